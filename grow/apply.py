"""Carry a growth plan out: weights and optimizer moments in memory, or one checkpoint into another."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grow.check import check_weights, inspect_checkpoint
from grow.from_data import Made, make_from_data
from grow.grown import GrownOptimizer, GrownWeights, OptimizerState, check_optimizer, copied_parameters
from grow.operators import needs_data
from grow.plan import GrowthPlan, Reference, differing_sizes
from grow.record import grown_state, growth_record, summary
from grow.samples import Samples
from lit_gpt.atomic import MANIFEST, directory_problems
from lit_gpt.axes import EMBEDDING
from lit_gpt.checkpoint import (
    EARLIER,
    TRAINING,
    TrainingCheckpoint,
    check_open,
    detect_form,
    manifest_sha256,
    prune_temporaries,
    read_config,
    read_exchange,
    read_training,
    read_weights,
    stored_name,
    write_exchange,
    write_training,
)
from lit_gpt.checkpoint import verify as checkpoint_problems
from lit_gpt.config import Config
from lit_gpt.errors import DataError
from lit_gpt.exchange_files import LitWeights
from lit_gpt.exchange_writer import Copies
from lit_gpt.lazy_tensors import CastWeights, spec_of
from lit_gpt.problems import raise_problems
from lit_gpt.stored_state import flops_behind, flops_with, tokens_behind
from lit_gpt.tokenizer import holds_tokenizer

SMALL_FILE_BYTES = 1 << 24  # whose content is checked in any case; larger ones only if they are read


def make_weights(
    plan: GrowthPlan,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    *,
    reference: Mapping[str, Tensor] | None = None,
    samples: Samples | None = None,
) -> Made:
    """The grown model of any plan. Only plans that need training samples do work here and now.

    Args:
        plan: what to do.
        weights: of the source.
        dtype: to cast them to first; None keeps theirs.
        reference: weights of the plan's reference, if it has one.
        samples: training samples for the source; plans that need none leave them alone.

    Raises:
        ValueError: a plan that needs samples, and none are given.
        DataError: samples that are too few or of another vocabulary.
        NonFiniteError: a loss or a gradient on the samples is not a number.
    """
    if samples is None or not needs_data(plan):
        return Made(plan, GrownWeights(plan, weights, dtype, reference))
    return make_from_data(plan, weights if dtype is None else CastWeights(weights, dtype), samples)


def grow_weights(
    plan: GrowthPlan, weights: Mapping[str, Tensor], reference: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A state dict of the grown model; `weights` stays as it was and shares no storage with it.

    Args:
        plan: what to do.
        weights: name -> tensor with the names and shapes of `parameter_shapes(plan.src)`, any dtype and device.
        reference: those of the plan's reference, if it has one; they are cast to the dtype of `weights`.

    Returns:
        Name -> tensor with the names and shapes of `parameter_shapes(plan.dst)`, in that order.

    Raises:
        DataError: the weights are not those of a model of the plan's source sizes.
    """
    check_weights(plan.src, weights, "the source", allow_non_finite=True)
    grown = dict(GrownWeights(plan, weights, reference=reference))
    check_weights(plan.dst, grown, "the grown model", allow_non_finite=True)
    return grown


def grow_optimizer(
    plan: GrowthPlan, optimizer_state: OptimizerState, policy: str = "reset"
) -> dict[str, dict[str, Tensor]]:
    """The optimizer state that the grown model starts from; the source's is left as it was.

    Args:
        plan: what was done to the weights.
        optimizer_state: of the source, one entry per parameter.
        policy: one of OPTIMIZER_POLICIES. "reset" gives {}: no state, as in a new optimizer.

    Raises:
        ValueError: unknown policy, or one that needs moments where there are none.
        DataError: parameters are missing or unexpected in the optimizer state.
    """
    return {name: dict(slots) for name, slots in GrownOptimizer(plan, optimizer_state, policy).items()}


