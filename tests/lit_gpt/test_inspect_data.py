"""Inspecting token files: every kind of damage is named, all at once, and the numbers are those of the tokens."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.errors import DataError
from lit_gpt.inspect_data import check_data, data_stats
from lit_gpt.packed_dataset import TokenFile, read_header, write_token_file
from lit_gpt.token_scan import DocumentLengths, IdCounts, read_tokens, scan_file
from lit_gpt.token_text import TokenText, show_documents, visible
from lit_gpt.tokenizer import Tokenizer

HEADER_BYTES = 24
EOS = 2


def prepare(root: Path, *arguments: object) -> None:
    command = [sys.executable, str(root / "scripts" / "prepare.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def pristine(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as scripts/prepare.py leaves it: 40 documents, a tenth held out, bytes as tokens."""
    folder = tmp_path_factory.mktemp("prepared")
    lines = [json.dumps({"text": f"Document {i}.\n" + "word " * (i + 1)}) for i in range(40)]
    (folder / "in.jsonl").write_text("\n".join(lines))
    prepare(
        root, "--input", folder / "in.jsonl", "--tokenizer", "bytes", "--out", folder / "out",
        "--validation-fraction", 0.3,
    )  # fmt: skip
    return folder / "out"


@pytest.fixture
def prepared(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "data"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_split(folder: Path, split: str, **changes: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"][split] |= changes
    (folder / "manifest.json").write_text(json.dumps(manifest))


def flip_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def only_problem(folder: Path, **options: object) -> str:
    problems = check_data(folder, **options).problems
    assert len(problems) == 1, problems
    return problems[0]


def test_a_prepared_folder_has_no_problems(prepared):
    found = check_data(prepared)

    manifest = json.loads((prepared / "manifest.json").read_text())
    assert found.problems == () and found.prepared and found.vocab_size == 259
    assert [split.name for split in found.splits] == ["train", "validation"]
    for split in found.splits:
        entry = manifest["splits"][split.name]
        assert (split.tokens, split.files, split.checksums) == (entry["tokens"], 1, 1)
        assert split.separator_id == EOS
        assert split.boundaries == {"<|eos 2|>": entry["documents"], "<|bos 1|>": 0}
    assert "train: bos (1) never occurs; 2 alone stands between documents" in found.notes


def test_documents_are_shown_with_their_boundaries(prepared):
    first, middle, last = check_data(prepared).splits[0].documents

    assert first.start.startswith("Document ") and first.before == "" and first.first_token == 0
    assert first.start.endswith("word <|eos 2|>")
    assert middle.before.endswith("<|eos 2|>") and middle.start.startswith("Document ")
    assert last.before.endswith("<|eos 2|>") and last.start.endswith("<|eos 2|>") and last.is_whole


def test_a_flipped_byte_names_its_file(prepared):
    flip_byte(prepared / "train_000000.bin", HEADER_BYTES + 200)

    problem = only_problem(prepared)

    assert "train_000000.bin is damaged" in problem
    assert "train_000000.json has " in problem and "manifest.json has " in problem


def test_a_byte_flipped_in_the_header_names_its_file(prepared):
    flip_byte(prepared / "validation_000000.bin", 16)

    assert "validation_000000.bin" in only_problem(prepared)


@pytest.mark.parametrize("suffix", [".json", ".bin"])
def test_a_checksum_that_only_one_record_has_is_enough(prepared, suffix):
    if suffix == ".json":
        (prepared / "train_000000.json").unlink()
    else:
        edit_split(prepared, "train", crc32=None)
    assert check_data(prepared).splits[0].checksums == 1
    flip_byte(prepared / "train_000000.bin", HEADER_BYTES + 200)

    assert "train_000000.bin is damaged" in only_problem(prepared)


def test_a_changed_receipt_is_named(prepared):
    edit_json(prepared / "train_000000.json", crc32=1)

    assert "train_000000.json has 00000001" in only_problem(prepared)


@pytest.mark.parametrize(("key", "value"), [("documents", 1), ("text_bytes", 1), ("text_bytes", "many")])
def test_a_receipt_with_another_sum_is_found(prepared, key, value):
    edit_json(prepared / "validation_000000.json", **{key: value})

    assert f" {key}, the receipts add up to {int(value == 1)}" in only_problem(prepared)


def test_a_receipt_that_is_no_json_is_found(prepared):
    (prepared / "train_000000.json").write_text("{")

    assert "train_000000.json is damaged" in only_problem(prepared)


def test_an_exchanged_tokenizer_is_found(prepared, data_dir):
    shutil.copy(data_dir("tokenizers/sp1000/test_model.model"), prepared / "tokenizer.model")

    assert "is not the one that the data was prepared with" in only_problem(prepared)


def test_a_lost_tokenizer_is_found_and_everything_else_is_checked(prepared):
    (prepared / "tokenizer_bytes.json").unlink()
    flip_byte(prepared / "train_000000.bin", HEADER_BYTES + 200)

    tokenizer, shard = check_data(prepared).problems

    assert "tokenizer cannot be read" in tokenizer and "train_000000.bin" in shard


def test_another_tokenizer_on_the_command_line_is_refused_as_one_in_the_folder(prepared, data_dir):
    problem = only_problem(prepared, tokenizer=data_dir("tokenizers/sp1000/test_model.model"))

    assert "test_model.model" in problem and "put that one back" in problem


def test_a_deleted_shard_is_named_and_the_rest_is_checked(prepared):
    (prepared / "train_000000.bin").unlink()
    flip_byte(prepared / "validation_000000.bin", HEADER_BYTES + 20)

    missing, damaged = check_data(prepared).problems

    assert "train_000000.bin is missing" in missing and "validation_000000.bin is damaged" in damaged


def test_a_truncated_shard_is_named(prepared):
    path = prepared / "train_000000.bin"
    path.write_bytes(path.read_bytes()[:-10])

    assert "train_000000.bin is truncated" in only_problem(prepared)


def test_a_shard_with_other_tokens_than_the_records_say_is_named(prepared):
    path = prepared / "train_000000.bin"
    tokens = np.fromfile(path, "<u2", offset=HEADER_BYTES)
    write_token_file(path, tokens[:-5], tokens.dtype)

    problems = check_data(prepared).problems

    assert all("train_000000.bin" in problem for problem in problems)
    assert any(f"holds {len(tokens) - 5} tokens" in problem for problem in problems)


def test_a_manifest_from_elsewhere_is_found(prepared, root, tmp_path):
    (tmp_path / "other.txt").write_text("Something else. " * 50)
    prepare(root, "--input", tmp_path / "other.txt", "--tokenizer", "bytes", "--out", tmp_path / "other")
    shutil.copy(tmp_path / "other" / "manifest.json", prepared)

    problems = check_data(prepared, "train").problems

    assert any("belong to another plan than manifest.json" in problem for problem in problems)
    assert any("train_000000.bin is damaged or was exchanged" in problem for problem in problems)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": 5}, "announces 5 documents, but the files hold"),
        ({"tokens": 7}, "announces 7 tokens, the files hold"),
        ({"table_bytes": 3}, "announces tokens for 3 bytes of text"),
    ],
)
def test_totals_of_the_manifest_that_the_files_do_not_have_are_found(prepared, changes, message):
    (prepared / "train_000000.json").unlink()  # or the receipts would say so too
    edit_split(prepared, "train", **changes)

    assert any(message in problem for problem in check_data(prepared, "train").problems)


