"""Bytes from one file into another by the kernel: linked, shared or copied, whatever the file system can do."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

STEP_BYTES = 1 << 26  # in one call to the kernel: signals are served in between
BUFFER_BYTES = 1 << 20  # where the kernel does not copy
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


def start_writeback(descriptor: int, offset: int, n_bytes: int) -> None:
    """Have the disk begin with bytes that were just written, instead of idling until the file is complete.

    This is advice that a system may not know; it waits for nothing and makes nothing durable, which takes an fsync.
    """
    advise = getattr(os, "posix_fadvise", None)  # not on macOS
    if advise is not None:
        with suppress(OSError):
            # Linux starts to write dirty pages of the range, and drops from memory only those that are written already
            advise(descriptor, offset, n_bytes, os.POSIX_FADV_DONTNEED)
