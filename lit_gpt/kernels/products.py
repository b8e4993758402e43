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


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for it."""
    if device.type == "cuda":  # without what torch counts as well: sm_70 and sm_75 emulate it
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_multiplies_bf16()


def product_dtype(x: Tensor, cpu_has_bf16: bool) -> torch.dtype:
    """The dtype to widen the factors of a product to: x's own, or fp32 for bf16 on a CPU that would emulate it."""
    emulated = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not cpu_has_bf16
    return torch.float32 if emulated else x.dtype


def linear(x: Tensor, weight: Tensor, *, cpu_has_bf16: bool) -> Tensor:
    """x (..., K) times the transpose of weight (N, K), whose dtype may be another. Returns (..., N) in x's dtype."""
    dtype = product_dtype(x, cpu_has_bf16)
    return F.linear(x.to(dtype), weight.to(x.dtype).to(dtype)).to(x.dtype)
