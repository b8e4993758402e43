"""The training loop: stages in a row, fit, train_step, validate. Read pretrain/stages.py first."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from lit_gpt.flops import flops_per_token
from lit_gpt.prefetch import WaitInterrupted
from pretrain.compilation import compile_secs
from pretrain.config import RunConfig
from pretrain.growth import closed_parts, enter_stage, learn_to_grow, learned_so_far, set_masks
from pretrain.guards import Diverged
from pretrain.loggers import Progress, say
from pretrain.loss_slope import add_loss, loss_slope
from pretrain.measuring import is_due, measure
from pretrain.optim import set_learning_rate
from pretrain.parallel import clip_gradients, gradients_shared
from pretrain.stages import Stage
from pretrain.state import TrainState
from pretrain.training import Run, Trained, mfu, peak_memory, step_flops, step_flops_computed, tokens_per_step


def train_in_stages(run: Run, trained: Trained, state: TrainState) -> Trained:
    """Train what is left of the run. Growth happens between two calls of `fit`.

    Raises:
        StopRequested: a signal came; no step is lost. Diverged: too many steps in a row were skipped.
    """
    if run.world.any(run.stop.requested()):  # before a growth, maybe
        stop(run, run.stages[state.grown_into_stage - 1], trained, state)
    for stage in run.stages[state.stage - 1 :]:
        if stage.index > state.stage:
            state.stage, state.stage_step, state.slope_bins = stage.index, 0, []
        if state.grown_into_stage < stage.index:
            if stage.learning is not None:
                trained = learn_to_grow(run, stage, trained, state)
                fit(run, stage, trained, state, until=stage.first_step)
            run.log.alive("growing", state)
            trained = enter_stage(run, stage, trained, state)
            state.validation_owed = "after_growth" if stage.is_grown else "start"
        fit(run, stage, trained, state, until=stage.steps)
    return trained


def fit(run: Run, stage: Stage, trained: Trained, state: TrainState, *, until: int) -> None:
    """Train one stage from where `state` is to step `until`. Does nothing if it is there; the stage's end is saved."""
    if state.ended_stage == stage.index:
        until = state.stage_step
    if state.stage_step >= until and state.validation_owed is None:
        return
    set_masks(stage, trained, state.stage_step)
    if state.validation_owed is not None:
        validate(run, stage, trained, state, state.validation_owed)
    if state.stage_step < until:
        train_until(run, stage, trained, state, until)
        if until < stage.steps:
            return
        validate(run, stage, trained, state, "before_growth" if is_grown_next(run, stage) else "end")
    save(run, stage, trained, state)
    if stage.index < len(run.stages) and run.world.any(run.stop.requested()):
        stop(run, stage, trained, state)


def is_grown_next(run: Run, stage: Stage) -> bool:
    """Whether the model grows when this stage is done."""
    return any(following.is_grown for following in run.stages[stage.index : stage.index + 1])


def train_until(run: Run, stage: Stage, trained: Trained, state: TrainState, until: int) -> None:
    """Steps of one stage, and what is measured, saved and logged between them; nothing of that after the last one."""
    config, last_log = run.config, (state.seconds, state.tokens)
    with (
        run.train.batches(
            state.position, until - state.stage_step, config.batch, run.world, lambda: is_asked_to_stop(run, state)
        ) as batches,
        Progress(stage.name, stage.steps, state.stage_step, run.flops_left(state), run.world.is_first) as progress,
    ):
        while state.stage_step < until:
            started = time.perf_counter()
            rows = step_rows(run, batches)
            if run.world.any(rows is None or run.stop.requested()):  # any process may have got the signal
                stop(run, stage, trained, state)
            grad_norm, rate = train_step(run, stage, trained, state, rows)
            finished = state.stage_step + 1 == until
            logged = finished or (state.step_count + 1) % config.logging.every_steps == 0
            loss = trained.guard.take_mean_loss() if logged else None  # waits for the device: within the measured time
            advance(run, stage, state, time.perf_counter() - started)
            run.log.alive("training", state)
            progress.step(state.stage_step, step_flops(config, stage, state.stage_step - 1).paper)
            if logged:
                log_step(run, stage, trained, state, progress, last_log, loss, float(grad_norm), rate)
                last_log = (state.seconds, state.tokens)
                finished = is_too_slow(stage, state, loss) or finished
            if logged or state.step_count % config.guards.max_skipped_steps == 0:
                trained.guard.check(state.step_count)
            if finished:
                break
            after_step(run, stage, trained, state)


