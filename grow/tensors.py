"""One tensor of a grown model at a time, weights or moments, made from a plan and the source's tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from grow.plan import GrowthPlan
from lit_gpt.axes import EMBEDDING, parameter_shapes
from lit_gpt.model import init_std, init_tensor


def grown_weight(plan: GrowthPlan, name: str, weights: Mapping[str, Tensor]) -> Tensor:
    """The parameter `name` of the grown model, with storage of its own.

    Args:
        plan: what to do.
        name: of a parameter of the grown model.
        weights: name -> tensor of the source; only what the parameter starts from is read.

    Returns:
        A tensor of the shape that `parameter_shapes(plan.dst)` gives, in dtype and on the device of its source; those
        of a new layer are in dtype and on the device of the embedding.
    """
    shape = parameter_shapes(plan.dst)[name]
    source = plan.source_of(name)
    if source is not None:
        grown = weights[source].clone()
    else:
        like = weights[EMBEDDING]
        if plan.is_silenced(name):
            grown = torch.zeros(shape, dtype=like.dtype, device=like.device)
        else:
            grown = init_tensor(name, plan.dst, plan.seed).to(dtype=like.dtype, device=like.device)
    return with_noise(grown, plan, name) if plan.noise and len(shape) == 2 else grown


def with_noise(weight: Tensor, plan: GrowthPlan, name: str) -> Tensor:
    """(1 - noise) * weight + noise * fresh weights of the initial distribution: arXiv 2405.15319, appendix I.2."""
    fresh = torch.empty(weight.shape, dtype=torch.float32)
    fresh.normal_(0.0, init_std(name, plan.dst), generator=generator(plan.seed, "noise", name))
    wide = weight.to(compute_dtype(weight.dtype))
    return wide.mul(1 - plan.noise).add(fresh.to(wide), alpha=plan.noise).to(weight.dtype)


def grown_moments(
    plan: GrowthPlan, name: str, moments: Mapping[str, Mapping[str, Tensor]], *, from_zero: bool = False
) -> dict[str, Tensor]:
    """The optimizer state of the parameter `name` of the grown model.

    Args:
        plan: what was done to the weights.
        name: of a parameter of the grown model.
        moments: of the source, parameter name -> "exp_avg", "exp_avg_sq" (shaped like the parameter), "step" (scalar).
        from_zero: forget them: zeros and step 0. Parameters without a source start so in any case.

    Returns:
        The same keys as the source has.
    """
    source = plan.source_of(name)
    if source is None:
        shape = parameter_shapes(plan.dst)[name]
        like = moments[EMBEDDING]
        return {
            key: torch.zeros(shape if value.dim() else (), dtype=value.dtype, device=value.device)
            for key, value in like.items()
        }
    return {key: torch.zeros_like(value) if from_zero else value.clone() for key, value in moments[source].items()}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products with weights of this dtype are computed in; they are cast back last."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def generator(seed: int, purpose: str, name: str) -> torch.Generator:
    """The stream of random numbers for one purpose of one parameter, so that any process can make any part."""
    key = hashlib.sha256(f"{seed}/{purpose}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
