"""What a file of raw text is, judged by its bytes, and its chunks, lines or rows, however they are packed.

Every way of reading was chosen because it notices a file that was cut short or damaged; see each function.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lit_gpt.errors import DataError

PLAIN, EMPTY, GZIP, ZSTD, PARQUET, ARROW_STREAM, ARROW_FILE = (
    "plain", "empty", "gzip", "zstd", "parquet", "arrow stream", "arrow file",
)  # fmt: skip
COLUMNAR = (PARQUET, ARROW_STREAM, ARROW_FILE)
MAGIC = {
    b"\x1f\x8b": GZIP,
    b"\x28\xb5\x2f\xfd": ZSTD,
    b"PAR1": PARQUET,
    b"\xff\xff\xff\xff": ARROW_STREAM,
    b"ARROW1\0\0": ARROW_FILE,
}
SUFFIXES = {".gz": (GZIP,), ".zst": (ZSTD,), ".parquet": (PARQUET,), ".arrow": (ARROW_STREAM, ARROW_FILE)}
PACKED_SUFFIXES = (".gz", ".zst")
COLUMNAR_SUFFIXES = (".parquet", ".arrow")
UNREADABLE = {b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"PK\x03\x04": "zip", b"7z\xbc\xaf\x27\x1c": "7z"}
LFS_MAGIC = b"version https://git-lfs"
UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # the first also begins UTF-32
ARRAY_START = re.compile(rb"\s*\[\s*\{")
HEAD_BYTES = 4096
CHUNK_BYTES = 1 << 20
ABSENT = object()
"""The value of a key that a row does not have."""


class WrongKeyError(DataError):
    """Rows do not have what was asked for: a matter of the options, not of a file to be left out."""


def sniff(path: str) -> str:
    """The kind of a file, by its first bytes; its name only tells what it was meant to be.

    Raises:
        DataError: the file is of a kind that cannot be read, or is not what its name says and not text either.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(LFS_MAGIC):
        raise DataError(f"{path} is a git-lfs pointer, not the data; run `git lfs pull` in its repository")
    if (packing := unreadable_packing(head)) is not None:
        raise DataError(f"{path} is packed with {packing}, which cannot be read; unpack it, or use gzip or zstd")
    if not head:
        return EMPTY
    for magic, kind in MAGIC.items():
        if head.startswith(magic):
            return kind
    if head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:  # a frame of zstd that holds no data, as pzstd writes first
        return ZSTD
    _refuse_broken_start(path, head)
    return PLAIN


def unreadable_packing(head: bytes) -> str | None:
    return next((name for magic, name in UNREADABLE.items() if head.startswith(magic)), None)


def _refuse_broken_start(path: str, head: bytes) -> None:
    """A packed file whose first bytes are lost must not pass for text, while text with a wrong name is welcome."""
    meant = SUFFIXES.get(Path(path).suffix)
    if meant is None:
        return
    cut_short = any(magic.startswith(head) for magic, kind in MAGIC.items() if kind in meant)
    if cut_short or meant[0] in COLUMNAR or not _looks_like_text(head):
        raise DataError(f"{path} is damaged: it does not begin like a {meant[0]} file; get it again")


