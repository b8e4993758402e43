"""Every operation the plain way, in fp32 or wider: what the others are compared with, and the shortest to read.

Legend: B batch, T tokens, S keys, H heads, G groups, D head size, C channels, n rotated channels, N rows, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same in fp32, or in float64 where one of them is that."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return tuple(t.to(dtype) for t in tensors)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v. q (B, H, T, D), k and v (B, G, S, D); mask (B or 1, 1, T, S) bool, or causal.

    Returns (B, H, T, D) in q's dtype.
    """
    T, S, repeats = q.size(2), k.size(2), q.size(1) // k.size(1)
    wide_q, wide_k, wide_v = wide(q, k, v)
    wide_k, wide_v = (t.repeat_interleave(repeats, dim=1) for t in (wide_k, wide_v))
    scores = wide_q @ wide_k.transpose(2, 3) / q.size(3) ** 0.5
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T) if mask is None else mask
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ wide_v).to(q.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight. x (..., C), weight (C,). Returns (..., C) in x's dtype."""
    wide_x, wide_weight = wide(x, weight)
    return (wide_x * (wide_x.square().mean(-1, keepdim=True) + eps).rsqrt() * wide_weight).to(x.dtype)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, and the norm of that. x, delta (..., C), weight (C,). Returns both, (..., C)."""
    total = x + delta
    return total, rms_norm(total, weight, eps)


def gated(gate: Tensor, up: Tensor, gelu: bool = False) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202), or gelu by its tanh formula. gate, up (..., F). Returns (..., F)."""
    wide_gate, wide_up = wide(gate, up)
    active = F.gelu(wide_gate, approximate="tanh") if gelu else F.silu(wide_gate)
    return (active * wide_up).to(gate.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channel t of the first n turns with channel t + n/2. x (B, T, H, D); cos and sin (T, 1, n) of `cos_sin`."""
    n = cos.size(-1)
    turned, rest = x[..., :n].to(cos.dtype), x[..., n:]
    partner = torch.cat((turned[..., n // 2 :], turned[..., : n // 2]), dim=-1)
    return torch.cat(((turned * cos + partner * sin).to(x.dtype), rest), dim=-1)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of hidden (N, C) @ weight.T (C, V) against targets (N,), all logits at once.

    Targets of -100 do not count. Returns a scalar, or (N,) with reduction "none"; in fp32, or float64 for float64.
    """
    logits, _ = wide(F.linear(hidden, weight.to(hidden.dtype)), weight)
    losses = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    return losses if reduction == "none" else losses.sum() / (targets != -100).sum().clamp(min=1)
