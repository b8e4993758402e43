"""How much memory this process may still take, by the machine and by its control group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MEMINFO, CGROUP, OWN_GROUPS = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
LIMITS = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}
"""Names of limit and use, in control groups of version 2 and 1."""


def available_memory(meminfo: Path = MEMINFO, cgroup: Path = CGROUP, own_groups: Path = OWN_GROUPS) -> int | None:
    """Bytes that can be had without swapping: what machine and control groups still have. None: not known."""
    found = [_machine_bytes(meminfo), *map(_group_bytes, _groups(cgroup, own_groups))]
    return min((each for each in found if each is not None), default=None)


def _machine_bytes(meminfo: Path) -> int | None:
    if not meminfo.is_file():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    available = fields.get("MemAvailable")
    return None if available is None else int(available.split()[0]) * 1024


def _groups(cgroup: Path, own_groups: Path) -> Iterator[Path]:
    """Folders of the control groups that this process is in, out to the outermost: a job's limit is on one of them.

    A container often shows its own group as the outermost one, and not where /proc says that it is.
    """
    lines = own_groups.read_text().splitlines() if own_groups.is_file() else []
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    for root, controllers in ((cgroup, ""), (cgroup / "memory", "memory")):
        group = root / paths.get(controllers, "/").strip("/")
        yield from (each for each in (group, *group.parents) if each.is_relative_to(root))


def _group_bytes(group: Path) -> int | None:
    """Limit less use; page cache that can be dropped is not counted as used."""
    for limit_name, used_name in LIMITS.items():
        limit, used = group / limit_name, group / used_name
        if not limit.is_file() or not used.is_file():
            continue
        text = limit.read_text().strip()
        if text == "max" or int(text) >= 1 << 60:  # version 1 says so with a number near 2 ** 63
            return None
        stat = group / "memory.stat"
        fields = dict(line.split() for line in stat.read_text().splitlines()) if stat.is_file() else {}
        return int(text) - int(used.read_text()) + int(fields.get("inactive_file", 0))
    return None
