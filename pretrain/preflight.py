"""All that can be checked before anything is computed: settings, data, starting point, and what they make together."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grow.plan import SYMMETRY, differing_sizes
from grow.registry import SIZES
from lit_gpt.checkpoint import find_checkpoint, read_config
from lit_gpt.config import Config
from lit_gpt.counts import parse_token_count
from lit_gpt.flops import count_parameters, flops_per_token
from lit_gpt.kernels.fp8 import count_fp8
from pretrain.command_line import Invocation
from pretrain.config import RunConfig, StageConfig
from pretrain.corpus import Corpus, model_config_for, read_corpus
from pretrain.data import TrainData, check_epochs, open_train_data, open_validation_sets
from pretrain.held_out import ValidationSet
from pretrain.loggers import say
from pretrain.loop import describe_stages
from pretrain.loss_slope import MIN_BINS
from pretrain.micro_batch import as_before, undecided
from pretrain.origin import (
    check_tokenizer,
    checkpoints_meant,
    continued_settings,
    first_position,
    fits_rows,
    growth_behind,
    mask_notes,
    naming_checkpoints,
    origin_model,
    own_state,
    parent_state,
    trainable_notes,
    with_saved_name,
)
from pretrain.parallel import check_device, check_world
from pretrain.stage_text import stage_lines
from pretrain.stages import Stage, plan_stages
from pretrain.training import stage_flops, tokens_per_step
from pretrain.world import ALONE, World
from pretrain.zero_shot.suite import Suite, open_suite

INDEX_FOLDER = "data_index"


@dataclass(frozen=True)
class Plan:
    """A run whose settings, data and starting point are known to be good; nothing is computed or deleted yet."""

    config: RunConfig
    origin: Path | None
    """The checkpoint that init_from means."""
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
    zero_shot: Suite | None
    """Tasks to score; None: none."""
    own: dict[str, Any] | None
    """state.json of the run's own last checkpoint; None for a run that has none."""
    auto_skips: tuple[tuple[int, int], ...] = ()
    """Samples that the run leaves out because it diverged on them; they are among data.skips."""

    @property
    def tokens(self) -> int:
        """Training tokens of all stages."""
        return self.samples * self.stages[-1].config.block_size


def preflight(
    invocation: Invocation,
    world: World = ALONE,
    auto_skips: tuple[tuple[int, int], ...] = (),
    meant: Mapping[str, str] | None = None,
) -> Plan:
    """Resolve and check all that can be checked before anything is computed; what raises, raises here.

    Args:
        invocation: settings and switches.
        world: the processes.
        auto_skips: samples to leave out beside those of the settings and of the run's own checkpoint.
        meant: what `checkpoints_meant` gave the first process, as other runs may save meanwhile; None: now.
    """
    given = invocation.config
    config = naming_checkpoints(given, checkpoints_meant(given) if meant is None else meant)
    config = undecided(config)
    check_world(config, world)
    check_device(config)
    corpus = read_corpus(config.data, look_beside=config.model.vocab_size is None)
    own = None if invocation.fresh else own_state(Path(config.out_dir))
    config = as_before(config, own, world)
    model_config = model_config_for(corpus, config.model, origin_model(config, own))
    known = tuple((start, stop) for start, stop in ({} if own is None else own).get("auto_skips", []))
    auto_skips = (*known, *(skip for skip in auto_skips if skip not in known))
    config = with_skips(config, auto_skips)
    stages = plan_stages(config, model_config, growth_behind(config, own))
    if invocation.scratch:
        check_scratch(config, stages)
        config = scratch_config(config, stages)
        stages = plan_stages(config, model_config)
        given = config
    if config.init_from is not None and own is None:  # a run that has checkpoints of its own needs its parent no more
        check_init_from(config, stages[0], invocation.fresh)
    config = with_saved_name(config, own)
    cache = None if invocation.dry_run else Path(config.out_dir) / INDEX_FOLDER
    train, position = open_stream(config, model_config, corpus, own, cache)
    validation, validation_lines = open_validation_sets(
        config.data, model_config, corpus, cache, separator_id=train.separator_id
    )
    zero_shot, zero_shot_lines = open_suite(
        config.zero_shot, corpus.tokenizer, model_config, train.separator_id if own is None else own.get("separator_id")
    )
    samples = config.batch.global_batch_size * sum(stage.steps for stage in stages)
    epoch_lines = check_epochs(train, position, position + samples)
    lines = [
        *trainable_notes(config, own),
        *slope_notes(config, stages),
        *train.notes,
        *epoch_lines,
        *validation_lines,
        *limit_notes(config, validation),
        *zero_shot_lines,
        *corpus.notes,
    ]
    origin = None if config.init_from is None else Path(config.init_from)
    config = dataclasses.replace(config, init_from=given.init_from, stages=given.stages)  # as they stand in the record
    return Plan(config, origin, stages, corpus, train, position, samples, validation, lines, zero_shot, own, auto_skips)


