"""Laws through points: known constants come back inside their intervals, and `grow fit` says what it did."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grow.__main__ import main
from grow.fit import fit_logarithm, fit_parabola, fit_power_law, predict_speedup
from grow.fit_command import BOOTSTRAP_HELD, _lines
from grow.report import text
from lit_gpt.flops import flops_per_token
from tests.synthetic_runs import LARGE, Stage, SyntheticRun, power_law_loss, sized, stacked_run

BUDGETS = np.geomspace(1e18, 1e22, 16)


def noisy(a: float, b: float, c: float, *, seed: int, budgets: np.ndarray = BUDGETS) -> np.ndarray:
    """L = c + a C^b times log-normal noise of 0.3 per cent."""
    return (c + a * budgets**b) * np.exp(0.003 * np.random.default_rng(seed).standard_normal(len(budgets)))


def test_a_power_law_without_noise_comes_back_to_the_last_digits():
    law = fit_power_law(BUDGETS, 40 * BUDGETS**-0.06)

    assert (law.a, law.b, law.c) == (pytest.approx(40), pytest.approx(-0.06), 0)
    assert law.interval("b") == pytest.approx((-0.06, -0.06)) and law.interval("c") == (0, 0)
    assert law.rms_log_residual < 1e-12
    assert law.predict(1e24) == pytest.approx(40 * 1e24**-0.06)


def test_an_offset_without_noise_comes_back_too():
    law = fit_power_law(BUDGETS, 1.7 + 900 * BUDGETS**-0.16, with_offset=True, n_draws=10)

    assert (law.a, law.b, law.c) == (pytest.approx(900, rel=1e-3), pytest.approx(-0.16, rel=1e-4), pytest.approx(1.7))


def coverage(a: float, b: float, c: float, *, n: int, noises: int, n_draws: int) -> dict[str, float]:
    """The share of noises for which the 95 per cent intervals hold each constant and the loss at a tenfold budget."""
    budgets = np.geomspace(BUDGETS[0], BUDGETS[-1], n)
    hits = dict.fromkeys(("a", "b", "prediction", *(("c",) if c else ())), 0)
    for seed in range(noises):
        loss = noisy(a, b, c, seed=seed, budgets=budgets)
        law = fit_power_law(budgets, loss, with_offset=c > 0, n_draws=n_draws, seed=seed)
        intervals = {name: law.interval(name) for name in hits if name != "prediction"}
        intervals["prediction"] = law.predicted_interval(10 * BUDGETS[-1])
        truth = {"a": a, "b": b, "c": c, "prediction": c + a * (10 * BUDGETS[-1]) ** b}
        for name, (low, high) in intervals.items():
            hits[name] += low <= truth[name] <= high
    return {name: held / noises for name, held in hits.items()}


@pytest.mark.parametrize("n", [3, 6, 16])
def test_intervals_of_95_per_cent_hold_a_law_without_offset_for_about_as_many_noises(n):
    """Of 300 noises 285; three standard errors of that are 4 per cent."""
    found = coverage(40, -0.06, 0.0, n=n, noises=300, n_draws=5000)
    assert all(0.91 <= share <= 0.99 for share in found.values()), found


@pytest.mark.parametrize(
    ("n", "noises", "n_draws"),
    [(16, 20, 40), *(pytest.param(n, 150, 200, marks=pytest.mark.slow) for n in (6, 16))],
)
def test_the_intervals_of_a_bootstrap_hold_a_law_with_offset_for_most_noises(n, noises, n_draws):
    found = coverage(900, -0.16, 1.7, n=n, noises=noises, n_draws=n_draws)
    assert min(found.values()) >= 0.75, found


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


def test_a_law_that_never_comes_down_to_a_loss_has_no_speedup():
    grown = fit_power_law(BUDGETS, 2.5 + 900 * BUDGETS**-0.16, with_offset=True, n_draws=5)
    baseline = fit_power_law(BUDGETS, 900 * BUDGETS**-0.16, n_draws=5)

    found = predict_speedup(grown, baseline, 1e22)

    assert (found.speedup, found.interval, found.never) == (None, None, 1)


def test_draws_that_never_come_down_to_a_loss_are_counted_and_no_ends_of_the_interval():
    """At six noisy points the grown law's offset may or may not lie below the loss of the baseline."""
    grown = fit_power_law(BUDGETS[:6], 2.5 + 900 * BUDGETS[:6] ** -0.16, with_offset=True, n_draws=5)
    grown = dataclasses.replace(grown, draws=np.array([[np.log(900), -0.16, c] for c in (2.4, 2.3, 9.0, 9.0)]))
    baseline = fit_power_law(BUDGETS, 40 * BUDGETS**-0.06, n_draws=4)

    found = predict_speedup(grown, baseline, 1e19)

    assert found.never == 0.5
    assert -1 < found.interval[0] < found.interval[1]


