"""A run goes on in the data where another one stopped: its order, its position, and what may change on the way."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from grow.apply import grow_checkpoint
from grow.operators import plan_growth
from grow.samples import open_samples
from lit_gpt.checkpoint import latest, read_config, read_exchange, read_training, write_exchange
from lit_gpt.flops import Flops, flops_per_token
from lit_gpt.packed_dataset import write_token_file
from lit_gpt.settings_files import merge
from pretrain import loop, preflight
from pretrain import run as run_module
from pretrain.origin import inherit_history
from pretrain.state import TrainState
from tests.pretrain.conftest import write_prepared
from tests.pretrain.processes import run_on
from tests.toys import toy_config, toy_weights

BATCH = 4
"""Sequences per step of the runs here."""


@pytest.fixture(scope="session")
def two_sources(tmp_path_factory) -> dict[str, str]:
    """Two prepared folders of 112 samples each."""
    folder = tmp_path_factory.mktemp("two")
    random = np.random.default_rng(0)
    return {name: str(write_prepared(folder / name, random.integers(3, 259, 2000))) for name in ("slim", "star")}


@pytest.fixture
def base(settings, two_sources) -> dict[str, object]:
    """A run of four steps of one block on two weighted sources, with a checkpoint after every step."""
    changes = {
        "data": {"train": two_sources, "weights": {"slim": 3, "star": 1}},
        "stages": [{"name": "base", "n_layer": 1, "max_steps": 4}],
        "checkpoints": {"every_steps": 1, "keep_last": 9},
        "validation": {"every_steps": 0, "max_tokens": 32},
    }
    return {**settings, **changes}


def records(settings: dict, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (Path(settings["out_dir"]) / name).read_text().splitlines()]


def checkpoint(settings: dict) -> Path:
    return latest(Path(settings["out_dir"]) / "checkpoints")


def data_of(settings: dict) -> dict:
    return read_training(checkpoint(settings)).state["data"]


def cut_back_to(settings: dict, step: int) -> None:
    """As if the run had been killed after this step's checkpoint."""
    for path in (Path(settings["out_dir"]) / "checkpoints").glob("*/step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


def grown(settings: dict, tmp_path: Path) -> Path:
    path = tmp_path / "grown-checkpoint"
    grow_checkpoint(checkpoint(settings), path, plan_growth("stack", read_config(checkpoint(settings)), n_layer=3))
    return path


def next_run(base: dict, tmp_path: Path, parent: Path, n_layer: int = 3, **changes) -> dict:
    """Settings of a run that starts from a checkpoint and says nothing about the order of its data."""
    own = {
        "out_dir": str(tmp_path / "next"),
        "init_from": str(parent),
        "data": {"train": base["data"]["train"]},
        "stages": [{"name": "next", "n_layer": n_layer, "max_steps": 2}],
    }
    return merge({**base, **own}, changes)


def test_a_grown_run_starts_exactly_where_its_base_stopped(base, pretrain, batches_of, tmp_path):
    """With another global batch, another micro-batch, and the weights and skips that only the checkpoint knows."""
    base["data"] = {**base["data"], "skips": [[4, 9]]}
    assert pretrain(base).returncode == 0
    packed_rows = np.concatenate(batches_of)
    batches_of.clear()

    settings = next_run(base, tmp_path, grown(base, tmp_path), batch={"global_batch_size": 6, "micro_batch_size": 3})
    result = pretrain(settings)
    assert result.returncode == 0, result.stderr
    assert "data.weights as in init_from: {'slim': 3.0, 'star': 1.0}" in result.stdout
    assert "data.skips as in init_from: [[4, 9]]" in result.stdout
    assert [record["position"] for record in records(settings)] == [16 + 6, 16 + 12]
    assert [len(batch) for batch in batches_of] == [3, 3, 3, 3]

    whole = {**base, "out_dir": str(tmp_path / "whole"), "stages": [{"name": "all", "n_layer": 1, "max_steps": 7}]}
    continued_rows = np.concatenate([packed_rows, *batches_of])
    batches_of.clear()
    assert pretrain(whole).returncode == 0
    assert np.array_equal(np.concatenate(batches_of), continued_rows)
    then, now = data_of(base), data_of(settings)
    assert {key: now[key] for key in ("segments", "skips", "order_id")} == {
        key: then[key] for key in ("segments", "skips", "order_id")
    }


def test_a_run_that_took_its_order_over_resumes_without_its_parent(base, pretrain, tmp_path):
    assert pretrain(base).returncode == 0
    parent = shutil.copytree(checkpoint(base), tmp_path / "parent")
    settings = next_run(base, tmp_path, parent, n_layer=1)
    assert pretrain(settings).returncode == 0
    undisturbed = [record["loss"] for record in records(settings)]
    cut_back_to(settings, 1)
    shutil.rmtree(parent)
    result = pretrain(settings)
    assert result.returncode == 0, result.stderr
    assert [record["loss"] for record in records(settings)] == undisturbed


def test_a_checkpoint_in_exchange_form_carries_the_data_object_too(base, pretrain, tmp_path):
    assert pretrain(base).returncode == 0
    source = read_training(checkpoint(base))
    exchange = tmp_path / "exchange"
    provenance = {"history": [], "data": source.state["data"], "tokenizer": source.state["tokenizer"]}
    write_exchange(exchange, read_config(checkpoint(base)), source.model, provenance=provenance)
    grow_checkpoint(exchange, tmp_path / "grown", plan_growth("stack", read_config(exchange), n_layer=3))
    assert read_exchange(tmp_path / "grown").provenance["data"] == source.state["data"]
    settings = next_run(base, tmp_path, tmp_path / "grown")
    assert pretrain(settings).returncode == 0
    assert records(settings)[0]["position"] == 16 + BATCH


def test_sources_of_other_names_are_refused_with_the_ways_out(base, pretrain, two_sources, tmp_path):
    assert pretrain(base).returncode == 0
    renamed = {"a": two_sources["slim"], "b": two_sources["star"]}
    settings = {**next_run(base, tmp_path, checkpoint(base), 1), "data": {"train": renamed}}
    result = pretrain(settings)
    assert result.returncode == 2
    assert "['slim', 'star']" in result.stderr
    assert "data.train.NAME" in result.stderr
    assert pretrain(settings, "--data.start_position", "0").returncode == 0
    assert records(settings)[0]["position"] == BATCH


def test_another_order_than_the_parents_is_refused_by_field(base, pretrain, tmp_path):
    assert pretrain(base).returncode == 0
    settings = next_run(base, tmp_path, checkpoint(base), 1, data={"weights": {"slim": 1, "star": 1}})
    result = pretrain(settings)
    assert result.returncode == 2
    assert "data.segments" in result.stderr
    assert "allow_order_change" in result.stderr
    allowed = pretrain(settings, "--data.allow_order_change", "true")
    assert allowed.returncode == 0, allowed.stderr
    assert records(settings)[0]["position"] == 16 + BATCH


def test_samples_of_another_length_begin_a_new_phase_by_consent(base, pretrain, tmp_path):
    """Position 16 of one length is no place in an order of another."""
    assert pretrain(base).returncode == 0
    settings = next_run(base, tmp_path, checkpoint(base), 1, model={"block_size": 8})
    result = pretrain(settings)
    assert result.returncode == 2
    assert "data.block" in result.stderr
    allowed = pretrain(settings, "--data.allow_order_change", "true")
    assert allowed.returncode == 0, allowed.stderr
    assert "starts over at sample 0" in allowed.stderr
    assert "11.61% of slim, 2.68% of star" in allowed.stderr
    assert records(settings)[0]["position"] == BATCH


def test_a_first_sample_may_be_given_by_hand(base, pretrain, batches_of):
    assert pretrain(base).returncode == 0
    whole = np.concatenate(batches_of)
    batches_of.clear()
    assert pretrain(base, "--fresh", "--data.start_position", "8").returncode == 0
    assert [record["position"] for record in records(base)] == [12, 16, 20, 24]
    assert np.array_equal(np.concatenate(batches_of)[:8], whole[8:])


def test_what_the_base_read_counts_among_the_epochs(base, pretrain, tmp_path):
    """Two steps read 7 samples in 112 of 'slim', and the base 13."""
    assert pretrain(base).returncode == 0
    settings = next_run(base, tmp_path, checkpoint(base), 1, data={"max_epochs": 0.15})
    result = pretrain(settings)
    assert result.returncode == 2
    assert "'slim' 0.17 times (0.12 times before its start)" in result.stderr


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"weights": None, "segments": [(0, 3, 1), (8, 0, 1)]}, "data.segments"),
        ({"weights": {"slim": 1, "star": 3}}, "data.segments"),
        ({"skips": [[2, 5]]}, "data.skips"),
    ],
)
def test_the_past_of_the_order_may_not_change(base, pretrain, change, field):
    assert pretrain(base).returncode == 0
    cut_back_to(base, 3)
    result = pretrain({**base, "data": {**base["data"], **in_words(change)}})
    assert result.returncode == 2
    assert field in result.stderr


