"""Safetensors files, one tensor at a time: 8 bytes with the length of a JSON header, the header, then the tensors.

The library maps a file into memory to read it and holds all of a file in memory to write it; nothing here holds more
than one tensor. What is written is read by the library, and what is read has passed the library's checks.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_gpt.checksum import combined_crc32
from lit_gpt.copying import copy_range, start_writeback, write_at
from lit_gpt.errors import DataError
from lit_gpt.lazy_tensors import TensorSpec

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8  # bytes: where the first tensor begins, as the library has it
LENGTH_BYTES = 8
CHUNK_BYTES = 1 << 22  # written at a time, straight after its checksum, while it is in the cache


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file."""

    name: str
    dtype: str
    """As the format has it: F32, BF16, …"""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte, from the beginning of the file."""
    n_bytes: int


def read_entries(path: Path) -> tuple[Entry, ...]:
    """Every tensor of a file, in the order of the file.

    Raises:
        DataError: it is not a whole safetensors file.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            header = json.loads(file.read(length))
        return tuple(sorted(_entries(header, LENGTH_BYTES + length), key=lambda entry: (entry.offset, entry.n_bytes)))
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is not a whole safetensors file: {error}; get it again") from error


def _entries(header: dict[str, dict], data_offset: int) -> list[Entry]:
    entries = []
    for name, values in header.items():
        if name == "__metadata__":
            continue
        begin, end = values["data_offsets"]
        entries.append(Entry(name, values["dtype"], tuple(values["shape"]), data_offset + begin, end - begin))
    return entries


def read_tensor(path: Path, entry: Entry) -> Tensor:
    """One tensor, on the CPU, with memory of its own.

    Raises:
        DataError: its dtype is not one of a weight, or the file ends before it does.
    """
    if entry.dtype not in DTYPES:
        raise DataError(f"{path}: {entry.name} has dtype {entry.dtype}; weights have one of {', '.join(DTYPES)}")
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    view = tensor_bytes(tensor)
    if view.nbytes != entry.n_bytes:
        raise DataError(f"{path}: {entry.name} of shape {entry.shape} has {entry.n_bytes:,} bytes; get it again")
    with path.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        while view.nbytes:
            n_read = file.readinto(view)
            if not n_read:
                raise DataError(f"{path} ends within {entry.name}; get it again")
            view = view[n_read:]
    return tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


class SafetensorsWriter:
    """Writes one file whose tensors are known beforehand, in any order, and knows its crc32 in the end.

    Args:
        path: the file to make.
        specs: name and what it will be, for every tensor. Those of wider dtypes come first in the file, so that every
            one is aligned to its entries; else the order is kept.
    """

    def __init__(self, path: Path, specs: Sequence[tuple[str, TensorSpec]]) -> None:
        self._specs = dict(specs)
        ordered = sorted(specs, key=lambda each: -each[1].dtype.itemsize)
        header, self._entries = _layout(ordered)
        self._crc32: dict[str, int] = {}
        self._header = header
        self._file = path.open("xb", buffering=0)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, of any device."""
        spec = self._specs[name]
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype), f"{name} is not what was announced"
        view = tensor_bytes(tensor.detach().cpu().contiguous())
        crc32, offset = 0, self._entries[name].offset
        for start in range(0, view.nbytes, CHUNK_BYTES):
            chunk = view[start : start + CHUNK_BYTES]
            crc32 = zlib.crc32(chunk, crc32)
            write_at(self._file.fileno(), chunk, offset + start)
        start_writeback(self._file.fileno(), offset, view.nbytes)
        self._crc32[name] = crc32

    def copy(self, name: str, descriptor: int, offset: int, crc32: int) -> None:
        """Copy one tensor, whose crc32 is known, from a place in an open file."""
        entry = self._entries[name]
        copy_range(descriptor, self._file.fileno(), offset, entry.offset, entry.n_bytes)
        start_writeback(self._file.fileno(), entry.offset, entry.n_bytes)
        self._crc32[name] = crc32

    def finish(self) -> int:
        """Write the header, without which the file means nothing, and close it; returns its crc32."""
        missing = self._entries.keys() - self._crc32.keys()
        assert not missing, f"never written: {sorted(missing)}"
        write_at(self._file.fileno(), self._header, 0)
        os.fsync(self._file.fileno())
        self._file.close()
        parts = [(self._crc32[name], entry.n_bytes) for name, entry in self._entries.items()]
        return combined_crc32([(zlib.crc32(self._header), len(self._header)), *parts])


def _layout(specs: Sequence[tuple[str, TensorSpec]]) -> tuple[bytes, dict[str, Entry]]:
    """The first bytes of a file, and where its tensors go."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, spec in specs:
        end = begin + spec.n_bytes
        header[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": (begin, end)}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    head = len(text).to_bytes(LENGTH_BYTES, "little") + text
    entries = {entry.name: entry for entry in _entries(header, len(head))}
    assert all(entry.n_bytes == prod(entry.shape) * DTYPES[entry.dtype].itemsize for entry in entries.values())
    return head, entries
