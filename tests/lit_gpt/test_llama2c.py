"""llama2.c's files: a real model writes its known text, others compute what their format says, damage is refused."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lit_gpt.axes import parameter_shapes
from lit_gpt.config import Config
from lit_gpt.errors import DataError
from lit_gpt.exchange import read_exchange
from lit_gpt.generate import generate
from lit_gpt.llama2c import MAGIC, checkpoint_file, read_llama2c, read_tokenizer, sentencepiece_model, to_exchange
from lit_gpt.model import GPT
from lit_gpt.tokenizer import Tokenizer

KNOWN_LOSS = 0.8250  # of SOURCE.md, mean next-token cross-entropy in nats on this text
KNOWN_LOSS_UNPERMUTED = 3.461
KNOWN_LOSS_TEXT = (
    "One day, a boy named Tim went to the park. He saw a big dog. The dog was sad. Tim wanted to help the dog. "
    "He gave the dog a ball. The dog was happy and they played all day."
)
BLOCKS = ("norm_1", "q", "k", "v", "o", "norm_2", "gate", "down", "up")

# The real model


@pytest.fixture(scope="module")
def stories(data_dir) -> Path:
    return data_dir("checkpoints/stories260K")


@pytest.fixture(scope="module")
def exchange(stories, tmp_path_factory) -> Path:
    return to_exchange(stories, tmp_path_factory.mktemp("stories") / "exchange")


def model_of(config: Config, weights) -> GPT:
    model = GPT(config)
    model.load_state_dict(dict(weights))
    return model


def test_the_real_model_writes_the_text_that_llama2c_writes(stories, exchange):
    model = model_of(*read_llama2c(stories))
    tokenizer = Tokenizer.load(exchange)

    ids = generate(model, [tokenizer.bos_id], 200, temperature=0)

    assert tokenizer.decode(ids) == (stories / "expected_greedy_200.txt").read_text()


@torch.no_grad()
def test_without_the_rotary_permutation_the_text_is_another_and_the_loss_as_bad_as_known(
    stories, exchange, monkeypatch
):
    monkeypatch.setattr("lit_gpt.llama2c._halves_from_neighbours", lambda rows, head_size: rows)
    model, tokenizer = model_of(*read_llama2c(stories)), Tokenizer.load(exchange)
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(KNOWN_LOSS_TEXT).tolist()]])

    text = tokenizer.decode(generate(model, [tokenizer.bos_id], 200, temperature=0))

    assert text != (stories / "expected_greedy_200.txt").read_text()
    assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(KNOWN_LOSS_UNPERMUTED, abs=5e-4)


@torch.no_grad()
def test_the_real_model_has_its_known_loss(stories, exchange):
    model, tokenizer = model_of(*read_llama2c(stories)), Tokenizer.load(exchange)
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(KNOWN_LOSS_TEXT).tolist()]])

    assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(KNOWN_LOSS, abs=5e-5)


def test_the_real_model_is_described_and_tied(stories):
    config, weights = read_llama2c(stories / "stories260K.bin")

    assert config == Config(
        block_size=512, vocab_size=512, n_layer=5, n_head=8, n_embd=64, n_query_groups=4, intermediate_size=172,
        norm_eps=1e-5, tie_embeddings=True,
    )  # fmt: skip
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == parameter_shapes(config)
    assert list(weights) == list(parameter_shapes(config)) and "lm_head.weight" not in weights


@torch.no_grad()
def test_transformers_computes_the_same_from_the_exported_folder(stories, exchange):
    transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
    ours = model_of(*read_llama2c(stories))
    idx = torch.randint(ours.config.vocab_size, (2, 300), generator=torch.Generator().manual_seed(0))

    theirs, report = transformers.LlamaForCausalLM.from_pretrained(exchange, output_loading_info=True)

    assert not any(report.values()), report
    found, wanted = ours(idx), theirs(idx).logits
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_exported_folder_holds_what_was_read_and_says_where_it_is_from(stories, exchange):
    config, weights = read_llama2c(stories)

    found = read_exchange(exchange)

    assert found.config == config
    assert set(found.weights) == set(weights)
    assert all(torch.equal(found.weights[name], weight) for name, weight in weights.items())
    assert found.provenance["converted_from"]["file"] == "stories260K.bin"


def test_the_real_tokenizer_gives_every_text_back(exchange):
    tokenizer = Tokenizer.load(exchange)

    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (512, 1, 2)
    for text in (KNOWN_LOSS_TEXT, "two  spaces \n and <s> Ünï ✓😀"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths()[ids].sum() == len(text.encode()) + 1  # the space in front


@pytest.mark.parametrize("name", ["stories260K.bin", "tok512.bin"])
def test_a_real_file_that_is_cut_off_anywhere_is_refused_and_leaves_nothing(stories, tmp_path, name):
    shutil.copytree(stories, tmp_path / "in", copy_function=shutil.copyfile)
    tmp_path.joinpath("in").chmod(0o755)
    file = tmp_path / "in" / name
    content = file.read_bytes()
    for size in (0, 3, 27, 28, 200, len(content) // 2, len(content) - 1):
        file.unlink()
        file.write_bytes(content[:size])
        with pytest.raises(DataError, match=r"tok512\.bin" if name.startswith("tok") else r"stories260K\.bin"):
            to_exchange(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What the format says, on models of other shapes

SHAPES = {
    "multi-head": {"n_heads": 4, "n_kv_heads": 4},
    "grouped": {"n_heads": 4, "n_kv_heads": 2},
    "multi-query": {"n_heads": 4, "n_kv_heads": 1},
}
SIZES = {"dim": 24, "hidden_dim": 20, "n_layers": 3, "vocab_size": 30, "seq_len": 16}


def tensors_of(sizes: dict[str, int], *, tied: bool, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights as llama2.c has them, layers stacked."""
    rng = np.random.default_rng(seed)
    L, C, F, V = sizes["n_layers"], sizes["dim"], sizes["hidden_dim"], sizes["vocab_size"]
    groups = C // sizes["n_heads"] * sizes["n_kv_heads"]
    shapes = {
        **{"q": (L, C, C), "k": (L, groups, C), "v": (L, groups, C), "o": (L, C, C)},
        **{"gate": (L, F, C), "down": (L, C, F), "up": (L, F, C), "embedding": (V, C)},
    }
    norms = {"norm_1": (L, C), "norm_2": (L, C), "norm": (C,)}
    tensors = {name: rng.normal(0, 0.3, shape) for name, shape in shapes.items()}
    tensors |= {name: rng.uniform(0.5, 1.5, shape) for name, shape in norms.items()}
    if not tied:
        tensors["head"] = rng.normal(0, 0.3, (V, C))
    return {name: tensor.astype("<f4") for name, tensor in tensors.items()}


