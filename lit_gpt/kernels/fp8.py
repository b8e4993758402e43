"""Matrix products of blocks in 8-bit floating point, by torchao: what it needs, and how a model is told to."""

from __future__ import annotations

from math import gcd

import torch.nn as nn

from lit_gpt.axes import layer_of, parameter_shapes
from lit_gpt.config import Config
from lit_gpt.kernels.backend import Need, Situation, cuda, first_missing, package

MULTIPLE = 16
"""Of which every size of an 8-bit product has to be one."""
INSTALL = "pip install 'lit-grow[fp8]'"


NEEDS: tuple[Need, ...] = (cuda((8, 9)), package("torchao", INSTALL))


def missing(situation: Situation) -> str | None:
    """The first thing that 8-bit products need of a machine and have not here; None if they can run.

    That a run computes in bf16 and compiles is for its settings to say.
    """
    return first_missing(NEEDS, situation)


def multiplies_in_fp8(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is the weight of a linear layer that `to_fp8` changes: of a block, in multiples of 16."""
    return layer_of(name) is not None and len(shape) == 2 and gcd(*shape, MULTIPLE) == MULTIPLE


def count_fp8(config: Config) -> tuple[int, int]:
    """Linear layers of blocks that `to_fp8` changes, and how many there are."""
    shapes = parameter_shapes(config)
    matrices = [name for name, shape in shapes.items() if layer_of(name) is not None and len(shape) == 2]
    return sum(multiplies_in_fp8(name, shapes[name]) for name in matrices), len(matrices)


def to_fp8(model: nn.Module, recipe: str) -> None:
    """Let linear layers of blocks multiply in 8 bits; weights, their names and dtypes stay as they are.

    Forward they cast input and weight to e4m3 where they use them, backward the gradient (to e5m2, or e4m3 by rows).
    Once per model, before it is compiled or sharded, and not where `weight_scale` masks weights.

    Args:
        model: a GPT.
        recipe: tensorwise, with one scale per tensor, or rowwise, with one per row, a power of two.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def is_changed(module: nn.Module, path: str) -> bool:
        assert getattr(module, "weight_scale", None) is None, "an 8-bit layer has no mask"
        return multiplies_in_fp8(f"{path}.weight", tuple(module.weight.shape))

    convert_to_float8_training(model, module_filter_fn=is_changed, config=Float8LinearConfig.from_recipe_name(recipe))
