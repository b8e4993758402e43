"""Exchange form against transformers' Llama: equal logits both ways; what cannot be equal is refused by name."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt.axes import parameter_shapes
from lit_gpt.checkpoint import detect_form, manifest_sha256, read_config, read_exchange, verify, write_exchange
from lit_gpt.config import Config
from lit_gpt.errors import DataError
from lit_gpt.hf import LLAMA, config_from_hf, config_to_hf, from_hf, fuse_qkv, hf_names, hf_shapes, split_qkv, to_hf
from lit_gpt.model import GPT, init_weights
from lit_gpt.tokenizer import Tokenizer

SMALL = {"n_layer": 2, "n_embd": 32, "intermediate_size": 48, "vocab_size": 257, "block_size": 24}
SHAPES = {
    "MHA": {"n_head": 4},
    "GQA": {"n_head": 4, "n_query_groups": 2},
    "MQA": {"n_head": 4, "n_query_groups": 1},
    "wide heads": {"n_head": 4, "n_query_groups": 2, "head_size": 12},
    "other base and eps": {"n_head": 4, "rope_base": 5e5, "norm_eps": 1e-2},
}
CONFIG = Config(**SMALL, **SHAPES["GQA"])

configs = st.builds(
    lambda n_layer, groups, q_per_kv, head_size, tied, base, eps: Config(
        n_layer=n_layer,
        n_head=groups * q_per_kv,
        n_query_groups=groups,
        head_size=head_size,
        n_embd=groups * q_per_kv * 3,
        intermediate_size=7,
        vocab_size=11,
        block_size=5,
        tie_embeddings=tied,
        rope_base=base,
        norm_eps=eps,
    ),
    n_layer=st.integers(1, 3),
    groups=st.integers(1, 4),
    q_per_kv=st.integers(1, 4),
    head_size=st.sampled_from([2, 4, 6]),
    tied=st.booleans(),
    base=st.floats(1.0, 1e8),
    eps=st.floats(1e-12, 1.0),
)


def model_of(config: Config, seed: int = 0) -> GPT:
    """A model whose norms are not all 1, so that a mix-up of them shows."""
    model = GPT(config)
    init_weights(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(len(name) + seed)
                )
    return model.eval()


def tokens_for(config: Config) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (2, config.block_size), generator=torch.Generator().manual_seed(3))


def assert_same_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="the hf extra is not installed")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pristine") / "exchange"
    return write_exchange(path, CONFIG, model_of(CONFIG).state_dict(), provenance={"history": [1]})


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


@pytest.fixture
def foreign(folder) -> Path:
    """A copy as Hugging Face would have written it: nothing of ours in it."""
    for name in ("MANIFEST.json", "lit_config.json", "growth.json"):
        (folder / name).unlink()
    return folder


# The oracle


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_computes_the_same_from_what_we_write(transformers, tmp_path, shape, tied):
    config = Config(**SMALL, **SHAPES[shape], tie_embeddings=tied)
    model = model_of(config)

    write_exchange(tmp_path / "exchange", config, model.state_dict())
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exchange", output_loading_info=True)

    assert not any(report.values()), report
    assert theirs.dtype == torch.float32
    assert theirs.config.vocab_size == config.padded_vocab_size == 320
    assert_same_logits(model(tokens_for(config)), theirs(tokens_for(config)).logits)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shape", SHAPES)
def test_we_compute_the_same_from_what_transformers_writes(transformers, tmp_path, shape, tied):
    ours = Config(**SMALL, **SHAPES[shape], padded_vocab_size=257, tie_embeddings=tied)
    values = config_to_hf(ours, torch.float32, bos_id=1, eos_id=2)
    torch.manual_seed(1)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).eval()
    theirs.save_pretrained(tmp_path / "folder")

    checkpoint = read_exchange(tmp_path / "folder")
    model = GPT(checkpoint.config)
    model.load_state_dict(checkpoint.weights)

    assert checkpoint.config == ours
    assert_same_logits(model(tokens_for(ours)), theirs(tokens_for(ours)).logits)


def test_the_table_has_every_tensor_of_transformers_and_no_other(transformers):
    values = config_to_hf(CONFIG, torch.float32, bos_id=None, eos_id=None)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).state_dict()

    ours = {}
    for name, shape in parameter_shapes(CONFIG).items():
        ours |= hf_shapes(name, shape, CONFIG)

    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


@torch.no_grad()
def test_several_shards_with_an_index_load_like_one_file(transformers, tmp_path):
    model = model_of(CONFIG)
    write_exchange(tmp_path / "shards", CONFIG, model.state_dict(), max_shard_bytes=20_000)

    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors*"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    read = read_exchange(tmp_path / "shards").weights

    assert files[0] == f"model-00001-of-{len(files) - 1:05d}.safetensors"
    assert files[-1] == "model.safetensors.index.json"
    assert_same_logits(model(tokens_for(CONFIG)), theirs(tokens_for(CONFIG)).logits)
    assert all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept(tmp_path, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in model_of(CONFIG).state_dict().items()}
    write_exchange(tmp_path / "exchange", CONFIG, weights)

    read = read_exchange(tmp_path / "exchange").weights

    assert all(torch.equal(read[name], tensor) and read[name].dtype == dtype for name, tensor in weights.items())
    assert json.loads((tmp_path / "exchange" / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]


def test_what_only_we_know_comes_back(pristine):
    checkpoint = read_exchange(pristine)

    assert checkpoint.config == CONFIG
    assert checkpoint.provenance == {"history": [1]}
    assert "257 tokens" in json.loads((pristine / "lit_config.json").read_text())["note"]
    assert verify(pristine) == []


def test_a_folder_that_hugging_face_wrote_needs_nothing_of_ours(foreign):
    checkpoint = read_exchange(foreign)

    assert (checkpoint.config.vocab_size, checkpoint.config.padded_vocab_size) == (320, 320)
    assert checkpoint.provenance is None
    assert detect_form(foreign) == "exchange"
    assert verify(foreign) == []
    assert len(manifest_sha256(foreign)) == 64
    assert manifest_sha256(foreign) == manifest_sha256(foreign)


def test_every_reading_gives_a_tensor_of_its_own(pristine):
    weights = read_exchange(pristine).weights
    for name in weights:
        weights[name].zero_()

    assert all(torch.equal(weights[name], tensor) for name, tensor in model_of(CONFIG).state_dict().items())
    with pytest.raises(KeyError):
        weights["model.norm.weight"]


def test_the_files_can_be_read_by_the_group(pristine):
    modes = {path.stat().st_mode & 0o777 for path in pristine.iterdir()}

    assert len(modes) == 1


# Layout


@given(config=configs, seed=st.integers(0, 2**31))
def test_fusing_is_undone_by_splitting_and_puts_every_row_where_the_formula_says(config, seed):
    D, queries = config.head_size, config.q_per_kv
    generator = torch.Generator().manual_seed(seed)
    sizes = [count * D for count in (config.n_head, config.n_query_groups, config.n_query_groups)]
    q, k, v = (torch.randn(size, 3, generator=generator) for size in sizes)

    qkv = fuse_qkv(q, k, v, config)

    assert qkv.shape == (config.qkv_size, 3)
    assert all(torch.equal(a, b) for a, b in zip(split_qkv(qkv, config), (q, k, v), strict=True))
    group, slot, dim = seed % config.n_query_groups, seed % (queries + 2), seed % D
    source = {queries: k, queries + 1: v}.get(slot)
    expected = q[(group * queries + slot) * D + dim] if source is None else source[group * D + dim]
    assert torch.equal(qkv[(group * (queries + 2) + slot) * D + dim], expected)


@settings(max_examples=15)
@given(config=configs)
def test_names_and_tensors_go_there_and_back(config):
    for name, shape in parameter_shapes(config).items():
        tensor = torch.randn(shape)
        theirs = to_hf(name, {name: tensor}.__getitem__, config)
        assert {key: tuple(part.shape) for key, part in theirs.items()} == hf_shapes(name, shape, config)
        assert torch.equal(from_hf(name, theirs.__getitem__, config), tensor)


def test_a_tensor_without_counterpart_is_named():
    with pytest.raises(ValueError, match="'transformer.wpe.weight' has no counterpart in LlamaForCausalLM"):
        hf_names("transformer.wpe.weight")


# config.json


@given(config=configs)
def test_a_config_goes_there_and_back(config):
    values = json.loads(json.dumps(config_to_hf(config, torch.float32, bos_id=1, eos_id=None)))

    back = config_from_hf(values)

    assert all(getattr(back, field) == getattr(config, field) for field in [*LLAMA.fields, "rope_base"])
    assert back.vocab_size == config.padded_vocab_size


def hf_config(**changes) -> dict:
    values = config_to_hf(CONFIG, torch.float32, bos_id=1, eos_id=2)
    del values["rope_parameters"], values["rope_theta"]
    return {**values, **changes}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4},
    ],
)
def test_the_rotary_base_is_found_where_either_version_of_transformers_puts_it(rope):
    assert config_from_hf(hf_config(**rope)).rope_base == 5e5


def test_absent_fields_mean_what_they_mean_to_transformers(transformers):
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values = {"model_type": "llama", **{key: hf_config()[key] for key in needed}}

    assert config_from_hf(values) == config_from_hf(transformers.LlamaConfig(**values).to_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gemma3"},
            "model_type='gemma3' is not supported, because it has two .*; supported: 'llama', 'm",
        ),
        ({"model_type": "own"}, "model_type='own' is not supported; supported: 'llama', 'mistral'"),
        ({"model_type": ["llama"]}, "model_type=.'llama'. is not supported; supported"),
        ({"attention_bias": 1}, "attention_bias=1 is not true or false"),
        ({"model_type": "mistral", "mlp_bias": True}, "mlp_bias=True means biases in the MLP"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' means another activation"),
        ({"sliding_window": 4096}, "sliding_window=4096 means attention over a window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 means heads that are rotated in part"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* means quantised weights"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling=.* means scaled or partial RoPE"),
        ({"rope_scaling": {"type": "linear"}}, "linear RoPE scaling needs the number factor, which is None"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "llama3 RoPE .* needs the number low_freq_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling .* needs factor >= 1"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters=.* partial"),
        ({"rope_parameters": 3}, "rope_parameters=3 is not an object"),
        ({"rope_theta": "ten"}, "rope_theta='ten' is not a positive number"),
        ({"rope_theta": float("inf")}, "rope_theta=inf is not a positive number"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 32.0}, "hidden_size=32.0 is not a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True is not a whole number"),
        ({"num_hidden_layers": 0}, "n_layer=0 must be at least 1"),
        ({"num_key_value_heads": 3}, "n_head=4 must be a multiple of n_query_groups=3"),
        ({"hidden_size": 10**400}, "config.json"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps=1000"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 is not true or false"),
    ],
)
def test_what_this_model_cannot_express_is_refused_by_name(changes, message):
    with pytest.raises(DataError, match=message):
        config_from_hf(hf_config(**changes))


def test_all_problems_of_a_config_are_listed_at_once():
    with pytest.raises(DataError) as error:
        config_from_hf(hf_config(attention_bias=2, hidden_act="gelu", vocab_size="many"), "somewhere/config.json")

    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("somewhere/config.json: ") for line in lines)


def test_a_model_that_hugging_face_cannot_express_is_not_exported(tmp_path):
    partial = Config(**SMALL, n_head=4, rotary_percentage=0.5)
    uneven = Config(**{**SMALL, "n_embd": 30}, n_head=4, head_size=8)
    for config, message in [(partial, "rotary_percentage=0.5"), (uneven, "n_embd=30, n_head=4")]:
        with pytest.raises(ValueError, match=message):
            write_exchange(tmp_path / "exchange", config, {})

    assert list(tmp_path.iterdir()) == []


# Damage


@settings(max_examples=25)
@given(chance=st.randoms(use_true_random=False), cut=st.booleans())
def test_damage_to_what_we_wrote_is_found_and_named(pristine, tmp_path, chance: random.Random, cut):
    damaged = Path(shutil.copytree(pristine, tmp_path / "copy", dirs_exist_ok=True))
    victim = chance.choice(sorted(damaged.iterdir()))
    content = bytearray(victim.read_bytes())
    place = chance.randrange(len(content))
    content[place] ^= chance.randrange(1, 256)
    victim.write_bytes(content[:place] if cut else content)

    assert any(victim.name in problem for problem in verify(damaged))
    if victim.name != "generation_config.json":  # the one file that is not ours to read
        with pytest.raises(DataError, match=victim.name):
            dict(read_exchange(damaged).weights)


@settings(max_examples=60)
@given(chance=st.randoms(use_true_random=False))
def test_a_foreign_file_with_a_damaged_header_ends_in_an_error_of_ours_or_in_tensors(pristine, tmp_path, chance):
    content = bytearray((pristine / "model.safetensors").read_bytes())
    header_bytes = int.from_bytes(content[:8], "little") + 8
    for _ in range(chance.randrange(1, 4)):
        content[chance.randrange(header_bytes)] = chance.randrange(256)
    (tmp_path / "model.safetensors").write_bytes(content[: chance.choice([len(content), header_bytes, 7])])
    shutil.copyfile(pristine / "config.json", tmp_path / "config.json")

    try:
        dict(read_exchange(tmp_path).weights)
    except DataError as error:
        assert str(tmp_path) in str(error)


def test_a_changed_file_of_ours_can_be_accepted_by_removing_the_manifest(folder):
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"bos_token_id": null', '"bos_token_id": 1'))

    with pytest.raises(DataError, match="remove MANIFEST.json to accept the folder as it is"):
        read_exchange(folder)
    (folder / "MANIFEST.json").unlink()
    assert read_config(folder) == CONFIG


def test_two_configs_that_contradict_each_other_are_refused(folder):
    (folder / "MANIFEST.json").unlink()
    values = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "default", "rope_theta": 5e5}
    for change, message in [
        ({"num_hidden_layers": 3}, "n_layer is 2 in lit_config.json and 3 in config.json"),
        ({"rope_parameters": rope}, "rope_base is 10000.0 in lit_config.json and 500000.0 in config.json"),
    ]:
        (folder / "config.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(DataError, match=message):
            read_config(folder)


def rewrite(folder: Path, change) -> None:
    """Load the one file of a folder, let `change` edit the tensors, and save it."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_tensors_that_do_not_fit_the_config_are_named(foreign):
    norm = "model.norm.weight"
    for change, message in [
        (
            lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"),
            "layers.1.self_attn.k_proj.weight is missing",
        ),
        (
            lambda tensors: tensors.update({"model.layers.0.mlp.bias": torch.ones(2)}),
            "unexpected tensor model.layers.0.mlp.bias",
        ),
        (
            lambda tensors: tensors.update({norm: torch.ones(31)}),
            r"model.norm.weight has shape \(31,\), the configuration wants \(32,\)",
        ),
        (lambda tensors: tensors.update({norm: torch.ones(32, dtype=torch.int32)}), "model.norm.weight has dtype I32"),
    ]:
        original = (foreign / "model.safetensors").read_bytes()
        rewrite(foreign, change)
        with pytest.raises(DataError, match=message):
            read_exchange(foreign)
        assert verify(foreign) != []
        (foreign / "model.safetensors").write_bytes(original)


