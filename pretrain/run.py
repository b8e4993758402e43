"""From settings to a finished run: preflight, resume or start, train. What the `pretrain` command does."""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from lit_gpt.atomic import remove_directory, write_atomically
from lit_gpt.checkpoint import (
    TRAINING,
    TrainingCheckpoint,
    check_open,
    detect_form,
    manifest_sha256,
    read_exchange,
    read_training,
    read_weights,
)
from lit_gpt.config import Config
from lit_gpt.errors import EXIT_STOPPED, exit_code
from lit_gpt.kernels.settings import BackendUnavailable
from lit_gpt.legacy import is_legacy
from lit_gpt.model import InitialWeights
from lit_gpt.processes import first
from pretrain.changed_settings import check_settings
from pretrain.checkpointing import LAST_SAVED_FILE, RunCheckpoints, restore_random_states
from pretrain.command_line import Invocation
from pretrain.config import RunConfig, to_plain
from pretrain.data import TrainData
from pretrain.footprint import memory_lines
from pretrain.growth import load_trainable_state, set_up
from pretrain.guards import Diverged, GivenUp
from pretrain.heartbeat import HEARTBEAT_FILE
from pretrain.loggers import EVALS_FILE, METRICS_FILE, TENSORBOARD_FOLDER, Log, NoLog, RunLog, say
from pretrain.loop import describe_divergence, skip_on_return, train_in_stages
from pretrain.micro_batch import choose_micro_batch, chosen_before, decided, with_micro_batch
from pretrain.origin import (
    check_separator,
    checkpoints_meant,
    continued_position,
    inherit_history,
)
from pretrain.parallel import (
    Compute,
    check_alike,
    choose_compute,
    describe_world,
    device_type,
    is_sharded,
    launch,
    with_kernels,
)
from pretrain.preflight import Plan, describe, preflight, tell
from pretrain.run_lock import run_lock
from pretrain.signals import SAVING, StopRequested, StopSignal, marked
from pretrain.stages import Stage
from pretrain.state import TrainState
from pretrain.time_limit import find_limits
from pretrain.training import Run, Trained
from pretrain.world import World, connected, find_world, in_turn, is_started_again

if TYPE_CHECKING:
    from lightning_fabric import Fabric

CONFIG_FILE = "config.yaml"


def run(invocation: Invocation, command: list[str], stop: StopSignal | None = None) -> None:
    """Start the run, resume it, or, if it is finished, say so.

    Args:
        invocation: settings and switches.
        command: that asked for it, for the record.
        stop: what is listened to already; None: from now until the end.

    Raises:
        ValueError: settings that do not fit each other, the data or the checkpoint.
        DataError, OSError: damaged or missing files, a folder that cannot be written.
        NonFiniteError, StopRequested: see pretrain/loop.py.
    """
    if stop is None:
        with StopSignal() as stop:
            return run(invocation, command, stop)
    world = find_world()
    if not world.is_first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the first process speaks for all, to the end)
    invocation = as_started(invocation, world)
    sharded = is_sharded(invocation.config.parallel, world)
    with connected(world, device_type(invocation.config), alone_too=sharded), ExitStack() as held:
        meant = first(world, lambda: checkpoints_meant(invocation.config))
        if invocation.dry_run:
            plan = in_turn(world, lambda: preflight(invocation, world, meant=meant))
            notes = (
                [] if plan.own is None else in_turn(world, lambda: resumed_state(plan.own, plan.config, plan.train))[1]
            )
            with told_once(world):
                stop.obey(world)
            memory = memory_found(plan, world)
            if world.is_first:
                describe(plan)
                tell([*notes, *memory])
            return None
        is_early = world.any(stop.requested())  # the checks may take longer than there is time left
        ready = None if is_early else in_turn(world, lambda: Ready.of(preflight(invocation, world, meant=meant), world))
        if ready is not None:
            alike = world.gather(f"{ready.compute.precision} on {ready.fabric.device.type}")
            in_turn(world, lambda: check_alike(alike))
            ready = ready.with_micro_batch(world)
        out_dir, fresh = Path(invocation.config.out_dir), invocation.fresh and not is_early

        def hold() -> None:
            with suppress(StopRequested):  # which all processes obey together, below
                held.enter_context(run_folder(out_dir, fresh, invocation.take_over, stop.requested))

        in_turn(world, hold if world.is_first else lambda: None)
        with told_once(world), marked(out_dir, world):
            stop.obey(world)
            assert ready is not None
            train_until_done(ready, invocation, meant, world, command, stop)


