"""Laws through points: known constants come back inside their intervals, and `grow fit` says what it did."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grow.__main__ import main
from grow.fit import fit_logarithm, fit_parabola, fit_power_law, predict_speedup
from lit_gpt.flops import flops_per_token
from tests.synthetic_runs import LARGE, Stage, SyntheticRun, power_law_loss, sized, stacked_run

BUDGETS = np.geomspace(1e18, 1e22, 16)


def noisy(a: float, b: float, c: float, *, seed: int, noise: float = 0.003) -> np.ndarray:
    """L = c + a C^b times log-normal noise."""
    return (c + a * BUDGETS**b) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(BUDGETS)))


def test_a_power_law_without_noise_comes_back_to_the_last_digits():
    law = fit_power_law(BUDGETS, 40 * BUDGETS**-0.06)

    assert (law.a, law.b, law.c) == (pytest.approx(40), pytest.approx(-0.06), 0)
    assert law.rms_log_residual < 1e-12
    assert law.predict(1e24) == pytest.approx(40 * 1e24**-0.06)


def test_an_offset_without_noise_comes_back_too():
    law = fit_power_law(BUDGETS, 1.7 + 900 * BUDGETS**-0.16, with_offset=True, n_draws=10)

    assert (law.a, law.b, law.c) == (pytest.approx(900, rel=1e-3), pytest.approx(-0.16, rel=1e-4), pytest.approx(1.7))


@pytest.mark.parametrize(("c", "a", "b"), [(0.0, 40, -0.06), (1.7, 900, -0.16)])
def test_the_constants_lie_inside_their_intervals_for_most_noises(c, a, b):
    """Of 20 noises, the 95 per cent intervals of a bootstrap over 16 points should miss few."""
    hits = {"a": 0, "b": 0, "c": 0, "prediction": 0}
    for seed in range(20):
        law = fit_power_law(BUDGETS, noisy(a, b, c, seed=seed), with_offset=c > 0, n_draws=100, seed=seed)
        for name, value in (("a", a), ("b", b), ("c", c)):
            low, high = law.interval(name)
            hits[name] += low <= value <= high
        low, high = law.predicted_interval(1e23)
        hits["prediction"] += low <= c + a * 1e23**b <= high

    assert min(hits.values()) >= 15, hits


def test_the_same_seed_gives_the_same_intervals_and_another_one_others():
    loss = noisy(40, -0.06, 0, seed=1)
    first, again, other = (fit_power_law(BUDGETS, loss, seed=seed, n_draws=50) for seed in (3, 3, 4))

    assert np.array_equal(first.draws, again.draws) and not np.array_equal(first.draws, other.draws)


def test_as_many_points_as_constants_have_no_interval():
    law = fit_power_law([1e18, 1e19], [4.0, 3.5])

    assert law.predict(1e19) == pytest.approx(3.5) and law.interval("b") is None


@pytest.mark.parametrize(
    ("flops", "loss", "offset", "message"),
    [
        ([1e18], [4.0], False, "1 different budget cannot fix the 2 constants"),
        ([1e18, 1e18], [4.0, 3.9], False, "1 different budget cannot"),
        ([1e18, 1e19], [4.0, 3.5], True, "2 different budgets cannot fix the 3 constants.*fit without offset"),
        ([1e18, 1e19], [4.0, float("nan")], False, "a loss of nan has no logarithm"),
        ([1e18, 1e19], [4.0, 0.0], False, "a loss of 0 has no logarithm"),
        ([-1e18, 1e19], [4.0, 3.5], False, r"a FLOPs of -1e\+18"),
    ],
)
def test_points_that_fix_no_law_are_refused(flops, loss, offset, message):
    with pytest.raises(ValueError, match=message):
        fit_power_law(flops, loss, with_offset=offset)


@settings(max_examples=10)
@given(st.floats(0.5, 4), st.sampled_from([1e20, 1e23]))
def test_a_law_that_is_k_times_cheaper_has_a_speedup_of_k_minus_one_at_every_budget(k, flops):
    baseline = fit_power_law(BUDGETS, noisy(40, -0.06, 0, seed=0), n_draws=200, seed=0)
    grown = fit_power_law(BUDGETS / k, noisy(40, -0.06, 0, seed=0), n_draws=200, seed=1)

    found = predict_speedup(grown, baseline, flops)

    assert found.speedup == pytest.approx(k - 1, rel=1e-6, abs=1e-6)
    assert found.interval[0] < k - 1 < found.interval[1]
    assert found.loss == pytest.approx(float(baseline.predict(flops)))


def test_a_law_that_never_comes_down_to_a_loss_has_minus_one_not_a_number():
    grown = fit_power_law(BUDGETS, 2.5 + 900 * BUDGETS**-0.16, with_offset=True, n_draws=5)
    baseline = fit_power_law(BUDGETS, 900 * BUDGETS**-0.16, n_draws=5)

    assert predict_speedup(grown, baseline, 1e22).speedup == -1


def test_the_lowest_point_of_a_parabola_in_the_logarithm():
    x = [1e9, 5e9, 10e9, 20e9, 50e9]
    loss = [2.3 + 0.04 * (np.log10(d) - 10.2) ** 2 for d in x]

    found = fit_parabola(x, loss)

    assert found.optimum == pytest.approx(10**10.2)
    assert found.at(np.array([1e9])) == pytest.approx([loss[0]])
    assert fit_parabola(x, [-value for value in loss]).optimum is None  # opens downwards
    assert fit_parabola([1e11, 2e11, 4e11], [2.3, 2.4, 2.6]).optimum is None  # outside of the points
    with pytest.raises(ValueError, match="three different positive x"):
        fit_parabola([0.0, 1e9, 2e9], [2.5, 2.4, 2.3])


def test_a_line_in_the_logarithm():
    x = np.geomspace(1, 100, 7)
    assert fit_logarithm(x, 0.3 - 0.02 * np.log(x)) == pytest.approx((0.3, -0.02))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Four sizes from scratch and three grown, 50 per cent cheaper, on L = 60 C^-0.09 and (1.5 C)^-0.09."""
    root = tmp_path_factory.mktemp("runs")
    paths = []
    for n_layer, steps in ((4, 200), (8, 300), (16, 400), (24, 600)):
        config = sized(n_layer)
        stage = Stage(f"scratch{n_layer}", config, steps, power_law_loss(config))
        paths.append(SyntheticRun(root / f"scratch{n_layer}", [stage], noise=0.001).write())
        if n_layer > 4:
            paths.append(grown_power_law(root / f"stack{n_layer}", n_layer, steps))
    return paths


