"""Eq. 2 and eq. 50 of arXiv 2405.15319 over the budget, a curve per model size: the kind of its figures 9 and 22."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from grow.planning.guideline import (
    FITTED_FLOPS,
    FITTED_PARAMETERS,
    Guideline,
    fitted_growth_factor,
    growth_timing,
    short,
)
from grow.report.extra import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZES = (0.41e9, 1.1e9, 3e9, 5e9)
SPAN = (5e19, 2e22)  # FLOPs, at least
FORMATS = ("png", "svg")
TOKENS_TOP = 45e9  # eq. 2 leaves every scale at the small end
FACTOR_TOP = 26


def check_plot_path(path: Path) -> None:
    """Refuse what could not be written or drawn, before anything is computed.

    Raises:
        ValueError: another format, or matplotlib is not installed.
    """
    if path.suffix.lstrip(".") not in FORMATS:
        raise ValueError(f"--plot {path}: the name must end in .{' or .'.join(FORMATS)}")
    require("--plot", "matplotlib")


def write_plot(plan: Guideline, path: Path) -> None:
    """Both rules, dashed outside the budgets and sizes that eq. 2 was fitted to, and where the plan lies on them."""
    from matplotlib.figure import Figure

    from grow.report.figures import drawing, save

    with drawing():
        figure = Figure(figsize=(10.4, 4.2), dpi=160, layout="constrained")
        timing, factor = figure.subplots(1, 2)
        _draw(timing, plan, growth_timing, plan.timing[plan.count], TOKENS_TOP)
        timing.set_ylabel("growth timing d, tokens (eq. 2)")
        timing.yaxis.set_major_formatter(lambda value, _: short(value) if value else "0")
        _draw(factor, plan, fitted_growth_factor, plan.fitted_factor, FACTOR_TOP)
        factor.set_ylabel("growth factor g (eq. 50; the paper recommends 4)")
        factor.axhline(4, color="#555555", linewidth=0.8, linestyle=":")
        path.parent.mkdir(parents=True, exist_ok=True)
        save(figure, path)


def _draw(axes: Axes, plan: Guideline, rule: Callable[[float, float], float], value: float, top: float) -> None:
    from grow.report.figures import COLOURS, INK

    low, high = min(SPAN[0], plan.rule_flops / 2), max(SPAN[1], plan.rule_flops * 2)
    budgets = [low * (high / low) ** (i / 200) for i in range(201)]
    for parameters, colour in zip(dict.fromkeys((*SIZES, plan.rule_parameters)), COLOURS, strict=False):
        fits = FITTED_PARAMETERS[0] <= parameters <= FITTED_PARAMETERS[1]
        label = None if fits else f"N = {short(parameters)} (not fitted)"
        axes.plot(budgets, [rule(parameters, each) for each in budgets], "--", color=colour, linewidth=1, label=label)
        if fits:
            inside = [each for each in budgets if FITTED_FLOPS[0] <= each <= FITTED_FLOPS[1]]
            values = [rule(parameters, each) for each in inside]
            axes.plot(inside, values, color=colour, linewidth=2, label=f"N = {short(parameters)}")
    axes.plot([plan.rule_flops], [value], "o", color=INK, label=f"this plan, N = {short(plan.rule_parameters)}")
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(0, max(top, 1.15 * value))
    axes.set_xlabel("budget C, FLOPs (solid: fitted)")
    axes.grid(axis="y", color="#e4e2dc", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
