"""`pretrain data`: show names the very samples that the trainer read; check and stats as commands."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lit_gpt.errors import EXIT_DATA, EXIT_OK, EXIT_USAGE
from lit_gpt.packed_dataset import write_token_file
from lit_gpt.tokenizer import Tokenizer
from tests.pretrain.conftest import BLOCK_SIZE, Finished, write_prepared

BATCH = 4
STEPS = 14


@pytest.fixture
def show(data_command: Callable[..., Finished]) -> Callable[..., dict[str, Any]]:
    """`pretrain data show RUN ... --json`, parsed."""

    def run(folder: Path, *arguments: object) -> dict[str, Any]:
        done = data_command("show", folder, *arguments, "--json")
        assert done.returncode == EXIT_OK, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture
def trained_rows(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Every row that any training step in this test gets, in order."""
    from pretrain.data import TrainData

    rows: list[np.ndarray] = []
    original = TrainData.batches

    @contextmanager
    def recording(self: TrainData, *arguments: Any, **keywords: Any) -> Iterator[Iterator[np.ndarray]]:
        def record(batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
            for batch in batches:
                rows.extend(np.array(batch))
                yield batch

        with original(self, *arguments, **keywords) as batches:
            yield record(batches)

    monkeypatch.setattr(TrainData, "batches", recording)
    return rows


def tokens_at(sample: dict[str, Any], dtype: str = "<u2") -> list[int]:
    """What really lies where a sample is said to be."""
    return np.fromfile(sample["file"], dtype, sample["n_tokens"], offset=sample["byte_offset"]).tolist()


def rows_of_step(rows: list[np.ndarray], step: int) -> list[list[int]]:
    return [row.tolist() for row in rows[(step - 1) * BATCH : step * BATCH]]


def assert_shown_is_trained(show: Callable[..., dict[str, Any]], folder: Path, rows: list[np.ndarray]) -> None:
    assert len(rows) == STEPS * BATCH
    for step in (1, 6, 7, STEPS):
        found = show(folder, "--step", step)
        assert [tokens_at(sample) for sample in found["samples"]] == rows_of_step(rows, step), f"step {step}"


def test_every_step_of_a_run_of_two_stages_is_shown_as_it_was_trained(pretrain, show, settings, trained_rows):
    settings["logging"]["every_steps"] = 5
    settings["checkpoints"]["every_steps"] = 4

    assert pretrain(settings).returncode == EXIT_OK

    assert_shown_is_trained(show, Path(settings["out_dir"]), trained_rows)
    assert [show(settings["out_dir"], "--step", step)["stage"] for step in (6, 7)] == ["base", "grown"]


def test_a_run_that_inherits_its_position_is_shown_as_it_was_trained(
    pretrain, show, settings, finished_run, trained_rows, tmp_path
):
    base = sorted((finished_run / "checkpoints" / "stage-01").iterdir())[-1]  # after 6 steps
    settings["init_from"] = str(base)
    settings["logging"]["every_steps"] = 3
    settings["checkpoints"]["every_steps"] = 100

    assert pretrain(settings).returncode == EXIT_OK

    assert show(settings["out_dir"], "--step", 1)["first_position"] == 6 * BATCH
    assert_shown_is_trained(show, Path(settings["out_dir"]), trained_rows)


def test_a_run_resumed_with_another_order_is_shown_as_it_was_trained(
    pretrain, show, settings, trained_rows, finished_run
):
    """By consent even the past of the order may change: the steps before keep the samples that they had."""
    folder = Path(shutil.copytree(finished_run, settings["out_dir"]))
    shutil.rmtree(folder / "checkpoints" / "stage-02")  # the second sitting begins behind step 6
    settings["data"] |= {"skips": [[0, 8], [32, 40]], "allow_order_change": True}

    assert pretrain(settings).returncode == EXIT_OK

    for step in (7, STEPS):
        shown = [tokens_at(sample) for sample in show(folder, "--step", step)["samples"]]
        assert shown == rows_of_step(trained_rows, step - 6)
        assert shown != [tokens_at(sample) for sample in show(finished_run, "--step", step)["samples"]]
    assert show(folder, "--step", 6)["samples"] == show(finished_run, "--step", 6)["samples"]


def test_a_run_that_waits_for_its_first_checkpoint_is_shown_too(show, settings, tmp_path, finished_run):
    folder = Path(shutil.copytree(finished_run, tmp_path / "copy"))
    with_checkpoints = show(folder, "--step", 3)
    shutil.rmtree(folder / "checkpoints")

    without = show(folder, "--step", 3)

    assert without["samples"] == with_checkpoints["samples"]
    assert "not verified" in without["verified"]


def test_steps_to_come_are_shown_as_such(show, tmp_path, finished_run):
    folder = Path(shutil.copytree(finished_run, tmp_path / "copy"))
    shutil.rmtree(folder / "checkpoints" / "stage-02")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:7]) + '\n{"step": 8, "pos')  # killed in mid-line

    assert show(folder, "--step", 7)["trained"] is True
    found = show(folder, "--step", 8)

    assert found["trained"] is False
    assert found["samples"] == show(finished_run, "--step", 8)["samples"]


