"""Settings of a run that do not fit together, all of them at once, before any file is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from lit_gpt.counts import parse_token_count
from pretrain.config import RunConfig, StageConfig, ZeroShotConfig
from pretrain.data_config import data_problems
from pretrain.time_limit import parse_duration


def config_problems(config: RunConfig) -> list[str]:
    """Everything that is wrong with a run's settings on their own, one line each."""
    problems = [
        *_number_problems(config),
        *_stage_problems(config),
        *data_problems(config.data),
        *_zero_shot_problems(config.zero_shot),
        *_fp8_problems(config),
    ]
    if min(config.batch.global_batch_size, config.batch.micro_batch_size) >= 1 and not config.batch.auto:
        try:
            config.batch.iters_per_step(1)
        except ValueError as error:
            problems.append(str(error))
    if config.schedule.kind == "cosine" and config.schedule.decay_steps:
        problems.append("schedule.decay_steps has no effect with kind=cosine; remove it or choose kind=wsd")
    if config.stop.after is not None:
        try:
            parse_duration(config.stop.after)
        except ValueError as error:
            problems.append(f"stop.after: {error}")
    if config.schedule.kind == "wsd" and config.schedule.horizon_steps is not None:
        problems.append("schedule.horizon_steps has no effect with kind=wsd; remove it or choose kind=cosine")
    return problems


def _zero_shot_problems(settings: ZeroShotConfig) -> list[str]:
    if settings.names or settings.tasks == []:  # which a flag gives to leave out the tasks that a file names
        return []
    given = [key for key, value in asdict(settings).items() if value != getattr(ZeroShotConfig(), key)]
    return [f"zero_shot.{key} has no effect without zero_shot.tasks; name tasks, or remove it" for key in given]


def _fp8_problems(config: RunConfig) -> list[str]:
    if config.fp8 == "none":
        return []
    problems = []
    if config.compile == "none":
        problems.append(f"fp8={config.fp8} is slower than bf16 unless blocks are compiled; leave compile or fp8 out")
    if config.precision == "fp32":
        problems.append(f"fp8={config.fp8} multiplies what is bf16 otherwise, not fp32; leave precision or fp8 out")
    return problems


def _number_problems(config: RunConfig) -> list[str]:
    at_least = {
        "batch.global_batch_size": (config.batch.global_batch_size, 1),
        "batch.micro_batch_size": (config.batch.micro_batch_size, 1),
        "logging.every_steps": (config.logging.every_steps, 1),
        "checkpoints.every_steps": (config.checkpoints.every_steps, 1),
        "checkpoints.keep_last": (config.checkpoints.keep_last, 1),
        "checkpoints.keep_every_steps": (config.checkpoints.keep_every_steps, 0),
        "validation.every_steps": (config.validation.every_steps, 0),
        "zero_shot.every_steps": (config.zero_shot.every_steps, 0),
        "zero_shot.limit": (1 if config.zero_shot.limit is None else config.zero_shot.limit, 1),
        "zero_shot.micro_batch_size": (config.zero_shot.micro_batch_size, 1),
        "schedule.warmup_steps": (config.schedule.warmup_steps, 0),
        "schedule.decay_steps": (config.schedule.decay_steps, 0),
        "optimizer.learning_rate": (config.optimizer.learning_rate, 0),
        "optimizer.min_learning_rate": (config.optimizer.min_learning_rate, 0),
        "optimizer.weight_decay": (config.optimizer.weight_decay, 0),
        "optimizer.grad_clip": (config.optimizer.grad_clip, 0),
        "guards.max_skipped_steps": (config.guards.max_skipped_steps, 1),
        "guards.window_steps": (config.guards.window_steps, 2),
        "guards.rollbacks": (config.guards.rollbacks, 0),
        "guards.spike_sigmas": (config.guards.spike_sigmas or 0, 0),
        "data.start_position": (config.data.start_position or 0, 0),
        "stop.margin_secs": (config.stop.margin_secs, 0),
    }
    for stage in config.stages:
        for key in ("learning_rate", "min_learning_rate", "warmup_steps", "rewarmup_steps", "mask_steps"):
            at_least[f"stage {stage.name!r}: {key}"] = (getattr(stage, key) or 0, 0)
        if stage.distill_steps is not None:
            at_least[f"stage {stage.name!r}: distill_steps"] = (stage.distill_steps, 1)
    problems = [f"{key}={value} must be at least {low}" for key, (value, low) in at_least.items() if value < low]
    for key in ("beta1", "beta2"):
        value = getattr(config.optimizer, key)
        if not 0 <= value < 1:
            problems.append(f"optimizer.{key}={value} must be in [0, 1)")
    return problems