def test_tokens_without_separators_between_documents_are_found(prepared):
    """The files of a writer that forgot them: all records agree with the files, except the number of documents."""
    path = prepared / "train_000000.bin"
    tokens = np.fromfile(path, "<u2", offset=HEADER_BYTES)
    tokens = tokens[tokens != EOS]
    write_token_file(path, tokens, tokens.dtype)
    (prepared / "train_000000.json").unlink()
    edit_split(prepared, "train", tokens=len(tokens), crc32=None, file_tokens=None)

    assert "but the files hold 0 separators" in only_problem(prepared)


def test_text_that_the_tokenizer_lost_is_a_note(root, tmp_path, data_dir):
    (tmp_path / "in.txt").write_text("Line breaks\nare unknown\nto this tokenizer.\n" * 20)
    prepare(
        root, "--input", tmp_path / "in.txt", "--out", tmp_path / "out", "--validation-fraction", 0,
        "--tokenizer", data_dir("tokenizers/sp1000/test_model.model"),
    )  # fmt: skip

    found = check_data(tmp_path / "out")

    assert found.problems == ()
    assert any("does not know some of it" in note for note in found.notes)


def test_files_that_the_manifest_does_not_list_are_a_note(prepared):
    shutil.copy(prepared / "train_000000.bin", prepared / "train_000001.bin")

    found = check_data(prepared)

    assert found.problems == () and any("train_000001.bin" in note for note in found.notes)


