"""Devices by name: their peak rate and memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What the maker's data sheet says."""

    flops_per_sec: float
    """Dense bf16 matrix products."""
    memory_bytes: float


DEVICES = {
    "a100-40g": Device(312e12, 40e9),
    "a100": Device(312e12, 80e9),
    "h100": Device(989e12, 80e9),
    "h200": Device(989e12, 141e9),
    "b200": Device(2250e12, 180e9),
    "l40s": Device(362e12, 48e9),
    "mi300x": Device(1307e12, 192e9),
    "rtx4090": Device(165e12, 24e9),
}


def peak_flops_per_sec(name: str) -> float | None:
    """Of the GPU that torch calls so, e.g. `NVIDIA H100 80GB HBM3`; None: it is not in the list."""
    joined = name.lower().replace(" ", "")
    return next((device.flops_per_sec for key, device in DEVICES.items() if key in joined), None)
