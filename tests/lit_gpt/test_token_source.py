"""Samples of token files: none missing, none twice, none across files; and what becomes of broken files."""

from __future__ import annotations

import errno
import gc
import os
from resource import RLIM_INFINITY

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lit_gpt.token_source as token_source
from lit_gpt.errors import DataError
from lit_gpt.packed_dataset import TokenFile, write_token_file
from lit_gpt.token_files import find_token_files
from lit_gpt.token_source import SampleIndex, TokenSource

VOCAB_SIZE = 32000


def write_files(folder, *lengths, dtype=np.uint16, name="train_{:06d}.bin"):
    """Files whose tokens count on from one file to the next."""
    first = 0
    for number, length in enumerate(lengths):
        write_token_file(folder / name.format(number), np.arange(first, first + length), dtype)
        first += length
    return find_token_files(folder, trim=False)


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
        TokenSource(find_token_files(tmp_path, trim=False), 4, VOCAB_SIZE)


@pytest.mark.parametrize(("dtype", "token"), [(np.uint16, 500), (np.int32, -3)])
def test_a_token_outside_the_vocabulary_is_refused_naming_the_file(tmp_path, dtype, token):
    write_token_file(tmp_path / "train_000000.bin", np.zeros(50), dtype)
    write_token_file(tmp_path / "train_000001.bin", np.array([0] * 7 + [token] + [0] * 20), dtype)
    source = TokenSource(find_token_files(tmp_path, trim=False), 4, 500)
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
        TokenSource(list(files), 4, VOCAB_SIZE)


