"""The first signal is remembered, an urgent second one ends the process; afterwards signals mean what they meant."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from pretrain.signals import REQUEUE, StopRequested, StopSignal, marked
from pretrain.world import ALONE, World


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    signal.sigtimedwait([], 0.001)  # gives the handler its turn


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_the_first_signal_is_remembered(first, capsys):
    with StopSignal() as stop:
        assert not stop.requested()
        send(first)
        assert stop.requested()
    assert stop.received == signal.Signals(first).name
    assert "saving at the next step" in capsys.readouterr().err


def test_a_warning_to_a_process_that_ends_does_not_kill_it():
    """The interpreter gives signals that it handles their defaults back before it ends, but not those it ignores."""
    code = (
        "from pretrain.signals import StopSignal\nimport os, signal\n"
        "class Late:\n"
        "    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGUSR1):\n"
        "        kill(pid, number)\n"
        "stop = StopSignal()\nstop.listen()\nstop.end_listening()\nimport sys\nsys.late = Late()\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_second_urgent_signal_exits_at_once():
    with StopSignal(env={}), pytest.raises(SystemExit) as exit_:
        send(signal.SIGTERM)
        send(signal.SIGINT)
    assert exit_.value.code == 128 + signal.SIGINT


def test_the_two_sigterms_of_slurm_at_the_time_limit_do_not_keep_a_run_from_saving():
    with StopSignal(env={"SLURM_JOB_ID": "7"}) as stop:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert stop.received == "SIGTERM"
        send(signal.SIGINT)
        with pytest.raises(SystemExit):
            send(signal.SIGINT)


def test_a_warning_may_come_twice_and_does_not_count_as_the_first_urgent_signal(capsys):
    with StopSignal(env={}) as stop:
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1):
            send(number)
        assert stop.received == "SIGUSR1"
    assert "again to exit" not in capsys.readouterr().err


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


ELASTIC = {"TORCHELASTIC_MAX_RESTARTS": "2"}


@pytest.mark.parametrize(
    ("world", "env", "looks_like_an_end", "leaves_a_file"),
    [
        (ALONE, {}, False, False),
        (World(0, 1, 0, 1, "srun"), {}, False, False),
        (World(0, 2, 0, 2, "srun"), {}, True, True),
        (World(1, 2, 1, 2, "srun"), {}, True, False),
        (World(0, 2, 0, 2, "torchrun"), {}, False, True),
        (World(0, 2, 0, 2, "torchrun", attempt=1), ELASTIC, True, True),
        (World(0, 2, 0, 2, "torchrun", attempt=2), ELASTIC, False, True),
    ],
)
def test_a_stop_leaves_as_the_launcher_needs_it(tmp_path, world, env, looks_like_an_end, leaves_a_file):
    def run():
        with marked(tmp_path, world, env):
            raise StopRequested("stopped")

    if looks_like_an_end:
        run()
    else:
        with pytest.raises(StopRequested):
            run()
    assert (tmp_path / REQUEUE).exists() == leaves_a_file


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "environment"])
def test_a_stop_of_which_no_file_can_tell_is_a_stop_all_the_same(tmp_path, capsys, launcher):
    gone = tmp_path / "gone"
    with pytest.raises(StopRequested), marked(gone, World(0, 2, 0, 2, launcher), {}):
        raise StopRequested("stopped")
    assert f"warning: {gone / REQUEUE} cannot be written (No such file" in capsys.readouterr().err


def test_a_run_that_reaches_its_end_leaves_no_file_of_an_earlier_stop(tmp_path):
    (tmp_path / REQUEUE).touch()
    with marked(tmp_path, World(0, 2, 0, 2, "srun"), {}):
        assert not (tmp_path / REQUEUE).exists()
    assert not (tmp_path / REQUEUE).exists()


@pytest.mark.parametrize("error", [OSError("the terminal is gone"), RuntimeError("reentrant call")])
def test_a_message_that_cannot_be_written_disturbs_nothing(monkeypatch, error):
    class Broken:
        def write(self, _):
            raise error

    monkeypatch.setattr("sys.stderr", Broken())
    with StopSignal(env={}) as stop:
        send(signal.SIGUSR1)
        assert stop.received == "SIGUSR1"
