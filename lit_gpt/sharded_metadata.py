"""`.metadata`, which says what the files of torch.distributed.checkpoint hold: a pickle, read without unpickling it.

The classes are torch's own. Each field is given only what its type is, so that nothing which hashes, compares or prints
them can be led astray, and every size must be backed by bytes in the files before anything of that size is allocated.
Importing this costs 0.7 s: import it late.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from lit_gpt.errors import DataError
from lit_gpt.pickle_machine import MAX_STEPS, Vocabulary, interpret
from lit_gpt.pickles import MAX_DIMENSIONS, MAX_PICKLE_BYTES, MAX_SIZE

METADATA = ".metadata"
BYTES_PER_STEP = (
    64  # of the checkpoint; a part of a tensor takes some 70 opcodes, and has more than 4 kB where it matters
)
WAY_OUT = "use an earlier checkpoint, or, if another version of torch wrote it, that version"


def load_metadata(path: Path, sizes: Mapping[str, int]) -> Metadata:
    """What the metadata of a checkpoint says, as far as its files bear it out.

    Args:
        sizes: bytes of each file that belongs to the checkpoint.

    Raises:
        DataError: it is missing, damaged, names other files, or asks for anything else; nothing of it was executed.
    """
    more = sum(sizes.values()) // BYTES_PER_STEP
    try:
        if path.stat().st_size > MAX_PICKLE_BYTES + more:
            raise DataError(f"{path} has {path.stat().st_size:,} bytes, far more than such files need; {WAY_OUT}")
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {WAY_OUT}") from None
    metadata = interpret(content, _VOCABULARY, path, MAX_STEPS + more)
    if type(metadata) is not Metadata:
        raise DataError(f"{path} holds a {type(metadata).__name__}, not the metadata of a checkpoint; {WAY_OUT}")
    problem = _problem(metadata, sizes)
    if problem:
        raise DataError(f"{path}: {problem}; the file is damaged, {WAY_OUT}")
    return metadata


# What it may ask for


_NONE = type(None)
_FIELDS: dict[type, dict[str, tuple[type, ...]]] = {
    Metadata: {
        **{"state_dict_metadata": (dict,), "planner_data": (dict,), "storage_data": (dict,)},
        **{"storage_meta": (StorageMeta, _NONE), "version": (str, _NONE)},
    },
    TensorStorageMetadata: {"properties": (TensorProperties,), "size": (torch.Size,), "chunks": (list,)},
    ChunkStorageMetadata: {"offsets": (torch.Size,), "sizes": (torch.Size,)},
    MetadataIndex: {"fqn": (str,), "offset": (torch.Size, _NONE), "index": (int, _NONE)},
    _StorageInfo: {"relative_path": (str,), "offset": (int,), "length": (int,)},
    StorageMeta: {
        **{"checkpoint_id": (str, _NONE), "save_id": (str, _NONE), "load_id": (str, _NONE), "modules": (list,)},
    },
}
"""Class -> its fields and what each may be."""


def _fill(target: Any, state: Any) -> None:
    """Give a new object its fields, once: a key of a dict must not change."""
    allowed = _FIELDS[type(target)]
    if type(state) is not dict or vars(target):
        raise ValueError(f"a {type(target).__name__} that is given its fields twice, or by a {type(state).__name__}")
    for name, value in state.items():
        if name not in allowed or type(value) not in allowed[name]:
            raise ValueError(f"a {type(target).__name__} whose {name} is a {type(value).__name__}")
        object.__setattr__(target, name, value)  # MetadataIndex is frozen


def _fill_properties(target: TensorProperties, state: Any) -> None:
    kinds = (torch.dtype, torch.layout, bool, _MEM_FORMAT_ENCODING, bool)
    if type(state) is not tuple or tuple(map(type, state)) != kinds:
        raise ValueError("properties that are none of a tensor")
    target.__setstate__(state)


def _size(numbers: Any) -> torch.Size:
    if type(numbers) is not tuple or len(numbers) > MAX_DIMENSIONS:
        raise ValueError(f"a shape that is a {type(numbers).__name__}, or of more than {MAX_DIMENSIONS} dimensions")
    if any(type(number) is not int or not 0 <= number < MAX_SIZE for number in numbers):
        raise ValueError("a shape of what are no sizes")
    return torch.Size(numbers)


def _layout(name: Any) -> torch.layout:
    if name != str(torch.strided):
        raise ValueError("a tensor of another layout than strided")
    return torch.strided


def _memory_format(number: Any) -> _MEM_FORMAT_ENCODING:
    if type(number) is not int:
        raise ValueError(f"a memory format that is a {type(number).__name__}")
    return _MEM_FORMAT_ENCODING(number)


def _maker(kind: type) -> Any:
    def make() -> Any:
        return kind.__new__(kind)

    return make


_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_VOCABULARY = Vocabulary(
    names={
        ("torch", "Size"): _size,
        ("torch.serialization", "_get_layout"): _layout,
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): _memory_format,
        **{("torch", name): dtype for name, dtype in _DTYPES.items()},
        **{(kind.__module__, kind.__name__): _maker(kind) for kind in (*_FIELDS, TensorProperties)},
    },
    states={**dict.fromkeys(_FIELDS, _fill), TensorProperties: _fill_properties},
    keys=(MetadataIndex,),
    way_out=WAY_OUT,
)


# Does it hold together


def _problem(metadata: Metadata, sizes: Mapping[str, int]) -> str | None:
    try:
        return _untyped(metadata) or _unbacked(metadata, sizes)
    except AttributeError as error:  # an object that was given not all of its fields
        return f"it does not hold together ({error})"


def _untyped(metadata: Metadata) -> str | None:
    """What is of another type than it should be inside of dicts and lists, which `_fill` does not look into."""
    for name, entry in metadata.state_dict_metadata.items():
        if type(name) is not str or type(entry) is not TensorStorageMetadata:
            return f"{name} is not a tensor"
    for index, place in metadata.storage_data.items():
        if type(index) is not MetadataIndex or type(place) is not _StorageInfo:
            return "it says where something lies that is no part of a tensor"
    if any(path != (name,) for name, path in metadata.planner_data.items()):
        return "a tensor has another name in the file than in memory"
    return None


def _unbacked(metadata: Metadata, sizes: Mapping[str, int]) -> str | None:
    """Whether every tensor is stored once, whole, in files that have room for it."""
    places: dict[str, dict[torch.Size | None, _StorageInfo]] = {}
    for index, place in metadata.storage_data.items():
        if not 0 <= place.offset <= place.offset + place.length <= sizes.get(place.relative_path, -1):
            return f"{index.fqn} lies outside the files of the checkpoint"
        places.setdefault(index.fqn, {})[index.offset] = place
    for name, entry in metadata.state_dict_metadata.items():
        stored = places.get(name, {})
        if len(entry.chunks) != len(stored) or not _is_tiled(entry):  # the first bounds what the second looks at
            return f"the parts of {name} do not add up to its shape {tuple(entry.size)}"
        if not _has_room(entry, stored, sizes):
            return f"{name} of shape {tuple(entry.size)} is longer than what is stored of it"
    return None


def _is_tiled(entry: TensorStorageMetadata) -> bool:
    """Whether the parts follow each other along the first dimension, as shares of processes do, and are all of it."""
    chunks, size = entry.chunks, entry.size
    if any(type(chunk) is not ChunkStorageMetadata for chunk in chunks):
        return False
    if any(
        len(chunk.offsets) != len(size) or any(chunk.offsets[1:]) or chunk.sizes[1:] != size[1:] for chunk in chunks
    ):
        return False
    if not size:
        return len(chunks) == 1
    end = 0
    for chunk in sorted(chunks, key=lambda chunk: (chunk.offsets[0], chunk.sizes[0])):
        if chunk.offsets[0] != end:
            return False
        end += chunk.sizes[0]
    return end == size[0]


def _has_room(
    entry: TensorStorageMetadata, stored: Mapping[torch.Size | None, _StorageInfo], sizes: Mapping[str, int]
) -> bool:
    used: dict[str, int] = {}  # bytes of each file: parts that lie on each other would be more than it has
    for chunk in entry.chunks:
        place = stored.get(chunk.offsets)
        if place is None or place.length < prod(chunk.sizes) * entry.properties.dtype.itemsize:
            return False
        used[place.relative_path] = used.get(place.relative_path, 0) + place.length
    return all(n_bytes <= sizes[path] for path, n_bytes in used.items())
