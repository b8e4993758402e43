"""The unit of every loss in a report: nats per token, or bits per byte where the runs' tokens are not the same text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from grow.runs.gather import Gathered
from grow.runs.trained_model import TrainedModel

BITS_PER_BYTE = "bits per byte"


def in_comparable_unit(gathered: Gathered) -> Gathered:
    """The same models with losses that may be compared.

    Runs with different tokenizers cut text into tokens of different length, so their nats per token mean different
    things: bits per byte take their place everywhere, and what has none is left out with a note.
    """
    tokenizers = {model.tokenizer for model in gathered.models} - {None}
    if len(tokenizers) < 2:
        return gathered
    kept = _whole_families([model for model in gathered.models if model.tokenizer and _has_bits(model)])
    names = {model.name for model in kept}
    left_out = tuple(model.name for model in gathered.models if model.name not in names)
    notes = [
        f"These runs use {len(tokenizers)} different tokenizers, so a token is not the same amount of text: every loss "
        f"here is in {BITS_PER_BYTE}, and validation sets are matched by name alone.",
        *(f"{name} is left out: its log holds no {BITS_PER_BYTE}, or nobody knows its tokenizer." for name in left_out),
    ]
    models = tuple(_in_bits(model) for model in kept)
    notes = [*gathered.notes, *notes]
    return dataclasses.replace(gathered, models=models, notes=tuple(notes), unit=BITS_PER_BYTE, left_out=left_out)


def _has_bits(model: TrainedModel) -> bool:
    return all(metric.bpb is not None for metric in model.metrics)


def _whole_families(models: Sequence[TrainedModel]) -> list[TrainedModel]:
    """Without the link to a parent that is not there any more."""
    names = {model.name for model in models}
    return [model if model.parent in names else dataclasses.replace(model, parent=None) for model in models]


def _in_bits(model: TrainedModel) -> TrainedModel:
    metrics = [dataclasses.replace(metric, loss=metric.bpb or 0.0) for metric in model.metrics]
    evaluations = [
        dataclasses.replace(evaluation, metric="loss")
        for evaluation in model.evaluations
        if evaluation.metric == "bpb" and evaluation.value is not None
    ]
    # the table has a column of bits per byte of its own
    evaluations += [evaluation for evaluation in model.evaluations if evaluation.metric == "bpb"]
    return dataclasses.replace(model, metrics=metrics, evaluations=evaluations)
