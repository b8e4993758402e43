"""Who may train in a run's folder."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lit_gpt.errors import DataError
from pretrain import loop
from pretrain import run_lock as module
from pretrain.heartbeat import HEARTBEAT_FILE, Heartbeat
from pretrain.run_lock import BEAT_SECS, DEAD_SECS, LOCK_FILE, Owner, check_held, read_owner, run_lock

ELSEWHERE = Owner(host="node7", pid=123, job="4711", since=1.7e9)


def leave(folder, owner=ELSEWHERE, silent_secs=0.0):
    """What an owner leaves behind that ended without a word."""
    path = folder / LOCK_FILE
    path.write_text(json.dumps(asdict(owner)))
    os.utime(path, (time.time() - silent_secs,) * 2)
    return path


def test_the_lock_names_its_owner_and_a_clean_end_names_nobody(tmp_path):
    with run_lock(tmp_path):
        assert read_owner(tmp_path / LOCK_FILE).pid == os.getpid()
    assert read_owner(tmp_path / LOCK_FILE) is None
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


def test_a_second_owner_is_refused_and_told_who_the_first_is(tmp_path):
    path = leave(tmp_path)
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="process 123 of job 4711 on node7, since 2023-11-14.*--take-over"):
            run_lock(tmp_path).__enter__()
        assert read_owner(path) == ELSEWHERE


def test_an_owner_of_this_node_that_was_killed_holds_nothing(tmp_path):
    leave(tmp_path, Owner.here())
    with run_lock(tmp_path):
        pass


@pytest.fixture
def a_living_owner(tmp_path, monkeypatch):
    """Touches the file while somebody waits for it."""
    monkeypatch.setattr(module.time, "sleep", lambda _: os.utime(tmp_path / LOCK_FILE))


def test_a_lock_that_is_not_seen_on_this_node_counts_as_long_as_its_heart_beats(tmp_path, capsys, a_living_owner):
    leave(tmp_path, silent_secs=BEAT_SECS)
    with pytest.raises(DataError, match="gave a sign of life 0 s ago"):
        run_lock(tmp_path).__enter__()
    leave(tmp_path, silent_secs=DEAD_SECS + 1)
    with run_lock(tmp_path):
        assert "counts as gone after 60 s" in capsys.readouterr().err


def test_the_next_job_of_a_chain_waits_for_one_that_was_killed_a_moment_ago(tmp_path, capsys, monkeypatch):
    """The file stays as it was left: only the clock moves on."""
    path = leave(tmp_path, silent_secs=BEAT_SECS)
    waited = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    monkeypatch.setattr(module, "silence", lambda _: BEAT_SECS + len(waited))
    with run_lock(tmp_path):
        assert read_owner(path).pid == os.getpid()
    told = capsys.readouterr().err
    assert "waiting for a sign of life" in told and "counts as gone after 60 s" in told
    assert len(waited) == DEAD_SECS - BEAT_SECS + 1


def test_a_signal_ends_the_wait_for_a_sign_of_life_with_75(settings, pretrain, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    path = leave(tmp_path / "run")
    monkeypatch.setattr(module.time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    stopped = pretrain(settings)
    assert stopped.returncode == 75, stopped.stderr
    assert "waiting for a sign of life" in stopped.stderr and "stopped by SIGTERM; repeat the command" in stopped.stderr
    assert read_owner(path) == ELSEWHERE and not (tmp_path / "run" / "checkpoints").exists()


def test_a_glance_of_status_does_not_look_like_an_owner(tmp_path, monkeypatch):
    (tmp_path / LOCK_FILE).touch()
    glance = (tmp_path / LOCK_FILE).open()
    fcntl.flock(glance, fcntl.LOCK_SH)
    monkeypatch.setattr(module.time, "sleep", lambda _: glance.close())
    with run_lock(tmp_path):
        assert glance.closed


def test_a_lock_that_was_taken_over_in_the_same_moment_is_not_held(tmp_path, monkeypatch):
    original = fcntl.flock

    def taken_over_first(*arguments):
        (tmp_path / LOCK_FILE).unlink()
        leave(tmp_path)
        original(*arguments)

    monkeypatch.setattr(module.fcntl, "flock", taken_over_first)
    with pytest.raises(DataError, match="has just taken it over.*process 123"):
        run_lock(tmp_path).__enter__()
    assert read_owner(tmp_path / LOCK_FILE) == ELSEWHERE


def test_a_job_that_was_requeued_onto_another_node_need_not_wait(tmp_path, monkeypatch):
    leave(tmp_path)
    monkeypatch.setattr(module.Owner, "here", lambda: replace(ELSEWHERE, host="node8"))
    with run_lock(tmp_path):
        assert read_owner(tmp_path / LOCK_FILE).host == "node8"


def test_a_lock_that_a_server_keeps_for_a_dead_node_can_be_taken_over(tmp_path, capsys):
    with leave(tmp_path).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with run_lock(tmp_path, take_over=True), pytest.raises(DataError):
            run_lock(tmp_path).__enter__()
    assert "is taken from process 123" in capsys.readouterr().err


def test_the_heart_beats_while_the_folder_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECS", 0.01)
    with run_lock(tmp_path):
        path = tmp_path / LOCK_FILE
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 60
        while path.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_file_system_without_locks_is_told_of_and_the_heartbeat_guards_alone(
    tmp_path, monkeypatch, capsys, a_living_owner
):
    def refuse(*_):
        raise OSError(module.errno.ENOLCK, "no locks available")

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    with run_lock(tmp_path):
        assert "without locks" in capsys.readouterr().err
    leave(tmp_path, silent_secs=BEAT_SECS)
    with pytest.raises(DataError, match="node7"):
        run_lock(tmp_path).__enter__()


def test_a_process_of_this_node_that_holds_the_lock_is_not_taken_over(tmp_path):
    with leave(tmp_path, Owner.here()).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=f"which lives, though it may be stopped.*kill -9 {os.getpid()}"):
            run_lock(tmp_path, take_over=True).__enter__()
    with run_lock(tmp_path, take_over=True):  # it has ended
        pass


def taken(path):
    path.unlink()
    leave(path.parent)


def rewritten(path):  # where the file system has no locks
    leave(path.parent)


def ended(path):
    path.write_text("")


@pytest.mark.parametrize("lose", [taken, rewritten, ended])
def test_an_owner_notices_that_somebody_else_holds_the_folder(tmp_path, lose):
    with run_lock(tmp_path):
        check_held(tmp_path)
        lose(tmp_path / LOCK_FILE)
        with pytest.raises(DataError, match="was taken over while this process held it"):
            check_held(tmp_path)
    check_held(tmp_path)


def test_the_heart_of_a_former_owner_does_not_beat_for_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECS", 0.01)
    touched = []
    monkeypatch.setattr(module.os, "utime", touched.append)
    with run_lock(tmp_path):
        taken_over = time.monotonic()
        while not touched:
            assert time.monotonic() < taken_over + 60
            time.sleep(0.01)
    assert all(isinstance(each, int) for each in touched)  # the file, not its name


@pytest.mark.parametrize("notices", ["log line", "heartbeat", "save"])
def test_a_run_that_wakes_up_in_a_folder_that_was_taken_over_writes_nothing(settings, pretrain, monkeypatch, notices):
    folder, original, seen = Path(settings["out_dir"]), loop.train_step, {}

    def asleep_in_step_5(this_run, stage, trained, state, batches):
        if state.step_count == 4:
            taken(folder / LOCK_FILE)
            seen.update(contents(folder))
        return original(this_run, stage, trained, state, batches)

    monkeypatch.setattr(loop, "train_step", asleep_in_step_5)
    if notices == "save":
        monkeypatch.setattr(Heartbeat, "beat", lambda *_, **__: None)
    every = 1 if notices == "log line" else 100
    done = pretrain(
        {
            **settings,
            "logging": {"every_steps": every, "tensorboard": False},
            "checkpoints": {"every_steps": 1, "on_failure": "continue"},
            "validation": {"every_steps": 0},
        }
    )
    assert done.returncode == 3, done.stderr
    assert "was taken over while this process held it: process 123 of job 4711 on node7" in done.stderr
    assert contents(folder) == seen
    assert (folder / HEARTBEAT_FILE).exists() == (notices != "save")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