@dataclass(frozen=True)
class Ready:
    """What was checked, and what it will run on; nothing is computed or deleted yet."""

    plan: Plan
    fabric: Fabric
    compute: Compute

    @classmethod
    def of(cls, plan: Plan, world: World) -> Ready:
        """A plan on the device of this process.

        Raises:
            ValueError: the device is not there, or cannot compute as asked, or not by the kernels asked for.
        """
        fabric = launch(plan.config, world)
        compute = choose_compute(plan.config, fabric.device, plan.tokens)
        return cls(plan, fabric, with_kernels(compute, plan.config, fabric.device, *of_models(plan)))

    def with_micro_batch(self, world: World) -> Ready:
        """With the micro-batch chosen, if the settings leave it open; every process calls this."""
        plan = self.plan
        config = decided(plan.config, plan.stages, self.compute, world, self.fabric.device, plan.own)
        return dataclasses.replace(self, plan=dataclasses.replace(plan, config=config))


def as_started(invocation: Invocation, world: World) -> Invocation:
    """What is asked for, without what was meant for the first start alone where a launcher repeats the command."""
    once = [name for name in ("fresh", "take_over") if getattr(invocation, name)]
    if not once or not is_started_again(world):
        return invocation
    if world.is_first:
        flags = " and ".join(f"--{name}".replace("_", "-") for name in once)
        sys.stderr.write(
            f"warning: {flags} ignored, as it counts for the first start only: torchrun started the processes again, "
            f"or SLURM the job\n"
        )
    return dataclasses.replace(invocation, **dict.fromkeys(once, False))


def memory_found(plan: Plan, world: World) -> list[str]:
    """What the run would take of a device like this process's, for a dry run; every process calls this."""
    config, device = plan.config, torch.device(device_type(plan.config))
    compute = choose_compute(config, device, plan.tokens)
    if config.batch.auto and chosen_before(config, plan.own, world) is None:
        size = choose_micro_batch(config, plan.stages, compute, world, device, may_try=False)
        config = with_micro_batch(config, max(1, size))
    lines = memory_lines(config, plan.stages, compute, world, device)
    try:
        with_kernels(compute, config, device, *of_models(plan))
    except BackendUnavailable as error:  # the run itself may be for another machine
        lines.append(f"warning: {error}")
    return lines


def of_models(plan: Plan) -> tuple[list[Config], int | None]:
    """What decides which kernels its models can have: their sizes, and whether documents are kept apart."""
    return [stage.config for stage in plan.stages], plan.train.separator_id


@contextmanager
def told_once(world: World) -> Iterator[None]:
    """An end that all processes come to together: the first one alone says so."""
    try:
        yield
    except (StopRequested, GivenUp) as end:
        if world.is_first:
            raise
        raise SystemExit(EXIT_STOPPED if isinstance(end, StopRequested) else exit_code(end)) from end


def train_until_done(
    ready: Ready, invocation: Invocation, meant: Mapping[str, str], world: World, command: list[str], stop: StopSignal
) -> None:
    """Train, and where the run diverges and may do so, go back and round the samples.

    Raises:
        GivenUp: it diverged once more than it may.
    """
    while True:
        try:
            return train(ready, world, command, stop)
        except GivenUp as end:
            plan = ready.plan
            if end.skip is None or len(plan.auto_skips) >= plan.config.guards.rollbacks:
                raise
            say(f"warning: {end}\nback to the last checkpoint, without these samples")
            again, skips = dataclasses.replace(invocation, fresh=False), (*plan.auto_skips, end.skip)
            batch = plan.config.batch  # what was chosen stays
            plan = in_turn(world, lambda again=again, skips=skips: preflight(again, world, skips, meant))
            plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, batch=batch))
            ready = dataclasses.replace(ready, plan=plan)


