"""The training loop: stages in a row, fit, train_step, validate. Read pretrain/stages.py first."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from lit_gpt.errors import NonFiniteError
from lit_gpt.flops import flops_per_token
from pretrain.config import RunConfig, parse_token_count
from pretrain.evaluate import evaluate
from pretrain.growth import closed_parts, enter_stage, learn_to_grow, learned_so_far, set_masks
from pretrain.loggers import Progress, say
from pretrain.optim import set_learning_rate
from pretrain.parallel import gradients_shared, whole
from pretrain.signals import StopRequested
from pretrain.stages import Stage
from pretrain.state import TrainState
from pretrain.training import Run, Trained, step_flops, step_flops_computed, tokens_per_step


def train_in_stages(run: Run, trained: Trained, state: TrainState) -> Trained:
    """Train what is left of the run. Growth happens between two calls of `fit`.

    Raises:
        StopRequested: a signal came; a checkpoint was saved. NonFiniteError: the loss or a gradient is not a number.
    """
    for stage in run.stages[state.stage - 1 :]:
        if stage.index > state.stage:
            state.stage, state.stage_step = stage.index, 0
        if state.grown_into_stage < stage.index:
            if stage.learning is not None:
                trained = learn_to_grow(run, stage, trained, state)
                fit(run, stage, trained, state, until=stage.first_step)
            trained = enter_stage(run, stage, trained, state)
        fit(run, stage, trained, state, until=stage.steps)
    return trained


def fit(run: Run, stage: Stage, trained: Trained, state: TrainState, *, until: int) -> None:
    """Train one stage from where `state` is to step `until`. Does nothing if it is there; the stage's end is saved."""
    if state.stage_step >= until:
        return
    set_masks(stage, trained, state.stage_step)
    if state.stage_step == stage.first_step:
        validate(run, stage, trained, state, "after_growth" if stage.is_grown else "start")
    config, last_log = run.config, (state.seconds, state.tokens)
    with (
        run.train.batches(state.position, until - state.stage_step, config.batch, run.world) as batches,
        Progress(stage.name, stage.steps, state.stage_step, run.flops_left(state), run.world.is_first) as progress,
    ):
        while state.stage_step < until:
            started = time.perf_counter()
            loss, grad_norm, rate = train_step(run, stage, trained, state, batches)
            advance(run, stage, state, loss, time.perf_counter() - started)
            progress.step(state.stage_step, step_flops(config, stage, state.stage_step - 1).paper)
            finished = state.stage_step == until
            if finished or state.step_count % config.logging.every_steps == 0:
                log_step(run, stage, state, progress, last_log, grad_norm, rate)
                last_log = (state.seconds, state.tokens)
            if finished:
                break
            every = config.validation.every_steps
            if every and state.step_count % every == 0:
                validate(run, stage, trained, state, "every")
            run.checkpoints.poll()
            stopping = run.world.any(run.stop.received is not None)  # any process may have got the signal
            if stopping or state.step_count % config.checkpoints.every_steps == 0:
                save(run, stage, trained, state, periodic=not stopping)
            if stopping:
                raise StopRequested(f"stopped by {run.stop.received or 'another process'}; repeat the command to go on")
    if until < stage.steps:
        return
    following = run.stages[stage.index : stage.index + 1]
    validate(run, stage, trained, state, "before_growth" if following and following[0].is_grown else "end")
    save(run, stage, trained, state)


def train_step(
    run: Run, stage: Stage, trained: Trained, state: TrainState, batches: Iterator[np.ndarray]
) -> tuple[float, float, float]:
    """One optimizer update from the samples at the state's position; returns loss, gradient norm, learning rate.

    `batches` stands at the same position: it yields (micro_batch_size, block_size + 1) int64.

    Raises:
        NonFiniteError: before the update, so the weights are those of the step before.
    """
    optimizer = trained.optimizer
    rate = stage.learning_rate(state.stage_step)
    set_learning_rate(optimizer.optimizer, rate)
    set_masks(stage, trained, state.stage_step)
    if not stage.is_taught(state.stage_step):
        trained.taught = None
    module = trained.module if trained.taught is None else trained.taught
    iters = run.config.batch.iters_per_step(run.world.size)
    loss = torch.zeros((), device=run.fabric.device)
    for i in range(iters):
        rows = torch.from_numpy(next(batches)).to(run.fabric.device)  # (B, block_size + 1)
        with gradients_shared(trained, run.world, last=i == iters - 1):
            iter_loss = module(rows[:, :-1], rows[:, 1:], separator_id=run.train.separator_id) / iters
            run.fabric.backward(iter_loss)
        loss += iter_loss.detach()
    loss = run.world.mean_(loss)
    max_norm = stage.optimizer.grad_clip or math.inf
    grad_norm = float(whole(nn.utils.clip_grad_norm_(trained.parameters, max_norm)))
    check_finite(run, state, float(loss), grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss), grad_norm, rate


