"""Texts in parts have the ids of whole texts; models for which that is not sure are never given parts."""

from __future__ import annotations

import io
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from lit_gpt.text_cuts import PART_CHARACTERS, can_cut, parts
from lit_gpt.tokenizer import SentencePieceTokenizer

FRAGMENTS = ["the", " ", "  ", "a", "\n", "\u2581", "é", "中", "\U0001f600", "\t", "ing", "</s>", "\0", "7", "."]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join)


def train(**settings: object) -> SentencePieceProcessor:
    rng = random.Random(0)
    words = ["".join(rng.choices("aeinrst", k=rng.randint(1, 7))) for _ in range(200)]
    lines = [" ".join(rng.choices(words, k=12)) for _ in range(300)]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, num_threads=1, minloglevel=2,
        **{"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "normalization_rule_name": "identity",
           "remove_extra_whitespaces": False, **settings},
    )  # fmt: skip
    return SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def like_llama() -> SentencePieceProcessor:
    return train(allow_whitespace_only_pieces=True)


@given(text=TEXTS, characters=st.integers(1, 20))
def test_the_parts_have_the_ids_of_the_whole(like_llama, text, characters):
    assert can_cut(like_llama)
    assert sum((like_llama.encode(part) for part in parts(text, characters)), []) == like_llama.encode(text)


def test_llamas_own_model_gives_the_same_ids_in_parts(data_dir):
    path = data_dir("tokenizers/llama2/tokenizer.model")
    tokenizer, whole = SentencePieceTokenizer(path), SentencePieceProcessor(model_file=str(path))
    assert can_cut(whole)
    for book in sorted(data_dir("books").glob("*.md"))[:3]:
        text = book.read_text(encoding="utf-8")[:200_000]
        assert len(list(parts(text))) > 100
        assert tokenizer.encode(text).tolist() == whole.encode(text)


@given(text=TEXTS.map(lambda text: text * 30))
def test_parts_are_the_text_again_with_a_space_between_them_and_none_is_much_too_short(text):
    cut = list(parts(text))
    assert " ".join(cut) == text
    assert all(len(part) >= PART_CHARACTERS for part in cut[:-1])


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"treat_whitespace_as_suffix": True},
        {"split_by_whitespace": False},
        {"user_defined_symbols": ["in the"]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_models_get_their_texts_whole(settings):
    assert not can_cut(train(**settings))
