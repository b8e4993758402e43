"""However often preparation is killed, and with however many processes it goes on: the bytes are the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.scripts.corpora import contents, make_texts, write_corpus

KILLS = 50
TASKS = [["--task", f"{i}/{n}"] for n in (1, 2, 3) for i in range(n)]
WORKERS = [["--workers", n] for n in (1, 2, 3)]


@pytest.fixture
def command(root, run, tmp_path) -> list[str]:
    """A preparation of a second or two: 24 units, SentencePiece, both splits, some of it packed."""
    folder = write_corpus(tmp_path / "in", [text * 9 for text in make_texts(480)], per_file=20)
    options = ["--input", folder, "--vocab-size", 320, "--unit-bytes", 1000, "--validation-fraction", 0.1]
    assert run(*options, "--out", tmp_path / "tokenizer", "--plan-only")[0] == 0
    options += ["--tokenizer", tmp_path / "tokenizer" / "tokenizer.model"]
    return [sys.executable, str(root / "scripts" / "prepare.py"), *map(str, options)]


def kill_after(secs: float, command: Sequence[object]) -> bool:
    """Start a command, and kill it with all its workers; returns whether it was still at work."""
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        try:
            process.wait(secs)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        errors = process.stderr.read()  # to the end: until the last worker is dead, too
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode != 0


def go_on(run: Callable[..., tuple[int, str, str]], out: Path, options: Sequence[str], rng: random.Random) -> None:
    """To the end, in one go or in tasks."""
    n_tasks = rng.choice([0, 1, 2, 5])
    order = rng.sample([f"{i}/{n_tasks}" for i in range(n_tasks)], n_tasks)
    for extra in [["--task", task] for task in order] or [rng.choice(WORKERS)]:
        code, _, errors = run(*options, "--out", out, *extra)
        assert (code, errors) == (0, "")


@pytest.mark.slow
def test_after_fifty_kills_the_bytes_are_those_of_an_undisturbed_run(command, run, tmp_path):
    started_secs = time.monotonic()
    assert not kill_after(600, [*command, "--out", tmp_path / "undisturbed"])
    usual_secs = time.monotonic() - started_secs
    expected = contents(tmp_path / "undisturbed")
    assert sum(name.endswith(".bin") for name in expected) > 36

    rng = random.Random(0)
    kills, found = 0, set()
    while kills < KILLS:
        out = tmp_path / f"killed-{kills}"
        for _ in range(rng.choice([1, 1, 2, 3])):
            extra = rng.choice([*TASKS, *WORKERS])
            kills += kill_after(rng.uniform(0.05, 0.95) * usual_secs, [*command, "--out", out, *extra])
            found.add(len(list(out.glob("*.bin"))))
        go_on(run, out, command[2:], rng)
        assert contents(out) == expected
    assert len(found) > 10  # they came at all stages of the work
