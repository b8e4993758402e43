"""scripts/slurm/prepare.sh under SLURM: an array writes what one process writes, whatever happens to its tasks."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm

N_FILES = 14
OPTIONS = ("--tokenizer", "bytes", "--unit-bytes", "20000", "--quiet")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some files of JSON lines, each large enough for a unit of its own."""
    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for number in range(N_FILES):
        texts = (" ".join(rng.choices(("grow", "stack", "layer", "width", "\u00e9t\u00e9"), k=400)) for _ in range(12))
        (folder / f"part-{number:02d}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture(scope="module")
def plain(corpus: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes of the corpus."""
    out = tmp_path_factory.mktemp("plain") / "out"
    command = [sys.executable, root / "scripts" / "prepare.py", "--input", corpus, "--out", out, *OPTIONS]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, cwd=root)
    return contents(out)


@pytest.fixture
def submit(slurm, corpus: Path, root: Path, tmp_path: Path):
    """Submit the job from outside the checkout; options are those of sbatch."""

    def call(*options: str, source: Path = corpus, **environment: str) -> int:
        return slurm.submit(
            root / "scripts" / "slurm" / "prepare.sh",
            *("--input", source, "--out", "out", *OPTIONS),
            options=options,
            cwd=tmp_path,
            environment={"LIT_GROW_ROOT": str(root), "PYTHON": sys.executable, **environment},
        )

    return call


@pytest.fixture
def slow(tmp_path: Path) -> dict[str, str]:
    """Variables that make a task wait before its third unit, for the file `release`."""
    python = tmp_path / "slow-python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("slow_prepare.py")} "$@"\n')
    python.chmod(0o755)
    return {"PYTHON": str(python), "RELEASE": str(tmp_path / "release")}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def wait_for_process(slurm, folder: Path, task: int) -> int:
    """The process of a task that waits before its third unit."""
    note = folder / f"release.{task}"
    slurm.wait_until(lambda: note.exists() and note.read_text() != "", f"task {task} to be at work")
    return int(note.read_text())


def test_an_array_writes_what_one_process_writes(slurm, submit, plain: dict[str, bytes], tmp_path: Path):
    job = submit("--array=0-2", "--cpus-per-task=2")

    assert slurm.wait(job) == dict.fromkeys(range(3), "COMPLETED"), slurm.output(job, 0)
    assert contents(tmp_path / "out") == plain
    assert "2 workers" in slurm.output(job, 1)
    assert any("corpus sha256" in slurm.output(job, task) for task in range(3)), "nobody wrote the manifest"


def test_a_job_that_follows_finds_all_done(slurm, submit, plain: dict[str, bytes], tmp_path: Path):
    array = submit("--array=5-6")
    after = submit(f"--dependency=afterany:{array}")

    assert set(slurm.wait(after).values()) == {"COMPLETED"}
    assert "corpus sha256" in slurm.output(after)
    assert contents(tmp_path / "out") == plain


@pytest.mark.parametrize("end", ["scancel", "kill -9"])
def test_what_a_lost_task_left_undone_is_done_by_the_same_command(
    slurm, submit, slow: dict[str, str], plain: dict[str, bytes], tmp_path: Path, end: str
):
    job = submit("--array=0-2", **slow)
    process = wait_for_process(slurm, tmp_path, 1)
    if end == "scancel":
        slurm.command("scancel", f"{job}_1")
    else:
        os.kill(process, signal.SIGKILL)
    slurm.wait_until(lambda: slurm.states(job)[1] in ("CANCELLED", "FAILED"), "the loss of task 1")
    (tmp_path / "release").touch()
    states = slurm.wait(job)

    assert states == {0: "COMPLETED", 1: "CANCELLED" if end == "scancel" else "FAILED", 2: "COMPLETED"}
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert ("the same command continues" in slurm.output(job, 1)) == (end == "scancel")

    again = submit("--array=0-1")

    assert slurm.wait(again) == dict.fromkeys(range(2), "COMPLETED")
    assert contents(tmp_path / "out") == plain


def test_a_requeued_task_goes_on_by_itself(
    slurm, submit, slow: dict[str, str], plain: dict[str, bytes], tmp_path: Path
):
    job = submit("--array=0-2", **slow)
    wait_for_process(slurm, tmp_path, 1)
    slurm.requeue(job, 1)
    (tmp_path / "release").touch()

    assert slurm.wait(job) == dict.fromkeys(range(3), "COMPLETED"), slurm.output(job, 1)
    assert contents(tmp_path / "out") == plain
    assert slurm.output(job, 1).count("task 1 of job") == 2


def test_a_damaged_file_fails_its_task_which_names_it(slurm, submit, corpus: Path, tmp_path: Path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in corpus.iterdir():
        (damaged / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    victim = damaged / "part-04.jsonl.gz"
    victim.write_bytes(victim.read_bytes()[:-100])

    job = submit("--array=0-2", source=damaged)

    states = slurm.wait(job)
    (failed,) = [task for task, state in states.items() if state == "FAILED"]
    assert sorted(states.values()) == ["COMPLETED", "COMPLETED", "FAILED"]
    assert f"{victim} is damaged" in slurm.output(job, failed)
    assert "Traceback" not in slurm.output(job, failed)
    assert not (tmp_path / "out" / "manifest.json").exists()
