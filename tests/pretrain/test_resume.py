"""A run that was interrupted, however, ends like one that was not: to the bit, without replay and without gaps."""

from __future__ import annotations

import errno
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.kill_sweep import cut_back
from lit_gpt.checkpoint import latest, manifest_sha256, read_training
from lit_gpt.settings_files import merge
from lit_gpt.tokenizer import Tokenizer
from tests.pretrain.conftest import write_prepared
from tests.pretrain.runs import assert_same_end


@pytest.fixture(scope="module")
def wait_for():
    def wait(process, condition, seconds=120):
        deadline = time.monotonic() + seconds
        while not condition():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "the run did not get there"
            time.sleep(0.02)

    return wait


@pytest.fixture
def copied(settings, finished_run):
    """A finished run under the settings' own out_dir."""
    return Path(shutil.copytree(finished_run, settings["out_dir"]))


def test_kill_9_at_any_moment_then_the_same_command_ends_the_same(
    settings, pretrain, pretrain_process, wait_for, finished_run
):
    folder = Path(settings["out_dir"])
    moments = random.Random(0)
    for after_lines in (1, moments.randint(2, 5), moments.randint(6, 12)):
        process = pretrain_process(settings)
        log = folder / "metrics.jsonl"
        wait_for(process, lambda n=after_lines, log=log: log.exists() and log.read_text().count("\n") >= n)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.communicate()
    assert pretrain(settings).returncode == 0
    assert_same_end(folder, finished_run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_at_the_next_step_and_exits_75(
    settings, pretrain, pretrain_process, wait_for, finished_run, number
):
    never = {**settings, "checkpoints": {"every_steps": 1000}}
    folder = Path(settings["out_dir"])
    process = pretrain_process(never)
    wait_for(process, lambda: (folder / "metrics.jsonl").exists())
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    saved = read_training(latest(folder / "checkpoints")).state["step_count"]
    assert 1 <= saved < 14
    assert pretrain(never).returncode == 0
    assert_same_end(folder, finished_run)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp32", "activation_checkpointing": "full"},
        {"precision": "bf16", "activation_checkpointing": "selective", "batch": {"micro_batch_size": 1}},
        {"precision": "bf16-true"},
    ],
    ids=lambda changes: changes["precision"],
)
def test_a_run_that_was_stopped_ends_to_the_bit_however_it_computes(settings, pretrain, tmp_path, changes):
    kept = {"checkpoints": {"every_steps": 2, "keep_every_steps": 1}, "validation": {"max_tokens": 160}}
    settings = merge(settings, {**changes, **kept})
    assert pretrain(settings).returncode == 0
    stopped = tmp_path / "stopped"
    cut_back(Path(settings["out_dir"]), stopped, 1, 4)
    again = pretrain({**settings, "out_dir": str(stopped)})
    assert "resumed from" in again.stdout, again.stderr
    assert_same_end(stopped, Path(settings["out_dir"]))


def test_a_run_killed_before_its_first_checkpoint_starts_over_without_double_records(settings, pretrain, finished_run):
    folder = Path(settings["out_dir"])
    folder.mkdir()
    for name in ("metrics.jsonl", "evals.jsonl"):
        first = (finished_run / name).read_text().splitlines(keepends=True)[0]
        (folder / name).write_text(first)
    assert pretrain(settings).returncode == 0
    assert_same_end(folder, finished_run)


def test_a_finished_run_is_left_alone(settings, pretrain, copied):
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()}
    again = pretrain(settings)
    assert again.returncode == 0
    assert "is finished" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in before if path.name != "run.lock"} == {
        path: time_ns for path, time_ns in before.items() if path.name != "run.lock"
    }
    assert {path for path in copied.rglob("*") if path.is_file()} - set(before) <= {copied / "run.lock"}


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:-1] + b"?"])
def test_a_damaged_last_checkpoint_is_passed_over_loudly_and_written_again(
    settings, pretrain, copied, finished_run, damage
):
    last = latest(copied / "checkpoints")
    victim = max((path for path in last.iterdir() if path.is_file()), key=lambda path: path.stat().st_size)
    victim.write_bytes(damage(victim.read_bytes()))
    again = pretrain(settings)
    assert again.returncode == 0, again.stderr
    assert f"warning: {last}" in again.stderr
    assert_same_end(copied, finished_run)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 1}, "seed"),
        ({"optimizer": {"learning_rate": 0.5}}, "optimizer.learning_rate"),
        ({"batch": {"global_batch_size": 8}}, "batch.global_batch_size"),
    ],
)
def test_other_settings_are_refused_by_name(settings, pretrain, copied, change, field):
    again = pretrain(merge(settings, change))
    assert again.returncode == 2
    assert f"{field}: " in again.stderr
    assert "--fresh" in again.stderr


