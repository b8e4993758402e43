"""Checkpoints for TinyLlama, prts and lit-gpt: files as torch.save writes them, one tensor in memory at a time."""

from __future__ import annotations

import errno
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt.atomic import CHUNK_BYTES, check_free_space, sync_directory
from lit_gpt.axes import EMBEDDING, HEAD, parameter_shapes
from lit_gpt.config import Config
from lit_gpt.copying import start_writeback
from lit_gpt.errors import DataError
from lit_gpt.lazy_tensors import one_ahead, spec_of
from lit_gpt.legacy_sizes import OWN_SIZES
from lit_gpt.pickles import STORAGES
from lit_gpt.problems import check_names

# What TinyLlama's model has no words for, and its value there.
PLAIN = {
    **{"qkv_bias": False, "proj_bias": False, "mlp_bias": False, "qk_norm": "none", "norm_placement": "before"},
    **{"norm_plus_one": False, "activation": "silu", "embedding_scale": 1.0, "rope_scaling": None},
    **{"rope_layers": None, "sliding_window": None, "sliding_layers": None, "rope_base": 10000.0},
    **{"rotary_percentage": 1.0, "norm_eps": 1e-5},
}
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
    name = "archive"
    with path.open("xb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{name}/data.pkl", buffer.getvalue())
        archive.writestr(f"{name}/byteorder", "little")
        for key, value in enumerate(one_ahead([partial(_bytes_of, tensor) for tensor in pickler.tensors])):
            with archive.open(f"{name}/data/{key}", "w", force_zip64=True) as entry:
                content = memoryview(value.numpy())
                for start in range(0, content.nbytes, CHUNK_BYTES):  # the checksum leaves a chunk in the cache
                    before = file.tell()
                    entry.write(content[start : start + CHUNK_BYTES])
                    start_writeback(file.fileno(), before, CHUNK_BYTES)
            del value, content  # before the next one is read
        archive.writestr(f"{name}/version", "3\n")
        archive.close()
        file.flush()
        os.fsync(file.fileno())


def _bytes_of(tensor: Deferred) -> Tensor:
    """(n_bytes,) uint8: the values of a tensor as they lie in the file."""
    return tensor.read().detach().to("cpu", tensor.dtype).contiguous().reshape(-1).view(torch.uint8)


def write_legacy(
    path: Path, config: Config, weights: Mapping[str, Tensor], counters: Mapping[str, int] | None = None
) -> Path:
    """Write `{"model": weights, ...}` under TinyLlama's names and in its order; all or nothing.

    The sizes go along under a key that those tools do not read, so that `read_legacy` knows them.

    Args:
        path: the file to make.
        config: sizes of the model. A tied head is written out: those tools know no other.
        weights: our names -> tensors; a lazy mapping is read one tensor after the other.
        counters: iter_num and step_count, beside the weights.

    Raises:
        ValueError: the model has parts that those tools do not know.
        DataError: `weights` are not those of `config`.
        OSError: the file exists already, cannot be written, or the disk is full.
    """
    plain = {**PLAIN, "head_size": config.n_embd // config.n_head}
    foreign = [f"{field}={getattr(config, field)}" for field in plain if getattr(config, field) != plain[field]]
    if foreign:
        raise ValueError(
            f"TinyLlama's and prts's models have no {', '.join(foreign)}; write exchange form, which says so"
        )
    shapes = parameter_shapes(config)
    check_names(shapes, weights, "the weights to write")
    shapes = {HEAD: shapes[EMBEDDING], **{name: shape for name, shape in shapes.items() if name != HEAD}}
    source = {name: EMBEDDING if name == HEAD and config.tie_embeddings else name for name in shapes}
    dtypes = {name: spec_of(weights, source[name]).dtype for name in shapes}
    check_free_space(path, sum(torch.Size(shapes[name]).numel() * dtypes[name].itemsize for name in shapes))

    def read(name: str) -> Tensor:
        tensor = weights[source[name]]
        if tuple(tensor.shape) != shapes[name]:
            raise DataError(f"{name} has shape {tuple(tensor.shape)}, the configuration wants {shapes[name]}")
        return tensor

    model = {name: Deferred(shape, dtypes[name], lambda name=name: read(name)) for name, shape in shapes.items()}
    if path.exists():
        raise FileExistsError(errno.EEXIST, "exists already; choose another name or remove it first", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_pickle(temporary, {"model": model, **(counters or {}), OWN_SIZES: config.to_dict()})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)
    return path
