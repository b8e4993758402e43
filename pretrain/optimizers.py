"""Optimizers beside fused AdamW: several as one, and AdamW with moments in 8 bits, by torchao."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lit_gpt.kernels.backend import Situation, find_cpp_compiler, package
from lit_gpt.kernels.fp8 import INSTALL
from lit_gpt.lazy_tensors import LazyTensors, TensorSpec, is_shared
from pretrain.config import OptimizerConfig

ADAMW_SLOTS, MUON_SLOTS = frozenset({"exp_avg", "exp_avg_sq", "step"}), frozenset({"momentum_buffer"})
SMALLEST = 1e-12
"""Scale of a block of zeros, as in torchao."""


class SkippedByHost(torch.optim.Optimizer):
    """Optimizers of different parameters with one state and one step, some of them without fused AdamW's `found_inf`.

    That door skips a step on the device. Here the host reads whether a step is to be skipped before it is made, and so
    waits for the device once a step.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        groups = [group for part in parts for group in part.param_groups]
        super().__init__(groups, {})
        self.param_groups = groups  # the same dicts: the parts see a new learning rate
        self.parts = parts
        for part in parts:
            part.state = self.state
        self.found_inf: Tensor | None = None

    def step(self, closure: None = None) -> None:
        """One update, or none where `found_inf` says so."""
        if self.found_inf is not None and bool(self.found_inf):
            return
        for part in self.parts:
            part.step()

    def slots(self, parameter: Tensor) -> frozenset[str]:
        """Names of what is stored of a parameter."""
        groups = [group for part in self.parts if isinstance(part, torch.optim.Muon) for group in part.param_groups]
        return MUON_SLOTS if any(parameter is each for group in groups for each in group["params"]) else ADAMW_SLOTS


class AdamW8bit(SkippedByHost):
    """AdamW whose moments take 8 bits and a scale per 256 numbers (arXiv 2110.02861), computed in fp32.

    Small tensors, and those (or a process's parts of them) that 256 does not divide, keep moments of their own dtype.
    """

    def __init__(self, groups: list[dict[str, Any]], settings: OptimizerConfig) -> None:
        from torchao import optim

        betas = (settings.beta1, settings.beta2)
        self.torchaos = optim.AdamW8bit(
            groups, lr=settings.learning_rate, betas=betas, eps=settings.eps, bf16_stochastic_round=False
        )
        super().__init__(self.torchaos)

    @torch.no_grad()
    def stored(self, parameter: nn.Parameter, slot: str, moment: Tensor) -> Tensor:
        """A moment as the state holds it. moment: shaped and shared as the parameter is, or a scalar."""
        if slot == "step":
            return moment.to("cpu", torch.float32)  # where torchao has it
        made = self.torchaos._new_buffer(parameter, slot == "exp_avg")
        own, values = _own_part(made), _own_part(moment)
        if hasattr(own, "codes"):
            _quantise(own, values)
        else:
            own.copy_(values)
        return made


class PlainMoments(LazyTensors):
    """Slot -> tensor of one parameter's state, made from 8 bits on every access, in the parameter's dtype.

    What is not shared is made on the CPU, as nobody but a checkpoint wants it.
    """

    def __init__(self, parameter: nn.Parameter, slots: Mapping[str, Tensor]) -> None:
        self._parameter = parameter
        self._slots = slots

    def __getitem__(self, slot: str) -> Tensor:
        moment = self._slots[slot]
        own = _own_part(moment)
        plain = own.dequantize().to(self._parameter.dtype) if hasattr(own, "codes") else own
        if not is_shared(moment):
            return plain.cpu()
        from torch.distributed.tensor import DTensor

        like = self._parameter
        return DTensor.from_local(plain, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def spec(self, slot: str) -> TensorSpec:
        if slot == "step":
            return TensorSpec((), torch.float32)
        like = self._parameter
        return TensorSpec(tuple(like.shape), like.dtype, shared=like.detach() if is_shared(like) else None)


def adamw8bit_missing(device_type: str) -> str | None:
    """What AdamW8bit needs and has not on a device; None if it can run."""
    if reason := package("torchao", INSTALL)(Situation()):
        return reason
    if device_type == "cpu" and find_cpp_compiler() is None:
        return "compiles its step, which on a CPU needs a C++ compiler (g++, clang++ or $CXX)"
    return None


def _own_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if is_shared(tensor) else tensor


def _quantise(target: Any, values: Tensor) -> None:
    """Fill an 8-bit tensor of torchao's; what came from 8 bits becomes the same numbers again.

    The codes of signed numbers reach from -0.99 to 1: the scale of a block is its largest value, or, where that was
    coded as -0.99, a 0.99th of it, which rounding has moved by a bit or not. The one with the least error is taken.
    """
    blocks = values.float().reshape(-1, target.block_size)
    largest, lowest = blocks.abs().amax(1), target.qmap[0].abs()
    scales = [largest]
    if lowest:
        between = largest / lowest
        scales += [between, between.nextafter(largest), between.nextafter(2 * between)]
    least = torch.full_like(largest, torch.inf)
    halfway = (target.qmap[1:] + target.qmap[:-1]) / 2
    codes = torch.empty_like(target.codes).view(blocks.shape)
    for scale in scales:
        scale = scale.clip(SMALLEST)
        found = torch.bucketize(blocks / scale[:, None], halfway)
        error = (target.qmap[found] * scale[:, None] - blocks).abs().sum(1)
        better = error < least
        least = torch.where(better, error, least)
        target.scale.copy_(torch.where(better, scale, target.scale))
        codes = torch.where(better[:, None], found.to(torch.uint8), codes)
    target.codes.copy_(codes.view(target.codes.shape))
