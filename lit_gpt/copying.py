"""Bytes from one file into another by the kernel: linked, shared or copied, whatever the file system can do."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

STEP_BYTES = 1 << 26  # in one call to the kernel: signals are served in between
BUFFER_BYTES = 1 << 20  # where the kernel does not copy
FLUSH_BYTES = 1 << 26  # written before the disk is told to begin; the best of 64 MB, 256 MB and never, if not by much
_CANNOT = frozenset(
    {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.EMLINK}
)


def copy_range(src: int, dst: int, src_offset: int, dst_offset: int, n_bytes: int) -> None:
    """Copy a range of an open file into another one; where the file system shares blocks, none is written.

    Args:
        src: file descriptor to read from.
        dst: file descriptor to write to.
        src_offset: first byte of the range.
        dst_offset: where it goes.
        n_bytes: its length.

    Raises:
        OSError: either file refused, or `src` ends before the range does.
    """
    done = _copy_in_kernel(src, dst, src_offset, dst_offset, n_bytes)
    while done < n_bytes:
        piece = os.pread(src, min(BUFFER_BYTES, n_bytes - done), src_offset + done)
        if not piece:
            raise OSError(errno.EIO, f"the source ends {n_bytes - done:,} bytes early; it was changed meanwhile")
        write_at(dst, piece, dst_offset + done)
        done += len(piece)


def _copy_in_kernel(src: int, dst: int, src_offset: int, dst_offset: int, n_bytes: int) -> int:
    """Bytes that were copied: all, or fewer where the kernel or the file system cannot."""
    copy = getattr(os, "copy_file_range", None)  # Linux only
    done = 0
    while copy is not None and done < n_bytes:
        try:
            copied = copy(src, dst, min(STEP_BYTES, n_bytes - done), src_offset + done, dst_offset + done)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            copied = 0
        if not copied:
            break
        done += copied
    return done


def write_at(dst: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at a place of an open file."""
    view = memoryview(data)
    while view.nbytes:
        written = os.pwrite(dst, view, offset)
        view, offset = view[written:], offset + written


def link_or_copy(src: Path, dst: Path, before_copy: Callable[[int], None] = lambda n_bytes: None) -> bool:
    """Give a file a second name; where that is impossible, copy it. Returns whether it is a link.

    Args:
        src: the file, which nobody may change in place from then on.
        dst: the new name.
        before_copy: called with the number of bytes before they are copied.
    """
    try:
        os.link(src.resolve(), dst)
        return True
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    with src.open("rb") as source, dst.open("xb") as target:
        n_bytes = os.fstat(source.fileno()).st_size
        before_copy(n_bytes)
        copy_range(source.fileno(), target.fileno(), 0, 0, n_bytes)
    shutil.copymode(src, dst)
    return False


class Flusher:
    """Has what was written so far put on the disk by a thread, while more is being written.

    Without it the disk idles until the file is complete and the writer waits for all of it then.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None
        self._unflushed_bytes = 0

    def __enter__(self) -> Flusher:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def wrote(self, descriptor: int, n_bytes: int) -> None:
        """Tell of bytes written to an open file.

        Raises:
            OSError: bytes written earlier did not reach the disk.
        """
        self._unflushed_bytes += n_bytes
        if self._unflushed_bytes < FLUSH_BYTES or (self._running is not None and not self._running.done()):
            return
        self.wait()
        self._unflushed_bytes = 0
        self._running = self._pool.submit(getattr(os, "fdatasync", os.fsync), descriptor)

    def wait(self) -> None:
        """Until nothing is under way; call it before a file is closed."""
        if self._running is not None:
            running, self._running = self._running, None
            running.result()
