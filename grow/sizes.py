"""Sizes of a grown model from the few that a user names; head_size never changes. Read lit_gpt/config.py first."""

from __future__ import annotations

import dataclasses
from typing import Any

from grow.layer_map import MAX_LAYERS, LayerMap
from lit_gpt.config import FAMILY_BY_WIDTH, PER_LAYER, Config

MAX_FACTOR = MAX_LAYERS  # of the width; a slip like 1e9 stops here


def with_depth(config: Config, n_layer: int, layer_map: LayerMap | None = None) -> Config:
    """The same model with another number of layers; its name follows if that names the sizes too.

    Fields with an entry for every layer follow the layer map; a new layer has what a plain model has in every layer.

    Raises:
        ValueError: the model has such fields, and there is no map.
    """
    lists = {field: getattr(config, field) for field in PER_LAYER if getattr(config, field) is not None}
    if lists and layer_map is None and n_layer != config.n_layer:
        raise ValueError(
            f"{', '.join(lists)} say something of each of {config.n_layer} layers, and nobody says which of them "
            f"{n_layer} layers are; grow a checkpoint of such a model by grow apply"
        )
    mapped = {
        field: tuple(True if layer is None else flags[layer] for layer in layer_map or range(n_layer))
        for field, flags in lists.items()
    }
    return _replaced(config, n_layer=n_layer, **mapped)