def is_too_slow(stage: Stage, state: TrainState, loss: float | None) -> bool:
    """Whether the logged losses, this one with them, end the stage, which `state` then says. All processes agree."""
    begin = stage.first_step + stage.schedule.warmup_steps
    if stage.slope is None or loss is None or state.stage_step <= begin:
        return False  # what a growth being learned or a rising rate makes of the loss tells nothing of the model
    state.slope_bins = add_loss(state.slope_bins, state.total_flops.paper, loss)
    slope = loss_slope(state.slope_bins)
    if slope is None or slope < stage.slope:
        return False
    state.ended_stage = stage.index
    say(
        f"stage {stage.name} ends at step {state.step_count:,}: the slope of its loss over the last doubling of FLOPs "
        f"is {slope:.4f}, not below {stage.slope:g}"
    )
    return True


def after_step(run: Run, stage: Stage, trained: Trained, state: TrainState) -> None:
    """What is due between two steps: a measurement, a checkpoint."""
    if is_due(run, state.step_count):
        validate(run, stage, trained, state, "every")
    run.checkpoints.poll()
    run.stop.save_secs = run.checkpoints.longest_secs
    if state.step_count % run.config.checkpoints.every_steps == 0:
        save(run, stage, trained, state, periodic=True)


def step_rows(run: Run, batches: Iterator[np.ndarray]) -> list[np.ndarray] | None:
    """This process's rows of one step, all before any is computed: then all processes can agree not to make the step.

    None: they did not come, and the run was asked to stop meanwhile.
    """
    try:
        return [next(batches) for _ in range(run.config.batch.iters_per_step(run.world.size))]
    except WaitInterrupted:
        return None


def is_asked_to_stop(run: Run, state: TrainState) -> bool:
    """Asked while data does not come, of this process alone: the others may be where they cannot answer."""
    run.log.alive("waiting for data", state)
    return run.stop.requested()


def stop(run: Run, stage: Stage, trained: Trained, state: TrainState) -> NoReturn:
    """Save what is not saved yet; the same command goes on from here.

    Raises:
        StopRequested: always.
    """
    if not run.checkpoints.holds(state):
        save(run, stage, trained, state)
    raise run.stop.end()


def train_step(
    run: Run, stage: Stage, trained: Trained, state: TrainState, batches: Sequence[np.ndarray]
) -> tuple[Tensor, float]:
    """One optimizer update from the samples at the state's position, or none if the guard is against it.

    batches: this process's of the step, (micro_batch_size, block_size + 1) int64 each.

    Returns:
        The gradient norm, a scalar on the device that is not waited for, and the learning rate.
    """
    optimizer = trained.optimizer
    rate = stage.learning_rate(state.stage_step)
    set_learning_rate(optimizer.optimizer, rate)
    set_masks(stage, trained, state.stage_step)
    if not stage.is_taught(state.stage_step):
        trained.taught = None
    module = trained.module if trained.taught is None else trained.taught
    loss = torch.zeros((), device=run.fabric.device)
    for done, batch in enumerate(batches, 1):
        rows = torch.from_numpy(batch).to(run.fabric.device)  # (B, block_size + 1)
        with gradients_shared(trained, run.world, last=done == len(batches)):
            iter_loss = module(rows[:, :-1], rows[:, 1:], separator_id=run.train.separator_id) / len(batches)
            run.fabric.backward(iter_loss)
        loss += iter_loss.detach()
    loss = run.world.mean_(loss)
    max_norm = stage.optimizer.grad_clip or math.inf
    grad_norm = clip_gradients(trained.parameters, max_norm)
    optimizer.optimizer.found_inf = trained.guard.judge(loss, grad_norm, state.step_count + 1)
    optimizer.step()
    optimizer.zero_grad()
    return grad_norm, rate


