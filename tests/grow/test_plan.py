"""A growth plan fits its two models, survives JSON, and names a source for every parameter."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grow.plan import GrowthPlan, differing_sizes
from lit_gpt.axes import parameter_shapes
from tests.toys import toy_config, toy_configs


def a_plan(**changes) -> GrowthPlan:
    parts = {"operator": "stack", "src": toy_config(), "dst": toy_config(n_layer=4), "layer_map": (0, 1, 0, 1)}
    return GrowthPlan(**{**parts, **changes})


@given(toy_configs(), st.data())
def test_a_plan_survives_json(src, data):
    layers = data.draw(st.lists(st.integers(0, src.n_layer - 1), min_size=1, max_size=6))
    dst = dataclasses.replace(src, n_layer=len(layers))
    plan = GrowthPlan("partial", src, dst, layers, seed=7, options={"layer_map": "1"})

    stored = json.loads(json.dumps(plan.to_dict()))

    assert stored["layer_map"] == layers
    assert GrowthPlan.from_dict(stored) == plan


def test_new_layers_identity_layers_and_noise_survive_json_and_old_plans_have_none():
    plan = a_plan(layer_map=(0, None, 1, None), identity_layers=[3, 1, 1], noise=0.2)
    assert plan.identity_layers == (1, 3)
    assert GrowthPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan

    before = {key: value for key, value in a_plan().to_dict().items() if key not in ("identity_layers", "noise")}
    assert GrowthPlan.from_dict(before) == a_plan()


def test_a_stored_plan_with_other_keys_is_refused_and_all_of_them_are_named():
    stored = a_plan().to_dict()
    stored["layermap"] = stored.pop("layer_map")

    with pytest.raises(ValueError) as failure:
        GrowthPlan.from_dict(stored)

    assert str(failure.value).split("\n") == [
        "growth plan: unknown key 'layermap'; did you mean 'layer_map'?",
        "growth plan: key 'layer_map' is missing",
    ]


def test_a_map_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="has 3 layers, but n_layer=4"):
        a_plan(layer_map=(0, 1, 0))
    with pytest.raises(ValueError, match="layer 2 "):
        a_plan(layer_map=(0, 1, 2, 1))


def test_sizes_that_depth_growth_cannot_change_are_all_named():
    with pytest.raises(ValueError) as failure:
        a_plan(dst=toy_config(n_layer=4, intermediate_size=32, norm_eps=1e-6))

    assert "intermediate_size changes from 24 to 32" in str(failure.value)
    assert "norm_eps changes from 1e-05 to 1e-06" in str(failure.value)


def test_identity_layers_and_noise_that_cannot_be_are_refused_together():
    with pytest.raises(ValueError) as failure:
        a_plan(identity_layers=(1, 4), noise=1.5)

    assert "identity layer 4 (counted from 0) is none of the 4 layers" in str(failure.value)
    assert "noise=1.5 must be in [0, 1]" in str(failure.value)


def test_names_of_models_are_no_difference():
    assert differing_sizes(toy_config(name="a"), toy_config(name="b", n_layer=3)) == ["n_layer"]
    assert a_plan(dst=toy_config(n_layer=4, name="large")).dst.name == "large"


def test_every_parameter_has_a_source():
    plan = a_plan()

    sources = plan.sources()

    assert list(sources) == list(parameter_shapes(plan.dst))
    assert set(sources.values()) == set(parameter_shapes(plan.src))
    assert sources["transformer.h.3.mlp.swiglu.w3.weight"] == "transformer.h.1.mlp.swiglu.w3.weight"
    assert sources["lm_head.weight"] == "lm_head.weight"


def test_parameters_of_new_and_of_silenced_layers_have_no_source():
    sources = a_plan(layer_map=(0, 1, None, 1), identity_layers=(3,)).sources()

    assert {name for name, source in sources.items() if source is None} == {
        *(name for name in sources if name.startswith("transformer.h.2.")),
        "transformer.h.3.attn.proj.weight",
        "transformer.h.3.mlp.swiglu.w3.weight",
    }


def test_a_plan_knows_its_connection_rate_and_whether_it_does_anything():
    assert a_plan().connection_rate == "2/3"
    assert not a_plan().is_identity
    assert a_plan(dst=toy_config(), layer_map=(0, 1)).is_identity
    assert not a_plan(dst=toy_config(), layer_map=(1, 0)).is_identity
    assert not a_plan(dst=toy_config(), layer_map=(0, 1), noise=0.1).is_identity
    assert not a_plan(dst=toy_config(), layer_map=(0, 1), identity_layers=(0,)).is_identity
    assert a_plan(layer_map=(0, 1, None, None)).connection_rate == "1/3"


def test_a_plan_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        a_plan().seed = 1