def grow_checkpoint(
    src_path: str | Path,
    dst_path: str | Path,
    plan: GrowthPlan,
    policy: str = "reset",
    *,
    allow_non_finite: bool = False,
    dtype: torch.dtype | None = None,
    reference_path: str | Path | None = None,
    samples: Samples | None = None,
) -> dict[str, Any]:
    """Grow a checkpoint into a new one of the same form; all or nothing, and the source is only read.

    A grown training form starts a run of its own at step 0: it keeps the data position, the seed and the growth
    history of its parent, and carries the parent's tokens and FLOPs as `parent_tokens` and `parent_flops`.

    Args:
        src_path: a checkpoint in training form or in exchange form.
        dst_path: the checkpoint to make.
        plan: what to do; its source sizes must be the checkpoint's.
        policy: one of OPTIMIZER_POLICIES. Exchange form has no optimizer state, so "reset" is all it can do.
        allow_non_finite: grow weights that hold NaN or infinity too.
        dtype: of the grown weights; None keeps that of the source. Moments keep theirs.
        reference_path: the checkpoint, of either form, of the plan's reference, see `read_reference`.
        samples: for plans that need training samples; their FLOPs are charged to the grown checkpoint.

    Returns:
        The receipt: source, destination, form, operator, layer_map, connection_rate, optimizer_policy, reference,
        preserves, function, stays_symmetric, parameters_before, parameters_after, parent and manifest (sha256), tokens,
        flops_total, growth_flops, data, and repeated: whether all of it lay there already and nothing was done.

    Raises:
        ValueError: a destination that cannot be, or a policy that the source cannot serve.
        FileNotFoundError: there is no source.
        DataError: the source is damaged, or is not what the plan was made for.
        OSError: the destination exists or cannot be written.
    """
    src_path, dst_path = Path(src_path), Path(dst_path)
    done = _finished_before(src_path, dst_path, plan, policy) if dtype is None else None
    if done is not None:
        return _receipt(src_path, dst_path, plan, policy, done) | {"repeated": True}
    _check_destination(src_path, dst_path)
    if dst_path.parent.is_dir():
        prune_temporaries(dst_path.parent, of=dst_path.name)
    form = detect_form(src_path)
    _check_source(read_config(src_path), plan, src_path)
    reference = reference_weights(plan, reference_path, allow_non_finite=allow_non_finite)
    carry_out = _grow_training if form == TRAINING else _grow_exchange
    making = Making(allow_non_finite, dtype, reference, samples)
    record = carry_out(src_path, dst_path, plan, policy, making)
    return _receipt(src_path, dst_path, plan, policy, record) | {"repeated": False}


def _receipt(
    src_path: Path, dst_path: Path, plan: GrowthPlan, policy: str, record: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "source": str(src_path),
        "destination": str(dst_path),
        "form": detect_form(dst_path),
        **summary(plan, policy),
        "manifest": manifest_sha256(dst_path),
        **{key: record[key] for key in ("parent", "tokens", "flops_total", "growth_flops")},
        "data": record["plan"]["data"],
    }


def _finished_before(src_path: Path, dst_path: Path, plan: GrowthPlan, policy: str) -> dict[str, Any] | None:
    """The record of this very growth, if its result lies at the destination whole: then there is nothing left to do."""
    if not ((dst_path / MANIFEST).is_file() and src_path.is_dir()) or needs_data(plan):
        return None
    if checkpoint_problems(dst_path, deep=False) or detect_form(dst_path) != detect_form(src_path):
        return None
    history = inspect_checkpoint(dst_path)["history"]
    dtypes = {spec_of(read_weights(path, verify=False), EMBEDDING).dtype for path in (src_path, dst_path)}
    same = (
        bool(history)
        and len(dtypes) == 1
        and history[-1]["parent"] == manifest_sha256(src_path)
        and history[-1]["optimizer_policy"] == policy
        and history[-1]["plan"] == json.loads(json.dumps(plan.to_dict()))
    )
    return history[-1] if same else None


@dataclass(frozen=True)
class Making:
    """What a growth takes beside its plan, its source and what becomes of the moments."""

    allow_non_finite: bool
    dtype: torch.dtype | None
    reference: Mapping[str, Tensor] | None
    samples: Samples | None

    def weights(self, plan: GrowthPlan, source: Mapping[str, Tensor]) -> Made:
        return make_weights(plan, source, self.dtype, reference=self.reference, samples=self.samples)

    def copies(self, plan: GrowthPlan) -> dict[str, str]:
        """Parameters that are, bit for bit, parameters of the source -> those; {} unless matrices are among them."""
        return {} if self.dtype is not None or needs_data(plan) else copied_parameters(plan)


def read_reference(path: str | Path) -> Reference:
    """What a plan has to know of a checkpoint, of either form, to take layers from it; reads no tensor."""
    path = Path(path)
    return Reference(read_config(path), manifest_sha256(path), path.name)


def reference_weights(
    plan: GrowthPlan, path: str | Path | None, *, allow_non_finite: bool = False
) -> Mapping[str, Tensor] | None:
    """Those of the plan's reference; refuses another checkpoint than the one that the plan was made with."""
    if plan.reference is None:
        return None
    if path is None:
        raise ValueError(f"the plan takes layers from {plan.reference.path_name}; give the path of this checkpoint")
    found = read_reference(path)
    if found.manifest != plan.reference.manifest:
        raise DataError(
            f"{path} is not the reference that this growth was planned with: its manifest is {found.manifest}, "
            f"not {plan.reference.manifest}"
        )
    weights = read_weights(path)
    check_weights(found.config, weights, str(path), allow_non_finite=allow_non_finite)
    return weights


