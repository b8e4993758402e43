"""The private SLURM itself: what the other tests of this folder take for granted."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm


def script(folder: Path, text: str) -> Path:
    path = folder / "job.sh"
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    return path


def test_a_job_runs_and_its_output_is_kept(slurm, tmp_path: Path):
    job = slurm.submit(script(tmp_path, 'echo "$1 in $PWD"'), "two words", cwd=tmp_path)

    assert set(slurm.wait(job).values()) == {"COMPLETED"}
    assert slurm.output(job) == f"two words in {tmp_path}\n"


def test_the_tasks_of_an_array_have_states_of_their_own(slurm, tmp_path: Path):
    job = slurm.submit(
        script(tmp_path, "echo task $SLURM_ARRAY_TASK_ID; exit $SLURM_ARRAY_TASK_ID"), options=["--array=0-1"]
    )

    assert slurm.wait(job) == {0: "COMPLETED", 1: "FAILED"}
    assert [slurm.output(job, task) for task in (0, 1)] == ["task 0\n", "task 1\n"]


def test_one_job_spans_both_nodes(slurm, tmp_path: Path):
    job = slurm.submit(script(tmp_path, "srun bash -c 'echo $SLURM_NODEID'"), options=["--nodes=2", "--ntasks=2"])

    assert set(slurm.wait(job).values()) == {"COMPLETED"}
    assert sorted(slurm.output(job).split()) == ["0", "1"]


def test_a_cancelled_job_hears_sigterm_first(slurm, tmp_path: Path):
    waits = "trap 'echo heard; exit 0' TERM; touch started; sleep 100 & wait"
    job = slurm.submit(script(tmp_path, waits), cwd=tmp_path)
    slurm.wait_until((tmp_path / "started").exists, "the start")

    slurm.command("scancel", "--signal=TERM", "--full", str(job))
    slurm.wait(job)

    assert "heard" in slurm.output(job)
