"""Log-likelihoods of rows of tokens, batched by length; the same numbers for every batch size, up to rounding.

Legend: B rows of a batch, T tokens, C n_embd, V padded_vocab_size, N scored tokens of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.errors import NonFiniteError
from lit_gpt.kernels.loss import CHUNK_ROWS, IGNORE_INDEX, loss_dtype
from lit_gpt.model import GPT
from pretrain.world import ALONE, World
from pretrain.zero_shot.encoding import Row

LOG_PROB, MISSES = range(2)
"""Columns of scored rows: the sum of log-probabilities in nats; tokens that were not the likeliest."""

TokenScores = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""idx, targets (B, T) -> for the N targets that count, row by row: log-probabilities, and which are the likeliest."""


@torch.no_grad()
def token_scores(model: GPT, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N,) of the targets that count, in at least fp32, and (N,) bool: which are the likeliest.

    The head, most of a small model's work, is computed for those alone. idx, targets: (B, T) int64; -100 does not
    count.
    """
    counted = targets != IGNORE_INDEX
    hidden, labels = model.hidden(idx)[counted], targets[counted]  # (N, C), (N,)
    log_probs, hits = [], []
    for part, wanted in zip(hidden.split(CHUNK_ROWS), labels.split(CHUNK_ROWS), strict=True):
        logits = model.lm_head(part)
        log_probs.append(-F.cross_entropy(logits.to(loss_dtype(logits.dtype)), wanted, reduction="none"))
        hits.append(logits.argmax(-1) == wanted)
    return torch.cat(log_probs), torch.cat(hits)


def score(
    rows: Sequence[Row],
    scores: TokenScores,
    batch_size: int,
    device: torch.device | str,
    world: World = ALONE,
    interrupted: Callable[[], bool] = lambda: False,
) -> np.ndarray | None:
    """(n_requests, 2) float64, the columns above, summed over each request's rows; None: interrupted.

    Args:
        rows: of requests 0 to n - 1, each with one or more.
        scores: what the model says of a batch, e.g. `partial(token_scores, model)`.
        batch_size: rows at a time; those of a batch are about equally long.
        device: of the model.
        world: the processes that take turns, batch by batch; all compute equally many, as sharded models demand.
        interrupted: asked before every batch; must answer the same on all processes.

    Raises:
        NonFiniteError: a log-likelihood is not a finite number.
    """
    table = np.zeros((max(row.request for row in rows) + 1, 2))
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number].tokens))  # what fills memory comes first
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for turn in range(math.ceil(len(batches) / world.size)):
        if interrupted():
            return None
        number = turn * world.size + world.rank
        batch = [rows[each] for each in batches[min(number, len(batches) - 1)]]
        found = _score_batch(batch, scores, device)
        if number < len(batches):
            np.add.at(table, [row.request for row in batch], found)
    table = world.sum(table)
    if not np.isfinite(table).all():
        raise NonFiniteError("the model's log-likelihoods are not finite numbers; it diverged, or overflows its dtype")
    return table


def _score_batch(batch: Sequence[Row], scores: TokenScores, device: torch.device | str) -> np.ndarray:
    """(B, 2) float64. Rows are filled up on the right, where no scored token sees it."""
    length = max(len(row.tokens) for row in batch) - 1
    idx = np.zeros((len(batch), length), dtype=np.int64)
    targets = np.full_like(idx, IGNORE_INDEX)
    for i, row in enumerate(batch):
        k = len(row.tokens) - 1
        idx[i, :k] = row.tokens[:-1]
        targets[i, k - row.n_scored : k] = row.tokens[1:][k - row.n_scored :]
    log_probs, hits = scores(torch.from_numpy(idx).to(device), torch.from_numpy(targets).to(device))
    values = np.stack((log_probs.double().cpu().numpy(), ~hits.cpu().numpy()))  # (2, N)
    starts = np.cumsum([0, *(row.n_scored for row in batch[:-1])])
    return np.add.reduceat(values, starts, axis=1).T
