"""One number for the weights of a model: which weights a measurement was made on, saved or not."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from lit_gpt.lazy_tensors import is_shared
from lit_gpt.processes import ONE_PROCESS, Processes


def weights_sha256(weights: Mapping[str, Tensor], processes: Processes = ONE_PROCESS) -> str:
    """sha256 of one line per tensor: name, dtype, shape, and sha256 of its numbers, in the order of the names.

    The same for every number of processes and however they share the tensors. Each gathers all tensors, one at a time,
    and reads its part of them: every process must call it.

    Args:
        weights: parameter name -> tensor, a tied one under one name.
        processes: which share them, or hold the same.
    """
    own: dict[str, str] = {}
    for number, name in enumerate(sorted(weights)):
        tensor = weights[name].detach()
        whole = tensor.full_tensor() if is_shared(tensor) else tensor
        if number % processes.size == processes.rank:
            own[name] = f"{name} {whole.dtype} {tuple(whole.shape)} {_sha256(whole)}\n"
    lines = {name: line for part in processes.gather(own) for name, line in part.items()}
    return hashlib.sha256("".join(lines[name] for name in sorted(lines)).encode()).hexdigest()


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
