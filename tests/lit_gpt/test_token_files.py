"""Which files a path means, in what order, what is cut from them, and the table that spares opening them again."""

from __future__ import annotations

import json
import os
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lit_gpt.token_files as token_files
from lit_gpt.errors import DataError
from lit_gpt.file_names import FileNames
from lit_gpt.packed_dataset import write_token_file
from lit_gpt.token_files import TokenFiles, detect_separator, find_token_files


def write_files(folder, *lengths, dtype=np.uint16, name="train_{:06d}.bin"):
    """Files whose tokens count on from one file to the next."""
    first = 0
    for number, length in enumerate(lengths):
        write_token_file(folder / name.format(number), np.arange(first, first + length), dtype)
        first += length
    return find_token_files(folder)


def names_of(files):
    return [os.path.basename(file.path) for file in files]


def tokens_of(file):
    return np.fromfile(file.path, file.dtype, file.n_tokens, offset=file.byte_offset).tolist()


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
    files = find_token_files(tmp_path)
    assert [file.n_tokens for file in files] == list(range(10, 22))
    assert names_of(files.by_name()) == sorted(f"train_{i}.bin" for i in range(12))
    assert files.by_name().fingerprint == find_token_files(tmp_path).by_name().fingerprint != files.fingerprint


def test_a_manifest_that_disagrees_with_its_files_is_refused(tmp_path):
    write_files(tmp_path, 50)
    write_manifest(tmp_path, train={"files": ["train_000000.bin"], "tokens": 49})
    with pytest.raises(DataError, match="announces 49 tokens, its files hold 50"):
        find_token_files(tmp_path)


def test_missing_data_is_a_missing_file(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "train*", tmp_path / "x.bin"):
        with pytest.raises(FileNotFoundError, match="prepare"):
            find_token_files(path)
    write_manifest(tmp_path, train={"files": ["train_000000.bin"], "tokens": 49})
    with pytest.raises(FileNotFoundError, match="train_000000.bin"):
        find_token_files(tmp_path)


def test_a_link_that_leads_nowhere_is_not_passed_over(tmp_path):
    write_files(tmp_path, 50)
    (tmp_path / "train_000001.bin").symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="train_000001.bin"):
        find_token_files(tmp_path)


def test_splits_of_a_folder_without_names_of_splits(tmp_path):
    for name in ("part_2.bin", "part_10.bin", "val_0.bin", "test.bin", "._part_2.bin"):
        write_token_file(tmp_path / name, np.arange(9), np.uint16)
    files = find_token_files(tmp_path)
    assert names_of(files) == ["part_2.bin", "part_10.bin"]
    assert [note for note in files.notes if "not read" in note] == [
        f"{tmp_path}: test.bin and 1 more not read, to go by the name; a pattern may name what is to be read"
    ]
    assert names_of(find_token_files(tmp_path, "validation")) == ["val_0.bin"]
    write_token_file(tmp_path / "train.bin", np.arange(9), np.uint16)
    assert names_of(find_token_files(tmp_path)) == ["train.bin"]
    with pytest.raises(FileNotFoundError, match=r"holds no other\* file that ends in .bin, .ds or .npy"):
        find_token_files(tmp_path, "other")


@pytest.mark.parametrize(
    ("name", "is_said"),
    [
        *(("part_7.bin", True), ("train_1.bin.zst", True), ("train_1.bin.part", True), ("more.ds", True)),
        *(("validation_0.bin", False), ("val.bin", False), ("test_0.bin", False), ("train_0.json", False)),
        *(("README.md", False), ("tokenizer.model", False), ("other.idx", False), ("gpt2-merges.txt", False)),
    ],
)
def test_what_could_be_training_data_is_never_left_out_in_silence(tmp_path, name, is_said):
    """Nor is there talk of files that plainly hold no tokens or belong to another split."""
    write_token_file(tmp_path / "train_0.bin", np.arange(9), np.uint16)
    cache = tmp_path / "cache" / "index.npz"
    cache.parent.mkdir()
    assert find_token_files(tmp_path, cache=cache).notes == ()
    write_token_file(tmp_path / name, np.arange(9), np.uint16)
    for _ in range(2):  # the second time from the cache
        notes = find_token_files(tmp_path, cache=cache).notes
        assert [name in note for note in notes] == [True] * is_said


