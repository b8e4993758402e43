"""Samples of a list of token files: where each one is, and random access to them."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Sequence
from typing import ClassVar
from weakref import WeakSet

import numpy as np

from lit_gpt.errors import DataError
from lit_gpt.packed_dataset import TokenFile
from lit_gpt.token_files import TokenFiles

OPEN_FILES = 256  # descriptors kept open by all sources; mapping files instead meets vm.max_map_count at 65,530 files
BUFFER_ROWS = 64  # read, checked and widened at a time: rows of 2,048 tokens then stay in the processor's cache


class SampleIndex:
    """sample -> (file, first token): samples of block_size targets, `stride` apart, that never cross files.

    n_tokens: (files,) integers. stride: tokens between the starts of two samples; block_size unless told.
    One int64 per file, so the index of 1e12 tokens in half a million files is 4 MB.
    """

    def __init__(self, n_tokens: np.ndarray, block_size: int, stride: int | None = None) -> None:
        self.block_size = block_size
        self.stride = block_size if stride is None else stride
        if block_size < 1 or self.stride < 1:
            raise ValueError(f"block_size={block_size} and stride={self.stride} must be at least 1")
        starts = (np.asarray(n_tokens, dtype=np.int64) - block_size - 1) // self.stride + 1
        self.first_sample = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.maximum(0, starts))])

    @property
    def n_samples(self) -> int:
        return int(self.first_sample[-1])

    @property
    def samples_per_file(self) -> np.ndarray:
        """(files,) int64."""
        return np.diff(self.first_sample)

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """indices: (k,) samples. Returns the file and the first token inside that file, (k,) int64 each."""
        files = np.searchsorted(self.first_sample, indices, side="right") - 1
        return files, (indices - self.first_sample[files]) * self.stride


class TokenSource:
    """Random access to the samples of a list of token files. One thread at a time may read.

    files: all with one dtype. block_size: targets per sample. vocab_size: every token read must be below it.
    stride: tokens between the starts of two samples; block_size unless told, so that all targets are read once.
    windowed: the order reads a few files at a time; they are then fetched whole as soon as they are opened.

    Raises:
        DataError: mixed dtypes, a file whose tokens are not all there, or too few tokens for a single sample.
    """

    def __init__(
        self,
        files: Sequence[TokenFile],
        block_size: int,
        vocab_size: int,
        *,
        stride: int | None = None,
        windowed: bool = False,
    ) -> None:
        if not files:
            raise DataError("no token files; prepare some with scripts/prepare.py")
        self.files = files if isinstance(files, TokenFiles) else TokenFiles.of(files)
        self.block_size, self.vocab_size = block_size, vocab_size
        self._index = SampleIndex(self.files.n_tokens, block_size, stride)
        self.stride = self._index.stride
        self.dtype = self.files.dtype
        self.n_tokens = int(self.files.n_tokens.sum())
        self.n_samples = self._index.n_samples
        if not self.n_samples:
            raise DataError(
                f"{files[0].path}{' and others' if len(files) > 1 else ''}: {self.n_tokens} tokens in {len(files)} "
                f"file(s) make no sample of block_size={block_size}, which needs at least {block_size + 1} tokens "
                f"in one file; add data or lower block_size"
            )
        self._descriptors = _Descriptors(windowed)
        self._buffer = np.empty((BUFFER_ROWS, block_size + 1), dtype=self.dtype)
        self._row_bytes = [memoryview(row) for row in self._buffer.view(np.uint8)]  # a new view per read costs more

    @property
    def fingerprint(self) -> str:
        """sha256 over names, sizes and first tokens of the files."""
        return self.files.fingerprint

    @property
    def samples_per_file(self) -> np.ndarray:
        """(files,) int64."""
        return self._index.samples_per_file

    def place(self, index: int) -> tuple[TokenFile, int]:
        """The file of a sample, and the sample's first token inside that file."""
        self._check_range(np.array([index]))
        files, first_tokens = self._index.locate(np.array([index]))
        return self.files[int(files[0])], int(first_tokens[0])

    def read(self, indices: np.ndarray) -> np.ndarray:
        """indices: (n,) samples. Returns (n, block_size + 1) int64; a sample's targets are its tokens after the first.

        Raises:
            DataError: a file changed or broke since it was opened, or holds a token that the vocabulary lacks.
        """
        indices = np.asarray(indices, dtype=np.int64)
        self._check_range(indices)
        files, first_tokens = self._index.locate(indices)
        offsets = self.files.byte_offset[files] + first_tokens * self.dtype.itemsize
        result = np.empty((len(indices), self.block_size + 1), dtype=np.int64)
        for start in range(0, len(indices), BUFFER_ROWS):
            few = slice(start, start + BUFFER_ROWS)
            self._fill(files[few].tolist(), offsets[few].tolist())
            rows = self._buffer[: len(files[few])]
            if rows.max() >= self.vocab_size or (self.dtype.kind == "i" and rows.min() < 0):
                self._refuse_tokens(rows, files[few])
            result[few] = rows
        return result

    def _check_range(self, indices: np.ndarray) -> None:
        if indices.size and not (indices.min() >= 0 and indices.max() < self.n_samples):
            raise IndexError(f"samples {indices.min()} .. {indices.max()} are not all in range({self.n_samples})")

    def _fill(self, files: list[int], offsets: list[int]) -> None:
        """Read one row of the buffer from each (file, offset in bytes)."""
        expected = self._buffer.shape[1] * self.dtype.itemsize
        open_files, preadv = self._descriptors.open, getattr(os, "preadv", None)
        for row, number, offset in zip(self._row_bytes, files, offsets):  # noqa: B905  the buffer may have more rows
            descriptor = open_files.get(number)
            if descriptor is None:
                descriptor = self._descriptors.add(number, self.files.names[number])
            found = preadv(descriptor, (row,), offset) if preadv else 0
            if found != expected:
                found += _read_rest(descriptor, row[found:], offset + found)
            if found != expected:
                raise DataError(
                    f"{self.files.names[number]} is truncated: expected {expected} bytes at {offset}, "
                    f"found {found} bytes; it was whole when the run started"
                )

    def _refuse_tokens(self, rows: np.ndarray, files: np.ndarray) -> None:
        bad = ((rows >= self.vocab_size) | (rows < 0)).any(axis=1)
        row = int(np.flatnonzero(bad)[0])
        tokens = rows[row]
        token = tokens[(tokens >= self.vocab_size) | (tokens < 0)][0]
        raise DataError(
            f"{self.files.names[files[row]]} holds token {token}, outside the vocabulary of {self.vocab_size}; "
            f"the file is damaged or was made with another tokenizer"
        )


