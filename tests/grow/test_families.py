"""Growth of models that are no plain Llama: per-layer flags follow the layer map, biases and head norms their rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from grow.apply import grow_optimizer, grow_weights
from grow.masks import MaskSchedule, mask_scales
from grow.operators import function_of, plan_growth
from grow.plan import GrowthPlan
from grow.sizes import with_depth
from grow.width import aki, fpi, hypercloning, lemon, split_width, staged_width, zero_width
from lit_gpt.axes import parameter_shapes, with_layer
from lit_gpt.config import Config
from lit_gpt.model import GPT
from tests.toys import toy_config, toy_tokens, toy_weights

FAMILIES: dict[str, dict[str, object]] = {
    "biases": {"qkv_bias": True, "proj_bias": True, "mlp_bias": True},
    "qwen2": {"family": "qwen2", "qkv_bias": True},
    "qwen3": {"family": "qwen3", "qk_norm": "head", "head_size": 6},
}
NOT_IN_WIDTH = {
    "olmo2": {"family": "olmo2", "norm_placement": "after", "qk_norm": "full"},
    "gemma": {"family": "gemma", "norm_plus_one": True, "activation": "gelu_tanh", "embedding_scale": 4.0},
}
OPERATORS = {
    "split": split_width,
    "split even": lambda src, dst: split_width(src, dst, shares="even"),
    "zero": zero_width,
    "fpi": fpi,
    "lemon": lemon,
    "hypercloning": hypercloning,
    "staged": staged_width,
}


def doubled(src: Config) -> Config:
    sizes = ("n_embd", "n_head", "n_query_groups", "intermediate_size")
    return dataclasses.replace(src, **{size: 2 * getattr(src, size) for size in sizes})


def logits(config: Config, weights: dict[str, Tensor], idx: Tensor) -> Tensor:
    model = GPT(config).double()
    model.load_state_dict(weights)
    return model(idx)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_biases_and_head_norms_keep_the_function_in_width(operator, family, tied):
    src = toy_config(tie_embeddings=tied, **FAMILIES[family])
    plan = OPERATORS[operator](src, doubled(src))
    weights, idx = toy_weights(src, dtype=torch.float64), toy_tokens(src)[:, :-1]

    before, after = logits(src, weights, idx), logits(plan.dst, grow_weights(plan, weights), idx)

    assert function_of(plan) == "exactly"
    assert (after - before).abs().max() <= 1e-10 * before.abs().max()


def gradients(config: Config, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    model, tokens = GPT(config).double(), toy_tokens(config)
    model.load_state_dict(weights)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("operator", ["split even", "fpi", "hypercloning"])
def test_their_mapped_moments_are_the_gradients_of_the_grown_model(operator, family):
    src = toy_config(**FAMILIES[family])
    plan = OPERATORS[operator](src, doubled(src))
    weights = toy_weights(src, dtype=torch.float64)
    moments = {
        name: {"exp_avg": gradient, "exp_avg_sq": gradient.square(), "step": torch.tensor(9.0)}
        for name, gradient in gradients(src, weights).items()
    }

    mapped = grow_optimizer(plan, moments, "map")

    wanted = gradients(plan.dst, grow_weights(plan, weights))
    for name in parameter_shapes(plan.dst):
        torch.testing.assert_close(mapped[name]["exp_avg"], wanted[name], rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(mapped[name]["exp_avg_sq"], wanted[name].square(), rtol=1e-6, atol=1e-12)


def test_copied_biases_come_from_the_next_layer_with_their_rows():
    src = toy_config(**FAMILIES["biases"])
    plan, weights = aki(src, doubled(src)), toy_weights(src)

    grown = grow_weights(plan, weights)["transformer.h.0.mlp.swiglu.w1.bias"]

    here, following = (weights[f"transformer.h.{layer}.mlp.swiglu.w1.bias"] for layer in (0, 1))
    assert torch.equal(grown[:24], here)
    assert torch.equal(grown[24:], following[list(plan.width.neurons[24:])])


@pytest.mark.parametrize("family", NOT_IN_WIDTH)
def test_a_family_whose_width_cannot_grow_is_refused_by_name(family):
    src = toy_config(**NOT_IN_WIDTH[family])
    with pytest.raises(ValueError, match=f"{family} cannot grow in width: it has .*; grow it in depth"):
        plan_growth("hypercloning", src, factor=2)


@pytest.mark.parametrize("operator", ["learn-depth", "gradmax"])
def test_operators_that_learn_refuse_parameters_that_they_do_not_know(operator):
    with pytest.raises(ValueError, match=f"{operator} cannot grow a model of family qwen3 with attn.norm_q.weight"):
        plan_growth(operator, toy_config(**FAMILIES["qwen3"]), factor=2)


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, *NOT_IN_WIDTH])
def test_identity_layers_pass_everything_on_in_every_family(family):
    src = toy_config(**(FAMILIES | NOT_IN_WIDTH)[family])
    plan = plan_growth("llama-pro", src, n_layer=4)
    weights, idx = toy_weights(src, dtype=torch.float64), toy_tokens(src)[:, :-1]

    assert torch.equal(logits(plan.dst, grow_weights(plan, weights), idx), logits(src, weights, idx))


def test_growth_in_depth_maps_every_per_layer_flag():
    src = toy_config(n_layer=3, rope_layers=[True, False, True], sliding_window=4, sliding_layers=[False, True, True])

    stacked = plan_growth("stack", src, n_layer=6).dst
    partial = plan_growth("partial", src, layer_map="1-2*3-3").dst
    fresh = plan_growth("random-depth", src, n_layer=4).dst

    assert stacked.rope_layers == (True, False, True) * 2 and stacked.sliding_layers == (False, True, True) * 2
    assert partial.rope_layers == (True, False, False, False, True)
    assert fresh.rope_layers == (True, False, True, True) and fresh.sliding_layers == (False, True, True, True)


@torch.no_grad()
def test_a_layer_without_rotation_stays_one_wherever_it_is_copied_to():
    src = toy_config(n_layer=2, rope_layers=[True, False])
    plan = plan_growth("interpolate", src, n_layer=4)
    weights, idx = toy_weights(src, dtype=torch.float64), toy_tokens(src)[:, :-1]
    grown = grow_weights(plan, weights)
    for layer in (1, 3):  # further copies write nothing: what is left is the source, if each copy kept its kind
        for name in ("attn.proj.weight", "mlp.swiglu.w3.weight"):
            grown[with_layer(name, layer)].zero_()

    assert torch.equal(logits(plan.dst, grown, idx), logits(src, weights, idx))


def test_a_plan_whose_flags_do_not_follow_its_map_is_refused():
    src = toy_config(n_layer=2, rope_layers=[True, False])
    dst = dataclasses.replace(with_depth(src, 4, (0, 1, 0, 1)), rope_layers=(True, True, False, False))
    with pytest.raises(ValueError, match="rope_layers changes from"):
        GrowthPlan("stack", src, dst, (0, 1, 0, 1))


def test_a_depth_without_a_map_cannot_say_what_each_layer_is():
    with pytest.raises(ValueError, match="rope_layers say something of each of 2 layers"):
        with_depth(toy_config(n_layer=2, rope_layers=[True, False]), 4)


def test_masks_are_refused_where_a_norm_comes_after_them():
    plan = plan_growth("random-depth", toy_config(**NOT_IN_WIDTH["olmo2"]), n_layer=4)
    with pytest.raises(ValueError, match="olmo2 norms it afterwards; grow without a mask"):
        mask_scales(plan, MaskSchedule(10).openness(0))
