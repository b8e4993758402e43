"""Which parameters of a grown model train: all, or those that its growth added."""

from __future__ import annotations

from grow.layer_map import further_copies
from grow.plan import GrowthPlan
from lit_gpt.axes import EMBEDDING, FINAL_NORM, HEAD, layer_of, parameter_shapes

TRAINABLE = {
    "all": "all",
    "new": "new layers",
    "new-and-head": "new layers, ln_f and lm_head",
}
"""Names of the sets, and what they are called in text."""


def new_layers(plan: GrowthPlan) -> tuple[int, ...]:
    """Layers of the grown model that are not the first copy of a source layer, counted from 0."""
    added = {*further_copies(plan.layer_map), *plan.fused_layers, *plan.reference_layers}
    return tuple(i for i, layer in enumerate(plan.layer_map) if layer is None or i in added)


def trainable_parameters(plan: GrowthPlan, which: str) -> frozenset[str]:
    """Names of the parameters of the grown model in one of the sets of TRAINABLE.

    A tied head is the embedding, which then trains with the head.

    Raises:
        ValueError: unknown set, or one of new layers where the growth added none.
    """
    names = list(parameter_shapes(plan.dst))
    if which == "all":
        return frozenset(names)
    if which not in TRAINABLE:
        raise ValueError(f"unknown trainable set {which!r}; known: {', '.join(TRAINABLE)}")
    layers = new_layers(plan)
    if not layers:
        raise ValueError(f"trainable={which!r} needs new layers, and growth by {plan.operator} added none; use 'all'")
    chosen = {name for name in names if layer_of(name) in layers}
    if which == "new-and-head":
        chosen |= {FINAL_NORM, EMBEDDING if plan.dst.tie_embeddings else HEAD}
    return frozenset(chosen)
