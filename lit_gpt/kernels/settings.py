"""Which implementation of each operation a model computes with: the settings, and the error when one cannot run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DOCTOR = "python -m lit_gpt.kernels.doctor"


@dataclass(frozen=True)
class KernelConfig:
    """Implementation of each operation; no part of what the model is. docs/kernels.md says what each one needs."""

    attention: Literal["auto", "sdpa", "cudnn", "flash", "fa3", "fa4", "flash_attn", "xformers", "math"] = "auto"
    """auto: cudnn, flash or sdpa on CUDA, the first that can run; sdpa, torch's own choice, on a CPU."""
    norm: Literal["auto", "torch", "triton", "reference"] = "auto"
    """RMSNorm, alone and after adding to the residual stream. auto: triton when eager on CUDA, otherwise torch."""
    mlp: Literal["auto", "torch", "triton", "reference"] = "auto"
    """Activation of the gate times the up projection. auto: as for norm."""
    rope: Literal["auto", "torch", "triton", "reference"] = "auto"
    """Rotary positions. auto: as for norm."""
    loss: Literal["auto", "chunked", "torch", "triton"] = "auto"
    """Head and cross-entropy: chunked never holds all logits, torch does. auto: chunked."""


class BackendUnavailable(ValueError):
    """A kernel that was asked for by name cannot run here, or computes something else than it should."""
