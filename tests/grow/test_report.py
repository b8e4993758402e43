"""`grow report`: from run directories to one dict, and from that dict to a page that says nothing else."""

from __future__ import annotations

import json
import re
import shutil
import sys
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grow.__main__ import main
from grow.report import text
from grow.report.command import summary
from grow.report.facts import blocks
from grow.report.page import FORMATS, layer_style, render
from lit_gpt.errors import DataError, run_command
from lit_gpt.flops import count_parameters, flops_per_token
from tests.browser import look_at, needs_chromium
from tests.reports import by_name, facts_on, report_on
from tests.synthetic_runs import (
    LARGE,
    SMALL,
    TOKENIZER,
    TOKENS_PER_STEP,
    Stage,
    SyntheticRun,
    base_loss,
    grown_loss,
    scratch_loss,
    scratch_run,
    stacked_run,
    useless_growth_loss,
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The report of a run that grew and one from scratch, as the demo makes it: the dict and its folder."""
    root = tmp_path_factory.mktemp("demo")
    runs = [stacked_run(root / "stacked").write(), scratch_run(root / "scratch").write()]
    return report_on(*runs, out=root / "out"), root / "out"


def test_the_speedup_is_that_of_the_known_curves(tmp_path):
    stacked = stacked_run(tmp_path / "stacked", noise=0.0).write()
    scratch = scratch_run(tmp_path / "scratch", noise=0.0).write()

    report = facts_on(stacked, scratch)

    large, small = flops_per_token(LARGE).paper, flops_per_token(SMALL).paper
    scratch_tokens = 390 * TOKENS_PER_STEP
    expected = large * scratch_tokens / (small * 146 * TOKENS_PER_STEP + large * (scratch_tokens - 380_000)) - 1
    assert report["speedup_at_equal_loss"] == pytest.approx(expected, rel=0.02)
    assert report["speedup_validation"]["speedup"] == pytest.approx(expected, rel=0.02)
    assert report["target_loss"] == report["speedup_train"]["target_loss"] == by_name(report)["scratch"]["final_loss"]
    assert report["headline"]["verdict"] == "won"


def test_every_model_has_a_row_that_counts_its_own_tokens_and_its_bases_flops(demo):
    rows = by_name(demo[0])

    assert list(rows) == ["base", "grown", "scratch"]
    assert [rows[name]["role"] for name in rows] == ["base", "grown", "baseline"]
    assert rows["grown"]["tokens"] == 341 * TOKENS_PER_STEP
    assert rows["grown"]["tokens_cumulative"] == (146 + 341) * TOKENS_PER_STEP
    base_flops = 146 * TOKENS_PER_STEP * flops_per_token(SMALL).paper
    assert rows["base"]["flops_total"] == pytest.approx(base_flops)
    own_flops = rows["grown"]["tokens"] * flops_per_token(LARGE).paper
    assert rows["grown"]["flops_total"] == pytest.approx(base_flops + own_flops)
    assert rows["grown"]["seconds_cumulative"] == pytest.approx(rows["base"]["seconds"] + rows["grown"]["seconds"])
    assert rows["grown"]["parameters"] == count_parameters(LARGE)
    assert rows["base"]["speedup"] is None and rows["grown"]["speedup"] == demo[0]["speedup_at_equal_loss"]
    assert rows["grown"]["bpb_of"] == "validation"


def test_layers_made_from_two_and_those_of_a_reference_say_so():
    drawn = blocks([0, 1, 1, 2, 3], fused_layers=[2], reference_layers=[4])
    assert [block["text"] for block in drawn] == ["1", "2", "2+3", "3", "[4]"]
    assert [block["source"] for block in drawn] == [1, 2, 2, 3, None]


def test_new_layers_have_no_source_and_identity_layers_are_marked():
    drawn = blocks([0, 0, None], identity_layers=[1])
    assert [block["source"] for block in drawn] == [1, 1, None]
    assert [block["identity"] for block in drawn] == [False, True, False]
    assert not any(block["connected"] for block in drawn)
    assert [block["text"] for block in drawn] == ["1", "(1)", "new"]
    assert layer_style(None, 2) != layer_style(1, 2)


def test_growth_is_drawn_with_its_layer_map_connection_rate_and_spike(demo):
    (growth,) = demo[0]["growths"]

    assert [block["source"] for block in growth["blocks"]] == [1, 2] * 4
    assert [block["connected"] for block in growth["blocks"]] == [False, True] * 4
    assert (growth["connection_rate"], growth["connection_share"]) == ("4/7", pytest.approx(4 / 7))
    assert growth["loss_after"] > growth["loss_before"] + 1
    (spike,) = demo[0]["charts"][0]["spikes"]
    assert spike["after"] == pytest.approx(growth["loss_after"], rel=1e-5)
    assert demo[0]["charts"][0]["y"]["max"] > spike["after"]
    assert "Circles: validation loss just before and just after growth." in demo[0]["charts"][0]["caption"]


def test_growth_that_did_not_help_is_said_in_the_same_place(tmp_path):
    lost = stacked_run(tmp_path / "lost", loss=useless_growth_loss).write()

    report = facts_on(lost, scratch_run(tmp_path / "scratch").write())

    assert report["speedup_at_equal_loss"] < 0
    assert report["headline"]["number"].startswith("−") and report["headline"]["verdict"] == "lost"
    assert "did not help" in report["headline"]["sentence"]
    assert report["target_loss"] == by_name(report)["grown"]["final_loss"]
    assert "<h1>Growing did not help" in render(report)


def test_one_run_alone_has_a_page_without_a_speedup_and_a_reason(tmp_path):
    report = facts_on(stacked_run(tmp_path / "stacked").write())

    assert report["speedup_at_equal_loss"] is None
    assert "no run in this report trained from scratch" in report["reason"]
    assert "no run in this report grew" in facts_on(scratch_run(tmp_path / "s").write())["reason"]


def test_losses_that_never_meet_give_a_reason_and_null(tmp_path):
    far = stacked_run(tmp_path / "far", loss=lambda tokens: scratch_loss(tokens) + 9).write()

    report = facts_on(far, scratch_run(tmp_path / "scratch").write())

    assert report["speedup_at_equal_loss"] is None
    assert "do not overlap" in report["reason"]


def test_every_further_grown_run_has_a_speedup_of_its_own(tmp_path):
    runs = [stacked_run(tmp_path / "one").write(), stacked_run(tmp_path / "two", loss=useless_growth_loss).write()]

    report = facts_on(*runs, scratch_run(tmp_path / "scratch").write())

    rows = by_name(report)
    assert list(rows) == ["one/base", "one/grown", "two/base", "two/grown", "scratch"]
    assert report["pair"] == {"grown": "one/grown", "scratch": "scratch"}
    assert rows["two/grown"]["speedup"] < 0 < rows["one/grown"]["speedup"] == report["speedup_at_equal_loss"]
    assert len({row["style"] for row in report["runs"]}) == 5


def runs_of_seeds(root: Path, *losses, **changes: Any) -> list[Path]:
    """As `grow report seed-*/stack seed-*/scratch` is given them; a loss of the grown model for each seed."""
    stacks = [
        stacked_run(root / f"seed-{n}" / "stack", loss=loss, seed=n, noise=0.0, **changes).write()
        for n, loss in enumerate(losses, 1)
    ]
    scratch = [scratch_run(root / f"seed-{n}" / "scratch", seed=n, noise=0.0) for n in range(1, len(losses) + 1)]
    return [*stacks, *(run.write() for run in scratch)]


def ahead_by(tokens_ahead: int):
    return lambda tokens: scratch_loss(tokens + tokens_ahead)


def test_several_seeds_have_one_headline_their_mean_with_its_error_and_pairs_of_one_seed(tmp_path):
    runs = runs_of_seeds(tmp_path, ahead_by(380_000), ahead_by(330_000), ahead_by(280_000))

    report = facts_on(*runs)

    rows = {name.removesuffix("/grown"): row["speedup"] for name, row in by_name(report).items()}
    each = [rows[f"seed-{n}/stack"] for n in (1, 2, 3)]
    assert each[0] > each[1] > each[2] > 0
    assert report["over_seeds"]["speedups"] == each and report["over_seeds"]["seeds"] == [1, 2, 3]
    mean, stderr = np.mean(each), np.std(each, ddof=1) / np.sqrt(3)
    assert report["speedup_at_equal_loss"] == pytest.approx(mean)
    assert report["over_seeds"]["stderr"] == pytest.approx(stderr)
    headline = report["headline"]
    assert headline["number"] == f"{text.percent(mean)} ± {text.percent(stderr, signed=False)}"
    assert headline["label"].endswith("mean ± standard error over 3 seeds")
    assert all(f"{text.percent(value)} with seed {n}" in headline["detail"] for n, value in enumerate(each, 1))
    assert report["claim"].startswith("3 seeds (1, 2, 3), ")
    (speedups,) = [table for table in report["tables"] if table["id"] == "speedups"]
    names = [row["name"] for row in speedups["rows"]]
    assert {f"seed-{n}/stack/grown over seed-{n}/scratch" for n in (1, 2, 3)} < set(names)
    assert "grown, mean over seeds 1, 2, 3" in names


def test_seeds_that_disagree_have_made_no_difference(tmp_path):
    report = facts_on(*runs_of_seeds(tmp_path, ahead_by(300_000), useless_growth_loss))

    assert report["headline"]["verdict"] == "even"
    assert min(report["over_seeds"]["speedups"]) < 0 < max(report["over_seeds"]["speedups"])
    assert "no difference here that all seeds share" in report["headline"]["sentence"]


def test_a_seed_without_a_speed_up_is_named_beside_the_mean_of_the_others(tmp_path):
    far = runs_of_seeds(tmp_path, ahead_by(300_000), ahead_by(200_000), lambda tokens: scratch_loss(tokens) + 9)

    report = facts_on(*far)

    assert report["over_seeds"]["speedups"][2] is None
    assert "over 2 seeds" in report["headline"]["label"]
    assert any(line.startswith("None with seed 3: the loss ranges") for line in report["headline"]["more"])


def test_pairs_of_other_settings_or_of_two_seeds_are_no_repetition_and_the_headline_names_its_pair(tmp_path):
    stacks = runs_of_seeds(tmp_path, ahead_by(300_000), ahead_by(200_000))[:2]
    lone = scratch_run(tmp_path / "scratch", seed=1).write()

    report = facts_on(*stacks, lone)  # the second seed has no run from scratch

    assert report["over_seeds"] is None
    said = "This is seed-1/stack/grown against scratch, the first of 2 pairs; the others are in the tables."
    assert said in report["headline"]["more"]
    other = runs_of_seeds(tmp_path / "other", ahead_by(300_000), ahead_by(200_000), fingerprint="0b" * 32)[:2]
    assert facts_on(stacks[0], other[1], lone)["over_seeds"] is None


def test_a_run_that_grew_twice_is_represented_by_its_last_model(tmp_path):
    middle = Stage("middle", SMALL, 100, lambda tokens: scratch_loss(tokens + 200_000), operator="stack")
    run_of_three = stacked_run(tmp_path / "three")
    run_of_three.stages.insert(1, middle)

    report = facts_on(run_of_three.write(), scratch_run(tmp_path / "scratch").write())

    assert report["pair"]["grown"] == "grown"
    assert [row["grown_from"] for row in report["runs"]] == [None, "base", "middle", None]


OTHER_TOKENIZER = {**TOKENIZER, "sha256": "dead" * 16}
TWO_TOKENIZERS = {"a": TOKENIZER, "b": OTHER_TOKENIZER}


def test_different_tokenizers_are_compared_in_bits_per_byte_alone(tmp_path):
    """Nats per token are three times as many for the baseline, whose tokens are three times as long."""
    stacked = stacked_run(tmp_path / "a").write()
    scratch = scratch_run(tmp_path / "b").write()
    plain = facts_on(stacked, scratch)
    longer = scratch_run(tmp_path / "c", tokenizer=OTHER_TOKENIZER).write()
    for name, field in (("metrics.jsonl", "loss"), ("evals.jsonl", "value")):
        lines = [json.loads(line) for line in (longer / name).read_text().splitlines()]
        lines = [{**line, field: 3 * line[field]} if line.get("metric", "loss") == "loss" else line for line in lines]
        (longer / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    report = facts_on(stacked, longer)

    assert report["unit"] == "bits per byte"
    assert report["speedup_at_equal_loss"] == pytest.approx(plain["speedup_at_equal_loss"], rel=1e-6)
    assert report["target_loss"] == pytest.approx(plain["target_loss"] / 2.4, rel=1e-6)
    assert report["speedup_validation"]["speedup"] == pytest.approx(plain["speedup_validation"]["speedup"], rel=1e-6)
    assert "different tokenizers: losses are bits per byte" in " ".join(report["headline"]["more"])
    assert any("matched by name alone" in note for note in report["notes"])
    assert all("bits per byte" in chart["y_label"] for chart in report["charts"] if chart["section"] == "loss")


def test_a_run_without_bits_per_byte_is_left_out_where_tokenizers_differ(tmp_path):
    other = scratch_run(tmp_path / "b", tokenizer=OTHER_TOKENIZER).write()
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    (other / "metrics.jsonl").write_text("".join(json.dumps({**line, "bpb": None}) + "\n" for line in lines))

    report = facts_on(stacked_run(tmp_path / "a").write(), other)

    assert list(by_name(report)) == ["base", "grown"] and report["speedup_at_equal_loss"] is None
    assert any("scratch is left out" in note for note in report["notes"])
    assert report["reason"].endswith("; the notes say why scratch could not be taken")


def test_where_every_run_is_left_out_the_reason_says_so_and_a_fit_is_refused_with_it(tmp_path, capsys):
    runs = [scratch_run(tmp_path / name, tokenizer=told).write() for name, told in TWO_TOKENIZERS.items()]
    for folder in runs:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        (folder / "metrics.jsonl").write_text("".join(json.dumps({**line, "bpb": None}) + "\n" for line in lines))

    report = facts_on(*runs)

    assert report["runs"] == [] and report["reason"].startswith("there is no run to compare here")
    assert report["reason"].endswith("; the notes say why a/scratch, b/scratch could not be taken")
    assert main(["fit", *map(str, runs)]) == 2
    assert "a/scratch is left out: its log holds no bits per byte" in capsys.readouterr().err


def test_a_pair_that_differs_in_more_than_growth_says_so_beside_the_number(tmp_path):
    smaller = SyntheticRun(tmp_path / "b", [Stage("scratch", SMALL, 390, scratch_loss)], seed=1)

    report = facts_on(stacked_run(tmp_path / "a").write(), smaller.write())

    beside = " ".join(report["headline"]["more"])
    assert "differ in size" in beside and "different seeds" in beside


def test_different_training_data_leaves_the_validation_loss_to_compare(tmp_path):
    runs = [stacked_run(tmp_path / "a").write(), scratch_run(tmp_path / "b", fingerprint="0b" * 32).write()]

    report = facts_on(*runs)

    assert "different data" in report["speedup_train"]["reason"]
    assert report["speedup_validation"]["speedup"] > 0


def test_beyond_one_epoch_the_validation_loss_decides(tmp_path):
    runs = [stacked_run(tmp_path / "a", samples=1000).write(), scratch_run(tmp_path / "b", samples=1000).write()]

    report = facts_on(*runs)

    assert report["primary_curve"] == "validation"
    assert report["speedup_at_equal_loss"] == report["speedup_validation"]["speedup"]
    assert by_name(report)["grown"]["final_loss"] == by_name(report)["grown"]["final_validation_loss"]
    assert by_name(report)["grown"]["epochs"] == pytest.approx(487 * 8 / 1000)
    assert any("times" in note for note in report["notes"])


def test_growth_from_a_checkpoint_of_another_run_is_linked_and_charged(tmp_path):
    """What `grow apply` and a run of its own leave behind, instead of two stages of one run."""
    both = stacked_run(tmp_path / "both").write()
    scratch = scratch_run(tmp_path / "scratch").write()
    together = facts_on(both, scratch)
    base, grown = split_run(both, tmp_path / "base_run", tmp_path / "grown_run")

    apart = facts_on(base, grown, scratch)

    assert [row["role"] for row in apart["runs"]] == ["base", "grown", "baseline"]
    assert apart["runs"][1]["grown_from"] == "base"
    assert apart["speedup_at_equal_loss"] == pytest.approx(together["speedup_at_equal_loss"])
    for key in ("tokens", "tokens_cumulative", "seconds_cumulative", "flops_total"):
        assert apart["runs"][1][key] == pytest.approx(together["runs"][1][key]), key

    alone = facts_on(grown, scratch)
    assert alone["speedup_at_equal_loss"] == pytest.approx(together["speedup_at_equal_loss"])
    assert alone["runs"][0]["seconds_cumulative"] is None
    assert any("wall time" in note for note in alone["notes"])


def split_run(both: Path, base: Path, grown: Path) -> tuple[Path, Path]:
    """The two stages of a run as two runs; the second counts from zero but keeps FLOPs, history and parent tokens."""
    for target, stage in ((base, 1), (grown, 2)):
        (target / "checkpoints").mkdir(parents=True)
        shutil.copytree(both / "checkpoints" / f"stage-{stage:02d}", target / "checkpoints" / "stage-01")
    lines = [json.loads(line) for line in (both / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["stage"] == 1][-1]
    for name in ("metrics.jsonl", "evals.jsonl"):
        for target, stage in ((base, 1), (grown, 2)):
            kept = [json.loads(line) for line in (both / name).read_text().splitlines()]
            kept = [line for line in kept if line["stage"] == stage]
            for line in kept if stage == 2 else []:
                line["stage"], line["step"] = 1, line["step"] - last["step"]
                line["tokens"] -= last["tokens"]
                if "seconds" in line:
                    line["seconds"] -= last["seconds"]
            (target / name).write_text("".join(json.dumps(line) + "\n" for line in kept))
    (parent,) = (base / "checkpoints" / "stage-01").iterdir()
    (checkpoint,) = (grown / "checkpoints" / "stage-01").iterdir()
    state = json.loads((checkpoint / "state.json").read_text())
    state["history"][0]["parent"] = sha256((parent / "MANIFEST.json").read_bytes()).hexdigest()
    state["parent_tokens"] = last["tokens"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    return base, grown


@pytest.mark.parametrize(
    "beginning",
    [
        {"init_from": "out/old/step-0000000100", "parent_tokens": 50_000},
        {"parent_tokens": 50_000},  # config.yaml and run_config lost
        {"init_from": "out/published"},  # weights alone: nothing is known of their training
        {"init_from": "out/published", "checkpoints": False},
    ],
)
def test_a_run_that_continues_a_checkpoint_is_shown_but_is_no_baseline(tmp_path, beginning):
    stacked = stacked_run(tmp_path / "stacked").write()
    continued = SyntheticRun(tmp_path / "more", [Stage("more", LARGE, 60, scratch_loss)], **beginning).write()

    report = facts_on(stacked, continued)

    row = by_name(report)["more"]
    assert row["role"] == "continued"
    assert row["seconds_cumulative"] is None and row["seconds"] > 0
    assert row["tokens_cumulative"] == 60 * TOKENS_PER_STEP + beginning.get("parent_tokens", 0)
    assert report["pair"] is None and report["speedup_at_equal_loss"] is None
    assert "no run in this report trained from scratch (more began with" in report["reason"]
    drawn = {chart["id"]: {series["name"] for series in chart["series"]} for chart in report["charts"]}
    assert "more" in drawn["train-flops"] & drawn["validation-flops"] & drawn["train-tokens"]
    assert "more" not in drawn["train-seconds"]
    assert any("no speed-up is measured against it" in note for note in report["notes"])
    is_unknown = any("How long the checkpoint that more began with" in note for note in report["notes"])
    assert is_unknown == ("parent_tokens" not in beginning)


def test_a_true_baseline_is_preferred_to_a_continued_run_before_it(tmp_path):
    continued = SyntheticRun(tmp_path / "more", [Stage("more", LARGE, 60, scratch_loss)], parent_tokens=9).write()
    stacked, scratch = stacked_run(tmp_path / "stacked").write(), scratch_run(tmp_path / "scratch").write()

    report = facts_on(continued, stacked, scratch)

    assert report["pair"] == {"grown": "grown", "scratch": "scratch"}
    assert report["speedup_at_equal_loss"] == facts_on(stacked, scratch)["speedup_at_equal_loss"]
    assert "no run in this report grew" in facts_on(continued)["reason"]


def test_growth_in_a_run_that_began_with_a_checkpoint_has_no_wall_time(tmp_path):
    stacked = stacked_run(tmp_path / "stacked", init_from="out/old", parent_tokens=5000).write()

    report = facts_on(stacked, scratch_run(tmp_path / "scratch").write())

    assert [row["role"] for row in report["runs"]] == ["base", "grown", "baseline"]
    assert [row["seconds_cumulative"] is None for row in report["runs"]] == [True, True, False]
    assert by_name(report)["grown"]["tokens_cumulative"] == 5000 + (146 + 341) * TOKENS_PER_STEP


def test_the_time_behind_a_grown_run_is_unknown_when_it_did_not_begin_at_its_parents_end(tmp_path):
    both = stacked_run(tmp_path / "both").write()
    base, grown = split_run(both, tmp_path / "base_run", tmp_path / "grown_run")
    (path,) = grown.glob("checkpoints/*/*/state.json")
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "parent_tokens": state["parent_tokens"] + 1}))  # trained on between the two

    row = by_name(facts_on(base, grown))["grown"]

    assert row["grown_from"] == "base" and row["seconds_cumulative"] is None


def test_a_killed_run_is_reported_with_notes(tmp_path):
    stacked = stacked_run(tmp_path / "stacked").write()
    metrics = (stacked / "metrics.jsonl").read_text()
    (stacked / "metrics.jsonl").write_text(metrics[:-40])
    evals = (stacked / "evals.jsonl").read_text().splitlines()
    (stacked / "evals.jsonl").write_text("\n".join(line for line in evals if '"end"' not in line))

    report = facts_on(stacked, scratch_run(tmp_path / "scratch").write())

    assert any("last line is incomplete" in note for note in report["notes"])
    assert any("has not reached its end" in note for note in report["notes"])
    assert report["speedup_at_equal_loss"] > 0


def test_a_run_whose_growth_is_still_to_come_is_no_baseline(tmp_path):
    stacked = stacked_run(tmp_path / "stacked").write()
    for name in ("metrics.jsonl", "evals.jsonl"):
        lines = (stacked / name).read_text().splitlines(keepends=True)
        (stacked / name).write_text("".join(line for line in lines if '"stage": 1' in line))

    report = facts_on(stacked)

    assert [row["role"] for row in report["runs"]] == ["base"]
    assert "only a base model" in report["reason"]
    assert any("only 1 of 2 stages" in note for note in report["notes"])


def test_logs_alone_are_enough_for_the_curves(tmp_path):
    runs = [
        stacked_run(tmp_path / "a", checkpoints=False).write(),
        scratch_run(tmp_path / "b", checkpoints=False).write(),
    ]
    for path in runs:
        (path / "evals.jsonl").unlink()

    report = facts_on(*runs)

    assert report["speedup_at_equal_loss"] > 0
    assert by_name(report)["grown"]["parameters"] == count_parameters(LARGE)
    assert by_name(report)["grown"]["bpb_of"] == "training"
    assert report["growths"][0]["blocks"] == []
    assert any("no checkpoint" in note for note in report["notes"])


def test_a_checkpoint_whose_state_is_no_mapping_is_passed_over_with_a_note(tmp_path):
    run_dir = scratch_run(tmp_path / "run").write()
    next(run_dir.glob("checkpoints/*/*/state.json")).write_text("[]")

    assert any("state.json is not a JSON object" in note for note in facts_on(run_dir)["notes"])


def test_what_is_no_run_is_refused_and_nothing_is_written(tmp_path):
    (tmp_path / "empty").mkdir()
    diverged = scratch_run(tmp_path / "diverged").write()
    lines = (diverged / "metrics.jsonl").read_text().splitlines()
    (diverged / "metrics.jsonl").write_text(
        "\n".join([*lines[:19], lines[19].replace('"loss": ', '"loss": NaN, "x": ')])
    )
    torn = scratch_run(tmp_path / "torn").write()
    (torn / "config.yaml").write_text("stages: [")
    good = scratch_run(tmp_path / "good").write()
    cases = [
        ([torn], DataError, r"config\.yaml is not YAML: .*; the file was damaged"),
        ([tmp_path / "empty"], DataError, r"no metrics\.jsonl"),
        ([tmp_path / "absent"], FileNotFoundError, "no such run directory"),
        ([diverged], DataError, "the loss of step 40 is nan"),
        ([good, good], ValueError, "given twice"),
    ]
    for runs, error, message in cases:
        with pytest.raises(error, match=message):
            report_on(*runs, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_exit_code_3(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    good = scratch_run(tmp_path / "good").write()

    assert run_command(lambda: report_on(good, out=tmp_path / "file") and 0) == 3
    assert capsys.readouterr().err.count("\n") == 1


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(ValueError, match=r"matplotlib.*`report` extra"):
        report_on(tmp_path, out=tmp_path / "out")


def test_json_prints_one_object_and_the_same_runs_give_the_same_files(demo, capsys):
    report, out = demo
    before = {file.name: file.read_bytes() for file in sorted(out.rglob("*.*"))}
    runs = (out.parent / "stacked", out.parent / "scratch")

    assert report_on(*runs, out=out, options=("--json", "--no-samples")) == report

    assert json.loads(capsys.readouterr().out) == report
    assert {file.name: file.read_bytes() for file in sorted(out.rglob("*.*"))} == before


def test_the_terminal_gets_the_headline_the_table_and_the_path_of_the_page(demo):
    report, out = demo

    lines = summary(report, out).splitlines()

    assert lines[0] == report["headline"]["sentence"]
    assert lines[-1] == str(out / "report.html")
    assert [line.split()[0] for line in lines if re.match(r"(base|grown|scratch) ", line)] == list(by_name(report))


def test_every_chart_is_a_png_and_an_svg(demo):
    report, out = demo

    names = [chart["id"] for chart in report["charts"]]
    losses = ["train-flops", "train-flops-zoom", "validation-flops", "train-tokens", "train-seconds"]
    assert names == [*losses, "loss-difference"]
    for name in names:
        assert (out / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / "figures" / f"{name}.svg").read_text()


class VisibleText(HTMLParser):
    """Collects what a reader sees: no scripts, no styles, no attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.hidden = 0
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.words.append(data)


NUMBER = re.compile(r"\d(?:[\d.,]*\d)?")


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *(leaf for item in value.values() for leaf in leaves(item))]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [value]