def test_tensors_that_old_files_carry_along_are_ignored(foreign):
    rewrite(foreign, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))

    assert len(read_exchange(foreign).weights) == len(parameter_shapes(CONFIG))


def test_a_head_that_is_stored_although_it_is_tied_is_ignored(tmp_path):
    config = Config(**SMALL, n_head=4, tie_embeddings=True)
    write_exchange(tmp_path / "exchange", config, model_of(config).state_dict())
    (tmp_path / "exchange" / "MANIFEST.json").unlink()
    rewrite(tmp_path / "exchange", lambda tensors: tensors.update({"lm_head.weight": torch.ones(320, 32)}))

    assert "lm_head.weight" not in read_exchange(tmp_path / "exchange").weights


def test_a_config_with_absurdly_many_layers_is_refused_at_once(foreign):
    values = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 10**12}))

    with pytest.raises(DataError, match="num_hidden_layers=1000000000000 is more than 10000 layers"):
        read_exchange(foreign)


def test_an_index_is_believed_only_about_files_beside_it(tmp_path, pristine):
    folder = write_exchange(tmp_path / "shards", CONFIG, read_exchange(pristine).weights, max_shard_bytes=20_000)
    (folder / "MANIFEST.json").unlink()
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first = weight_map["model.embed_tokens.weight"]
    for change, message in [
        ({"model.norm.weight": "../elsewhere.safetensors"}, "names of files beside it"),
        ({"model.norm.weight": 3}, "names of files beside it"),
        ({"model.norm.weight": first}, f"{first}: model.norm.weight is in the index, not in the file"),
        ({"model.norm.weight": "model-00009-of-00009.safetensors"}, "model-00009-of-00009.safetensors is missing"),
    ]:
        index.write_text(json.dumps({"weight_map": {**weight_map, **change}}))
        with pytest.raises(DataError, match=message):
            read_exchange(folder)
    index.write_text("[]")
    with pytest.raises(DataError, match="does not hold a JSON object"):
        read_exchange(folder)


