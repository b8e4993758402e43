"""Growth by learned mixing matrices: where it starts, what is learned, and that the tensors are those that computed."""

from __future__ import annotations

import dataclasses
import math
from itertools import repeat

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grow.apply import grow_weights
from grow.learned import DEPTH_RATE, WIDTH_RATE, LearnedGrowth, default_rate, learn
from grow.mixing import PARTS, parts_of, weights_of
from grow.operators import plan_growth
from grow.plan import GrowthPlan
from grow.sizes import with_depth
from lit_gpt.axes import parameter_shapes
from lit_gpt.errors import DataError, NonFiniteError
from lit_gpt.model import GPT
from tests.toys import toy_config, toy_configs, toy_model, toy_tokens, toy_weights

LEARNED = [
    ("learn-depth", {"n_layer": 5}),
    ("learn-width", {"n_embd": 24}),
    ("learn-width", {"n_layer": 3, "n_embd": 24}),
    ("learn-width", {"intermediate_size": 40}),
]


def plan_of(name: str = "learn-depth", request: dict[str, int] | None = None, *, seed: int = 0, **sizes) -> GrowthPlan:
    return plan_growth(name, toy_config(**sizes), seed=seed, **(request or {"n_layer": 5}))


def stacked(src, n_layer: int) -> GrowthPlan:
    return GrowthPlan("partial", src, with_depth(src, n_layer), tuple(i % src.n_layer for i in range(n_layer)))


def plain(plan: GrowthPlan, weights: dict[str, torch.Tensor]) -> GPT:
    model = GPT(plan.dst).to(next(iter(weights.values())).dtype)
    model.load_state_dict(weights)
    return model


@given(toy_configs(3), st.integers(0, 4), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_in_depth_learning_starts_from_the_stacked_model(src, more, dtype):
    weights = toy_weights(src, dtype=dtype)
    n_layer = src.n_layer + more

    found = LearnedGrowth(plan_growth("learn-depth", src, n_layer=n_layer), weights).materialise()

    expected = grow_weights(stacked(src, n_layer), weights)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], weight) and found[name].dtype == dtype for name, weight in expected.items())


@given(st.lists(st.integers(0, 2), min_size=4, max_size=5))
def test_one_hot_matrices_give_any_layer_map(layers):
    src = toy_config(n_layer=3)
    growth = LearnedGrowth(plan_growth("learn-depth", src, n_layer=len(layers)), toy_weights(src))

    growth.load_state_dict({f"depth.{part}": torch.eye(3)[layers] for part in PARTS})

    expected = grow_weights(plan_growth("partial", src, layer_map=layers), toy_weights(src))
    assert all(torch.equal(weight, expected[name]) for name, weight in growth.materialise().items())


def test_every_kind_of_weight_has_a_matrix_of_its_own():
    src = toy_config()
    growth = LearnedGrowth(plan_growth("learn-depth", src, n_layer=3), toy_weights(src))
    before = growth.materialise()
    for part in PARTS:
        with torch.no_grad():
            growth.depth[part][2] = torch.tensor([0.25, 0.5])
            changed = {name for name, weight in growth.materialise().items() if not torch.equal(weight, before[name])}
            growth.depth[part][2] = torch.tensor([1.0, 0.0])
        assert len(changed) == 1 and next(iter(changed)).startswith("transformer.h.2.")


@pytest.mark.parametrize(("name", "request_"), LEARNED)
@pytest.mark.parametrize("tied", [False, True])
def test_only_the_mixing_matrices_are_parameters_and_all_of_them_get_gradients(name, request_, tied):
    plan = plan_of(name, request_, tie_embeddings=tied)
    growth = LearnedGrowth(plan, toy_weights(plan.src))
    tokens = toy_tokens(plan.src)
    source = {name: buffer.clone() for name, buffer in growth.named_buffers()}

    growth(tokens[:, :-1], tokens[:, 1:]).backward()
    torch.optim.AdamW(growth.parameters()).step()

    names = {name for name, _ in growth.named_parameters()}
    assert names == set(growth.state_dict()) and all(name.partition(".")[0] in ("depth", "width") for name in names)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in growth.parameters())
    assert all(torch.equal(buffer, source[name]) for name, buffer in growth.named_buffers())
    assert not any(buffer.requires_grad for buffer in growth.buffers())


