"""How much memory this process may still take, by the machine and by its control group."""

from __future__ import annotations

from pathlib import Path

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def available_memory(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int | None:
    """Bytes that can be had without swapping: what machine and control group still have. None: not known."""
    found = [_machine_bytes(meminfo), _cgroup_bytes(cgroup)]
    return min((each for each in found if each is not None), default=None)


def _machine_bytes(meminfo: Path) -> int | None:
    if not meminfo.is_file():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    available = fields.get("MemAvailable")
    return None if available is None else int(available.split()[0]) * 1024


def _cgroup_bytes(cgroup: Path) -> int | None:
    """Limit less use, in control groups of version 2 and 1; page cache that can be dropped is not counted as used."""
    names = {"memory.max": "memory.current", "memory/memory.limit_in_bytes": "memory/memory.usage_in_bytes"}
    for limit_name, used_name in names.items():
        limit, used = cgroup / limit_name, cgroup / used_name
        if not limit.is_file() or not used.is_file():
            continue
        text = limit.read_text().strip()
        if text == "max" or int(text) >= 1 << 60:  # version 1 says so with a number near 2 ** 63
            return None
        stat = limit.with_name("memory.stat")
        fields = dict(line.split() for line in stat.read_text().splitlines()) if stat.is_file() else {}
        return int(text) - int(used.read_text()) + int(fields.get("inactive_file", 0))
    return None
