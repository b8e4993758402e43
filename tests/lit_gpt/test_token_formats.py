"""Token files that others wrote: read byte for byte, or refused with the reason and the way out."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.errors import DataError
from lit_gpt.packed_dataset import write_token_file
from lit_gpt.token_files import find_token_files
from lit_gpt.token_formats import describe_file, given_dtype

TEXT = np.random.default_rng(0).integers(0, 32_000, 20_000)
LARGE = np.random.default_rng(1).integers(0, 128_256, 20_000)


def tokens_of(path, **options):
    """All tokens of the only file that a path names."""
    (file,) = find_token_files(path, **options)
    return np.fromfile(file.path, file.dtype, file.n_tokens, offset=file.byte_offset)


def megatron(folder, documents, *, code=8, dtype="<u2", pointers=None, version=1, magic=b"MMIDIDX\0\0"):
    """A pair as Megatron's indexed_dataset.py lays it out."""
    sizes = np.array([len(each) for each in documents], dtype="<i4")
    starts = (np.cumsum(sizes, dtype="<i8") - sizes) * np.dtype(dtype).itemsize if pointers is None else pointers
    head = magic + struct.pack("<QBQQ", version, code, len(sizes), len(sizes) + 1)
    marks = np.arange(len(sizes) + 1, dtype="<i8")
    (folder / "text_document.idx").write_bytes(head + sizes.tobytes() + starts.tobytes() + marks.tobytes())
    np.concatenate(documents).astype(dtype).tofile(folder / "text_document.bin")
    return folder / "text_document.bin"


DOCUMENTS = [np.arange(5), np.arange(100, 107), np.array([9])]


class TestMegatron:
    """A headerless .bin that the .idx beside it describes."""

    def test_a_real_pair(self, data_dir):
        folder = data_dir("openwebtext1k")
        files = find_token_files(folder)
        assert (files.kind, files.n_tokens.tolist(), files.dtype.name) == ("megatron", [1_361_845], "uint16")
        tokens = tokens_of(folder)
        assert tokens.max() == 4999 and np.count_nonzero(tokens == 4999) == 1000

    @pytest.mark.parametrize(("code", "dtype"), [(1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
    def test_its_types_of_tokens(self, tmp_path, code, dtype):
        megatron(tmp_path, DOCUMENTS, code=code, dtype=dtype)
        tokens = tokens_of(tmp_path)
        assert tokens.dtype == dtype and tokens.tolist() == np.concatenate(DOCUMENTS).tolist()

    @pytest.mark.parametrize("name", ["text_document", "text_document.bin", "text_document.idx", "*.bin", ""])
    def test_its_names(self, tmp_path, name):
        megatron(tmp_path, DOCUMENTS)
        assert len(tokens_of(tmp_path / name)) == 13

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"code": 7}, "dtype code 7"),
            ({"code": 6}, "dtype code 6"),
            ({"code": 99}, "dtype code 99"),
            ({"version": 2}, "version 2"),
            ({"code": 4}, "do not follow one another"),
            ({"magic": b"TNTIDX\0\0\0"}, "TNTIDX form"),
            ({"magic": b"something"}, "not a Megatron index"),
            ({"pointers": np.array([0, 10, 26])}, "do not follow one another"),
            ({"pointers": np.array([2, 12, 26])}, "do not follow one another"),
        ],
    )
    def test_what_is_refused(self, tmp_path, change, message):
        path = megatron(tmp_path, DOCUMENTS, **change)
        with pytest.raises(DataError, match=message) as raised:
            find_token_files(tmp_path)
        assert str(path.with_suffix("")) in str(raised.value)

    @pytest.mark.parametrize(("suffix", "size"), [(".bin", 24), (".bin", 28), (".idx", 100), (".idx", 20), (".idx", 0)])
    def test_a_part_that_is_not_whole(self, tmp_path, suffix, size):
        path = megatron(tmp_path, DOCUMENTS).with_suffix(suffix)
        path.write_bytes(path.read_bytes()[:size].ljust(size, b"\0"))
        with pytest.raises(DataError, match="text_document.*(truncated|damaged|not a Megatron|empty)"):
            find_token_files(tmp_path)

    def test_litpkds_wins_over_a_stray_neighbour(self, tmp_path):
        write_token_file(tmp_path / "x.bin", np.arange(9), np.uint16)
        (tmp_path / "x.idx").write_bytes(b"whatever")
        assert find_token_files(tmp_path).kind == "litpkds"