def test_patterns_and_single_files(tmp_path):
    for name in ("train_slim_0_0000000000.bin", "train_slim_0_0000000001.bin", "train_star_0_0000000000.bin"):
        write_token_file(tmp_path / name, np.arange(9), np.uint16)
    (tmp_path / "train_slim.json").write_text("{}")
    assert len(find_token_files(tmp_path)) == 3
    assert len(find_token_files(tmp_path / "train_slim*")) == 2
    assert len(find_token_files(str(tmp_path / "**" / "*star*"))) == 1
    assert len(find_token_files(tmp_path / "train_slim_0_0000000001.bin")) == 1


@pytest.mark.parametrize("bad", [0, 3, 70])
def test_every_header_is_read_and_the_bad_one_named(tmp_path, monkeypatch, bad):
    monkeypatch.setattr(token_files, "FILES_PER_TASK", 16)
    write_files(tmp_path, *[20] * 71, name="train_slim_0_{:010d}.bin")
    with open(tmp_path / f"train_slim_0_{bad:010d}.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=f"train_slim_0_{bad:010d}.bin is damaged.*expected 64 bytes, found 65 bytes"):
        find_token_files(tmp_path)


@pytest.mark.parametrize("other", [1, 40, 48])
def test_mixed_types_are_refused_naming_both_files(tmp_path, monkeypatch, other):
    monkeypatch.setattr(token_files, "FILES_PER_TASK", 16)
    write_files(tmp_path, *[20] * 49)
    write_token_file(tmp_path / f"train_{other:06d}.bin", np.arange(50), np.int32)
    message = f"train_{other:06d}.bin holds int32 tokens, but .*train_[0-9]*.bin holds uint16"
    with pytest.raises(DataError, match=message):
        find_token_files(tmp_path)


def test_mixed_formats_are_refused_naming_both_files(tmp_path):
    write_files(tmp_path, 50)
    np.arange(1000, dtype="<u2").tofile(tmp_path / "train_1.bin")
    with pytest.raises(DataError, match="train_1.bin is a raw file, but .*train_000000.bin is a litpkds file"):
        find_token_files(tmp_path)


def test_the_fingerprint_is_that_of_earlier_versions(tmp_path):
    for dtype, expected in (
        ("u2", "4c3f54096307d04ebeac7265923b7fb436eba1fe0fe1707f027139e1f61a33cd"),
        ("i4", "1477bab1cb8a65625756c3b3ac9197d63d591d78d6a540389422a2e80593b992"),
    ):
        folder = tmp_path / dtype
        folder.mkdir()
        for number, length in enumerate((5000, 0, 100)):
            write_token_file(folder / f"train_{number:06d}.bin", np.arange(length) * 7 % 1000, dtype)
        files = find_token_files(folder, trim=False)
        assert files.fingerprint == TokenFiles.of(list(files)).fingerprint == expected


def test_a_slice_is_a_table_too(tmp_path):
    files = write_files(tmp_path, 10, 20, 30)
    assert [each.n_tokens for each in files[1:]] == files[1:].n_tokens.tolist() == [20, 30]
    assert files[-1] == files[2] and files[np.int64(1)].path.endswith("train_000001.bin")


def test_a_table_costs_less_than_a_hundred_bytes_per_file():
    count = 20_000
    tracemalloc.start()
    names = FileNames.of(f"folder/train_slim_{i // 1000}_{i % 1000:010d}.bin" for i in range(count))
    columns = (np.full(count, 2049 * 1024), np.full(count, 24), np.zeros((count, 32), np.uint8))
    files = TokenFiles(names, *columns, dtype=np.dtype("<u2"), kind="litpkds")
    kept_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(files) == count and kept_bytes < 100 * count


class TestPadding:
    """What older writers add at the end of the last file of each of their processes."""

    TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=30)

    @given(st.lists(st.lists(TOKENS, min_size=1, max_size=3), min_size=1, max_size=3), st.sampled_from([1, 4, 1000]))
    def test_only_the_run_that_ends_the_last_file_of_a_process_goes(self, tmp_path_factory, processes, tail_tokens):
        folder = tmp_path_factory.mktemp("padding")
        expected = []
        for process, files in enumerate(processes):
            for counter, tokens in enumerate(files):
                write_token_file(folder / f"train_slim_{process}_{counter:010d}.bin", np.array(tokens), np.uint16)
            expected += [*files[:-1], without_last_run(files[-1])]
        expected = [tokens for tokens in expected if tokens]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(token_files, "TAIL_TOKENS", tail_tokens)
            if not expected:
                with pytest.raises(DataError, match="no tokens except padding"):
                    find_token_files(folder)
                return
            files = find_token_files(folder)
        assert [tokens_of(file) for file in files] == expected
        cut = sum(without_last_run(files[-1]) != files[-1] for files in processes)
        assert len(files.notes) == cut
        assert files.fingerprint == TokenFiles.of(list(files)).fingerprint

    def test_each_cut_is_told(self, tmp_path):
        write_token_file(tmp_path / "train_slim_0_0000000000.bin", np.array([5, 6, 7, 1, 1]), np.uint16)
        write_token_file(tmp_path / "train_slim_0_0000000001.bin", np.array([5, 6, 1, 1, 1]), np.uint16)
        write_token_file(tmp_path / "train_slim_1_0000000000.bin", np.ones(5), np.uint16)
        files = find_token_files(tmp_path)
        assert files.n_tokens.tolist() == [5, 2]
        assert [note.replace(f"{tmp_path}/train_slim_", "") for note in files.notes] == [
            "0_0000000001.bin: its last 3 of 5 tokens are one id (1), cut as padding",
            "1_0000000000.bin: its last 5 of 5 tokens are one id (1), cut as padding; nothing else is in it, so the "
            "file is left out",
        ]

    def test_negative_ids_are_ids(self, tmp_path):
        write_token_file(tmp_path / "train_0_0000000000.bin", np.array([5, -1, -1, -1]), np.int32)
        assert find_token_files(tmp_path).n_tokens.tolist() == [1]

    def test_it_stays_when_asked_to(self, tmp_path):
        write_token_file(tmp_path / "train_0_0000000000.bin", np.zeros(9), np.uint16)
        files = find_token_files(tmp_path, trim=False)
        assert (files.n_tokens.tolist(), files.notes) == ([9], ())

    def test_our_own_folders_are_left_as_they_are(self, tmp_path):
        write_token_file(tmp_path / "train_000000.bin", np.array([5, 6, 1, 1]), np.uint16)
        write_manifest(tmp_path, train={"files": ["train_000000.bin"], "tokens": 4})
        for path in (tmp_path, tmp_path / "train_000000.bin", tmp_path / "train*"):
            files = find_token_files(path)
            assert (files.n_tokens.tolist(), files.notes) == ([4], ())


