"""Validation loss, perplexity and bits per byte on named sets: every row once, in order, weighted by tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lit_gpt.kernels.loss import IGNORE_INDEX
from pretrain.data import ValidationSet


@dataclass(frozen=True)
class Evaluation:
    """What was measured on one set."""

    nats_per_token: float
    stderr: float | None
    """Standard error of nats_per_token over rows; None for a single row. Tokens within a row are not independent."""
    bits_per_byte: float | None
    """None when no counted token stands for text."""
    n_tokens: int
    limited: bool
    """Whether a part of the set was left out."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats_per_token, 700.0))


def _batches(rows: int, micro_batch_size: int) -> Iterator[np.ndarray]:
    for start in range(0, rows, micro_batch_size):
        yield np.arange(start, min(start + micro_batch_size, rows))


@torch.no_grad()
def evaluate(
    module: nn.Module,
    validation_set: ValidationSet,
    micro_batch_size: int,
    max_tokens: int | None,
    device: torch.device,
) -> Evaluation:
    """Measure a set. The result does not depend on micro_batch_size, except for the last bits of the sum.

    Bits per byte follow data.md: a target counts if its token stands for at least one byte of text.
    """
    source = validation_set.source
    block_size = source.block_size
    rows = source.n_samples if max_tokens is None else min(source.n_samples, max(1, max_tokens // block_size))
    row_nats: list[Tensor] = []
    text_nats, text_bytes = 0.0, 0
    for indices in _batches(rows, micro_batch_size):
        samples = source.read(indices)
        losses = _losses(module, samples, micro_batch_size, device)
        lengths = validation_set.byte_lengths[samples[:, 1:]]
        row_nats.append(losses.sum(1))
        text_nats += float(losses[torch.from_numpy(lengths > 0)].sum())
        text_bytes += int(lengths.sum())
    nats = torch.cat(row_nats) / block_size
    return Evaluation(
        nats_per_token=float(nats.mean()),
        stderr=float(nats.std() / math.sqrt(rows)) if rows > 1 else None,
        bits_per_byte=text_nats / (math.log(2) * text_bytes) if text_bytes else None,
        n_tokens=rows * block_size,
        limited=rows < source.n_samples,
    )


def _losses(module: nn.Module, samples: np.ndarray, micro_batch_size: int, device: torch.device) -> Tensor:
    """(n, block_size) float64 losses; a short batch is padded, so that compiled code sees one shape."""
    batch = np.full((micro_batch_size, samples.shape[1]), 0, dtype=np.int64)
    batch[: len(samples)] = samples
    rows = torch.from_numpy(batch).to(device)
    targets = rows[:, 1:].clone()
    targets[len(samples) :] = IGNORE_INDEX
    losses = module(rows[:, :-1], targets, reduction="none")
    return losses[: len(samples)].double().cpu()