def numbers_of(report: dict[str, Any]) -> set[str]:
    """Every number of the report in every way the page may write it."""
    written = set[str]()
    for leaf in leaves(report):
        if isinstance(leaf, str):
            written |= set(NUMBER.findall(leaf))
        elif isinstance(leaf, int | float) and not isinstance(leaf, bool):
            forms = [str(leaf), *(write(leaf) for write in FORMATS if leaf >= 0 or write in (text.percent, text.loss))]
            written |= {number for form in forms for number in NUMBER.findall(form)}
    return written


def test_every_number_on_the_page_is_in_the_report(demo):
    report, out = demo

    page = VisibleText((out / "report.html").read_text()).words
    shown = [number for words in page for number in NUMBER.findall(words)]

    assert len(shown) > 100
    assert set(shown) - numbers_of(report) == set()
    assert text.percent(report["speedup_at_equal_loss"]) in "".join(page)


def test_the_page_follows_the_report_and_nothing_else(demo):
    report = json.loads(json.dumps(demo[0]))
    report["runs"][1]["final_train_loss"] = 1.234567

    assert ">1.235</td>" in render(report)


def test_the_page_needs_no_network_and_no_markup_of_others_gets_into_it(demo):
    report = json.loads(json.dumps(demo[0]))
    evil = "</script><script>alert(1)</script><img src=x>"
    report["samples"]["prompts"] = [{"prompt": evil, "texts": [{"name": evil, "text": evil}]}]

    page = render(report)

    assert evil not in page and "<img" not in page
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) == {"data:,"}
    assert "default-src 'none'" in page and "@import" not in page and "url(" not in page.split("<body>")[0]