class TestDatatrove:
    """Headerless .ds files of datatrove's TokenizedFile, with .metadata and .index."""

    def write(self, folder, tokens=TEXT, token_bytes=2, metadata=True, index=True):
        path = folder / "00000_00000_doc_shuffled.ds"
        tokens.astype(f"<u{token_bytes}").tofile(path)
        if metadata:
            text = f"HuggingFaceTB/cosmo2|{token_bytes}\n{len(tokens)}\n20 kT"
            (folder / f"{path.name}.metadata").write_text(text)
        if index:
            np.array([len(tokens) // 2, len(tokens)], dtype="<u8").tofile(folder / f"{path.name}.index")
        return path

    @pytest.mark.parametrize(("metadata", "index"), [(True, True), (True, False), (False, True)])
    @pytest.mark.parametrize(("token_bytes", "tokens"), [(2, TEXT), (4, TEXT), (4, LARGE)])
    def test_what_is_beside_it_says_how_wide_a_token_is(self, tmp_path, token_bytes, tokens, metadata, index):
        path = self.write(tmp_path, tokens, token_bytes, metadata, index)
        (tmp_path / f"{path.name}.loss").write_bytes(bytes(len(tokens)))
        files = find_token_files(tmp_path)
        assert (files.kind, files.notes[:-1]) == ("datatrove", ())
        assert files.tokenizer == ("HuggingFaceTB/cosmo2" if metadata else "")
        assert np.array_equal(tokens_of(tmp_path), tokens)

    def test_alone_it_is_assumed_to_be_uint16_and_says_so(self, tmp_path):
        path = self.write(tmp_path, metadata=False, index=False)
        files = find_token_files(path)
        assert files.kind == "datatrove" and "uint16 was assumed" in files.notes[0]
        assert np.array_equal(tokens_of(path), TEXT)
        assert find_token_files(path, dtype="uint16").notes == ()

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("metadata", "gpt2|2\n20001\n", "truncated: .*metadata announces 20001 tokens"),
            ("metadata", "gpt2|2\n19999\n", "damaged: .*metadata announces 19999 tokens"),
            ("metadata", "gpt2|3\n20000\n", "metadata is damaged"),
            ("metadata", "gpt2|2", "metadata is damaged"),
            ("metadata", "", "metadata is damaged"),
            ("metadata", "gpt2|2\nmany", "metadata is damaged"),
        ],
    )
    def test_a_description_that_does_not_fit(self, tmp_path, name, content, message):
        path = self.write(tmp_path)
        (tmp_path / f"{path.name}.{name}").write_text(content)
        with pytest.raises(DataError, match=message):
            find_token_files(tmp_path)

    @pytest.mark.parametrize("last", [19_999, 0])
    def test_an_index_that_does_not_fit(self, tmp_path, last):
        path = self.write(tmp_path, metadata=False)
        np.array([10, last], dtype="<u8").tofile(tmp_path / f"{path.name}.index")
        with pytest.raises(DataError, match=f"each of the {last} tokens of"):
            find_token_files(tmp_path)

    def test_a_tokenizer_without_a_name_has_none(self, tmp_path):
        path = self.write(tmp_path)
        (tmp_path / f"{path.name}.metadata").write_text("Unknown Tokenizer|2|2\n20000\n20 kT")
        assert find_token_files(tmp_path).tokenizer == ""