def describe_divergence(run: Run, state: TrainState, found: Diverged) -> str:
    """What to do about a run that was given up: the samples to look at and the checkpoint to go back to."""
    start, stop = skipped_positions(run.config, state, found)
    skip = skip_on_return(run, state, found)
    skip_text = "" if skip is None else f", or leave them out: add {list(skip)} to data.skips and repeat the command"
    return (
        f"steps {found.first_step} to {found.last_step} were not made: their loss or gradient is no number, or a "
        f"spike. Samples {start} to {stop - 1} of the data order. Last checkpoint: {run.checkpoints.last or 'none'}. "
        f"Look at these samples: pretrain data show {run.config.out_dir} --step {found.first_step}{skip_text}. "
        f"{_with_a_lower_rate(run)}"
    )


def _with_a_lower_rate(run: Run) -> str:
    """How: a run does not resume under another one."""
    if run.checkpoints.last is None:
        return "Or start over with a lower rate: --fresh --optimizer.learning_rate RATE"
    return (
        f"Or go on with a lower rate as another run, its stages what is left of these: "
        f"--init-from {run.checkpoints.last} --out-dir NEW --optimizer.learning_rate RATE"
    )


def skipped_positions(config: RunConfig, state: TrainState, found: Diverged) -> tuple[int, int]:
    """First position of the skipped steps, and that behind their last."""
    batch = config.batch.global_batch_size
    return state.position - (state.step_count + 1 - found.first_step) * batch, state.position


def skip_on_return(run: Run, state: TrainState, found: Diverged) -> tuple[int, int] | None:
    """For data.skips, from the last checkpoint on: what lies before it is behind the run, which cannot order it anew.

    None: the order cannot leave samples out.
    """
    start, stop = skipped_positions(run.config, state, found)
    saved = run.checkpoints.last_step
    if saved is not None:
        start = max(start, state.position - (state.step_count - saved) * run.config.batch.global_batch_size)
    return run.train.stretch(start, stop)


def advance(run: Run, stage: Stage, state: TrainState, seconds: float) -> None:
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


def log_step(
    run: Run,
    stage: Stage,
    trained: Trained,
    state: TrainState,
    progress: Progress,
    last_log: tuple[float, int],
    loss: float | None,
    grad_norm: float,
    rate: float,
) -> None:
    """Write the mean loss since the last line, None if every step was skipped, and what goes with it."""
    seconds, tokens = state.seconds - last_log[0], state.tokens - last_log[1]
    tokens_per_sec = tokens / seconds if seconds else 0.0
    bytes_per_token, total = run.train.bytes_per_token(state.position), state.total_flops
    compiled = compile_secs()
    compiling, trained.compile_secs_told = compiled - trained.compile_secs_told, compiled
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
            "bpb": loss / math.log(2) / bytes_per_token if bytes_per_token and loss is not None else None,
            "lr": rate,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "skipped_steps": trained.guard.total,
            "tokens_per_sec": tokens_per_sec,
            "compile_secs": trained.compile_secs_told,
            "mfu": mfu(run, stage, tokens_per_sec),
            "peak_memory": peak_memory(run),
            "position": state.position,
            "seconds": state.seconds,
            "time": time.time(),
        }
    )
    flops_per_sec = tokens_per_sec * flops_per_token(stage.config).paper
    progress.status(state.stage_step, loss, tokens_per_sec, flops_per_sec, compiling)


def validate(run: Run, stage: Stage, trained: Trained, state: TrainState, when: str) -> None:
    """Measure what is due; `when` says why now.

    Raises:
        StopRequested: between two batches. Nothing was written, and it is measured again when the run goes on.
    """
    if not measure(run, stage, trained, state, when):
        stop(run, stage, trained, state)


def save(run: Run, stage: Stage, trained: Trained, state: TrainState, *, periodic: bool = False) -> None:
    """Write a checkpoint of this moment; a periodic one maybe while training goes on."""
    state.guard = trained.guard.to_dict()
    run.log.alive("saving", state)
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
