"""Where a run computes: the Fabric frame, and the precision and compilation that fit the device."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lit_gpt.kernels.products import cpu_multiplies_bf16
from lit_gpt.model import GPT
from pretrain.config import RunConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Compiling blocks and loss costs 5 to 20 s cold on a CPU and is repaid after about this many tokens of a small model
REPAID_AFTER_TOKENS = 400_000


@dataclass(frozen=True)
class Compute:
    """How the model computes, and why."""

    precision: str
    """fp32, bf16 or bf16-true."""
    compile: str
    """none, block or model."""
    reason: str
    """For the log: what decided."""

    @property
    def compute_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.precision == "bf16" else None


def launch(config: RunConfig) -> Fabric:
    """One process on one device.

    Raises:
        ValueError: the device is not there, or several processes were started.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise ValueError(f"WORLD_SIZE={world_size}: this version trains in one process; start it without torchrun")
    if config.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={config.device!r} must be auto, cpu or cuda")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA device; use device=auto or cpu")
    accelerator = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    # one process is one process, also where SLURM is installed: Fabric would look for it and warn of a missing srun
    fabric = Fabric(accelerator=accelerator, devices=1, precision="32-true", plugins=[LightningEnvironment()])
    fabric.launch()
    return fabric


def find_cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile would use on a CPU."""
    return next(
        (found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := shutil.which(name))), None
    )


def choose_compute(config: RunConfig, device: torch.device, total_tokens: int) -> Compute:
    """Resolve `precision` and `compile`.

    Raises:
        ValueError: compile was asked for on a CPU without a C++ compiler.
    """
    has_bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_multiplies_bf16()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    hardware = f"{name} {'multiplies' if has_bf16 else 'does not multiply'} bf16"
    precision = config.precision if config.precision != "auto" else "bf16" if has_bf16 else "fp32"
    compiler = find_cpp_compiler()
    if config.compile != "auto":
        if config.compile != "none" and device.type == "cpu" and compiler is None:
            raise ValueError(f"compile={config.compile} needs a C++ compiler (g++, clang++ or $CXX); use compile=none")
        return Compute(precision, config.compile, f"{hardware}; compile as asked")
    if device.type == "cuda":
        return Compute(precision, "block", hardware)
    if precision == "fp32":
        return Compute(precision, "none", f"{hardware}, fp32 runs eagerly")
    if compiler is None:
        return Compute(precision, "none", f"{hardware}, no C++ compiler to compile with")
    if total_tokens < REPAID_AFTER_TOKENS:
        return Compute(precision, "none", f"{hardware}, {total_tokens:,} tokens do not repay compiling")
    return Compute(precision, "block", f"{hardware}, compiled with {os.path.basename(compiler)}")


def prepare_model(model: GPT, compute: Compute, device: torch.device) -> GPT:
    """Move, cast and compile in place; the keys of the state dict stay as they are."""
    model.to(device)
    model.compute_dtype = compute.compute_dtype
    if compute.precision == "bf16-true":
        model.to(torch.bfloat16)
    if compute.compile == "model":
        model.compile(dynamic=False)
    elif compute.compile == "block":
        # block by block: the graphs of one depth serve every other depth, so growth compiles nothing new
        for block in model.transformer.h:
            block.compile(dynamic=False)
        model.loss_kernel = torch.compile(model.loss_kernel, dynamic=False)
    return model
