"""prepare.py export: chunks of one size hold the very stream of the source, for readers that know of nothing else."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.errors import EXIT_DATA, EXIT_OK, EXIT_USAGE, run_command
from lit_gpt.packed_dataset import write_token_file
from lit_gpt.token_files import find_token_files
from lit_gpt.tokenizer import Tokenizer

VOCAB_SIZE = 259  # of the bytes tokenizer
EOS_ID = 2


@pytest.fixture(scope="module")
def export(root):
    """The sub-command as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "scripts"))
        importlib.import_module("prepare")
        yield importlib.import_module("prep.export")


@pytest.fixture
def run(export, capsys):
    """Run the sub-command in this process; gives (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        main = sys.modules["prepare"].main
        code = run_command(lambda: main(["export", *map(str, arguments)]))
        return code, *capsys.readouterr()

    return call


def tokens_of(n: int, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, vocab_size, n)


def write_source(folder: Path, lengths: list[int], dtype: str = "<u2", tokenizer: bool = True) -> np.ndarray:
    """A folder with one token file per length, and its stream."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [tokens_of(length, number) for number, length in enumerate(lengths)]
    for number, part in enumerate(parts):
        write_token_file(folder / f"train_{number:06d}.bin", part, np.dtype(dtype))
    if tokenizer:
        Tokenizer.load("bytes").save(folder)
    return np.concatenate(parts)


def chunks_in(folder: Path, prefix: str = "train") -> list[Path]:
    """As TinyLlama finds them."""
    return sorted(folder.glob(f"{prefix}*"))


def rows_of(paths: list[Path], row: int) -> Iterator[np.ndarray]:
    """Rows of a chunk after the other, by a reader that believes the first header, as TinyLlama's does."""
    with paths[0].open("rb") as file:
        magic, version, code, chunk_tokens = struct.unpack("<7sQBQ", file.read(24))
    assert (magic, version) == (b"LITPKDS", 1)
    dtype = {8: np.uint16, 4: np.int32}[code]
    for path in paths:
        for number in range(chunk_tokens // row):
            offset = 24 + number * row * np.dtype(dtype).itemsize
            yield np.fromfile(path, dtype, count=row, offset=offset)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    chunk=st.integers(1, 80),
    tail=st.sampled_from(["drop", "pad"]),
)
def test_a_reader_of_equal_files_sees_the_stream_of_the_source(export, lengths: list[int], chunk: int, tail: str):
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "source"), Path(folder, "out")
        stream = write_source(source, lengths)
        status = run_command(
            lambda: export.main([str(source), "--out", str(out), "--chunk", str(chunk), "--tail", tail])
        )
        rest = len(stream) % chunk
        expected = stream[: len(stream) - rest] if tail == "drop" else stream
        if not len(expected):
            assert status == EXIT_DATA and not out.exists()
            return

        paths = chunks_in(out)

        assert status == EXIT_OK
        assert {path.stat().st_size for path in paths} == {24 + 2 * chunk}
        found = np.concatenate(list(rows_of(paths, row=chunk)))
        assert found[: len(expected)].tolist() == expected.tolist()
        assert (found[len(expected) :] == EOS_ID).all()


def test_names_and_size_are_tinyllamas(run, tmp_path: Path):
    stream = write_source(tmp_path / "source", [3_000_000, 1_500_000])

    status, out, err = run(tmp_path / "source", "--out", tmp_path / "out", "--prefix", "train_slim")

    assert status == EXIT_OK
    paths = chunks_in(tmp_path / "out", "train_slim")
    assert [path.name for path in paths] == ["train_slim_0_0000000000.bin", "train_slim_0_0000000001.bin"]
    assert [path.stat().st_size for path in paths] == [4_196_376] * 2
    rows = list(rows_of(paths, row=2049))
    assert len(rows) == 2048
    assert np.array_equal(np.concatenate(rows), stream[: 2048 * 2049])
    assert f"the last {4_500_000 - 2048 * 2049} of 4500000 tokens" in out and "dropped" in out
    assert "opens 8 files per device" in err


def test_padding_says_what_with_and_how_much(run, tmp_path: Path):
    write_source(tmp_path / "source", [25])

    status, out, _ = run(tmp_path / "source", "--out", tmp_path / "out", "--chunk", 10, "--tail", "pad")

    assert status == EXIT_OK
    assert "ends in 5 times the id 2" in out


