"""What runs here and why not: `python -m lit_gpt.kernels.doctor [--config FILE]`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from lit_gpt.checkpoint import find_checkpoint, read_config
from lit_gpt.config import Config, unknown_key
from lit_gpt.errors import EXIT_OK, run_command
from lit_gpt.kernels.attention import cudnn_text
from lit_gpt.kernels.backend import Situation, dtype_name, find_cpp_compiler
from lit_gpt.kernels.choice import BACKENDS, auto, resolve
from lit_gpt.kernels.fp8 import missing
from lit_gpt.kernels.products import multiplies_bf16
from lit_gpt.kernels.self_check import self_check
from lit_gpt.kernels.settings import DOCTOR, BackendUnavailable, KernelConfig
from lit_gpt.settings_files import read_settings_file

EXIT_UNUSABLE = 1
GIB = 1 << 30
PACKAGES = {
    "triton": "our own kernels",
    "flash-attn": "attention: flash_attn",
    "flash-attn-3": "attention: fa3",
    "flash-attn-4": "attention: fa4",
    "xformers": "attention: xformers; nothing else is left to use, as since 0.0.34 its SwiGLU is plain torch",
    "torchao": "fp8, and optimizer.name=adamw8bit",
}
"""Distributions -> what they serve."""


def installed(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def find_device(wanted: str) -> torch.device:
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def versions() -> Iterator[str]:
    yield f"python {platform.python_version()}, torch {torch.__version__}, CUDA of torch {torch.version.cuda or 'none'}"
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    yield f"cuDNN {cudnn_text(cudnn) if cudnn else 'none'}"
    for distribution, serves in PACKAGES.items():
        yield f"{distribution} {installed(distribution)} ({serves})"


def hardware(device: torch.device) -> Iterator[str]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        yield (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / GIB:.0f} GiB, "
            f"{properties.multi_processor_count} multiprocessors"
        )
        return
    yield (
        f"CPU with {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, "
        f"AMX {'yes' if torch.cpu._is_amx_tile_supported() else 'no'}, "
        f"bf16 products {'yes' if multiplies_bf16(device) else 'no'}, "
        f"C++ compiler {find_cpp_compiler() or 'none: torch.compile cannot be used'}"
    )


def cuda_notes() -> Iterator[str]:
    """What torch would choose by itself, and a cuDNN that is another than torch's own."""
    if not torch.cuda.is_available():
        return
    yield f"torch's own order of attention kernels: {', '.join(sdpa_order())}"
    yield from shadowed_cudnn(installed_cudnn(), torch.backends.cudnn.version())


def sdpa_order() -> list[str]:
    """What scaled_dot_product_attention tries, the first that can run first."""
    names = {int(value): name.lower() for name, value in SDPBackend.__members__.items()}
    return [names[number] for number in torch._C._get_sdp_priority_order()]


def installed_cudnn() -> str | None:
    """Version of the cuDNN wheel that came with torch."""
    found = (installed(f"nvidia-cudnn-cu{major}") for major in (13, 12))
    return next((each for each in found if each != "not installed"), None)


def shadowed_cudnn(wheel: str | None, loaded: int | None) -> Iterator[str]:
    """wheel: `9.19.0.56`; loaded: as torch gives it, 91900."""
    if wheel is None or loaded is None:
        return
    if not wheel.startswith(cudnn_text(loaded)):
        yield (
            f"warning: torch's wheel brings cuDNN {wheel}, but {cudnn_text(loaded)} is loaded: another one shadows it, "
            f"and attention may be slower. Take it out of LD_LIBRARY_PATH"
        )


def table(situation: Situation) -> Iterator[str]:
    """Every backend with `ok` or `no` and the reason; what auto chooses has a star."""
    for operation, backends in BACKENDS.items():
        chosen = auto(operation, situation)
        yield f"{operation}: auto is {chosen}"
        for name, backend in backends.items():
            reason = backend.missing(situation)
            yield f"  {'*' if name == chosen else ' '} {name:<10} {'ok' if reason is None else f'no: {reason}'}"


