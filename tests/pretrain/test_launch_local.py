"""scripts/launch_local.sh: several processes by torchrun, that stop together and start again when one dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pretrain.conftest import command_for
from tests.pretrain.runs import records

pytestmark = pytest.mark.slow


@pytest.fixture
def launch(settings, root: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start the settings on two processes."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {root / "tests" / "slow_pretrain.py"} "$@"\n')
    python.chmod(0o755)

    def call(**environment: str) -> subprocess.Popen[str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC"))}
        return subprocess.Popen(
            ["bash", str(root / "scripts" / "launch_local.sh"), *command_for(settings, tmp_path, "--device", "cpu")],
            env=own | {"PYTHON": sys.executable, "PYTHON_EXEC": str(python), "PROCESSES": "2"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return call


def assert_same_losses(folder: Path, expected: Path) -> None:
    """Every step once, with the losses of a single process up to rounding."""
    found, wanted = records(folder), records(expected)
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in wanted], rel=1e-5)


def test_when_a_process_dies_all_start_again_from_the_last_checkpoint(settings, launch, finished_run):
    settings["checkpoints"] = {"every_steps": 2, "async_save": False}  # else that of step 8 may still be being written
    process = launch(MAX_RESTARTS="1", DIE_AT="9")  # the checkpoint before that is of step 8, after growth
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert output.count("step-0000000008 (") == 1, output
    assert_same_losses(Path(settings["out_dir"]), finished_run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_stops_all_with_75_and_the_same_command_goes_on(settings, launch, finished_run, number):
    folder = Path(settings["out_dir"])
    settings["checkpoints"] = {"every_steps": 1000}
    process = launch(STEP_SECS="0.3", MAX_RESTARTS="1")
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(records(folder)) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)

    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "stopped by SIGUSR1; repeat the command to go on" in output
    assert 2 <= len(records(folder)) < 14

    again = launch()
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    assert_same_losses(folder, finished_run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_processes_that_do_not_listen_yet_is_repeated_until_they_do(launch, tmp_path, number):
    """The first asks its launcher, torchrun's parent, to stop before it becomes Python."""
    python = tmp_path / "python"
    ask = f'kill -{int(number)} "$(ps -o ppid= -p $PPID | tr -d " ")"; sleep 2'
    python.write_text(python.read_text().replace("exec", f'if [ "$LOCAL_RANK" = 0 ]; then {ask}; fi\nexec'))
    process = launch(MAX_RESTARTS="1")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert output.count("repeat the command to go on") == 1 and "Traceback" not in output and "traceback" not in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_there_are_processes_ends_with_75_too(launch, tmp_path, number):
    """torchrun has not got that far: it is a program here that asks its caller to stop, and waits."""
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(f"#!/bin/sh\nkill -{int(number)} $PPID\nexec sleep 300\n")
    torchrun.chmod(0o755)
    process = launch(PYTHON=str(torchrun))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