def scaled_depth(n_layer_src: int, n_layer: int | None, factor: float | None) -> int | None:
    """The depth that n_layer or factor asks for; None if neither is given.

    Raises:
        ValueError: too deep, a factor that gives no whole depth, or two that contradict each other.
    """
    if n_layer is not None and n_layer > MAX_LAYERS:
        raise ValueError(f"n_layer={n_layer} is too deep; at most {MAX_LAYERS} layers can be grown")
    if factor is None:
        return n_layer
    if not 0 < factor <= MAX_LAYERS / n_layer_src:
        raise ValueError(
            f"factor={factor} must be above 0, and {n_layer_src} layers grow to at most {MAX_LAYERS}; choose another"
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


def wider(
    src: Config,
    *,
    n_embd: int | None = None,
    n_head: int | None = None,
    n_query_groups: int | None = None,
    intermediate_size: int | None = None,
    factor: float | None = None,
) -> Config:
    """The source with a larger width, where sizes that are not given follow from those that are, see `resized`.

    Args:
        src: sizes before growth.
        n_embd: residual channels after growth.
        n_head: query heads after growth.
        n_query_groups: key/value heads after growth.
        intermediate_size: neurons after growth.
        factor: of all of them at once; beside it only n_query_groups may be given.

    Raises:
        ValueError: sizes that are not whole, shrink, or break head_size; the message has sizes that fit.
    """
    scaled = {"n_embd": n_embd, "n_head": n_head, "intermediate_size": intermediate_size}
    given = {name: value for name, value in scaled.items() if value is not None}
    if factor is not None:
        if given:
            raise ValueError(f"factor={factor} and {', '.join(given)} both give sizes; give one of the two")
        given = {name: _times(src, name, factor) for name in scaled}
    if n_query_groups is not None:
        given["n_query_groups"] = n_query_groups
    _check_not_smaller(src, given)
    return resized(src, **given)


def resized(config: Config, **given: int) -> Config:
    """The same model in another width, where sizes that are not given follow from those that are.

    head_size stays. Where n_embd is n_head * head_size, as in Llama, it stays so: one of the two gives the other.
    Query groups keep their number of query heads, so that their number changes; multi-query stays multi-query.
    intermediate_size changes as n_embd does.

    Args:
        config: sizes to start from.
        given: some of n_embd, n_head, n_query_groups and intermediate_size.

    Raises:
        ValueError: sizes that are not whole or break head_size; the message has sizes that fit.
    """
    sizes = {**_width_and_heads(config, given), **given}
    if "n_query_groups" not in sizes:
        sizes["n_query_groups"] = _groups(config, sizes["n_head"])
    if "intermediate_size" not in sizes:
        sizes["intermediate_size"] = _neurons(config, sizes["n_embd"])
    return _replaced(config, **sizes)


def more_neurons(src: Config, *, intermediate_size: int | None = None, factor: float | None = None) -> Config:
    """The source with more neurons and all else as it was; one of the two arguments says how many.

    Raises:
        ValueError: both, fewer than there are, or a number that is not whole.
    """
    if factor is not None:
        if intermediate_size is not None:
            raise ValueError(f"factor={factor} and intermediate_size both give a size; give one of the two")
        intermediate_size = _times(src, "intermediate_size", factor)
    given = {} if intermediate_size is None else {"intermediate_size": intermediate_size}
    _check_not_smaller(src, given)
    return _replaced(src, **given)


def _check_not_smaller(src: Config, given: dict[str, int]) -> None:
    smaller = [name for name, value in given.items() if value < getattr(src, name)]
    if smaller:
        lines = (f"{name}={given[name]} is smaller than the source's {getattr(src, name)}" for name in smaller)
        raise ValueError("\n".join(f"{line}; growth keeps or enlarges it" for line in lines))


def _times(src: Config, name: str, factor: float) -> int:
    if not 1 <= factor <= MAX_FACTOR:
        raise ValueError(f"factor={factor} of the width must be at least 1 and at most {MAX_FACTOR}; choose another")
    grown = getattr(src, name) * factor
    if grown != int(grown):
        raise ValueError(
            f"factor={factor} times {name}={getattr(src, name)} is {grown:g}; the result must be a whole number"
        )
    return int(grown)


def _width_and_heads(src: Config, given: dict[str, int]) -> dict[str, int]:
    """n_embd and n_head, one from the other where the source ties them together."""
    n_embd, n_head = given.get("n_embd"), given.get("n_head")
    if src.n_embd != src.n_head * src.head_size:
        return {"n_embd": n_embd or src.n_embd, "n_head": n_head or src.n_head}
    if n_embd is None:
        return {"n_embd": (n_head or src.n_head) * src.head_size, "n_head": n_head or src.n_head}
    if n_embd % src.head_size:
        below = n_embd // src.head_size * src.head_size
        raise ValueError(
            f"n_embd={n_embd} breaks head_size={src.head_size}, which growth keeps: it must be a multiple of it, "
            f"e.g. {max(below, src.head_size)} or {below + src.head_size}"
        )
    if n_head not in (None, n_embd // src.head_size):
        raise ValueError(
            f"n_embd={n_embd} and n_head={n_head} break head_size={src.head_size}, which growth keeps: "
            f"n_embd={n_embd} goes with n_head={n_embd // src.head_size}, and n_head={n_head} "
            f"with n_embd={n_head * src.head_size}; give one of the two"
        )
    return {"n_embd": n_embd, "n_head": n_embd // src.head_size}


def _groups(src: Config, n_head: int) -> int:
    if src.n_query_groups == 1 or n_head == src.n_head:
        return src.n_query_groups
    if n_head % src.q_per_kv:
        raise ValueError(
            f"n_head={n_head} is no whole number of groups of {src.q_per_kv} query heads; "
            f"give n_query_groups too, or a multiple of {src.q_per_kv}"
        )
    return n_head // src.q_per_kv


def _neurons(src: Config, n_embd: int) -> int:
    grown, rest = divmod(src.intermediate_size * n_embd, src.n_embd)
    if rest:
        raise ValueError(
            f"intermediate_size={src.intermediate_size} does not grow to a whole number with n_embd={src.n_embd} "
            f"-> {n_embd}; give it, e.g. intermediate_size={grown + 1}"
        )
    return grown


def _replaced(config: Config, **sizes: Any) -> Config:
    """Other sizes under the name they have in the family of named sizes, if the name speaks of sizes at all."""
    grown = dataclasses.replace(config, **sizes)
    if grown == config:
        return config
    heads = (grown.n_head, grown.n_query_groups, grown.intermediate_size)
    in_family = FAMILY_BY_WIDTH.get(grown.n_embd) == heads
    return dataclasses.replace(grown, name=f"{grown.n_layer}L{grown.n_embd}H" if in_family else "")
