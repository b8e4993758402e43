"""Token files: write and read the LITPKDS format of lit-gpt and TinyLlama, and cut files into training samples.

Bytes of a file: `LITPKDS`, version u64 = 1, dtype code u8, number of tokens u64, then the tokens; little-endian. Unlike
older writers we store the true number of tokens: no padding is ever written, none is trained on.
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
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
OPEN_FILES = 256  # descriptors kept open per source; mapping files instead meets vm.max_map_count at 65,530 files
FINGERPRINT_BYTES = 512

MANIFEST = "manifest.json"


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
        data = file.read(HEADER.size)
        found_bytes = os.fstat(file.fileno()).st_size
    if len(data) < HEADER.size:
        raise DataError(f"{path} is truncated: expected a header of {HEADER.size} bytes, found {found_bytes} bytes")
    magic, version, code, n_tokens = HEADER.unpack(data)
    if magic != MAGIC:
        raise DataError(f"{path} is not a LITPKDS token file: it begins with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise DataError(f"{path} has LITPKDS version {version}; this program reads version {VERSION}")
    dtype = np.dtype(DTYPE_OF_CODE.get(code, "V"))
    if dtype not in CODE_OF_DTYPE:
        raise DataError(f"{path} has dtype code {code}; tokens have one of {sorted(CODE_OF_DTYPE.values())}")
    token_file = TokenFile(str(path), HEADER.size, n_tokens, dtype)
    if found_bytes != token_file.end_bytes:
        kind = "truncated" if found_bytes < token_file.end_bytes else "damaged"
        raise DataError(
            f"{path} is {kind}: its header announces {n_tokens} tokens, expected {token_file.end_bytes} bytes, "
            f"found {found_bytes} bytes; copy or prepare it again"
        )
    return token_file


class SampleIndex:
    """sample -> (file, first token): samples of block_size targets at stride block_size that never cross files.

    One int64 per file, so the index of 1e12 tokens in half a million files is 4 MB.
    """

    def __init__(self, n_tokens: np.ndarray, block_size: int) -> None:
        per_file = np.maximum(0, (np.asarray(n_tokens, dtype=np.int64) - 1) // block_size)
        self.block_size = block_size
        self.first_sample = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(per_file)])

    @property
    def n_samples(self) -> int:
        return int(self.first_sample[-1])

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """indices: (k,) samples. Returns the file and the first token inside that file, (k,) int64 each."""
        files = np.searchsorted(self.first_sample, indices, side="right") - 1
        return files, (indices - self.first_sample[files]) * self.block_size


class TokenSource:
    """Random access to the samples of a list of token files. One thread at a time may read.

    files: all with one dtype. block_size: targets per sample. vocab_size: every token read must be below it.

    Raises:
        DataError: mixed dtypes, a file whose tokens are not all there, or too few tokens for a single sample.
    """

    def __init__(self, files: Sequence[TokenFile], block_size: int, vocab_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1")
        if not files:
            raise DataError("no token files; prepare some with scripts/prepare.py")
        self.files, self.block_size, self.vocab_size = files, block_size, vocab_size
        self.dtype = files[0].dtype
        for file in files:
            if file.dtype != self.dtype:
                raise DataError(
                    f"{file.path} holds {file.dtype} tokens, but {files[0].path} holds {self.dtype}; "
                    f"files of one source need one dtype, so prepare them in one go"
                )
        self.n_tokens = sum(file.n_tokens for file in files)
        self._index = SampleIndex(np.fromiter((file.n_tokens for file in files), np.int64, len(files)), block_size)
        self.n_samples = self._index.n_samples
        if not self.n_samples:
            raise DataError(
                f"{files[0].path}{' and others' if len(files) > 1 else ''}: {self.n_tokens} tokens in {len(files)} "
                f"file(s) make no sample of block_size={block_size}, which needs at least {block_size + 1} tokens "
                f"in one file; add data or lower block_size"
            )
        self.fingerprint = _fingerprint(files)
        self._descriptors = _Descriptors(OPEN_FILES)
        self._buffer = np.empty((0, block_size + 1), dtype=self.dtype)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """indices: (n,) samples. Returns (n, block_size + 1) int64; a sample's targets are its tokens after the first.

        Raises:
            DataError: a file changed or broke since it was opened, or holds a token that the vocabulary lacks.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < self.n_samples):
            raise IndexError(f"samples {indices.min()} .. {indices.max()} are not all in range({self.n_samples})")
        if len(self._buffer) < len(indices):
            self._buffer = np.empty((len(indices), self.block_size + 1), dtype=self.dtype)
        rows = self._buffer[: len(indices)]
        files, first_tokens = self._index.locate(indices)
        offsets = first_tokens * self.dtype.itemsize
        for row, number, offset in zip(rows.view(np.uint8), files.tolist(), offsets.tolist(), strict=True):
            self._read_row(row, self.files[number], offset)
        if rows.size and (rows.max() >= self.vocab_size or rows.min() < 0):
            self._refuse_tokens(rows, files)
        return rows.astype(np.int64)

    def _read_row(self, row: np.ndarray, file: TokenFile, offset: int) -> None:
        found_bytes = _read_into(self._descriptors.get(file.path), row, file.byte_offset + offset)
        if found_bytes != len(row):
            raise DataError(
                f"{file.path} is truncated: expected {len(row)} bytes at {file.byte_offset + offset}, "
                f"found {found_bytes} bytes; it was whole when the run started"
            )

    def _refuse_tokens(self, rows: np.ndarray, files: np.ndarray) -> None:
        bad = ((rows >= self.vocab_size) | (rows < 0)).any(axis=1)
        row = int(np.flatnonzero(bad)[0])
        tokens = rows[row]
        token = tokens[(tokens >= self.vocab_size) | (tokens < 0)][0]
        raise DataError(
            f"{self.files[files[row]].path} holds token {token}, outside the vocabulary of {self.vocab_size}; "
            f"the file is damaged or was made with another tokenizer"
        )


