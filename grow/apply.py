"""Carry a growth plan out: weights and optimizer moments in memory, or one checkpoint into another."""

from __future__ import annotations

import dataclasses
import errno
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grow.check import check_weights
from grow.from_data import Made, make_from_data
from grow.operators import function_of, is_learned, needs_data
from grow.plan import OPTIMIZER_POLICIES, GrowthPlan, differing_sizes
from grow.samples import Samples
from grow.tensors import grown_moments, grown_weight
from lit_gpt.axes import parameter_shapes
from lit_gpt.checkpoint import (
    TRAINING,
    detect_form,
    manifest_sha256,
    read_config,
    read_exchange,
    read_training,
    write_exchange,
    write_training,
)
from lit_gpt.config import Config
from lit_gpt.errors import DataError
from lit_gpt.flops import Flops, count_parameters
from lit_gpt.tokenizer import FILE_NAMES
from lit_gpt.versions import versions

OptimizerState = Mapping[str, Mapping[str, Tensor]]
"""Parameter name -> "exp_avg", "exp_avg_sq" (shaped like the parameter) and "step" (a scalar)."""
GIVE_DATA = "name some: grow apply --data PATH, a folder of scripts/prepare.py or token files"


class GrownWeights(Mapping[str, Tensor]):
    """Name -> tensor of the grown model, made from the source on every access: nothing is held.

    With a dtype, the source's weights are cast to it before they are grown.

    Raises:
        ValueError: a plan that needs training samples.
    """

    def __init__(self, plan: GrowthPlan, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
        if needs_data(plan):
            raise ValueError(f"{plan.operator} makes weights from training samples, and there are none; {GIVE_DATA}")
        self._plan = plan
        self._names = parameter_shapes(plan.dst)
        self._weights = weights if dtype is None else CastWeights(weights, dtype)

    def __getitem__(self, name: str) -> Tensor:
        return grown_weight(self._plan, name, self._weights)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class CastWeights(Mapping[str, Tensor]):
    """The same weights in another dtype, cast on every access."""

    def __init__(self, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._weights = weights
        self._dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name].to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def make_weights(
    plan: GrowthPlan, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None, samples: Samples | None = None
) -> Made:
    """The grown model of any plan. Only plans that need training samples do work here and now.

    Args:
        plan: what to do.
        weights: of the source.
        dtype: to cast them to first; None keeps theirs.
        samples: training samples for the source; plans that need none leave them alone.

    Raises:
        ValueError: a plan that needs samples, and none are given.
        DataError: samples that are too few or of another vocabulary.
        NonFiniteError: a loss or a gradient on the samples is not a number.
    """
    if samples is None or not needs_data(plan):
        return Made(plan, GrownWeights(plan, weights, dtype))
    return make_from_data(plan, weights if dtype is None else CastWeights(weights, dtype), samples)


def grow_weights(plan: GrowthPlan, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the grown model; `weights` stays as it was and shares no storage with it.

    Args:
        plan: what to do.
        weights: name -> tensor with the names and shapes of `parameter_shapes(plan.src)`, any dtype and device.

    Returns:
        Name -> tensor with the names and shapes of `parameter_shapes(plan.dst)`, in that order.

    Raises:
        ValueError: a plan that needs training samples; see `make_weights`.
        DataError: the weights are not those of a model of the plan's source sizes.
    """
    check_weights(plan.src, weights, "the source", allow_non_finite=True)
    grown = dict(GrownWeights(plan, weights))
    check_weights(plan.dst, grown, "the grown model", allow_non_finite=True)
    return grown


class GrownOptimizer(Mapping[str, dict[str, Tensor]]):
    """Name -> optimizer state of a parameter of the grown model, made on every access; empty under "reset".

    Raises:
        ValueError: unknown policy, or one that needs moments where there are none.
        DataError: parameters are missing or unexpected in the optimizer state.
    """

    def __init__(self, plan: GrowthPlan, optimizer_state: OptimizerState, policy: str) -> None:
        _check_optimizer(plan, optimizer_state, policy)
        self._plan = plan
        self._state = optimizer_state
        self._old_only = policy == "map-old-zero-new"
        self._sources = {} if policy == "reset" else plan.sources()
        firsts = {source: name for name, source in reversed(self._sources.items())}
        self._first_copies = set(firsts.values())

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        if name not in self._sources:
            raise KeyError(name)
        forgotten = self._old_only and name not in self._first_copies
        return grown_moments(self._plan, name, self._state, from_zero=forgotten, first_copies=self._old_only)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def _check_optimizer(plan: GrowthPlan, optimizer_state: OptimizerState, policy: str) -> None:
    if policy not in OPTIMIZER_POLICIES:
        raise ValueError(f"unknown optimizer policy {policy!r}; known: {', '.join(OPTIMIZER_POLICIES)}")
    if policy == "reset":
        return
    if is_learned(plan):
        raise ValueError(
            f"optimizer policy {policy!r} does not go with {plan.operator}: its weights are trained mixtures, of which "
            f"the source's moments say nothing; use 'reset'"
        )
    if not optimizer_state:
        raise ValueError(f"optimizer policy {policy!r} needs moments, and the source has none; use 'reset'")
    strange = set(parameter_shapes(plan.src)) ^ set(optimizer_state)
    if strange:
        raise DataError(
            f"the optimizer state does not belong to the source: {len(strange)} parameters are in only one of the two, "
            f"e.g. {min(strange)}; use policy 'reset'"
        )


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
    return dict(GrownOptimizer(plan, optimizer_state, policy))


def growth_record(
    plan: GrowthPlan,
    policy: str,
    *,
    parent: str,
    parent_path_name: str,
    step_count: int | None,
    tokens: int | None,
    flops_total: float | None,
    growth_flops: float = 0.0,
) -> dict[str, Any]:
    """One entry of a model's growth history: plain values for JSON.

    Args:
        plan: what was done to the weights.
        policy: what was done to the optimizer state.
        parent: identity of the checkpoint before growth, see `manifest_sha256`.
        parent_path_name: last part of its path.
        step_count: optimizer updates of its run; None if it does not say, like the next two.
        tokens: training tokens behind it, those of its own parents included.
        flops_total: training FLOPs behind it in the paper's convention, those of its own parents included.
        growth_flops: of the growth itself, where it learned from data; they are added to `flops_total`.
    """
    return {
        "operator": plan.operator,
        "plan": plan.to_dict(),
        "connection_rate": plan.connection_rate,
        "optimizer_policy": policy,
        "parent": parent,
        "parent_path_name": parent_path_name,
        "step_count": step_count,
        "tokens": tokens,
        "flops_total": None if flops_total is None else flops_total + growth_flops,
        "growth_flops": growth_flops,
        "versions": versions(),
    }


def grow_checkpoint(
    src_path: str | Path,
    dst_path: str | Path,
    plan: GrowthPlan,
    policy: str = "reset",
    *,
    allow_non_finite: bool = False,
    dtype: torch.dtype | None = None,
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
        samples: for plans that need training samples; their FLOPs are charged to the grown checkpoint.

    Returns:
        The receipt: source, destination, form, operator, layer_map, connection_rate, optimizer_policy, preserves,
        function, parameters_before, parameters_after, parent and manifest (sha256), tokens, flops_total,
        growth_flops and data (what an operator that reads samples has read).

    Raises:
        ValueError: a destination that cannot be, a policy that the source cannot serve, or a plan that needs samples.
        FileNotFoundError: there is no source.
        DataError: the source is damaged, or is not what the plan was made for; or the samples do not fit it.
        NonFiniteError: a loss or a gradient on the samples is not a number.
        OSError: the destination exists or cannot be written.
    """
    src_path, dst_path = Path(src_path), Path(dst_path)
    _check_destination(src_path, dst_path)
    form = detect_form(src_path)
    _check_source(read_config(src_path), plan, src_path)
    carry_out = _grow_training if form == TRAINING else _grow_exchange
    record = carry_out(src_path, dst_path, plan, policy, allow_non_finite, dtype, samples)
    return {
        "source": str(src_path),
        "destination": str(dst_path),
        "form": form,
        **summary(plan, policy),
        "manifest": manifest_sha256(dst_path),
        **{key: record[key] for key in ("parent", "tokens", "flops_total", "growth_flops")},
        "data": record["plan"]["data"],
    }


def summary(plan: GrowthPlan, policy: str) -> dict[str, Any]:
    """What a growth does, in the keys of its receipt."""
    return {
        "operator": plan.operator,
        "layer_map": list(plan.layer_map),
        "connection_rate": plan.connection_rate,
        "optimizer_policy": policy,
        "preserves": function_of(plan) != "no",
        "function": function_of(plan),
        "parameters_before": count_parameters(plan.src),
        "parameters_after": count_parameters(plan.dst),
    }


def _check_destination(src_path: Path, dst_path: Path) -> None:
    src, dst = src_path.resolve(), dst_path.resolve()
    if src == dst or src in dst.parents:
        raise ValueError(f"the destination {dst_path} lies in the source {src_path}; choose a folder outside it")
    if dst.is_file() or (dst.is_dir() and any(dst.iterdir())):
        raise FileExistsError(errno.EEXIST, "exists already; choose another name or remove it first", str(dst_path))


def _check_source(found: Config, plan: GrowthPlan, src_path: Path) -> None:
    differing = differing_sizes(found, plan.src)
    if differing:
        lines = [f"{name} is {getattr(found, name)}, not {getattr(plan.src, name)}" for name in differing]
        raise DataError(f"{src_path} is not the model this growth was planned for: {'; '.join(lines)}")


def _grow_training(
    src_path: Path,
    dst_path: Path,
    plan: GrowthPlan,
    policy: str,
    allow_non_finite: bool,
    dtype: torch.dtype | None,
    samples: Samples | None,
) -> dict[str, Any]:
    source = read_training(src_path)
    optimizer = GrownOptimizer(plan, source.optimizer, policy)
    check_weights(plan.src, source.model, str(src_path), allow_non_finite=allow_non_finite)
    made = make_weights(plan, source.model, dtype, samples)
    record = growth_record(
        made.plan,
        policy,
        parent=manifest_sha256(src_path),
        parent_path_name=src_path.name,
        step_count=source.state["step_count"],
        tokens=_tokens_behind(source.state),
        flops_total=_flops_behind(source.state).paper,
        growth_flops=made.flops.paper,
    )
    write_training(
        dst_path,
        model=made.weights,
        optimizer=optimizer,
        state=grown_state(source.state, plan, record, made.flops),
    )
    return record


def _tokens_behind(state: Mapping[str, Any]) -> int:
    return state["tokens"] + state.get("parent_tokens", 0)


def _flops_behind(state: Mapping[str, Any]) -> Flops:
    return Flops(**state["flops"]) + Flops(**state.get("parent_flops", {}))


def grown_state(state: Mapping[str, Any], plan: GrowthPlan, record: dict[str, Any], flops: Flops) -> dict[str, Any]:
    """state.json of a model that was just grown: a run that has not begun, from the data position of its parent.

    `flops` are those of the growth itself: the first that the new run spends.
    """
    return {
        **state,
        "run_config": None,
        "model_config": plan.dst.to_dict(),
        "stage": 1,
        "stage_name": plan.operator,
        "stage_step": 0,
        "step_count": 0,
        "iter_num": 0,
        "grown_into_stage": 1,
        "tokens": 0,
        "flops": dataclasses.asdict(flops),
        "parent_tokens": _tokens_behind(state),
        "parent_flops": dataclasses.asdict(_flops_behind(state)),
        "seconds": 0.0,
        "loss_sum": 0.0,
        "loss_count": 0,
        "history": [*state["history"], record],
        "command": list(sys.argv),
        "versions": versions(),
    }


def _grow_exchange(
    src_path: Path,
    dst_path: Path,
    plan: GrowthPlan,
    policy: str,
    allow_non_finite: bool,
    dtype: torch.dtype | None,
    samples: Samples | None,
) -> dict[str, Any]:
    source = read_exchange(src_path)
    _check_optimizer(plan, {}, policy)  # refuses what needs moments
    check_weights(plan.src, source.weights, str(src_path), allow_non_finite=allow_non_finite)
    before = source.provenance or {}
    made = make_weights(plan, source.weights, dtype, samples)
    record = growth_record(
        made.plan,
        policy,
        parent=manifest_sha256(src_path),
        parent_path_name=src_path.name,
        **{key: before.get(key) for key in ("step_count", "tokens", "flops_total")},
        growth_flops=made.flops.paper,
    )
    behind = {"flops_total": record["flops_total"]} if "flops_total" in before else {}
    write_exchange(
        dst_path,
        plan.dst,
        made.weights,
        tokenizer_dir=src_path if any((src_path / name).is_file() for name in FILE_NAMES) else None,
        provenance={**before, **behind, "history": [*before.get("history", []), record]},
    )
    return record
