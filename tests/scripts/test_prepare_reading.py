"""Reading raw text: every format gives the same documents, and every kind of damage is either mended or named."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.errors import DataError

ROWS = [
    {"text": f"Row {i}, naïve 中文.\n" + "word " * (i % 50), "meta": {"set": "ab"[i % 2]}, "n": i} for i in range(600)
]
TEXTS = [row["text"] for row in ROWS]
JSON_LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@pytest.fixture(scope="module")
def corpus(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "scripts"))
        yield importlib.import_module("prep.corpus")


@pytest.fixture(scope="module")
def formats(corpus):
    return sys.modules["prep.formats"]


@pytest.fixture
def read(corpus):
    """(texts, what was counted) of one file."""

    def call(path: Path, text_key: str = "text", document_bytes: int = 0, drop=()) -> tuple[list[str], dict[str, int]]:
        counters: Counter[str] = Counter()
        reading = corpus.Reading(text_key, document_bytes, 0, drop)
        (file,), _ = corpus.find_inputs([str(path)])
        texts = [text for _, text in corpus.read_documents(file, reading, counters)]
        return texts, dict(+counters)

    return call


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def gz(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def parquet(rows: list[dict], **options: object) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, write_page_checksum=True, row_group_size=250, **options)
    return sink.getvalue().to_pybytes()


def arrow_stream(rows: list[dict], schema: pa.Schema | None = None) -> bytes:
    table, sink = pa.Table.from_pylist(rows, schema), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=257)
    return sink.getvalue().to_pybytes()


def arrow_file(rows: list[dict]) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=257)
    return sink.getvalue().to_pybytes()


FORMS = {
    "a.jsonl": JSON_LINES,
    "a.jsonl.gz": gz(JSON_LINES),
    "a.jsonl.zst": zstd(JSON_LINES),
    "a.json.gz": gz(JSON_LINES),
    "a.json.zst": zstd(JSON_LINES),
    "a.parquet": parquet(ROWS),
    "a.arrow": arrow_stream(ROWS),
    "b.arrow": arrow_file(ROWS),
    "two members.jsonl.gz": gz(JSON_LINES[:9_000]) + gz(JSON_LINES[9_000:]),
    "two frames.jsonl.zst": zstd(JSON_LINES[:9_000]) + zstd(JSON_LINES[9_000:]),
    "skipped frame first.jsonl.zst": b"\x50\x2a\x4d\x18\x03\0\0\0abc" + zstd(JSON_LINES),
    "not gzip.jsonl.gz": JSON_LINES,
    "not zstd but gzip.jsonl.zst": gz(JSON_LINES),
    "parquet.jsonl": parquet(ROWS),
    "stream of arrow.parquet": arrow_stream(ROWS),
    "no suffix": parquet(ROWS),
    "with a mark of byte order.jsonl": b"\xef\xbb\xbf" + JSON_LINES,
    "without the last line feed.jsonl": JSON_LINES[:-1],
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_rows_whatever_its_name(read, tmp_path, name):
    (tmp_path / name).write_bytes(FORMS[name])
    assert read(tmp_path / name) == (TEXTS, {"rows": len(ROWS)})


@pytest.mark.parametrize("name", FORMS)
def test_rows_with_a_value_can_be_dropped_and_keys_can_lie_inside_objects(read, tmp_path, name):
    (tmp_path / name).write_bytes(FORMS[name])
    texts, counted = read(tmp_path / name, drop=(("meta.set", "b"), ("n", "0")))
    assert texts == [row["text"] for row in ROWS[2:] if row["meta"]["set"] == "a"]
    assert counted == {"rows": 600, "dropped": 301}
    assert read(tmp_path / name, text_key="meta.set")[0] == ["a", "b"] * 300


@pytest.mark.parametrize("name", ["a.txt", "a.md.gz", "a.py.zst", "a", "a.gz"])
@pytest.mark.parametrize("document_bytes", [0, 1, 1000])
def test_a_text_is_one_document_or_cut_where_lines_end(read, tmp_path, name, document_bytes):
    text = "".join(TEXTS) + "end"
    pack = {".gz": gz, ".zst": zstd}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack(text.encode()))
    texts, counted = read(tmp_path / name, document_bytes=document_bytes)
    assert "".join(texts) == text
    assert all(each.endswith("\n") for each in texts[:-1])
    if document_bytes:
        assert all(document_bytes < len(each.encode()) < document_bytes + 300 for each in texts[:-1])
    else:
        assert texts == [text]


@given(st.lists(st.binary(max_size=30)), st.integers(0, 40))
def test_lines_are_those_of_the_whole_text_however_it_comes_in_pieces(formats, pieces, document_bytes):
    pieces = [piece.replace(b"\x00", b"\n") for piece in pieces]
    data = b"".join(pieces)
    assert list(formats.lines(iter(pieces))) == data.split(b"\n")
    texts = list(formats.texts(iter(pieces), document_bytes))
    assert b"".join(texts) == data
    assert not document_bytes or all(text.endswith(b"\n") and len(text) > document_bytes for text in texts[:-1])
    assert list(formats.texts(iter([b"ab\nc", b"d\nef"]), 3)) == [b"ab\ncd\n", b"ef"]


DAMAGED = ("a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "b.arrow", "two frames.jsonl.zst")


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_cut_short_anywhere_is_an_error_with_its_path(read, tmp_path, name):
    data = FORMS[name]
    path = tmp_path / name
    end_of_first_frame = len(zstd(JSON_LINES[:9_000])) if name.startswith("two") else None
    for length in {*range(1, 12), *range(12, len(data), len(data) // 60), *range(len(data) - 12, len(data))}:
        if length != end_of_first_frame:  # which is a whole file
            path.write_bytes(data[:length])
            with pytest.raises(DataError, match=f"{name}.*get it again"):
                read(path)


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("garbage", [b"x", b"\0\0\0\x01", b"garbage " * 100])
def test_garbage_behind_the_end_is_an_error_with_the_path(read, tmp_path, name, garbage):
    (tmp_path / name).write_bytes(FORMS[name] + garbage)
    with pytest.raises(DataError, match=f"{name} is damaged.*get it again"):
        read(tmp_path / name)


def test_a_second_arrow_stream_behind_the_first_is_an_error(read, tmp_path):
    (tmp_path / "a.arrow").write_bytes(FORMS["a.arrow"] * 2)
    with pytest.raises(DataError, match=r"a\.arrow is damaged"):
        read(tmp_path / "a.arrow")


@pytest.mark.parametrize(
    ("name", "data"), [("a.parquet", JSON_LINES), ("a.arrow", b"text"), ("a.jsonl.zst", b"(\xb5\xfd")]
)
def test_a_packed_file_without_its_first_bytes_is_not_taken_for_text(read, tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"{name} is damaged: it does not begin like a"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_flipped_byte_never_changes_a_text_without_a_word(read, tmp_path, name):
    """Where the file has checksums, as these three have; Arrow streams have none."""
    rng = random.Random(0)
    data, path, noticed = FORMS[name], tmp_path / name, 0
    for place in (0, 1, 2, *rng.sample(range(len(data)), 60)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :])
        try:
            assert read(path)[0] == TEXTS  # it was a byte that says nothing about the rows, a time say
        except DataError as error:
            assert name in str(error)
            noticed += 1
    assert noticed > 20


@pytest.mark.parametrize("name", ["a.arrow", "b.arrow"])
def test_damaged_offsets_of_arrow_do_not_read_beyond_the_file(read, tmp_path, name):
    data = FORMS[name]
    offsets = sum(len(text.encode()) for text in TEXTS[:20]).to_bytes(4, "little")
    assert data.count(offsets) == 1
    (tmp_path / name).write_bytes(data.replace(offsets, b"\xff\xff\xff\x7f"))
    with pytest.raises(DataError, match=f"{name} is damaged.*offset"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "a.parquet", "a.arrow"])
def test_a_git_lfs_pointer_says_how_to_get_the_data(read, tmp_path, name):
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DataError, match=f"{name}.*git lfs pull"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "a.parquet", "a.arrow"])
def test_an_empty_file_is_counted(read, tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert read(tmp_path / name) == ([], {"empty_files": 1})


def test_what_is_not_text_is_refused(read, tmp_path):
    for name, data in {
        "a.txt": b"\x7fELF\0\0\0",
        "b.txt": gz(b"\x7fELF\0\0\0"),
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name} is not text"):
            read(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("pack", [bytes, gz])
def test_text_in_another_form_of_unicode_says_how_to_convert_it(read, tmp_path, encoding, pack):
    (tmp_path / "a.txt").write_bytes(pack("\u6587\u5b57".encode(encoding)))
    with pytest.raises(DataError, match=r"a\.txt is in UTF-16 or UTF-32.*iconv"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("document_bytes", [0, 1])
def test_the_mark_of_utf_8_is_no_part_of_the_text(read, tmp_path, document_bytes):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc\nd\xef\xbb\xbf")
    assert "".join(read(tmp_path / "a.txt", document_bytes=document_bytes)[0]) == "abc\nd\ufeff"


@pytest.mark.parametrize("indent", [None, 1])
def test_one_large_array_instead_of_json_lines_says_how_to_make_lines_of_it(read, tmp_path, indent):
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=indent))
    with pytest.raises(DataError, match=r"a\.json begins with an array.*jq -c"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize("head", [b"BZh91AY", b"\xfd7zXZ\0", b"PK\x03\x04"])
def test_other_packings_are_refused_even_before_anything_is_read_where_the_name_is_unknown(corpus, tmp_path, head):
    (tmp_path / "a").write_bytes(head + b"abc")
    with pytest.raises(ValueError, match=r"a: .*cannot be read; unpack it"):
        corpus.find_inputs([str(tmp_path / "a")])
    (tmp_path / "a").rename(tmp_path / "a.txt")
    (file,), _ = corpus.find_inputs([str(tmp_path)])
    with pytest.raises(DataError, match=r"a\.txt is packed with"):
        list(corpus.read_documents(file, corpus.Reading("text", 0, 0), Counter()))


def test_zstd_with_a_window_too_long_to_read_says_how_to_pack_it_again(read, tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(JSON_LINES) + packer.flush())
    with pytest.raises(DataError, match=r"a\.jsonl\.zst.*--long=31"):
        read(tmp_path / "a.jsonl.zst")


@pytest.fixture(params=["orjson", "json"])
def json_package(request, monkeypatch):
    if request.param == "json":
        monkeypatch.setitem(sys.modules, "orjson", None)


MENDED = {
    b'{"text": "caf\xe9"}': "caf\ufffd",
    b'{"text": "a\\ud800b"}': "a\ufffdb",
    b'{"text": "\\ud83d\\ude00"}': "😀",
    b'{"text": "a", "text": "b"}': "b",
    b'{"text": "a", "n": 1e400}': "a",
    b'{"text": "a", "n": 123456789012345678901234567890}': "a",
    b' {"text": "a"}\r': "a",
}


def test_text_that_is_not_unicode_is_mended_and_counted(read, tmp_path, json_package):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(MENDED))
    assert read(tmp_path / "a.jsonl") == (list(MENDED.values()), {"rows": len(MENDED), "repaired": 2})
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert read(tmp_path / "a.txt") == (["caf\ufffd"], {"repaired": 1})


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_text_that_is_not_unicode_is_mended_in_its_row_alone(read, tmp_path, name):
    texts = [b"good", b"caf\xe9", None, "中".encode()] * 100
    binary = pa.array(texts, pa.binary())
    for column in (binary, pa.Array.from_buffers(pa.string(), len(binary), binary.buffers())):
        table = pa.table({"text": column})
        if name == "a.parquet":
            pq.write_table(table, tmp_path / name)
        else:
            with pa.ipc.new_stream(tmp_path / name, table.schema) as writer:
                writer.write_table(table)
        expected = ["good", "caf\ufffd", "中"] * 100
        assert read(tmp_path / name) == (expected, {"rows": 400, "repaired": 100, "no_text": 100})


BROKEN = [
    b'{"text": "abc"',
    b'"abc"',
    b'{"text": NaN}',
    b'{"text": -Infinity}',
    b"\xff",
    b"[" * 100_000,
    b'{"text": "a\x01"}',
]


def test_broken_lines_are_counted_and_the_rest_is_read(read, tmp_path, json_package):
    (tmp_path / "a.jsonl").write_bytes(b"".join(each + b"\n\n" + JSON_LINES for each in BROKEN))
    texts, counted = read(tmp_path / "a.jsonl")
    assert texts == TEXTS * len(BROKEN)
    assert counted == {"rows": 601 * len(BROKEN), "bad_json": len(BROKEN), "repaired": 1}


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-(2**40), 2**40) | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.dictionaries(st.sampled_from(["text", "meta", "x"]), JSON_VALUES),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=1),
)
def test_rows_are_the_same_with_and_without_orjson(formats, row, ascii, changes):
    line = bytearray(json.dumps(row, ensure_ascii=ascii).encode("utf-8", "surrogatepass").replace(b"\n", b" "))
    for place, value in changes:
        line[place % len(line)] = value
    outcomes = []
    for package in (importlib.import_module("orjson"), None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "orjson", package)
            counters: Counter[str] = Counter()
            rows = list(formats.json_rows(iter([bytes(line)]), counters))
            outcomes.append((json.dumps(rows), counters))
    assert outcomes[0] == outcomes[1]


def test_rows_without_text_are_counted(read, tmp_path, json_package):
    others = b'{"text": null}\n{"text": 5}\n{"url": "x"}\n{"text": ["a"]}\n'
    empty = b'{"text": " \\n\\u3000"}\n{"text": ""}\n'
    (tmp_path / "a.jsonl").write_bytes(others + empty + JSON_LINES)
    assert read(tmp_path / "a.jsonl") == (TEXTS, {"rows": 606, "no_text": 4, "empty": 2})


@pytest.mark.parametrize("form", [parquet, arrow_stream])
def test_rows_of_tables_without_text_are_counted(read, tmp_path, form):
    rows = [{"text": None}] * 3 + [{"text": " \n"}, {"text": ""}] + [{"text": "a"}] * 5
    (tmp_path / "a").write_bytes(form(rows))
    assert read(tmp_path / "a") == (["a"] * 5, {"rows": 10, "no_text": 3, "empty": 2})


def test_a_key_that_most_rows_lack_stops_with_the_keys_there_are(read, formats, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"content": "abc", "meta": {"lang": "en"}}\n' * 501 + b'{"text": "a"}\n' * 100_000)
    with pytest.raises(formats.WrongKeyError, match=r"501 of the first 1000 .*'text'.*content, meta\.lang.*--text-key"):
        read(path)
    path.write_bytes(b'{"content": "abc"}\n' * 500 + b'{"text": "a"}\n' * 500)
    assert read(path)[1] == {"rows": 1000, "no_text": 500}


def test_a_key_to_drop_by_that_most_rows_lack_stops_too(read, formats, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(JSON_LINES)
    with pytest.raises(
        formats.WrongKeyError, match=r"600 of the first 600 rows have no 'meta\.kind'.*meta\.set.*--drop"
    ):
        read(tmp_path / "a.jsonl", drop=(("meta.kind", "b"),))


def test_rows_to_be_dropped_do_not_count_when_keys_are_judged(read, formats, tmp_path):
    rows = [{"text": None if i % 3 else "a", "kind": "code" if i < 700 else "web"} for i in range(1000)]
    (tmp_path / "a").write_bytes(parquet(rows))
    with pytest.raises(formats.WrongKeyError, match="200 of the first 300 rows"):
        read(tmp_path / "a", drop=(("kind", "code"),))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
def test_a_key_with_a_dot_in_its_own_name_is_found(read, tmp_path, name):
    rows = [{"a.text": str(i), "meta.set": "ab"[i % 2]} for i in range(10)]
    form = {
        "a.jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
        "a.parquet": parquet,
        "a.arrow": arrow_stream,
    }
    (tmp_path / name).write_bytes(form[name](rows))
    assert read(tmp_path / name, text_key="a.text", drop=(("meta.set", "a"),))[0] == ["1", "3", "5", "7", "9"]


@pytest.mark.parametrize("form", [parquet, arrow_stream, arrow_file])
def test_a_missing_column_names_the_columns_there_are(read, formats, tmp_path, form):
    (tmp_path / "a").write_bytes(form(ROWS))
    for options in ({"text_key": "content"}, {"text_key": "meta.text"}, {"drop": (("meta.kind", "x"),)}):
        with pytest.raises(formats.WrongKeyError, match=r"no column .* its columns are text, meta\.set, n\. Choose"):
            read(tmp_path / "a", **options)
    with pytest.raises(
        formats.WrongKeyError, match=r"600 of the first 600 rows have no text under 'n'.*text, meta\.set, n"
    ):
        read(tmp_path / "a", text_key="n")
    (tmp_path / "a").write_bytes(form([{"text": None, "content": "abc"}] * 2000))
    with pytest.raises(formats.WrongKeyError, match=r"1000 of the first 1000 .*text, content"):
        read(tmp_path / "a")


@pytest.mark.parametrize("nulls", [0, 1])
def test_rows_are_dropped_by_values_that_are_not_strings_and_by_null(read, tmp_path, nulls):
    rows = [{"text": str(i), "ok": bool(i % 2), "of": {"n": None if i == 3 else i}} for i in range(10)]
    rows[5]["of"] = None if nulls else {"n": None}
    for name, data in {
        "a": parquet(rows),
        "b": arrow_stream(rows),
        "c.jsonl": "\n".join(map(json.dumps, rows)).encode(),
    }.items():
        (tmp_path / name).write_bytes(data)
        assert read(tmp_path / name, drop=(("ok", "false"), ("of.n", "7")))[0] == ["1", "3", "5", "9"]
        dropped = ["3", "5"] if not (nulls and name == "c.jsonl") else ["3"]
        kept = [str(i) for i in range(10) if str(i) not in dropped]
        assert read(tmp_path / name, drop=(("of.n", "null"),))[0] == kept


def save_to_disk(folder: Path, shards: list[list[dict]], **state: object) -> Path:
    """As datasets 5.2.0 does it."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        (folder / name).write_bytes(arrow_stream(rows))
    description = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "0",
        "_split": "train",
        **state,
    }
    (folder / "state.json").write_text(json.dumps(description))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_saved_dataset_is_read_by_its_list_of_files(corpus, read, tmp_path):
    folder = save_to_disk(tmp_path / "saved", [ROWS[:100], ROWS[100:250]])
    (folder / "cache-0123.arrow").write_bytes(arrow_stream(ROWS))  # of some map(), not part of the dataset
    files, ignored = corpus.find_inputs([str(folder)])
    assert [file.name for file in files] == [f"saved/data-0000{i}-of-00002.arrow" for i in range(2)]
    assert ignored == [] and {file.split for file in files} == {"auto"}
    assert read(files[0].path)[0] + read(files[1].path)[0] == TEXTS[:250]
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match="data-00001-of-00002.arrow, missing"):
        corpus.find_inputs([str(tmp_path)])