def test_there_is_a_matrix_for_what_grows_and_none_for_what_stays():
    def names(request: dict[str, int], **sizes: int) -> set[str]:
        plan = plan_of("learn-width", request, **sizes)
        return {name for name, _ in LearnedGrowth(plan, toy_weights(plan.src)).named_parameters()}

    in_depth = {f"depth.{part}" for part in ("q", "k", "v", "o", "w1", "w2", "w3", "norm_1", "norm_2")}
    assert names({"n_layer": 3}) == in_depth
    assert names({"n_embd": 24}) == {"width.embd", "width.q", "width.k", "width.v", "width.mlp"}
    assert names({"intermediate_size": 25}) == {"width.mlp"}
    assert names({"n_embd": 32}, n_query_groups=1) == {"width.embd", "width.q", "width.mlp"}
    assert names({"n_layer": 3, "intermediate_size": 25}) == {*in_depth, "width.mlp"}


@pytest.mark.parametrize(("name", "request_"), LEARNED)
@pytest.mark.parametrize(("n_query_groups", "tied"), [(1, False), (2, True), (4, False)])
def test_what_is_materialised_computes_what_the_matrices_do(name, request_, n_query_groups, tied):
    plan = plan_of(name, request_, n_query_groups=n_query_groups, tie_embeddings=tied)
    weights = toy_weights(plan.src, dtype=torch.float64)
    growth = LearnedGrowth(plan, weights)
    tokens = toy_tokens(plan.src)
    learn(growth, repeat(tokens), steps=2)

    model = plain(plan, growth.materialise())

    idx, targets = tokens[:, :-1], tokens[:, 1:]
    with torch.no_grad():
        assert torch.equal(growth(idx), model(idx))
        assert torch.equal(growth(idx, targets, reduction="none"), model(idx, targets, reduction="none"))
        assert torch.equal(growth(idx, targets, separator_id=3), model(idx, targets, separator_id=3))
    assert {name: tuple(weight.shape) for name, weight in model.state_dict().items()} == parameter_shapes(plan.dst)


def test_materialised_tensors_share_no_storage_and_leave_source_and_matrices_alone():
    plan = plan_of()
    weights = toy_weights(plan.src)
    growth = LearnedGrowth(plan, weights)
    first = growth.materialise()

    assert len({weight.untyped_storage().data_ptr() for weight in first.values()}) == len(first)
    kept = {name: weight.clone() for name, weight in first.items()}
    for weight in (*first.values(), *weights.values()):
        weight.zero_()
    assert all(torch.equal(weight, kept[name]) for name, weight in growth.materialise().items())


@pytest.mark.parametrize(("name", "request_"), LEARNED[:3])
def test_learning_lowers_the_loss_and_the_same_seed_gives_the_same_bits(name, request_):
    plan = plan_of(name, request_)

    def run(seed: int) -> tuple[list[float], dict[str, torch.Tensor]]:
        growth = LearnedGrowth(dataclasses.replace(plan, seed=seed), toy_weights(plan.src))
        return learn(growth, repeat(toy_tokens(plan.src)), steps=15), growth.materialise()

    (losses, first), (_, again), (_, other) = run(0), run(0), run(1)

    assert len(losses) == 15 and losses[-1] < losses[0] - 0.05
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = name == "learn-width"
    assert any(not torch.equal(first[name], other[name]) for name in first) is drawn


def test_matrices_are_restored_by_name_and_the_next_step_is_the_same():
    plan = plan_of("learn-width", {"n_layer": 3, "n_embd": 24})
    weights, tokens = toy_weights(plan.src), toy_tokens(plan.src)
    growth = LearnedGrowth(plan, weights)
    learn(growth, repeat(tokens), steps=3)

    restored = LearnedGrowth(dataclasses.replace(plan, seed=9), weights)
    restored.load_state_dict({name: value.clone() for name, value in growth.state_dict().items()})

    assert all(torch.equal(weight, restored.materialise()[name]) for name, weight in growth.materialise().items())


def test_the_inner_model_may_compute_in_bf16_while_the_matrices_are_fp32():
    plan = plan_of("learn-width", {"n_layer": 3, "n_embd": 24}, tie_embeddings=True)
    growth = LearnedGrowth(plan, toy_weights(plan.src))
    tokens = toy_tokens(plan.src)
    with torch.no_grad():
        exact = growth(tokens[:, :-1], tokens[:, 1:])
    growth.model.compute_dtype = torch.bfloat16

    loss = growth(tokens[:, :-1], tokens[:, 1:])
    loss.backward()

    assert loss != exact and loss.item() == pytest.approx(exact.item(), rel=0.05)
    assert {parameter.grad.dtype for parameter in growth.parameters()} == {torch.float32}


