"""What is in a set of token files, and whether it is what was prepared: ids, boundaries, totals and checksums."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lit_gpt.opened_data import OpenedData, Progress, Split, Vocabulary, open_data, read_all, silent, with_separator
from lit_gpt.packed_dataset import TokenFile
from lit_gpt.prepared_check import unlisted_notes
from lit_gpt.token_scan import HIGHEST_COUNTED_ID, DocumentLengths, IdCounts, Scan
from lit_gpt.token_source import SampleIndex
from lit_gpt.token_text import Document, show_documents
from lit_gpt.tokenizer import Tokenizer

FREQUENT_IDS = 10
PERCENTILES = (5, 25, 50, 75, 95, 100)


@dataclass(frozen=True)
class SplitCheck:
    """What was found in the files of one split."""

    name: str
    kind: str
    dtype: str
    files: int
    tokens: int
    lowest_id: int
    highest_id: int
    separator_id: int | None
    boundaries: dict[str, int]
    """How often the tokens occur that may stand between documents."""
    checksums: int
    """Files whose checksum is the one that was recorded when they were written."""
    documents: tuple[Document, ...]
    """Some of them: the first, the last, and others between."""


@dataclass(frozen=True)
class DataCheck:
    """The outcome of `check_data`."""

    path: str
    prepared: bool
    vocab_size: int | None
    splits: tuple[SplitCheck, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class FrequentId:
    """One of the most frequent ids."""

    id: int
    count: int
    share: float
    text: str


@dataclass(frozen=True)
class SplitStats:
    """Numbers of one split."""

    name: str
    kind: str
    dtype: str
    files: int
    tokens: int
    separator_id: int | None
    documents: int | None
    """None where nothing separates them."""
    tokens_per_document: dict[str, float]
    """mean, p5, p25, p50 (the median), p75, p95, p100 (the longest); the separator counts. Empty without documents."""
    bytes_per_token: float | None
    """Text bytes, by the tokenizer's table; None without a tokenizer that has one."""
    block_size: int
    samples: int
    unused_tokens: int
    """Tokens that are in no sample: samples do not cross files."""
    epochs: float | None
    """How often a run of `budget_tokens` reads the split."""
    highest_id: int
    unused_ids: int | None
    """Ids of the vocabulary that never occur."""
    most_frequent: tuple[FrequentId, ...]