@pytest.mark.parametrize(
    ("change", "stays"),
    [
        ({"weights": None, "segments": [(0, 3, 1), (10, 0, 1)]}, (slice(0, 2), slice(0, 2))),
        ({"skips": [[8, 12]]}, (slice(0, 4), slice(4, 8))),
        ({"skips": [[10, 12]]}, (slice(0, 2), slice(0, 2))),
    ],
)
def test_the_future_of_the_order_may_change(base, pretrain, batches_of, change, stays):
    """Rows of the run from sample 8 on: `stays` are the same ones after and before the change."""
    assert pretrain(base).returncode == 0
    before = np.concatenate(batches_of)[8:]
    batches_of.clear()
    cut_back_to(base, 2)
    result = pretrain({**base, "data": {**base["data"], **in_words(change)}})
    assert result.returncode == 0, result.stderr
    after = np.concatenate(batches_of)
    assert np.array_equal(after[stays[0]], before[stays[1]])
    assert not np.array_equal(after, before)


def in_words(change: dict) -> dict:
    """(start, slim, star) -> a segment as it is written in a settings file."""
    if "segments" not in change:
        return change
    segments = [{"start": start, "weights": {"slim": a, "star": b}} for start, a, b in change["segments"]]
    return {**change, "segments": segments}