def test_a_folder_without_safetensors_says_what_is_wrong_with_it(foreign):
    (foreign / "model.safetensors").unlink()
    with pytest.raises(DataError, match="neither model.safetensors nor model.safetensors.index.json"):
        read_exchange(foreign)
    (foreign / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(DataError, match="pytorch_model.bin is not a whole file of torch.save"):
        read_exchange(foreign)
    with pytest.raises(FileNotFoundError):
        read_exchange(foreign / "nowhere")


def test_weights_that_are_not_those_of_the_config_are_not_written(tmp_path):
    weights = model_of(CONFIG).state_dict()
    norm = "transformer.ln_f.weight"
    for wrong, message in [
        ({name: tensor for name, tensor in weights.items() if name != norm}, f"lack {norm}"),
        ({**weights, "transformer.wpe.weight": weights[norm]}, "have an unexpected transformer.wpe.weight"),
        ({**weights, norm: weights[norm][:-1]}, r"transformer.ln_f.weight has shape \(31,\)"),
    ]:
        with pytest.raises(DataError, match=message):
            write_exchange(tmp_path / "exchange", CONFIG, wrong)

    assert os.listdir(tmp_path) == []


# Tokenizers


TEXTS = [
    "Growth happens between two calls of fit.",
    "def f(x):\n    return x + 1\n",
    "12 345 \u00e9t\u00e9 \u65e5\u672c",
]


@pytest.fixture(params=["trained here", "tokenizers/llama2", "tokenizers/sp1000/test_model.model"])
def tokenizer_path(request, tmp_path, data_dir) -> Path:
    """A byte-fallback BPE like that of scripts/prepare.py, Llama's own, and a unigram model that normalises."""
    if request.param != "trained here":
        return data_dir(request.param)
    from sentencepiece import SentencePieceTrainer

    path = tmp_path / "tokenizer" / "tokenizer.model"
    path.parent.mkdir()
    SentencePieceTrainer.train(
        sentence_iterator=iter(Path(__file__).read_text().splitlines()),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    return path.parent


def test_auto_tokenizer_encodes_as_we_do(transformers, tmp_path, tokenizer_path):
    """No promise for texts that begin with a space: transformers 5 drops one there."""
    tokenizer = Tokenizer.load(tokenizer_path)
    config = Config(n_layer=1, n_head=1, n_embd=4, intermediate_size=4, block_size=8, vocab_size=tokenizer.vocab_size)

    folder = write_exchange(tmp_path / "exchange", config, model_of(config).state_dict(), tokenizer_dir=tokenizer_path)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)

    written = json.loads((folder / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert Tokenizer.load(folder).fingerprint == tokenizer.fingerprint
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text).tolist()


def test_the_byte_tokenizer_goes_along(tmp_path):
    config = Config(n_layer=1, n_head=1, n_embd=4, intermediate_size=4, block_size=8, vocab_size=259)

    write_exchange(tmp_path / "exchange", config, model_of(config).state_dict(), tokenizer_dir="bytes")

    assert Tokenizer.load(tmp_path / "exchange").kind == "bytes"


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(tmp_path):
    config = Config(n_layer=1, n_head=1, n_embd=4, intermediate_size=4, block_size=8, vocab_size=40)

    with pytest.raises(ValueError, match="has 259 tokens, the model 64 rows"):
        write_exchange(tmp_path / "exchange", config, model_of(config).state_dict(), tokenizer_dir="bytes")

    assert os.listdir(tmp_path) == []
