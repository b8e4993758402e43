"""What a measurement ran on, recorded beside every number without naming the host; and what it took of memory."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

# bf16 matrix units and instructions, which decide how fast a CPU trains
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")


def describe() -> dict[str, object]:
    """CPU model, cores this process may use, its bf16 flags, memory, versions, and the date (UTC)."""
    cpu, flags = _cpu()
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": _version("torch"),
        "numpy": _version("numpy"),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def own_memory(key: str) -> int:
    """A line of /proc/self/status, in bytes: VmRSS, or VmHWM, its peak. That of getrusage begins with the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _cpu() -> tuple[str, set[str]]:
    """Model name and feature flags; Linux tells both, elsewhere the name alone is known."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    return fields.get("model name", platform.machine()), set(fields.get("flags", fields.get("Features", "")).split())


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    import json

    print(json.dumps(describe(), indent=2))
