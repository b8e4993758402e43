"""The legacy order gives the samples that TinyLlama's own loader gave, from any position on."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt import legacy_order
from lit_gpt.legacy_order import LegacyOrder

# Each case was read once, with numpy 2.4, by TinyLlama's PackedDataset and CombinedDataset in a DataLoader of batch
# size 8 for every rank, put together as `create_dataloader` of its pretrain/tinyllama.py does, from LITPKDS files whose
# samples hold source, file and block. `first` and `later` are source * 10**6 + file * blocks + block: of positions 0 ..
# and of those from half of `count` on; `sha256` is that of all `count` of them as little-endian int64.
CASES = {
    "three ranks that begin again": {
        "order": ({"slim": 100, "star": 53}, {"slim": 5, "star": 7}, 3407, {"slim": 0.693584, "star": 0.306416}, 3),
        "count": 36_000,
        "first": (
            "115 222 479 285 492 420 283 62 477 284 338 478 1000317 1000206 1000080 344 306 397 1000314 1000346 "
            "1000267 1000197 1000069 1000252 44 64 424 456 436 241 341 47 242 42 46 399 1000312 1000249 1000037 "
            "340 438 240 1000308 1000238 1000304 119 494 243 457 309"
        ),
        "later": [199, 167, 302, 261, 201, 434, 1000042, 1000100, 1000155, 368],
        "sha256": "d90510e1c364fa216d39621de377d8280e2bda9e476b8b16fd0a20f5803efe63",
    },
    "weights that do not add up to 1": {
        "order": (
            {"web": 40, "code": 33, "books": 17},
            {"web": 64, "code": 3, "books": 11},
            1,
            {"web": 5.0, "code": 2.5, "books": 1.1},
            2,
        ),
        "count": 24_000,
        "first": (
            "377 1296 1000007 1000079 1000093 1000035 755 1282 761 2100 1150 2056 1000082 1000034 1000029 1000005 "
            "2475 1469 2224 2096 1000028 1000064 1107 2084 1000095 1000067 2233 1345 1508 1389 1000094 1000066 "
            "2391 1390 2000098 2000157 2000037 2000011 2195 624 1140 1398 354 184 2000128 2000076 1501 151 1507 "
            "1871"
        ),
        "later": [2194, 115, 1482, 2096, 2476, 2081, 1000023, 1000080, 1000093, 1000065],
        "sha256": "45f4a70926eb1d421fc209e5a7a3ca289383f0dc87b8a277e7ec7fc194e342d2",
    },
    "one source, one rank": {
        "order": ({"one": 9}, {"one": 128}, 12345, {"one": 1.0}, 1),
        "count": 8000,
        "first": (
            "122 322 1044 494 460 632 764 423 589 25 37 584 385 571 105 1129 951 210 419 952 609 179 487 691 219 "
            "266 294 1144 213 613 1036 372 489 433 325 696 197 334 450 88 407 40 999 496 87 950 82 333 582 1132"
        ),
        "later": [933, 290, 729, 970, 80, 261, 102, 407, 214, 164],
        "sha256": "5cfa045142f072f5d97d7428884aeabe44419b74edd5dd9ff2eebadedd6b60a0",
    },
}


def numbers(order: LegacyOrder, positions: np.ndarray) -> np.ndarray:
    source, sample = order.locate(positions)
    return source * 10**6 + sample


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_samples_are_those_of_tinyllamas_loader(case):
    found = numbers(LegacyOrder(*case["order"]), np.arange(case["count"]))
    assert found[:50].tolist() == [int(number) for number in case["first"].split()]
    assert found[case["count"] // 2 :][:10].tolist() == case["later"]
    assert hashlib.sha256(found.astype("<i8").tobytes()).hexdigest() == case["sha256"]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_jump_lands_on_the_same_samples(case):
    half = case["count"] // 2
    order = LegacyOrder(*case["order"])
    assert numbers(order, np.arange(half, half + 10)).tolist() == case["later"]
    assert numbers(order, np.arange(50)).tolist() == [int(number) for number in case["first"].split()], "backwards"
    assert numbers(order, np.arange(half, half + 10)).tolist() == case["later"], "and there again"


@pytest.fixture
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is kept for speed is so small that two thousand samples go far beyond it."""
    for name, value in {"PICKS": 64, "SAVED_EVERY_PICKS": 2, "SAVED_EVERY_GROUPS": 2}.items():
        monkeypatch.setattr(legacy_order, name, value)
    for name in ("CACHED_PICKS", "CACHED_GROUPS"):
        monkeypatch.setattr(legacy_order, name, 1)


SETTINGS = {"slim": 50, "star": 33}, {"slim": 5, "star": 7}, 3407, {"slim": 0.7, "star": 0.3}, 2
WHOLE = 2000


@pytest.fixture(scope="module")
def whole() -> np.ndarray:
    return numbers(LegacyOrder(*SETTINGS), np.arange(WHOLE))


@given(positions=st.lists(st.integers(0, WHOLE - 40), min_size=1, max_size=12))
def test_the_samples_do_not_depend_on_what_was_asked_before(small_caches, whole, positions):
    order = LegacyOrder(*SETTINGS)
    for position in positions:
        assert np.array_equal(numbers(order, np.arange(position, position + 40)), whole[position : position + 40])


