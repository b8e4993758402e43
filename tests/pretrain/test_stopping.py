"""A signal at any moment: saved within a step, exit 75, and the same command ends like a run that nothing disturbed."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_gpt.checkpoint import latest, manifest_sha256, read_training
from lit_gpt.packed_data import PackedData
from pretrain import checkpointing, evaluate, loop, run
from pretrain.signals import REQUEUE, StopSignal
from pretrain.time_limit import TimeLimit
from tests.pretrain.processes import finish, start
from tests.pretrain.runs import assert_same_end, records


def also(*values: object) -> object:
    """A moment that is looked at with the slow tests: each costs two runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


class Sender:
    """Sends SIGTERM to this process once, when its moment comes, and counts the steps that were made since."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.is_sent = False
        self.steps_since = 0
        self.when = ""
        self.before(loop, "advance", lambda *_: self._count())
        self.before(loop, "validate", lambda *arguments: setattr(self, "when", arguments[-1]))

    def _count(self) -> None:
        self.steps_since += self.is_sent

    def send(self) -> None:
        if not self.is_sent:
            self.is_sent = True
            os.kill(os.getpid(), signal.SIGTERM)

    def before(self, owner: object, name: str, act: Callable[..., None]) -> None:
        """Let `act` see the arguments of every call of a function before the function does."""
        original = getattr(owner, name)

        def watched(*arguments, **keywords):
            act(*arguments)
            return original(*arguments, **keywords)

        self._monkeypatch.setattr(owner, name, watched)


@pytest.fixture
def sender(monkeypatch) -> Sender:
    return Sender(monkeypatch)


def saved(folder: Path) -> dict:
    return read_training(latest(folder / "checkpoints")).state


@pytest.fixture
def goes_on(settings, pretrain, finished_run, sender):
    """Stop at the moment that the test has prepared, look at what was saved, go on to the end; returns the former."""

    def check(*, saves: bool = True) -> dict:
        stopped = pretrain(settings)
        assert stopped.returncode == 75, stopped.stderr
        assert "stopped by SIGTERM; repeat the command" in stopped.stderr
        assert sender.steps_since <= 1
        state = saved(Path(settings["out_dir"])) if saves else {}
        assert saves or not list(Path(settings["out_dir"]).glob("checkpoints/*"))
        assert pretrain(settings).returncode == 0
        assert_same_end(Path(settings["out_dir"]), finished_run)
        return state

    return check


@pytest.mark.parametrize("step", [also(1), 6, 9])
def test_during_a_step(sender, goes_on, step):
    sender.before(
        loop, "train_step", lambda run, stage, trained, state, rows: step == state.step_count + 1 and sender.send()
    )
    state = goes_on()
    assert state["step_count"] == step
    assert state["validation_owed"] == ("before_growth" if step == 6 else None)


@pytest.mark.parametrize(
    ("when", "step", "stage"),
    [
        ("every", 4, 1),
        ("before_growth", 6, 1),
        also("after_growth", 6, 2),
        ("end", 14, 2),
    ],
)
def test_during_validation(sender, goes_on, when, step, stage):
    batches = []

    def second_batch(*_):
        if sender.when == when:
            batches.append(when)
            if len(batches) == 2:
                sender.send()

    sender.before(evaluate, "_losses", second_batch)
    state = goes_on()
    assert (state["validation_owed"], state["step_count"], state["stage"]) == (when, step, stage)
    assert len(batches) > 30, "all of it was measured when the run went on"


@pytest.mark.parametrize("moment", ["preflight", also("run_folder"), also("launch"), also("start"), "train_in_stages"])
def test_before_the_first_step_nothing_is_saved_as_nothing_was_trained(sender, goes_on, moment):
    sender.before(run, moment, lambda *_: sender.send())
    goes_on(saves=False)


def test_a_dry_run_that_is_asked_to_stop_stops(settings, pretrain, sender):
    sender.before(run, "preflight", lambda *_: sender.send())
    stopped = pretrain(settings, "--dry-run")
    assert (stopped.returncode, stopped.stdout) == (75, "")


def test_during_the_first_validation_nothing_is_saved_either(sender, goes_on):
    sender.before(evaluate, "_losses", lambda *_: sender.send())
    goes_on(saves=False)


@pytest.mark.parametrize(("moment", "step"), [("preflight", 12), also("resume", 6), ("train_in_stages", 6)])
def test_before_the_first_step_of_a_later_start_its_checkpoint_stays_as_it_is(
    settings, pretrain, finished_run, sender, moment, step
):
    """Step 6 is the end of a stage: the growth that comes next is not begun."""
    folder = Path(shutil.copytree(finished_run, settings["out_dir"]))
    for path in folder.glob("checkpoints/stage-*/step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    last = latest(folder / "checkpoints")
    before = manifest_sha256(last)
    sender.before(run, moment, lambda *_: sender.send())
    sender.before(loop, "enter_stage", lambda *_: pytest.fail("it grew"))

    assert pretrain(settings).returncode == 75
    assert (sender.is_sent, sender.steps_since) == (True, 0)
    assert (latest(folder / "checkpoints"), manifest_sha256(last)) == (last, before)


def test_a_kill_after_validation_was_made_up_for_repeats_it_in_the_log_once(settings, pretrain, finished_run, sender):
    sender.before(evaluate, "_losses", lambda *_: sender.when == "before_growth" and sender.send())
    assert pretrain(settings).returncode == 75
    folder = Path(settings["out_dir"])
    evals = (finished_run / "evals.jsonl").read_text().splitlines(keepends=True)
    made_up = [line for line in evals if '"step": 0' in line or '"step": 4' in line or '"before_growth"' in line]
    (folder / "evals.jsonl").write_text("".join(made_up))  # as if killed between the validation and the save

    assert pretrain(settings).returncode == 0
    assert records(folder, "evals.jsonl") == records(finished_run, "evals.jsonl")


@pytest.mark.parametrize("step", [also(4), 6])
def test_during_a_save(sender, goes_on, step):
    sender.before(checkpointing, "write_training", lambda path: path.name.endswith(f"{step:010d}") and sender.send())
    assert goes_on()["step_count"] == step


def test_during_growth(sender, goes_on):
    sender.before(loop, "enter_stage", lambda *_: sender.send())
    state = goes_on()
    assert (state["step_count"], state["stage"], state["grown_into_stage"]) == (6, 2, 2)


def test_while_data_does_not_come(sender, goes_on, monkeypatch):
    released, reads, original = threading.Event(), [], PackedData.read_samples

    def slow_in_the_second_stage(*arguments):
        reads.append(1)
        if len(reads) == 2:
            sender.send()
            released.wait(60)
        return original(*arguments)

    monkeypatch.setattr(PackedData, "read_samples", slow_in_the_second_stage)
    assert goes_on()["step_count"] == 6
    released.set()


@pytest.mark.slow
def test_while_a_growth_is_learned(settings, pretrain, sender):
    settings["stages"][1] = {"name": "grown", "operator": "ligo", "max_steps": 8, "options": {"learn_steps": 4}}
    sender.before(loop, "train_step", lambda run, stage, trained, state, rows: state.step_count == 7 and sender.send())
    assert pretrain(settings).returncode == 75
    folder = Path(settings["out_dir"])
    state = saved(folder)
    assert (state["step_count"], state["stage"], state["grown_into_stage"]) == (8, 2, 1)
    assert pretrain(settings).returncode == 0

    undisturbed = {**settings, "out_dir": str(folder.with_name("undisturbed"))}
    assert pretrain(undisturbed).returncode == 0
    assert_same_end(folder, Path(undisturbed["out_dir"]))


def test_the_time_of_a_sitting_ends_like_a_signal(settings, pretrain, monkeypatch):
    limits = (TimeLimit("stop.after=5s", 5.0),)
    ticks = iter(range(1000))  # each look at the clock is a second
    monkeypatch.setattr("pretrain.run.find_limits", lambda *_: limits)
    monkeypatch.setattr("pretrain.signals.StopSignal", lambda: StopSignal(clock=lambda: next(ticks)))
    stopped = pretrain(settings)
    assert stopped.returncode == 75, stopped.stderr
    assert "stopped by stop.after=5s" in stopped.stderr


WHEN_TORCH_IS_IMPORTED = """
import os, signal, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" and os.environ["RANK"] == os.environ["SENT_TO"]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGUSR1)

