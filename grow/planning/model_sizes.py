"""From a number of parameters to a model, and from a model's sizes to its name. Read lit_gpt/config.py first."""

from __future__ import annotations

import dataclasses
from math import log

from lit_gpt.config import NAMED_SIZES, Config
from lit_gpt.flops import count_parameters

PAPER_SIZES = {0.41e9: "24L1024H", 1.1e9: "24L2048H", 3e9: "tiny_LLaMA_3B", 7e9: "tiny_LLaMA_7B"}
"""What arXiv 2405.15319 calls 410M, 1.1B, 3B and 7B. The names are round: 0.37, 1.36, 2.40 and 5.93 B parameters."""
WIDTHS = (128, 256, 512, 768, 1024, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 8192, 12288, 16384, 20480)
DEPTHS = (4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 64, 80, 96, 128)  # all four times a tower
WIDTH_PER_LAYER = (32, 130)  # n_embd / n_layer: from the narrowest of the paper and Llama, 43, to the widest, 128
FAR = 1.25  # a model whose parameters differ by more is not proposed


def nearest_model(parameters: float, vocab_size: int = 32000) -> Config:
    """One of the paper's sizes by its name there, or that member of the family <layers>L<width>H which is nearest.

    Raises:
        ValueError: none has about as many parameters.
    """
    if parameters in PAPER_SIZES:
        return Config.from_name(PAPER_SIZES[parameters], vocab_size=vocab_size)
    shapes = [
        (n_layer, n_embd)
        for n_embd in WIDTHS
        for n_layer in DEPTHS
        if WIDTH_PER_LAYER[0] <= n_embd / n_layer <= WIDTH_PER_LAYER[1]
    ]
    models = [Config.from_name(f"{n_layer}L{n_embd}H", vocab_size=vocab_size) for n_layer, n_embd in shapes]
    distances = [abs(log(_count(model) / parameters)) for model in models]
    at = min(range(len(models)), key=distances.__getitem__)
    if distances[at] > log(FAR):
        raise ValueError(
            f"no model of the family has about {parameters:.3g} parameters, the nearest is {models[at].name} with "
            f"{_count(models[at]):.3g}; give its depth and width, or a name"
        )
    return models[at]


def _count(model: Config) -> int:
    """As `count_parameters`, from one layer: a search looks at hundreds of models."""
    one, two = (count_parameters(dataclasses.replace(model, n_layer=n)) for n in (1, 2))
    return one + (model.n_layer - 1) * (two - one)


def named(config: Config) -> Config:
    """The same sizes under the name that stands for them, if one does."""
    candidates = [config.name, *NAMED_SIZES, f"{config.n_layer}L{config.n_embd}H"]
    for name in filter(None, candidates):
        known = Config.from_name(name, vocab_size=config.vocab_size, padded_vocab_size=config.padded_vocab_size)
        if dataclasses.replace(known, name="") == dataclasses.replace(config, name=""):
            return known
    return dataclasses.replace(config, name="")