def _looks_like_text(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


@contextlib.contextmanager
def damage_named(path: str) -> Iterator[None]:
    """Turn what decoders raise into a DataError with the path. Errors of the system, which have a number, pass."""
    try:
        yield
    except (EOFError, zlib.error, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error
    except Exception as error:
        of_arrow = type(error).__module__.partition(".")[0] == "pyarrow"  # which may not be installed
        if of_arrow or (isinstance(error, OSError) and error.errno is None):
            raise _damaged(path, error) from error
        raise


def _damaged(path: str, error: Exception) -> DataError:
    if "too much memory" in str(error):
        return DataError(f"{path} was packed with `zstd --long`; pack it again without: zstd -d --long=31, then zstd")
    return DataError(f"{path} is damaged or cut short: {' '.join(str(error).split())}; get it again")


def chunks(path: str, kind: str) -> Iterator[bytes]:
    """The content of a plain, gzip or zstd file in pieces of about a megabyte, without the mark of UTF-8 at its start.

    Raises:
        DataError: the file is damaged, cut short, followed by something else, or not text.
    """
    with damage_named(path), _opened(path, kind) as stream:
        chunk = stream.read(CHUNK_BYTES)
        _refuse_other_than_text(path, chunk[:HEAD_BYTES])
        yield chunk.removeprefix(codecs.BOM_UTF8)
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _refuse_other_than_text(path: str, head: bytes) -> None:
    if head.startswith(UTF_16_MARKS):
        raise DataError(f"{path} is in UTF-16 or UTF-32; make UTF-8 of it: iconv -f UTF-16 -t UTF-8, or -f UTF-32")
    if b"\0" in head:
        raise DataError(
            f"{path} is not text: it holds zero bytes; give text or JSON lines in UTF-8, plain or packed with "
            f"gzip or zstd, or parquet or Arrow files"
        )


def _opened(path: str, kind: str) -> BinaryIO:
    if kind == ZSTD:
        # the package zstandard takes the end of a truncated file for the end of the data; this does not
        return pyarrow_for(path).input_stream(path, compression="zstd")
    return gzip.open(path, "rb") if kind == GZIP else open(path, "rb", buffering=0)


def pyarrow_for(path: str) -> Any:
    """The package, or an error that says which file needs it and how to get it."""
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(
            f"{path} needs the package pyarrow, which is not installed; "
            f"install the [prep] extra: pip install 'lit-grow[prep]'"
        ) from error
    return pyarrow


def lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The lines of a text that comes in pieces, without their line feeds; the last may be empty."""
    begun: list[bytes] = []
    for piece in pieces:
        first, *others = piece.split(b"\n")
        begun.append(first)
        if others:
            yield b"".join(begun)
            yield from others[:-1]
            begun = [others[-1]]
    yield b"".join(begun)


def texts(pieces: Iterator[bytes], document_bytes: int) -> Iterator[bytes]:
    """The whole text, or, unless `document_bytes` is 0, groups of whole lines just longer than that."""
    if not document_bytes:
        yield b"".join(pieces)
        return
    group: list[bytes] = []
    size = 0
    for line in _with_line_feeds(lines(pieces)):
        group.append(line)
        size += len(line)
        if size > document_bytes:
            yield b"".join(group)
            group, size = [], 0
    if group:
        yield b"".join(group)


def _with_line_feeds(found: Iterator[bytes]) -> Iterator[bytes]:
    previous = next(found)
    for line in found:
        yield previous + b"\n"
        previous = line
    if previous:
        yield previous


def without_array(path: str, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The pieces of JSON lines.

    Raises:
        DataError: they are one array of objects, which would have to be held in memory as a whole.
    """
    first = next(pieces, b"")
    if ARRAY_START.match(first):
        raise DataError(
            f"{path} begins with an array; give JSON lines, each of which is one object: jq -c '.[]' makes them of it"
        )
    yield first
    yield from pieces


def without_rows(path: str, pieces: Iterator[bytes], text_key: str) -> Iterator[bytes]:
    """The pieces of a text whose name says nothing of its form.

    Raises:
        DataError: it begins with a JSON object that has a text, and must not be taken for text as a whole.
    """
    first = next(pieces, b"")
    row = _slowly_parsed(first.partition(b"\n")[0], Counter())
    if isinstance(row, dict) and isinstance(value_at(row, text_key), str):
        raise DataError(f"{path} holds JSON lines, it seems, but its name does not say so; let it end in .jsonl")
    yield first
    yield from pieces


def json_rows(pieces: Iterator[bytes], counters: Counter[str]) -> Iterator[dict[str, Any] | None]:
    """The objects on the lines of a text; None for a line that holds no JSON object, which is counted `bad_json`."""
    fast_loads = _fast_json()
    for line in lines(pieces):
        if line and not line.isspace():
            yield _parsed(line, fast_loads, counters)


def _fast_json() -> Callable[[bytes], Any] | None:
    try:
        import orjson
    except ImportError:
        return None
    return orjson.loads


def _parsed(line: bytes, fast_loads: Callable[[bytes], Any] | None, counters: Counter[str]) -> dict[str, Any] | None:
    row = None
    try:
        if fast_loads is not None:
            row = fast_loads(line)
    except ValueError:
        fast_loads = None  # lone surrogates and bytes that are not UTF-8 are for the standard library
    if fast_loads is None:
        row = _slowly_parsed(line, counters)
    if not isinstance(row, dict):
        counters["bad_json"] += 1
        return None
    return row


def _slowly_parsed(line: bytes, counters: Counter[str]) -> Any:
    try:
        return json.loads(decoded(line, counters), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def decoded(data: bytes, counters: Counter[str]) -> str:
    """UTF-8 text; bytes that are none are replaced and the text is counted `repaired`."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        counters["repaired"] += 1
        return data.decode(errors="replace")


def value_at(row: dict[str, Any], key: str) -> Any:
    """What a row has under `a.b.c`: under that name, or in objects inside each other; `ABSENT` if nothing."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return ABSENT
        value = value[part]
    return value


def names_in(row: dict[str, Any]) -> list[str]:
    """The keys of a row, those of an object inside it with a dot, as `value_at` takes them."""
    inside = ([f"{key}.{name}" for name in value] if isinstance(value, dict) else [] for key, value in row.items())
    return [name for key, names in zip(row, inside, strict=True) for name in names or [key]]
