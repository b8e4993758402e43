"""LITPKDS files: the exact bytes, round trips, and damage that is named; manifests that cannot be read."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lit_gpt.packed_dataset as packed_dataset
from lit_gpt.errors import DataError
from lit_gpt.packed_dataset import (
    TokenFileWriter,
    load_manifest,
    read_header,
    token_dtype,
    write_token_file,
)


def test_the_bytes_of_a_file_are_those_of_lit_gpt(tmp_path):
    write_token_file(tmp_path / "x.bin", np.arange(10), np.uint16)
    expected = "4c4954504b4453" + "0100000000000000" + "08" + "0a00000000000000"
    expected += "0000010002000300040005000600070008000900"
    assert (tmp_path / "x.bin").read_bytes().hex() == expected
    assert sorted(os.listdir(tmp_path)) == ["x.bin"]


@pytest.mark.parametrize(("dtype", "code"), [("u1", 1), ("i1", 2), ("i2", 3), ("i4", 4), ("i8", 5), ("u2", 8)])
def test_dtype_codes(tmp_path, dtype, code):
    write_token_file(tmp_path / "x.bin", np.arange(3), dtype)
    assert (tmp_path / "x.bin").read_bytes()[15] == code
    assert read_header(tmp_path / "x.bin").dtype == np.dtype(dtype)


def test_the_dtype_follows_the_vocabulary():
    assert [token_dtype(size).name for size in (259, 32000, 65499, 65500, 128000)] == [
        "uint16", "uint16", "uint16", "int32", "int32",
    ]  # fmt: skip


@given(st.lists(st.lists(st.integers(0, 65535), max_size=40), max_size=5))
def test_pieces_come_back_as_one_stream(tmp_path_factory, pieces):
    path = tmp_path_factory.mktemp("stream") / "x.bin"
    with TokenFileWriter(path, np.uint16) as writer:
        for piece in pieces:
            writer.write(np.array(piece, dtype=np.int64))
    file = read_header(path)
    tokens = np.fromfile(path, file.dtype, offset=file.byte_offset)
    assert tokens.tolist() == [token for piece in pieces for token in piece]
    assert file.n_tokens == writer.n_tokens == len(tokens)


@pytest.mark.parametrize("token", [65536, -1])
def test_a_token_that_would_wrap_around_is_refused_and_nothing_is_left(tmp_path, token):
    with pytest.raises(ValueError, match=f"token {token} does not fit uint16"):
        write_token_file(tmp_path / "x.bin", np.array([1, token]), np.uint16)
    assert os.listdir(tmp_path) == []


def test_floats_are_no_tokens(tmp_path):
    with pytest.raises(ValueError, match="float32"):
        TokenFileWriter(tmp_path / "x.bin", np.float32)


def test_an_interrupted_writer_leaves_the_old_file(tmp_path):
    write_token_file(tmp_path / "x.bin", np.arange(3), np.uint16)
    before = (tmp_path / "x.bin").read_bytes()
    with pytest.raises(KeyboardInterrupt), TokenFileWriter(tmp_path / "x.bin", np.uint16) as writer:
        writer.write(np.arange(100))
        raise KeyboardInterrupt
    assert (tmp_path / "x.bin").read_bytes() == before
    assert os.listdir(tmp_path) == ["x.bin"]


def test_a_full_disk_at_the_last_moment_leaves_nothing(tmp_path, monkeypatch):
    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(packed_dataset.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left.*x.bin"):
        write_token_file(tmp_path / "x.bin", np.arange(3), np.uint16)
    assert os.listdir(tmp_path) == []


def damaged(tmp_path, edit):
    write_token_file(tmp_path / "x.bin", np.arange(100), np.uint16)
    data = bytearray((tmp_path / "x.bin").read_bytes())
    (tmp_path / "x.bin").write_bytes(edit(data))
    return tmp_path / "x.bin"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data[:150], "truncated.*expected 224 bytes.*found 150 bytes"),
        (lambda data: data[:11], "truncated.*header of 24 bytes, found 11 bytes"),
        (lambda data: b"", "found 0 bytes"),
        (lambda data: data + b"x", "damaged.*expected 224 bytes.*found 225 bytes"),
        (lambda data: b"PK" + data[2:], "not a LITPKDS token file"),
        (lambda data: data[:7] + b"\2" + data[8:], "version 2"),
        (lambda data: data[:15] + b"\6" + data[16:], "dtype code 6"),
        (lambda data: data[:15] + b"\x63" + data[16:], "dtype code 99"),
        (lambda data: data[:16] + b"\xff" * 8 + data[24:], "truncated"),
    ],
)
def test_a_damaged_file_is_one_clear_error_with_its_path(tmp_path, edit, message):
    path = damaged(tmp_path, edit)
    with pytest.raises(DataError, match=message) as raised:
        read_header(path)
    assert str(path) in str(raised.value)


@given(st.binary(max_size=64))
def test_garbage_is_never_taken_for_tokens(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("garbage") / "x.bin"
    path.write_bytes(data)
    with pytest.raises(DataError, match="x.bin"):
        read_header(path)


def test_a_manifest_that_is_missing_or_damaged_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="prepare"):
            load_manifest(folder)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="manifest.json is damaged"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match="lacks what scripts/prepare.py writes"):
        load_manifest(tmp_path)
