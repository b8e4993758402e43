"""What came out of a comparison: the arms in order of their loss, with errors over seeds, and who differs from whom."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grow.compare.plan import seed_folder
from grow.compare.settings import FROM_SCRATCH, CompareConfig
from grow.curves import Curve, Evaluation, RunLog, default_window, read_run_log, smooth, speedup, training_curve
from lit_gpt.errors import DataError

CONFIDENCE = 0.95
UNEQUAL = 0.02  # arms whose FLOPs differ by more than this share are not quite comparable


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    stderr: float | None
    """Standard error of the mean; None for a single seed."""
    low: float | None
    """Ends of the interval by Student's t, of 95 % where nothing else is said."""
    high: float | None
    n: int


@dataclass(frozen=True)
class RankedArm:
    """One arm, over all seeds."""

    name: str
    loss: Estimate
    """Nats per token at the end."""
    losses: tuple[float, ...]
    """By seed."""
    spike: Estimate | None
    """Loss right after growth minus loss right before it; None for `scratch`."""
    behind_best: Estimate
    """Loss minus that of the first in the ranking, seed by seed. The interval is wide enough for all pairs of arms
    together (Bonferroni): the first is chosen for being lowest, and of many equal arms some pair always looks apart."""
    against_scratch: Estimate | None
    """Loss minus that of training from scratch, seed by seed; None without such an arm."""
    speedup: Estimate | None
    """FLOPs of scratch over those of this arm minus one, at equal training loss, over the seeds that have one."""
    speedup_is_bound: bool
    """Whether an arm was below the loss from its first point on, so that the true speed-up is at least this."""
    flops: float
    """Of the base and the probe, the mean over seeds."""

    @property
    def is_told_apart(self) -> bool:
        """Whether its interval of differences to the best leaves 0 out."""
        return self.behind_best.low is not None and self.behind_best.low > 0

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "is_told_apart": self.is_told_apart}


@dataclass(frozen=True)
class ArmCurve:
    """Smoothed training loss of an arm, the mean over seeds, where all seeds have one."""

    name: str
    curve: Curve


@dataclass(frozen=True)
class Ranking:
    """All arms, the lowest loss first."""

    arms: tuple[RankedArm, ...]
    measured: str
    """What the loss is of."""
    seeds: tuple[int, ...]
    curves: tuple[ArmCurve, ...]
    window_tokens: float
    """In which training losses are smoothed for curves and speed-ups."""
    notes: tuple[str, ...] = ()
    """What was left out of the logs, in sentences."""

    @property
    def unequal(self) -> list[RankedArm]:
        """Arms that cost more or less than the others: a teacher, gradients before growth, steps that do not divide."""
        usual = float(np.median([arm.flops for arm in self.arms]))
        return [arm for arm in self.arms if abs(arm.flops / usual - 1) > UNEQUAL]

    def to_dict(self) -> dict[str, Any]:
        return {
            "measured": self.measured,
            "seeds": list(self.seeds),
            "window_tokens": self.window_tokens,
            "arms": [arm.to_dict() for arm in self.arms],
            "notes": list(self.notes),
        }


