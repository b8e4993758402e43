"""From settings to a finished run: preflight, resume or start, train. What the `pretrain` command does."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from grow.plan import SYMMETRY, differing_sizes
from grow.registry import SIZES
from lit_gpt.atomic import write_atomically
from lit_gpt.checkpoint import (
    TrainingCheckpoint,
    detect_form,
    find_checkpoint,
    manifest_sha256,
    read_config,
    read_exchange,
    read_training,
    read_weights,
)
from lit_gpt.config import Config
from lit_gpt.errors import EXIT_STOPPED, exit_code
from lit_gpt.flops import count_parameters, flops_per_token
from lit_gpt.legacy import is_legacy
from lit_gpt.model import InitialWeights
from pretrain.changed_settings import check_settings
from pretrain.checkpointing import RunCheckpoints, restore_random_states
from pretrain.command_line import Invocation
from pretrain.config import RunConfig, StageConfig, to_plain
from pretrain.corpus import Corpus, model_config_for, read_corpus
from pretrain.data import TrainData, check_epochs, open_train_data, open_validation_sets
from pretrain.growth import load_trainable_state, set_up
from pretrain.guards import Diverged, GivenUp
from pretrain.heartbeat import HEARTBEAT_FILE
from pretrain.held_out import ValidationSet
from pretrain.loggers import EVALS_FILE, METRICS_FILE, TENSORBOARD_FOLDER, NoLog, RunLog, say
from pretrain.loop import describe_divergence, describe_stages, skip_on_return, train_in_stages
from pretrain.origin import (
    check_separator,
    check_tokenizer,
    continued_position,
    continued_settings,
    first_position,
    fits_rows,
    growth_behind,
    inherit_history,
    mask_notes,
    origin_model,
    own_state,
    parent_state,
    trainable_notes,
    with_saved_name,
)
from pretrain.parallel import check_world, choose_compute, describe_world, device_type, is_sharded, launch
from pretrain.run_lock import run_lock
from pretrain.signals import StopRequested, StopSignal, marked
from pretrain.stage_text import stage_lines
from pretrain.stages import Stage, plan_stages
from pretrain.state import TrainState
from pretrain.time_limit import find_limits
from pretrain.training import Run, Trained, stage_flops, tokens_per_step
from pretrain.world import ALONE, World, connected, find_world, in_turn

CONFIG_FILE = "config.yaml"
INDEX_FOLDER = "data_index"


@dataclass(frozen=True)
class Plan:
    """A run whose settings, data and starting point are known to be good; nothing is computed or deleted yet."""

    config: RunConfig
    stages: list[Stage]
    corpus: Corpus
    train: TrainData
    position: int
    """Of the run's first sample."""
    samples: int
    """Training samples of all stages."""
    validation: list[ValidationSet]
    data_lines: list[str]
    """What was found, for the log."""
    own: dict[str, Any] | None
    """state.json of the run's own last checkpoint; None for a run that has none."""
    auto_skips: tuple[tuple[int, int], ...] = ()
    """Samples that the run leaves out because it diverged on them; they are among data.skips."""


def run(invocation: Invocation, command: list[str]) -> None:
    """Start the run, resume it, or, if it is finished, say so.

    Raises:
        ValueError: settings that do not fit each other, the data or the checkpoint.
        DataError, OSError: damaged or missing files, a folder that cannot be written.
        NonFiniteError, StopRequested: see pretrain/loop.py.
    """
    world = find_world()
    if not world.is_first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the first process speaks for all, to the end)
    sharded = is_sharded(invocation.config.parallel, world)
    with connected(world, device_type(invocation.config), alone_too=sharded), ExitStack() as held:
        plan = in_turn(world, lambda: preflight(invocation, world))
        if invocation.dry_run:
            if plan.own is not None:
                resumed_state(plan.own, plan.config, plan.train)
            if world.is_first:
                describe(plan)
            return
        out_dir = Path(plan.config.out_dir)
        if world.is_first:
            in_turn(world, lambda: held.enter_context(run_folder(out_dir, invocation.fresh, invocation.take_over)))
        else:
            in_turn(world, lambda: None)
        with told_once(world), marked(out_dir, world):
            train_until_done(plan, invocation, world, command)