def test_an_interval_so_wide_that_it_says_nothing_is_still_a_line_of_text():
    assert text.percent(1e300) == "+1.00×10³⁰²\u202f%" and text.loss(1e300) == "1.00×10³⁰⁰"


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


def test_the_command_says_what_its_points_are_and_how_it_made_its_intervals(runs, capsys):
    code, out, _ = fit(capsys, *runs)

    assert code == 0
    assert "The final training loss of each run, averaged over the last tenth" in out
    assert "stack over scratch: +" in out and "10 times the largest budget" in out
    assert "intervals: 95 %, Student's t." in out and "too narrow" not in out


def test_with_an_offset_the_command_says_how_far_to_trust_its_intervals(runs, capsys):
    code, out, _ = fit(capsys, *runs, "--offset", "--resamples", "20")

    assert code == 0
    assert f"bootstrap over points, {BOOTSTRAP_HELD}" in out
    assert "scratch: 4 points for 3 constants; intervals from so few are too narrow" in out
    assert "stack: as many points as constants" in out


@pytest.mark.parametrize(
    ("speedup", "interval", "never", "said"),
    [
        (
            0.5,
            (0.4, 0.6),
            0.0,
            "+50\u202f% [+40\u202f%, +60\u202f%] at the loss from scratch at 1.00×10²¹ FLOPs",
        ),
        (0.5, (0.4, 0.6), 0.25, "FLOPs (2.500); 25\u202f% of the draws never reach it"),
        (
            None,
            (0.1, 0.2),
            0.75,
            "never reaches the loss from scratch at 1.00×10²¹ FLOPs (2.500); 75\u202f% of",
        ),
    ],
)
def test_a_speedup_is_said_with_the_share_of_draws_that_have_none(speedup, interval, never, said):
    each = {"family": "stack", "flops_scratch": 1e21, "loss": 2.5}
    each |= {"speedup": speedup, "interval": interval, "never": never}
    found = {"form": "a C^b", "points": "final", "loss": "train", "unit": "nats per token", "families": [], "notes": []}

    line = list(_lines({**found, "speedups": [each]}))[-1]

    assert line.startswith("stack over scratch: ") and said in line
    assert "100" not in line and ("never" in line) == (never > 0)


@pytest.mark.parametrize("loss", ["train", "validation"])
def test_every_point_of_one_run_makes_a_law_with_a_warning(runs, capsys, loss):
    code, out, _ = fit(capsys, runs[0], "--points", "every", "--loss", loss, "--json", "--resamples", "20")

    found = json.loads(out)
    assert code == 0 and len(found["families"][0]["losses"]) > 3
    assert any("not independent" in note for note in found["notes"])


def test_too_few_runs_are_bad_usage_and_one_family_of_them_is_left_out(runs, capsys, tmp_path):
    code, out, err = fit(capsys, runs[0])
    assert (code, out) == (2, "") and "'scratch' (scratch4): 1 different budget" in err
    assert "--points every takes all losses" in err

    code, out, _ = fit(capsys, *runs[:2], runs[2])  # two from scratch, one grown
    assert code == 0 and "Left out: family 'stack'" in out and "has no interval" in out

    lone = stacked_run(tmp_path / "base").write()
    lines = (lone / "metrics.jsonl").read_text().splitlines(keepends=True)
    (lone / "metrics.jsonl").write_text("".join(line for line in lines if '"stage": 1' in line))
    code, _, err = fit(capsys, lone)
    assert code == 2 and "no run here has a train loss to fit" in err


def test_points_of_other_peoples_models_are_named_as_left_out(runs, capsys, tmp_path):
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text(json.dumps({"model": "other", "tokens": 1e9, "flops_total": 6e18, "loss": 3.1}) + "\n")
    said = f"Left out, because files of other people's models are for grow report alone: {theirs}."

    code, _, err = fit(capsys, theirs)
    assert code == 2 and "no run here has a train loss to fit" in err and said in err
    code, out, _ = fit(capsys, *runs[:2], theirs)
    assert code == 0 and said in out


def from_checkpoint(path: Path, n_layer: int, steps: int, **beginning: object) -> tuple[Path, Path]:
    """The base and the arm of a comparison: another run that begins with the base's checkpoint and grows from it."""
    both = grown_power_law(path / "both", n_layer, steps)
    base, arm = path / "base", path / "stack"
    for folder, stage in ((base, 1), (arm, 2)):
        shutil.copytree(both / "checkpoints" / f"stage-{stage:02d}", folder / "checkpoints" / f"stage-{stage:02d}")
        for name in ("metrics.jsonl", "evals.jsonl"):
            lines = [json.loads(line) for line in (both / name).read_text().splitlines()]
            lines = [line | {"stage_name": folder.name} for line in lines if line["stage"] == stage]
            for line in lines if stage == 2 else []:
                line |= {"step": line["step"] - 50, "tokens": line["tokens"] - 50 * 2048}
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    origin = {"init_from": "out/base/checkpoints/stage-01/step-0000000050", "out_dir": "out/stack"}
    stages = [{"name": "base", "max_steps": 0}, {"name": "stack", "operator": "stack"}]
    (base / "config.yaml").write_text(json.dumps({"out_dir": "out/base", "stages": stages[:1]}))
    (arm / "config.yaml").write_text(json.dumps({**origin, "stages": stages}))
    (state,) = arm.glob("checkpoints/*/*/state.json")
    known = {"parent_tokens": 50 * 2048, "run_config": origin}
    state.write_text(json.dumps(json.loads(state.read_text()) | known | beginning))
    return base, arm


