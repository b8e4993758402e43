"""The figures and tables of the paper in `grow report`: each drawn when the runs can feed it, else said in one line."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grow.paper import printed_models
from grow.planning.guideline import FITTED_FLOPS, fitted_growth_factor, growth_timing, short
from grow.report import text
from grow.report.axes import colour_and_dash, log_ticks, nice_ticks
from grow.report.guideline_charts import Grown, guideline_charts
from grow.report.isoflop import _alike
from grow.report.law_charts import _fit_words
from grow.report.page import render
from grow.report.paper import models_like, speedups_like
from grow.scores import AVERAGE, AVERAGED, LABELS, METRICS
from lit_gpt.config import Config
from lit_gpt.flops import count_parameters, flops_per_token
from tests.browser import look_at, needs_chromium
from tests.reports import by_name, facts_on, report_on
from tests.synthetic_runs import (
    LARGE,
    TOKENS_PER_STEP,
    Stage,
    SyntheticRun,
    power_law_loss,
    scratch_run,
    sized,
    stacked_run,
    swept_run,
    useless_growth_loss,
)

NOT_FITTED = "N = 7 B (not fitted)"
RULES = "Growth timing and factor by the paper's rules"
NINE = (*AVERAGED, "wikitext")


def from_scratch(path: Path, *, n_layer: int = 8, steps: int = 450, **changes: Any) -> Path:
    config = sized(n_layer)
    return SyntheticRun(path, [Stage("scratch", config, steps, power_law_loss(config))], noise=0.0, **changes).write()


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A report with every figure: three timings, three factors, three operators, two sizes, scores, another's model."""
    root = tmp_path_factory.mktemp("everything")
    runs = [from_scratch(root / "scratch", tasks=NINE), from_scratch(root / "larger", n_layer=16, steps=500)]
    runs += [swept_run(root / f"d{steps}", steps, tasks=NINE) for steps in (30, 120, 480)]
    runs += [swept_run(root / f"n{n_layer}", 120, n_layer_src=n_layer, tasks=NINE) for n_layer in (1, 4)]
    runs.append(swept_run(root / "inter", 120, operator="interpolate", tasks=NINE, limit=50))
    theirs = root / "theirs.jsonl"
    common = {"model": "theirs", "parameters": 3e6, "results": {"sciq": {"acc_norm": 0.4}}}
    points = [{**common, "tokens": at, "loss": 6 - at / 1e6} for at in (1e5, 5e5, 1e6)]
    theirs.write_text("".join(json.dumps(point) + "\n" for point in points))
    return report_on(*runs, theirs, out=root / "out"), root / "out"


