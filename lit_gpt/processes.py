"""What several processes do together, so that all of them learn when one of them fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Processes(Protocol):
    """One process or several. Every one of them must make the same calls in the same order."""

    @property
    def rank(self) -> int:
        """This one's number, from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    @property
    def group(self) -> Any:
        """Their process group; None is torch's default."""

    def broadcast(self, value: Any) -> Any:
        """What the first process passes, on every process."""

    def gather(self, value: Any) -> list[Any]:
        """What every process passes, by rank, on every process."""


@dataclass(frozen=True)
class OneProcess:
    """A single process, which talks to nobody."""

    rank: int = 0
    size: int = 1
    group: Any = None

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]


ONE_PROCESS = OneProcess()


@dataclass(frozen=True)
class _Outcome:
    """What came of some work: a value, or an error that can be sent."""

    value: Any = None
    error: Exception | None = None


def first(processes: Processes, work: Callable[[], T]) -> T:
    """What `work` returns on the first process, which alone does it; every process raises what it raises there."""
    if processes.size == 1:
        return work()
    own = _attempt(work) if processes.rank == 0 else None
    outcome = processes.broadcast(own)
    return _value(own or outcome)


def together(processes: Processes, work: Callable[[], T]) -> list[T]:
    """What `work` returns on every process, by rank; if it raises on any, every process raises."""
    if processes.size == 1:
        return [work()]
    own = _attempt(work)
    outcomes = processes.gather(own)
    _value(own)  # with its own traceback
    return [_value(outcome) for outcome in outcomes]


def _attempt(work: Callable[[], T]) -> _Outcome:
    try:
        return _Outcome(value=work())
    except Exception as error:
        return _Outcome(error=error)


def _value(outcome: _Outcome) -> Any:
    if outcome.error is not None:
        raise outcome.error
    return outcome.value
