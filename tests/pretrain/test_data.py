"""From the settings to a stream: token files of any kind, what is said about them, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from lit_gpt.config import Config
from lit_gpt.errors import DataError
from lit_gpt.packed_dataset import write_token_file
from lit_gpt.tokenizer import Tokenizer
from pretrain.config import DataConfig, ModelConfig
from pretrain.corpus import model_config_for, read_corpus
from pretrain.data import check_epochs, open_train_data, open_validation_sets
from pretrain.data_config import SegmentConfig
from tests.pretrain.conftest import write_prepared

SIZES = {"n_layer": 1, "n_head": 1, "n_embd": 8, "head_size": 8, "intermediate_size": 8}
CONFIG = Config(block_size=16, vocab_size=259, **SIZES)
SEED = 3407


def foreign(folder: Path, name: str = "train_0.bin", n_tokens: int = 2000, token: int = 70) -> Path:
    """Token files that nobody describes: runs of one byte token, a control token every tenth."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = np.full(n_tokens, token)
    tokens[9::10] = tokens[-1] = 2  # a file that ends in a run of one id would be taken for padded
    write_token_file(folder / name, tokens, np.dtype("uint16"))
    return folder


def opened(data: DataConfig, config: Config = CONFIG, cache: Path | None = None):
    return open_train_data(data, config, read_corpus(data), SEED, cache)


def test_prepared_folders_and_files_of_others_make_one_stream(tmp_path):
    ours = write_prepared(tmp_path / "ours", np.full(2000, 80))
    theirs = foreign(tmp_path / "theirs")
    train = opened(DataConfig({"a": str(ours), "b": str(theirs), "c": str(theirs / "train_0.bin")}))
    assert train.packed.order.samples == {"a": 112, "b": 124, "c": 124}
    assert "data a: 1 litpkds file, 1,800 tokens, 112 samples of 16 targets" in train.notes
    assert sum("separates documents" in note for note in train.notes) == 2


def test_a_pattern_names_some_files_of_a_folder(tmp_path):
    for number in range(3):
        foreign(tmp_path / "all", f"train_slim_{number}.bin", 100)
        foreign(tmp_path / "all", f"train_star_{number}.bin", 200)
    train = opened(DataConfig(str(tmp_path / "all" / "train_slim*"), tokenizer="bytes"))
    assert train.packed.order.samples == {"train_slim": 3 * 6}


def test_the_index_is_kept_and_read_again(tmp_path):
    data = DataConfig({"a/b": str(foreign(tmp_path / "theirs"))}, tokenizer="bytes")
    first = opened(data, cache=tmp_path / "run" / "data_index")
    assert [path.name for path in (tmp_path / "run" / "data_index").iterdir()] == ["train_a_b.npz"]
    assert opened(data, cache=tmp_path / "run" / "data_index").packed.order_id == first.packed.order_id


def test_ids_that_nobody_explains_need_a_vocabulary_size(tmp_path):
    corpus = read_corpus(DataConfig(str(foreign(tmp_path))))
    with pytest.raises(ValueError, match=r"data\.tokenizer.*model\.vocab_size"):
        model_config_for(corpus, ModelConfig("1L64H"))
    assert model_config_for(corpus, ModelConfig("1L64H", vocab_size=300)).vocab_size == 300
    assert any("data.tokenizer" in note for note in corpus.notes)


def test_a_named_tokenizer_says_what_the_ids_mean(tmp_path):
    corpus = read_corpus(DataConfig(str(foreign(tmp_path)), tokenizer="bytes"))
    assert model_config_for(corpus, ModelConfig("1L64H")).vocab_size == 259
    assert corpus.tokenizer_entry["sha256"] == Tokenizer.load("bytes").fingerprint
    assert corpus.notes == ()


def test_a_named_tokenizer_that_is_not_the_folders_is_refused(tmp_path):
    ours = write_prepared(tmp_path / "ours", np.arange(2000) % 200, sha256="f" * 64)
    with pytest.raises(ValueError, match=r"different tokenizers.*data\.tokenizer bytes"):
        read_corpus(DataConfig(str(ours), tokenizer="bytes"))


def test_a_token_outside_the_vocabulary_is_refused_in_files_of_others_too(tmp_path):
    train = opened(DataConfig(str(foreign(tmp_path, token=400)), tokenizer=None))
    with pytest.raises(DataError, match=r"400.*259"):
        train.packed.samples(0, 1)


def test_a_folder_that_is_still_being_prepared_is_refused(tmp_path):
    foreign(tmp_path / "half")
    (tmp_path / "half" / "plan.json").write_text("{}")
    with pytest.raises(DataError, match="not prepared to the end or is still being prepared"):
        read_corpus(DataConfig(str(tmp_path / "half"), tokenizer="bytes"))


