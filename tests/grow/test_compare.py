"""`grow compare`: its settings, what an arm may cost, and what is concluded from the losses of several seeds."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import yaml

from grow.compare import runs
from grow.compare.plan import Origin, PlannedRun, arm_steps, planned_runs
from grow.compare.ranking import estimate, rank
from grow.compare.settings import CompareConfig, read_settings
from grow.compare.text import sentences, table
from lit_gpt.config import Config
from lit_gpt.errors import EXIT_STOPPED, EXIT_USAGE, DataError
from lit_gpt.flops import flops_per_token
from tests.browser import look_at, needs_chromium
from tests.toys import toy_config

BASE = toy_config(n_layer=1)
MODEL = {"name": "4L16H", "n_head": 4, "n_query_groups": 2, "intermediate_size": 24, "block_size": 16}
WHOLE = {
    "config": [],
    "settings": {"model": MODEL, "batch": {"global_batch_size": 4}},
    "base": {"n_layer": 1, "max_steps": 10},
    "probe": {"max_steps": 20},
    "arms": {"scratch": {}, "stack": {"operator": "stack"}},
}


def settings_file(folder: Path, **changes: object) -> Path:
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump({**WHOLE, **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": {}}, "unknown key 'arm'; did you mean 'arms'"),
        ({"seeds": [1, 1]}, "must be different whole numbers"),
        ({"seeds": []}, "at least one"),
        ({"seeds": 3}, r"seeds=3 is not a list, e.g. seeds: \[1, 2, 3\]"),
        ({"probe": {"tokens": 3}}, "must be {max_tokens: N} or {max_steps: N}"),
        ({"base": {"n_layer": 1}}, "base needs exactly one of max_tokens and max_steps, or a checkpoint"),
        ({"base": {"checkpoint": "a", "n_layer": 1}}, "base names a checkpoint, so n_layer has no effect"),
        ({"arms": {"stack": {"operator": "stack"}}}, "arms must hold at least two"),
        ({"arms": {"scratch": {}, "a/b": {"operator": "stack"}}}, "needs a name that a folder can have"),
        ({"arms": {"scratch": {}, "stack": {"operator": "stack", "max_steps": 3}}}, "max_steps is not for arms"),
        ({"arms": ["stack"]}, r"is not a mapping, e.g. arms: \{scratch"),
        ({"arms": {"scratch": {}, "base": {"operator": "stack"}}}, "arm 'base' has the name of a base's folder"),
        ({"probe": {"max_steps": "abc"}}, "probe: 'abc' is not a number of steps"),
        ({"arms": {"scratch": {}, "a": {"operator": "stak"}}}, "unknown growth operator 'stak'"),
        ({"arms": {"scratch": {"operator": "stack"}, "a": {}}}, "it is the baseline and has no operator"),
        ({"arms": {"scratch": {}, "a": {"base": {"n_layer": 2}}}}, "base has no effect: it has no operator"),
        ({"arms": {"scratch": {}, "a": {"stages": []}}}, "stages must be a list of stages"),
        ({"arms": {"scratch": {}, "a": {"stages": [{"operator": "stack"}] * 2}}}, "needs a share of the FLOPs"),
        ({"arms": {"scratch": {}, "a": {"stages": [{"share": 0.5}] * 2}}}, "needs a share of the FLOPs"),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_settings(settings_file(tmp_path, **changes))


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "compare.yaml").write_text("seeds: [1]\n")
    with pytest.raises(ValueError, match=r"config is missing(.|\n)*arms is missing"):
        read_settings(tmp_path / "compare.yaml")


def comparison(tmp_path: Path, **changes: object) -> CompareConfig:
    return dataclasses.replace(read_settings(settings_file(tmp_path, **changes)), out_dir=str(tmp_path / "out"))


def test_arms_cost_the_same_and_scratch_the_base_too(tmp_path):
    arms = {"scratch": {}, "stack": {"operator": "stack"}, "shallow": {"operator": "stack", "n_layer": 2}}
    model = Config.from_name(**MODEL, vocab_size=BASE.vocab_size)
    cost = {n: flops_per_token(dataclasses.replace(model, n_layer=n)).paper for n in (2, 4)}

    base, config = Origin(Path("base"), BASE, 7 * cost[4] * 64), comparison(tmp_path, arms=arms)

    steps = {name: arm_steps(config, name, base, base) for name in arms}

    assert steps == {"scratch": [27], "stack": [20], "shallow": [round(20 * cost[4] / cost[2])]}


def test_a_longer_base_leaves_less_and_hops_share_what_is_left(tmp_path):
    hops = [{"operator": "stack", "n_layer": 2, "share": 0.25}, {"operator": "stack"}]
    arms = {"scratch": {}, "late": {"operator": "stack", "base": {"max_steps": 20}}, "hops": {"stages": hops}}
    model = Config.from_name(**MODEL, vocab_size=BASE.vocab_size)
    cost = {n: 64 * flops_per_token(dataclasses.replace(model, n_layer=n)).paper for n in (2, 4)}
    base, late = (Origin(Path("base"), BASE, n * cost[4]) for n in (8, 13))
    config = comparison(tmp_path, arms=arms)

    assert arm_steps(config, "late", base, late) == [15]
    assert arm_steps(config, "hops", base, base) == [round(0.25 * 20 * cost[4] / cost[2]), 15]
    with pytest.raises(ValueError, match="arm 'late': after its base 0 FLOPs are left"):
        arm_steps(config, "late", base, Origin(Path("base"), BASE, 30 * cost[4]))


def test_an_arm_whose_base_is_the_model_already_is_refused(tmp_path):
    model = Config.from_name(**MODEL, vocab_size=BASE.vocab_size)
    base = Origin(Path("base"), model, 1e9)
    with pytest.raises(ValueError, match="arm 'stack' does not grow: its base has the sizes of the grown model"):
        arm_steps(comparison(tmp_path), "stack", base, base)


def test_a_base_of_unknown_cost_has_no_baseline(tmp_path):
    base = Origin(Path("base"), BASE, None)
    assert arm_steps(comparison(tmp_path), "stack", base, base) == [20]
    with pytest.raises(ValueError, match="nobody wrote down the FLOPs behind base, so scratch cannot be given as many"):
        arm_steps(comparison(tmp_path), "scratch", base, base)


def test_data_that_is_not_there_is_named(tmp_path):
    def planned(**settings: object) -> None:
        planned_runs(comparison(tmp_path, settings={**WHOLE["settings"], **settings}), 1)

    with pytest.raises(FileNotFoundError, match="data .*nowhere does not exist; make it with scripts/prepare.py"):
        planned(data={"train": {"a": str(tmp_path), "b": str(tmp_path / "nowhere")}})
    with pytest.raises(ValueError, match="does not say how many token ids there are; give a folder of scripts"):
        planned(data={"train": str(tmp_path)})
    with pytest.raises(ValueError, match=r"data.train=\[\] does not say"):
        planned()


@pytest.mark.parametrize(("code", "said"), [(EXIT_STOPPED, "stopped while"), (EXIT_USAGE, "refused")])
def test_a_stop_while_settings_are_checked_is_no_refusal(tmp_path, monkeypatch, capsys, code, said):
    run = PlannedRun(1, "scratch", {}, stages=(), tokens_per_step=64)
    monkeypatch.setattr(runs, "planned_runs", lambda *_: [run])
    monkeypatch.setattr(runs, "_pretrain", lambda *_: code)
    with pytest.raises(runs.RunFailed, match=f"exit code {code}"):
        runs.try_out(comparison(tmp_path), [1])
    assert f"seed 1 scratch: {said}" in capsys.readouterr().err


def write_run(folder: Path, name: str, loss: float, *, ended: bool = True, hops: tuple[int, ...] = (20,)) -> None:
    """A run that comes down to a loss along a power law, with the records that `rank` reads; steps of its stages."""
    folder.mkdir(parents=True)
    rest = {"step": 0, "stage": 2, "tokens": 0, "flops_total": 0.0, "set": "text", "metric": "loss"}
    evals = [] if name == "scratch" else [{"when": "start", "stage_name": "base", "value": loss + 1}]
    metrics, total = [], sum(hops)
    for number, steps in enumerate(hops):
        stage_name, done = name if number == len(hops) - 1 else f"{name}, hop {number + 1}", len(metrics)
        if name != "scratch":
            evals.append({"when": "after_growth", "stage_name": stage_name, "value": evals[-1]["value"] + 0.5})
        for step in range(done + 1, done + steps + 1):
            counts = {"step": step, "stage_step": step - done, "tokens": 64 * step, "flops_total": 1e6 * step}
            stage = {"stage": number + 2, "stage_name": stage_name, "seconds": step}
            metrics.append({**counts, **stage, "loss": loss * (total / step) ** 0.1})
        if number < len(hops) - 1:
            evals.append({"when": "before_growth", "stage_name": stage_name, "value": loss + 0.7})
    evals += [{"when": "end", "stage_name": name, "value": loss}] if ended else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (folder / "evals.jsonl").write_text("".join(json.dumps({**rest, **line}) + "\n" for line in evals))


@pytest.fixture
def ranked(tmp_path):
    """A comparison with these losses, by arm and seed."""

    def make(**losses: list[float]):
        arms = {name: {} if name == "scratch" else {"operator": name} for name in losses}
        seeds = list(range(1, len(next(iter(losses.values()))) + 1))
        config = comparison(tmp_path, arms=arms, seeds=seeds)
        for name, each in losses.items():
            for seed, loss in zip(seeds, each, strict=True):
                hops = (5, 15) if name == "gradual" else (20,)
                write_run(tmp_path / "out" / f"seed-{seed}" / name, name, loss, hops=hops)
        return rank(config)

    return make


def test_the_lowest_mean_comes_first_and_differences_are_taken_seed_by_seed(ranked):
    found = ranked(scratch=[4.0, 4.2, 4.1], stack=[3.5, 3.7, 3.6], interpolate=[3.6, 3.8, 3.7])

    assert [arm.name for arm in found.arms] == ["stack", "interpolate", "scratch"]
    stack, interpolate, scratch = found.arms
    assert stack.loss.mean == pytest.approx(3.6) and stack.loss.stderr == pytest.approx(0.1 / math.sqrt(3))
    assert interpolate.behind_best.mean == pytest.approx(0.1)
    assert interpolate.behind_best.stderr == pytest.approx(0, abs=1e-12)  # though the losses overlap
    assert interpolate.is_told_apart and stack.against_scratch.mean == pytest.approx(-0.5)
    assert stack.spike.mean == pytest.approx(0.5) and scratch.spike is None
    assert stack.speedup.mean == pytest.approx((4.1 / 3.6) ** 10 - 1, rel=0.15)


def test_what_chance_may_have_done_is_not_told_apart(ranked):
    found = ranked(scratch=[5.0, 5.4, 5.1], stack=[3.5, 3.9, 3.6], interpolate=[3.7, 3.6, 3.75])

    assert found.arms[1].name == "interpolate" and not found.arms[1].is_told_apart
    assert "Not told apart from it with 95 % confidence in all arms together: interpolate." in sentences(found)
    assert "stack ends lowest: 3.6667 ± 0.1202 nats per token (validation loss on text, 3 seeds)." in sentences(found)


def test_one_seed_has_no_error_and_says_so(ranked):
    found = ranked(scratch=[4.0], stack=[3.5])

    assert found.arms[0].loss.stderr is None and not found.arms[1].is_told_apart
    assert "One seed says nothing about chance; give several." in sentences(found)
    assert "±" not in table(found)


def test_an_arm_in_hops_has_the_curve_of_its_last_one_and_changes_no_other(ranked, tmp_path):
    losses = {"scratch": [4.0, 4.2], "stack": [3.5, 3.7]}
    alone = {arm.name: arm for arm in ranked(**losses).arms}
    shutil.rmtree(tmp_path / "out")

    found = {arm.name: arm for arm in ranked(**losses, gradual=[3.6, 3.8]).arms}

    assert found["stack"].speedup == alone["stack"].speedup
    assert found["gradual"].spike.mean == pytest.approx(0.5)


def test_the_more_arms_the_further_apart_they_must_be(ranked, tmp_path):
    losses = {"scratch": [4.0, 4.1, 4.05], "stack": [3.6, 3.8, 3.72]}
    assert ranked(**losses).arms[1].is_told_apart
    shutil.rmtree(tmp_path / "out")
    more = {name: [4.2, 4.3, 4.25] for name in ("interpolate", "zero-depth", "llama-pro", "gradual", "midas")}
    assert not {arm.name: arm for arm in ranked(**losses, **more).arms}["scratch"].is_told_apart


def test_in_how_many_seeds_the_first_beats_scratch_is_counted(ranked):
    found = ranked(scratch=[4.0, 4.0, 4.0, 4.0], stack=[3.0, 3.0, 3.0, 4.1])
    assert "lower in 3 of 4 seeds." in " ".join(sentences(found))


def test_an_arm_that_costs_more_is_named(ranked, tmp_path):
    found = ranked(scratch=[4.0, 4.1], stack=[3.5, 3.6], distill=[3.4, 3.5])
    dear = dataclasses.replace(found.arms[0], flops=2.5e7)
    assert "Not of equal FLOPs with the others: distill (2.5e+07)." in sentences(
        dataclasses.replace(found, arms=(dear, *found.arms[1:]))
    )


def test_a_run_that_has_not_come_to_its_end_is_an_error(tmp_path):
    config = comparison(tmp_path, seeds=[1, 2])
    for seed, name in ((1, "scratch"), (1, "stack"), (2, "scratch"), (2, "stack")):
        write_run(tmp_path / "out" / f"seed-{seed}" / name, name, 3.0, ended=(seed, name) != (2, "stack"))
    with pytest.raises(DataError, match="seed-2/stack has not come to its end"):
        rank(config)


def test_half_a_last_line_is_said_and_damage_or_other_data_is_an_error(ranked, tmp_path):
    losses = {"scratch": [4.0, 4.2], "stack": [3.5, 3.7]}
    folder, config = tmp_path / "out" / "seed-2" / "stack", comparison(tmp_path, seeds=[1, 2])
    ranked(**losses)
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"step": 21, "lo')
    assert sentences(rank(config))[-1] == "stack/metrics.jsonl: the last line is incomplete and was left out."

    evals = (folder / "evals.jsonl").read_text()
    (folder / "evals.jsonl").write_text(evals.replace('"metric"', '"data": "decafe", "metric"'))
    with pytest.raises(DataError, match="measured on 2 different sets called text: data was changed"):
        rank(config)
    (folder / "evals.jsonl").write_text(evals.replace("3.7", "NaN"))
    with pytest.raises(DataError, match="the loss of step 0 is nan; the run diverged"):
        rank(config)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match=r"has no metrics\.jsonl"):
        rank(config)


def test_intervals_are_students():
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t(0.975, 2 degrees)


def test_what_differs_from_a_finished_runs_settings_is_shown_with_both_values(tmp_path):
    arms = {"scratch": {}, "stack": {"operator": "stack", "learning_rate": 0.5}}
    settings = {**WHOLE["settings"], "model": {**MODEL, "vocab_size": BASE.vocab_size}}
    config = comparison(tmp_path, arms=arms, settings=settings)
    stack = planned_runs(config, 1)[-1]
    done = stack.folder(config) / "done.json"
    done.parent.mkdir(parents=True)
    settings = runs._as_trained(config, runs._own_settings(config, stack))
    done.write_text(json.dumps({"settings": settings}))
    assert runs.is_done(config, stack)

    del settings["stages"][1]["learning_rate"]
    done.write_text(json.dumps({"settings": {**settings, "seed": 7, "data": {"train": "x" * 300}}}))
    with pytest.raises(DataError) as refusal:
        runs.is_done(config, stack)

    assert str(refusal.value).splitlines() == [
        f"{done.parent} was trained with other settings; choose another out_dir, or remove it:",
        f"  data: {{'train': '{'x' * 49}... then, not set now",
        "  seed: 7 then, 1 now",
        "  stages[2].learning_rate: not set then, 0.5 now",
    ]


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_without_errors_or_sideways_scrolling(ranked, tmp_path, width):
    from grow.compare.page import render

    found = ranked(scratch=[4.0, 4.2, 4.1], stack=[3.5, 3.7, 3.6])
    page = render(found, {"command": "grow compare", "files": {"a.yaml": "x: " + "1" * 300}, "versions": {}})

    seen = look_at(page, width, tmp_path / "browser")

    assert seen["errors"] == [] and seen["content"] <= seen["width"] == width
    assert "stack ends lowest" in seen["text"]


def test_the_page_has_every_number_of_the_table_and_needs_nothing_else(ranked):
    from grow.compare.page import render
    from grow.compare.text import rows

    found = ranked(scratch=[4.0, 4.2, 4.1], stack=[3.5, 3.7, 3.6])
    page = render(found, {"command": "grow compare", "files": {"a.yaml": "x: 1"}, "versions": {"torch": "2.13.0"}})

    assert all(cell in page for row in rows(found) for cell in row)
    assert "http" not in page.replace("http://www.w3.org", "").replace("http-equiv", "")
