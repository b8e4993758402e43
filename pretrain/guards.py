"""Steps that would do harm are not made: a loss or gradient that is no number, and, where asked for, a spike.

The update is skipped inside fused AdamW (`found_inf`, the door of its gradient scaler): weights, moments and step
counters stay to the bit, and nobody waits for the device to say so. Only accepted values enter the window that spikes
are measured against; it goes into checkpoints, so that a resumed run judges as one that was not stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lit_gpt.errors import NonFiniteError
from pretrain.config import GuardConfig

NOTHING_SKIPPED: Mapping[str, Any] = MappingProxyType(
    {"window": [], "in_a_row": 0, "total": 0, "first_step": 0, "loss_sum": 0.0, "loss_count": 0}
)


class Diverged(NonFiniteError):
    """Too many steps in a row were skipped."""

    def __init__(self, first_step: int, last_step: int) -> None:
        super().__init__(f"steps {first_step} to {last_step} were skipped")
        self.first_step = first_step
        """Number of the first of them, counted from 1 as in metrics.jsonl."""
        self.last_step = last_step


class GivenUp(NonFiniteError):
    """A run that diverged, with what to do about it."""

    def __init__(self, message: str, skip: tuple[int, int] | None) -> None:
        super().__init__(message)
        self.skip = skip
        """For data.skips: the samples of the skipped steps; None if the order cannot leave samples out."""


class Guard:
    """Judges every step by its loss and gradient norm, on the training device."""

    def __init__(self, settings: GuardConfig, device: torch.device, state: Mapping[str, Any] = NOTHING_SKIPPED) -> None:
        """Continue from `state`, what `to_dict` gave."""
        self.settings = settings
        self._window = torch.full((2, settings.window_steps), torch.nan, dtype=torch.float64, device=device)
        accepted = torch.tensor(state["window"], dtype=torch.float64).reshape(-1, 2)[-settings.window_steps :]
        if len(accepted):
            self._window[:, -len(accepted) :] = accepted.T
        self._in_a_row, self._total, self._first_step = (
            torch.tensor(state[key], device=device) for key in ("in_a_row", "total", "first_step")
        )
        self._loss_sum = torch.tensor(state["loss_sum"], dtype=torch.float64, device=device)
        self._loss_count = torch.tensor(state["loss_count"], device=device)

    def judge(self, loss: Tensor, grad_norm: Tensor, step: int) -> Tensor:
        """Whether step number `step` is to be skipped: fp32, 1 or 0, for `found_inf`; nothing is waited for.

        loss, grad_norm: scalars, the same on every process.
        """
        values = torch.stack([loss.detach(), grad_norm.detach()]).double()
        bad = ~values.isfinite().all() | self._is_spike(values)
        moved = torch.cat([self._window[:, 1:], values[:, None]], dim=1)
        self._window = torch.where(bad, self._window, moved)
        self._in_a_row = torch.where(bad, self._in_a_row + 1, 0)
        self._total = self._total + bad
        self._first_step = torch.where(self._in_a_row == 1, step, self._first_step)
        self._loss_sum = torch.where(bad, self._loss_sum, self._loss_sum + values[0])
        self._loss_count = self._loss_count + ~bad
        return bad.float()

    def _is_spike(self, values: Tensor) -> Tensor:
        """Above mean + k sigma of the accepted steps in the window, once the window is full."""
        if self.settings.spike_sigmas is None:
            return torch.zeros((), dtype=torch.bool, device=values.device)
        mean, sigma = self._window.mean(dim=1), self._window.std(dim=1)
        return (values > mean + self.settings.spike_sigmas * sigma).any()  # never while the window holds a NaN

    @property
    def total(self) -> int:
        """Steps skipped so far; waits for the device."""
        return int(self._total)

    def take_mean_loss(self) -> float | None:
        """The mean loss of the steps made since the last call; None if none was. Waits for the device."""
        count, total = int(self._loss_count), float(self._loss_sum)
        self._loss_sum, self._loss_count = torch.zeros_like(self._loss_sum), torch.zeros_like(self._loss_count)
        return total / count if count else None

    def check(self, step: int) -> None:
        """After step number `step`; waits for the device.

        Raises:
            Diverged: as many steps in a row were skipped as the settings allow.
        """
        if int(self._in_a_row) >= self.settings.max_skipped_steps:
            raise Diverged(int(self._first_step), step)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for state.json."""
        accepted = self._window.T[~self._window.isnan().any(dim=0)]
        return {
            "window": accepted.tolist() if self.settings.spike_sigmas is not None else [],
            "in_a_row": int(self._in_a_row),
            "total": self.total,
            "first_step": int(self._first_step),
            "loss_sum": float(self._loss_sum),
            "loss_count": int(self._loss_count),
        }