def open_files_limit() -> int:
    """Descriptors that all sources together may keep open: the rest of the process needs some too."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return OPEN_FILES if soft == resource.RLIM_INFINITY else max(1, min(OPEN_FILES, soft // 2))


class _Descriptors:
    """Open files by number. All sources of the process share one limit; the file opened longest ago is closed first."""

    _all: ClassVar[WeakSet[_Descriptors]] = WeakSet()

    def __init__(self, windowed: bool) -> None:
        self.open: dict[int, int] = {}
        self._windowed = windowed
        self._all.add(self)

    def add(self, number: int, path: str) -> int:
        limit = max(1, open_files_limit() // len(self._all))
        while len(self.open) >= limit:
            self._close_oldest()
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            if error.errno != errno.EMFILE or not self.open:
                raise
            self._close_oldest()
            return self.add(number, path)
        if hasattr(os, "posix_fadvise"):
            advice = os.POSIX_FADV_WILLNEED if self._windowed else os.POSIX_FADV_RANDOM
            os.posix_fadvise(descriptor, 0, 0, advice)
        self.open[number] = descriptor
        return descriptor

    def _close_oldest(self) -> None:
        os.close(self.open.pop(next(iter(self.open))))

    def __del__(self) -> None:
        for descriptor in self.open.values():
            os.close(descriptor)


def _read_rest(descriptor: int, row: memoryview, offset: int) -> int:
    """Fill `row` from `offset`; returns how many bytes there were. NFS may give a read in parts, macOS 10 no preadv."""
    done = 0
    while done < len(row):
        part = os.pread(descriptor, len(row) - done, offset + done)
        if not part:
            break
        row[done : done + len(part)] = part
        done += len(part)
    return done
