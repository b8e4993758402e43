"""How numbers are written in the report: one function per quantity, shared by sentences, page and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

NARROW = "\u202f"  # a narrow space that does not break, between a number and its unit
MINUS = "\u2212"
NOTHING = "\u2013"
LARGE = 1e6  # losses and percentages beyond are written as powers
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def loss(value: float | None) -> str:
    """Nats per token or bits per byte."""
    if value is not None and value >= LARGE:
        return flops(value)
    return NOTHING if value is None else f"{value:.3f}".replace("-", MINUS)


def score(value: float, stderr: float | None) -> str:
    """A score with its standard error: 52.8, 0.5 -> "52.80 ± 0.50"; perplexities of untrained models as powers."""
    written = f"{value:.2f}" if value < 1e5 else flops(value)
    return (
        written if stderr is None else f"{written} ± {stderr:.2f}" if stderr < 1e5 else f"{written} ± {flops(stderr)}"
    )


def percent(share: float | None, *, signed: bool = True) -> str:
    """0.79 -> "+79 %"; one decimal below ten per cent; ends of intervals that say nothing as powers."""
    if share is None:
        return NOTHING
    value = 100 * share
    digits = 0 if abs(value) >= 9.95 else 1
    number = f"{abs(value):,.{digits}f}" if abs(value) < LARGE else flops(abs(value))
    text = f"{number}{NARROW}%"
    if not signed or float(f"{value:.{digits}f}") == 0:
        return text
    return (MINUS if value < 0 else "+") + text


def percent_over_seeds(share: float, stderr: float) -> str:
    """0.54, 0.03 -> "+54 % ± 3.0 %": a mean and its standard error."""
    return f"{percent(share)} ± {percent(stderr, signed=False)}"


def power_of_ten(exponent: int) -> str:
    """12 -> "10¹²"."""
    return "10" + str(exponent).translate(SUPERSCRIPT)


def flops(value: float | None) -> str:
    """2.4e12 -> "2.40×10¹²"."""
    if value is None:
        return NOTHING
    if not value:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}×{power_of_ten(int(exponent))}"


def count(value: float | None) -> str:
    """Tokens, parameters: 692224 -> "692 k"."""
    if value is None:
        return NOTHING
    number, suffix = scaled(value)
    return f"{_three_digits(number)}{NARROW}{suffix}" if suffix else f"{value:g}"


def scaled(value: float) -> tuple[float, str]:
    """7e9 -> 7, "B"; no suffix below a thousand."""
    for size, suffix in SUFFIXES:
        if value >= 0.9995 * size:
            return value / size, suffix
    return value, ""


def _three_digits(value: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(value) + 1e-9))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def duration(seconds: float | None) -> str:
    """247 -> "4 min 7 s"."""
    if seconds is None:
        return NOTHING
    if seconds < 10:
        return f"{seconds:.1f}{NARROW}s"
    total = round(seconds)
    if total < 60:
        return f"{total}{NARROW}s"
    if total < 3600:
        return f"{total // 60}{NARROW}min {total % 60}{NARROW}s"
    minutes = round(seconds / 60)
    return f"{minutes // 60}{NARROW}h {minutes % 60}{NARROW}min"


def whole(value: float | None) -> str:
    """1234567 -> "1,234,567"."""
    return NOTHING if value is None else f"{value:,.0f}"


def epochs(value: float | None) -> str:
    """Times that the data was read."""
    return NOTHING if value is None else f"{value:.2f}"


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as columns of text for a terminal."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
