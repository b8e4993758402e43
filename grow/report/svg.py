"""Charts as inline SVG: colours come from the page's style sheet, so that one drawing serves light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

from grow.report.axes import INSET, colour_and_dash

LEFT, RIGHT, TOP, BOTTOM = 46, 12, 16, 44  # margins in drawing units; a unit is a pixel at the drawn size
TOP_AXIS = 38  # margin above for a second axis
MAX_DOTS = 80  # beyond that the dots of a line touch
MAX_LABELS = 2  # of growths; more would write over each other
INSET_WIDTH = 700  # narrower drawings have no room for an inset
STAR = "l1.8,4.6 5,0.3 -3.9,3.1 1.3,4.8 -4.2,-2.7 -4.2,2.7 1.3,-4.8 -3.9,-3.1 5,-0.3z"  # from its upper tip


@dataclass(frozen=True)
class Frame:
    """Where a chart's values lie in the drawing: the edges of its plot."""

    chart: dict[str, Any]
    left: float
    top: float
    right: float
    bottom: float

    def x(self, value: float) -> float:
        return self.left + _share(value, self.chart["x"]) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - _share(value, self.chart["y"]) * (self.bottom - self.top)


def _share(value: float, axis: dict[str, Any]) -> float:
    """Where on an axis a value lies, from 0 to 1."""
    low, high = axis["min"], axis["max"]
    if axis["log"]:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)


def chart_svg(chart: dict[str, Any], width: int, height: int) -> str:
    """One chart as an <svg> element of these proportions; text has the page's size at `width` pixels."""
    frame = Frame(chart, LEFT, TOP_AXIS if chart["top"] else TOP, width - RIGHT, height - BOTTOM)
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(_description(chart))}" '
        f'data-chart="{escape(chart["id"])}" data-plot="{LEFT} {frame.top:g} {frame.right:g} {frame.bottom:g}">',
        *_axes(frame),
        *_top_axis(frame),
        *_clipped(frame, f"clip-{chart['id']}-{width}"),
        *_spikes(frame),
        *_arrows(frame),
        *(_inset(frame, f"clip-{chart['id']}-inset") if chart["inset"] and width >= INSET_WIDTH else ()),
        "</svg>",
    ]
    return "\n".join(parts)


def look_of(style: int) -> str:
    """The classes of a line: its colour and its dashes."""
    colour, dash = colour_and_dash(style)
    return f"s{colour} d{dash}"


def _clipped(frame: Frame, clip: str) -> Iterator[str]:
    """The lines, cut off at the edges of the plot."""
    top = frame.top - 8
    yield f'<clipPath id="{clip}"><rect x="{frame.left:g}" y="{top:g}" width="{frame.right - frame.left:g}" '
    yield f'height="{frame.bottom - top:g}"/></clipPath>'
    yield f'<g clip-path="url(#{clip})">'
    yield from _lines(frame)
    yield "</g>"


def _inset(frame: Frame, clip: str) -> Iterator[str]:
    """A smaller chart in the free corner of a larger one, with its arrows."""
    across, up = INSET
    left, bottom = frame.left + across * (frame.right - frame.left), frame.bottom - up * (frame.bottom - frame.top)
    yield f'<rect class="inset" x="{left:g}" y="{frame.top:g}" width="{frame.right - left:g}" '
    yield f'height="{bottom - frame.top:g}"/>'
    inner = Frame(frame.chart["inset"], left + LEFT, frame.top + 14, frame.right - 10, bottom - 26)
    yield from _axes(inner, label=False)
    yield from _clipped(inner, clip)
    yield from _arrows(inner)


def _description(chart: dict[str, Any]) -> str:
    names = dict.fromkeys(series["name"] for series in chart["series"])
    return f"{chart['title']}: {chart['y']['label']} of {', '.join(names)} over {chart['x']['label']}"


