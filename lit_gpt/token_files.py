"""What a path holds: the token files of a folder, a file or a pattern, in any format, ordered by their numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_gpt.errors import DataError
from lit_gpt.file_names import FileNames
from lit_gpt.packed_dataset import MANIFEST, TokenFile
from lit_gpt.token_formats import Described, describe_file, given_dtype, head_digest
from lit_gpt.token_listing import Listing, list_files, load_arrays, save_arrays

if TYPE_CHECKING:
    from lit_gpt.tokenizer import Tokenizer

TABLE_VERSION = 2  # of the cached table; raise it when the same files would give another table
THREADS = 16  # files are opened in parallel where there are many: on a network each open is a wait
FILES_PER_TASK = 256
TAIL_TOKENS = 1 << 16  # read at a time, from the end, to find where padding begins
SEPARATORS = (1, 2, 0)  # <s>, </s> and <unk> of the lineage
SAMPLED_FILES, SAMPLED_TOKENS = 3, 1 << 20
MOST_FREQUENT_SEPARATOR = 1 / 8  # a document has at least seven tokens of its own, on average
RAREST_SEPARATOR = 1 / 500_000
FEW_GAPS = 8  # fewer say nothing about how evenly an id is spread
MOST_CLOSE_GAPS = 0.15  # 0.05 if scattered by chance; in OpenWebText 0 for the separator, 0.2 and more for punctuation


class TokenFiles(Sequence[TokenFile]):
    """Token files of one format and one type, in the order in which they are read.

    names, n_tokens, byte_offset, heads: (files,) each, heads (files, 32) bytes with a digest of the first tokens.
    Nothing is stored per file but numbers, 62 bytes of them, so half a million files fit into 30 MB.
    """

    def __init__(
        self,
        names: FileNames,
        n_tokens: np.ndarray,
        byte_offset: np.ndarray,
        heads: np.ndarray,
        *,
        dtype: np.dtype,
        kind: str,
        notes: Sequence[str] = (),
        tokenizer: str = "",
    ) -> None:
        self.names, self.n_tokens, self.byte_offset, self.heads = names, n_tokens, byte_offset, heads
        self.dtype = dtype
        self.kind = kind
        """litpkds, datatrove, megatron or raw."""
        self.notes = tuple(notes)
        """One sentence each: what was trimmed, left out or assumed."""
        self.tokenizer = tokenizer
        """The tokenizer that the format names, or nothing."""

    @classmethod
    def of(cls, files: Sequence[TokenFile], kind: str = "raw") -> TokenFiles:
        """Files whose places are known already. Each is opened once.

        Raises:
            DataError: two types, or a file that is shorter than it should be.
        """
        described = [Described(file, kind, head_digest(file)) for file in files]
        return _table(FileNames.of(file.path for file in files), described)

    def __len__(self) -> int:
        return len(self.n_tokens)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return TokenFile(self.names[index], int(self.byte_offset[index]), int(self.n_tokens[index]), self.dtype)

    def take(self, indices: np.ndarray) -> TokenFiles:
        """The files at (k,) indices, in that order."""
        arrays = (self.n_tokens[indices], self.byte_offset[indices], self.heads[indices])
        options = {"dtype": self.dtype, "kind": self.kind, "notes": self.notes, "tokenizer": self.tokenizer}
        return TokenFiles(self.names.take(indices), *arrays, **options)

    def with_columns(self, n_tokens: np.ndarray, heads: np.ndarray, notes: Sequence[str]) -> TokenFiles:
        """The same files with other lengths."""
        options = {"dtype": self.dtype, "kind": self.kind, "notes": notes, "tokenizer": self.tokenizer}
        return TokenFiles(self.names, n_tokens, self.byte_offset, heads, **options)

    def by_name(self) -> TokenFiles:
        """In the order of `sorted(glob(...))`, which is that of the lineage's loaders."""
        names = list(self.names)
        return self.take(np.array(sorted(range(len(names)), key=names.__getitem__), dtype=np.int64))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over names, sizes and first tokens, in this order; the folder plays no part."""
        digest = sha256()
        stored_as = self.dtype.str
        columns = (self.names.without_folders(), self.n_tokens.tolist(), self.heads)
        for name, n_tokens, head in zip(*columns, strict=True):
            digest.update(f"{name}\x1f{n_tokens}\x1f{stored_as}\x1f".encode() + head.tobytes())
        return digest.hexdigest()


def find_token_files(
    path: str | os.PathLike[str],
    split: str = "train",
    *,
    dtype: str | None = None,
    trim: bool = True,
    cache: Path | None = None,
) -> TokenFiles:
    """The token files of a path: all are opened once, checked, and described in one compact table.

    path: a prepared folder (the files that its manifest lists for the split); any other folder (its files named
        `{split}*`; without any, "train" means all but those named validation*, val* or test*, and "validation" val*);
        one file; or a pattern such as `slim_star/train_slim*`.
    dtype: type of the tokens of files that do not say it; uint16 unless told.
    trim: remove the padding that older writers leave at the end of the last LITPKDS file of each of their processes.
        Where that file ends in two or more of one id, these go. Our own writer never pads, so folders with our
        manifest are left as they are. Every cut is one of the `notes`.
    cache: an .npz file to keep the table in. It is used while names, sizes and times of all files are as they were.

    Raises:
        FileNotFoundError: no such path, or a file that the manifest lists is not there.
        NoTokenFilesError: no token file of this split.
        DataError: a file is damaged, holds something else, or disagrees with the others or with the manifest.
        ValueError: the files say themselves that their tokens are not of type `dtype`.
    """
    given = given_dtype(dtype)
    path = os.fspath(Path(path))
    listing = list_files(path, split)
    key = "" if cache is None else listing.key([TABLE_VERSION, os.path.abspath(path), dtype, trim])
    stored = None if cache is None else load_arrays(cache, key, len(listing.names))
    ours = listing.announced_tokens is not None
    table = _described(listing, given, trim and not ours) if stored is None else _restored(listing.names, *stored)
    files = _without_empty(table) if trim and not ours else table
    _check_total(path, listing.announced_tokens, files)
    if stored is not None:
        files.fingerprint = stored[0]["fingerprint"]
    elif cache is not None:
        files.notes += _save(cache, key, table, files.fingerprint)
    files.notes += listing.notes  # never from the cache, whose key knows only the files that are read
    return files


def _described(listing: Listing, dtype: np.dtype | None, trim: bool) -> TokenFiles:
    table = _describe_files(listing.names, dtype)
    if trim and table.kind == "litpkds":
        return _without_padding(table)
    return table


def _check_total(path: str, announced: int | None, files: TokenFiles) -> None:
    found = int(files.n_tokens.sum())
    if announced not in (None, found):
        raise DataError(
            f"{os.path.join(path, MANIFEST)} announces {announced} tokens, its files hold {found}; "
            f"files were exchanged, so prepare the data again"
        )


def _describe_files(names: FileNames, dtype: np.dtype | None) -> TokenFiles:
    def part(first: int) -> TokenFiles:
        few = names.take(np.arange(first, min(first + FILES_PER_TASK, len(names))))
        return _table(few, [describe_file(path, dtype) for path in few])

    starts = range(0, len(names), FILES_PER_TASK)
    if len(starts) == 1:
        return part(0)
    pool = ThreadPoolExecutor(THREADS)
    try:
        parts = list(pool.map(part, starts))
    finally:
        pool.shutdown(cancel_futures=True)
    for each in parts:
        _check_alike(parts[0][0], parts[0].kind, each[0], each.kind)
    columns = ([getattr(each, name) for each in parts] for name in ("n_tokens", "byte_offset", "heads"))
    notes = dict.fromkeys(note for each in parts for note in each.notes)
    options = {"dtype": parts[0].dtype, "kind": parts[0].kind, "tokenizer": parts[0].tokenizer}
    return TokenFiles(names, *map(np.concatenate, columns), notes=tuple(notes), **options)


def _table(names: FileNames, described: Sequence[Described]) -> TokenFiles:
    """described: (files,) in the order of the names.

    Raises:
        DataError: two of them have different types or formats.
    """
    first = described[0]
    for each in described:
        _check_alike(first.file, first.kind, each.file, each.kind)
    return TokenFiles(
        names,
        np.array([each.file.n_tokens for each in described], dtype=np.int64),
        np.array([each.file.byte_offset for each in described], dtype=np.int64),
        np.frombuffer(b"".join(each.head for each in described), np.uint8).reshape(-1, 32),
        dtype=first.file.dtype,
        kind=first.kind,
        notes=tuple(dict.fromkeys(each.note for each in described if each.note)),
        tokenizer=first.tokenizer,
    )


def _check_alike(first: TokenFile, first_kind: str, other: TokenFile, other_kind: str) -> None:
    if first.dtype != other.dtype:
        raise DataError(
            f"{other.path} holds {other.dtype} tokens, but {first.path} holds {first.dtype}; "
            f"files of one source need one dtype, so prepare them in one go"
        )
    if first_kind != other_kind:
        raise DataError(
            f"{other.path} is a {other_kind} file, but {first.path} is a {first_kind} file; "
            f"name those that belong together with a pattern"
        )


def _without_padding(files: TokenFiles) -> TokenFiles:
    """Cut the run of one id at the end of every group's last file, unless the folder was prepared by us."""
    n_tokens, heads, notes = files.n_tokens.copy(), files.heads.copy(), list(files.notes)
    for i in files.names.last_of_each_group().tolist():
        file = files[i]
        run, token = _last_run(file)
        if run < 2 or os.path.isfile(os.path.join(os.path.dirname(file.path), MANIFEST)):
            continue
        n_tokens[i] -= run
        heads[i] = np.frombuffer(head_digest(replace(file, n_tokens=int(n_tokens[i]))), np.uint8)
        fate = "" if n_tokens[i] else "; nothing else is in it, so the file is left out"
        notes.append(
            f"{file.path}: its last {run} of {file.n_tokens} tokens are one id ({token}), cut as padding{fate}"
        )
    return files.with_columns(n_tokens, heads, notes)


