"""The growth operators by name, aliases included: the only list of them; and how a name becomes a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from grow import depth
from grow.layer_map import MAX_LAYERS
from grow.plan import GrowthPlan
from lit_gpt.config import FAMILY_BY_WIDTH, Config


@dataclass(frozen=True)
class Operator:
    """What can be said of an operator without running it."""

    name: str
    aliases: tuple[str, ...]
    axis: str
    """What grows: "depth"."""
    preserves: bool
    """Whether the grown model computes the same function as its source."""
    paper: str
    summary: str
    layers: Callable[[int, int], tuple[int, ...]] | None
    """Source depth, grown depth -> layer map; None where the user has to give the map."""
    options: tuple[str, ...] = ("n_layer", "factor", "layer_map")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        shown = ("name", "aliases", "axis", "preserves", "paper", "summary", "options")
        values = {key: getattr(self, key) for key in shown}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


OPERATORS: dict[str, Operator] = {
    op.name: op
    for op in (
        Operator(
            name="stack",
            aliases=("gstack", "g_stack", "stacking", "direct_depth"),
            axis="depth",
            preserves=False,
            paper="arXiv 2405.15319",
            summary="the whole tower, repeated: 123123",
            layers=depth.stack,
        ),
        Operator(
            name="interpolate",
            aliases=("interpolation", "interleave", "interleaving", "inner_stacking"),
            axis="depth",
            preserves=False,
            paper="arXiv 2405.15319",
            summary="every layer, repeated where it stands: 112233",
            layers=depth.interpolate,
        ),
        Operator(
            name="partial",
            aliases=("partial_stack", "partial_stacking"),
            axis="depth",
            preserves=False,
            paper="arXiv 2405.15319",
            summary="the layers of an explicit map: 1-23*2-3",
            layers=None,
        ),
    )
}
BY_NAME: dict[str, Operator] = {name: op for op in OPERATORS.values() for name in (op.name, *op.aliases)}


def operator(name: str) -> Operator:
    """The operator behind a name or an alias; case, `-` and `_` do not matter.

    Raises:
        ValueError: there is none; the message names the nearest and all that are known.
    """
    wanted = name.lower().replace("-", "_")
    if wanted not in BY_NAME:
        near = get_close_matches(wanted, BY_NAME, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise ValueError(f"unknown growth operator {name!r}{hint} Known: {', '.join(OPERATORS)}")
    return BY_NAME[wanted]


def plan_growth(
    name: str,
    src: Config,
    *,
    n_layer: int | None = None,
    factor: float | None = None,
    layer_map: str | Sequence[int] | None = None,
    seed: int = 0,
) -> GrowthPlan:
    """Plan the growth of a model of sizes `src`; no weights are needed.

    Args:
        name: of the operator, or an alias.
        src: sizes before growth.
        n_layer: layers after growth. One of n_layer, factor and layer_map says how deep the grown model is.
        factor: layers after growth over layers before.
        layer_map: the map to use instead of the operator's own: text with layers counted from 1, or a sequence of
            layers counted from 0.
        seed: seed of whatever the operator draws.

    Raises:
        ValueError: unknown operator, depths that contradict each other or the operator, or a map that does not fit.
    """
    op = operator(name)
    depth_dst = _grown_depth(src.n_layer, n_layer, factor)
    if layer_map is not None:
        layers = depth.partial(src.n_layer, depth_dst, layer_map)
    elif op.layers is None:
        raise ValueError(f"{op.name} needs a layer map, e.g. '1-23*2-3' (layers count from 1); give one, or use stack")
    elif depth_dst is None:
        raise ValueError(f"how deep is the grown model? Give {op.name} n_layer, factor or a layer map")
    else:
        _check_not_smaller(op.name, src.n_layer, depth_dst)
        layers = op.layers(src.n_layer, depth_dst)
    _check_not_smaller(op.name, src.n_layer, len(layers))
    options = {"layer_map": layer_map} if isinstance(layer_map, str) else {}
    return GrowthPlan(op.name, src, with_depth(src, len(layers)), layers, seed, options)


def _grown_depth(n_layer_src: int, n_layer: int | None, factor: float | None) -> int | None:
    """The depth that n_layer or factor asks for; None if neither is given."""
    if n_layer is not None and n_layer > MAX_LAYERS:
        raise ValueError(f"n_layer={n_layer} is too deep; at most {MAX_LAYERS} layers can be grown")
    if factor is None:
        return n_layer
    if not 1 <= factor <= MAX_LAYERS / n_layer_src:
        raise ValueError(
            f"factor={factor} must be at least 1, and {n_layer_src} layers grow to at most {MAX_LAYERS}; choose another"
        )
    grown = n_layer_src * factor
    if grown != int(grown):
        raise ValueError(f"factor={factor} times {n_layer_src} layers is {grown:g}; the result must be a whole number")
    if n_layer is not None and n_layer != grown:
        raise ValueError(
            f"n_layer={n_layer} and factor={factor} contradict each other: "
            f"{n_layer_src} layers times {factor} is {grown:g}; give one of the two"
        )
    return int(grown)


def _check_not_smaller(name: str, n_layer_src: int, n_layer_dst: int) -> None:
    if n_layer_dst < n_layer_src:
        raise ValueError(f"{name} cannot shrink {n_layer_src} layers to {n_layer_dst}; ask for {n_layer_src} or more")


def with_depth(config: Config, n_layer: int) -> Config:
    """The same model with another number of layers; its name follows if that names the sizes too."""
    if n_layer == config.n_layer:
        return config
    heads = (config.n_head, config.n_query_groups, config.intermediate_size)
    name = f"{n_layer}L{config.n_embd}H" if FAMILY_BY_WIDTH.get(config.n_embd) == heads else ""
    return dataclasses.replace(config, n_layer=n_layer, name=name)
