"""The table of axes describes the model that is really built."""

from __future__ import annotations

import pytest
from hypothesis import given

from lit_gpt.axes import (
    AXES_IN_BLOCK,
    EMBD,
    HEADS,
    QKV,
    WRITERS,
    axes_of,
    axis_sizes,
    layer_of,
    name_in_block,
    parameter_shapes,
    with_layer,
)
from lit_gpt.config import Config
from lit_gpt.model import GPT
from tests.toys import toy_config, toy_configs


@given(toy_configs())
def test_names_shapes_and_order_are_those_of_the_model(config):
    built = {name: tuple(parameter.shape) for name, parameter in GPT(config).named_parameters()}
    assert list(built.items()) == list(parameter_shapes(config).items())


def test_head_size_may_differ_from_width_over_heads():
    config = toy_config(head_size=6)
    built = {name: tuple(parameter.shape) for name, parameter in GPT(config).named_parameters()}
    assert built == parameter_shapes(config)
    assert axis_sizes(config)[HEADS] == 24 and axis_sizes(config)[QKV] == (4 + 2 * 2) * 6


@given(toy_configs())
def test_every_dimension_has_the_size_of_its_axis(config):
    sizes = axis_sizes(config)
    for name, shape in parameter_shapes(config).items():
        assert tuple(sizes[axis] for axis in axes_of(name)) == shape


def test_a_tied_head_is_listed_once():
    assert "lm_head.weight" in parameter_shapes(toy_config())
    assert "lm_head.weight" not in parameter_shapes(toy_config(tie_embeddings=True))


def test_what_writes_into_the_residual_stream_has_it_among_its_outputs():
    for name in WRITERS:
        axes = axes_of(name if name not in AXES_IN_BLOCK else with_layer(name, 0))
        assert axes[-1 if name == "transformer.wte.weight" else 0] == EMBD


@pytest.mark.parametrize(
    ("name", "layer", "inside"),
    [
        ("transformer.h.0.norm_1.weight", 0, "norm_1.weight"),
        ("transformer.h.12.mlp.swiglu.w3.weight", 12, "mlp.swiglu.w3.weight"),
        ("transformer.wte.weight", None, "transformer.wte.weight"),
        ("lm_head.weight", None, "lm_head.weight"),
    ],
)
def test_names_know_their_layer(name, layer, inside):
    assert layer_of(name) == layer and name_in_block(name) == inside


def test_layers_are_replaced_by_number_not_by_substring():
    assert with_layer("transformer.h.1.attn.attn.weight", 11) == "transformer.h.11.attn.attn.weight"
    assert with_layer("transformer.h.11.mlp.swiglu.w1.weight", 1) == "transformer.h.1.mlp.swiglu.w1.weight"


@pytest.mark.parametrize("name", ["transformer.h.0.attn.bias", "wte.weight", "transformer.h.x.norm_1.weight", ""])
def test_unknown_parameters_are_refused(name):
    with pytest.raises(ValueError, match="not a parameter of this model"):
        axes_of(name)


def test_shapes_of_a_large_model_need_no_tensors():
    assert len(parameter_shapes(Config.from_name("tiny_LLaMA_7B"))) == 3 + 7 * 32
