"""A figure as plain data: what every chart has, and the axes that fit what it shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from grow.report import text

MAX_POINTS = 320  # per line: more than a screen shows
UNITS = ((3600.0, "h"), (60.0, "min"), (1.0, "s"))
STEEP_START = 0.06  # share of the x axis whose losses may fall out of the picture
INSET = (0.46, 0.4)  # an inset lies to the right of and above these shares of the plot, if no line does
MAX_TICKS = 6
N_COLOURS, N_DASHES = 8, 4
LOOKS = 16  # a line's style: its colour plus this times the rounds that all colours have been through
SEQUENCE, SEQUENCE_LENGTH = 8, 5  # the first of the colours that form a scale, and their number


def style_number(place: int) -> int:
    """The look of the line at a place in a list of them; they differ up to 32 lines."""
    return LOOKS * (place // N_COLOURS) + place % N_COLOURS


def colour_and_dash(style: int) -> tuple[int, int]:
    """Numbers of the colour and of the dashes of a style."""
    colour, rounds = style % LOOKS, style // LOOKS
    return colour, (colour + rounds) % N_DASHES


def solid(colour: int) -> int:
    """The style of this colour without dashes."""
    return colour + LOOKS * (-colour % N_DASHES)


def chart(name: str, section: str, title: str, series: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A chart without axes yet.

    Args:
        name: its id, and the name of its files.
        section: part of the page: "loss", "scores" or "laws".
        title: above it.
        series: each with name, style, kind ("line", "logged", "dots", "fit", "marks", "stars") and points, in order of
            x; some with intervals, the low and high end of a bar for each point, or None.
        changes: of what follows.
    """
    return {
        "id": name,
        "section": section,
        "title": title,
        "caption": "",
        "series": series,
        "quantity": "flops",
        "x_label": None,
        "y_label": "",
        "log": [],
        "spikes": [],
        "arrows": [],
        "cut_start": False,
        "legend": False,
        "from_x": None,
        "zero": None,
        "y_limit": None,
        "flops_per_token": None,
        "inset": None,
        **changes,
    }


def thinned(x: np.ndarray, y: np.ndarray, keep_first: int = 0) -> list[list[float]]:
    """At most about MAX_POINTS of a line, the first and the last among them."""
    chosen = np.unique(np.linspace(0, len(x) - 1, MAX_POINTS).round().astype(int))
    chosen = np.union1d(chosen, np.arange(min(keep_first, len(x))))
    return [[rounded(x[i]), rounded(y[i])] for i in chosen]


def rounded(value: float) -> float:
    return float(f"{value:.6g}")


def with_axes(drawn: dict[str, Any]) -> dict[str, Any]:
    """The chart with axes that show all of its lines and marks; where `cut_start`, not the steep fall at first."""
    lines = [series["points"] for series in drawn["series"] if series["kind"] != "logged"]
    x_min, x_max = min(line[0][0] for line in lines), max(line[-1][0] for line in lines)
    low, high = (x_min / 1.15, x_max * 1.15) if "x" in drawn["log"] else (drawn["from_x"] or 0.0, 1.02 * x_max)
    finished = {
        **drawn,
        "x": {
            "min": rounded(low),
            "max": rounded(high),
            "log": "x" in drawn["log"],
            "zero": drawn["zero"],
            **_x_ticks(low, high, drawn),
        },
        "y": _y_axis(drawn, lines, x_max),
        "top": _top_axis(low, high, drawn["flops_per_token"]),
    }
    return {**finished, "inset": finished["inset"] if _has_room(finished) else None}


def zoomed(drawn: dict[str, Any], from_x: float, to_x: float = math.inf) -> dict[str, Any]:
    """The chart, without axes, of the lines and marks that it has between two values of x."""
    parts = [
        {**series, "points": [point for point in series["points"] if from_x <= point[0] <= to_x], "intervals": []}
        for series in drawn["series"]
        if series["kind"] != "logged"
    ]
    shown = [part for part in parts if part["points"]]
    return {**drawn, "series": shown, "spikes": [], "cut_start": False, "from_x": from_x, "inset": None}


