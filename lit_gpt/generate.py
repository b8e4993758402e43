"""Sampling from a model with a key/value cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt.model import GPT

MIN_TEMPERATURE = 1e-6  # above 0; with less, logits are divided to infinity in fp32
MAX_SEED = 1 << 63


class KVCache:
    """Keys and values of one sequence, preallocated: 2 x n_layer x (1, G, max_tokens, D)."""

    def __init__(self, model: GPT, max_tokens: int) -> None:
        config = model.config
        weight = model.transformer.wte.weight
        shape = (config.n_layer, 1, config.n_query_groups, max_tokens, config.head_size)
        dtype = model.compute_dtype or weight.dtype
        self.k = torch.zeros(shape, dtype=dtype, device=weight.device)
        self.v = torch.zeros_like(self.k)
        self.lengths = [0] * config.n_layer

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (1, G, T, D) keys and values of one layer; returns all of that layer, (1, G, S, D)."""
        start, end = self.lengths[layer], self.lengths[layer] + k.size(2)
        self.k[layer, :, :, start:end] = k
        self.v[layer, :, :, start:end] = v
        self.lengths[layer] = end
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def pick_token(
    logits: Tensor, *, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    """Draw an id from logits (V,). Temperature 0 is greedy; top_k, top_p (nucleus, arXiv 1904.09751) cut the tail."""
    if temperature == 0:
        return int(logits.argmax())
    logits = logits / temperature
    if top_k is not None and top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    if top_p is not None and top_p < 1:
        sorted_logits, order = logits.sort(descending=True)
        before = sorted_logits.softmax(-1).cumsum(-1) - sorted_logits.softmax(-1)
        logits = logits.index_fill(0, order[before >= top_p], -torch.inf)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))


def generate(model: GPT, prompt_ids: list[int], max_new_tokens: int, **settings: Any) -> list[int]:
    """Continue a prompt; returns prompt and new ids. For settings and errors see `stream`."""
    return [*prompt_ids, *stream(model, prompt_ids, max_new_tokens, **settings)]


def stream(
    model: GPT,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_ids: Collection[int] = (),
) -> Iterator[int]:
    """The ids that continue a prompt, one by one as they are drawn. Stops after any of eos_ids.

    Raises:
        ValueError: an empty prompt, ids outside the vocabulary, more tokens than block_size, or a setting out of range.
    """
    total = len(prompt_ids) + max_new_tokens
    if not prompt_ids:
        raise ValueError("the prompt is empty; give at least one token, e.g. the tokenizer's bos_id")
    if total > model.config.block_size:
        raise ValueError(
            f"{len(prompt_ids)} + {max_new_tokens} tokens do not fit block_size={model.config.block_size}; shorten the "
            f"prompt"
        )
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < model.config.padded_vocab_size:
        raise ValueError(
            f"prompt ids must be in [0, {model.config.padded_vocab_size}), and one is {max(prompt_ids)}; use the "
            f"model's own tokenizer"
        )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must not be negative")
    if abs(seed) >= MAX_SEED:
        raise ValueError(f"seed={seed} must be between -2^63 and 2^63")
    possible = temperature == 0 or MIN_TEMPERATURE <= temperature < math.inf
    if not possible or (top_k is not None and top_k < 1) or not (top_p is None or 0 < top_p <= 1):
        raise ValueError(
            f"need temperature 0 or from {MIN_TEMPERATURE} on, top_k >= 1, top_p in (0, 1]; "
            f"got {temperature}, {top_k}, {top_p}"
        )
    generator = torch.Generator().manual_seed(seed)
    cache = KVCache(model, total)
    return _drawn(
        model,
        cache,
        prompt_ids,
        max_new_tokens,
        lambda logits: pick_token(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator),
        eos_ids,
    )


def _drawn(
    model: GPT,
    cache: KVCache,
    prompt_ids: list[int],
    max_new_tokens: int,
    pick: Callable[[Tensor], int],
    eos_ids: Collection[int],
) -> Iterator[int]:
    """The loop of `stream`, whose errors shall come before the first id is asked for."""
    device = model.transformer.wte.weight.device
    position, fresh = 0, list(prompt_ids)
    for _ in range(max_new_tokens):
        with torch.inference_mode():
            logits = model(torch.tensor([fresh], device=device), first_position=position, kv_store=cache)
            next_id = pick(logits[0, -1, : model.config.vocab_size].float().cpu())
        yield next_id
        if next_id in eos_ids:
            return
        position, fresh = position + len(fresh), [next_id]


def load_for_inference(path: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> GPT:
    """The model of any checkpoint, its weights cast one after the other: never twice in memory.

    Raises:
        FileNotFoundError, ValueError, DataError: as `read_weights`.
    """
    from lit_gpt.checkpoint import read_config, read_weights

    with torch.device("meta"):
        model = GPT(read_config(path))
    weights = {name: weight.to(device=device, dtype=dtype) for name, weight in read_weights(path).items()}
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)