def without_last_run(tokens):
    run = 1
    while run < len(tokens) and tokens[-run - 1] == tokens[-1]:
        run += 1
    return tokens if run < 2 else tokens[:-run]


class TestCache:
    """The table kept in a file between two starts."""

    def write(self, folder):
        for process in range(2):
            for counter in range(3):
                tokens = np.array([process, counter, 3, 4, 5, 1, 1])
                write_token_file(folder / f"train_slim_{process}_{counter:010d}.bin", tokens, np.uint16)
        write_token_file(folder / "train_slim_2_0000000000.bin", np.ones(7), np.uint16)

    def same(self, one, other):
        columns = ("n_tokens", "byte_offset", "heads")
        facts = ("dtype", "kind", "notes", "tokenizer", "fingerprint")
        arrays = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in columns)
        return arrays and list(one) == list(other) and all(getattr(one, x) == getattr(other, x) for x in facts)

    def test_a_second_start_opens_no_token_file(self, tmp_path, monkeypatch):
        (tmp_path / "data").mkdir()
        self.write(tmp_path / "data")
        first = find_token_files(tmp_path / "data", cache=tmp_path / "index.npz")
        assert self.same(first, find_token_files(tmp_path / "data"))
        monkeypatch.setattr(token_files, "describe_file", None)
        monkeypatch.setattr(token_files, "open", None, raising=False)
        assert self.same(first, find_token_files(tmp_path / "data", cache=tmp_path / "index.npz"))
        with pytest.raises(TypeError):  # this has to open them
            find_token_files(tmp_path / "data", dtype="uint16", cache=tmp_path / "index.npz")

    def test_other_files_of_the_same_size_and_date_are_noticed(self, tmp_path):
        """As an archive leaves them that gives every file the same date."""
        data, cache = tmp_path / "data", tmp_path / "index.npz"
        data.mkdir()
        self.write(data)
        for path in data.iterdir():
            os.utime(path, ns=(0, 0))
        before = find_token_files(data, cache=cache).fingerprint
        path = data / "train_slim_0_0000000000.bin"
        changed = path.stat().st_ctime_ns
        write_token_file(path, np.arange(7), np.uint16)
        while os.utime(path, ns=(0, 0)) or path.stat().st_ctime_ns == changed:  # the clock of files ticks slowly
            continue
        assert find_token_files(data, cache=cache).fingerprint == find_token_files(data).fingerprint != before

    def test_a_manifest_that_comes_or_goes_is_noticed(self, tmp_path):
        """Files are cut only where none says that they were never padded."""
        cache = tmp_path / "cache" / "index.npz"
        cache.parent.mkdir()
        self.write(tmp_path)
        assert find_token_files(tmp_path / "train*", cache=cache).n_tokens.tolist() == [7, 7, 5, 7, 7, 5]
        (tmp_path / "manifest.json").write_text("{}")
        assert find_token_files(tmp_path / "train*", cache=cache).n_tokens.tolist() == [7] * 7

    def test_changed_files_are_read_again(self, tmp_path, monkeypatch):
        data, cache = tmp_path / "data", tmp_path / "index.npz"
        data.mkdir()
        self.write(data)
        changes = [
            lambda: write_token_file(data / "train_slim_0_0000000001.bin", np.arange(20), np.uint16),
            lambda: os.utime(data / "train_slim_0_0000000000.bin", ns=(0, 12345)),
            lambda: (data / "train_slim_0_0000000002.bin").rename(data / "train_slim_0_0000000003.bin"),
            lambda: (data / "train_slim_1_0000000002.bin").unlink(),
        ]
        find_token_files(data, cache=cache)
        calls = []
        describe = token_files.describe_file
        monkeypatch.setattr(token_files, "describe_file", lambda *given: calls.append(given) or describe(*given))
        for change in changes:
            change()
            calls.clear()
            found = find_token_files(data, cache=cache)
            assert len(calls) == len(list(data.iterdir()))
            assert self.same(found, find_token_files(data))
            calls.clear()
            assert self.same(found, find_token_files(data, cache=cache)) and not calls

    def test_one_cache_for_two_settings_serves_neither_wrongly(self, tmp_path):
        data, cache = tmp_path / "data", tmp_path / "index.npz"
        data.mkdir()
        self.write(data)
        for _ in range(2):
            assert find_token_files(data, cache=cache).n_tokens.tolist() == [7, 7, 5, 7, 7, 5]
            assert find_token_files(data, trim=False, cache=cache).n_tokens.tolist() == [7] * 7
            assert find_token_files(data / "train_slim_0*", cache=cache).n_tokens.tolist() == [7, 7, 5]

    def test_a_changed_description_is_noticed(self, tmp_path):
        np.arange(1000, dtype="<u2").tofile(tmp_path / "x.ds")
        (tmp_path / "x.ds.metadata").write_text("gpt2|2\n1000\n1 kT")
        assert find_token_files(tmp_path, cache=tmp_path / "index.npz").tokenizer == "gpt2"
        (tmp_path / "x.ds.metadata").write_text("gpt2|4\n500\n500 T")
        assert find_token_files(tmp_path, cache=tmp_path / "index.npz").dtype == np.uint32

    @given(st.booleans(), st.integers(0, 10**6), st.integers(0, 7))
    def test_a_damaged_cache_is_made_anew(self, tmp_path, cut, at, bit):
        data, cache = tmp_path / "data", tmp_path / "index.npz"
        if not data.exists():
            data.mkdir()
            self.write(data)
        expected, _ = find_token_files(data), find_token_files(data, cache=cache)
        stored = bytearray(cache.read_bytes())
        if cut:
            del stored[at % len(stored) :]
        else:
            stored[at % len(stored)] ^= 1 << bit
        cache.write_bytes(stored)
        assert self.same(expected, find_token_files(data, cache=cache))
        assert self.same(expected, find_token_files(data, cache=cache))

    @pytest.mark.parametrize("content", [b"", b"no zip", b"\x80\x04."])
    def test_a_foreign_file_in_its_place_is_replaced(self, tmp_path, content):
        (tmp_path / "data").mkdir()
        self.write(tmp_path / "data")
        (tmp_path / "index.npz").write_bytes(content)
        find_token_files(tmp_path / "data", cache=tmp_path / "index.npz")
        assert (tmp_path / "index.npz").read_bytes()[:4] == b"PK\x03\x04"

    def test_pickles_are_not_opened(self, tmp_path):
        (tmp_path / "data").mkdir()
        self.write(tmp_path / "data")
        np.savez(tmp_path / "index.npz", facts=np.array([object()], dtype=object))
        find_token_files(tmp_path / "data", cache=tmp_path / "index.npz")
        with np.load(tmp_path / "index.npz", allow_pickle=False) as stored:
            assert set(stored.files) == {"facts", "n_tokens", "byte_offset", "heads"}

    def test_a_cache_that_cannot_be_written_is_a_note(self, tmp_path):
        self.write(tmp_path)
        files = find_token_files(tmp_path, cache=tmp_path / "nowhere" / "index.npz")
        assert files.n_tokens.sum() == 38
        assert "could not be kept" in files.notes[-1] and "nowhere" in files.notes[-1]


