"""Figures of losses, as plain data: against FLOPs, tokens and wall time, with speed-up arrows and growth spikes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, count
from typing import Any

import numpy as np

from grow.curves import Curve, validation_curve
from grow.report import text
from grow.report.axes import chart, rounded, style_number, thinned, with_axes, zoomed
from grow.report.compare import ALONG, Comparisons
from grow.runs.gather import NATS_PER_TOKEN, Gathered
from grow.runs.trained_model import TrainedModel
from grow.scores import ExternalModel

SPIKE_WIDTH_POINTS = 24  # first losses after growth, which are never thinned out
# Further models of a role, and those of others, take the styles after these
ROLE_STYLES = {"grown": 0, "baseline": 1, "base": 2, "continued": 3}
FURTHER_STYLES = (7, 5, 6, 4)  # the light blue last: it is solid, as the blue of what grew
ARROW_DISTANCE = 0.09  # of the height of a chart: nearer ones would write over each other


def build_charts(gathered: Gathered, comparisons: Comparisons, styles: dict[str, int]) -> list[dict[str, Any]]:
    """Training loss against FLOPs (whole and where the pair is compared), tokens and wall time; validation loss.

    Args:
        gathered: what to draw.
        comparisons: smoothing window, validation set and the pair of the arrows.
        styles: name -> number of the line's look.
    """
    flops, tokens, seconds = (
        _training_chart(gathered, comparisons, styles, quantity) for quantity in ("flops", "tokens", "seconds")
    )
    nearer = _zoom(flops, comparisons)
    flops = {**flops, "arrows": flops["arrows"][:1], "inset": nearer[0] if nearer else None}
    charts = [flops, *nearer, _validation_chart(gathered, comparisons, styles), tokens, seconds]
    return [drawn if "x" in drawn else with_axes(drawn) for drawn in charts if _is_extended(drawn)]


def _is_extended(drawn: dict[str, Any]) -> bool:
    """Whether any line goes further than x = 0, where a run that was only validated at its start ends."""
    return any(series["points"][-1][0] > 0 for series in drawn["series"])


def line_styles(models: Sequence[TrainedModel], external: Sequence[ExternalModel] = ()) -> dict[str, int]:
    """Name -> number of the line's look: the first model of each role always has the same."""
    styles: dict[str, int] = {}
    free = map(style_number, chain(FURTHER_STYLES, count(len(ROLE_STYLES) + len(FURTHER_STYLES))))
    for model in models:
        first = ROLE_STYLES[model.role]
        styles[model.name] = next(free) if first in styles.values() else first
    return styles | {model.name: next(free) for model in external}


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


def flops_per_token(models: Sequence[TrainedModel]) -> float | None:
    """Of the target models, if they have one size; bases are smaller and do not count."""
    sizes = {model.parameters for model in models if model.role != "base"}
    size = sizes.pop() if len(sizes) == 1 else None
    return None if size is None else 6.0 * size


def _training_chart(
    gathered: Gathered, comparisons: Comparisons, styles: dict[str, int], quantity: str
) -> dict[str, Any]:
    series: list[dict[str, Any]] = []
    for model in gathered.models:
        smoothed = comparisons.smoothed(model)
        x_of = _positions(model, quantity)
        if x_of is None:
            continue
        common = {"name": model.name, "role": model.role, "style": styles[model.name]}
        keep = SPIKE_WIDTH_POINTS if model.role == "grown" else 0
        series.append({**common, "kind": "logged", "points": thinned(x_of(model.curve), model.curve.loss, keep)})
        series.append({**common, "kind": "line", "points": thinned(x_of(smoothed), smoothed.loss)})
    of_others = _external_losses(gathered, styles, quantity)
    series += of_others
    is_flops = quantity == "flops"
    spikes = _spikes(gathered.models, comparisons, styles) if is_flops else []
    caption = QUANTITIES[quantity]["caption"].format(window=text.count(comparisons.window_tokens))
    if spikes:
        caption += " Circles: validation loss just before and just after growth."
    if of_others:
        caption += f" As their files say: {', '.join(each['name'] for each in of_others)}."
    return chart(
        f"train-{quantity}",
        "loss",
        QUANTITIES[quantity]["title"],
        series,
        caption=caption,
        y_label=f"training loss, {gathered.unit}",
        quantity=quantity,
        spikes=spikes,
        arrows=_arrows(comparisons, "train") if is_flops else [],
        cut_start=True,
        flops_per_token=flops_per_token(gathered.models) if is_flops else None,
    )


