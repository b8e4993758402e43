"""The way to GGUF: its own package knows the name of every tensor that exchange form writes, in every family."""

from __future__ import annotations

import pytest

from lit_gpt.axes import parameter_shapes
from lit_gpt.hf import hf_shapes
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
