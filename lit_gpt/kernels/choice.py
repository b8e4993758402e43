"""From settings to the functions that a model computes with: once, when it is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lit_gpt.kernels import attention, loss, mlp, norm, rope
from lit_gpt.kernels.backend import Backend, Situation
from lit_gpt.kernels.settings import DOCTOR, BackendUnavailable, KernelConfig

BACKENDS: Mapping[str, Mapping[str, Backend[Any]]] = {
    "attention": attention.BACKENDS,
    "norm": norm.BACKENDS,
    "mlp": mlp.BACKENDS,
    "rope": rope.BACKENDS,
    "loss": loss.BACKENDS,
}
"""Operation -> name -> backend, both as in KernelConfig."""
PLAIN = KernelConfig(attention="sdpa", norm="torch", mlp="torch", rope="torch", loss="chunked")
"""Runs everywhere."""


@dataclass(frozen=True)
class Kernels:
    """What a model computes with; by default what runs everywhere."""

    attention: attention.Attention = attention.sdpa
    norm: norm.Norm = norm.BACKENDS["torch"].op
    mlp: mlp.Gate = mlp.gated
    rope: rope.Rope = rope.apply_rope
    loss: loss.LinearCrossEntropy = loss.linear_cross_entropy
    names: KernelConfig = PLAIN
    """How they are called; none of them auto."""

    def with_compiled_loss(self) -> Kernels:
        return dataclasses.replace(self, loss=loss.compiled(self.loss))

    def __str__(self) -> str:
        return " ".join(f"{operation}={name}" for operation, name in dataclasses.asdict(self.names).items())


def auto(operation: str, situation: Situation) -> str:
    """What `auto` means: the fastest that torch brings along and that can run. On a CPU always that of PLAIN."""
    plain = getattr(PLAIN, operation)
    if situation.device_type != "cuda":
        return plain
    by_preference = {
        # where torch itself prefers cuDNN: not on sm_120
        "attention": [*(["cudnn"] if (situation.capability or (0, 0))[0] in (9, 10) else []), "flash", "sdpa"],
        "loss": ["chunked"],
    }.get(operation, ["torch"] if situation.compiled else ["triton", "torch"])  # a compiler fuses torch's own as well
    return next(name for name in by_preference if BACKENDS[operation][name].missing(situation) is None)


def resolve(wanted: KernelConfig, situation: Situation) -> Kernels:
    """The chosen functions, ready to run.

    Raises:
        BackendUnavailable: one that was named cannot run; a line for each, with what it needs.
    """
    names = {
        operation: auto(operation, situation) if name == "auto" else name
        for operation, name in dataclasses.asdict(wanted).items()
    }
    chosen = {operation: BACKENDS[operation][name] for operation, name in names.items()}
    missing = {operation: backend.missing(situation) for operation, backend in chosen.items()}
    problems = [_refusal(operation, names[operation], reason) for operation, reason in missing.items() if reason]
    if problems:
        raise BackendUnavailable("\n".join(problems))
    for operation, backend in chosen.items():
        try:
            backend.prepare()
        except Exception as error:  # a package of any kind, and of another version than torch looks for
            raise BackendUnavailable(_refusal(operation, names[operation], str(error))) from error
    return Kernels(**{operation: backend.op for operation, backend in chosen.items()}, names=KernelConfig(**names))


def _refusal(operation: str, name: str, reason: str) -> str:
    return (
        f"kernels.{operation}={name!r} cannot be used: {reason}. Use kernels.{operation}=auto; {DOCTOR} says what can "
        f"be used here"
    )
