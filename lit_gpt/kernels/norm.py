"""Root-mean-square norm (arXiv 1910.07467) with statistics in fp32 or wider.

Legend: C channels, the last dimension of x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.kernels import reference
from lit_gpt.kernels.backend import Backend, Situation, at_most_fp32, triton_runs
from lit_gpt.kernels.triton_ops import MAX_COLS, triton_add_rms_norm, triton_rms_norm


class Norm(NamedTuple):
    """A norm, and the same after adding to the residual stream."""

    alone: Callable[[Tensor, Tensor, float], Tensor]
    """x (..., C), weight (C,), eps -> (..., C)."""
    after_adding: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    """x, delta (..., C), weight (C,), eps -> x + delta and the norm of that."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight. x (..., C), weight (C,) of any dtype. Returns (..., C) in x's dtype."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _RMSNorm.apply(x, weight, eps)
    # fused by torch on CUDA, and everywhere when compiled; it wants the weight in x's dtype and computes in fp32 inside
    return F.rms_norm(x, (x.size(-1),), weight.to(x.dtype), eps)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, and the norm of that. x, delta (..., C), weight (C,). Returns both, (..., C)."""
    total = x + delta
    return total, rms_norm(total, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """In few passes over x: torch composes this norm of a dozen operations on a CPU, three dozen with the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        unit = wide * scale
        ctx.save_for_backward(unit, scale, weight)
        return (unit * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, scale, weight = ctx.saved_tensors
        wide, weight = grad.to(unit.dtype), weight.to(unit.dtype)
        along = (wide * unit).flatten(0, -2)  # (rows, C)
        mean = (along @ weight).div_(weight.numel()).view(scale.shape)
        grad_x = (wide * weight).addcmul_(unit, mean, value=-1).mul_(scale)
        return grad_x.to(grad.dtype), along.sum(0), None


def _not_too_wide(situation: Situation) -> str | None:
    if situation.n_embd <= MAX_COLS:
        return None
    return f"norms at most {MAX_COLS} channels together, this model has {situation.n_embd}"


BACKENDS: dict[str, Backend[Norm]] = {
    "torch": Backend(Norm(rms_norm, add_rms_norm)),
    "triton": Backend(Norm(triton_rms_norm, triton_add_rms_norm), (at_most_fp32, _not_too_wide, triton_runs)),
    "reference": Backend(Norm(reference.rms_norm, reference.add_rms_norm)),
}
