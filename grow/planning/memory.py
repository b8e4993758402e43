"""How much memory training takes on each device, roughly: what `pretrain` keeps under FSDP2 in mixed precision.

Legend: T tokens of a micro-batch, C n_embd, F intermediate_size, V padded_vocab_size, L n_layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from lit_gpt.axes import EMBEDDING, HEAD, layer_of, parameter_shapes
from lit_gpt.config import Config
from lit_gpt.flops import count_parameters

RECOMPUTE = ("none", "selective", "full")
"""Values of pretrain's activation_checkpointing."""
CHUNK_ROWS = 1024  # rows of logits that exist at a time, see lit_gpt/kernels/loss.py
FP32, BF16 = 4, 2


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: float
    """fp32."""
    gradients: float
    """fp32."""
    moments: float
    """AdamW's two, fp32."""
    gathered: float
    """bf16 copies: of what is whole at a time, with one block's fp32 gradients; on one device of all weights."""
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.moments + self.gathered + self.activations


def memory_per_device(config: Config, devices: int, micro_batch_size: int, recompute: str) -> Memory:
    """Of training with fp32 weights, bf16 computation and everything sharded over `devices`.

    Workspaces of kernels, fragmentation and the framework itself (about 1 GB) are not in it.

    Args:
        config: sizes of the model.
        devices: over which weights, gradients and moments are sharded.
        micro_batch_size: sequences at a time on one device.
        recompute: one of RECOMPUTE.
    """
    share = count_parameters(config) / devices
    sizes = {name: prod(shape) for name, shape in parameter_shapes(config).items()}
    block = sum(size for name, size in sizes.items() if layer_of(name) == 0)
    ends = sizes[EMBEDDING] + sizes.get(HEAD, 0)
    if devices == 1:
        gathered = BF16 * count_parameters(config)  # every product keeps its copy for backward
    else:
        gathered = BF16 * (ends + 2 * block) + FP32 * block  # the next block is fetched ahead
    tokens = micro_batch_size * config.block_size
    activations = tokens * config.n_layer * BF16 * saved_per_token(config, recompute)
    if recompute == "full":
        activations += tokens * BF16 * saved_per_token(config, "none")  # of the block that is made again
    logits = min(CHUNK_ROWS, tokens) * config.padded_vocab_size * (FP32 + BF16)
    return Memory(FP32 * share, FP32 * share, 2 * FP32 * share, gathered, activations + logits)


def saved_per_token(config: Config, recompute: str) -> int:
    """Numbers that one layer keeps per token for its backward pass.

    none: what goes into the two norms and comes out of them (4 C); rotated q and k, and v, where k and v are repeated
    for every query head, or else q, k and v and the rotated ones; what attention gives; gate, silu of it, up projection
    and product (4 F). That is what an eager layer saves; a compiled one makes some of it again. full: the layer's input
    alone. selective: that, and the results of matrix products and of attention.
    """
    heads = config.n_head * config.head_size
    if recompute == "full":
        return config.n_embd
    if recompute == "selective":
        return 3 * config.n_embd + config.qkv_size + heads + 2 * config.intermediate_size
    into_attention = 3 * heads if config.q_per_kv > 1 else config.qkv_size + 2 * heads
    return 4 * config.n_embd + into_attention + heads + 4 * config.intermediate_size


@dataclass(frozen=True)
class Device:
    """What the maker's data sheet says."""

    flops_per_sec: float
    """Dense bf16 matrix products."""
    memory_bytes: float


DEVICES = {
    "a100-40g": Device(312e12, 40e9),
    "a100": Device(312e12, 80e9),
    "h100": Device(989e12, 80e9),
    "h200": Device(989e12, 141e9),
    "b200": Device(2250e12, 180e9),
    "l40s": Device(362e12, 48e9),
    "mi300x": Device(1307e12, 192e9),
    "rtx4090": Device(165e12, 24e9),
}
