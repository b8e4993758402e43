"""Progress of a preparation on stderr: a bar on a terminal, and elsewhere, as in a job's log, a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import rich.progress

SECS_BETWEEN_LINES = 30.0
SECS_BETWEEN_DRAWINGS = 0.1


class Progress:
    """Counts text, and shows nothing. Use as a context manager.

    total_bytes: of text that there is to read, as far as the sizes of the files tell. n_units: of work.
    """

    def __init__(self, total_bytes: int, n_units: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total_bytes, self.n_units, self.clock = total_bytes, n_units, clock
        self.text_bytes = self.read_bytes = self.units_done = 0
        self.started_secs = clock()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def advance(self, text_bytes: int, read_bytes: int) -> None:
        """text_bytes: that became tokens. read_bytes: of the total that is behind us."""
        self.text_bytes += text_bytes
        self.read_bytes += read_bytes
        self.show()

    def finish_unit(self) -> None:
        self.units_done += 1
        self.show()

    def show(self) -> None:
        pass

    @property
    def elapsed_secs(self) -> float:
        return self.clock() - self.started_secs

    @property
    def speed(self) -> str:
        return f"{self.text_bytes / 1e6 / max(self.elapsed_secs, 1e-3):.1f} MB/s"

    @property
    def remaining(self) -> str:
        """How long it will still take, if it goes on like this."""
        if not self.read_bytes:
            return "-:--:--"
        secs = round(self.elapsed_secs * max(0, self.total_bytes - self.read_bytes) / self.read_bytes)
        return f"{secs // 3600}:{secs // 60 % 60:02d}:{secs % 60:02d}"


class Lines(Progress):
    """One line every half minute."""

    def __init__(
        self,
        total_bytes: int,
        n_units: int,
        clock: Callable[[], float] = time.monotonic,
        stream: TextIO | None = None,
    ) -> None:
        super().__init__(total_bytes, n_units, clock)
        self.stream = sys.stderr if stream is None else stream
        self.next_secs = SECS_BETWEEN_LINES

    def show(self) -> None:
        if self.elapsed_secs < self.next_secs:
            return
        self.next_secs = self.elapsed_secs + SECS_BETWEEN_LINES
        share = self.read_bytes / max(self.total_bytes, 1)
        print(
            f"{self.units_done} of {self.n_units} units, {share:.1%}, {self.text_bytes / 1e6:,.0f} MB of text, "
            f"{self.speed}, {self.remaining} to go",
            file=self.stream,
            flush=True,
        )


class Bar(Progress):
    """A bar that is drawn anew a few times per second."""

    next_secs = 0.0

    def __enter__(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>5.1f} %"))
        figures = TextColumn("{task.fields[figures]}")
        self.display: rich.progress.Progress = RichProgress(*columns, figures, console=Console(stderr=True))
        self.task = self.display.add_task("", total=max(self.total_bytes, 1), figures="")
        self.display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.draw()
        self.display.stop()

    def show(self) -> None:
        if self.elapsed_secs >= self.next_secs:
            self.next_secs = self.elapsed_secs + SECS_BETWEEN_DRAWINGS
            self.draw()

    def draw(self) -> None:
        self.display.update(
            self.task,
            completed=self.read_bytes,
            description=f"{self.units_done}/{self.n_units} units",
            figures=f"{self.text_bytes / 1e6:,.0f} MB  {self.speed}  {self.remaining}",
        )


def choose_progress(total_bytes: int, n_units: int, *, quiet: bool) -> Progress:
    """The display that suits where stderr goes."""
    if quiet or not n_units:
        return Progress(total_bytes, n_units)
    return (Bar if sys.stderr.isatty() else Lines)(total_bytes, n_units)