def test_a_module_that_was_cast_to_bf16_still_learns():
    plan = plan_of("learn-width", {"n_layer": 3, "n_embd": 24})
    growth = LearnedGrowth(plan, toy_weights(plan.src)).to(torch.bfloat16)

    losses = learn(growth, repeat(toy_tokens(plan.src)), steps=10, rate=0.01)

    assert losses[-1] < losses[0]
    assert {weight.dtype for weight in growth.materialise().values()} == {torch.bfloat16}


@pytest.mark.parametrize("n_query_groups", [1, 2, 4])
def test_taking_a_model_apart_and_putting_it_together_changes_nothing(n_query_groups):
    config = toy_config(n_query_groups=n_query_groups)
    weights = toy_weights(config)
    again = weights_of(parts_of(weights, config), config)
    assert set(again) == set(weights) and all(torch.equal(again[name], weight) for name, weight in weights.items())


def zero_padded(growth: LearnedGrowth) -> dict[str, torch.Tensor]:
    """Matrices [I; 0] instead of [I; random], as a state dict."""
    return {name: torch.eye(*matrix.shape, dtype=matrix.dtype) for name, matrix in growth.state_dict().items()}


@pytest.mark.parametrize("n_query_groups", [2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_identity_over_zero_is_zero_padding_and_keeps_the_function_once_norms_follow_rule_z(n_query_groups, tied):
    src = toy_config(n_query_groups=n_query_groups, tie_embeddings=tied)
    plan = plan_growth("learn-width", src, n_embd=24)
    growth = LearnedGrowth(plan, toy_weights(src, dtype=torch.float64))
    growth.load_state_dict(zero_padded(growth))
    ratio = src.n_embd / plan.dst.n_embd
    weights = {name: w * math.sqrt(ratio) if w.dim() == 1 else w for name, w in growth.materialise().items()}
    dst = dataclasses.replace(plan.dst, norm_eps=src.norm_eps * ratio)
    idx = toy_tokens(src)[:, :-1]

    with torch.no_grad():
        before = toy_model(src, dtype=torch.float64)(idx)
        after = plain(dataclasses.replace(plan, dst=dst, width=dataclasses.replace(plan.width, rule="Z")), weights)(idx)

    assert (after - before).abs().max() <= 1e-10 * before.abs().max()


@pytest.mark.parametrize("n_query_groups", [2, 4])
def test_every_weight_is_the_product_that_the_paper_writes_with_whole_heads_mixed(n_query_groups):
    """W' = sum_j D[l, j] B_out W_j B_in^T with dense matrices: B (x) I for heads, B_v per query head for the output."""
    src = toy_config(n_query_groups=n_query_groups)
    plan = plan_growth("learn-width", src, n_layer=3, n_embd=24)
    growth = LearnedGrowth(plan, toy_weights(src, dtype=torch.float64))
    generator = torch.Generator().manual_seed(1)
    B, D = (
        {name: torch.randn(matrix.shape, generator=generator, dtype=torch.float64) for name, matrix in kind.items()}
        for kind in (growth.width, growth.depth)
    )
    growth.load_state_dict(
        {f"width.{name}": b for name, b in B.items()} | {f"depth.{name}": d for name, d in D.items()}
    )
    eye = torch.eye(src.head_size, dtype=torch.float64)
    queries, keys, values = (torch.kron(B[name], eye) for name in "qkv")
    outputs = torch.kron(B["v"], torch.eye(src.q_per_kv * src.head_size, dtype=torch.float64))
    sides = {
        **{"q": (queries, B["embd"]), "k": (keys, B["embd"]), "v": (values, B["embd"]), "o": (B["embd"], outputs)},
        **{"w1": (B["mlp"], B["embd"]), "w2": (B["mlp"], B["embd"]), "w3": (B["embd"], B["mlp"])},
    }
    old = dict(growth.named_buffers())

    found = parts_of(growth.materialise(), plan.dst)

    for part, (rows, columns) in sides.items():
        expected = torch.einsum("lj,jrc->lrc", D[part], rows @ old[part] @ columns.T)
        assert torch.allclose(found[part], expected, rtol=1e-10), part
    for part in ("norm_1", "norm_2"):
        assert torch.allclose(found[part], D[part] @ old[part] @ B["embd"].T, rtol=1e-10), part
    for part in ("wte", "ln_f", "lm_head"):
        assert torch.allclose(found[part], old[part] @ B["embd"].T, rtol=1e-10), part


@pytest.mark.parametrize("n_query_groups", [1, 2, 4])
def test_old_heads_keep_their_queries_and_keys_exactly(n_query_groups):
    """On inputs in the old channels: whole heads are mixed, so the first n_head rows of heads are the old ones."""
    src = toy_config(n_query_groups=n_query_groups)
    plan = plan_growth("learn-width", src, n_embd=32, n_query_groups=2 * n_query_groups)
    weights = toy_weights(src, dtype=torch.float64)
    grown = LearnedGrowth(plan, weights).materialise()
    old, new = parts_of(weights, src), parts_of(grown, plan.dst)
    heads = [group * plan.dst.q_per_kv + slot for group in range(src.n_query_groups) for slot in range(src.q_per_kv)]

    q = new["q"].unflatten(1, (-1, src.head_size))[:, heads].flatten(1, 2)[..., : src.n_embd]
    k = new["k"].unflatten(1, (-1, src.head_size))[:, : src.n_query_groups].flatten(1, 2)[..., : src.n_embd]

    assert torch.equal(q, old["q"]) and torch.equal(k, old["k"])


def test_new_heads_are_mixtures_of_whole_heads_so_that_rotations_stay_apart():
    src = toy_config(n_query_groups=4)
    plan = plan_growth("learn-width", src, n_embd=24)
    growth = LearnedGrowth(plan, toy_weights(src, dtype=torch.float64))

    found = parts_of(growth.materialise(), plan.dst)["k"].unflatten(1, (-1, src.head_size))[..., : src.n_embd]

    old = growth.k.unflatten(1, (-1, src.head_size))
    assert torch.allclose(found, torch.einsum("ij,ljdc->lidc", growth.width["k"], old), rtol=0, atol=1e-12)


def test_new_query_heads_in_a_group_are_read_as_an_old_one_is():
    src = toy_config(n_query_groups=1)
    plan = plan_growth("learn-width", src, n_embd=24)
    growth = LearnedGrowth(plan, toy_weights(src))
    growth.load_state_dict(zero_padded(growth))

    blocks = growth.materialise()["transformer.h.0.attn.proj.weight"].unflatten(1, (-1, src.head_size))

    assert (plan.dst.q_per_kv, src.q_per_kv) == (6, 4)
    assert torch.equal(blocks[:, 4], blocks[:, 0]) and torch.equal(blocks[:, 5], blocks[:, 1])
    assert not torch.equal(blocks[:, 1], blocks[:, 0])


def test_random_rows_have_the_variance_of_one_over_their_number():
    plan = plan_growth("learn-width", toy_config(n_head=16, n_embd=64, n_query_groups=16), n_embd=256)
    growth = LearnedGrowth(plan, toy_weights(plan.src))
    matrix = growth.width["embd"]
    assert torch.equal(matrix[:64], torch.eye(64))
    assert matrix[64:].std().item() == pytest.approx(256**-0.5, rel=0.05)


def test_the_rate_depends_on_what_grows():
    rates = [default_rate(plan_of(name, request)) for name, request in (*LEARNED, ("learn-width", {"n_layer": 3}))]
    assert rates == [DEPTH_RATE, WIDTH_RATE, WIDTH_RATE, WIDTH_RATE, DEPTH_RATE]


def test_what_cannot_be_learned_is_refused():
    plan = plan_of()
    growth = LearnedGrowth(plan, toy_weights(plan.src))
    with pytest.raises(ValueError, match="learn_steps=0 must be at least 1"):
        learn(growth, repeat(toy_tokens(plan.src)), steps=0)
    with pytest.raises(ValueError, match="layer 3 is new"):
        LearnedGrowth(plan_growth("random-depth", plan.src, n_layer=3), toy_weights(plan.src))
    with pytest.raises(DataError, match="the source"):
        LearnedGrowth(plan, toy_weights(toy_config(n_layer=1)))


def test_a_loss_that_is_no_number_stops_learning_before_the_update():
    plan = plan_of()
    weights = toy_weights(plan.src)
    weights["transformer.ln_f.weight"][0] = math.inf
    growth = LearnedGrowth(plan, weights)
    before = {name: value.clone() for name, value in growth.state_dict().items()}

    with pytest.raises(NonFiniteError, match="step 1 of learned growth.*Lower --learn-rate"):
        learn(growth, repeat(toy_tokens(plan.src)), steps=2)

    assert all(torch.equal(value, before[name]) for name, value in growth.state_dict().items())