@dataclass(frozen=True)
class DataStats:
    """The outcome of `data_stats`."""

    path: str
    vocab_size: int | None
    budget_tokens: int | None
    splits: tuple[SplitStats, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def check_data(
    path: str | os.PathLike[str],
    split: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    *,
    dtype: str | None = None,
    vocab_size: int | None = None,
    separator_id: int | None = None,
    documents: int = 3,
    characters: int = 400,
    progress: Progress = silent,
) -> DataCheck:
    """Read every token of a data folder, file or pattern, and compare it with all that is known about it.

    Args:
        path: whatever find_token_files reads.
        split: only this one; default: all there are.
        tokenizer: what the ids mean, where the folder does not say it itself.
        dtype: type of the tokens in raw files.
        vocab_size: ids must be below it, where no tokenizer says so.
        separator_id: the token between documents, where nothing else says it; default: looked for.
        documents: how many to show of each split.
        characters: how much of each of them.
        progress: told how far reading is.

    Raises:
        FileNotFoundError: nothing is there. DataError: nothing can be read at all.
        ValueError: an argument contradicts the data.
    """
    opened = open_data(path, split, tokenizer, dtype=dtype, vocab_size=vocab_size, separator_id=separator_id)
    checks = [_check_split(each, opened, documents, characters, progress) for each in opened.splits]
    if opened.manifest is not None:
        opened.notes.extend(unlisted_notes(opened.path, opened.manifest))
    return DataCheck(
        path=str(path),
        prepared=opened.manifest is not None,
        vocab_size=opened.vocabulary.size,
        splits=tuple(checks),
        problems=tuple(opened.problems),
        notes=tuple(dict.fromkeys(opened.notes)),
    )


def _check_split(each: Split, opened: OpenedData, documents: int, characters: int, progress: Progress) -> SplitCheck:
    counts, problems, vocabulary = IdCounts(), opened.problems, opened.vocabulary
    for scan in read_all(each.files, counts, problems, progress):
        problems += _range_problems(scan, vocabulary.size)
        if each.recorded is not None:
            problems += each.recorded.file_problems(scan)
    if each.recorded is not None:
        problems += each.recorded.total_problems(counts, vocabulary.tokenizer)
        opened.notes.extend(each.recorded.notes())
    vocabulary = with_separator(vocabulary, each.files)
    opened.notes.extend(_boundary_notes(each.name, vocabulary, counts))
    return SplitCheck(
        name=each.name,
        kind=each.kind,
        dtype=_dtype_name(each.files),
        files=len(each.files),
        tokens=counts.n_tokens,
        lowest_id=counts.lowest,
        highest_id=counts.highest,
        separator_id=vocabulary.separator_id,
        boundaries={vocabulary.text.mark(token): counts.of(token) for token in vocabulary.boundary_ids},
        checksums=each.recorded.compared if each.recorded is not None else 0,
        documents=tuple(show_documents(each.files, vocabulary.text, documents, characters)),
    )


def _dtype_name(files: Sequence[TokenFile]) -> str:
    return files[0].dtype.name if len(files) else "none"


def _range_problems(scan: Scan, vocab_size: int | None) -> list[str]:
    limit = HIGHEST_COUNTED_ID + 1 if vocab_size is None else vocab_size
    bad = scan.lowest if scan.lowest < 0 else scan.highest if scan.highest >= limit else None
    if bad is None:
        return []
    rule = "which no vocabulary has" if vocab_size is None else f"outside the vocabulary of {vocab_size}"
    return [f"{scan.file.path} holds token {bad}, {rule}; the file is damaged, of another type or of another tokenizer"]


def _boundary_notes(split: str, vocabulary: Vocabulary, counts: IdCounts) -> list[str]:
    """What is worth a look before a model is trained on it."""
    tokenizer, separator_id = vocabulary.tokenizer, vocabulary.separator_id
    if separator_id is None:
        return [f"{split}: no token is known to stand between documents; give --tokenizer or --separator-id"]
    if tokenizer is None:
        return [f"{split}: no tokenizer is known, so ids are shown; give one with --tokenizer"]
    if tokenizer.bos_id is not None and not counts.of(tokenizer.bos_id):
        return [f"{split}: bos ({tokenizer.bos_id}) never occurs; {separator_id} alone stands between documents"]
    return []


def data_stats(
    path: str | os.PathLike[str],
    split: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    *,
    dtype: str | None = None,
    vocab_size: int | None = None,
    separator_id: int | None = None,
    block_size: int = 2048,
    budget_tokens: int | None = None,
    progress: Progress = silent,
) -> DataStats:
    """Read every token of a data folder, file or pattern, and count.

    Args:
        path, split, tokenizer, dtype, vocab_size, separator_id, progress: as in check_data.
        block_size: targets per sample.
        budget_tokens: training tokens of a run, to tell how often it would read each split.

    Raises:
        FileNotFoundError: nothing is there. DataError: nothing can be read at all.
        ValueError: an argument contradicts the data.
    """
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be at least 1")
    opened = open_data(path, split, tokenizer, dtype=dtype, vocab_size=vocab_size, separator_id=separator_id)
    stats = [_split_stats(each, opened, block_size, budget_tokens, progress) for each in opened.splits]
    return DataStats(
        path=str(path),
        vocab_size=opened.vocabulary.size,
        budget_tokens=budget_tokens,
        splits=tuple(stats),
        problems=tuple(opened.problems),
        notes=tuple(dict.fromkeys(opened.notes)),
    )


def _split_stats(
    each: Split, opened: OpenedData, block_size: int, budget_tokens: int | None, progress: Progress
) -> SplitStats:
    vocabulary = with_separator(opened.vocabulary, each.files)
    counts = IdCounts()
    lengths = None if vocabulary.separator_id is None else DocumentLengths(vocabulary.separator_id)
    n_tokens = []
    for scan in read_all(each.files, counts, opened.problems, progress, lengths):
        n_tokens.append(scan.file.n_tokens)
        if lengths is not None and each.recorded is not None:
            lengths.close()  # chunks of other writers continue each other, prepared files do not
    if lengths is not None:
        lengths.close()
    per_file = np.array(n_tokens, dtype=np.int64)
    samples = SampleIndex(per_file, block_size).n_samples
    return SplitStats(
        name=each.name,
        kind=each.kind,
        dtype=_dtype_name(each.files),
        files=len(each.files),
        tokens=counts.n_tokens,
        separator_id=vocabulary.separator_id,
        documents=None if lengths is None else lengths.n_documents,
        tokens_per_document=_length_summary(lengths, counts.n_tokens),
        bytes_per_token=_bytes_per_token(counts, vocabulary.tokenizer),
        block_size=block_size,
        samples=samples,
        unused_tokens=counts.n_tokens - samples * block_size - int((per_file > block_size).sum()),
        epochs=budget_tokens / (samples * block_size) if budget_tokens and samples else None,
        highest_id=counts.highest,
        unused_ids=None if vocabulary.size is None else _unused_ids(counts, vocabulary.size),
        most_frequent=_most_frequent(counts, vocabulary),
    )


def _length_summary(lengths: DocumentLengths | None, n_tokens: int) -> dict[str, float]:
    if lengths is None or not lengths.n_documents:
        return {}
    percentiles = {f"p{percent}": lengths.percentile(percent) for percent in PERCENTILES}
    return {"mean": n_tokens / lengths.n_documents, **percentiles}


def _bytes_per_token(counts: IdCounts, tokenizer: Tokenizer | None) -> float | None:
    if tokenizer is None or not counts.n_tokens:
        return None
    try:
        return counts.sum_of(tokenizer.byte_lengths()) / counts.n_tokens
    except ValueError:  # a kind of model whose pieces have no known bytes
        return None


def _unused_ids(counts: IdCounts, vocab_size: int) -> int:
    return vocab_size - int(np.count_nonzero(counts.counts[:vocab_size]))


def _most_frequent(counts: IdCounts, vocabulary: Vocabulary) -> tuple[FrequentId, ...]:
    text = vocabulary.text
    order = np.argsort(-counts.counts, kind="stable")[:FREQUENT_IDS].tolist()
    return tuple(
        FrequentId(token, counts.of(token), counts.of(token) / counts.n_tokens, text.piece(token))
        for token in order
        if counts.of(token)
    )
