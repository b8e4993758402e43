"""A run is a list of stages; growth happens between two calls of fit, never inside one. Read grow/plan.py first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grow.apply import read_reference
from grow.grown import check_policy
from grow.learned import default_rate
from grow.masks import DEFAULT_STEPS, MaskSchedule
from grow.operators import in_sizes, is_learned, operator, plan_growth
from grow.plan import GrowthPlan, differing_sizes
from grow.registry import LEARN_STEPS, SIZES
from grow.trainable import trainable_parameters
from lit_gpt.axes import parameter_shapes
from lit_gpt.checkpoint import find_checkpoint, read_config
from lit_gpt.config import Config
from lit_gpt.counts import parse_token_count
from lit_gpt.kernels.fp8 import MULTIPLE, count_fp8
from pretrain.config import OptimizerConfig, RunConfig, ScheduleConfig, StageConfig
from pretrain.loss_slope import DEFAULTS
from pretrain.optim import learning_rate


@dataclass(frozen=True)
class Teaching:
    """A teacher beside the model, for the first steps of a stage."""

    weight: float
    """Its share of the loss."""
    steps: int
    config: Config
    """Of the teacher."""
    path: Path | None
    """Its checkpoint; None: the last one of the stage before."""


@dataclass(frozen=True)
class Learning:
    """The first steps of a stage whose growth is learned: they train mixing matrices, and then the model is grown."""

    steps: int
    rate: float
    """Learning rate of the first step; it falls linearly to 0."""


@dataclass(frozen=True)
class Stage:
    """One call of fit, with everything resolved."""

    index: int
    """Counts from 1."""
    name: str
    config: Config
    steps: int
    """Optimizer updates of this stage."""
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    plan: GrowthPlan | None
    """How the model of the stage before becomes this one's; None if nothing grows."""
    optimizer_policy: str
    schedule_start: int = 0
    """Steps of its schedule that lie before this stage."""
    schedule_steps: int = 0
    """Length of its schedule, over all stages that share it."""
    rewarmup_steps: int = 0
    frozen: frozenset[str] = frozenset()
    """Parameters that do not train."""
    mask: MaskSchedule | None = None
    teaching: Teaching | None = None
    learning: Learning | None = None
    slope: float | None = None
    """Of log loss against log FLOPs, at which the stage ends before its steps are done; None: when they are."""
    reference: Path | None = None
    """Checkpoint that the growth takes layers from beside the source."""

    @property
    def is_grown(self) -> bool:
        return self.plan is not None

    @property
    def first_step(self) -> int:
        """Steps of this stage that are done when its model is there: those that learn how to grow it."""
        return 0 if self.learning is None else self.learning.steps

    def is_taught(self, stage_step: int) -> bool:
        """Whether the teacher takes part in the step after `stage_step` finished ones."""
        return self.teaching is not None and self.first_step <= stage_step < self.teaching.steps

    def taught_steps(self, done_steps: int = 0) -> int:
        """Steps after the first `done_steps` in which the teacher takes part."""
        if self.teaching is None:
            return 0
        return max(0, min(self.teaching.steps, self.steps) - max(self.first_step, done_steps))

    def learning_rate(self, stage_step: int) -> float:
        """Of the update after `stage_step` finished ones of this stage."""
        if stage_step < self.first_step:
            return self.learning.rate * (1 - stage_step / self.learning.steps)
        done = stage_step - self.first_step
        rate = learning_rate(self.schedule_start + done, self.schedule_steps, self.optimizer, self.schedule)
        return rate * min(1.0, (done + 1) / self.rewarmup_steps) if self.rewarmup_steps else rate


def plan_stages(run: RunConfig, model: Config, grown_by: GrowthPlan | None = None) -> list[Stage]:
    """Resolve sizes, lengths and growth of every stage, so that a mistake in the last one shows before step 0.

    Args:
        run: the run's settings.
        model: sizes of the last stage's model.
        grown_by: the growth that made the checkpoint which the run starts from, if it was made by one.

    Raises:
        ValueError: sizes, lengths, layer maps or other settings that do not fit.
        DataError, OSError: a teacher that cannot be read.
    """
    stages: list[Stage] = []
    for index, settings in enumerate(run.stages, 1):
        before = stages[-1] if stages else None
        try:
            stages.append(_stage(run, settings, index, before, model, grown_by))
        except ValueError as error:
            raise ValueError(f"stage {settings.name!r}: {error}") from error
    return _with_schedule_lengths(stages)