def test_a_position_is_shown_with_its_step(show, finished_run):
    found = show(finished_run, "--position", 6 * BATCH + 1, "--samples", 2)

    assert (found["step"], found["first_position"], found["stop_position"]) == (7, 24, 28)
    assert [sample["position"] for sample in found["samples"]] == [25, 26]
    assert found["samples"] == show(finished_run, "--step", 7)["samples"][1:3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--step", 15), "step 15 is beyond the run's plan of 14 steps"),
        (("--step", 0), "step 0 does not exist: steps count from 1"),
        (("--position", 56), "--position 56 is no sample of this run, which reads samples 0 to 55"),
        (("--position=-1",), "--position -1 is no sample of this run"),
        (("--step", 1, "--samples", 0), "--samples 0"),
        ((), "one of the arguments --step --position is required"),
        (("--step", 1, "--smaples", 3), "did you mean --samples?"),
        (("--step", 1, "--data.tran", "x"), "did you mean"),
    ],
)
def test_what_cannot_be_shown_is_refused(data_command, finished_run, arguments, message):
    done = data_command("show", finished_run, *arguments)

    assert done.returncode == EXIT_USAGE and message in done.stderr and done.stdout == ""


def test_no_run_is_no_run(data_command, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        done = data_command("show", folder, "--step", 1)
        assert done.returncode == EXIT_DATA and str(folder) in done.stderr


def test_the_text_is_that_of_the_tokens(show, finished_run):
    (sample,) = show(finished_run, "--step", 2, "--samples", 1)["samples"]

    assert sample["text"] == Tokenizer.load("bytes").decode(tokens_at(sample))
    assert len(show(finished_run, "--step", 2, "--characters", 5)["samples"][0]["text"]) == 5


def test_shown_for_people(data_command, finished_run):
    done = data_command("show", finished_run, "--step", "8", "--samples=1")

    assert done.returncode == EXIT_OK
    assert "step 8 of 14 (stage grown), trained on: samples 28 to 31 of the permuted order" in done.stdout
    assert "verified against" in done.stdout and "train_000000.bin from byte" in done.stdout
    assert len(done.stdout.splitlines()) == 4  # line breaks in the text are written as \n


def test_other_data_in_the_same_place_is_refused_with_the_field(data_command, finished_run, prepared, tmp_path):
    other = write_prepared(tmp_path / "other", np.random.default_rng(0).integers(3, 259, 11000))

    done = data_command("show", finished_run, "--step", 3, f"--data.train.{prepared.name}", other)

    assert done.returncode == EXIT_DATA and done.stdout == ""
    assert "this is not the data that" in done.stderr and f"data.sources.{prepared.name}.fingerprint" in done.stderr
    assert "allow_order_change" not in done.stderr  # a way out for training, not for looking


def test_settings_that_the_run_did_not_have_are_refused_with_the_field(data_command, show, finished_run, tmp_path):
    done = data_command("show", finished_run, "--step", 3, "--data.skips", "[[0, 4]]")
    assert done.returncode == EXIT_DATA and "data.skips: the checkpoint has []" in done.stderr

    copy = Path(shutil.copytree(finished_run, tmp_path / "copy"))
    (copy / "config.yaml").write_text(yaml.safe_dump(yaml.safe_load((copy / "config.yaml").read_text()) | {"seed": 1}))
    assert show(copy, "--step", 3)["samples"] == show(finished_run, "--step", 3)["samples"]


def test_data_that_moved_is_named_on_the_command_line(data_command, show, finished_run, prepared, tmp_path):
    moved = Path(shutil.copytree(prepared, tmp_path / "moved"))

    before = show(finished_run, "--step", 3)["samples"]
    after = show(finished_run, "--step", 3, f"--data.train.{prepared.name}", moved)["samples"]

    assert [sample["file"] for sample in after] == [str(moved / "train_000000.bin")] * BATCH
    assert [tokens_at(sample) for sample in after] == [tokens_at(sample) for sample in before]
    done = data_command("show", finished_run, "--step", 3, "--data.train", tmp_path / "gone")
    assert done.returncode == EXIT_DATA and f"{tmp_path / 'gone'} does not exist" in done.stderr


def test_a_run_on_token_files_from_elsewhere_that_begins_at_a_given_position(
    pretrain, show, settings, tmp_path, trained_rows, root
):
    tokens = Tokenizer.load("bytes").encode((root / "LICENSE").read_text(encoding="utf-8"))
    tokens.astype("<u2").tofile(tmp_path / "train.bin")
    write_token_file(tmp_path / "more.bin", tokens[::-1], np.int32)
    settings["data"] = {
        "train": {"raw": str(tmp_path / "train.bin"), "kds": str(tmp_path / "more.bin")},
        "weights": {"raw": 0.25, "kds": 0.75},
        "tokenizer": "bytes",
        "start_position": 1234,
    }
    settings["model"]["vocab_size"] = 259
    settings["stages"] = [{"name": "only", "max_steps": 5}]
    assert pretrain(settings).returncode == EXIT_OK
    folder = Path(settings["out_dir"])

    found = show(folder, "--step", 5)

    assert found["first_position"] == 1234 + 4 * BATCH
    ids = [tokens_at(sample, {"raw": "<u2", "kds": "<i4"}[sample["source"]]) for sample in found["samples"]]
    assert ids == rows_of_step(trained_rows, 5)
    assert [sample["text"] for sample in found["samples"]] == [Tokenizer.load("bytes").decode(each) for each in ids]
    without = show(folder, "--step", 5, "--data.tokenizer", "null")
    assert [sample["text"] for sample in without["samples"]] == [" ".join(map(str, each))[:300] for each in ids]
    assert any("no tokenizer is known" in note for note in without["notes"])


def test_check_prints_and_exits_by_what_it_finds(data_command, prepared, tmp_path):
    folder = Path(shutil.copytree(prepared, tmp_path / "data"))

    done = data_command("check", folder)
    assert done.returncode == EXIT_OK and done.stdout.endswith("nothing is wrong\n") and done.stderr == ""

    (folder / "tokenizer_bytes.json").unlink()
    (folder / "train_000000.bin").write_bytes(b"LITPKDS")
    done = data_command("check", folder, "--documents", "1")
    assert done.returncode == EXIT_DATA and done.stderr.startswith("2 problems:\n")
    assert "train_000000.bin is truncated" in done.stderr and "tokenizer cannot be read" in done.stderr
    done = data_command("check", folder, "--json")
    assert done.returncode == EXIT_DATA and done.stderr == ""
    assert len(json.loads(done.stdout)["problems"]) == 2


def test_options_of_check_are_heard_in_both_spellings(data_command, tmp_path):
    np.array([70, 71, 260, 5], dtype="<u4").tofile(tmp_path / "train.bin")

    for option in ("--vocab-size", "--vocab_size"):
        done = data_command("check", tmp_path, "--dtype", "uint32", option, "260", "--json")
        assert done.returncode == EXIT_DATA
        assert ["holds token 260" in problem for problem in json.loads(done.stdout)["problems"]] == [True]
        assert data_command("check", tmp_path, "--dtype=uint32", f"{option}=261").returncode == EXIT_OK


def test_stats_as_json_and_for_people(data_command, prepared):
    done = data_command("stats", prepared, "--block_size", BLOCK_SIZE, "--tokens", "20k", "--json")
    train, validation = json.loads(done.stdout)["splits"]
    assert done.returncode == EXIT_OK
    assert train["samples"] == (train["tokens"] - 1) // BLOCK_SIZE and validation["name"] == "validation"
    assert train["epochs"] == pytest.approx(20_000 / (train["samples"] * BLOCK_SIZE))

    text = data_command("stats", prepared).stdout
    assert f"{train['tokens']:,} (uint16) in 1 litpkds file" in text and "e' " in text


@pytest.mark.parametrize("arguments", [("--tokens", "many"), ("--block-size", "0"), ("--dtype", "uint16")])
def test_bad_options_of_stats_are_refused(data_command, prepared, arguments):
    done = data_command("stats", prepared, *arguments)

    assert done.returncode == EXIT_USAGE and done.stderr.startswith("error: ")


def test_text_that_the_terminal_cannot_show_is_escaped(tmp_path):
    Tokenizer.load("bytes").encode("naïve ↑").astype("<u2").tofile(tmp_path / "train.bin")

    done = subprocess.run(
        [sys.executable, "-m", "pretrain", "data", "check", tmp_path, "--tokenizer", "bytes"],
        capture_output=True,
        env={"PYTHONIOENCODING": "ascii", "PYTHONWARNINGS": "error"},
    )

    assert done.returncode == EXIT_OK, done.stderr
    assert rb"na\xefve \u2191" in done.stdout


@pytest.mark.parametrize("arguments", [[], ["show"], ["check"], ["stats"]])
def test_help_needs_neither_torch_nor_numpy(arguments):
    code = (
        f"import sys; sys.argv = ['pretrain', 'data', *{arguments!r}, '--help']\n"
        "from pretrain.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit as leaving:\n    assert not leaving.code\n"
        "assert not {'torch', 'numpy', 'jsonargparse'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "usage: pretrain data" in done.stdout


def test_check_and_stats_do_not_import_torch(prepared):
    code = (
        "import sys; from pretrain.data_command import main\n"
        f"assert main(['check', {str(prepared)!r}]) == main(['stats', {str(prepared)!r}]) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr


def test_no_command_is_answered_with_the_help(data_command):
    done = data_command()

    assert done.returncode == EXIT_USAGE and "show" in done.stderr and done.stdout == ""


def test_what_is_not_known_of_foreign_files_is_not_said_as_a_fact(data_command, tmp_path):
    np.full(1000, 70, dtype="<u2").tofile(tmp_path / "corpus_text_document.bin")

    done = data_command("check", tmp_path)

    assert "between documents: not known; seen of what it could be: " in done.stdout
    assert "give --dtype if they are of another type; if it is Megatron's, copy the .idx beside it" in done.stdout
    assert "data.dtype" not in done.stdout + done.stderr
    (tmp_path / "corpus_text_document.bin").write_bytes(bytes(1001))
    refused = data_command("check", tmp_path)
    assert refused.returncode == EXIT_DATA and "data.dtype" not in refused.stdout + refused.stderr