@contextmanager
def told_once(world: World) -> Iterator[None]:
    """An end that all processes come to together: the first one alone says so."""
    try:
        yield
    except (StopRequested, GivenUp) as end:
        if world.is_first:
            raise
        raise SystemExit(EXIT_STOPPED if isinstance(end, StopRequested) else exit_code(end)) from end


def train_until_done(plan: Plan, invocation: Invocation, world: World, command: list[str]) -> None:
    """Train, and where the run diverges and may do so, go back and round the samples.

    Raises:
        GivenUp: it diverged once more than it may.
    """
    while True:
        try:
            return train(plan, world, command)
        except GivenUp as end:
            if end.skip is None or len(plan.auto_skips) >= plan.config.guards.rollbacks:
                raise
            say(f"warning: {end}\nback to the last checkpoint, without these samples")
            again, skips = dataclasses.replace(invocation, fresh=False), (*plan.auto_skips, end.skip)
            plan = in_turn(world, lambda again=again, skips=skips: preflight(again, world, skips))


def train(plan: Plan, world: World, command: list[str]) -> None:
    """Start or resume in a folder that nobody else trains in."""
    config, stages = plan.config, plan.stages
    fabric = launch(config, world)
    compute = choose_compute(config, fabric.device, plan.samples * stages[-1].config.block_size)
    out_dir = Path(config.out_dir)
    metadata = {
        "run_config": to_plain(config),
        "seed": config.seed,
        "command": command,
        "tokenizer": plan.corpus.tokenizer_entry,
        "separator_id": plan.train.separator_id,
        "auto_skips": [list(skip) for skip in plan.auto_skips],
        "compute": {"precision": compute.precision, "compile": compute.compile, "reason": compute.reason},
    }
    checkpoints = RunCheckpoints(out_dir, config.checkpoints, metadata, world, fabric.device.type)
    checkpoint = checkpoints.resume()
    state = (
        in_turn(world, lambda: resumed_state(checkpoint.state, config, plan.train)) if checkpoint else new_state(plan)
    )
    if is_finished(state, stages):
        say(f"{out_dir} is finished: {state.step_count:,} steps. --fresh starts over")
        return
    if world.is_first:
        settings = yaml.safe_dump(to_plain(config), sort_keys=False)
        write_atomically(out_dir / CONFIG_FILE, settings.encode())  # those of this sitting; some may change
        describe(plan)
    say(f"compute: {compute.precision}, compile {compute.compile} ({compute.reason})")
    if world.size > 1:
        say(f"processes: {describe_world(config.parallel, world)}")
    stage = stages[state.grown_into_stage - 1]  # the one whose model there is: the next may still learn to grow
    with StopSignal(find_limits(config.stop, world)) as stop:
        kept_stage = 0 if checkpoint is None else state.stage  # nothing stays of a run killed before its first save
        log = (
            RunLog(
                out_dir,
                stage=kept_stage,
                step=state.step_count,
                tensorboard=config.logging.tensorboard,
                owed=state.validation_owed,
            )
            if world.is_first
            else NoLog()
        )
        this_run = Run(config, stages, fabric, world, compute, plan.train, plan.validation, checkpoints, log, stop)
        trained = start(this_run, stage, state) if checkpoint is None else resume(this_run, stage, checkpoint, state)
        try:
            with checkpoints:
                train_in_stages(this_run, trained, state)
        except Diverged as found:
            skip = skip_on_return(this_run, state, found)
            raise GivenUp(describe_divergence(this_run, state, found), skip) from found
        finally:
            log.close()
    say(f"done: {state.step_count:,} steps, {state.tokens:,} tokens; last checkpoint {checkpoints.last}")


