"""What one token file holds: LITPKDS, datatrove, Megatron or raw, told by its first bytes and the files beside it."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lit_gpt.errors import DataError
from lit_gpt.packed_dataset import CODE_OF_DTYPE, MAGIC, TokenFile, parse_header

HEAD_BYTES = 4096  # of every file; holds any header there is, and the FINGERPRINT_BYTES behind it
FINGERPRINT_BYTES = 512
SAMPLED_BYTES = 1 << 17  # of a headerless file, to see how wide its tokens are
DOCUMENTS_AT_ONCE = 1 << 20

# What files may be said to hold that do not say it themselves
DTYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")

MEGATRON_INDEX = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document marks: 34 bytes
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}

LLM_C_HEADER = struct.Struct("<iii")  # magic, version, tokens; the rest of 256 int32 is unused
LLM_C_HEADER_BYTES = 1024
LLM_C_DTYPES = {(20240520, 1): "<u2", (20240801, 7): "<u4"}

NOT_TOKENS = {
    b"version https://git-lfs": "is a git-lfs pointer instead of the data; run `git lfs pull` where it came from",
    b"PK\x03\x04": "is a zip archive, perhaps a PyTorch checkpoint; name the token files with a pattern",
    b"\x1f\x8b\x08": "is compressed with gzip; unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; unpack it first",
    b"PAR1": "is a parquet file; prepare its text with scripts/prepare.py",
    b"TNTIDX": "is an index of the older TNTIDX form; convert the data to MMIDIDX with Megatron's tools, or prepare it "
    "again with scripts/prepare.py",
}
PRINTABLE = bytes(range(32, 127)) + b"\t\n\r"
TEXT_BYTES = 32  # so many printable characters in a row are no accident
MAX_UPPER = 3  # the upper 16 bits of ids up to 262,143
ASSUMED = "no file says how its tokens are stored: uint16 was assumed; give data.dtype if they are of another type"
MEGATRON_HINT = "; if it is Megatron's, copy the .idx beside it"


@dataclass(frozen=True)
class Described:
    """A token file and what was learned on the way."""

    file: TokenFile
    kind: str
    """litpkds, datatrove, megatron or raw."""
    head: bytes
    """sha256 of the first FINGERPRINT_BYTES of tokens."""
    note: str = ""
    tokenizer: str = ""
    """Name that the writer gave, if any."""


def describe_file(path: str, dtype: np.dtype | None = None) -> Described:
    """Find out what a file holds and check that it is whole.

    dtype: of the tokens, for files that do not say it themselves.

    Raises:
        OSError: the file cannot be read.
        DataError: it holds no tokens, or not all it should.
        ValueError: it says itself that its tokens have another type than `dtype`.
    """
    with open(path, "rb", buffering=0) as opened:
        head, n_bytes = opened.read(HEAD_BYTES), os.fstat(opened.fileno()).st_size
        if not head.startswith(MAGIC):
            _refuse_other_files(path, head)
        told = _with_header(path, head, n_bytes) or _with_neighbour(path, n_bytes)
        if told is not None:
            file, kind, tokenizer = told
            _check_given_dtype(file, dtype)
            return Described(file, kind, _head_digest(opened, file, head), tokenizer=tokenizer)
        kind = "datatrove" if path.endswith(".ds") else "raw"
        width_known, dtype = dtype is not None, np.dtype("<u2") if dtype is None else dtype
        file = TokenFile(path, 0, n_bytes // dtype.itemsize, dtype)
        _check_raw(file, head, _sample(opened), n_bytes)
        return Described(file, kind, _head_digest(opened, file, head), note="" if width_known else _assumed(path))


def _assumed(path: str) -> str:
    return ASSUMED + MEGATRON_HINT if path.endswith(".bin") else ASSUMED


def given_dtype(name: str | None) -> np.dtype | None:
    """The type of headerless tokens as the user names it.

    Raises:
        ValueError: not the name of an integer type.
    """
    if name is None:
        return None
    if name not in DTYPES:
        raise ValueError(f"data.dtype={name!r} is unknown; known: {', '.join(DTYPES)}")
    return np.dtype(name).newbyteorder("<")


def head_digest(file: TokenFile) -> bytes:
    """sha256 of a file's first FINGERPRINT_BYTES of tokens.

    Raises:
        DataError: the file is shorter than it should be.
    """
    with open(file.path, "rb", buffering=0) as opened:
        found_bytes = os.fstat(opened.fileno()).st_size
        if found_bytes < file.end_bytes:
            raise DataError(
                f"{file.path} is truncated: expected {file.end_bytes} bytes, found {found_bytes} bytes; "
                f"copy or prepare it again"
            )
        return _head_digest(opened, file, b"")


def _head_digest(opened: BinaryIO, file: TokenFile, head: bytes) -> bytes:
    """head: bytes from the start of the file that were read already."""
    end = file.byte_offset + min(FINGERPRINT_BYTES, file.n_tokens * file.dtype.itemsize)
    if len(head) < end:
        opened.seek(0)
        head = opened.read(end)
    return sha256(head[file.byte_offset : end]).digest()


def _refuse_other_files(path: str, head: bytes) -> None:
    if not head:
        raise DataError(f"{path} is empty: found 0 bytes; copy or prepare it again, or remove it")
    for magic, reason in NOT_TOKENS.items():
        if head.startswith(magic):
            raise DataError(f"{path} {reason}")


def _check_given_dtype(file: TokenFile, dtype: np.dtype | None) -> None:
    if dtype is not None and dtype != file.dtype:
        raise ValueError(
            f"data.dtype={dtype} was given, but {file.path} itself says that it holds {file.dtype}; "
            f"leave data.dtype out, it is for files that do not say it"
        )


def _with_header(path: str, head: bytes, n_bytes: int) -> tuple[TokenFile, str, str] | None:
    """A file that begins with a header of LITPKDS, numpy or llm.c."""
    if head.startswith(MAGIC):
        return parse_header(path, head, n_bytes), "litpkds", ""
    if head.startswith(b"\x93NUMPY"):
        return _numpy_header(path, n_bytes), "raw", ""
    magic_and_version = LLM_C_HEADER.unpack(head[: LLM_C_HEADER.size])[:2] if len(head) >= LLM_C_HEADER.size else None
    if magic_and_version in LLM_C_DTYPES:
        dtype, n_tokens = np.dtype(LLM_C_DTYPES[magic_and_version]), LLM_C_HEADER.unpack_from(head)[2]
        file = TokenFile(path, LLM_C_HEADER_BYTES, n_tokens, dtype)
        _check_size(file, n_bytes, "its llm.c header")
        return file, "raw", ""
    return None


def _numpy_header(path: str, n_bytes: int) -> TokenFile:
    with open(path, "rb") as opened:
        try:
            version = np.lib.format.read_magic(opened)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(opened)
        except ValueError as error:
            raise DataError(f"{path} has a damaged numpy header ({error}); copy or save it again") from error
        start = opened.tell()
    if len(shape) != 1 or dtype.kind not in "iu" or dtype != dtype.newbyteorder("<"):
        raise DataError(
            f"{path} is a numpy array of shape {shape} and type {dtype}; "
            f"tokens are one row of little-endian integers, so save array.ravel() of such a type"
        )
    file = TokenFile(path, start, shape[0], dtype)
    _check_size(file, n_bytes, "its numpy header")
    return file


def _check_size(file: TokenFile, n_bytes: int, source: str) -> None:
    if n_bytes != file.end_bytes:
        kind = "truncated" if n_bytes < file.end_bytes else "damaged"
        raise DataError(
            f"{file.path} is {kind}: {source} announces {file.n_tokens} tokens of {file.dtype}, expected "
            f"{file.end_bytes} bytes, found {n_bytes} bytes; copy or prepare it again"
        )


def _with_neighbour(path: str, n_bytes: int) -> tuple[TokenFile, str, str] | None:
    """A file whose tokens are described by another one beside it: Megatron's .idx, datatrove's .metadata or .index."""
    index = Path(path).with_suffix(".idx")
    if path.endswith(".bin") and index.is_file():
        return _megatron(path, index, n_bytes), "megatron", ""
    if not path.endswith(".ds"):
        return None
    if os.path.isfile(f"{path}.metadata"):
        file, tokenizer = _datatrove_metadata(path)
        _check_size(file, n_bytes, f"{path}.metadata")
        return file, "datatrove", tokenizer
    if os.path.isfile(f"{path}.index"):
        return _datatrove_index(path, n_bytes), "datatrove", ""
    return None


def _datatrove_metadata(path: str) -> tuple[TokenFile, str]:
    """`tokenizer|bytes per token`, the number of tokens, and that number for people: three lines."""
    try:
        first, count = Path(f"{path}.metadata").read_text(encoding="utf-8").splitlines()[:2]
        n_tokens = int(count)
        tokenizer, separator, token_bytes = first.rpartition("|")
        dtype = np.dtype({"2": "<u2", "4": "<u4"}[token_bytes if separator else "2"])  # 2 where no width is written
    except (ValueError, KeyError) as error:
        raise DataError(
            f"{path}.metadata is damaged ({error!r}); copy it again, or move it away and give data.dtype"
        ) from error
    name = tokenizer if separator else first
    return TokenFile(path, 0, n_tokens, dtype), "" if name.startswith("Unknown Tokenizer") else name


def _datatrove_index(path: str, n_bytes: int) -> TokenFile:
    """The index holds the end of every document in tokens, u64 each; the last one is the number of tokens."""
    with open(f"{path}.index", "rb") as index:
        size = index.seek(0, os.SEEK_END)
        index.seek(max(0, size - 8))
        n_tokens = int.from_bytes(index.read(8), "little")
    for dtype in (np.dtype("<u2"), np.dtype("<u4")):
        if n_tokens and n_bytes == n_tokens * dtype.itemsize:
            return TokenFile(path, 0, n_tokens, dtype)
    raise DataError(
        f"{path} has {n_bytes} bytes, which are not 2 or 4 for each of the {n_tokens} tokens of {path}.index; "
        f"copy both again"
    )


def _megatron(path: str, index: Path, n_bytes: int) -> TokenFile:
    with open(index, "rb") as opened:
        head = opened.read(MEGATRON_INDEX.size)
        _refuse_other_files(str(index), head)
        if not head.startswith(MEGATRON_MAGIC) or len(head) < MEGATRON_INDEX.size:
            raise DataError(
                f"{index} is not a Megatron index: it begins with {head[:9]!r}, not {MEGATRON_MAGIC!r}; "
                f"move it away if {Path(path).name} is not Megatron's"
            )
        _, version, code, sequences, documents = MEGATRON_INDEX.unpack(head)
        dtype = np.dtype(MEGATRON_DTYPES.get(code, "V"))
        if version != 1 or dtype not in CODE_OF_DTYPE:
            raise DataError(
                f"{index} has version {version} and dtype code {code}; this program reads version 1 "
                f"and integers, codes {[code for code, name in MEGATRON_DTYPES.items() if 'f' not in name]}"
            )
        needed = MEGATRON_INDEX.size + sequences * 12 + documents * 8
        found = os.fstat(opened.fileno()).st_size
        if found < needed:
            raise DataError(
                f"{index} is truncated: expected {needed} bytes for {sequences} sequences and {documents} document "
                f"marks, found {found} bytes; copy it again"
            )
        n_tokens = _megatron_tokens(opened, index, sequences, dtype.itemsize)
    file = TokenFile(path, 0, n_tokens, dtype)
    _check_size(file, n_bytes, str(index))
    return file


def _megatron_tokens(opened: BinaryIO, index: Path, sequences: int, token_bytes: int) -> int:
    """The sum of the sequences' sizes; each must start where the one before it ends."""
    n_tokens = 0
    for first in range(0, sequences, DOCUMENTS_AT_ONCE):
        count = min(DOCUMENTS_AT_ONCE, sequences - first)
        sizes = _array(opened, MEGATRON_INDEX.size + first * 4, "<i4", count).astype(np.int64)
        starts = _array(opened, MEGATRON_INDEX.size + sequences * 4 + first * 8, "<i8", count)
        ends = np.cumsum(sizes)
        if sizes.min() < 0 or not np.array_equal(starts, (n_tokens + ends - sizes) * token_bytes):
            raise DataError(
                f"{index} lists sequences that do not follow one another in the .bin; "
                f"write the data again, each sequence once and in order"
            )
        n_tokens += int(ends[-1])
    return n_tokens


