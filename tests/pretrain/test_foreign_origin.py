"""A run that starts from a checkpoint of other tools: a Hugging Face folder, or a file of TinyLlama or prts."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from lit_gpt.checkpoint import latest, read_training, write_exchange
from lit_gpt.config import Config
from lit_gpt.tokenizer import Tokenizer
from tests.toys import toy_config, toy_weights

VOCAB = Tokenizer.load("bytes").vocab_size
CONFIG = toy_config(vocab_size=VOCAB, padded_vocab_size=VOCAB)
QWEN3 = dataclasses.replace(CONFIG, family="qwen3", qk_norm="head", head_size=8)


def as_folder(path: Path, config: Config = CONFIG) -> Path:
    """What Hugging Face would have written: nothing of ours beside it."""
    write_exchange(path, config, toy_weights(config))
    for name in ("MANIFEST.json", "lit_config.json"):
        (path / name).unlink()
    return path


def as_lineage_file(path: Path) -> Path:
    """A run of prts after 40 micro-batches of 2 on 3 devices, with moments."""
    weights = toy_weights(CONFIG)
    moments = {
        name: {"exp_avg": weight * 9, "exp_avg_sq": weight.square(), "step": torch.tensor(5.0)}
        for name, weight in weights.items()
    }
    hparams = {"micro_batch_size": 2, "devices": 3, "num_nodes": 1, "out_dir": Path("out")}
    state = {"model": weights, "optimizer": {"state": moments}, "hparams": hparams, "iter_num": 40, "step_count": 5}
    torch.save(state, path)
    return path


def settings_from(origin: Path, prepared: Path, out: Path) -> dict[str, object]:
    return {
        "out_dir": str(out),
        "init_from": str(origin),
        "model": {"name": "init_from"},
        "data": {"train": str(prepared)},
        "stages": [{"name": "more", "max_steps": 2}],
        "batch": {"global_batch_size": 4, "micro_batch_size": 2},
        "optimizer": {"learning_rate": 1e-9, "min_learning_rate": 0.0},
        "logging": {"tensorboard": False},
    }


@pytest.mark.parametrize("config", [CONFIG, QWEN3], ids=["llama", "qwen3"])
def test_a_hugging_face_folder_is_trained_on_with_its_own_sizes(pretrain, prepared, tmp_path, config):
    origin = as_folder(tmp_path / "folder", config)

    result = pretrain(settings_from(origin, prepared, tmp_path / "run"))

    assert result.returncode == 0, result.stderr
    last = read_training(latest(tmp_path / "run" / "checkpoints"))
    assert Config.from_dict(last.state["model_config"]) == config
    assert last.state["position"] == 8
    weights = toy_weights(config)
    assert all(torch.allclose(last.model[name], weight, atol=1e-6) for name, weight in weights.items())


def test_a_file_of_the_lineage_starts_with_a_new_optimizer_and_counts_what_it_has_seen(
    pretrain, prepared, tmp_path, monkeypatch
):
    monkeypatch.setattr("lit_gpt.legacy_sizes._named", lambda name: CONFIG)
    origin = as_lineage_file(tmp_path / "iter-000040-ckpt.pth")

    result = pretrain(settings_from(origin, prepared, tmp_path / "run"), "--data.start_position", "7")

    assert result.returncode == 0, result.stderr
    last = read_training(latest(tmp_path / "run" / "checkpoints"))
    assert last.state["position"] == 7 + 8
    assert last.state["parent_tokens"] == 40 * 2 * 3 * CONFIG.block_size
    assert last.state["step_count"] == 2
    assert all(slots["step"] == 2 for slots in last.optimizer.values())


def test_the_sizes_stay_known_when_the_run_is_resumed_without_its_origin(pretrain, prepared, tmp_path):
    origin = as_folder(tmp_path / "folder")
    settings = settings_from(origin, prepared, tmp_path / "run")
    assert pretrain(settings).returncode == 0
    origin.rename(tmp_path / "moved")

    result = pretrain(settings)

    assert (result.returncode, result.stderr) == (0, "")
    assert "is finished" in result.stdout


def test_a_vocabulary_that_the_embedding_has_no_rows_for_is_refused_with_the_way_out(pretrain, prepared, tmp_path):
    origin = as_folder(tmp_path / "folder", toy_config(vocab_size=100, padded_vocab_size=100))

    result = pretrain(settings_from(origin, prepared, tmp_path / "run"))

    assert result.returncode == 2
    assert "the data has 259 token ids, the embedding of init_from 100 rows; prepare the data with" in result.stderr


def test_fewer_tokens_than_rows_are_a_padded_vocabulary(pretrain, prepared, tmp_path):
    origin = as_folder(tmp_path / "folder", toy_config(vocab_size=VOCAB + 5, padded_vocab_size=VOCAB + 5))

    assert pretrain(settings_from(origin, prepared, tmp_path / "run")).returncode == 0


def test_a_folder_that_brings_another_tokenizer_is_refused(pretrain, prepared, tmp_path, data_dir):
    origin = as_folder(tmp_path / "folder")
    shutil.copyfile(data_dir("tokenizers/sp1000/test_model.model"), origin / "tokenizer.model")

    result = pretrain(settings_from(origin, prepared, tmp_path / "run"), "--dry-run")

    assert result.returncode == 2 and "was trained with another tokenizer" in result.stderr
    assert f"if the one beside {origin} is not its own, take it out of that folder" in result.stderr


def test_a_folder_that_brings_the_tokenizer_of_the_data_is_taken(pretrain, prepared, tmp_path):
    origin = as_folder(tmp_path / "folder")
    Tokenizer.load("bytes").save(origin)

    assert pretrain(settings_from(origin, prepared, tmp_path / "run"), "--dry-run").returncode == 0


def test_another_block_size_has_to_be_asked_for(pretrain, prepared, tmp_path):
    origin = as_folder(tmp_path / "folder")
    settings = settings_from(origin, prepared, tmp_path / "run")
    named = {"name": "2L16H", "n_head": 4, "n_query_groups": 2, "intermediate_size": 24, "padded_vocab_size": VOCAB}

    result = pretrain({**settings, "model": named}, "--dry-run")
    assert result.returncode == 2 and "block_size: 16 in the checkpoint, 2048 wanted" in result.stderr

    result = pretrain(settings, "--model.block_size", "8", "--dry-run")
    assert result.returncode == 0, result.stderr


def test_sizes_of_a_checkpoint_that_is_not_given_are_an_error(pretrain, prepared, tmp_path):
    settings = settings_from(tmp_path, prepared, tmp_path / "run")
    del settings["init_from"]

    result = pretrain(settings)

    assert result.returncode == 2
    assert "model.name init_from takes the sizes of init_from, which is not given" in result.stderr