def preflight(invocation: Invocation, world: World = ALONE, auto_skips: tuple[tuple[int, int], ...] = ()) -> Plan:
    """Resolve and check all that can be checked before anything is computed; what raises, raises here.

    auto_skips: samples to leave out beside those of the settings and of the run's own checkpoint.
    """
    config = invocation.config
    check_world(config, world)
    corpus = read_corpus(config.data, look_beside=config.model.vocab_size is None)
    own = None if invocation.fresh else own_state(Path(config.out_dir))
    model_config = model_config_for(corpus, config.model, origin_model(config, own))
    known = tuple((start, stop) for start, stop in ({} if own is None else own).get("auto_skips", []))
    auto_skips = (*known, *(skip for skip in auto_skips if skip not in known))
    config = with_skips(config, auto_skips)
    stages = plan_stages(config, model_config, growth_behind(config, own))
    if invocation.scratch:
        if config.init_from is not None:
            raise ValueError("--scratch trains from the first step, init_from does not; give one of the two")
        config = scratch_config(config, stages)
        stages = plan_stages(config, model_config)
    if config.init_from is not None and own is None:  # a run that has checkpoints of its own needs its parent no more
        check_init_from(config, stages[0], invocation.fresh)
    config = with_saved_name(config, own)
    cache = None if invocation.dry_run else Path(config.out_dir) / INDEX_FOLDER
    train, position = open_stream(config, model_config, corpus, own, cache)
    validation, validation_lines = open_validation_sets(
        config.data, model_config, corpus, cache, separator_id=train.separator_id
    )
    samples = config.batch.global_batch_size * sum(stage.steps for stage in stages)
    epoch_lines = check_epochs(train, position, position + samples)
    lines = [*trainable_notes(config, own), *train.notes, *epoch_lines, *validation_lines, *corpus.notes]
    return Plan(config, stages, corpus, train, position, samples, validation, lines, own, auto_skips)


def with_skips(config: RunConfig, skips: Sequence[tuple[int, int]]) -> RunConfig:
    """The settings with more samples left out."""
    given = config.data.skips or []
    more = [list(skip) for skip in skips if list(skip) not in [list(each) for each in given]]
    return dataclasses.replace(config, data=dataclasses.replace(config.data, skips=[*given, *more])) if more else config


def scratch_config(config: RunConfig, stages: list[Stage]) -> RunConfig:
    """The baseline of a growing run: its last model from the first step on, for the FLOPs of all stages together."""
    last = config.stages[-1]
    per_step = flops_per_token(stages[-1].config).times(tokens_per_step(config, stages[-1])).paper
    steps = round(sum(stage_flops(config, stage).paper for stage in stages) / per_step)
    own = {key: getattr(last, key) for key in ("n_layer", *SIZES, "learning_rate", "min_learning_rate", "warmup_steps")}
    if last.continue_schedule:
        own["warmup_steps"] = stages[-1].schedule.warmup_steps  # that of the schedule's first stage
    return dataclasses.replace(config, stages=[StageConfig("scratch", max_steps=steps, **own)])


def new_state(plan: Plan) -> TrainState:
    """Before the first step."""
    return TrainState(position=plan.position, validation_owed="start")


def is_finished(state: TrainState, stages: list[Stage]) -> bool:
    """Whether nothing is left to do, not even to measure."""
    return state.stage == len(stages) and state.stage_step >= stages[-1].steps and state.validation_owed is None


def open_stream(
    config: RunConfig, model_config: Config, corpus: Corpus, own: dict[str, Any] | None, cache: Path | None
) -> tuple[TrainData, int]:
    """The training stream, and the position at which the run began or begins in it.

    Args:
        config: the run's settings.
        model_config: sizes of its last model.
        corpus: what is known of the data.
        own: state.json of the run's own last checkpoint; None for a run that has none.
        cache: folder for finished indices; None keeps none.
    """
    state = parent_state(config) if own is None else own
    check_tokenizer(state, corpus)
    saved = state.get("data")
    inherited = saved if config.init_from is not None else None
    data, taken_over = continued_settings(config.data, inherited)
    train = open_train_data(data, model_config, corpus, config.seed, cache)
    train = dataclasses.replace(train, notes=(*train.notes, *taken_over, *mask_notes(state, train)))
    if own is not None:
        return train, own["position"] - own["step_count"] * config.batch.global_batch_size
    return train, first_position(config, train, saved)


def describe(plan: Plan) -> None:
    """Data, sizes, FLOPs and the plan, before anything is computed."""
    for line in plan.data_lines:
        if line.startswith("warning:"):
            sys.stderr.write(f"{line}\n")
        else:
            say(line)
    for stage, line in zip(plan.stages, describe_stages(plan.stages, plan.config), strict=True):
        flops = stage_flops(plan.config, stage).paper
        say(f"{line}, {count_parameters(stage.config):,} parameters, {flops:.3g} FLOPs")
        for detail in stage_lines(stage):
            say(f"  {detail}")
        if stage.plan is not None and stage.plan.stays_symmetric:
            sys.stderr.write(f"warning: stage {stage.name!r}: {SYMMETRY}; use other shares, or noise\n")