def _check_destination(src_path: Path, dst_path: Path) -> None:
    src, dst = src_path.resolve(), dst_path.resolve()
    if src == dst or src in dst.parents:
        raise ValueError(f"the destination {dst_path} lies in the source {src_path}; choose a folder outside it")
    for parent in dst.parents:
        if parent.name == "checkpoints" and any(parent.glob("stage-*/step-*")):
            raise ValueError(
                f"the destination {dst_path} lies among the checkpoints of the run {parent.parent}, which would take "
                f"it for its own; choose a folder outside"
            )
    if dst.is_file() or (dst.is_dir() and any(dst.iterdir())):
        raise FileExistsError(errno.EEXIST, "exists already; choose another name or remove it first", str(dst_path))


def _check_source(found: Config, plan: GrowthPlan, src_path: Path) -> None:
    differing = differing_sizes(found, plan.src)
    if differing:
        lines = [f"{name} is {getattr(found, name)}, not {getattr(plan.src, name)}" for name in differing]
        raise DataError(f"{src_path} is not the model this growth was planned for: {'; '.join(lines)}")


def _grow_training(src_path: Path, dst_path: Path, plan: GrowthPlan, policy: str, making: Making) -> dict[str, Any]:
    source = read_training(src_path, verify_up_to_bytes=SMALL_FILE_BYTES)
    check_open(source.state, src_path)
    optimizer = GrownOptimizer(plan, source.optimizer, policy)
    copies = making.copies(plan) if source.manifest["files"] else {}  # of a legacy file nothing can be linked
    only_linked = bool(copies) and not plan.fused_layers
    finite = _check_weights_as_needed(source, src_path, plan, making.allow_non_finite, linked=only_linked)
    made = making.weights(plan, source.model)
    record = growth_record(
        made.plan,
        policy,
        parent=manifest_sha256(src_path),
        parent_path_name=src_path.name,
        step_count=source.state["step_count"],
        tokens=tokens_behind(source.state),
        flops_total=flops_behind(source.state).paper,
        growth_flops=made.flops,
    )
    write_training(
        dst_path,
        model=made.weights,
        optimizer=optimizer,
        state=grown_state(source.state, plan, record, made.flops),
        references=source.references(_stored_copies(copies, optimizer), finite=finite) if copies else None,
    )
    return record


def _check_weights_as_needed(
    source: TrainingCheckpoint, src_path: Path, plan: GrowthPlan, allow_non_finite: bool, *, linked: bool
) -> bool:
    """Check the source as far as its growth needs it; returns whether its weights are known to be finite numbers.

    Files that are only `linked` are not read: their sizes and the manifest's digest are right, and the manifest says
    whether the weights were finite when they were written. Older checkpoints do not say, and are read.
    """
    trusted = source.is_finite or allow_non_finite
    if not (linked and trusted):
        raise_problems(directory_problems(src_path, source.manifest, deep=True), EARLIER)
    if not trusted:
        check_weights(plan.src, source.model, str(src_path))
    return source.is_finite or not trusted


def _stored_copies(copies: Mapping[str, str], optimizer: GrownOptimizer) -> dict[str, str]:
    """What is a copy of a tensor of the source, under the names of the files: new name -> name in the source."""
    copied = {stored_name(name): stored_name(source) for name, source in copies.items()}
    for name, source in optimizer.copies().items():
        copied |= {stored_name(name, slot): stored_name(source, slot) for slot in optimizer[name]}
    return copied


def _grow_exchange(src_path: Path, dst_path: Path, plan: GrowthPlan, policy: str, making: Making) -> dict[str, Any]:
    source = read_exchange(src_path, verify_weights=False)  # they are checked while they are copied
    check_optimizer(plan, {}, policy)  # refuses what needs moments
    in_files = isinstance(source.weights, LitWeights)
    if needs_data(plan) or not in_files:
        check_weights(plan.src, source.weights, str(src_path), allow_non_finite=making.allow_non_finite)
    before = source.provenance or {}
    made = making.weights(plan, source.weights)
    record = growth_record(
        made.plan,
        policy,
        parent=manifest_sha256(src_path),
        parent_path_name=src_path.name,
        **{key: before.get(key) for key in ("step_count", "tokens", "flops_total")},
        growth_flops=made.flops,
    )
    write_exchange(
        dst_path,
        plan.dst,
        made.weights,
        tokenizer_dir=src_path if holds_tokenizer(src_path) else None,
        provenance={**before, **flops_with(before, made.flops), "history": [*before.get("history", []), record]},
        copies=Copies(source.weights, making.copies(plan), making.allow_non_finite) if in_files else None,
        special_ids=source.special_ids,
    )
    return record
