"""Carry out the plans whose weights are made from training samples: learned mixtures and GradMax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grow.gradmax import GradMaxWeights, gradmax_columns
from grow.learned import LearnedGrowth, default_rate, learn
from grow.operators import is_learned
from grow.plan import GrowthPlan
from grow.registry import BATCH_SIZE, LEARN_STEPS
from grow.samples import Samples
from grow.tensors import WithNoise
from lit_gpt.errors import NonFiniteError
from lit_gpt.flops import Flops, flops_per_token


@dataclass(frozen=True)
class Made:
    """A grown model and what making it took."""

    plan: GrowthPlan
    """With a record of the data."""
    weights: Mapping[str, Tensor]
    """Name -> tensor of the grown model."""
    flops: Flops = Flops()
    """Of the training or the gradients behind the weights; what merely moves weights is free."""


def make_from_data(plan: GrowthPlan, weights: Mapping[str, Tensor], samples: Samples) -> Made:
    """Make the weights of a plan that needs data.

    Args:
        plan: see `needs_data`; its options may set learn_steps, learn_rate and batch_size.
        weights: of the source.
        samples: of the source's vocabulary and block_size; positions are read from 0 on.

    Raises:
        DataError: fewer samples than one batch, or a token that the vocabulary lacks.
        NonFiniteError: a loss or a gradient is not a number.
    """
    made = _learned(plan, weights, samples) if is_learned(plan) else _gradmax(plan, weights, samples)
    return dataclasses.replace(made, weights=WithNoise(plan, made.weights))


def _learned(plan: GrowthPlan, weights: Mapping[str, Tensor], samples: Samples) -> Made:
    steps = plan.options.get("learn_steps", LEARN_STEPS)
    n_rows = plan.options.get("batch_size", BATCH_SIZE)
    growth = LearnedGrowth(plan, weights)
    rate = plan.options.get("learn_rate", default_rate(plan))
    batches = samples.batches(n_rows)
    held = samples.batch(steps * n_rows, n_rows)  # those after the last that are learned from
    first_loss = _loss(growth, held)
    learn(growth, batches, steps=steps, rate=rate)
    record = {
        "steps": steps,
        "batch_size": n_rows,
        "rate": rate,
        "first_loss": first_loss,
        "last_loss": _loss(growth, held),
        **samples.to_dict(steps * n_rows),
    }
    grown = growth.materialise()
    if not all(bool(weight.isfinite().all()) for weight in grown.values()):
        raise NonFiniteError(f"learned growth ended in weights that are no numbers; lower --learn-rate (now {rate:g})")
    return Made(_recorded(plan, record), grown, flops_per_token(plan.dst).times(record["tokens"]))


@torch.no_grad()
def _loss(growth: LearnedGrowth, rows: Tensor) -> float:
    """Nats per token on (B, T + 1) samples."""
    rows = rows.to(growth.wte.device)
    return growth(rows[:, :-1], rows[:, 1:]).item()


def _gradmax(plan: GrowthPlan, weights: Mapping[str, Tensor], samples: Samples) -> Made:
    n_rows = plan.options.get("batch_size", BATCH_SIZE)
    found = gradmax_columns(plan, weights, next(samples.batches(n_rows)))
    record = {"batch_size": n_rows, "neurons_not_converged": found.n_open, **samples.to_dict(n_rows)}
    return Made(_recorded(plan, record), GradMaxWeights(plan, weights, found.columns), found.flops)


def _recorded(plan: GrowthPlan, record: dict[str, Any]) -> GrowthPlan:
    return dataclasses.replace(plan, data=record)
