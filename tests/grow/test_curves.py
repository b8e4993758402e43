"""Speed-up and its parts: what must hold for every pair of loss curves, and what reading a log refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grow.curves import (
    Curve,
    default_window,
    first_crossing,
    loss_at,
    read_run_log,
    smooth,
    speedup,
    speedup_at,
    training_curve,
    validation_curve,
)
from lit_gpt.errors import DataError

FLOPS_PER_TOKEN = 6e6


def power_law(
    n_points: int, *, noise: float = 0.0, seed: int = 0, base_flops: float = 0.0, cheaper: float = 1.0
) -> Curve:
    """A noisy L = 2 + 6 (tokens x cheaper)^-0.2, logged every 1,000 tokens."""
    tokens = np.arange(1, n_points + 1, dtype=np.int64) * 1000
    loss = 2 + 6 * (tokens * cheaper / 1000.0) ** -0.2 + noise * np.random.default_rng(seed).standard_normal(n_points)
    return Curve(tokens, base_flops + tokens * FLOPS_PER_TOKEN, loss)


curves = st.builds(power_law, st.integers(50, 400), noise=st.floats(0, 0.1), seed=st.integers(0, 99))
windows = st.floats(500, 20_000)


@given(curves, windows)
def test_a_curve_against_itself_has_no_speedup(curve, window):
    smoothed = smooth(curve, window)

    result = speedup(smoothed, smoothed)

    assert result.speedup == 0
    assert result.target_loss == smoothed.loss[-1]


@given(curves, windows, st.floats(1.01, 8))
def test_a_curve_that_costs_k_times_less_has_a_speedup_of_k_minus_one(curve, window, factor):
    grown = smooth(Curve(curve.tokens, curve.flops / factor, curve.loss), window)

    assert speedup(grown, smooth(curve, window)).speedup == pytest.approx(factor - 1)


def test_a_shift_by_one_and_a_half_gives_fifty_per_cent():
    baseline = power_law(300)

    assert speedup(Curve(baseline.tokens, baseline.flops / 1.5, baseline.loss), baseline).speedup == pytest.approx(0.5)


@pytest.mark.parametrize("expected", [0.0, 0.5, -0.2])
@pytest.mark.parametrize("window_tokens", [1000, 10_000])
def test_a_known_speedup_comes_back_within_one_per_cent_with_the_base_paid_for(expected, window_tokens):
    """The grown curve, its base's FLOPs included, is at every loss the baseline's at 1 / (1 + expected) of the FLOPs.

    Smoothing: the mean of the last 1,000 or 10,000 of 400,000 tokens.
    """
    baseline, base_flops = power_law(400), 2e10
    tokens = np.arange(1, 701, dtype=np.int64) * 1000
    flops = base_flops + tokens * FLOPS_PER_TOKEN
    loss = 2 + 6 * (flops / FLOPS_PER_TOKEN / 1000 * (1 + expected)) ** -0.2
    grown = Curve(tokens, flops, loss)

    result = speedup(smooth(grown, window_tokens), smooth(baseline, window_tokens))

    assert result.reached and result.speedup == pytest.approx(expected, abs=0.01)
    assert result.flops_grown > base_flops


def test_a_loss_that_growth_never_reaches_is_said_and_no_number_is_made_up():
    baseline, grown = power_law(300), power_law(300, cheaper=0.5)

    result = speedup_at(grown, baseline, float(baseline.loss[-1]))

    assert (result.speedup, result.flops_grown, result.reason) == (None, None, "not reached")
    assert result.flops_baseline == baseline.flops[-1]


def test_the_loss_at_a_budget_is_interpolated_in_log_flops_and_never_extrapolated():
    curve = Curve(np.arange(4), np.array([0.0, 1e10, 1e12, 1e13]), np.array([9.0, 4.0, 3.0, 2.5]))

    assert loss_at(curve, 1e11) == pytest.approx(3.5)
    assert loss_at(curve, 1e13) == 2.5
    assert loss_at(curve, 1e9) is None and loss_at(curve, 1.01e13) is None


@given(curves, windows, st.floats(1e8, 1e11))
def test_the_cost_of_the_base_lowers_the_speedup_and_is_counted_in_full(curve, window, base_flops):
    faster = Curve(curve.tokens, curve.flops / 3, curve.loss)
    charged = Curve(curve.tokens, curve.flops / 3 + base_flops, curve.loss)
    baseline = smooth(curve, window)

    free, paid = speedup(smooth(faster, window), baseline), speedup(smooth(charged, window), baseline)

    assert paid.target_loss == free.target_loss
    assert paid.speedup < free.speedup
    assert paid.flops_grown == pytest.approx(free.flops_grown + base_flops, rel=0.03)  # log and sum do not commute


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 0.005), (0.02, 0.06)])
@given(seed=st.integers(0, 30), every=st.sampled_from([2, 4, 5]))
def test_the_speedup_hardly_depends_on_how_often_the_runs_logged(noise, tolerance, seed, every):
    baseline = power_law(400, noise=noise, seed=seed)
    grown = power_law(400, noise=noise, seed=seed + 100, base_flops=2e10, cheaper=2.5)
    fine = speedup(smooth(grown, 20_000), smooth(baseline, 20_000))
    coarse = speedup(smooth(every_nth(grown, every), 20_000), smooth(every_nth(baseline, every), 20_000))

    assert coarse.target_loss == pytest.approx(fine.target_loss)
    assert 1 + coarse.speedup == pytest.approx(1 + fine.speedup, rel=tolerance)


def every_nth(curve: Curve, n: int) -> Curve:
    """What a run that logs n times more rarely would have written: the means of n intervals."""
    return Curve(curve.tokens[n - 1 :: n], curve.flops[n - 1 :: n], curve.loss.reshape(-1, n).mean(1))


@given(curves, windows)
def test_a_worse_grown_model_has_a_negative_speedup_at_its_own_final_loss(curve, window):
    slower = power_law(len(curve), base_flops=1e10, cheaper=0.4)
    grown, baseline = smooth(slower, window), smooth(power_law(len(curve)), window)

    result = speedup(grown, baseline)

    assert result.speedup < 0
    assert result.target_loss == grown.loss[-1] > baseline.loss[-1]


@given(curves, windows)
def test_curves_that_never_share_a_loss_give_a_reason_and_no_number(curve, window):
    far_above = smooth(Curve(curve.tokens, curve.flops, curve.loss + 50), window)

    result = speedup(far_above, smooth(curve, window))

    assert (result.speedup, result.target_loss, result.flops_grown) == (None, None, None)
    assert "do not overlap" in result.reason


def test_a_grown_model_below_the_target_from_its_first_point_has_a_lower_bound():
    baseline = power_law(100)
    grown = Curve(np.array([1, 2]), np.array([1e11, 2e11]), np.array([2.5, 2.4]))

    result = speedup(grown, baseline)

    assert result.lower_bound
    assert result.speedup == pytest.approx(baseline.flops[-1] / 1e11 - 1)


@given(curves, windows)
def test_nothing_is_extrapolated(curve, window):
    smoothed = smooth(curve, window)
    result = speedup(smooth(power_law(len(curve), base_flops=1e9, cheaper=2), window), smoothed)

    assert smoothed.flops[0] <= result.flops_baseline <= smoothed.flops[-1]


def test_a_crossing_is_the_first_one_and_interpolates_log_flops():
    curve = Curve(np.arange(1, 5), np.array([1.0, 100.0, 200.0, 400.0]), np.array([4.0, 2.0, 3.5, 1.0]))

    assert first_crossing(curve, 3.0).flops == pytest.approx(10.0)
    assert first_crossing(curve, 0.5) is None


def test_an_untrained_point_that_cost_nothing_is_passed_over():
    curve = Curve(np.arange(3), np.array([0.0, 10.0, 1000.0]), np.array([8.0, 4.0, 2.0]))

    assert first_crossing(curve, 3.0).flops == pytest.approx(100.0)
    assert first_crossing(curve, 5.0).at_most


@given(windows)
def test_smoothing_averages_exactly_the_window_even_inside_a_log_interval(window):
    tokens = np.array([10_000, 20_000, 40_000])
    curve = Curve(tokens, tokens * 6.0, np.array([4.0, 3.0, 2.0]))

    smoothed = smooth(curve, window)

    assert smoothed.loss[-1] == pytest.approx(2.0)
    assert smooth(curve, 30_000).loss == pytest.approx([(20_000 * 2.0 + 10_000 * 3.0) / 30_000])
    assert smoothed.tokens[0] - window >= 0


def test_a_window_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        smooth(power_law(10), 10_001)


def test_the_window_is_a_share_of_the_shortest_curve_but_no_shorter_than_two_log_intervals():
    assert default_window([power_law(100), power_law(400)]) == pytest.approx(10_000)
    assert default_window([power_law(15), power_law(400)]) == pytest.approx(2000)
    assert default_window([power_law(2)]) == pytest.approx(1000)


def metric(step: int, **changes: object) -> dict:
    return {
        "step": step,
        "stage": 1,
        "stage_name": "main",
        "stage_step": step,
        "tokens": step * 100,
        "flops_total": step * 1e6,
        "loss": 5.0 - step / 100,
        "bpb": None,
        "seconds": float(step),
        "position": step,
        "time": 1.7e9 + step,
        **changes,
    }


def write_log(run_dir: Path, *lines: dict | str) -> Path:
    run_dir.mkdir(exist_ok=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (run_dir / "metrics.jsonl").write_text(text)
    return run_dir


def test_half_a_line_at_the_end_is_left_out_with_a_note(tmp_path):
    log = read_run_log(write_log(tmp_path / "run", metric(1), metric(2), json.dumps(metric(3))[:40]))

    assert [line.step for line in log.metrics] == [1, 2]
    assert len(log.notes) == 1 and "run/metrics.jsonl" in log.notes[0]


def test_empty_lines_say_nothing_and_a_line_ends_with_a_newline_alone(tmp_path):
    lines = (metric(1), "", json.dumps(metric(2, stage_name="one\u2028two"), ensure_ascii=False), "", "")

    log = read_run_log(write_log(tmp_path / "run", *lines))

    assert [line.stage_name for line in log.metrics] == ["main", "one\u2028two"]
    assert log.notes == ()


def test_a_line_whose_steps_were_all_skipped_is_left_out_with_a_note(tmp_path):
    log = read_run_log(write_log(tmp_path / "run", metric(1), metric(2, loss=None), metric(3)))

    assert [line.step for line in log.metrics] == [1, 3]
    assert log.notes == ("run/metrics.jsonl: 1 line without a loss left out; every step there was skipped.",)


def test_a_step_that_was_taken_again_replaces_the_first_try(tmp_path):
    log = read_run_log(write_log(tmp_path / "run", metric(1), metric(2), metric(3), metric(2, loss=1.0)))

    assert [(line.step, line.loss) for line in log.metrics] == [(1, 4.99), (2, 1.0)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([metric(1), "{nonsense", metric(2)], "line 2 is not JSON"),
        ([metric(1), metric(40, loss=float("nan"))], "the loss of step 40 is nan"),
        ([metric(1), metric(7, loss="low")], "the loss of step 7 is low"),
        ([metric(7, loss=None)], "no complete line"),
        (["[1, 2]", metric(2)], "not a JSON object"),
        ([{"step": 1}], "lacks stage"),
        ([metric(1, flops_total="many")], "flops_total is 'many'"),
        ([metric(1, tokens=float("inf"))], "tokens is inf"),
        ([metric(1), metric(2, bpb=float("nan"))], "line 2: bpb is nan"),
        ([metric(1), metric(2, stage=1.5)], "line 2: stage is 1.5, not a whole number"),
        ([metric(1), metric(2, stage_name=7)], "line 2: stage_name is 7, not text"),
        ([""], "no complete line"),
    ],
)
def test_a_log_that_cannot_be_a_curve_is_one_clear_error(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        read_run_log(write_log(tmp_path / "run", *lines))


def test_a_measurement_that_is_no_number_is_one_clear_error_and_scores_of_tasks_are_no_measurement(tmp_path):
    run_dir = write_log(tmp_path / "run", metric(1))
    common = {"step": 1, "stage": 1, "stage_name": "main", "when": "every", "tokens": 100, "flops_total": 1e6}
    score = {**common, "task": "boolq", "metric": "acc", "value": 0.5}
    (run_dir / "evals.jsonl").write_text(json.dumps(score))
    assert read_run_log(run_dir).evaluations == ()

    bits = {**common, "set": "a", "metric": "bpb", "value": float("nan")}
    (run_dir / "evals.jsonl").write_text(json.dumps(score) + "\n" + json.dumps(bits))
    with pytest.raises(DataError, match="line 2: the bpb of step 1 is nan"):
        read_run_log(run_dir)


def test_a_folder_without_metrics_is_no_run(tmp_path):
    with pytest.raises(DataError, match=r"no metrics\.jsonl"):
        read_run_log(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such run directory"):
        read_run_log(tmp_path / "absent")


def test_a_log_whose_tokens_go_back_is_damaged(tmp_path):
    log = read_run_log(write_log(tmp_path / "run", metric(1), metric(2, tokens=50)))

    with pytest.raises(DataError, match="must grow from line to line"):
        training_curve(log.metrics, 0)


def test_a_validation_curve_holds_the_losses_of_one_set(tmp_path):
    def evaluation(step: int, value: float | None, **changes: object) -> dict:
        base = {"step": step, "stage": 1, "stage_name": "main", "when": "every", "tokens": step * 100}
        return {**base, "flops_total": step * 1e6, "set": "a", "metric": "loss", "value": value, **changes}

    run_dir = write_log(tmp_path / "run", metric(1))
    lines = [
        evaluation(0, 8.0, when="start"),
        evaluation(5, 4.0),
        evaluation(5, 3.9, when="end"),
        evaluation(5, None, metric="bpb"),
        evaluation(5, 7.0, set="b"),
        {"task": "piqa", "step": None, "stage": None, "metric": "acc", "value": 0.5},  # of scripts/evaluate.py
    ]
    (run_dir / "evals.jsonl").write_text("\n".join(map(json.dumps, lines)))

    curve = validation_curve(read_run_log(run_dir).evaluations, "a")

    assert curve.loss.tolist() == [8.0, 3.9] and curve.tokens.tolist() == [0, 500]
    assert validation_curve([], "a") is None


def test_a_baseline_with_one_paid_measurement_cannot_be_compared_and_the_reason_says_why():
    def curve(*losses):
        at = np.arange(len(losses))
        return Curve(at * 100, at * 1e9, np.array(losses, dtype=np.float64))

    result = speedup(curve(8.0, 6.0, 5.0), curve(8.0, 5.5))
    assert result.speedup is None
    assert "validation.every_steps" in result.reason
