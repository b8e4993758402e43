"""Runs on token files as they are found in the wild, and what runs write about their data."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from lit_gpt.checkpoint import latest, read_training
from lit_gpt.errors import NonFiniteError
from lit_gpt.legacy_order import LegacyOrder
from lit_gpt.packed_dataset import write_token_file
from lit_gpt.settings_files import merge
from lit_gpt.tokenizer import Tokenizer
from pretrain.changed_settings import changed_settings
from pretrain.command_line import config_of
from pretrain.config import BatchConfig, DataConfig, to_plain
from pretrain.world import World
from tests.pretrain.conftest import BLOCK_SIZE, write_prepared
from tests.pretrain.test_data import CONFIG, foreign, opened

BLOCKS_PER_FILE = 4


@pytest.fixture(scope="session")
def tinyllama(tmp_path_factory) -> Path:
    """A folder as the scripts of TinyLlama leave it: equally long files of two sets by two processes, and held-out
    ones. 18 and 17 files for training, so that two ranks of the old reader never read 2 and 1 of them."""
    folder = tmp_path_factory.mktemp("slim_star")
    random = np.random.default_rng(1)
    for name, n_files in (("train_slim", 18), ("train_star", 17), ("validation", 2)):
        for number in range(n_files):
            tokens = random.integers(3, 259, BLOCKS_PER_FILE * (BLOCK_SIZE + 1))
            path = folder / f"{name}_{number % 2}_{number // 2:010d}.bin"
            write_token_file(path, tokens, np.dtype("uint16"))
    return folder


@pytest.fixture
def short(settings) -> dict[str, object]:
    """Two steps of one block."""
    changes = {"stages": [{"name": "main", "n_layer": 1, "max_steps": 2}], "validation": {"every_steps": 0}}
    return {**settings, **changes}


def tinyllama_data(folder: Path, **more: object) -> dict[str, object]:
    paths = {"slim": f"{folder}/train_slim*", "star": f"{folder}/train_star*"}
    weights = {"slim": 0.693584, "star": 0.306416}
    return {"train": paths, "weights": weights, "validation": str(folder), "tokenizer": "bytes", **more}


def records(settings: dict, name: str) -> list[dict]:
    return [json.loads(line) for line in (Path(settings["out_dir"]) / name).read_text().splitlines()]


def test_a_folder_of_tinyllamas_is_trained_on(short, pretrain, tinyllama):
    result = pretrain({**short, "data": tinyllama_data(tinyllama)})
    assert result.returncode == 0, result.stderr
    assert "data slim: 18 litpkds files, 1,224 tokens, 72 samples of 16 targets" in result.stdout
    assert "epochs in this run: slim 0 -> 0.0" in result.stdout
    evaluated = {record["metric"]: record["value"] for record in records(short, "evals.jsonl")}
    assert evaluated["bpb"] == pytest.approx(evaluated["loss"] / np.log(2), rel=1e-6)
    assert records(short, "evals.jsonl")[0]["n"] == 2 * (BLOCKS_PER_FILE * (BLOCK_SIZE + 1) - 1)


def test_the_legacy_order_is_what_the_old_reader_reads(short, pretrain, tinyllama, batches_of):
    data = tinyllama_data(tinyllama, order="legacy", legacy_world_size=2, start_position=24)
    result = pretrain({**short, "data": data})
    assert result.returncode == 0, result.stderr
    assert "data slim: 2 of 18 files are never read" in result.stdout
    assert "data star: 1 of 17 files are never read" in result.stdout

    files = {name: sorted(tinyllama.glob(f"train_{name}*")) for name in ("slim", "star")}
    counts = {name: len(each) for name, each in files.items()}
    order = LegacyOrder(counts, dict.fromkeys(counts, BLOCKS_PER_FILE), 3407, data["weights"], 2)
    expected = []
    for source, sample in zip(*order.locate(np.arange(24, 32)), strict=True):
        number, block = divmod(int(sample), BLOCKS_PER_FILE)
        tokens = np.fromfile(files[order.names[source]][number], np.uint16, offset=24)
        expected.append(tokens[block * (BLOCK_SIZE + 1) :][: BLOCK_SIZE + 1])
    assert np.array_equal(np.concatenate(batches_of), expected)


def test_a_run_that_starts_from_a_legacy_one_keeps_its_order(short, pretrain, tinyllama, tmp_path):
    base = {**short, "data": tinyllama_data(tinyllama, order="legacy", legacy_world_size=2)}
    assert pretrain(base).returncode == 0
    changes = {"out_dir": str(tmp_path / "next"), "init_from": str(latest(Path(base["out_dir"]) / "checkpoints"))}
    data = {key: value for key, value in tinyllama_data(tinyllama).items() if key != "weights"}
    result = pretrain({**short, **changes, "data": data})
    assert result.returncode == 0, result.stderr
    assert "data.order as in init_from: legacy" in result.stdout
    state = read_training(latest(tmp_path / "next" / "checkpoints")).state["data"]
    assert (state["order"], state["world_size"], state["position"]) == ("legacy", 2, 16)
    refused = pretrain({**short, **changes, "data": {**data, "order": "permuted"}, "out_dir": str(tmp_path / "other")})
    assert refused.returncode == 2
    assert "data.order: the checkpoint has 'legacy', this run has 'permuted'" in refused.stderr


def test_a_megatron_file_of_other_hands_is_trained_on(short, pretrain, data_dir):
    folder = data_dir("openwebtext1k")
    data = {"train": str(folder), "tokenizer": str(folder)}
    changes = {"data": data, "stages": [{"name": "main", "n_layer": 1, "max_steps": 3}]}
    result = pretrain({**short, **changes})
    assert result.returncode == 0, result.stderr
    assert "1,361,845 tokens" in result.stdout
    assert "separates documents" in result.stdout
    assert "no validation data beside" in result.stdout
    metrics = records(short, "metrics.jsonl")
    assert [record["position"] for record in metrics] == [4, 8, 12]
    bytes_per_token = metrics[0]["loss"] / np.log(2) / metrics[0]["bpb"]
    assert 3 < bytes_per_token < 4.5
    state = read_training(latest(Path(short["out_dir"]) / "checkpoints")).state
    assert (state["tokenizer"]["vocab_size"], state["model_config"]["vocab_size"]) == (5000, 5000)


def test_every_source_is_validated_by_its_name(short, pretrain, tmp_path):
    random = np.random.default_rng(0)
    train = {name: str(write_prepared(tmp_path / name, random.integers(3, 259, 1000))) for name in ("a", "b")}
    assert pretrain({**short, "data": {"train": train}}).returncode == 0
    found = records(short, "evals.jsonl")
    assert {(each["set"], each["metric"]) for each in found} == {
        (name, metric) for name in train for metric in ("loss", "perplexity", "bpb")
    }
    assert len({each["data"] for each in found}) == 2
    assert all(each["value"] > 0 and each["limit"] is None for each in found)


def test_a_limited_value_is_marked_as_such(short, pretrain):
    assert pretrain({**short, "validation": {"max_tokens": "64"}}).returncode == 0
    assert {(each["n"], each["limit"]) for each in records(short, "evals.jsonl")} == {(64, 64)}
    assert pretrain({**short, "validation": {"max_tokens": "1B"}}, "--fresh").returncode == 0
    assert {each["limit"] for each in records(short, "evals.jsonl")} == {None}


def test_without_any_validation_data_a_run_goes_on_and_says_so_once(short, pretrain, tmp_path):
    result = pretrain({**short, "data": {"train": str(foreign(tmp_path / "theirs")), "tokenizer": "bytes"}})
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("no validation data") == 1
    assert not (Path(short["out_dir"]) / "evals.jsonl").exists()


def test_a_bad_token_that_only_training_meets_stops_the_run_with_one_message(short, pretrain, tmp_path):
    """It is read ahead by a thread: its error must come out where the batches are used, and end the thread."""
    folder = foreign(tmp_path / "theirs", n_tokens=100)
    tokens = np.arange(100)
    tokens[8::16] = 300
    write_token_file(folder / "train_1.bin", tokens, np.dtype("uint16"))
    data = {"train": str(folder)}
    result = pretrain({**short, "data": data, "model": {**short["model"], "vocab_size": 259}})
    assert result.returncode == 3
    assert "train_1.bin" in result.stderr
    assert "300" in result.stderr
    assert "Traceback" not in result.stderr


def test_another_tokenizer_is_refused_on_resume(short, pretrain, tmp_path, data_dir):
    folder = foreign(tmp_path / "theirs")
    data = {"train": str(folder), "tokenizer": "bytes"}
    assert pretrain({**short, "data": data}).returncode == 0
    result = pretrain({**short, "data": {**data, "tokenizer": str(data_dir("openwebtext1k"))}})
    assert result.returncode == 2
    assert "another tokenizer" in result.stderr


def test_a_dry_run_tells_about_the_data_and_writes_nothing(short, pretrain, tinyllama):
    result = pretrain({**short, "data": tinyllama_data(tinyllama)}, "--dry-run")
    assert result.returncode == 0
    assert "data star: 17 litpkds files" in result.stdout
    assert "validation " in result.stdout
    assert not Path(short["out_dir"]).exists()


def test_settings_saved_before_there_were_data_orders_are_no_other_settings(short):
    config = config_of(short)
    saved = json.loads(json.dumps(to_plain(config)))
    new = ("order", "legacy_world_size", "segments", "skips", "window", "tokenizer", "dtype")
    for key in new:
        del saved["data"][key]
    assert changed_settings(saved, config) == []
    changed = config_of(merge(short, {"data": {"window": 4, "dtype": "uint16"}}))
    assert changed_settings(saved, changed) == [
        "data.dtype: None in the checkpoint, 'uint16' now",
        "data.window: None in the checkpoint, 4 now",
    ]


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 1), (1, 6), (2, 3), (3, 2), (6, 1)])
def test_ranks_together_read_the_same_global_batches(tmp_path, world_size, micro_batch_size):
    train = opened(DataConfig(str(foreign(tmp_path))))
    batch = BatchConfig(global_batch_size=6, micro_batch_size=micro_batch_size)
    shares = []
    for rank in range(world_size):
        with train.batches(5, 4, batch, World(rank, world_size)) as rows:
            shares.append(np.concatenate(list(rows)).reshape(4, 6 // world_size, CONFIG.block_size + 1))
    together = np.concatenate(shares, axis=1).reshape(24, -1)
    assert np.array_equal(together, train.packed.read(np.arange(5, 29)))


def end_normally() -> None:
    pass


def send_a_signal() -> None:
    signal.raise_signal(signal.SIGTERM)


def diverge() -> None:
    raise NonFiniteError("no number")


@pytest.mark.parametrize(("happens", "code"), [(end_normally, 0), (send_a_signal, 75), (diverge, 4)])
def test_the_thread_that_reads_ahead_ends_with_the_run_however_it_ends(short, pretrain, monkeypatch, happens, code):
    """The batches are so large that it cannot have read them all when the first step is done."""
    from pretrain import loop

    was_reading = []

    def advance(*arguments):
        was_reading.append("read-ahead" in threads())
        original(*arguments)
        happens()

    def threads():
        return [thread.name for thread in threading.enumerate()]

    original = loop.advance
    monkeypatch.setattr(loop, "advance", advance)
    large = {"batch": {"global_batch_size": 600, "micro_batch_size": 300}}
    stages = [{"name": "main", "n_layer": 1, "max_steps": 4}]
    assert pretrain({**short, **large, "stages": stages}).returncode == code
    assert was_reading[0]
    assert "read-ahead" not in threads()


def test_a_tokenizer_that_seems_to_be_another_one_is_warned_of(short, pretrain, tmp_path):
    folder = tmp_path / "foreign"
    folder.mkdir()
    write_token_file(folder / "train_0.bin", 70 + np.arange(3000) % 50, np.dtype("<u2"))
    result = pretrain({**short, "data": {"train": str(folder), "tokenizer": "bytes"}})
    assert result.returncode == 0
    assert "warning: data foreign: no separator found" in result.stderr
    result = pretrain({**short, "data": {"train": str(folder)}}, "--model.vocab_size", "259", "--fresh")
    assert "no separator found" in result.stdout
    assert "no separator" not in result.stderr


def test_the_tokenizer_beside_token_files_of_others_is_used_where_nobody_names_one(short, pretrain, tmp_path):
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_token_file(tmp_path / name / "train_0.bin", random.integers(3, 259, 3000), np.dtype("<u2"))
    settings = {**short, "data": {"train": {name: str(tmp_path / name) for name in ("a", "b")}}}
    Tokenizer.load("bytes").save(tmp_path / "a")
    refused = pretrain(settings)
    assert refused.returncode == 2
    assert "data.tokenizer" in refused.stderr
    Tokenizer.load("bytes").save(tmp_path / "b")
    result = pretrain(settings)
    assert result.returncode == 0, result.stderr
    assert f"tokenizer: that of {tmp_path / 'a'}, beside the token files" in result.stdout
    assert records(short, "metrics.jsonl")[0]["bpb"] is not None
