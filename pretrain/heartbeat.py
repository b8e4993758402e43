"""A run's sign of life: one small file that says what it does and since when, for `pretrain status`."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

HEARTBEAT_FILE = "heartbeat.json"
EVERY_SECS = 3.0
ENDED = "ended"
"""What a run does last, when it is not killed."""
JOB_VARIABLE = "SLURM_JOB_ID"


class Heartbeat:
    """Rewrites the file when the run does something else, and every few seconds while it goes on with the same.

    It is there as a whole or not at all, but not synced: losing it costs nothing. A disk that refuses it stops no run.
    What `check` raises does; it is called before the file is written.
    """

    def __init__(
        self,
        folder: Path,
        clock: Callable[[], float] = time.time,
        env: Mapping[str, str] = os.environ,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._path = folder / HEARTBEAT_FILE
        self._clock = clock
        self._check = check
        self._owner = {"pid": os.getpid(), "host": socket.gethostname(), "job": env.get(JOB_VARIABLE)}
        self._doing, self._written = "", -EVERY_SECS
        self._facts: dict[str, Any] = {}

    def beat(self, doing: str, **facts: Any) -> None:
        """The run is alive and does this. facts: what else the file says, from now on."""
        now = self._clock()
        self._facts |= facts
        if doing == self._doing and now - self._written < EVERY_SECS:
            return
        self._check()
        self._doing, self._written = doing, now
        record = {"time": now, "doing": doing, **self._facts, **self._owner}
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        with suppress(OSError):
            temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
            temporary.replace(self._path)


def read_heartbeat(folder: Path) -> dict[str, Any] | None:
    """What the file says; None where there is none that can be read."""
    try:
        record = json.loads((folder / HEARTBEAT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "time" in record and "doing" in record else None