def _external_losses(gathered: Gathered, styles: dict[str, int], quantity: str) -> list[dict[str, Any]]:
    """Losses of other people's models as they wrote them; only beside losses in the same unit, nats per token."""
    place = {"tokens": 0, "flops": 1}.get(quantity)
    if place is None or gathered.unit != NATS_PER_TOKEN:
        return []
    found = []
    for model in gathered.external:
        drawn = [[rounded(point[place]), rounded(point[2])] for point in model.losses if point[place] is not None]
        if drawn:
            common = {"name": model.name, "role": "external", "style": styles[model.name]}
            found.append({**common, "kind": "line", "points": sorted(drawn)})
    return found


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


def _validation_chart(gathered: Gathered, comparisons: Comparisons, styles: dict[str, int]) -> dict[str, Any]:
    curves = [(model, validation_curve(model.evaluations, comparisons.set_name or "")) for model in gathered.models]
    series = [
        {
            "name": model.name,
            "role": model.role,
            "style": styles[model.name],
            "kind": "dots",
            "points": thinned(curve.flops, curve.loss, SPIKE_WIDTH_POINTS),
        }
        for model, curve in curves
        if curve is not None
    ]
    return chart(
        "validation-flops",
        "loss",
        "Validation loss",
        series,
        caption=f"Held-out text ({comparisons.set_name}), against compute; not smoothed.",
        y_label=f"validation loss, {gathered.unit}",
        spikes=_spikes(gathered.models, comparisons, styles),
        arrows=_arrows(comparisons, "validation")[:1],
        cut_start=True,
        flops_per_token=flops_per_token(gathered.models),
    )


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
                    "x": rounded(after.flops_total),
                    "before": rounded(before.value),
                    "after": rounded(after.value),
                }
            )
    return spikes


def _arrows(comparisons: Comparisons, curve: str) -> list[dict[str, Any]]:
    """From the baseline to the grown model at equal loss: at the end, then at earlier losses."""
    if not comparisons.pairs:
        return []
    result = getattr(comparisons.pairs[0], curve)
    results = [result, *reversed(result.get("along", []))] if result["speedup"] is not None else []
    return [
        {
            "y": each["target_loss"],
            "x_from": each["flops_scratch"],
            "x_to": each["flops_grown"],
            "label": ("≥" if each["lower_bound"] else "") + text.percent(each["speedup"]),
        }
        for each in results
        if each["speedup"] is not None
    ]


def _zoom(drawn: dict[str, Any], comparisons: Comparisons) -> list[dict[str, Any]]:
    """The part of a chart around its arrows, where the curves lie close together; nothing if it has no arrow."""
    if not drawn["arrows"]:
        return []
    ends = [arrow[end] for arrow in drawn["arrows"] for end in ("x_from", "x_to")]
    from_x, to_x = 0.8 * min(ends), 1.15 * max(ends)
    pair = comparisons.pairs[0]
    which = (
        f" The arrows are those of {pair.grown.name} and {pair.baseline.name}." if len(comparisons.pairs) > 1 else ""
    )
    found = with_axes(
        {
            **zoomed(drawn, from_x, to_x),
            "id": f"{drawn['id']}-zoom",
            "title": "The same, where they meet",
            "caption": (
                "Arrows go from the FLOPs of training from scratch to those of growing, at equal loss: the last one, "
                f"and where there is room that from scratch at {' and '.join(f'{share:.0%}' for share in ALONG)} "
                f"of its FLOPs.{which}"
            ),
        }
    )
    return [{**found, "arrows": _apart(found["arrows"], found["y"])}]


def _apart(arrows: Sequence[dict[str, Any]], axis: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that do not lie too near to one before them."""
    kept: list[dict[str, Any]] = []
    distance = ARROW_DISTANCE * (axis["max"] - axis["min"])
    for arrow in arrows:
        if all(abs(arrow["y"] - other["y"]) >= distance for other in kept):
            kept.append(arrow)
    return kept
