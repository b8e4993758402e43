"""Mappings name -> tensor that read or make a tensor on every access, and say what it will be beforehand."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

FINITE_BLOCK = (
    1 << 15
)  # entries that are looked at at a time: torch starts no threads for so few, they stay in the cache

Made = TypeVar("Made")


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor will be, without it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device = torch.device("cpu")
    shared: Tensor | None = None
    """The tensor itself if processes share it (a DTensor): it alone knows which part is here."""

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class LazyTensors(Mapping[str, Tensor]):
    """Name -> tensor, read or made on every access; nothing is held."""

    @abstractmethod
    def spec(self, name: str) -> TensorSpec:
        """What `self[name]` will be; reads and makes nothing."""

    def fill(self, name: str, target: Tensor) -> None:
        """Copy `self[name]` into a tensor of its shape, or into the part of it that this process holds."""
        fill_(target, self[name])

    def __contains__(self, name: object) -> bool:
        """By name alone: Mapping's own makes the tensor to find out."""
        return any(name == each for each in self)


def spec_of(tensors: Mapping[str, Tensor], name: str) -> TensorSpec:
    """What `tensors[name]` is. A lazy mapping is asked, any other one is expected to hold its tensors."""
    if isinstance(tensors, LazyTensors):
        return tensors.spec(name)
    tensor = tensors[name]
    return TensorSpec(tuple(tensor.shape), tensor.dtype, tensor.device, tensor if is_shared(tensor) else None)


def is_shared(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def fill_(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into another, or into the part of it that this process holds; nothing is communicated."""
    if is_shared(target):
        from torch.distributed.tensor import distribute_tensor

        local = whole.to(device=target.device, dtype=target.dtype)
        whole = distribute_tensor(local, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(whole)


def fill_from(tensors: Mapping[str, Tensor], name: str, target: Tensor) -> None:
    """Copy `tensors[name]` into a tensor of its shape. A lazy mapping need not read more than what belongs there."""
    if isinstance(tensors, LazyTensors):
        tensors.fill(name, target)
    else:
        fill_(target, tensors[name])


class Renamed(LazyTensors):
    """Tensors of one or several mappings under other names.

    Args:
        places: new name -> mapping and name there.
    """

    def __init__(self, places: Mapping[str, tuple[Mapping[str, Tensor], str]]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> Tensor:
        tensors, there = self._places[name]
        return tensors[there]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def spec(self, name: str) -> TensorSpec:
        return spec_of(*self._places[name])

    def fill(self, name: str, target: Tensor) -> None:
        fill_from(*self._places[name], target)


class CastWeights(LazyTensors):
    """The same weights in another dtype, cast on every access."""

    def __init__(self, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._weights = weights
        self._dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name].to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def spec(self, name: str) -> TensorSpec:
        return replace(spec_of(self._weights, name), dtype=self._dtype)


def promoted(dtypes: set[torch.dtype]) -> torch.dtype:
    """The dtype of a tensor that is put together from parts of these."""
    first, *others = dtypes
    for dtype in others:
        first = torch.promote_types(first, dtype)
    return first


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; takes no memory of the tensor's size."""
    flat = tensor.detach().reshape(-1)
    blocks = flat.split(FINITE_BLOCK) if flat.device.type == "cpu" else (flat,)  # a GPU has to be waited for each time
    return all(_is_finite(block) for block in blocks)


def _is_finite(block: Tensor) -> bool:
    """A sum is finite only if all its terms are, and costs a tenth of looking at each; it may overflow, though."""
    total = block.sum(dtype=torch.float64 if block.dtype == torch.float64 else torch.float32)
    return bool(total.isfinite()) or bool(block.isfinite().all())


def one_ahead(jobs: Iterable[Callable[[], Made]]) -> Iterator[Made]:
    """What the jobs return, in order; each is done by a thread while the result before it is used.

    Two results are in memory at a time. An error of a job is raised where its result would have come.
    """
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for job in jobs:
            before, waiting = waiting, thread.submit(job)
            if before is not None:
                yield before.result()
                del before  # or it would hold its result while the next one is awaited
        if waiting is not None:
            yield waiting.result()
