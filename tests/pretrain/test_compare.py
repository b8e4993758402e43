"""`grow compare` with real runs at toy size."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest
import yaml

from grow.__main__ import main as grow
from grow.compare import runs
from lit_gpt.checkpoint import latest, read_training
from lit_gpt.errors import DataError
from pretrain.run_lock import run_lock
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

    def run(command: list[str], stdout: IO[bytes], **_: object) -> SimpleNamespace:
        assert command[:3] == [sys.executable, "-m", "pretrain"]
        commands.append(command[3:])
        monkeypatch.setattr(sys, "argv", ["pretrain", *command[3:]])

        def wait(timeout: float | None = None) -> int:
            with open(stdout.fileno(), "a", closefd=False) as log, redirect_stdout(log), redirect_stderr(log):
                return main()

        return SimpleNamespace(wait=wait)

    monkeypatch.setattr(runs.subprocess, "Popen", run)
    before = {number: signal.getsignal(number) for number in StopSignal.SIGNALS}
    yield commands
    for number, handler in before.items():
        signal.signal(number, handler)


def test_all_arms_of_a_seed_go_on_from_one_base_and_are_ranked(compare_file, started, tmp_path, capsys):
    assert grow(["compare", "--config", str(compare_file)]) == 0

    assert sum("--dry-run" not in command for command in started) == 4
    assert ["--dry-run" in command for command in started[:3]] == [True] * 3  # before anything is trained
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


def changed(compare_file: Path, **settings: object) -> Path:
    compare_file.write_text(yaml.safe_dump({**yaml.safe_load(compare_file.read_text()), **settings}))
    return compare_file


def trained(commands: list[list[str]]) -> list[str]:
    """Folders that runs were made in, as seed/name."""
    files = [Path(command[-1]) for command in commands if "--dry-run" not in command]
    return [f"{file.parent.name}/{file.stem}" for file in files]


HOPS = [{"operator": "partial", "n_layer": 2, "layer_map": "11", "share": 0.4}, {"operator": "zero-depth"}]
OWN_BASES = {
    "hops": {"stages": HOPS},
    "late": {"operator": "stack", "base": {"max_steps": 8}},
    "late, zero": {"operator": "zero-depth", "base": {"max_steps": 8}},
}


@pytest.mark.slow
def test_arms_may_grow_in_hops_and_equal_bases_of_their_own_are_trained_once(compare_file, started, tmp_path, capsys):
    changed(compare_file, arms=OWN_BASES)

    assert grow(["compare", "--config", str(compare_file)]) == 0, capsys.readouterr().err

    own = "base, max_steps 8"
    assert trained(started) == [f"seed-1/{name}" for name in ("base", own, *OWN_BASES)]
    ended = {
        name: read_training(latest(tmp_path / "out" / "seed-1" / name / "checkpoints")).state
        for name in ("hops", "late", own)
    }
    assert [each["operator"] for each in ended["hops"]["history"]] == ["partial", "zero-depth"]
    assert ended[own]["step_count"] == 8 and ended["late"]["parent_tokens"] == 8 * 64


@pytest.mark.slow
def test_what_is_done_is_found_after_a_move_and_without_its_base(compare_file, started, tmp_path, capsys):
    arms = {name: OWN_BASES[name] for name in ("hops", "late")}
    again = ["compare", "--config", str(changed(compare_file, arms=arms)), "--out-dir", str(tmp_path / "moved")]
    assert grow(["compare", "--config", str(compare_file)]) == 0
    shutil.move(tmp_path / "out", tmp_path / "moved")
    started.clear()

    assert grow(again) == 0 and started == [], capsys.readouterr().err

    arms["late"] = {"operator": "stack", "base": {"max_steps": 8, "learning_rate": 0.5}}
    changed(compare_file, arms=arms)
    assert grow(again) == 3
    err = capsys.readouterr().err
    assert "late was trained with other settings" in err and "  init_from: 'base, max_steps 8' then, 'base, lear" in err
    changed(compare_file, arms=arms | {"late": OWN_BASES["late"]})
    for base in ("base", "base, max_steps 8"):
        shutil.rmtree(tmp_path / "moved" / "seed-1" / base)
    assert grow(again) == 0 and started == [], capsys.readouterr().err


@pytest.mark.slow
def test_files_of_settings_that_share_a_folder_share_runs_and_write_pages_of_their_own(
    compare_file, started, tmp_path, capsys
):
    assert grow(["compare", "--config", str(compare_file)]) == 0
    first = (tmp_path / "out" / "compare.json").read_bytes()
    other = tmp_path / "other.yaml"
    other.write_text(compare_file.read_text())
    changed(other, arms={"scratch": {}, "zero": {"operator": "zero-depth"}})
    started.clear()

    assert grow(["compare", "--config", str(other)]) == 0

    assert trained(started) == ["seed-1/zero"]
    assert str(tmp_path / "out" / "other.html") in capsys.readouterr().out
    assert {arm["name"] for arm in json.loads((tmp_path / "out" / "other.json").read_text())["arms"]} == {
        "scratch",
        "zero",
    }
    assert (tmp_path / "out" / "compare.json").read_bytes() == first


@pytest.mark.slow
def test_a_dry_run_lists_what_would_be_made_and_what_is_done_and_leaves_nothing(
    compare_file, started, tmp_path, capsys
):
    changed(compare_file, seeds=[1, 2], arms=OWN_BASES | {"scratch": {}})
    dry = ["compare", "--config", str(compare_file), "--dry-run", "--json"]

    assert grow(dry) == 0, capsys.readouterr().err

    before = json.loads(capsys.readouterr().out)["runs"]
    assert not (tmp_path / "out").exists() and trained(started) == []
    assert [run["name"] for run in before] == ["base", "base, max_steps 8", *OWN_BASES, "scratch"] * 2
    assert {run["state"] for run in before} == {""} and len(started) == 4  # the arms of the first seed
    assert grow(["compare", "--config", str(compare_file), "--seed", "1"]) == 0
    said = capsys.readouterr()
    assert "seed 2: not trained yet: hops, late, late, zero, scratch\n" in said.out
    assert not (tmp_path / "out" / "compare.json").exists()
    assert grow(dry) == 0
    after = json.loads(capsys.readouterr().out)["runs"]
    assert [run["state"] for run in after] == ["done"] * 6 + [""] * 6
    assert [{**run, "state": ""} for run in after] == before
    for run in after[:6]:
        state = read_training(latest(tmp_path / "out" / "seed-1" / run["name"] / "checkpoints")).state
        assert (state["tokens"], state["flops"]["paper"]) == (run["tokens"], run["flops"])
    assert grow(dry[:-1]) == 0
    table = capsys.readouterr().out
    assert "partial to 2L16H, zero-depth to 3L16H" in table and "6 of 12 runs are left" in table


def test_only_the_seeds_of_the_file_can_be_asked_for(compare_file, capsys):
    assert grow(["compare", "--config", str(compare_file), "--seed", "7"]) == 2
    assert "--seed 7 is none of the file's seeds, [1]" in capsys.readouterr().err


def test_settings_that_fit_no_arm_are_found_before_the_base_is_trained(compare_file, started, tmp_path, capsys):
    settings = yaml.safe_load(compare_file.read_text())
    settings["arms"]["stack"]["layer_map"] = "12"
    compare_file.write_text(yaml.safe_dump(settings))

    for flags in ([], ["--dry-run"]):
        assert grow(["compare", "--config", str(compare_file), *flags]) == 2

        err = capsys.readouterr().err
        assert "seed 1 stack: refused\n  error: stage 'stack': it cannot grow" in err
        assert "seed-1/stack ended with exit code 2; the reason stands above; mend it and repeat the command" in err
    assert trained(started) == [] and not (tmp_path / "out").exists()


def test_a_wrong_setting_is_named_by_its_arm_and_not_by_a_file_that_is_gone(compare_file, started, tmp_path, capsys):
    changed(compare_file, settings={"optimizer": {"lerning_rate": 1}})
    assert grow(["compare", "--config", str(compare_file)]) == 2
    err = capsys.readouterr().err
    assert "  error: arm 'masks': optimizer: unknown key 'lerning_rate'" in err and "settings.yaml" not in err


@pytest.mark.slow
def test_every_run_has_a_line_and_a_log_and_its_costs_add_up_over_starts(compare_file, started, tmp_path, capsys):
    compare = ["compare", "--config", str(changed(compare_file, arms={"scratch": {}, "stack": {"operator": "stack"}}))]
    assert grow(compare) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["seed 1 base", "seed 1 scratch", "seed 1 stack"]
    assert re.fullmatch(r"seed 1 stack: 5 steps, loss \d\.\d+, \d+ s", lines[-1])
    folder = tmp_path / "out" / "seed-1" / "stack"
    assert "loss" in (folder / "log.txt").read_text()

    (folder / "done.json").unlink()  # as if it had been stopped
    (folder / "starts.jsonl").write_text('{"exit_code": 75, "seconds": 50.0, "cpu_seconds": 40.0}\n')
    assert grow([*compare, "--verbose"]) == 0

    assert "is finished: 5 steps" in capsys.readouterr().err
    costs = {run["name"]: run for run in json.loads((tmp_path / "out" / "compare.json").read_text())["runs"]}
    assert list(costs) == ["base", "scratch", "stack"] and 40 <= costs["stack"]["cpu_seconds"] < 50
    assert costs["stack"]["tokens"] == 5 * 64 and costs["stack"]["training_seconds"] > 0


def test_a_run_that_another_process_makes_is_left_to_it(compare_file, started, tmp_path, capsys):
    folder = tmp_path / "out" / "seed-1" / "base"
    folder.mkdir(parents=True)
    changed(compare_file, arms={"zero": {"operator": "zero-depth"}, "stack": {"operator": "stack"}})
    compare = ["compare", "--config", str(compare_file)]
    with run_lock(folder):  # a `pretrain` by hand, or one on another machine
        assert grow(compare) == 3
        assert capsys.readouterr().err.count(f"  error: another process trains in {folder} and holds its lock") == 1
    started.clear()
    with (folder / "log.txt").open("ab") as log:  # another `grow compare`
        fcntl.flock(log, fcntl.LOCK_EX)
        assert grow(compare) == 3
    assert capsys.readouterr().err.startswith(f"error: another process makes the run in {folder}, and log.txt there")
    assert trained(started) == []


@pytest.mark.slow
def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(compare_file, started, capsys):
    changed(compare_file, arms={"scratch": {}, "stack": {"operator": "stack"}})
    assert grow(["compare", "--config", str(compare_file)]) == 0
    settings = yaml.safe_load(compare_file.read_text())
    settings["arms"]["stack"]["learning_rate"] = 0.5
    compare_file.write_text(yaml.safe_dump(settings))

    assert grow(["compare", "--config", str(compare_file)]) == 3

    err = capsys.readouterr().err
    assert "was trained with other settings; choose another out_dir, or remove it:" in err
    assert "  stages[2].learning_rate: not set then, 0.5 now" in err


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ('{"settings": "a hash"}', "the settings of its run")]
)
def test_a_record_of_a_finished_run_that_says_too_little_is_named(tmp_path, text, message):
    (tmp_path / "done.json").write_text(text)
    with pytest.raises(DataError, match=message):
        runs._read_done(tmp_path / "done.json")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_command_alone_stops_and_saves_its_run(compare_file, tmp_path, number):
    settings = yaml.safe_load(compare_file.read_text())
    settings |= {"base": {"n_layer": 1, "max_steps": 100_000}, "settings": {"data": {"max_epochs": 10_000}}}
    compare_file.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "grow", "compare", "--config", str(compare_file), "--verbose"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as going:
        next(line for line in going.stderr if "  loss " in line)  # of a step
        going.send_signal(number)
        rest = going.stderr.read()

    assert going.returncode == 75 and "stopped by" in rest
    assert latest(tmp_path / "out" / "seed-1" / "base" / "checkpoints") is not None


@pytest.mark.slow
def test_a_comparison_that_was_killed_goes_on(compare_file, tmp_path):
    command = [sys.executable, "-m", "grow", "compare", "--config", str(compare_file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as going:
        next(line for line in going.stderr if line.startswith("seed 1 scratch: "))  # which has come to its end
        os.killpg(going.pid, signal.SIGKILL)

    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "seed 1 base: " not in done.stderr and "ends lowest" in done.stdout