def test_the_draws_go_on_behind_the_first_chunk():
    """More draws than are made at a time, against CPython's own generator."""
    names, n = ["a", "b", "c"], 70_000
    order = LegacyOrder(dict.fromkeys(names, 8), dict.fromkeys(names, 4), 7, {"a": 0.2, "b": 0.5, "c": 0.3}, 1)
    drawn = random.Random(7).choices(range(3), weights=[0.2, 0.5, 0.3], k=n)
    assert order.locate(np.arange(n))[0].tolist() == drawn


def test_every_rank_draws_the_same_sources_and_reads_its_own_files():
    order = LegacyOrder({"a": 48, "b": 32}, {"a": 3, "b": 5}, 3407, {"a": 1, "b": 2}, 2)
    source, sample = (each.reshape(-1, 2) for each in order.locate(np.arange(400)))
    assert np.array_equal(source[:, 0], source[:, 1])
    for i, blocks in enumerate((3, 5)):
        first, second = (set((sample[source[:, rank] == i, rank] // blocks).tolist()) for rank in (0, 1))
        assert first and second and not first & second


def test_epochs_count_what_is_read_and_unread_files_what_never_is():
    order = LegacyOrder({"web": 40, "code": 33}, {"web": 4, "code": 3}, 1, {"web": 2, "code": 1}, 2)
    assert order.unread_files() == {"web": 8, "code": 1}
    for stop in (0, 1, 7, 100, 101, 9_999):
        source, _ = order.locate(np.arange(stop))
        counts = np.bincount(source, minlength=2)
        assert order.epochs(stop) == {"web": counts[0] / (32 * 4), "code": counts[1] / (32 * 3)}
    _, sample = LegacyOrder({"web": 40}, {"web": 4}, 1, None, 2).locate(np.arange(32 * 4))
    assert len(np.unique(sample)) == 32 * 4, "one epoch reads every sample of the files that are read"
    assert len(np.unique(sample // 4)) == 32


def test_without_weights_the_shares_are_equal():
    files, blocks = {"web": 8, "code": 8}, {"web": 4, "code": 4}
    equal = LegacyOrder(files, blocks, 1, {"web": 0.5, "code": 0.5}, 1).locate(np.arange(100))
    assert np.array_equal(LegacyOrder(files, blocks, 1, None, 1).locate(np.arange(100)), equal)


def test_the_order_id_knows_every_setting():
    files, blocks = {"web": 16, "code": 16}, {"web": 4, "code": 4}
    weights = {"web": 1.0, "code": 1.0}
    settings = [
        (files, blocks, 1, weights, 1),
        (files | {"web": 17}, blocks, 1, weights, 1),
        (files, blocks | {"web": 5}, 1, weights, 1),
        (files, blocks, 2, weights, 1),
        (files, blocks, 1, weights | {"web": 2.0}, 1),
        (files, blocks, 1, weights, 2),
        (files, blocks, 1, weights, 1, 4),
        (dict(reversed(files.items())), blocks, 1, weights, 1),
    ]
    assert len({LegacyOrder(*each).order_id for each in settings}) == len(settings)


def test_too_few_files_for_the_ranks_are_refused_with_what_would_work():
    with pytest.raises(ValueError) as raised:
        LegacyOrder({"web": 100, "code": 30}, {"web": 4, "code": 4}, 1, {"web": 1, "code": 1}, 8)
    for part in ("'code' has 30 files", "world_size=8", "world_size 3 or less", "64 files", "order=permuted"):
        assert part in str(raised.value)
    assert "web" not in str(raised.value)
    with pytest.raises(ValueError, match="'code' has 5 files for world_size=1.*use at least 8 files, or"):
        LegacyOrder({"code": 5}, {"code": 4}, 1, None, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": {}}, "name at least one"),
        ({"seed": -1}, "seed=-1 must not be negative"),
        ({"weights": {"web": 1.0}}, "source 'code' has no weight"),
        ({"weights": {"web": 1.0, "code": 0.5, "x": 1}}, "unknown source 'x'"),
        ({"weights": {"web": 0.0, "code": 0.0}}, "all weights are 0"),
        ({"blocks_per_file": {"web": 4, "code": 0}}, "files of source 'code' are shorter than one sample"),
        ({"world_size": 0}, "must be at least 1"),
    ],
)
def test_an_impossible_order_is_refused(change, message):
    settings = {
        "files": {"web": 8, "code": 8},
        "blocks_per_file": {"web": 4, "code": 4},
        "seed": 1,
        "weights": {"web": 1.0, "code": 1.0},
        "world_size": 1,
    }
    LegacyOrder(**settings)
    with pytest.raises(ValueError, match=message):
        LegacyOrder(**settings | change)


def test_negative_positions_are_refused():
    with pytest.raises(ValueError, match="negative"):
        LegacyOrder({"a": 8}, {"a": 4}, 1, None, 1).locate(np.array([-1]))


def test_a_numpy_that_shuffles_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(legacy_order, "KNOWN_SHUFFLE", list(range(8)))
    with pytest.raises(RuntimeError, match="shuffles otherwise"):
        LegacyOrder({"a": 8}, {"a": 4}, 1, None, 1)
