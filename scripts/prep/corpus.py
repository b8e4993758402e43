"""Raw text: find the input files, read their documents, and say which split each document belongs to."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import itertools
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_gpt.errors import DataError
from lit_gpt.tokenizer import well_formed
from prep import formats
from prep.columns import column_rows
from prep.formats import ABSENT, COLUMNAR_SUFFIXES, PACKED_SUFFIXES, WrongKeyError
from prep.saved_datasets import files_of_saved, is_saved

TEXT_SUFFIXES = (".txt", ".md", ".py")
LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
STDLIB_SKIPPED = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
STDLIB_MIN_BYTES = 5_000_000  # embeddable and zipped Pythons have no sources; the usual ones have 11 MB
STDLIB_MIN_CHARACTERS = 200
STDLIB_VALIDATION_EVERY = 20
SPLIT_BUCKETS = 10_000
HASHED_BYTES = 256_000_000  # corpora up to this size are identified by content, larger ones by names and sizes
ROWS_BEFORE_JUDGING = 1000
NAMES_SHOWN = 40


@dataclass(frozen=True)
class Reading:
    """How files are read as documents."""

    text_key: str
    """Where a row has its text: a key, a column, or names joined by dots where one lies inside the other."""
    document_bytes: int
    """Length at which text files are cut; 0 takes each as one document."""
    validation_buckets: int
    """Out of 10,000 hash values of a text, those that mean validation."""
    drop: tuple[tuple[str, str], ...] = ()
    """(key, value) of rows to leave out."""


@dataclass(frozen=True)
class InputFile:
    """One file of raw text."""

    path: str
    name: str
    """Name inside the given folder: the same on every machine."""
    n_bytes: int
    split: str
    """`train` or `validation` where that is fixed, `auto` where the text decides."""

    @property
    def holds_lines(self) -> bool:
        """Whether each line is a JSON object with a document, if the content is no table; otherwise it is one text."""
        return _unpacked(self.name).endswith(LINES_SUFFIXES)


def find_inputs(paths: list[str], split: str = "auto") -> tuple[list[InputFile], list[str]]:
    """The files behind `paths`, sorted by name, and the names of what was left out of folders.

    A path is a file of any name, a folder, or a glob pattern. Names begin at the given file or folder, at the folder
    before the first wildcard of a pattern.

    Raises:
        FileNotFoundError: a path does not exist, a pattern matches nothing, or a folder holds nothing to read.
        ValueError: a file in a format that cannot be read.
    """
    found: list[InputFile] = []
    ignored: list[str] = []
    for path, root in itertools.chain.from_iterable(map(_matches, paths)):
        if path.is_dir():
            files, left_out = _in_folder(path, root, split)
            found += files
            ignored += left_out
        else:
            if not _known(path.name):
                _refuse_unreadable(path)
            found.append(_input_file(path, path.relative_to(root).as_posix(), split))
    distinct = {os.path.realpath(file.path): file for file in found}
    return sorted(distinct.values(), key=lambda file: (file.name, file.path)), ignored


def kinds_of(files: list[InputFile]) -> str:
    """How many of which kind, by their names: `11 JSON lines, 1 text`."""
    found = Counter(
        "JSON lines" if file.holds_lines else "tables" if _unpacked(file.name).endswith(COLUMNAR_SUFFIXES) else "text"
        for file in files
    )
    return ", ".join(f"{count} {kind}" for kind, count in found.most_common())


def _matches(given: str) -> list[tuple[Path, Path]]:
    """The files and folders that an argument means, each with the folder at which its name begins."""
    path = Path(given)
    if path.exists():
        return [(path, path.parent)]
    if not glob.has_magic(given):
        raise FileNotFoundError(f"input {path} does not exist; give text files or folders that hold some")
    found = sorted(map(Path, glob.glob(given, recursive=True)))
    if not found:
        raise FileNotFoundError(f"no file matches the pattern {given}; check it, and the folder before the wildcard")
    root = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
    return [(each, root.parent) for each in found if each.is_dir() or _is_file(each)]


def _refuse_unreadable(path: Path) -> None:
    with path.open("rb") as file:
        packing = formats.unreadable_packing(file.read(formats.HEAD_BYTES))
    if packing is not None:
        raise ValueError(f"input {path}: files packed with {packing} cannot be read; unpack it to text or JSON lines")


def _in_folder(folder: Path, root: Path, split: str) -> tuple[list[InputFile], list[str]]:
    """The files in a folder that are of a known kind, and what was left out."""
    found: list[InputFile] = []
    ignored: list[str] = []
    for place, folders, names in _walk(folder):
        if is_saved(place, names):
            folders.clear()
            files, left_out = files_of_saved(place, split)
            found += [_input_file(file, file.relative_to(root).as_posix(), where) for file, where in files]
            ignored += [f"{each.relative_to(root).as_posix()} (split left out)" for each in left_out]
            continue
        for path in (place / name for name in names):
            if _known(path.name) and _is_file(path):
                found.append(_input_file(path, path.relative_to(root).as_posix(), split))
            else:
                ignored.append(path.name)
    if not found:
        raise FileNotFoundError(f"folder {folder} holds no text: looked for {_known_suffixes()}")
    return found, ignored


def _walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """What `os.walk` gives, in one order, without what is hidden, and also behind links, but no folder twice."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(place), folders, sorted(name for name in names if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def _is_file(path: Path) -> bool:
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(
            f"{path} is a link to {os.readlink(path)}, which is missing; get it, or remove the link"
        )
    return path.is_file()


