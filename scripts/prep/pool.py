"""Worker processes for units: one that dies is noticed, and its unit named; none outlives the command."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any

from lit_gpt.errors import EXIT_STOPPED, DataError
from lit_gpt.tokenizer import Tokenizer
from prep.progress import Progress
from prep.units import Unit, run_unit

SECS_BETWEEN_REPORTS = 0.2
SECS_TO_STOP = 10.0
DONE = "done"


def run_units(units: list[Unit], tokenizer: Tokenizer, workers: int, progress: Progress) -> None:
    """Run all units, in this process or in several. The output does not depend on how many.

    Raises:
        DataError: a file is damaged, or a worker was killed. OSError: what the system refused, such as room.
        KeyboardInterrupt: a worker was asked to stop.
    """
    if min(workers, len(units)) <= 1:
        for unit in units:
            run_unit(unit, tokenizer, progress.advance)
            progress.finish_unit()
        return
    pool = [_Worker(units[0].out) for _ in range(min(workers, len(units)))]
    try:
        with _interrupts_ignored():
            for worker in pool:
                worker.process.start()
                worker.far_end.close()  # so that reading ends when the worker does
        _share_out(units, pool, progress)
        for worker in pool:  # no unit is left, so they leave by themselves
            worker.process.join(SECS_TO_STOP)
    finally:
        _stop(pool)


class _Worker:
    """A process of the pool, as seen from outside."""

    def __init__(self, out: str) -> None:
        context = multiprocessing.get_context("spawn")  # forking a process with threads of a tokenizer may deadlock
        self.connection, self.far_end = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_work, args=(self.far_end, out), daemon=True)
        self.unit: Unit | None = None

    def give(self, unit: Unit | None) -> None:
        self.unit = unit
        try:
            self.connection.send(unit)
        except OSError:  # it has died, which the next look at it will tell
            pass

    def news(self) -> Any:
        """What the worker has to say.

        Raises:
            DataError: it died. KeyboardInterrupt: it was asked to stop.
        """
        try:
            return self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(SECS_TO_STOP)
            code = self.process.exitcode
            if code in (EXIT_STOPPED, -signal.SIGTERM):
                raise KeyboardInterrupt from error
            raise DataError(self._obituary(code)) from error

    def _obituary(self, code: int | None) -> str:
        death = f"ended with exit status {code}"
        if code is not None and code < 0:
            death = f"was killed by {signal.Signals(-code).name}"
        where = f"unit {self.unit.number} ({self.unit.files[0].name} and on)" if self.unit else "no unit"
        advice = "; if memory ran out, with fewer --workers" if code == -signal.SIGKILL else ""
        return f"a worker {death} at work on {where}. What is finished is kept; repeat the command{advice}"


def _share_out(units: list[Unit], pool: list[_Worker], progress: Progress) -> None:
    waiting = iter(units)
    for worker in pool:
        worker.give(next(waiting, None))
    while busy := {worker.connection: worker for worker in pool if worker.unit is not None}:
        for connection in wait(list(busy)):
            _hear(busy[connection], waiting, progress)


def _hear(worker: _Worker, waiting: Iterator[Unit], progress: Progress) -> None:
    news = worker.news()
    if isinstance(news, BaseException):
        raise news
    if news == DONE:
        progress.finish_unit()
        worker.give(next(waiting, None))
    else:
        progress.advance(*news)


def _stop(pool: list[_Worker]) -> None:
    """End all workers; those at work remove what they have not finished."""
    started = [worker.process for worker in pool if worker.process.pid is not None]
    for process in started:
        process.terminate()
    deadline_secs = time.monotonic() + SECS_TO_STOP
    for process in started:
        process.join(max(0.0, deadline_secs - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes that are started inside ignore a Ctrl-C for good: it is for us, and we tell them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Reports:
    """Passes progress on, but not more often than anybody wants to know."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.text_bytes = self.read_bytes = 0
        self.next_secs = 0.0

    def advance(self, text_bytes: int, read_bytes: int) -> None:
        self.text_bytes += text_bytes
        self.read_bytes += read_bytes
        if time.monotonic() >= self.next_secs:
            self.send()

    def send(self) -> None:
        self.connection.send((self.text_bytes, self.read_bytes))
        self.text_bytes = self.read_bytes = 0
        self.next_secs = time.monotonic() + SECS_BETWEEN_REPORTS


def _work(connection: Connection, out: str) -> None:
    """What a worker does: unit by unit, until there is none."""
    signal.signal(signal.SIGTERM, _leave)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_die_with_parent, daemon=True).start()
    tokenizer = Tokenizer.load(Path(out))
    reports = _Reports(connection)
    while (unit := connection.recv()) is not None:
        try:
            run_unit(unit, tokenizer, reports.advance)
        except (DataError, ValueError, OSError) as error:
            connection.send(error)
            return
        reports.send()
        connection.send(DONE)


def _leave(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one would disturb tidying up
    raise SystemExit(EXIT_STOPPED)


def _die_with_parent() -> None:
    """Without this, the workers of a killed run finish their units, while the next run is at work on them."""
    multiprocessing.parent_process().join()
    os._exit(1)