class TestSeparator:
    """The id between documents, as far as the tokens show it."""

    def documents(self, folder, *ends, length=200, count=50, **options):
        generator = np.random.default_rng(0)
        bodies = [generator.integers(10, 500, generator.integers(length // 2, 2 * length)) for _ in range(count)]
        tokens = np.concatenate([np.array([*body, *ends]) for body in bodies])
        write_token_file(folder / "train_0.bin", tokens, np.uint16)
        return find_token_files(folder, **options)

    @pytest.mark.parametrize(("ends", "expected"), [((1,), 1), ((2,), 2), ((2, 1), 1), ((), None), ((0,), 0)])
    def test_the_lineages_ids_are_tried(self, tmp_path, ends, expected):
        found = detect_separator(self.documents(tmp_path, *ends))
        assert found.id == expected
        assert found.counts == {token: 50 * (token in ends) for token in (1, 2, 0)}
        assert ("no separator" if expected is None else f"id {expected} separates") in found.describe()

    def test_ids_that_the_tokenizer_names_come_first(self, tmp_path):
        assert detect_separator(self.documents(tmp_path, 1, 600), [600, 601]).id == 600

    def test_a_frequent_word_is_none(self, tmp_path):
        found = detect_separator(self.documents(tmp_path, 1, length=4))
        assert found.id is None and found.counts[1] == 50

    def test_punctuation_in_real_text_is_none_and_the_end_of_text_is_found(self, data_dir):
        files = find_token_files(data_dir("openwebtext1k"))
        assert detect_separator(files).id is None
        assert detect_separator(files, [4999]).id == 4999

    def test_files_are_sampled_over_the_whole_list(self, tmp_path, monkeypatch):
        monkeypatch.setattr(token_files, "SAMPLED_TOKENS", 30)
        files = write_files(tmp_path, *[40] * 9)
        found = detect_separator(files, [0, 29, 30, 160, 189, 320, 349])
        assert found.tokens_seen == 90
        assert found.counts == {0: 1, 29: 1, 30: 0, 160: 1, 189: 1, 320: 1, 349: 1, 1: 1, 2: 1}