def _stage(
    run: RunConfig,
    settings: StageConfig,
    index: int,
    before: Stage | None,
    model: Config,
    grown_by: GrowthPlan | None,
) -> Stage:
    config = in_sizes(model, vars(settings))
    plan = None
    if before is not None:
        config = dataclasses.replace(config, norm_eps=before.config.norm_eps)  # an operator may have changed it
        plan = _plan(settings, before.config, config, run.seed)
    if plan is not None:
        check_policy(plan, settings.optimizer_policy)
        config = dataclasses.replace(plan.dst, name=config.name)
    steps = _stage_steps(settings, config, run.batch.global_batch_size, at_least=int(not _only_hands_on(run, index)))
    continued = before is not None and settings.continue_schedule
    stage = Stage(
        index=index,
        name=settings.name,
        config=config,
        steps=steps,
        optimizer=dataclasses.replace(run.optimizer, **_given(settings, "learning_rate", "min_learning_rate")),
        schedule=before.schedule
        if continued
        else dataclasses.replace(run.schedule, **_given(settings, "warmup_steps")),
        plan=plan,
        optimizer_policy=settings.optimizer_policy,
        schedule_start=_schedule_end(before) if continued else 0,
        rewarmup_steps=settings.rewarmup_steps,
        frozen=_frozen(settings, config, plan or (grown_by if before is None else None)),
        mask=_mask(settings, plan, steps),
        teaching=_teaching(settings, plan, config, steps, before),
        learning=_learning(plan, steps),
        slope=_slope(settings, run.stages[index : index + 1]),
        reference=None
        if plan is None or plan.reference is None
        else find_checkpoint(str(settings.options["reference"])),
    )
    if run.fp8 != "none":
        _check_fp8(stage)
    if stage.teaching is not None and not stage.taught_steps():
        raise ValueError(
            f"distill_steps={stage.teaching.steps} has no effect: they count from the beginning of the stage, whose "
            f"first {stage.first_step} steps learn how to grow, without a teacher; give more"
        )
    return stage


def _plan(settings: StageConfig, src: Config, dst: Config, seed: int) -> GrowthPlan | None:
    """The growth into a stage; sizes that stay are not named, so that an operator need not take them."""
    changed = differing_sizes(src, dst)
    if settings.operator is None:
        if changed:
            lines = ", ".join(f"{name} {getattr(src, name)} -> {getattr(dst, name)}" for name in changed)
            raise ValueError(f"the model grows ({lines}), and no operator says how; see `grow operators`")
        return None
    wider = any(name in changed for name in (*SIZES, "head_size"))
    taken = operator(settings.operator, in_width=wider).options
    named = [name for name in SIZES if name in changed or (wider and name in taken)]
    if "n_layer" in changed or not wider:
        named.append("n_layer")
    sizes = {name: getattr(dst, name) for name in named}
    try:
        plan = plan_growth(
            settings.operator, src, layer_map=settings.layer_map, **{"seed": seed, **_options(settings), **sizes}
        )
    except ValueError as error:
        raise ValueError(f"it cannot grow from {src.n_layer} layers of width {src.n_embd}: {error}") from error
    other = [name for name in differing_sizes(plan.dst, dst) if name != "norm_eps"]
    if other:
        lines = ", ".join(f"{name} {getattr(plan.dst, name)}, not {getattr(dst, name)}" for name in other)
        raise ValueError(f"{plan.operator} leads to another model ({lines}); adapt the sizes of the stage")
    return plan


def _options(settings: StageConfig) -> dict[str, Any]:
    """What plan_growth takes beyond sizes."""
    named = [name for name in settings.options if name in ("n_layer", *SIZES, "factor", "layer_map")]
    if named:
        raise ValueError(f"options holds {', '.join(named)}; sizes and layer_map stand beside `options`")
    read = [name for name in settings.options if name in ("batch_size", "data")]
    if read:
        raise ValueError(f"options holds {' and '.join(read)}; a stage grows from the batches of its own run")
    options = dict(settings.options)
    if "reference" in options:
        options["reference"] = read_reference(find_checkpoint(str(options["reference"])))
    return options


def _learning(plan: GrowthPlan | None, steps: int) -> Learning | None:
    if plan is None or not is_learned(plan):
        return None
    learn_steps = plan.options.get("learn_steps", LEARN_STEPS)
    if learn_steps >= steps:
        raise ValueError(
            f"{plan.operator} learns for {learn_steps} steps and the stage has {steps}; "
            f"give options: {{learn_steps: {max(1, steps // 4)}}}, or more steps"
        )
    return Learning(learn_steps, plan.options.get("learn_rate", default_rate(plan)))


def _only_hands_on(run: RunConfig, index: int) -> bool:
    """Whether a stage may be without steps: the first, which then is init_from as it is, for the second to grow."""
    return index == 1 and run.init_from is not None and len(run.stages) > 1


def _slope(settings: StageConfig, following: Sequence[StageConfig]) -> float | None:
    if settings.grow_when is None:
        return None
    axis = operator(following[0].operator).axis
    return settings.slope if settings.slope is not None else DEFAULTS.get(axis, DEFAULTS["width"])


