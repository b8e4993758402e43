"""Bytes that the kernel moves: the right ones, with and without its help, and no fault passed over."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt import copying
from lit_gpt.copying import copy_range, link_or_copy, start_writeback

CONTENT = bytes(range(256)) * 20


def refuse(number: int):
    def raising(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return raising


def copied(folder: Path, src_offset: int, dst_offset: int, n_bytes: int) -> bytes:
    """What a file of dots holds after a range was copied into it."""
    (folder / "src").write_bytes(CONTENT)
    (folder / "dst").write_bytes(b"." * 6000)
    with (folder / "src").open("rb") as src, (folder / "dst").open("r+b") as dst:
        copy_range(src.fileno(), dst.fileno(), src_offset, dst_offset, n_bytes)
    return (folder / "dst").read_bytes()


@pytest.mark.parametrize("in_kernel", [True, False])
@given(src_offset=st.integers(0, 5000), dst_offset=st.integers(0, 7000), n_bytes=st.integers(0, 120))
def test_a_range_goes_where_it_belongs_and_nowhere_else(tmp_path, in_kernel, src_offset, dst_offset, n_bytes):
    expected = bytearray(b"." * 6000)
    expected.extend(bytes(max(0, dst_offset - 6000)) if n_bytes else b"")
    expected[dst_offset : dst_offset + n_bytes] = CONTENT[src_offset : src_offset + n_bytes]
    with pytest.MonkeyPatch.context() as patch:
        if not in_kernel:
            patch.delattr(os, "copy_file_range", raising=False)
        assert copied(tmp_path, src_offset, dst_offset, n_bytes) == bytes(expected)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("n_before", [0, 2])
def test_where_the_kernel_cannot_copy_the_rest_is_read_and_written(tmp_path, monkeypatch, number, n_before):
    calls = []

    def a_few_bytes_then_none(src: int, dst: int, count: int, src_offset: int, dst_offset: int) -> int:
        calls.append(count)
        if len(calls) > n_before:
            raise OSError(number, "cannot")
        return os.pwrite(dst, os.pread(src, 7, src_offset), dst_offset)

    monkeypatch.setattr(os, "copy_file_range", a_few_bytes_then_none, raising=False)
    monkeypatch.setattr(copying, "BUFFER_BYTES", 11)

    assert copied(tmp_path, 3, 100, 1000)[100:1100] == CONTENT[3:1003]
    assert len(calls) == n_before + 1


def test_a_full_disk_is_not_taken_for_a_kernel_that_cannot(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "copy_file_range", refuse(errno.ENOSPC), raising=False)
    with pytest.raises(OSError) as failure:
        copied(tmp_path, 0, 0, 10)
    assert failure.value.errno == errno.ENOSPC


def test_a_source_that_ends_early_is_an_error(tmp_path):
    with pytest.raises(OSError, match="ends 7 bytes early"):
        copied(tmp_path, len(CONTENT) - 3, 0, 10)


def test_a_file_gets_a_second_name(tmp_path):
    (tmp_path / "src").write_bytes(CONTENT)

    assert link_or_copy(tmp_path / "src", tmp_path / "dst")

    assert (tmp_path / "src").samefile(tmp_path / "dst")


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_a_file_cannot_have_a_second_name_it_is_copied(tmp_path, monkeypatch, number):
    (tmp_path / "src").write_bytes(CONTENT)
    (tmp_path / "src").chmod(0o640)
    monkeypatch.setattr(os, "link", refuse(number))
    announced: list[int] = []

    assert not link_or_copy(tmp_path / "src", tmp_path / "dst", announced.append)

    assert announced == [len(CONTENT)]
    assert (tmp_path / "dst").read_bytes() == CONTENT and (tmp_path / "dst").stat().st_mode & 0o777 == 0o640
    assert not (tmp_path / "src").samefile(tmp_path / "dst")


def test_advice_that_the_system_does_not_take_is_no_fault(tmp_path, monkeypatch):
    with (tmp_path / "file").open("wb") as file:
        file.write(CONTENT)
        start_writeback(file.fileno(), 0, len(CONTENT))
        monkeypatch.setattr(os, "posix_fadvise", refuse(errno.EINVAL), raising=False)
        start_writeback(file.fileno(), 0, len(CONTENT))
        monkeypatch.delattr(os, "posix_fadvise")
        start_writeback(file.fileno(), 0, len(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT
