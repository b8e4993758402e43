"""Rotary position embedding (arXiv 2104.09864), half-split: channel t turns with channel t + n/2.

Legend: B batch, T tokens, H heads, D head size, n rotated channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_gpt.kernels import reference
from lit_gpt.kernels.backend import Backend, at_most_fp32, triton_runs
from lit_gpt.kernels.triton_ops import triton_rope

Rope = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x (B, T, H, D), cos and sin (T, 1, n) -> (B, T, H, D)."""


def cos_sin(angles: Tensor) -> tuple[Tensor, Tensor]:
    """What `apply_rope` takes, made of angles (T, n/2): cos, and sin with the sign it has in each half, (T, 1, n)."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).unsqueeze(1), torch.cat((-sin, sin), dim=-1).unsqueeze(1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first n channels of x (B, T, H, D) in the dtype of cos and sin (T, 1, n); the others stay."""
    rotate = _rotate if torch.compiler.is_compiling() else _Rotation.apply  # the compiler saves the passes by itself
    n = cos.size(-1)
    if n == x.size(-1):
        return rotate(x, cos, sin)
    return torch.cat((rotate(x[..., :n], cos, sin), x[..., n:]), dim=-1)


class _Rotation(torch.autograd.Function):
    """The gradient is the rotation back; autograd would keep more tensors and go over them more often."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(cos.dtype)
    partner = wide.roll(cos.size(-1) // 2, dims=-1)
    return (wide * cos).addcmul_(partner, sin).to(x.dtype)


BACKENDS: dict[str, Backend[Rope]] = {
    "torch": Backend(apply_rope),
    "triton": Backend(triton_rope, (at_most_fp32, triton_runs)),
    "reference": Backend(reference.rope),
}
