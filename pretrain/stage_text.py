"""A stage as lines of text: what a run says of it before anything is computed. Read pretrain/stages.py first."""

from __future__ import annotations

from collections.abc import Iterator

from grow.layer_map import layer_texts
from grow.plan import GrowthPlan
from grow.plan_text import describe_growth
from lit_gpt.axes import parameter_shapes
from pretrain.stages import Stage


def stage_lines(stage: Stage) -> Iterator[str]:
    """Sizes, growth and everything in which the stage's training is its own."""
    sizes = stage.config.to_dict().items()
    yield ", ".join(f"{key}={value}" for key, value in sizes if value != "")
    if stage.plan is not None:
        yield from growth_lines(stage.plan, stage.optimizer_policy)
    yield describe_rate(stage)
    if stage.slope is not None:
        yield f"ends before that once log loss over log FLOPs is not below {stage.slope:g} (the last doubling of FLOPs)"
    if stage.learning is not None:
        yield f"the first {stage.learning.steps:,} steps learn the growth, at a rate from {stage.learning.rate:g} to 0"
    if stage.mask is not None:
        yield f"masks of new parts open over {stage.mask.total_steps:,} steps, {stage.mask.phases}"
    if stage.frozen:
        n_tensors = len(parameter_shapes(stage.config))
        yield f"frozen: {len(stage.frozen)} of {n_tensors} tensors; {n_tensors - len(stage.frozen)} train"
    if stage.teaching is not None:
        teacher = stage.teaching.path or "the model of the stage before"
        last = min(stage.teaching.steps, stage.steps)
        yield f"teacher: {teacher}, weight {stage.teaching.weight:g} of the loss until step {last:,}"


def growth_lines(plan: GrowthPlan, optimizer_policy: str) -> Iterator[str]:
    options = {**plan.options, **({"noise": plan.noise} if plan.noise else {}), "seed": plan.seed}
    asked = ", ".join(f"{key} {value}" for key, value in options.items())
    yield f"grown by {plan.operator}: {describe_growth(plan)} ({asked}), optimizer state: {optimizer_policy}"
    if plan.width is None or plan.src.n_layer != plan.dst.n_layer:
        layers = " ".join(layer_texts(plan.layer_map, **plan.marks))
        yield f"layer map {layers}, R_c {plan.connection_rate}"


def describe_rate(stage: Stage) -> str:
    """The learning rate over a stage; that of a warm-up begins at 0."""
    schedule, optimizer = stage.schedule, stage.optimizer
    rates = f"learning rate {optimizer.learning_rate:g}, {schedule.kind} to {optimizer.min_learning_rate:g}"
    if schedule.kind == "wsd":
        share = f"over the last {schedule.decay_steps:,} of {stage.schedule_steps:,} steps"
        fall = f"falls to {optimizer.min_learning_rate:g} {share}" if schedule.decay_steps else "constant"
        rates = f"learning rate {optimizer.learning_rate:g}, wsd: {fall}"
    if stage.schedule_start:
        rises = f", rises again over {stage.rewarmup_steps:,} steps" if stage.rewarmup_steps else ""
        return f"{rates}; continues the schedule at step {stage.schedule_start:,} of {stage.schedule_steps:,}{rises}"
    return f"{rates}; {schedule.warmup_steps:,} steps of warm-up"
