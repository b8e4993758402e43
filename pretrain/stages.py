"""A run is a list of stages; growth happens between two calls of fit, never inside one. Read grow/plan.py first."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from grow.operators import needs_data, plan_growth, with_depth
from grow.plan import GrowthPlan
from lit_gpt.config import Config
from pretrain.config import OptimizerConfig, RunConfig, ScheduleConfig, StageConfig, parse_token_count


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
    """How the model of the stage before becomes this one's; None for the first."""
    optimizer_policy: str

    @property
    def is_grown(self) -> bool:
        return self.plan is not None


def plan_stages(run: RunConfig, model: Config) -> list[Stage]:
    """Resolve sizes, lengths and growth of every stage, so that a mistake in the last one shows before step 0.

    Args:
        run: the run's settings.
        model: sizes of the last stage's model.

    Raises:
        ValueError: sizes, lengths or layer maps that do not fit.
    """
    stages: list[Stage] = []
    for index, settings in enumerate(run.stages, 1):
        config = _stage_config(settings, model)
        plan = _plan(settings, stages[-1].config, config, run.seed) if stages else None
        stages.append(
            Stage(
                index=index,
                name=settings.name,
                config=config,
                steps=_stage_steps(settings, config, run.batch.global_batch_size),
                optimizer=dataclasses.replace(run.optimizer, **_given(settings, "learning_rate", "min_learning_rate")),
                schedule=dataclasses.replace(run.schedule, **_given(settings, "warmup_steps")),
                plan=plan,
                optimizer_policy=settings.optimizer_policy,
            )
        )
    return stages


def _stage_config(settings: StageConfig, model: Config) -> Config:
    if settings.n_layer is None or settings.n_layer == model.n_layer:
        return model
    return with_depth(model, settings.n_layer)


def _plan(settings: StageConfig, src: Config, dst: Config, seed: int) -> GrowthPlan:
    try:
        plan = plan_growth(settings.operator or "", src, n_layer=dst.n_layer, layer_map=settings.layer_map, seed=seed)
        if needs_data(plan):
            raise ValueError(f"{plan.operator} reads data to grow; let `grow apply --data` do it between two runs")
        return plan
    except ValueError as error:
        raise ValueError(f"stage {settings.name!r} cannot grow from {src.n_layer} layers: {error}") from error


def _stage_steps(settings: StageConfig, config: Config, global_batch_size: int) -> int:
    if settings.max_steps is not None:
        steps = settings.max_steps
        rule = f"max_steps={steps} must be at least 1"
    else:
        tokens_per_step = global_batch_size * config.block_size
        steps = parse_token_count(settings.max_tokens or 0) // tokens_per_step
        rule = f"max_tokens={settings.max_tokens} is less than one step of {tokens_per_step:,} tokens"
    if steps < 1:
        raise ValueError(f"stage {settings.name!r}: {rule}")
    return steps


def _given(stage: StageConfig, *fields: str) -> dict[str, Any]:
    """The fields that the stage sets for itself."""
    return {name: value for name in fields if (value := getattr(stage, name)) is not None}
