"""Which parameters of a grown model train."""

from __future__ import annotations

import pytest

from grow.operators import plan_growth
from grow.trainable import new_layers, trainable_parameters
from lit_gpt.axes import FINAL_NORM, HEAD, layer_of, parameter_shapes
from tests.toys import toy_config

SOURCE = toy_config(n_layer=4)


@pytest.mark.parametrize(
    ("operator", "sizes", "layers"),
    [
        ("mslt", {"n_layer": 6}, (4, 5)),
        ("llama-pro", {"n_layer": 6}, (2, 5)),
        ("random-depth", {"n_layer": 5}, (4,)),
        ("interpolate", {"n_layer": 8}, (1, 3, 5, 7)),
        ("stack", {"n_layer": 4}, ()),
    ],
)
def test_new_layers_are_those_that_are_no_first_copy(operator, sizes, layers):
    assert new_layers(plan_growth(operator, SOURCE, **sizes)) == layers


def test_the_sets_hold_new_layers_and_with_the_head_what_follows_them():
    plan = plan_growth("mslt", SOURCE, n_layer=6)
    in_new_layers = {name for name in parameter_shapes(plan.dst) if layer_of(name) in (4, 5)}
    assert trainable_parameters(plan, "new") == in_new_layers
    assert trainable_parameters(plan, "new-and-head") == in_new_layers | {FINAL_NORM, HEAD}
    assert trainable_parameters(plan, "all") == set(parameter_shapes(plan.dst))


def test_a_tied_head_trains_as_the_embedding_that_it_is():
    plan = plan_growth("mslt", toy_config(n_layer=4, tie_embeddings=True), n_layer=6)
    assert "transformer.wte.weight" in trainable_parameters(plan, "new-and-head")


def test_new_layers_cannot_be_trained_where_there_are_none():
    with pytest.raises(ValueError, match="stack added none; use 'all'"):
        trainable_parameters(plan_growth("stack", SOURCE, n_layer=4), "new")
    with pytest.raises(ValueError, match="known: all, new, new-and-head"):
        trainable_parameters(plan_growth("stack", SOURCE, n_layer=8), "some")
