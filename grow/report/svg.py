"""Charts as inline SVG: colours come from the page's style sheet, so that one drawing serves light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

LEFT, RIGHT, TOP, BOTTOM = 46, 12, 16, 44  # margins in drawing units; a unit is a pixel at the drawn size
MAX_DOTS = 80  # beyond that the dots of a line touch


@dataclass(frozen=True)
class Frame:
    """Where a chart's values lie in the drawing."""

    chart: dict[str, Any]
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.width - RIGHT

    @property
    def bottom(self) -> float:
        return self.height - BOTTOM

    def x(self, value: float) -> float:
        axis = self.chart["x"]
        return LEFT + (value - axis["min"]) / (axis["max"] - axis["min"]) * (self.right - LEFT)

    def y(self, value: float) -> float:
        axis = self.chart["y"]
        return self.bottom - (value - axis["min"]) / (axis["max"] - axis["min"]) * (self.bottom - TOP)


def chart_svg(chart: dict[str, Any], width: int, height: int) -> str:
    """One chart as an <svg> element of these proportions; text has the page's size at `width` pixels."""
    frame = Frame(chart, width, height)
    clip = f"clip-{chart['id']}-{width}"
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(_description(chart))}" '
        f'data-chart="{escape(chart["id"])}" data-plot="{LEFT} {TOP} {frame.right:g} {frame.bottom:g}">',
        f'<clipPath id="{clip}"><rect x="{LEFT}" y="{TOP // 2}" width="{frame.right - LEFT:g}" '
        f'height="{frame.bottom - TOP // 2:g}"/></clipPath>',
        *_axes(frame),
        f'<g clip-path="url(#{clip})">',
        *_lines(frame),
        "</g>",
        *_spikes(frame),
        *_arrow(frame),
        "</svg>",
    ]
    return "\n".join(parts)


def _description(chart: dict[str, Any]) -> str:
    names = dict.fromkeys(series["name"] for series in chart["series"])
    return f"{chart['title']}: {chart['y']['label']} of {', '.join(names)} over {chart['x']['label']}"


def _axes(frame: Frame) -> Iterator[str]:
    for tick in frame.chart["y"]["ticks"]:
        y = frame.y(tick["at"])
        yield f'<line class="grid" x1="{LEFT}" x2="{frame.right:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(tick["label"])}</text>'
    base = frame.bottom
    yield f'<line class="axis" x1="{LEFT}" x2="{frame.right:g}" y1="{base:g}" y2="{base:g}"/>'
    for tick in frame.chart["x"]["ticks"]:
        x = frame.x(tick["at"])
        yield f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base:g}" y2="{base + 4:g}"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{base + 18:g}" text-anchor="middle">{escape(tick["label"])}</text>'
    middle = (LEFT + frame.right) / 2
    label = escape(frame.chart["x"]["label"])
    yield f'<text class="label" x="{middle:g}" y="{frame.height - 6:g}" text-anchor="middle">{label}</text>'


def _lines(frame: Frame) -> Iterator[str]:
    for series in sorted(frame.chart["series"], key=lambda series: series["kind"] != "logged"):
        points = [(frame.x(x), frame.y(y)) for x, y in series["points"]]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        yield f'<polyline class="{series["kind"]} s{series["style"]}" points="{path}"/>'
        if series["kind"] == "dots" and len(points) <= MAX_DOTS:
            yield from (f'<circle class="dot s{series["style"]}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points)


def _spikes(frame: Frame) -> Iterator[str]:
    """A dotted line from the validation loss before growth up to the one after it."""
    for spike in frame.chart["spikes"]:
        x, before, after = frame.x(spike["x"]), frame.y(spike["before"]), frame.y(spike["after"])
        yield f'<line class="spike" x1="{x:.1f}" x2="{x:.1f}" y1="{before:.1f}" y2="{after:.1f}"/>'
        yield from (
            f'<circle class="ring s{spike["style"]}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for y in (before, after)
        )
        yield f'<text class="mark" x="{x + 9:.1f}" y="{min(before, after) + 4:.1f}">growth</text>'


def _arrow(frame: Frame) -> Iterator[str]:
    """At equal loss, from the baseline's FLOPs to the grown model's."""
    arrow = frame.chart["arrow"]
    if arrow is None:
        return
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
    corner = max(min(start, end) - 7, LEFT + 56)
    yield f'<text class="gain" x="{corner:.1f}" y="{y + 18:.1f}" text-anchor="end">{escape(arrow["label"])}</text>'
