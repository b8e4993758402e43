"""report.html: one file that needs nothing else, rendered from the report's dict and from it alone."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from grow.report import text
from grow.report.svg import chart_svg, look_of

if TYPE_CHECKING:
    from jinja2 import Environment

# Viridis: ordered, and told apart by lightness alone
LAYER_COLOURS = ((68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37))
FORMATS = (text.loss, text.percent, text.flops, text.count, text.duration, text.whole, text.epochs)


def render(report: dict[str, Any]) -> str:
    """The page as text; every number in it is one of the report's."""
    return environment().get_template("report.html.j2").render(report=report)


@cache
def environment() -> Environment:
    """What finds the templates of this folder and gives them their functions."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("grow.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {function.__name__: function for function in (*FORMATS, chart_svg, layer_style, look_of)}
    return environment


def layer_style(layer: int | None, n_layer: int) -> str:
    """CSS colours of source layer `layer` (from 1) of `n_layer`: its place on the scale, and text that shows on it.

    A layer without a source is grey.
    """
    if layer is None:
        return "background:#666;color:#fff"
    place = 0.06 + 0.86 * ((layer - 1) / (n_layer - 1) if n_layer > 1 else 0.3)
    position = place * (len(LAYER_COLOURS) - 1)
    below = int(position)
    mixed = [
        round(a + (b - a) * (position - below))
        for a, b in zip(LAYER_COLOURS[below], LAYER_COLOURS[below + 1], strict=True)
    ]
    ink = "#111" if _luminance(mixed) > 0.18 else "#fff"  # where black and white contrast equally
    return f"background:rgb({mixed[0]},{mixed[1]},{mixed[2]});color:{ink}"


def _luminance(rgb: list[int]) -> float:
    """Relative luminance of an sRGB colour (WCAG 2.1)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
