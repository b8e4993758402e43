"""Masks of random growth: new parts start closed, so that the function is kept, and open while training goes on.

In depth a new layer adds c times what attention and MLP write, in width every vector that is produced (embedding, q, k,
v, what proj, w1, w2 and w3 give) is multiplied by 1 where it is old and by c where it is new (arXiv 2405.15319,
appendix A; arXiv 2305.02869). Either is a scale on rows or columns of weights, so a masked model is the plain model
with scaled weights: names and shapes stay, and at c = 1 nothing is left of the mask. c depends on the step alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import mul

import torch
from torch import Tensor

from grow.plan import GrowthPlan
from grow.width_tensors import widening
from lit_gpt.axes import EMBD, EMBEDDING, HEADS, INTERMEDIATE, QKV, axes_of, layer_of, name_in_block, parameter_shapes

LAYERS = "layers"
PHASES: dict[str, tuple[tuple[str, ...], ...]] = {
    "together": ((LAYERS, INTERMEDIATE, EMBD, HEADS),),
    "in-turn": ((LAYERS, INTERMEDIATE), (EMBD,), (HEADS,)),
}
"""What opens at once, phase after phase: all of it (arXiv 2405.15319), or one kind after the other (prts's `msg`)."""
DEFAULT_STEPS = 5000  # prts's grow_step


@dataclass(frozen=True)
class MaskSchedule:
    """How new parts open, step by step."""

    steps: int
    """Optimizer steps of one phase, over which its c rises linearly to 1."""
    phases: str = "together"
    """One of PHASES."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"mask_steps={self.steps} must be at least 1; 0 leaves the mask out")
        if self.phases not in PHASES:
            raise ValueError(f"unknown mask_phases {self.phases!r}; known: {', '.join(PHASES)}")

    @property
    def total_steps(self) -> int:
        return self.steps * len(PHASES[self.phases])

    def openness(self, stage_step: int) -> dict[str, float]:
        """c of every kind of new part in the step after `stage_step` finished ones.

        The first phase starts above 0, where new parameters would get no gradient.
        """
        return {
            part: min(1.0, max(0.0, (stage_step + 1 - phase * self.steps) / self.steps))
            for phase, parts in enumerate(PHASES[self.phases])
            for part in parts
        }


def mask_scales(plan: GrowthPlan, openness: Mapping[str, float]) -> dict[str, Tensor]:
    """What every masked weight is multiplied by.

    Args:
        plan: the growth; its new layers, channels, heads and neurons are masked.
        openness: c of each kind of them.

    Returns:
        Parameter name -> fp32 factor that broadcasts over the weight: (rows, 1), (1, columns) or (rows, columns).
        Parameters that nothing masks are left out.

    Raises:
        ValueError: a model that would undo the masks.
    """
    if plan.dst.norm_placement == "after":
        raise ValueError(
            f"masks scale what attention and MLP write, and {plan.dst.family} norms it afterwards; grow without a mask"
        )
    outputs, proj_inputs = _new_outputs(plan, openness)
    scales = {}
    for name, shape in parameter_shapes(plan.dst).items():
        if len(shape) != 2:
            continue
        factors = []
        if name == EMBEDDING and EMBD in outputs:
            factors.append(outputs[EMBD][None, :])
        elif axes_of(name)[0] in outputs:
            factors.append(outputs[axes_of(name)[0]][:, None])
        if name_in_block(name) == "attn.proj.weight" and proj_inputs is not None:
            factors.append(proj_inputs[None, :])
        if axes_of(name)[0] == EMBD and _is_new_layer(plan, name):
            factors.append(torch.full((1, 1), openness[LAYERS]))
        if factors:
            scales[name] = reduce(mul, factors)
    return scales


def _is_new_layer(plan: GrowthPlan, name: str) -> bool:
    layer = layer_of(name)
    return layer is not None and plan.layer_map[layer] is None


def _new_outputs(plan: GrowthPlan, openness: Mapping[str, float]) -> tuple[dict[str, Tensor], Tensor | None]:
    """Factors of the outputs along each axis, and of proj's inputs; only of axes that have something new."""
    if plan.width is None:
        return {}, None
    axes = widening(plan.width, plan.src, plan.dst).axes
    kinds = {EMBD: EMBD, INTERMEDIATE: INTERMEDIATE, QKV: HEADS}
    outputs = {
        axis: _factors(axes[axis].new, openness[kind]) for axis, kind in kinds.items() if bool(axes[axis].new.any())
    }
    # a new query head beside old keys attends evenly over live values: its output is masked, not its query alone
    proj_inputs = _factors(axes[HEADS].new, openness[HEADS]) if None in plan.width.slots else None
    return outputs, proj_inputs


def _factors(new: Tensor, c: float) -> Tensor:
    return torch.where(new, torch.tensor(c), torch.tensor(1.0))