@contextmanager
def run_folder(out_dir: Path, fresh: bool, take_over: bool = False) -> Iterator[None]:
    """Make the folder, hold its lock, and refuse early what would only fail at the first save.

    Raises:
        OSError: it cannot be written. DataError: another process trains in it.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    if not os.access(out_dir, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "the run folder cannot be written", str(out_dir))
    with run_lock(out_dir, take_over=take_over):
        if fresh:
            remove_run(out_dir)
        yield


def remove_run(out_dir: Path) -> None:
    """Delete what an earlier run left; other files in the folder stay."""
    for name in ("checkpoints", TENSORBOARD_FOLDER):
        shutil.rmtree(out_dir / name, ignore_errors=True)
    for name in (METRICS_FILE, EVALS_FILE, CONFIG_FILE, HEARTBEAT_FILE):
        (out_dir / name).unlink(missing_ok=True)


def start(this_run: Run, stage: Stage, state: TrainState) -> Trained:
    """Step 0: initial weights, or those of `init_from`; `state` takes over what the latter brings along."""
    config = this_run.config
    if config.init_from is None:
        return set_up(this_run, stage, InitialWeights(stage.config, config.seed), state)
    source = find_checkpoint(config.init_from)
    trained = set_up(this_run, stage, read_weights(source), state)
    if detect_form(source) == "training" and not is_legacy(source):  # those of other tools start with a new optimizer
        inherit(trained, state, read_training(source))
    else:
        for line in inherit_history(state, read_exchange(source).provenance or {}):
            sys.stderr.write(f"{line}\n")
    say(f"weights from {source}, data from sample {state.position:,}")
    return trained


def check_init_from(config: RunConfig, stage: Stage, fresh: bool) -> None:
    """Refuse a starting checkpoint of other sizes, and one that --fresh would delete.

    Raises:
        ValueError: naming every size that differs. DataError, OSError: it cannot be read.
    """
    source = find_checkpoint(config.init_from or "")
    if fresh and Path(config.out_dir).resolve() in source.resolve().parents:
        raise ValueError(
            f"--fresh would delete init_from={source}, which lies in the run's folder; move one of the two"
        )
    found, wanted = read_config(source), stage.config
    sizes = differing_sizes(found, wanted)
    if "vocab_size" in sizes and fits_rows(found, wanted):
        sizes.remove("vocab_size")
    if "block_size" in sizes and config.model.block_size is not None:  # no weight has its size: another one is a choice
        sizes.remove("block_size")
        say(f"init_from was made for block_size={found.block_size}; this run trains with {wanted.block_size}")
    if sizes:
        lines = [
            f"  {size}: {getattr(found, size)} in the checkpoint, {getattr(wanted, size)} wanted" for size in sizes
        ]
        raise ValueError(
            "\n".join([f"init_from {source} is another model than the first stage's:", *lines])
            + "\nAdapt `model`, or grow the checkpoint first (grow apply SRC DST); for another vocabulary, prepare the "
            + "data with the checkpoint's tokenizer (scripts/prepare.py --tokenizer PATH)"
        )


def inherit(trained: Trained, state: TrainState, parent: TrainingCheckpoint) -> None:
    """Take over history, FLOPs and, if there are any, moments of the checkpoint a run starts from."""
    before = TrainState.from_dict(parent.state)
    state.history = before.history
    state.parent_tokens = before.parent_tokens + before.tokens
    state.parent_flops = before.total_flops
    load_trainable_state(trained, parent.optimizer)


def resumed_state(state: dict[str, Any], config: RunConfig, train: TrainData) -> TrainState:
    """Where a checkpoint of the run stands, after checking that it is of these settings and this data.

    state: its state.json.

    Raises:
        ValueError: naming what differs.
    """
    check_settings(state["run_config"], config)
    check_separator(state, train)
    continued_position(train, state["data"])
    return TrainState.from_dict(state)


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
