"""What a run measures between its steps: losses on validation sets, scores of tasks. Read pretrain/loop.py first."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
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

EVERY = "every"


def is_due(run: Run, step: int) -> bool:
    """Whether anything is measured after this step because of its number."""
    return any(every_steps > 0 and step % every_steps == 0 for every_steps, _ in _parts(run))


def measure(run: Run, stage: Stage, trained: Trained, state: TrainState, when: str) -> bool:
    """Measure what is due and write the records, all at once; whether that was done.

    If not, the run was asked to stop between two batches, and `state` says that the measurement is owed.

    Args:
        run, stage, trained, state: the run and where it stands.
        when: why now; with `every` it depends on the step what is due.
    """
    state.validation_owed = when
    at = moment({**state.to_dict(), "stage": stage.index, "stage_name": stage.name}, when)
    found = Found([], [], cache(lambda: _fingerprint(run, trained)))
    for every_steps, add in _parts(run):
        due = when != EVERY or (every_steps > 0 and state.step_count % every_steps == 0)
        if due and not add(run, trained, state, at, found):
            return False
    state.validation_owed = None
    run.log.evaluation(found.records)
    for line in found.lines:
        say(line)
    return True


@dataclass
class Found:
    """What was measured."""

    records: list[dict[str, Any]]
    lines: list[str]
    """The same for people."""
    fingerprint: Callable[[], str]
    """Of the weights they were measured on: computed once, and by all processes together."""


Add = Callable[[Run, Trained, TrainState, Mapping[str, Any], Found], bool]
"""Measures one kind of thing and adds it to what was found; False: asked to stop."""


def _parts(run: Run) -> list[tuple[int, Add]]:
    """What a run measures, and every how many steps besides its own moments (0: not)."""
    losses = (run.config.validation.every_steps, _add_losses)
    return [losses] if run.zero_shot is None else [losses, (run.config.zero_shot.every_steps, _add_scores)]


def _add_losses(run: Run, trained: Trained, state: TrainState, at: Mapping[str, Any], found: Found) -> bool:
    """Those of every validation set."""
    limit = run.config.validation.max_tokens
    max_tokens = None if limit is None else parse_token_count(limit)
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
            return False
        found.records += loss_records(at, each, result, max_tokens, found.fingerprint())
        bpb = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits per byte"
        what = f"validation {each.name} ({at['stage_name']}, {at['when']})"
        found.lines.append(f"{what}: {result.nats_per_token:.4f} nats per token{bpb}")
    return True


def _add_scores(run: Run, trained: Trained, state: TrainState, at: Mapping[str, Any], found: Found) -> bool:
    """Those of every task, and their average where there is one.

    Where a model gives no finite numbers it has no scores; whether its run goes on, its guards decide.
    """
    suite, scores = run.zero_shot, list[Score]()
    assert suite is not None
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
            return False
        scores += of_task
    if not scores:
        return True
    mean = average(scores)
    scores += [] if mean is None else [mean]
    dtype = str(run.compute.dtype).removeprefix("torch.")
    weights = found.fingerprint()
    found.records += score_records(at, scores, checkpoint=None, weights=weights, first=suite.first, dtype=dtype)
    found.lines.append(f"zero-shot ({at['stage_name']}, {at['when']}): {describe_scores(scores)}")
    return True


def _uncompiled(run: Run) -> AbstractContextManager[Any]:
    """Batches of tasks have as many shapes as lengths: compiling for each would cost more than it saves."""
    return nullcontext() if run.compute.compile == "none" else torch.compiler.set_stance("force_eager")


def _fingerprint(run: Run, trained: Trained) -> str:
    """Of the weights that were measured, saved or not."""
    growth = trained.growth
    weights = trained.model.state_dict() if growth is None else growth.materialise()
    return weights_sha256(weights, run.world)


def _is_interrupted(run: Run, state: TrainState, doing: str) -> bool:
    """Asked before every batch, by all processes."""
    run.log.alive(doing, state)
    return run.world.any(run.stop.requested())
