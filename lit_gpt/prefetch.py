"""Micro-batches of one rank, read ahead by a thread: many rows at a time off the files, a few at a time to the loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lit_gpt.packed_data import PackedData

READ_AHEAD_ROWS = 256
CHUNKS_AHEAD = 2  # finished ones that may wait for the loop
LOCATED_ROWS = 4096  # their places are computed in one call
ASK_AFTER_SECS = 0.5  # a wait that takes longer may be interrupted


class WaitInterrupted(Exception):
    """Nobody waits for the rows any longer."""


@dataclass(frozen=True)
class Share:
    """The rows that one rank reads: in step t a slice of the positions [start + t * G, start + (t + 1) * G)."""

    start: int
    """First position of the first step."""
    steps: int
    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank} must be in range({self.world_size}), the world size")
        if self.start < 0 or self.steps < 0 or self.global_batch_size < 1 or self.micro_batch_size < 1:
            raise ValueError(
                f"start={self.start} and steps={self.steps} must not be negative, "
                f"global_batch_size={self.global_batch_size} and micro_batch_size={self.micro_batch_size} at least 1"
            )
        rows_per_iter = self.micro_batch_size * self.world_size
        if self.global_batch_size % rows_per_iter:
            per_rank, rest = divmod(self.global_batch_size, self.world_size)
            fitting = [] if rest else [n for n in range(1, per_rank + 1) if per_rank % n == 0]
            way_out = f"micro_batch_size can be {', '.join(map(str, fitting))}" if fitting else "change the world size"
            raise ValueError(
                f"global_batch_size={self.global_batch_size} must be a multiple of micro_batch_size * world size = "
                f"{self.micro_batch_size} * {self.world_size} = {rows_per_iter}; {way_out}"
            )

    @property
    def rows_per_step(self) -> int:
        return self.global_batch_size // self.world_size

    @property
    def n_rows(self) -> int:
        return self.steps * self.rows_per_step

    def positions(self, first_row: int, stop_row: int) -> np.ndarray:
        """Positions of the rank's rows first_row .. stop_row - 1, counted over all steps: (stop_row - first_row,)."""
        steps, rows = np.divmod(np.arange(first_row, stop_row), self.rows_per_step)
        return self.start + steps * self.global_batch_size + self.rank * self.rows_per_step + rows


class Prefetcher:
    """Iterator over the micro-batches of a share, (micro_batch_size, block_size + 1) int64 each, read by a thread.

    The thread starts with the first batch that is asked for, is at most CHUNKS_AHEAD + 1 chunks of rows ahead and never
    reads behind the last step. Its errors are raised where the batches are used. Close the iterator, or use it as a
    context manager; until then nobody else may read from `packed`.
    """

    def __init__(
        self,
        packed: PackedData,
        share: Share,
        read_ahead_rows: int = READ_AHEAD_ROWS,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        if read_ahead_rows < 1:
            raise ValueError(f"read_ahead_rows={read_ahead_rows} must be at least 1")
        self._micro_batch_size = share.micro_batch_size
        self._reader = _Reader(packed, share, -(-read_ahead_rows // share.micro_batch_size) * share.micro_batch_size)
        self._thread: threading.Thread | None = None
        self._chunk = np.empty((0, 0), dtype=np.int64)
        self._row = 0
        self._interrupted = interrupted
        self._error: BaseException | None = None

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> np.ndarray:
        if self._row == len(self._chunk):
            self._chunk, self._row = self._next_chunk(), 0
        batch = self._chunk[self._row : self._row + self._micro_batch_size]
        self._row += self._micro_batch_size
        return batch

    def close(self) -> None:
        """End the thread, once the chunk that it is reading is there. The iterator is of no use afterwards.

        A thread whose chunk was not waited for is not waited for here either.
        """
        self._reader.end()
        if self._thread is not None and not isinstance(self._error, WaitInterrupted):
            self._thread.join()
        self._chunk, self._row = np.empty((0, 0), dtype=np.int64), 0
        self._error = self._error or ValueError("the prefetcher is closed")

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_reader"):  # not if a setting was refused
            self._reader.end()

    def _next_chunk(self) -> np.ndarray:
        if self._error is not None:
            raise self._error
        if self._thread is None:
            # a daemon, so that a program that fails elsewhere is not kept from ending
            self._thread = threading.Thread(target=self._reader.run, name="read-ahead", daemon=True)
            self._thread.start()
        chunk = self._wait()
        self._reader.free.release()
        if isinstance(chunk, BaseException):
            self._error = chunk
            raise chunk
        return chunk

    def _wait(self) -> np.ndarray | BaseException:
        while True:
            try:
                return self._reader.chunks.get(timeout=ASK_AFTER_SECS)
            except Empty:
                if self._interrupted():
                    self._error = WaitInterrupted()
                    raise self._error from None


class _Reader:
    """What the thread does. It knows nothing of the Prefetcher, which can therefore be forgotten without closing it."""

    def __init__(self, packed: PackedData, share: Share, chunk_rows: int) -> None:
        self._packed, self._share, self._chunk_rows = packed, share, chunk_rows
        self.chunks: SimpleQueue[np.ndarray | BaseException] = SimpleQueue()
        self.free = threading.Semaphore(CHUNKS_AHEAD)
        self.stop = threading.Event()

    def end(self) -> None:
        self.stop.set()
        self.free.release()

    def run(self) -> None:
        try:
            self._read()
        except BaseException as error:  # noqa: BLE001  the iterator raises it
            self.chunks.put(error)
        else:
            self.chunks.put(StopIteration())

    def _read(self) -> None:
        located = max(1, LOCATED_ROWS // self._chunk_rows) * self._chunk_rows
        for first in range(0, self._share.n_rows, located):
            stop = min(first + located, self._share.n_rows)
            source, sample = self._packed.order.locate(self._share.positions(first, stop))
            for row in range(0, stop - first, self._chunk_rows):
                self.free.acquire()
                if self.stop.is_set():
                    return
                few = slice(row, row + self._chunk_rows)
                self.chunks.put(self._packed.read_samples(source[few], sample[few]))


def batches(
    packed: PackedData,
    *,
    start: int,
    steps: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    read_ahead_rows: int = READ_AHEAD_ROWS,
    interrupted: Callable[[], bool] = lambda: False,
) -> Prefetcher:
    """The micro-batches of `steps` steps from position `start` on, for one rank: an iterator to be closed.

    Step t takes the positions [start + t * global_batch_size, start + (t + 1) * global_batch_size), the rank its
    rank-th part of them. Rows are read read_ahead_rows at a time, rounded up to whole micro-batches. `interrupted` is
    asked again and again while rows do not come; the iterator raises WaitInterrupted when it says so.

    Raises:
        ValueError: sizes that do not divide; the message has the sizes that would.
    """
    share = Share(start, steps, global_batch_size, micro_batch_size, rank, world_size)
    return Prefetcher(packed, share, read_ahead_rows, interrupted)
