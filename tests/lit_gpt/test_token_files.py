"""Which files a path means, in any format, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lit_gpt.errors import DataError
from lit_gpt.packed_dataset import load_manifest, write_token_file
from lit_gpt.token_files import find_token_files


def write_files(folder, *lengths, dtype=np.uint16, name="train_{:06d}.bin"):
    """Files whose tokens count on from one file to the next."""
    first = 0
    for number, length in enumerate(lengths):
        write_token_file(folder / name.format(number), np.arange(first, first + length), dtype)
        first += length
    return find_token_files(folder)


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