def _array(opened: BinaryIO, offset: int, dtype: str, count: int) -> np.ndarray:
    opened.seek(offset)
    return np.frombuffer(opened.read(count * np.dtype(dtype).itemsize), dtype)


def _sample(opened: BinaryIO) -> bytes:
    opened.seek(0)
    return opened.read(SAMPLED_BYTES)


def _check_raw(file: TokenFile, head: bytes, sample: bytes, n_bytes: int) -> None:
    """Refuse text, and tokens of another width, which would be served as garbage."""
    if n_bytes % file.dtype.itemsize:
        raise DataError(
            f"{file.path} has {n_bytes} bytes, not a multiple of the {file.dtype.itemsize} bytes of {file.dtype}; "
            f"it was cut short, or data.dtype is not what it was written as"
        )
    if file.dtype.itemsize > 1 and len(head) >= TEXT_BYTES and not head.translate(None, PRINTABLE):
        raise DataError(f"{file.path} is text, not tokens; prepare it with scripts/prepare.py")
    zeros = {"uint32": "every second", "int64": "most"}
    written = _wider_dtype(sample, file.dtype.itemsize)
    if written:
        raise DataError(
            f"{file.path} was written as {written}: read as {file.dtype}, {zeros[written]} of its tokens would be 0; "
            f"give data.dtype {written}"
        )


def _wider_dtype(sample: bytes, token_bytes: int) -> str:
    """The type that tokens were written in, if read with `token_bytes` each their upper halves would be tokens."""
    for wide, name in ((8, "int64"), (4, "uint32")):
        words = np.frombuffer(sample[: len(sample) // 8 * 8], "<u2").reshape(-1, wide // 2)
        upper = words[:, max(1, token_bytes // 2) :]
        if wide <= token_bytes or len(words) < 8:
            continue
        if (upper > MAX_UPPER).mean() < 0.01 and (words[:, 0] > MAX_UPPER).mean() > 0.5:
            return name
    return ""
