"""prepare.py: text comes back out of the tokens, whatever happens on the way, and bad input is one clear error."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter

import pytest

from lit_gpt.errors import EXIT_DATA, EXIT_USAGE
from lit_gpt.packed_dataset import load_manifest
from lit_gpt.token_files import find_token_files
from tests.scripts.corpora import contents, documents_in, make_texts, write_corpus


@pytest.mark.parametrize("tokenizer", [["--tokenizer", "bytes"], ["--vocab-size", "320"]])
def test_every_document_comes_back_once(run, tmp_path, tokenizer):
    texts = make_texts(100)
    write_corpus(tmp_path / "in", texts)
    code, out, _ = run(
        "--input", tmp_path / "in", "--out", tmp_path / "out", "--validation-fraction", "0.2", *tokenizer
    )
    train, validation = (documents_in(tmp_path / "out", split) for split in ("train", "validation"))
    assert code == 0
    assert sorted(train + validation) == sorted(texts)
    assert 5 < len(validation) < 40
    assert [text for text in texts if text in set(train)] == train  # in the order of the input

    manifest = load_manifest(tmp_path / "out")
    for split, held in (("train", train), ("validation", validation)):
        totals = manifest["splits"][split]
        assert totals["documents"] == len(held)
        assert totals["text_bytes"] == totals["table_bytes"] == sum(len(text.encode()) for text in held)
        assert totals["tokens"] == sum(file.n_tokens for file in find_token_files(tmp_path / "out", split))
    assert manifest["corpus_sha256"] in out
    assert f"{manifest['splits']['train']['tokens']} tokens" in out and "a boundary: " in out


def test_real_text_of_many_kinds(run, data_dir, tmp_path):
    code, _, errors = run(
        "--input", data_dir("web_samples"), "--tokenizer", data_dir("tokenizers/llama2"), "--out", tmp_path / "out",
    )  # fmt: skip
    manifest = load_manifest(tmp_path / "out")
    assert (code, errors) == (0, "")
    assert manifest["tokenizer"]["vocab_size"] == 32000 and manifest["separator_id"] == 2
    splits = manifest["splits"].values()
    assert sum(split["documents"] for split in splits) == 30 + 20 + 50 + 11 + 1  # and SOURCE.md
    assert all(split["table_bytes"] == split["text_bytes"] for split in splits)


def test_the_standard_library(run, tmp_path):
    code, out, errors = run("--stdlib", "--tokenizer", "bytes", "--out", tmp_path / "out")
    splits = load_manifest(tmp_path / "out")["splits"]
    assert (code, errors) == (0, "")
    assert "standard library of Python" in out
    assert splits["train"]["text_bytes"] > 5_000_000
    assert 0.01 < splits["validation"]["documents"] / splits["train"]["documents"] < 0.15


def test_a_python_without_sources_uses_those_of_torch(corpus, monkeypatch, tmp_path):
    package = tmp_path / "torch"
    (package / "tests").mkdir(parents=True)
    (package / "nn.py").write_text("x = 1\n" * 100)
    (package / "short.py").write_text("x = 1\n")
    (package / "latin.py").write_bytes(b"# \xe9\n" * 100)
    (package / "tests" / "test.py").write_text("x = 1\n" * 100)
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "nothing")})
    monkeypatch.setattr(
        corpus.importlib.util, "find_spec", lambda name: type("Spec", (), {"submodule_search_locations": [package]})
    )
    files, source = corpus.stdlib_inputs()
    assert [file.name for file in files] == ["nn.py"] and "torch" in source
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="use --input"):
        corpus.stdlib_inputs()


def test_equal_texts_fall_on_the_same_side(run, tmp_path):
    texts = make_texts(40)
    write_corpus(tmp_path / "in", texts + texts[::-1] + texts, per_file=7)
    options = ("--tokenizer", "bytes", "--validation-fraction", 0.3)
    assert run("--input", tmp_path / "in", "--out", tmp_path / "out", *options)[0] == 0
    train, validation = (Counter(documents_in(tmp_path / "out", split)) for split in ("train", "validation"))
    assert not train.keys() & validation.keys()
    assert set((train + validation).values()) == {3}


def test_held_out_files_are_the_whole_validation_set(run, tmp_path):
    (tmp_path / "a.txt").write_text("train " * 50)
    (tmp_path / "b.txt").write_text("held out " * 50)
    run("--input", tmp_path / "a.txt", "--validation-input", tmp_path / "b.txt", "--tokenizer", "bytes",
        "--out", tmp_path / "out")  # fmt: skip
    assert documents_in(tmp_path / "out", "train") == ["train " * 50]
    assert documents_in(tmp_path / "out", "validation") == ["held out " * 50]
    both = ("--input", tmp_path / "a.txt", "--validation-input", tmp_path / "a.txt")
    code, _, errors = run(*both, "--tokenizer", "bytes", "--out", tmp_path / "out2")
    assert code == EXIT_USAGE and "both training and validation" in errors


def test_one_long_text_can_be_cut_into_documents(run, tmp_path):
    text = "".join(make_texts(60))
    (tmp_path / "a.txt").write_text(text)
    options = ("--input", tmp_path / "a.txt", "--tokenizer", "bytes")
    _, _, errors = run(*options, "--out", tmp_path / "whole")
    assert "no document fell into the validation split" in errors
    run(*options, "--out", tmp_path / "cut", "--document-bytes", 500, "--validation-fraction", 0)
    documents = documents_in(tmp_path / "cut", "train")
    assert "".join(documents) == text
    assert len(documents) > 20 and all(document.endswith("\n") for document in documents)


# Kills itself at the n-th moment at which something on the disk changes its name or is made durable.
KILLED = """
import os, signal, sys
import prepare
left = int(sys.argv.pop(1))
def counted(real):
    def call(*arguments):
        global left
        for step in (lambda: real(*arguments), lambda: None):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            step()
    return call
