"""Runs from start to end in one process: stages, growth, records, the same numbers for every micro-batch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from lit_gpt.checkpoint import latest, read_training
from lit_gpt.config import Config
from lit_gpt.flops import count_parameters
from lit_gpt.settings_files import merge
from pretrain.parallel import find_cpp_compiler
from pretrain.run import run
from tests.pretrain.runs import records


@pytest.fixture
def finish(tmp_path, settings):
    """Run settings (with changes) to the end in this process; returns the run's folder."""

    def go(name="run", *flags, **changes):
        from pretrain.command_line import parse

        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(merge(settings, {"out_dir": str(tmp_path / name), **changes})))
        run(parse(["--config", str(path), *flags]), command=["pretrain"])
        return tmp_path / name

    return go


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(read_training(latest(folder / "checkpoints")).model)


def test_a_run_grows_between_its_stages_and_learns(finish):
    folder = finish()
    metrics = records(folder)
    assert [(m["stage_name"], m["stage_step"]) for m in metrics][5:7] == [("base", 6), ("grown", 1)]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    checkpoint = read_training(latest(folder / "checkpoints"))
    assert checkpoint.state["model_config"]["n_layer"] == 3
    assert checkpoint.state["grown_into_stage"] == 2
    assert [record["operator"] for record in checkpoint.state["history"]] == ["stack"]


def test_flops_and_positions_count_every_stage_at_its_own_price(finish):
    last = records(finish())[-1]
    sizes = {"block_size": 16, "vocab_size": 259, "n_head": 2, "n_embd": 16, "head_size": 8, "intermediate_size": 32}
    per_token = [6 * count_parameters(Config(n_layer=layers, **sizes)) for layers in (1, 3)]
    tokens_per_step = 4 * 16
    assert last["flops_total"] == tokens_per_step * (6 * per_token[0] + 8 * per_token[1])
    assert last["tokens"] == tokens_per_step * 14
    assert last["position"] == 4 * 14


def test_validation_is_measured_at_the_start_around_growth_in_between_and_at_the_end(finish):
    losses = [r for r in records(finish(), "evals.jsonl") if r["metric"] == "loss"]
    assert [(r["when"], r["step"], r["stage_name"]) for r in losses] == [
        ("start", 0, "base"),
        ("every", 4, "base"),
        ("before_growth", 6, "base"),
        ("after_growth", 6, "grown"),
        ("every", 8, "grown"),
        ("every", 12, "grown"),
        ("end", 14, "grown"),
    ]
    assert all(r["stderr"] > 0 and r["limit"] is None for r in losses)


def test_bits_per_byte_of_a_byte_tokenizer_is_the_loss_in_bits(finish):
    """Every byte token stands for one byte, so both count the same targets."""
    values = {(r["step"], r["when"], r["metric"]): r["value"] for r in records(finish(), "evals.jsonl")}
    for (step, when, metric), value in values.items():
        if metric == "bpb":
            assert value == pytest.approx(values[step, when, "loss"] / math.log(2), rel=1e-6)


def test_perplexity_is_the_exponential_of_the_loss(finish):
    values = {(r["step"], r["when"], r["metric"]): r["value"] for r in records(finish(), "evals.jsonl")}
    assert values[14, "end", "perplexity"] == pytest.approx(math.exp(values[14, "end", "loss"]))


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_the_micro_batch_size_changes_nothing_but_rounding(finish, micro_batch_size):
    reference = records(finish("reference"))
    other = records(finish("other", batch={"micro_batch_size": micro_batch_size}))
    assert [m["position"] for m in other] == [m["position"] for m in reference]
    assert [m["loss"] for m in other] == pytest.approx([m["loss"] for m in reference], rel=1e-4)


def test_two_runs_of_the_same_settings_are_identical(finish):
    first, second = finish("first"), finish("second")
    assert records(first) == records(second)
    assert all(torch.equal(a, final_weights(second)[name]) for name, a in final_weights(first).items())


def test_the_grown_stage_continues_the_data_where_the_base_stopped(finish):
    grown = records(finish("grown"))
    scratch = records(finish("scratch", stages=[{"name": "scratch", "max_steps": 14}]))
    assert [m["position"] for m in grown] == [m["position"] for m in scratch]