def _fingerprint(files: Sequence[TokenFile]) -> str:
    """sha256 over names, sizes and first tokens. Opens every file once, and so finds those that are not whole."""
    digest = sha256()
    for file in files:
        with open(file.path, "rb", buffering=0) as opened:
            found_bytes = os.fstat(opened.fileno()).st_size
            if found_bytes < file.end_bytes:
                raise DataError(
                    f"{file.path} is truncated: expected {file.end_bytes} bytes, found {found_bytes} bytes; "
                    f"copy or prepare it again"
                )
            opened.seek(file.byte_offset)
            head = opened.read(min(FINGERPRINT_BYTES, file.n_tokens * file.dtype.itemsize))
        digest.update(f"{Path(file.path).name}\x1f{file.n_tokens}\x1f{file.dtype.str}\x1f".encode())
        digest.update(sha256(head).digest())
    return digest.hexdigest()


class _Descriptors:
    """Open files by path; the one that was used longest ago is closed first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._open: OrderedDict[str, int] = OrderedDict()

    def get(self, path: str) -> int:
        descriptor = self._open.get(path)
        if descriptor is not None:
            self._open.move_to_end(path)
            return descriptor
        if len(self._open) >= self.limit:
            os.close(self._open.popitem(last=False)[1])
        descriptor = os.open(path, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        self._open[path] = descriptor
        return descriptor

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def _read_into(descriptor: int, row: np.ndarray, offset: int) -> int:
    """Fill `row`, (k,) uint8, from `offset`; returns how many bytes there were. NFS may give a read in parts."""
    done = 0
    while done < len(row):
        if hasattr(os, "preadv"):
            count = os.preadv(descriptor, [row[done:]], offset + done)
        else:  # macOS before 11
            part = os.pread(descriptor, len(row) - done, offset + done)
            count = len(part)
            row[done : done + count] = np.frombuffer(part, dtype=np.uint8)
        if count == 0:
            break
        done += count
    return done


def load_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest that scripts/prepare.py writes last.

    Raises:
        FileNotFoundError: there is none, so the folder is not prepared data, or not yet.
        DataError: it cannot be read.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        reason = "was not prepared to the end" if path.parent.is_dir() else "does not exist"
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


def find_token_files(directory: str | os.PathLike[str], split: str = "train") -> list[TokenFile]:
    """The token files of one split: those the manifest lists, or without a manifest all `{split}*.bin` of the folder.

    Raises:
        FileNotFoundError: no folder, or no file of this split.
        DataError: a file is damaged, or does not hold what the manifest says.
    """
    directory = Path(directory)
    if (directory / MANIFEST).is_file():
        return _files_of_manifest(directory, split)
    if not directory.is_dir():
        raise FileNotFoundError(f"data folder {directory} does not exist; prepare it with scripts/prepare.py")
    paths = sorted(directory.glob(f"{split}*.bin"), key=_natural_key)
    if not paths:
        raise FileNotFoundError(f"{directory} holds no {split}*.bin; prepare it with scripts/prepare.py")
    return [read_header(path) for path in paths]


def _files_of_manifest(directory: Path, split: str) -> list[TokenFile]:
    splits = load_manifest(directory)["splits"]
    if not splits.get(split, {}).get("files"):
        held = ", ".join(name for name, each in splits.items() if each["files"])
        raise FileNotFoundError(
            f"{directory} holds no {split} data; it holds {held}. Name a folder that does, or prepare the text again: "
            f"scripts/prepare.py --document-bytes cuts long files, --validation-input names held-out ones"
        )
    files = [read_header(directory / name) for name in splits[split]["files"]]
    _check_total(directory, files, splits[split]["tokens"])
    return files


def _check_total(directory: Path, files: Iterable[TokenFile], expected_tokens: int) -> None:
    found_tokens = sum(file.n_tokens for file in files)
    if found_tokens != expected_tokens:
        raise DataError(
            f"{directory / MANIFEST} announces {expected_tokens} tokens, its files hold {found_tokens}; "
            f"files were exchanged, so prepare the data again"
        )


def _natural_key(path: Path) -> list[tuple[int, str]]:
    """Numbers inside a name count as numbers: `x_2.bin` comes before `x_10.bin`."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part) if part.isdigit() else -1, part) for part in parts]