def test_rows_that_are_only_marked_as_selected_are_refused(corpus, tmp_path):
    save_to_disk(tmp_path / "saved", [ROWS], _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(DataError, match="selected; save it again"):
        corpus.find_inputs([str(tmp_path)])


def saved_splits(folder: Path, *names: str) -> Path:
    for name in names:
        save_to_disk(folder / name, [ROWS[:10]])
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": names}))
    return folder


def test_the_splits_of_a_saved_dataset_stay_what_they_are_and_the_test_split_is_left_out(corpus, tmp_path):
    folder = saved_splits(tmp_path / "saved", "train", "validation", "test")
    for split, expected in (
        ("auto", {"train": "train", "validation": "validation"}),
        ("train", {"train": "train"}),
        ("validation", {"validation": "validation"}),
    ):
        files, ignored = corpus.find_inputs([str(folder)], split)
        assert {file.name.split("/")[1]: file.split for file in files} == expected
        assert [name.partition(" ")[0] for name in ignored] == [
            f"saved/{name}" for name in ("train", "validation", "test") if name not in expected
        ]


def test_a_saved_dataset_without_validation_is_split_by_its_texts(corpus, tmp_path):
    files, ignored = corpus.find_inputs([str(saved_splits(tmp_path / "saved", "train", "test"))])
    assert [file.split for file in files] == ["auto"] and len(ignored) == 1
    with pytest.raises(FileNotFoundError, match="the splits test, other, and none.*give the folder of a split"):
        corpus.find_inputs([str(saved_splits(tmp_path / "other", "test", "other"))])


def test_a_state_of_something_else_does_not_hide_the_files_beside_it(corpus, tmp_path):
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "a.jsonl").write_bytes(JSON_LINES)
    files, ignored = corpus.find_inputs([str(tmp_path)])
    assert len(files) == 1 and ignored == ["state.json"]