def test_bytes_per_token_follow_the_weights(tmp_path):
    """Nine of ten tokens of one source stand for a byte, all of the other one do."""
    paths = {"nine": str(foreign(tmp_path / "nine", n_tokens=10_001)), "ten": str(tmp_path / "ten")}
    write_prepared(tmp_path / "ten", np.full(10_000, 80))
    data = DataConfig(paths, weights={"nine": 3, "ten": 1})
    assert opened(data).bytes_per_token(0) == pytest.approx(0.9 * 0.75 + 0.25, rel=1e-3)
    by_size = (0.9 * 10_001 + 9000) / 19_001
    assert opened(DataConfig(paths)).bytes_per_token(10**6) == pytest.approx(by_size, rel=1e-3)


def test_bytes_per_token_follow_the_segment_in_force(tmp_path):
    paths = {"nine": str(foreign(tmp_path / "nine", n_tokens=10_001)), "ten": str(tmp_path / "ten")}
    write_prepared(tmp_path / "ten", np.full(10_000, 80))
    segments = [SegmentConfig(0, {"nine": 1.0}), SegmentConfig(100, {"ten": 1.0})]
    train = opened(DataConfig(paths, segments=segments, skips=[[10, 40]]))
    assert [train.bytes_per_token(position) for position in (0, 70, 71)] == pytest.approx([0.9, 0.9, 1.0], rel=1e-3)


def test_bytes_per_token_are_unknown_without_a_tokenizer(tmp_path):
    assert opened(DataConfig(str(foreign(tmp_path)))).bytes_per_token(5) is None


def test_validation_is_what_stands_beside_the_training_data(tmp_path):
    foreign(tmp_path / "a")
    foreign(tmp_path / "a", "validation_0.bin", 52)
    data = DataConfig({"a": str(tmp_path / "a"), "b": str(foreign(tmp_path / "b"))}, tokenizer="bytes")
    sets, notes = open_validation_sets(data, CONFIG, read_corpus(data))
    assert [(each.name, each.n_targets) for each in sets] == [("a", 51)]
    assert sum("no validation data" in note and str(tmp_path / "b") in note for note in notes) == 1


def test_validation_that_was_asked_for_must_be_there(tmp_path):
    data = DataConfig(str(foreign(tmp_path / "a")), validation={"held_out": str(tmp_path / "a")}, tokenizer="bytes")
    with pytest.raises(FileNotFoundError):
        open_validation_sets(data, CONFIG, read_corpus(data))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_corpus(dataclasses.replace(data, validation=str(tmp_path / "nowhere")))


def test_what_is_taken_for_granted_of_files_beside_prepared_ones_is_said_of_each(tmp_path):
    ours, theirs = write_prepared(tmp_path / "ours", np.arange(2000) % 200), foreign(tmp_path / "theirs")
    data = DataConfig({"ours": str(ours), "theirs": str(theirs)}, validation=str(theirs / "train_0.bin"))
    said = f"  its token ids are taken to be those of the tokenizer in {ours}"
    train = opened(data)
    assert [train.notes[train.notes.index(said) - 2][:12], train.notes.count(said)] == ["data theirs:", 1]
    assert open_validation_sets(data, CONFIG, read_corpus(data))[1].count(said) == 1
    named = dataclasses.replace(data, tokenizer="bytes")
    assert said not in (*opened(named).notes, *open_validation_sets(named, CONFIG, read_corpus(named))[1])


def separators(folder: Path, data: DataConfig, manifest_ids: dict[str, int | None]) -> int | None:
    """What document_mask finds in prepared folders that say this of themselves, and in what else `data` names."""
    paths = data.train_paths() if isinstance(data.train, dict) else {}
    for name, separator_id in manifest_ids.items():
        path = write_prepared(folder / name, np.full(2000, 80)) / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"separator_id": separator_id}))
        paths[name] = str(folder / name)
    return opened(dataclasses.replace(data, train=paths, document_mask=True)).separator_id


def test_documents_end_where_manifest_files_settings_or_tokenizer_say_so(tmp_path):
    theirs = {"theirs": str(foreign(tmp_path / "theirs"))}  # id 2, every tenth
    plain = foreign(tmp_path / "plain") / "train_0.bin"
    write_token_file(plain, np.arange(2000) % 200 + 50, np.dtype("uint16"))
    assert opened(DataConfig(theirs)).separator_id is None
    assert separators(tmp_path, DataConfig({}), {"a": 7, "b": 7}) == 7
    assert separators(tmp_path, DataConfig(theirs), {}) == 2
    assert separators(tmp_path, DataConfig(theirs), {"a": 2}) == 2
    assert separators(tmp_path, DataConfig(theirs, separator_id=9), {"a": 9}) == 9
    assert (
        separators(tmp_path, DataConfig({"plain": str(plain)}, tokenizer="bytes"), {}) == Tokenizer.load("bytes").eos_id
    )


