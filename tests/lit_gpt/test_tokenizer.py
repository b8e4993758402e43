"""Tokenizers: text survives, ids agree between formats, and the byte table accounts for every byte of real text."""

from __future__ import annotations

import builtins
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.errors import DataError
from lit_gpt.tokenizer import BytesTokenizer, Tokenizer, tokenizer_files, well_formed

EDGE_TEXTS = (
    "", " ", "  leading", "trailing  ", "a\n\n\tb\r\n", "naïve café", "中文字符", "😀👩‍👩‍👧", "x = 12345", "\x00\x7f",
    "</s><s><unk> [INST]", "a\ufeffb", "e\u0301", "long " * 300,
)  # fmt: skip


@pytest.fixture(scope="module")
def llama(data_dir):
    return Tokenizer.load(data_dir("tokenizers/llama2/tokenizer.model"))


@pytest.fixture(scope="module")
def llama_json(data_dir):
    return Tokenizer.load(data_dir("tokenizers/llama2/tokenizer.json"))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A small byte-level tokenizer.json as GPT-2 and Llama 3 use them, with every trap: truncation, padding, holes."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, the end"] * 20, trainer)
    tokenizer.add_tokens(["héllo"])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    tokenizer.save(str(path))
    return Tokenizer.load(path)


PIECES = ["Ġ", "t", "h", "e", "Ġt", "he", "Ġthe", "a", "b", "Ã", "©", "!", "1"]


@pytest.fixture
def pair(tmp_path):
    """GPT-2's two files, of every byte and a few pieces, with a prefix before their names."""
    alphabet = sorted(
        {*tokenizers.pre_tokenizers.ByteLevel.alphabet(), *PIECES, "Ã©"}, key=lambda piece: (len(piece), piece)
    )
    ids = {piece: i for i, piece in enumerate([*alphabet, "<|endoftext|>"])}
    (tmp_path / "tiny-vocab.json").write_text(json.dumps(ids))
    (tmp_path / "tiny-merges.txt").write_text("#version: 0.2\nĠ t\nh e\nĠt he\nÃ ©\n", encoding="utf-8")
    return tmp_path


def texts_of(data_dir):
    """Real text: web pages, LaTeX, questions in several languages, and a part of each book."""
    books = sorted(data_dir("books").glob("*.md"))
    texts = [book.read_text(encoding="utf-8")[-8_000:] for book in books]
    for file in sorted(data_dir("web_samples").glob("*.jsonl")):
        texts += [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    return texts


def test_the_bytes_tokenizer_has_259_ids():
    tokenizer = Tokenizer.load("bytes")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (259, 1, 2)
    assert tokenizer.encode("aé").tolist() == [100, 198, 172]
    assert tokenizer.decode([1, 100, 198, 172, 2, 0]) == "aé"
    assert tokenizer.byte_lengths().tolist() == [0, 0, 0] + [1] * 256


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_keep_any_text(text):
    tokenizer = BytesTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())


@given(st.text(st.characters(categories=["Cs", "Lu", "So"])))
def test_lone_surrogates_are_replaced_and_pairs_joined(text):
    assert well_formed(text) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    well_formed(text).encode()


@pytest.mark.parametrize("kind", ["bytes", "llama", "llama_json", "byte_level"])
def test_a_lone_surrogate_is_no_crash(kind, request):
    tokenizer = BytesTokenizer() if kind == "bytes" else request.getfixturevalue(kind)
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("kind", ["llama", "llama_json", "byte_level"])
@pytest.mark.parametrize("text", EDGE_TEXTS)
def test_text_survives_a_round_trip(kind, text, request):
    tokenizer = request.getfixturevalue(kind)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", EDGE_TEXTS)
def test_both_formats_of_one_model_give_the_same_ids(text, llama, llama_json):
    assert llama.encode(text).tolist() == llama_json.encode(text).tolist()


def test_both_formats_of_one_model_give_the_same_ids_on_real_text(data_dir, llama, llama_json):
    texts = texts_of(data_dir)
    assert len(texts) > 100
    assert_same_ids(texts, llama, llama_json)
    assert (llama.bos_id, llama.eos_id) == (llama_json.bos_id, llama_json.eos_id) == (1, 2)


@pytest.mark.slow
def test_both_formats_of_one_model_give_the_same_ids_on_whole_books(data_dir, llama, llama_json):
    books = sorted(data_dir("books").glob("*.md"))
    assert_same_ids([book.read_text(encoding="utf-8") for book in books], llama, llama_json)