def _without_empty(files: TokenFiles) -> TokenFiles:
    kept = np.flatnonzero(files.n_tokens)
    if not len(kept):
        raise DataError(f"{files[0].path}{' and others' if len(files) > 1 else ''} hold no tokens except padding")
    return files if len(kept) == len(files) else files.take(kept)


def _last_run(file: TokenFile) -> tuple[int, int]:
    """Length and id of the run that ends a file; reads backwards and only as far as the run goes."""
    run, token = 0, None
    with open(file.path, "rb") as opened:
        for stop in range(file.n_tokens, 0, -TAIL_TOKENS):
            start = max(0, stop - TAIL_TOKENS)
            opened.seek(file.byte_offset + start * file.dtype.itemsize)
            tokens = np.frombuffer(opened.read((stop - start) * file.dtype.itemsize), file.dtype)
            token = int(tokens[-1]) if token is None else token
            others = np.flatnonzero(tokens != token)
            if others.size:
                return run + len(tokens) - 1 - int(others[-1]), token
            run += len(tokens)
    return run, token


def _save(cache: Path, key: str, table: TokenFiles, fingerprint: str) -> tuple[str, ...]:
    """table: every file of the listing, in its order, so that names need not be stored."""
    facts = {"dtype": table.dtype.str, "kind": table.kind, "notes": table.notes, "tokenizer": table.tokenizer}
    arrays = {"n_tokens": table.n_tokens, "byte_offset": table.byte_offset, "heads": table.heads}
    problem = save_arrays(cache, key, facts | {"fingerprint": fingerprint}, arrays)
    return (problem,) if problem else ()


