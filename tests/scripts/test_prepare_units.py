"""Preparation in parts: workers, tasks and their ends, damaged files, choices of text, limits of disk and of ids."""

from __future__ import annotations

import errno
import gzip
import io
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lit_gpt.errors import EXIT_DATA, EXIT_STOPPED, EXIT_USAGE
from lit_gpt.packed_dataset import load_manifest
from lit_gpt.token_files import find_token_files
from lit_gpt.tokenizer import Tokenizer
from tests.scripts.corpora import contents, documents_in, make_texts, write_corpus

MAIN = "import prepare; raise SystemExit(prepare.run_command(prepare.main))"


@pytest.fixture(autouse=True)
def outside_of_any_array(monkeypatch):
    for name in list(os.environ):
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)


@pytest.fixture
def many_units(tmp_path):
    """Options that read a corpus as ten units with the bytes tokenizer."""
    folder = write_corpus(tmp_path / "in", make_texts(100), per_file=10)
    return ("--input", folder, "--tokenizer", "bytes", "--unit-bytes", 100, "--validation-fraction", 0.2)


@pytest.fixture
def undisturbed(run, many_units, tmp_path):
    """All files that one process makes of `many_units`."""
    assert run(*many_units, "--out", tmp_path / "undisturbed")[0] == 0
    made = contents(tmp_path / "undisturbed")
    assert sum(name.startswith("train") and name.endswith(".bin") for name in made) == 10
    return made


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_no_byte(run, many_units, undisturbed, workers, tmp_path):
    assert run(*many_units, "--out", tmp_path / "out", "--workers", workers)[0] == 0
    assert contents(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("n_tasks", [1, 2, 5])
def test_tasks_in_any_order_change_no_byte(run, many_units, undisturbed, n_tasks, tmp_path):
    orders = list(itertools.permutations(range(n_tasks)))
    for order in orders[:: max(1, len(orders) // 2)]:
        out = tmp_path / "-".join(map(str, order))
        for left, task in zip(reversed(range(n_tasks)), order, strict=True):
            code, told, errors = run(*many_units, "--out", out, "--task", f"{task}/{n_tasks}")
            assert (code, errors) == (0, "")
            missing = re.search(r"(\d+) of 10 units are missing", told)
            assert int(missing[1]) == 10 // n_tasks * left if left else not missing
            assert (out / "manifest.json").is_file() == (not left)
        assert contents(out) == undisturbed


def test_tasks_may_share_a_folder_at_the_same_time(start, many_units, undisturbed, tmp_path):
    out = tmp_path / "out"
    tasks = [start(MAIN, *many_units, "--out", out, "--task", f"{i}/3") for i in range(3)]
    for task in tasks:
        with task:
            assert task.wait(timeout=60) == 0, task.stderr.read()
    assert contents(out) == undisturbed


def test_neither_the_locale_nor_what_is_installed_changes_a_byte(start, run, monkeypatch, tmp_path):
    texts = [f"{text}\u6587\ud800" for text in make_texts(30)]
    for name, some in {"Z": texts[:10], "a \u00e4": texts[10:20], "\u00e9": texts[20:]}.items():
        write_corpus(tmp_path / "in" / name, some)
    options = ("--input", tmp_path / "in", "--tokenizer", "bytes", "--unit-bytes", 100)
    assert run(*options, "--out", tmp_path / "here")[0] == 0
    for name, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONHASHSEED": "7"}.items():
        monkeypatch.setenv(name, value)
    with start("import sys; sys.modules['orjson'] = None; " + MAIN, *options, "--out", tmp_path / "there") as process:
        assert process.wait(timeout=60) == 0, process.stderr.read()
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_the_command_without_a_task_does_what_is_missing(run, many_units, undisturbed, tmp_path):
    out = tmp_path / "out"
    run(*many_units, "--out", out, "--task", "1/3")
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.bin")}
    assert len(before) > 2
    assert run(*many_units, "--out", out)[0] == 0
    assert contents(out) == undisturbed
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before


def test_a_task_finds_its_number_in_a_slurm_array(run, many_units, undisturbed, monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "3")
    for number in (4, 3):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
        code, told, _ = run(*many_units, "--out", tmp_path / "out")
        assert code == 0 and ("5 of 10 units are missing: 0, 2, 4, 6, 8" in told) == (number == 4)
    assert contents(tmp_path / "out") == undisturbed
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "9")
    code, _, errors = run(*many_units, "--out", tmp_path / "out2")
    assert code == EXIT_USAGE and "without gaps" in errors


@pytest.mark.parametrize("task", ["2/2", "-1/2", "1", "a/b", "0/0"])
def test_a_task_that_is_no_share_is_refused(run, many_units, tmp_path, task):
    code, _, errors = run(*many_units, "--out", tmp_path / "out", f"--task={task}")
    assert code == EXIT_USAGE and f"--task {task} must be I/N" in errors


def test_tasks_need_a_tokenizer_which_plan_only_provides(run, monkeypatch, tmp_path):
    write_corpus(tmp_path / "in", make_texts(60), per_file=10)
    options = ("--input", tmp_path / "in", "--vocab_size", 320, "--unit_bytes", 4000)
    code, _, errors = run(*options, "--out", tmp_path / "out", "--task", "0/2")
    assert code == EXIT_USAGE and "--plan-only" in errors and "--tokenizer PATH" in errors
    code, told, _ = run(*options, "--out", tmp_path / "out", "--plan_only")
    assert code == 0 and "6 units" in told and "--array=0-5" in told
    assert not list((tmp_path / "out").glob("*.bin"))
    code, told, _ = run(*options, "--out", tmp_path / "out", "--plan-only", "--json")
    assert [unit["unit"] for unit in json.loads(told)["units"]] == list(range(6))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    assert run(*options, "--out", tmp_path / "in-a-job", "--plan-only")[0] == 0
    assert [run(*options, "--out", tmp_path / "out", "--task", f"{i}/2")[0] for i in range(2)] == [0, 0]
    monkeypatch.undo()
    assert run(*options, "--out", tmp_path / "alone")[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_task_refuses_a_folder_with_another_plan_even_before_the_first_token(run, many_units, tmp_path):
    assert run(*many_units, "--out", tmp_path / "out", "--plan-only")[0] == 0
    code, _, errors = run(*many_units, "--out", tmp_path / "out", "--text-key", "body", "--task", "0/2")
    assert code == EXIT_USAGE and "different: text_key)" in errors


def test_tasks_share_a_folder_with_tasks_only(run, prepare, many_units, tmp_path):
    (tmp_path / "out").mkdir()
    with prepare.locked(tmp_path / "out"):
        assert run(*many_units, "--out", tmp_path / "out", "--task", "0/2")[0] == EXIT_DATA
    with prepare.locked(tmp_path / "out", shared=True):
        assert run(*many_units, "--out", tmp_path / "out")[0] == EXIT_DATA
        assert run(*many_units, "--out", tmp_path / "out", "--task", "0/2")[0] == 0


def test_json_of_a_task_lists_what_is_missing(run, many_units, tmp_path):
    _, told, _ = run(*many_units, "--out", tmp_path / "out", "--task", "0/2", "--json")
    assert json.loads(told) == {"missing_units": [1, 3, 5, 7, 9]}


def test_receipts_and_manifest_say_nothing_of_when_and_where(undisturbed):
    for name, data in undisturbed.items():
        if name.endswith(".json"):
            assert socket.gethostname().encode() not in data
            assert not re.search(rb"secs|seconds|date|time|/tmp", data)


def test_the_manifest_says_what_was_chosen_and_describes_each_file(run, many_units, tmp_path):
    assert run(*many_units, "--out", tmp_path / "out", "--drop", "text=x")[0] == 0
    manifest = load_manifest(tmp_path / "out")
    assert manifest["options"]["drop"] == [["text", "x"]] and manifest["options"]["validation_fraction"] == 0.2
    assert (manifest["add_bos"], manifest["add_eos"], manifest["bad_files"]) == (False, True, [])
    for name, split in manifest["splits"].items():
        files = find_token_files(tmp_path / "out", name)
        assert split["file_tokens"] == {Path(file.path).name: file.n_tokens for file in files}
        assert set(split["crc32"]) == set(split["files"])
        assert split["bytes_per_token"] == pytest.approx(split["text_bytes"] / split["tokens"])


@pytest.fixture
def large_units(tmp_path):
    """Options that keep two workers busy for some seconds, with files of about equal size."""
    texts = [text * 60 for text in make_texts(160)]
    folder = write_corpus(tmp_path / "large", texts, per_file=20)
    return ("--input", folder, "--tokenizer", "bytes", "--unit-bytes", 100, "--workers", 2)


def wait_for_temporary(out: Path, process: subprocess.Popen[str]) -> Path:
    """A token file that a worker has begun."""
    while not (found := list(out.glob("*.bin.*.tmp"))):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    return found[0]


def test_a_worker_that_dies_is_an_error_with_its_unit_and_the_same_command_goes_on(start, run, large_units, tmp_path):
    out = tmp_path / "out"
    with start(MAIN, *large_units, "--out", out) as process:
        temporary = wait_for_temporary(out, process)
        os.kill(int(temporary.name.split(".")[-2]), signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_DATA
    assert re.fullmatch(r"error: a worker was killed by SIGKILL at work on unit \d+ .*fewer --workers\n", errors), (
        errors
    )
    assert run(*large_units, "--out", out, "--workers", 1)[0] == 0
    assert run(*large_units, "--out", tmp_path / "whole", "--workers", 1)[0] == 0
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "whom"),
    [
        pytest.param(signal.SIGTERM, "the command alone", id="kill"),
        pytest.param(signal.SIGINT, "all its processes", id="Ctrl-C"),
        pytest.param(signal.SIGTERM, "all its processes", id="scancel", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "the command alone", id="kill -INT", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_it_soon_and_leaves_nothing_unfinished(root, large_units, tmp_path, number, whom):
    out = tmp_path / "out"
    command = [sys.executable, str(root / "scripts" / "prepare.py"), *map(str, large_units), "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_for_temporary(out, process)
        (os.killpg if whom == "all its processes" else os.kill)(process.pid, number)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (EXIT_STOPPED, "stopped; the same command continues\n")
    assert not list(out.glob("*.tmp")) and not (out / "manifest.json").exists()


def test_only_what_dead_processes_left_is_removed(run, many_units, undisturbed, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    host = socket.gethostname()
    unfinished = {
        f"train_000001.bin.{host}.{dead.pid}.tmp": False,
        f"train_000001.bin.{host}.{os.getppid()}.tmp": True,  # lives
        f"train_000001.bin.{host}.{os.getpid()}.tmp": False,  # of an earlier process with our number
        "train_000001.bin.elsewhere.7.tmp": True,
        "train_000002.bin.elsewhere.8.tmp": False,
        "notes.tmp": True,  # somebody's
    }
    for name in unfinished:
        (out / name).write_bytes(b"x")
    for name in ("train_000002.bin.elsewhere.8.tmp", "notes.tmp"):
        os.utime(out / name, times=(time.time() - 90_000,) * 2)
    assert run(*many_units, "--out", out)[0] == 0
    assert contents(out).keys() - undisturbed.keys() == {name for name, stays in unfinished.items() if stays}


@pytest.mark.parametrize("change", ["cut", "grown", "other receipt", "no receipt"])
def test_a_unit_that_is_not_as_its_receipt_says_is_done_again(run, many_units, undisturbed, change, tmp_path):
    out = tmp_path / "out"
    run(*many_units, "--out", out, "--task", "0/2")
    shard, receipt = out / "train_000004.bin", out / "train_000004.json"
    if change == "cut":
        os.truncate(shard, shard.stat().st_size - 2)
    elif change == "grown":
        shard.write_bytes(shard.read_bytes() + b"xx")
    elif change == "other receipt":
        receipt.write_text(re.sub('"plan_id": "..', '"plan_id": "zz', receipt.read_text()))
    else:
        receipt.unlink()
    assert run(*many_units, "--out", out)[0] == 0
    assert contents(out) == undisturbed


def write_damaged(folder: Path, texts: list[str]) -> Path:
    """Three files, the second of which ends too early."""
    write_corpus(folder, texts, per_file=30)
    path = folder / "part-001.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-40])
    return folder


def test_what_is_before_the_damage_is_kept_if_asked_and_listed(run, tmp_path):
    texts = make_texts(90)
    options = ("--input", write_damaged(tmp_path / "in", texts), "--tokenizer", "bytes", "--unit-bytes", 100)
    code, _, errors = run(*options, "--out", tmp_path / "out")
    assert code == EXIT_DATA and "part-001.jsonl.gz" in errors and "--on-bad-file skip" in errors
    assert (tmp_path / "out" / "train_000000.bin").is_file()  # the first unit is kept

    code, told, _ = run(*options, "--out", tmp_path / "out", "--on_bad_file", "skip")
    manifest = load_manifest(tmp_path / "out")
    (bad,) = manifest["bad_files"]
    kept = documents_in(tmp_path / "out", "train") + documents_in(tmp_path / "out", "validation")
    assert code == 0 and manifest["counters"]["bad_files"] == 1
    assert bad["name"] == "in/part-001.jsonl.gz" and str(tmp_path) not in bad["reason"]
    assert f"kept {bad['documents']} documents of in/part-001.jsonl.gz" in told
    assert sorted(kept) == sorted(texts[:30] + texts[30 : 30 + bad["documents"]] + texts[60:])

    code, _, errors = run(*options, "--out", tmp_path / "out")
    assert code == EXIT_DATA and "part-001.jsonl.gz" in errors  # nobody said this time that it may be skipped


def test_what_is_wrong_in_a_worker_is_one_clear_error_of_the_command(run, tmp_path):
    folder = write_damaged(tmp_path / "in", make_texts(90))
    code, _, errors = run("--input", folder, "--tokenizer", "bytes", "--unit-bytes", 100, "--out", tmp_path / "out",
                          "--workers", 2)  # fmt: skip
    assert code == EXIT_DATA and errors.startswith("error: ") and errors.count("\n") == 1
    assert "part-001.jsonl.gz is damaged" in errors
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_wrong_key_is_no_damage_to_skip(run, many_units, tmp_path):
    options = ("--text-key", "body", "--on-bad-file", "skip", "--workers", 2)
    code, _, errors = run(*many_units, "--out", tmp_path / "out", *options)
    assert code == EXIT_DATA and "--text-key" in errors and errors.count("\n") == 1


def test_a_damaged_file_can_be_skipped_while_a_tokenizer_is_trained(run, tmp_path):
    options = ("--input", write_damaged(tmp_path / "in", make_texts(90)), "--vocab-size", 320)
    assert run(*options, "--out", tmp_path / "out")[0] == EXIT_DATA
    assert run(*options, "--out", tmp_path / "out", "--on-bad-file", "skip")[0] == 0


def test_rows_can_be_dropped_by_what_they_say_of_themselves(run, tmp_path):
    texts = make_texts(30)
    rows = [{"text": text, "meta": {"set": "abc"[i % 3]}, "lang": "de"[i % 2]} for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, _ = run("--input", tmp_path / "a.jsonl", "--tokenizer", "bytes", "--out", tmp_path / "out",
                     "--split", "train", "--drop", "meta.set=a", "--drop", "meta.set=b", "--drop=lang=d")  # fmt: skip
    kept = [text for i, text in enumerate(texts) if i % 3 == 2 and i % 2 == 1]
    assert code == 0 and documents_in(tmp_path / "out", "train") == kept
    assert load_manifest(tmp_path / "out")["counters"]["dropped"] == 30 - len(kept)
    code, _, errors = run("--input", tmp_path / "a.jsonl", "--tokenizer", "bytes", "--out", tmp_path / "x",
                          "--drop", "meta.set")  # fmt: skip
    assert code == EXIT_USAGE and "KEY=VALUE" in errors


@pytest.mark.parametrize("split", ["train", "validation"])
def test_all_text_can_belong_to_one_split(run, tmp_path, split):
    write_corpus(tmp_path / "in", make_texts(40))
    options = ("--input", tmp_path / "in", "--tokenizer", "bytes", "--split", split)
    code, told, errors = run(*options, "--out", tmp_path / "out")
    splits = load_manifest(tmp_path / "out")["splits"]
    other = {"train": "validation", "validation": "train"}[split]
    assert (code, errors) == (0, "") and "a boundary: " in told
    assert splits[split]["documents"] == 40 and splits[other]["files"] == []
    code, _, errors = run(*options, "--out", tmp_path / "out2", "--validation-fraction", 0.1)
    assert code == EXIT_USAGE and "leave out --validation-fraction" in errors


def test_a_held_out_folder_with_nothing_in_it_is_refused_and_needs_the_tokenizer_of_training(run, tmp_path):
    (tmp_path / "a.txt").write_text("ab")
    options = ("--input", tmp_path / "a.txt", "--split", "validation", "--out", tmp_path / "out")
    code, _, errors = run(*options, "--tokenizer", "bytes")
    assert code == EXIT_DATA and "3 validation tokens" in errors
    code, _, errors = run(*options)
    assert code == EXIT_USAGE and "needs --tokenizer" in errors


@pytest.mark.parametrize(("share", "files"), [(1.0, 7), (0.5, 3), (0.15, 1)])
def test_a_share_of_the_files_can_be_read(run, tmp_path, share, files):
    texts = make_texts(70)
    write_corpus(tmp_path / "in", texts, per_file=10)
    options = ("--input", tmp_path / "in", "--tokenizer", "bytes", "--split", "train")
    assert run(*options, "--out", tmp_path / "out", "--percentage", share)[0] == 0
    assert documents_in(tmp_path / "out", "train") == texts[: 10 * files]


def test_a_share_of_no_file_is_refused(run, many_units, tmp_path):
    code, _, errors = run(*many_units, "--out", tmp_path / "out", "--percentage", 0.05)
    assert code == EXIT_USAGE and "is none" in errors
    files = write_corpus(tmp_path / "hundred", make_texts(100), per_file=1)
    options = ("--input", files, "--tokenizer", "bytes", "--plan-only", "--json", "--unit-bytes", 1)
    _, told, _ = run(*options, "--out", tmp_path / "out", "--percentage", 0.29)
    assert len(json.loads(told)["units"]) == 29
    code, _, errors = run(*many_units, "--out", tmp_path / "out", "--percentage", 2)
    assert code == EXIT_USAGE and "--percentage 2.0 must be in (0, 1]" in errors


def test_ids_beyond_16_bits_survive(run, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"</s>": 0} | {f"w{i}": i for i in range(1, 70_000)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="</s>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text(" ".join(f"w{i}" for i in (65_535, 65_536, 69_999, 1)) + " w7" * 20)
    code, _, _ = run("--input", tmp_path / "a.txt", "--tokenizer", tmp_path / "tokenizer.json", "--out",
                     tmp_path / "out", "--split", "train")  # fmt: skip
    (file,) = find_token_files(tmp_path / "out")
    tokens = np.fromfile(file.path, file.dtype, offset=file.byte_offset).tolist()
    assert code == 0 and file.dtype == np.int32 and load_manifest(tmp_path / "out")["dtype"] == "int32"
    assert tokens == [65_535, 65_536, 69_999, 1, *[7] * 20, 0]


def test_a_tokenizer_without_eos_needs_a_word_on_separators(run, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 0, "y": 1}, unk_token="x"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("y " * 20)
    options = ("--input", tmp_path / "a.txt", "--tokenizer", tmp_path / "tokenizer.json", "--split", "train")
    code, _, errors = run(*options, "--out", tmp_path / "out")
    assert code == EXIT_USAGE and "--separator-id N, or --no-separator" in errors
    assert run(*options, "--out", tmp_path / "a", "--separator-id", 0)[0] == 0
    assert run(*options, "--out", tmp_path / "b", "--no-separator")[0] == 0
    assert [load_manifest(tmp_path / name)["splits"]["train"]["tokens"] for name in "ab"] == [21, 20]
    assert load_manifest(tmp_path / "a")["add_eos"] is False


def test_which_token_is_eos_is_not_taken_from_what_a_failed_run_left(run, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "x": 1}, unk_token="x"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
        model.save(str(tmp_path / name / "tokenizer.json"))
    (tmp_path / "with" / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    (tmp_path / "short.txt").write_text("x")
    (tmp_path / "long.txt").write_text("x " * 20)
    options = ("--split", "train", "--out", tmp_path / "out")
    assert run("--input", tmp_path / "short.txt", "--tokenizer", tmp_path / "with", *options)[0] == EXIT_DATA
    assert run("--input", tmp_path / "long.txt", "--tokenizer", tmp_path / "without", *options)[0] == 0
    assert load_manifest(tmp_path / "out")["separator_id"] == 0


def test_a_separator_that_stands_for_text_is_not_counted_as_text(run, tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 10)
    code, _, errors = run("--input", tmp_path / "a.txt", "--tokenizer", "bytes", "--out", tmp_path / "out",
                          "--split", "train", "--separator-id", 13)  # fmt: skip
    assert (code, errors) == (0, "")
    assert load_manifest(tmp_path / "out")["splits"]["train"]["table_bytes"] == 100


def test_a_disk_that_may_be_too_small_is_refused_before_the_first_byte(run, many_units, monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    code, _, errors = run(*many_units, "--out", tmp_path / "out")
    assert code == EXIT_DATA and "100 are free" in errors and errors.count("\n") == 1
    assert not list((tmp_path / "out").glob("*.bin*"))


def test_a_disk_with_room_for_the_tokens_but_not_for_the_text_is_enough(run, monkeypatch, tmp_path):
    folder = write_corpus(tmp_path / "in", make_texts(60), per_file=100)
    free_bytes = sum(path.stat().st_size for path in folder.iterdir()) // 2
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free_bytes))
    assert run("--input", folder, "--vocab-size", 320, "--out", tmp_path / "out")[0] == 0


def test_a_disk_that_fills_up_under_way_is_one_clear_error(run, many_units, undisturbed, monkeypatch, tmp_path):
    class FullDisk(io.BytesIO):
        def write(self, data: bytes) -> int:
            if len(data) > 24:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    real_open = open

    def opened(path: object, mode: str = "r", *rest: object, **options: object) -> object:
        if "train_000003.bin" in str(path) and mode == "wb":
            real_open(path, mode).close()
            return FullDisk()
        return real_open(path, mode, *rest, **options)

    monkeypatch.setattr("builtins.open", opened)
    code, _, errors = run(*many_units, "--out", tmp_path / "out")
    monkeypatch.undo()
    assert code == EXIT_DATA and "train_000003.bin: No space left" in errors and errors.count("\n") == 1
    assert len(list((tmp_path / "out").glob("train*.bin*"))) == 3
    assert run(*many_units, "--out", tmp_path / "out")[0] == 0
    assert contents(tmp_path / "out") == undisturbed


@pytest.fixture
def progress(prepare):
    return sys.modules["prep.progress"]


def test_a_log_gets_a_line_now_and_then(progress):
    now = [0.0]
    log = io.StringIO()
    with progress.Lines(100_000_000, 4, clock=lambda: now[0], stream=log) as lines:
        lines.advance(1_000_000, 1_000_000)
        assert log.getvalue() == ""
        for now[0] in (29.0, 30.0, 31.0, 59.0, 61.0):
            lines.advance(3_000_000, 5_000_000)
        lines.finish_unit()
    first, second = log.getvalue().splitlines()
    assert first == "0 of 4 units, 11.0%, 7 MB of text, 0.2 MB/s, 0:04:03 to go"
    assert "26.0%" in second


def test_a_terminal_gets_a_bar_unless_it_is_told_to_be_quiet(prepare, progress, many_units, monkeypatch, tmp_path):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    assert prepare.main([*map(str, many_units), "--out", str(tmp_path / "out")]) == 0
    assert "10/10 units" in screen.getvalue() and "MB/s" in screen.getvalue()
    screen.truncate(0)
    assert prepare.main([*map(str, many_units), "--out", str(tmp_path / "out2"), "--quiet"]) == 0
    assert screen.getvalue() == ""


def test_progress_ends_at_all_there_was_to_read_packed_or_not(units, corpus, many_units, tmp_path):
    files, _ = corpus.find_inputs([str(many_units[1])])
    assert any(file.name.endswith(".gz") for file in files)
    reading = corpus.Reading("text", 0, 0)
    unit = units.Unit(0, tuple(files), str(tmp_path), "plan", "tokenizer", 2, reading)
    steps: list[tuple[int, int]] = []
    units.run_unit(unit, Tokenizer.load("bytes"), lambda *step: steps.append(step))
    assert sum(read for _, read in steps) == unit.n_bytes
    assert sum(text for text, _ in steps) == sum(len(text) for text in make_texts(100))
    assert all(read >= 0 for _, read in steps)


def test_check_and_export_are_sub_commands(run, many_units, undisturbed, tmp_path):
    code, told, errors = run("check", tmp_path / "undisturbed", "--split", "train")
    assert (code, errors) == (0, "") and "nothing is wrong" in told
    code, told, _ = run("check", tmp_path / "undisturbed", "--json", "--characters=9")
    assert code == 0 and json.loads(told)["prepared"] is True
    (tmp_path / "undisturbed" / "train_000001.bin").unlink()
    code, _, errors = run("check", tmp_path / "undisturbed")
    assert code == EXIT_DATA and "train_000001.bin is missing" in errors
    assert run(*many_units, "--out", tmp_path / "undisturbed")[0] == 0
    code, _, _ = run("export", tmp_path / "undisturbed", "--out", tmp_path / "chunks", "--chunk", 1000)
    assert code == 0 and len(list((tmp_path / "chunks").glob("train_0_*.bin"))) > 5


def test_the_first_part_of_packed_files_stands_for_a_large_corpus_when_a_tokenizer_is_trained(
    prepare, corpus, monkeypatch, tmp_path
):
    bpe = sys.modules["prep.bpe"]
    texts = make_texts(200)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    files, _ = corpus.find_inputs([str(tmp_path / "a.jsonl.gz")])
    reading = corpus.Reading("text", 0, 0)
    assert sum(map(len, bpe._sampled_lines(files, reading, False))) > 0.9 * sum(map(len, texts))
    monkeypatch.setattr(bpe, "READ_BYTES", 10_000)
    assert 5_000 < sum(map(len, bpe._sampled_lines(files, reading, False))) < 13_000
