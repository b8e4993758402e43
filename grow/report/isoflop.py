"""IsoFLOP figures: loss at equal FLOPs against growth timing d and growth factor g, with parabolas in the logarithm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grow.curves import Curve, loss_at
from grow.fit import Parabola, fit_parabola
from grow.report import text
from grow.report.axes import SEQUENCE, chart, rounded, with_axes
from grow.report.compare import Comparisons
from grow.runs.gather import Gathered
from grow.runs.trained_model import TrainedModel

N_BUDGETS = 5
SAME = 0.02  # timings and sizes that differ by less count as equal
ZERO_AT = 4.0  # d = 0 is drawn at the smallest d over this


@dataclass(frozen=True)
class Sweep:
    """Grown models of one size that differ in one thing, and one from scratch."""

    what: str
    """ "d" or "g"."""
    fixed: str
    """What they have in common, in words."""
    members: tuple[tuple[float, TrainedModel], ...]
    """Value and model, in order; from scratch is d = 0, or g = 1. Runs that repeat a value are all here."""


WORDS = {
    "d": ("growth timing", "growth timing d, tokens of the base", "tokens"),
    "g": ("growth factor", "growth factor g", "factor"),
}


def isoflop_charts(
    gathered: Gathered, comparisons: Comparisons
) -> tuple[list[dict[str, Any]], list[dict[str, str]], list[dict[str, Any]]]:
    """The charts of both kinds, what is missing for them, and the optimum of every parabola."""
    charts: list[dict[str, Any]] = []
    missing, optima = [], []
    for what in WORDS:
        drawn = []
        for number, sweep in enumerate(sweeps(gathered, what), 1):
            found, lowest = _isoflop(sweep, comparisons, number, gathered.unit)
            drawn += [found] if found else []
            optima += lowest
        charts += drawn
        if not drawn:
            other = "factor" if what == "d" else "timing"
            needs = f"runs of one size and operator that grew at three or more {WORDS[what][0]}s and share the {other}"
            missing.append(
                {"figure": f"IsoFLOP against {WORDS[what][0]}", "needs": f"{needs}, with FLOPs that overlap"}
            )
    return charts, missing, optima


def sweeps(gathered: Gathered, what: str) -> list[Sweep]:
    """Groups of grown models with three or more different values of `what` and all else equal, the data too."""
    groups: dict[tuple[Any, ...], list[tuple[float, float, TrainedModel]]] = {}
    for model in gathered.of_role("grown"):
        if model.single_growth is None or model.parameters is None:
            continue
        d, g = model.single_growth
        value, other = (d, g) if what == "d" else (g, d)
        groups.setdefault((model.operator, *_setting(model)), []).append((value, other, model))
    found = []
    for (operator, *setting), members in groups.items():
        scratch = [model for model in gathered.of_role("baseline") if _setting(model) == tuple(setting)]
        zero = [(0.0 if what == "d" else 1.0, model) for model in scratch]
        for alike in _alike(members, 1):
            ours = sorted(((value, model) for value, _, model in alike), key=lambda member: member[0])
            if len(_alike([*(zero if what == "g" else ()), *ours], 0)) >= 3:
                found.append(Sweep(what, _in_words(operator, alike[0][2], what), (*zero, *ours)))
    return found


def _setting(model: TrainedModel) -> tuple[Any, ...]:
    """What models must share to differ in growth alone."""
    return model.parameters, model.tokenizer, frozenset(model.data_fingerprints.items())


def _alike(members: Sequence[tuple[Any, ...]], place: int) -> list[list[tuple[Any, ...]]]:
    """Groups, in order, whose numbers at `place` are at most SAME above the lowest of the group."""
    groups: list[list[tuple[Any, ...]]] = []
    for member in sorted(members, key=lambda member: member[place]):
        if groups and member[place] <= groups[-1][0][place] * (1 + SAME):
            groups[-1].append(member)
        else:
            groups.append([member])
    return groups


def _in_words(operator: str | None, model: TrainedModel, what: str) -> str:
    common = f"g = {model.growth_factor:g}" if what == "d" else f"d = {text.count(model.grown_after_tokens)} tokens"
    return f"{operator}, {text.count(model.parameters)} parameters, {common}"


def _isoflop(
    sweep: Sweep, comparisons: Comparisons, number: int, unit: str
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    curves = [(value, comparisons.smoothed(model)) for value, model in sweep.members]
    budgets = _budgets([curve for _, curve in curves])
    if budgets is None:
        return None, []
    name, label, quantity = WORDS[sweep.what]
    zero = min(value for value, _ in curves if value > 0) / ZERO_AT if curves[0][0] == 0 else None
    series: list[dict[str, Any]] = []
    optima = []
    for place, flops in enumerate(budgets):
        found, parabola = _budget_series(curves, flops, zero, SEQUENCE + place)
        series += found
        optima.append({"sweep": sweep.fixed, "what": sweep.what, "flops": flops, "optimum": parabola.optimum})
    drawn = chart(
        f"isoflop-{'timing' if sweep.what == 'd' else 'factor'}{'' if number == 1 else f'-{number}'}",
        "laws",
        f"Loss at equal FLOPs against {name}",
        series,
        caption=_caption(sweep, optima),
        quantity=quantity,
        x_label=label,
        y_label=f"training loss, {unit}",
        log=["x"],
        legend=True,
        zero=zero,
    )
    return with_axes(drawn), optima


def _budgets(curves: Sequence[Curve]) -> list[float] | None:
    """Budgets that every curve covers, evenly spaced in the logarithm; None where there are none."""
    low, high = max(curve.flops[0] for curve in curves), min(curve.flops[-1] for curve in curves)
    return [float(flops) for flops in np.geomspace(low, high, N_BUDGETS)] if low < high else None


def _budget_series(
    curves: Sequence[tuple[float, Curve]], flops: float, zero: float | None, style: int
) -> tuple[list[dict[str, Any]], Parabola]:
    """Losses at one budget and the parabola through those that have a logarithm."""
    measured = [(value, loss_at(curve, flops)) for value, curve in curves]
    measured = [(value, loss) for value, loss in measured if loss is not None]
    with_log = [(value, loss) for value, loss in measured if value > 0]
    parabola = fit_parabola(*zip(*with_log, strict=True))
    ends = with_log[0][0], with_log[-1][0]
    line = np.geomspace(*ends, 40)
    common = {"name": f"{text.flops(flops)} FLOPs", "role": "budget", "style": style}
    marks = [[rounded(value or zero or 0.0), rounded(loss)] for value, loss in measured]
    found = [
        {**common, "kind": "marks", "points": marks},
        {**common, "kind": "fit", "points": [[rounded(x), rounded(float(parabola.at(x)))] for x in line]},
    ]
    if parabola.optimum is not None:
        lowest = [rounded(parabola.optimum), rounded(float(parabola.at(parabola.optimum)))]
        found.append({**common, "kind": "stars", "points": [lowest]})
    return found, parabola


def _caption(sweep: Sweep, optima: Sequence[dict[str, Any]]) -> str:
    write = text.count if sweep.what == "d" else "{:.2g}".format
    lowest = [f"{write(each['optimum'])} at {text.flops(each['flops'])} FLOPs" for each in optima if each["optimum"]]
    best = f"Lowest: {', '.join(lowest)}." if lowest else "No parabola has its lowest point between the runs."
    has_zero = sweep.members[0][0] == 0
    zero = " From scratch is d = 0: drawn at the axis, not fitted." if has_zero else ""
    one = " From scratch is g = 1." if sweep.members[0][0] == 1 else ""
    return f"{sweep.fixed}. Lines: parabolas in the logarithm; stars: their lowest points. {best}{zero}{one}"
