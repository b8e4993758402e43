"""A signal to one of two processes, or a kill of both, at any moment: the same command ends like an undisturbed run."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from lit_gpt.checkpoint import latest, read_training
from lit_gpt.packed_data import PackedData
from pretrain import checkpointing, evaluate, growth, loop
from pretrain.signals import REQUEUE
from tests.pretrain.conftest import of_processes
from tests.pretrain.processes import run_on
from tests.pretrain.runs import assert_same_end
from tests.pretrain.test_stopping import Sender

pytestmark = pytest.mark.slow


def in_a_step(sender: Sender, act: Callable[[], None], step: int) -> None:
    sender.before(loop, "train_step", lambda run, stage, trained, state, rows: state.step_count + 1 == step and act())


def in_validation(sender: Sender, act: Callable[[], None], when: str) -> None:
    sender.before(evaluate, "_losses", lambda *_: sender.when == when and act())


def in_a_save(sender: Sender, act: Callable[[], None], step: int) -> None:
    sender.before(checkpointing, "write_training", lambda path: path.name.endswith(f"{step:010d}") and act())


def before_growth(sender: Sender, act: Callable[[], None]) -> None:
    sender.before(loop, "enter_stage", lambda *_: act())


def in_growth(sender: Sender, act: Callable[[], None]) -> None:
    """The grown model is there, its moments are not."""
    sender.before(growth, "load_trainable_state", lambda *_: act())


def while_data_does_not_come(sender: Sender, act: Callable[[], None]) -> None:
    """In the second stage, which begins with the second read."""
    reads, original = [], PackedData.read_samples

    def read_samples(*arguments):
        reads.append(1)
        if len(reads) == 2:
            act()
            threading.Event().wait()
        return original(*arguments)

    PackedData.read_samples = read_samples


def signalled(moment: Callable[..., None], on_rank: int, note: Path) -> None:
    """SIGTERM to one of the processes at a moment. note: told how many steps were made since."""
    if int(os.environ["RANK"]) != on_rank:
        return
    sender = Sender(pytest.MonkeyPatch())

    def act() -> None:
        if not sender.is_sent:
            note.write_text("0")
        sender.send()

    moment(sender, act)
    sender.before(loop, "advance", lambda *_: sender.is_sent and note.write_text(str(sender.steps_since)))


def killed(moment: Callable[..., None]) -> None:
    """SIGKILL to every process at a moment of its own."""
    moment(Sender(pytest.MonkeyPatch()), lambda: os.kill(os.getpid(), signal.SIGKILL))


def as_a_step_of_slurm(prepare: Callable[[], None]) -> None:
    """What srun leaves in the environment of a task."""
    rank = os.environ["RANK"]
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    os.environ.update({"SLURM_JOB_ID": "7", "SLURM_PROCID": rank, "SLURM_LOCALID": rank, **step})
    prepare()


@pytest.fixture
def settings(tmp_path, prepared) -> dict[str, object]:
    return of_processes(tmp_path / "run", prepared)


MOMENTS = {
    "step": (partial(in_a_step, step=3), 1, {"stage": 1, "step_count": 3}),
    "last step of a stage": (partial(in_a_step, step=6), 0, {"stage": 1, "step_count": 6}),
    "validation": (partial(in_validation, when="every"), 0, {"step_count": 4, "validation_owed": "every"}),
    "last validation": (partial(in_validation, when="end"), 1, {"step_count": 14, "validation_owed": "end"}),
    "save in the background": (partial(in_a_save, step=4), 1, {"stage": 1}),
    "save before growth": (partial(in_a_save, step=6), 1, {"stage": 1, "step_count": 6, "grown_into_stage": 1}),
    "growth": (before_growth, 0, {"stage": 2, "step_count": 6, "grown_into_stage": 2}),
    "wait for data": (while_data_does_not_come, 1, {"stage": 2, "step_count": 6}),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_a_signal_to_one_of_two_processes_stops_both_within_a_step(name, settings, of_two, tmp_path):
    moment, on_rank, expected = MOMENTS[name]
    note = tmp_path / "steps since"

    stopped = run_on(settings, 2, tmp_path / "first", prepare=partial(signalled, moment, on_rank, note), code=75)

    assert "repeat the command to go on" in stopped.errors(0) and int(note.read_text()) <= 1
    state = read_training(latest(tmp_path / "run" / "checkpoints")).state
    assert {key: state[key] for key in expected} == expected
    run_on(settings, 2, tmp_path / "second")
    assert_same_end(tmp_path / "run", of_two)


def test_tasks_of_slurm_end_with_0_and_leave_word_until_the_run_is_done(settings, of_two, tmp_path):
    prepare = partial(signalled, partial(in_a_step, step=3), 1, tmp_path / "steps since")
    run_on(settings, 2, tmp_path / "first", prepare=partial(as_a_step_of_slurm, prepare), code=0)
    assert "repeat the command to go on" in (tmp_path / "run" / REQUEUE).read_text()
    assert latest(tmp_path / "run" / "checkpoints").name == "step-0000000003"
    run_on(settings, 2, tmp_path / "second")
    assert not (tmp_path / "run" / REQUEUE).exists()
    assert_same_end(tmp_path / "run", of_two)


@pytest.mark.parametrize(
    ("moment", "last"),
    [
        (partial(in_a_save, step=6), 4),  # before: the stage is done and not saved
        (in_growth, 6),
        (partial(in_a_step, step=8), 6),  # after: the grown model has trained and is not saved
    ],
    ids=["before", "during", "after"],
)
def test_a_kill_around_the_growth_of_a_shared_model_changes_no_bit(moment, last, settings, of_two, tmp_path):
    run_on(settings, 2, tmp_path / "first", prepare=partial(killed, moment), code=-signal.SIGKILL)
    assert latest(tmp_path / "run" / "checkpoints").name == f"step-{last:010d}"
    run_on(settings, 2, tmp_path / "second")
    assert_same_end(tmp_path / "run", of_two)
