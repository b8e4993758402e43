"""The data order is a bijection per epoch, the same for any cut into batches, and fixed for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.data_order import BLOCK_POSITIONS, LARGE_BLOCK_POSITIONS, DataOrder, quotas
from lit_gpt.permutation import Permutation, derive_keys


def is_shuffled(values: np.ndarray, n: int) -> bool:
    return sorted(values.tolist()) == list(range(n)) and values.tolist() != list(range(n))


# The numbers below were made with the definition of the design, once. Whoever changes them changes the data order of
# every run that exists: its checkpoints could not be continued.
def test_the_order_is_what_it_always_was():
    assert derive_keys(2, 3407, "slim", 0) == [0x8431826A328BB1FF, 0xACBEB932542B4B40]
    assert Permutation(10, 3407, "slim", 0)(np.arange(10)).tolist() == [3, 9, 6, 8, 1, 4, 7, 2, 5, 0]
    million = Permutation(1_000_003, 3407, "slim", 1)(np.arange(8))
    assert million.tolist() == [480135, 398379, 424136, 265373, 826029, 444416, 78841, 801675]
    huge = Permutation(488_281_250, "golden")(np.arange(10**8, 10**8 + 4))
    assert huge.tolist() == [488278801, 426033549, 336117613, 6379762]

    mixture = DataOrder({"slim": 1000, "star": 300}, 3407, {"slim": 0.7, "star": 0.3})
    source, sample = mixture.locate(np.arange(12))
    assert source.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]
    assert sample.tolist() == [120, 66, 412, 164, 929, 906, 630, 44, 127, 288, 277, 268]
    assert mixture.order_id == "237f82609825fa8b979dec59c052778324eb02ca651da989c902fa88e1e48b59"

    source, sample = DataOrder({"a": 50, "b": 7}, 1).locate(np.arange(8))
    assert source.tolist() == [1, 0, 0, 0, 0, 0, 0, 1]
    assert sample.tolist() == [2, 1, 48, 5, 43, 16, 37, 4]


def test_the_permutation_is_a_bijection_for_every_small_n():
    for n in range(400):
        assert sorted(Permutation(n, 7, n)(np.arange(n)).tolist()) == list(range(n))


@pytest.mark.parametrize("n", [4096, 65536, 65537, 99_991, 1_000_003])
def test_the_permutation_is_a_bijection_for_large_n(n):
    assert is_shuffled(Permutation(n, 7)(np.arange(n)), n)


@given(
    st.integers(2, 2**40), st.integers(0, 2**32), st.lists(st.integers(0, 2**40), min_size=1, max_size=50, unique=True)
)
def test_the_permutation_keeps_distinct_points_distinct_and_inside(n, key, points):
    points = np.unique(np.array(points) % n)
    image = Permutation(n, key)(points)
    assert len(np.unique(image)) == len(points)
    assert image.min() >= 0 and image.max() < n


def test_permutations_with_different_keys_have_nothing_in_common():
    n = 10_000
    first, second = (Permutation(n, seed)(np.arange(n)) for seed in (1, 2))
    assert (first == second).sum() < 10  # 1 is expected of two random permutations


def test_neighbouring_values_look_random():
    """Chi-square over triples of low bits: 511 degrees of freedom, so 511 +- 32; a linear generator gives millions."""
    low = Permutation(1_000_003, 5)(np.arange(300_000)) % 8
    counts = np.bincount(low[:-2] * 64 + low[1:-1] * 8 + low[2:], minlength=512)
    expected = counts.sum() / 512
    assert ((counts - expected) ** 2 / expected).sum() < 511 + 6 * 32


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(1, 40), min_size=1, max_size=4),
    st.integers(0, 2**32),
)
def test_without_weights_an_epoch_reads_every_sample_once(sizes, seed):
    order = DataOrder(sizes, seed)
    total = sum(sizes.values())
    for epoch in range(3):
        source, sample = order.locate(np.arange(epoch * total, (epoch + 1) * total))
        everything = [(i, j) for i, name in enumerate(order.names) for j in range(sizes[name])]
        assert sorted(zip(source.tolist(), sample.tolist(), strict=True)) == everything


def test_epochs_differ():
    order = DataOrder({"a": 100}, 1)
    _, sample = order.locate(np.arange(200))
    assert is_shuffled(sample[:100], 100) and is_shuffled(sample[100:], 100)
    assert sample[:100].tolist() != sample[100:].tolist()


def test_the_order_of_sources_in_a_file_has_no_effect():
    forward, backward = DataOrder({"a": 50, "b": 7}, 1), DataOrder({"b": 7, "a": 50}, 1)
    assert forward.order_id == backward.order_id
    assert np.array_equal(forward.locate(np.arange(57)), backward.locate(np.arange(57)))


@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=5))
def test_quotas_add_up_and_miss_the_share_by_less_than_one_place(weights):
    length, places = quotas(weights)
    assert sum(places) == length
    assert all(abs(place - length * w / sum(weights)) < 1 for place, w in zip(places, weights, strict=True))


def test_small_weights_get_a_longer_block_and_too_small_ones_are_refused():
    assert quotas([0.5, 0.5]) == (BLOCK_POSITIONS, (2048, 2048))
    assert quotas([0.9999, 0.0001]) == (LARGE_BLOCK_POSITIONS, (65529, 7))
    with pytest.raises(ValueError, match="drop the source or raise it"):
        quotas([1.0, 1e-9])


def test_every_block_has_the_exact_shares():
    order = DataOrder({"a": 10**6, "b": 10**6, "c": 10**6}, 1, {"a": 0.7, "b": 0.2, "c": 0.1})
    source, _ = order.locate(np.arange(3 * BLOCK_POSITIONS))
    blocks = [np.bincount(block).tolist() for block in source.reshape(3, -1)]
    assert blocks == [[2867, 819, 410]] * 3
    assert not np.array_equal(source[:BLOCK_POSITIONS], source[BLOCK_POSITIONS : 2 * BLOCK_POSITIONS])


def test_more_blocks_than_are_kept_and_back_again():
    settings = {"a": 50_000, "b": 50_000}, 1, {"a": 0.5, "b": 0.5}
    order = DataOrder(*settings)
    whole = np.array(order.locate(np.arange(12 * BLOCK_POSITIONS)))
    assert np.array_equal(order.locate(np.arange(100)), whole[:, :100])
    assert np.array_equal(DataOrder(*settings).locate(np.arange(45_000, 45_100)), whole[:, 45_000:45_100])


@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(0, 2**31))
def test_a_weight_change_at_any_place_leaves_prefixes_of_every_source(first, second, seed):
    sizes = {"a": 20_000, "b": 20_000}
    segments = [(0, {"a": 0.7, "b": 0.3}), (first, {"a": 0.2, "b": 0.8}), (first + second, {"b": 1.0})]
    order = DataOrder(sizes, seed, segments=segments)
    source, sample = order.locate(np.arange(first + second + 500))
    for i, name in enumerate(order.names):
        read = sample[source == i]
        expected = Permutation(sizes[name], seed, name, 0)(np.arange(len(read)))
        assert sorted(read.tolist()) == sorted(expected.tolist())


def test_a_weight_change_leaves_the_past_alone():
    sizes = {"a": 20_000, "b": 20_000}
    before = DataOrder(sizes, 1, segments=[(0, {"a": 0.7, "b": 0.3})])
    after = DataOrder(sizes, 1, segments=[(0, {"a": 0.7, "b": 0.3}), (5001, {"a": 0.1, "b": 0.9})])
    assert np.array_equal(before.locate(np.arange(5001)), after.locate(np.arange(5001)))
    assert not np.array_equal(before.locate(np.arange(5001, 5100)), after.locate(np.arange(5001, 5100)))


def test_a_source_may_join_later():
    alone = DataOrder({"b": 20_000}, 1, {"b": 1.0})
    joined = DataOrder({"a": 500, "b": 20_000}, 1, segments=[(0, {"b": 1.0}), (300, {"a": 0.5, "b": 0.5})])
    source, sample = joined.locate(np.arange(1000))
    assert not (source[:300] == 0).any() and (source[300:] == 0).any()
    assert np.array_equal(sample[:300], alone.locate(np.arange(300))[1])


@given(st.lists(st.integers(0, 400), min_size=2, max_size=8, unique=True), st.sampled_from([None, {"a": 1, "b": 3}]))
def test_skipped_stretches_are_left_out_and_nothing_else(cuts, weights):
    cuts = sorted(cuts)[: len(cuts) // 2 * 2]
    skips = list(zip(cuts[::2], cuts[1::2], strict=True))
    sizes = {"a": 300, "b": 200}
    kept = [p for p in range(500) if not any(start <= p < stop for start, stop in skips)]
    expected = DataOrder(sizes, 1, weights).locate(np.array(kept))
    order = DataOrder(sizes, 1, weights, skips=skips)
    assert np.array_equal(order.locate(np.arange(len(kept))), expected)
    assert [order.raw_stop(position) for position in range(1, len(kept) + 1)] == [p + 1 for p in kept]


FILE_SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


def windowed(files: dict[str, list[int]], seed: int, window: int | None, **options) -> DataOrder:
    sizes = {name: np.array(each) for name, each in files.items()}
    samples = {name: int(each.sum()) for name, each in sizes.items()}
    return DataOrder(samples, seed, window=window, files=sizes, **options)


@given(st.dictionaries(st.sampled_from("abc"), FILE_SIZES, min_size=1), st.integers(1, 40), st.integers(0, 2**32))
def test_a_windowed_epoch_reads_every_sample_once(files, window, seed):
    order = windowed(files, seed, window)
    total = sum(order.samples.values())
    everything = sorted((i, j) for i, name in enumerate(order.names) for j in range(order.samples[name]))
    for epoch in range(3):
        source, sample = order.locate(np.arange(epoch * total, (epoch + 1) * total))
        assert sorted(zip(source.tolist(), sample.tolist(), strict=True)) == everything


@given(FILE_SIZES, st.integers(1, 15), st.integers(0, 2**32))
def test_a_window_is_done_with_its_files_before_the_next_one(sizes, window, seed):
    _, sample = windowed({"a": sizes}, seed, window, weights={"a": 1.0}).locate(np.arange(sum(sizes)))
    file_of = np.repeat(np.arange(len(sizes)), sizes)[sample].tolist()
    shuffled = Permutation(len(sizes), seed, "a", 0, "files")(np.arange(len(sizes))).tolist()
    for first in range(0, len(sizes), window):
        files = shuffled[first : first + window]
        count = sum(sizes[file] for file in files)
        assert sorted(file_of[:count]) == sorted(file for file in files for _ in range(sizes[file]))
        del file_of[:count]
    assert not file_of


def test_a_window_without_weights_holds_files_of_any_source():
    files = {"a": [50] * 20, "b": [30] * 20}
    order = windowed(files, 1, 4)
    source, sample = order.locate(np.arange(1600))
    file_of = source * 20 + sample // np.array([50, 30])[source]
    assert len(np.unique(file_of[:100])) <= 4
    assert len(np.unique(file_of)) == 40
    firsts = [int(source[np.flatnonzero(file_of == file)[0]]) for file in dict.fromkeys(file_of.tolist())]
    assert 0 < sum(firsts[:20]) < 20, "the first windows hold files of one source only"


def test_windows_are_shuffled_inside_and_their_epochs_differ():
    sizes, window = [40] * 30, 5
    order = windowed({"a": sizes}, 1, window)
    first, second = (order.locate(np.arange(start, start + 1200))[1] for start in (0, 1200))
    assert is_shuffled(first, 1200) and is_shuffled(second, 1200)
    in_first_window = [set((epoch[: 40 * window] // 40).tolist()) for epoch in (first, second)]
    assert in_first_window[0] != in_first_window[1]
    assert len(set((first[:40] // 40).tolist())) == window, "the files of a window are read one after the other"
    other_seed = windowed({"a": sizes}, 2, window).locate(np.arange(1200))[1]
    assert not np.array_equal(other_seed, first)


def test_a_window_of_all_files_is_an_order_over_all():
    sizes = [40] * 30
    for window in (30, 31, 10**6):
        _, sample = windowed({"a": sizes}, 1, window).locate(np.arange(1200))
        assert is_shuffled(sample, 1200)
        assert len(np.unique(sample[:200] // 40)) > 25


@given(st.integers(0, 900), st.integers(1, 80), st.integers(0, 900), st.sampled_from([None, {"a": 1, "b": 3}]))
def test_a_windowed_order_does_not_depend_on_what_was_asked_before(start, count, before, weights):
    files = {"a": [7, 0, 20, 3, 3, 40], "b": [11] * 9}
    whole = np.array(windowed(files, 5, 2, weights=weights).locate(np.arange(1000)))
    order = windowed(files, 5, 2, weights=weights)
    order.locate(np.array([before]))
    assert np.array_equal(order.locate(np.arange(start, start + count)), whole[:, start : start + count])


def test_the_windowed_order_is_what_it_always_was():
    files = {"a": [7, 0, 20, 3, 3, 40], "b": [11] * 9}
    order = windowed(files, 3407, 3)
    source, sample = order.locate(np.arange(10))
    assert source.tolist() == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert sample.tolist() == [93, 32, 53, 59, 57, 94, 62, 49, 43, 48]
    assert order.order_id == "b081406794f418e4549f4caee188f1d3d91e5e180f4298ec6cd2cf8a1c5e3ab0"
    mixture = windowed(files, 3407, 3, weights={"a": 0.7, "b": 0.3})
    source, sample = mixture.locate(np.arange(10))
    assert source.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    assert sample.tolist() == [18, 31, 27, 30, 28, 29, 32, 25, 54, 46]


def test_the_order_id_knows_the_window_and_the_files_in_it():
    ids = [
        windowed({"a": files}, 1, window).order_id
        for files, window in (([4, 6], None), ([4, 6], 1), ([4, 6], 2), ([6, 4], 1))
    ]
    assert len(set(ids)) == 4
    assert ids[0] == DataOrder({"a": 10}, 1).order_id


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0, "files": {"a": np.array([5])}}, "window=0 must be at least 1"),
        ({"window": 2}, "give all files"),
        ({"window": 2, "files": {"a": np.array([5, 1])}}, "hold {'a': 6} samples"),
    ],
)
def test_an_impossible_window_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DataOrder({"a": 5}, 1, **options)


def test_epochs_counts_what_is_read():
    assert DataOrder({"a": 30, "b": 10}, 1).epochs(80) == {"a": 2.0, "b": 2.0}
    weighted = DataOrder({"a": 30, "b": 10}, 1, {"a": 1, "b": 3})
    source, _ = weighted.locate(np.arange(777))
    counts = np.bincount(source)
    assert weighted.epochs(777) == {"a": counts[0] / 30, "b": counts[1] / 10}
    assert weighted.epochs(0) == {"a": 0.0, "b": 0.0}


def test_all_problems_are_reported_at_once():
    with pytest.raises(ValueError) as raised:
        DataOrder({"a": 0, "b": 5}, 1, {"a": -1, "c": 2}, skips=[(5, 3), (0, 4)])
    for part in ("'a' has 0 samples", "unknown source 'c'", "weight -1", "[5, 3)"):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"a": 1}, "segments": [(0, {"a": 1})]}, "not both"),
        ({"segments": [(1, {"a": 1})]}, "must start at 0"),
        ({"segments": [(0, {"a": 1}), (0, {"a": 2})]}, "must increase"),
        ({"segments": [(0, None), (9, {"a": 2})]}, "proportional"),
        ({"weights": {"a": 0.0}}, "at least one must be positive"),
        ({"weights": {"a": float("nan")}}, "must be a number"),
        ({"skips": [(0, 5), (4, 6)]}, "overlap"),
    ],
)
def test_an_impossible_order_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DataOrder({"a": 5}, 1, **options)


def test_negative_positions_are_refused():
    with pytest.raises(ValueError, match="negative"):
        DataOrder({"a": 5}, 1).locate(np.array([-1]))