def check_finite(run: Run, state: TrainState, loss: float, grad_norm: float) -> None:
    """Stop before numbers that are none reach the weights.

    Raises:
        NonFiniteError: with the samples to look at and the checkpoint to go back to.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    step, stop = state.step_count + 1, state.position + run.config.batch.global_batch_size
    skip = run.train.stretch(state.position, stop)
    skip_text = "" if skip is None else f", or leave them out: add {list(skip)} to data.skips and repeat the command"
    raise NonFiniteError(
        f"step {step}: loss {loss}, gradient norm {grad_norm}; the update was not made. "
        f"Samples {state.position} to {stop - 1} of the data order. Last checkpoint: "
        f"{run.checkpoints.last or 'none'}. Lower optimizer.learning_rate, or look at these samples: "
        f"pretrain data show {run.config.out_dir} --step {step}{skip_text}"
    )


def advance(run: Run, stage: Stage, state: TrainState, loss: float, seconds: float) -> None:
    """Count one finished step."""
    batch = run.config.batch
    state.flops += step_flops(run.config, stage, state.stage_step)
    state.flops_computed += step_flops_computed(run.config, stage, state.stage_step)
    state.stage_step += 1
    state.step_count += 1
    state.iter_num += batch.iters_per_step(run.world.size)
    state.position += batch.global_batch_size
    state.tokens += tokens_per_step(run.config, stage)
    state.seconds += seconds
    state.loss_sum += loss
    state.loss_count += 1


def log_step(
    run: Run,
    stage: Stage,
    state: TrainState,
    progress: Progress,
    last_log: tuple[float, int],
    grad_norm: float,
    rate: float,
) -> None:
    """Write the mean loss since the last line and what goes with it."""
    loss = state.loss_sum / state.loss_count
    state.loss_sum, state.loss_count = 0.0, 0
    seconds, tokens = state.seconds - last_log[0], state.tokens - last_log[1]
    tokens_per_sec = tokens / seconds if seconds else 0.0
    bytes_per_token, total = run.train.bytes_per_token(state.position), state.total_flops
    run.log.metrics(
        {
            "step": state.step_count,
            "stage": stage.index,
            "stage_name": stage.name,
            "stage_step": state.stage_step,
            "tokens": state.tokens,
            "flops_total": total.paper,
            "flops_model": total.model,
            "flops_palm": total.palm,
            "flops_computed": state.flops_computed + state.parent_flops.paper,
            "loss": loss,
            "bpb": loss / math.log(2) / bytes_per_token if bytes_per_token else None,
            "lr": rate,
            "grad_norm": grad_norm,
            "tokens_per_sec": tokens_per_sec,
            "mfu": None,  # no peak rate is known for a CPU, and GPUs are not trained on yet
            "position": state.position,
            "seconds": state.seconds,
            "time": time.time(),
        }
    )
    flops_per_sec = tokens_per_sec * flops_per_token(stage.config).paper
    progress.status(state.stage_step, loss, tokens_per_sec, flops_per_sec)


def validate(run: Run, stage: Stage, trained: Trained, state: TrainState, when: str) -> None:
    """Measure every validation set and write the records; `when` says why now."""
    limit = run.config.validation.max_tokens
    max_tokens = None if limit is None else parse_token_count(limit)
    for validation_set in run.validation:
        result = evaluate(
            trained.module, validation_set, run.config.batch.micro_batch_size, max_tokens, run.fabric.device, run.world
        )
        common = {
            "step": state.step_count,
            "stage": stage.index,
            "stage_name": stage.name,
            "when": when,
            "tokens": state.tokens,
            "flops_total": state.total_flops.paper,
            "set": validation_set.name,
        }
        rest = {
            "n": result.n_tokens,
            "limit": max_tokens if result.limited else None,
            "checkpoint": None,  # measured on the weights in memory, before they are saved
            "data": validation_set.source.fingerprint,
        }
        values = (
            ("loss", result.nats_per_token, result.stderr),
            ("perplexity", result.perplexity, None),
            ("bpb", result.bits_per_byte, None),
        )
        run.log.evaluation(
            [{**common, "metric": metric, "value": value, "stderr": stderr, **rest} for metric, value, stderr in values]
        )
        bpb = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits per byte"
        say(f"validation {validation_set.name} ({stage.name}, {when}): {result.nats_per_token:.4f} nats per token{bpb}")


def save(run: Run, stage: Stage, trained: Trained, state: TrainState, *, periodic: bool = False) -> None:
    """Write a checkpoint of this moment; a periodic one maybe while training goes on."""
    run.checkpoints.save(
        trained.model,
        trained.optimizer.optimizer,
        state,
        periodic=periodic,
        learning=learned_so_far(trained),
        model_config=trained.model.config.to_dict(),
        stage_name=stage.name,
        mask=closed_parts(stage, state.stage_step),
        data=run.train.packed.state(state.position),
    )


def describe_stages(stages: Sequence[Stage], config: RunConfig) -> list[str]:
    """One line per stage for the start of the log."""
    return [
        f"stage {stage.index} {stage.name}: {stage.config.n_layer} layers, {stage.steps:,} steps of "
        f"{tokens_per_step(config, stage):,} tokens"
        for stage in stages
    ]
