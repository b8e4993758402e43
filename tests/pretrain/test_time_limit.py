"""How long a run may take: what users write, what SLURM answers, and when the run has to save."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import StopConfig
from pretrain.signals import StopSignal
from pretrain.time_limit import TimeLimit, find_limits, job_secs_left, parse_duration
from pretrain.world import ALONE


@pytest.mark.parametrize(
    ("text", "secs"),
    [("8h", 28800), ("1h30m", 5400), ("0.5h", 1800), ("2d", 172800), ("5:00", 300), ("59", None), ("", None)]
    + [("12:00:00", 43200), ("2-12:00:00", 216000), ("UNLIMITED", None), ("0:00", None), ("8 hours", None)],
)
def test_times_are_read_as_people_and_as_slurm_write_them(text, secs):
    if secs is None:
        with pytest.raises(ValueError, match="write 8h, 90m|more than no time"):
            parse_duration(text)
    else:
        assert parse_duration(text) == secs


@given(days=st.integers(0, 99), hours=st.integers(0, 23), minutes=st.integers(0, 59), seconds=st.integers(1, 59))
def test_every_time_that_slurm_prints_is_understood(days, hours, minutes, seconds):
    expected = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    assert parse_duration(f"{days}-{hours:02d}:{minutes:02d}:{seconds:02d}") == expected
    assert parse_duration(f"{days}d{hours}h{minutes}m{seconds}s") == expected


@pytest.mark.parametrize(("answer", "secs"), [("1-00:00:05", 86405), ("UNLIMITED", None), ("INVALID", None)])
def test_slurm_is_asked_for_the_time_that_the_job_has_left(tmp_path, answer, secs):
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\n[ "$*" = "--noheader --jobs 7 --format %L" ] && echo {answer}\n')
    squeue.chmod(0o755)
    assert job_secs_left({"SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:/bin:/usr/bin"}) == secs


def test_without_a_job_or_without_an_answer_there_is_no_limit(tmp_path):
    assert job_secs_left({}) is None
    (tmp_path / "squeue").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    assert job_secs_left({"SLURM_JOB_ID": "7", "PATH": str(tmp_path)}) is None


def test_the_job_is_left_before_its_end_and_a_sitting_at_its_end():
    limits = find_limits(StopConfig(after="2h", margin_secs=60), ALONE, lambda: 600.0, now=lambda: 1000.0)
    assert limits == (
        TimeLimit("stop.after=2h", 1000.0 + 7200),
        TimeLimit("the end of the job's time", 1000.0 + 600 - 60, saves=2),
    )


def test_a_job_that_has_less_than_the_margin_is_not_left_after_one_step(capsys):
    assert find_limits(StopConfig(), ALONE, lambda: 59.0) == ()
    assert "only a signal will stop the run" in capsys.readouterr().err


def test_the_longer_saving_takes_the_earlier_the_run_stops():
    clock = iter([500.0, 519.9, 520.0])
    stop = StopSignal((TimeLimit("the end", 540.0, saves=2),), clock=lambda: next(clock))
    stop.save_secs = 10.0
    assert [stop.requested() for _ in range(3)] == [False, False, True]
    assert stop.received == "the end"