def test_the_baseline_spends_the_flops_of_all_stages_on_the_last_model(finish):
    stacked, scratch = records(finish("stacked")), records(finish("scratch", "--scratch"))
    assert {m["stage_name"] for m in scratch} == {"scratch"}
    one_step = scratch[0]["flops_total"]
    assert abs(scratch[-1]["flops_total"] - stacked[-1]["flops_total"]) <= one_step / 2


def test_moments_survive_growth_when_they_are_mapped(finish):
    def stages(policy):
        return [
            {"name": "base", "n_layer": 1, "max_steps": 6},
            {"name": "grown", "operator": "stack", "max_steps": 1, "optimizer_policy": policy},
        ]

    def adam_step(folder):
        optimizer = read_training(latest(folder / "checkpoints")).optimizer
        return {name: float(slots["step"]) for name, slots in optimizer.items()}

    assert set(adam_step(finish("reset", stages=stages("reset"))).values()) == {1.0}
    assert set(adam_step(finish("map", stages=stages("map"))).values()) == {7.0}
    mixed = adam_step(finish("mixed", stages=stages("map-old-zero-new")))
    assert mixed["transformer.h.0.norm_1.weight"] == 7.0
    assert mixed["transformer.h.2.norm_1.weight"] == 1.0


def test_a_run_grows_by_layers_that_are_made_from_two(finish, capsys):
    stages = [
        {"name": "base", "n_layer": 3, "max_steps": 2},
        {"name": "inserted", "n_layer": 4, "operator": "opt-deus", "max_steps": 2, "optimizer_policy": "map"},
        {"name": "predicted", "n_layer": 5, "operator": "lesa", "max_steps": 1},
    ]

    checkpoint = read_training(latest(finish(stages=stages) / "checkpoints"))

    assert [record["plan"]["fused_layers"] for record in checkpoint.state["history"]] == [[2], [3]]
    assert checkpoint.state["model_config"]["n_layer"] == 5
    out = capsys.readouterr().out
    assert "layer map 1 2 (2+3) 3, R_c 2/3" in out and "layer map 1 2 3 3+4 4, R_c 3/4" in out


def test_only_what_retention_names_stays(finish):
    folder = finish(checkpoints={"every_steps": 1, "keep_last": 2, "keep_every_steps": 5})
    steps = sorted(f"{p.parent.name}/{int(p.name[5:])}" for p in (folder / "checkpoints").glob("*/step-*"))
    assert steps == ["stage-01/5", "stage-01/6", "stage-02/10", "stage-02/13", "stage-02/14"]


@pytest.mark.slow
def test_a_checkpoint_that_was_grown_by_hand_is_trained_on_with_its_data_position(finish, tmp_path):
    from grow.apply import grow_checkpoint
    from grow.operators import plan_growth
    from lit_gpt.checkpoint import read_config

    base = finish("base", stages=[{"name": "base", "n_layer": 1, "max_steps": 6}])
    parent = latest(base / "checkpoints")
    grow_checkpoint(parent, tmp_path / "grown-ckpt", plan_growth("stack", read_config(parent), n_layer=3), "reset")
    stages = [{"name": "grown", "max_steps": 8}]
    by_hand = finish("by-hand", stages=stages, init_from=str(tmp_path / "grown-ckpt"))

    in_run = [m for m in records(finish("in-run")) if m["stage"] == 2]
    for key in ("loss", "position", "flops_total"):
        assert [m[key] for m in records(by_hand)] == [m[key] for m in in_run]
    assert len(read_training(latest(by_hand / "checkpoints")).state["history"]) == 1


def test_bf16_computation_keeps_fp32_weights_and_stays_close(finish):
    reference = records(finish("fp32", precision="fp32"))
    folder = finish("bf16", precision="bf16")
    assert {t.dtype for t in final_weights(folder).values()} == {torch.float32}
    assert [m["loss"] for m in records(folder)] == pytest.approx([m["loss"] for m in reference], rel=0.02)


@pytest.mark.slow
@pytest.mark.skipif(find_cpp_compiler() is None, reason="no C++ compiler to compile with")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks
def test_compiled_blocks_and_loss_agree_with_eager(finish):
    reference = records(finish("eager", compile="none"))
    compiled = records(finish("compiled", compile="block"))
    assert [m["loss"] for m in compiled] == pytest.approx([m["loss"] for m in reference], rel=1e-3)