def grown_power_law(path: Path, n_layer: int, steps: int) -> Path:
    """A fourth of the layers for 50 steps, then all: by its own and its base's FLOPs on L = 60 (1.5 C)^-0.09."""
    base, grown = sized(n_layer // 4), sized(n_layer)
    spent = flops_per_token(base).paper / flops_per_token(grown).paper * 50 * 2048
    at = power_law_loss(grown, gain=1.5)
    stages = [
        Stage("base", base, 50, power_law_loss(base)),
        Stage("grown", grown, steps, lambda t: at(t + spent), "stack"),
    ]
    return SyntheticRun(path, stages, noise=0.001).write()


def fit(capsys, *argv: str | Path) -> tuple[int, str, str]:
    code = main(["fit", *map(str, argv)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_finds_the_laws_of_both_families_and_the_speedup_between_them(runs, capsys):
    code, out, _ = fit(capsys, *runs, "--at", "1e15,1e16", "--json")

    found = json.loads(out)
    families = {family["name"]: family for family in found["families"]}
    assert code == 0 and list(families) == ["scratch", "stack"]
    assert families["scratch"]["runs"] == ["scratch4", "scratch8", "scratch16", "scratch24"]
    assert families["scratch"]["b"]["value"] == pytest.approx(-0.09, rel=0.02)
    assert [each["flops"] for each in families["stack"]["predictions"]] == [1e15, 1e16]
    assert [each["speedup"] for each in found["speedups"]] == [pytest.approx(0.5, abs=0.1)] * 2
    low, high = found["speedups"][0]["interval"]
    assert low < found["speedups"][0]["speedup"] < high


def test_the_command_says_what_its_points_are_and_doubts_few_of_them(runs, capsys):
    code, out, _ = fit(capsys, *runs)

    assert code == 0
    assert "The final training loss of each run, averaged over the last tenth" in out
    assert "stack over scratch: +" in out and "10 times the largest budget" in out
    assert "3 points for 2 constants; intervals from so few are too narrow" in out


@pytest.mark.parametrize("loss", ["train", "validation"])
def test_every_point_of_one_run_makes_a_law_with_a_warning(runs, capsys, loss):
    code, out, _ = fit(capsys, runs[0], "--points", "every", "--loss", loss, "--json", "--resamples", "20")

    found = json.loads(out)
    assert code == 0 and len(found["families"][0]["losses"]) > 3
    assert any("not independent" in note for note in found["notes"])


def test_too_few_runs_are_bad_usage_and_one_family_of_them_is_left_out(runs, capsys, tmp_path):
    code, out, err = fit(capsys, runs[0])
    assert (code, out) == (2, "") and "'scratch' (scratch4): 1 different budget" in err

    code, out, _ = fit(capsys, *runs[:2], runs[2])  # two from scratch, one grown
    assert code == 0 and "Left out: family 'stack'" in out and "has no interval" in out

    lone = stacked_run(tmp_path / "base").write()
    lines = (lone / "metrics.jsonl").read_text().splitlines(keepends=True)
    (lone / "metrics.jsonl").write_text("".join(line for line in lines if '"stage": 1' in line))
    code, _, err = fit(capsys, lone)
    assert code == 2 and "no run here has a train loss to fit" in err


@pytest.mark.parametrize("option", [["--at", "soon"], ["--at", "-1"], ["--at", "inf"], ["--resamples", "0"]])
def test_settings_that_make_no_sense_are_bad_usage(runs, capsys, option):
    try:
        code = main(["fit", str(runs[0]), *option])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert capsys.readouterr().err


def test_a_run_that_diverged_is_bad_data(runs, capsys, tmp_path):
    diverged = SyntheticRun(tmp_path / "nan", [Stage("x", LARGE, 20, lambda tokens: tokens * np.nan)]).write()
    code, _, err = fit(capsys, runs[0], diverged)
    assert code == 3 and "the loss of step 2 is nan" in err and err.count("\n") == 1


def test_an_offset_without_scipy_names_the_extra(runs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    code, _, err = fit(capsys, runs[0], "--offset")
    assert code == 2 and "scipy" in err and "`report` extra" in err
