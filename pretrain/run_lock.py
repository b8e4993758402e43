"""One process at a time trains in a run's folder, and run.lock says which."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from lit_gpt.errors import DataError
from pretrain.signals import StopRequested

LOCK_FILE = "run.lock"
BEAT_SECS = 10  # between two heartbeats: the lock file's time of change
DEAD_SECS = 60  # without one, nobody is there any more
LOCK_TRIES = 5  # `pretrain status` holds a lock for a moment to see whether somebody else does
TAKE_OVER = "--take-over"
LOST = frozenset({errno.ENOENT, errno.ESTALE})
_held: dict[Path, tuple[IO[str], str]] = {}
"""Of this process, as the system's locks are: lock file -> that file as it was opened, and what was written into it."""
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})


class TakenOver(DataError):
    """A run's folder belongs to somebody else by now."""


@dataclass(frozen=True)
class Owner:
    """Who holds a run's folder."""

    host: str
    pid: int
    job: str | None
    """The batch system's number of the job."""
    since: float
    """Seconds since 1970."""

    @classmethod
    def here(cls, env: Mapping[str, str] = os.environ) -> Owner:
        return cls(socket.gethostname(), os.getpid(), env.get("SLURM_JOB_ID"), time.time())

    def describe(self) -> str:
        job = f" of job {self.job}" if self.job else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        return f"process {self.pid}{job} on {self.host}, since {since}"


@contextmanager
def run_lock(folder: Path, *, take_over: bool = False, stopped: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Hold a run's folder.

    The system's own lock decides wherever it is seen; the process that holds it dies with it. Where it is not (several
    network file systems keep it to one node, or have none), the heartbeat does: an owner on another node counts as
    gone when its lock file has not changed for DEAD_SECS, which is waited for, or when it was this same job, which the
    batch system started again. `take_over` is for a server that still keeps the lock of a node that is gone. `stopped`
    is asked while waiting.

    Raises:
        DataError: somebody else holds it. OSError: the folder cannot be written. StopRequested: `stopped` said so.
    """
    path = folder / LOCK_FILE
    if take_over and path.exists():
        _refuse_neighbour(path)
        sys.stderr.write(f"warning: {TAKE_OVER}: {path} is taken from {_told(read_owner(path))}\n")
        path.unlink()  # whoever holds the old file holds a file without a name
    with path.open("a+") as file:
        locked = _lock(file, path)
        _refuse_living_owner(path, locked, stopped)
        text = json.dumps(asdict(Owner.here()))
        _write(file, text)
        _held[path] = (file, text)
        try:
            with _heartbeat(file):
                yield
        finally:
            del _held[path]
            with suppress(OSError):  # a full disk, say; the heartbeat has stopped anyway
                _write(file, "")


def is_lost(folder: Path) -> bool:
    """Whether somebody took over a folder that this process holds: it may have been stopped, or cut off, for long."""
    path = folder / LOCK_FILE
    if path not in _held:
        return False
    file, text = _held[path]
    try:
        is_same = os.path.samestat(os.fstat(file.fileno()), path.stat())
        return not is_same or path.read_text(encoding="utf-8") != text
    except OSError as error:
        return error.errno in LOST  # a file system that is away for a while says nothing


def check_held(folder: Path) -> None:
    """Before anything is written into a run's folder.

    Raises:
        TakenOver: this process held it, and somebody took it over.
    """
    if is_lost(folder):
        raise TakenOver(
            f"{folder} was taken over while this process held it: {_told(read_owner(folder / LOCK_FILE))}; nothing "
            f"more is written here. See how that one is doing: pretrain status {folder}"
        )


def _refuse_neighbour(path: Path) -> None:
    """A process of this node that holds the lock is no dead node's, even if it is stopped and silent."""
    owner = read_owner(path)
    if owner is None or owner.host != socket.gethostname():
        return
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{TAKE_OVER}: {path.parent} is held on this node by {owner.describe()}, which lives, though it may be "
                f"stopped; end it first (kill -9 {owner.pid}), then repeat the command without {TAKE_OVER}"
            ) from error
        except OSError:  # a file system without locks
            return


def _lock(file: IO[str], path: Path) -> bool:
    """Whether the system's lock could be taken; False where there are none."""
    for tries_left in reversed(range(LOCK_TRIES)):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if not tries_left:
                raise _refusal(path, "holds its lock") from error
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            sys.stderr.write(
                f"warning: {path.parent} is on a file system without locks; only {LOCK_FILE} guards the run\n"
            )
            return False
    if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        raise _refusal(path, f"has just taken it over with {TAKE_OVER}")
    return True


def _refuse_living_owner(path: Path, locked: bool, stopped: Callable[[], bool]) -> None:
    """With the lock in hand, an owner on this node is gone; one on another node may not have seen it taken."""
    owner = read_owner(path)
    if (
        owner is None
        or (owner.host == socket.gethostname() and locked)
        or (owner.job and owner.job == Owner.here().job)
    ):
        return
    silent_secs = _await_sign_of_life(path, owner, stopped)
    if silent_secs <= DEAD_SECS:
        raise _refusal(path, f"gave a sign of life {silent_secs:.0f} s ago")
    sys.stderr.write(
        f"warning: {path.parent} was held by {owner.describe()}, which gave its last sign of life "
        f"{silent_secs:.0f} s ago; it counts as gone after {DEAD_SECS} s\n"
    )


def _await_sign_of_life(path: Path, owner: Owner, stopped: Callable[[], bool]) -> float:
    """Seconds since the last heartbeat, once there was another one, or they are too many.

    A job that was killed leaves a young file, and the next one of a chain may start at once.
    """
    before, silent_secs = _touched(path), silence(path)
    if silent_secs <= DEAD_SECS:
        sys.stderr.write(f"{path.parent} was held by {owner.describe()}; waiting for a sign of life\n")
    while silent_secs <= DEAD_SECS and _touched(path) == before:
        if stopped():
            raise StopRequested(f"stopped while {path.parent} was held by {owner.describe()}; repeat the command")
        time.sleep(1)
        silent_secs = silence(path)
    return silent_secs


def _refusal(path: Path, why: str) -> DataError:
    return DataError(
        f"another process trains in {path.parent} and {why}: {_told(read_owner(path))}; last sign of life "
        f"{silence(path):.0f} s ago. Wait for it, stop it, or choose another out_dir. If you know that it is gone "
        f"(its node died, say; it gives a sign of life every {BEAT_SECS} s): {TAKE_OVER}"
    )


def _told(owner: Owner | None) -> str:
    return "an unknown process" if owner is None else owner.describe()


def read_owner(path: Path) -> Owner | None:
    """Who a lock file names; None if it names nobody that can be understood."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def silence(path: Path) -> float:
    """Seconds since the last heartbeat, by the clock of the file system: nodes' clocks differ."""
    probe = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        probe.touch()
        return max(0.0, probe.stat().st_mtime - _touched(path))
    finally:
        probe.unlink(missing_ok=True)


def _touched(path: Path) -> float:
    """When a file was last changed; it is opened, as NFS may answer from memory otherwise."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:  # being taken over
        return time.time()


def _write(file: IO[str], text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()


@contextmanager
def _heartbeat(file: IO[str]) -> Iterator[None]:
    """Touch the lock file every BEAT_SECS: what holds the folder is alive, whether or not it makes progress.

    The file that was opened, not its name: if somebody took that over, its life is another's to show.
    """
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECS):
            try:
                os.utime(file.fileno())
            except OSError:  # a file system that is away for a while
                continue

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
