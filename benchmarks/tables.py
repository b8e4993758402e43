"""Tables in pages that are made from results: what stands between `<!-- table: NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lit_gpt.atomic import write_atomically

NAME_AND_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def row(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    return "\n".join([row(head), row(["---", *(["--:"] * (len(head) - 1))]), *map(row, rows)])


def with_tables(page: str, table: Callable[[str], str]) -> str:
    """The page with what `table` makes of each name between its marks."""
    return NAME_AND_TABLE.sub(lambda match: f"{match[1]}{table(match[2])}\n{match[3]}", page)


def renew(page: Path, table: Callable[[str], str]) -> None:
    """Write the page with its tables."""
    write_atomically(page, with_tables(page.read_text(encoding="utf-8"), table).encode())


def check(page: Path, table: Callable[[str], str], command: str) -> int:
    """0 if the page has these tables already, else 1, after naming the command that makes them."""
    text = page.read_text(encoding="utf-8")
    if with_tables(text, table) == text:
        return 0
    sys.stdout.write(f"{page} has other tables than its results; run {command}\n")
    return 1