def chart_of(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(chart for chart in report["charts"] if chart["id"] == name)


def table_of(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(table for table in report["tables"] if table["id"] == name)


def row_of(table: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    row = next(row for row in table["rows"] if row["name"] == name)
    return dict(zip(table["columns"], row["cells"], strict=True))


def test_every_kind_of_figure_is_there_and_nothing_is_missing(everything):
    report, out = everything

    names = {chart["id"] for chart in report["charts"]}
    assert names >= {"train-flops", "train-tokens", "score-average", "score-sciq", "score-wikitext", "loss-difference"}
    assert names >= {"scaling-law", "isoflop-timing", "isoflop-factor"}
    assert {table["id"] for table in report["tables"]} == {"runs", "scores", "operators", "speedups"}
    assert [each["figure"] for each in report["missing"]] == [RULES], "the runs are too small for eq. 2"
    for name in names:
        assert all((out / "figures" / f"{name}.{suffix}").stat().st_size for suffix in ("png", "svg"))


def test_what_the_runs_cannot_feed_is_said_in_one_line_each(tmp_path):
    report = facts_on(scratch_run(tmp_path / "scratch").write())

    missing = {each["figure"]: each["needs"] for each in report["missing"]}
    assert list(missing) == [
        "Average accuracy",
        "Accuracy of single tasks",
        "Wikitext perplexity",
        "Loss difference with a logarithmic fit",
        "Scaling law L = a C^b with predictions",
        "IsoFLOP against growth timing",
        "IsoFLOP against growth factor",
        RULES,
        "Table of scores",
        "Operators against metrics",
    ]
    assert "three or more growth timings" in missing["IsoFLOP against growth timing"]
    page = render(report).replace("&#39;", "'")
    assert all("\n" not in needs and f"It needs {needs}." in page for needs in missing.values())


def test_an_average_that_lacks_a_task_says_which(tmp_path):
    report = facts_on(scratch_run(tmp_path / "scratch", tasks=NINE[1:]).write())

    needs = next(each["needs"] for each in report["missing"] if each["figure"] == "Average accuracy")
    assert "there are none of Lambada" in needs
    assert {chart["id"] for chart in report["charts"]} >= {"score-piqa", "score-wikitext"}


def test_the_speedup_is_given_along_the_way_too(tmp_path):
    report = facts_on(stacked_run(tmp_path / "a", noise=0.0).write(), scratch_run(tmp_path / "b", noise=0.0).write())

    along = report["speedup_train"]["along"]
    shares = [each["flops_scratch"] / report["speedup_train"]["flops_scratch"] for each in along]
    assert shares == [pytest.approx(0.6, abs=1e-3), pytest.approx(0.8, abs=1e-3)]
    # the grown curve is that from scratch 380,000 tokens later: a head start that is worth more early
    assert along[0]["speedup"] > along[1]["speedup"] > report["speedup_at_equal_loss"] > 0
    zoom, main = chart_of(report, "train-flops-zoom"), chart_of(report, "train-flops")
    assert [arrow["label"] for arrow in main["arrows"]] == [text.percent(report["speedup_at_equal_loss"])]
    assert len(zoom["arrows"]) >= 2 and main["inset"]["arrows"] == zoom["arrows"]
    rows = table_of(report, "speedups")["rows"]
    assert [row["cells"][3]["value"] for row in rows] == [
        *(each["speedup"] for each in along),
        report["speedup_at_equal_loss"],
    ]


def test_tokens_of_the_target_model_stand_above_the_flops(tmp_path):
    report = facts_on(stacked_run(tmp_path / "a").write(), scratch_run(tmp_path / "b").write())

    tick = chart_of(report, "train-flops")["top"]["ticks"][1]
    assert tick["label"] == "200\u202fk" and tick["at"] == pytest.approx(2e5 * flops_per_token(LARGE).paper, rel=1e-3)


def test_models_of_two_sizes_share_no_axis_of_tokens_and_meet_the_baseline_of_their_size(everything):
    report = everything[0]

    assert chart_of(report, "train-flops")["top"] is None
    names = [row["name"] for row in table_of(report, "speedups")["rows"]]
    assert all(name.endswith("over scratch") for name in names)


def test_the_loss_difference_is_that_of_the_curves_and_its_fit_runs_on(tmp_path):
    """From scratch 60 C^-0.09, grown 0.2 lower at every budget but for the smoothing."""
    report = facts_on(swept_run(tmp_path / "grown", 120), from_scratch(tmp_path / "scratch"))

    chart = chart_of(report, "loss-difference")
    line, fit = (series["points"] for series in chart["series"])
    assert [y for _, y in line[len(line) // 2 :]] == pytest.approx([0.2] * (len(line) - len(line) // 2), abs=0.02)
    assert fit[-1][0] == pytest.approx(4 * line[-1][0], rel=1e-4)
    assert fit[0][1] == pytest.approx(np.interp(fit[0][0], *np.transpose(line)), abs=0.005)


def test_what_is_said_of_a_difference_is_said_of_every_growth_and_of_one_that_is_behind(tmp_path):
    runs = [
        stacked_run(tmp_path / "good", noise=0.0).write(),
        stacked_run(tmp_path / "bad", loss=useless_growth_loss, noise=0.0).write(),
        scratch_run(tmp_path / "scratch", noise=0.0).write(),
    ]

    caption = chart_of(facts_on(*runs), "loss-difference")["caption"]

    assert "good/grown: by the fit the difference would be gone" in caption
    assert "bad/grown: the grown model is behind at all of the shared FLOPs" in caption


@pytest.mark.parametrize(
    ("gap", "intercept", "slope", "words"),
    [
        ([0.3, 0.2], 0.2, -0.05, "by the fit the difference would be gone at 54"),
        ([0.3, 0.2], 9.0, -0.05, "gone beyond a thousand times"),
        ([0.3, 0.2], 0.2, 0.05, "the fit does not fall"),
        ([0.3, -0.1], 0.1, -0.05, "the difference is gone within the shared FLOPs"),
        ([-0.1, -0.3], 0.0, -0.1, "behind at all of the shared FLOPs, and the fit does not rise"),
        ([-0.3, -0.1], -0.4, 0.1, "behind at all of the shared FLOPs; by the fit it would catch up at 54"),
    ],
)
def test_the_words_for_a_difference_fit_its_sign_and_its_slope(gap, intercept, slope, words):
    said = _fit_words(np.array(gap), intercept, slope, np.exp(3))
    assert words.replace("54", text.flops(np.exp(4))) in said


def test_isoflop_parabolas_find_the_best_timing_and_leave_zero_out(everything):
    """The loss is lowest for 120 steps of the base, whatever the budget; from scratch is far above and not fitted."""
    report = everything[0]

    chart = chart_of(report, "isoflop-timing")
    found = [each["optimum"] for each in report["optima"] if each["what"] == "d"]
    assert len(found) == 5
    assert all(optimum == pytest.approx(120 * TOKENS_PER_STEP, rel=0.12) for optimum in found), found
    marks = next(series for series in chart["series"] if series["kind"] == "marks")
    timings = [steps * TOKENS_PER_STEP for steps in (30, 120, 480)]
    assert [x for x, _ in marks["points"]] == [chart["x"]["zero"], *timings]
    assert marks["points"][0][1] > max(y for _, y in marks["points"][1:]) + 0.1
    assert chart["x"]["ticks"][0] == {"at": chart["x"]["zero"], "label": "0"}
    fit = next(series for series in chart["series"] if series["kind"] == "fit")
    assert fit["points"][0][0] == marks["points"][1][0]


def test_an_isoflop_figure_shows_runs_that_repeat_a_timing_and_none_on_other_data(tmp_path):
    runs = [swept_run(tmp_path / f"d{steps}", steps) for steps in (30, 120, 480)]
    runs += [swept_run(tmp_path / "again", 120, seed=1), swept_run(tmp_path / "else", 60, fingerprint="0" * 64)]
    runs.append(from_scratch(tmp_path / "scratch", fingerprint="0" * 64))

    (chart,) = [chart for chart in facts_on(*runs)["charts"] if chart["id"].startswith("isoflop")]

    marks = next(series for series in chart["series"] if series["kind"] == "marks")
    assert [x for x, _ in marks["points"]] == [steps * TOKENS_PER_STEP for steps in (30, 120, 120, 480)]


def test_two_timings_and_one_that_is_nearly_the_same_make_no_parabola(tmp_path):
    report = facts_on(*(swept_run(tmp_path / f"d{steps}", steps) for steps in (118, 120, 480)))

    assert not any(chart["id"].startswith("isoflop") for chart in report["charts"])


@pytest.mark.parametrize("first", [4.0e9, 4.05e9, 4.1e9, 4.15e9])
def test_numbers_that_differ_by_little_are_of_one_group_wherever_they_lie(first):
    near, far = [first, 1.0005 * first, 1.019 * first], [1.021 * first, 1.03 * first]

    assert _alike([(value,) for value in (*far, *near)], 0) == [[(value,) for value in near], [(v,) for v in far]]


def test_isoflop_parabolas_find_the_best_factor(everything):
    found = [each["optimum"] for each in everything[0]["optima"] if each["what"] == "g"]

    # from scratch is g = 1 and 0.2 above what the grown ones say of g = 1, so the parabola is not theirs alone
    assert len(found) == 5 and all(3 < optimum < 5 for optimum in found), found
    chart = chart_of(everything[0], "isoflop-factor")
    assert [x for x, _ in chart["series"][0]["points"]] == [1, 2, 4, 8]


def test_the_papers_rules_are_drawn_with_what_grew_where_they_mean_something(tmp_path):
    """Ten billion tokens at a quarter of the layers, then 90 billion at 1.2 billion parameters."""
    small, large = (Config.from_name(name) for name in ("6L2048H", "24L2048H"))
    stages = [
        Stage("base", small, 100, power_law_loss(small)),
        Stage("grown", large, 900, power_law_loss(large), operator="stack"),
    ]
    run = SyntheticRun(tmp_path / "paper", stages, noise=0.0, tokens_per_step=10**8).write()

    report = facts_on(run, swept_run(tmp_path / "toy", 120))

    flops, parameters = by_name(report)["paper/grown"]["flops_total"], count_parameters(large)
    for name, value, rule in (
        ("guideline-timing", 10.0, growth_timing(parameters, flops) / 1e9),
        ("guideline-factor", 4.0, fitted_growth_factor(parameters, flops)),
    ):
        chart = chart_of(report, name)
        (dot,) = [series for series in chart["series"] if series["kind"] == "marks"]
        assert (dot["name"], dot["points"]) == ("paper/grown", [[pytest.approx(flops, rel=1e-5), value]])
        curve = next(each["points"] for each in chart["series"] if each["name"] == f"N = {short(parameters)}")
        assert np.interp(flops, *np.transpose(curve)) == pytest.approx(rule, rel=1e-3)
    assert RULES not in {each["figure"] for each in report["missing"]}


def test_rules_are_solid_where_they_were_fitted_and_dashed_elsewhere():
    timing, factor = guideline_charts([Grown("7B", 7e9, 1.26e22, 20e9, 4.0)])

    kinds = {name: [s["kind"] for s in timing["series"] if s["name"] == name] for name in ("N = 3 B", NOT_FITTED)}
    assert kinds == {"N = 3 B": ["fit", "line"], NOT_FITTED: ["fit"]}
    solid = next(series["points"] for series in timing["series"] if series["kind"] == "line")
    assert FITTED_FLOPS[0] <= solid[0][0] < solid[-1][0] <= FITTED_FLOPS[1]
    recommended = next(series for series in factor["series"] if series["name"] == "recommended: 4")
    assert {y for _, y in recommended["points"]} == {4}
    looks = {
        series["name"]: colour_and_dash(series["style"]) for series in timing["series"] if series["kind"] == "line"
    }
    assert len(set(looks.values())) == 4 and {dash for _, dash in looks.values()} == {0}


def test_wikitext_perplexity_has_an_inset_of_the_end_where_two_lines_have_a_course(everything):
    chart = chart_of(everything[0], "score-wikitext")

    inset = chart["inset"]
    longest = max(series["points"][-1][0] for series in chart["series"])
    assert inset["x"]["min"] == pytest.approx(0.6 * longest, rel=1e-5) and len(inset["series"]) >= 2
    ends = [y for series in inset["series"] for _, y in series["points"]]
    assert inset["y"]["min"] < min(ends) and max(ends) < inset["y"]["max"] < chart["y"]["max"]
    assert chart_of(everything[0], "score-sciq")["inset"] is None


def test_the_scaling_law_has_a_line_for_each_family_and_stars_ahead(everything):
    chart = chart_of(everything[0], "scaling-law")

    kinds = [(series["name"], series["kind"]) for series in chart["series"] if series["kind"] != "logged"]
    assert kinds == [(name, kind) for name in ("scratch", "stack") for kind in ("marks", "fit", "stars")]
    assert chart["log"] == ["x", "y"] and "b = −0.0" in chart["caption"]
    star = next(series for series in chart["series"] if series["kind"] == "stars")["points"][0]
    assert star[0] == pytest.approx(10 * max(row["flops_total"] for row in everything[0]["runs"]), rel=1e-4)
    marks = next(series for series in chart["series"] if series["kind"] == "marks")["points"]
    scratch = [by_name(everything[0])[name] for name in ("scratch", "larger/scratch")]
    assert marks == [
        [pytest.approx(run["flops_total"], rel=1e-4), pytest.approx(run["final_train_loss"], rel=1e-4)]
        for run in scratch
    ], "one report has one final training loss of a run"


def test_scores_have_standard_errors_and_limited_ones_a_mark(everything):
    report = everything[0]

    table = table_of(report, "scores")
    cell = row_of(table, "d120/grown")["SciQ"]
    assert cell["text"] == f"{cell['value']:.2f} ± {cell['stderr']:.2f}" and cell["limit"] is None
    limited = row_of(table, "inter/grown")["Average"]
    assert limited["text"].endswith("*") and limited["limit"] == 50
    assert "* Limited" in table["caption"]
    assert "inter/grown" in chart_of(report, "score-piqa")["caption"]
    line = next(series for series in chart_of(report, "score-piqa")["series"] if series["name"] == "scratch")
    low, high = line["intervals"][-1]
    assert (low + high) / 2 == pytest.approx(line["points"][-1][1]) and high - low == pytest.approx(2 * 1.58, abs=0.01)


def test_operators_are_shaded_from_the_worst_to_the_best_of_every_column_at_equal_flops(everything):
    table = table_of(everything[0], "operators")

    flops = {row["name"]: row["cells"][table["columns"].index("FLOPs")]["value"] for row in table["rows"]}
    shaded = {
        row["name"]: row["cells"][table["columns"].index("Loss")]
        for row in table["rows"]
        if row["cells"][table["columns"].index("Loss")]["shade"] is not None
    }
    assert set(shaded) == {"d120/grown: stack", "inter/grown: interpolate", "n1/grown: stack"}
    assert max(flops[name] for name in shaded) <= 1.05 * min(flops[name] for name in shaded)
    assert max(flops.values()) > 1.2 * max(flops[name] for name in shaded)
    losses = list(shaded.values())
    best, worst = (extreme(losses, key=lambda cell: cell["value"]) for extreme in (min, max))
    assert (best["shade"], worst["shade"]) == (1, 0)
    scores = [row["cells"][table["columns"].index("SciQ")] for row in table["rows"] if row["name"] in shaded]
    assert max((cell for cell in scores if cell["value"]), key=lambda cell: cell["value"])["shade"] == 1
    assert {"inter/grown: interpolate", "d120/grown: stack", "scratch"} < {row["name"] for row in table["rows"]}


def test_operators_on_other_data_are_marked_and_not_shaded(tmp_path):
    runs = [swept_run(tmp_path / name, 120, operator=name) for name in ("stack", "interpolate")]
    runs.append(swept_run(tmp_path / "other", 120, fingerprint="0" * 64))

    table = table_of(facts_on(*runs), "operators")

    shades = {row["name"]: row["cells"][table["columns"].index("Loss")]["shade"] for row in table["rows"]}
    assert list(shades) == ["stack/grown: stack", "interpolate/grown: interpolate", "other/grown: stack (other data)"]
    assert shades.pop("other/grown: stack (other data)") is None


def test_tables_are_written_as_csv_with_full_numbers_and_as_markdown(everything):
    report, out = everything

    with (out / "tables" / "scores.csv").open() as file:
        rows = {row["Model"]: row for row in csv.DictReader(file)}
    cell = row_of(table_of(report, "scores"), "d120/grown")["SciQ"]
    assert float(rows["d120/grown"]["SciQ"]) == cell["value"]
    assert float(rows["d120/grown"]["SciQ stderr"]) == cell["stderr"]
    assert rows["inter/grown"]["SciQ limit"] == "50" and rows["d120/grown"]["SciQ limit"] == ""
    lines = (out / "tables" / "operators.md").read_text().splitlines()
    assert lines[0].startswith("| Model | Parameters | FLOPs | Lambada") and set(lines[1]) <= set("| -:")
    assert len(lines) == len(table_of(report, "operators")["rows"]) + 4


def test_points_of_others_are_drawn_beside_the_runs_without_a_speedup(everything):
    report = everything[0]

    (theirs,) = [series for series in chart_of(report, "train-flops")["series"] if series["name"] == "theirs"]
    assert theirs["points"] == [[1.8e12, 5.9], [9e12, 5.5], [1.8e13, 5.0]]
    assert chart_of(report, "train-flops")["caption"].endswith(" As their files say: theirs.")
    (scores,) = [series for series in chart_of(report, "score-sciq")["series"] if series["name"] == "theirs"]
    assert [y for _, y in scores["points"]] == [40, 40, 40]
    assert "theirs" not in by_name(report) and report["external"][0]["points"] == 3


def test_models_of_one_name_are_told_apart_by_their_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"model": "scratch", "tokens": 1e6, "loss": 3.0}))

    report = facts_on(from_scratch(tmp_path / "scratch"), tmp_path / "a.jsonl", tmp_path / "b.jsonl")

    names = [model["name"] for model in report["external"]]
    assert names == [f"scratch ({tmp_path / name})" for name in ("a.jsonl", "b.jsonl")]
    lines = chart_of(report, "train-tokens")["series"]
    looks = {series["name"]: colour_and_dash(series["style"]) for series in lines}
    assert [looks[name] for name in names] == [(7, 3), (5, 1)]  # neither solid nor blue, as what grew is
    assert len({series["style"] for series in lines}) == 3 and {"scratch", *names} == {s["name"] for s in lines}


def test_a_second_validation_set_is_not_drawn_and_a_note_says_so(tmp_path):
    run = from_scratch(tmp_path / "scratch")
    lines = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    (first,) = {line["set"] for line in lines}
    lines += [line | {"set": "code"} for line in lines]
    (run / "evals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    notes = facts_on(run)["notes"]

    assert f"Validation losses are those on {first}; those on code are not shown." in notes


def test_a_run_that_was_only_validated_at_its_start_has_no_validation_chart(tmp_path):
    run = from_scratch(tmp_path / "scratch", steps=30, validation_every=1000)
    lines = [line for line in (run / "evals.jsonl").read_text().splitlines(keepends=True) if '"start"' in line]
    (run / "evals.jsonl").write_text("".join(lines))

    report = facts_on(run)

    assert {chart["id"] for chart in report["charts"]} == {"train-flops", "train-tokens", "train-seconds"}


def test_a_run_that_grew_twice_is_one_point_of_a_law_and_none_of_a_sweep(tmp_path):
    for steps in (60, 90, 120):
        stages = [
            Stage("one", sized(2), 40, power_law_loss(sized(2))),
            Stage("two", sized(4), steps, power_law_loss(sized(4)), operator="stack"),
            Stage("three", LARGE, 200, power_law_loss(LARGE), operator="stack"),
        ]
        SyntheticRun(tmp_path / f"run{steps}", stages, noise=0.0).write()

    report = facts_on(*sorted(tmp_path.iterdir()), from_scratch(tmp_path / "scratch"))

    law = chart_of(report, "scaling-law")
    marks = next(series for series in law["series"] if series["kind"] == "marks")
    assert (marks["name"], len(marks["points"])) == ("stack", 3)
    assert not any(chart["id"].startswith("isoflop") for chart in report["charts"])


def test_a_score_of_nobody_knows_when_stands_in_the_table_alone(tmp_path):
    """A line of scripts/evaluate.py on a checkpoint that does not say how long it was trained."""
    line = {"step": None, "stage": None, "tokens": None, "flops_total": None, "when": "evaluate", "n": 1000}
    line |= {"task": "sciq", "metric": "acc_norm", "value": 0.5, "stderr": 0.02, "limit": None}
    (tmp_path / "theirs.jsonl").write_text(json.dumps(line))

    report = facts_on(from_scratch(tmp_path / "scratch", tasks=("sciq",)), tmp_path / "theirs.jsonl")

    assert row_of(table_of(report, "scores"), "theirs")["SciQ"]["text"] == "50.00 ± 2.00"
    chart = chart_of(report, "score-sciq")
    assert [series["name"] for series in chart["series"]] == ["scratch"] and chart["quantity"] == "flops"


def test_the_published_curves_of_pythia_are_drawn_as_they_are(data_dir, tmp_path):
    files = sorted(data_dir("reference_results/pythia_zero_shot").glob("*.jsonl"))

    report = report_on(*files, out=tmp_path / "out")

    chart = chart_of(report, "score-average")
    assert chart["quantity"] == "tokens"
    assert [series["name"] for series in chart["series"]] == [path.stem for path in files]
    assert all(len(series["points"]) == 27 for series in chart["series"])
    ends = {series["name"]: series["points"][-1][1] for series in chart["series"]}
    assert ends["pythia-70m-deduped"] < ends["pythia-410m-deduped"] < ends["pythia-6.9b-deduped"]
    assert "there is no run to compare" in report["reason"] and report["runs"] == []
    assert (tmp_path / "out" / "figures" / "score-average.png").is_file()


def test_the_papers_numbers_stand_beside_models_of_their_size():
    names = {(model["where"], model["name"]) for model in models_like([1.03e9], operators=False)}
    assert names == {("Table 3", name) for name in ("Pythia-1B", "TinyLlama", "G_stack", "scratch")}
    operators = models_like([1.1e9], operators=True)
    assert len(operators) == 9 and {model["where"] for model in operators} == {"Figure 3"}
    assert operators[0]["scores"][AVERAGE].value == pytest.approx(0.528, abs=1e-4) and operators[0]["speedup"] == 0.491
    assert [each.speedup for each in speedups_like([0.37e9])] == pytest.approx([0.531, 0.337, 0.31])
    assert models_like([3e6], operators=False) == [] == speedups_like([2e9])


COLUMNS = {  # as they are called in the transcription -> as evaluators call the task
    **{"lambada": "lambada_openai", "arc_c": "arc_challenge", "arc_e": "arc_easy"},
    **{"obqa": "openbookqa", "wikitext_word_ppl": "wikitext"},
}
ROWS = {
    "Table 2": ("table_2_sft_3B", {"scratch": "scratch_400B", "G_stack": "gstack_290B"}),
    "Table 3": (
        "table_3_1B_100B_tokens",
        {"Pythia-1B": "pythia_1b", "TinyLlama": "tinyllama_1.1b_103B"}
        | {"G_stack": "gstack_1.1b", "scratch": "baseline_1.1b"},
    ),
    "Table 6": (
        "table_6_7B_130B_tokens",
        {"Pythia-6.9B": "pythia_6.9b_130B", "OLMo-7B": "olmo_7b_133B"}
        | {"Amber-7B": "amber_7b_132B", "G_stack": "gstack_7b_130B"},
    ),
    "Table 7": ("table_7_samba_410M", {"Samba, scratch": "scratch_50B", "Samba, G_stack": "gstack_47B"}),
}


def as_transcribed(tables: dict[str, Any]) -> dict[tuple[str, str], dict[str, float]]:
    """Place and name of a model as in our file -> task -> what is printed, loss, speed-up and tokens among them."""
    figure = tables["figure_3"]
    found = {}
    for place, column in enumerate(figure["columns"]):
        operator, _, way = column.replace("learn", "learned").rpartition("_")
        name = f"{operator} ({way})" if operator else column
        found["Figure 3", name] = {row: values[place] for row, values in figure["rows"].items()} | {"tokens": 100e9}
    for where, (table, names) in ROWS.items():
        for name, row in names.items():
            printed = dict(zip(tables[table]["columns"], tables[table][row], strict=True))
            tokens = re.search(r"_(\d+)B(_tokens)?$", row) or re.search(r"_(\d+)B(_tokens)?$", table)
            found[where, name] = printed | {"tokens": float(tokens[1]) * 1e9}
    return {
        key: {COLUMNS.get(task, task): value for task, value in row.items() if task != "avg" and value is not None}
        for key, row in found.items()
    }


def test_the_papers_numbers_are_those_of_its_tables(data_dir):
    """Every number of our file stands in the transcribed tables in the same table, row and column, and none lacks."""
    tables = json.loads(data_dir("reference_results/paper_tables.json").read_text())
    ours = {}
    for model in printed_models():
        more = {"train_loss": model["loss"], "speedup_percent": model["speedup"], "tokens": model["tokens"]}
        given = {name: value for name, value in more.items() if value is not None}
        ours[model["where"], model["name"]] = model["scores"] | given
        assert set(model["scores"]) <= set(METRICS) and set(METRICS) | {AVERAGE} == set(LABELS)

    assert ours == as_transcribed(tables)


def test_a_report_at_the_papers_size_shows_its_rows_in_the_tables(tmp_path):
    """Runs are small here, so the sizes are made up: 1.1e9 parameters by their FLOPs alone, without a checkpoint."""
    runs = [
        swept_run(tmp_path / "grown", 120, tasks=NINE, checkpoints=False),
        from_scratch(tmp_path / "scratch", tasks=NINE, checkpoints=False),
    ]
    factor = 1.1e9 / (flops_per_token(LARGE).paper / 6)
    for path in [run / name for run in runs for name in ("metrics.jsonl", "evals.jsonl")]:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [{**line, "flops_total": line["flops_total"] * factor} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    report = facts_on(*runs)

    assert by_name(report)["scratch"]["parameters"] == pytest.approx(1.1e9, rel=1e-3)
    rows = table_of(report, "scores")["rows"]
    assert [row["name"] for row in rows if row["kind"] == "paper"] == [
        "paper, Table 3: Pythia-1B, 100\u202fB tokens",
        "paper, Table 3: TinyLlama, 103\u202fB tokens",
        "paper, Table 3: G_stack, 100\u202fB tokens",
        "paper, Table 3: scratch, 100\u202fB tokens",
    ]
    printed = row_of(table_of(report, "speedups"), "paper, Figure 3: 100\u202fB tokens")
    assert printed["Speed-up"]["text"] == "+49\u202f%" and printed["Loss"]["value"] is None


def test_the_papers_operators_stand_below_ours_and_are_shaded_by_themselves():
    from grow.report.tables import _printed_row, _table

    ours = {"name": "ours", "kind": "run", "parameters": 1.1e9, "scores": {}, "loss": 2.5, "speedup": 0.1}
    printed = [_printed_row(model) for model in models_like([1.1e9], operators=True)]

    table = _table("operators", "", "", [ours, {**ours, "name": "worse", "loss": 2.6}, *printed], shaded=True)

    assert [row_of(table, name)["Loss"]["shade"] for name in ("ours", "worse")] == [1, 0]
    stacked = row_of(table, "paper, Figure 3: G_direct (depth), 100\u202fB tokens")
    assert (stacked["Loss"]["text"], stacked["Loss"]["shade"], stacked["Speed-up"]["shade"]) == ("2.151", 1, 1)


def test_ticks_of_a_logarithmic_axis_are_few_and_round():
    assert log_ticks(1e18, 1e20) == [1e18, 1e19, 1e20]
    assert log_ticks(0.9, 9) == [1, 2, 5]
    assert len(log_ticks(1e3, 1e24)) <= 6
    assert nice_ticks(2.13, 2.31) == [2.15, 2.2, 2.25, 2.3]


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_every_figure_and_sorts_every_table(everything, tmp_path, width):
    report, out = everything

    seen = look_at((out / "report.html").read_text(), width, tmp_path / "browser")

    assert seen["errors"] == [] and seen["content"] <= width == seen["width"]
    assert [tip["chart"] for tip in seen["tips"]] == [chart["id"] for chart in report["charts"]]
    assert set(seen["sorted"]) == {"runs", "scores", "operators", "speedups"}
    for name, (down, up, by_first) in seen["sorted"].items():
        rows = [(row["name"], row["cells"][-1]["value"]) for row in table_of(report, name)["rows"]]
        values = sorted((value for _, value in rows if value is not None), reverse=True)
        value_of = dict(rows)
        with_value = len(values) if len(value_of) == len(rows) else 0  # names in some tables repeat
        assert [value_of[row] for row in down][:with_value] == values[:with_value]
        assert [value_of[row] for row in up][:with_value] == values[::-1][:with_value]
        assert by_first == sorted(by_first, key=str.casefold)
