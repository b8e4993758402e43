"""Depth operators are layer maps: exactly the published ones, and sensible for every other depth."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grow.depth import interpolate, partial, stack


def test_stacking_repeats_the_tower():
    assert stack(3, 6) == (0, 1, 2, 0, 1, 2)
    assert stack(6, 24) == (0, 1, 2, 3, 4, 5) * 4
    assert stack(1, 4) == (0, 0, 0, 0)


def test_interpolation_repeats_every_layer_in_place():
    assert interpolate(3, 6) == (0, 0, 1, 1, 2, 2)
    assert interpolate(2, 8) == (0, 0, 0, 0, 1, 1, 1, 1)
    assert interpolate(3, 5) == (0, 0, 1, 1, 2)


def test_stacking_by_a_broken_factor_names_the_depths_that_work():
    with pytest.raises(ValueError, match="6 layers do not divide 20; use 18 or 24 layers, give a layer map"):
        stack(6, 20)


@given(st.integers(1, 16), st.integers(1, 5))
def test_stacking_takes_layer_i_modulo_the_source_depth(n_layer_src, factor):
    layers = stack(n_layer_src, factor * n_layer_src)
    assert layers == tuple(i % n_layer_src for i in range(factor * n_layer_src))


@given(st.integers(1, 16), st.integers(0, 40))
def test_interpolation_keeps_the_order_and_spreads_evenly(n_layer_src, more):
    layers = interpolate(n_layer_src, n_layer_src + more)

    copies = [layers.count(layer) for layer in range(n_layer_src)]
    assert list(layers) == sorted(layers)
    assert min(copies) >= 1 and max(copies) - min(copies) <= 1


@given(st.integers(1, 16))
def test_growing_to_the_same_depth_changes_nothing(n_layer):
    assert stack(n_layer, n_layer) == interpolate(n_layer, n_layer) == tuple(range(n_layer))


def test_partial_takes_text_from_one_and_sequences_from_zero():
    assert partial(3, 5, "1-23*2") == partial(3, None, [0, 1, 2, 1, 2]) == (0, 1, 2, 1, 2)
    with pytest.raises(ValueError, match="there is no layer 4"):
        partial(3, None, "1234")
    with pytest.raises(ValueError, match="layer 3 "):
        partial(3, None, [3])
    with pytest.raises(ValueError, match="has 3 layers, but n_layer=5"):
        partial(3, 5, "123")
