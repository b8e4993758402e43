"""Timing that neighbours disturb alike: what is compared takes turns, and ratios are taken within a turn."""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from benchmarks.machine import describe

Key = TypeVar("Key")


@dataclass(frozen=True)
class Sample:
    """What one call took."""

    cpu_secs: float
    """Of all threads of this process."""
    secs: float
    """By the clock; on a GPU until it has finished."""
    peak_bytes: int | None
    """Of a GPU's memory, beyond what was held before; None on a CPU."""


def circumstances(device: torch.device, turns: int, **versions: Any) -> dict[str, Any]:
    """What every record says of how it was measured; `versions` are of what else took part."""
    return {
        "device": str(device),
        "clock": clock(device),
        "turns": turns,
        "threads": torch.get_num_threads(),
        "machine": {**describe(), **versions, "load_average": os.getloadavg()},
    }


def find_device(name: str | None) -> torch.device:
    """By default the GPU where there is one.

    Raises:
        ValueError: CUDA was asked for, and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device; leave it out")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def device_key(device: torch.device) -> str:
    """What results of one kind of machine are stored under."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"threads={torch.get_num_threads()}"


def clock(device: torch.device) -> str:
    """The field of a sample to compare: neighbours hardly change CPU time, and a GPU's work is no CPU time."""
    return "secs" if device.type == "cuda" else "cpu_secs"


def timed(function: Callable[[], object], device: torch.device) -> Sample:
    """One call."""
    is_cuda = device.type == "cuda"
    held = 0
    if is_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    if is_cuda:
        torch.cuda.synchronize(device)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Sample(cpu, wall, torch.cuda.max_memory_allocated(device) - held if is_cuda else None)


def in_turns(
    tasks: Mapping[Key, Callable[[], object]], turns: int, device: torch.device, *, say_turns: bool = True
) -> dict[Key, list[Sample]]:
    """Every task once in each turn, in an order that changes, so that none always follows the same one."""
    samples: dict[Key, list[Sample]] = {key: [] for key in tasks}
    for turn in range(turns):
        if say_turns:
            say(f"turn {turn + 1} of {turns}")
        for key in random.Random(turn).sample(list(tasks), len(tasks)):
            samples[key].append(timed(tasks[key], device))
    return samples


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    values = list(values)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "q1": low, "q3": high}


def spread_of_ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Of one turn's numbers each."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def say(text: str) -> None:
    """Progress, beside the result."""
    print(text, file=sys.stderr, flush=True)
