"""What is written down of a growth: its entry in the history, the state of what it made, and the receipt."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from grow.operators import function_of
from grow.plan import GrowthPlan
from grow.registry import PRESERVING
from lit_gpt.flops import Flops, count_parameters
from lit_gpt.stored_state import flops_behind, tokens_behind, trained_on
from lit_gpt.versions import versions

FREE = Flops()
"""Of a growth that merely moves weights."""


def growth_record(
    plan: GrowthPlan,
    policy: str,
    *,
    parent: str,
    parent_path_name: str,
    step_count: int | None,
    tokens: int | None,
    flops_total: float | None,
    growth_flops: Flops = FREE,
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
        growth_flops: those of the growth itself; in the paper's convention they are added to flops_total.
    """
    return {
        "operator": plan.operator,
        "plan": plan.to_dict(),
        "connection_rate": plan.connection_rate,
        "optimizer_policy": policy,
        "parent": parent,
        "parent_path_name": parent_path_name,
        "reference": None if plan.reference is None else plan.reference.manifest,
        "step_count": step_count,
        "tokens": tokens,
        "flops_total": None if flops_total is None else flops_total + growth_flops.paper,
        "growth_flops": growth_flops.paper,
        "growth_flops_model": growth_flops.model,
        "growth_flops_palm": growth_flops.palm,
        "versions": versions(),
    }


def grown_state(state: Mapping[str, Any], plan: GrowthPlan, record: dict[str, Any], flops: Flops) -> dict[str, Any]:
    """state.json of a model that was just grown: a run that has not begun, from the data position of its parent.

    `flops` are those of the growth itself: the first that the new run spends.
    """
    return {
        **state,
        "run_config": None,
        "trained_on": trained_on(state),
        "model_config": plan.dst.to_dict(),
        "stage": 1,
        "stage_name": plan.operator,
        "stage_step": 0,
        "step_count": 0,
        "iter_num": 0,
        "grown_into_stage": 1,
        "tokens": 0,
        "flops": dataclasses.asdict(flops),
        "flops_computed": flops.paper,
        "parent_tokens": tokens_behind(state),
        "parent_flops": dataclasses.asdict(flops_behind(state)),
        "seconds": 0.0,
        "loss_sum": 0.0,
        "loss_count": 0,
        "history": [*state["history"], record],
        "command": list(sys.argv),
        "versions": versions(),
    }


def summary(plan: GrowthPlan, policy: str) -> dict[str, Any]:
    """What a growth does, in the keys of its receipt."""
    return {
        "operator": plan.operator,
        "layer_map": list(plan.layer_map),
        "connection_rate": plan.connection_rate,
        "optimizer_policy": policy,
        "reference": None if plan.reference is None else plan.reference.manifest,
        "preserves": function_of(plan) in PRESERVING,
        "function": function_of(plan),
        "stays_symmetric": plan.stays_symmetric,
        "parameters_before": count_parameters(plan.src),
        "parameters_after": count_parameters(plan.dst),
    }