def assert_same_ids(texts, one, other):
    """Also where a text spells the names of control tokens."""
    texts = [*texts, *(text[:500] + "<s>" + text[500:900] + "</s><unk>" for text in texts)]
    assert all(map(np.array_equal, one.encode_batch(texts), other.encode_batch(texts)))


def test_literal_control_tokens_are_text(llama, llama_json, byte_level):
    for tokenizer in (llama, llama_json):
        assert not set(tokenizer.encode("a</s><s>").tolist()) & {0, 1, 2}
    assert byte_level.eos_id not in byte_level.encode("a<|endoftext|>b").tolist()


def test_a_stored_truncation_or_padding_has_no_effect(byte_level):
    assert len(byte_level.encode("zq" * 50)) == 100
    assert byte_level.encode("z").size == 1


def test_added_tokens_count_into_the_vocabulary(llama_json, byte_level):
    assert llama_json.vocab_size == 32003
    added = byte_level.encode("héllo")
    assert added.tolist() == [byte_level.vocab_size - 1]
    assert byte_level.byte_lengths()[added].sum() == len("héllo".encode())


@pytest.mark.parametrize("kind", ["llama", "llama_json", "byte_level"])
def test_the_byte_table_accounts_for_every_byte_of_real_text(kind, data_dir, request):
    tokenizer = request.getfixturevalue(kind)
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,) and lengths[tokenizer.eos_id] == 0
    for text in [*texts_of(data_dir), *EDGE_TEXTS[1:]]:
        counted = lengths[tokenizer.encode(text)].sum() - tokenizer.bytes_added_per_text
        assert counted == len(text.encode()), text[:80]


def test_a_tokenizer_without_byte_fallback_counts_unknown_text_as_nothing(data_dir):
    tokenizer = Tokenizer.load(data_dir("tokenizers/sp1000/test_model.model"))
    assert tokenizer.vocab_size == 1000
    assert tokenizer.byte_lengths()[tokenizer.encode("中")].sum() == 1  # the space that it puts before any text


def test_a_batch_is_the_same_as_one_text_at_a_time(llama, llama_json, byte_level):
    for tokenizer in (llama, llama_json, byte_level, BytesTokenizer()):
        batch = tokenizer.encode_batch(EDGE_TEXTS)
        assert [ids.tolist() for ids in batch] == [tokenizer.encode(text).tolist() for text in EDGE_TEXTS]
        assert all(ids.dtype == np.int64 for ids in batch)


@pytest.mark.parametrize("kind", ["bytes", "llama", "llama_json", "byte_level"])
def test_a_saved_tokenizer_is_the_same_one(kind, request, tmp_path):
    tokenizer = BytesTokenizer() if kind == "bytes" else request.getfixturevalue(kind)
    tokenizer.save(tmp_path)
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.kind, loaded.fingerprint) == (tokenizer.kind, tokenizer.fingerprint)
    assert loaded.encode("some text").tolist() == tokenizer.encode("some text").tolist()


@pytest.mark.parametrize(
    ("config", "eos"),
    [
        ({"eos_token": "<|endoftext|>"}, 0),
        ({"eos_token": {"content": "<|endoftext|>", "special": True}}, 0),
        ({"eos_token": None}, None),
        ({}, None),
        (None, 0),
    ],
)
def test_eos_comes_from_the_config_beside_the_tokenizer(byte_level, tmp_path, config, eos):
    byte_level.save(tmp_path)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).eos_id == eos


def test_whether_bos_comes_first_is_what_the_file_says(byte_level, tmp_path):
    assert Tokenizer.load("bytes").puts_bos_first
    byte_level.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|endoftext|>"}')
    loaded = Tokenizer.load(tmp_path)
    assert loaded.bos_id == 0 and not loaded.puts_bos_first

    changed = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    changed.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    changed.save(str(tmp_path / "tokenizer.json"))

    loaded = Tokenizer.load(tmp_path)
    assert loaded.puts_bos_first
    assert loaded.encode("the cat").tolist() == byte_level.encode("the cat").tolist(), "encode leaves it out"


