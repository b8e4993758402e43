"""Files as torch.save writes them, one tensor in memory at a time."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt.pickles import STORAGES

PROTOCOL = 2  # torch's own


@dataclass(frozen=True)
class Deferred:
    """A tensor that will be there when its turn comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class _Storage:
    key: str
    tensor: Deferred


class _Pickler(pickle.Pickler):
    """Writes `Deferred` tensors as references to the files of the archive that will hold them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=PROTOCOL)
        self.tensors: list[Deferred] = []

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        n_elements = torch.Size(value.tensor.shape).numel()
        return ("storage", getattr(torch, STORAGES[value.tensor.dtype]), value.key, "cpu", n_elements)

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Deferred):
            return NotImplemented
        self.tensors.append(value)
        stride = torch.empty(value.shape, device="meta").stride()
        storage = _Storage(str(len(self.tensors) - 1), value)
        return torch._utils._rebuild_tensor_v2, (storage, 0, value.shape, stride, False, OrderedDict())


def write_pickle(path: Path, content: Mapping[str, Any]) -> None:
    """Write nested dicts and lists of plain values and `Deferred` tensors so that torch.load reads them.

    Raises:
        OSError: the file exists or cannot be written.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(content)
    name = path.stem
    with path.open("xb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{name}/data.pkl", buffer.getvalue())
        archive.writestr(f"{name}/byteorder", "little")
        for key, tensor in enumerate(pickler.tensors):
            value = tensor.read().detach().to("cpu", tensor.dtype).contiguous().reshape(-1)
            with archive.open(f"{name}/data/{key}", "w", force_zip64=True) as entry:
                entry.write(memoryview(value.view(torch.uint8).numpy()))
        archive.writestr(f"{name}/version", "3\n")
