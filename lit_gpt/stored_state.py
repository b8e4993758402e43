"""What a training form holds beside tensors: state.json and random states, as bytes."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lit_gpt.errors import DataError
from lit_gpt.flops import Flops

EARLIER = "use an earlier checkpoint"


def encode_state(state: dict[str, Any]) -> bytes:
    """The content of state.json; raises ValueError for what JSON cannot hold."""
    try:
        return (json.dumps(state, indent=1) + "\n").encode()
    except TypeError as error:
        raise ValueError(f"state holds what JSON cannot: {error}; convert it before saving") from error


def check_open(state: dict[str, Any], path: str | Path) -> None:
    """Refuse weights that compute something else than they did in training.

    Raises:
        DataError: a growth mask was still opening when the checkpoint was saved, and weights know nothing of it.
    """
    if state.get("mask") is not None:
        raise DataError(
            f"{path} was saved while the mask of its growth was still opening, and without it the model is another "
            f"one; take a checkpoint from after the mask has opened"
        )


def trained_on(state: Mapping[str, Any]) -> dict[str, Any]:
    """The data settings of the run behind a state.json: its own, or that of what it grew from."""
    return (state.get("run_config") or {}).get("data") or state.get("trained_on") or {}


def tokens_behind(state: Mapping[str, Any]) -> int:
    """Training tokens that a state.json counts, those of its parents included."""
    return state["tokens"] + state.get("parent_tokens", 0)


def flops_behind(state: Mapping[str, Any]) -> Flops:
    """Training FLOPs that a state.json counts, those of its parents included."""
    return Flops(**state["flops"]) + Flops(**state.get("parent_flops", {}))


FLOPS = {"paper": "flops_total", "model": "flops_model", "palm": "flops_palm"}
"""Convention -> its key in growth.json, as in metrics.jsonl."""


def flops_entries(flops: Flops) -> dict[str, float]:
    """What growth.json says of the FLOPs behind a model."""
    return {key: getattr(flops, convention) for convention, key in FLOPS.items()}


def flops_with(provenance: Mapping[str, Any], more: Flops) -> dict[str, float]:
    """The entries that growth.json has already, with those of a growth added."""
    known = {convention: key for convention, key in FLOPS.items() if provenance.get(key) is not None}
    return {key: provenance[key] + getattr(more, convention) for convention, key in known.items()}


def encode_rng(rng: dict[str, Any] | None) -> bytes | None:
    """The content of a file of random states; raises ValueError for what could not be read back safely."""
    if rng is None:
        return None
    buffer = io.BytesIO()
    torch.save(rng, buffer)
    try:
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"rng holds more than tensors and plain values, it could not be read back: {error}") from error
    return buffer.getvalue()


def read_rng(path: Path) -> dict[str, Any]:
    """The random states in a file; raises DataError if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{path} cannot be read: {error}; {EARLIER}") from error
