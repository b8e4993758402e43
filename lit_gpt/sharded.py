"""Tensors read from torch.distributed.checkpoint files, each by itself. Importing this costs 0.7 s: import it late."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from lit_gpt.errors import DataError
from lit_gpt.lazy_tensors import LazyTensors, TensorSpec
from lit_gpt.sharded_metadata import METADATA, load_metadata


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
    """Reads the metadata once, without unpickling it, and checks it against the files."""

    def __init__(self, directory: Path, sizes: Mapping[str, int]) -> None:
        super().__init__(directory)
        self.metadata = load_metadata(directory / METADATA, sizes)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata
