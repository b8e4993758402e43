"""How the name of a growth operator becomes a plan. Read grow/registry.py first: the operators are listed there."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from grow import depth
from grow.layer_map import LayerMap, format_layer_map, further_copies
from grow.plan import NEEDS_SCIPY, GrowthPlan, Reference, differing_sizes
from grow.registry import BY_NAME, IN_WIDTH, LEARNING, OPERATORS, RETIRED, SIZES, UNAVAILABLE, Operator
from grow.sizes import resized, scaled_depth, with_depth
from lit_gpt.axes import OPTIONAL_IN_BLOCK, names_in_block
from lit_gpt.config import Config


def in_sizes(model: Config, given: Mapping[str, Any]) -> Config:
    """The model in the sizes, n_layer and SIZES, that are given and not None; the others are its own, or follow."""
    widths = {name: given[name] for name in SIZES if given.get(name) is not None}
    config = resized(model, **widths) if widths else model
    return config if given.get("n_layer") in (None, config.n_layer) else with_depth(config, given["n_layer"])


def operator(name: str, *, in_width: bool = False) -> Operator:
    """The operator behind a name or an alias; case, `-` and `_` do not matter.

    Args:
        name: of an operator.
        in_width: whether it is asked to grow the width, which tells apart what some methods of prts mean.

    Raises:
        ValueError: there is none, or it is not available; the message says why, or names the nearest and all known.
    """
    wanted = name.lower().replace("-", "_")
    if in_width and wanted in IN_WIDTH:
        return OPERATORS[IN_WIDTH[wanted]]
    if wanted in BY_NAME:
        return BY_NAME[wanted]
    if wanted in UNAVAILABLE:
        raise ValueError(f"operator {name!r} is not available: {UNAVAILABLE[wanted]}. See `grow operators`")
    if wanted in RETIRED:
        raise ValueError(f"operator {name!r} is retired: {RETIRED[wanted]}")
    near = get_close_matches(wanted, BY_NAME, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0].replace('_', '-')!r}?" if near else ";"
    raise ValueError(f"unknown growth operator {name!r}{hint} Known: {', '.join(OPERATORS)}")


def plan_growth(
    name: str,
    src: Config,
    *,
    n_layer: int | None = None,
    n_embd: int | None = None,
    n_head: int | None = None,
    n_query_groups: int | None = None,
    intermediate_size: int | None = None,
    factor: float | None = None,
    layer_map: str | Sequence[int | None] | None = None,
    reference: Reference | None = None,
    seed: int = 0,
    noise: float = 0.0,
    **options: Any,
) -> GrowthPlan:
    """Plan the growth of a model of sizes `src`; no weights are needed.

    Args:
        name: of the operator, or an alias.
        src: sizes before growth.
        n_layer: layers after growth. In depth one of n_layer, factor and layer_map says how deep the grown model is.
        n_embd: residual channels after growth; with the next three see `grow.sizes.wider` for what follows from what.
        n_head: query heads after growth.
        n_query_groups: key/value heads after growth.
        intermediate_size: neurons after growth.
        factor: sizes after growth over sizes before: layers for operators in depth, all widths for all others.
        layer_map: the map to use instead of the operator's own: text with layers counted from 1, or a sequence of
            layers counted from 0, None for a new one.
        reference: the larger model whose next layers inheritune appends.
        seed: seed of whatever the operator draws.
        noise: share of every grown matrix that is replaced by noise, see `GrowthPlan.noise`.
        options: residual, shares, order, adjust_eps and twin_noise of the operators in grow/width.py that have them;
            learn_steps, learn_rate and batch_size of those that read data when the plan is carried out.

    Raises:
        ValueError: unknown operator, sizes that contradict each other or the operator, or a map that does not fit.
    """
    sizes = _given(n_embd=n_embd, n_head=n_head, n_query_groups=n_query_groups, intermediate_size=intermediate_size)
    options = _given(**options)
    op = operator(name, in_width=bool(sizes))
    _check_options(
        op,
        {**_given(n_layer=n_layer, factor=factor, layer_map=layer_map, reference=reference), **sizes, **options},
        src,
    )
    _check_kinds({**options, "seed": seed, "noise": noise})
    _check_learning(options)
    if op.needs_data:
        _check_plain(op, src)
    making = {name: value for name, value in options.items() if name not in LEARNING}
    if reference is not None:
        plan = _plan_appended(op, src, scaled_depth(src.n_layer, n_layer, factor), reference, seed)
    elif op.width is None:
        plan = _plan_depth(op, src, scaled_depth(src.n_layer, n_layer, factor), layer_map, seed)
    else:
        plan = _plan_width(op, src, n_layer, _given(**sizes, factor=factor), seed, making)
    written = {**_given(layer_map=layer_map if isinstance(layer_map, str) else None), **options}
    return dataclasses.replace(plan, options=written, noise=noise)


def _check_plain(op: Operator, src: Config) -> None:
    """What is learned or drawn from gradients knows the matrices and norms of a plain Llama."""
    more = [name for name in names_in_block(src) if name in OPTIONAL_IN_BLOCK]
    if more:
        raise ValueError(
            f"{op.name} cannot grow a model of family {src.family} with {', '.join(more)}; use one that copies, "
            f"e.g. stack or hypercloning"
        )


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _plan_depth(
    op: Operator,
    src: Config,
    n_layer: int | None,
    layer_map: str | Sequence[int | None] | None,
    seed: int,
) -> GrowthPlan:
    layers = _layers(op, src.n_layer, n_layer, layer_map)
    identity_layers = further_copies(layers) if op.identity_copies else ()
    if op.identity_copies:
        _check_preserved(op, src.n_layer, layers, identity_layers)
    fused_layers = further_copies(layers) if op.fusion else ()
    if fused_layers and op.fusion == "aligned" and importlib.util.find_spec("scipy") is None:
        raise ValueError(NEEDS_SCIPY)  # now, and not after the stage before has been trained
    return GrowthPlan(
        op.name,
        src,
        with_depth(src, len(layers), layers),
        layers,
        seed,
        identity_layers=identity_layers,
        fusion=op.fusion if fused_layers else None,
        fused_layers=fused_layers,
    )


def _plan_appended(op: Operator, src: Config, n_layer: int | None, reference: Reference, seed: int) -> GrowthPlan:
    """The layers of the source, and above them those of the reference that come next."""
    deepest = reference.config.n_layer
    if deepest <= src.n_layer:
        raise ValueError(
            f"the reference {reference.path_name} has {deepest} layers, and the source has {src.n_layer} already; "
            f"give the larger model that the source was cut from"
        )
    if n_layer is not None and not src.n_layer < n_layer <= deepest:
        raise ValueError(
            f"by the {deepest} layers of the reference {reference.path_name} a source of {src.n_layer} layers grows to "
            f"{src.n_layer + 1} to {deepest}, and not to {n_layer}; ask for one of these, or leave the reference out"
        )
    layers = _layers(op, deepest, n_layer, None)
    return GrowthPlan(
        op.name,
        src,
        with_depth(src, len(layers)),
        layers,
        seed,
        reference=reference,
        reference_layers=range(src.n_layer, len(layers)),
    )


def _plan_width(
    op: Operator, src: Config, n_layer: int | None, sizes: dict[str, Any], seed: int, options: dict[str, Any]
) -> GrowthPlan:
    if not sizes and n_layer is None:
        sizes = [option for option in op.options if option in ("n_layer", *SIZES, "factor")]
        raise ValueError(f"how large is the grown model? Give {op.name} {' or '.join(sizes)}")
    dst = op.grown_sizes(src, **sizes)
    if n_layer is not None:
        _check_not_smaller(op, src.n_layer, n_layer)
    layers = {} if op.layers is None else {"layer_map": op.layers(src.n_layer, n_layer or src.n_layer)}
    if n_layer is not None:
        dst = with_depth(dst, n_layer, layers.get("layer_map"))
    plan = op.width(src, dst, seed=seed, **layers, **options)
    if plan.width is not None and plan.width.is_identity and plan.dst.norm_eps == src.norm_eps:
        return dataclasses.replace(plan, width=None)
    return plan


def needs_data(plan: GrowthPlan) -> bool:
    """Whether carrying the plan out takes training samples; a growth to the same sizes has nothing to learn."""
    op = OPERATORS.get(plan.operator)
    return op is not None and op.needs_data and bool(differing_sizes(plan.src, plan.dst))


def is_learned(plan: GrowthPlan) -> bool:
    """Whether the plan's weights are trained while it is carried out."""
    op = OPERATORS.get(plan.operator)
    return op is not None and op.is_learned and bool(differing_sizes(plan.src, plan.dst))


def function_of(plan: GrowthPlan) -> str:
    """What a plan makes of the function, one of FUNCTION."""
    if plan.is_identity:
        return "bitwise"
    if plan.fresh:
        return "nothing"
    if set(plan.layer_map) == {None}:
        return "no layers"
    other = (*plan.fused_layers, *plan.reference_layers)  # no layers of the source, whatever their numbers are
    acting = [None if i in other else layer for i, layer in enumerate(plan.layer_map) if i not in plan.identity_layers]
    if plan.noise or acting != list(range(plan.src.n_layer)):
        return "no"
    if plan.width is None:
        return "bitwise"
    if plan.width.is_exact(plan.src, plan.dst):
        return "exactly"
    with_eps = dataclasses.replace(plan.dst, norm_eps=plan.width.exact_eps(plan.src))
    return "up to eps" if plan.width.is_exact(plan.src, with_eps) else "no"


KINDS = {
    **dict.fromkeys(("seed", "learn_steps", "batch_size"), (int, "a whole number")),
    **dict.fromkeys(("noise", "twin_noise", "learn_rate"), (int | float, "a number")),
    "adjust_eps": (bool, "true or false"),
}
"""Options that no table of names checks -> what they have to be, and what that is called."""


def _check_kinds(options: Mapping[str, Any]) -> None:
    """Refuse values of another kind, which a file of settings may hold."""
    wrong = {
        name: value
        for name, value in options.items()
        if name in KINDS
        and not (isinstance(value, KINDS[name][0]) and isinstance(value, bool) == (name == "adjust_eps"))
    }
    if wrong:
        lines = (f"{name}={value!r} must be {KINDS[name][1]}" for name, value in wrong.items())
        is_power = any(isinstance(value, str) and "e" in value for value in wrong.values())
        raise ValueError("\n".join(lines) + ("; YAML reads 1.0e-3 as a number, and 1e-3 as text" if is_power else ""))