def test_a_folder_that_was_not_prepared_to_the_end_is_refused(prepared):
    (prepared / "manifest.json").unlink()

    with pytest.raises(DataError, match="holds a plan.json but no manifest.json"):
        check_data(prepared)


@pytest.mark.parametrize("option", [{"vocab_size": 0}, {"separator_id": -1}, {"separator_id": 9, "vocab_size": 9}])
def test_a_vocabulary_that_cannot_be_is_refused(tmp_path, option):
    write_token_file(tmp_path / "train_0.bin", np.arange(5), np.uint16)

    with pytest.raises(ValueError, match=next(iter(option))):
        check_data(tmp_path, **option)


def test_a_folder_without_that_split_is_refused(prepared):
    with pytest.raises(FileNotFoundError, match="holds no test data; it holds train, validation"):
        check_data(prepared, "test")


@pytest.mark.parametrize("option", [{"dtype": "uint16"}, {"vocab_size": 259}, {"separator_id": 2}])
def test_what_the_manifest_says_is_not_said_again(prepared, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}=.*leave it out"):
        check_data(prepared, **option)


def test_ids_outside_the_vocabulary_are_found_in_every_file(tmp_path):
    write_token_file(tmp_path / "train_0.bin", np.array([1, 99]), np.uint16)
    write_token_file(tmp_path / "train_1.bin", np.array([1, 100]), np.uint16)
    write_token_file(tmp_path / "validation_0.bin", np.array([1, 5000]), np.uint16)

    problems = check_data(tmp_path, vocab_size=100).problems

    assert ["train_1.bin holds token 100" in problems[0], "validation_0.bin holds token 5000" in problems[1]] == [
        True
    ] * 2
    assert len(problems) == 2
    assert check_data(tmp_path, "train", vocab_size=101).problems == ()


@pytest.mark.parametrize("token", [-1, 2**31 - 1])
def test_ids_that_no_vocabulary_has_are_found_without_one(tmp_path, token):
    write_token_file(tmp_path / "train_0.bin", np.array([1, token, 7]), np.int32)

    assert f"train_0.bin holds token {token}" in only_problem(tmp_path)


def test_a_tokenizer_bounds_the_ids_of_files_from_elsewhere(tmp_path):
    write_token_file(tmp_path / "train_0.bin", np.array([70, 259]), np.uint16)

    assert "outside the vocabulary of 259" in only_problem(tmp_path, tokenizer="bytes")
    with pytest.raises(ValueError, match="vocab_size=300, but tokenizer bytes has 259 ids"):
        check_data(tmp_path, tokenizer="bytes", vocab_size=300)


def test_every_damaged_header_of_files_from_elsewhere_is_named_and_the_whole_files_are_read(tmp_path):
    for number in range(5):
        write_token_file(tmp_path / f"train_{number}.bin", np.arange(50), np.uint16)
    for number in (1, 3):
        path = tmp_path / f"train_{number}.bin"
        path.write_bytes(path.read_bytes()[:-1])

    found = check_data(tmp_path, vocab_size=49)

    names = [f"train_{number}.bin" for number in (1, 3, 0, 2, 4)]
    assert [name in problem for name, problem in zip(names, found.problems, strict=True)] == [True] * 5
    assert ["truncated" in problem for problem in found.problems] == [True, True, False, False, False]
    assert (found.splits[0].files, found.splits[0].tokens) == (3, 150)


def test_files_of_two_types_are_a_problem(tmp_path):
    write_token_file(tmp_path / "train_0.bin", np.arange(50), np.uint16)
    write_token_file(tmp_path / "train_1.bin", np.arange(50), np.int32)

    assert "train_1.bin holds int32 tokens" in only_problem(tmp_path)


