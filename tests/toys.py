"""Models small enough to grow, train and compare by the hundred, with weights in which no mistake can hide."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from lit_gpt.axes import parameter_shapes
from lit_gpt.config import Config
from lit_gpt.model import GPT


def toy_config(**sizes: object) -> Config:
    """Two layers of 4 heads in 2 groups, width 16, 20 embedding rows for 19 tokens."""
    defaults = {
        "block_size": 16,
        "vocab_size": 19,
        "padded_vocab_size": 20,
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 16,
        "n_query_groups": 2,
        "intermediate_size": 24,
    }
    return Config(**{**defaults, **sizes})


def toy_weights(config: Config, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights under the model's names; norm weights are far from 1, where a forgotten one would not show."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in parameter_shapes(config).items():
        if len(shape) == 1:
            weights[name] = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
        else:
            scale = shape[1] ** -0.5
            weights[name] = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return {name: weight.to(dtype) for name, weight in weights.items()}


def toy_model(config: Config, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT:
    model = GPT(config).to(dtype)
    model.load_state_dict(toy_weights(config, seed=seed, dtype=dtype))
    return model


def toy_tokens(config: Config, *, n_rows: int = 2, seed: int = 0) -> Tensor:
    """(n_rows, block_size + 1) random ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (n_rows, config.block_size + 1), generator=generator)


def toy_configs(max_layers: int = 4) -> st.SearchStrategy[Config]:
    """Multi-head, grouped and multi-query; tied or not; up to `max_layers` layers."""
    return st.builds(
        toy_config,
        n_layer=st.integers(1, max_layers),
        n_query_groups=st.sampled_from([1, 2, 4]),
        tie_embeddings=st.booleans(),
    )
