"""GradMax: the function stays, and new neurons get the largest first gradient that their length allows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grow import gradmax
from grow.apply import grow_optimizer
from grow.gradmax import GradMaxWeights, gradmax_columns, mlp_inputs_and_gradients, top_directions
from grow.operators import function_of, plan_growth
from grow.plan import GrowthPlan
from lit_gpt.axes import name_in_block, with_layer
from lit_gpt.config import Config
from lit_gpt.errors import NonFiniteError
from lit_gpt.flops import flops_per_token
from lit_gpt.model import GPT
from tests.toys import toy_config, toy_model, toy_tokens, toy_weights

DOWN = "mlp.swiglu.w3.weight"
OLD, NEW = 24, 8  # neurons


def plan_of(src: Config, seed: int = 0) -> GrowthPlan:
    return plan_growth("gradmax", src, intermediate_size=OLD + NEW, seed=seed)


def grown(plan: GrowthPlan, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    rows = toy_tokens(plan.src, n_rows=4)
    return dict(GradMaxWeights(plan, weights, gradmax_columns(plan, weights, rows).columns))


def model_of(config: Config, weights: dict[str, Tensor]) -> GPT:
    model = GPT(config).double()
    model.load_state_dict(weights)
    return model


def new_gradients(model: GPT, rows: Tensor) -> list[Tensor]:
    """Per layer the gradient of the new rows of the up projection, (NEW, C)."""
    ups = [block.mlp.swiglu.w2.weight for block in model.transformer.h]
    gradients = torch.autograd.grad(model(rows[:, :-1], rows[:, 1:]), ups)
    return [gradient[OLD:] for gradient in gradients]


@pytest.mark.parametrize("n_query_groups", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_new_neurons_keep_the_function_and_all_old_weights(n_query_groups, tied):
    src = toy_config(n_query_groups=n_query_groups, tie_embeddings=tied)
    plan, weights = plan_of(src), toy_weights(src, dtype=torch.float64)
    found = grown(plan, weights)
    idx = toy_tokens(src, seed=5)[:, :-1]

    with torch.no_grad():
        before = toy_model(src, dtype=torch.float64)(idx)
        gap = (model_of(plan.dst, found)(idx) - before).abs().max()

    assert gap <= 1e-10 * before.abs().max() and function_of(plan) == "exactly"
    for name, weight in found.items():
        columns = name_in_block(name) == DOWN
        old = weight[:, : weights[name].size(1)] if columns else weight[: weights[name].size(0)]
        assert torch.equal(old, weights[name]), name


def test_only_the_up_projection_of_new_neurons_is_zero_and_only_it_gets_a_gradient_at_first():
    src = toy_config()
    plan = plan_of(src)
    found = grown(plan, toy_weights(src, dtype=torch.float64))
    model, rows = model_of(plan.dst, found), toy_tokens(src, n_rows=4)

    model(rows[:, :-1], rows[:, 1:]).backward()
    for block in model.transformer.h:
        mlp = block.mlp.swiglu
        assert not mlp.w2.weight[OLD:].any() and (mlp.w2.weight.grad[OLD:].norm(dim=1) > 0).all()
        assert mlp.w1.weight[OLD:].all() and not mlp.w1.weight.grad[OLD:].any()
        assert mlp.w3.weight[:, OLD:].all() and not mlp.w3.weight.grad[:, OLD:].any()
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()

    model.zero_grad()
    model(rows[:, :-1], rows[:, 1:]).backward()
    for block in model.transformer.h:
        for weight in (block.mlp.swiglu.w1.weight, block.mlp.swiglu.w2.weight):
            assert (weight.grad[OLD:].norm(dim=1) > 0).all()
        assert (block.mlp.swiglu.w3.weight.grad[:, OLD:].norm(dim=0) > 0).all()


def test_no_random_direction_of_the_same_length_gives_a_larger_first_gradient():
    src = toy_config()
    plan, weights = plan_of(src), toy_weights(src, dtype=torch.float64)
    rows, found = toy_tokens(src, n_rows=4), grown(plan, weights)
    best = [gradient.norm(dim=1) for gradient in new_gradients(model_of(plan.dst, found), rows)]

    largest = [torch.zeros(NEW, dtype=torch.float64) for _ in best]
    for draw in range(100):
        generator = torch.Generator().manual_seed(draw)
        changed = dict(found)
        for layer in range(src.n_layer):
            name = with_layer(DOWN, layer)
            random = torch.randn(src.n_embd, NEW, generator=generator, dtype=torch.float64)
            changed[name] = found[name].clone()
            changed[name][:, OLD:] = F.normalize(random, dim=0) * found[name][:, OLD:].norm(dim=0)
        gradients = new_gradients(model_of(plan.dst, changed), rows)
        largest = [torch.maximum(a, b.norm(dim=1)) for a, b in zip(largest, gradients, strict=True)]

    assert all((a >= b).all() for a, b in zip(best, largest, strict=True))


def test_new_columns_are_as_long_as_the_old_ones_of_their_layer_on_average():
    src = toy_config()
    weights = toy_weights(src, dtype=torch.float64)
    for name, weight in grown(plan_of(src), weights).items():
        if name_in_block(name) == DOWN:
            mean = weights[name].norm(dim=0).mean()
            assert torch.allclose(weight[:, OLD:].norm(dim=0), mean.expand(NEW), rtol=1e-12)


def test_directions_are_the_first_left_singular_vectors():
    generator = torch.Generator().manual_seed(3)
    gates, x, delta = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (5, 40, 40))

    found = top_directions(gates, x, delta, tolerance=1e-14, max_iterations=20_000)

    matrices = torch.einsum("tj,tc,td->jcd", F.silu(x @ gates.T), delta, x)
    left, values, _ = torch.linalg.svd(matrices)
    assert found.n_open == 0
    assert torch.allclose(found.values, values[:, 0], rtol=1e-10)
    assert torch.allclose((found.vectors * left[:, :, 0]).sum(1).abs(), torch.ones(5, dtype=torch.float64), atol=1e-6)


def test_the_usual_tolerance_finds_nearly_the_largest_gradient():
    generator = torch.Generator().manual_seed(4)
    gates, x, delta = (torch.randn(n, 32, generator=generator) for n in (20, 200, 200))
    delta *= 1e-9  # as small as gradients of a mean loss over many tokens are

    found = top_directions(gates, x, delta)

    matrices = torch.einsum("tj,tc,td->jcd", F.silu(x @ gates.T), delta * 1e9, x)
    largest = torch.linalg.matrix_norm(matrices, 2)
    reached = torch.einsum("jcd,jc->jd", matrices, found.vectors).norm(dim=1)
    assert (reached >= 0.99 * largest).all() and torch.allclose(found.values * 1e9, reached, rtol=0.01)


def test_directions_do_not_depend_on_how_many_are_made_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(5)
    gates, x, delta = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (7, 30, 30))
    at_once = top_directions(gates, x, delta, seed=1, name="w3")
    monkeypatch.setattr(gradmax, "NEURONS_AT_ONCE", 3)
    in_parts = top_directions(gates, x, delta, seed=1, name="w3")

    assert torch.allclose(at_once.vectors, in_parts.vectors, atol=1e-12) and at_once.multiplied == in_parts.multiplied


def test_iterations_that_run_out_are_counted_and_no_gradient_gives_a_vector_of_length_one():
    generator = torch.Generator().manual_seed(6)
    gates, x, delta = (torch.randn(n, 6, generator=generator) for n in (4, 30, 30))

    short = top_directions(gates, x, delta, tolerance=1e-9, max_iterations=2)
    nothing = top_directions(gates, x, torch.zeros_like(delta))

    assert short.n_open == 4 and short.multiplied == 2 * 2 * 4
    assert nothing.n_open == 0 and torch.allclose(nothing.vectors.norm(dim=1), torch.ones(4))


def test_what_is_recorded_is_the_input_of_the_mlp_and_the_gradient_at_its_output():
    src = toy_config()
    model, rows = toy_model(src, dtype=torch.float64), toy_tokens(src)
    inputs, gradients = mlp_inputs_and_gradients(model, rows)

    model(rows[:, :-1], rows[:, 1:]).backward()
    for block, x, delta in zip(model.transformer.h, inputs, gradients, strict=True):
        mlp = block.mlp.swiglu
        hidden = F.silu(x @ mlp.w1.weight.T) * (x @ mlp.w2.weight.T)
        assert torch.allclose(mlp.w3.weight.grad, delta.T @ hidden, atol=1e-12)
    assert not any(block.mlp._forward_hooks for block in model.transformer.h)


def test_tokens_of_another_document_are_not_seen_where_the_model_does_not_see_them():
    config = toy_config()
    rows = toy_tokens(config, n_rows=1)
    rows[rows == 3] = 4
    rows[0, 5] = 3  # ends the first document
    others = rows.clone()
    others[0, :5] = (others[0, :5] + 1) % 3
    model = model_of(config, toy_weights(config, dtype=torch.float64))
    for separator_id, unseen in ((3, True), (None, False)):
        (*_, one), (*_, other) = (mlp_inputs_and_gradients(model, each, separator_id)[0] for each in (rows, others))
        assert torch.equal(one[6:], other[6:]) is unseen


def test_the_seed_says_it_all():
    src = toy_config()
    weights = toy_weights(src, dtype=torch.bfloat16)
    first, again, other = (grown(plan_of(src, seed), weights) for seed in (0, 0, 1))
    assert {weight.dtype for weight in first.values()} == {torch.bfloat16}
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = {name_in_block(name) for name in first if not torch.equal(first[name], other[name])}
    assert changed == {"mlp.swiglu.w1.weight", DOWN}


def test_moments_of_old_weights_stay_and_new_ones_are_zero():
    src = toy_config()
    moments = {
        name: {"exp_avg": weight, "exp_avg_sq": weight.square(), "step": torch.tensor(3.0)}
        for name, weight in toy_weights(src).items()
    }
    for name, state in grow_optimizer(plan_of(src), moments, "map").items():
        old, new = moments[name]["exp_avg"], state["exp_avg"]
        missing = [size for dim in (-1, -2)[: old.dim()] for size in (0, new.size(dim) - old.size(dim))]
        assert torch.equal(new, F.pad(old, missing)) and state["step"] == 3, name


def test_the_gradient_and_every_iteration_are_charged():
    src = toy_config()
    plan, weights, rows = plan_of(src), toy_weights(src), toy_tokens(src)

    found = gradmax_columns(plan, weights, rows)

    n_tokens = rows[:, 1:].numel()
    gradient = flops_per_token(src).times(n_tokens).paper
    per_product, per_gate = 4 * n_tokens * src.n_embd, 2 * n_tokens * src.n_embd
    products = (found.flops.paper - gradient - src.n_layer * NEW * per_gate) / per_product
    assert products == round(products) and products >= 2 * 2 * src.n_layer * NEW


def test_a_gradient_that_is_no_number_is_an_error():
    src = toy_config()
    weights = toy_weights(src)
    weights["transformer.ln_f.weight"][0] = float("inf")
    with pytest.raises(NonFiniteError, match="gradmax: the loss on its batch"):
        gradmax_columns(plan_of(src), weights, toy_tokens(src))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "Give gradmax intermediate_size or factor$"),
        ({"n_embd": 32}, "and not n_embd"),
        ({"intermediate_size": 20}, "smaller than the source's 24"),
        ({"factor": 1.01}, "must be a whole number"),
        ({"factor": 2, "intermediate_size": 48}, "give one of the two"),
    ],
)
def test_gradmax_grows_neurons_and_nothing_else(request_, message):
    with pytest.raises(ValueError, match=message):
        plan_growth("gradmax", toy_config(), **request_)
    doubled = plan_growth("gradmax", toy_config(), factor=2)
    assert doubled.dst == toy_config(intermediate_size=48)