def _stage_problems(config: RunConfig) -> list[str]:
    if not config.stages:
        return ["stages is empty; a run needs at least one, e.g. [{name: main, max_tokens: 1B}]"]
    problems = []
    names = [stage.name for stage in config.stages]
    problems += [f"stage name {name!r} occurs twice" for name in sorted({n for n in names if names.count(n) > 1})]
    for number, stage in enumerate(config.stages, 1):
        where = f"stage {number} ({stage.name!r})"
        if (stage.max_tokens is None) == (stage.max_steps is None):
            problems.append(f"{where} needs exactly one of max_tokens and max_steps")
        problems += [f"{where}: {problem}" for problem in _growth_problems(stage, is_first=number == 1)]
        problems += [f"{where}: {problem}" for problem in _slope_problems(stage, config.stages[number : number + 1])]
        try:
            if stage.max_tokens is not None:
                parse_token_count(stage.max_tokens)
        except ValueError as error:
            problems.append(f"{where}: {error}")
    try:
        if config.validation.max_tokens is not None:
            parse_token_count(config.validation.max_tokens)
    except ValueError as error:
        problems.append(f"validation.max_tokens: {error}")
    return problems


def _growth_problems(stage: StageConfig, *, is_first: bool) -> list[str]:
    """What does not fit within one stage's settings of growth and schedule."""
    problems = []
    if is_first and (stage.operator or stage.layer_map):
        problems.append(
            "it has a growth operator but nothing to grow from; use `grow apply` and init_from, or init_from and a "
            "stage of max_steps: 0 before this one"
        )
    if is_first and stage.continue_schedule:
        problems.append("continue_schedule needs a stage before this one; remove it")
    if not stage.operator and (stage.layer_map or stage.options):
        problems.append("layer_map and options belong to a growth operator; give one, or remove them")
    if stage.rewarmup_steps and not stage.continue_schedule:
        problems.append("rewarmup_steps goes with continue_schedule; use warmup_steps where the schedule starts again")
    if stage.continue_schedule and stage.warmup_steps is not None:
        problems.append("warmup_steps has no effect with continue_schedule; use rewarmup_steps")
    if stage.distill_weight is not None and not 0 <= stage.distill_weight <= 1:
        problems.append(
            f"distill_weight={stage.distill_weight} must be in [0, 1]: it is the teacher's share of the loss"
        )
    return problems


def _slope_problems(stage: StageConfig, following: Sequence[StageConfig]) -> list[str]:
    """What does not fit about a stage's end by the slope of its loss; `following` holds the next stage, if any."""
    if stage.grow_when is None:
        return [] if stage.slope is None else ["slope belongs to grow_when: loss_slope; give it, or remove slope"]
    problems = []
    if not following or following[0].operator is None:
        problems.append("grow_when needs a next stage that grows; remove it, or give that an operator")
    if following and following[0].continue_schedule:
        problems.append("the next stage cannot continue_schedule: with grow_when nobody knows where it would be")
    if stage.slope is not None and not stage.slope < 0:
        problems.append(f"slope={stage.slope} must be below 0: the loss falls as FLOPs are spent")
    return problems
