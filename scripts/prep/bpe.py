"""Train a small SentencePiece tokenizer on the corpus itself, with the same result every time."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from lit_gpt.atomic import write_atomically
from lit_gpt.errors import DataError
from prep.corpus import InputFile, Reading, read_documents

TEXT_BYTES = 6_000_000  # a 4,096-piece model from more text is hardly another model; 4 s on one core
READ_BYTES = 256_000_000
LINE_CHARACTERS = 8_000

Item = TypeVar("Item")


def train_bpe(path: Path, files: list[InputFile], vocab_size: int, reading: Reading) -> None:
    """Write a byte-fallback BPE of an even sample of the training text. One thread, and nothing is drawn at random.

    Raises:
        DataError: the text has too few different pairs for so many pieces.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(_sampled_lines(files, reading)),
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
        reason = str(error).splitlines()[-1]
        raise DataError(
            f"the corpus does not suit a tokenizer of {vocab_size} pieces ({reason}); "
            f"change --vocab-size, or use --tokenizer bytes"
        ) from error
    write_atomically(path, model.getvalue())


def _sampled_lines(files: list[InputFile], reading: Reading) -> list[str]:
    files = [file for file in files if file.split != "validation"]
    lines = [
        piece
        for file in thinned(files, [file.n_bytes for file in files], READ_BYTES)
        for split, text in read_documents(file, reading, Counter())
        if split == "train"
        for line in text.split("\n")
        for piece in _pieces(line)
    ]
    return thinned(lines, [len(line) for line in lines], TEXT_BYTES)


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
