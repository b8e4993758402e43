"""Files of torch.save, read without unpickling and written without holding the tensors.

A pickle is a program. Here its opcodes are interpreted by a machine that knows dicts, lists, tensors and paths and
nothing else: no import, no call, no attribute of anything outside this file can be reached. Tensors stay in the file
until they are read. Only the zip format (torch 1.6 and later) is known, uncompressed as torch writes it.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lit_gpt.errors import DataError

MAX_PICKLE_BYTES = 1 << 24  # of the structure; that of a 7B model with optimizer state has 0.3 MB
MAX_STEPS = 1 << 19  # opcodes, each of which may make an object of 64 bytes; those of a 7B model are some 70,000
MAX_DIMENSIONS = 64  # torch's own
MAX_SIZE = 1 << 63
SPARE_ENTRIES = 1 << 12  # what calls may make, for files so small that nothing is bounded by their size
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
            return _Machine(path, _Records(path, file, archive)).run()
    except DataError:
        raise
    except FileNotFoundError:
        raise
    except zipfile.BadZipFile as error:
        raise DataError(
            f"{path} is not a whole file of torch.save in its zip format ({error}); get it again if it was cut short, "
            f"or save it again with torch 1.6 or later"
        ) from error
    except (ValueError, KeyError, IndexError, TypeError, EOFError, OverflowError, NotImplementedError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); {WAY_OUT}") from error


def check_sizes(content: bytes) -> None:
    """Refuse a pickle that makes Python's own unpickler allocate what the file does not back.

    Raises:
        ValueError: text or bytes longer than what is left, or a place in the memo beyond what could be stored.
    """
    for opcode, argument, position in pickletools.genops(content):
        if opcode.name in _MEMO and argument is not None and argument > len(content):
            raise ValueError(f"at position {position} it stores under number {argument}, more than it has bytes")


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
        _set_item(found, key, value)
    return found


def _path(*parts: Any) -> str:
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("a path of what is no text")
    return "/".join(parts).replace("//", "/", 1) if parts else "."


def _first(value: Any, *_: Any) -> Any:
    return value


def _device(kind: Any, *index: Any) -> Any:
    return (kind, *index) if index else kind


_KNOWN: dict[tuple[str, str], Any] = {
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
_CALLABLE = frozenset(id(value) for value in _KNOWN.values() if not isinstance(value, torch.dtype))


def _set_item(target: Any, key: Any, value: Any) -> None:
    if type(target) is not dict or not isinstance(key, str | int | float | None):  # a deep tuple takes for ever to hash
        raise ValueError(f"an entry of a {type(target).__name__} under a {type(key).__name__}")
    target[key] = value


_MARK = object()
_SIZED = (str, bytes, tuple, list, dict)
_MEMO = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")


class _Machine:
    """Interprets the opcodes of one pickle."""

    def __init__(self, path: Path, records: _Records) -> None:
        self._path, self._records = path, records
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._entries_left = SPARE_ENTRIES

    def run(self) -> Any:
        content = self._records.pickle()
        self._entries_left += len(content)
        for step, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if step == MAX_STEPS:
                raise ValueError(f"more than {MAX_STEPS:,} steps")
            if opcode.name == "STOP":
                return self._stack.pop()
            if opcode.name in _PUSHING:
                self._stack.append(argument)
            elif opcode.name in _CONSTANT:
                self._stack.append(_CONSTANT[opcode.name]())
            elif opcode.name in _STEPS:
                _STEPS[opcode.name](self, argument)
            else:
                raise DataError(f"{self._path} uses {opcode.name}, which a checkpoint never needs (refused, not run)")
        raise ValueError("no end")

    def nothing(self, _: Any) -> None:
        """Protocol numbers and frames."""

    def pop(self, _: Any) -> None:
        self._stack.pop()

    def _above_mark(self) -> list[Any]:
        for index in range(len(self._stack) - 1, -1, -1):
            if self._stack[index] is _MARK:
                found = self._stack[index + 1 :]
                del self._stack[index:]
                return found
        raise ValueError("no mark")

    def tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise ValueError("a tuple of more than there is")
        parts = self._stack[-count:]
        del self._stack[-count:]
        self._stack.append(tuple(parts))

    def marked_tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._above_mark()))

    def marked_list(self, _: Any) -> None:
        self._stack.append(self._above_mark())

    def append(self, _: Any) -> None:
        self._extend([self._stack.pop()])

    def appends(self, _: Any) -> None:
        self._extend(self._above_mark())

    def _extend(self, values: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise ValueError("appending to what is no list")
        self._stack[-1].extend(values)

    def set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        _set_item(self._stack[-1], key, value)

    def set_items(self, _: Any) -> None:
        flat = self._above_mark()
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            _set_item(self._stack[-1], key, value)

    def put(self, number: Any) -> None:
        self._memo[len(self._memo) if number is None else number] = self._stack[-1]

    def get(self, number: int) -> None:
        self._stack.append(self._memo[number])

    def named(self, argument: str) -> None:
        self._push_known(*argument.split(" ", 1))

    def named_on_stack(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._push_known(module, name)

    def _push_known(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError(f"a name made of a {type(module).__name__} and a {type(name).__name__}")
        if (module, name) not in _KNOWN:
            raise DataError(
                f"{self._path} asks for {module}.{name}, which a checkpoint never needs (refused, not run); {WAY_OUT}"
            )
        self._stack.append(_KNOWN[module, name])

    def call(self, _: Any) -> None:
        """Only what `_KNOWN` has, which all lives in this file."""
        arguments, target = self._stack.pop(), self._stack.pop()
        if id(target) not in _CALLABLE or type(arguments) is not tuple:
            raise ValueError(f"a call of {type(target).__name__}")
        # a few bytes call again with what lies in the memo: what all calls together make is bounded by the file
        self._entries_left -= len(arguments) + sum(len(each) for each in arguments if isinstance(each, _SIZED))
        if self._entries_left < 0:
            raise ValueError("calls that make more than the file has")
        self._stack.append(target(*arguments))

    def build(self, _: Any) -> None:
        """State of an object beside its content: state dicts have their versions there. It is left out."""
        self._stack.pop()
        if type(self._stack[-1]) is not dict:
            raise ValueError(f"state of a {type(self._stack[-1]).__name__}")

    def persistent(self, _: Any) -> None:
        kind, dtype, key, _, n_elements = self._stack.pop()
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(n_elements) is not int:
            raise ValueError(f"a reference by a {type(kind).__name__} that is to no storage")
        if not isinstance(key, str):
            raise ValueError(f"a storage whose name is a {type(key).__name__}")
        self._stack.append(self._records.storage(key, dtype, n_elements))


_PUSHING = frozenset(
    """BININT BININT1 BININT2 LONG1 LONG4 INT LONG FLOAT BINFLOAT UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8""".split()
)
_CONSTANT: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
}
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.nothing,
    "FRAME": _Machine.nothing,
    "POP": _Machine.pop,
    "TUPLE": _Machine.marked_tuple,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "LIST": _Machine.marked_list,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    **dict.fromkeys(_MEMO, _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "GLOBAL": _Machine.named,
    "STACK_GLOBAL": _Machine.named_on_stack,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}
