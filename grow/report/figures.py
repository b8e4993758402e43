"""The charts as PNG and SVG files, for slides and papers; drawn by matplotlib from the same data as the page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which colour-blind readers can tell apart; line styles differ as well
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8A7500", "#5E4FB0", "#555555")
DASHES = ("-", (0, (6, 2)), (0, (1.5, 1.5)), "-.", "-", (0, (6, 2)), (0, (1.5, 1.5)), "-.")
INK = "#1d2430"


def write_figures(charts: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write every chart as <id>.png and <id>.svg into `folder`; returns the paths."""
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    # the salt replaces random ids, so that equal charts give equal files
    with matplotlib.rc_context({"svg.hashsalt": "lit-grow", "svg.fonttype": "none", "font.size": 10}):
        for chart in charts:
            figure = Figure(figsize=(7.2, 4.2), dpi=160, layout="constrained")
            _draw(figure.add_subplot(), chart)
            for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                paths.append(folder / f"{chart['id']}.{suffix}")
                figure.savefig(paths[-1], metadata=metadata)
    return paths


def _draw(axes: Axes, chart: dict[str, Any]) -> None:
    for series in chart["series"]:
        x, y = zip(*series["points"], strict=True)
        colour, dash = COLOURS[series["style"]], DASHES[series["style"]]
        if series["kind"] == "logged":
            axes.plot(x, y, color=colour, linewidth=0.6, alpha=0.35)
        else:
            marker = "o" if series["kind"] == "dots" else None
            axes.plot(x, y, color=colour, linestyle=dash, linewidth=1.8, marker=marker, ms=3, label=series["name"])
    _draw_marks(axes, chart)
    axes.set_title(chart["title"], loc="left", color=INK)
    axes.set_xlabel(chart["x"]["label"])
    axes.set_ylabel(chart["y"]["label"])
    for axis, name in ((axes.xaxis, "x"), (axes.yaxis, "y")):
        ticks = chart[name]["ticks"]
        axis.set_ticks([tick["at"] for tick in ticks], [tick["label"] for tick in ticks])
    axes.set_xlim(chart["x"]["min"], chart["x"]["max"])
    axes.set_ylim(chart["y"]["min"], chart["y"]["max"])
    axes.grid(axis="y", color="#e4e2dc", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(frameon=False)


def _draw_marks(axes: Axes, chart: dict[str, Any]) -> None:
    for spike in chart["spikes"]:
        ends = (spike["before"], spike["after"])
        axes.plot([spike["x"]] * 2, ends, color=INK, linestyle=":", linewidth=1, marker="o", ms=4, mfc="white")
        axes.annotate("growth", (spike["x"], max(ends)), (6, -3), textcoords="offset points", color=INK, fontsize=9)
    arrow = chart["arrow"]
    if arrow is None:
        return
    start, end = (arrow["x_from"], arrow["y"]), (arrow["x_to"], arrow["y"])
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.4})
    corner = (min(start[0], end[0]), arrow["y"])
    axes.annotate(arrow["label"], corner, (-5, -14), textcoords="offset points", ha="right", color=INK, weight="bold")
