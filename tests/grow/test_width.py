"""Growth in width: functions kept where the rules say so and nowhere else, moments, symmetry, and no dead start."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grow import width_tensors
from grow.apply import grow_optimizer, grow_weights
from grow.check import zero_gradient
from grow.plan import GrowthPlan
from grow.width import (
    aki,
    aki_pro,
    fpi,
    hypercloning,
    lemon,
    random_width,
    split_width,
    staged_width,
    zero_width,
)
from grow.width_plan import WidthPlan, copy_numbers, from_runs, to_runs
from lit_gpt.axes import EMBEDDING, FINAL_NORM, HEAD, axes_of, layer_of, name_in_block, parameter_shapes
from lit_gpt.config import Config
from lit_gpt.model import GPT
from tests.toys import toy_config, toy_configs, toy_tokens, toy_weights

Operator = Callable[..., GrowthPlan]
OPERATORS: dict[str, Operator] = {
    "split": split_width,
    "zero": zero_width,
    "random": random_width,
    "fpi": fpi,
    "aki": aki,
    "aki_pro": aki_pro,
    "lemon": lemon,
    "hypercloning": hypercloning,
    "staged": staged_width,
}
PRESERVING: dict[str, Callable[[Config, Config], GrowthPlan]] = {
    "split M": split_width,
    "split M even": lambda src, dst: split_width(src, dst, shares="even"),
    "split M, any copies": lambda src, dst: split_width(src, dst, order="random", seed=3),
    "split E": lambda src, dst: split_width(src, dst, residual="E", adjust_eps=True),
    "zero M": zero_width,
    "zero Z": lambda src, dst: zero_width(src, dst, residual="Z", adjust_eps=True),
    "fpi M": fpi,
    "fpi E": lambda src, dst: fpi(src, dst, residual="E", adjust_eps=True),
    "lemon M": lemon,
    "lemon Z": lambda src, dst: lemon(src, dst, residual="Z", adjust_eps=True),
}
PRESERVING_MULTIPLES: dict[str, Callable[[Config, Config], GrowthPlan]] = {
    "split U": lambda src, dst: split_width(src, dst, residual="U"),
    "hypercloning": hypercloning,
    "hypercloning with noise": lambda src, dst: hypercloning(src, dst, twin_noise=0.316, seed=5),
}


def grown_config(src: Config, *, n_embd: int = 16, groups: int = 1, slots: int = 1, neurons: int = 24) -> Config:
    """`groups` and `slots` are factors: of the query groups, and of the query heads in each of them."""
    return dataclasses.replace(
        src,
        n_embd=n_embd,
        n_head=src.n_head * groups * slots,
        n_query_groups=src.n_query_groups * groups,
        intermediate_size=neurons,
    )


@st.composite
def growths(draw, n_embd=(16, 20, 24, 32, 40)) -> tuple[Config, Config]:
    """Multi-head, grouped and multi-query, tied or not, to widths that are multiples and that are none."""
    src = draw(toy_configs(max_layers=2))
    dst = grown_config(
        src,
        n_embd=draw(st.sampled_from(n_embd)),
        groups=draw(st.sampled_from([1, 2, 3])),
        slots=draw(st.sampled_from([1, 2])),
        neurons=draw(st.sampled_from([24, 30, 48])),
    )
    return src, dst


def spiky_weights(config: Config, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """As toy_weights, with the few large entries that trained weights have."""
    generator = torch.Generator().manual_seed(seed + 1)
    weights = toy_weights(config, seed=seed, dtype=torch.float64)
    for name, weight in weights.items():
        if weight.dim() == 2:
            weight[torch.rand(weight.shape, generator=generator) < 0.02] *= 6
        weights[name] = weight.to(dtype)
    return weights


def model_of(config: Config, weights: dict[str, Tensor]) -> GPT:
    model = GPT(config).to(weights[EMBEDDING].dtype)
    model.load_state_dict(weights, strict=True)
    return model


def grown_model(plan: GrowthPlan, weights: dict[str, Tensor]) -> GPT:
    return model_of(plan.dst, grow_weights(plan, weights))


def relative_gap(plan: GrowthPlan, dtype: torch.dtype = torch.float64, seed: int = 0) -> float:
    """Largest logit difference over the largest logit, or over 1 where logits are small."""
    weights = spiky_weights(plan.src, seed=seed, dtype=dtype)
    idx = toy_tokens(plan.src, seed=seed)[:, :-1]
    with torch.no_grad():
        before, after = model_of(plan.src, weights)(idx), grown_model(plan, weights)(idx)
    return ((after - before).abs().max() / before.abs().max().clamp(min=1)).item()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def gradients(model: GPT, tokens: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(model(tokens[:, :-1], tokens[:, 1:]), parameters), strict=True))


def moments_of(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {
        name: {"exp_avg": weight, "exp_avg_sq": weight.square(), "step": torch.tensor(9.0)}
        for name, weight in weights.items()
    }


def old_entries(plan: GrowthPlan) -> dict[str, Tensor]:
    """bool, for every parameter of the grown model: which entries have a source."""
    ones = {name: torch.ones(shape) for name, shape in parameter_shapes(plan.src).items()}
    grown = grow_optimizer(plan, moments_of(ones), "map")
    return {name: slots["exp_avg"] != 0 for name, slots in grown.items()}


DOUBLE = toy_config(), grown_config(toy_config(), n_embd=32, groups=2, neurons=48)
ODD = toy_config(), grown_config(toy_config(), n_embd=20, groups=2, neurons=30)
MORE_QUERIES = toy_config(), grown_config(toy_config(), n_embd=20, groups=2, slots=2, neurons=30)


@pytest.mark.parametrize("name", PRESERVING)
@settings(max_examples=7)
@given(growths(), st.integers(0, 3))
def test_the_function_is_kept_at_any_width(name, growth, seed):
    plan = PRESERVING[name](*growth)

    assert plan.width.is_exact(plan.src, plan.dst)
    assert relative_gap(plan, seed=seed) < 1e-10
    assert relative_gap(plan, torch.float32, seed) < 1e-4


@pytest.mark.parametrize("name", PRESERVING_MULTIPLES)
@settings(max_examples=6)
@given(growths(n_embd=(16, 32, 48)))
def test_the_function_is_kept_at_multiples_of_the_width(name, growth):
    plan = PRESERVING_MULTIPLES[name](*growth)

    assert plan.width.is_exact(plan.src, plan.dst)
    assert relative_gap(plan) < 1e-10
    assert relative_gap(plan, torch.float32) < 1e-4


@pytest.mark.parametrize(("tie", "n_query_groups", "factor"), [*itertools.product([False, True], [1, 2, 4], [2, 3])])
def test_staged_growth_keeps_the_function(tie, n_query_groups, factor):
    src = toy_config(tie_embeddings=tie, n_query_groups=n_query_groups)
    plan = staged_width(src, grown_config(src, n_embd=16 * factor, groups=factor, neurons=24 * factor))

    assert plan.width.is_exact(plan.src, plan.dst) and plan.width.stays_symmetric
    assert relative_gap(plan) < 1e-10
    assert relative_gap(plan, torch.float32) < 1e-4


@settings(max_examples=25)
@given(
    growths(),
    st.sampled_from(["M", "E", "bert2bert", "published"]),
    st.sampled_from([fpi, zero_width, split_width]),
    st.booleans(),
)
def test_a_plan_knows_whether_it_keeps_the_function(growth, rule, operator, adjust_eps):
    """The published norms fail except where they coincide with an exact rule."""
    plan = operator(*growth, residual=rule, adjust_eps=adjust_eps)

    if plan.width.is_exact(plan.src, plan.dst):
        assert relative_gap(plan) < 1e-10
    else:
        assert relative_gap(plan) > 1e-6


@pytest.mark.parametrize("operator", [fpi, split_width])
@pytest.mark.parametrize(("rule", "growth"), [("published", DOUBLE), ("published", ODD), ("bert2bert", ODD)])
def test_the_published_norms_change_the_function(operator, rule, growth):
    assert relative_gap(operator(*growth, residual=rule)) > 0.1


@pytest.mark.parametrize("tie", [False, True])
def test_copied_norms_are_exact_where_all_is_doubled_unless_the_head_is_tied(tie):
    src = toy_config(tie_embeddings=tie)
    plan = split_width(src, grown_config(src, n_embd=32), residual="bert2bert")

    assert plan.width.is_exact(plan.src, plan.dst) == (relative_gap(plan) < 1e-10) == (not tie)


@pytest.mark.parametrize("growth", [DOUBLE, ODD])
def test_zero_padding_by_the_published_gamma_is_exact_only_with_its_own_eps(growth):
    kept, adjusted = (zero_width(*growth, residual="published", adjust_eps=adjust) for adjust in (False, True))

    assert adjusted.dst.norm_eps == pytest.approx(1e-5 * 16 / growth[1].n_embd)
    assert relative_gap(adjusted) < 1e-10 < 1e-6 < relative_gap(kept) < 2e-2
    assert adjusted.width.is_exact(*growth[:1], adjusted.dst) and not kept.width.is_exact(*growth)


@pytest.mark.parametrize("operator", [random_width, aki, aki_pro])
@pytest.mark.parametrize("growth", [DOUBLE, ODD])
def test_new_knowledge_changes_the_function(operator, growth):
    plan = operator(*growth)
    assert not plan.width.is_exact(*growth)
    assert relative_gap(plan) > 0.1


@pytest.mark.parametrize("name", OPERATORS)
@settings(max_examples=6)
@given(growths(n_embd=(32, 48)), st.data())
def test_a_grown_state_dict_is_that_of_a_fresh_model_and_owns_its_storage(name, growth, data):
    src, dst = growth
    if name == "staged":
        dst = grown_config(src, n_embd=32, groups=2, neurons=48)
    plan = OPERATORS[name](src, dst, seed=data.draw(st.integers(0, 3)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    weights, before = toy_weights(src, dtype=dtype), toy_weights(src, dtype=dtype)

    grown = grow_weights(plan, weights)

    assert {key: tuple(weight.shape) for key, weight in grown.items()} == parameter_shapes(plan.dst)
    assert all(weight.dtype == dtype and weight.isfinite().all() for weight in grown.values())
    assert GPT(plan.dst).load_state_dict(grown, strict=True) and plan.dst == dst
    storages = [weight.untyped_storage().data_ptr() for weight in [*weights.values(), *grown.values()]]
    assert len(set(storages)) == len(storages)
    assert same(weights, before)
    assert same(grown, grow_weights(plan, weights)), "the same seed gives the same bits"


@pytest.mark.parametrize("name", OPERATORS)
def test_another_seed_changes_only_what_is_drawn(name):
    first, second = (OPERATORS[name](*DOUBLE, seed=seed) for seed in (0, 1))
    weights = toy_weights(first.src)
    a, b = grow_weights(first, weights), grow_weights(second, weights)

    changed = {name_in_block(key) for key in a if not torch.equal(a[key], b[key])}

    matrices = {name_in_block(key) for key, weight in a.items() if weight.dim() == 2}
    assert changed == {
        "split": matrices - {EMBEDDING},
        "lemon": matrices - {EMBEDDING},
        "zero": matrices - {EMBEDDING},
        "random": matrices,
        "hypercloning": set(),
        "staged": set(),
    }.get(name, changed)
    if name in ("fpi", "aki", "aki_pro"):
        assert changed == set(map(name_in_block, a)), "which channels are copied is drawn, and reaches everything"


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("tie", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_growing_to_the_same_size_is_the_identity(name, tie, dtype):
    src = toy_config(tie_embeddings=tie)
    plan = OPERATORS[name](src, src, seed=4)
    weights = spiky_weights(src, dtype=dtype)

    assert plan.is_identity and same(grow_weights(plan, weights), weights)
    moments = moments_of(weights)
    assert all(same(slots, moments[key]) for key, slots in grow_optimizer(plan, moments, "map").items())


def test_weights_without_storage_can_be_grown_too():
    src, dst = toy_config(n_layer=1), dataclasses.replace(DOUBLE[1], n_layer=1)
    meta = {name: torch.empty(shape, device="meta") for name, shape in parameter_shapes(src).items()}
    for operator in (split_width, random_width):
        assert all(weight.is_meta for weight in grow_weights(operator(src, dst), meta).values())


@settings(max_examples=6)
@given(growths(), st.sampled_from(["split", "zero", "fpi"]))
def test_width_and_depth_commute_and_fit_one_plan(growth, name):
    src, wide = growth
    layers = (*range(src.n_layer), *range(src.n_layer))
    kwargs = {"shares": "even"} if name == "split" else {}
    deep = GrowthPlan("stack", src, dataclasses.replace(src, n_layer=len(layers)), layers)
    deep_after = GrowthPlan("stack", wide, dataclasses.replace(wide, n_layer=len(layers)), layers)
    both = dataclasses.replace(wide, n_layer=len(layers))
    weights = spiky_weights(src)

    at_once = grow_weights(OPERATORS[name](src, both, layer_map=layers, **kwargs), weights)
    depth_first = grow_weights(OPERATORS[name](deep.dst, both, **kwargs), grow_weights(deep, weights))
    width_first = grow_weights(deep_after, grow_weights(OPERATORS[name](src, wide, **kwargs), weights))

    assert same(at_once, depth_first)
    if name != "zero":
        assert same(at_once, width_first)
    idx = toy_tokens(src)[:, :-1]
    torch.testing.assert_close(model_of(both, width_first)(idx), model_of(both, at_once)(idx), rtol=1e-10, atol=1e-10)


def test_lemon_grows_in_depth_too_and_further_copies_of_a_layer_write_nothing():
    src = toy_config()
    plan = lemon(src, dataclasses.replace(grown_config(src, n_embd=24, groups=2), n_layer=5))

    assert plan.layer_map == (0, 0, 0, 1, 1) and plan.identity_layers == (1, 2, 4)
    assert relative_gap(plan) < 1e-10


def test_lemon_copies_the_residual_stream_as_often_as_it_fits_and_pads_the_rest():
    plan = lemon(toy_config(), grown_config(toy_config(), n_embd=40))

    assert plan.width.channels == (*range(16), *range(16), *[None] * 8)


def test_a_width_plan_gives_new_layers_the_initial_weights_of_the_grown_sizes():
    src, wide = DOUBLE
    plan = split_width(src, dataclasses.replace(wide, n_layer=3), layer_map=(0, None, 1))
    plan = dataclasses.replace(plan, identity_layers=(1,))

    assert relative_gap(plan) < 1e-10


# Moments


EVEN: dict[str, Callable[[Config, Config], GrowthPlan]] = {
    "split M": lambda src, dst: split_width(src, dst, shares="even"),
    "split E": lambda src, dst: split_width(src, dst, shares="even", residual="E", adjust_eps=True),
    "zero M": zero_width,
    "zero Z": lambda src, dst: zero_width(src, dst, residual="Z", adjust_eps=True),
    "fpi M": fpi,
}


@pytest.mark.parametrize("name", EVEN)
@settings(max_examples=6)
@given(growths())
def test_mapped_moments_are_the_gradients_of_the_grown_model(name, growth):
    assert_moments_are_gradients(EVEN[name](*growth))


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("operator", [hypercloning, staged_width])
@pytest.mark.parametrize("factor", [2, 3])
def test_mapped_moments_of_cloned_models_are_the_gradients_too(operator, tie, factor):
    src = toy_config(tie_embeddings=tie)
    assert_moments_are_gradients(
        operator(src, grown_config(src, n_embd=16 * factor, groups=factor, neurons=24 * factor))
    )


def assert_moments_are_gradients(plan: GrowthPlan) -> None:
    weights, tokens = spiky_weights(plan.src), toy_tokens(plan.src)
    before = gradients(model_of(plan.src, weights), tokens)
    after = gradients(grown_model(plan, weights), tokens)

    mapped = grow_optimizer(plan, moments_of(before), "map")

    for name, old in old_entries(plan).items():
        torch.testing.assert_close(mapped[name]["exp_avg"][old], after[name][old], rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(mapped[name]["exp_avg_sq"], mapped[name]["exp_avg"].square())
        assert not mapped[name]["exp_avg"][~old].any()
        assert mapped[name]["step"] == 9


def test_doubling_halves_first_moments_and_quarters_second_ones_but_for_the_head():
    ones = moments_of({name: torch.ones(shape) for name, shape in parameter_shapes(DOUBLE[0]).items()})
    for operator in (hypercloning, staged_width):
        for name, slots in grow_optimizer(operator(*DOUBLE), ones, "map").items():
            expected = 1.0 if name == HEAD else 0.5
            assert slots["exp_avg"].eq(expected).all() and slots["exp_avg_sq"].eq(expected**2).all(), name


def test_zero_padding_by_rule_m_keeps_moments_but_for_writers_and_norms():
    ones = moments_of({name: torch.ones(shape) for name, shape in parameter_shapes(DOUBLE[0]).items()})
    plan = zero_width(*DOUBLE)
    old = old_entries(plan)
    for name, slots in grow_optimizer(plan, ones, "map").items():
        written = name_in_block(name) in (EMBEDDING, "attn.proj.weight", "mlp.swiglu.w3.weight")
        expected = 2**-0.5 if written else 2**0.5 if len(axes_of(name)) == 1 else 1.0
        torch.testing.assert_close(slots["exp_avg"][old[name]].unique(), torch.tensor([expected]))


@pytest.mark.parametrize("growth", [DOUBLE, ODD, MORE_QUERIES])
def test_further_copies_of_channels_forget_under_map_old_zero_new(growth):
    plan = fpi(*growth)
    ones = moments_of({name: torch.ones(shape) for name, shape in parameter_shapes(plan.src).items()})
    first_of = first_rows(plan.width, plan.src.head_size)

    grown, all_mapped = (grow_optimizer(plan, ones, policy) for policy in ("map-old-zero-new", "map"))

    for name, shape in parameter_shapes(plan.dst).items():
        first = torch.ones(shape, dtype=torch.bool)
        for dim, axis in enumerate(axes_of(name)):
            first &= first_of[axis].view([-1 if dim == other else 1 for other in range(len(shape))])
        assert torch.equal(grown[name]["exp_avg"], all_mapped[name]["exp_avg"] * first), name
        assert grown[name]["step"] == 9 and all_mapped[name]["exp_avg"].all()


# Training afterwards


def step(model: GPT, optimizer: torch.optim.Optimizer, tokens: Tensor) -> dict[str, Tensor]:
    """One update; returns the gradients it was made with."""
    optimizer.zero_grad()
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def twins_apart(plan: GrowthPlan) -> dict[str, float]:
    """After one AdamW step of 1e-3 the largest difference between two copies of a neuron, and of a query head."""
    model = grown_model(plan, spiky_weights(plan.src))
    step(model, torch.optim.AdamW(model.parameters(), lr=1e-3), toy_tokens(plan.src))
    weights = model.state_dict()
    found = {}
    for name, half in (("mlp.swiglu.w1.weight", 24), ("attn.attn.weight", plan.src.qkv_size)):
        weight = weights[f"transformer.h.0.{name}"]
        found[name] = (weight[:half] - weight[half:]).abs().max().item()
    return found


def test_one_step_separates_copies_with_random_shares_and_no_step_those_with_even_ones():
    apart = twins_apart(split_width(*DOUBLE))
    assert all(difference > 1e-3 for difference in apart.values()), apart
    assert all(difference > 1e-3 for difference in twins_apart(hypercloning(*DOUBLE, twin_noise=0.3)).values())

    even = split_width(*DOUBLE, shares="even")
    assert even.width.stays_symmetric and not split_width(*DOUBLE).width.stays_symmetric
    assert not zero_width(*DOUBLE).width.stays_symmetric, "there are no copies"
    assert not hypercloning(*DOUBLE, twin_noise=0.3).width.stays_symmetric
    assert fpi(*DOUBLE).width.stays_symmetric and not aki(*DOUBLE).width.stays_symmetric
    assert all(difference < 1e-9 for difference in twins_apart(even).values())


@pytest.mark.parametrize(("n_query_groups", "tie"), [(1, True), (4, False)])
@pytest.mark.parametrize(
    "sizes",
    [
        {"n_embd": 32, "groups": 2, "neurons": 48},
        {"n_embd": 24, "slots": 2, "neurons": 30},
        {"n_embd": 20},
        {"neurons": 48},
        {"groups": 2},
        {"slots": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("operator", [zero_width, random_width, lemon])
def test_every_new_row_and_column_gets_a_gradient_within_two_steps(operator, sizes, n_query_groups, tie):
    src = toy_config(tie_embeddings=tie, n_query_groups=n_query_groups)
    plan = operator(src, grown_config(src, **sizes))
    model, tokens = grown_model(plan, spiky_weights(src)), toy_tokens(src, n_rows=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reached = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in parameter_shapes(plan.dst).items()}

    for _ in range(3):
        for name, gradient in step(model, optimizer, tokens).items():
            reached[name] |= gradient != 0

    assert not zero_gradient(model, tokens[:, :-1], tokens[:, 1:])
    for name, old in old_entries(plan).items():
        new = ~old
        for dim in range(new.dim()):
            if name != EMBEDDING or dim == 0:  # rows of tokens that do not occur get no gradient, grown or not
                lines = new.any(dim) if new.dim() == 2 else new
                assert (reached[name] & new).any(dim)[lines].all() if new.dim() == 2 else reached[name][new].all(), name


# What the matrices look like


def test_zero_padding_has_zero_lower_left_blocks_and_norms_that_can_train():
    plan = zero_width(*DOUBLE)
    weights = toy_weights(plan.src)
    grown = grow_weights(plan, weights)

    for name, weight in grown.items():
        if weight.dim() == 1:
            assert weight[16:].eq(1).all()
            continue
        rows, columns = weights[name].shape
        lower_left, upper_right = weight[rows:, :columns], weight[:rows, columns:]
        if name == EMBEDDING:
            assert not upper_right.any()
            continue
        assert not lower_left.any(), name
        assert upper_right.all(), name
        assert name == HEAD or weight[rows:, columns:].all(), name


def test_new_query_heads_in_an_old_group_are_closed_and_random_inside():
    src = toy_config(n_query_groups=1)
    plan = zero_width(src, grown_config(src, n_embd=32, slots=2))

    grown = grow_weights(plan, toy_weights(src))

    assert not grown["transformer.h.0.attn.proj.weight"][:, 16:].any()
    assert grown["transformer.h.0.attn.attn.weight"][16:32].all()


@pytest.mark.parametrize("factor", [2, 3])
def test_hypercloning_tiles(factor):
    src = toy_config()
    plan = hypercloning(src, grown_config(src, n_embd=16 * factor, groups=factor, neurons=24 * factor))
    weights = toy_weights(src, dtype=torch.float64)

    for name, weight in grow_weights(plan, weights).items():
        before = weights[name]
        if name in (EMBEDDING, HEAD):
            expected = before.repeat(1, factor) / (1 if name == EMBEDDING else factor)
        else:
            expected = before.repeat(factor, factor) / factor if before.dim() == 2 else before.repeat(factor)
        torch.testing.assert_close(weight, expected)


def test_hypercloning_leaves_a_single_key_value_head_single():
    src = toy_config(n_query_groups=1)
    plan = hypercloning(src, grown_config(src, n_embd=32, slots=2, neurons=48))
    weights = toy_weights(src, dtype=torch.float64)
    name = "transformer.h.1.attn.attn.weight"

    grown = grow_weights(plan, weights)[name]

    queries, keys_and_values = weights[name][:16], weights[name][16:]
    torch.testing.assert_close(grown, torch.cat([queries, queries, keys_and_values]).repeat(1, 2) / 2)


def test_twin_noise_is_opposite_on_twins_and_as_large_as_asked():
    quiet, noisy = (hypercloning(*DOUBLE, twin_noise=share) for share in (0.0, 0.3))
    weights = toy_weights(quiet.src, dtype=torch.float64)
    before, after = grow_weights(quiet, weights), grow_weights(noisy, weights)

    for name in before:
        noise = after[name] - before[name]
        if name == EMBEDDING or noise.dim() == 1:
            assert not noise.any(), name
        else:
            one, other = noise.chunk(2, dim=1)
            torch.testing.assert_close(one, -other, msg=name)
            ratio = noise.square().mean().sqrt() / before[name].square().mean().sqrt()
            assert ratio.item() == pytest.approx(0.3, rel=0.15), name


def test_staged_growth_is_block_diagonal():
    plan = staged_width(*DOUBLE)
    weights = toy_weights(plan.src, dtype=torch.float64)

    for name, weight in grow_weights(plan, weights).items():
        before = weights[name]
        if before.dim() == 1:
            expected = before.repeat(2)
        elif layer_of(name) is None:
            expected = before.repeat(1, 2) / (1 if name == EMBEDDING else 2)
        else:
            expected = torch.block_diag(before, before)
        assert torch.equal(weight, expected), name


def first_rows(width: WidthPlan, head_size: int) -> dict[str, Tensor]:
    """bool, axis -> which entries are the first copy of what they copy."""
    queries = len(width.slots)
    group_is_first = torch.tensor(copy_numbers(width.groups)) == 0
    slot_is_first = torch.tensor([*(number == 0 for number in copy_numbers(width.slots)), True, True])
    units = group_is_first[:, None] & slot_is_first
    return {
        "embd": torch.tensor(copy_numbers(width.channels)) == 0,
        "intermediate": torch.tensor(copy_numbers(width.neurons)) == 0,
        "qkv": units.flatten().repeat_interleave(head_size),
        "heads": units[:, :queries].flatten().repeat_interleave(head_size),
        "vocab": torch.ones(1, dtype=torch.bool),
    }


@pytest.mark.parametrize("growth", [DOUBLE, ODD, MORE_QUERIES])
def test_copied_outputs_come_from_the_next_layer_under_aki(growth):
    plan, plain = aki(*growth, seed=2), fpi(*growth, seed=2)
    weights = toy_weights(plan.src, dtype=torch.float64)
    grown, expanded = grow_weights(plan, weights), grow_weights(plain, weights)
    first_of = first_rows(plan.width, plan.src.head_size)

    for name, weight in grown.items():
        if layer_of(name) != 0 or weight.dim() == 1:
            assert torch.equal(weight, expanded[name]), f"{name} is as in fpi"
            continue
        first = first_of[axes_of(name)[0]]
        following = expanded[name.replace("h.0", "h.1")]
        assert torch.equal(weight[first], expanded[name][first]) and torch.equal(weight[~first], following[~first])


def test_aki_pro_interpolates_and_copies_query_heads_in_their_group():
    src = toy_config()
    plan = aki_pro(src, dataclasses.replace(grown_config(src, n_embd=24, slots=2), n_layer=4))

    assert plan.layer_map == (0, 0, 1, 1)
    assert plan.width.groups == (0, 1) and plan.width.slots[:2] == (0, 1) and set(plan.width.slots) == {0, 1}


@given(st.integers(0, 5))
def test_shares_are_random_per_weight_and_sum_to_one(seed):
    ones = {name: torch.ones(shape, dtype=torch.float64) for name, shape in parameter_shapes(DOUBLE[0]).items()}

    grown = grow_weights(split_width(*DOUBLE, seed=seed, residual="U"), ones)

    for name, weight in grown.items():
        if weight.dim() == 2 and name != EMBEDDING:
            one, other = weight.chunk(2, dim=1)
            torch.testing.assert_close(one + other, torch.ones_like(one), rtol=1e-12, atol=0)
            assert 0.05 / 1.1 < weight.min() and one.std() > 0.1, name


def test_a_matrix_of_many_blocks_of_rows_is_grown_as_well(monkeypatch):
    monkeypatch.setattr(width_tensors, "BLOCK_ENTRIES", 100)
    for name in ("split M", "zero M", "lemon M"):
        assert relative_gap(PRESERVING[name](*ODD)) < 1e-10
    assert_moments_are_gradients(fpi(*ODD))
    assert_moments_are_gradients(zero_width(*ODD))
    ones = {name: torch.ones(shape) for name, shape in parameter_shapes(DOUBLE[0]).items()}
    head = grow_weights(split_width(*DOUBLE), ones)[HEAD]
    assert len(head.unique(dim=0)) == len(head), "every block of rows draws its own shares"


def test_bfloat16_is_computed_in_float32_and_rounded_once():
    plan = split_width(*ODD, seed=1)
    weights = toy_weights(plan.src, dtype=torch.bfloat16)
    wide = grow_weights(plan, {name: weight.float() for name, weight in weights.items()})

    for name, weight in grow_weights(plan, weights).items():
        assert torch.equal(weight, wide[name].bfloat16()), name


# Plans


@pytest.mark.parametrize("name", OPERATORS)
def test_a_width_plan_survives_json(name):
    plan = OPERATORS[name](*DOUBLE, seed=3)
    assert GrowthPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@given(st.lists(st.one_of(st.none(), st.integers(0, 9))))
def test_maps_are_stored_as_runs(entries):
    assert list(from_runs(json.loads(json.dumps(to_runs(entries))))) == entries


def test_a_cyclic_map_is_stored_in_few_numbers():
    assert to_runs((0, 1, 2, 3, 0, 1, None, None)) == [[0, 4], [0, 2], [None, 2]]


def test_a_stored_width_plan_with_other_keys_is_refused():
    stored = split_width(*DOUBLE).to_dict()
    stored["width"]["chanels"] = stored["width"].pop("channels")
    with pytest.raises(ValueError, match="unknown key 'chanels'; did you mean 'channels'") as failure:
        GrowthPlan.from_dict(stored)
    assert "key 'channels' is missing" in str(failure.value)


@pytest.mark.parametrize(
    ("operator", "changes", "message"),
    [
        (split_width, {"n_embd": 12}, r"residual channels \(n_embd\) shrink from 16 to 12"),
        (zero_width, {"intermediate_size": 20}, r"neurons \(intermediate_size\) shrink from 24 to 20"),
        (fpi, {"n_query_groups": 4}, r"query heads per group .* shrink from 2 to 1"),
        (lemon, {"n_embd": 32, "head_size": 8}, "head_size changes from 4 to 8, and rotary positions depend on it"),
        (split_width, {"n_embd": 32, "norm_eps": 1e-6}, "norm_eps changes from 1e-05 to 1e-06; keep it"),
        (split_width, {"n_embd": 32, "block_size": 32}, "block_size changes from 16 to 32, but this growth keeps it"),
        (split_width, {"tie_embeddings": True}, "tie_embeddings changes from False to True"),
        (split_width, {"n_layer": 4}, "layer map has 2 layers, but n_layer=4"),
        (hypercloning, {"n_embd": 24}, "n_embd=16 does not divide 24; use 16 or 32, or split-width"),
        (staged_width, {"n_embd": 32}, "block-diagonal growth multiplies n_embd, n_query_groups and intermediate_size"),
        (
            staged_width,
            {"n_embd": 32, "n_head": 16, "n_query_groups": 4, "intermediate_size": 48},
            "block-diagonal growth multiplies n_embd, n_query_groups and intermediate_size by one factor",
        ),
    ],
)
def test_sizes_that_cannot_be_grown_to_are_refused(operator, changes, message):
    src = toy_config(head_size=4)
    with pytest.raises(ValueError, match=message):
        operator(src, dataclasses.replace(src, **changes))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("U", "rule U needs equally many copies"),
        ("Z", "rule Z needs equally many copies"),
        ("mean", "unknown rule 'mean'; known: M, U, E, Z, bert2bert, published"),
    ],
)
def test_rules_that_do_not_fit_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        split_width(*ODD, residual=rule)


def test_rule_u_refuses_new_channels_and_an_unknown_order_is_named():
    with pytest.raises(ValueError, match="rule U needs a whole factor, and n_embd=16 grows to 32"):
        zero_width(*DOUBLE, residual="U")
    with pytest.raises(ValueError, match="unknown order 'shuffled'; known: cyclic, random"):
        split_width(*DOUBLE, order="shuffled")


def test_neurons_that_could_never_train_are_refused():
    src = toy_config()
    dst = grown_config(src, neurons=26)
    maps = {"channels": range(16), "groups": range(2), "slots": range(2), "neurons": [*range(24), None, None]}

    with pytest.raises(ValueError, match="never train where n_embd does not grow.*use fill='closed'"):
        GrowthPlan("x", src, dst, (0, 1), width=WidthPlan(**maps, fill="block"))


def test_a_map_that_loses_or_invents_a_channel_is_refused():
    src = toy_config()
    maps = {"channels": range(16), "groups": range(2), "slots": range(2), "neurons": [*range(23), 22]}

    with pytest.raises(ValueError, match="must have every index from 0 to 23 and no other; look at 23"):
        GrowthPlan("x", src, src, (0, 1), width=WidthPlan(**maps))
    with pytest.raises(ValueError, match="has 23 entries, but the grown model has 24"):
        GrowthPlan("x", src, src, (0, 1), width=WidthPlan(**{**maps, "neurons": range(23)}))


def test_the_tied_final_norm_makes_up_for_copies_in_the_shared_matrix():
    src = toy_config(tie_embeddings=True)
    plan = split_width(src, grown_config(src, n_embd=32))
    weights = toy_weights(src, dtype=torch.float64)

    grown = grow_weights(plan, weights)

    torch.testing.assert_close(grown[FINAL_NORM], weights[FINAL_NORM].repeat(2) / 2)
    torch.testing.assert_close(grown[EMBEDDING], weights[EMBEDDING].repeat(1, 2))
