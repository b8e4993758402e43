"""What the figures show, as plain data: series, axes, marks. The page and the image files are both drawn from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from grow.curves import Curve, validation_curve
from grow.report import text
from grow.report.compare import Comparisons
from grow.report.gather import TrainedModel

MAX_POINTS = 320  # per line: more than a screen shows
SPIKE_WIDTH_POINTS = 24  # first losses after growth, which are never thinned out
N_STYLES = 8
# Further models of a role take the styles after these
ROLE_STYLES = {"grown": 0, "baseline": 1, "base": 2, "continued": 3}
UNITS = ((3600.0, "h"), (60.0, "min"), (1.0, "s"))


def build_charts(
    models: Sequence[TrainedModel], comparisons: Comparisons, styles: dict[str, int]
) -> list[dict[str, Any]]:
    """Training loss against FLOPs (whole and where the pair is compared), tokens and wall time; validation loss.

    Args:
        models: what to draw.
        comparisons: smoothing window, validation set and the pair of the arrow.
        styles: name -> number of the line's look.
    """
    flops, tokens, seconds = (
        _training_chart(models, comparisons, styles, quantity) for quantity in ("flops", "tokens", "seconds")
    )
    charts = [flops, *_zoom(flops), _validation_chart(models, comparisons, styles), tokens, seconds]
    return [with_axes(chart) for chart in charts if chart["series"]]


def line_styles(models: Sequence[TrainedModel]) -> dict[str, int]:
    """Name -> number of the line's look: the first model of each role always has the same."""
    free = [style for style in range(N_STYLES) if style not in ROLE_STYLES.values()]
    styles: dict[str, int] = {}
    for model in models:
        first = ROLE_STYLES[model.role]
        styles[model.name] = first if first not in styles.values() else free[len(styles) % len(free)]
    return styles


QUANTITIES: dict[str, dict[str, str]] = {
    "flops": {
        "title": "Training loss against compute",
        "caption": "Thick: the mean of the last {window} tokens. Thin: as logged. Growing is charged for its base.",
    },
    "tokens": {
        "title": "Against tokens",
        "caption": "Tokens seen, those of the base included.",
    },
    "seconds": {
        "title": "Against wall time",
        "caption": "Time in training steps, that of the base included.",
    },
}


def _training_chart(
    models: Sequence[TrainedModel], comparisons: Comparisons, styles: dict[str, int], quantity: str
) -> dict[str, Any]:
    series: list[dict[str, Any]] = []
    for model in models:
        smoothed = comparisons.smoothed(model)
        x_of = _positions(model, quantity)
        if x_of is None:
            continue
        common = {"name": model.name, "role": model.role, "style": styles[model.name]}
        keep = SPIKE_WIDTH_POINTS if model.role == "grown" else 0
        series.append({**common, "kind": "logged", "points": thinned(x_of(model.curve), model.curve.loss, keep)})
        series.append({**common, "kind": "line", "points": thinned(x_of(smoothed), smoothed.loss)})
    return {
        "id": f"train-{quantity}",
        "title": QUANTITIES[quantity]["title"],
        "caption": QUANTITIES[quantity]["caption"].format(window=text.count(comparisons.window_tokens)),
        "y_label": "training loss, nats per token",
        "quantity": quantity,
        "series": series,
        "spikes": _spikes(models, comparisons, styles) if quantity == "flops" else [],
        "arrow": _arrow(comparisons, "train") if quantity == "flops" else None,
    }


def _positions(model: TrainedModel, quantity: str) -> Callable[[Curve], np.ndarray] | None:
    """What turns a curve of the model into x values; None where they are not known."""
    if quantity == "flops":
        return lambda curve: curve.flops
    if quantity == "tokens":
        return lambda curve: model.tokens_at(curve.tokens)
    seconds = model.seconds_at()
    if seconds is None:
        return None
    return lambda curve: np.interp(curve.tokens, model.curve.tokens, seconds)


def _validation_chart(
    models: Sequence[TrainedModel], comparisons: Comparisons, styles: dict[str, int]
) -> dict[str, Any]:
    curves = {model.name: validation_curve(model.evaluations, comparisons.set_name or "") for model in models}
    series = [
        {
            "name": model.name,
            "role": model.role,
            "style": styles[model.name],
            "kind": "dots",
            "points": thinned(curve.flops, curve.loss, SPIKE_WIDTH_POINTS),
        }
        for model in models
        if (curve := curves[model.name]) is not None
    ]
    return {
        "id": "validation-flops",
        "title": "Validation loss",
        "caption": f"Held-out text ({comparisons.set_name}), against compute; not smoothed.",
        "y_label": "validation loss, nats per token",
        "quantity": "flops",
        "series": series,
        "spikes": _spikes(models, comparisons, styles),
        "arrow": _arrow(comparisons, "validation"),
    }


