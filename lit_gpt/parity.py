"""Do two readings of one model compute the same: logits on random tokens and on a text, before and after a conversion.

The one side is our model on the weights as they were read from the source. The other is transformers on the folder that
was written, where it is installed and the folder is one that it loads: code that shares nothing with ours.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt.available_memory import available_memory
from lit_gpt.config import Config
from lit_gpt.flops import count_parameters
from lit_gpt.model import GPT

MAX_TOKENS = 128
TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1969 two people walked on the Moon; 600 million watched.\n"
    "def area(radius):\n    return 3.14159 * radius ** 2\n\nWhat grows, grows from what was there before."
)
BYTES_PER_PARAMETER = 2 * 4  # two models in fp32
MARGIN = 1.5  # activations, and a tensor that is read while both are there

Model = Callable[[Tensor], Tensor]
"""(B, T) int64 ids -> (B, T, V) logits."""


@dataclass(frozen=True)
class Agreement:
    """What one batch showed."""

    max_abs_logit_gap: float
    max_abs_logit: float
    """The scale of the gap."""
    top1_agreement: float
    """Share of positions at which both find the same token most likely."""
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def fits_in_memory(config: Config) -> bool:
    """Whether both models do, in fp32, in what the machine has to give now."""
    return count_parameters(config) * BYTES_PER_PARAMETER * MARGIN < available_bytes()


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    found = available_memory()
    return found if found is not None else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def our_model(config: Config, weights: Mapping[str, Tensor]) -> Model:
    """Our model in fp32, or in float64 for float64 weights."""
    model = GPT(config).eval()
    for name, parameter in model.named_parameters():
        tensor = weights[name]
        if tensor.dtype == torch.float64:
            model.double()
        parameter.data = tensor.to(parameter.dtype)
    return model


def has_transformers() -> bool:
    return util.find_spec("transformers") is not None


def their_model(folder: Path) -> Model:
    """What transformers makes of a folder, in fp32."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    return lambda idx: model(idx).logits


def batches(config: Config, tokenizer_dir: Path | None) -> dict[str, Tensor]:
    """(2, T) random ids and, if there is a tokenizer, (1, T) ids of a text."""
    length = min(config.block_size, MAX_TOKENS)
    found = {"random": torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))}
    if tokenizer_dir is not None:
        from lit_gpt.tokenizer import Tokenizer

        ids = torch.from_numpy(Tokenizer.load(tokenizer_dir).encode(TEXT))[:length]
        found["text"] = ids[None]
    return found


@torch.inference_mode()
def agreement(ours: Model, other: Model, idx: Tensor) -> Agreement:
    """Compare the logits of two models on ids (B, T)."""
    a, b = ours(idx).double(), other(idx).double()
    return Agreement(
        max_abs_logit_gap=(a - b).abs().max().item(),
        max_abs_logit=b.abs().max().item(),
        top1_agreement=(a.argmax(-1) == b.argmax(-1)).double().mean().item(),
        tokens=idx.numel(),
    )
