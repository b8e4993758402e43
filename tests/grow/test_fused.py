"""Layers made from two neighbours: aligned means that keep the function, predicted ones that are reproducible."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grow import fused
from grow.apply import GrownWeights, grow_checkpoint, grow_optimizer, grow_weights
from grow.check import zero_gradient
from grow.depth import lesa, opt_deus
from grow.operators import function_of, plan_growth
from grow.plan import SILENCED, GrowthPlan
from grow.prediction import Predictor, decompose
from grow.tensors import grown_weight
from grow.transport import ALIGNED_BY, align, aligned_mean
from lit_gpt.axes import AXES_IN_BLOCK, HEADS, INTERMEDIATE, QKV, layer_of, name_in_block, parameter_shapes, with_layer
from lit_gpt.checkpoint import read_exchange, write_exchange
from lit_gpt.config import Config
from lit_gpt.errors import DataError
from lit_gpt.model import GPT
from tests.toys import toy_config, toy_configs, toy_model, toy_tokens, toy_weights

DTYPES = [torch.float32, torch.bfloat16]
NORMS = ("norm_1.weight", "norm_2.weight")


def layer(weights: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """The parameters of a layer by their names in a block."""
    return {name_in_block(name): weight for name, weight in weights.items() if layer_of(name) == number}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(weight, b[name]) for name, weight in a.items())


def model_of(config: Config, weights: dict[str, Tensor]) -> GPT:
    model = GPT(config).to(weights["transformer.wte.weight"].dtype)
    model.load_state_dict(weights)
    return model


def reordered(part: str, weight: Tensor, order: dict[str, Tensor]) -> Tensor:
    for dim, axis in enumerate(AXES_IN_BLOCK[part]):
        weight = weight[(slice(None),) * dim + (order[axis],)] if axis in order else weight
    return weight


def any_order(config: Config, seed: int) -> dict[str, Tensor]:
    """Query groups, query heads in each of them and neurons in another order, by loops over heads."""
    random = torch.Generator().manual_seed(seed)
    size, per_group = config.head_size, config.q_per_kv
    qkv, heads = [], []
    for group in torch.randperm(config.n_query_groups, generator=random).tolist():
        slots = torch.randperm(per_group, generator=random).tolist()
        heads += [group * per_group + slot for slot in slots]
        qkv += [group * (per_group + 2) + slot for slot in (*slots, per_group, per_group + 1)]
    channels = {QKV: qkv, HEADS: heads}
    order = {axis: torch.tensor([i * size + d for i in units for d in range(size)]) for axis, units in channels.items()}
    return {**order, INTERMEDIATE: torch.randperm(config.intermediate_size, generator=random)}


def with_reordered_layer(weights: dict[str, Tensor], source: int, target: int, order) -> dict[str, Tensor]:
    """The layer `source` in another order, in the place of the layer `target`."""
    moved = {part: reordered(part, weight, order) for part, weight in layer(weights, source).items()}
    return {**weights, **{f"transformer.h.{target}.{part}": weight for part, weight in moved.items()}}


def test_new_layers_go_into_the_uppermost_gaps():
    assert opt_deus(6, 8) == lesa(6, 8) == (0, 1, 2, 3, 3, 4, 4, 5)
    assert opt_deus(2, 3) == (0, 0, 1) and opt_deus(1, 1) == (0,)
    layers = lesa(32, 48)
    assert [layer for layer in range(32) if layers.count(layer) == 2] == list(range(15, 31))
    for n_layer in (6, 7):
        with pytest.raises(ValueError, match=f"3 layers have 2 gaps: at most 5 layers, and not {n_layer}"):
            opt_deus(3, n_layer)


@given(toy_configs(), st.integers(0, 99))
def test_another_order_of_groups_heads_and_neurons_is_another_name_for_the_same_layer(config, seed):
    """What the next tests rest on: the orders that they make are symmetries of the model."""
    weights = toy_weights(config, dtype=torch.float64)
    moved = with_reordered_layer(weights, 0, 0, any_order(config, seed))
    idx = toy_tokens(config)[:, :-1]
    torch.testing.assert_close(model_of(config, moved)(idx), model_of(config, weights)(idx), rtol=1e-10, atol=1e-10)


@given(toy_configs(), st.integers(0, 99), st.sampled_from([*DTYPES, torch.float64]))
def test_the_aligned_mean_of_a_layer_and_its_reordered_self_is_the_layer(config, seed, dtype):
    weights = toy_weights(config, seed=seed, dtype=dtype)
    lower = layer(weights, 0)
    upper = {part: reordered(part, weight, any_order(config, seed)) for part, weight in lower.items()}

    alignment = align(lower, upper, config)

    for part in lower:
        mean = aligned_mean(f"transformer.h.0.{part}", lower[part], upper[part], alignment)
        assert torch.equal(mean, lower[part]) and mean.dtype == dtype, part


@given(toy_configs(), st.integers(0, 99))
def test_an_alignment_changes_the_order_of_a_layer_and_not_its_function(config, seed):
    weights = toy_weights(config, seed=seed, dtype=torch.float64)
    other = layer(toy_weights(config, seed=seed + 1, dtype=torch.float64), 0)

    moved = with_reordered_layer(weights, 0, 0, align(other, layer(weights, 0), config))

    idx = toy_tokens(config)[:, :-1]
    torch.testing.assert_close(model_of(config, moved)(idx), model_of(config, weights)(idx), rtol=1e-10, atol=1e-10)


@settings(max_examples=10)
@given(st.integers(0, 99))
def test_no_other_order_of_neurons_and_heads_is_cheaper(seed):
    config = toy_config(n_head=4, n_query_groups=2, intermediate_size=4)
    first, second = (layer(toy_weights(config, seed=s, dtype=torch.float64), 0) for s in (seed, seed + 1))

    def cost(order: dict[str, Tensor]) -> float:
        """Squared distances over all matrices of the layers."""
        return sum((first[part] - reordered(part, second[part], order)).square().sum().item() for part in ALIGNED_BY)

    def orders() -> list[dict[str, Tensor]]:
        found = []
        for groups, *slots in itertools.product(itertools.permutations(range(2)), *[((0, 1), (1, 0))] * 2):
            heads = [2 * group + slot for group, pair in zip(groups, slots, strict=True) for slot in pair]
            qkv = [4 * g + s for g, pair in zip(groups, slots, strict=True) for s in (*pair, 2, 3)]
            units = {HEADS: heads, QKV: qkv}
            found.append({a: torch.tensor([4 * i + d for i in u for d in range(4)]) for a, u in units.items()})
        return found

    found = align(first, second, config)

    neurons = [{INTERMEDIATE: torch.tensor(p)} for p in itertools.permutations(range(4))]
    assert cost({INTERMEDIATE: found[INTERMEDIATE]}) == pytest.approx(min(map(cost, neurons)))
    assert cost({axis: found[axis] for axis in (QKV, HEADS)}) == pytest.approx(min(map(cost, orders())))


@settings(max_examples=12)
@given(toy_configs(), st.data(), st.sampled_from(DTYPES))
def test_opt_deus_keeps_the_function_to_the_bit_and_zeroes_nothing_but_what_new_layers_write_with(config, data, dtype):
    n_layer = data.draw(st.integers(config.n_layer, 2 * config.n_layer - 1))
    plan = plan_growth("opt-deus", config, n_layer=n_layer)
    src = toy_weights(config, dtype=dtype)

    dst = grow_weights(plan, src)

    idx = toy_tokens(config)[:, :-1]
    assert torch.equal(model_of(plan.dst, dst)(idx), model_of(config, src)(idx)) and function_of(plan) == "bitwise"
    zero = {name for name, weight in dst.items() if not weight.any()}
    assert zero == {with_layer(part, number) for part in SILENCED for number in plan.fused_layers} & dst.keys()
    assert len(plan.fused_layers) == n_layer - config.n_layer and plan.identity_layers == plan.fused_layers
    for name in dst:
        if layer_of(name) not in plan.fused_layers:
            source = name if layer_of(name) is None else with_layer(name, plan.layer_map[layer_of(name)])
            assert torch.equal(dst[name], src[source]), name


@pytest.mark.parametrize("n_query_groups", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_a_new_layer_between_a_layer_and_its_reordered_self_is_that_layer_silenced(n_query_groups, tied):
    config = toy_config(n_query_groups=n_query_groups, tie_embeddings=tied)
    weights = toy_weights(config)
    weights = with_reordered_layer(weights, 0, 1, any_order(config, seed=3))

    grown = layer(grow_weights(plan_growth("opt-deus", config, n_layer=3), weights), 1)

    assert all(torch.equal(grown[part], layer(weights, 0)[part]) for part in grown if part not in SILENCED)


def test_a_new_layer_wakes_by_what_it_writes_with():
    plan = plan_growth("opt-deus", toy_config(n_layer=3), n_layer=5)
    tokens = toy_tokens(plan.src)
    model = model_of(plan.dst, grow_weights(plan, toy_weights(plan.src)))

    quiet = set(zero_gradient(model, tokens[:, :-1], tokens[:, 1:]))

    assert quiet == {
        name for name in model.state_dict() if layer_of(name) in (1, 3) and name_in_block(name) not in SILENCED
    }


@pytest.mark.parametrize("name", ["opt-deus", "lesa"])
def test_moments_of_layers_that_are_made_from_two_start_from_zero(name):
    plan = plan_growth(name, toy_config(n_layer=3), n_layer=4)
    moments = {
        param: {"exp_avg": weight, "exp_avg_sq": weight.square(), "step": torch.tensor(7.0)}
        for param, weight in toy_weights(plan.src).items()
    }

    grown = grow_optimizer(plan, moments, "map")

    assert {param: tuple(slots["exp_avg"].shape) for param, slots in grown.items()} == parameter_shapes(plan.dst)
    for param, slots in grown.items():
        if layer_of(param) == 2:
            assert not any(value.any() for value in slots.values())
        else:
            assert same(slots, moments[plan.source_of(param)])


def test_without_scipy_opt_deus_names_the_extra_before_anything_is_trained(monkeypatch):
    plan = plan_growth("opt-deus", toy_config(), n_layer=3)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "scipy.optimize", None)
        with pytest.raises(ValueError, match=r"lit-grow\[report\]"):
            grow_weights(plan, toy_weights(plan.src))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"lit-grow\[report\]"):
        plan_growth("opt-deus", toy_config(), n_layer=3)
    assert plan_growth("opt-deus", toy_config(), n_layer=2).is_identity, "nothing is matched"


def matrices_of(config: Config, part: str = "mlp.swiglu.w1.weight") -> list[Tensor]:
    weights = toy_weights(config, dtype=torch.float64)
    return [layer(weights, number)[part] for number in range(config.n_layer)]


@pytest.mark.parametrize("part", ["mlp.swiglu.w1.weight", "mlp.swiglu.w3.weight", "attn.proj.weight"])
def test_the_decomposition_is_that_of_all_matrices_side_by_side(part):
    matrices = matrices_of(toy_config(n_layer=4), part)

    directions, scales = decompose(matrices)
    found = Predictor(directions, scales, [])

    torch.testing.assert_close(scales.flip(0), torch.linalg.svdvals(torch.cat(matrices, dim=1)))
    slices = torch.cat([found.slice_of(matrix) for matrix in matrices], dim=1)
    torch.testing.assert_close(slices @ slices.T, torch.eye(len(scales), dtype=torch.float64), rtol=0, atol=1e-9)
    for matrix in matrices:
        torch.testing.assert_close(found.matrix_of(found.slice_of(matrix)), matrix, rtol=1e-9, atol=1e-9)


def test_directions_in_which_no_matrix_reaches_do_no_harm():
    """As many layers do not span more outputs than they have inputs."""
    matrices = [torch.randn(40, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    found = Predictor(*decompose(matrices), [])
    assert int((found.scales > 0).sum()) == 12
    for matrix in matrices:
        torch.testing.assert_close(found.matrix_of(found.slice_of(matrix)), matrix, rtol=1e-4, atol=1e-4)
    assert Predictor.fit(matrices, torch.Generator()).between(*matrices[:2]).isfinite().all()


def test_a_rule_across_depth_is_learned_and_holds_for_layers_that_were_not_seen():
    """W_l = A cos(2l) + B sin(2l): the sum of two neighbours is -0.83 times the layer, so their mean points away."""
    random = torch.Generator().manual_seed(1)
    a, b = (torch.randn(96, 16, generator=random) for _ in range(2))
    layers = [a * torch.cos(torch.tensor(2.0 * i)) + b * torch.sin(torch.tensor(2.0 * i)) for i in range(20)]
    seen, (below, wanted, above) = layers[:-3], layers[-3:]

    predicted = Predictor.fit(seen, torch.Generator().manual_seed(0)).between(below, above)

    def error(guess: Tensor) -> float:
        return ((guess - wanted).norm() / wanted.norm()).item()

    assert error(predicted) < 0.6 < min(error((below + above) / 2), error(torch.stack(seen).mean(0)), error(0 * wanted))


@pytest.mark.parametrize("n_query_groups", [1, 2, 4])
def test_a_seed_gives_the_same_predicted_layers_and_another_one_changes_their_matrices_only(n_query_groups):
    src = toy_config(n_layer=3, n_query_groups=n_query_groups, tie_embeddings=n_query_groups == 2)
    weights = toy_weights(src)

    def grown(seed: int, global_seed: int) -> dict[str, Tensor]:
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        made = grow_weights(plan_growth("lesa", src, n_layer=5, seed=seed), weights)
        assert torch.equal(torch.get_rng_state(), state), "the global random state is left alone"
        return made

    first, again, other = grown(1, 0), grown(1, 5), grown(2, 0)

    assert same(first, again)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed == {name for name in first if layer_of(name) in (1, 3) and name_in_block(name) not in NORMS}
    for part in NORMS:
        assert torch.equal(layer(first, 1)[part], (layer(weights, 0)[part] + layer(weights, 1)[part]) / 2)


def test_predicted_layers_act_and_every_parameter_gets_a_gradient():
    plan = plan_growth("lesa", toy_config(n_layer=3), n_layer=4)
    model = model_of(plan.dst, grow_weights(plan, toy_weights(plan.src)))
    tokens = toy_tokens(plan.src)
    gap = (model(tokens[:, :-1]) - toy_model(plan.src)(tokens[:, :-1])).abs().max()
    assert gap > 0.01 and function_of(plan) == "no"
    assert zero_gradient(model, tokens[:, :-1], tokens[:, 1:]) == []


@pytest.mark.parametrize("name", ["opt-deus", "lesa"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_in_which_tensors_are_asked_for_changes_nothing(name, dtype):
    plan = plan_growth(name, toy_config(n_layer=3), n_layer=4, seed=4)
    weights = toy_weights(plan.src, dtype=dtype)
    before = {name: weight.clone() for name, weight in weights.items()}

    forwards, lazy = grow_weights(plan, weights), GrownWeights(plan, weights)
    backwards = {name: lazy[name] for name in reversed(list(lazy))}
    one = grown_weight(plan, "transformer.h.2.attn.attn.weight", weights)

    assert same(forwards, backwards) and torch.equal(one, forwards["transformer.h.2.attn.attn.weight"])
    assert {weight.dtype for weight in forwards.values()} == {dtype}
    assert same(weights, before)
    storages = [weight.untyped_storage().data_ptr() for weight in [*weights.values(), *forwards.values()]]
    assert len(set(storages)) == len(storages)


def test_what_is_costly_is_made_once_per_pair_of_layers_and_per_kind_of_matrix(monkeypatch):
    aligned, fitted = [], []
    monkeypatch.setattr(fused, "align", lambda *args: aligned.append(1) or align(*args))
    monkeypatch.setattr(fused.Predictor, "fit", lambda *args: fitted.append(1) or Predictor(*decompose(args[0]), []))
    src = toy_config(n_layer=4)

    grow_weights(plan_growth("opt-deus", src, n_layer=6), toy_weights(src))
    assert len(aligned) == 2
    monkeypatch.setattr(Predictor, "between", lambda self, lower, upper: lower)
    grow_weights(plan_growth("lesa", src, n_layer=6), toy_weights(src))
    assert len(fitted) == 7, "q, k, v, o, gate, up and down"


@pytest.mark.parametrize("name", ["opt-deus", "lesa"])
def test_a_stored_plan_and_the_weights_give_the_grown_checkpoint_again(name, tmp_path):
    src = toy_config(vocab_size=20, n_layer=3)
    write_exchange(tmp_path / "src", src, toy_weights(src))
    plan = plan_growth(name, src, n_layer=5, seed=8)

    receipt = grow_checkpoint(tmp_path / "src", tmp_path / "dst", plan)

    found = read_exchange(tmp_path / "dst")
    stored = GrowthPlan.from_dict(json.loads((tmp_path / "dst" / "growth.json").read_text())["history"][0]["plan"])
    assert stored == plan and receipt["layer_map"] == [0, 0, 1, 1, 2] and receipt["reference"] is None
    assert same(dict(found.weights), grow_weights(stored, read_exchange(tmp_path / "src").weights))


def test_plans_stored_before_layers_were_made_from_two_can_still_be_read():
    plan = plan_growth("stack", toy_config(), factor=2)
    added = ("fusion", "fused_layers", "reference", "reference_layers")
    assert GrowthPlan.from_dict({key: value for key, value in plan.to_dict().items() if key not in added}) == plan


@pytest.mark.parametrize("name", ["opt-deus", "lesa"])
def test_weights_without_storage_can_be_grown_by_fusing_too(name):
    config = toy_config(n_layer=3)
    meta = {param: torch.empty(shape, device="meta") for param, shape in parameter_shapes(config).items()}
    grown = grow_weights(plan_growth(name, config, n_layer=4), meta)
    assert all(weight.is_meta for weight in grown.values())


@pytest.mark.parametrize("name", ["opt-deus", "lesa"])
def test_no_layer_is_made_from_what_is_no_number(name):
    config = toy_config(n_layer=3)
    weights = toy_weights(config)
    weights["transformer.h.1.mlp.swiglu.w1.weight"][0, 0] = float("nan")
    with pytest.raises(DataError, match="transformer.h.1.mlp.swiglu.w1.weight holds NaN"):
        grow_weights(plan_growth(name, config, n_layer=4), weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fused_layers": (1,)}, "fusion=None is no way to make layers from two; known: aligned, predicted"),
        ({"fusion": "averaged", "fused_layers": (1,)}, "fusion='averaged' is no way"),
        ({"fusion": "aligned", "fused_layers": (3,)}, "fused layer 3 .* above layer 1 of the source"),
        ({"fusion": "aligned", "fused_layers": (4,)}, r"fused layer 4 \(counted from 0\) is none of the 4 layers"),
        ({"fusion": "predicted", "fused_layers": (1,)}, "from a source of 3 layers or more, and it has 2"),
    ],
)
def test_plans_that_cannot_be_carried_out_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GrowthPlan("x", toy_config(), toy_config(n_layer=4), (0, 0, 1, 1), **changes)


def test_lesa_needs_three_layers():
    with pytest.raises(ValueError, match="3 layers or more, and it has 2; use opt-deus or interpolate"):
        plan_growth("lesa", toy_config(), n_layer=3)