def train(ready: Ready, world: World, command: list[str], stop: StopSignal) -> None:
    """Start or resume in a folder that nobody else trains in.

    Raises:
        StopRequested, GivenUp: with all steps saved that count.
    """
    plan, fabric, compute = ready.plan, ready.fabric, ready.compute
    config, stages = plan.config, plan.stages
    out_dir = Path(config.out_dir)
    metadata = metadata_of(ready, world, command)
    checkpoints = RunCheckpoints(out_dir, config.checkpoints, metadata, world, fabric.device.type)
    checkpoint = checkpoints.resume()
    if checkpoint is None:
        state, notes = new_state(plan), []
    else:
        state, notes = in_turn(world, lambda: resumed_state(checkpoint.state, config, plan.train))
    if world.is_first:
        tell(notes)
    if is_finished(state, stages):
        say(f"{out_dir} is finished: {state.step_count:,} steps. --fresh starts over")
        return
    stop.obey(world)
    checkpoints.moment = state.moment
    settings = yaml.safe_dump(to_plain(config), sort_keys=False).encode()
    first(world, lambda: write_atomically(out_dir / CONFIG_FILE, settings))  # those of this sitting; some may change
    if world.is_first:
        describe(plan)
    say(f"compute: {compute}")
    say(f"kernels: {compute.kernels}")
    if world.size > 1:
        say(f"processes: {describe_world(config.parallel, world)}")
    stage = stages[state.grown_into_stage - 1]  # the one whose model there is: the next may still learn to grow
    log = in_turn(world, lambda: open_log(config, state, world, begins=checkpoint is None))
    stop.limits = stop.limits or find_limits(config.stop, world)  # they do not begin anew when the run goes back
    stop.consequence = SAVING
    measured = (plan.validation, plan.zero_shot)
    this_run = Run(config, stages, fabric, world, compute, plan.train, *measured, checkpoints, log, stop)
    try:
        if checkpoint is None:
            trained = start(this_run, stage, state, plan.origin)
        else:
            trained = resume(this_run, stage, checkpoint, state)
        with checkpoints:
            train_in_stages(this_run, trained, state)
    except Diverged as found:
        skip = skip_on_return(this_run, state, found)
        raise GivenUp(describe_divergence(this_run, state, found), skip) from found
    finally:
        log.close()
    say(f"done: {state.step_count:,} steps, {state.tokens:,} tokens; last checkpoint {checkpoints.last}")


def open_log(config: RunConfig, state: TrainState, world: World, *, begins: bool) -> Log:
    """The run's logs, cut back to `state`; nothing stays in them of a run that was killed before its first save."""
    if not world.is_first:
        return NoLog()
    return RunLog(
        Path(config.out_dir),
        stage=0 if begins else state.stage,
        step=state.step_count,
        tensorboard=config.logging.tensorboard,
        owed=state.validation_owed,
    )


def new_state(plan: Plan) -> TrainState:
    """Before the first step."""
    return TrainState(position=plan.position, validation_owed="start")


def metadata_of(ready: Ready, world: World, command: list[str]) -> dict[str, Any]:
    """What every checkpoint of this sitting says of how it came about."""
    plan, compute = ready.plan, ready.compute
    return {
        "run_config": to_plain(plan.config),
        "seed": plan.config.seed,
        "command": command,
        "tokenizer": plan.corpus.tokenizer_entry,
        "separator_id": plan.train.separator_id,
        "auto_skips": [list(skip) for skip in plan.auto_skips],
        "compute": {
            "precision": compute.precision,
            "compile": compute.compile,
            "fp8": compute.fp8,
            "reason": compute.reason,
            "device": ready.fabric.device.type,
            "processes": world.size,
        },
        "kernels": dataclasses.asdict(compute.kernels.names),
    }