def test_more_files_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(token_source, "OPEN_FILES", 2)
    source = TokenSource(write_files(tmp_path, *[9] * 6), 4, VOCAB_SIZE)
    order = np.random.default_rng(0).permutation(source.n_samples)
    assert source.read(order)[:, 0].tolist() == [int(i) // 2 * 9 + int(i) % 2 * 4 for i in order]
    assert len(source._descriptors.open) == 2


def test_sources_share_the_descriptors_of_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(token_source, "OPEN_FILES", 8)
    gc.collect()  # sources of earlier tests are gone
    sources = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        sources.append(TokenSource(write_files(tmp_path / name, *[9] * 9), 4, VOCAB_SIZE))
    for source in sources:
        assert source.read(np.arange(source.n_samples))[:, 0].tolist() == [i // 2 * 9 + i % 2 * 4 for i in range(18)]
    assert [len(source._descriptors.open) for source in sources] == [4, 4]


def test_a_low_limit_of_the_system_is_respected(monkeypatch):
    monkeypatch.setattr(token_source.resource, "getrlimit", lambda _: (256, 4096))
    assert token_source.open_files_limit() == 128
    monkeypatch.setattr(token_source.resource, "getrlimit", lambda _: (RLIM_INFINITY, RLIM_INFINITY))
    assert token_source.open_files_limit() == token_source.OPEN_FILES


def test_running_out_of_descriptors_closes_one_of_ours_instead_of_failing(tmp_path, monkeypatch):
    source = TokenSource(write_files(tmp_path, *[9] * 6), 4, VOCAB_SIZE)
    expected = source.read(np.arange(source.n_samples))
    source = TokenSource(find_token_files(tmp_path), 4, VOCAB_SIZE)
    system_open = os.open

    def scarce(path, flags):
        if len(source._descriptors.open) >= 3:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        return system_open(path, flags)

    monkeypatch.setattr(token_source.os, "open", scarce)
    assert np.array_equal(source.read(np.arange(source.n_samples)), expected)


def test_descriptors_are_closed_with_their_source(tmp_path):
    gc.collect()
    before = os.listdir("/dev/fd")
    source = TokenSource(write_files(tmp_path, *[9] * 6), 4, VOCAB_SIZE)
    source.read(np.arange(source.n_samples))
    assert len(os.listdir("/dev/fd")) == len(before) + 6
    del source
    gc.collect()
    assert len(os.listdir("/dev/fd")) == len(before)


def test_reading_without_preadv(tmp_path, monkeypatch):
    source = TokenSource(write_files(tmp_path, 100), 4, VOCAB_SIZE)
    expected = source.read(np.arange(source.n_samples))
    monkeypatch.delattr(token_source.os, "preadv")
    assert np.array_equal(source.read(np.arange(source.n_samples)), expected)


def test_reads_that_come_in_parts_are_put_together(tmp_path, monkeypatch):
    source = TokenSource(write_files(tmp_path, 100), 4, VOCAB_SIZE)
    expected = source.read(np.arange(source.n_samples))
    preadv, pread = os.preadv, os.pread
    monkeypatch.setattr(
        token_source.os, "preadv", lambda descriptor, parts, offset: preadv(descriptor, [parts[0][:3]], offset)
    )
    monkeypatch.setattr(
        token_source.os, "pread", lambda descriptor, count, offset: pread(descriptor, min(3, count), offset)
    )
    assert np.array_equal(source.read(np.arange(source.n_samples)), expected)


def test_more_rows_than_the_buffer_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(token_source, "BUFFER_ROWS", 7)
    files = write_files(tmp_path, 100, 150, 30)
    source = TokenSource(files, 4, VOCAB_SIZE)
    rows = source.read(np.arange(source.n_samples))
    assert len(rows) > 30 and np.array_equal(rows, rows[:, :1] + np.arange(5))
    assert [len(source.read(np.arange(count))) for count in (0, 1, 6, 7, 8, 14, 15)] == [0, 1, 6, 7, 8, 14, 15]


def test_a_bad_token_is_found_behind_the_first_buffer_too(tmp_path, monkeypatch):
    monkeypatch.setattr(token_source, "BUFFER_ROWS", 2)
    write_token_file(tmp_path / "train_0.bin", np.zeros(41), np.uint16)
    write_token_file(tmp_path / "train_1.bin", np.array([0] * 40 + [500]), np.uint16)
    source = TokenSource(find_token_files(tmp_path, trim=False), 4, 500)
    with pytest.raises(DataError, match="train_1.bin holds token 500"):
        source.read(np.arange(source.n_samples))


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
    three = TokenSource(find_token_files(tmp_path / "three", trim=False), 4, VOCAB_SIZE)
    assert one.fingerprint == two.fingerprint != three.fingerprint


@given(st.lists(st.integers(0, 300), min_size=1, max_size=30), st.integers(1, 20))
def test_the_index_finds_every_sample(n_tokens, block_size):
    index = SampleIndex(np.array(n_tokens), block_size)
    expected = [(f, start) for f, n in enumerate(n_tokens) for start in range(0, n - block_size, block_size)]
    files, starts = index.locate(np.arange(index.n_samples))
    assert list(zip(files.tolist(), starts.tolist(), strict=True)) == expected


@given(st.lists(st.integers(0, 300), min_size=1, max_size=30), st.integers(1, 20), st.integers(1, 40))
def test_the_index_finds_every_sample_at_any_stride(n_tokens, block_size, stride):
    index = SampleIndex(np.array(n_tokens), block_size, stride)
    expected = [(f, start) for f, n in enumerate(n_tokens) for start in range(0, n - block_size, stride)]
    files, starts = index.locate(np.arange(index.n_samples))
    assert list(zip(files.tolist(), starts.tolist(), strict=True)) == expected
    assert index.samples_per_file.tolist() == [len(range(0, n - block_size, stride)) for n in n_tokens]


def test_the_lineages_stride_gives_its_blocks(tmp_path):
    source = TokenSource(write_files(tmp_path, 20, 14), 4, VOCAB_SIZE, stride=5)
    blocks = [list(range(start, start + 5)) for start in (0, 5, 10, 15, 20, 25)]
    assert source.read(np.arange(source.n_samples)).tolist() == blocks
    assert (source.stride, source.samples_per_file.tolist()) == (5, [4, 2])


@pytest.mark.parametrize(("block_size", "stride"), [(0, None), (4, 0), (-1, 5)])
def test_sizes_below_one_are_refused(tmp_path, block_size, stride):
    with pytest.raises(ValueError, match="must be at least 1"):
        TokenSource(write_files(tmp_path, 100), block_size, VOCAB_SIZE, stride=stride)


@given(st.lists(st.integers(0, 60), min_size=2, max_size=6), st.integers(1, 9), st.integers(1, 12))
def test_a_sample_is_where_its_place_says(tmp_path_factory, lengths, block_size, stride):
    files = write_files(tmp_path_factory.mktemp("place"), *lengths, 99)
    source = TokenSource(files, block_size, VOCAB_SIZE, stride=stride)
    for sample in range(source.n_samples):
        file, first = source.place(sample)
        offset = file.byte_offset + first * file.dtype.itemsize
        tokens = np.fromfile(file.path, file.dtype, block_size + 1, offset=offset)
        assert tokens.tolist() == source.read(np.array([sample]))[0].tolist()
    with pytest.raises(IndexError):
        source.place(source.n_samples)


@pytest.mark.parametrize("windowed", [False, True])
def test_the_system_is_told_how_the_files_will_be_read(tmp_path, monkeypatch, windowed):
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system takes no advice")
    advice = []
    monkeypatch.setattr(token_source.os, "posix_fadvise", lambda *arguments: advice.append(arguments[1:]))
    source = TokenSource(write_files(tmp_path, 30, 30), 4, VOCAB_SIZE, windowed=windowed)
    source.read(np.arange(source.n_samples))
    assert advice == [(0, 0, os.POSIX_FADV_WILLNEED if windowed else os.POSIX_FADV_RANDOM)] * 2


def test_tokens_of_four_bytes_without_sign(tmp_path):
    tokens = np.array([70_000, 1, 200_000, 3, 4], dtype="<u4")
    tokens.tofile(tmp_path / "x.bin")
    files = find_token_files(tmp_path / "x.bin", dtype="uint32")
    assert TokenSource(files, 4, 200_001).read(np.array([0])).tolist() == [tokens.tolist()]
    with pytest.raises(DataError, match="holds token 200000, outside the vocabulary of 200000"):
        TokenSource(files, 4, 200_000).read(np.array([0]))
