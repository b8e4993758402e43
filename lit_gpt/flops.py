"""Parameter counts and FLOPs per token: the three conventions in use, under names of their own."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import prod

from lit_gpt.axes import EMBEDDING, HEAD, parameter_shapes
from lit_gpt.config import Config


@dataclass(frozen=True)
class Flops:
    """Floating-point operations in three conventions; per token, or summed over a run."""

    paper: float = 0
    """6 x all parameters, both embedding matrices in (a tied one once): the axis of arXiv 2405.15319."""
    model: float = 0
    """6 x parameters that are multiplied + causal attention: what is really needed."""
    palm: float = 0
    """6 x parameters that are multiplied + 12 n_layer n_head head_size block_size (arXiv 2204.02311, appendix B):
    the convention behind most published MFU figures."""

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.paper + other.paper, self.model + other.model, self.palm + other.palm)

    def times(self, tokens: float) -> Flops:
        return Flops(self.paper * tokens, self.model * tokens, self.palm * tokens)


def count_parameters(config: Config) -> int:
    """All parameters; a tied head is counted once."""
    return sum(prod(shape) for shape in parameter_shapes(config).values())


def count_non_embedding(config: Config) -> int:
    """All parameters but the embedding and the head."""
    shapes = parameter_shapes(config)
    return sum(prod(shape) for name, shape in shapes.items() if name not in (EMBEDDING, HEAD))


def count_matmul_parameters(config: Config) -> int:
    """Parameters that take part in a matrix product: blocks and head, not the looked-up embedding, not the norms."""
    shapes = parameter_shapes(config)
    in_blocks = sum(prod(shape) for name, shape in shapes.items() if len(shape) == 2 and name not in (EMBEDDING, HEAD))
    return in_blocks + config.padded_vocab_size * config.n_embd


def flops_per_token(config: Config) -> Flops:
    """Training FLOPs (forward and backward) for one token of a full block."""
    matmul = 6 * count_matmul_parameters(config)
    full_attention = 12 * config.n_layer * config.n_head * config.head_size * config.block_size
    return Flops(paper=6 * count_parameters(config), model=matmul + full_attention // 2, palm=matmul + full_attention)


def computed_share(config: Config, frozen: Collection[str]) -> float:
    """Share of a training step's FLOPs in the paper's convention that is computed when some parameters are frozen.

    Forward takes 2 per parameter, the gradient of a weight 2 where it trains, and that of a layer's input 2 from the
    lowest trained parameter on upwards.
    """
    sizes = {name: prod(shape) for name, shape in parameter_shapes(config).items()}
    total = sum(sizes.values())
    trained = [name for name in sizes if name not in frozen]
    if not trained:
        return 1 / 3
    names = list(sizes)  # in the order in which they act
    reached = sum(sizes[name] for name in names[names.index(trained[0]) :])
    return (total + sum(sizes[name] for name in trained) + reached) / (3 * total)