def test_folders_files_and_patterns_are_found_in_one_order(corpus, tmp_path):
    for name in (
        "b/2.jsonl.zst",
        "b/1.parquet",
        "a/3.txt",
        "a/.hidden.txt",
        ".git/4.txt",
        "a/5.json",
        "a/6.json.zst",
        "a/7.png",
    ):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    names = ["in/a/3.txt", "in/a/6.json.zst", "in/b/1.parquet", "in/b/2.jsonl.zst"]
    whole, ignored = corpus.find_inputs([f"{tmp_path}/in"])
    assert [file.name for file in whole] == names and ignored == ["5.json", "7.png"]
    assert corpus.find_inputs([f"{tmp_path}/in/*"])[0] == whole  # the folders a and b
    assert corpus.find_inputs([f"{tmp_path}/in/b/*", f"{tmp_path}/in/a/", f"{tmp_path}/in/b"])[0][-2:] == [
        corpus.InputFile(str(tmp_path / "in" / "b" / name), f"b/{name}", 1, "auto")
        for name in ("1.parquet", "2.jsonl.zst")
    ]
    found, _ = corpus.find_inputs([f"{tmp_path}/in/**/*.[jp]*"])
    assert [file.name for file in found] == [
        "in/a/5.json",
        "in/a/6.json.zst",
        "in/a/7.png",
        "in/b/1.parquet",
        "in/b/2.jsonl.zst",
    ]
    with pytest.raises(FileNotFoundError, match=r"no file matches the pattern .*\*\.md"):
        corpus.find_inputs([f"{tmp_path}/in/*.md"])
    odd = tmp_path / "[x].txt"
    odd.write_text("a file whose name is like a pattern")
    assert corpus.find_inputs([str(odd)])[0][0].path == str(odd)


