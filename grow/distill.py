"""Distillation: a grown or new model learns from the smaller one as well as from the data (knowledge inheritance)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_gpt.kernels.loss import IGNORE_INDEX, loss_dtype
from lit_gpt.model import GPT

CHUNK_ROWS = 1024  # rows of logits, of both models, that exist at a time


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """-sum softmax(teacher) log softmax(student), at temperature 1.

    student, teacher: (n, V) logits. Returns (n,) nats: the entropy of the teacher where the two agree, else more.
    """
    dtype = loss_dtype(student.dtype)
    return -(teacher.to(dtype).softmax(-1) * F.log_softmax(student.to(dtype), dim=-1)).sum(-1)


class Distillation(nn.Module):
    """A student whose loss is a mixture of its own cross-entropy and of that against a teacher's probabilities.

    The loss of prts's `distill` (soft targets of the small model, temperature 1) at soft_share=1; after "Knowledge
    Inheritance" (arXiv 2105.13880). The teacher has no gradient and is no part of the student's state dict.

    Raises:
        ValueError: the two have different vocabularies, or a share outside [0, 1].
    """

    def __init__(self, student: GPT, teacher: GPT, soft_share: float = 1.0) -> None:
        super().__init__()
        rows = student.config.padded_vocab_size, teacher.config.padded_vocab_size
        if rows[0] != rows[1]:
            raise ValueError(
                f"the teacher has {rows[1]} embedding rows, the student {rows[0]}; they need one vocabulary"
            )
        if not 0 <= soft_share <= 1:
            raise ValueError(f"distill_weight={soft_share} must be in [0, 1]: it is the teacher's share of the loss")
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        self.soft_share = soft_share

    def forward(self, idx: Tensor, targets: Tensor, *, separator_id: int | None = None) -> Tensor:
        """idx, targets: (B, T) int64, see `GPT.forward`. Returns the mean loss, a scalar in nats."""
        with torch.no_grad():
            known = self.teacher.hidden(idx, separator_id=separator_id).flatten(0, 1)
        hidden = self.student.hidden(idx, separator_id=separator_id).flatten(0, 1)
        counts = targets.flatten() != IGNORE_INDEX
        total = sum(
            checkpoint(self._chunk, *chunk, use_reentrant=False)
            for chunk in zip(
                *(part.split(CHUNK_ROWS) for part in (hidden, known, targets.flatten(), counts)), strict=True
            )
        )
        return total / counts.sum().clamp(min=1)

    def _chunk(self, hidden: Tensor, known: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
        """Summed loss of some rows; their logits are made again in backward, so that they never exist as a whole."""
        logits = self.student.lm_head(hidden)
        with torch.no_grad():
            soft_targets = self.teacher.lm_head(known)
        losses = self.soft_share * soft_cross_entropy(logits, soft_targets)
        if self.soft_share < 1:
            wide = logits.to(loss_dtype(logits.dtype))
            losses = losses + (1 - self.soft_share) * F.cross_entropy(
                wide, targets, ignore_index=IGNORE_INDEX, reduction="none"
            )
        return (losses * counts).sum()
