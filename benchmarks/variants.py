"""What benchmarks/training.py measures: ways to make one training step, which of them are compared, and the goals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import peers
from lit_gpt.config import Config
from lit_gpt.kernels.backend import Situation
from lit_gpt.kernels.choice import BACKENDS, auto
from lit_gpt.kernels.settings import KernelConfig

AUTO = KernelConfig()
OVER_EAGER_TRANSFORMERS = 1.5
COMPILED_PEERS = ("transformers", "litgpt")  # to be no slower than these
BLOCK_OVER_MODEL = 1.15  # compiled blocks may take this much of a compiled model's time


@dataclass(frozen=True)
class Variant:
    """One way to make the same training step."""

    family: str
    """ours, transformers, litgpt, nanochat or naive."""
    precision: str
    """fp32, or bf16: fp32 weights and optimizer, bf16 computation."""
    compile: str = "none"
    """none, block (blocks and loss, ours alone) or model."""
    kernels: KernelConfig = AUTO
    """Ours alone."""

    @property
    def name(self) -> str:
        chosen = [f" {op}={name}" for op, name in asdict(self.kernels).items() if name != "auto"]
        how = "eager" if self.compile == "none" else f"{self.compile}-compiled"
        return f"{self.family} {self.precision} {how}{''.join(chosen)}"


def all_variants(config: Config, device: torch.device) -> list[Variant]:
    """Ours and the peers' in every precision; ours with each other backend that can run here, one at a time."""
    precisions = ("bf16",) if device.type == "cuda" else ("fp32", "bf16")
    found = []
    for precision in precisions:
        found += [Variant("ours", precision, compiled) for compiled in ("none", "block", "model")]
        found += [Variant(family, precision, compiled) for family in peers.MODULES for compiled in ("none", "model")]
    found.insert(1, Variant("naive", precisions[0]))
    found += [
        Variant("ours", precisions[0], kernels=kernels) for kernels in other_kernels(config, precisions[0], device)
    ]
    return [each for each in found if each.family != "nanochat" or each.precision == peers.nanochat_precision(device)]


def other_kernels(config: Config, precision: str, device: torch.device) -> Iterator[KernelConfig]:
    """What can run eagerly and is not what `auto` chooses, one operation at a time."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    situation = Situation.on(device, dtype=dtype, head_sizes=(config.head_size,), n_embd=config.n_embd)
    for operation, backends in BACKENDS.items():
        for name, backend in backends.items():
            if name != auto(operation, situation) and backend.missing(situation) is None:
                yield dataclasses.replace(AUTO, **{operation: name})


def are_compared(ours: Variant, other: Variant) -> bool:
    """What `auto` gives against others of its policy, against our other backends, and against other compilation."""
    if ours.family != "ours" or ours.kernels != AUTO or ours == other:
        return False
    if other.family == "naive":
        return True
    if ours.precision != other.precision:
        return False
    return other.family != "ours" or other.kernels == AUTO or other.compile == ours.compile


def targets(result: dict[str, Any]) -> list[tuple[str, str, float, dict[str, float] | None]]:
    """What was to be reached: ours, against, how many times as fast, and what was found (None: not measured)."""
    found = {(each["ours"], each["against"]): each for each in result[f"ratios_{result['clock']}"]}
    rows = []
    for precision in ("fp32", "bf16"):
        if not any(f" {precision} " in variant["name"] for variant in result["variants"]):
            continue
        ours = f"ours {precision} block-compiled"
        wanted = [(f"transformers {precision} eager", OVER_EAGER_TRANSFORMERS)]
        wanted += [(f"{family} {precision} model-compiled", 1.0) for family in COMPILED_PEERS]
        wanted += [(f"ours {precision} model-compiled", 1 / BLOCK_OVER_MODEL)]
        rows += [(ours, other, times, found.get((ours, other))) for other, times in wanted]
    return rows