def stdlib_inputs() -> tuple[list[InputFile], str]:
    """The interpreter's own sources, every twentieth by name for validation, and a sentence on what they are."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = _sources(root)
    if sum(file.n_bytes for file in files) >= STDLIB_MIN_BYTES:
        return files, f"standard library of Python {sysconfig.get_python_version()}"
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{root} holds no Python sources to speak of, and torch is not installed; use --input")
    return _sources(Path(spec.submodule_search_locations[0])), "sources of torch; the standard library has none here"


def _sources(root: Path) -> list[InputFile]:
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in STDLIB_SKIPPED)
        for name in names:
            path = Path(folder, name)
            if path.suffix == ".py" and _is_substantial(path):
                relative = path.relative_to(root).as_posix()
                held_out = text_hash(relative) % STDLIB_VALIDATION_EVERY == 0
                files.append(_input_file(path, relative, "validation" if held_out else "train"))
    return sorted(files, key=lambda file: file.name)


def _is_substantial(path: Path) -> bool:
    try:
        return len(path.read_bytes().decode()) > STDLIB_MIN_CHARACTERS
    except UnicodeDecodeError:
        return False


def _input_file(path: Path, name: str, split: str) -> InputFile:
    """`name` is the same whatever encoding the locale has for names."""
    if not os.access(path, os.R_OK):
        raise DataError(f"{path} cannot be read: permission denied; change its permissions, or leave it out")
    try:
        name = os.fsencode(name).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"the name of {str(path)!r} is not in UTF-8, as plan and manifest are; rename it") from error
    return InputFile(str(path), name, path.stat().st_size, split)


def _unpacked(name: str) -> str:
    return next((name.removesuffix(suffix) for suffix in PACKED_SUFFIXES if name.endswith(suffix)), name)


def _known(name: str) -> bool:
    if name.endswith(".json"):  # a lone .json in a folder is seldom JSON lines; C4 calls its lines .json.gz
        return False
    return name.endswith(COLUMNAR_SUFFIXES) or _unpacked(name).endswith(TEXT_SUFFIXES + LINES_SUFFIXES)


def _known_suffixes() -> str:
    packed = " or ".join(PACKED_SUFFIXES)
    plain = ", ".join(TEXT_SUFFIXES + LINES_SUFFIXES[:-1])
    return f"{plain}, each also with {packed}, .json with {packed}, {', '.join(COLUMNAR_SUFFIXES)}, saved datasets"


def content_digests(files: list[InputFile]) -> list[str | None]:
    """A hash of each file's content, or None for all where the corpus is too large to be read twice."""
    if sum(file.n_bytes for file in files) > HASHED_BYTES:
        return [None] * len(files)
    return [hashlib.blake2b(Path(file.path).read_bytes(), digest_size=16).hexdigest() for file in files]


