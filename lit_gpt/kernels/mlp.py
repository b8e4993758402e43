"""The gate of an MLP: its activation times the up projection (arXiv 2002.05202)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from lit_gpt.kernels import reference
from lit_gpt.kernels.backend import Backend, at_most_fp32, triton_runs
from lit_gpt.kernels.triton_ops import triton_gated

Gate = Callable[[Tensor, Tensor, bool], Tensor]


def gated(gate: Tensor, up: Tensor, gelu: bool = False) -> Tensor:
    """silu(gate) * up, or gelu by its tanh formula. gate, up (..., F). Returns (..., F)."""
    return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up


BACKENDS: dict[str, Backend[Gate]] = {
    "torch": Backend(gated),
    "triton": Backend(triton_gated, (at_most_fp32, triton_runs)),
    "reference": Backend(reference.gated),
}
