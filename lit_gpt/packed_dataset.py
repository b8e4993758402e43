"""The LITPKDS token files of lit-gpt and TinyLlama, written and read, and the manifest of a prepared folder.

Bytes of a file: `LITPKDS`, version u64 = 1, dtype code u8, number of tokens u64, then the tokens; little-endian. Unlike
older writers we store the true number of tokens: no padding is ever written, none is trained on.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lit_gpt.atomic import sync_directory
from lit_gpt.errors import DataError

MAGIC = b"LITPKDS"
VERSION = 1
HEADER = struct.Struct("<7sQBQ")  # magic, version, dtype code, tokens: 24 bytes
DTYPE_OF_CODE = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f4", 7: "<f8", 8: "<u2"}
CODE_OF_DTYPE = {np.dtype(name): code for code, name in DTYPE_OF_CODE.items() if not name.startswith("<f")}
MAX_UINT16_VOCAB = 65500  # lit-gpt's limit: above it tokens are int32

MANIFEST = "manifest.json"
PLAN = "plan.json"  # scripts/prepare.py writes it first and the manifest last


@dataclass(frozen=True)
class TokenFile:
    """A stretch of tokens inside a file, whatever format the file has."""

    path: str
    byte_offset: int
    """Where the first token is."""
    n_tokens: int
    dtype: np.dtype

    @property
    def end_bytes(self) -> int:
        return self.byte_offset + self.n_tokens * self.dtype.itemsize


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that lit-gpt stores tokens of a vocabulary in."""
    return np.dtype("<u2" if vocab_size < MAX_UINT16_VOCAB else "<i4")


class TokenFileWriter:
    """Write one LITPKDS file piece by piece. It appears under its name complete, or not at all.

    Use as a context manager: leaving it normally publishes the file, an exception removes what was written.
    """

    def __init__(self, path: str | os.PathLike[str], dtype: np.dtype) -> None:
        self.path = Path(path)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODE_OF_DTYPE:
            known = ", ".join(str(each) for each in CODE_OF_DTYPE)
            raise ValueError(f"tokens cannot be stored as {dtype}; LITPKDS knows {known}")
        self.n_tokens = 0
        self.crc32 = 0
        """Checksum of the token bytes, without the header."""
        self._temporary = self.path.with_name(f"{self.path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        self._file: BinaryIO | None = None

    def __enter__(self) -> TokenFileWriter:
        self._file = open(self._temporary, "wb")
        self._file.write(bytes(HEADER.size))
        return self

    def write(self, tokens: np.ndarray) -> None:
        """tokens: (k,) integers, appended.

        Raises:
            ValueError: a token that the dtype cannot hold; it would be stored as another token.
        """
        info = np.iinfo(self.dtype)
        if tokens.size and (tokens.min() < info.min or tokens.max() > info.max):
            raise ValueError(
                f"token {tokens.max() if tokens.max() > info.max else tokens.min()} does not fit {self.dtype}"
            )
        data = tokens.astype(self.dtype).tobytes()
        self._file.write(data)
        self.crc32 = zlib.crc32(data, self.crc32)
        self.n_tokens += len(tokens)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None:
            try:
                self._publish()
            except OSError as failure:
                self._discard(failure)
                raise
        else:
            self._discard(error)

    def _publish(self) -> None:
        self._file.seek(0)
        self._file.write(HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[self.dtype], self.n_tokens))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        sync_directory(self.path.parent)

    def _discard(self, error: BaseException) -> None:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(self.path)  # a failed write does not say where
        self._temporary.unlink(missing_ok=True)
        try:
            self._file.close()
        except OSError:  # closing flushes; on a full disk that fails a second time, and the file is gone anyway
            pass


def write_token_file(path: str | os.PathLike[str], tokens: np.ndarray, dtype: np.dtype) -> None:
    """Write (k,) tokens as one LITPKDS file, atomically."""
    with TokenFileWriter(path, dtype) as writer:
        writer.write(np.asarray(tokens))


def read_header(path: str | os.PathLike[str]) -> TokenFile:
    """The header of a LITPKDS file, checked against the file's size.

    Raises:
        FileNotFoundError: no such file.
        DataError: not a LITPKDS file, or cut short, or with bytes behind its end.
    """
    with open(path, "rb") as file:
        return parse_header(str(path), file.read(HEADER.size), os.fstat(file.fileno()).st_size)


def parse_header(path: str, data: bytes, found_bytes: int) -> TokenFile:
    """`read_header` for a file whose first bytes and whose size are known already."""
    if len(data) < HEADER.size:
        raise DataError(f"{path} is truncated: expected a header of {HEADER.size} bytes, found {found_bytes} bytes")
    magic, version, code, n_tokens = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise DataError(f"{path} is not a LITPKDS token file: it begins with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise DataError(f"{path} has LITPKDS version {version}; this program reads version {VERSION}")
    dtype = np.dtype(DTYPE_OF_CODE.get(code, "V"))
    if dtype not in CODE_OF_DTYPE:
        raise DataError(f"{path} has dtype code {code}; tokens have one of {sorted(CODE_OF_DTYPE.values())}")
    token_file = TokenFile(path, HEADER.size, n_tokens, dtype)
    if found_bytes != token_file.end_bytes:
        kind = "truncated" if found_bytes < token_file.end_bytes else "damaged"
        raise DataError(
            f"{path} is {kind}: its header announces {n_tokens} tokens, expected {token_file.end_bytes} bytes, "
            f"found {found_bytes} bytes; copy or prepare it again"
        )
    return token_file


def manifest_of(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The manifest of a prepared folder; None for token files of others.

    Raises:
        DataError: it cannot be read, or is missing where preparation began.
    """
    if (Path(path) / MANIFEST).is_file():
        return load_manifest(path)
    if (Path(path) / PLAN).is_file():
        raise DataError(
            f"{path} holds a {PLAN} but no {MANIFEST}: it was not prepared to the end or is still being prepared, or "
            f"the manifest is lost; repeat the command of scripts/prepare.py, which writes what is missing"
        )
    return None


def source_of(manifest: Mapping[str, Any]) -> str | None:
    """Where the text of a prepared folder is from, as text; stored, even one file counts as `1 files`."""
    source = manifest.get("source")
    return "1 file" if source == "1 files" else source


def load_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest that scripts/prepare.py writes last.

    Raises:
        FileNotFoundError: there is none, so the folder is not prepared data, or not yet.
        DataError: it cannot be read.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        reason = "was not prepared to the end or is still being prepared" if path.parent.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"no {path}: the folder {reason}; run scripts/prepare.py --out {directory} with --input PATH... or --stdlib"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}); prepare the data again") from error
    if not _is_manifest(manifest):
        raise DataError(f"{path} lacks what scripts/prepare.py writes into a manifest; prepare the data again")
    return manifest


def _is_manifest(value: Any) -> bool:
    """Whether the entries are there that reading the folder relies on."""
    parts = [value, *(value.get(key) for key in ("tokenizer", "splits"))] if isinstance(value, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        return False
    splits = value["splits"].values()
    whole = all(isinstance(split, dict) and {"files", "tokens", "text_bytes"} <= set(split) for split in splits)
    return whole and {"sha256", "vocab_size"} <= set(value["tokenizer"])
