"""What begins with a stage: its model, optimizer, teacher and masks. Read pretrain/stages.py first."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grow.apply import reference_weights
from grow.distill import Distillation
from grow.from_data import Made
from grow.gradmax import GradMaxWeights, gradmax_columns
from grow.grown import GrownOptimizer, GrownWeights
from grow.learned import BETAS, LearnedGrowth
from grow.masks import mask_scales
from grow.operators import needs_data
from grow.plan_text import describe_growth
from grow.record import growth_record
from grow.registry import BATCH_SIZE
from grow.tensors import WithNoise
from lit_gpt.axes import parameter_shapes
from lit_gpt.checkpoint import TrainingCheckpoint, manifest_sha256, read_training, read_weights
from lit_gpt.config import Config
from lit_gpt.errors import DataError
from lit_gpt.model import GPT, Embedding, Linear
from pretrain.guards import Guard
from pretrain.loggers import say
from pretrain.optim import build_optimizer, load_named_state, named_state
from pretrain.parallel import build_model, replicate
from pretrain.stages import Stage
from pretrain.state import TrainState
from pretrain.training import Run, Trained


def set_up(run: Run, stage: Stage, weights: Mapping[str, Tensor], state: TrainState) -> Trained:
    """The model of a stage with its weights, as it trains under the stage's settings."""
    model = _build(run, stage.config, weights, stage.frozen)
    module = run.fabric.setup_module(
        replicate(model, run.config.parallel, run.world, run.fabric.device), move_to_device=False
    )
    optimizer = run.fabric.setup_optimizers(build_optimizer(model, stage.optimizer))
    guard = Guard(run.config.guards, run.fabric.device, state.guard)
    return Trained(model, module, optimizer, guard, _with_teacher(run, stage, model, state))


def _build(run: Run, config: Config, weights: Mapping[str, Tensor], frozen: Collection[str] = ()) -> GPT:
    return build_model(
        config,
        weights,
        run.compute,
        run.config.parallel,
        run.world,
        device=run.fabric.device,
        frozen=frozen,
    )


def _with_teacher(run: Run, stage: Stage, model: GPT, state: TrainState) -> Distillation | None:
    if state.stage != stage.index or not stage.is_taught(state.stage_step):
        return None  # of another stage: what the next one still learns to grow
    path = stage.teaching.path or _parent(run, stage, state)
    config = stage.teaching.config
    weights = read_weights(path, verify=path != run.checkpoints.last, processes=run.world)
    teacher = _build(run, config, weights, frozen=parameter_shapes(config))
    say(f"teacher: {path}, weight {stage.teaching.weight:g} of the loss for {stage.teaching.steps:,} steps")
    return Distillation(model, teacher, stage.teaching.weight)


def _parent(run: Run, stage: Stage, state: TrainState) -> Path:
    """The last checkpoint of the stage before, the same one however often the run was stopped since.

    Raises:
        DataError: it is gone, or is another one.
    """
    folder = run.checkpoints.folder / f"stage-{stage.index - 1:02d}"
    found = sorted(folder.glob("step-*"))
    record = state.history[-1] if stage.is_grown and state.grown_into_stage == stage.index else None
    if record is not None:
        found = [path for path in found if path.name == record["parent_path_name"]]
    if not found or (record is not None and manifest_sha256(found[-1]) != record["parent"]):
        raise DataError(
            f"the model of the stage before, from which stage {stage.name!r} grows or learns, is not in {folder}; "
            f"restore it, or start over with --fresh"
        )
    return found[-1]


def learn_to_grow(run: Run, stage: Stage, trained: Trained, state: TrainState) -> Trained:
    """The mixing matrices of a stage's growth as what trains, from where a checkpoint of it stands."""
    growth = LearnedGrowth(stage.plan, _read_parent(run, _parent(run, stage, state)).model)
    growth.model.compute_dtype = run.compute.compute_dtype
    growth.model.use_kernels(run.compute.kernels)
    module = run.fabric.setup_module(growth)
    optimizer = torch.optim.AdamW(
        growth.parameters(), lr=stage.learning.rate, betas=BETAS, weight_decay=0.0, fused=True
    )
    guard = trained.guard
    if not state.stage_step:
        guard = Guard(run.config.guards, run.fabric.device, _without_window(guard))
    learning = Trained(trained.model, module, run.fabric.setup_optimizers(optimizer), guard, growth=growth)
    saved = run.checkpoints.learning
    if state.stage_step:
        if saved is None:
            raise DataError(f"{run.checkpoints.last} holds no mixing matrices of the growth that it was learning")
        with torch.no_grad():
            for name, parameter in growth.named_parameters():
                parameter.copy_(saved["matrices"][name])
        load_named_state(growth, optimizer, saved["moments"])
    return learning


def learned_so_far(trained: Trained) -> dict[str, Any] | None:
    """Mixing matrices and their moments by name, for a checkpoint; None if no growth is being learned."""
    if trained.growth is None:
        return None
    matrices = {name: parameter.detach().cpu() for name, parameter in trained.growth.named_parameters()}
    return {"matrices": matrices, "moments": named_state(trained.growth, trained.optimizer.optimizer)}