def estimate(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Mean, standard error and interval of independent values."""
    from scipy.stats import t

    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(mean, None, None, None, n)
    stderr = float(np.std(values, ddof=1)) / math.sqrt(n)
    reach = float(t.ppf((1 + confidence) / 2, n - 1)) * stderr
    return Estimate(mean, stderr, mean - reach, mean + reach, n)


def rank(config: CompareConfig) -> Ranking:
    """Read what the runs left behind.

    Raises:
        DataError, OSError: a run is missing, is not at its end, or its log is damaged.
    """
    folders = {name: [seed_folder(config, seed) / name for seed in config.seeds] for name in config.arms}
    logs = {name: [read_run_log(folder) for folder in each] for name, each in folders.items()}
    set_name = _common_set(logs)
    ends = {
        name: [_final_loss(log, name, set_name, folder) for log, folder in zip(each, folders[name], strict=True)]
        for name, each in logs.items()
    }
    _check_same_text(logs, set_name)
    curves = {name: [_curve(log, name) for log in each] for name, each in logs.items()}
    window = default_window([curve for each in curves.values() for curve in each])
    smoothed = {name: [smooth(curve, window) for curve in each] for name, each in curves.items()}
    order = sorted(config.arms, key=lambda name: float(np.mean(ends[name])))
    arms = [_ranked(name, ends, logs[name], smoothed, order[0], set_name) for name in order]
    measured = f"validation loss on {set_name}" if set_name else "training loss, smoothed"
    means = tuple(ArmCurve(name, _mean_curve(smoothed[name])) for name in order)
    notes = tuple(note for each in logs.values() for log in each for note in log.notes)
    return Ranking(tuple(arms), measured, tuple(config.seeds), means, window, notes)


def _common_set(logs: dict[str, list[RunLog]]) -> str | None:
    """The first validation set that was measured at the end of any run; None: none was."""
    return next((e.set for runs in logs.values() for log in runs for e in log.evaluations if _is_final(e)), None)


def _check_same_text(logs: dict[str, list[RunLog]], set_name: str | None) -> None:
    """Losses of different tokens do not rank: data that was prepared anew, say, with another tokenizer."""
    found = {
        evaluation.data
        for runs in logs.values()
        for log in runs
        for evaluation in log.evaluations
        if _is_final(evaluation) and evaluation.set == set_name
    }
    if len(found) > 1:
        raise DataError(
            f"the runs were measured on {len(found)} different sets called {set_name}: data was changed between them; "
            f"compare in another out_dir"
        )


def _is_final(evaluation: Evaluation) -> bool:
    return (evaluation.metric, evaluation.when) == ("loss", "end")


def _final_loss(log: RunLog, name: str, set_name: str | None, folder: Path) -> float:
    if set_name is None:
        curve = _curve(log, name)
        return float(smooth(curve, default_window([curve])).loss[-1])
    found = [e.value for e in log.evaluations if _is_final(e) and (e.set, e.stage_name) == (set_name, name)]
    if not found:
        raise DataError(f"{folder} has not come to its end, or was not measured on {set_name}; repeat the command")
    return found[-1]


def _curve(log: RunLog, name: str) -> Curve:
    """Logged losses of an arm's last stage."""
    metrics = [metric for metric in log.metrics if metric.stage_name == name]
    if not metrics:
        raise DataError(f"no step of {name!r} was logged; lower logging.every_steps or lengthen the probe")
    before = [metric.tokens for metric in log.metrics if metric.stage < metrics[0].stage]
    return training_curve(metrics, before[-1] if before else 0)


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    """Point by point; the runs of an arm have the same steps."""
    shortest = min(len(curve) for curve in curves)
    parts = [np.mean([getattr(c, key)[-shortest:] for c in curves], axis=0) for key in ("tokens", "flops", "loss")]
    return Curve(parts[0].astype(np.int64), parts[1], parts[2])


def _ranked(
    name: str,
    ends: dict[str, list[float]],
    logs: Sequence[RunLog],
    smoothed: dict[str, list[Curve]],
    best: str,
    set_name: str | None,
) -> RankedArm:
    scratch = FROM_SCRATCH if FROM_SCRATCH in ends and name != FROM_SCRATCH else None
    found = [] if scratch is None else [speedup(a, b) for a, b in zip(smoothed[name], smoothed[scratch], strict=True)]
    measured = [each for each in found if each.speedup is not None]
    spikes = [] if set_name is None else [_spike(log, name, set_name) for log in logs]
    known = [each for each in spikes if each is not None]
    n_pairs = max(1, len(ends) * (len(ends) - 1) // 2)
    return RankedArm(
        name=name,
        loss=estimate(ends[name]),
        losses=tuple(ends[name]),
        spike=estimate(known) if known else None,
        behind_best=_difference(ends[name], ends[best], 1 - (1 - CONFIDENCE) / n_pairs),
        against_scratch=None if scratch is None else _difference(ends[name], ends[scratch]),
        speedup=estimate([each.speedup for each in measured]) if measured else None,
        speedup_is_bound=any(each.lower_bound for each in measured),
        flops=float(np.mean([log.metrics[-1].flops_total for log in logs])),
    )


def _difference(ours: Sequence[float], theirs: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    return estimate([a - b for a, b in zip(ours, theirs, strict=True)], confidence)


def _spike(log: RunLog, name: str, set_name: str) -> float | None:
    """What the arm's last growth did to the loss; None for one that did not grow."""
    losses = [e for e in log.evaluations if (e.metric, e.set) == ("loss", set_name)]
    for before, after in zip(losses, losses[1:], strict=False):
        if (after.when, after.stage_name) == ("after_growth", name):
            return after.value - before.value
    return None
