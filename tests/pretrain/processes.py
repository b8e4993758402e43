"""Runs of several processes for tests: forked from one that has imported torch already, they meet by a file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.forked import Started, place, pretrain, start_function
from tests.pretrain.conftest import command_for


def run_on(
    settings: dict[str, object],
    size: int,
    folder: Path,
    *flags: str,
    prepare: Callable[[], None] | None = None,
    code: int = 0,
) -> Started:
    """`pretrain` on these settings as so many processes, until all of them have ended with the code.

    Args:
        settings: of the run.
        size: number of processes.
        folder: a new one, for what they say.
        flags: further ones of the command.
        prepare: a function of a module, or a partial of one; each process calls it first, to change what a test needs.
        code: how all of them are to end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = start_function(_prepared, (prepare, command_for(settings, folder, *flags)), size, folder / "logs")
    codes = started.wait()
    assert codes == [code] * size, (codes, *map(started.errors, range(size)))
    return started


def _prepared(prepare: Callable[[], None] | None, arguments: list[str]) -> None:
    if prepare is not None:
        prepare()
    pretrain(arguments)


def start(settings: dict[str, object], size: int, folder: Path, *, script: str) -> list[subprocess.Popen[str]]:
    """A script that is given settings, as so many fresh interpreters: for what happens before torch is imported."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", script, *command_for(settings, folder)]
    (folder / "meeting").unlink(missing_ok=True)
    return [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "RANK": str(rank), **place(rank, size, folder / "meeting")},
        )
        for rank in range(size)
    ]


def finish(processes: list[subprocess.Popen[str]], timeout_secs: float = 300) -> list[subprocess.CompletedProcess[str]]:
    """Wait for fresh interpreters; what is left after a time is killed."""
    done = []
    try:
        for process in processes:
            stdout, stderr = process.communicate(timeout=timeout_secs)
            done.append(subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr))
    finally:
        for process in processes:
            process.kill()
    return done