class TestRaw:
    """Files without a word about themselves: nanoGPT's .bin, OLMo's .npy."""

    @pytest.mark.parametrize("name", ["train.bin", "part-000-00000.npy", "tokens.dat"])
    def test_tokens_from_the_first_byte_on(self, tmp_path, name):
        TEXT.astype("<u2").tofile(tmp_path / name)
        files = find_token_files(tmp_path / name)
        assert (files.kind, files.byte_offset.tolist()) == ("raw", [0])
        assert "uint16 was assumed" in files.notes[0]
        assert np.array_equal(tokens_of(tmp_path / name), TEXT)

    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "uint32", "int64", "uint64"])
    def test_the_type_that_was_given(self, tmp_path, dtype):
        tokens = TEXT % 100 if dtype == "uint8" else TEXT
        tokens.astype(dtype).tofile(tmp_path / "train.bin")
        assert find_token_files(tmp_path, dtype=dtype).notes == ()
        assert np.array_equal(tokens_of(tmp_path, dtype=dtype), tokens)

    @pytest.mark.parametrize("tokens", [TEXT, LARGE, TEXT[:40], np.zeros(500) + 17])
    @pytest.mark.parametrize(("written", "named"), [("<u4", "uint32"), ("<i4", "uint32"), ("<i8", "int64")])
    def test_wider_tokens_are_not_read_as_uint16(self, tmp_path, tokens, written, named):
        tokens.astype(written).tofile(tmp_path / "train.bin")
        for dtype in (None, "uint16"):
            with pytest.raises(DataError, match=f"was written as {named}.*give data.dtype {named}"):
                find_token_files(tmp_path, dtype=dtype)

    def test_int64_is_not_read_as_uint32(self, tmp_path):
        LARGE.astype("<i8").tofile(tmp_path / "train.bin")
        with pytest.raises(DataError, match="give data.dtype int64"):
            find_token_files(tmp_path, dtype="uint32")

    @given(st.sampled_from([300, 32_000, 65_535]), st.integers(0, 2**32), st.integers(1, 3000))
    def test_real_uint16_is_never_taken_for_something_wider(self, tmp_path_factory, vocab_size, seed, count):
        tokens = np.random.default_rng(seed).integers(0, vocab_size, count)
        path = tmp_path_factory.mktemp("raw") / "train.bin"
        tokens.astype("<u2").tofile(path)
        assert np.array_equal(tokens_of(path), tokens)

    def test_few_different_small_ids_are_not_taken_for_something_wider(self, tmp_path):
        np.random.default_rng(0).integers(0, 3, 5000).astype("<u2").tofile(tmp_path / "train.bin")
        assert len(tokens_of(tmp_path)) == 5000

    @pytest.mark.parametrize(("n_bytes", "dtype"), [(101, None), (102, "uint32")])
    def test_a_part_of_a_token_is_refused(self, tmp_path, n_bytes, dtype):
        (tmp_path / "train.bin").write_bytes(bytes([200, 100]) * 50 + bytes(n_bytes - 100))
        with pytest.raises(DataError, match=f"train.bin has {n_bytes} bytes, not a multiple"):
            find_token_files(tmp_path, dtype=dtype)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is empty"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n", "git-lfs pointer.*git lfs pull"),
            (b"PK\x03\x04" + bytes(100), "zip archive"),
            (b"\x1f\x8b\x08" + bytes(99), "gzip"),
            (b"\x28\xb5\x2f\xfd" + bytes(100), "zstd"),
            (b"PAR1" + bytes(100), "parquet"),
            (b"TNTIDX\0\0" + bytes(100), "TNTIDX"),
            (b'{"text": "some words"}\n' * 2, "is text, not tokens"),
            (b"LITPKDS", "truncated"),
        ],
    )
    def test_what_holds_no_tokens_is_refused(self, tmp_path, content, message):
        (tmp_path / "train.bin").write_bytes(content)
        with pytest.raises(DataError, match=message) as raised:
            find_token_files(tmp_path)
        assert "train.bin" in str(raised.value)


