"""`pretrain status` and `pretrain validate`: what a run's files tell, and what they must not claim."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from grow.apply import grow_checkpoint
from grow.operators import plan_growth
from lit_gpt.checkpoint import latest, read_config, read_training, write_exchange
from lit_gpt.errors import DataError
from pretrain.heartbeat import EVERY_SECS, HEARTBEAT_FILE, Heartbeat, read_heartbeat
from pretrain.run_lock import LOCK_FILE, read_owner, run_lock
from pretrain.status import QUIET_SECS, SAVING_SECS, describe, status_of
from pretrain.validate_command import main as validate_main
from tests.pretrain.runs import records

SINCE = 900.0
"""When the owner of the lock here started."""


@pytest.fixture
def copied(finished_run, tmp_path) -> Path:
    """A finished run that may be changed."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def held(copied, monkeypatch):
    """Such a run without its last checkpoint, and somebody who holds its lock."""
    shutil.rmtree(copied / "checkpoints" / "stage-02" / "step-0000000014")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with run_lock(copied):
        since = dataclasses.replace(read_owner(copied / LOCK_FILE), since=SINCE)
        (copied / LOCK_FILE).write_text(json.dumps(dataclasses.asdict(since)))
        yield copied


def test_a_finished_run_says_so(copied, monkeypatch, capsys):
    from pretrain.__main__ import main

    monkeypatch.setattr("sys.argv", ["pretrain", "status", str(copied), "--json"])
    assert main() == 0
    found = json.loads(capsys.readouterr().out)
    last = records(copied)[-1]
    assert (found["state"], found["finished"], found["owner"]) == ("finished", True, None)
    assert (found["step"], found["planned_steps"], found["stage_name"]) == (14, 14, "grown")
    assert (found["loss"], found["tokens"]) == (last["loss"], last["tokens"])
    assert found["tokens_per_sec"] > 0
    assert found["checkpoint"]["path"].endswith("step-0000000014") and found["checkpoint"]["age_secs"] >= 0


def test_a_run_that_ended_early_is_stopped(copied):
    shutil.rmtree(copied / "checkpoints" / "stage-02" / "step-0000000014")
    found = status_of(copied)
    assert (found.state, found.finished, found.checkpoint.step) == ("stopped", False, 12)


def test_a_checkpoint_that_lacks_a_file_is_not_the_last_one(copied):
    last = copied / "checkpoints" / "stage-02" / "step-0000000014"
    next(path for path in last.iterdir() if path.name != "MANIFEST.json").unlink()
    assert status_of(copied).checkpoint.step == 12


def logged_until(folder: Path, step: int) -> None:
    """Cut the log back."""
    log = folder / "metrics.jsonl"
    log.write_text("".join(f"{line}\n" for line in log.read_text().splitlines() if json.loads(line)["step"] <= step))


@pytest.mark.parametrize(("beaten", "stage"), [(5, 1), (9, 2), (14, 2)])
def test_step_and_stage_are_of_one_moment_and_the_loss_says_of_which(held, beaten, stage):
    """The log is written every so many steps, the heartbeat every few seconds: either may be the later one."""
    logged_until(held, 6)
    last = records(held)[-1]
    Heartbeat(held, clock=lambda: 1000.0).beat("training", step=beaten, stage=stage)
    found = status_of(held, now=1002.0)
    name = ("base", "grown")[stage - 1]
    assert (found.step, found.stage, found.stage_name) == (max(beaten, 6), stage, name)
    assert (found.logged_step, found.loss, found.tokens) == (6, last["loss"], last["tokens"])
    assert any("(at step 6)" in line for line in describe(found)) == (beaten > 6)


def test_who_holds_the_lock_trains(held):
    logged_until(held, 12)
    Heartbeat(held, clock=lambda: 1000.0, env={}).beat("training", step=13)
    found = status_of(held, now=1002.0)
    assert (found.state, found.step, found.doing, found.silent_secs) == ("running", 13, "training", 2.0)
    assert (found.owner.pid, found.owner.job) == (os.getpid(), "77")
    assert found.stuck_since is None
    assert any("SLURM job 77" in line for line in describe(found))


def test_a_start_is_not_stuck_because_the_one_before_was_silent_since(held):
    """It reads through the checkpoint, say; nothing tells of it yet but the lock."""
    beat = {"time": 1.0, "doing": "ended", "step": 13, "host": "node-7", "pid": 5, "job": None}
    owner = read_owner(held / LOCK_FILE)
    for who in ({}, {"host": owner.host, "pid": owner.pid}):  # in a container every start may be process 1
        (held / HEARTBEAT_FILE).write_text(json.dumps(beat | {"doing": "training"} | who))
        found = status_of(held, now=SINCE + QUIET_SECS + 1)
        assert (found.state, found.doing, found.silent_secs) == ("running", "starting", QUIET_SECS + 1)
        assert status_of(held, now=SINCE + SAVING_SECS + 1).state == "stuck"


@pytest.mark.parametrize(("doing", "patience"), [("training", QUIET_SECS), ("saving", SAVING_SECS)])
def test_silence_is_stuck_after_a_time_that_depends_on_what_it_does(held, doing, patience):
    Heartbeat(held, clock=lambda: 1000.0).beat(doing, step=13)
    assert status_of(held, now=1000.0 + patience).state == "running"
    found = status_of(held, now=1000.0 + patience + 1)
    assert (found.state, found.stuck_since) == ("stuck", 1000.0)
    assert any("stuck since" in line for line in describe(found))