def test_a_windowed_run_resumes_to_the_bit(base, pretrain, batches_of, tmp_path):
    random = np.random.default_rng(1)
    for number in range(6):
        write_token_file(tmp_path / f"train_{number}.bin", random.integers(3, 259, 100), np.dtype("uint16"))
    base["data"] = {"train": {"files": str(tmp_path)}, "tokenizer": "bytes", "window": 2}
    assert pretrain(base).returncode == 0
    weights = dict(read_training(checkpoint(base)).model)
    whole = np.concatenate(batches_of)
    batches_of.clear()
    cut_back_to(base, 2)
    assert pretrain(base).returncode == 0
    assert np.array_equal(np.concatenate(batches_of), whole[8:])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in read_training(checkpoint(base)).model.items())
    result = pretrain({**base, "data": {**base["data"], "window": 3}})
    assert result.returncode == 2
    assert "data.window" in result.stderr


def test_a_step_that_failed_can_be_left_out_as_the_error_says(base, pretrain, batches_of, monkeypatch):
    """Its message counts as data.skips does, which is not as positions do where something is skipped already."""
    base["data"]["skips"] = [[2, 5]]
    base["guards"] = {"max_skipped_steps": 1}
    norms = iter([1.0, 1.0, math.nan])
    monkeypatch.setattr(loop, "clip_gradients", lambda *_: torch.tensor(next(norms, 1.0)))
    failed = pretrain(base)
    assert failed.returncode == 4
    assert f"pretrain data show {base['out_dir']} --step 3" in failed.stderr
    stretch = json.loads(re.search(r"add (\[\d+, \d+\]) to data.skips", failed.stderr)[1])
    assert stretch == [8 + 3, 12 + 3]
    bad_rows = {row.tobytes() for row in np.concatenate(batches_of[-2:])}
    batches_of.clear()
    base["data"]["skips"].append(stretch)
    assert pretrain(base).returncode == 0
    rows = [row.tobytes() for row in np.concatenate(batches_of)]
    assert len(rows) == 2 * BATCH and not bad_rows & set(rows)


