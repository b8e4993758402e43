"""Runs of several processes for tests: forked from one that has imported torch already, they meet by a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.forked import Started, pretrain, start_function
from tests.pretrain.conftest import command_for


def start(
    settings: dict[str, object], size: int, folder: Path, *, prepare: Callable[[], None] | None = None
) -> Started:
    """`pretrain` on these settings as so many processes, which leave what they say in a folder of their own.

    prepare: a function of a module, or a partial of one; each process calls it first, for what a test has to change.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return start_function(_prepared, (prepare, command_for(settings, folder)), size, folder / "logs")


def run_on(
    settings: dict[str, object], size: int, folder: Path, *, prepare: Callable[[], None] | None = None, code: int = 0
) -> Started:
    """Start, wait, and see that all of them ended with the code."""
    started = start(settings, size, folder, prepare=prepare)
    codes = started.wait()
    assert codes == [code] * size, (codes, *map(started.errors, range(size)))
    return started


def _prepared(prepare: Callable[[], None] | None, arguments: list[str]) -> None:
    if prepare is not None:
        prepare()
    pretrain(arguments)