def test_what_grew_from_a_checkpoint_of_known_cost_is_a_point_and_its_base_is_none(runs, capsys, tmp_path):
    scratch = [run for run in runs if run.name.startswith("scratch")]
    arms = [from_checkpoint(tmp_path / str(n), n, steps) for n, steps in ((8, 300), (16, 400), (24, 600))]
    _, out, _ = fit(capsys, *runs, "--json")
    together = {family["name"]: family for family in json.loads(out)["families"]}

    code, out, err = fit(capsys, *scratch, *(run for pair in arms for run in pair), "--json")

    assert code == 0, err
    apart = {family["name"]: family for family in json.loads(out)["families"]}
    assert apart["stack"]["flops"] == together["stack"]["flops"]
    assert apart["stack"]["losses"] == pytest.approx(together["stack"]["losses"])
    assert apart["scratch"] == together["scratch"]
    assert "Left out, because a base's training is cut short: 8/base, 16/base, 24/base." in json.loads(out)["notes"]


def test_what_began_with_a_checkpoint_is_left_out_where_its_cost_is_unknown_and_is_a_family_without_growth(
    runs, capsys, tmp_path
):
    scratch = [run for run in runs if run.name.startswith("scratch")]
    _, foreign = from_checkpoint(tmp_path / "foreign", 8, 300, parent_tokens=0)
    continued = [
        SyntheticRun(
            tmp_path / f"more{n}", [Stage(f"more{n}", sized(n), 60, power_law_loss(sized(n)))], **begun
        ).write()
        for n, begun in ((4, {"parent_tokens": 9}), (8, {"parent_tokens": 9}), (16, {"init_from": "out/published"}))
    ]

    code, out, _ = fit(capsys, *scratch, foreign, *continued, "--json")

    found = json.loads(out)
    assert code == 0
    assert {family["name"]: family["runs"] for family in found["families"]} == {
        "scratch": [run.name for run in scratch],
        "continued": ["more4", "more8"],
    }
    unknown = "nobody wrote down the FLOPs behind the checkpoint that the run began with"
    assert f"Left out, because {unknown}: stack, more16." in found["notes"]


def test_half_a_last_line_and_other_tokenizers_are_said_and_damage_is_bad_data(runs, capsys, tmp_path):
    def copied(name: str) -> Path:
        return shutil.copytree(runs[0], tmp_path / name)

    torn, other, empty = copied("torn"), copied("other"), copied("empty")
    with (torn / "metrics.jsonl").open("a") as log:
        log.write('{"step": 201, "lo')
    code, out, _ = fit(capsys, torn, runs[1])
    assert code == 0 and "torn/metrics.jsonl: the last line is incomplete and was left out." in out

    (state,) = other.glob("checkpoints/*/*/state.json")
    state.write_text(state.read_text().replace("c0ffee", "decafe"))
    code, out, _ = fit(capsys, other, runs[1], "--json")
    found = json.loads(out)
    assert code == 0 and found["unit"] == "bits per byte" and "2 different tokenizers" in " ".join(found["notes"])
    assert max(found["families"][0]["losses"]) < 3  # a byte has fewer bits than a token nats, here

    (empty / "metrics.jsonl").unlink()
    code, _, err = fit(capsys, empty, runs[1])
    assert code == 3 and "has no metrics.jsonl" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "option", [["--at", "soon"], ["--at", "-1"], ["--at", "inf"], ["--resamples", "0"], ["--seed", "-1"]]
)
def test_settings_that_make_no_sense_are_bad_usage(runs, capsys, option):
    try:
        code = main(["fit", str(runs[0]), *option])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert option[0] in capsys.readouterr().err.splitlines()[-1]


def test_a_run_that_diverged_is_bad_data(runs, capsys, tmp_path):
    diverged = SyntheticRun(tmp_path / "nan", [Stage("x", LARGE, 20, lambda tokens: tokens * np.nan)]).write()
    code, _, err = fit(capsys, runs[0], diverged)
    assert code == 3 and "the loss of step 2 is nan" in err and err.count("\n") == 1


def test_an_offset_without_scipy_names_the_extra(runs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    code, _, err = fit(capsys, runs[0], "--offset")
    assert code == 2 and "scipy" in err and "`report` extra" in err