def test_a_single_source_keeps_its_name_when_its_folder_moves(base, pretrain, data_command, tmp_path):
    old, new = tmp_path / "mv", tmp_path / "moved"
    write_prepared(old, np.random.default_rng(0).integers(3, 259, 2000))
    settings = {**base, "data": {"train": str(old)}}
    assert pretrain(settings).returncode == 0
    order_id = data_of(settings)["order_id"]
    cut_back_to(settings, 2)
    old.rename(new)
    shown = data_command("show", settings["out_dir"], "--step", "1", "--data.train", new)
    assert "verified against" in shown.stdout, shown.stderr
    result = pretrain({**settings, "data": {"train": str(new)}})
    assert result.returncode == 0, result.stderr
    assert data_of(settings)["order_id"] == order_id


def test_the_same_data_under_another_name_is_refused_with_the_flag_that_works(base, pretrain, two_sources):
    settings = {**base, "data": {"train": {"a": two_sources["slim"]}}}
    assert pretrain(settings).returncode == 0
    cut_back_to(settings, 2)
    renamed = {**settings, "data": {"train": {"b": two_sources["slim"]}}}
    result = pretrain(renamed)
    assert result.returncode == 2
    assert f"--data.train '{{a: {two_sources['slim']}}}'" in result.stderr
    assert "allow_order_change" not in result.stderr
    assert pretrain({**settings, "data": {"train": {"a": two_sources["slim"]}}}).returncode == 0


def test_the_settings_of_the_last_sitting_lie_in_the_folder(base, pretrain):
    assert pretrain(base).returncode == 0
    cut_back_to(base, 2)
    assert pretrain(base, "--data.max_epochs", "7").returncode == 0
    written = yaml.safe_load((Path(base["out_dir"]) / "config.yaml").read_text())
    assert written["data"]["max_epochs"] == 7


@pytest.mark.parametrize("flags", [("--seed", "9"), ("--data.weights", "{slim: 1, star: 1}")])
def test_a_dry_run_refuses_what_resuming_refuses(base, pretrain, flags):
    assert pretrain(base).returncode == 0
    cut_back_to(base, 2)
    before = sorted((path, path.stat().st_mtime_ns) for path in Path(base["out_dir"]).rglob("*"))
    dry = pretrain(base, *flags, "--dry-run")
    assert sorted((path, path.stat().st_mtime_ns) for path in Path(base["out_dir"]).rglob("*")) == before
    real = pretrain(base, *flags)
    assert (dry.returncode, dry.stderr) == (real.returncode, real.stderr)
    assert dry.returncode == 2


def test_show_counts_with_and_without_skipped_samples(base, pretrain, data_command):
    settings = merge(base, {"data": {"skips": [[2, 12]]}})
    assert pretrain(settings).returncode == 0
    shown = data_command("show", settings["out_dir"], "--step", "2")
    assert "samples 4 to 7 (14 to 17 of the order, skipped ones included)" in shown.stdout
    found = json.loads(data_command("show", settings["out_dir"], "--step", "2", "--json").stdout)
    assert (found["first_position"], found["order_start"], found["order_stop"]) == (4, 14, 18)


