"""compare.html: the ranking as one page that needs nothing else, in the looks of the report's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from grow.compare.ranking import RankedArm, Ranking
from grow.compare.text import HEAD, rows, sentences
from grow.report.axes import chart, nice_ticks, style_number, thinned, with_axes
from grow.report.page import environment

ROW, TOP, BOTTOM, RIGHT = 30, 10, 40, 16  # of the figure, in drawing units
FROM_SHARE = 0.3  # curves are shown from this share of the FLOPs on


def render(ranking: Ranking, facts: Mapping[str, Any]) -> str:
    """The page as text.

    facts: how it was made, for the end of the page: command, files of settings and their text, versions.
    """
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            title=f"{ranking.arms[0].name} ends lowest",
            sentences=sentences(ranking),
            head=HEAD,
            rows=[(style_number(i), row) for i, row in enumerate(rows(ranking))],
            ranking=ranking,
            wide=ranking_svg(ranking, 940),
            narrow=ranking_svg(ranking, 340),
            chart=curves_chart(ranking),
            facts=facts,
        )
    )


def curves_chart(ranking: Ranking) -> dict[str, Any]:
    """Mean training loss over seeds against FLOPs, as plain data for the report's drawing."""
    series = [
        {
            "name": arm.name,
            "role": "grown",
            "style": style_number(number),
            "kind": "line",
            "points": thinned(arm.curve.flops, arm.curve.loss),
        }
        for number, arm in enumerate(ranking.curves)
    ]
    last = max(one["points"][-1][0] for one in series)
    shown = [{**one, "points": [p for p in one["points"] if p[0] >= FROM_SHARE * last]} for one in series]
    drawn = chart(
        "compare-curves",
        "loss",
        "Training loss against compute",
        [one for one in shown if one["points"]],
        caption=f"The mean over {len(ranking.seeds)} seeds of the mean of the last "
        f"{ranking.window_tokens:,.0f} tokens; growing is charged for its base.",
        y_label="training loss, nats per token",
        from_x=FROM_SHARE * last,
    )
    return with_axes(drawn)


def ranking_svg(ranking: Ranking, width: int) -> str:
    """A row for every arm: a ring for each seed, the mean, and its 95 % interval."""
    ends = [end for arm in ranking.arms for end in _ends(arm)]
    pad = 0.06 * (max(ends) - min(ends)) or 0.01
    low, high = min(ends) - pad, max(ends) + pad
    left = min(0.4 * width, 20 + 7.5 * max(len(arm.name) for arm in ranking.arms))
    height = TOP + ROW * len(ranking.arms) + BOTTOM

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (width - RIGHT - left)

    label = escape(f"{ranking.measured} of {', '.join(arm.name for arm in ranking.arms)}")
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">']
    base = height - BOTTOM
    for tick in nice_ticks(low, high, about=max(2, width // 160)):
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{base}"/>')
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{base + 16}" text-anchor="middle">{tick:g}</text>')
    for place, arm in enumerate(ranking.arms):
        parts += _row(arm, style_number(place), TOP + ROW * (place + 0.5), left, x)
    middle = (left + width - RIGHT) / 2
    parts.append(
        f'<text class="label" x="{middle:g}" y="{height - 6}" text-anchor="middle">{escape(ranking.measured)}</text>'
    )
    return "\n".join([*parts, "</svg>"])


def _ends(arm: RankedArm) -> Iterator[float]:
    yield from arm.losses
    yield from (end for end in (arm.loss.low, arm.loss.high) if end is not None)


def _row(arm: RankedArm, style: int, y: float, left: float, x: Any) -> Iterator[str]:
    yield f'<text class="tick" x="{left - 10:g}" y="{y + 4:g}" text-anchor="end">{escape(arm.name)}</text>'
    if arm.loss.low is not None and arm.loss.high is not None:
        yield f'<line class="line s{style}" x1="{x(arm.loss.low):.1f}" x2="{x(arm.loss.high):.1f}" y1="{y}" y2="{y}"/>'
    yield from (f'<circle class="dot s{style}" cx="{x(loss):.1f}" cy="{y}" r="3"/>' for loss in arm.losses)
    mean = x(arm.loss.mean)
    yield f'<line class="line s{style}" x1="{mean:.1f}" x2="{mean:.1f}" y1="{y - 7}" y2="{y + 7}"/>'