def test_json_lines_are_not_taken_for_text_where_the_name_says_nothing(read, tmp_path):
    for name in ("part-00000", "part-00000.gz", "a.jsonl.1"):
        (tmp_path / name).write_bytes(JSON_LINES)
        with pytest.raises(DataError, match=f"{name} holds JSON lines.*let it end in .jsonl"):
            read(tmp_path / name)
    (tmp_path / "a.ndjson").write_bytes(JSON_LINES)
    assert read(tmp_path / "a.ndjson")[0] == TEXTS
    for name, text in {"a.txt": JSON_LINES.decode(), "a.ipynb": '{"cells": []}\n'}.items():
        (tmp_path / name).write_text(text, newline="")
        assert read(tmp_path / name)[0] == [text]


def test_folders_behind_links_are_read_and_none_is_read_twice(corpus, tmp_path):
    for name in ("in/a.txt", "elsewhere/b.txt", "elsewhere/deep/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "same").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "deep" / "circle").symlink_to(tmp_path / "in")
    files, ignored = corpus.find_inputs([str(tmp_path / "in")])
    assert ([file.name for file in files], ignored) == (["in/a.txt", "in/link/b.txt", "in/link/deep/c.txt"], [])


@pytest.mark.parametrize("pattern", ["", "*.txt"])
def test_a_link_to_what_is_missing_is_no_file_to_leave_out(corpus, tmp_path, pattern):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").symlink_to("blob")
    with pytest.raises(FileNotFoundError, match=r"b\.txt is a link to blob, which is missing"):
        corpus.find_inputs([str(tmp_path / pattern)])


def test_a_file_that_may_not_be_read_is_named_before_any_is(corpus, monkeypatch, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("abc")
    monkeypatch.setattr(corpus.os, "access", lambda path, mode: Path(path).name != "b.txt")  # root may read all
    with pytest.raises(DataError, match=r"b\.txt cannot be read.*permissions"):
        corpus.find_inputs([str(tmp_path)])


def test_a_name_that_no_plan_can_hold_is_refused(corpus, tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    try:
        with open(path, "wb"):
            pass
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    with pytest.raises(DataError, match=r"caf\\udce9\.txt' is not in UTF-8.*rename it"):
        corpus.find_inputs([str(tmp_path)])


def test_a_missing_package_is_named_with_its_extra(read, tmp_path, monkeypatch):
    for name in ("a.jsonl.zst", "a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(FORMS[name])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("a.jsonl.zst", "a.parquet", "a.arrow"):
        with pytest.raises(ValueError, match=rf"{name}.*pyarrow.*\[prep\]"):
            read(tmp_path / name)


def test_an_error_of_the_disk_is_not_taken_for_damage(formats):
    with pytest.raises(OSError, match="Input/output") as caught, formats.damage_named("a.jsonl"):
        raise OSError(5, "Input/output error", "a.jsonl")
    assert not isinstance(caught.value, DataError)


READ_BOTH = """
import sys
from collections import Counter
from prep.corpus import Reading, find_inputs, read_documents

def megabytes():
    with open("/proc/self/status") as status:  # without the pages of mapped files, which the system can drop
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

def read(path):
    (file,), _ = find_inputs([path])
    characters = most = 0
    for number, (_, text) in enumerate(read_documents(file, Reading("text", 1000, 500), Counter())):
        characters += len(text)
        most = max(most, megabytes()) if number % 100 == 0 else most
    return characters, most

small, most_for_small = read(sys.argv[1])
large, most_for_large = read(sys.argv[2])
assert large == 15 * small
print(most_for_large - most_for_small)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the figures of Linux on a process")
@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.parquet", "a.arrow", "a.txt.gz"])
def test_memory_does_not_grow_with_the_file(root, tmp_path, name):
    rng = random.Random(0)
    rows = [{"text": rng.randbytes(1000).hex()} for _ in range(1000)]
    for copies in (1, 15):
        path = tmp_path / f"{copies}-{name}"
        if name == "a.parquet":  # one row group
            pq.write_table(pa.Table.from_pylist(rows * copies), path, row_group_size=10**6, use_dictionary=False)
        elif name == "a.arrow":
            path.write_bytes(arrow_stream(rows * copies))
        else:
            lines = "".join(row["text"] + "\n" if "txt" in name else json.dumps(row) + "\n" for row in rows).encode()
            path.write_bytes((zstd if name.endswith("zst") else gz)(lines) * copies)
    program = [sys.executable, "-c", READ_BOTH, *(str(tmp_path / f"{copies}-{name}") for copies in (1, 15))]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'scripts'}"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 12  # of the 30 that the large file has more of text
