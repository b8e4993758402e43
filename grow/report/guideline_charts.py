"""Eq. 2 and eq. 50 of arXiv 2405.15319 over the budget, a curve per size, and what grew: its figures 9 and 22."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grow.planning.guideline import (
    FACTOR,
    FITTED_FLOPS,
    FITTED_PARAMETERS,
    fitted_growth_factor,
    growth_timing,
    short,
)
from grow.report.axes import LOOKS, SEQUENCE, SEQUENCE_LENGTH, chart, rounded, solid, with_axes
from grow.runs.gather import Gathered

SIZES = (0.41e9, 1.1e9, 3e9, 5e9)
SPAN = (5e19, 2e22)  # FLOPs, at least
N_BUDGETS = 120
TIMING_TOP = 45.0  # eq. 2 leaves every scale at the small end
FACTOR_TOP = 26.0
PLAIN = 7  # the grey look


@dataclass(frozen=True)
class Grown:
    """A model that grew once, or is to."""

    name: str
    parameters: float
    """N."""
    flops: float
    """C, the base's included."""
    timing: float
    """d, tokens of the base."""
    factor: float
    """g."""

    @property
    def within_reach(self) -> bool:
        """Whether eq. 2 gives a base of fewer tokens than training from scratch would have."""
        return growth_timing(self.parameters, self.flops) < self.flops / (6 * self.parameters)


def charts_of_runs(gathered: Gathered) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Both charts with the models that grew once, or what is missing for them."""
    grown = []
    for model in gathered.of_role("grown"):
        growth = model.single_growth
        if growth is not None and model.parameters is not None and model.flops_are_whole:
            grown.append(Grown(model.name, model.parameters, float(model.end.flops_total), *growth))
    grown = [each for each in grown if each.within_reach]
    if grown:
        return guideline_charts(grown), []
    needs = (
        "a run that grew once, of a size and budget for which eq. 2 gives a base of fewer tokens than training from "
        "scratch has: from about 6e18 FLOPs on for 0.1 B parameters, 1.2e20 for 1 B"
    )
    return [], [{"figure": "Growth timing and factor by the paper's rules", "needs": needs}]


def guideline_charts(grown: Sequence[Grown]) -> list[dict[str, Any]]:
    """Both rules, dashed outside what they were fitted to, and where the models lie."""
    timing = _chart(
        "guideline-timing",
        "When to grow: eq. 2",
        "growth timing d, billions of tokens",
        grown,
        lambda parameters, flops: growth_timing(parameters, flops) / 1e9,
        [each.timing / 1e9 for each in grown],
        TIMING_TOP,
    )
    factor = _chart(
        "guideline-factor",
        "By how much to grow: eq. 50",
        "growth factor g",
        grown,
        fitted_growth_factor,
        [each.factor for each in grown],
        FACTOR_TOP,
        recommended=FACTOR,
    )
    return [timing, factor]


def _chart(
    name: str,
    title: str,
    y_label: str,
    grown: Sequence[Grown],
    rule: Callable[[float, float], float],
    values: Sequence[float],
    top: float,
    recommended: float | None = None,
) -> dict[str, Any]:
    low = min(SPAN[0], *(each.flops / 2 for each in grown))
    high = max(SPAN[1], *(each.flops * 2 for each in grown))
    budgets = np.geomspace(low, high, N_BUDGETS)
    series: list[dict[str, Any]] = []
    for place, parameters in enumerate(sorted({*SIZES, *(each.parameters for each in grown)})):
        series += _curves(parameters, budgets, rule, place)
    if recommended is not None:
        ends = [[rounded(at), recommended] for at in (low, high)]
        series.append(_series(f"recommended: {recommended:g}", "fit", PLAIN, ends))
    for each, value in zip(grown, values, strict=True):
        series.append(_series(each.name, "marks", PLAIN, [[rounded(each.flops), rounded(value)]]))
    drawn = chart(
        name,
        "laws",
        title,
        series,
        caption=(
            "Lines: the rule for N parameters, solid at the sizes and budgets that eq. 2 was fitted to. "
            f"Dots: {_named(grown)}."
        ),
        x_label="budget C, FLOPs, base included",
        y_label=y_label,
        log=["x"],
        legend=True,
        y_limit=max(top, *(1.15 * value for value in values)),
    )
    return with_axes(drawn)


def _named(grown: Sequence[Grown]) -> str:
    return ", ".join(f"{each.name} (N = {short(each.parameters)})" for each in grown)


def _curves(
    parameters: float, budgets: np.ndarray, rule: Callable[[float, float], float], place: int
) -> list[dict[str, Any]]:
    """Dashed over all budgets, and solid where the rule was fitted."""
    fits = FITTED_PARAMETERS[0] <= parameters <= FITTED_PARAMETERS[1]
    name = f"N = {short(parameters)}{'' if fits else ' (not fitted)'}"
    style = solid(SEQUENCE + place % SEQUENCE_LENGTH) + LOOKS * (place // SEQUENCE_LENGTH)
    points = [[rounded(flops), rounded(rule(parameters, flops))] for flops in budgets]
    inside = [point for point in points if fits and FITTED_FLOPS[0] <= point[0] <= FITTED_FLOPS[1]]
    drawn = [_series(name, "fit", style, points)]
    return [*drawn, _series(name, "line", style, inside)] if inside else drawn


def _series(name: str, kind: str, style: int, points: list[list[float]]) -> dict[str, Any]:
    return {"name": name, "role": "rule", "style": style, "kind": kind, "points": points}
