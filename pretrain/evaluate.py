"""Validation loss, perplexity and bits per byte on named sets: every target once, the same number on any world size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lit_gpt.kernels.loss import IGNORE_INDEX
from pretrain.held_out import ValidationSet
from pretrain.world import ALONE, World

TARGETS, NATS, TEXT_NATS, TEXT_BYTES = range(4)
"""Columns of a table of measured rows: targets, their loss, the loss of those that stand for text, and its bytes."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured on one set."""

    nats_per_token: float
    stderr: float | None
    """Standard error of nats_per_token over rows; None for a single row. Tokens within a row are not independent."""
    bits_per_byte: float | None
    """None when no counted token stands for text, or nobody knows whether it does."""
    n_tokens: int
    limited: bool
    """Whether a part of the set was left out."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats_per_token, 700.0))


def evaluate(
    module: nn.Module,
    validation_set: ValidationSet,
    micro_batch_size: int,
    max_tokens: int | None,
    device: torch.device,
    world: World = ALONE,
    interrupted: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Measure a set on all ranks; every rank gets the same result, to the bit for every number of ranks.

    It does not depend on micro_batch_size, except for the last bits. `interrupted` is asked before every batch and must
    answer the same on all ranks; None when it says so.
    """
    n_rows = validation_set.rows_within(max_tokens)
    table = measure(module, validation_set, micro_batch_size, n_rows, device, world.rank, world.size, interrupted)
    if table is None:
        return None
    return summarise(world.sum(table), limited=n_rows < validation_set.n_rows)


@torch.no_grad()
def measure(
    module: nn.Module,
    validation_set: ValidationSet,
    micro_batch_size: int,
    n_rows: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    interrupted: Callable[[], bool] = lambda: False,
) -> np.ndarray | None:
    """(n_rows, 4) float64: the columns above for the rows of one rank, 0 for those of the others; None: interrupted.

    Ranks take turns by batches, not by rows: a row is then computed in the same batch for every number of ranks, and
    so to the same bits. All ranks compute equally many batches, as sharded models demand.
    """
    table = np.zeros((n_rows, 4))
    turns = math.ceil(math.ceil(n_rows / micro_batch_size) / world_size)
    for turn in range(turns):
        if interrupted():
            return None
        start = (turn * world_size + rank) * micro_batch_size
        rows = np.arange(start, max(start, min(start + micro_batch_size, n_rows)))
        samples, targets = validation_set.read(rows)
        losses = _losses(module, samples, targets, micro_batch_size, device, validation_set.separator_id)
        table[rows, TARGETS] = targets
        table[rows, NATS] = losses.sum(1)
        if validation_set.byte_lengths is not None:
            counted = np.arange(losses.shape[1]) < targets[:, None]
            lengths = np.where(counted, validation_set.byte_lengths[samples[:, 1:]], 0)
            table[rows, TEXT_NATS] = np.where(lengths > 0, losses, 0.0).sum(1)
            table[rows, TEXT_BYTES] = lengths.sum(1)
    return table


def summarise(table: np.ndarray, limited: bool) -> Evaluation:
    """One result from the rows of all ranks. Bits per byte: a target counts if it stands for at least one byte."""
    targets, nats, text_nats, text_bytes = (float(column) for column in table.sum(0))
    return Evaluation(
        nats_per_token=nats / targets,
        stderr=ratio_stderr(table[:, NATS], table[:, TARGETS]),
        bits_per_byte=text_nats / (math.log(2) * text_bytes) if text_bytes else None,
        n_tokens=int(targets),
        limited=limited,
    )


def ratio_stderr(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """Standard error of sums.sum() / counts.sum() over n > 1 independent rows, None for a single one.

    (n,) each; rows need not be equally large. With counts of 1 it is a mean's; of a share sqrt(p (1 - p) / (n - 1)).
    """
    n, total = len(sums), float(counts.sum())
    if n < 2:
        return None
    deviations = sums - float(sums.sum()) / total * counts
    return math.sqrt(float((deviations**2).sum()) * n / (n - 1)) / total


def _losses(
    module: nn.Module,
    samples: np.ndarray,
    targets: np.ndarray,
    micro_batch_size: int,
    device: torch.device,
    separator_id: int | None,
) -> np.ndarray:
    """(k, block_size) float64 losses, 0 behind a row's last target. A short batch is padded: compiled code sees one
    shape."""
    batch = torch.zeros((micro_batch_size, samples.shape[1]), dtype=torch.int64)
    batch[: len(samples)] = torch.from_numpy(samples)
    labels: Tensor = torch.full_like(batch[:, 1:], IGNORE_INDEX)
    for row, count in enumerate(targets.tolist()):
        labels[row, :count] = batch[row, 1 : count + 1]
    losses = module(batch[:, :-1].to(device), labels.to(device), reduction="none", separator_id=separator_id)
    return losses[: len(samples)].double().cpu().numpy()