def _check_learning(options: Mapping[str, Any]) -> None:
    problems = [
        f"{name}={options[name]} must be at least 1"
        for name in ("learn_steps", "batch_size")
        if options.get(name, 1) < 1
    ]
    if not 0 < options.get("learn_rate", 1.0) < math.inf:
        problems.append(f"learn_rate={options['learn_rate']} must be a positive number")
    if problems:
        raise ValueError("\n".join(problems))


def _check_options(op: Operator, given: dict[str, object], src: Config) -> None:
    foreign = [name for name in given if name not in op.options]
    _check_known(op, foreign)
    if "n_layer" in foreign and given["n_layer"] != src.n_layer:
        others = ", ".join(other.name for other in OPERATORS.values() if other.axis == "both")
        raise ValueError(
            f"{op.name} grows width only, but n_layer goes {src.n_layer} -> {given['n_layer']}; grow in depth before "
            f"or afterwards, or use an operator for both: {others}"
        )
    if foreign:
        others = ", ".join(other.name for other in OPERATORS.values() if foreign[0] in other.options) or "none"
        raise ValueError(
            f"{op.name} takes {', '.join(op.options)}, and not {', '.join(foreign)}; leave it out. "
            f"Operators that take {foreign[0]}: {others}"
        )


def _check_known(op: Operator, foreign: Sequence[str]) -> None:
    """Refuse options that no operator takes, with the nearest one that this operator does."""
    known = {option for other in OPERATORS.values() for option in other.options}
    for name in foreign:
        if name not in known:
            taken = [*op.options, "seed", "noise"]
            near = get_close_matches(name, taken, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"unknown option {name}; {hint}{op.name} takes {', '.join(taken)}")


def _layers(
    op: Operator, n_layer_src: int, n_layer_dst: int | None, layer_map: str | Sequence[int | None] | None
) -> LayerMap:
    if layer_map is not None:
        layers = depth.partial(n_layer_src, n_layer_dst, layer_map)
    elif op.layers is None:
        raise ValueError(f"{op.name} needs a layer map, e.g. '1-23*2-3' (layers count from 1); give one, or use stack")
    elif n_layer_dst is None:
        known = {"n_layer": "n_layer", "factor": "factor", "layer_map": "a layer map"}
        options = " or ".join(text for option, text in known.items() if option in op.options)
        raise ValueError(f"how deep is the grown model? Give {op.name} {options}")
    else:
        _check_not_smaller(op, n_layer_src, n_layer_dst)
        layers = op.layers(n_layer_src, n_layer_dst)
    _check_not_smaller(op, n_layer_src, len(layers))
    return layers


def _check_not_smaller(op: Operator, n_layer_src: int, n_layer_dst: int) -> None:
    if n_layer_dst < n_layer_src and op.name != "inheritune":
        raise ValueError(
            f"{op.name} cannot shrink {n_layer_src} layers to {n_layer_dst}; ask for {n_layer_src} or more, "
            f"or take the first layers by inheritune"
        )


def _check_preserved(op: Operator, n_layer_src: int, layers: LayerMap, identity_layers: tuple[int, ...]) -> None:
    """An explicit map may be anything; an operator that promises the function refuses what would change it."""
    acting = [layer for i, layer in enumerate(layers) if i not in identity_layers]
    if acting != list(range(n_layer_src)):
        raise ValueError(
            f"{op.name} preserves the function, for which the first copies of the layers must be all layers of the "
            f"source in their order, and those of {format_layer_map(layers)} are {format_layer_map(acting)}; "
            f"use partial to grow by this map as it is"
        )