sys.meta_path.insert(0, Watch())
from pretrain.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("n_processes", [1, also(2)])
def test_while_torch_is_imported(settings, tmp_path, monkeypatch, n_processes):
    """The last process alone gets the signal, long before there is a world."""
    monkeypatch.setenv("SENT_TO", str(n_processes - 1))
    folder = Path(settings["out_dir"])
    done = finish(start(settings, n_processes, tmp_path / "processes", script=WHEN_TORCH_IS_IMPORTED))
    assert [process.returncode for process in done] == [75] * n_processes, done
    assert "SIGUSR1: stopping before the first step" in done[-1].stderr
    assert "repeat the command to go on" in done[0].stderr
    assert not (folder / "checkpoints").exists()
    assert (folder / REQUEUE).exists() == (n_processes > 1)


AT_THE_END = """
import os, signal, sys
from pretrain.__main__ import main
code = main()
os.kill(os.getpid(), signal.SIGUSR1)
sys.exit(code)
"""


def test_when_the_run_is_done(settings, tmp_path):
    """A warning that comes too late changes no exit code."""
    settings["stages"] = [{"name": "base", "max_steps": 1}]
    (done,) = finish(start(settings, 1, tmp_path, script=AT_THE_END))
    assert done.returncode == 0, done.stderr
