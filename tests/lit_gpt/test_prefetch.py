"""Reading ahead changes no batch, for any ranks, micro-batches and resumes, reads no more, and ends with its user."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.data_order import DataOrder
from lit_gpt.errors import DataError
from lit_gpt.legacy_order import LegacyOrder
from lit_gpt.packed_data import PackedData
from lit_gpt.packed_dataset import read_header, write_token_file
from lit_gpt.prefetch import Share, WaitInterrupted, batches
from lit_gpt.token_source import TokenSource

BLOCK_SIZE, GLOBAL_BATCH_SIZE, STEPS = 6, 32, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 files of source a, 8 of source b, 63 random tokens each."""
    folder, generator = tmp_path_factory.mktemp("tokens"), np.random.default_rng(0)
    for name, count in (("a", 16), ("b", 8)):
        for number in range(count):
            write_token_file(folder / f"{name}{number:02d}.bin", generator.integers(0, 999, 63), np.dtype("<u2"))
    return folder


def opened(folder: Path, kind: str = "mixture") -> PackedData:
    stride = BLOCK_SIZE + 1 if kind == "legacy" else BLOCK_SIZE
    sources = {
        name: TokenSource(
            [read_header(path) for path in sorted(folder.glob(f"{name}*"))], BLOCK_SIZE, 999, stride=stride
        )
        for name in ("a", "b")
    }
    weights, samples = {"a": 0.7, "b": 0.3}, {name: source.n_samples for name, source in sources.items()}
    per_file = {name: source.samples_per_file for name, source in sources.items()}
    orders = {
        "proportional": lambda: DataOrder(samples, 1),
        "mixture": lambda: DataOrder(samples, 1, weights, skips=[(40, 50)]),
        "windowed": lambda: DataOrder(samples, 1, weights, window=2, files=per_file),
        "legacy": lambda: LegacyOrder({"a": 16, "b": 8}, {"a": 9, "b": 9}, 1, weights, world_size=1),
    }
    return PackedData(sources, orders[kind]())


def read_all(
    packed: PackedData, start: int, steps: int, world_size: int, micro_batch_size: int, **options
) -> np.ndarray:
    """The rows of all ranks put together as global batches: (steps, GLOBAL_BATCH_SIZE, BLOCK_SIZE + 1)."""
    ranks = []
    for rank in range(world_size):
        sizes = {"global_batch_size": GLOBAL_BATCH_SIZE, "micro_batch_size": micro_batch_size}
        share = {"start": start, "steps": steps, "rank": rank, "world_size": world_size}
        with batches(packed, **share, **sizes, **options) as stream:
            micro_batches = list(stream)
        assert {each.shape for each in micro_batches} == {(micro_batch_size, BLOCK_SIZE + 1)}
        assert all(each.dtype == np.int64 for each in micro_batches)
        ranks.append(np.concatenate(micro_batches).reshape(steps, -1, BLOCK_SIZE + 1))
    return np.concatenate(ranks, axis=1)


def one_by_one(packed: PackedData, start: int, steps: int) -> np.ndarray:
    """What `read_all` has to give, without a prefetcher."""
    rows = packed.read(np.arange(start, start + steps * GLOBAL_BATCH_SIZE))
    return rows.reshape(steps, GLOBAL_BATCH_SIZE, BLOCK_SIZE + 1)


@pytest.mark.parametrize("kind", ["proportional", "mixture", "windowed", "legacy"])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_every_world_size_and_micro_batch_gives_the_same_global_batches(folder, kind, world_size, micro_batch_size):
    packed = opened(folder, kind)
    assert np.array_equal(
        read_all(packed, 0, STEPS, world_size, micro_batch_size), one_by_one(opened(folder, kind), 0, STEPS)
    )


@pytest.mark.parametrize("kind", ["mixture", "legacy"])
@pytest.mark.parametrize("step", range(STEPS))
def test_a_run_resumed_at_any_step_elsewhere_sees_the_rest(folder, kind, step):
    saved = opened(folder, kind).state(step * GLOBAL_BATCH_SIZE)
    resumed = opened(folder, kind)
    resumed.check_state(saved)
    world_size, micro_batch_size = [(1, 8), (2, 4), (4, 8), (8, 1)][step % 4]
    rest = read_all(resumed, saved["position"], STEPS - step, world_size, micro_batch_size)
    assert np.array_equal(rest, one_by_one(opened(folder, kind), 0, STEPS)[step:])


@given(st.integers(0, 500), st.integers(1, 5), st.sampled_from([1, 2, 4, 8]), st.integers(1, 5000))
def test_how_many_rows_are_read_at_a_time_changes_nothing(folder, start, steps, world_size, read_ahead_rows):
    packed = opened(folder)
    found = read_all(packed, start, steps, world_size, 2, read_ahead_rows=read_ahead_rows)
    assert np.array_equal(found, one_by_one(packed, start, steps))


class Recorder:
    """Stands for PackedData: remembers which positions were read, and fails at one of them if told."""

    def __init__(self, fails_at: int | None = None, error: BaseException | None = None) -> None:
        self.order = self
        self.read, self.fails_at, self.error = [], fails_at, error
        self.threads = set()

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros_like(positions), positions

    def read_samples(self, source: np.ndarray, sample: np.ndarray) -> np.ndarray:
        self.threads.add(threading.current_thread())
        self.read += sample.tolist()
        if self.fails_at in self.read:
            raise self.error
        return np.repeat(sample[:, None], 3, axis=1)