def enter_stage(run: Run, stage: Stage, trained: Trained, state: TrainState) -> Trained:
    """The model of a stage, from the one trained so far, which must not be used afterwards."""
    state.guard = _without_window(trained.guard)
    entered = _grown(run, stage, trained, state) if stage.is_grown else _taken_over(run, stage, state)
    state.grown_into_stage = stage.index
    return entered


def _without_window(guard: Guard) -> dict[str, Any]:
    """What a guard goes on from when another model begins to train, which has another loss."""
    return {**guard.to_dict(), "window": []}


def _grown(run: Run, stage: Stage, trained: Trained, state: TrainState) -> Trained:
    """From the checkpoint that the stage before ended with: weights and moments need not be whole on any process."""
    parent = _parent(run, stage, state)
    checkpoint = _read_parent(run, parent)
    made = _make(run, stage, trained, state, checkpoint.model)
    moments = GrownOptimizer(stage.plan, checkpoint.optimizer, stage.optimizer_policy)
    state.history.append(
        growth_record(
            made.plan,
            stage.optimizer_policy,
            parent=manifest_sha256(parent),
            parent_path_name=parent.name,
            step_count=state.step_count,
            tokens=state.parent_tokens + state.tokens,
            flops_total=state.total_flops.paper,
            growth_flops=made.flops,
        )
    )
    state.flops += made.flops
    state.flops_computed += made.flops.paper
    grown = set_up(run, stage, made.weights, state)
    load_trainable_state(grown, moments)
    say(f"growth: {made.plan.operator} {describe_growth(made.plan)}, optimizer state: {stage.optimizer_policy}")
    return grown


def _read_parent(run: Run, parent: Path) -> TrainingCheckpoint:
    """What the stage before ended with; unless it was just written or resumed from, its checksums are compared."""
    return read_training(parent, verify=parent != run.checkpoints.last, processes=run.world)


def _make(run: Run, stage: Stage, trained: Trained, state: TrainState, source: Mapping[str, Tensor]) -> Made:
    """The weights of a stage's model. What was learned is charged already; a gradient on a batch is not."""
    plan = stage.plan
    if trained.growth is not None:
        learned = {"steps": stage.learning.steps, "rate": stage.learning.rate, "last_step": state.step_count}
        return Made(dataclasses.replace(plan, data=learned), WithNoise(plan, trained.growth.materialise()))
    if needs_data(plan):
        rows = run.train.packed.samples(state.position, min(BATCH_SIZE, run.config.batch.global_batch_size))
        found = gradmax_columns(plan, source, torch.from_numpy(rows), run.train.separator_id)
        read = {"position": state.position, "batch_size": len(rows), "neurons_not_converged": found.n_open}
        made = WithNoise(plan, GradMaxWeights(plan, source, found.columns))
        return Made(dataclasses.replace(plan, data=read), made, found.flops)
    return Made(plan, GrownWeights(plan, source, reference=reference_weights(plan, stage.reference)))


def _taken_over(run: Run, stage: Stage, state: TrainState) -> Trained:
    """The same model under other settings: what goes on training keeps its moments."""
    checkpoint = _read_parent(run, _parent(run, stage, state))
    entered = set_up(run, stage, checkpoint.model, state)
    load_trainable_state(entered, checkpoint.optimizer)
    return entered


def load_trainable_state(trained: Trained, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Moments of the parameters that train; those of frozen ones, and those of another optimizer, are dropped."""
    trains = {name for name, parameter in trained.model.named_parameters() if parameter.requires_grad}
    own = {name: moments[name] for name in moments if name in trains}
    n_without = load_named_state(trained.model, trained.optimizer.optimizer, own)
    if n_without:
        say(f"{n_without} parameters start without moments: those of the checkpoint are another optimizer's")


def closed_parts(stage: Stage, done_steps: int) -> dict[str, float] | None:
    """c of every part of a masked growth in the last of `done_steps` steps; None once all of it is open."""
    if stage.mask is None or done_steps >= stage.mask.total_steps:
        return None
    return stage.mask.openness(max(0, done_steps - 1))


def set_masks(stage: Stage, trained: Trained, stage_step: int) -> None:
    """Open the new parts of a masked growth as far as the step after `stage_step` finished ones has them."""
    if stage.mask is None:
        return
    openness = closed_parts(stage, stage_step + 1)
    if openness is None:
        for module in trained.model.modules():
            if isinstance(module, Linear | Embedding):
                module.weight_scale = None
        return
    for name, scale in mask_scales(stage.plan, openness).items():
        layer = trained.model.get_submodule(name.removesuffix(".weight"))
        if layer.weight_scale is None:
            layer.weight_scale = scale.to(layer.weight.device)
        else:
            layer.weight_scale.copy_(scale)  # in place: a compiled block sees the same tensor with other values
