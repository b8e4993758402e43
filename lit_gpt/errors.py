"""How a command fails: one clear message on stderr and an exit code that a shell script can act on."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_DATA = 3
EXIT_NON_FINITE = 4
EXIT_INTERRUPTED = 130  # what shells report after Ctrl-C
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped with nothing lost, run the same command again


class DataError(RuntimeError):
    """A data file or a checkpoint is damaged, missing a part, or does not fit what it is used with."""


class NonFiniteError(RuntimeError):
    """Training met a loss or a gradient that is not a number."""


def exit_code(error: BaseException) -> int:
    """What a command that fails with this error exits with."""
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, NonFiniteError):
        return EXIT_NON_FINITE
    if isinstance(error, DataError | OSError):
        return EXIT_DATA
    return EXIT_USAGE


def explain(error: BaseException) -> str:
    """An error as one line for a user."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if error.errno == errno.ENOSPC:
        return f"{what}. The disk is full; nothing was published. Free some space and repeat the command"
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"{what}. Change its permissions, or choose another place"
    return what


def run_command(main: Callable[[], int | None]) -> int:
    """Run `main`; turn the errors that are meant for users into one message and an exit code.

    ValueError is a setting (2), DataError and OSError a file (3), NonFiniteError a diverged run (4). Any other
    exception is a fault of ours and keeps its traceback.
    """
    # OpenMP threads that spin at barriers lose most of their speed to any other busy process; read when torch loads it
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return main() or EXIT_OK
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the interpreter flushes it at exit)
        return EXIT_OK
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return EXIT_INTERRUPTED
    except (ValueError, DataError, NonFiniteError, OSError) as error:
        sys.stderr.write(f"error: {explain(error)}\n")
        return exit_code(error)