def test_the_separator_of_a_manifest_is_what_pads(run, tmp_path: Path):
    write_source(tmp_path / "source", [25])
    totals = {"files": ["train_000000.bin"], "tokens": 25, "documents": 1, "text_bytes": 25, "table_bytes": 25}
    manifest = {"tokenizer": {"sha256": "", "vocab_size": VOCAB_SIZE}, "splits": {"train": totals}, "separator_id": 77}
    (tmp_path / "source" / "manifest.json").write_text(json.dumps(manifest))

    run(tmp_path / "source", "--out", tmp_path / "out", "--chunk", 10, "--tail", "pad")

    *_, last = rows_of(chunks_in(tmp_path / "out"), row=10)
    assert last[5:].tolist() == [77] * 5


def test_the_tokenizer_comes_along_and_the_chunks_can_be_read_back(run, tmp_path: Path):
    stream = write_source(tmp_path / "source", [40, 35])

    run(tmp_path / "source", "--out", tmp_path / "out", "--chunk", 25)

    assert Tokenizer.load(tmp_path / "out").vocab_size == VOCAB_SIZE
    again = [np.fromfile(file.path, file.dtype, offset=file.byte_offset) for file in find_token_files(tmp_path / "out")]
    assert np.concatenate(again).tolist() == stream.tolist()


@pytest.mark.parametrize(("vocab_size", "code"), [(65_499, 8), (65_500, 4), (200_000, 4)])
def test_the_type_follows_the_vocabulary(run, tmp_path: Path, vocab_size: int, code: int):
    write_source(tmp_path / "source", [40], dtype="<i8", tokenizer=False)

    run(tmp_path / "source", "--out", tmp_path / "out", "--chunk", 20, "--vocab-size", vocab_size)

    assert {path.read_bytes()[15] for path in chunks_in(tmp_path / "out")} == {code}


@pytest.mark.parametrize(("dtype", "code"), [("<u2", 8), ("<i4", 4), ("<i8", 4)])
def test_without_a_known_vocabulary_the_type_is_that_of_the_source(run, tmp_path: Path, dtype: str, code: int):
    stream = write_source(tmp_path / "source", [40], dtype=dtype, tokenizer=False)

    run(tmp_path / "source", "--out", tmp_path / "out", "--chunk", 20)

    paths = chunks_in(tmp_path / "out")
    assert {path.read_bytes()[15] for path in paths} == {code}
    assert np.concatenate(list(rows_of(paths, row=20))).tolist() == stream.tolist()


def test_an_id_outside_the_vocabulary_is_refused_and_no_chunk_holds_it(run, tmp_path: Path):
    write_source(tmp_path / "source", [40])
    write_token_file(tmp_path / "source" / "train_000001.bin", np.array([5] * 30 + [300]), np.dtype("<u2"))

    status, _, err = run(tmp_path / "source", "--out", tmp_path / "out", "--chunk", 40, "--tail", "pad")

    assert status == EXIT_DATA
    assert "id 300" in err and "vocabulary of 259" in err and len(err.splitlines()) == 1
    assert [path.name for path in chunks_in(tmp_path / "out")] == ["train_0_0000000000.bin"]


def test_a_stopped_export_is_continued_by_the_same_command(run, tmp_path: Path):
    write_source(tmp_path / "source", [64, 36])
    command = (tmp_path / "source", "--out", tmp_path / "out", "--chunk", 10)
    run(*command)
    whole = contents(tmp_path / "out")
    first, second, third, *_ = chunks_in(tmp_path / "out")
    written_ns = first.stat().st_mtime_ns
    second.unlink()
    third.write_bytes(third.read_bytes()[:-3])
    for unfinished in (second.name, "export_train.json"):
        (tmp_path / "out" / f"{unfinished}.{socket.gethostname()}.{os.getpid()}.tmp").write_bytes(b"half")

    status, out, _ = run(*command)

    assert status == EXIT_OK
    assert contents(tmp_path / "out") == whole
    assert first.stat().st_mtime_ns == written_ns
    assert "8 of them were there already" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_whole_chunks_only_and_says_how_to_go_on(export, run, tmp_path: Path, monkeypatch, number):
    write_source(tmp_path / "source", [64, 36])
    command = (tmp_path / "source", "--out", tmp_path / "out", "--chunk", 10)

    def interrupted(tokens: np.ndarray, _: object) -> None:
        if len(chunks_in(tmp_path / "out")) > 4:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(export, "check_ids", interrupted)
        status, _, err = run(*command)

    assert status == 75 and "the same command continues" in err
    assert {path.stat().st_size for path in chunks_in(tmp_path / "out")} == {24 + 2 * 10}
    assert run(*command)[0] == EXIT_OK
    assert len(chunks_in(tmp_path / "out")) == 10