def angles_of(sizes: dict[str, int], base: float = 10000.0) -> np.ndarray:
    """(T, D / 2)"""
    half = sizes["dim"] // sizes["n_heads"] // 2
    return np.outer(np.arange(sizes["seq_len"]), base ** (-np.arange(half) / half))


def write_version_0(path: Path, sizes: dict[str, int], tensors: dict[str, np.ndarray], base: float = 10000.0) -> Path:
    vocab_size = sizes["vocab_size"] * (-1 if "head" in tensors else 1)
    names = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads")
    content = struct.pack("<7i", *(sizes[name] for name in names), vocab_size, sizes["seq_len"])
    content += b"".join(tensors[name].tobytes() for name in ("embedding", *BLOCKS, "norm"))
    angles = angles_of(sizes, base)
    content += np.cos(angles).astype("<f4").tobytes() + np.sin(angles).astype("<f4").tobytes()
    path.write_bytes(content + (tensors["head"].tobytes() if "head" in tensors else b""))
    return path


def write_version_1(path: Path, sizes: dict[str, int], tensors: dict[str, np.ndarray], version: int = 1) -> Path:
    names = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
    header = struct.pack("<Ii7iB", MAGIC, version, *(sizes[name] for name in names), "head" not in tensors)
    order = ("norm_1", "norm_2", "norm", "embedding", "q", "k", "v", "o", "gate", "down", "up")
    order += ("head",) if "head" in tensors else ()
    path.write_bytes(header.ljust(256, b"\0") + b"".join(tensors[name].tobytes() for name in order))
    return path


