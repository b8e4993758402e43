"""Samples are read by position, the same for any cut into batches, and a changed past is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.data_order import DataOrder
from lit_gpt.packed_data import PackedData


class CountingSource:
    """A source whose samples are recognisable: sample i of source s is filled with 1000 s + i."""

    def __init__(self, number: int, n_samples: int, block_size: int = 4, fingerprint: str = "f") -> None:
        self.number, self.n_samples, self.block_size = number, n_samples, block_size
        self.fingerprint = f"{fingerprint}{number}"

    def read(self, indices: np.ndarray) -> np.ndarray:
        assert ((indices >= 0) & (indices < self.n_samples)).all()
        return np.repeat((1000 * self.number + indices)[:, None], self.block_size + 1, axis=1)


def packed(sizes: dict[str, int], seed: int = 1, fingerprint: str = "f", block_size: int = 4, **options) -> PackedData:
    sources = {
        name: CountingSource(number, size, block_size, fingerprint) for number, (name, size) in enumerate(sizes.items())
    }
    return PackedData(sources, DataOrder(sizes, seed, **options))


@pytest.mark.parametrize("weights", [None, {"a": 0.7, "b": 0.3}])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_every_world_size_and_micro_batch_gives_the_same_global_batches(weights, world_size, micro_batch_size):
    global_batch_size, n_steps = 32, 6
    sizes = {"a": 90, "b": 50}
    expected = packed(sizes, weights=weights).samples(0, n_steps * global_batch_size)
    ranks = [packed(sizes, weights=weights) for _ in range(world_size)]
    per_rank = global_batch_size // world_size
    rows = [
        data.samples(step * global_batch_size + rank * per_rank + first, micro_batch_size)
        for step in range(n_steps)
        for rank, data in enumerate(ranks)
        for first in range(0, per_rank, micro_batch_size)
    ]
    assert np.array_equal(np.concatenate(rows), expected)


@given(st.integers(0, 5000), st.integers(0, 70), st.integers(0, 5000))
def test_reading_does_not_depend_on_what_was_read_before(start, count, before):
    data = packed({"a": 90, "b": 50}, weights={"a": 1, "b": 2})
    fresh = packed({"a": 90, "b": 50}, weights={"a": 1, "b": 2}).samples(start, count)
    data.samples(before, 3)
    assert np.array_equal(data.samples(start, count), fresh)


@pytest.mark.parametrize("stop", range(1, 12))
def test_a_run_resumed_at_any_step_sees_the_rest(stop):
    options = {"weights": {"a": 0.7, "b": 0.3}, "skips": [(20, 30)]}
    whole = packed({"a": 90, "b": 50}, **options).samples(0, 12 * 8)
    state = packed({"a": 90, "b": 50}, **options).state(stop * 8)
    resumed = packed({"a": 90, "b": 50}, **options)
    resumed.check_state(state)
    assert np.array_equal(resumed.samples(state["position"], (12 - stop) * 8), whole[stop * 8 :])


def test_the_state_is_what_checkpoints_hold():
    state = packed({"slim": 9, "star": 5}, 3407, weights={"slim": 0.7, "star": 0.3}, skips=[(8, 10)]).state(12)
    order_id = state.pop("order_id")
    assert len(order_id) == 64
    assert state == {
        "v": 1,
        "position": 12,
        "seed": 3407,
        "block": 4,
        "stride": 4,
        "window": None,
        "segments": [[0, {"slim": 0.7, "star": 0.3}]],
        "skips": [[8, 10]],
        "sources": {"slim": {"samples": 9, "fingerprint": "f0"}, "star": {"samples": 5, "fingerprint": "f1"}},
    }


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 2}, "data.seed"),
        ({"block_size": 8}, "data.block"),
        ({"fingerprint": "g"}, "data.sources.a.fingerprint"),
        ({"sizes": {"a": 91, "b": 50}}, "data.sources.a.samples"),
        ({"weights": {"a": 0.6, "b": 0.4}}, "data.segments"),
        ({"skips": [(3, 5)]}, "data.skips"),
    ],
)
def test_a_changed_past_is_refused_naming_the_field_and_the_way_out(change, field):
    settings = {"sizes": {"a": 90, "b": 50}, "seed": 1, "weights": {"a": 0.7, "b": 0.3}}
    state = packed(**settings).state(40)
    with pytest.raises(ValueError) as raised:
        packed(**settings | change).check_state(state)
    assert field in str(raised.value)
    assert "allow_order_change" in str(raised.value)


def test_the_future_may_be_changed():
    state = packed({"a": 90, "b": 50}, weights={"a": 0.7, "b": 0.3}).state(40)
    changed = packed(
        {"a": 90, "b": 50}, segments=[(0, {"a": 0.7, "b": 0.3}), (40, {"a": 0.1, "b": 0.9})], skips=[(40, 48)]
    )
    changed.check_state(state)
    changed.check_state(changed.state(60))


def test_a_state_of_another_version_is_refused():
    data = packed({"a": 9})
    with pytest.raises(ValueError, match="version 2"):
        data.check_state(data.state(0) | {"v": 2})


def test_sources_must_fit_the_order_and_each_other():
    with pytest.raises(ValueError, match="order was made for"):
        PackedData({"a": CountingSource(0, 5)}, DataOrder({"a": 6}, 1))
    with pytest.raises(ValueError, match="same block_size"):
        PackedData(
            {"a": CountingSource(0, 5, block_size=4), "b": CountingSource(1, 5, block_size=8)},
            DataOrder({"a": 5, "b": 5}, 1),
        )
