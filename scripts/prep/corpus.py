"""Raw text: find the input files, read their documents, and say which split each document belongs to."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lit_gpt.errors import DataError
from lit_gpt.tokenizer import well_formed

TEXT_SUFFIXES = (".txt", ".md", ".py")
LINES_SUFFIXES = (".jsonl", ".json")
UNREADABLE_SUFFIXES = (".parquet", ".zst", ".arrow", ".bz2", ".xz", ".zip")
STDLIB_SKIPPED = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
STDLIB_MIN_BYTES = 5_000_000  # embeddable and zipped Pythons have no sources; the usual ones have 11 MB
STDLIB_MIN_CHARACTERS = 200
STDLIB_VALIDATION_EVERY = 20
SPLIT_BUCKETS = 10_000
HASHED_BYTES = 256_000_000  # corpora up to this size are identified by content, larger ones by names and sizes
ROWS_BEFORE_JUDGING = 1000
GZIP_MAGIC = b"\x1f\x8b"
LFS_MAGIC = b"version https://git-lfs"


@dataclass(frozen=True)
class Reading:
    """How files are read as documents."""

    text_key: str
    """Where a JSON line has its text."""
    document_bytes: int
    """Length at which text files are cut; 0 takes each as one document."""
    validation_buckets: int
    """Out of 10,000 hash values of a text, those that mean validation."""


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
        """Whether each line is a JSON object with a document; otherwise the file is one text."""
        return self.name.removesuffix(".gz").endswith(LINES_SUFFIXES)


def find_inputs(paths: list[str], split: str = "auto") -> tuple[list[InputFile], list[str]]:
    """The files behind `paths`, sorted by name, and the names of files in folders that are of no known kind.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds nothing to read.
        ValueError: a file in a format that cannot be read.
    """
    found: list[InputFile] = []
    ignored: list[str] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"input {path} does not exist; give text files or folders that hold some")
        if path.is_file():
            if path.suffix in UNREADABLE_SUFFIXES:
                raise ValueError(f"input {path}: {path.suffix} files cannot be read; unpack it to text or JSON lines")
            found.append(_input_file(path, path.name, split))
            continue
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and not _hidden(file.relative_to(path))]
        known = [file for file in files if _known(file.name)]
        if not known:
            raise FileNotFoundError(f"folder {path} holds no text: looked for {_known_suffixes()}")
        found += [_input_file(file, file.relative_to(path.parent).as_posix(), split) for file in known]
        ignored += [file.name for file in files if not _known(file.name)]
    distinct = {os.path.realpath(file.path): file for file in found}
    return sorted(distinct.values(), key=lambda file: (file.name, file.path)), ignored


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
    return InputFile(str(path), name, path.stat().st_size, split)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _known(name: str) -> bool:
    if name.endswith(".json"):  # a lone .json in a folder is seldom JSON lines; C4 calls its lines .json.gz
        return False
    return name.removesuffix(".gz").endswith(TEXT_SUFFIXES + LINES_SUFFIXES)


def _known_suffixes() -> str:
    return ", ".join(TEXT_SUFFIXES + LINES_SUFFIXES[:1]) + ", each also with .gz, and .json.gz"


def content_digests(files: list[InputFile]) -> list[str | None]:
    """A hash of each file's content, or None for all where the corpus is too large to be read twice."""
    if sum(file.n_bytes for file in files) > HASHED_BYTES:
        return [None] * len(files)
    return [hashlib.blake2b(Path(file.path).read_bytes(), digest_size=16).hexdigest() for file in files]


def text_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def read_documents(file: InputFile, reading: Reading, counters: Counter[str]) -> Iterator[tuple[str, str]]:
    """(split, text) of the documents of one file. None is empty, all have a UTF-8 form; what was mended is counted.

    Raises:
        DataError: the file is damaged, or is not text.
    """
    try:
        with _open(file.path) as stream:
            rows = _rows(file, stream, reading.text_key, counters) if file.holds_lines else _texts(stream, reading)
            for row in rows:
                text = _mended(row, counters)
                if text.strip():
                    yield _split_of(file, text, reading.validation_buckets), text
                else:
                    counters["empty"] += 1
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file.path} is damaged or cut short: {error}; get it again") from error


def _split_of(file: InputFile, text: str, validation_buckets: int) -> str:
    """Equal texts always fall on the same side, whatever file or worker they come from."""
    if file.split != "auto":
        return file.split
    return "validation" if text_hash(text) % SPLIT_BUCKETS < validation_buckets else "train"


def _open(path: str) -> BinaryIO:
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.startswith(LFS_MAGIC):
        raise DataError(f"{path} is a git-lfs pointer, not the data; run `git lfs pull` in its repository")
    if head.startswith(GZIP_MAGIC):
        return gzip.open(path, "rb")
    if b"\0" in head:
        raise DataError(f"{path} is not text: it holds zero bytes; give text, JSON lines, or either with gzip")
    return open(path, "rb")


def _texts(stream: BinaryIO, reading: Reading) -> Iterator[bytes]:
    """The whole file, or pieces of about `document_bytes` that end where a line ends."""
    if not reading.document_bytes:
        yield stream.read()
        return
    while piece := b"".join(stream.readlines(reading.document_bytes)):
        yield piece


def _rows(file: InputFile, stream: BinaryIO, text_key: str, counters: Counter[str]) -> Iterator[str]:
    """The text of each JSON line."""
    n_rows = without_text = 0
    keys: list[str] = []
    for line in stream:
        if not line.strip():
            continue
        n_rows += 1
        row = _parsed(line, counters)
        text = row.get(text_key) if row is not None else None
        if isinstance(text, str):
            yield text
        elif row is not None:
            without_text += 1
            keys = list(row)
        if n_rows == ROWS_BEFORE_JUDGING:
            _judge(file, n_rows, without_text, text_key, keys)
    if n_rows < ROWS_BEFORE_JUDGING:
        _judge(file, n_rows, without_text, text_key, keys)
    counters.update(rows=n_rows, no_text=without_text)


def _judge(file: InputFile, n_rows: int, without_text: int, text_key: str, keys: list[str]) -> None:
    if 2 * without_text > n_rows:
        raise DataError(
            f"{file.path}: {without_text} of the first {n_rows} rows have no text under {text_key!r}; "
            f"the last of them has the keys {', '.join(keys) or 'none'}. Choose one with --text-key"
        )


def _parsed(line: bytes, counters: Counter[str]) -> dict[str, Any] | None:
    try:
        row = json.loads(_decoded(line, counters), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        counters["bad_json"] += 1
        return None
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _mended(row: str | bytes, counters: Counter[str]) -> str:
    if isinstance(row, bytes):
        return _decoded(row, counters)
    text = well_formed(row)
    counters["repaired"] += text is not row
    return text


def _decoded(data: bytes, counters: Counter[str]) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        counters["repaired"] += 1
        return data.decode(errors="replace")
