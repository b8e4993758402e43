"""AdamW with 8-bit moments: what it stores, how far it is from AdamW, what it skips and passes on.

Its step is torchao's, which compiles it; most tests have it run eagerly, as that takes a minute on a CPU.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from grow.grown import GrownOptimizer
from grow.operators import plan_growth
from lit_gpt.checkpoint import latest, read_training
from lit_gpt.memory import Computation, memory_per_device
from lit_gpt.settings_files import merge
from pretrain import parallel
from pretrain.command_line import parse
from pretrain.config import OptimizerConfig, ParallelConfig
from pretrain.optim import build_optimizer, load_named_state, named_state, set_learning_rate
from pretrain.optimizers import ADAMW_SLOTS, adamw8bit_missing
from pretrain.parallel import Compute, build_model, check_device, whole
from pretrain.run import run
from pretrain.validate_command import validate
from pretrain.world import ALONE, connected
from tests.pretrain.conftest import two_stages
from tests.pretrain.processes import run_on
from tests.pretrain.runs import assert_same_end, cut_off_after, records
from tests.pretrain.test_muon import stepped
from tests.pretrain.test_stages import StageConfig, run_config
from tests.toys import toy_config, toy_model, toy_tokens, toy_weights

# of blocks, all matrices have a multiple of 256 numbers and 4,096 at least; the embedding is too small
CONFIG = toy_config(n_embd=64, n_head=4, n_query_groups=4, intermediate_size=96)
ADAMW, EIGHT = (OptimizerConfig(name=name, learning_rate=1e-3) for name in ("adamw", "adamw8bit"))
ROUNDING = 0.03
"""Of moments, relative to their norm: a single one is off by up to a 14th."""


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao", reason="the fp8 extra is not installed")


@pytest.fixture
def eager(torchao):
    with torch.compiler.set_stance("force_eager"):
        yield


def off(found, expected):
    return float((found - expected).norm() / expected.norm())


def moments_off(found, expected, slot):
    return max(off(found[name][slot], expected[name][slot]) for name in expected)


def test_matrices_have_their_moments_in_a_byte_and_small_tensors_in_fp32(eager):
    model = toy_model(CONFIG)
    optimizer = build_optimizer(model, EIGHT)
    stepped(optimizer, model)
    for name, parameter in model.named_parameters():
        for slot in ("exp_avg", "exp_avg_sq"):
            moment = optimizer.state[parameter][slot]
            if parameter.numel() >= 4096:
                assert moment.codes.dtype == torch.uint8 and moment.scale.numel() == parameter.numel() / 256, name
            else:
                assert type(moment) is torch.Tensor and moment.dtype == torch.float32, name


def test_the_memory_estimate_knows_their_size(eager):
    config = dataclasses.replace(CONFIG, padded_vocab_size=64)
    model = toy_model(config)
    optimizer = build_optimizer(model, EIGHT)
    stepped(optimizer, model)
    slots = [optimizer.state[p][slot] for p in model.parameters() for slot in ("exp_avg", "exp_avg_sq")]
    parts = [part for slot in slots for part in ([slot.codes, slot.scale] if hasattr(slot, "codes") else [slot])]
    estimate = memory_per_device(config, Computation(2, "fp32", device="cpu", eight_bit=True)).moments
    assert sum(part.nbytes for part in parts) == pytest.approx(estimate, rel=0.05)


def test_its_steps_and_moments_are_adamws_within_the_rounding(eager):
    start = toy_weights(CONFIG)
    models = [toy_model(CONFIG) for _ in range(2)]
    expected, found = (stepped(build_optimizer(m, s), m, 5) for m, s in zip(models, (ADAMW, EIGHT), strict=True))
    assert set(found) == set(expected) and all(set(slots) == ADAMW_SLOTS for slots in found.values())
    assert all(torch.equal(found[name]["step"], expected[name]["step"]) for name in expected)
    assert 1e-4 < moments_off(found, expected, "exp_avg") < ROUNDING
    assert 1e-4 < moments_off(found, expected, "exp_avg_sq") < ROUNDING
    adamw, eight = (dict(model.named_parameters()) for model in models)
    for name, weight in start.items():
        assert off(eight[name].detach() - weight, adamw[name].detach() - weight) < 0.1, name


def test_it_follows_the_schedule_and_decays_what_adamw_decays(eager):
    model = toy_model(CONFIG)
    optimizer = build_optimizer(model, EIGHT)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for rate, moves in ((0.0, False), (1e-3, True)):
        set_learning_rate(optimizer, rate)
        stepped(optimizer, model)
        assert all(torch.equal(p, before[name]) != moves for name, p in model.named_parameters())


def test_a_step_that_is_skipped_changes_no_bit(eager):
    model = toy_model(CONFIG)
    optimizer = build_optimizer(model, EIGHT)
    stepped(optimizer, model)

    def copied():
        state = named_state(model, optimizer)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        return weights | {f"{name}.{slot}": slots[slot].clone() for name, slots in state.items() for slot in slots}

    for skipped in (True, False):
        before = copied()
        optimizer.found_inf = torch.tensor(float(skipped))
        stepped(optimizer, model)
        assert all(torch.equal(before[name], tensor) for name, tensor in copied().items()) == skipped


def test_moments_that_were_stored_come_back_to_the_bit(eager):
    source, target = toy_model(CONFIG), toy_model(CONFIG)
    first = build_optimizer(source, EIGHT)
    stored = stepped(first, source, 3)
    codes = [first.state[p]["exp_avg"].codes for p in source.parameters() if p.numel() >= 4096]
    assert any(bool((each.view(-1, 256).amin(1) == 0).any()) for each in codes), "no block ends below at -0.99"
    second = build_optimizer(target, EIGHT)
    target.load_state_dict(source.state_dict())
    assert load_named_state(target, second, stored) == 0
    for _ in range(2):
        one, other = named_state(source, first), named_state(target, second)
        assert all(torch.equal(one[name][slot], other[name][slot]) for name in one for slot in one[name])
        for model, optimizer in ((source, first), (target, second)):
            stepped(optimizer, model)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


@pytest.mark.parametrize(("before", "after"), [(EIGHT, ADAMW), (ADAMW, EIGHT)])
def test_adamw_and_it_take_over_each_others_moments(eager, before, after):
    source, target = toy_model(CONFIG), toy_model(CONFIG)
    state = stepped(build_optimizer(source, before), source, 3)
    optimizer = build_optimizer(target, after)
    assert load_named_state(target, optimizer, state) == 0
    taken = named_state(target, optimizer)
    for slot in ("exp_avg", "exp_avg_sq"):
        assert moments_off(taken, state, slot) < (1e-9 if after is ADAMW else ROUNDING)
    assert all(float(slots["step"]) == 4 for slots in stepped(optimizer, target).values())


@pytest.mark.parametrize("sizes", [{"n_layer": 4}, {"n_embd": 128}])
def test_growth_maps_the_moments_that_it_stores(eager, sizes):
    model = toy_model(CONFIG)
    state = stepped(build_optimizer(model, EIGHT), model)
    plain = {name: {slot: slots[slot] for slot in slots} for name, slots in state.items()}
    plan = plan_growth("stack" if "n_layer" in sizes else "split-width", CONFIG, **sizes)
    grown, expected = GrownOptimizer(plan, state, "map"), GrownOptimizer(plan, plain, "map")
    target = toy_model(plan.dst)
    optimizer = build_optimizer(target, EIGHT)
    assert load_named_state(target, optimizer, grown) == 0
    taken = named_state(target, optimizer)
    for slot in ("exp_avg", "exp_avg_sq"):
        assert all(torch.equal(grown[name][slot], expected[name][slot]) for name in expected)
        assert moments_off(taken, expected, slot) < ROUNDING


def test_sharded_it_stores_and_steps_as_alone(eager):
    alone = toy_model(CONFIG)
    expected = stepped(build_optimizer(alone, EIGHT), alone, 3)
    with connected(ALONE, "cpu", alone_too=True):
        parts = Compute("fp32", "none", ""), ParallelConfig("fsdp"), ALONE
        model = build_model(CONFIG, toy_weights(CONFIG), *parts, device=torch.device("cpu"))
        optimizer = build_optimizer(model, EIGHT)
        state = stepped(optimizer, model, 3)
        again = build_model(CONFIG, toy_weights(CONFIG), *parts, device=torch.device("cpu"))
        other = build_optimizer(again, EIGHT)
        load_named_state(again, other, state)
        loaded = named_state(again, other)
        for name, slots in expected.items():
            for slot in slots:
                assert torch.allclose(whole(state[name][slot]), slots[slot], rtol=1e-4, atol=1e-9), (name, slot)
                assert torch.equal(whole(loaded[name][slot]), whole(state[name][slot])), (name, slot)


def test_it_is_refused_without_the_package_and_on_a_cpu_without_a_compiler(monkeypatch):
    config = run_config(StageConfig("main", max_steps=1), optimizer=EIGHT, device="cpu")
    with monkeypatch.context() as patched:
        patched.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ValueError, match="adamw8bit needs the package torchao; pip install 'lit-grow.fp8.'"):
            check_device(config)
    pytest.importorskip("torchao", reason="the fp8 extra is not installed")
    monkeypatch.setattr("pretrain.optimizers.find_cpp_compiler", lambda: None)
    with pytest.raises(ValueError, match="adamw8bit compiles its step, which on a CPU needs a C.. compiler"):
        check_device(config)
    assert adamw8bit_missing("cuda") is None


WIDE = {"name": "2L64H", "block_size": 16, "n_head": 2, "intermediate_size": 96, "head_size": 32}
MAPPED = [
    {"name": "base", "n_layer": 1, "max_steps": 6},
    {"name": "grown", "operator": "stack", "optimizer_policy": "map", "max_steps": 6},
]


def wide_run(out_dir, data, **changes):
    eight_bit = {"model": WIDE, "stages": MAPPED, "optimizer": {"name": "adamw8bit"}}
    return merge(two_stages(out_dir, data), {**eight_bit, **changes})


@pytest.fixture
def go(tmp_path, prepared):
    def start(name, **changes):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(wide_run(tmp_path / name, prepared, **changes)))
        run(parse(["--config", str(path)]), command=["pretrain"])
        return tmp_path / name

    return start


@pytest.mark.slow
@pytest.mark.parametrize("in_background", [False, True])
def test_a_run_learns_with_it_and_resumes_to_the_bit(eager, go, monkeypatch, in_background):
    settings = {"checkpoints": {"every_steps": 2, "async_save": in_background}}
    whole_run = go("whole", **settings)
    losses = [line["loss"] for line in records(whole_run)]
    assert losses[-1] < losses[0] - 1.0

    with cut_off_after(9):
        go("stopped", **settings)
    assert_same_end(go("stopped", **settings), whole_run)
    monkeypatch.setattr(parallel, "adamw8bit_missing", lambda _: "is missing")
    assert validate(str(whole_run), [])  # where it cannot run
    stored = read_training(latest(whole_run / "checkpoints")).optimizer
    assert set(stored["transformer.h.0.attn.attn.weight"]) == ADAMW_SLOTS
    assert {slots[slot].dtype for slots in stored.values() for slot in slots} == {torch.float32}


def eagerly() -> None:
    torch.compiler.set_stance("force_eager")


@pytest.mark.slow
def test_two_processes_that_share_the_model_have_the_losses_of_one(torchao, tmp_path, prepared):
    losses = []
    for size in (1, 2):
        settings = wide_run(tmp_path / f"run {size}", prepared)
        settings |= {"batch": {"global_batch_size": 4, "micro_batch_size": 1}}
        run_on(settings, size, tmp_path / f"of {size}", prepare=eagerly)
        losses.append([line["loss"] for line in records(tmp_path / f"run {size}")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:OptimState8bit does not implement _stable_hash_for_caching")
def test_compiled_it_steps_as_eagerly(torchao):
    models = [toy_model(CONFIG) for _ in range(2)]
    with torch.compiler.set_stance("force_eager"):
        stepped(build_optimizer(models[0], EIGHT), models[0], 3)
    stepped(build_optimizer(models[1], EIGHT), models[1], 3)
    for (name, found), expected in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4), name


@pytest.mark.gpu
def test_on_a_gpu_it_steps_as_adamw_and_is_stored(torchao):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    device, found = torch.device("cuda"), []
    for settings in (ADAMW, EIGHT):
        model = build_model(
            CONFIG, toy_weights(CONFIG), Compute("fp32", "none", ""), ParallelConfig(), ALONE, device=device
        )
        optimizer = build_optimizer(model, settings)
        for seed in range(5):
            tokens = toy_tokens(CONFIG, seed=seed).to(device)
            model(tokens[:, :-1], tokens[:, 1:]).backward()
            optimizer.found_inf = torch.zeros((), device=device)
            optimizer.step()
            optimizer.zero_grad()
        state = named_state(model, optimizer)
        found.append({name: {slot: slots[slot].cpu() for slot in slots} for name, slots in state.items()})
    for slot in ("exp_avg", "exp_avg_sq"):
        assert moments_off(found[1], found[0], slot) < ROUNDING