def text_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def read_documents(file: InputFile, reading: Reading, counters: Counter[str]) -> Iterator[tuple[str, str]]:
    """(split, text) of the documents of one file. None is empty, all have a UTF-8 form; what was mended is counted.

    Memory holds a part of a file at a time, but for text files that are one document.

    Raises:
        DataError: the file is damaged, or is not text.
        WrongKeyError: most rows have no text under the key, or lack a key by which to drop some.
    """
    buckets = reading.validation_buckets if file.split == "auto" else 0
    fixed_split = "train" if file.split == "auto" else file.split
    for content in _contents(file, reading, counters):
        text = _mended(content, counters)
        if not text or text.isspace():
            counters["empty"] += 1
        elif buckets and text_hash(text) % SPLIT_BUCKETS < buckets:  # equal texts always fall on the same side
            yield "validation", text
        else:
            yield fixed_split, text


def _contents(file: InputFile, reading: Reading, counters: Counter[str]) -> Iterator[str | bytes]:
    kind = formats.sniff(file.path)
    if kind == formats.EMPTY:
        counters["empty_files"] += 1
    elif kind in formats.COLUMNAR:
        keys = [reading.text_key, *(key for key, _ in reading.drop)]
        names, rows = column_rows(file.path, kind, keys)
        yield from _texts_of(rows, names, file, reading, counters)
    elif file.holds_lines:
        rows = formats.json_rows(formats.without_array(file.path, formats.chunks(file.path, kind)), counters)
        yield from _texts_of(rows, None, file, reading, counters)
    else:
        pieces = formats.chunks(file.path, kind)
        if not _unpacked(file.name).endswith(TEXT_SUFFIXES):
            pieces = formats.without_rows(file.path, pieces, reading.text_key)
        yield from formats.texts(pieces, reading.document_bytes)


def _texts_of(
    rows: Iterator[dict[str, Any] | None],
    names: list[str] | None,
    file: InputFile,
    reading: Reading,
    counters: Counter[str],
) -> Iterator[str | bytes]:
    """The texts of rows. `names` are those of the columns, None where each row has its own; a row may be None."""
    n_rows = n_dropped = 0
    lacking: Counter[str] = Counter()
    incomplete: dict[str, Any] = {}
    try:
        for row in rows:
            n_rows += 1
            if row is not None and _is_dropped(row, reading.drop):
                n_dropped += 1
            elif row is not None:
                text = formats.value_at(row, reading.text_key)
                if isinstance(text, str | bytes):
                    yield text
                if (reading.drop or not isinstance(text, str)) and (missing := _missing(row, text, reading)):
                    lacking.update(missing)
                    incomplete = row
            if n_rows == ROWS_BEFORE_JUDGING:
                _judge(file, n_rows - n_dropped, lacking, reading, names or formats.names_in(incomplete))
        if n_rows < ROWS_BEFORE_JUDGING:
            _judge(file, n_rows - n_dropped, lacking, reading, names or formats.names_in(incomplete))
    finally:
        counters.update(rows=n_rows, no_text=lacking[reading.text_key], dropped=n_dropped)


def _missing(row: dict[str, Any], text: Any, reading: Reading) -> list[str]:
    """The keys that a row should have and has not."""
    missing = [key for key, _ in reading.drop if formats.value_at(row, key) is ABSENT]
    return missing if isinstance(text, str | bytes) else [reading.text_key, *missing]


def _is_dropped(row: dict[str, Any], drop: tuple[tuple[str, str], ...]) -> bool:
    for key, value in drop:
        if _spelled(formats.value_at(row, key)) == value:
            return True
    return False


def _spelled(value: Any) -> str | None:
    """A value as one writes it on a command line."""
    if isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, bool | int | float | None) else None


def _judge(file: InputFile, n_rows: int, lacking: Counter[str], reading: Reading, names: list[str]) -> None:
    for key, n_lacking in lacking.items():
        if 2 * n_lacking > n_rows:
            is_text = key == reading.text_key
            raise WrongKeyError(
                f"{file.path}: {n_lacking} of the first {n_rows} rows have no {'text under ' * is_text}{key!r}; "
                f"such a row has the keys {', '.join(names[:NAMES_SHOWN]) or 'none'}. "
                f"{'Choose one with --text-key' if is_text else _drop_rule(key, reading)}"
            )


def _drop_rule(key: str, reading: Reading) -> str:
    given = " ".join(f"--drop {name}={value}" for name, value in reading.drop if name == key)
    return f"{given} needs it in every row, to tell which to leave out; name another key, or do without --drop"


def _mended(content: str | bytes, counters: Counter[str]) -> str:
    if isinstance(content, bytes):
        return formats.decoded(content, counters)
    text = well_formed(content)
    counters["repaired"] += text is not content
    return text
