"""Token files read from end to end in flat memory: how often each id occurs, how long the documents are."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from lit_gpt.errors import DataError
from lit_gpt.packed_dataset import TokenFile

READ_BYTES = 4 << 20
COUNTED_AT_ONCE = 1 << 18  # np.bincount converts to int64; this much of it stays in the processor's cache
HIGHEST_COUNTED_ID = (1 << 24) - 1  # no vocabulary is larger, and damage must not ask for 16 GB of counters
EXACT_LENGTHS = 1 << 20  # longer documents are rare enough to be listed one by one


def read_tokens(file: TokenFile, first_token: int = 0, n_tokens: int | None = None) -> Iterator[np.ndarray]:
    """The tokens [first_token, first_token + n_tokens) of a file, to its end by default, in pieces of READ_BYTES.

    Raises:
        FileNotFoundError: no such file. DataError: it ends before the tokens do.
    """
    left = file.n_tokens - first_token if n_tokens is None else n_tokens
    with open(file.path, "rb", buffering=0) as opened:
        opened.seek(file.byte_offset + first_token * file.dtype.itemsize)
        while left > 0:
            wanted = min(left, max(1, READ_BYTES // file.dtype.itemsize))
            piece = np.fromfile(opened, file.dtype, wanted)
            if len(piece) < wanted:
                raise DataError(
                    f"{file.path} is truncated: {file.n_tokens} tokens are announced, the last {left - len(piece)} of "
                    f"them are not there; copy or prepare it again"
                )
            left -= wanted
            yield piece


class IdCounts:
    """How often each id occurs."""

    def __init__(self) -> None:
        self._counts = np.zeros(1, dtype=np.int64)
        self.n_tokens = 0
        self.n_impossible = 0
        """Tokens below 0 or above HIGHEST_COUNTED_ID."""
        self.lowest = self.highest = 0

    @property
    def counts(self) -> np.ndarray:
        """(highest possible id + 1,) int64."""
        return self._counts[: min(self.highest, HIGHEST_COUNTED_ID) + 1]

    def of(self, token: int) -> int:
        return int(self._counts[token]) if 0 <= token < len(self._counts) else 0

    def sum_of(self, values: np.ndarray) -> int:
        """The sum over all tokens of the (vocab_size,) integer that each id has; 0 for ids beyond them."""
        used = self.counts[: len(values)]
        return int(np.dot(values[: len(used)], used))

    def add(self, tokens: np.ndarray) -> None:
        """tokens: (k,) integers of any type."""
        for start in range(0, len(tokens), COUNTED_AT_ONCE):
            self._add(tokens[start : start + COUNTED_AT_ONCE])

    def _add(self, tokens: np.ndarray) -> None:
        lowest, highest = int(tokens.min()), int(tokens.max())
        self.lowest, self.highest = min(self.lowest, lowest), max(self.highest, highest)
        self.n_tokens += len(tokens)
        if lowest < 0 or highest > HIGHEST_COUNTED_ID:
            possible = tokens[(tokens >= 0) & (tokens <= HIGHEST_COUNTED_ID)]
            self.n_impossible += len(tokens) - len(possible)
            tokens = possible
        found = np.bincount(tokens.astype(np.intp))
        if len(found) > len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros(len(found) - len(self._counts), dtype=np.int64)])
        self._counts[: len(found)] += found


@dataclass(frozen=True)
class Scan:
    """What one file was found to hold."""

    file: TokenFile
    crc32: int
    """Checksum of the token bytes, without a header."""
    lowest: int
    highest: int


def scan_file(file: TokenFile, counts: IdCounts, on_piece: Callable[[np.ndarray], None] = lambda piece: None) -> Scan:
    """Read a file once, adding to `counts`; `on_piece` gets every (k,) piece of it.

    Raises:
        FileNotFoundError: no such file. DataError: it ends before the tokens do.
    """
    crc32, lowest, highest = 0, 0, 0
    for piece in read_tokens(file):
        crc32 = zlib.crc32(piece.data, crc32)
        lowest, highest = min(lowest, int(piece.min())), max(highest, int(piece.max()))
        counts.add(piece)
        on_piece(piece)
    return Scan(file, crc32, lowest, highest)


class DocumentLengths:
    """Lengths of documents, their separator included, counted while the tokens pass by.

    separator_id: the token at the end of each document, or at its beginning: if the first token of all is one.
    """

    def __init__(self, separator_id: int) -> None:
        self.separator_id = separator_id
        self._counts = np.zeros(EXACT_LENGTHS, dtype=np.int64)
        self._long: list[int] = []
        self._open = 0
        self._shift: int | None = None

    def add(self, tokens: np.ndarray) -> None:
        """tokens: (k,) integers that follow those of the call before."""
        if not len(tokens):
            return
        if self._shift is None:
            self._shift = int(tokens[0] == self.separator_id)
        last_tokens = np.flatnonzero(tokens == self.separator_id) - self._shift
        if not len(last_tokens):
            self._open += len(tokens)
            return
        self._count(np.diff(last_tokens, prepend=-1 - self._open))
        self._open = len(tokens) - 1 - int(last_tokens[-1])

    def close(self) -> None:
        """What is still open is a document without its end; call it where the next tokens do not continue it."""
        self._count(np.array([self._open]))
        self._open = 0

    def _count(self, lengths: np.ndarray) -> None:
        self._long += lengths[lengths >= EXACT_LENGTHS].tolist()
        found = np.bincount(lengths[(lengths > 0) & (lengths < EXACT_LENGTHS)])
        self._counts[: len(found)] += found

    @property
    def n_documents(self) -> int:
        return int(self._counts.sum()) + len(self._long)

    def percentile(self, percent: float) -> int:
        """The length that at least this share of the documents does not exceed; 0 if there are none."""
        rank = max(1, -(-self.n_documents * percent // 100))
        below = np.cumsum(self._counts)
        if rank <= below[-1]:
            return int(np.searchsorted(below, rank))
        beyond = int(rank - below[-1])
        return sorted(self._long)[beyond - 1] if self._long else 0