def test_a_start_beyond_the_data_is_named_first(base, pretrain):
    result = pretrain(base, "--data.start_position", "5000")
    assert result.returncode == 2
    assert "data.start_position=5,000 is too far" in result.stderr.splitlines()[0]


@pytest.mark.parametrize(
    ("flops_total", "expected"), [(100.0, 100.0), (None, 7.0)], ids=["known", "only that of its growths"]
)
def test_a_run_from_an_exchange_form_starts_at_what_is_known_of_its_cost(flops_total, expected):
    state = TrainState()
    first = {"tokens": None, "flops_total": None}  # written before growth could cost anything
    history = [first, {**first, "growth_flops": 4.0}, {"tokens": 5, "flops_total": flops_total, "growth_flops": 3.0}]

    inherit_history(state, {"history": history})

    assert (state.parent_flops.paper, state.parent_tokens) == (expected, 5)


@pytest.mark.parametrize("history", [[], [{"tokens": 5, "flops_total": 50.0, "growth_flops": 3.0}]])
def test_a_run_from_an_exchange_form_is_charged_what_was_trained_since_its_last_growth(history):
    state = TrainState()
    inherit_history(state, {"tokens": 9, "flops_total": 90.0, "history": history})
    assert (state.parent_flops.paper, state.parent_tokens) == (90.0, 9)


COST = {"tokens": 9, "flops_total": 90.0, "flops_model": 70.0, "flops_palm": 80.0}


def test_a_run_from_an_exchange_form_takes_over_all_three_counts_of_flops():
    state = TrainState()
    assert inherit_history(state, {**COST, "history": []}) == []
    assert dataclasses.astuple(state.parent_flops) == (90.0, 70.0, 80.0)


def test_a_count_of_flops_that_the_checkpoint_does_not_tell_is_said():
    state = TrainState()
    (line,) = inherit_history(state, {"tokens": 9, "flops_total": 90.0, "history": []})
    assert line.startswith("warning: ") and "flops_model" in line and "90 FLOPs" in line
    assert dataclasses.astuple(state.parent_flops) == (90.0, 0, 0)


def test_the_cost_of_a_growth_is_added_in_all_three_conventions(tmp_path):
    """Growth from data costs FLOPs; a parent in exchange form may know what lies behind it, or nothing at all."""
    config = toy_config()
    samples = open_samples(write_tokens(tmp_path), config)
    plan = plan_growth("learn-depth", config, n_layer=3, learn_steps=2, batch_size=2)
    spent = flops_per_token(plan.dst).times(2 * 2 * config.block_size)
    for name, cost in (("known", COST), ("foreign", {})):
        write_exchange(tmp_path / name, config, toy_weights(config), provenance=cost)
        grow_checkpoint(tmp_path / name, tmp_path / f"{name}-grown", plan, samples=samples)
        state, behind = TrainState(), Flops(*list(cost.values())[1:])

        assert inherit_history(state, read_exchange(tmp_path / f"{name}-grown").provenance) == []

        assert dataclasses.astuple(state.parent_flops) == pytest.approx(dataclasses.astuple(behind + spent))


def write_tokens(folder: Path) -> Path:
    write_token_file(folder / "tokens.bin", np.arange(400) % 19, np.dtype("u2"))
    return folder / "tokens.bin"


def test_a_runs_folder_means_its_latest_checkpoint_and_its_sizes_can_be_taken_over(base, pretrain, tmp_path):
    assert pretrain(base).returncode == 0
    run = next_run(base, tmp_path, Path(base["out_dir"]), n_layer=1, model={"name": "init_from"})

    result = pretrain(run)

    assert result.returncode == 0 and f"weights from {checkpoint(base)}, " in result.stdout


