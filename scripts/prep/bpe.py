"""Train a small SentencePiece tokenizer on the corpus itself, with the same result every time."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from lit_gpt.atomic import write_atomically
from lit_gpt.errors import DataError
from prep.corpus import InputFile, Reading, read_documents
from prep.formats import WrongKeyError
from prep.units import text_bytes

TEXT_BYTES = 6_000_000  # a 4,096-piece model from more text is hardly another model; 4 s on one core
READ_BYTES = 64_000_000  # held in memory, as lines; more is not seen
FILES_WANTED = 16
LINE_CHARACTERS = 8_000

Item = TypeVar("Item")


def train_bpe(
    path: Path, files: list[InputFile], vocab_size: int, reading: Reading, *, skip_bad_files: bool = False
) -> None:
    """Write a byte-fallback BPE of an even sample of the training text. One thread, and nothing is drawn at random.

    Raises:
        DataError: the text has too few different pairs for so many pieces.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(_sampled_lines(files, reading, skip_bad_files)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * LINE_CHARACTERS,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"the corpus does not suit a tokenizer of {vocab_size} pieces: {_reason(str(error))}; "
            f"change --vocab-size, or use --tokenizer bytes"
        ) from error
    write_atomically(path, model.getvalue())


def _reason(message: str) -> str:
    """What the trainer's error says of the sizes that work, without its source lines."""
    if found := re.search(r"\d+ vs (\d+)", message):
        return f"its characters and bytes alone take {found[1]}, the smallest that works"
    if found := re.search(r"value <= (\d+)", message):
        return f"its text has pieces for {found[1]}, the largest that works"
    return message.splitlines()[-1]


def _sampled_lines(files: list[InputFile], reading: Reading, skip_bad_files: bool) -> list[str]:
    files = [file for file in files if file.split != "validation"]
    limit = _limit_per_file(files)
    lines = [
        piece
        for file in thinned(files, [min(text_bytes(file), limit) for file in files], READ_BYTES)
        for text in _head(file, reading, limit, skip_bad_files)
        for line in text.split("\n")
        for piece in _pieces(line)
    ]
    return thinned(lines, [len(line) for line in lines], TEXT_BYTES)


def _limit_per_file(files: list[InputFile]) -> int:
    """Bytes of text to read of each file: of a corpus that is too large to be held, many files a little."""
    sizes = [text_bytes(file) for file in files]
    if sum(sizes) <= READ_BYTES:
        return READ_BYTES
    return READ_BYTES // min(len(files), FILES_WANTED)


def _head(file: InputFile, reading: Reading, limit: int, skip_bad_files: bool) -> Iterator[str]:
    """The training documents with which a file begins."""
    seen = 0
    try:
        for split, text in read_documents(file, reading, Counter()):
            if seen >= limit:
                return
            seen += len(text)
            if split == "train":
                yield text
    except WrongKeyError:
        raise
    except DataError:
        if not skip_bad_files:
            raise


def _pieces(line: str) -> list[str]:
    if not line.strip():
        return []
    line = line.replace("\0", "")  # the trainer drops whole lines that hold one
    return [line[i : i + LINE_CHARACTERS] for i in range(0, len(line), LINE_CHARACTERS)]


def thinned(items: Sequence[Item], sizes: Sequence[int], limit: int) -> list[Item]:
    """Evenly spread items whose sizes add up to about `limit`; all of them if they fit."""
    total = sum(sizes)
    kept, seen, taken = [], 0, 0
    for item, size in zip(items, sizes, strict=True):
        if taken * total <= seen * min(limit, total):
            kept.append(item)
            taken += size
        seen += size
    return kept