def thinned(x: np.ndarray, y: np.ndarray, keep_first: int = 0) -> list[list[float]]:
    """At most about MAX_POINTS of a line, the first and the last among them."""
    chosen = np.unique(np.linspace(0, len(x) - 1, MAX_POINTS).round().astype(int))
    chosen = np.union1d(chosen, np.arange(min(keep_first, len(x))))
    return [[_rounded(x[i]), _rounded(y[i])] for i in chosen]


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _spikes(models: Sequence[TrainedModel], comparisons: Comparisons, styles: dict[str, int]) -> list[dict[str, Any]]:
    """Validation loss just before and just after each growth."""
    by_name = {model.name: model for model in models}
    spikes = []
    for model in models:
        parent = by_name.get(model.parent or "")
        after = model.evaluation("loss", comparisons.set_name, ["after_growth"])
        before = parent.evaluation("loss", comparisons.set_name, ["before_growth", "end"]) if parent else None
        if before is not None and after is not None:
            spikes.append(
                {
                    "name": model.name,
                    "style": styles[model.name],
                    "x": _rounded(after.flops_total),
                    "before": _rounded(before.value),
                    "after": _rounded(after.value),
                }
            )
    return spikes


def _arrow(comparisons: Comparisons, curve: str) -> dict[str, Any] | None:
    """From the baseline to the grown model at equal loss."""
    if not comparisons.pairs:
        return None
    result = getattr(comparisons.pairs[0], curve)
    if result["speedup"] is None:
        return None
    return {
        "y": result["target_loss"],
        "x_from": result["flops_scratch"],
        "x_to": result["flops_grown"],
        "label": ("≥" if result["lower_bound"] else "") + text.percent(result["speedup"]),
    }


def _zoom(chart: dict[str, Any]) -> list[dict[str, Any]]:
    """The part of a chart around its arrow, where the curves lie close together; nothing if it has no arrow."""
    arrow = chart["arrow"]
    if arrow is None:
        return []
    from_x = 0.7 * min(arrow["x_from"], arrow["x_to"])
    series = [
        {**series, "points": [point for point in series["points"] if point[0] >= from_x]}
        for series in chart["series"]
        if series["kind"] == "line"
    ]
    return [
        {
            **chart,
            "id": f"{chart['id']}-zoom",
            "title": "The same, where they meet",
            "caption": "The arrow goes from the FLOPs of training from scratch to those of growing, at equal loss.",
            "series": [series for series in series if series["points"]],
            "spikes": [],
            "from_x": from_x,
        }
    ]


def with_axes(chart: dict[str, Any]) -> dict[str, Any]:
    """Axes that show the ends of all curves and every spike, and cut off the steep fall at the very start."""
    lines = [series["points"] for series in chart["series"] if series["kind"] != "logged"]
    x_max = max(points[-1][0] for points in lines)
    shown = [y for points in lines for x, y in points if x >= 0.06 * x_max or len(points) < 3]
    shown += [y for spike in chart["spikes"] for y in (spike["before"], spike["after"])]
    shown += [chart["arrow"]["y"]] if chart["arrow"] else []
    pad = 0.06 * (max(shown) - min(shown)) or 0.1
    low, high = _rounded(min(shown) - pad), _rounded(max(shown) + pad)
    ticks = [{"at": at, "label": f"{at:g}"} for at in nice_ticks(low, high)]
    return {
        **chart,
        "x": _x_axis(chart.get("from_x", 0.0), 1.02 * x_max, chart["quantity"]),
        "y": {"min": low, "max": high, "label": chart["y_label"], "ticks": ticks},
    }


def _x_axis(low: float, high: float, quantity: str) -> dict[str, Any]:
    if quantity == "flops":
        exponent = math.floor(math.log10(high))
        unit, label = 10.0**exponent, f"training FLOPs, base included (× {text.power_of_ten(exponent)})"
    elif quantity == "tokens":
        unit, label = 1.0, "tokens seen"
    else:
        unit, name = next((size, name) for size, name in UNITS if high >= 3 * size or size == 1.0)
        label = f"training time ({name})"
    write = text.count if quantity == "tokens" else "{:g}".format
    ticks = [{"at": _rounded(at * unit), "label": write(at)} for at in nice_ticks(low / unit, high / unit)]
    return {"min": _rounded(low), "max": _rounded(high), "label": label, "ticks": ticks}


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers in [low, high], 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / about
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= 0.999 * rough)
    return [_rounded(i * step) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