@pytest.mark.parametrize("n_layer", [1, 2, 8, 32])
def test_layers_differ_in_colour_and_their_numbers_can_be_read(n_layer):
    styles = [layer_style(layer, n_layer) for layer in range(1, n_layer + 1)]

    assert len(set(styles)) == n_layer
    for style in styles:
        background = np.array([int(value) for value in re.findall(r"\d+", style.split(";")[0])]) / 255
        linear = np.where(background <= 0.04045, background / 12.92, ((background + 0.055) / 1.055) ** 2.4)
        luminance = linear @ [0.2126, 0.7152, 0.0722]
        ink = 1.0 if style.endswith("#fff") else 0.0056
        bright, dark = max(luminance, ink), min(luminance, ink)
        assert (bright + 0.05) / (dark + 0.05) >= 4.2  # WCAG AA asks 4.5 of small text; these are bold


@pytest.mark.parametrize(
    ("write", "value", "expected"),
    [
        (text.percent, 0.789, "+79 %"),
        (text.percent, -0.034, "−3.4 %"),
        (text.percent, 0.0001, "0.0 %"),
        (text.percent, None, "–"),
        (text.flops, 2.4e12, "2.40×10¹²"),
        (text.count, 692_224, "692 k"),
        (text.count, 1_000_000, "1 M"),
        (text.count, 999_999, "1 M"),
        (text.count, 34_918.4, "34.9 k"),
        (text.count, 17, "17"),
        (text.duration, 247, "4 min 7 s"),
        (text.duration, 6.42, "6.4 s"),
        (text.duration, 59.7, "1 min 0 s"),
        (text.duration, 3600 * 5 + 1790, "5 h 30 min"),
        (text.loss, 3.21449, "3.214"),
    ],
)
def test_numbers_are_written_for_readers(write, value, expected):
    assert write(value).replace(text.NARROW, " ") == expected


