"""Matrix products in the dtype in which this machine makes them fast.

A CPU without bf16 instructions emulates a bf16 product: it widens the factors to fp32 and adds up in fp32, slowly.
Doing the same with its fp32 product gives the same numbers, but for the order of the sum, three to four times as fast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has AMX tiles or AVX512-bf16. Ask once, when a model is built: torch.compile cannot trace it."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def product_dtype(x: Tensor, cpu_has_bf16: bool) -> torch.dtype:
    """The dtype to widen the factors of a product to: x's own, or fp32 for bf16 on a CPU that would emulate it."""
    emulated = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not cpu_has_bf16
    return torch.float32 if emulated else x.dtype


def linear(x: Tensor, weight: Tensor, *, cpu_has_bf16: bool) -> Tensor:
    """x (..., K) times the transpose of weight (N, K), whose dtype may be another. Returns (..., N) in x's dtype."""
    dtype = product_dtype(x, cpu_has_bf16)
    return F.linear(x.to(dtype), weight.to(x.dtype).to(dtype)).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, cpu_has_bf16: bool, mask: Tensor | None = None) -> Tensor:
    """q (B, H, T, D), k and v (B, H, S, D) with S >= T: query t sees the keys up to S - T + t. Returns (B, H, T, D).

    mask: (B, 1, T, S) bool, what each query sees, instead of that; see `document_mask`.
    """
    dtype = product_dtype(q, cpu_has_bf16)
    T, S = q.size(2), k.size(2)
    if mask is None and T not in (1, S):
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    y = F.scaled_dot_product_attention(
        q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask, is_causal=mask is None and T > 1
    )
    return y.to(q.dtype)


def document_mask(tokens: Tensor, separator_id: int) -> Tensor:
    """tokens (B, T). Returns (B, 1, T, T) bool: a token sees itself and those before it in its own document.

    A separator ends its document. With rotary positions nothing else has to change: only distances matter.
    """
    ends = (tokens == separator_id).long()
    document = ends.cumsum(1) - ends  # (B, T)
    return (document.unsqueeze(2) == document.unsqueeze(1)).tril().unsqueeze(1)