def _stage_steps(settings: StageConfig, config: Config, global_batch_size: int, at_least: int) -> int:
    if settings.max_steps is not None:
        steps = settings.max_steps
        rule = f"max_steps={steps} must be at least {at_least}"
    else:
        tokens_per_step = global_batch_size * config.block_size
        steps = parse_token_count(settings.max_tokens or 0) // tokens_per_step
        rule = (
            f"max_tokens={settings.max_tokens} is less than one step of {tokens_per_step:,} tokens "
            f"(batch.global_batch_size={global_batch_size} samples of block_size={config.block_size}); "
            f"give more tokens, or lower one of the two"
        )
    if steps < at_least:
        raise ValueError(rule)
    return steps


def _frozen(settings: StageConfig, config: Config, plan: GrowthPlan | None) -> frozenset[str]:
    which = settings.trainable
    if which == "auto":
        which = operator(settings.operator).trainable if settings.operator else "all"
    if which == "all":
        return frozenset()
    if plan is None or differing_sizes(plan.dst, config):
        raise ValueError(
            f"trainable={which!r} needs a growth that says what is new: an operator in this stage, or, in the first "
            f"one, an init_from that `grow apply` made; use 'all'"
        )
    return frozenset(parameter_shapes(config)) - trainable_parameters(plan, which)


def _mask(settings: StageConfig, plan: GrowthPlan | None, steps: int) -> MaskSchedule | None:
    if plan is None or not operator(plan.operator).masked:
        if settings.mask_steps is not None:
            raise ValueError("mask_steps belongs to the operators random-depth and random-width; remove it")
        return None
    if settings.mask_steps == 0:
        return None
    mask = MaskSchedule(settings.mask_steps or DEFAULT_STEPS, settings.mask_phases)
    if mask.total_steps > steps:
        raise ValueError(
            f"the mask of {plan.operator} opens over {mask.total_steps:,} steps and the stage has {steps:,}; "
            f"give mask_steps, e.g. {max(1, steps // (2 * mask.total_steps // mask.steps))}, or 0 to open at once"
        )
    return mask


def _check_fp8(stage: Stage) -> None:
    """Refuse a stage whose products cannot be made in 8 bits.

    Raises:
        ValueError: it masks weights, or its sizes do not fit.
    """
    if stage.mask is not None:
        raise ValueError("the mask of a growth does not go with fp8: 8-bit products know none; give mask_steps: 0")
    if stage.config.block_size % MULTIPLE:
        raise ValueError(f"fp8 needs a block_size that is a multiple of {MULTIPLE}, not {stage.config.block_size}")
    if not count_fp8(stage.config)[0]:
        raise ValueError(f"fp8 has no effect: no linear layer of a block has sizes that are multiples of {MULTIPLE}")


def _teaching(
    settings: StageConfig, plan: GrowthPlan | None, config: Config, steps: int, before: Stage | None
) -> Teaching | None:
    default = 1.0 if plan is not None and plan.operator == "distill" else 0.0
    weight = default if settings.distill_weight is None else settings.distill_weight
    if not weight:
        given = _given(settings, "distill_steps", "teacher")
        if given:
            raise ValueError(f"{', '.join(given)} has no effect without distill_weight; give it or remove them")
        return None
    path = None if settings.teacher is None else find_checkpoint(settings.teacher)
    if path is None and before is None:
        raise ValueError("distill_weight in the first stage has no stage before it to learn from; give teacher: PATH")
    teacher = read_config(path) if path is not None else before.config
    if teacher.padded_vocab_size != config.padded_vocab_size:
        raise ValueError(
            f"the teacher has {teacher.padded_vocab_size} embedding rows, the model {config.padded_vocab_size}; "
            f"they need one vocabulary"
        )
    if teacher.block_size < config.block_size:
        raise ValueError(
            f"the teacher sees {teacher.block_size} tokens, the model {config.block_size}; use a block_size it can see"
        )
    return Teaching(weight, settings.distill_steps or steps, teacher, path)


def _with_schedule_lengths(stages: list[Stage]) -> list[Stage]:
    """Every stage with the length of its schedule, which is known once the last stage that shares it is."""
    ends, end = [], 0
    for stage, following in reversed(list(zip(stages, [*stages[1:], None], strict=True))):
        if following is None or following.schedule_start == 0:
            end = _schedule_end(stage)
        ends.append(end)
    return [dataclasses.replace(stage, schedule_steps=n) for stage, n in zip(stages, reversed(ends), strict=True)]


def _schedule_end(stage: Stage) -> int:
    return stage.schedule_start + stage.steps - stage.first_step


def _given(stage: StageConfig, *fields: str) -> dict[str, Any]:
    """The fields that the stage sets for itself."""
    return {name: value for name in fields if (value := getattr(stage, name)) is not None}
