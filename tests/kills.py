"""Children of a process that are killed before any call to the file system that Python makes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable


def start_child(work: Callable[[], object], before: Callable[[], object] = lambda: None) -> int:
    """A fork that does `before` and then `work` and ends with 0; returns its process id."""
    child = os.fork()
    if child == 0:
        before()
        work()
        os._exit(0)
    return child


def kill_at(event_number: int) -> None:
    """From now on, SIGKILL to this process before its call of that number to the file system, counted from 1."""
    seen = 0

    def hook(event: str, _: object) -> None:
        nonlocal seen
        seen += event == "open" or event.startswith(("os.", "shutil."))
        if seen == event_number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
