"""The picture of `grow plan --plot`: both rules of arXiv 2405.15319 over the budget, and where the plan lies."""

from __future__ import annotations

from pathlib import Path

from grow.planning.guideline import Guideline, short
from grow.report.extra import require

FORMATS = ("png", "svg")


def check_plot_path(path: Path) -> None:
    """Refuse what could not be written or drawn, before anything is computed.

    Raises:
        ValueError: another format, or matplotlib is not installed.
    """
    if path.suffix.lstrip(".") not in FORMATS:
        raise ValueError(f"--plot {path}: the name must end in .{' or .'.join(FORMATS)}")
    require("--plot", "matplotlib")


def write_plot(plan: Guideline, path: Path) -> None:
    """Draw what `grow report` draws of runs: one picture of two charts."""
    from matplotlib.figure import Figure

    from grow.report.figures import draw, drawing, save
    from grow.report.guideline_charts import Grown, guideline_charts

    name = f"this plan, N = {short(plan.rule_parameters)}"
    planned = Grown(name, plan.rule_parameters, plan.rule_flops, plan.base.tokens, plan.factor)
    with drawing():
        figure = Figure(figsize=(13, 4.2), dpi=160, layout="constrained")
        for axes, chart in zip(figure.subplots(1, 2), guideline_charts([planned]), strict=True):
            draw(axes, chart)
        path.parent.mkdir(parents=True, exist_ok=True)
        save(figure, path)