def read_ahead_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def wait_for(condition) -> None:
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it never came true")


@pytest.mark.parametrize("read_ahead_rows", [1, 8, 24, 1000])
def test_nothing_behind_the_last_step_is_read(read_ahead_rows):
    recorder = Recorder()
    sizes = {"global_batch_size": 16, "micro_batch_size": 4, "rank": 1, "world_size": 2}
    with batches(recorder, start=100, steps=3, **sizes, read_ahead_rows=read_ahead_rows) as stream:
        rows = np.concatenate(list(stream))
        with pytest.raises(StopIteration):
            next(stream)
    expected = [*range(108, 116), *range(124, 132), *range(140, 148)]
    assert rows[:, 0].tolist() == expected
    assert recorder.read == expected


def test_the_thread_starts_with_the_first_batch_and_is_not_far_ahead():
    recorder = Recorder()
    stream = batches(recorder, start=0, steps=100, global_batch_size=8, micro_batch_size=8, read_ahead_rows=16)
    assert not read_ahead_threads() and not recorder.read
    assert next(stream)[:, 0].tolist() == list(range(8))
    wait_for(lambda: len(recorder.read) >= 48)
    assert next(stream)[:, 0].tolist() == list(range(8, 16))
    assert len(recorder.read) == 48, "one chunk is in use and two wait"
    assert threading.current_thread() not in recorder.threads
    stream.close()


@pytest.mark.parametrize("batches_read", [0, 1, 7, 40])
def test_closing_leaves_no_thread_behind(batches_read):
    with batches(Recorder(), start=0, steps=40, global_batch_size=8, micro_batch_size=8, read_ahead_rows=16) as stream:
        for _ in range(batches_read):
            next(stream)
    assert not read_ahead_threads()
    with pytest.raises(ValueError, match="closed"):
        next(stream)
    stream.close()


def test_forgetting_an_iterator_ends_its_thread():
    stream = batches(Recorder(), start=0, steps=40, global_batch_size=8, micro_batch_size=8, read_ahead_rows=16)
    next(stream)
    (thread,) = read_ahead_threads()
    del stream
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.mark.parametrize("error", [DataError("the file is gone"), OSError(5, "no such device"), KeyError("a fault")])
def test_an_error_of_the_thread_is_raised_where_the_batches_are_used(error):
    recorder = Recorder(fails_at=20, error=error)
    with batches(recorder, start=0, steps=9, global_batch_size=8, micro_batch_size=8, read_ahead_rows=8) as stream:
        assert len(next(stream)) == len(next(stream)) == 8
        for _ in range(2):  # an error that was raised once does not turn into the end of the data
            with pytest.raises(type(error)) as raised:
                next(stream)
            assert raised.value is error
    assert not read_ahead_threads()


def test_a_wait_for_rows_that_do_not_come_can_be_given_up():
    recorder, released = Recorder(), threading.Event()
    recorder.locate = lambda positions: (released.wait(60), positions)
    asked = iter([False, True])
    sizes = {"global_batch_size": 8, "micro_batch_size": 8}
    with batches(recorder, start=0, steps=9, **sizes, interrupted=lambda: next(asked)) as stream:
        with pytest.raises(WaitInterrupted):
            next(stream)
        assert list(asked) == []
    assert read_ahead_threads(), "closing did not wait for the rows either"
    released.set()
    wait_for(lambda: not read_ahead_threads())


def test_a_damaged_file_is_reported_by_name(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    packed = opened(tmp_path, "proportional")
    with open(tmp_path / "a03.bin", "r+b") as file:
        file.truncate(60)
    with batches(packed, start=0, steps=99, global_batch_size=8, micro_batch_size=8) as stream:
        with pytest.raises(DataError, match=r"a03\.bin is truncated"):
            list(stream)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batch_size": 5}, "multiple of micro_batch_size .* = 10; micro_batch_size can be 1, 2, 4, 8$"),
        ({"world_size": 3}, "= 4 \\* 3 = 12; change the world size"),
        ({"rank": 2}, "rank=2 must be in range\\(2\\)"),
        ({"start": -1}, "start=-1"),
        ({"micro_batch_size": 0}, "micro_batch_size=0 at least 1"),
        ({"read_ahead_rows": 0}, "read_ahead_rows=0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_would(change, message):
    sizes = {"start": 0, "steps": 3, "global_batch_size": 16, "micro_batch_size": 4, "rank": 0, "world_size": 2}
    with pytest.raises(ValueError, match=message):
        batches(Recorder(), **sizes | change)


def test_the_ranks_share_the_positions_without_gap_or_overlap():
    shares = [Share(5, 3, 12, 2, rank, 3) for rank in range(3)]
    positions = np.concatenate([share.positions(0, share.n_rows) for share in shares])
    assert sorted(positions.tolist()) == list(range(5, 41))
    assert shares[1].positions(2, 6).tolist() == [11, 12, 21, 22]