def late_save(base: dict) -> Callable[[], None]:
    """Hides the base's last checkpoint; what brings it back, as if the base had saved at that moment."""
    last = checkpoint(base)
    hidden = Path(last.rename(Path(base["out_dir"]) / "hidden"))
    return partial(bring_back, hidden, last)


def bring_back(hidden: Path, path: Path) -> None:
    if hidden.exists():
        hidden.rename(path)


def test_a_run_that_still_trains_is_taken_as_it_was_at_one_moment(base, pretrain, tmp_path, monkeypatch):
    assert pretrain(base).returncode == 0
    before, save = checkpoint(base).with_name("step-0000000003"), late_save(base)
    stage = {"distill_weight": 0.5, "teacher": base["out_dir"]}
    run = next_run(base, tmp_path, Path(base["out_dir"]), n_layer=1)
    run["stages"] = [{**run["stages"][0], **stage}]
    original = preflight.plan_stages
    monkeypatch.setattr(preflight, "plan_stages", lambda *arguments: save() or original(*arguments))

    result = pretrain(run)

    assert checkpoint(base).name == "step-0000000004"
    assert f"weights from {before}, data from sample {3 * BATCH}" in result.stdout
    assert f"teacher: {before}, " in result.stdout
    settings = yaml.safe_load((Path(run["out_dir"]) / "config.yaml").read_text())
    assert settings["init_from"] == settings["stages"][0]["teacher"] == base["out_dir"]
    assert "is finished" in pretrain(run).stdout, "the same command still names the same run"


def saving_after_the_first_looked(save: Callable[[], None]) -> None:
    original = run_module.preflight

    def preflight(*arguments, **keywords):
        plan = original(*arguments, **keywords)
        save()
        sys.stderr.write(f"from {plan.origin.name}, sample {plan.position}\n")
        return plan

    run_module.preflight = preflight


@pytest.mark.slow
def test_all_processes_take_the_same_checkpoint_of_a_run_that_still_trains(base, pretrain, tmp_path):
    assert pretrain(base).returncode == 0
    run = next_run(base, tmp_path, Path(base["out_dir"]), n_layer=1)
    run["data"] = {**run["data"], "weights": {"slim": 1, "star": 1}, "allow_order_change": True}
    started = run_on(run, 2, tmp_path / "two", prepare=partial(saving_after_the_first_looked, late_save(base)))
    expected = f"from step-0000000003, sample {3 * BATCH}\n"
    assert [expected in started.errors(rank) for rank in (0, 1)] == [True, True], started.errors(1)
    assert [started.errors(rank).count("warning: data.allow_order_change") for rank in (0, 1)] == [1, 0]


def test_a_teacher_may_be_a_runs_folder(base, pretrain, tmp_path):
    assert pretrain(base).returncode == 0
    stage = {"name": "pupil", "n_layer": 1, "max_steps": 2, "distill_weight": 0.5, "teacher": base["out_dir"]}

    result = pretrain({**base, "out_dir": str(tmp_path / "pupil"), "stages": [stage]})

    assert result.returncode == 0, result.stderr
    assert f"teacher: {checkpoint(base)}, weight 0.5 of the loss for 2 steps" in result.stdout


@pytest.mark.parametrize(("trainable", "said"), [("auto", True), ("new", False), ("all", False)])
def test_a_run_that_trains_more_than_the_paper_of_its_growth_says_so(base, pretrain, tmp_path, trainable, said):
    assert pretrain(base).returncode == 0
    plan = plan_growth("llama-pro", read_config(checkpoint(base)), n_layer=2)
    grow_checkpoint(checkpoint(base), tmp_path / "grown-checkpoint", plan)
    run = next_run(base, tmp_path, tmp_path / "grown-checkpoint", n_layer=2)
    run["stages"][0]["trainable"] = trainable

    result = pretrain(run, "--dry-run")

    assert result.returncode == 0, result.stderr
    assert ("grown by llama-pro" in result.stdout and "trainable: new" in result.stdout) is said
