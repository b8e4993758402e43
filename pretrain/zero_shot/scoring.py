"""Log-likelihoods of rows of tokens, batched by length; the same numbers for every batch size, up to rounding.

Legend: B rows of a batch, T tokens, N scored tokens of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lit_gpt.errors import NonFiniteError
from lit_gpt.kernels.loss import IGNORE_INDEX
from pretrain.world import ALONE, World
from pretrain.zero_shot.encoding import Row

LOG_PROB, MISSES = range(2)
"""Columns of scores: log-probabilities in nats, or their sum; tokens that were not the likeliest."""

TokenScores = Callable[[Tensor, Tensor], Tensor]
"""idx, targets (B, T) -> (N, 2), the columns above for the N targets that count, row by row."""


@torch.no_grad()
def token_scores(model: nn.Module, idx: Tensor, targets: Tensor) -> Tensor:
    """What a `GPT` says of the targets that count, see `lit_gpt.kernels.loss.token_scores`. idx, targets: (B, T).

    Through its forward, where sharded weights are gathered, and which a growth that is being learned has, too.
    """
    return model(idx, targets, reduction="scores")


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
    table = np.zeros((len(rows), 2))  # by rows: each is one process's, so that sums are the same for every number
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number].tokens))  # what fills memory comes first
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for turn in range(math.ceil(len(batches) / world.size)):
        if interrupted():
            return None
        number = turn * world.size + world.rank
        batch = [rows[each] for each in batches[min(number, len(batches) - 1)]]
        found = _score_batch(batch, scores, device)
        if number < len(batches):
            table[order[number * batch_size : (number + 1) * batch_size]] = found
    table = world.sum(table)
    if not np.isfinite(table).all():
        raise NonFiniteError("the model's log-likelihoods are not finite numbers; it diverged, or overflows its dtype")
    requests = np.array([row.request for row in rows])
    found = np.zeros((requests.max() + 1, 2))
    np.add.at(found, requests, table)
    return found


def _score_batch(batch: Sequence[Row], scores: TokenScores, device: torch.device | str) -> np.ndarray:
    """(B, 2) float64. Rows are filled up on the right, where no scored token sees it."""
    length = max(len(row.tokens) for row in batch) - 1
    idx = np.zeros((len(batch), length), dtype=np.int64)
    targets = np.full_like(idx, IGNORE_INDEX)
    for i, row in enumerate(batch):
        k = len(row.tokens) - 1
        idx[i, :k] = row.tokens[:-1]
        targets[i, k - row.n_scored : k] = row.tokens[1:][k - row.n_scored :]
    values = scores(torch.from_numpy(idx).to(device), torch.from_numpy(targets).to(device)).double().cpu().numpy()
    starts = np.cumsum([0, *(row.n_scored for row in batch[:-1])])
    return np.add.reduceat(values, starts, axis=0)
