"""Masks of random growth: closed they keep the function, open they are gone, and in between they open step by step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from grow.apply import grow_weights
from grow.masks import MaskSchedule, mask_scales
from grow.operators import plan_growth
from grow.width_tensors import widening
from lit_gpt.axes import axes_of, layer_of
from lit_gpt.model import GPT
from tests.toys import toy_config, toy_configs, toy_model, toy_tokens, toy_weights

PARTS = ("layers", "intermediate", "embd", "heads")
GROWTHS = [
    ("random-depth", {"n_layer": 5}),
    ("random-width", {"n_embd": 24}),
    ("random-width", {"n_embd": 40, "intermediate_size": 70}),
    ("random-width", {"n_embd": 32, "n_query_groups": None}),
    ("random-width", {"intermediate_size": 40}),
]


def grown(config, name, sizes, dtype=torch.float64):
    sizes = dict(sizes)
    if "n_query_groups" in sizes:
        sizes["n_query_groups"] = config.n_query_groups  # more query heads for the keys there are
    elif name == "random-width" and config.n_query_groups == 2 and (sizes.get("n_embd", 32) // 4) % 2:
        sizes["n_query_groups"] = sizes["n_embd"] // 4 // 2
    plan = plan_growth(name, config, **sizes, seed=3)
    return plan, grow_weights(plan, toy_weights(config, dtype=dtype))


def masked(plan, weights, c):
    scales = mask_scales(plan, dict.fromkeys(PARTS, c))
    return {name: weight * scales.get(name, 1) for name, weight in weights.items()}


@given(config=toy_configs(), growth=st.sampled_from(GROWTHS))
@settings(max_examples=20, deadline=None)
def test_a_closed_mask_keeps_the_function(config, growth):
    plan, weights = grown(config, *growth)
    tokens = toy_tokens(config)[:, :-1]
    before = toy_model(config, dtype=torch.float64)(tokens)

    model = GPT(plan.dst).double()
    model.load_state_dict(masked(plan, weights, 0.0))

    assert (model(tokens) - before).abs().max() <= 1e-10 * max(1, before.abs().max())


@pytest.mark.parametrize("growth", GROWTHS, ids=str)
def test_an_open_mask_is_none_and_it_opens_without_a_jump(growth):
    config = toy_config()
    plan, weights = grown(config, *growth)
    assert all(torch.equal(weight, weights[name]) for name, weight in masked(plan, weights, 1.0).items())

    def logits(c):
        return functional_call(GPT(plan.dst).double(), masked(plan, weights, c), toy_tokens(config)[:, :-1])

    opened, plain = logits(0.5), logits(1.0)
    assert (opened - plain).abs().max() > 1e-3
    assert (logits(0.5 + 1e-6) - opened).abs().max() < 1e-4


@pytest.mark.parametrize("growth", GROWTHS, ids=str)
def test_what_is_new_gets_a_gradient_as_soon_as_the_mask_is_not_closed(growth):
    config = toy_config()
    plan, weights = grown(config, *growth)
    tokens = toy_tokens(config)

    def gradient_of_new(c):
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        loss = functional_call(GPT(plan.dst).double(), masked(plan, leaves, c), (tokens[:, :-1], tokens[:, 1:]))
        loss.backward()
        found = [leaf.grad[new_entries(plan, name)] for name, leaf in leaves.items()]
        return torch.cat([gradient.flatten() for gradient in found])

    assert not gradient_of_new(0.0).any()
    assert bool((gradient_of_new(0.05) != 0).float().mean() > 0.95)


def new_entries(plan, name):
    """bool, of the parameter's shape: what does not come from the source."""
    if plan.width is None:
        layer = layer_of(name)
        new = layer is not None and plan.layer_map[layer] is None
        return torch.full(grown_shape(plan, name), new)
    axes = [widening(plan.width, plan.src, plan.dst).axes[axis].new for axis in axes_of(name)]
    return axes[0] if len(axes) == 1 else axes[0][:, None] | axes[1]


def grown_shape(plan, name):
    from lit_gpt.axes import parameter_shapes

    return parameter_shapes(plan.dst)[name]


def test_the_mask_starts_above_zero_and_rises_in_even_steps():
    schedule = MaskSchedule(4)
    assert [schedule.openness(step)["embd"] for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert schedule.total_steps == 4


def test_in_turn_opens_neurons_and_layers_then_channels_then_heads():
    schedule = MaskSchedule(2, "in-turn")
    opened = [tuple(schedule.openness(step)[part] for part in PARTS) for step in range(6)]
    assert opened == [
        (0.5, 0.5, 0, 0),
        (1, 1, 0, 0),
        (1, 1, 0.5, 0),
        (1, 1, 1, 0),
        (1, 1, 1, 0.5),
        (1, 1, 1, 1),
    ]
    assert schedule.total_steps == 6


@pytest.mark.parametrize(("arguments", "message"), [((0,), "at least 1"), ((5, "later"), "together, in-turn")])
def test_a_schedule_that_is_none_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskSchedule(*arguments)