def check_scratch(config: RunConfig, stages: Sequence[Stage]) -> None:
    """Refuse --scratch where it has no meaning.

    Raises:
        ValueError: the run has another beginning, or nobody knows its FLOPs.
    """
    if config.init_from is not None:
        raise ValueError("--scratch trains from the first step, init_from does not; give one of the two")
    if any(stage.slope is not None for stage in stages):
        raise ValueError(
            "--scratch spends the FLOPs of all stages, and with grow_when nobody knows those; replace it by the "
            "max_steps that the stage had in the run to compare with"
        )


def limit_notes(config: RunConfig, sets: Sequence[ValidationSet]) -> list[str]:
    """A line for the log if validation.max_tokens leaves a part of a set out."""
    limit = config.validation.max_tokens
    if limit is None or all(each.n_targets <= parse_token_count(limit) for each in sets):
        return []
    return [
        f"  of each set the first {parse_token_count(limit):,} targets at most are measured (validation.max_tokens)"
    ]


def slope_notes(config: RunConfig, stages: Sequence[Stage]) -> list[str]:
    """A line for the log for each stage that grow_when cannot end, as it is logged too seldom for a slope."""
    notes, every = [], config.logging.every_steps
    for stage in stages:
        judged_steps = stage.steps - stage.first_step - stage.schedule.warmup_steps
        if stage.index == 1 and config.init_from is None:
            judged_steps = min(judged_steps, stage.steps // 2)  # the last doubling of its FLOPs
        if stage.slope is not None and judged_steps // every <= MIN_BINS:
            notes.append(
                f"warning: stage {stage.name!r} has grow_when, which has no effect: a slope takes more than {MIN_BINS} "
                f"losses in a doubling of FLOPs, and there are at most {max(0, judged_steps // every)} with "
                f"logging.every_steps={every}; log more often, or give more steps"
            )
    return notes


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
    origin = None if own is not None or config.init_from is None else find_checkpoint(config.init_from)
    check_tokenizer(state, corpus, origin)
    saved = state.get("data")
    inherited = saved if config.init_from is not None else None
    data, taken_over = continued_settings(config.data, inherited)
    train = open_train_data(data, model_config, corpus, config.seed, cache)
    train = dataclasses.replace(train, notes=(*train.notes, *taken_over, *mask_notes(state, train)))
    if own is not None:
        return train, own["position"] - own["step_count"] * config.batch.global_batch_size
    position, notes = first_position(config, train, saved)
    return dataclasses.replace(train, notes=(*train.notes, *notes)), position


def tell(lines: Sequence[str]) -> None:
    """What was found: warnings on stderr, all else in the log."""
    for line in lines:
        if line.startswith("warning:"):
            sys.stderr.write(f"{line}\n")
        else:
            say(line)


def describe(plan: Plan) -> None:
    """Data, sizes, FLOPs and the plan, before anything is computed."""
    tell(plan.data_lines)
    for stage, line in zip(plan.stages, describe_stages(plan.stages, plan.config), strict=True):
        flops = stage_flops(plan.config, stage).paper
        say(f"{line}, {count_parameters(stage.config):,} parameters, {flops:.3g} FLOPs")
        for detail in stage_lines(stage):
            say(f"  {detail}")
        if plan.config.fp8 != "none":
            say("  {} of {} linear layers of blocks multiply in fp8".format(*count_fp8(stage.config)))
        if stage.plan is not None and stage.plan.stays_symmetric:
            sys.stderr.write(f"warning: stage {stage.name!r}: {SYMMETRY}; use other shares, or noise\n")


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