@pytest.mark.parametrize(
    ("manifest_ids", "data", "message"),
    [
        ({"a": 1, "b": 2}, {}, "a: 1; .*b: 2"),
        ({"a": None}, {}, "a: none known"),
        ({"a": 1}, {"theirs": True}, "a: 1; .*theirs: 2"),
        ({"a": 1}, {"separator_id": 2}, r"data.separator_id=2 does not fit .*a: 1"),
        ({}, {"theirs": True, "separator_id": 259}, "separator_id=259 .* vocabulary of 259"),
    ],
)
def test_documents_that_do_not_end_alike_everywhere_are_no_documents(tmp_path, manifest_ids, data, message):
    theirs = {"theirs": str(foreign(tmp_path / "theirs"))} if data.pop("theirs", False) else {}
    with pytest.raises(ValueError, match=message):
        separators(tmp_path, DataConfig(theirs, **data), manifest_ids)


def test_files_of_which_nobody_knows_where_documents_end_cannot_be_masked(tmp_path):
    write_token_file(tmp_path / "train_0.bin", np.arange(2000) % 200 + 50, np.dtype("uint16"))
    with pytest.raises(ValueError, match=r"none known; .*data\.separator_id or data\.tokenizer"):
        separators(tmp_path, DataConfig({"plain": str(tmp_path)}), {})


def test_held_out_files_that_should_be_there_and_are_not_are_missing_files(tmp_path):
    """No excuse to train without validation."""
    ours = write_prepared(tmp_path / "ours", np.arange(2000) % 200)
    (ours / "validation_000000.bin").unlink()
    theirs = foreign(tmp_path / "theirs")
    (theirs / "validation_0.bin").symlink_to(tmp_path / "gone")
    for folder in (ours, theirs):
        data = DataConfig(str(folder), tokenizer="bytes")
        with pytest.raises(FileNotFoundError, match="validation_0"):
            open_validation_sets(data, CONFIG, read_corpus(data))


def test_a_path_that_names_nothing_is_refused_before_anything_else_is_asked(tmp_path):
    """A tokenizer that nobody named is the smaller mistake."""
    for path in ("nowhere", "train_slim*"):
        with pytest.raises(FileNotFoundError, match=rf"{re.escape(path)} does not exist"):
            read_corpus(DataConfig(str(tmp_path / path)))


def test_a_megatron_dataset_is_named_without_a_suffix(data_dir):
    path = data_dir("openwebtext1k") / "meg-gpt2-openwebtext_text_document"
    assert opened(DataConfig(str(path)), Config(block_size=1024, vocab_size=5000, **SIZES)).packed.order.samples == {
        "meg-gpt2-openwebtext_text_document": 1329
    }


def test_a_single_file_may_be_the_validation_set(tmp_path):
    folder = foreign(tmp_path / "a", "held_out.bin", 52)
    data = DataConfig(str(folder), validation=str(folder / "held_out.bin"), tokenizer="bytes")
    sets, _ = open_validation_sets(data, CONFIG, read_corpus(data))
    assert [each.n_targets for each in sets] == [51]


def test_epochs_count_what_was_read_before_the_run(tmp_path):
    train = opened(DataConfig(str(foreign(tmp_path)), max_epochs=2))  # 124 samples
    name = tmp_path.name
    assert check_epochs(train, 0, 62) == [f"epochs in this run: {name} 0 -> 0.5"]
    assert check_epochs(train, 62, 186)[-1] == f"warning: read more than once: {name}"
    with pytest.raises(ValueError, match=r"2\.50 times \(1\.00 times before its start\)"):
        check_epochs(train, 124, 310)


def test_epochs_count_skipped_samples_as_used_up(tmp_path):
    train = opened(DataConfig(str(foreign(tmp_path)), max_epochs=1, skips=[[0, 62]]))
    assert check_epochs(train, 0, 62) == [f"epochs in this run: {tmp_path.name} 0 -> 1"]
    with pytest.raises(ValueError, match="max_epochs=1"):
        check_epochs(train, 0, 63)


def test_a_real_megatron_file_is_a_source(data_dir):
    """1,000 documents of OpenWebText in a file of other hands: 1,361,845 tokens, ids up to 4,999."""
    folder = data_dir("openwebtext1k")
    config = Config(block_size=1024, vocab_size=5000, **SIZES)
    train = opened(DataConfig(str(folder)), config)
    assert train.packed.order.samples == {"openwebtext1k": 1361844 // 1024}
    rows = train.packed.samples(0, 64)
    assert rows.shape == (64, 1025)
    assert len(np.unique(rows)) > 2000  # text, and not the bytes of something else


def test_the_manifest_of_a_prepared_folder_tells_its_separator_so_none_is_guessed(tmp_path):
    ours = write_prepared(tmp_path / "ours", np.arange(2000) % 200)
    assert json.loads((ours / "manifest.json").read_text())["tokenizer"]["kind"] == "bytes"
    assert not any("separat" in note for note in opened(DataConfig(str(ours))).notes)
