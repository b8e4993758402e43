"""Muon for the matrices of blocks and AdamW for the rest: what each updates, skips, stores and passes on to growth."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from grow.grown import GrownOptimizer
from grow.operators import plan_growth
from lit_gpt.axes import layer_of, parameter_shapes
from lit_gpt.checkpoint import latest, read_training
from lit_gpt.settings_files import merge
from pretrain.command_line import parse
from pretrain.config import BatchConfig, OptimizerConfig, ParallelConfig
from pretrain.optim import (
    build_optimizer,
    load_named_state,
    named_state,
    set_learning_rate,
)
from pretrain.optimizers import ADAMW_SLOTS, MUON_SLOTS
from pretrain.parallel import check_world
from pretrain.run import run
from pretrain.world import World
from tests.pretrain.conftest import two_stages
from tests.pretrain.processes import run_on
from tests.pretrain.runs import assert_same_end, cut_off_after, records
from tests.pretrain.test_stages import StageConfig, run_config
from tests.toys import toy_config, toy_model, toy_tokens

MUON = OptimizerConfig(name="muon", learning_rate=1e-2)


def backward(model, seed=0):
    tokens = toy_tokens(model.config, seed=seed)
    model(tokens[:, :-1], tokens[:, 1:]).backward()


def stepped(optimizer, model, steps=1):
    for seed in range(steps):
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()
    return named_state(model, optimizer)


def is_matrix_of_a_block(name, parameter):
    return layer_of(name) is not None and parameter.dim() == 2


def test_matrices_of_blocks_have_one_moment_and_all_else_adamws():
    model = toy_model(toy_config(qkv_bias=True))
    state = stepped(build_optimizer(model, MUON), model)
    for name, parameter in model.named_parameters():
        expected = MUON_SLOTS if is_matrix_of_a_block(name, parameter) else ADAMW_SLOTS
        assert set(state[name]) == expected, name


def test_its_step_is_orthogonal_and_as_long_as_adamws():
    """The rate is scaled by 0.2 sqrt(larger side) (arXiv 2502.16982); Newton-Schulz leaves singular values near 1."""
    model = toy_model(toy_config())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stepped(build_optimizer(model, OptimizerConfig(name="muon", learning_rate=1e-2, weight_decay=0.0)), model)
    for name, parameter in model.named_parameters():
        if is_matrix_of_a_block(name, parameter):
            step = (parameter.detach() - before[name]) / (1e-2 * 0.2 * max(parameter.shape) ** 0.5)
            values = torch.linalg.svdvals(step)
            assert 0.6 < float(values.median()) and float(values.max()) < 1.4, name


def test_the_rest_is_stepped_as_by_adamw_alone():
    models = [toy_model(toy_config()) for _ in range(2)]
    for model, settings in zip(models, (OptimizerConfig(learning_rate=1e-2), MUON), strict=True):
        stepped(build_optimizer(model, settings), model)
    adamw, muon = (dict(model.named_parameters()) for model in models)
    for name, parameter in muon.items():
        assert torch.equal(parameter, adamw[name]) != is_matrix_of_a_block(name, parameter), name


def test_both_parts_follow_the_schedule():
    model = toy_model(toy_config())
    optimizer = build_optimizer(model, OptimizerConfig(name="muon", weight_decay=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    set_learning_rate(optimizer, 0.0)
    stepped(optimizer, model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_step_that_is_skipped_changes_no_bit():
    model = toy_model(toy_config())
    optimizer = build_optimizer(model, MUON)
    stepped(optimizer, model)

    def copied():
        state = named_state(model, optimizer)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        return weights | {f"{name}.{slot}": t.clone() for name, slots in state.items() for slot, t in slots.items()}

    for skipped in (True, False):
        before = copied()
        backward(model)
        optimizer.found_inf = torch.tensor(float(skipped))
        optimizer.step()
        optimizer.zero_grad()
        assert all(torch.equal(before[name], tensor) for name, tensor in copied().items()) == skipped


@pytest.mark.parametrize("names", [("adamw", "muon"), ("muon", "adamw")])
def test_another_optimizers_moments_are_left_out_and_fitting_ones_taken(names):
    source, target = (toy_model(toy_config()) for _ in range(2))
    state = stepped(build_optimizer(source, OptimizerConfig(name=names[0])), source)
    optimizer = build_optimizer(target, OptimizerConfig(name=names[1]))
    load_named_state(target, optimizer, state)
    taken = {name for name, p in target.named_parameters() if p in optimizer.state}
    assert taken == {name for name, p in target.named_parameters() if not is_matrix_of_a_block(name, p)}
    assert set(stepped(optimizer, target)) == set(dict(target.named_parameters()))


def test_growth_maps_its_moment_as_the_gradient():
    """Where the function is kept and copies share evenly, a copy's gradient is its share of the source's."""
    config = toy_config(n_embd=8, n_head=2, n_query_groups=2, intermediate_size=8)
    model = toy_model(config)
    state = stepped(build_optimizer(model, MUON), model)
    for operator, sizes in (("stack", {"n_layer": 4}), ("split-width", {"n_embd": 16})):
        plan = plan_growth(operator, config, **sizes)
        grown = GrownOptimizer(plan, state, "map")
        adamw_like = {
            name: {"exp_avg": slots["momentum_buffer"]} if "momentum_buffer" in slots else slots
            for name, slots in state.items()
        }
        as_exp_avg = GrownOptimizer(plan, adamw_like, "map")
        matrices = {
            name for name, shape in parameter_shapes(plan.dst).items() if layer_of(name) is not None and shape[1:]
        }
        for name in grown:
            if name in matrices:
                assert set(grown[name]) == MUON_SLOTS
                assert torch.equal(grown[name]["momentum_buffer"], as_exp_avg[name]["exp_avg"])
            else:
                assert set(grown[name]) == ADAMW_SLOTS


def test_new_parameters_get_the_slots_of_their_kind():
    config = toy_config()
    state = stepped(build_optimizer(model := toy_model(config), MUON), model)
    plan = plan_growth("zero-layer", config, n_layer=4)
    grown = GrownOptimizer(plan, state, "map")
    for name in ("transformer.h.3.attn.attn.weight", "transformer.h.3.norm_1.weight"):
        slots = grown[name]
        assert set(slots) == (MUON_SLOTS if "attn" in name else ADAMW_SLOTS)
        assert all(slots.spec(slot).shape == tuple(slots[slot].shape) for slot in slots)


@pytest.fixture
def go(tmp_path, prepared):
    def start(name, **changes):
        settings = merge(two_stages(tmp_path / name, prepared), {"optimizer": {"name": "muon"}, **changes})
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(settings))
        run(parse(["--config", str(path)]), command=["pretrain"])
        return tmp_path / name

    return start


MAPPED = [
    {"name": "base", "n_layer": 1, "max_steps": 6},
    {"name": "grown", "operator": "stack", "optimizer_policy": "map", "max_steps": 8},
]


def test_a_run_learns_with_it_and_resumes_to_the_bit(go):
    whole = go("whole", stages=MAPPED)
    losses = [line["loss"] for line in records(whole)]
    assert losses[-1] < losses[0] - 1.0

    with cut_off_after(9):
        go("stopped", stages=MAPPED)
    assert_same_end(go("stopped", stages=MAPPED), whole)
    stored = read_training(latest(whole / "checkpoints")).optimizer
    assert set(stored["transformer.h.0.attn.attn.weight"]) == MUON_SLOTS


def test_a_run_from_another_optimizers_checkpoint_says_that_moments_are_left_out(go, tmp_path, capsys):
    stages = [{"name": "base", "n_layer": 1, "max_steps": 2}]
    parent = go("parent", stages=stages, optimizer={"name": "adamw"})
    capsys.readouterr()
    go("child", stages=stages, init_from=str(latest(parent / "checkpoints")))
    assert "5 parameters start without moments" in capsys.readouterr().out


@pytest.mark.parametrize(("strategy", "size", "refused"), [("auto", 2, True), ("fsdp", 1, True), ("ddp", 2, False)])
def test_it_is_refused_where_no_process_has_a_whole_matrix(strategy, size, refused):
    config = run_config(StageConfig("main", max_steps=1), optimizer=MUON, parallel=ParallelConfig(strategy))
    config = dataclasses.replace(config, batch=BatchConfig(4, 1))
    if not refused:
        check_world(config, World(0, size))
        return
    with pytest.raises(ValueError, match="muon needs whole matrices.*--parallel.strategy ddp"):
        check_world(config, World(0, size))


@pytest.mark.slow
def test_replicated_it_has_the_losses_of_a_single_process(tmp_path, prepared):
    losses = []
    for size in (1, 2):
        settings = merge(two_stages(tmp_path / f"run {size}", prepared), {"optimizer": {"name": "muon"}})
        settings |= {"batch": {"global_batch_size": 4, "micro_batch_size": 1}, "parallel": {"strategy": "ddp"}}
        run_on(settings, size, tmp_path / f"of {size}")
        losses.append([line["loss"] for line in records(tmp_path / f"run {size}")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