WRITERS = {0: write_version_0, 1: write_version_1}


def reference_logits(sizes: dict[str, int], tensors: dict[str, np.ndarray], idx: np.ndarray) -> np.ndarray:
    """(T, V) of one sequence (T,): what run.c computes, written from its definitions in float64; neighbours rotate."""
    weights = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    T, H, G = len(idx), sizes["n_heads"], sizes["n_kv_heads"]
    D = sizes["dim"] // H
    turn = np.exp(1j * angles_of(sizes)[:T])[:, None]  # (T, 1, D / 2)

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight

    def rotated(x):
        turned = (x[..., ::2] + 1j * x[..., 1::2]) * turn
        return np.stack((turned.real, turned.imag), axis=-1).reshape(x.shape)

    x = weights["embedding"][idx]
    for layer in range(sizes["n_layers"]):
        w = {name: weights[name][layer] for name in BLOCKS}
        y = norm(x, w["norm_1"])
        q = rotated((y @ w["q"].T).reshape(T, H, D))
        k = np.repeat(rotated((y @ w["k"].T).reshape(T, G, D)), H // G, axis=1)
        v = np.repeat((y @ w["v"].T).reshape(T, G, D), H // G, axis=1)
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(D) + np.where(np.tri(T), 0, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        x = x + np.einsum("hij,jhd->ihd", shares / shares.sum(-1, keepdims=True), v).reshape(T, -1) @ w["o"].T
        y = norm(x, w["norm_2"])
        gate = y @ w["gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["up"].T)) @ w["down"].T
    return norm(x, weights["norm"]) @ weights.get("head", weights["embedding"]).T


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("version", WRITERS)
def test_a_model_computes_what_its_format_says(tmp_path, version, shape, tied):
    sizes = SIZES | SHAPES[shape]
    tensors = tensors_of(sizes, tied=tied)
    idx = np.random.default_rng(1).integers(sizes["vocab_size"], size=sizes["seq_len"])

    config, weights = read_llama2c(WRITERS[version](tmp_path / "model.bin", sizes, tensors))

    assert config.tie_embeddings is tied and config.block_size == sizes["seq_len"]
    found = model_of(config, weights).double()(torch.from_numpy(idx)[None])[0].numpy()
    np.testing.assert_allclose(found, reference_logits(sizes, tensors, idx), rtol=1e-9, atol=1e-9)


def test_an_untied_head_survives_the_way_into_exchange_form(tmp_path):
    sizes = SIZES | SHAPES["grouped"]
    tensors = tensors_of(sizes, tied=False)
    source = write_version_0(tmp_path / "model.bin", sizes, tensors)

    found = read_exchange(to_exchange(source, tmp_path / "out"))  # no tokenizer beside it

    assert torch.equal(found.weights["lm_head.weight"], torch.from_numpy(tensors["head"]))
    assert not (tmp_path / "out" / "tokenizer.model").exists()


@pytest.fixture
def grouped(tmp_path) -> Path:
    sizes = SIZES | SHAPES["grouped"]
    return write_version_0(tmp_path / "model.bin", sizes, tensors_of(sizes, tied=True))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 26, "not a checkpoint of llama2.c.*n_embd=26 must be a multiple of n_head=4"),
        (0, 0, "n_embd=0 must be at least 1"),
        (0, 20, "head_size=5"),
        (1, 21, "is cut off"),
        (1, -3, "intermediate_size=-3 must be at least 1"),
        (2, 2, "is not what its header says"),
        (2, 2**31 - 1, "is cut off: it has .* bytes, and 2147483647 layers"),
        (3, 0, "n_head=0 must be at least 1"),
        (4, 3, "n_head=4 must be a multiple of n_query_groups=3"),
        (5, 0, "vocab_size=0 must be at least 1"),
        (5, -30, "is cut off"),
        (6, 15, "is not what its header says"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(grouped, at, value, message):
    content = bytearray(grouped.read_bytes())
    struct.pack_into("<i", content, 4 * at, value)
    grouped.write_bytes(content)

    with pytest.raises(DataError, match=message) as caught:
        read_llama2c(grouped)

    assert str(grouped) in str(caught.value) and "\n" not in str(caught.value)


@given(st.binary(max_size=300))
@example(b"")
@example(b"PK\3\4 a file of torch.save")
@example(struct.pack("<I", MAGIC))
@example(struct.pack("<Ii", MAGIC, 1) + b"\1" * 21)
def test_any_other_file_is_refused(tmp_path, content):
    path = tmp_path / "other.bin"
    path.write_bytes(content)

    with pytest.raises(DataError, match=r"other\.bin"):
        read_llama2c(path)


def test_a_version_that_is_not_read_is_named(tmp_path):
    sizes = SIZES | SHAPES["grouped"]
    path = write_version_1(tmp_path / "model.bin", sizes, tensors_of(sizes, tied=True), version=2)
    with pytest.raises(DataError, match="is a version 2 file.*--version 1"):
        read_llama2c(path)


def test_a_flag_that_is_neither_yes_nor_no_is_refused(tmp_path):
    sizes = SIZES | SHAPES["grouped"]
    path = write_version_1(tmp_path / "model.bin", sizes, tensors_of(sizes, tied=True))
    content = bytearray(path.read_bytes())
    content[36] = 7
    path.write_bytes(content)
    with pytest.raises(DataError, match="says 7 where 0 or 1"):
        read_llama2c(path)


def test_rotary_tables_of_another_base_are_refused_and_zeros_are_not(tmp_path):
    sizes = SIZES | SHAPES["grouped"]
    tensors = tensors_of(sizes, tied=True)
    path = write_version_0(tmp_path / "model.bin", sizes, tensors, base=500000.0)
    with pytest.raises(DataError, match="rotary tables are not those of base 10000"):
        read_llama2c(path)

    tables = 2 * 4 * angles_of(sizes).size
    path.write_bytes(path.read_bytes()[:-tables] + bytes(tables))
    assert read_llama2c(path)[0].rope_base == 10000.0


# Which file of a folder


def test_of_a_folder_the_one_checkpoint_is_taken(tmp_path, grouped):
    (tmp_path / "tok512.bin").touch()
    assert checkpoint_file(tmp_path) == grouped

    (tmp_path / "other.bin").touch()
    with pytest.raises(ValueError, match=r"several checkpoints: model\.bin, other\.bin; give the path of one"):
        checkpoint_file(tmp_path)


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint of llama2.c"):
        read_llama2c(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"missing\.bin does not exist"):
        read_llama2c(tmp_path / "missing.bin")


# Tokenizers

BYTE_TOKENS = [(f"<0x{byte:02X}>".encode(), 0.0) for byte in range(256)]
BASE = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0), *BYTE_TOKENS]
LEARNED = [" t", "he", " the", "ab", "bc", "abc", " a", "\n\n", "é", " ", "t", "h", "e", "a", "b", "c", "\n", "✓"]
TOKENS = BASE + [(token.encode(), -float(number)) for number, token in enumerate(LEARNED)]


def write_tokenizer(path: Path, tokens=TOKENS, longest: int | None = None) -> Path:
    longest = max(len(token) for token, _ in tokens) if longest is None else longest
    content = struct.pack("<I", longest)
    path.write_bytes(content + b"".join(struct.pack("<fI", score, len(token)) + token for token, score in tokens))
    return path


def reference_ids(text: str) -> list[int]:
    """As run.c encodes: a space in front, characters, then the best-scored pair is joined until none is a token."""
    ids = {token: number for number, (token, _) in enumerate(TOKENS)}
    parts = []
    for character in f" {text}" if text else "":
        token = character.encode()
        parts += [ids[token]] if token in ids else [byte + 3 for byte in token]
    while True:
        joined = [ids.get(TOKENS[left][0] + TOKENS[right][0]) for left, right in zip(parts, parts[1:], strict=False)]
        best = max((number for number in joined if number is not None), key=lambda i: TOKENS[i][1], default=None)
        if best is None:
            return parts
        at = joined.index(best)
        parts[at : at + 2] = [best]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    content = sentencepiece_model(write_tokenizer(folder / "tok.bin"))
    (folder / "tokenizer.model").write_bytes(content)
    return Tokenizer.load(folder / "tokenizer.model")


@given(st.text(st.sampled_from("the abc\nté✓x😀<s>0"), max_size=40))
@example("")
@example("abc ab  the\n\n the")
def test_a_tokenizer_encodes_as_llama2c_does(tokenizer, text):
    ids = tokenizer.encode(text)

    assert ids.tolist() == reference_ids(text)
    assert tokenizer.decode(ids) == text


def test_a_tokenizer_keeps_its_ids_and_scores(tmp_path, tokenizer):
    assert read_tokenizer(write_tokenizer(tmp_path / "tok.bin")) == TOKENS
    assert tokenizer.vocab_size == len(TOKENS)
    assert tokenizer.decode([1, 2]) == ""
    assert tokenizer.byte_lengths()[: len(BASE)].tolist() == [0, 0, 0] + [1] * 256


@pytest.mark.parametrize(
    ("tokens", "longest", "message"),
    [
        (TOKENS, 4, "runs past its limit"),
        (TOKENS[:258], None, "does not begin with <unk>, <s>, </s> and the 256 bytes"),
        (TOKENS[1:], None, "does not begin with"),
        ([*TOKENS, (b" the", -99.0)], None, "holds 1 tokens twice"),
        ([*TOKENS, (b"\xff\xfe", -99.0)], None, "token 277 is not UTF-8"),
        ([*TOKENS, (b"", -99.0)], None, "token 277 is empty"),
    ],
)
def test_a_tokenizer_that_makes_no_sense_is_refused(tmp_path, tokens, longest, message):
    with pytest.raises(DataError, match=message):
        sentencepiece_model(write_tokenizer(tmp_path / "tok.bin", tokens, longest))


def test_the_tokenizer_with_the_models_size_is_taken(tmp_path):
    sizes = SIZES | SHAPES["grouped"] | {"vocab_size": len(TOKENS)}
    write_version_0(tmp_path / "model.bin", sizes, tensors_of(sizes, tied=True))
    write_tokenizer(tmp_path / "tok300.bin", [*TOKENS, *((f"word{i}".encode(), -100.0 - i) for i in range(23))])
    with pytest.raises(
        DataError, match=r"has 277 tokens, and of the tokenizers beside it none fits: tok300\.bin \(300"
    ):
        to_exchange(tmp_path, tmp_path / "out")

    write_tokenizer(tmp_path / "tokenizer.bin")
    assert Tokenizer.load(to_exchange(tmp_path, tmp_path / "out")).vocab_size == 277

    write_tokenizer(tmp_path / "tok277.bin")
    with pytest.raises(DataError, match="several fit"):
        to_exchange(tmp_path, tmp_path / "again")
