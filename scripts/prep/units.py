"""Units of preparation: each turns some input files into one token file per split, and leaves receipts for them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import os
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.atomic import write_atomically
from lit_gpt.errors import DataError
from lit_gpt.packed_dataset import TokenFileWriter, read_header, token_dtype
from lit_gpt.tokenizer import Tokenizer
from prep.corpus import InputFile, Reading, read_documents

SPLITS = ("train", "validation")
MIN_BYTES, MAX_BYTES = 8_000_000, 2_000_000_000  # 2 GB of text is about 1 GB of tokens and 7 CPU-minutes
UNITS_WANTED = 64
BATCH_CHARACTERS = 500_000


@dataclass(frozen=True)
class Unit:
    """The work behind one token file of each split; all that a process needs to know to do it."""

    number: int
    files: tuple[InputFile, ...]
    out: str
    plan_id: str
    separator_id: int | None
    reading: Reading

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
            if receipt["plan_id"] != self.plan_id:
                return False
            return receipt["file"] is None or read_header(self.path(split, ".bin")).n_tokens == receipt["tokens"]
        except (FileNotFoundError, DataError):
            return False

    def discard(self) -> None:
        for split in SPLITS:
            for suffix in (".bin", ".json"):
                self.path(split, suffix).unlink(missing_ok=True)


def group_files(files: list[InputFile]) -> list[tuple[InputFile, ...]]:
    """Cut the list into groups of about equal size: enough of them to share out, none too large to repeat."""
    total_bytes = sum(file.n_bytes for file in files)
    limit = min(MAX_BYTES, max(MIN_BYTES, total_bytes // UNITS_WANTED))
    groups: list[list[InputFile]] = [[]]
    size = 0
    for file in files:
        if groups[-1] and size + file.n_bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += file.n_bytes
    return [tuple(group) for group in groups]


class SplitWriter:
    """Collects the documents of one split of one unit and writes them as one token file, if there are any."""

    def __init__(self, unit: Unit, split: str, tokenizer: Tokenizer, stack: contextlib.ExitStack) -> None:
        self.path, self.plan_id, self.tokenizer, self.stack = unit.path(split, ".bin"), unit.plan_id, tokenizer, stack
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
        encoded = self.tokenizer.encode_batch(self.texts)
        for text, ids in zip(self.texts, encoded, strict=True):
            self._count(text.encode(), ids)
        self.writer.write(np.concatenate([part for ids in encoded for part in (ids, *self.separator)]))
        self.texts, self.waiting_characters = [], 0

    def _count(self, data: bytes, ids: np.ndarray) -> None:
        self.digest.update(len(data).to_bytes(8, "little") + data)
        self.documents += 1
        self.text_bytes += len(data)
        if self.byte_lengths is not None:
            self.table_bytes += int(self.byte_lengths[ids].sum()) - self.tokenizer.bytes_added_per_text

    def receipt(self, counters: Counter[str]) -> dict[str, Any]:
        return {
            "plan_id": self.plan_id,
            "file": self.path.name if self.writer else None,
            "documents": self.documents,
            "tokens": self.writer.n_tokens if self.writer else 0,
            "text_bytes": self.text_bytes,
            "table_bytes": None if self.byte_lengths is None else self.table_bytes,
            "crc32": self.writer.crc32 if self.writer else 0,
            "text_sha256": self.digest.hexdigest(),
            "counters": dict(sorted((+counters).items())),
        }


def byte_lengths_of(tokenizer: Tokenizer) -> np.ndarray | None:
    """Bytes per id; None for a kind of model whose pieces have no known bytes."""
    try:
        return tokenizer.byte_lengths()
    except ValueError:
        return None


def run_unit(unit: Unit) -> None:
    """Write the token files of one unit, then their receipts. Does nothing where all is there already."""
    if unit.is_done():
        return
    tokenizer = Tokenizer.load(unit.out)
    counters: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        writers = {split: SplitWriter(unit, split, tokenizer, stack) for split in SPLITS}
        for file in unit.files:
            for split, text in read_documents(file, unit.reading, counters):
                writers[split].add(text)
        for writer in writers.values():
            writer.flush()
    for split, writer in writers.items():
        receipt = writer.receipt(counters if split == "train" else Counter())
        write_atomically(unit.path(split, ".json"), to_json(receipt))


def run_units(units: list[Unit], workers: int) -> None:
    """Run all units, in this process or in several. The output does not depend on how many."""
    if workers == 1 or len(units) == 1:
        for number, unit in enumerate(units):
            run_unit(unit)
            _show_progress(number + 1, len(units))
        return
    context = multiprocessing.get_context("spawn")  # forking a process with threads of a tokenizer may deadlock
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(units)), context, _die_with_parent) as pool:
        try:
            futures = [pool.submit(run_unit, unit) for unit in units]
            for number, done in enumerate(concurrent.futures.as_completed(futures)):
                done.result()
                _show_progress(number + 1, len(units))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _die_with_parent() -> None:
    """Without this, the workers of a killed run wait for work for ever."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {total} units", end="\n" if done == total else "", file=sys.stderr)


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); delete the folder and prepare it anew") from error