def test_the_two_files_of_gpt2_are_one_tokenizer_whichever_is_given(pair, tmp_path):
    tokenizer = Tokenizer.load(pair)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, tokenizer.vocab_size - 1)
    ids = tokenizer.encode("the théthe")
    assert [tokenizer.decode([i]) for i in ids] == ["t", "he", " t", "h", "é", "t", "he"]
    for text in EDGE_TEXTS:  # no space is put before a text, and no text becomes a control token
        ids = tokenizer.encode(text + "<|endoftext|>")
        assert tokenizer.decode(ids) == text + "<|endoftext|>" and tokenizer.eos_id not in ids
        assert tokenizer.byte_lengths()[ids].sum() == len(text.encode()) + 13
    assert tokenizer.byte_lengths()[tokenizer.eos_id] == 0
    for name in ("tiny-vocab.json", "tiny-merges.txt"):
        assert Tokenizer.load(pair / name).fingerprint == tokenizer.fingerprint

    (tmp_path / "out").mkdir()
    tokenizer.save(tmp_path / "out")
    saved = Tokenizer.load(tmp_path / "out")
    assert (saved.kind, saved.fingerprint, saved.eos_id) == (tokenizer.kind, tokenizer.fingerprint, tokenizer.eos_id)
    assert saved.encode("the théthe").tolist() == tokenizer.encode("the théthe").tolist()


def test_everything_that_decides_a_tokenizer_is_listed(pair):
    (pair / "tokenizer_config.json").write_text('{"eos_token": "a", "bos_token": {"content": "b"}}')
    names = ["tiny-vocab.json", "tiny-merges.txt", "tokenizer_config.json"]
    assert [file.name for file in tokenizer_files(pair / "tiny-merges.txt")] == names
    tokenizer = Tokenizer.load(pair)
    assert [tokenizer.decode([i]) for i in (tokenizer.bos_id, tokenizer.eos_id)] == ["b", "a"]
    before = tokenizer.fingerprint
    (pair / "tiny-merges.txt").write_text("#version: 0.2\nh e\n", encoding="utf-8")
    assert Tokenizer.load(pair).fingerprint != before


def test_half_a_pair_or_two_pairs_are_refused(pair):
    for name in ("vocab.json", "merges.txt"):
        (pair / name).write_bytes((pair / f"tiny-{name}").read_bytes())
    with pytest.raises(ValueError, match=r"several tokenizers: tiny-vocab\.json, vocab\.json; name one"):
        Tokenizer.load(pair)
    for lost, kept in (("tiny-vocab.json", "tiny-merges.txt"), ("merges.txt", "vocab.json")):
        (pair / lost).unlink()
        with pytest.raises(FileNotFoundError, match=rf"{kept} is one of two files, and {lost} is not beside it"):
            Tokenizer.load(pair / kept)
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer; .*vocab\.json with merges\.txt"):
        Tokenizer.load(pair)


@pytest.mark.parametrize("vocabulary", ["{}", "[]", '{"a": 0}', "{", '{"a": "b"}'])
def test_a_damaged_pair_is_named(pair, vocabulary):
    (pair / "tiny-vocab.json").write_text(vocabulary)
    with pytest.raises(DataError, match=r"tiny-vocab\.json"):
        Tokenizer.load(pair)


def test_real_documents_give_the_ids_that_other_code_wrote(data_dir):
    """1,000 web pages that Megatron tokenised: the text of the ids gives the ids back, all of them."""
    folder = data_dir("openwebtext1k")
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (5000, 4999)
    ids = np.fromfile(folder / "meg-gpt2-openwebtext_text_document.bin", np.uint16)
    documents = np.split(ids, np.flatnonzero(ids == tokenizer.eos_id) + 1)[:-1]
    assert len(documents) == 1000
    documents = [document[:-1] for document in documents]
    texts = [tokenizer.decode(document) for document in documents]
    assert all(map(np.array_equal, tokenizer.encode_batch(texts), documents))
    lengths = tokenizer.byte_lengths()
    assert [lengths[document].sum() for document in documents] == [len(text.encode()) for text in texts]


def test_a_model_without_known_bytes_refuses_the_table(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="WordLevel"):
        Tokenizer.load(tmp_path).byte_lengths()


def test_a_missing_package_is_named_with_its_extra(byte_level, monkeypatch):
    real_import = builtins.__import__

    def without_tokenizers(name, *args, **kwargs):
        if name == "tokenizers":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tokenizers)
    with pytest.raises(ValueError, match=r"\[prep\]"):
        Tokenizer.load(byte_level.path)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"garbage", b"{}", bytes(range(256))])
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        Tokenizer.load(tmp_path / name)


def test_a_missing_tokenizer_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Tokenizer.load(tmp_path / "x.model")
    with pytest.raises(FileNotFoundError, match="tokenizer.model, tokenizer.json"):
        Tokenizer.load(tmp_path)
