"""Weights into safetensors files under Hugging Face's names: one tensor after the other, or copied by the kernel."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_gpt.atomic import crc32_text
from lit_gpt.axes import parameter_shapes
from lit_gpt.config import Config
from lit_gpt.errors import DataError
from lit_gpt.exchange_files import INDEX, MODEL, LitWeights, ScannedTensor
from lit_gpt.hf import family_of, hf_names, hf_shapes, to_hf
from lit_gpt.lazy_tensors import TensorSpec, one_ahead, spec_of
from lit_gpt.safetensors_file import DTYPE_NAMES, SafetensorsWriter

Shard = Sequence[tuple[str, TensorSpec]]
"""Hugging Face name and kind of every tensor of one file, in the order of the model."""


@dataclass(frozen=True)
class Copies:
    """Weights that are, byte for byte, those of another exchange form. All of that form is checked on the way."""

    source: LitWeights
    names: Mapping[str, str]
    """Our name of a parameter -> our name of the parameter of `source` that it equals."""
    allow_non_finite: bool = False
    """Whether NaN and infinity in `source`, copied or not, are taken as they are."""

    def parts(self) -> dict[str, str]:
        """The same in Hugging Face's names."""
        family = family_of(self.source.config)
        return {
            ours: theirs
            for name, source in self.names.items()
            for ours, theirs in zip(hf_names(name, family), hf_names(source, family), strict=True)
        }


def plan_shards(
    config: Config, weights: Mapping[str, Tensor], copies: Copies | None, max_shard_bytes: int
) -> list[Shard]:
    """Which tensors go into which file; reads no tensor.

    Raises:
        DataError: a tensor does not have the shape that the configuration wants, or a dtype that cannot be stored.
    """
    shards: list[list[tuple[str, TensorSpec]]] = [[]]
    shard_bytes = 0
    for name, spec in _stored_specs(config, weights, copies):
        if shards[-1] and shard_bytes + spec.n_bytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append((name, spec))
        shard_bytes += spec.n_bytes
    return shards


def _stored_specs(config: Config, weights: Mapping[str, Tensor], copies: Copies | None) -> Shard:
    parts = {} if copies is None else copies.parts()
    found = []
    for name, shape in parameter_shapes(config).items():
        spec = spec_of(weights, name)
        if spec.shape != shape:
            raise DataError(f"{name} has shape {spec.shape}, the configuration wants {shape}")
        if spec.dtype not in DTYPE_NAMES:
            raise DataError(f"{name} has dtype {spec.dtype}; weights have one of {', '.join(DTYPE_NAMES.values())}")
        for theirs, part_shape in hf_shapes(name, shape, config).items():
            copied = theirs in parts
            part = copies.source.files.spec(parts[theirs]) if copied else TensorSpec(part_shape, spec.dtype)
            found.append((theirs, part))
    return found


def write_shards(
    directory: Path,
    config: Config,
    weights: Mapping[str, Tensor],
    shards: Sequence[Shard],
    copies: Copies | None,
    *,
    ahead: bool = False,
) -> dict[str, str]:
    """Write the files of weights, and their index if there are several; returns the crc32 of each, as text.

    Raises:
        DataError: what is copied from is damaged, or not finite where it has to be.
        OSError: the disk is full, or another fault of the file system.
    """
    names = _file_names(len(shards))
    with ExitStack() as stack:
        files = [
            stack.enter_context(SafetensorsWriter(directory / name, shard))
            for name, shard in zip(names, shards, strict=True)
        ]
        file_of = {name: file for file, shard in zip(files, shards, strict=True) for name, _ in shard}
        if copies is not None:
            _copy(file_of, copies)
        copied = {} if copies is None else copies.names
        jobs = [
            partial(to_hf, name, weights.__getitem__, config) for name in parameter_shapes(config) if name not in copied
        ]
        for parts in one_ahead(jobs) if ahead else (job() for job in jobs):
            for theirs, part in parts.items():
                file_of[theirs].write(theirs, part)
        crc32 = {name: crc32_text(file.finish()) for name, file in zip(names, files, strict=True)}
    if len(shards) > 1:
        _write_index(directory, names, shards)
    return crc32


def _copy(file_of: Mapping[str, SafetensorsWriter], copies: Copies) -> None:
    """Copy every tensor to all its places just after it was read, while it is in the page cache."""
    copies_of: dict[str, list[str]] = {}
    for name, source in copies.parts().items():
        copies_of.setdefault(source, []).append(name)
    for scanned in copies.source.scan(allow_non_finite=copies.allow_non_finite):
        _copy_one(scanned, copies_of.get(scanned.name, []), file_of)


def _copy_one(scanned: ScannedTensor, names: Sequence[str], file_of: Mapping[str, SafetensorsWriter]) -> None:
    if not names:
        return
    with scanned.path.open("rb", buffering=0) as source:
        for name in names:
            file_of[name].copy(name, source.fileno(), scanned.entry.offset, scanned.crc32)


def _file_names(n_shards: int) -> list[str]:
    if n_shards == 1:
        return [MODEL]
    return [f"model-{number:05d}-of-{n_shards:05d}.safetensors" for number in range(1, n_shards + 1)]


def _write_index(directory: Path, names: Sequence[str], shards: Sequence[Shard]) -> None:
    total_bytes = sum(spec.n_bytes for shard in shards for _, spec in shard)
    weight_map = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name, _ in shard}
    write_json(directory / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
