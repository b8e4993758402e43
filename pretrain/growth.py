"""What begins with a stage: its model, optimizer, teacher and masks. Read pretrain/stages.py first."""

from __future__ import annotations

from pathlib import Path

from grow.apply import grow_optimizer, grow_weights, growth_record
from grow.distill import Distillation
from grow.masks import mask_scales
from lit_gpt.checkpoint import manifest_sha256, read_weights
from lit_gpt.errors import DataError
from lit_gpt.model import GPT, Embedding, Linear
from pretrain.loggers import say
from pretrain.optim import build_optimizer, load_named_state, named_state
from pretrain.parallel import prepare_model
from pretrain.stages import Stage
from pretrain.state import TrainState
from pretrain.training import Run, Trained


def set_up(run: Run, stage: Stage, model: GPT, state: TrainState) -> Trained:
    """A model with its weights becomes one that trains under the stage's settings."""
    prepare_model(model, run.compute, run.fabric.device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in stage.frozen)
    module = run.fabric.setup_module(model)
    optimizer = run.fabric.setup_optimizers(build_optimizer(model, stage.optimizer))
    return Trained(model, module, optimizer, _with_teacher(run, stage, model, state))


def _with_teacher(run: Run, stage: Stage, model: GPT, state: TrainState) -> Distillation | None:
    if not stage.is_taught(state.stage_step):
        return None
    path = stage.teaching.path or _parent(run, stage, state)
    teacher = GPT(stage.teaching.config)
    teacher.load_state_dict(dict(read_weights(path)))
    teacher.requires_grad_(False)
    prepare_model(teacher, run.compute, run.fabric.device)
    say(f"teacher: {path}, {stage.teaching.weight:g} of the loss for {stage.teaching.steps:,} steps")
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
            f"the teacher of stage {stage.name!r}, the model of the stage before, is not in {folder}; "
            f"restore it, or give `teacher`"
        )
    return found[-1]


def enter_stage(run: Run, stage: Stage, trained: Trained, state: TrainState) -> Trained:
    """The model of a stage, from the one trained so far, which must not be used afterwards."""
    entered = _grown(run, stage, trained, state) if stage.is_grown else _taken_over(run, stage, trained, state)
    state.grown_into_stage = stage.index
    return entered


def _grown(run: Run, stage: Stage, trained: Trained, state: TrainState) -> Trained:
    plan, parent = stage.plan, run.checkpoints.last
    assert plan is not None and parent is not None, "a stage ends with a checkpoint"
    model = GPT(stage.config)
    model.load_state_dict(grow_weights(plan, trained.model.state_dict()))
    moments = grow_optimizer(plan, named_state(trained.model, trained.optimizer.optimizer), stage.optimizer_policy)
    state.history.append(
        growth_record(
            plan,
            stage.optimizer_policy,
            parent=manifest_sha256(parent),
            parent_path_name=parent.name,
            step_count=state.step_count,
            tokens=state.parent_tokens + state.tokens,
            flops_total=state.total_flops.paper,
        )
    )
    grown = set_up(run, stage, model, state)
    load_trainable_state(grown, moments)
    say(
        f"growth: {plan.operator} {plan.src.n_layer} -> {plan.dst.n_layer} layers, R_c {plan.connection_rate}, "
        f"optimizer state: {stage.optimizer_policy}"
    )
    return grown


def _taken_over(run: Run, stage: Stage, trained: Trained, state: TrainState) -> Trained:
    """The same model under other settings: what goes on training keeps its moments."""
    moments = named_state(trained.model, trained.optimizer.optimizer)
    model = GPT(stage.config)
    model.load_state_dict(trained.model.state_dict())
    entered = set_up(run, stage, model, state)
    load_trainable_state(entered, moments)
    return entered


def load_trainable_state(trained: Trained, moments: dict) -> None:
    """Moments of the parameters that train; those of frozen ones are dropped."""
    trains = {name for name, parameter in trained.model.named_parameters() if parameter.requires_grad}
    load_named_state(
        trained.model,
        trained.optimizer.optimizer,
        {name: slots for name, slots in moments.items() if name in trains},
    )


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
