"""Token files: the exact bytes, round trips, samples that miss nothing, and damage that is named."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lit_gpt.packed_dataset as packed_dataset
import lit_gpt.token_source as token_source
from lit_gpt.errors import DataError
from lit_gpt.packed_dataset import (
    TokenFile,
    TokenFileWriter,
    load_manifest,
    read_header,
    token_dtype,
    write_token_file,
)
from lit_gpt.token_files import find_token_files
from lit_gpt.token_source import SampleIndex, TokenSource

VOCAB_SIZE = 32000


def write_files(folder, *lengths, dtype=np.uint16, name="train_{:06d}.bin"):
    """Files whose tokens count on from one file to the next."""
    first = 0
    for number, length in enumerate(lengths):
        write_token_file(folder / name.format(number), np.arange(first, first + length), dtype)
        first += length
    return find_token_files(folder)


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


@given(st.lists(st.integers(0, 60), min_size=1, max_size=5), st.integers(1, 12))
def test_samples_cover_every_file_once_and_never_cross_files(tmp_path_factory, lengths, block_size):
    folder = tmp_path_factory.mktemp("samples")
    files = write_files(folder, *lengths)
    expected, first = [], 0
    for length in lengths:
        tokens = list(range(first, first + length))
        first += length
        starts = range(0, length - block_size, block_size)
        expected += [tokens[start : start + block_size + 1] for start in starts]
    if not expected:
        with pytest.raises(DataError, match=f"block_size={block_size}"):
            TokenSource(files, block_size, VOCAB_SIZE)
        return
    source = TokenSource(files, block_size, VOCAB_SIZE)
    assert source.n_samples == len(expected)
    assert source.read(np.arange(source.n_samples)).tolist() == expected
    backwards = np.arange(source.n_samples)[::-1]
    assert source.read(backwards).tolist() == expected[::-1]


def test_rows_are_int64_and_do_not_share_memory(tmp_path):
    source = TokenSource(write_files(tmp_path, 100), 4, VOCAB_SIZE)
    first, second = source.read(np.array([0])), source.read(np.array([1]))
    assert first.dtype == np.int64 and first.shape == (1, 5)
    assert first.tolist() == [[0, 1, 2, 3, 4]] and second.tolist() == [[4, 5, 6, 7, 8]]
    assert source.read(np.array([], dtype=np.int64)).shape == (0, 5)


def test_three_tokens_make_no_sample(tmp_path):
    with pytest.raises(DataError, match="3 tokens.*block_size=8.*at least 9 tokens"):
        TokenSource(write_files(tmp_path, 3), 8, VOCAB_SIZE)


def test_samples_outside_the_data_are_a_fault(tmp_path):
    source = TokenSource(write_files(tmp_path, 100), 4, VOCAB_SIZE)
    for index in (-1, source.n_samples):
        with pytest.raises(IndexError):
            source.read(np.array([index]))


def test_mixed_dtypes_are_refused_naming_the_file(tmp_path):
    write_token_file(tmp_path / "train_000000.bin", np.arange(50), np.uint16)
    write_token_file(tmp_path / "train_000001.bin", np.arange(50), np.int32)
    with pytest.raises(DataError, match="train_000001.bin holds int32"):
        TokenSource(find_token_files(tmp_path), 4, VOCAB_SIZE)


@pytest.mark.parametrize(("dtype", "token"), [(np.uint16, 500), (np.int32, -3)])
def test_a_token_outside_the_vocabulary_is_refused_naming_the_file(tmp_path, dtype, token):
    write_token_file(tmp_path / "train_000000.bin", np.zeros(50), dtype)
    write_token_file(tmp_path / "train_000001.bin", np.array([0] * 7 + [token] + [0] * 20), dtype)
    source = TokenSource(find_token_files(tmp_path), 4, 500)
    assert source.read(np.array([0, 1])).sum() == 0
    with pytest.raises(DataError, match=f"train_000001.bin holds token {token}, outside the vocabulary of 500"):
        source.read(np.arange(source.n_samples))


def test_a_file_cut_short_during_the_run_is_named(tmp_path):
    source = TokenSource(write_files(tmp_path, 1000), 4, VOCAB_SIZE)
    os.truncate(tmp_path / "train_000000.bin", 500)
    source.read(np.array([0]))
    with pytest.raises(DataError, match="train_000000.bin is truncated: expected 10 bytes"):
        source.read(np.array([source.n_samples - 1]))


def test_a_file_cut_short_before_the_run_is_named(tmp_path):
    files = write_files(tmp_path, 1000)
    os.truncate(tmp_path / "train_000000.bin", 500)
    with pytest.raises(DataError, match="expected 2024 bytes, found 500 bytes"):
        TokenSource(files, 4, VOCAB_SIZE)


def test_more_files_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(token_source, "OPEN_FILES", 2)
    source = TokenSource(write_files(tmp_path, *[9] * 6), 4, VOCAB_SIZE)
    order = np.random.default_rng(0).permutation(source.n_samples)
    assert source.read(order)[:, 0].tolist() == [int(i) // 2 * 9 + int(i) % 2 * 4 for i in order]
    assert len(source._descriptors._open) == 2


def test_reading_without_preadv(tmp_path, monkeypatch):
    source = TokenSource(write_files(tmp_path, 100), 4, VOCAB_SIZE)
    expected = source.read(np.arange(source.n_samples))
    monkeypatch.delattr(token_source.os, "preadv")
    assert np.array_equal(source.read(np.arange(source.n_samples)), expected)


def test_reads_that_come_in_parts_are_put_together(tmp_path, monkeypatch):
    source = TokenSource(write_files(tmp_path, 100), 4, VOCAB_SIZE)
    expected = source.read(np.arange(source.n_samples))
    preadv = os.preadv
    monkeypatch.setattr(
        token_source.os, "preadv", lambda descriptor, parts, offset: preadv(descriptor, [parts[0][:3]], offset)
    )
    assert np.array_equal(source.read(np.arange(source.n_samples)), expected)


def test_tokens_may_lie_anywhere_in_a_file_of_another_format(tmp_path):
    (tmp_path / "raw").write_bytes(b"12345" + np.arange(20, dtype="<u2").tobytes())
    source = TokenSource([TokenFile(str(tmp_path / "raw"), 5, 20, np.dtype("<u2"))], 4, VOCAB_SIZE)
    assert source.read(np.array([1])).tolist() == [[4, 5, 6, 7, 8]]


def test_the_fingerprint_follows_content_and_not_the_folder(tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    one, two = (TokenSource(write_files(tmp_path / name, 50, 60), 4, VOCAB_SIZE) for name in ("one", "two"))
    write_files(tmp_path / "three", 50, 60)
    write_token_file(tmp_path / "three" / "train_000001.bin", np.arange(60), np.uint16)
    three = TokenSource(find_token_files(tmp_path / "three"), 4, VOCAB_SIZE)
    assert one.fingerprint == two.fingerprint != three.fingerprint


@given(st.lists(st.integers(0, 300), min_size=1, max_size=30), st.integers(1, 20))
def test_the_index_finds_every_sample(n_tokens, block_size):
    index = SampleIndex(np.array(n_tokens), block_size)
    expected = [(f, start) for f, n in enumerate(n_tokens) for start in range(0, n - block_size, block_size)]
    files, starts = index.locate(np.arange(index.n_samples))
    assert list(zip(files.tolist(), starts.tolist(), strict=True)) == expected


def write_manifest(folder, **splits):
    whole = {name: {"text_bytes": 0, **split} for name, split in splits.items()}
    manifest = {"tokenizer": {"sha256": "0", "vocab_size": 99}, "splits": whole}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_files_are_found_by_manifest(tmp_path):
    write_files(tmp_path, 50, 60)
    write_manifest(tmp_path, train={"files": ["train_000001.bin"], "tokens": 60}, validation={"files": [], "tokens": 0})
    assert [file.n_tokens for file in find_token_files(tmp_path, "train")] == [60]
    with pytest.raises(FileNotFoundError, match="no validation data; it holds train"):
        find_token_files(tmp_path, "validation")


def test_files_are_found_by_name_in_the_order_of_their_numbers(tmp_path):
    write_files(tmp_path, *range(10, 22), name="train_{}.bin")
    assert [file.n_tokens for file in find_token_files(tmp_path)] == list(range(10, 22))


def test_a_manifest_that_disagrees_with_its_files_is_refused(tmp_path):
    write_files(tmp_path, 50)
    write_manifest(tmp_path, train={"files": ["train_000000.bin"], "tokens": 49})
    with pytest.raises(DataError, match="announces 49 tokens, its files hold 50"):
        find_token_files(tmp_path)


def test_missing_data_is_a_missing_file(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="prepare"):
            find_token_files(folder)
        with pytest.raises(FileNotFoundError, match="prepare"):
            load_manifest(folder)
    write_manifest(tmp_path, train={"files": ["train_000000.bin"], "tokens": 49})
    with pytest.raises(FileNotFoundError, match="train_000000.bin"):
        find_token_files(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="manifest.json is damaged"):
        load_manifest(tmp_path)
