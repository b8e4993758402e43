"""Tensors read from torch.distributed.checkpoint files, each by itself. Importing this costs 0.7 s: import it late."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from lit_gpt.errors import DataError
from lit_gpt.lazy_tensors import LazyTensors, TensorSpec
from lit_gpt.pickles import check_sizes

METADATA = ".metadata"
_CHECKPOINT = "torch.distributed.checkpoint"
ALLOWED_GLOBALS = frozenset(
    {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
        (f"{_CHECKPOINT}.metadata", "ChunkStorageMetadata"),
        (f"{_CHECKPOINT}.metadata", "Metadata"),
        (f"{_CHECKPOINT}.metadata", "MetadataIndex"),
        (f"{_CHECKPOINT}.metadata", "StorageMeta"),
        (f"{_CHECKPOINT}.metadata", "TensorProperties"),
        (f"{_CHECKPOINT}.metadata", "TensorStorageMetadata"),
        (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"),
    }
)
DTYPES = frozenset(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))


@contextmanager
def plain_errors() -> Iterator[None]:
    """Keep dcp from warning that there is one process, and from raising what `except Exception` does not catch.

    What failed on any process is raised on every one.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except dcp.CheckpointException as error:
        cause = next((failure[0] for failure in error.failures.values()), None)
        raise (cause if isinstance(cause, Exception) else RuntimeError(str(error))) from None


class StoredTensors(LazyTensors):
    """Name -> tensor on the CPU, read from the files on every access.

    Args:
        directory: where the files are.
        sizes: bytes of each file that belongs to the checkpoint; no other file is touched.

    Raises:
        DataError: the metadata is damaged, names other files, or contains what could run code.
    """

    def __init__(self, directory: Path, sizes: Mapping[str, int]) -> None:
        self.directory = directory
        self._reader = _Reader(directory, sizes)
        self.metadata = self._reader.metadata
        self._entries: dict[str, TensorStorageMetadata] = self.metadata.state_dict_metadata

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        self.fill(name, tensor)
        return tensor

    def fill(self, name: str, target: Tensor) -> None:
        """Read a tensor into another, of any dtype and device; of a DTensor, the parts that this process holds."""
        try:
            with plain_errors():
                dcp.load({name: target.detach()}, storage_reader=self._reader, no_dist=True)
        except Exception as error:
            raise DataError(
                f"{name} cannot be read from {self.directory}: {error}; use an earlier checkpoint"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def spec(self, name: str) -> TensorSpec:
        entry = self._entries[name]
        return TensorSpec(tuple(entry.size), entry.properties.dtype)

    @cached_property
    def places(self) -> dict[str, list[tuple[MetadataIndex, Any]]]:
        """Name -> for each of its parts the part's index and where it lies: relative_path, offset, length."""
        found: dict[str, list[tuple[MetadataIndex, Any]]] = {}
        for index, place in self.metadata.storage_data.items():
            found.setdefault(index.fqn, []).append((index, place))
        return found


class _Reader(dcp.FileSystemReader):
    """Reads the metadata once, through the allow-list, and checks it against the files."""

    def __init__(self, directory: Path, sizes: Mapping[str, int]) -> None:
        super().__init__(directory)
        self.metadata = load_metadata(directory / METADATA)
        problem = _metadata_problem(self.metadata, sizes)
        if problem:
            raise DataError(f"{directory / METADATA}: {problem}; the file is damaged, use an earlier checkpoint")

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


def load_metadata(path: Path) -> Metadata:
    """Unpickle dcp's metadata with nothing but an allow-list of its own data classes.

    Raises:
        DataError: it is not such metadata, or it names anything else; nothing of it was executed.
    """
    try:
        content = path.read_bytes()
        check_sizes(content)
        metadata = _AllowListed(io.BytesIO(content)).load()
    except FileNotFoundError:
        raise DataError(f"{path} is missing; use an earlier checkpoint") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{path} cannot be read: {error}; use an earlier checkpoint") from error
    if not isinstance(metadata, Metadata):
        raise DataError(f"{path} holds a {type(metadata).__name__}, not the metadata of a checkpoint")
    return metadata


class _AllowListed(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED_GLOBALS or (module == "torch" and name in DTYPES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a checkpoint never needs (refused, not run)")


def _metadata_problem(metadata: Metadata, sizes: Mapping[str, int]) -> str | None:
    """What does not hold together; a size must be backed by bytes before anything of that size is allocated."""
    try:
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                return f"{name} is not a tensor"
            if sum(prod(chunk.sizes) for chunk in entry.chunks) != prod(entry.size):
                return f"the parts of {name} do not add up to its shape {tuple(entry.size)}"
        for index, place in metadata.storage_data.items():
            if not 0 <= place.offset <= place.offset + place.length <= sizes.get(place.relative_path, -1):
                return f"{index.fqn} lies outside the files of the checkpoint"
        return _unbacked_tensor(metadata)
    except Exception as error:  # the unpickled classes check no type
        return f"it does not hold together ({error!r})"


def _unbacked_tensor(metadata: Metadata) -> str | None:
    stored: dict[str, int] = {}
    for index, place in metadata.storage_data.items():
        stored[index.fqn] = stored.get(index.fqn, 0) + place.length
    for name, entry in metadata.state_dict_metadata.items():
        if prod(entry.size) * entry.properties.dtype.itemsize > stored.get(name, 0):
            return f"{name} of shape {tuple(entry.size)} is longer than what is stored of it"
    return None
