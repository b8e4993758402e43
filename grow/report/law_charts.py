"""Figures of laws: the loss difference with a logarithmic fit, and power laws of the loss with predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from grow.curves import Curve, loss_at
from grow.fit import PREDICTED, PowerLaw, fit_logarithm, fit_power_law
from grow.report import text
from grow.report.axes import N_COLOURS, chart, rounded, thinned, with_axes
from grow.report.compare import Comparison, Comparisons
from grow.runs.families import SCRATCH, Family, families
from grow.runs.gather import Gathered

N_GRID = 200  # budgets at which two curves are subtracted
EXTRAPOLATED = 4  # times the shared FLOPs, by the logarithmic fit
Found = tuple[list[dict[str, Any]], list[dict[str, str]]]


def law_charts(gathered: Gathered, comparisons: Comparisons, styles: dict[str, int]) -> Found:
    """Both kinds, and what is missing for them."""
    parts = (_difference(comparisons, styles, gathered.unit), _scaling(gathered, comparisons, styles))
    return [chart for charts, _ in parts for chart in charts], [each for _, missing in parts for each in missing]


def _difference(comparisons: Comparisons, styles: dict[str, int], unit: str) -> Found:
    """Loss from scratch minus loss of the grown model, at equal FLOPs."""
    series: list[dict[str, Any]] = []
    said = []
    for pair in comparisons.pairs:
        found = _difference_of(pair, comparisons)
        if found is None:
            continue
        flops, gap = found
        fitted = flops >= (flops[0] + flops[-1]) / 2
        intercept, slope = fit_logarithm(flops[fitted], gap[fitted])
        ahead = np.geomspace(flops[fitted][0], EXTRAPOLATED * flops[-1], 60)
        common = {"name": pair.grown.name, "role": "grown", "style": styles[pair.grown.name]}
        series.append({**common, "kind": "line", "points": thinned(flops, gap)})
        fit = thinned(ahead, intercept + slope * np.log(ahead))
        series.append({**common, "kind": "fit", "points": fit})
        said.append(f"{pair.grown.name}: {_fit_words(gap, intercept, slope, flops[-1])}")
    if not series:
        needs = "a run that grew and one from scratch on the same data, with FLOPs that overlap"
        return [], [{"figure": "Loss difference with a logarithmic fit", "needs": needs}]
    drawn = chart(
        "loss-difference",
        "laws",
        "Loss difference at equal FLOPs",
        series,
        caption=(
            "Above zero the grown model is ahead. Dashed: p + q ln C, fitted to the second half of the shared FLOPs "
            f"and drawn to {EXTRAPOLATED} times their end. {' '.join(said)}"
        ),
        y_label=f"loss from scratch − loss grown, {unit}",
    )
    return [with_axes(drawn)], []


def _difference_of(pair: Comparison, comparisons: Comparisons) -> tuple[np.ndarray, np.ndarray] | None:
    """Budgets that both curves cover, and the difference there."""
    if not pair.same_data:
        return None
    grown, baseline = comparisons.smoothed(pair.grown), comparisons.smoothed(pair.baseline)
    low, high = max(grown.flops[0], baseline.flops[0]), min(grown.flops[-1], baseline.flops[-1])
    if low >= high:
        return None
    flops = np.linspace(low, high, N_GRID)
    return flops, _losses(baseline, flops) - _losses(grown, flops)


def _losses(curve: Curve, flops: np.ndarray) -> np.ndarray:
    return np.array([loss_at(curve, float(at)) for at in flops], dtype=np.float64)


def _fit_words(gap: np.ndarray, intercept: float, slope: float, highest: float) -> str:
    """What the measured difference and its fit, which ends at `highest` FLOPs, say."""
    if gap.max() <= 0:
        behind = "the grown model is behind at all of the shared FLOPs"
        if slope <= 0:
            return f"{behind}, and the fit does not rise."
        return f"{behind}; by the fit it would catch up {_where_zero(intercept, slope, highest)}."
    if intercept + slope * np.log(highest) <= 0:
        return "the difference is gone within the shared FLOPs."
    if slope >= 0:
        return "the fit does not fall."
    return f"by the fit the difference would be gone {_where_zero(intercept, slope, highest)}."


def _where_zero(intercept: float, slope: float, highest: float) -> str:
    log_zero = -intercept / slope
    if log_zero - np.log(highest) >= np.log(1000):
        return "beyond a thousand times these FLOPs"
    return f"at {text.flops(float(np.exp(log_zero)))} FLOPs"


def _scaling(gathered: Gathered, comparisons: Comparisons, styles: dict[str, int]) -> Found:
    """Final losses of several sizes or budgets, a power law for each family, and its prediction."""
    of_kinds = families(gathered, smoothed=comparisons.smoothed)
    found = [family for family in of_kinds if len(set(family.flops)) >= 2 and family.loss.min() > 0]
    if not found:
        needs = "two or more finished runs of one kind (from scratch, or grown by one operator) with different FLOPs"
        return [], [{"figure": "Scaling law L = a C^b with predictions", "needs": needs}]
    by_name = {model.name: model for model in gathered.models}
    ahead = PREDICTED * max(float(family.flops.max()) for family in found)
    series: list[dict[str, Any]] = []
    for family in found:
        for name in family.models:
            smoothed = comparisons.smoothed(by_name[name])
            common = {"name": name, "role": by_name[name].role, "style": styles[name]}
            series.append({**common, "kind": "logged", "points": thinned(smoothed.flops, smoothed.loss)})
    laws = [fit_power_law(family.flops, family.loss, seed=seed) for seed, family in enumerate(found)]
    for family, law in zip(found, laws, strict=True):
        series += _law_series(family, law, ahead, _law_styles(found)[family.name])
    caption = (
        "Marks: the final training loss of every run. Dashed: least squares in logarithms. Stars: at "
        f"{PREDICTED} times the largest; bars are 95 % intervals of the law, and no prediction is a measurement. "
        f"{' '.join(map(_law_words, found, laws))}"
    )
    drawn = chart("scaling-law", "laws", "Scaling law", series, caption=caption, log=["x", "y"], legend=True)
    return [with_axes({**drawn, "y_label": f"training loss, {gathered.unit}"})], []


def _law_series(family: Family, law: PowerLaw, ahead: float, style: int) -> list[dict[str, Any]]:
    common = {"name": family.name, "role": "family", "style": style}
    order = np.argsort(family.flops)
    line = np.array([family.flops.min(), ahead])
    interval = law.predicted_interval(ahead)
    return [
        {**common, "kind": "marks", "points": thinned(family.flops[order], family.loss[order])},
        {**common, "kind": "fit", "points": thinned(line, law.predict(line))},
        {
            **common,
            "kind": "stars",
            "points": [[rounded(ahead), rounded(float(law.predict(ahead)))]],
            "intervals": [None if interval is None else [rounded(bound) for bound in interval]],
        },
    ]


def _law_words(family: Family, law: PowerLaw) -> str:
    interval = law.interval("b")
    doubt = "" if interval is None else f" (95 % interval {interval[0]:.4f} to {interval[1]:.4f})"
    return f"{family.name}: b = {law.b:.4f}{doubt} from {len(family.flops)} runs.".replace("-", text.MINUS)


def _law_styles(found: Sequence[Family]) -> dict[str, int]:
    """Family -> look of its law: scratch as the run from scratch, the first operator as the grown one."""
    others = [family.name for family in found if family.name != SCRATCH]
    free = [0, *range(2, N_COLOURS)]
    return {SCRATCH: 1} | {name: free[i % len(free)] for i, name in enumerate(others)}
