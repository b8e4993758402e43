"""Files of torch.save, read without unpickling (pickle_machine.py): dicts, lists, tensors, paths and nothing else.

Tensors stay in the file until they are read. Only the zip format (torch 1.6 and later) is known, uncompressed as torch
writes it.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lit_gpt.errors import DataError
from lit_gpt.pickle_machine import UNREADABLE, Vocabulary, interpret

MAX_PICKLE_BYTES = 1 << 24  # of the structure; that of a 7B model with optimizer state has 0.3 MB
MAX_DIMENSIONS = 64  # torch's own
MAX_SIZE = 1 << 60  # of a dimension
LOCAL_HEADER_BYTES = 30
WAY_OUT = "get it again, or load it where it was made and save its weights with safetensors"
_DTYPES = {
    **{"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool},
}
STORAGES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class _Storage:
    """Where the bytes of a tensor are."""

    path: Path
    position: int
    dtype: torch.dtype
    n_elements: int


@dataclass(frozen=True)
class PickledTensor:
    """A tensor that is still in its file."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    def read(self) -> Tensor:
        """A contiguous tensor of its own on the CPU."""
        reach = _reach(self.shape, self.stride)
        raw = torch.empty(reach * self.dtype.itemsize, dtype=torch.uint8)
        with self.storage.path.open("rb") as file:
            file.seek(self.storage.position + self.offset * self.dtype.itemsize)
            if file.readinto(memoryview(raw.numpy())) != raw.numel():
                raise DataError(f"{self.storage.path} was cut short while it was read; {WAY_OUT}")
        return raw.view(self.dtype).as_strided(self.shape, self.stride).contiguous()


def _reach(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last of a strided tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def read_pickle(path: str | Path) -> Any:
    """What a file of torch.save holds: dicts, lists, plain values, paths as text, and `PickledTensor`s.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is no such file, is damaged, or names anything that a checkpoint does not need. Nothing is run.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            records = _Records(path, file, archive)
            return interpret(records.pickle(), _vocabulary(records), path)
    except DataError:
        raise
    except FileNotFoundError:
        raise
    except zipfile.BadZipFile as error:
        raise DataError(
            f"{path} is not a whole file of torch.save in its zip format ({error}); get it again if it was cut short, "
            f"save it again with torch 1.6 or later, or, if it is of llama2.c, convert it first: "
            f"scripts/convert_hf_checkpoint.py"
        ) from error
    except UNREADABLE as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); {WAY_OUT}") from error


class _Records:
    """The parts of the archive: the pickle, and the bytes of each storage."""

    def __init__(self, path: Path, file: BinaryIO, archive: zipfile.ZipFile) -> None:
        self._path, self._file = path, file
        self._entries = {info.filename: info for info in archive.infolist()}
        names = [name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(names) != 1:
            raise DataError(f"{path} has no data.pkl, so it is not a file of torch.save; {WAY_OUT}")
        self._prefix = names[0].removesuffix("data.pkl")
        self._size = path.stat().st_size
        order = self._entries.get(f"{self._prefix}byteorder")
        if order is not None and self._bytes(order, 16) != b"little":
            raise DataError(f"{path} was written on a big-endian machine; save it again on another")

    def pickle(self) -> bytes:
        return self._bytes(self._entries[f"{self._prefix}data.pkl"], MAX_PICKLE_BYTES)

    def _bytes(self, entry: zipfile.ZipInfo, most: int) -> bytes:
        position, size = self._place(entry)
        if size > most:
            raise DataError(f"{self._path}: {entry.filename} has {size:,} bytes, a checkpoint's has at most {most:,}")
        self._file.seek(position)
        return self._file.read(size)

    def _place(self, entry: zipfile.ZipInfo) -> tuple[int, int]:
        """Position and size of a part of the archive, which has to lie in the file, stored as it is."""
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
            raise DataError(f"{self._path}: {entry.filename} is compressed or encrypted, which torch never does")
        self._file.seek(entry.header_offset)
        header = self._file.read(LOCAL_HEADER_BYTES)
        if len(header) < LOCAL_HEADER_BYTES or header[:4] != b"PK\3\4":
            raise DataError(f"{self._path}: {entry.filename} is not where the archive says; {WAY_OUT}")
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        position = entry.header_offset + LOCAL_HEADER_BYTES + lengths
        if position + entry.file_size > self._size:
            raise DataError(f"{self._path}: {entry.filename} runs past the end of the file; {WAY_OUT}")
        return position, entry.file_size

    def storage(self, key: str, dtype: torch.dtype, n_elements: int) -> _Storage:
        position, size = self._place(self._entries[f"{self._prefix}data/{key}"])
        if not 0 <= n_elements * dtype.itemsize <= size:
            raise DataError(
                f"{self._path}: storage {key} has {size} bytes, {n_elements} of {dtype} need more; {WAY_OUT}"
            )
        return _Storage(self._path, position, dtype, n_elements)


# What a pickle may ask for by name -> what this file has for it. None of these is what the name means in Python.


def _tensor(storage: _Storage, offset: int, shape: tuple, stride: tuple, *_: Any) -> PickledTensor:
    if not isinstance(storage, _Storage) or len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
        raise ValueError("a tensor without a storage, or with another number of strides than dimensions")
    if any(type(number) is not int or not 0 <= number < MAX_SIZE for number in (offset, *shape, *stride)):
        raise ValueError("a tensor whose offset, shape or stride are no sizes")
    if offset + _reach(shape, stride) > storage.n_elements or prod(shape) > storage.n_elements:
        raise ValueError(
            f"a tensor of shape {shape} and stride {stride} does not fit its {storage.n_elements} elements"
        )
    return PickledTensor(storage, offset, tuple(shape), tuple(stride))


def _mapping(pairs: Any = ()) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
        if not isinstance(key, str | int | None):  # a deep tuple takes for ever to hash
            raise ValueError(f"an entry under a {type(key).__name__}")
        found[key] = value
    return found


def _path(*parts: Any) -> str:
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("a path of what is no text")
    return "/".join(parts).replace("//", "/", 1) if parts else "."


def _first(value: Any, *_: Any) -> Any:
    return value


def _device(kind: Any, *index: Any) -> Any:
    return (kind, *index) if index else kind


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _mapping,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch", "Size"): _first,
    ("torch", "device"): _device,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _DTYPES.values()},
    **{
        (module, name): _path
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    },
}


def _no_state(target: Any, state: Any) -> None:
    """State of an object beside its content: state dicts have their versions there. It is left out."""


def _vocabulary(records: _Records) -> Vocabulary:
    def storage(reference: Any) -> _Storage:
        kind, dtype, key, _, n_elements = reference
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(n_elements) is not int:
            raise ValueError(f"a reference by a {type(kind).__name__} that is to no storage")
        if not isinstance(key, str):
            raise ValueError(f"a storage whose name is a {type(key).__name__}")
        return records.storage(key, dtype, n_elements)

    return Vocabulary(names=_NAMES, states={dict: _no_state}, persistent=storage, way_out=WAY_OUT)
