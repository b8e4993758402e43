"""Depth operators are layer maps: exactly the published ones, and sensible for every other depth."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grow.depth import (
    gradual,
    inheritune,
    interpolate,
    lidas,
    llama_pro,
    midas,
    one_layer,
    partial,
    random_depth,
    repeat_top,
    solar,
    stack,
    staged_depth,
    zero_layer,
)
from grow.layer_map import connection_rate_text, further_copies


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


def composed(first, then):
    """The map of two growths in a row."""
    return tuple(first[layer] for layer in then)


def test_gradual_growth_appends_copies_of_the_last_layers():
    assert gradual(3, 5) == (0, 1, 2, 1, 2)
    assert gradual(3, 6) == stack(3, 6)


def test_doubling_in_hops_is_stacking():
    assert composed(composed(gradual(3, 6), gradual(6, 12)), gradual(12, 24)) == stack(3, 24)


def test_more_than_doubling_names_the_hops():
    with pytest.raises(ValueError, match="9 is more than twice 3.*3 -> 6 -> 9"):
        gradual(3, 9)


def test_solar_leaves_the_end_of_one_tower_and_the_start_of_the_other_out():
    assert solar(32, 48) == (*range(24), *range(8, 32))
    assert connection_rate_text(solar(32, 48)) == "46/47"
    assert solar(3, 4) == (0, 1, 1, 2)
    assert solar(3, 6) == stack(3, 6)


@pytest.mark.parametrize(("n_layer_src", "n_layer_dst"), [(3, 5), (3, 8), (4, 10)])
def test_solar_refuses_depths_that_no_two_towers_make(n_layer_src, n_layer_dst):
    with pytest.raises(ValueError, match=f"an even number of 4 to {2 * n_layer_src}, and not to {n_layer_dst}"):
        solar(n_layer_src, n_layer_dst)


def test_llama_pro_adds_a_copy_after_every_p_layers():
    assert llama_pro(6, 8) == (0, 1, 2, 2, 3, 4, 5, 5)
    expanded = llama_pro(32, 40)
    assert connection_rate_text(expanded) == "31/39"
    assert further_copies(expanded) == tuple(range(4, 40, 5))


def test_llama_pro_refuses_a_broken_period_and_names_the_depths_that_work():
    with pytest.raises(ValueError, match="5 more do not divide 6 layers; depths that work: 7, 8, 9, 12; zero-depth"):
        llama_pro(6, 11)


def test_midas_repeats_the_middle_block():
    assert midas(6, 8) == (0, 1, 2, 3, 2, 3, 4, 5)  # of three blocks the second
    assert midas(4, 6) == (0, 1, 0, 1, 2, 3)  # of two blocks the first
    assert midas(3, 6) == stack(3, 6)


def test_midas_grows_by_one_block_per_hop():
    assert composed(midas(4, 6), midas(6, 8)) == (0, 1, 0, 1, 0, 1, 2, 3)


def test_lidas_repeats_the_layers_around_the_middle():
    assert lidas(4, 6) == (0, 1, 1, 2, 2, 3)
    assert lidas(8, 12) == (0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7)


@pytest.mark.parametrize(
    ("rule", "n_layer_src", "n_layer_dst", "message"),
    [
        (midas, 6, 10, "6 layers are not made of blocks of 4. Depths that work: 7, 8, 9, 12"),
        (lidas, 6, 9, "3 more layers are an odd number"),
        (lidas, 8, 16, "2 or more such blocks.*Depths that work: 10, 12"),
        (lidas, 1, 3, "Depths that work: none"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(rule, n_layer_src, n_layer_dst, message):
    with pytest.raises(ValueError, match=message):
        rule(n_layer_src, n_layer_dst)


def test_staged_growth_doubles_and_only_doubles():
    assert staged_depth(3, 6) == (0, 0, 1, 1, 2, 2)
    with pytest.raises(ValueError, match="3 layers to 6, and not to 7"):
        staged_depth(3, 7)


def test_bert2bert_stacks_and_takes_the_rest_from_the_top():
    assert repeat_top(3, 8) == (0, 1, 2, 0, 1, 2, 1, 2)
    assert repeat_top(3, 6) == stack(3, 6)


def test_random_growth_puts_new_layers_on_top():
    assert random_depth(2, 5) == (0, 1, None, None, None)
    assert zero_layer(2, 3) == (None, None, None)


def test_one_layer_starts_everywhere_and_only_from_one():
    assert one_layer(1, 4) == (0, 0, 0, 0)
    with pytest.raises(ValueError, match="the source has 2; use stack"):
        one_layer(2, 4)


def test_inheritune_takes_the_first_layers_of_a_larger_model():
    assert inheritune(24, 6) == (0, 1, 2, 3, 4, 5)
    for n_layer in (0, 25):
        with pytest.raises(ValueError, match=f"1 to 24 of them, and not {n_layer}"):
            inheritune(24, n_layer)


@pytest.mark.parametrize("rule", [gradual, solar, llama_pro, midas, lidas, staged_depth, random_depth, inheritune])
@given(n_layer=st.integers(1, 16))
def test_no_growth_is_no_change(rule, n_layer):
    assert rule(n_layer, n_layer) == tuple(range(n_layer))


@pytest.mark.parametrize(
    "rule", [stack, interpolate, gradual, solar, llama_pro, midas, lidas, staged_depth, repeat_top]
)
@given(n_layer_src=st.integers(1, 12), n_layer_dst=st.integers(1, 40))
def test_a_map_has_the_depth_asked_for_and_uses_every_layer(rule, n_layer_src, n_layer_dst):
    try:
        layers = rule(n_layer_src, max(n_layer_src, n_layer_dst))
    except ValueError:
        return
    assert len(layers) == max(n_layer_src, n_layer_dst)
    assert set(layers) == set(range(n_layer_src))


@pytest.mark.parametrize("rule", [interpolate, llama_pro, staged_depth])
@given(n_layer_src=st.integers(1, 12), n_layer_dst=st.integers(1, 40))
def test_without_its_further_copies_a_map_is_the_source(rule, n_layer_src, n_layer_dst):
    try:
        layers = rule(n_layer_src, max(n_layer_src, n_layer_dst))
    except ValueError:
        return
    further = further_copies(layers)
    assert [layer for i, layer in enumerate(layers) if i not in further] == list(range(n_layer_src))
