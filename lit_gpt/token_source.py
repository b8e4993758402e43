"""Samples of a list of token files: where each one is, and random access to them."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from lit_gpt.errors import DataError
from lit_gpt.packed_dataset import TokenFile
from lit_gpt.token_files import fingerprint

OPEN_FILES = 256  # descriptors kept open per source; mapping files instead meets vm.max_map_count at 65,530 files


class SampleIndex:
    """sample -> (file, first token): samples of block_size targets at stride block_size that never cross files.

    One int64 per file, so the index of 1e12 tokens in half a million files is 4 MB.
    """

    def __init__(self, n_tokens: np.ndarray, block_size: int) -> None:
        per_file = np.maximum(0, (np.asarray(n_tokens, dtype=np.int64) - 1) // block_size)
        self.block_size = block_size
        self.first_sample = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(per_file)])

    @property
    def n_samples(self) -> int:
        return int(self.first_sample[-1])

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """indices: (k,) samples. Returns the file and the first token inside that file, (k,) int64 each."""
        files = np.searchsorted(self.first_sample, indices, side="right") - 1
        return files, (indices - self.first_sample[files]) * self.block_size


class TokenSource:
    """Random access to the samples of a list of token files. One thread at a time may read.

    files: all with one dtype. block_size: targets per sample. vocab_size: every token read must be below it.

    Raises:
        DataError: mixed dtypes, a file whose tokens are not all there, or too few tokens for a single sample.
    """

    def __init__(self, files: Sequence[TokenFile], block_size: int, vocab_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1")
        if not files:
            raise DataError("no token files; prepare some with scripts/prepare.py")
        self.files, self.block_size, self.vocab_size = files, block_size, vocab_size
        self.dtype = files[0].dtype
        for file in files:
            if file.dtype != self.dtype:
                raise DataError(
                    f"{file.path} holds {file.dtype} tokens, but {files[0].path} holds {self.dtype}; "
                    f"files of one source need one dtype, so prepare them in one go"
                )
        self.n_tokens = sum(file.n_tokens for file in files)
        self._index = SampleIndex(np.fromiter((file.n_tokens for file in files), np.int64, len(files)), block_size)
        self.n_samples = self._index.n_samples
        if not self.n_samples:
            raise DataError(
                f"{files[0].path}{' and others' if len(files) > 1 else ''}: {self.n_tokens} tokens in {len(files)} "
                f"file(s) make no sample of block_size={block_size}, which needs at least {block_size + 1} tokens "
                f"in one file; add data or lower block_size"
            )
        self.fingerprint = fingerprint(files)
        self._descriptors = _Descriptors(OPEN_FILES)
        self._buffer = np.empty((0, block_size + 1), dtype=self.dtype)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """indices: (n,) samples. Returns (n, block_size + 1) int64; a sample's targets are its tokens after the first.

        Raises:
            DataError: a file changed or broke since it was opened, or holds a token that the vocabulary lacks.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < self.n_samples):
            raise IndexError(f"samples {indices.min()} .. {indices.max()} are not all in range({self.n_samples})")
        if len(self._buffer) < len(indices):
            self._buffer = np.empty((len(indices), self.block_size + 1), dtype=self.dtype)
        rows = self._buffer[: len(indices)]
        files, first_tokens = self._index.locate(indices)
        offsets = first_tokens * self.dtype.itemsize
        for row, number, offset in zip(rows.view(np.uint8), files.tolist(), offsets.tolist(), strict=True):
            self._read_row(row, self.files[number], offset)
        if rows.size and (rows.max() >= self.vocab_size or rows.min() < 0):
            self._refuse_tokens(rows, files)
        return rows.astype(np.int64)

    def _read_row(self, row: np.ndarray, file: TokenFile, offset: int) -> None:
        found_bytes = _read_into(self._descriptors.get(file.path), row, file.byte_offset + offset)
        if found_bytes != len(row):
            raise DataError(
                f"{file.path} is truncated: expected {len(row)} bytes at {file.byte_offset + offset}, "
                f"found {found_bytes} bytes; it was whole when the run started"
            )

    def _refuse_tokens(self, rows: np.ndarray, files: np.ndarray) -> None:
        bad = ((rows >= self.vocab_size) | (rows < 0)).any(axis=1)
        row = int(np.flatnonzero(bad)[0])
        tokens = rows[row]
        token = tokens[(tokens >= self.vocab_size) | (tokens < 0)][0]
        raise DataError(
            f"{self.files[files[row]].path} holds token {token}, outside the vocabulary of {self.vocab_size}; "
            f"the file is damaged or was made with another tokenizer"
        )


class _Descriptors:
    """Open files by path; the one that was used longest ago is closed first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._open: OrderedDict[str, int] = OrderedDict()

    def get(self, path: str) -> int:
        descriptor = self._open.get(path)
        if descriptor is not None:
            self._open.move_to_end(path)
            return descriptor
        if len(self._open) >= self.limit:
            os.close(self._open.popitem(last=False)[1])
        descriptor = os.open(path, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        self._open[path] = descriptor
        return descriptor

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def _read_into(descriptor: int, row: np.ndarray, offset: int) -> int:
    """Fill `row`, (k,) uint8, from `offset`; returns how many bytes there were. NFS may give a read in parts."""
    done = 0
    while done < len(row):
        if hasattr(os, "preadv"):
            count = os.preadv(descriptor, [row[done:]], offset + done)
        else:  # macOS before 11
            part = os.pread(descriptor, len(row) - done, offset + done)
            count = len(part)
            row[done : done + count] = np.frombuffer(part, dtype=np.uint8)
        if count == 0:
            break
        done += count
    return done