def test_an_export_that_was_killed_before_its_first_file_is_no_foreign_folder(run, tmp_path: Path):
    write_source(tmp_path / "source", [64])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"export_train.json.{socket.gethostname()}.{os.getpid()}.tmp").write_bytes(b"half")
    assert run(tmp_path / "source", "--out", tmp_path / "out", "--chunk", 10)[0] == EXIT_OK
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_several_sets_share_a_folder_under_prefixes_of_their_own(run, tmp_path: Path):
    write_source(tmp_path / "slim", [64])
    write_source(tmp_path / "star", [36])

    statuses = [
        run(tmp_path / name, "--out", tmp_path / "out", "--chunk", 10, "--prefix", f"train_{name}")[0]
        for name in ("slim", "star")
    ]

    assert statuses == [EXIT_OK, EXIT_OK]
    assert [len(chunks_in(tmp_path / "out", f"train_{name}")) for name in ("slim", "star")] == [6, 3]


def test_a_folder_of_something_else_is_refused_and_left_alone(run, tmp_path: Path):
    write_source(tmp_path / "source", [64])
    write_source(tmp_path / "other", [64, 64])
    run(tmp_path / "other", "--out", tmp_path / "out", "--chunk", 10)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    before = contents(tmp_path / "out"), contents(tmp_path / "source")

    attempts = [
        (run(tmp_path / "source", "--out", tmp_path / "out", "--chunk", 10), "different: source"),
        (run(tmp_path / "other", "--out", tmp_path / "out", "--chunk", 20), "different: chunk_tokens"),
        (run(tmp_path / "source", "--out", tmp_path / "notes", "--chunk", 10), "diary.txt"),
        (run(tmp_path / "source", "--out", tmp_path / "source", "--chunk", 10), "train_000000.bin"),
    ]

    for (status, _, err), reason in attempts:
        assert status == EXIT_USAGE and reason in err and len(err.splitlines()) == 1
    assert (contents(tmp_path / "out"), contents(tmp_path / "source")) == before


def test_tokens_of_two_tokenizers_do_not_meet_in_one_folder(run, tmp_path: Path):
    write_source(tmp_path / "source", [64])
    write_source(tmp_path / "other", [64], tokenizer=False)
    run(tmp_path / "source", "--out", tmp_path / "out", "--chunk", 10)

    status, _, err = run(tmp_path / "other", "--out", tmp_path / "out", "--chunk", 10, "--prefix", "more")

    assert status == EXIT_USAGE
    assert "another tokenizer" in err


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        (["--chunk", "0"], EXIT_USAGE, "--chunk 0"),
        (["--chunk", "10", "--pad-id", "3"], EXIT_USAGE, "--tail pad only"),
        (["--chunk", "10", "--tail", "pad", "--pad-id", "900"], EXIT_USAGE, "outside the vocabulary of 259"),
        (["--chunk", "10", "--prefix", "a/b"], EXIT_USAGE, "--prefix"),
        (["--chunk", "10", "--vocab-size", "0"], EXIT_USAGE, "--vocab-size 0"),
        (["--chunk", "1000"], EXIT_DATA, "has 64 tokens, too few for one chunk of 1000"),
        (["--chunk", "10", "--split", "validation"], EXIT_DATA, "validation"),
    ],
)
def test_what_cannot_be_is_one_clear_error_and_writes_nothing(
    run, tmp_path: Path, options: list[str], status: int, reason: str
):
    write_source(tmp_path / "source", [64])

    found, _, err = run(tmp_path / "source", "--out", tmp_path / "out", *options)

    assert found == status
    assert reason in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_padding_without_a_known_separator_needs_an_id(run, tmp_path: Path):
    write_source(tmp_path / "source", [64], tokenizer=False)
    command = (tmp_path / "source", "--out", tmp_path / "out", "--chunk", 10, "--tail", "pad")

    status, _, err = run(*command)

    assert status == EXIT_USAGE and "--pad-id" in err
    assert run(*command, "--pad-id", 7)[0] == EXIT_OK
    *_, last = rows_of(chunks_in(tmp_path / "out"), row=10)
    assert last[4:].tolist() == [7] * 6
