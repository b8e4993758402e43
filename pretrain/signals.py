"""What asks a run to stop: signals and limits of time. The loop obeys between two steps, or batches of validation.

Importing this costs nothing: signals are listened to before torch is imported.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.time_limit import TimeLimit
    from pretrain.world import World

REQUEUE = "REQUEUE"
"""File in a run's folder: it stopped before it was done. Batch scripts queue their job again."""
STOPPED_FILE = "PRETRAIN_STOPPED"
"""Environment variable: a file to write in that case, by which a launcher that loses exit codes is told."""

SAVING = "saving at the next step"


class StopRequested(Exception):
    """The run was asked to stop, and all its steps are saved."""


class StopSignal:
    """Context manager that remembers a signal instead of dying of it, and knows the limits of time.

    A second SIGINT or SIGTERM exits at once; batch systems send SIGUSR1 and SIGUSR2 as warnings, as often as they like.
    In a SLURM job SIGTERM is no more than that either: at the time limit slurmd and srun send one each (seen with
    22.05), and SIGKILL follows anyway.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(
        self,
        limits: tuple[TimeLimit, ...] = (),
        clock: Callable[[], float] = time.monotonic,
        env: Mapping[str, str] = os.environ,
    ) -> None:
        self.received: str | None = None
        """What asked first."""
        self.save_secs = 0.0
        """What the longest save took: decides how long before the end of the job's time the run stops."""
        self.limits = limits
        """They may be found later than a signal comes."""
        self.consequence = SAVING
        """Of a signal, for whoever sent it."""
        self._clock = clock
        self._urgent = (signal.SIGINT,) if "SLURM_JOB_ID" in env else (signal.SIGINT, signal.SIGTERM)
        self._urged = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """From now on a signal is remembered."""
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}

    def end_listening(self) -> None:
        """Before the process ends: the interpreter takes handlers back, and a late warning would kill it then."""
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)

    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        for limit in self.limits:
            if self.received is None and self._clock() >= limit.at_secs - limit.saves * self.save_secs:
                self.received = limit.what
        return self.received is not None

    def obey(self, world: World) -> None:
        """Before the first step, where nothing is to be saved; every process must ask.

        Raises:
            StopRequested: any of them was asked to stop.
        """
        if world.any(self.requested()):
            raise self.end()

    def end(self) -> StopRequested:
        """What a run that obeys ends with."""
        return StopRequested(f"stopped by {self.received or 'another process'}; repeat the command to go on")

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number in self._urgent and self._urged:
            sys.exit(128 + number)
        self._urged = self._urged or number in self._urgent
        if self.received is None:
            self.received = signal.Signals(number).name
            again = "; again to exit without saving" if number in self._urgent else ""
            with suppress(OSError, RuntimeError):  # the terminal is gone; or the signal came while stderr was written
                sys.stderr.write(f"\n{self.received}: {self.consequence}{again}\n")


@contextmanager
def marked(out_dir: Path, world: World, env: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Around a run of several processes: leave REQUEUE where it stopped early, and exit as its launcher needs it.

    srun kills the others, and torchrun starts all again, when the first process ends with another code than 0; so
    there a stop looks like an end, and the file tells them apart. Where it cannot be written, srun's first process ends
    with the code after all: the others have saved too.

    Raises:
        StopRequested: nobody would misunderstand the exit code.
    """
    marker = out_dir / REQUEUE
    if world.is_first:
        marker.unlink(missing_ok=True)
    try:
        yield
    except StopRequested as stop:
        told = True
        if world.is_first:
            paths = [marker] * (world.size > 1) + [Path(env[name]) for name in (STOPPED_FILE,) if env.get(name)]
            told = all([_is_written(path, f"{stop}\n") for path in paths])
        if not _looks_like_an_end(world, env) or (world.launcher == "srun" and not told):
            raise
        if world.is_first:
            sys.stderr.write(f"{stop}\n")


def _is_written(path: Path, text: str) -> bool:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:  # a quota, say: the run has saved, and nothing may hide that
        sys.stderr.write(f"warning: {path} cannot be written ({error.strerror}); it would say that the run stopped\n")
        return False
    return True


def _looks_like_an_end(world: World, env: Mapping[str, str]) -> bool:
    restarts_left = world.launcher == "torchrun" and world.attempt < int(env.get("TORCHELASTIC_MAX_RESTARTS") or 0)
    return restarts_left or (world.launcher == "srun" and world.size > 1)
