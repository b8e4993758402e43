"""Operators that grow in depth: pure functions from two depths to a layer map, layers counted from 0."""

from __future__ import annotations

from collections.abc import Sequence

from grow.layer_map import check_layer_map, parse_layer_map


def stack(n_layer_src: int, n_layer_dst: int) -> tuple[int, ...]:
    """Repeat the whole tower, 0 1 2 0 1 2.

    G_stack, or G_direct in depth, of "Stacking Your Transformers" (arXiv 2405.15319). All parameters of a layer are
    copied. Does not preserve the function: the loss rises at growth and falls below scratch's in training.

    Raises:
        ValueError: the source's depth does not divide the grown one.
    """
    if n_layer_dst % n_layer_src:
        below = n_layer_dst // n_layer_src * n_layer_src
        raise ValueError(
            f"stack needs a whole factor, and {n_layer_src} layers do not divide {n_layer_dst}; "
            f"use {max(below, n_layer_src)} or {below + n_layer_src} layers, give a layer map, or use interpolate"
        )
    return tuple(layer % n_layer_src for layer in range(n_layer_dst))


def interpolate(n_layer_src: int, n_layer_dst: int) -> tuple[int, ...]:
    """Repeat every layer where it stands, 0 0 1 1 2 2; any depth will do.

    "Interpolation" of arXiv 2405.15319, section 5, also known as interleaving; the remainder is spread evenly.
    Does not preserve the function, and keeps fewer neighbours together than stacking (a lower connection rate).
    """
    return tuple(layer * n_layer_src // n_layer_dst for layer in range(n_layer_dst))


def partial(n_layer_src: int, n_layer_dst: int | None, layer_map: str | Sequence[int]) -> tuple[int, ...]:
    """The layers that an explicit map names, e.g. "12-3456*5-56".

    Partial stacking of arXiv 2405.15319, section 5: repeating a part of the tower; the closer a map's connection rate
    is to that of stacking, the better it did there. Does not preserve the function.

    Args:
        n_layer_src: layers of the source.
        n_layer_dst: layers the map must have; None takes as many as it has.
        layer_map: text as in grow/layer_map.py (layers from 1), or a sequence of layers counted from 0.

    Raises:
        ValueError: the map is malformed, names a layer that does not exist, or has another length.
    """
    if isinstance(layer_map, str):
        return parse_layer_map(layer_map, n_layer_src=n_layer_src, n_layer=n_layer_dst)
    layers = tuple(layer_map)
    check_layer_map(layers, n_layer_src, len(layers) if n_layer_dst is None else n_layer_dst)
    return layers