def section(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """A part of a run's settings; empty where they do not have it.

    Raises:
        ValueError: it is no mapping.
    """
    given = settings.get(name) or {}
    if not isinstance(given, dict):
        raise ValueError(f"{name}={given!r} must be a mapping of settings")
    return given


def kernels_of(settings: dict[str, Any]) -> KernelConfig:
    """The `kernels` of a run's settings.

    Raises:
        ValueError: an unknown operation or backend.
    """
    given = section(settings, "kernels")
    problems = []
    for operation, name in given.items():
        if operation not in BACKENDS:
            problems.append(f"kernels: {unknown_key(str(operation), list(BACKENDS))}")
        elif name != "auto" and name not in BACKENDS[operation]:
            known = ["auto", *BACKENDS[operation]]
            problems.append(f"kernels.{operation}: {unknown_key(str(name), known, what='backend')}")
    if problems:
        raise ValueError("\n".join(problems))
    return KernelConfig(**given)


def model_of(settings: dict[str, Any]) -> Config:
    """Sizes of a run's last model; the usual ones where its settings name none.

    Raises:
        ValueError: an unknown name or size. DataError, OSError: init_from cannot be read.
    """
    given = {key: value for key, value in section(settings, "model").items() if value is not None}
    known = [field.name for field in dataclasses.fields(Config)]
    problems = [f"model: {unknown_key(str(key), known)}" for key in given if key not in known]
    if problems:
        raise ValueError("\n".join(problems))
    name = given.pop("name", None)
    if name == "init_from":
        return dataclasses.replace(read_config(find_checkpoint(settings.get("init_from") or "")), **given)
    return Config(**given) if name is None else Config.from_name(name, **given)


def situation_of(settings: dict[str, Any], device: torch.device) -> Situation:
    """What a run of these settings would meet on the device, by its last model; `auto` as pretrain's."""
    model = model_of(settings)
    precision = settings.get("precision", "auto")
    is_fp32 = precision == "fp32" or (precision == "auto" and not multiplies_bf16(device))
    compile_ = settings.get("compile", "auto")
    return Situation.on(
        device,
        dtype=torch.float32 if is_fp32 else torch.bfloat16,
        compiled=device.type == "cuda" if compile_ == "auto" else compile_ != "none",
        masked=bool(section(settings, "data").get("document_mask")) or any(map(model.slides, range(model.n_layer))),
        head_sizes=(model.head_size,),
        n_embd=model.n_embd,
    )


def refusals(settings: dict[str, Any], situation: Situation) -> Iterator[str]:
    """What settings beside `kernels` ask for and this machine has not."""
    if settings.get("device") == "cuda" and situation.device_type != "cuda":
        yield "device=cuda cannot be used: torch sees no CUDA device"
    fp8 = settings.get("fp8", "none")
    if fp8 != "none" and (reason := missing(situation)):
        yield f"fp8={fp8} cannot be used: {reason}"


def examine(config: Path | None) -> int:
    """Print the report; returns the exit code."""
    settings = {} if config is None else read_settings_file(config)
    wanted = kernels_of(settings)
    device = find_device(str(settings.get("device", "auto")))
    situation = situation_of(settings, device)
    lines = [*versions(), *hardware(device), *cuda_notes()]
    compiled = "compiled" if situation.compiled else "eager"
    lines += ["", f"on {device.type} in {dtype_name(situation.dtype)}, {compiled}:", *table(situation)]
    sys.stdout.write("\n".join(lines) + "\n\n")
    problems = list(refusals(settings, situation))
    try:
        kernels = resolve(wanted, situation)
        self_check(kernels, situation, device)
        sys.stdout.write(f"kernels: {kernels}; each agrees with its reference\n")
    except BackendUnavailable as error:
        problems.append(str(error).replace(DOCTOR, "the table above"))
    sys.stdout.writelines(f"{problem}\n" for problem in problems)
    return EXIT_UNUSABLE if problems else EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lit_gpt.kernels.doctor", description=__doc__)
    parser.add_argument("--config", type=Path, help="a run's settings; exit code 1 if they name what cannot run here")
    return examine(parser.parse_args(argv).config)


if __name__ == "__main__":
    sys.exit(run_command(main))
