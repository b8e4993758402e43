"""Tensors into torch.distributed.checkpoint files, one at a time, or by reference. Importing this costs 0.7 s."""

from __future__ import annotations

import dataclasses
import queue
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from lit_gpt.atomic import CHUNK_BYTES, crc32_text
from lit_gpt.copying import link_or_copy, start_writeback
from lit_gpt.lazy_tensors import LazyTensors, TensorSpec, is_shared
from lit_gpt.processes import ONE_PROCESS, Processes
from lit_gpt.sharded import StoredTensors, plain_errors

SUFFIX = ".distcp"
WEIGHTS_PREFIX = "model."


@dataclass(frozen=True)
class References:
    """Tensors of a new checkpoint that are stored in the files of another one."""

    source: StoredTensors
    names: Mapping[str, str]
    """Name in the new checkpoint -> name in `source`."""
    crc32: Mapping[str, str]
    """Of the files of `source`, as its manifest has them."""
    finite: bool = False
    """Whether all weights among them are known to be finite numbers."""

    def files(self) -> list[str]:
        """Names of the files that hold them."""
        return sorted({place.relative_path for name in set(self.names.values()) for _, place in self._places(name)})

    def add_to(self, metadata: Metadata) -> list[WriteResult]:
        """Enter the tensors into the metadata of the new checkpoint; returns where they lie, as if just written."""
        for name, source_name in self.names.items():
            metadata.state_dict_metadata[name] = self.source.metadata.state_dict_metadata[source_name]
            metadata.planner_data[name] = (name,)
        return [
            WriteResult(dataclasses.replace(index, fqn=name), place.length, place)
            for name, source_name in self.names.items()
            for index, place in self._places(source_name)
        ]

    def _places(self, name: str) -> list[tuple[MetadataIndex, Any]]:
        return self.source.places[name]


def write_tensors(
    directory: Path,
    tensors: LazyTensors,
    references: References | None = None,
    *,
    on_tensor: Callable[[str, Tensor], None] = lambda name, tensor: None,
    before_copy: Callable[[int], None] = lambda n_bytes: None,
    processes: Processes = ONE_PROCESS,
) -> dict[str, str]:
    """Write `tensors` of any shape, dtype and device into `directory`: weights, all else, and the metadata.

    Weights have files of their own, so that a checkpoint grown by reference need not keep the moments of its parent.
    Of several processes each writes the parts that it holds; what all of them hold whole, one of them writes.

    Args:
        directory: an empty directory.
        tensors: name -> tensor; each is read once, one after the other, but for those that are referenced.
        references: tensors that are not written; the files that hold them are linked, or copied where links are not
            possible.
        on_tensor: called with each tensor, or this process's part of it, as it is written.
        before_copy: called with the size of a file before it is copied for want of a link.
        processes: that write the same tensors together; one alone may reference others.

    Returns:
        File name -> crc32, as text, of every file that this process wrote or linked, but for the metadata.

    Raises:
        OSError: the file system refused, on whichever process.
    """
    assert references is None or processes.size == 1, "links are made by one process"
    linked = [] if references is None else references.files()
    for name in linked:
        link_or_copy(references.source.directory / name, directory / name, before_copy)
    referenced = {} if references is None else references.names
    planned = {name: _planned(tensors.spec(name)) for name in tensors if name not in referenced}
    writer = _Writer(directory, references, set(linked))
    with plain_errors():
        dcp.save(
            planned,
            storage_writer=writer,
            planner=_Planner(tensors, on_tensor),
            process_group=processes.group,
            no_dist=processes.size == 1,
        )
    return {**{name: references.crc32[name] for name in linked}, **writer.crc32}


def _planned(spec: TensorSpec) -> Tensor:
    """What dcp plans with: a tensor without storage, but for one whose parts only it knows itself."""
    if spec.shared is not None:
        return spec.shared
    return torch.empty(spec.shape, dtype=spec.dtype, device="meta")


class _Planner(dcp.DefaultSavePlanner):
    """Plans with tensors without storage, and reads each when it is written."""

    def __init__(self, tensors: Mapping[str, Tensor], on_tensor: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self._tensors = tensors
        self._on_tensor = on_tensor

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        tensor = self._tensors[index.fqn].detach()
        if is_shared(tensor):
            tensor = tensor.to_local()
        self._on_tensor(index.fqn, tensor)
        return tensor


class _Writer(dcp.FileSystemWriter):
    """One thread: tensors are fetched one by one, except for 10 MB ahead where a GPU may be copied from meanwhile."""

    def __init__(self, directory: Path, references: References | None, taken: set[str]) -> None:
        super().__init__(directory, single_file_per_rank=True, sync_files=True, overwrite=False)
        self.crc32: dict[str, str] = {}
        self.fs = _FileSystem(self.crc32)
        self._references = references
        self._taken = taken

    def write_data(self, plan: SavePlan, planner: dcp.SavePlanner) -> Any:
        """Weights into one file, all else into another, under names that no linked file has."""
        files: queue.Queue[tuple[Path, str, list[WriteItem]]] = queue.Queue()
        weights = [item for item in plan.items if item.index.fqn.startswith(WEIGHTS_PREFIX)]
        others = [item for item in plan.items if not item.index.fqn.startswith(WEIGHTS_PREFIX)]
        names = self._free_names(plan.storage_data.prefix)
        for items in (weights, others):
            if items:
                name = next(names)
                files.put((self.fs.concat_path(self.path, name), name, items))
        return self._write_data(planner, files)

    def _free_names(self, prefix: str) -> Iterator[str]:
        number = 0
        while True:
            if f"{prefix}{number}{SUFFIX}" not in self._taken:
                yield f"{prefix}{number}{SUFFIX}"
            number += 1

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Store the metadata of what was written and of what is referenced."""
        referenced = [] if self._references is None else self._references.add_to(metadata)
        super().finish(metadata, [*results, referenced])

    def storage_meta(self) -> StorageMeta:
        """Nothing: the default would keep the temporary path and a random id in the file."""
        return StorageMeta()


class _FileSystem(FileSystem):
    """Computes the crc32 of data files while they are written."""

    def __init__(self, crc32: dict[str, str]) -> None:
        self._crc32 = crc32

    @contextmanager
    def create_stream(self, path: Path, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            if mode != "wb" or path.suffix != SUFFIX:
                yield stream
                return
            counting = _CountingStream(stream)
            yield counting
        self._crc32[path.name] = crc32_text(counting.crc32)


class _CountingStream:
    """A file that is written from front to back, as far as torch's writers use one, and its crc32."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.crc32 = 0
        self._stream = stream
        self.tell, self.flush = stream.tell, stream.flush
        self.fileno, self.close = stream.fileno, stream.close

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, view.nbytes, CHUNK_BYTES):
            chunk = view[start : start + CHUNK_BYTES]
            self.crc32 = zlib.crc32(chunk, self.crc32)
            self._stream.write(chunk)
        if view.nbytes >= CHUNK_BYTES:
            start_writeback(self.fileno(), self.tell() - view.nbytes, view.nbytes)
        return view.nbytes
