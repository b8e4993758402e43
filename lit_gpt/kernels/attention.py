"""Causal attention over query groups, by whichever implementation is chosen.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_gpt.kernels.backend import (
    Backend,
    Need,
    Situation,
    cuda,
    half_precision,
    head_size,
    no_mask,
    package,
)
from lit_gpt.kernels.products import product_dtype
from lit_gpt.kernels.settings import BackendUnavailable

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""q (B, H, T, D), k and v (B, G, S, D), mask (B or 1, 1, T, S) bool -> (B, H, T, D).

Without a mask T is S and a query sees the keys up to its own, or T is 1 and it sees all.
"""

CUDNN_AT_LEAST = 91501  # with older ones torch itself does not prefer it


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """torch's scaled_dot_product_attention, which picks a kernel by itself."""
    if q.size(1) != k.size(1):
        k, v = (t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v))  # (B, H, S, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.size(2) > 1)


def sdpa_by(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`sdpa` by one kernel of torch and no other."""
    with sdpa_kernel(kernel):
        return sdpa(q, k, v, mask)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The package flash-attn 2 (arXiv 2307.08691), which wants (B, T, H, D) and knows groups."""
    from flash_attn import flash_attn_func

    refuse_mask("flash_attn", mask)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return flash_attn_func(q, k, v, causal=q.size(1) > 1).transpose(1, 2)


def xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """memory_efficient_attention of the package xformers (arXiv 2112.05682), which wants (B, T, H, D)."""
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    refuse_mask("xformers", mask)
    k, v = (t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return memory_efficient_attention(q, k, v, LowerTriangularMask() if q.size(1) > 1 else None).transpose(1, 2)


def refuse_mask(backend: str, mask: Tensor | None) -> None:
    """For what `resolve` could not know: nothing is left out in silence."""
    if mask is not None:
        raise BackendUnavailable(f"kernels.attention={backend!r} knows no mask, and there is one; use sdpa or math")


def activate(implementation: str) -> None:
    """Put FlashAttention 3 or 4 in the place of torch's own flash kernel, for this process."""
    from torch.nn.attention import activate_flash_attention_impl

    activate_flash_attention_impl(implementation)


def knows(implementation: str) -> Need:
    """A torch that can put it in the place of its own."""

    def need(_: Situation) -> str | None:
        if implementation in torch.nn.attention.list_flash_attention_impls():
            return None
        return f"needs a torch that knows {implementation}, this is {torch.__version__}; install a newer one"

    return need


def cudnn_is_new(situation: Situation) -> str | None:
    if situation.cudnn is not None and situation.cudnn >= CUDNN_AT_LEAST:
        return None
    found = "none" if situation.cudnn is None else cudnn_text(situation.cudnn)
    return f"needs cuDNN {cudnn_text(CUDNN_AT_LEAST)} or newer, found {found}; install a newer torch"


def cudnn_text(version: int) -> str:
    """`91501` -> `9.15.1`."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _flash(device: Need, *more: Need) -> tuple[Need, ...]:
    """What flash kernels have in common."""
    return (device, half_precision, no_mask, head_size(256), *more)


BACKENDS: dict[str, Backend[Attention]] = {
    "sdpa": Backend(sdpa),
    "cudnn": Backend(
        partial(sdpa_by, SDPBackend.CUDNN_ATTENTION),
        (cuda((8, 0)), half_precision, no_mask, head_size(128), cudnn_is_new),
    ),
    "flash": Backend(partial(sdpa_by, SDPBackend.FLASH_ATTENTION), _flash(cuda((8, 0)))),
    "fa3": Backend(
        partial(sdpa_by, SDPBackend.FLASH_ATTENTION),
        _flash(
            cuda((9, 0), majors=(9,)),
            knows("FA3"),
            package("flash_attn_interface", "pip install flash-attn-3 --index-url of PyTorch's wheels"),
        ),
        partial(activate, "FA3"),
    ),
    "fa4": Backend(
        partial(sdpa_by, SDPBackend.FLASH_ATTENTION),
        _flash(
            cuda((9, 0), majors=(9, 10)),
            knows("FA4"),
            package("flash_attn.cute.interface", "pip install --pre flash-attn-4"),
        ),
        partial(activate, "FA4"),
    ),
    "flash_attn": Backend(
        flash_attn,
        _flash(cuda((8, 0)), package("flash_attn", "pip install 'lit-grow[flash-attn]' --no-build-isolation")),
    ),
    "xformers": Backend(xformers, (cuda((7, 5)), no_mask, package("xformers.ops", "pip install 'lit-grow[xformers]'"))),
    "math": Backend(partial(sdpa_by, SDPBackend.MATH)),
}


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, cpu_has_bf16: bool, mask: Tensor | None = None, by: Attention = sdpa
) -> Tensor:
    """q (B, H, T, D), k and v (B, G, S, D) with S >= T: query t sees the keys up to S - T + t. Returns (B, H, T, D).

    mask: (B or 1, 1, T, S) bool, what each query sees, instead of that; see `document_mask`.
    """
    dtype = product_dtype(q, cpu_has_bf16)
    T, S = q.size(2), k.size(2)
    if mask is None and T not in (1, S):
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return by(q.to(dtype), k.to(dtype), v.to(dtype), mask).to(q.dtype)


def document_mask(tokens: Tensor, separator_id: int) -> Tensor:
    """tokens (B, T). Returns (B, 1, T, T) bool: a token sees itself and those before it in its own document.

    A separator ends its document. With rotary positions nothing else has to change: only distances matter.
    """
    ends = (tokens == separator_id).long()
    document = ends.cumsum(1) - ends  # (B, T)
    return (document.unsqueeze(2) == document.unsqueeze(1)).tril().unsqueeze(1)


def window_mask(
    window: int | None, first_position: int, length: int, mask: Tensor | None, device: torch.device
) -> Tensor | None:
    """(1 or B, 1, T, S) bool: a token sees the last `window` ones, itself included, as far as `mask` lets it.

    `mask` itself where the window has no effect. T = length, S = first_position + length.
    """
    end = first_position + length
    if window is None or end <= window:
        return mask
    queries = torch.arange(first_position, end, device=device)[:, None]
    keys = torch.arange(end, device=device)
    seen = ((keys <= queries) & (keys > queries - window))[None, None]
    return seen if mask is None else seen & mask
