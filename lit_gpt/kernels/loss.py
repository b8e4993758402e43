"""Linear layer and cross-entropy in one, a chunk of rows at a time, so that the logits never exist as a whole.

Legend: N rows (tokens), C n_embd, V padded_vocab_size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ROWS = 1024  # a chunk of logits at V=32000 in fp32 is 125 MiB; larger chunks are bound by page faults on a CPU
IGNORE_INDEX = -100


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """Losses are computed in fp32, or in float64 for float64 weights."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunk_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (n, C), weight (V, C), targets (n,) -> losses (n,), logits (n, V), log-sum-exp (n,)."""
    logits = F.linear(hidden, weight).to(loss_dtype(hidden.dtype))
    log_sum = torch.logsumexp(logits, -1)
    picked = logits.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    return (log_sum - picked) * (targets != IGNORE_INDEX), logits, log_sum


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Mean loss. The gradients are made in forward, while a chunk's logits are there, and scaled in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
        count = (targets != IGNORE_INDEX).sum().clamp(min=1)
        cast_weight = weight.to(hidden.dtype)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=loss_dtype(weight.dtype)) if wants_weight else None
        total = torch.zeros((), dtype=loss_dtype(hidden.dtype), device=hidden.device)
        for rows in torch.arange(len(targets)).split(chunk_rows):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            losses, logits, log_sum = _chunk_losses(hidden[part], cast_weight, targets[part])
            total += losses.sum()
            if not (wants_hidden or wants_weight):
                continue
            valid = targets[part] != IGNORE_INDEX
            grad_logits = logits.sub_(log_sum[:, None]).exp_()
            grad_logits.scatter_add_(1, targets[part].clamp(min=0)[:, None], -valid[:, None].to(grad_logits.dtype))
            grad_logits = grad_logits.mul_((valid / count)[:, None]).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, cast_weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total / count

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, reduction: str = "mean", chunk_rows: int = CHUNK_ROWS
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T` against `targets` in nats, without the (N, V) logits.

    Args:
        hidden: (N, C).
        weight: (V, C).
        targets: (N,) int64; -100 is left out of the loss, a batch of nothing else has loss 0.
        reduction: "mean" over the targets that count, differentiable; or "none", (N,) losses without gradients.
        chunk_rows: rows of logits that exist at a time.

    Returns:
        fp32 (float64 for float64 inputs).
    """
    if reduction == "mean":
        return _ChunkedLinearCrossEntropy.apply(hidden, weight, targets, chunk_rows)
    if reduction != "none":
        raise ValueError(f"reduction={reduction!r} must be 'mean' or 'none'")
    with torch.no_grad():
        cast_weight = weight.to(hidden.dtype)
        parts = zip(hidden.split(chunk_rows), targets.split(chunk_rows), strict=True)
        return torch.cat([_chunk_losses(part, cast_weight, labels)[0] for part, labels in parts])


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same mean loss the plain way: all logits at once. The oracle of the tests."""
    logits = F.linear(hidden, weight.to(hidden.dtype)).to(loss_dtype(hidden.dtype))
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX)
