"""What a backend is, what it may need, and how that is found out. Nothing is asked before a model is built."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

Op = TypeVar("Op")
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Situation:
    """What decides which backends can run."""

    device_type: str = "cpu"
    """cpu or cuda."""
    dtype: torch.dtype = torch.float32
    """In which blocks compute."""
    compiled: bool = False
    """Whether torch.compile sees the blocks."""
    masked: bool = False
    """Whether attention is asked for more than causality: documents kept apart, or a window."""
    head_sizes: tuple[int, ...] = (64,)
    """Of all models of a run."""
    n_embd: int = 2048
    """The largest one."""
    capability: tuple[int, int] | None = None
    """Of the CUDA device: (9, 0) is sm_90."""
    cudnn: int | None = None
    """As torch gives it: 91501 is 9.15.1."""

    @classmethod
    def on(cls, device: torch.device, **known: Any) -> Situation:
        """A situation on a device of this machine; `known` are the other fields."""
        if device.type == "cuda":
            known |= {
                "capability": torch.cuda.get_device_capability(device),
                "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
            }
        return cls(device.type, **known)


Need = Callable[[Situation], str | None]
"""What is missing, as a sentence without a subject; None if nothing is."""


def first_missing(needs: Iterable[Need], situation: Situation) -> str | None:
    """The first thing that is needed and is not there; None if nothing is."""
    return next((reason for need in needs if (reason := need(situation))), None)


@dataclass(frozen=True)
class Backend(Generic[Op]):
    """One implementation of an operation."""

    op: Op
    needs: tuple[Need, ...] = ()
    prepare: Callable[[], object] = lambda: None
    """Called when it is chosen."""

    def missing(self, situation: Situation) -> str | None:
        """The first thing that it needs and has not; None if it can run."""
        return first_missing(self.needs, situation)


def cuda(least: tuple[int, int], majors: tuple[int, ...] = ()) -> Need:
    """A CUDA device of compute capability `least` or newer; `majors`: of one of these major versions alone."""

    def need(situation: Situation) -> str | None:
        if situation.device_type != "cuda" or situation.capability is None:
            return f"needs a CUDA device, this run is on {situation.device_type}"
        found = "sm_{}{}".format(*situation.capability)
        if majors and situation.capability[0] not in majors:
            return f"needs a GPU of {' or '.join(f'sm_{major}x' for major in majors)}, this one is {found}"
        if situation.capability < least:
            return "needs a GPU of sm_{}{} or newer, this one is {}".format(*least, found)
        return None

    return need


def half_precision(situation: Situation) -> str | None:
    if situation.dtype in HALF:
        return None
    return f"computes in bf16 and fp16 only, this run computes in {dtype_name(situation.dtype)}; use precision=bf16"


def at_most_fp32(situation: Situation) -> str | None:
    return "computes in fp32 at most, this run in fp64" if situation.dtype == torch.float64 else None


def no_mask(situation: Situation) -> str | None:
    if not situation.masked:
        return None
    return "knows no mask, and this run keeps documents apart or has a sliding window; use sdpa or math"


def head_size(largest: int) -> Need:
    def need(situation: Situation) -> str | None:
        odd = [size for size in situation.head_sizes if size % 8 or size > largest]
        return f"needs a head_size that 8 divides, {largest} at most; this model has {odd[0]}" if odd else None

    return need


def package(module: str, install: str) -> Need:
    """An installed package whose import succeeds; `install` is how to get it."""

    def need(_: Situation) -> str | None:
        if importlib.util.find_spec(module.split(".")[0]) is None:
            return f"needs the package {module}; {install}"
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:  # a library of another CUDA, a part that was not built
            return f"needs the package {module}, whose import fails ({' '.join(str(error).split())}); {install}"
        return None

    return need


def interprets_triton() -> bool:
    """Whether Triton's kernels run in its interpreter: slow, in plain Python, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_runs(situation: Situation) -> str | None:
    """Our Triton kernels: a GPU or the interpreter, and the package."""
    if not interprets_triton() and (reason := cuda((8, 0))(situation)):
        return reason
    return package("triton", "it comes with torch's CUDA builds, elsewhere: pip install 'lit-grow[triton]'")(situation)


def find_cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile would use on a CPU."""
    return next(
        (found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := shutil.which(name))), None
    )


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `bf16`."""
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
