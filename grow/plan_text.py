"""Layer maps, plans, receipts and growth histories as lines of text: what the `grow` command prints of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from grow.data_command import describe_learned, describe_learning
from grow.layer_map import (
    connection_rate,
    connection_rate_text,
    draw_layer_map,
    format_layer_map,
    unused_layers,
)
from grow.operators import function_of, needs_data, operator
from grow.plan import FUSIONS, OPTIMIZER_POLICIES, SYMMETRY, GrowthPlan
from grow.registry import FUNCTION, PRESERVING
from lit_gpt.flops import count_parameters

if TYPE_CHECKING:
    from lit_gpt.config import Config

WIDTHS = {
    "n_embd": "residual channels",
    "n_head": "query heads",
    "n_query_groups": "key/value heads",
    "intermediate_size": "neurons of the MLP",
}


def layer_map_lines(layers: Sequence[int | None], n_layer_src: int, **marks: Sequence[int]) -> Iterator[str]:
    """The picture of a map, its connection rate, and the layers of the source that it leaves out."""
    first, *more = draw_layer_map(layers, **marks)
    yield f"  layers      {first}"
    for line in more:
        yield f"              {line}"
    rate = connection_rate(layers)
    if rate is None:
        yield "  R_c         undefined: a single layer has no neighbour"
    else:
        yield f"  R_c         {connection_rate_text(layers)} = {float(rate):.1%} of neighbours were neighbours before"
    unused = [str(layer + 1) for layer in unused_layers(layers, n_layer_src)]
    if unused:
        yield f"  not used    {', '.join(unused)}"


def plan_lines(plan: GrowthPlan, policy: str) -> Iterator[str]:
    """What a growth will do, and what becomes of the optimizer state under a policy."""
    op = operator(plan.operator)
    yield f"{op.name}: {describe_growth(plan)} ({op.paper})"
    if plan.width is None or plan.src.n_layer != plan.dst.n_layer:
        yield f"  layer map   {format_layer_map(plan.layer_map)}"
        yield from layer_map_lines(plan.layer_map, plan.src.n_layer, **plan.marks)
    if plan.identity_layers:
        yield "  (n)         proj = w3 = 0: the layer passes its input on, until it is trained"
    if plan.fusion is not None:
        yield f"  n+m         {FUSIONS[plan.fusion]}"
    if plan.reference is not None:
        yield f"  [n]         layer n of {plan.reference.path_name}, {plan.reference.manifest}"
    if None in plan.layer_map:
        yield f"  new         a layer with initial weights, drawn with seed {plan.seed}"
    if plan.noise:
        yield f"  noise       {plan.noise:g} of every matrix, drawn with seed {plan.seed}"
    yield f"  sizes       {describe_sizes(plan.dst)}"
    yield f"  parameters  {count_parameters(plan.src):,} -> {count_parameters(plan.dst):,}"
    yield f"  preserves   {describe_function(plan)}"
    if plan.is_identity:
        yield "  note        nothing grows: what is written is a copy of the source"
    if plan.stays_symmetric:
        yield f"  symmetry    {SYMMETRY}."
        yield "              Part them by --shares random, --twin-noise or --noise, or use another operator"
    if needs_data(plan):
        yield f"  data        {describe_learning(plan)}"
    yield f"  trained     {op.trained}"
    yield f"  optimizer   {policy}: {OPTIMIZER_POLICIES[policy]}"


def describe_growth(plan: GrowthPlan) -> str:
    """What grows, e.g. "2 -> 4 layers, n_embd 16 -> 32"."""
    sizes = [(f"{name} ", getattr(plan.src, name), getattr(plan.dst, name), "") for name in WIDTHS]
    sizes.insert(0, ("", plan.src.n_layer, plan.dst.n_layer, " layers"))
    changed = [f"{name}{before} -> {after}{unit}" for name, before, after, unit in sizes if before != after]
    return ", ".join(changed) or f"{plan.src.n_layer} layers, as before"


def describe_function(plan: GrowthPlan) -> str:
    if plan.is_identity:
        return "everything: the two models are the same"
    function = function_of(plan)
    if function not in PRESERVING:
        return f"{FUNCTION[function]}: the loss jumps at growth and comes down in training"
    return FUNCTION[function]


def describe_sizes(config: Config) -> str:
    fields = ("n_layer", "n_embd", "n_head", "n_query_groups", "head_size", "intermediate_size", "padded_vocab_size")
    return ", ".join(f"{field} {getattr(config, field)}" for field in fields)


def receipt_lines(receipt: dict[str, Any]) -> Iterator[str]:
    """What `grow.apply.grow_checkpoint` did."""
    did = "nothing to do, this growth made it before:" if receipt["repeated"] else "wrote"
    yield f"{did} {receipt['destination']} ({receipt['form']} form)"
    yield f"  parent      {receipt['parent']}"
    if receipt["reference"] is not None:
        yield f"  reference   {receipt['reference']}"
    yield f"  manifest    {receipt['manifest']}"
    if None not in (receipt["tokens"], receipt["flops_total"]):
        yield f"  behind it   {receipt['tokens']:,} tokens, {receipt['flops_total']:.4g} FLOPs"
    if receipt["data"]:
        yield from describe_learned(receipt["data"], receipt["growth_flops"])


def history_lines(history: list[dict[str, Any]]) -> Iterator[str]:
    """The growths behind a checkpoint, oldest first."""
    if not history:
        yield "never grown"
    for record in history:
        plan = GrowthPlan.from_dict(record["plan"])
        behind = "" if record["tokens"] is None else f" after {record['tokens']:,} tokens"
        yield f"grown by {record['operator']}: {describe_growth(plan)}{behind}"
        yield f"  layer map   {format_layer_map(plan.layer_map)}"
        yield f"  R_c         {record['connection_rate']}"
        if plan.reference is not None:
            yield f"  reference   {plan.reference.path_name} {plan.reference.manifest}"
        yield f"  optimizer   {record['optimizer_policy']}"
        yield f"  parent      {record['parent_path_name']} {record['parent']}"
