"""The layer-map language: what it means, where its errors point, and the connection rate."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grow.depth import interpolate, stack
from grow.layer_map import (
    MAX_LAYERS,
    check_layer_map,
    connection_rate,
    connection_rate_text,
    draw_layer_map,
    format_layer_map,
    further_copies,
    parse_layer_map,
    unused_layers,
)

# arXiv 2405.15319, the eight ways to stack 6 layers to 24, counted from 0
EIGHT_MAPS = {
    "123456*4": [0, 1, 2, 3, 4, 5] * 4,
    "12-3456*5-56": [0, 1] + [2, 3, 4, 5] * 5 + [4, 5],
    "12-345*7-6": [0, 1] + [2, 3, 4] * 7 + [5],
    "123-456*7": [0, 1, 2] + [3, 4, 5] * 7,
    "1234-56*10": [0, 1, 2, 3] + [4, 5] * 10,
    "12-34*10-56": [0, 1] + [2, 3] * 10 + [4, 5],
    "1-234*7-56": [0] + [1, 2, 3] * 7 + [4, 5],
    "123*7-456": [0, 1, 2] * 7 + [3, 4, 5],
}
CONNECTIONS = {
    "123456*4": 20,
    "12-3456*5-56": 18,
    "12-345*7-6": 17,
    "123-456*7": 17,
    "1-234*7-56": 17,
    "123*7-456": 17,
    "1234-56*10": 14,
    "12-34*10-56": 14,
}


@pytest.mark.parametrize("text", EIGHT_MAPS)
def test_the_papers_maps_mean_what_the_paper_says(text):
    layers = parse_layer_map(text, n_layer_src=6, n_layer=24)

    assert list(layers) == EIGHT_MAPS[text]
    assert connection_rate(layers) == Fraction(CONNECTIONS[text], 23)
    assert connection_rate_text(layers) == f"{CONNECTIONS[text]}/23"
    assert format_layer_map(layers) == text


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("1", [0]),
        ("11*3", [0] * 6),
        ("11..11*3", [10] * 3),
        ("1..12*2", [*range(12)] * 2),
        ("1..2-3..6*5-5..6", EIGHT_MAPS["12-3456*5-56"]),
        ("1,2,5*3", [0, 1, 4] * 3),
        ("1..3,7*2-10", [0, 1, 2, 6] * 2 + [9]),
        ("3..3-12", [2, 11]),
        ("12-new*2-3", [0, 1, None, None, 2]),
        ("new-10..12", [None, 9, 10, 11]),
    ],
)
def test_numbers_are_decimal_once_a_range_or_a_list_occurs(text, layers):
    assert list(parse_layer_map(text)) == layers


@pytest.mark.parametrize(
    ("text", "column", "rule"),
    [
        ("", 0, "a layer is missing"),
        ("-12", 0, "a layer is missing"),
        ("12--3", 3, "a layer is missing"),
        ("12-", 3, "a layer is missing"),
        ("12-*3", 3, "a layer is missing"),
        ("1,,2", 2, "a layer is missing"),
        ("1..", 3, "last layer of the range is missing"),
        ("12*", 3, "number of repeats is missing"),
        ("12*0", 3, "at least once"),
        ("1..2*0-3", 5, "at least once"),
        ("102", 1, "layers count from 1"),
        ("0..3", 0, "layers count from 1"),
        ("127", 2, "no layer 7; the source has layers 1 to 6"),
        ("1..7", 3, "no layer 7"),
        ("2,12", 2, "no layer 12"),
        ("4..2", 0, "goes up"),
        ("1x", 1, "'x' is not part of a layer map"),
        ("1 2", 1, "' ' is not part of a layer map"),
        ("x", 0, "'x' is not part of a layer map"),
        ("1..x", 3, "'x' is not part of a layer map"),
        ("²", 0, "'²' is not part of a layer map"),
        ("12*3*4", 4, "'*' cannot stand here"),
        ("1,2*3,4", 5, "',' cannot stand here"),
        ("1.5", 1, "'.' cannot stand here"),
        ("12*99999", 3, "too large"),
        ("1-12*600", 2, "past 1024 layers"),
        ("1-ne", 2, "'n' is not part of a layer map"),
        ("1-newer", 5, "'e' is not part of a layer map"),
        ("new*2000", 0, "past 1024 layers"),
    ],
)
def test_an_error_points_at_the_character(text, column, rule):
    with pytest.raises(ValueError) as failure:
        parse_layer_map(text, n_layer_src=6)

    message, shown, caret = str(failure.value).split("\n")
    assert rule in message
    assert shown == f"  {text}"
    assert caret == "  " + " " * column + "^"


def test_a_map_of_another_length_names_both_lengths():
    with pytest.raises(ValueError, match=r"'123\*2' has 6 layers, but n_layer=7"):
        parse_layer_map("123*2", n_layer=7)


def test_a_map_that_yaml_took_for_a_number_is_refused():
    with pytest.raises(ValueError, match="in quotes"):
        parse_layer_map(123456)


@given(st.lists(st.sampled_from([*"0123456789-*., x", "new"]), max_size=12).map("".join))
def test_any_text_is_a_map_or_an_error_that_points_into_it(text):
    try:
        layers = parse_layer_map(text, n_layer_src=6)
    except ValueError as error:
        caret = str(error).split("\n")[-1]
        assert caret.endswith("^") and len(caret) - 3 <= len(text)
    else:
        assert 1 <= len(layers) <= MAX_LAYERS
        assert all(layer is None or 0 <= layer < 6 for layer in layers)


@st.composite
def layer_maps(draw):
    """Maps with repeated parts, of sources of up to 30 layers, some with new layers."""
    layer = st.integers(0, draw(st.sampled_from([2, 8, 9, 29])))
    if draw(st.booleans()):
        layer |= st.none()
    part = st.tuples(st.lists(layer, min_size=1, max_size=5), st.integers(1, 4))
    parts = draw(st.lists(part, min_size=1, max_size=4))
    return tuple(layer for block, repeats in parts for layer in block * repeats)


@given(layer_maps())
def test_a_formatted_map_reads_as_itself(layers):
    text = format_layer_map(layers)

    assert parse_layer_map(text) == layers
    written_out = ",".join("new" if layer is None else str(layer + 1) for layer in layers)
    assert len(text) <= len(written_out) + len("10..")


@given(layer_maps())
def test_the_connection_rate_is_a_share_and_the_bars_of_a_drawing_are_its_complement(layers):
    rate = connection_rate(layers)
    drawn = " ".join(draw_layer_map(layers, width=20))

    cells = [word for word in drawn.split() if word != "|"]
    assert [None if cell == "new" else int(cell) - 1 for cell in cells] == list(layers)
    if len(layers) == 1:
        assert rate is None and connection_rate_text(layers) is None
        return
    assert 0 <= rate <= 1
    assert connection_rate_text(layers) == f"{len(layers) - 1 - drawn.count('|')}/{len(layers) - 1}"
    assert Fraction(connection_rate_text(layers)) == rate


@given(st.integers(2, 40))
def test_the_identity_keeps_every_neighbour(n_layer):
    assert connection_rate(range(n_layer)) == 1
    assert connection_rate_text(range(n_layer)) == f"{n_layer - 1}/{n_layer - 1}"


@given(st.integers(1, 12), st.integers(1, 8))
def test_connection_rates_of_stacking_and_interpolation_have_closed_forms(n_layer_src, factor):
    n_layer = factor * n_layer_src
    if n_layer == 1:
        return
    assert connection_rate(stack(n_layer_src, n_layer)) == Fraction(n_layer - factor, n_layer - 1)
    assert connection_rate(interpolate(n_layer_src, n_layer)) == Fraction(n_layer_src - 1, n_layer - 1)


@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 6), st.integers(0, 3), st.integers(0, 9))
def test_the_connection_rate_of_partial_stacking_has_a_closed_form(n_prefix, n_block, repeats, n_suffix, overlap):
    prefix = list(range(n_prefix))
    block = list(range(n_prefix, n_prefix + n_block))
    start = max(0, n_prefix + n_block - overlap)
    suffix = list(range(start, start + n_suffix))
    layers = prefix + block * repeats + suffix
    if len(layers) == 1:
        return
    broken = (repeats - 1) + (bool(suffix) and suffix[0] != block[-1] + 1)
    assert connection_rate(layers) == 1 - Fraction(broken, len(layers) - 1)


@pytest.mark.parametrize(
    ("layers", "rate"),
    [
        (stack(3, 6), "4/5"),
        (interpolate(3, 6), "2/5"),
        (stack(8, 24), "21/23"),
        (interpolate(8, 24), "7/23"),
        ([*range(24), *range(8, 32)], "46/47"),  # SOLAR, 32 layers to 48
        ([layer for i in range(32) for layer in ([i, i] if i % 4 == 3 else [i])], "31/39"),  # LLaMA Pro, 32 to 40
    ],
)
def test_published_connection_rates(layers, rate):
    assert connection_rate_text(layers) == rate


def test_maps_that_do_not_fit_two_depths_are_refused():
    check_layer_map((0, 1, 0), 2, 3)
    with pytest.raises(ValueError, match="has 3 layers, but n_layer=4"):
        check_layer_map((0, 1, 0), 2, 4)
    with pytest.raises(ValueError, match=r"layer 2 \(counted from 0\); the source has layers 0 to 1"):
        check_layer_map((0, 2), 2, 2)
    with pytest.raises(ValueError, match="layer '0'"):
        check_layer_map(("0",), 2, 1)


def test_layers_that_a_map_leaves_out_are_known():
    assert unused_layers(parse_layer_map("12-5*3"), 6) == [2, 3, 5]


def test_a_drawing_puts_identity_layers_in_brackets():
    assert draw_layer_map((0, 0, 1, None), identity_layers={1}) == ["1 | (1) 2 | new"]


def test_further_copies_are_all_but_the_lowest_of_a_source():
    assert further_copies((0, 1, 0, None, 2, 1, None)) == (2, 5)