def test_other_data_is_refused_by_name_unless_allowed(settings, pretrain, tmp_path, root):
    data = tmp_path / "data"
    tokens = Tokenizer.load("bytes").encode((root / "LICENSE").read_text())
    write_prepared(data, tokens)
    settings = {**settings, "data": {"train": str(data)}, "stages": [{"name": "main", "max_steps": 2}]}
    assert pretrain(settings).returncode == 0
    write_prepared(data, np.flip(tokens))
    again = pretrain(settings)
    assert again.returncode == 2
    assert "fingerprint" in again.stderr
    assert "allow_order_change" in again.stderr
    allowed = pretrain(settings, "--data.allow_order_change", "true")
    assert allowed.returncode == 0, allowed.stderr
    assert "warning: data.allow_order_change" in allowed.stderr


def test_data_that_moved_is_still_the_same_data(settings, pretrain, prepared, tmp_path):
    settings = {**settings, "stages": [{"name": "main", "max_steps": 2}], "data": {"train": {"text": str(prepared)}}}
    assert pretrain(settings).returncode == 0
    moved = shutil.copytree(prepared, tmp_path / "moved")
    again = pretrain({**settings, "data": {"train": {"text": str(moved)}, "max_epochs": 9}})
    assert again.returncode == 0, again.stderr


def test_damaged_checkpoints_do_not_push_out_the_good_ones(settings, pretrain, copied):
    """Newer ones that are damaged are not counted among those that stay, and go with the next save."""
    folder = copied / "checkpoints" / "stage-02"
    for path in folder.iterdir():
        (path / "MANIFEST.json").write_text("{}")
    settings = {**settings, "checkpoints": {"every_steps": 1, "keep_last": 1}}
    assert pretrain(settings).returncode == 0
    assert [path.name for path in folder.iterdir()] == ["step-0000000014"]
    assert latest(copied / "checkpoints").parent.name == "stage-02"


def _all_damaged(checkpoints: Path) -> None:
    (checkpoints.parent / "last_saved").unlink()  # of a run of before there was one
    for folder in checkpoints.glob("*/*"):
        victim = max(folder.iterdir(), key=lambda path: path.stat().st_size)
        victim.write_bytes(victim.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize("lose", [_all_damaged, shutil.rmtree])
def test_a_run_that_lost_all_of_its_checkpoints_is_not_begun_again_unasked(settings, pretrain, copied, lose):
    lose(copied / "checkpoints")
    kept = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file() and path.name != "run.lock"}
    again = pretrain(settings)
    assert again.returncode == 3, again.stderr
    assert "had reached stage-02/step-0000000014 and none of its checkpoints" in again.stderr
    assert "--fresh" in again.stderr
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert pretrain(settings, "--fresh").returncode == 0


def test_a_run_with_checkpoints_of_its_own_needs_its_parent_no_more(settings, pretrain, finished_run, tmp_path):
    parent = shutil.copytree(latest(finished_run / "checkpoints"), tmp_path / "parent")
    settings = {**settings, "init_from": str(parent), "stages": [{"name": "main", "max_steps": 2}]}
    assert pretrain(settings).returncode == 0
    shutil.rmtree(parent)
    again = pretrain(settings)
    assert again.returncode == 0, again.stderr
    assert "is finished" in again.stdout


def test_a_start_that_a_launcher_repeats_does_not_delete_what_the_first_one_trained(
    settings, pretrain, copied, monkeypatch
):
    """A job of one task that SLURM queued again: the command still says --fresh."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    before = manifest_sha256(latest(copied / "checkpoints"))
    again = pretrain(settings, "--fresh", "--take-over")
    assert again.returncode == 0 and "is finished" in again.stdout
    assert "--fresh and --take-over ignored" in again.stderr
    assert manifest_sha256(latest(copied / "checkpoints")) == before


def test_fresh_is_an_error_where_the_earlier_checkpoints_cannot_be_removed(settings, pretrain, copied, monkeypatch):
    def refuse(path, target):
        raise PermissionError(errno.EACCES, "no", str(path))

    before = {*copied.rglob("*")}
    monkeypatch.setattr(Path, "rename", refuse)
    refused = pretrain(settings, "--fresh")
    assert refused.returncode == 3 and "checkpoints: no" in refused.stderr
    assert before - {copied / "last_saved"} <= {*copied.rglob("*")}


def test_fresh_starts_over(settings, pretrain, copied):
    assert pretrain({**settings, "seed": 1}, "--fresh").returncode == 0
    assert read_training(latest(copied / "checkpoints")).state["seed"] == 1
