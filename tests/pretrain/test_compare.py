"""`grow compare` with real runs at toy size."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml

from grow.__main__ import main as grow
from grow.compare import runs
from lit_gpt.checkpoint import latest, read_training
from pretrain.signals import StopSignal
from tests.pretrain.conftest import two_stages


@pytest.fixture
def compare_file(tmp_path, prepared):
    whole = two_stages(tmp_path / "unused", prepared)
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(whole))
    path = tmp_path / "compare.yaml"
    comparison = {
        **{"out_dir": str(tmp_path / "out"), "seeds": [1], "config": str(tmp_path / "settings.yaml")},
        **{"base": {"n_layer": 1, "max_steps": 4}, "probe": {"max_steps": 5}},
        "arms": {"scratch": {}, "stack": {"operator": "stack"}, "masks": {"operator": "random-depth", "mask_steps": 2}},
    }
    path.write_text(yaml.safe_dump(comparison))
    return path


@pytest.fixture
def started(monkeypatch):
    """Runs are made in this process; gives their commands."""
    from pretrain.__main__ import main

    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        assert command[:3] == [sys.executable, "-m", "pretrain"]
        commands.append(command[3:])
        monkeypatch.setattr(sys, "argv", ["pretrain", *command[3:]])
        return SimpleNamespace(wait=main)

    monkeypatch.setattr(runs.subprocess, "Popen", run)
    before = {number: signal.getsignal(number) for number in StopSignal.SIGNALS}
    yield commands
    for number, handler in before.items():
        signal.signal(number, handler)


def test_all_arms_of_a_seed_go_on_from_one_base_and_are_ranked(compare_file, started, tmp_path, capsys):
    assert grow(["compare", "--config", str(compare_file)]) == 0

    assert sum("--dry-run" not in command for command in started) == 4
    assert ["--dry-run" in command for command in started[1:4]] == [True] * 3  # before any arm is trained
    assert "ends lowest" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert {arm["name"] for arm in found["arms"]} == {"scratch", "stack", "masks"} and found["seeds"] == [1]
    assert (tmp_path / "out" / "compare.html").is_file()
    flops = [arm["flops"] for arm in found["arms"]]
    assert max(flops) / min(flops) < 1.1  # a step of five
    histories = [
        read_training(latest(tmp_path / "out" / "seed-1" / name / "checkpoints")).state["history"]
        for name in ("stack", "masks")
    ]
    assert [each[0]["operator"] for each in histories] == ["stack", "random-depth"]
    assert len({each[0]["step_count"] for each in histories}) == 1


def test_what_is_done_is_not_done_again_and_a_new_arm_is_added(compare_file, started):
    assert grow(["compare", "--config", str(compare_file)]) == 0
    started.clear()
    assert grow(["compare", "--config", str(compare_file)]) == 0
    assert started == []
    settings = yaml.safe_load(compare_file.read_text())
    settings["arms"]["zero"] = {"operator": "zero-depth"}
    compare_file.write_text(yaml.safe_dump(settings))

    assert grow(["compare", "--config", str(compare_file)]) == 0

    assert sum("--dry-run" not in command for command in started) == 1


def test_arms_may_grow_in_hops_and_from_a_base_of_their_own(compare_file, started, tmp_path, capsys):
    settings = yaml.safe_load(compare_file.read_text())
    hops = [{"operator": "partial", "n_layer": 2, "layer_map": "11", "share": 0.4}, {"operator": "zero-depth"}]
    late = {"operator": "stack", "base": {"max_steps": 8}}
    settings |= {"seeds": [1], "arms": {"hops": {"stages": hops}, "late": late}}
    compare_file.write_text(yaml.safe_dump(settings))

    assert grow(["compare", "--config", str(compare_file)]) == 0, capsys.readouterr().err

    ended = {
        name: read_training(latest(tmp_path / "out" / "seed-1" / name / "checkpoints")).state
        for name in ("hops", "late", "late, its base")
    }
    assert [each["operator"] for each in ended["hops"]["history"]] == ["partial", "zero-depth"]
    assert ended["late, its base"]["step_count"] == 8


def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(compare_file, started, capsys):
    assert grow(["compare", "--config", str(compare_file)]) == 0
    settings = yaml.safe_load(compare_file.read_text())
    settings["arms"]["stack"]["learning_rate"] = 0.5
    compare_file.write_text(yaml.safe_dump(settings))

    assert grow(["compare", "--config", str(compare_file)]) == 3

    assert "was trained with other settings (stages); choose another out_dir, or remove it" in capsys.readouterr().err


def test_a_run_that_fails_ends_the_comparison_with_its_exit_code(compare_file, started, capsys):
    settings = yaml.safe_load(compare_file.read_text())
    settings["arms"]["stack"]["layer_map"] = "12"
    compare_file.write_text(yaml.safe_dump(settings))

    assert grow(["compare", "--config", str(compare_file)]) == 2

    err = capsys.readouterr().err
    assert "seed-1/stack ended with exit code 2; the reason stands above; mend it and repeat the command" in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_command_alone_stops_and_saves_its_run(compare_file, tmp_path, number):
    settings = yaml.safe_load(compare_file.read_text())
    settings |= {"base": {"n_layer": 1, "max_steps": 100_000}, "settings": {"data": {"max_epochs": 10_000}}}
    compare_file.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "grow", "compare", "--config", str(compare_file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as going:
        next(line for line in going.stderr if "loss" in line)
        going.send_signal(number)
        rest = going.stderr.read()

    assert going.returncode == 75 and "stopped by" in rest
    assert latest(tmp_path / "out" / "seed-1" / "base" / "checkpoints") is not None


@pytest.mark.slow
def test_a_comparison_that_was_killed_goes_on(compare_file, tmp_path):
    command = [sys.executable, "-m", "grow", "compare", "--config", str(compare_file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as going:
        next(line for line in going.stderr if line.startswith("== seed-1/stack"))
        os.killpg(going.pid, signal.SIGKILL)

    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "== seed-1/base" not in done.stderr and "ends lowest" in done.stdout