def _axes(frame: Frame, *, label: bool = True) -> Iterator[str]:
    for tick in frame.chart["y"]["ticks"]:
        y = frame.y(tick["at"])
        yield f'<line class="grid" x1="{frame.left:g}" x2="{frame.right:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield _text("tick", frame.left - 8, y + 4, tick["label"], "end")
    base = frame.bottom
    yield f'<line class="axis" x1="{frame.left:g}" x2="{frame.right:g}" y1="{base:g}" y2="{base:g}"/>'
    for tick in frame.chart["x"]["ticks"]:
        x = frame.x(tick["at"])
        yield f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base:g}" y2="{base + 4:g}"/>'
        yield _text("tick", x, base + 18, tick["label"], "middle")
    if label:
        yield _text("label", (frame.left + frame.right) / 2, base + BOTTOM - 6, frame.chart["x"]["label"], "middle")


def _text(look: str, x: float, y: float, words: str, anchor: str) -> str:
    return f'<text class="{look}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _top_axis(frame: Frame) -> Iterator[str]:
    if frame.chart["top"] is None:
        return
    for tick in frame.chart["top"]["ticks"]:
        x = frame.x(tick["at"])
        yield f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top - 4:g}" y2="{frame.top:g}"/>'
        yield _text("tick", x, frame.top - 8, tick["label"], "middle")
    yield _text("label", frame.right, 11, frame.chart["top"]["label"], "end")


def _lines(frame: Frame) -> Iterator[str]:
    for series in sorted(frame.chart["series"], key=lambda series: series["kind"] != "logged"):
        points = [(frame.x(x), frame.y(y)) for x, y in series["points"]]
        look = look_of(series["style"])
        yield from _bars(frame, series)
        if series["kind"] in ("line", "logged", "dots", "fit"):
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            yield f'<polyline class="{series["kind"]} {look}" points="{path}"/>'
        if series["kind"] == "stars":
            yield from (f'<path class="dot {look}" d="M{x:.1f},{y - 7:.1f} {STAR}"/>' for x, y in points)
        elif series["kind"] == "marks" or (series["kind"] == "dots" and len(points) <= MAX_DOTS):
            yield from (f'<circle class="dot {look}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points)


def _bars(frame: Frame, series: dict[str, Any]) -> Iterator[str]:
    """What the points may as well be."""
    for (x, _), interval in zip(series["points"], series.get("intervals", ()), strict=False):
        if interval is not None:
            look, at = look_of(series["style"]), frame.x(x)
            low, high = (frame.y(bound) for bound in interval)
            yield f'<line class="bar {look}" x1="{at:.1f}" x2="{at:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'


def _spikes(frame: Frame) -> Iterator[str]:
    """A dotted line from the validation loss before growth up to the one after it."""
    for spike in frame.chart["spikes"]:
        x, before, after = frame.x(spike["x"]), frame.y(spike["before"]), frame.y(spike["after"])
        yield f'<line class="spike" x1="{x:.1f}" x2="{x:.1f}" y1="{before:.1f}" y2="{after:.1f}"/>'
        yield from (
            f'<circle class="ring {look_of(spike["style"])}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for y in (before, after)
        )
        if len(frame.chart["spikes"]) <= MAX_LABELS:
            yield _text("mark", x + 9, min(before, after) + 4, "growth", "start")


def _arrows(frame: Frame) -> Iterator[str]:
    for arrow in frame.chart["arrows"]:
        yield from _arrow(frame, arrow)


def _arrow(frame: Frame, arrow: dict[str, Any]) -> Iterator[str]:
    """At equal loss, from the baseline's FLOPs to the grown model's."""
    y, start, end = frame.y(arrow["y"]), frame.x(arrow["x_from"]), frame.x(arrow["x_to"])
    for x in (start, end):
        yield f'<line class="drop" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{frame.bottom:g}"/>'
        yield f'<circle class="stop" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
    towards = 1 if end > start else -1
    tip = end - 5 * towards
    if abs(end - start) > 14:
        yield f'<line class="arrow" x1="{start:.1f}" x2="{tip - 6 * towards:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<path class="head" d="M{tip:.1f},{y:.1f} l{-9 * towards},-5 v10 z"/>'
    # below the left end: both curves come down to it from above, so this corner is free
    corner = max(min(start, end) - 7, frame.left + 56)
    yield _text("gain", corner, y + 18, arrow["label"], "end")