def _y_axis(drawn: dict[str, Any], lines: Sequence[Any], x_max: float) -> dict[str, Any]:
    cut = STEEP_START * x_max if drawn["cut_start"] else 0.0
    shown = [y for line in lines for x, y in line if x >= cut or len(line) < 3]
    shown += [y for spike in drawn["spikes"] for y in (spike["before"], spike["after"])]
    shown += [arrow["y"] for arrow in drawn["arrows"]]
    shown += [
        bound for series in drawn["series"] for interval in series.get("intervals", ()) for bound in interval or ()
    ]
    shown = [y for y in shown if drawn["y_limit"] is None or y <= drawn["y_limit"]]
    if "y" in drawn["log"]:
        low, high = rounded(min(shown) / 1.06), rounded(max(shown) * 1.06)
    else:
        pad = 0.06 * (max(shown) - min(shown)) or 0.1
        low, high = rounded(min(shown) - pad), rounded(max(shown) + pad)
    ticks = [{"at": at, "label": f"{at:g}".replace("-", text.MINUS)} for at in nice_ticks(low, high)]
    return {"min": low, "max": high, "label": drawn["y_label"], "ticks": ticks, "log": "y" in drawn["log"]}


def _x_ticks(low: float, high: float, drawn: dict[str, Any]) -> dict[str, Any]:
    quantity, label = drawn["quantity"], drawn["x_label"]
    if "x" in drawn["log"]:
        write = {"flops": _flops, "tokens": text.count}.get(quantity, "{:g}".format)
        ticks = [{"at": at, "label": write(at)} for at in log_ticks(low, high)]
        if drawn["zero"] is not None:
            ticks = [{"at": drawn["zero"], "label": "0"}, *(tick for tick in ticks if tick["at"] > 1.5 * drawn["zero"])]
        return {"label": label or "training FLOPs, base included", "ticks": ticks}
    unit, own_label, write = _linear_unit(high, quantity)
    ticks = [{"at": rounded(at * unit), "label": write(at)} for at in nice_ticks(low / unit, high / unit)]
    return {"label": label or own_label, "ticks": ticks}


def _linear_unit(high: float, quantity: str) -> tuple[float, str, Callable[[float], str]]:
    """The unit of the ticks, the label that names it, and how a tick is written."""
    if quantity == "flops":
        exponent = math.floor(math.log10(high))
        label = f"training FLOPs, base included (× {text.power_of_ten(exponent)})"
        return 10.0**exponent, label, "{:g}".format
    if quantity == "tokens":
        return 1.0, "tokens seen", text.count
    unit, name = next((size, name) for size, name in UNITS if high >= 3 * size or size == 1.0)
    return unit, f"training time ({name})", "{:g}".format


def _flops(value: float) -> str:
    mantissa, exponent = f"{value:.0e}".split("e")
    power = text.power_of_ten(int(exponent))
    return power if mantissa == "1" else f"{mantissa}×{power}"


def _top_axis(low: float, high: float, flops_per_token: float | None) -> dict[str, Any] | None:
    """Tokens of the target model, where all lines of the chart are of one size."""
    if flops_per_token is None:
        return None
    ticks = nice_ticks(low / flops_per_token, high / flops_per_token)
    label = "tokens of a model of this size for the same FLOPs"
    return {"label": label, "ticks": [{"at": rounded(at * flops_per_token), "label": text.count(at)} for at in ticks]}


def _has_room(drawn: dict[str, Any]) -> bool:
    """Whether no line and no spike passes where the inset would lie."""

    def share(value: float, axis: dict[str, Any]) -> float:
        return (value - axis["min"]) / (axis["max"] - axis["min"])

    marks = [(x, y) for series in drawn["series"] for x, y in series["points"]]
    marks += [(spike["x"], spike["after"]) for spike in drawn["spikes"]]
    return not any(INSET[0] < share(x, drawn["x"]) and INSET[1] < share(y, drawn["y"]) < 1 for x, y in marks)


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers in [low, high], 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / about
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= 0.999 * rough)
    return [rounded(i * step) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high], few enough to label; with 2 and 5 times them where there is room."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [factor * 10.0**exponent for exponent in decades for factor in (1, 2, 5)]
    fine = [at for at in fine if low <= at <= high]
    whole = [10.0**exponent for exponent in decades if low <= 10.0**exponent <= high]
    every = math.ceil(len(whole) / MAX_TICKS) if whole else 1
    return fine if len(fine) <= MAX_TICKS else whole[::every]
