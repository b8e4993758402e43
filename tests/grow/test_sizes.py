"""Sizes of wider models: what follows from what, and which sizes are refused with the ones that fit."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grow.sizes import scaled_depth, wider
from lit_gpt.config import Config
from tests.toys import toy_config, toy_configs


def sizes(config: Config) -> tuple[int, int, int, int]:
    return config.n_embd, config.n_head, config.n_query_groups, config.intermediate_size


@pytest.mark.parametrize(
    ("n_query_groups", "request_", "expected"),
    [
        (2, {"factor": 2}, (32, 8, 4, 48)),
        (2, {"factor": 1.5}, (24, 6, 3, 36)),
        (2, {"n_embd": 32}, (32, 8, 4, 48)),
        (2, {"n_head": 6}, (24, 6, 3, 36)),
        (2, {"n_embd": 32, "n_query_groups": 2}, (32, 8, 2, 48)),
        (2, {"factor": 2, "n_query_groups": 2}, (32, 8, 2, 48)),
        (2, {"intermediate_size": 30}, (16, 4, 2, 30)),
        (2, {"n_embd": 48, "n_query_groups": 3}, (48, 12, 3, 72)),
        (2, {"n_embd": 32, "intermediate_size": 24}, (32, 8, 4, 24)),
        (4, {"factor": 2}, (32, 8, 8, 48)),
        (4, {"n_embd": 20, "intermediate_size": 24}, (20, 5, 5, 24)),
        (1, {"factor": 2}, (32, 8, 1, 48)),
        (1, {"n_embd": 20}, (20, 5, 1, 30)),
    ],
)
def test_sizes_that_are_not_given_follow_from_those_that_are(n_query_groups, request_, expected):
    grown = wider(toy_config(n_query_groups=n_query_groups), **request_)

    assert sizes(grown) == expected
    assert grown.head_size == 4 and grown.n_layer == 2


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"n_embd": 30}, "n_embd=30 breaks head_size=4, which growth keeps.*e.g. 28 or 32"),
        ({"n_embd": 32, "n_head": 4}, "n_embd=32 goes with n_head=8, and n_head=4 with n_embd=16"),
        ({"n_embd": 20}, "n_head=5 is no whole number of groups of 2 query heads; give n_query_groups"),
        ({"n_embd": 8}, "n_embd=8 is smaller than the source's 16"),
        ({"n_embd": 8, "intermediate_size": 3}, "(?s)n_embd=8.*intermediate_size=3 is smaller"),
        ({"n_head": 8, "n_query_groups": 3}, "n_head=8 must be a multiple of n_query_groups=3"),
        ({"factor": 2, "n_embd": 32}, "factor=2 and n_embd both give sizes"),
        ({"factor": 0.5}, "must be at least 1"),
        ({"factor": float("nan")}, "must be at least 1"),
        ({"factor": 1e9}, "at most 1024"),
        ({"factor": 1.1}, "is 17.6; the result must be a whole number"),
    ],
)
def test_sizes_that_cannot_be_are_refused_with_sizes_that_can(request_, message):
    with pytest.raises(ValueError, match=message):
        wider(toy_config(), **request_)


def test_an_mlp_that_does_not_scale_to_a_whole_number_has_to_be_given():
    src = toy_config(n_query_groups=4, intermediate_size=25)
    with pytest.raises(ValueError, match="give it, e.g. intermediate_size=32"):
        wider(src, n_embd=20)
    assert wider(src, n_embd=20, intermediate_size=32).intermediate_size == 32


def test_where_heads_are_no_part_of_the_width_they_stay_as_they_are():
    src = toy_config(head_size=8)
    assert sizes(wider(src, factor=2)) == (32, 8, 4, 48)
    assert sizes(wider(src, n_embd=20, intermediate_size=24)) == (20, 4, 2, 24)
    assert sizes(wider(src, n_head=6)) == (16, 6, 3, 24)


@given(toy_configs(), st.integers(1, 4))
def test_a_whole_factor_always_fits_and_keeps_what_is_no_size(config, factor):
    grown = wider(config, factor=factor)

    assert grown.n_embd == factor * config.n_embd and grown.head_size == config.head_size
    assert grown.n_query_groups in (1, factor * config.n_query_groups)
    names = ("n_embd", "n_head", "n_query_groups", "intermediate_size")
    assert dataclasses.replace(grown, **{name: getattr(config, name) for name in names}) == config


def test_the_papers_sizes_are_reached_from_each_other():
    assert wider(Config.from_name("24L1024H"), factor=2) == Config.from_name("24L2048H")
    assert wider(Config.from_name("tiny_LLaMA_1b"), factor=2).name == ""


def test_a_depth_is_a_number_or_a_factor_that_gives_one():
    assert scaled_depth(6, None, 4) == scaled_depth(6, 24, 4) == scaled_depth(6, 24, None) == 24
    assert scaled_depth(6, None, 0.5) == 3
    assert scaled_depth(6, None, None) is None
