"""Logs of a run: cut back on resume, and no log that fails stops a run."""

from __future__ import annotations

import json

import pytest

from pretrain.loggers import Progress, RunLog, cut_back, format_seconds


def write_lines(path, records, tail=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)


def test_lines_after_the_checkpoint_and_half_a_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [{"stage": 1, "step": step} for step in (10, 20, 30)]
    write_lines(path, records, tail='{"stage": 1, "ste')
    cut_back(path, stage=1, step=20)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20]


def test_a_record_of_the_next_stage_at_the_same_step_is_dropped(tmp_path):
    path = tmp_path / "evals.jsonl"
    write_lines(path, [{"stage": 1, "step": 20}, {"stage": 2, "step": 20}])
    cut_back(path, stage=1, step=20)
    assert path.read_text().count("\n") == 1


def test_scores_of_a_model_of_no_run_stay(tmp_path):
    path = tmp_path / "evals.jsonl"
    path.write_text('{"stage": 1, "ste\n')  # behind half a line of a killed run
    score, loss = {"stage": None, "step": None, "task": "piqa"}, {"stage": 2, "step": 20}
    path.write_text(path.read_text() + "".join(json.dumps(record) + "\n" for record in (score, loss)))
    cut_back(path, stage=1, step=20)
    assert [json.loads(line)["stage"] for line in path.read_text().splitlines()] == [None]


def test_a_log_that_cannot_be_written_warns_once_and_does_not_raise(tmp_path, capsys):
    log = RunLog(tmp_path, stage=1, step=0, tensorboard=False)
    (tmp_path / "evals.jsonl").mkdir()
    for _ in range(3):
        log.evaluation([{"set": "a", "metric": "loss", "value": 1.0, "when": "start", "step": 0}])
    assert capsys.readouterr().err.count("warning: evals.jsonl cannot be written") == 1


def test_tensorboard_that_cannot_be_closed_warns_and_does_not_raise(tmp_path, capsys, monkeypatch):
    log = RunLog(tmp_path, stage=0, step=0, tensorboard=True)

    def full(*_):
        raise OSError("no space")

    monkeypatch.setattr(log._tensorboard, "finalize", full)
    log.close()
    assert "warning: TensorBoard cannot be written" in capsys.readouterr().err


def test_tensorboard_whose_thread_met_a_full_disk_warns_once_and_does_not_raise(tmp_path, capsys):
    log = RunLog(tmp_path, stage=0, step=0, tensorboard=True)
    record = {"lr": 1.0, "grad_norm": 1.0, "tokens_per_sec": 1.0, "tokens": 1, "flops_total": 1.0, "loss": 3.37}
    log.metrics({**record, "step": 1})
    writer = next(iter(log._tensorboard.experiment.all_writers.values()))
    writer.event_writer._async_writer._worker.exception = OSError(28, "No space left on device")
    for step in (2, 3):
        log.metrics({**record, "step": step})
    log.close()
    assert capsys.readouterr().err.count("warning: TensorBoard cannot be written ([Errno 28] No space") == 1
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, round(event.value, 3)) for event in events.Scalars("train/loss")]


def test_tensorboard_shows_each_step_once_after_a_resume_and_none_of_a_run_that_starts_anew(tmp_path):
    record = {"lr": 1.0, "grad_norm": 1.0, "tokens_per_sec": 1.0, "tokens": 1, "flops_total": 1.0}
    for stage, first, loss in ((0, 1, 3.0), (1, 2, 4.0)):
        log = RunLog(tmp_path, stage=stage, step=first - 1, tensorboard=True)
        for step in range(first, 4):
            log.metrics({**record, "step": step, "stage": 1, "loss": loss})
        log.close()
    assert scalars(tmp_path) == [(1, 3.0), (2, 4.0), (3, 4.0)]
    log = RunLog(tmp_path, stage=0, step=0, tensorboard=True)
    log.metrics({**record, "step": 1, "stage": 1, "loss": 5.0})
    log.close()
    assert scalars(tmp_path) == [(1, 5.0)]


@pytest.mark.parametrize(("seconds", "text"), [(5, "5s"), (95, "1m35s"), (3700, "1h01m"), (float("inf"), "?")])
def test_durations_read_as_people_write_them(seconds, text):
    assert format_seconds(seconds) == text


def test_the_time_left_is_at_the_rate_of_what_does_not_compile(capsys):
    progress = Progress("base", total_steps=30, done_steps=0, flops_left=6000.0, shown=False)
    for flops_per_sec, compiling in ((1.0, 50.0), (100.0, 0.0), (2.0, 50.0)):
        progress.status(10, 3.0, 64.0, flops_per_sec, compiling)
    times = [line.rpartition("  ")[2] for line in capsys.readouterr().out.splitlines()]
    assert times == ["? left in this run", "1m00s left in this run", "1m00s left in this run"]
