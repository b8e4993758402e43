"""Which files a path names for a split, by directory entries alone, and a cache of what was learned about them."""

from __future__ import annotations

import glob
import io
import json
import os
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np

from lit_gpt.atomic import write_atomically
from lit_gpt.file_names import FileNames
from lit_gpt.packed_dataset import MANIFEST, load_manifest

SUFFIXES = (".bin", ".ds", ".npy")
DESCRIBING = (".idx", ".metadata", ".index")  # files that say what is in another one
HELD_OUT = ("validation", "val", "test")
NAMES_OF_SPLIT = {"train": (("train", ()), ("", HELD_OUT)), "validation": (("validation", ()), ("val", ()))}
"""Split -> what its files begin with, and what they must not begin with; the second pair where the first finds none."""
NOT_OURS = (zipfile.BadZipFile, zlib.error)

Entry = tuple[str, os.stat_result]


class NoTokenFilesError(FileNotFoundError):
    """A path holds no token file of a split. A file that should be there and is not is a plain FileNotFoundError."""


@dataclass(frozen=True)
class Listing:
    """Candidates for token files, in the order in which they are read."""

    names: FileNames
    sizes_and_times: np.ndarray
    """(files, 3) int64: bytes, nanoseconds of the last writing, and of the last change of any kind: archives and
    copies keep the former, so that other files of the same size would be taken for those that were there before."""
    announced_tokens: int | None = None
    """What the manifest says, if there is one."""
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Listing:
        numbers = array("q")

        def paths() -> Iterator[str]:
            for path, stat in entries:
                numbers.extend((stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
                yield path

        names = FileNames.of(paths())
        return cls(names, np.frombuffer(numbers, np.int64).reshape(-1, 3) if numbers else np.empty((0, 3), np.int64))

    def in_natural_order(self) -> Listing:
        order = self.names.natural_order()
        return replace(self, names=self.names.take(order), sizes_and_times=self.sizes_and_times[order])

    def key(self, options: list[Any]) -> str:
        """sha256 of all that reading these files depends on, without opening one of them."""
        names = self.names
        digest = sha256(repr((options, self.announced_tokens, names.groups, self._describing())).encode())
        for each in (names.group, names.number, names.width, self.sizes_and_times):
            digest.update(np.ascontiguousarray(each, dtype=np.int64))
        return digest.hexdigest()

    def _describing(self) -> list[tuple[str, int, int]]:
        folders = {os.path.dirname(before) or "." for before, _ in self.names.groups}
        found = [
            each for folder in folders for each in entries_of(folder) if each.name.endswith((*DESCRIBING, MANIFEST))
        ]
        return sorted((entry.path, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in found)


def is_there(path: str) -> bool:
    """Whether a path is a folder, a file, a Megatron dataset or a pattern that matches something."""
    return os.path.exists(path) or os.path.isfile(_megatron_bin(path)) or any(glob.iglob(path, recursive=True))


def _megatron_bin(path: str) -> str:
    """Megatron's tools name a dataset without a suffix."""
    return f"{path.removesuffix('.idx')}.bin"


def list_files(path: str, split: str) -> Listing:
    """The candidates of a folder, a file or a pattern; `find_token_files` says which.

    Raises:
        NoTokenFilesError: there are none.
        FileNotFoundError: the manifest lists a file that is not there, or a link leads nowhere.
        DataError: the folder's manifest cannot be read.
    """
    if os.path.isfile(os.path.join(path, MANIFEST)):
        return _list_manifest(path, split)
    if os.path.isdir(path):
        return _list_folder(path, split)
    for one in (_megatron_bin(path), path):
        if os.path.isfile(one):
            return Listing.of([(one, os.stat(one))])
    found = ((name, os.stat(name)) for name in glob.iglob(path, recursive=True) if name.endswith(SUFFIXES))
    listing = Listing.of(each for each in found if S_ISREG(each[1].st_mode)).in_natural_order()
    if not len(listing.names):
        raise NoTokenFilesError(
            f"{path} does not exist: it is no folder and no file, and as a pattern it matches no {_listed(SUFFIXES)} "
            f"file; prepare data with scripts/prepare.py"
        )
    return listing


def _list_manifest(folder: str, split: str) -> Listing:
    splits = load_manifest(folder)["splits"]
    if not splits.get(split, {}).get("files"):
        held = ", ".join(name for name, each in splits.items() if each["files"])
        raise NoTokenFilesError(
            f"{folder} holds no {split} data; it holds {held}. Name a folder that does, or prepare the text again: "
            f"scripts/prepare.py --document-bytes cuts long files, --validation-input names held-out ones"
        )
    paths = (os.path.join(folder, name) for name in splits[split]["files"])
    try:
        listing = Listing.of((path, os.stat(path)) for path in paths)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error.filename} is missing, {MANIFEST} lists it; copy it again, or repeat the command of "
            f"scripts/prepare.py, which writes what is missing"
        ) from error
    return replace(listing, announced_tokens=splits[split]["tokens"])


def _list_folder(folder: str, split: str) -> Listing:
    for prefix, others in NAMES_OF_SPLIT.get(split, ((split, ()),)):
        unread: list[str] = []
        listing = Listing.of(_named(folder, prefix, others, unread)).in_natural_order()
        if len(listing.names):
            return replace(listing, notes=_unread_notes(folder, unread)) if split == "train" else listing
    raise NoTokenFilesError(
        f"{folder} holds no {split}* file that ends in {_listed(SUFFIXES)}; prepare it with scripts/prepare.py, or "
        f"name the token files with a pattern"
    )


def _named(folder: str, prefix: str, others: tuple[str, ...], unread: list[str]) -> Iterator[Entry]:
    """The regular files of a folder with a token file's suffix, this prefix and none of the others.

    unread: gets the names of those that could be training data as well.
    """
    for entry in entries_of(folder):
        name = entry.name
        if name.startswith(".") or name.endswith(DESCRIBING):
            continue
        if name.endswith(SUFFIXES) and name.startswith(prefix) and not name.startswith(others):
            if S_ISREG(entry.stat().st_mode):
                yield entry.path, entry.stat()
        elif _may_hold_tokens(name) and (others or not name.startswith(HELD_OUT)):
            unread.append(name)


def _may_hold_tokens(name: str) -> bool:
    """Whether a name is a token file's, packed or cut off perhaps: `x.bin`, `x.bin.zst`, `x.bin.part`."""
    return any(f"{suffix}." in f"{name}." for suffix in SUFFIXES)


def _unread_notes(folder: str, unread: list[str]) -> tuple[str, ...]:
    if not unread:
        return ()
    more = f" and {len(unread) - 1:,} more" if len(unread) > 1 else ""
    return (f"{folder}: {min(unread)}{more} not read, to go by the name; a pattern may name what is to be read",)


def entries_of(folder: str) -> Iterator[os.DirEntry]:
    """Everything in a folder."""
    with os.scandir(folder) as entries:
        yield from entries


def _listed(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def save_arrays(cache: Path, key: str, facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    """Keep arrays and plain values in one .npz file; returns what prevented it, if anything did."""
    data = io.BytesIO()
    facts = facts | {"key": key, "digest": _digest(arrays)}
    np.savez(data, facts=np.array(json.dumps(facts)), **arrays)
    try:
        write_atomically(cache, data.getbuffer())
    except OSError as error:
        return f"the index could not be kept in {cache} ({error}), so the next start reads all headers again"
    return ""


def load_arrays(cache: Path, key: str, rows: int) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """What `save_arrays` kept under this key; None where there is nothing, something else, or a damaged file.

    rows: first dimension that all arrays must have. Nothing in the file is executed.
    """
    try:
        with open(cache, "rb") as file, np.load(file, allow_pickle=False) as stored:
            facts = json.loads(str(stored["facts"]))
            if facts["key"] != key:
                return None
            arrays = {name: stored[name] for name in stored.files if name != "facts"}
    except (*NOT_OURS, OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, MemoryError):
        return None
    whole = facts["digest"] == _digest(arrays) and all(len(each) == rows for each in arrays.values())
    return (facts, arrays) if whole else None


def _digest(arrays: dict[str, np.ndarray]) -> str:
    """sha256 over all that arrays are; zip's own checksums do not cover names and types."""
    digest = sha256()
    for name, values in sorted(arrays.items()):
        digest.update(f"{name} {values.dtype.str} {values.shape} ".encode())
        digest.update(np.ascontiguousarray(values))
    return digest.hexdigest()
