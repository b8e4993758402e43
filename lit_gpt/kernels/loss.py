"""Linear layer and cross-entropy in one, a chunk of rows at a time, so that the logits never exist as a whole.

Legend: N rows (tokens), n rows of one chunk, C n_embd, V padded_vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.kernels import reference
from lit_gpt.kernels.backend import Backend, at_most_fp32, triton_runs
from lit_gpt.kernels.triton_ops import triton_chunk_loss

CHUNK_ROWS = 1024  # 125 MiB of logits at V=32000 in fp32; larger outputs are bound by page faults on a CPU
CPU_CHUNK_ROWS = 128  # at V=4096 2 MiB, which a cache holds: benchmarks/training.py
IGNORE_INDEX = -100
ChunkLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
LinearCrossEntropy = Callable[..., Tensor]
"""hidden (N, C), weight (V, C), targets (N,), and by keyword `reduction` -> a loss, see `linear_cross_entropy`."""


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """Losses are computed in fp32, or in float64 for float64 weights."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits (n, V), targets (n,) -> losses (n,) and their gradients (n, V) with respect to the logits.

    Rows whose target does not count hold finite numbers that the caller drops. torch.compile fuses this function.
    """
    log_probs = F.log_softmax(logits.to(loss_dtype(logits.dtype)), dim=-1)
    picked = targets.clamp(min=0)[:, None]
    losses = -log_probs.gather(1, picked).squeeze(1)
    grads = log_probs.exp_()
    return losses, grads.scatter_add_(1, picked, grads.new_full(picked.shape, -1.0)).to(logits.dtype)


def default_chunk_rows(hidden: Tensor, weight: Tensor) -> int:
    """Few where the cache of a CPU counts, but not so few that adding a chunk's part to the weight's gradient does."""
    adds_in_place = hidden.dtype == loss_dtype(weight.dtype)
    if hidden.device.type != "cpu" or not adds_in_place:
        return CHUNK_ROWS
    return min(max(hidden.size(1) // 2, CPU_CHUNK_ROWS), CHUNK_ROWS)


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (m, n) += a (m, k) @ b (k, n), without a temporary where the dtypes are the same."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    else:
        total += a @ b


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Mean loss. The gradients are made in forward, while a chunk's logits are there, and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int, kernel: ChunkLoss
    ) -> Tensor:
        cast_weight = weight.to(hidden.dtype)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=loss_dtype(weight.dtype)) if wants_weight else None
        valid = (targets != IGNORE_INDEX).to(hidden.dtype)
        total = torch.zeros((), dtype=loss_dtype(hidden.dtype), device=hidden.device)
        space = hidden.new_empty(min(chunk_rows, len(targets)), len(weight))  # each chunk's logits replace the last
        for start in range(0, len(targets), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = torch.mm(hidden[rows], cast_weight.t(), out=space[: len(targets[rows])])
            losses, grad_logits = kernel(logits, targets[rows])
            total += (losses * valid[rows]).sum()
            # rows that do not count are masked on the narrow side, C wide, not on the V wide logits
            if grad_hidden is not None:
                torch.mm(grad_logits, cast_weight, out=grad_hidden[rows]).mul_(valid[rows, None])
            if grad_weight is not None:
                add_product_(grad_weight, grad_logits.t(), hidden[rows] * valid[rows, None])
        count = (targets != IGNORE_INDEX).sum().clamp(min=1)
        ctx.save_for_backward(grad_hidden, grad_weight, count)
        ctx.weight_dtype = weight.dtype
        return total / count

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight, count = ctx.saved_tensors
        scale = grad_loss / count
        if grad_hidden is not None:
            grad_hidden = grad_hidden * scale.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    reduction: str = "mean",
    chunk_rows: int | None = None,
    kernel: ChunkLoss = chunk_loss,
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T` against `targets` in nats, without the (N, V) logits.

    Args:
        hidden: (N, C).
        weight: (V, C).
        targets: (N,) int64; -100 is left out of the loss, a batch of nothing else has loss 0.
        reduction: "mean" over the targets that count, differentiable; or "none", (N,) losses without gradients.
        chunk_rows: rows of logits that exist at a time. Default: `default_chunk_rows`.
        kernel: `chunk_loss`, or another form of it. It may return the gradients in the memory of the logits.

    Returns:
        fp32 (float64 for float64 inputs).

    Raises:
        ValueError: an unknown reduction.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction={reduction!r} must be 'mean' or 'none'")
    chunk_rows = chunk_rows or default_chunk_rows(hidden, weight)
    if reduction == "mean" and torch.is_grad_enabled():
        return _ChunkedLinearCrossEntropy.apply(hidden, weight, targets, chunk_rows, kernel)
    with torch.no_grad():
        cast_weight = weight.to(hidden.dtype)
        parts = zip(hidden.split(chunk_rows), targets.split(chunk_rows), strict=True)
        losses = [kernel(F.linear(part, cast_weight), labels)[0] for part, labels in parts]
        losses = torch.cat(losses).masked_fill(targets == IGNORE_INDEX, 0.0)
        return losses if reduction == "none" else losses.sum() / (targets != IGNORE_INDEX).sum().clamp(min=1)


@torch.no_grad()
def token_scores(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """What a model says of the targets that count: how probable they are, and whether it would have written others.

    The head, most of a small model's work, is computed for those alone.

    Args:
        hidden: (B, T, C).
        targets: (B, T) int64; -100 does not count.
        head: (n, C) -> logits (n, V).

    Returns:
        (N, 2) for the N targets that count, row by row: log-probabilities in nats, and 1 where another token is
        likelier, else 0. fp32, or float64 for float64 logits.
    """
    counted = targets != IGNORE_INDEX
    scores = []
    for part, wanted in zip(hidden[counted].split(CHUNK_ROWS), targets[counted].split(CHUNK_ROWS), strict=True):
        logits = head(part)
        log_probs = -F.cross_entropy(logits.to(loss_dtype(logits.dtype)), wanted, reduction="none")
        scores.append(torch.stack((log_probs, (logits.argmax(-1) != wanted).to(log_probs.dtype)), dim=1))
    return torch.cat(scores)


def compiled(loss: LinearCrossEntropy) -> LinearCrossEntropy:
    """The same loss with what torch.compile can fuse compiled: of the chunked one what happens to a chunk's logits."""
    if loss is linear_cross_entropy:
        return partial(loss, kernel=torch.compile(chunk_loss, dynamic=False))
    if loss is reference.linear_cross_entropy:
        return torch.compile(loss, dynamic=False)
    return loss


BACKENDS: dict[str, Backend[LinearCrossEntropy]] = {
    "chunked": Backend(linear_cross_entropy),
    "torch": Backend(reference.linear_cross_entropy),
    "triton": Backend(partial(linear_cross_entropy, kernel=triton_chunk_loss), (at_most_fp32, triton_runs)),
}
