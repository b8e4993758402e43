"""What a run measures between its steps: losses on validation sets, scores of tasks. Read pretrain/loop.py first."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from lit_gpt.counts import parse_token_count
from lit_gpt.errors import NonFiniteError
from lit_gpt.fingerprint import weights_sha256
from pretrain.evaluate import evaluate
from pretrain.evaluation_records import loss_records, moment, score_records
from pretrain.loggers import say
from pretrain.stages import Stage
from pretrain.state import TrainState
from pretrain.training import Run, Trained
from pretrain.zero_shot.metrics import Score, average, describe_scores
from pretrain.zero_shot.suite import Suite

EVERY = "every"


def is_due(run: Run, step: int) -> bool:
    """Whether anything is measured after this step because of its number."""
    return _sets_are_due(run, step) or _tasks_are_due(run, step)


def _sets_are_due(run: Run, step: int) -> bool:
    every = run.config.validation.every_steps
    return every > 0 and step % every == 0


def _tasks_are_due(run: Run, step: int) -> bool:
    every = run.config.zero_shot.every_steps
    return run.zero_shot is not None and every > 0 and step % every == 0


def measure(run: Run, stage: Stage, trained: Trained, state: TrainState, when: str) -> bool:
    """Measure what is due and write the records, all at once; whether that was done.

    If not, the run was asked to stop between two batches, and `state` says that the measurement is owed.

    Args:
        run, stage, trained, state: the run and where it stands.
        when: why now; with `every` it depends on the step what is due.
    """
    state.validation_owed = when
    at = moment({**state.to_dict(), "stage": stage.index, "stage_name": stage.name}, when)
    found = Found([], [])
    if when != EVERY or _sets_are_due(run, state.step_count):
        found = _with_losses(run, trained, state, at, found)
    if found is not None and run.zero_shot is not None and (when != EVERY or _tasks_are_due(run, state.step_count)):
        found = _with_scores(run, run.zero_shot, trained, state, at, found)
    if found is None:
        return False
    state.validation_owed = None
    run.log.evaluation(found.records)
    for line in found.lines:
        say(line)
    return True


@dataclass(frozen=True)
class Found:
    """What was measured."""

    records: list[dict[str, Any]]
    lines: list[str]
    """The same for people."""


def _with_losses(run: Run, trained: Trained, state: TrainState, at: Mapping[str, Any], before: Found) -> Found | None:
    """With those of every validation set; None: asked to stop."""
    limit = run.config.validation.max_tokens
    max_tokens = None if limit is None else parse_token_count(limit)
    records, lines = [*before.records], [*before.lines]
    for each in run.validation:
        result = evaluate(
            trained.module,
            each,
            run.config.batch.micro_batch_size,
            max_tokens,
            run.fabric.device,
            run.world,
            lambda: _is_interrupted(run, state, "validating"),
        )
        if result is None:
            return None
        records += loss_records(at, each, result, max_tokens)
        bpb = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits per byte"
        what = f"validation {each.name} ({at['stage_name']}, {at['when']})"
        lines.append(f"{what}: {result.nats_per_token:.4f} nats per token{bpb}")
    return Found(records, lines)


def _with_scores(
    run: Run, suite: Suite, trained: Trained, state: TrainState, at: Mapping[str, Any], before: Found
) -> Found | None:
    """With those of every task, and their average where there is one; None: asked to stop.

    Where a model gives no finite numbers it has no scores; whether its run goes on, its guards decide.
    """
    scores: list[Score] = []
    for task in suite.prepared:
        try:
            with _uncompiled(run):
                of_task = suite.score(
                    task,
                    trained.module,
                    run.fabric.device,
                    run.world,
                    lambda: _is_interrupted(run, state, "scoring tasks"),
                )
        except NonFiniteError as error:
            if run.world.is_first:
                name = task.examples.task.name
                sys.stderr.write(f"warning: no score of {name} at step {state.step_count:,}: {error}\n")
            continue
        if of_task is None:
            return None
        scores += of_task
    if not scores:
        return before
    mean = average(scores)
    scores += [] if mean is None else [mean]
    dtype = "float32" if run.compute.precision == "fp32" else "bfloat16"
    weights = _fingerprint(run, trained)
    records = score_records(at, scores, checkpoint=None, weights=weights, first=suite.first, dtype=dtype)
    line = f"zero-shot ({at['stage_name']}, {at['when']}): {describe_scores(scores)}"
    return Found([*before.records, *records], [*before.lines, line])


def _uncompiled(run: Run) -> AbstractContextManager[Any]:
    """Batches of tasks have as many shapes as lengths: compiling for each would cost more than it saves."""
    return nullcontext() if run.compute.compile == "none" else torch.compiler.set_stance("force_eager")


def _fingerprint(run: Run, trained: Trained) -> str:
    """Of the weights that were scored, saved or not."""
    growth = trained.growth
    weights = trained.model.state_dict() if growth is None else growth.materialise()
    return weights_sha256(weights, run.world)


def _is_interrupted(run: Run, state: TrainState, doing: str) -> bool:
    """Asked before every batch, by all processes."""
    run.log.alive(doing, state)
    return run.world.any(run.stop.requested())
