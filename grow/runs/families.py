"""Families of runs that began alike, and the budgets and losses that a law is fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from grow.curves import Curve, default_window, smooth, validation_curve
from grow.runs.gather import Gathered
from grow.runs.trained_model import TrainedModel

SCRATCH, CONTINUED = "scratch", "continued"
POINTS = ("final", "every")
LOSSES = ("train", "validation")


@dataclass(frozen=True)
class Family:
    """Runs that began in the same way."""

    name: str
    """`scratch`, the growth operator, or `continued`: a checkpoint's weights without growth."""
    models: tuple[str, ...]
    flops: np.ndarray
    """(n,) budgets, base models included."""
    loss: np.ndarray
    """(n,)"""


def family_of(model: TrainedModel) -> str | None:
    """Its family; None for bases, whose training was cut short, and where FLOPs behind it are not counted."""
    if model.is_base or not model.flops_are_whole:
        return None
    if model.role == "grown":
        return model.operator or "grown"
    return CONTINUED if model.role == "continued" else SCRATCH


def left_out(gathered: Gathered, found: Sequence[Family]) -> list[str]:
    """A sentence for each reason for which models are no points of a law."""
    fitted = {name for family in found for name in family.models}
    reasons: dict[str, list[str]] = {}
    for model in gathered.models:
        if model.name not in fitted:
            reasons.setdefault(_why_left_out(model), []).append(model.name)
    return [f"Left out, because {reason}: {', '.join(names)}." for reason, names in reasons.items()]


def _why_left_out(model: TrainedModel) -> str:
    if model.is_base:
        return "a base's training is cut short"
    if not model.flops_are_whole:
        return "nobody wrote down the FLOPs behind the checkpoint that the run began with"
    return "there is no such loss"


def over_last_tenth(model: TrainedModel) -> Curve:
    """Training losses, averaged over the last tenth of the run (at least two log intervals) before every point."""
    return smooth(model.curve, default_window([model.curve]))


def families(
    gathered: Gathered,
    *,
    points: str = "final",
    loss: str = "train",
    smoothed: Callable[[TrainedModel], Curve] = over_last_tenth,
) -> list[Family]:
    """All families, scratch first.

    Args:
        gathered: the runs.
        points: "final" takes the last loss of every run, "every" all of them.
        loss: "train" takes the training loss, "validation" those on the first set of each run, its start left out.
        smoothed: makes the curve of training losses of a model.
    """
    by_name: dict[str, list[tuple[str, Curve]]] = {}
    for model in sorted(gathered.models, key=lambda model: family_of(model) != SCRATCH):
        name, curve = family_of(model), smoothed(model) if loss == "train" else _validation(model)
        if name is not None and curve is not None:
            by_name.setdefault(name, []).append((model.name, curve))
    return [_family(name, members, points) for name, members in by_name.items()]


def _validation(model: TrainedModel) -> Curve | None:
    sets = [evaluation.set for evaluation in model.evaluations if evaluation.metric == "loss"]
    after_start = [e for e in model.evaluations if e.when not in ("start", "after_growth")]
    return validation_curve(after_start, sets[0]) if sets else None


def _family(name: str, members: Iterable[tuple[str, Curve]], points: str) -> Family:
    chosen = slice(-1, None) if points == "final" else slice(None)
    parts = [(model, curve.flops[chosen], curve.loss[chosen]) for model, curve in members]
    flops, loss = (np.concatenate([part[place] for part in parts]) for place in (1, 2))
    return Family(name, tuple(model for model, _, _ in parts), flops, loss)
