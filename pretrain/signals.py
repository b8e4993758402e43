"""SIGINT and SIGTERM ask a run to stop; the loop obeys at the next step boundary."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any


class StopRequested(Exception):
    """The run was asked to stop and has saved a checkpoint."""


class StopSignal:
    """Context manager that remembers a signal instead of dying of it. A second one exits at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            sys.exit(128 + number)
        self.received = signal.Signals(number).name
        sys.stderr.write(f"\n{self.received}: saving at the next step; again to exit without saving\n")
