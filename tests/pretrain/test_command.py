"""Bad input: one clear message, an exit code that says whose fault it is, and nothing half-written."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from lit_gpt.checkpoint import latest
from lit_gpt.tokenizer import Tokenizer
from tests.pretrain.conftest import Finished, write_prepared


def assert_refused(result: Finished, code: int, *words: str) -> None:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    for word in words:
        assert word in result.stderr


def test_a_missing_corpus_is_named(settings, pretrain, tmp_path):
    result = pretrain({**settings, "data": {"train": str(tmp_path / "nowhere")}})
    assert_refused(result, 3, "nowhere", "scripts/prepare.py")
    assert not Path(settings["out_dir"]).exists()


@pytest.mark.parametrize("n_tokens", [0, 3])
def test_a_corpus_without_a_single_sample_is_refused(settings, pretrain, tmp_path, n_tokens):
    data = write_prepared(tmp_path / "data", Tokenizer.load("bytes").encode("abc")[:n_tokens])
    assert_refused(pretrain({**settings, "data": {"train": str(data)}}), 3, "block_size", "16")


def test_a_truncated_token_file_is_refused_before_training(settings, pretrain, tmp_path):
    data = write_prepared(tmp_path / "data", np.arange(2000) % 200)
    victim = data / "train_000000.bin"
    victim.write_bytes(victim.read_bytes()[:-7])
    assert_refused(pretrain({**settings, "data": {"train": str(data)}}), 3, str(victim))


@pytest.mark.parametrize("content", ["[]", "{}", '{"tokenizer": {}, "splits": {}}', "{"])
def test_a_manifest_that_is_none_is_refused(settings, pretrain, tmp_path, content):
    data = write_prepared(tmp_path / "data", np.arange(2000) % 200)
    (data / "manifest.json").write_text(content)
    assert_refused(pretrain({**settings, "data": {"train": str(data)}}), 3, "manifest.json", "prepare")


def test_a_vocabulary_that_is_not_the_datas_is_refused_with_both_numbers(settings, pretrain):
    settings["model"] = {**settings["model"], "vocab_size": 32000}
    assert_refused(pretrain(settings), 2, "32000", "259", "vocab_size")


def test_two_tokenizers_are_refused(settings, pretrain, prepared, tmp_path):
    other = write_prepared(tmp_path / "other", np.arange(2000) % 200, sha256="another")
    settings["data"] = {"train": {"a": str(prepared), "b": str(other)}}
    assert_refused(pretrain(settings), 2, "different tokenizers")


def test_a_layer_map_that_names_no_layer_is_refused_before_the_base_is_trained(settings, pretrain):
    settings["stages"][1] = {"name": "grown", "operator": "partial", "layer_map": "1-2-1", "max_steps": 2}
    assert_refused(pretrain(settings), 2, "stage 'grown'", "layer 2")
    assert not Path(settings["out_dir"]).exists()


def test_reading_the_data_too_often_is_refused_with_the_number_of_epochs(settings, pretrain):
    settings["data"] = {**settings["data"], "max_epochs": 0.01}
    assert_refused(pretrain(settings), 2, "data.max_epochs")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(settings, pretrain, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert_refused(pretrain({**settings, "out_dir": str(tmp_path / "locked" / "run")}), 3, "locked")


def test_an_out_dir_below_a_file_is_refused(settings, pretrain, tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(pretrain({**settings, "out_dir": str(tmp_path / "file" / "run")}), 3, "file")


def test_two_jobs_on_one_folder_are_refused(settings, pretrain):
    folder = Path(settings["out_dir"])
    folder.mkdir()
    with (folder / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_refused(pretrain(settings), 3, "another process")


def test_a_loss_that_is_no_number_stops_before_the_update_and_names_the_samples(settings, pretrain):
    settings["optimizer"] = {"learning_rate": 1e30, "grad_clip": 0}
    settings["schedule"] = {"kind": "wsd"}
    result = pretrain(settings)
    assert_refused(result, 4, "step", "Samples", "learning_rate")
    last = latest(Path(settings["out_dir"]) / "checkpoints")
    assert (str(last) if last else "none") in result.stderr


def test_starting_from_another_model_names_every_size(settings, pretrain, tmp_path):
    base = {**settings, "stages": [{"name": "base", "n_layer": 1, "max_steps": 2}]}
    assert pretrain(base).returncode == 0
    checkpoint = latest(Path(settings["out_dir"]) / "checkpoints")
    other = {
        **settings,
        "out_dir": str(tmp_path / "other"),
        "stages": [{"name": "main", "max_steps": 2}],
        "init_from": str(checkpoint),
    }
    assert_refused(pretrain(other), 2, "n_layer: 1 in the checkpoint, 3 wanted", "grow apply")


def test_fresh_deletes_nothing_before_everything_else_is_checked(settings, pretrain, finished_run):
    folder = Path(shutil.copytree(finished_run, settings["out_dir"]))
    inside = str(latest(folder / "checkpoints"))
    assert_refused(pretrain({**settings, "init_from": inside}, "--fresh"), 2, "would delete")
    assert_refused(pretrain({**settings, "init_from": "nowhere"}, "--fresh"), 3, "nowhere")
    assert_refused(pretrain({**settings, "device": "tpu"}, "--fresh"), 2, "device")
    assert latest(folder / "checkpoints") is not None


def test_a_baseline_does_not_start_from_a_checkpoint(settings, pretrain):
    assert_refused(pretrain({**settings, "init_from": "somewhere"}, "--scratch"), 2, "init_from")


def test_help_is_given_wherever_it_is_asked_for(settings, pretrain):
    result = pretrain(settings, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "Blocks during this stage" in result.stdout or "--stages" in result.stdout


def test_starting_with_another_tokenizer_is_refused(settings, pretrain, finished_run, tmp_path):
    other = write_prepared(tmp_path / "other", np.arange(2000) % 200, sha256="f" * 64)
    change = {"init_from": str(latest(finished_run / "checkpoints")), "data": {"train": str(other)}}
    result = pretrain({**settings, **change, "stages": [{"name": "main", "max_steps": 2}]})
    assert_refused(result, 2, "another tokenizer", "--tokenizer")


def test_the_fields_of_a_stage_can_be_asked_for(settings, pretrain, capsys):
    with pytest.raises(SystemExit):
        pretrain(settings, "--stages.help")
    assert "--stages.optimizer_policy" in capsys.readouterr().out


def test_a_dry_run_prints_the_plan_and_writes_nothing(settings, pretrain):
    result = pretrain(settings, "--dry-run")
    assert result.returncode == 0
    assert "layer map 1 1 1" in result.stdout
    assert not Path(settings["out_dir"]).exists()


def on_a_small_disk(command, size_kib: int, mount: Path) -> None:
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.decode().strip()}")
    try:
        command()
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_stops_cleanly_and_keeps_the_last_good_checkpoint(settings, pretrain, tmp_path):
    mount = tmp_path / "small"

    def check():
        small = {**settings, "out_dir": str(mount / "run"), "checkpoints": {"every_steps": 1, "keep_last": 9}}
        result = pretrain(small)
        assert_refused(result, 3, "free")
        names = {path.name for path in (mount / "run" / "checkpoints").glob("*/*")}
        assert names, "at least one checkpoint fits"
        assert all(name.startswith("step-") for name in names), "nothing half-written"
        assert latest(mount / "run" / "checkpoints") is not None

    on_a_small_disk(check, 3000, mount)


def test_a_folder_without_token_files_is_told_of_before_its_vocabulary(settings, pretrain, tmp_path):
    (tmp_path / "empty").mkdir()
    refused = pretrain({**settings, "data": {"train": str(tmp_path / "empty")}})
    assert_refused(refused, 3, f"{tmp_path / 'empty'} holds no train* file")
    assert "token ids" not in refused.stderr