def is_finished(state: TrainState, stages: list[Stage]) -> bool:
    """Whether nothing is left to do, not even to measure."""
    return state.stage == len(stages) and state.stage_step >= stages[-1].steps and state.validation_owed is None


@contextmanager
def run_folder(
    out_dir: Path, fresh: bool, take_over: bool = False, stopped: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Make the folder, hold its lock, and refuse early what would only fail at the first save.

    Raises:
        OSError: it cannot be written. DataError: another process trains in it. StopRequested: see `run_lock`.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    if not os.access(out_dir, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "the run folder cannot be written", str(out_dir))
    with run_lock(out_dir, take_over=take_over, stopped=stopped):
        if fresh:
            remove_run(out_dir)
        yield


def remove_run(out_dir: Path) -> None:
    """Delete what an earlier run left; other files in the folder stay.

    Raises:
        OSError: a part of it cannot be removed.
    """
    (out_dir / LAST_SAVED_FILE).unlink(missing_ok=True)  # first: alone it would say that all are lost
    for name in ("checkpoints", TENSORBOARD_FOLDER):
        if (out_dir / name).exists():
            remove_directory(out_dir / name)  # at once: no part of it stays that could be resumed
    for name in (METRICS_FILE, EVALS_FILE, CONFIG_FILE, HEARTBEAT_FILE):
        (out_dir / name).unlink(missing_ok=True)


def start(this_run: Run, stage: Stage, state: TrainState, source: Path | None) -> Trained:
    """Step 0: initial weights, or those of the checkpoint `source`; `state` takes over what the latter brings along."""
    if source is None:
        return set_up(this_run, stage, InitialWeights(stage.config, this_run.config.seed), state)
    if detect_form(source) == TRAINING and not is_legacy(source):  # those of other tools start with a new optimizer
        parent = read_training(source, processes=this_run.world)
        check_open(parent.state, source)
        trained = set_up(this_run, stage, parent.model, state)
        inherit(trained, state, parent)
    else:
        trained = set_up(this_run, stage, read_weights(source), state)
        for line in inherit_history(state, read_exchange(source).provenance or {}):
            if this_run.world.is_first:
                sys.stderr.write(f"{line}\n")
    say(f"weights from {source}, data from sample {state.position:,}")
    return trained


def inherit(trained: Trained, state: TrainState, parent: TrainingCheckpoint) -> None:
    """Take over history, FLOPs and, if there are any, moments of the checkpoint a run starts from."""
    before = TrainState.from_dict(parent.state)
    state.history = before.history
    state.parent_tokens = before.parent_tokens + before.tokens
    state.parent_flops = before.total_flops
    load_trainable_state(trained, parent.optimizer)


def resumed_state(state: dict[str, Any], config: RunConfig, train: TrainData) -> tuple[TrainState, list[str]]:
    """Where a checkpoint of the run stands, after checking that it is of these settings and this data; and log lines.

    state: its state.json.

    Raises:
        ValueError: naming what differs.
    """
    check_settings(state["run_config"], config)
    check_separator(state, train)
    _, notes = continued_position(train, state["data"])
    return TrainState.from_dict(state), notes


def resume(this_run: Run, stage: Stage, checkpoint: TrainingCheckpoint, state: TrainState) -> Trained:
    """The model and optimizer of a checkpoint, to the bit."""
    trained = set_up(this_run, stage, checkpoint.model, state)
    load_trainable_state(trained, checkpoint.optimizer)
    if checkpoint.rng is not None:
        restore_random_states(checkpoint.rng)
    last = this_run.checkpoints.last
    assert last is not None
    say(f"resumed from {last} ({manifest_sha256(last)[:12]})")
    return trained
