"""Units of preparation: each turns some input files into one token file per split, and leaves receipts for them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.atomic import check_free_space, write_atomically
from lit_gpt.errors import DataError
from lit_gpt.packed_dataset import HEADER, TokenFileWriter, read_header, token_dtype
from lit_gpt.tokenizer import Tokenizer
from prep.corpus import InputFile, Reading, read_documents
from prep.formats import PACKED_SUFFIXES, WrongKeyError

SPLITS = ("train", "validation")
MIN_BYTES, MAX_BYTES = 8_000_000, 2_000_000_000  # 2 GB of text is about 1 GB of tokens and 7 CPU-minutes
UNITS_WANTED = 64
BATCH_CHARACTERS = 500_000
MOST_BYTES_PER_TOKEN = (
    8  # of a corpus, as large vocabularies have 4 or 5; a disk that has room for no more is too small
)
PACKED_EXPANSION = 3  # bytes of text behind one byte of a packed file, roughly: to size units and to tell progress

Advance = Callable[[int, int], None]
"""Told of work done: bytes of text, and about how many bytes of text the input had in all that was read."""


@dataclass(frozen=True)
class Unit:
    """The work behind one token file of each split; all that a process needs to know to do it."""

    number: int
    files: tuple[InputFile, ...]
    out: str
    plan_id: str
    tokenizer_sha256: str
    separator_id: int | None
    reading: Reading
    skip_bad_files: bool = False
    """Whether a damaged file is kept up to the damage; otherwise it fails the unit."""

    @property
    def n_bytes(self) -> int:
        """About the bytes of text in the files."""
        return sum(map(text_bytes, self.files))

    def path(self, split: str, suffix: str) -> Path:
        return Path(self.out, f"{split}_{self.number:06d}{suffix}")

    def receipt(self, split: str) -> dict[str, Any]:
        return read_json(self.path(split, ".json"))

    def is_done(self) -> bool:
        """Whether the receipts of this plan are there, and the files are as they say."""
        return all(self._holds(split) for split in SPLITS)

    def _holds(self, split: str) -> bool:
        try:
            receipt = self.receipt(split)
            if receipt["plan_id"] != self.plan_id or receipt.get("tokenizer_sha256") != self.tokenizer_sha256:
                return False
            if receipt["file"] is None:
                return True
            file = read_header(self.path(split, ".bin"))  # which compares its size with the number of tokens
            return (file.n_tokens, file.end_bytes) == (receipt["tokens"], receipt["bytes"])
        except (FileNotFoundError, DataError):
            return False

    def discard(self) -> None:
        for split in SPLITS:
            for suffix in (".bin", ".json"):
                self.path(split, suffix).unlink(missing_ok=True)


def text_bytes(file: InputFile) -> int:
    """About the bytes of text that a file holds, judged by its name and size."""
    return file.n_bytes * (PACKED_EXPANSION if file.name.endswith((*PACKED_SUFFIXES, ".parquet")) else 1)


def bytes_per_unit(files: list[InputFile]) -> int:
    """Text for one unit: enough units to share out, none too large to repeat."""
    return min(MAX_BYTES, max(MIN_BYTES, sum(map(text_bytes, files)) // UNITS_WANTED))


def group_files(files: list[InputFile], limit_bytes: int) -> list[tuple[InputFile, ...]]:
    """Cut the list into groups of at most so many bytes of text; a larger file is a group of its own."""
    groups: list[list[InputFile]] = [[]]
    size = 0
    for file in files:
        if groups[-1] and size + text_bytes(file) > limit_bytes:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += text_bytes(file)
    return [tuple(group) for group in groups]


class SplitWriter:
    """Collects the documents of one split of one unit and writes them as one token file, if there are any."""

    def __init__(self, unit: Unit, split: str, tokenizer: Tokenizer, stack: contextlib.ExitStack) -> None:
        self.unit, self.path, self.tokenizer, self.stack = unit, unit.path(split, ".bin"), tokenizer, stack
        self.separator = [] if unit.separator_id is None else [np.array([unit.separator_id])]
        self.byte_lengths = byte_lengths_of(tokenizer)
        self.texts: list[str] = []
        self.waiting_characters = self.documents = self.text_bytes = self.table_bytes = 0
        self.digest = hashlib.sha256()
        self.writer: TokenFileWriter | None = None

    def add(self, text: str) -> None:
        self.texts.append(text)
        self.waiting_characters += len(text)
        if self.waiting_characters >= BATCH_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        if not self.texts:
            return
        if self.writer is None:
            self.writer = self.stack.enter_context(TokenFileWriter(self.path, token_dtype(self.tokenizer.vocab_size)))
        tokens = self._encoded()
        self._count(tokens)
        self.writer.write(tokens)
        self.texts, self.waiting_characters = [], 0

    def _encoded(self) -> np.ndarray:
        encoded = self.tokenizer.encode_batch(self.texts)
        return np.concatenate([part for ids in encoded for part in (ids, *self.separator)])

    def _count(self, tokens: np.ndarray) -> None:
        """tokens: (k,) int64 of all waiting texts, with their separators."""
        for data in map(str.encode, self.texts):
            self.digest.update(len(data).to_bytes(8, "little") + data)
            self.text_bytes += len(data)
        self.documents += len(self.texts)
        if self.byte_lengths is not None:
            beside_text = self.tokenizer.bytes_added_per_text
            if self.unit.separator_id is not None:
                beside_text += int(self.byte_lengths[self.unit.separator_id])
            used = np.bincount(tokens, minlength=len(self.byte_lengths))  # `[tokens]` would take as much as `tokens`
            self.table_bytes += int(used @ self.byte_lengths) - beside_text * len(self.texts)

    def receipt(self) -> dict[str, Any]:
        n_tokens = self.writer.n_tokens if self.writer else 0
        return {
            "plan_id": self.unit.plan_id,
            "tokenizer_sha256": self.unit.tokenizer_sha256,
            "file": self.path.name if self.writer else None,
            "bytes": HEADER.size + n_tokens * self.writer.dtype.itemsize if self.writer else 0,
            "documents": self.documents,
            "tokens": n_tokens,
            "text_bytes": self.text_bytes,
            "table_bytes": None if self.byte_lengths is None else self.table_bytes,
            "crc32": self.writer.crc32 if self.writer else 0,
            "text_sha256": self.digest.hexdigest(),
        }


@functools.lru_cache(maxsize=1)
def byte_lengths_of(tokenizer: Tokenizer) -> np.ndarray | None:
    """Bytes per id; None for a kind of model whose pieces have no known bytes."""
    try:
        return tokenizer.byte_lengths()
    except ValueError:
        return None


@dataclass
class Reader:
    """Reads the files of a unit one after the other, and keeps account of what was wrong with them."""

    unit: Unit
    advance: Advance
    counters: Counter[str]
    bad_files: list[dict[str, Any]]

    def documents(self) -> Iterator[tuple[str, str]]:
        """(split, text) of every document.

        Raises:
            DataError: a file is damaged, unless such files are to be skipped.
        """
        for file in self.unit.files:
            yield from self._documents_of(file)

    def _documents_of(self, file: InputFile) -> Iterator[tuple[str, str]]:
        documents = seen_bytes = 0
        try:
            for split, text in read_documents(file, self.unit.reading, self.counters):
                documents += 1
                n_bytes = len(text) if text.isascii() else len(text.encode())
                read_bytes = min(n_bytes, text_bytes(file) - seen_bytes)
                seen_bytes += read_bytes
                self.advance(n_bytes, read_bytes)
                yield split, text
        except WrongKeyError:
            raise
        except DataError as error:
            if not self.unit.skip_bad_files:
                raise DataError(f"{error}. Or keep what is before the damage: --on-bad-file skip") from error
            reason = str(error).replace(file.path, file.name)  # receipts say the same wherever the corpus lies
            self.bad_files.append({"name": file.name, "reason": reason, "documents": documents})
            self.counters["bad_files"] += 1
        self.advance(0, text_bytes(file) - seen_bytes)


def run_unit(unit: Unit, tokenizer: Tokenizer, advance: Advance) -> None:
    """Write the token files of one unit, then their receipts.

    Raises:
        DataError: a damaged file. OSError: the disk is too small, or already for the least that could come.
    """
    bytes_per_token = 1 if tokenizer.kind == "bytes" else MOST_BYTES_PER_TOKEN
    check_free_space(unit.out, unit.n_bytes * token_dtype(tokenizer.vocab_size).itemsize // bytes_per_token)
    reader = Reader(unit, advance, Counter(), [])
    with contextlib.ExitStack() as stack:
        writers = {split: SplitWriter(unit, split, tokenizer, stack) for split in SPLITS}
        for split, text in reader.documents():
            writers[split].add(text)
        for writer in writers.values():
            writer.flush()
    for split, writer in writers.items():
        receipt = writer.receipt()
        if split == SPLITS[0]:  # counts of what happened before the split was known
            receipt |= {"counters": dict(sorted((+reader.counters).items())), "bad_files": reader.bad_files}
        write_atomically(unit.path(split, ".json"), to_json(receipt))


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); delete the folder and prepare it anew") from error
