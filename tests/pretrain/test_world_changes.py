"""A run that grows twice, shared by one, two and four processes in turn: the same samples in every step, the same
losses as one process has in one go."""

from __future__ import annotations

import hashlib
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from lit_gpt.checkpoint import latest, read_training
from lit_gpt.settings_files import merge
from pretrain import loop
from tests.pretrain.conftest import of_processes
from tests.pretrain.processes import run_on
from tests.pretrain.runs import records

pytestmark = pytest.mark.slow

CHANGES = {
    "model": {"name": "4L16H"},
    "stages": [
        {"name": "base", "n_layer": 1, "max_steps": 8},
        {"name": "twice", "operator": "gradual", "n_layer": 2, "optimizer_policy": "map", "max_steps": 8},
        {"name": "four", "operator": "midas", "max_steps": 8},
    ],
    "batch": {"global_batch_size": 8},
    "optimizer": {"learning_rate": 5e-3},
}
N_STEPS = 24
# processes, micro-batch, and the step to stop after; every change between 1, 2 and 4, the first at the end of a stage,
# so that the model grows from what other processes saved
SITTINGS = [(2, 1, 8), (4, 2, 11), (2, 4, 14), (1, 1, 18), (4, 1, 20), (1, 8, 22), (2, 2, N_STEPS)]
EXACT = {"rel": 1e-6, "abs": 1e-6}
"""Sums of gradients in another order round other bits of fp32."""


def recording(folder: Path, stop_after: int) -> None:
    """Note the tokens that each step trains on here; SIGTERM to the last process in the step to stop after."""
    step_rows, train_step, read = loop.step_rows, loop.train_step, []

    def noting(*arguments):
        read[:] = step_rows(*arguments)
        return list(read)

    def noted(run, stage, trained, state, *rest):
        step = state.step_count + 1
        np.save(folder / f"step-{step:04d}-of-{run.world.rank}.npy", np.concatenate(read))
        if step == stop_after and run.world.rank == run.world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(run, stage, trained, state, *rest)

    loop.step_rows, loop.train_step = noting, noted


def samples_of(folder: Path) -> list[str]:
    """A hash of the tokens of each step, over all processes in global order: a rank has a stretch of it."""
    steps = [sorted(folder.glob(f"step-{step:04d}-of-*.npy")) for step in range(1, N_STEPS + 1)]
    assert all(steps)
    return [hashlib.sha256(np.concatenate([np.load(path) for path in paths]).tobytes()).hexdigest() for paths in steps]


@pytest.fixture(scope="module")
def go(tmp_path_factory, prepared):
    """Run in sittings; returns the run's folder and what its steps trained on."""

    def run(sittings: list[tuple[int, int, int]]) -> tuple[Path, list[str]]:
        folder = tmp_path_factory.mktemp("sittings")
        for size, micro_batch_size, stop_after in sittings:
            settings = merge(of_processes(folder / "run", prepared), CHANGES)
            settings["batch"]["micro_batch_size"] = micro_batch_size
            (folder / "samples").mkdir(exist_ok=True)
            prepare = partial(recording, folder / "samples", 0 if stop_after == N_STEPS else stop_after)
            code = 0 if stop_after == N_STEPS else 75
            run_on(settings, size, folder / f"until {stop_after}", prepare=prepare, code=code)
            assert latest(folder / "run" / "checkpoints").name == f"step-{stop_after:010d}"
        return folder / "run", samples_of(folder / "samples")

    return run


@pytest.fixture(scope="module")
def alone(go):
    return go([(1, 8, N_STEPS)])


def assert_same_losses(folder: Path, expected: Path) -> None:
    ours, theirs = records(folder), records(expected)
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], **EXACT)
    assert [(line["step"], line["position"]) for line in ours] == [(line["step"], line["position"]) for line in theirs]
    ours, theirs = records(folder, "evals.jsonl"), records(expected, "evals.jsonl")
    assert [line["value"] for line in ours] == pytest.approx([line["value"] for line in theirs], **EXACT)
    assert [(line["step"], line["when"]) for line in ours] == [(line["step"], line["when"]) for line in theirs]


def test_steps_of_one_process_train_on_other_samples_each(alone):
    assert len(set(alone[1])) == N_STEPS


def test_two_growths_shared_by_two_processes_are_those_of_one(go, alone):
    folder, samples = go([(2, 2, N_STEPS)])
    assert samples == alone[1]
    assert_same_losses(folder, alone[0])
    history = read_training(latest(folder / "checkpoints")).state["history"]
    assert [record["operator"] for record in history] == ["gradual", "midas"]


def test_whoever_shares_a_run_it_trains_on_the_same_samples_and_has_the_same_losses(go, alone):
    folder, samples = go(SITTINGS)
    assert samples == alone[1]
    assert_same_losses(folder, alone[0])
