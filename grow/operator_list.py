"""The registry of operators as text: what `grow operators` prints, and the tables of docs/operators.md."""

from __future__ import annotations

from collections.abc import Sequence

from grow.registry import FUNCTION, OPERATORS, RETIRED, SIZES, UNAVAILABLE, Operator


def operator_list() -> list[str]:
    """Lines of plain text: every operator with all that is known of it, then the names that cannot be asked for."""
    lines = []
    for op in OPERATORS.values():
        lines += [
            f"{op.name}{f' (also {_names(op.aliases)})' if op.aliases else ''}",
            f"  what        {op.summary}",
            f"  axis        {op.axis}",
            f"  preserves   {FUNCTION[op.function]}",
            f"  trained     {op.trained}",
            f"  paper       {op.paper}",
            f"  options     {_options(op)}",
        ]
    return [*lines, "", "not available", *(f"  {_names([name])}: {reason}" for name, reason in _refused())]


def operator_tables() -> list[str]:
    """Lines of Markdown: a table of the operators, and one of the names that cannot be asked for."""
    lines = ["| operator | also | what | axis | preserves | trained afterwards | options | paper |", _rule(8)]
    for op in OPERATORS.values():
        cells = (_names(op.aliases), op.summary, op.axis, op.function, op.trained, _short_options(op), op.paper)
        lines.append(_row(f"`{op.name}`", *cells))
    lines += ["", "| not available | why |", _rule(2)]
    return lines + [_row(f"`{_names([name])}`", reason) for name, reason in _refused()]


def _short_options(op: Operator) -> str:
    """As `_options`, with one word for the four sizes that make up the width."""
    if not set(SIZES) <= set(op.options):
        return _options(op)
    return ", ".join([*(_option(option) for option in op.options if option not in SIZES), "widths"])


def _refused() -> list[tuple[str, str]]:
    return [*UNAVAILABLE.items(), *RETIRED.items()]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('*', '&#42;') for cell in cells)} |"


def _rule(n_columns: int) -> str:
    return "|---" * n_columns + "|"


def _names(names: Sequence[str]) -> str:
    return ", ".join(name.replace("_", "-") for name in names)


def _options(op: Operator) -> str:
    return ", ".join(_option(option) for option in op.options)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
