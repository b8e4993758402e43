"""The charts as PNG and SVG files, for slides and papers; drawn by matplotlib from the same data as the page."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grow.report.axes import INSET, colour_and_dash

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart; line styles differ as well
# and from the ninth on a scale from blue to yellow (viridis) for what is ordered
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8A7500", "#5E4FB0", "#555555"),
    *("#440154", "#3b528b", "#21918c", "#5ec962", "#d3c01a"),
)
DASHES = ("-", (0, (6, 2)), (0, (1.5, 1.5)), "-.")
MAX_NAMES = 6  # more stand beside the plot, not in it
MARKERS = {"dots": "o", "marks": "o", "stars": "*"}
INK = "#1d2430"


def write_figures(charts: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write every chart as <id>.png and <id>.svg into `folder`; returns the paths."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with drawing():
        for chart in charts:
            figure = Figure(figsize=(7.2, 4.2), dpi=160, layout="constrained")
            draw(figure.add_subplot(), chart)
            for suffix in ("png", "svg"):
                paths.append(folder / f"{chart['id']}.{suffix}")
                save(figure, paths[-1])
    return paths


def drawing() -> AbstractContextManager[None]:
    """The settings that every figure is drawn and saved under."""
    import matplotlib

    # the salt replaces random ids, so that equal charts give equal files
    return matplotlib.rc_context({"svg.hashsalt": "lit-grow", "svg.fonttype": "none", "font.size": 10})


def save(figure: Figure, path: Path) -> None:
    """Write .png or .svg, without the date and the version of what drew it."""
    figure.savefig(path, metadata={"Software": None} if path.suffix == ".png" else {"Date": None})


def draw(axes: Axes, chart: dict[str, Any]) -> None:
    """A chart with its title, axes and names, without its caption."""
    _draw_plot(axes, chart)
    axes.set_title(chart["title"], loc="left", color=INK)
    axes.set_xlabel(chart["x"]["label"])
    axes.set_ylabel(chart["y"]["label"])
    axes.spines[["top", "right", "left"]].set_visible(False)
    if chart["top"]:
        top = axes.secondary_xaxis("top")
        _set_ticks(top.xaxis, chart["top"]["ticks"])
        top.set_xlabel(chart["top"]["label"], fontsize=8)
    if chart["inset"]:
        across, up = INSET
        inset = axes.inset_axes((across + 0.06, up + 0.07, 0.93 - across, 0.92 - up))
        _draw_plot(inset, chart["inset"])
        inset.tick_params(labelsize=7)
    handles, names = axes.get_legend_handles_labels()
    if len(names) > MAX_NAMES:
        axes.figure.legend(handles, names, loc="outside right upper", frameon=False, fontsize=7)
    else:
        axes.legend(frameon=False, loc="lower left" if chart["inset"] else "best", fontsize=9)


def _draw_plot(axes: Axes, chart: dict[str, Any]) -> None:
    """Lines, marks and ticks of a chart or of an inset."""
    for name in chart["log"]:
        axes.set(**{f"{name}scale": "log"})
    labelled = set()
    for series in chart["series"]:
        x, y = zip(*series["points"], strict=True)
        (colour, dash), kind = colour_and_dash(series["style"]), series["kind"]
        colour, dash = COLOURS[colour], DASHES[dash]
        if kind == "logged":
            axes.plot(x, y, color=colour, linewidth=0.6, alpha=0.35)
            continue
        name = series["name"] if series["name"] not in labelled else None
        labelled.add(series["name"])
        for at, interval in zip(x, series.get("intervals", ()), strict=False):
            axes.plot([at] * 2, interval or [math.nan] * 2, color=colour, linewidth=0.8)
        look = {"linestyle": "none" if kind in ("marks", "stars") else "--" if kind == "fit" else dash}
        look |= {
            "linewidth": 1.1 if kind == "fit" else 1.8,
            "marker": MARKERS.get(kind),
            "ms": 9 if kind == "stars" else 3,
        }
        axes.plot(x, y, color=colour, label=name, **look)
    _draw_marks(axes, chart)
    for axis, name in ((axes.xaxis, "x"), (axes.yaxis, "y")):
        _set_ticks(axis, chart[name]["ticks"])
    axes.set_xlim(chart["x"]["min"], chart["x"]["max"])
    axes.set_ylim(chart["y"]["min"], chart["y"]["max"])
    axes.grid(axis="y", color="#e4e2dc", linewidth=0.8)


def _set_ticks(axis: Axis, ticks: list[dict[str, Any]]) -> None:
    axis.set_ticks([tick["at"] for tick in ticks], [tick["label"] for tick in ticks])
    axis.set_ticks([], minor=True)


def _draw_marks(axes: Axes, chart: dict[str, Any]) -> None:
    for spike in chart["spikes"]:
        ends = (spike["before"], spike["after"])
        axes.plot([spike["x"]] * 2, ends, color=INK, linestyle=":", linewidth=1, marker="o", ms=4, mfc="white")
        axes.annotate("growth", (spike["x"], max(ends)), (6, -3), textcoords="offset points", color=INK, fontsize=9)
    for arrow in chart["arrows"]:
        start, end = (arrow["x_from"], arrow["y"]), (arrow["x_to"], arrow["y"])
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.4})
        corner, look = (min(start[0], end[0]), arrow["y"]), {"ha": "right", "color": INK, "weight": "bold"}
        axes.annotate(arrow["label"], corner, (-5, -12), textcoords="offset points", fontsize=9, **look)