def test_both_models_write_text_from_the_same_prompts(tmp_path):
    from lit_gpt.checkpoint import write_training
    from lit_gpt.config import Config
    from lit_gpt.model import GPT, init_weights
    from lit_gpt.tokenizer import Tokenizer

    data = tmp_path / "data"
    tokenizer = Tokenizer.load("bytes")
    data.mkdir()
    tokenizer.save(data)
    sizes = {"block_size": 32, "vocab_size": tokenizer.vocab_size, "n_head": 2, "n_embd": 16, "intermediate_size": 32}
    small, large = (Config(n_layer=n_layer, **sizes) for n_layer in (1, 2))

    def write_weights(path: Path, config: Config, state: dict[str, Any]) -> None:
        model = GPT(config)
        init_weights(model, seed=1)
        write_training(path, model.state_dict(), {}, state)

    common = {"data_folder": str(data), "write_weights": write_weights, "validation_every": 1000}
    common["tokenizer"] = {"sha256": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
    stages = [Stage("base", small, 20, base_loss), Stage("grown", large, 60, grown_loss, operator="stack")]
    stacked = SyntheticRun(tmp_path / "stacked", stages, **common).write()
    scratch = SyntheticRun(tmp_path / "scratch", [Stage("scratch", large, 60, scratch_loss)], **common).write()

    report = facts_on(stacked, scratch, options=("--prompt", "def f(", "--prompt", "x"))

    assert report["samples"]["skipped"] == []
    first, second = report["samples"]["prompts"]
    assert (first["prompt"], [written["name"] for written in first["texts"]]) == ("def f(", ["grown", "scratch"])
    assert all(written["text"] for written in first["texts"])
    assert len(second["texts"]) == 2
    too_long = facts_on(stacked, scratch, options=("--prompt", "x" * 99))
    assert "block_size=32" in too_long["samples"]["skipped"][0]["reason"]
    shutil.rmtree(data)
    without = facts_on(stacked, scratch, options=())
    assert without["samples"]["prompts"] == []
    assert [skipped["name"] for skipped in without["samples"]["skipped"]] == ["grown", "scratch"]
    assert "training data" in without["samples"]["skipped"][0]["reason"]


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_every_number_without_errors_or_sideways_scrolling(demo, tmp_path, width):
    report, out = demo
    page = (out / "report.html").read_text()

    seen = look_at(page, width, tmp_path / "browser")

    assert seen["width"] == width
    assert seen["content"] <= width and seen["hidden_table"] <= 0
    assert seen["errors"] == []
    for row in report["runs"]:
        for value in (
            row["name"],
            text.count(row["parameters"]),
            text.count(row["tokens"]),
            text.flops(row["flops_total"]),
            text.duration(row["seconds"]),
            text.loss(row["final_train_loss"]),
            text.loss(row["bpb"]),
            text.percent(row["speedup"]),
        ):
            assert value in seen["text"], (row["name"], value)
    assert [tip["chart"] for tip in seen["tips"]] == [chart["id"] for chart in report["charts"]]
    for tip in seen["tips"]:
        assert "grown" in tip["text"] and re.search(r"\d\.\d{3}", tip["text"]), tip


@pytest.mark.browser
@needs_chromium
def test_a_browser_that_prefers_dark_gets_a_dark_page(demo, tmp_path):
    page = (demo[1] / "report.html").read_text()

    light = look_at(page, 800, tmp_path / "light")
    dark = look_at(page, 800, tmp_path / "dark", "--blink-settings=preferredColorScheme=0")

    brightness = [sum(map(int, re.findall(r"\d+", seen["background"])[:3])) for seen in (light, dark)]
    assert brightness[0] > 700 > 100 > brightness[1]


def test_bits_per_byte_of_training_and_of_held_out_text_do_not_stand_in_one_column():
    from grow.report.facts import _of_one_kind

    held_out, estimate = {"bpb": 2.0, "bpb_of": "validation"}, {"bpb": 1.5, "bpb_of": "training"}
    assert _of_one_kind([held_out, estimate]) == [held_out, {"bpb": None, "bpb_of": None}]
    assert _of_one_kind([estimate, estimate]) == [estimate, estimate]


def test_a_report_without_a_speed_up_shows_no_number_for_it(tmp_path, capsys):
    report_on(scratch_run(tmp_path / "scratch").write(), out=tmp_path / "out")
    printed, page = capsys.readouterr().out, (tmp_path / "out" / "report.html").read_text()
    assert "There is no speed-up to report." in printed
    assert "\u2013 speed-up" not in printed and '<p class="number">' not in page


def test_models_of_several_sizes_are_not_called_one_size(tmp_path, demo):
    assert "one size (" in demo[0]["claim"]
    alone = facts_on(stacked_run(tmp_path / "stacked").write())
    assert "sizes of " in alone["claim"] and "one size" not in alone["claim"]
