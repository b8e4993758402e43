"""One piece of work in a thread while training goes on, and what came of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pretrain.world import World


class BackgroundWork:
    """Work that has begun. Every process has its share of it, and it fails on all of them or on none.

    Args:
        work: what to do.
        world: the processes; only its main-thread collectives are used here.
    """

    def __init__(self, work: Callable[[], None], world: World) -> None:
        self._work = work
        self._world = world
        self._error: Exception | None = None
        self.seconds = 0.0
        """How long it took."""
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            self._work()
        except Exception as error:  # for `result`, which raises it where somebody listens
            self._error = error
        self.seconds = time.perf_counter() - started

    def is_done(self) -> bool:
        """Whether it has ended on every process; every process must ask."""
        return not self._world.any(self._thread.is_alive())

    def result(self) -> None:
        """Wait until it has ended here, and raise what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
