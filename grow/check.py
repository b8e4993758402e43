"""Whether weights are what a configuration asks for, and what a growth did to the function and to the gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grow.samples import open_tokens
from lit_gpt.atomic import MANIFEST
from lit_gpt.axes import EMBEDDING, layer_of, name_in_block, parameter_shapes
from lit_gpt.checkpoint import TRAINING, detect_form, read_config, read_exchange, read_training, read_weights
from lit_gpt.checkpoint import verify as checkpoint_problems
from lit_gpt.config import Config
from lit_gpt.flops import count_non_embedding, count_parameters
from lit_gpt.lazy_tensors import all_finite
from lit_gpt.model import GPT
from lit_gpt.problems import raise_problems, shape_problems

MAX_TOKENS = 128  # of one sequence in a comparison: enough for positions to matter, cheap for any model
PROGRESS = ("stage", "step_count", "tokens", "parent_tokens")


def check_weights(config: Config, weights: Mapping[str, Tensor], where: str, *, allow_non_finite: bool = False) -> None:
    """Refuse weights that are not those of a model of this configuration, or that are not numbers.

    Args:
        config: sizes of the model.
        weights: name -> tensor; each is read once and let go, so a lazy mapping is never in memory as a whole.
        where: what the message calls them, e.g. the path of the checkpoint.
        allow_non_finite: take NaN and infinity as they are.

    Raises:
        DataError: with a line for each of the first few problems.
    """
    shapes, non_finite = {}, []
    for name, weight in weights.items():
        shapes[name] = tuple(weight.shape)
        if not (allow_non_finite or all_finite(weight)):
            non_finite.append(f"{where}: {name} holds NaN or infinity")
    problems = shape_problems(parameter_shapes(config), shapes, where) + non_finite
    raise_problems(problems, "use another checkpoint")


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured."""

    max_abs_logit_gap: float
    """Largest difference between two logits of the source and of the grown model."""
    max_abs_logit: float
    """Largest logit of the source: the scale of the gap."""
    zero_gradient: list[str]
    """Parameters of the grown model whose gradient is exactly zero: they would not train."""
    waiting: list[str]
    """Those of them that train from the second step on: what their layer writes with is zero, and gets a gradient."""
    n_tokens: int
    """Tokens that went through both models."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def inspect_checkpoint(path: Path, *, verify: bool = False) -> dict[str, Any]:
    """What a checkpoint says of itself, as plain values.

    Args:
        path: a checkpoint of either form.
        verify: also read every byte and compare the checksums.

    Returns:
        path, form, config, parameters, non_embedding, progress (the counters of a training form), history (one record
        per growth, oldest first) and verified: None if that was not asked for, False if the folder has no checksums.

    Raises:
        FileNotFoundError: there is nothing at the path.
        DataError: it is not a checkpoint, or not a whole one.
    """
    raise_problems(checkpoint_problems(path, deep=verify), "use an earlier checkpoint, or write it again")
    form, config = detect_form(path), read_config(path)
    if form == TRAINING:
        state = read_training(path, verify=False).state
    else:
        state = read_exchange(path, verify=False).provenance or {}
    return {
        "path": str(path),
        "form": form,
        "config": config.to_dict(),
        "parameters": count_parameters(config),
        "non_embedding": count_non_embedding(config),
        "progress": {key: state[key] for key in PROGRESS if state.get(key) is not None},
        "history": state.get("history", []),
        "verified": (path / MANIFEST).is_file() if verify else None,
    }


def load_model(path: Path, *, allow_non_finite: bool = False) -> GPT:
    """The model of a checkpoint of either form, on the CPU, in fp32 or, for float64 weights, in float64."""
    config, weights = read_config(path), read_weights(path)
    check_weights(config, weights, str(path), allow_non_finite=allow_non_finite)
    model = GPT(config)
    if weights[EMBEDDING].dtype == torch.float64:
        model.double()
    model.load_state_dict(dict(weights))
    return model


def tokens_from_file(path: str | Path, config: Config, *, n_rows: int = 2) -> Tensor:
    """The first samples of a token file or a folder of them: (n_rows, up to 128 + 1) int64 ids.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is not a token file, is too short, or holds ids outside the vocabulary.
    """
    source, _ = open_tokens(path, config, min(config.block_size, MAX_TOKENS))
    return torch.from_numpy(source.read(np.arange(min(n_rows, source.n_samples))))


def random_tokens(config: Config, *, n_rows: int = 2, seed: int = 0) -> Tensor:
    """(n_rows, up to 128 + 1) int64 ids of the vocabulary, a function of the seed."""
    length = min(config.block_size, MAX_TOKENS) + 1
    return torch.randint(config.vocab_size, (n_rows, length), generator=torch.Generator().manual_seed(seed))


def compare(src: GPT, dst: GPT, tokens: Tensor) -> Comparison:
    """The gap between the functions of two models, and the parameters of `dst` that get no gradient.

    Args:
        src: the model before growth.
        dst: the model after growth; its gradients are left as they were found: absent.
        tokens: (B, T + 1) int64; the last column is only a target.

    Raises:
        ValueError: the two have different vocabularies, or a token lies outside them.
    """
    if src.config.padded_vocab_size != dst.config.padded_vocab_size:
        raise ValueError(
            f"the models have {src.config.padded_vocab_size} and {dst.config.padded_vocab_size} embedding rows; "
            f"a comparison needs one vocabulary"
        )
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < src.config.padded_vocab_size:
        raise ValueError(f"tokens must be in [0, {src.config.padded_vocab_size}); use data of the same tokenizer")
    idx, targets = tokens[:, :-1], tokens[:, 1:]
    with torch.no_grad():
        before, after = src(idx), dst(idx)
    without = zero_gradient(dst, idx, targets)
    return Comparison(
        max_abs_logit_gap=(after - before).abs().max().item(),
        max_abs_logit=before.abs().max().item(),
        zero_gradient=without,
        waiting=waiting(dst, without),
        n_tokens=idx.numel(),
    )


def zero_gradient(model: GPT, idx: Tensor, targets: Tensor) -> list[str]:
    """Parameters whose gradient of the loss on idx, targets (B, T) is exactly zero."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(model(idx, targets), parameters, allow_unused=True)
    return [
        name for name, gradient in zip(names, gradients, strict=True) if gradient is None or not bool(gradient.any())
    ]


def waiting(model: GPT, without_gradient: list[str]) -> list[str]:
    """Those of some parameters without a gradient that lie behind an attn.proj or a w3 that is zero but gets one."""
    weights = dict(model.named_parameters())
    found = []
    for name in without_gradient:
        layer, inner = layer_of(name), name_in_block(name)
        if layer is None:
            continue
        writes = "attn.proj.weight" if inner.startswith(("attn.", "norm_1")) else "mlp.swiglu.w3.weight"
        gate = name.removesuffix(inner) + writes
        if gate not in without_gradient and gate in weights and not bool(weights[gate].any()):
            found.append(name)
    return found
