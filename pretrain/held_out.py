"""Held-out token files as rows in file order, so that every target is measured once."""

from __future__ import annotations

import numpy as np

from lit_gpt.errors import DataError
from lit_gpt.token_scan import read_tokens
from lit_gpt.token_source import TokenSource


class ValidationSet:
    """Rows of a held-out set: first the full ones of all files, then the short last row of each file.

    name: for records. source: the full rows, at a stride of block_size.
    byte_lengths: (vocab_size,) int64, UTF-8 bytes that each token stands for, 0 for separators and other controls;
        None if it is not known what the tokens stand for.
    separator_id: token that ends a document, beyond which no token sees; None: they see all of their row.
    """

    def __init__(
        self, name: str, source: TokenSource, byte_lengths: np.ndarray | None, separator_id: int | None = None
    ) -> None:
        self.name, self.source, self.byte_lengths, self.separator_id = name, source, byte_lengths, separator_id
        tokens = source.files.n_tokens
        full_rows = np.maximum(0, (tokens - 1) // source.block_size)
        first = full_rows * source.block_size  # a row's last token is the next one's first
        self._tail_files = np.flatnonzero(tokens - first > 1)
        self._tail_first = first[self._tail_files]
        self._tail_targets = (tokens - first)[self._tail_files] - 1
        self.n_rows = source.n_samples + len(self._tail_files)
        self.n_targets = source.n_samples * source.block_size + int(self._tail_targets.sum())

    def rows_within(self, max_tokens: int | None) -> int:
        """How many rows from the start make at most `max_tokens` targets, but at least one row."""
        if max_tokens is None or max_tokens >= self.n_targets:
            return self.n_rows
        return min(self.source.n_samples, max(1, max_tokens // self.source.block_size))

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """rows: (k,) in ascending order. Returns (k, block_size + 1) int64 tokens and (k,) targets of each row.

        A short row is filled up with zeros behind its last target.

        Raises:
            DataError: a file changed or broke since it was opened, or holds a token that the vocabulary lacks.
        """
        full = rows[rows < self.source.n_samples]
        samples = np.zeros((len(rows), self.source.block_size + 1), dtype=np.int64)
        targets = np.full(len(rows), self.source.block_size, dtype=np.int64)
        if len(full):
            samples[: len(full)] = self.source.read(full)
        for i, row in enumerate(rows[len(full) :], len(full)):
            tail = self._read_tail(int(row) - self.source.n_samples)
            samples[i, : len(tail)] = tail
            targets[i] = len(tail) - 1
        return samples, targets

    def _read_tail(self, number: int) -> np.ndarray:
        file = self.source.files[int(self._tail_files[number])]
        count = int(self._tail_targets[number]) + 1
        tokens = np.concatenate(list(read_tokens(file, int(self._tail_first[number]), count))).astype(np.int64)
        if tokens.min() < 0 or tokens.max() >= self.source.vocab_size:
            raise DataError(
                f"{file.path} holds tokens {tokens.min()} to {tokens.max()}, outside the vocabulary of "
                f"{self.source.vocab_size}; the file is damaged or was made with another tokenizer"
            )
        return tokens
