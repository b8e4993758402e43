"""Samples are read by position, the same for any cut into batches, and a changed past is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.data_order import DataOrder
from lit_gpt.errors import DataError
from lit_gpt.legacy_order import LegacyOrder
from lit_gpt.packed_data import PackedData, Place, describe_overlap, expected_overlap
from lit_gpt.packed_dataset import read_header, write_token_file
from lit_gpt.token_files import TokenFiles
from lit_gpt.token_source import TokenSource


class CountingSource:
    """A source whose samples are recognisable: sample i of source s is filled with 1000 s + i."""

    def __init__(self, number: int, n_samples: int, block_size: int = 4, fingerprint: str = "f") -> None:
        self.number, self.n_samples, self.block_size, self.stride = number, n_samples, block_size, block_size
        self.fingerprint = f"{fingerprint}{number}"

    def read(self, indices: np.ndarray) -> np.ndarray:
        assert ((indices >= 0) & (indices < self.n_samples)).all()
        return np.repeat((1000 * self.number + indices)[:, None], self.block_size + 1, axis=1)


def packed(sizes: dict[str, int], seed: int = 1, fingerprint: str = "f", block_size: int = 4, **options) -> PackedData:
    sources = {
        name: CountingSource(number, size, block_size, fingerprint) for number, (name, size) in enumerate(sizes.items())
    }
    if options.get("window"):
        options["files"] = {name: np.array([size - 5, 5]) for name, size in sizes.items()}
    return PackedData(sources, DataOrder(sizes, seed, **options))


def legacy(folder: Path, world_size: int = 1, seed: int = 1, **options) -> PackedData:
    """Two sources of 20 and 17 files in a folder, read as TinyLlama would; every token of a file is its number."""
    block_size = options.pop("block_size", 4)
    sources = {}
    for name, count in (("web", 20), ("code", 17)):
        for file in range(count):
            path = folder / f"{name}_{file:02d}.bin"
            if not path.exists():
                write_token_file(path, np.full(15, file), np.dtype("<u2"))
        files = TokenFiles.of([read_header(path) for path in sorted(folder.glob(f"{name}_*"))])
        sources[name] = TokenSource(files, block_size, 1000, stride=block_size + 1)
    settings = {"weights": {"web": 0.7, "code": 0.3}} | options
    counts = {name: len(source.files) for name, source in sources.items()}
    blocks = {name: int(source.samples_per_file[0]) for name, source in sources.items()}
    return PackedData(sources, LegacyOrder(counts, blocks, seed, world_size=world_size, **settings))


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
    # order_id as it was when checkpoints first held one
    assert state.pop("order_id") == "e9adc74136cb290defeacfbbd7650a2ad2711f49bb2d5e57c24733cb6c77ed3f"
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
        ({"window": 1}, "data.window: the checkpoint has None, this run has 1"),
    ],
)
def test_a_changed_past_is_refused_naming_the_field_and_the_way_out(change, field):
    settings = {"sizes": {"a": 90, "b": 50}, "seed": 1, "weights": {"a": 0.7, "b": 0.3}}
    state = packed(**settings).state(40)
    with pytest.raises(ValueError) as raised:
        packed(**settings | change).check_state(state)
    assert field in str(raised.value)
    assert "--data.allow_order_change true" in str(raised.value) or "--data.start_position 0" in str(raised.value)


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
    for order in (DataOrder({"a": 6}, 1), DataOrder({"b": 5}, 1), LegacyOrder({"b": 8}, {"b": 1}, 1, None, 1)):
        with pytest.raises(ValueError, match="order was made for"):
            PackedData({"a": CountingSource(0, 5)}, order)
    with pytest.raises(ValueError, match="same block_size"):
        PackedData(
            {"a": CountingSource(0, 5, block_size=4), "b": CountingSource(1, 5, block_size=8)},
            DataOrder({"a": 5, "b": 5}, 1),
        )


@given(st.lists(st.integers(0, 5000), max_size=70), st.sampled_from([None, {"a": 1, "b": 2}]))
def test_positions_are_read_in_any_order(positions, weights):
    data = packed({"a": 90, "b": 50}, weights=weights)
    positions = np.array(positions, dtype=np.int64)
    assert np.array_equal(data.read(positions), data.samples(0, 5001)[positions])


@pytest.mark.parametrize("window", [None, 1])
def test_a_place_is_where_the_sample_was_read(tmp_path: Path, window):
    rng, sources = np.random.default_rng(0), {}
    for name in ("a", "b"):
        for number in range(3):
            write_token_file(tmp_path / f"{name}{number}.bin", rng.integers(0, 999, 50 + number), np.dtype("<u2"))
        files = [read_header(path) for path in sorted(tmp_path.glob(f"{name}*"))]
        sources[name] = TokenSource(files, 8, 1000)
    samples = {name: source.n_samples for name, source in sources.items()}
    files = {name: source.samples_per_file for name, source in sources.items()}
    data = PackedData(sources, DataOrder(samples, 1, {"a": 1, "b": 2}, window=window, files=files))
    for position in range(40):
        place = data.place(position)
        row = np.fromfile(place.path, place.dtype, count=9, offset=place.byte_offset)
        assert row.tolist() == data.samples(position, 1)[0].tolist()
        assert place.first_token * 2 + 24 == place.byte_offset
        assert Path(place.path).name[0] == place.source
        assert np.array_equal(sources[place.source].read(np.array([place.sample]))[0], row)


def test_a_legacy_order_reads_files_at_its_own_stride(tmp_path: Path):
    data = legacy(tmp_path, world_size=2)
    rows = data.samples(0, 300)
    source, sample = data.order.locate(np.arange(300))
    assert np.array_equal(rows, np.repeat(sample[:, None] // 3, 5, axis=1))
    assert data.place(7) == Place(
        position=7,
        source=data.order.names[source[7]],
        sample=int(sample[7]),
        path=str(tmp_path / f"{data.order.names[source[7]]}_{sample[7] // 3:02d}.bin"),
        byte_offset=24 + int(sample[7]) % 3 * 5 * 2,
        first_token=int(sample[7]) % 3 * 5,
        dtype=np.dtype("<u2"),
    )


def test_a_legacy_run_resumes_from_its_own_state(tmp_path: Path):
    saved = json.loads(json.dumps(legacy(tmp_path, world_size=2).state(40)))
    order_id, sources = saved.pop("order_id"), saved.pop("sources")
    assert saved == {
        "v": 1,
        "position": 40,
        "order": "legacy",
        "block": 4,
        "stride": 5,
        "seed": 1,
        "weights": [["web", 0.7], ["code", 0.3]],
        "world_size": 2,
        "files_per_group": 8,
    }
    assert [sources["code"][field] for field in ("samples", "files", "blocks_per_file")] == [51, 17, 3]
    legacy(tmp_path, world_size=2).check_state(saved | {"order_id": order_id, "sources": sources})


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 2}, "data.seed"),
        ({"world_size": 1}, "data.world_size: the checkpoint has 2, this run has 1"),
        ({"files_per_group": 4}, "data.files_per_group"),
        ({"weights": {"web": 0.6, "code": 0.4}}, "data.weights"),
        ({"block_size": 6}, "data.stride"),
    ],
)
def test_a_changed_legacy_order_is_refused_naming_the_field(tmp_path: Path, change, field):
    state = legacy(tmp_path, world_size=2).state(40)
    with pytest.raises(ValueError, match=field):
        legacy(tmp_path, **{"world_size": 2} | change).check_state(state)


def test_another_kind_of_order_is_refused(tmp_path: Path):
    old = legacy(tmp_path)
    files = {name: source.files for name, source in zip(old.order.names, old.sources, strict=True)}
    sources = {name: TokenSource(each, 4, 1000) for name, each in files.items()}
    samples = {name: source.n_samples for name, source in sources.items()}
    new = PackedData(sources, DataOrder(samples, 1, {"web": 0.7, "code": 0.3}))
    with pytest.raises(ValueError, match="data.order: the checkpoint has 'legacy', this run has 'permuted'"):
        new.check_state(old.state(40))
    with pytest.raises(ValueError, match="data.order: the checkpoint has 'permuted', this run has 'legacy'"):
        old.check_state(new.state(40))


def test_legacy_files_of_two_sizes_are_refused_naming_the_file(tmp_path: Path):
    legacy(tmp_path)
    write_token_file(tmp_path / "web_07.bin", np.full(9, 7), np.dtype("<u2"))
    with pytest.raises(DataError, match=r"web_07.bin holds 1 samples of 5 tokens, the other files of 'web' 3"):
        legacy(tmp_path)


def test_a_legacy_order_refuses_samples_that_overlap():
    with pytest.raises(ValueError, match="order=legacy needs 5"):
        PackedData({"a": CountingSource(0, 80)}, LegacyOrder({"a": 8}, {"a": 10}, 1, None, 1))


def test_another_block_size_is_a_new_phase_and_says_how_much_would_be_read_again():
    before = packed({"a": 90, "b": 50}, weights={"a": 3, "b": 1})
    state = before.state(60)
    assert expected_overlap(state) == before.order.epochs(60)
    with pytest.raises(ValueError) as raised:
        packed({"a": 45, "b": 25}, weights={"a": 3, "b": 1}, block_size=8).check_state(state)
    assert "data.block: the checkpoint has 4, this run has 8" in str(raised.value)
    assert "position 0 of the new order" in str(raised.value)
    assert describe_overlap(state) in str(raised.value)
    assert "44.44% of a, 40.00% of b" in describe_overlap(state)


def test_nothing_can_be_read_again_more_than_whole(tmp_path: Path):
    assert expected_overlap(packed({"a": 10, "b": 10}).state(77)) == {"a": 1.0, "b": 1.0}
    assert expected_overlap(packed({"a": 10, "b": 10}, weights={"a": 1, "b": 0}).state(5)) == {"a": 0.5, "b": 0.0}
    assert expected_overlap(packed({"a": 10}, window=1).state(5)) == {"a": 0.5}
    read_files = 16  # of 20 and of 17: one rank reads whole groups of 8
    assert expected_overlap(legacy(tmp_path).state(10**4)) == {"web": read_files / 20, "code": read_files / 17}
