"""Every family of Hugging Face against transformers: plain and odd models, there and back, logits and greedy text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt.axes import parameter_shapes
from lit_gpt.checkpoint import read_exchange, write_exchange
from lit_gpt.config import Config, RopeScaling
from lit_gpt.errors import DataError
from lit_gpt.generate import generate
from lit_gpt.hf import config_from_hf, config_to_hf, hf_shapes
from lit_gpt.hf_families import FAMILIES, REFUSED
from lit_gpt.model import GPT, scaled_frequencies

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")

PLAIN = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 96, "pad_token_id": None},
}
ODD = {**PLAIN, "hidden_size": 36, "num_attention_heads": 6, "head_dim": 40, "vocab_size": 257, "num_hidden_layers": 3}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}
LAYER_TYPES = ["full_attention", "sliding_attention", "full_attention"]
# Test name: family, what its model has beside PLAIN or ODD
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", PLAIN | {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama odd": ("llama", ODD | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama 3": ("llama", ODD | {"rope_parameters": LLAMA3}),
    "llama linear": ("llama", PLAIN | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "tinyllama": ("llama", PLAIN | {"num_attention_heads": 8, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}),
    "smollm2": ("llama", PLAIN | {"num_attention_heads": 4, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "mistral": ("mistral", PLAIN | {"sliding_window": None}),
    "mistral odd": ("mistral", ODD | {"sliding_window": 7, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", PLAIN),
    "qwen2 odd": (
        "qwen2",
        ODD | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", PLAIN | {"head_dim": 16}),
    "qwen3 odd": (
        "qwen3",
        ODD | {"attention_bias": True, "use_sliding_window": True, "sliding_window": 5, "layer_types": LAYER_TYPES},
    ),
    "smollm3": ("smollm3", PLAIN | {"num_hidden_layers": 4}),
    "smollm3 odd": (
        "smollm3",
        ODD | {"no_rope_layers": [0, 1, 0], "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "olmo2": ("olmo2", PLAIN | {"num_key_value_heads": 4}),
    "olmo2 odd": ("olmo2", ODD | {"attention_bias": True, "tie_word_embeddings": True}),
    "phi3": ("phi3", PLAIN),
    "phi3 odd": (
        "phi3",
        ODD | {"sliding_window": 9, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}},
    ),
    "gemma": ("gemma", PLAIN | {"head_dim": 8}),
    "gemma odd": ("gemma", ODD | {"attention_bias": True, "tie_word_embeddings": False}),
}
WITHOUT_MEANING = (  # of a config.json, for what a model computes
    *("transformers_version", "dtype", "torch_dtype", "use_cache", "initializer_range", "_name_or_path"),
    *("max_window_layers", "no_rope_layer_interval", "original_max_position_embeddings", "hidden_activation"),
    *("bos_token_id", "eos_token_id", "rope_scaling", "partial_rotary_factor", "rope_theta"),
)


def their_model(name: str, seed: int = 0) -> Any:
    """A model of transformers whose biases are not 0 and whose norms are far from 1."""
    family, sizes = MODELS[name]
    config = transformers.AutoConfig.for_model(family, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter += 0.3 * noise
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
    return model


def our_model(folder: Path) -> GPT:
    checkpoint = read_exchange(folder)
    model = GPT(checkpoint.config)
    model.load_state_dict(dict(checkpoint.weights))
    return model.eval()


def tokens(vocab_size: int, length: int = 80) -> torch.Tensor:
    return torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=MODELS)
def case(request, tmp_path) -> tuple[Any, Path]:
    """A model and the folder that transformers wrote it to."""
    model = their_model(request.param)
    model.save_pretrained(tmp_path / "theirs")
    return model, tmp_path / "theirs"


@torch.no_grad()
def test_logits_and_greedy_text_are_those_of_transformers(case):
    theirs, folder = case
    ours, idx = our_model(folder), tokens(theirs.config.vocab_size)

    wanted = theirs(idx).logits
    assert (ours(idx) - wanted).abs().max() <= 1e-5 * wanted.abs().max()

    prompt = idx[:1, :8]
    settings = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    text = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    assert generate(ours, prompt[0].tolist(), 64, temperature=0) == text[0].tolist()

    wanted = theirs.double()(idx).logits
    assert wanted.dtype == torch.float64
    assert (ours.double()(idx) - wanted).abs().max() <= 2e-6 * wanted.abs().max()


def test_tensors_and_config_come_back_bit_for_bit(case, tmp_path):
    theirs, folder = case
    checkpoint = read_exchange(folder)

    write_exchange(tmp_path / "back", checkpoint.config, checkpoint.weights)
    back, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)

    assert not any(report.values()), report
    found, wanted = back.state_dict(), theirs.state_dict()
    assert found.keys() == wanted.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in wanted.items()
    )
    assert type(back) is type(theirs)
    assert meaning(back.config) == meaning(theirs.config)


def meaning(config: Any) -> dict[str, Any]:
    """What a config says of the model; a family that does not name head_dim takes it where it is given."""
    values = {"head_dim": config.hidden_size // config.num_attention_heads, **config.to_dict()}
    return {key: value for key, value in values.items() if key not in WITHOUT_MEANING}


def test_the_tables_have_every_tensor_of_transformers_and_no_other(case):
    theirs, folder = case
    config = read_exchange(folder).config

    ours: dict[str, tuple[int, ...]] = {}
    for name, shape in parameter_shapes(config).items():
        ours |= hf_shapes(name, shape, config)

    spare = {"lm_head.weight"} if config.tie_embeddings else set()
    assert ours == {name: tuple(each.shape) for name, each in theirs.state_dict().items() if name not in spare}
    assert (
        list(parameter_shapes(config))
        == [name for name, _ in GPT(config).named_parameters() if name in parameter_shapes(config)]
        or config.tie_embeddings
    )


@torch.no_grad()
def test_a_window_and_a_cache_see_the_same_tokens(tmp_path):
    their_model("mistral odd").save_pretrained(tmp_path / "theirs")
    model = our_model(tmp_path / "theirs")
    idx = tokens(257, 30)

    near, far = idx.clone(), idx.clone()
    far[:, 0] = (far[:, 0] + 1) % 257  # 3 layers of 7 tokens reach 18 back
    near[:, 12] = (near[:, 12] + 1) % 257

    assert torch.equal(model(idx)[:, 19:], model(far)[:, 19:])
    assert not torch.equal(model(idx)[:, 19:], model(near)[:, 19:])


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_fields_mean_what_they_mean_to_transformers(family):
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values = {
        "model_type": family,
        **{key: (PLAIN | {"num_attention_heads": 32, "hidden_size": 64})[key] for key in needed},
    }

    full = json.loads(transformers.AutoConfig.for_model(**values, pad_token_id=None).to_json_string(use_diff=False))

    assert config_from_hf(values) == config_from_hf(full)


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_family_that_cannot_be_is_refused_by_name_with_its_reason(model_type):
    with pytest.raises(DataError, match=f"model_type='{model_type}' is not supported, because it"):
        config_from_hf({"model_type": model_type})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": "head"}, "qk_norm=head: LlamaForCausalLM always has qk_norm=none; family qwen3 has it"),
        ({"qkv_bias": True}, "qkv_bias=True and proj_bias=False differ, .*; family qwen2 has it"),
        ({"norm_placement": "after", "qk_norm": "full"}, "norm_placement=after: .*; family olmo2 has it"),
        ({"rotary_percentage": 0.5}, "rotary_percentage=0.5 .*; family phi3 has it"),
        ({"sliding_window": 4}, "sliding_window=4: .*; family mistral or smollm3 or phi3 has it"),
        ({"rope_layers": [True, False]}, "rope_layers=.True, False.: .*; family smollm3 has it"),
        ({"embedding_scale": 2.0}, "embedding_scale=2.0: .*; keep this model in training form"),
        ({"family": "own"}, "family='own' is unknown; known: llama, mistral"),
    ],
)
def test_a_model_that_its_family_does_not_have_is_not_exported(changes, message):
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "intermediate_size": 8, "vocab_size": 9, "block_size": 8}
    with pytest.raises(ValueError, match=message):
        config_to_hf(Config(**{**sizes, **changes}), torch.float32, bos_id=None, eos_id=None)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3", {"layer_types": ["chunked_attention"] * 2}, "layer_types=.'chunked_attention'.* another attention"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "use_sliding_window=False is another attention"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types=.* is not a list of 2 layers"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers=.1. is not a list with 1 or 0 for each of 2 layers"),
        ("mistral", {"sliding_window": "wide"}, "sliding_window='wide' is neither null nor a number of tokens"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "rope_scaling=.* it has default"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv=8.0 means clipped queries"),
        ("gemma", {"hidden_activation": "relu"}, "hidden_activation='relu' means another activation"),
    ],
)
def test_what_a_family_says_and_this_model_cannot_is_named(family, changes, message):
    with pytest.raises(DataError, match=message):
        config_from_hf({"model_type": family, **PLAIN, **changes})


def test_per_layer_flags_are_lists_in_json_and_all_of_them_is_none():
    config = Config(n_layer=2, rope_layers=[True, False], rope_scaling={"kind": "linear", "factor": 2.0})

    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert Config(n_layer=2, rope_layers=[True, True]).rope_layers is None
    with pytest.raises(ValueError, match="rope_layers has 2 entries, n_layer=3"):
        Config(n_layer=3, rope_layers=[True, False])


def test_fast_frequencies_stay_and_slow_ones_are_divided():
    frequencies = torch.tensor(
        [1.0, 2 * torch.pi * 2 / 64, 1e-4], dtype=torch.float64
    )  # 10, 2 and 0 turns in 64 tokens

    scaled = scaled_frequencies(frequencies, RopeScaling("llama3", 8.0, 1.0, 4.0, 64))

    assert scaled[0] == 1.0 and scaled[2] == 1e-4 / 8
    assert torch.isclose(scaled[1], frequencies[1] * (1 / 3 + 2 / 3 / 8))