class TestHeadersOfOthers:
    """numpy's own header, and the one of llm.c."""

    @pytest.mark.parametrize("dtype", ["u1", "<u2", "<i4", "<u4", "<i8"])
    @pytest.mark.parametrize("name", ["train.npy", "train.bin"])
    def test_a_numpy_array(self, tmp_path, dtype, name):
        with open(tmp_path / name, "wb") as file:
            np.save(file, TEXT.astype(dtype))
        files = find_token_files(tmp_path)
        assert (files.kind, files.dtype, files.notes) == ("raw", np.dtype(dtype), ())
        assert np.array_equal(tokens_of(tmp_path), TEXT.astype(dtype))

    @pytest.mark.parametrize(
        "array", [TEXT.reshape(2, -1), TEXT.astype("f4"), TEXT.astype(">u2"), np.array(5), np.array(["a"])]
    )
    def test_arrays_that_are_no_row_of_integers(self, tmp_path, array):
        np.save(tmp_path / "train.npy", array)
        with pytest.raises(DataError, match="train.npy is a numpy array of shape"):
            find_token_files(tmp_path)

    @pytest.mark.parametrize("size", [9, 60, 1000])
    def test_a_numpy_file_cut_short(self, tmp_path, size):
        np.save(tmp_path / "train.npy", TEXT)
        (tmp_path / "train.npy").write_bytes((tmp_path / "train.npy").read_bytes()[:size])
        with pytest.raises(DataError, match="train.npy (has a damaged numpy header|is truncated)"):
            find_token_files(tmp_path)

    @pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")])
    def test_llm_c(self, tmp_path, magic, version, dtype):
        header = np.zeros(256, dtype="<i4")
        header[:3] = magic, version, len(TEXT)
        data = header.tobytes() + TEXT.astype(dtype).tobytes()
        (tmp_path / "train.bin").write_bytes(data)
        assert find_token_files(tmp_path).byte_offset.tolist() == [1024]
        assert np.array_equal(tokens_of(tmp_path), TEXT)
        (tmp_path / "train.bin").write_bytes(data[:-1])
        with pytest.raises(DataError, match="its llm.c header announces 20000 tokens"):
            find_token_files(tmp_path)


def test_a_type_that_contradicts_the_file_is_refused(tmp_path):
    write_token_file(tmp_path / "a.bin", TEXT, np.uint16)
    np.save(tmp_path / "b.npy", TEXT.astype("<u2"))
    (tmp_path / "m").mkdir()
    megatron(tmp_path / "m", DOCUMENTS)
    for path in (tmp_path / "a.bin", tmp_path / "b.npy", tmp_path / "m"):
        assert find_token_files(path, dtype="uint16").dtype == np.uint16
        with pytest.raises(ValueError, match="data.dtype=uint32 was given.*itself says that it holds uint16"):
            find_token_files(path, dtype="uint32")


@pytest.mark.parametrize("name", ["float32", "int", ">u2", "u2", ""])
def test_an_unknown_type_is_refused(tmp_path, name):
    TEXT.astype("<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match=f"data.dtype={name!r} is unknown; known: uint8, uint16, uint32"):
        find_token_files(tmp_path, dtype=name)


@given(st.binary(max_size=200), st.sampled_from(["x.bin", "x.ds", "x.npy"]), st.sampled_from([None, "uint8", "uint32"]))
def test_any_bytes_are_either_tokens_to_the_last_byte_or_one_clear_error(tmp_path_factory, content, name, dtype):
    path = tmp_path_factory.mktemp("bytes") / name
    path.write_bytes(content)
    try:
        described = describe_file(str(path), given_dtype(dtype))
    except (DataError, ValueError) as error:
        assert str(path) in str(error)
    else:
        assert described.file.end_bytes == len(content)