def test_slow_steps_are_waited_for(held):
    lines = (held / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1]) | {"seconds": 14 * 100.0}  # 100 s a step
    (held / "metrics.jsonl").write_text(json.dumps(last) + "\n" + lines[-1][:20])
    Heartbeat(held, clock=lambda: 1000.0).beat("training", step=13)
    assert status_of(held, now=1900.0).state == "running"
    assert status_of(held, now=2100.0).state == "stuck"


def test_a_run_on_another_machine_whose_lock_is_not_seen_lives_as_long_as_it_says_so(copied):
    shutil.rmtree(copied / "checkpoints" / "stage-02" / "step-0000000014")
    beat = {"time": 1000.0, "doing": "training", "step": 13, "host": "node-7", "pid": 5, "job": None}
    (copied / HEARTBEAT_FILE).write_text(json.dumps(beat))
    assert (status_of(copied, now=1100.0).state, status_of(copied, now=1100.0).owner.host) == ("running", "node-7")
    assert status_of(copied, now=1200.0).state == "stopped"
    (copied / HEARTBEAT_FILE).write_text(json.dumps(beat | {"doing": "ended"}))
    assert status_of(copied, now=1001.0).state == "stopped"


def test_a_folder_without_a_run_is_an_error(tmp_path, monkeypatch, capsys):
    from pretrain.__main__ import main

    monkeypatch.setattr("sys.argv", ["pretrain", "status", str(tmp_path)])
    assert main() == 3
    assert "holds no run" in capsys.readouterr().err


def test_a_heartbeat_is_rewritten_when_it_says_something_else_or_after_some_seconds(tmp_path):
    now = 0.0
    heart = Heartbeat(tmp_path, clock=lambda: now)
    heart.beat("training", step=1)
    now = EVERY_SECS / 2
    heart.beat("training", step=2)
    assert read_heartbeat(tmp_path)["step"] == 1
    heart.beat("saving", step=2)
    assert read_heartbeat(tmp_path)["doing"] == "saving"
    now *= 4
    heart.beat("saving", step=3)
    assert read_heartbeat(tmp_path)["step"] == 3
    assert [path.name for path in tmp_path.iterdir()] == [HEARTBEAT_FILE]


def test_a_heartbeat_that_cannot_be_written_stops_nothing(tmp_path):
    Heartbeat(tmp_path / "nowhere").beat("training", step=1)
    assert read_heartbeat(tmp_path / "nowhere") is None


def test_what_is_measured_again_is_what_the_run_measured_at_its_end(finished_run, capsys):
    assert validate_main([str(finished_run), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["sets"]
    end = {r["metric"]: r["value"] for r in records(finished_run, "evals.jsonl") if r["when"] == "end"}
    assert (found["loss"], found["bpb"], found["step"]) == (end["loss"], end["bpb"], 14)


def test_validate_passes_over_a_damaged_checkpoint_as_training_does(copied, capsys, caplog):
    last = copied / "checkpoints" / "stage-02" / "step-0000000014"
    victim = max(last.iterdir(), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    assert validate_main([str(copied)]) == 0
    assert f"skipped a checkpoint that is not valid: {last}" in caplog.text
    assert "step 12" in capsys.readouterr().out
    with pytest.raises(DataError, match="crc32"):
        validate_main([str(last)])


def test_validate_of_a_run_without_any_checkpoint_says_so(copied):
    for folder in (copied / "checkpoints").iterdir():
        shutil.rmtree(folder)
    with pytest.raises(DataError, match="checkpoints holds no valid checkpoint"):
        validate_main([str(copied)])


def test_a_run_that_asked_for_shards_is_measured_by_a_single_process(finished_run, capsys):
    assert validate_main([str(finished_run), "--parallel.strategy", "fsdp"]) == 0
    assert "nats per token" in capsys.readouterr().out


def test_settings_of_the_run_may_be_replaced(finished_run, capsys):
    assert validate_main([str(finished_run), "--validation.max-tokens", "32"]) == 0
    assert "32 tokens of the set's start, step 14" in capsys.readouterr().out


def test_validate_measures_a_grown_checkpoint_and_a_folder_too(finished_run, prepared, tmp_path, capsys):
    source = latest(finished_run / "checkpoints")
    grow_checkpoint(source, tmp_path / "grown", plan_growth("zero-depth", read_config(source), n_layer=5))
    training = read_training(source)
    write_exchange(tmp_path / "folder", read_config(source), dict(training.model))
    losses = {}
    for name in ("grown", "folder"):
        assert validate_main([str(tmp_path / name), "--data.validation", str(prepared), "--json"]) == 0
        losses[name] = json.loads(capsys.readouterr().out)["sets"][0]["loss"]
    assert validate_main([str(source), "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)["sets"][0]["loss"]
    assert losses == pytest.approx(dict.fromkeys(losses, expected), rel=1e-6)  # zero-depth keeps the function

    with pytest.raises(ValueError, match="does not say what data its run had; give --data.validation DIR"):
        validate_main([str(tmp_path / "folder")])