def _restored(names: FileNames, facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> TokenFiles:
    options = {name: facts[name] for name in ("kind", "notes", "tokenizer")}
    return TokenFiles(names, **arrays, dtype=np.dtype(facts["dtype"]), **options)


@dataclass(frozen=True)
class Separator:
    """The id that seems to stand between documents."""

    id: int | None
    counts: dict[int, int]
    """How often each candidate was seen."""
    tokens_seen: int

    def describe(self) -> str:
        """One sentence with what was seen."""
        seen = ", ".join(f"{count} of id {token}" for token, count in self.counts.items())
        if self.id is None:
            return f"no separator found: among {self.tokens_seen} tokens there are {seen}"
        rate = self.tokens_seen / self.counts[self.id]
        return f"id {self.id} separates documents, one in {rate:.0f} tokens: among {self.tokens_seen} there are {seen}"


def likely_separators(tokenizer: Tokenizer | None, vocab_size: int | None) -> tuple[int, ...]:
    """The tokenizer's eos and bos; without them the last id, with which GPT-2 and Llama 3 end their vocabulary."""
    special = () if tokenizer is None else (tokenizer.eos_id, tokenizer.bos_id)
    named = tuple(each for each in special if each is not None)
    return named or (() if vocab_size is None else (vocab_size - 1,))


def detect_separator(files: Sequence[TokenFile], candidates: Sequence[int] = ()) -> Separator:
    """Guess the id between documents, from the first million tokens of up to three files. It changes nothing.

    A separator is neither rare nor frequent, and seldom comes twice within a twentieth of its mean distance, as
    punctuation does. Of several such ids the most frequent is taken; the first named where they are equally frequent
    (a document may have a beginning and an end).

    candidates: see `likely_separators`. The ids of the lineage, 1, 2 and 0, are looked at where none of them will do.
    """
    counts = dict.fromkeys((*candidates, *SEPARATORS), 0)
    gaps: dict[int, list[np.ndarray]] = {token: [] for token in counts}
    tokens_seen = 0
    for i in sorted({round(place) for place in np.linspace(0, len(files) - 1, SAMPLED_FILES)}):
        file = files[i]
        count = min(file.n_tokens, SAMPLED_TOKENS)
        tokens = np.fromfile(file.path, file.dtype, count, offset=file.byte_offset)
        tokens_seen += len(tokens)
        for token in counts:
            found = np.flatnonzero(tokens == token)
            counts[token] += len(found)
            gaps[token].append(np.diff(found))
    usual = [token for token in counts if _separates(counts[token], np.concatenate(gaps[token]), tokens_seen)]
    usual = [token for token in usual if token in candidates] or usual
    return Separator(max(usual, key=counts.__getitem__, default=None), counts, tokens_seen)


def _separates(count: int, gaps: np.ndarray, tokens_seen: int) -> bool:
    if not count or not RAREST_SEPARATOR <= count / tokens_seen <= MOST_FREQUENT_SEPARATOR:
        return False
    return len(gaps) < FEW_GAPS or float((gaps <= gaps.mean() / 20).mean()) < MOST_CLOSE_GAPS