def test_nothing_at_all_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no train"):
        check_data(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        check_data(tmp_path / "nowhere")


def test_real_tokens_of_megatron(data_dir):
    found = check_data(data_dir("openwebtext1k"), vocab_size=5000)

    assert found.problems == () and not found.prepared
    (split,) = found.splits
    assert (split.kind, split.dtype, split.tokens, split.highest_id) == ("megatron", "uint16", 1_361_845, 4999)
    assert split.separator_id == 4999 and split.boundaries["<|separator 4999|>"] == 1000
    assert all(document.is_whole for document in split.documents)
    assert "holds token 4999, outside the vocabulary of 4999" in only_problem(
        data_dir("openwebtext1k"), vocab_size=4999
    )


def test_real_tokens_of_megatron_with_their_tokenizer(data_dir):
    found = check_data(data_dir("openwebtext1k"), tokenizer=data_dir("openwebtext1k"), characters=60)

    (split,) = found.splits
    assert found.problems == () and found.vocab_size == 5000 and split.boundaries == {"<|eos 4999|>": 1000}
    first, _, last = split.documents
    assert first.start == "A magazine supplement with an image of A" and first.before == ""
    assert last.start.startswith("Man who stabbed ex-partner's") and last.end == "t posted<|eos 4999|>"


def test_stats_of_real_tokens(data_dir):
    found = data_stats(data_dir("openwebtext1k"), separator_id=4999, block_size=256, budget_tokens=13_616_640)

    (split,) = found.splits
    assert split.documents == 1000 and split.tokens_per_document["mean"] == 1361.845
    assert split.samples == (1_361_845 - 1) // 256 == 5319
    assert split.unused_tokens == 1_361_845 - (5319 * 256 + 1)
    assert split.epochs == 10.0
    tokens = np.fromfile(data_dir("openwebtext1k/meg-gpt2-openwebtext_text_document.bin"), "<u2")
    lengths = np.diff(np.flatnonzero(tokens == 4999), prepend=-1)
    assert split.tokens_per_document["p100"] == lengths.max()
    assert split.tokens_per_document["p50"] == np.sort(lengths)[499]
    expected = sorted(Counter(tokens.tolist()).items(), key=lambda item: (-item[1], item[0]))[:10]
    assert [(each.id, each.count) for each in split.most_frequent] == expected


def test_stats_of_real_books(root, tmp_path, data_dir):
    books = [next(data_dir("books").glob(f"{name}*")) for name in ("Jane Austen - Emma", "Homer")]
    prepare(
        root, "--input", *books, data_dir("web_samples"), "--out", tmp_path / "out", "--document-bytes", 20000,
        "--tokenizer", data_dir("tokenizers/sp1000/test_model.model"),
    )  # fmt: skip
    assert check_data(tmp_path / "out").problems == ()

    found = data_stats(tmp_path / "out", block_size=128)

    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for split in found.splits:
        entry = manifest["splits"][split.name]
        assert (split.tokens, split.documents) == (entry["tokens"], entry["documents"])
        assert split.tokens_per_document["mean"] == pytest.approx(entry["tokens"] / entry["documents"])
        # the table counts one space too many at the beginning of every document
        assert split.bytes_per_token * split.tokens == pytest.approx(entry["table_bytes"] + entry["documents"])
        assert split.unused_ids == 1000 - len(set(all_tokens(tmp_path / "out", entry["files"])))
    assert {" the", " and"} <= {each.text for each in found.splits[0].most_frequent}


def all_tokens(folder: Path, names: list[str]) -> list[int]:
    return [token for name in names for piece in read_tokens(read_header(folder / name)) for token in piece.tolist()]


def test_stats_count_samples_file_by_file(tmp_path):
    for number, n_tokens in enumerate((5, 9, 4)):
        write_token_file(tmp_path / f"train_{number}.bin", np.arange(n_tokens), np.uint16)

    (split,) = data_stats(tmp_path, block_size=4).splits

    assert (split.samples, split.unused_tokens, split.files) == (1 + 2 + 0, 4, 3)
    with pytest.raises(ValueError, match="block_size=0 must be at least 1"):
        data_stats(tmp_path, block_size=0)


streams = st.lists(st.lists(st.integers(0, 3), max_size=30), min_size=1, max_size=4)


@given(streams)
def test_counts_are_those_of_the_tokens_however_they_are_cut(pieces):
    counts, tokens = IdCounts(), [token for piece in pieces for token in piece]
    for piece in pieces:
        counts.add(np.array(piece, dtype=np.uint16))

    assert [counts.of(token) for token in range(5)] == [tokens.count(token) for token in range(5)]
    assert counts.n_tokens == len(tokens) and counts.highest == max(tokens, default=0)


@given(streams)
def test_lengths_are_those_of_the_documents_however_they_are_cut(pieces):
    tokens = [token for piece in pieces for token in piece]
    lengths = DocumentLengths(separator_id=3)
    for piece in pieces:
        lengths.add(np.array(piece, dtype=np.uint16))
    lengths.close()

    cuts = [i for i, token in enumerate(tokens) if token == 3]
    starts = sorted({0, len(tokens), *(cuts if tokens[:1] == [3] else [cut + 1 for cut in cuts])})
    expected = sorted(b - a for a, b in zip(starts, starts[1:], strict=False))
    assert lengths.n_documents == len(expected)
    if expected:
        assert lengths.percentile(100) == expected[-1]
        assert lengths.percentile(1) == expected[0]
        assert lengths.percentile(50) == statistics.median_low(expected)


def test_documents_longer_than_the_table_of_lengths_are_counted_too():
    lengths = DocumentLengths(separator_id=1)
    lengths.add(np.array([0, 0, 1], dtype=np.uint16))
    for _ in range(5):
        lengths.add(np.zeros(1 << 20, dtype=np.uint16))
    lengths.add(np.array([1], dtype=np.uint16))

    assert (lengths.n_documents, lengths.percentile(50), lengths.percentile(100)) == (2, 3, 5 * (1 << 20) + 1)


def test_a_file_is_read_in_pieces_that_add_up(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_gpt.token_scan.READ_BYTES", 64)
    write_token_file(tmp_path / "x.bin", np.arange(1000), np.uint16)
    file = read_header(tmp_path / "x.bin")

    assert np.concatenate(list(read_tokens(file))).tolist() == list(range(1000))
    assert np.concatenate(list(read_tokens(file, 990))).tolist() == list(range(990, 1000))
    assert max(len(piece) for piece in read_tokens(file)) == 32
    gone = TokenFile(file.path, file.byte_offset, 1001, file.dtype)
    with pytest.raises(DataError, match="truncated: 1001 tokens are announced, the last 1 of them"):
        scan_file(gone, IdCounts())


def test_text_marks_what_is_no_text():
    text = TokenText(Tokenizer.load("bytes"), separator_id=7)

    assert text(np.array([1, 70, 71, 7, 300, -1, 72, 2])) == "<|bos 1|>CD<|separator 7|><|300|><|-1|>E<|eos 2|>"
    assert text(np.array([], dtype=np.int64)) == ""
    assert TokenText(None, 4)(np.array([1, 4, 5])) == "1 <|separator 4|> 5"
    assert visible("a\nb\tc\xa0\u200bé") == "a\\nb\\tc\\xa0\\u200bé"


@given(st.text(max_size=60), st.integers(1, 20))
def test_both_ends_of_a_text_are_shown_to_the_character(text, characters):
    tokenizer = Tokenizer.load("bytes")
    tokens = tokenizer.encode(text)
    whole = tokenizer.decode(tokens)
    shown = TokenText(tokenizer)

    assert shown.start(tokens, characters) == whole[:characters]
    assert shown.is_longer(tokens, characters) == (len(whole) > characters)


def test_documents_that_begin_with_their_separator_are_shown_whole(tmp_path):
    tokens = np.array([1, 70, 70, 1, 71, 71, 71, 1, 72])
    write_token_file(tmp_path / "train_0.bin", tokens, np.uint16)
    text = TokenText(Tokenizer.load("bytes"), separator_id=1)

    shown = show_documents([read_header(tmp_path / "train_0.bin")], text, count=3, characters=50)

    assert [document.start for document in shown] == ["<|bos 1|>CC", "<|bos 1|>DDD", "<|bos 1|>E"]
    assert all(document.is_whole for document in shown)


def test_a_document_longer_than_the_search_is_shown_as_a_part(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_gpt.token_text.SEARCH_TOKENS", (4, 10))
    tokens = np.full(100, 70)
    tokens[[5, 99]] = EOS
    write_token_file(tmp_path / "train_0.bin", tokens, np.uint16)

    shown = show_documents(
        [read_header(tmp_path / "train_0.bin")], TokenText(Tokenizer.load("bytes"), EOS), count=3, characters=50
    )

    assert [document.is_whole for document in shown] == [True, False, False]
    assert shown[1].n_tokens == 20
