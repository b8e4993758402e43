"""Operators by name, and how a name and a depth become a plan."""

from __future__ import annotations

import subprocess
import sys

import pytest

from grow.layer_map import MAX_LAYERS
from grow.operators import BY_NAME, OPERATORS, operator, plan_growth, with_depth
from lit_gpt.config import Config
from tests.toys import toy_config


@pytest.mark.parametrize("name", ["stack", "gstack", "G_stack", "g-stack", "stacking"])
def test_stacking_goes_by_many_names(name):
    assert operator(name) is OPERATORS["stack"]


def test_no_two_operators_share_a_name():
    assert len(BY_NAME) == sum(1 + len(op.aliases) for op in OPERATORS.values())


def test_an_unknown_operator_is_met_with_the_nearest_and_all_known_ones():
    with pytest.raises(ValueError, match="did you mean 'interpolate'. Known: stack, interpolate, partial"):
        operator("interpolat")


def test_n_layer_factor_and_map_are_three_ways_to_say_the_same():
    src = toy_config(n_layer=3)

    by_depth = plan_growth("stack", src, n_layer=6, seed=5)
    by_factor = plan_growth("gstack", src, factor=2, seed=5)
    by_map = plan_growth("stack", src, layer_map=[0, 1, 2, 0, 1, 2], seed=5)

    assert by_depth == by_factor == by_map
    assert by_depth.operator == "stack" and by_depth.seed == 5 and by_depth.dst == toy_config(n_layer=6)


def test_a_fractional_factor_is_fine_where_the_depth_is_whole():
    assert plan_growth("interpolate", toy_config(n_layer=4), factor=1.5).layer_map == (0, 0, 1, 2, 2, 3)


def test_an_explicit_map_lifts_the_rule_of_whole_factors_and_is_kept_as_written():
    plan = plan_growth("stack", toy_config(n_layer=3), n_layer=5, layer_map="123-23")

    assert plan.layer_map == (0, 1, 2, 1, 2)
    assert plan.options == {"layer_map": "123-23"}


@pytest.mark.parametrize(
    ("name", "request_", "message"),
    [
        ("stack", {}, "how deep is the grown model"),
        ("stack", {"n_layer": 4}, "3 layers do not divide 4"),
        ("stack", {"n_layer": 2}, "cannot shrink 3 layers to 2"),
        ("stack", {"n_layer": 0}, "cannot shrink 3 layers to 0"),
        ("partial", {"n_layer": 2, "layer_map": "12"}, "cannot shrink 3 layers to 2"),
        ("partial", {"n_layer": 6}, "partial needs a layer map"),
        ("stack", {"n_layer": 6, "factor": 3}, "contradict each other: 3 layers times 3 is 9"),
        ("stack", {"factor": 2.5}, "7.5; the result must be a whole number"),
        ("stack", {"factor": 0.5}, "must be at least 1"),
        ("stack", {"factor": float("nan")}, "must be at least 1"),
        ("stack", {"factor": float("inf")}, "at most 1024"),
        ("stack", {"n_layer": 3 * MAX_LAYERS}, "too deep"),
        ("partial", {"factor": 2, "layer_map": "12312"}, "has 5 layers, but n_layer=6"),
        ("partial", {"layer_map": "1234"}, "there is no layer 4"),
    ],
)
def test_requests_that_cannot_be_met(name, request_, message):
    with pytest.raises(ValueError, match=message):
        plan_growth(name, toy_config(n_layer=3), **request_)


@pytest.mark.parametrize("name", ["stack", "interpolate"])
def test_growing_to_the_same_depth_is_the_identity(name):
    plan = plan_growth(name, toy_config(n_layer=3), factor=1)
    assert plan.is_identity and plan.dst == plan.src


def test_a_grown_model_is_named_after_its_sizes_or_not_at_all():
    assert with_depth(Config.from_name("6L2048H"), 24) == Config.from_name("24L2048H")
    assert with_depth(Config.from_name("tiny_LLaMA_750M_like3B"), 32).name == "32L2560H"
    assert with_depth(Config.from_name("tiny_LLaMA_1b"), 44).name == ""
    assert with_depth(toy_config(name="toy"), 2).name == "toy"


def test_planning_needs_no_torch():
    modules = "grow.layer_map, grow.plan, grow.depth, grow.operators, lit_gpt.config, lit_gpt.axes, lit_gpt.flops"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
