"""What a training loop holds: the run, the model that is being trained, and what a step of it costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grow.learned import LearnedGrowth
from grow.planning.devices import peak_flops_per_sec
from lit_gpt.flops import Flops, computed_share, flops_per_token
from lit_gpt.model import GPT
from pretrain.checkpointing import RunCheckpoints
from pretrain.compilation import compile_secs
from pretrain.config import RunConfig
from pretrain.data import TrainData
from pretrain.guards import Guard
from pretrain.held_out import ValidationSet
from pretrain.loggers import Log
from pretrain.parallel import Compute
from pretrain.signals import StopSignal
from pretrain.stages import Stage
from pretrain.state import TrainState
from pretrain.world import World
from pretrain.zero_shot.suite import Suite

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step of a run to its last."""

    config: RunConfig
    stages: list[Stage]
    fabric: Fabric
    world: World
    compute: Compute
    train: TrainData
    validation: list[ValidationSet]
    zero_shot: Suite | None
    checkpoints: RunCheckpoints
    log: Log
    stop: StopSignal

    def flops_left(self, state: TrainState) -> float:
        """Paper-convention training FLOPs until the run's end, for the time left."""
        later = [stage_flops(self.config, stage).paper for stage in self.stages if stage.index > state.stage]
        return sum(later) + stage_flops(self.config, self.stages[state.stage - 1], state.stage_step).paper


@dataclass
class Trained:
    """The model that is being trained and its optimizer; all of it is replaced when a stage begins."""

    model: GPT
    module: nn.Module
    """The model as Fabric calls it."""
    optimizer: Any
    """AdamW behind Fabric's step."""
    guard: Guard
    """Judges its steps."""
    taught: nn.Module | None = None
    """The model beside its teacher: called instead of `module` in training steps as long as the teacher stays."""
    growth: LearnedGrowth | None = None
    """A growth that is being learned: its mixing matrices are what trains, and `model` is what it grows."""
    compile_secs_told: float = field(default_factory=compile_secs)
    """What the log has told of the seconds spent compiling."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What trains."""
        return [p for p in (self.growth or self.model).parameters() if p.requires_grad]


def mfu(run: Run, stage: Stage, tokens_per_sec: float) -> float | None:
    """Share of what all devices could compute at most, by the convention of PaLM (lit_gpt/flops.py) and their peak in
    bf16; None where that is not known, as for a CPU."""
    if run.fabric.device.type != "cuda":
        return None
    peak = peak_flops_per_sec(torch.cuda.get_device_name(run.fabric.device))
    return peak and flops_per_token(stage.config).palm * tokens_per_sec / (peak * run.world.size)


def peak_memory(run: Run) -> int | None:
    """Most bytes that tensors have held on the CUDA device of this process since it started; None on a CPU."""
    device = run.fabric.device
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def tokens_per_step(config: RunConfig, stage: Stage) -> int:
    return config.batch.global_batch_size * stage.config.block_size


def step_flops(config: RunConfig, stage: Stage, stage_step: int) -> Flops:
    """Of the optimizer step after `stage_step` finished ones: a whole training step, and a teacher's forward pass."""
    per_token = flops_per_token(stage.config)
    if stage.is_taught(stage_step):
        per_token += _teacher_flops(stage)
    return per_token.times(tokens_per_step(config, stage))


def stage_flops(config: RunConfig, stage: Stage, first_step: int = 0) -> Flops:
    """Of a stage from a step on."""
    total = flops_per_token(stage.config).times(stage.steps - first_step)
    if stage.teaching is not None:
        total += _teacher_flops(stage).times(stage.taught_steps(first_step))
    return total.times(tokens_per_step(config, stage))


def _teacher_flops(stage: Stage) -> Flops:
    """A forward pass for one token: a third of forward and backward."""
    return flops_per_token(stage.teaching.config).times(1 / 3)


def step_flops_computed(config: RunConfig, stage: Stage, stage_step: int) -> float:
    """As `step_flops` in the paper's convention, without the gradients that frozen parameters make unnecessary."""
    charged = step_flops(config, stage, stage_step).paper
    own = flops_per_token(stage.config).paper * tokens_per_step(config, stage)
    return charged - own * (1 - computed_share(stage.config, stage.frozen))