os.replace, os.fsync = counted(os.replace), counted(os.fsync)
raise SystemExit(prepare.main())
"""


def test_after_a_kill_at_any_moment_the_same_command_gives_the_same_bytes(start, run, tmp_path):
    write_corpus(tmp_path / "in", make_texts(60), per_file=10)
    options = ("--input", tmp_path / "in", "--vocab-size", 320, "--validation-fraction", 0.2, "--unit-bytes", 4000)
    assert run(*options, "--out", tmp_path / "whole")[0] == 0
    expected = contents(tmp_path / "whole")
    assert sum(name.endswith(".bin") for name in expected) > 6

    moments = random.Random(0).sample(range(60), 6)
    for moment in moments:
        out = tmp_path / f"killed-{moment}"
        with start(KILLED, moment, *options, "--out", out) as killed:
            _, errors = killed.communicate(timeout=60)
        assert killed.returncode == -signal.SIGKILL, errors
        assert contents(out) != expected
        assert run(*options, "--out", out)[0] == 0
        assert contents(out) == expected


def test_a_finished_folder_answers_at_once(start, run, tmp_path):
    write_corpus(tmp_path / "in", make_texts(40))
    options = ("--input", tmp_path / "in", "--vocab-size", 300, "--out", tmp_path / "out")
    _, first, _ = run(*options)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    program = (
        "import sys, prepare; code = prepare.main(); "
        "heavy = {'torch', 'sentencepiece', 'tokenizers', 'transformers'} & set(sys.modules); "
        "raise SystemExit(code or len(heavy))"
    )
    with start(program, *options) as again:
        out, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert out.splitlines() == [line for line in first.splitlines() if "a boundary" not in line]
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_lost_shard_is_written_again(run, tmp_path):
    write_corpus(tmp_path / "in", make_texts(40))
    options = ("--input", tmp_path / "in", "--tokenizer", "bytes", "--out", tmp_path / "out")
    run(*options)
    expected = contents(tmp_path / "out")
    os.truncate(tmp_path / "out" / "train_000000.bin", 100)
    assert run(*options)[0] == 0
    assert contents(tmp_path / "out") == expected


def test_other_inputs_or_options_are_refused(run, tmp_path):
    write_corpus(tmp_path / "in", make_texts(40))
    options = ("--input", tmp_path / "in", "--tokenizer", "bytes", "--out", tmp_path / "out")
    run(*options)
    expected = contents(tmp_path / "out")
    for other, field in (
        (("--validation-fraction", "0.5"), "validation_buckets"),
        (("--no-separator",), "separator"),
        (("--tokenizer", "bytes", "--vocab_size", "300"), None),
        (("--document_bytes=70",), "document_bytes"),
    ):
        code, _, errors = run(*options, *other)
        assert code == (EXIT_USAGE if field else 0)
        assert not field or f"different: {field})" in errors and "another --out" in errors
    (tmp_path / "in" / "more.txt").write_text("more")
    code, _, errors = run(*options)
    assert code == EXIT_USAGE and "inputs" in errors
    (tmp_path / "in" / "more.txt").unlink()
    (tmp_path / "in" / "part-000.jsonl").write_bytes((tmp_path / "in" / "part-000.jsonl").read_bytes().swapcase())
    assert run(*options)[0] == EXIT_USAGE  # same size, other content
    assert contents(tmp_path / "out") == expected


def test_token_files_of_unknown_origin_are_left_alone(run, tmp_path):
    (tmp_path / "train_000000.bin").write_bytes(b"precious")
    write_corpus(tmp_path / "in", make_texts(10))
    code, _, errors = run("--input", tmp_path / "in", "--tokenizer", "bytes", "--out", tmp_path)
    assert code == EXIT_USAGE and "holds token files, but no plan.json" in errors
    assert (tmp_path / "train_000000.bin").read_bytes() == b"precious"


def test_a_tokenizer_or_a_plan_of_unknown_origin_is_left_alone(run, tmp_path):
    write_corpus(tmp_path / "in", make_texts(10))
    for name, content in {"tokenizer.model": "precious", "plan.json": '{"buy": "milk"}'}.items():
        out = tmp_path / f"a {name}"
        out.mkdir()
        (out / name).write_text(content)
        for task in ((), ("--task", "0/1")):
            code, _, errors = run("--input", tmp_path / "in", "--tokenizer", "bytes", "--out", out, *task)
            assert code == EXIT_USAGE and name in errors and "another --out" in errors
            assert contents(out) == {name: content.encode()}


def test_a_folder_of_another_version_says_so(run, tmp_path):
    write_corpus(tmp_path / "in", make_texts(40))
    options = ("--input", tmp_path / "in", "--tokenizer", "bytes", "--out", tmp_path / "out")
    run(*options)
    plan = tmp_path / "out" / "plan.json"
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "format": 1, "plan_id": "old"}))
    for task in ((), ("--task", "0/2")):
        code, _, errors = run(*options, *task)
        assert code == EXIT_USAGE and "another version of this command (format 1 of plan.json, this one" in errors
        assert "delete the folder" in errors and errors.count("\n") == 1


@pytest.mark.parametrize("tokenizer", [("--tokenizer", "bytes"), ("--vocab-size", 320)])
def test_a_tokenizer_that_was_lost_is_put_back(run, tmp_path, tokenizer):
    write_corpus(tmp_path / "in", make_texts(60))
    options = ("--input", tmp_path / "in", *tokenizer, "--out", tmp_path / "out")
    run(*options)
    expected = contents(tmp_path / "out")
    (name,) = (name for name in expected if name.startswith("tokenizer"))
    (tmp_path / "out" / name).unlink()
    assert run(*options)[0] == 0
    assert contents(tmp_path / "out") == expected


def test_tokens_of_another_tokenizer_are_not_taken_for_those_of_the_one_beside_them(run, tmp_path):
    write_corpus(tmp_path / "in", make_texts(60))
    options = ("--input", tmp_path / "in", "--vocab-size", 320, "--out", tmp_path / "out")
    run(*options)
    run("--input", tmp_path / "in", "--vocab-size", 330, "--out", tmp_path / "other")
    os.replace(tmp_path / "other" / "tokenizer.model", tmp_path / "out" / "tokenizer.model")
    assert run(*options)[0] == 0
    assert load_manifest(tmp_path / "out")["tokenizer"]["vocab_size"] == 330
    assert sorted(documents_in(tmp_path / "out", "train") + documents_in(tmp_path / "out", "validation")) == sorted(
        make_texts(60)
    )


def test_a_second_run_on_the_same_folder_is_refused(run, prepare, tmp_path):
    write_corpus(tmp_path / "in", make_texts(10))
    (tmp_path / "out").mkdir()
    with prepare.locked(tmp_path / "out"):
        code, _, errors = run("--input", tmp_path / "in", "--tokenizer", "bytes", "--out", tmp_path / "out")
    assert code == EXIT_DATA and "another run" in errors
    assert os.listdir(tmp_path / "out") == []


def test_text_that_the_terminal_cannot_show_is_no_error(root, tmp_path):
    write_corpus(tmp_path / "in", [f"\u6587\u5b57 {text}" for text in make_texts(40)])
    options = ["--input", tmp_path / "in", "--tokenizer", "bytes", "--out", tmp_path / "out"]
    command = [sys.executable, root / "scripts" / "prepare.py", *options]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "\\u6587\\u5b57" in done.stdout


def test_json_is_one_object_and_nothing_else(run, tmp_path):
    write_corpus(tmp_path / "in", make_texts(40))
    _, out, _ = run("--input", tmp_path / "in", "--tokenizer", "bytes", "--out", tmp_path / "out", "--json")
    assert json.loads(out) == load_manifest(tmp_path / "out")


def test_separators(run, data_dir, tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 10)
    options = ("--input", tmp_path / "a.txt", "--tokenizer", "bytes", "--validation-fraction", "0")
    run(*options, "--out", tmp_path / "none", "--no-separator")
    run(*options, "--out", tmp_path / "bos", "--separator_id", "1")
    assert load_manifest(tmp_path / "none")["separator_id"] is None
    assert load_manifest(tmp_path / "none")["splits"]["train"]["tokens"] == 100
    assert load_manifest(tmp_path / "bos")["separator_id"] == 1
    code, _, errors = run(*options, "--out", tmp_path / "x", "--separator-id", 259)
    assert code == EXIT_USAGE and "vocabulary of 259" in errors


LINES = {
    "broken": b'{"text": "abc"',
    "not an object": b'"abc"',
    "NaN": b'{"text": NaN}',
    "deep": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_broken_lines_are_counted_and_borne_up_to_a_limit(run, tmp_path, line):
    good = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in make_texts(20))
    (tmp_path / "a.jsonl").write_bytes(good + line + b"\n\n")
    options = ("--input", tmp_path / "a.jsonl", "--tokenizer", "bytes", "--out", tmp_path / "out")
    code, _, errors = run(*options)
    assert code == EXIT_DATA and "1 of 21 lines" in errors and "--max-bad" in errors
    code, out, _ = run(*options, "--max-bad", 0.1)
    assert code == 0 and "bad_json 1" in out
    assert load_manifest(tmp_path / "out")["counters"] == {"bad_json": 1, "rows": 21}


def test_rows_without_text_and_text_that_needs_mending_are_counted(run, tmp_path):
    rows = [json.dumps({"text": text}).encode() for text in make_texts(20)]
    rows += [b'{"text": null}', b'{"text": 5}', b'{"url": "x"}', b'{"text": " \\n"}', b'{"text": ""}']
    rows += [b'{"text": "a\\ud800b"}', b'{"text": "caf\xe9"}', b'{"text": "\\ud83d\\ude00"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    run("--input", tmp_path / "a.jsonl", "--tokenizer", "bytes", "--out", tmp_path / "out", "--validation-fraction", 0)
    assert load_manifest(tmp_path / "out")["counters"] == {"empty": 2, "no_text": 3, "repaired": 2, "rows": 28}
    assert documents_in(tmp_path / "out", "train")[-3:] == ["a\ufffdb", "caf\ufffd", "\U0001f600"]


def test_a_wrong_text_key_shows_the_keys_there_are(run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "abc", "url": "x"}\n' * 5)
    options = ("--input", tmp_path / "a.jsonl", "--tokenizer", "bytes", "--validation-fraction", 0)
    code, _, errors = run(*options, "--out", tmp_path / "out")
    assert code == EXIT_DATA and "content, url" in errors and "--text-key" in errors
    assert run(*options, "--out", tmp_path / "out", "--text_key", "content")[0] == 0


BAD_FILES = {
    "a.txt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "b.txt": (b"\x7fELF\0\0\0", "is not text"),
    "c.jsonl.gz": (gzip.compress(b'{"text": "abc"}\n' * 10_000)[:-20], "damaged or cut short"),
    "d.jsonl.gz": (gzip.compress(b'{"text": "abc"}\n' * 10_000)[:40] + b"x" * 40, "damaged or cut short"),
    "e.parquet": (b"PAR1", "damaged or cut short"),
    "f.jsonl": (b"BZh91AY&SY", "cannot be read; unpack it"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_and_nothing_is_published(run, tmp_path, name):
    data, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(data)
    (tmp_path / "good.txt").write_text("some text " * 100)
    inputs = (tmp_path / name, tmp_path / "good.txt")
    code, out, errors = run("--input", *inputs, "--tokenizer", "bytes", "--out", tmp_path / "out")
    assert code in (EXIT_DATA, EXIT_USAGE) and out == ""
    assert name in errors and message in errors and errors.count("\n") == 1
    assert not list(tmp_path.glob("out/*.bin")) and not list(tmp_path.glob("out/*.tmp"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "0 bytes"),
        (b" \n\n", "no training document holds any text"),
        (b"ab", "3 training tokens.*block_size \\+ 1"),
    ],
)
def test_a_corpus_with_nothing_to_learn_is_refused_and_the_folder_stays_free(run, tmp_path, text, message):
    (tmp_path / "a.txt").write_bytes(text)
    options = ("--input", tmp_path / "a.txt", "--tokenizer", "bytes", "--out", tmp_path / "out")
    code, _, errors = run(*options, "--validation-fraction", 0)
    assert code == EXIT_DATA
    assert re.search(message, errors)
    assert not list(tmp_path.glob("out/*.bin"))
    (tmp_path / "a.txt").write_text("enough to learn something from " * 10)
    assert run(*options, "--validation-fraction", 0)[0] == 0


def test_missing_input_is_a_missing_file(run, tmp_path):
    code, _, errors = run("--input", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert code == EXIT_DATA and "nowhere does not exist" in errors
    (tmp_path / "empty").mkdir()
    code, _, errors = run("--input", tmp_path / "empty", "--out", tmp_path / "out")
    assert code == EXIT_DATA and "holds no text" in errors
    assert not (tmp_path / "out").exists()


def test_a_corpus_too_small_for_a_tokenizer_is_refused_and_the_folder_stays_free(run, tmp_path):
    (tmp_path / "a.txt").write_text("a b c " * 20)
    options = ("--input", tmp_path / "a.txt", "--out", tmp_path / "out", "--validation-fraction", 0)
    code, _, errors = run(*options)
    assert code == EXIT_DATA and "--vocab-size" in errors and "bytes" in errors
    assert run(*options, "--tokenizer", "bytes")[0] == 0
    assert load_manifest(tmp_path / "out")["tokenizer"]["kind"] == "bytes"


@pytest.mark.parametrize(
    ("vocab_size", "said"), [(50, r"take (\d+), the smallest"), (4096, r"pieces for (\d+), the largest")]
)
def test_a_vocabulary_that_does_not_suit_the_corpus_names_the_size_that_does_and_leaves_no_plan(
    run, tmp_path, vocab_size, said
):
    (tmp_path / "a.txt").write_text("a b c quick brown fox " * 20)
    options = ("--input", tmp_path / "a.txt", "--out", tmp_path / "out", "--validation-fraction", 0, "--vocab-size")

    code, _, errors = run(*options, vocab_size)

    assert code == EXIT_DATA and len(errors.splitlines()) == 1 and "trainer_interface" not in errors
    assert list((tmp_path / "out").iterdir()) == []
    assert run(*options, re.search(said, errors)[1])[0] == 0


def test_settings_that_contradict_each_other_are_listed_together(run, tmp_path):
    code, _, errors = run(
        "--out", tmp_path / "out", "--workers", 0, "--validation_fraction", 2, "--separator-id", 1, "--no_separator",
    )  # fmt: skip
    assert code == EXIT_USAGE
    for part in ("--input PATH... or --stdlib", "--workers 0", "--validation-fraction 2", "exclude each other"):
        assert part in errors
    code, _, errors = run("--stdlib", "--out", tmp_path / "out", "--max-bad", "nan")
    assert code == EXIT_USAGE and "--max-bad nan must be in [0, 1]" in errors
    code, _, errors = run("--input", tmp_path, "--out", tmp_path / "out", "--validation-fraction", "0.00001")
    assert code == EXIT_USAGE and "must be 0 or at least 0.0001" in errors


def test_text_that_the_tokenizer_cannot_hold_is_reported(run, data_dir, tmp_path):
    (tmp_path / "a.txt").write_text("the 中文 " * 50)
    tokenizer = data_dir("tokenizers/sp1000/test_model.model")
    code, _, errors = run("--input", tmp_path / "a.txt", "--tokenizer", tokenizer, "--out", tmp_path / "out",
                          "--validation-fraction", 0, "--separator-id", 2)  # fmt: skip
    assert code == 0 and "of 550 bytes" in errors


def test_files_of_other_kinds_in_a_folder_are_mentioned(run, tmp_path):
    write_corpus(tmp_path / "in", make_texts(40))
    (tmp_path / "in" / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "in" / ".git").mkdir()
    (tmp_path / "in" / ".git" / "a.txt").write_text("hidden")
    _, _, errors = run("--input", tmp_path / "in", "--tokenizer", "bytes", "--out", tmp_path / "out")
    assert "left out 1 files or splits of other kinds, e.g. picture.png" in errors


def test_an_out_folder_that_cannot_be_written_is_one_clear_error(run, tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 10)
    code, _, errors = run("--input", tmp_path / "a.txt", "--tokenizer", "bytes", "--out", tmp_path / "a.txt")
    assert code == EXIT_USAGE and "is a file" in errors
    code, _, errors = run("--input", tmp_path / "a.txt", "--tokenizer", "bytes", "--out", tmp_path / "a.txt" / "out")
    assert code == EXIT_DATA and errors.count("\n") == 1
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        code, _, errors = run("--input", tmp_path / "a.txt", "--tokenizer", "bytes", "--out", tmp_path / "closed/out")
        assert code == EXIT_DATA and "permissions" in errors


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own with 300 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small file system: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_clear_error_and_the_same_command_goes_on_when_there_is_room(run, small_disk, tmp_path):
    write_corpus(tmp_path / "in", [text * 3 for text in make_texts(100)])
    options = ("--input", tmp_path / "in", "--tokenizer", "bytes")
    code, _, errors = run(*options, "--out", small_disk / "out")
    assert code == EXIT_DATA and os.strerror(errno.ENOSPC) in errors and errors.count("\n") == 1
    assert not list(small_disk.glob("out/*.bin")) and not list(small_disk.glob("out/*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    assert run(*options, "--out", small_disk / "out")[0] == 0
    assert run(*options, "--out", tmp_path / "out")[0] == 0
    assert contents(small_disk / "out") == contents(tmp_path / "out")


def test_the_report_says_what_kinds_of_files_there_were(run, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("some words of text\n" * 200)
    for name in ("b", "c"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": f"document {name} " * 200}) + "\n")
    arguments = ("--input", folder, "--out", tmp_path / "out", "--tokenizer", "bytes")
    for _ in range(2):  # the second time it is there already
        code, out, stderr = run(*arguments)
        assert code == 0, stderr
        assert "3 files (2 JSON lines, 1 text)" in out
