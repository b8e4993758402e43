"""A path to token files, opened for inspection: its splits, what their ids mean, and what cannot be opened."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.errors import DataError, explain
from lit_gpt.packed_dataset import MANIFEST, TokenFile, manifest_of
from lit_gpt.prepared_check import RecordedSplit
from lit_gpt.token_files import SEPARATORS, detect_separator, find_token_files, likely_separators
from lit_gpt.token_formats import describe_file, given_dtype
from lit_gpt.token_listing import NoTokenFilesError, list_files
from lit_gpt.token_scan import DocumentLengths, IdCounts, Scan, scan_file
from lit_gpt.token_text import TokenText
from lit_gpt.tokenizer import Tokenizer

SPLITS = ("train", "validation")

Progress = Callable[[int, int], None]
"""Called with the tokens of the split that are read and all that there are."""


def silent(done: int, total: int) -> None:
    """The progress that nobody wants to see."""


@dataclass(frozen=True)
class Vocabulary:
    """What ids mean, as far as that is known."""

    tokenizer: Tokenizer | None
    size: int | None
    separator_id: int | None = None

    @property
    def text(self) -> TokenText:
        return TokenText(self.tokenizer, self.separator_id)

    @property
    def boundary_ids(self) -> tuple[int, ...]:
        """Ids that may stand between documents, the likeliest first."""
        separator = () if self.separator_id is None else (self.separator_id,)
        usual = SEPARATORS if self.tokenizer is None else ()
        return tuple(dict.fromkeys((*separator, *likely_separators(self.tokenizer, self.size), *usual)))


@dataclass(frozen=True)
class Split:
    """The files of one split that can be opened."""

    name: str
    kind: str
    files: Sequence[TokenFile]
    recorded: RecordedSplit | None = None
    """What was written down about them, if they are prepared."""


@dataclass(frozen=True)
class OpenedData:
    """A path with its splits, and what was noticed on the way."""

    path: Path
    manifest: dict[str, Any] | None
    vocabulary: Vocabulary
    splits: list[Split]
    problems: list[str]
    notes: list[str]


def open_data(
    path: str | os.PathLike[str],
    split: str | None,
    tokenizer: str | os.PathLike[str] | None,
    *,
    dtype: str | None,
    vocab_size: int | None,
    separator_id: int | None,
) -> OpenedData:
    """Everything that is there, with those of its files that can be opened; the others go to `problems`.

    Raises:
        FileNotFoundError: nothing is there. DataError: nothing can be read at all.
        ValueError: an argument contradicts the data.
    """
    manifest = manifest_of(path)
    problems: list[str] = []
    notes: list[str] = []
    if manifest is None:
        vocabulary = _given_vocabulary(tokenizer, vocab_size, separator_id)
        try:
            splits = _given_splits(os.fspath(path), split, dtype, problems, notes)
        except (ValueError, DataError) as error:
            if "data.dtype" not in str(error):
                raise
            raise type(error)(_as_option(str(error))) from error
        problems, notes = [*map(_as_option, problems)], [*map(_as_option, notes)]
    else:
        given = {"dtype": dtype, "vocab_size": vocab_size, "separator_id": separator_id}
        _refuse_known({name: value for name, value in given.items() if value is not None}, Path(path))
        vocabulary = _prepared_vocabulary(Path(path), manifest, tokenizer, problems, notes)
        splits = _prepared_splits(Path(path), manifest, split, problems)
    return OpenedData(Path(path), manifest, vocabulary, splits, problems, notes)


def _as_option(message: str) -> str:
    """What is a setting of a run is an option here."""
    return message.replace("data.dtype", "--dtype")


def _given_vocabulary(
    given: str | os.PathLike[str] | None, vocab_size: int | None, separator_id: int | None
) -> Vocabulary:
    tokenizer = None if given is None else Tokenizer.load(given)
    size = vocab_size if tokenizer is None else tokenizer.vocab_size
    if vocab_size not in (None, size):
        raise ValueError(f"vocab_size={vocab_size}, but tokenizer {given} has {size} ids; leave out one of the two")
    if size is not None and size < 1:
        raise ValueError(f"vocab_size={size} must be at least 1")
    if separator_id is not None and not 0 <= separator_id < (size or separator_id + 1):
        raise ValueError(f"separator_id={separator_id} is no id of the vocabulary ({size or 'of unknown size'})")
    return Vocabulary(tokenizer, size, separator_id)


def _refuse_known(given: Mapping[str, Any], path: Path) -> None:
    if given:
        listed = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(f"{listed}: {path / MANIFEST} says this of its files; leave it out")


def _prepared_vocabulary(
    path: Path,
    manifest: Mapping[str, Any],
    given: str | os.PathLike[str] | None,
    problems: list[str],
    notes: list[str],
) -> Vocabulary:
    """The meaning of the ids of a prepared folder; what is wrong with its tokenizer goes to `problems`."""
    entry = manifest["tokenizer"]
    where = path if given is None else given
    tokenizer = None
    try:
        tokenizer = Tokenizer.load(where)
    except (DataError, OSError) as error:
        problems.append(f"the tokenizer cannot be read: {explain(error)}")
    except ValueError as error:
        notes.append(f"no text is shown: {error}")
    if tokenizer is not None and tokenizer.fingerprint != entry["sha256"]:
        problems.append(
            f"the tokenizer in {where} (sha256 {tokenizer.fingerprint[:12]}) is not the one that the data was "
            f"prepared with ({entry['sha256'][:12]}), so its ids mean something else; put that one back"
        )
    return Vocabulary(tokenizer, entry["vocab_size"], manifest.get("separator_id"))


def _prepared_splits(path: Path, manifest: Mapping[str, Any], split: str | None, problems: list[str]) -> list[Split]:
    held = [name for name, entry in manifest["splits"].items() if entry["files"]]
    names = [name for name in held if split in (None, name)]
    if not names:
        raise FileNotFoundError(f"{path} holds no {split or ''} data; it holds {', '.join(held) or 'none at all'}")
    records = [RecordedSplit(path, name, manifest) for name in names]
    return [Split(record.split, "litpkds", record.open_files(problems), record) for record in records]


def _given_splits(
    path: str, split: str | None, dtype: str | None, problems: list[str], notes: list[str]
) -> list[Split]:
    """Every split there is; a file or a pattern is one.

    Raises:
        FileNotFoundError: there is none.
    """
    names = SPLITS if split is None and os.path.isdir(path) else (split or SPLITS[0],)
    found: list[Split] = []
    missing: list[NoTokenFilesError] = []
    for name in names:
        try:
            files = find_token_files(path, name, dtype=dtype)
            notes += files.notes
            found.append(Split(name, files.kind, files))
        except NoTokenFilesError as error:
            missing.append(error)
        except DataError as error:
            found.append(_whole_files(path, name, dtype, str(error), problems))
    if not found:
        raise missing[0]
    return found


def _whole_files(path: str, split: str, dtype: str | None, reason: str, problems: list[str]) -> Split:
    """The files of a split that cannot be read as one, with a line in `problems` for each that is to blame."""
    files: list[TokenFile] = []
    kinds: list[str] = []
    to_blame: list[str] = []
    for name in list_files(path, split).names:
        try:
            described = describe_file(name, given_dtype(dtype))
            files.append(described.file)
            kinds.append(described.kind)
        except (DataError, OSError) as error:
            to_blame.append(explain(error))
    problems += to_blame or [reason]
    return Split(split, kinds[0] if kinds else "unreadable", files)


def read_all(
    files: Sequence[TokenFile],
    counts: IdCounts,
    problems: list[str],
    progress: Progress,
    lengths: DocumentLengths | None = None,
) -> Iterator[Scan]:
    """Read the files one after the other; those that are not whole after all go to `problems`."""
    total = sum(file.n_tokens for file in files)

    def on_piece(piece: np.ndarray) -> None:
        progress(counts.n_tokens, total)
        if lengths is not None:
            lengths.add(piece)

    for file in files:
        try:
            yield scan_file(file, counts, on_piece)
        except (DataError, OSError) as error:
            problems.append(explain(error))


def with_separator(vocabulary: Vocabulary, files: Sequence[TokenFile]) -> Vocabulary:
    """The vocabulary with the token between documents: the recorded one, else the likeliest of those that could be."""
    if vocabulary.separator_id is not None or not len(files):
        return vocabulary
    likely = likely_separators(vocabulary.tokenizer, vocabulary.size)
    return dataclasses.replace(vocabulary, separator_id=detect_separator(files, likely).id)
