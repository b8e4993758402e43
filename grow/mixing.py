"""The grown model as a linear function of mixing matrices: what LiGO learns. Read lit_gpt/axes.py first.

A weight of layer l of the grown model is sum_j D[l, j] (B_out W_j B_in^T), where W_j is that of layer j of the source,
every kind of weight has a D, and every axis a B. There is a matrix for what grows and none for what stays:

    name                                      shape       mixes
    depth.q k v o w1 w2 w3 norm_1 norm_2      (L', L)     layers
    width.embd                                (C', C)     residual channels
    width.q, width.k, width.v                 (H', H), (G', G), (G', G)    whole heads, as RoPE demands
    width.mlp                                 (F', F)     neurons

Legend: L n_layer, C n_embd, H n_head, G n_query_groups, D head_size, F intermediate_size; a prime is after growth.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from grow.plan import GrowthPlan
from grow.width_plan import IndexMap
from grow.width_tensors import compute_dtype, generator
from lit_gpt.axes import EMBEDDING, FINAL_NORM, HEAD, with_layer
from lit_gpt.config import Config
from lit_gpt.hf import fuse_qkv, split_qkv

NAME_OF_PART = {
    "o": "attn.proj.weight",
    "w1": "mlp.swiglu.w1.weight",
    "w2": "mlp.swiglu.w2.weight",
    "w3": "mlp.swiglu.w3.weight",
    "norm_1": "norm_1.weight",
    "norm_2": "norm_2.weight",
}
FUSED = "attn.attn.weight"
PARTS = ("q", "k", "v", *NAME_OF_PART)
"""Kinds of weights of a layer, q, k and v apart."""
OUTSIDE = {"wte": EMBEDDING, "ln_f": FINAL_NORM, "lm_head": HEAD}


def parts_of(weights: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """All weights of a model, those of all layers in one tensor per kind: (n_layer, rows, columns) or (n_layer, C)."""
    qkv = [split_qkv(weights[with_layer(FUSED, layer)], config) for layer in range(config.n_layer)]
    parts = {name: torch.stack(layers) for name, layers in zip("qkv", zip(*qkv, strict=True), strict=True)}
    for part, name in NAME_OF_PART.items():
        parts[part] = torch.stack([weights[with_layer(name, layer)] for layer in range(config.n_layer)])
    outside = {part: name for part, name in OUTSIDE.items() if not (part == "lm_head" and config.tie_embeddings)}
    return parts | {part: weights[name].clone() for part, name in outside.items()}


def weights_of(parts: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The inverse of `parts_of`; tensors may share storage."""
    weights = {OUTSIDE[part]: tensor for part, tensor in parts.items() if part in OUTSIDE}
    for layer in range(config.n_layer):
        q, k, v = (parts[part][layer].contiguous() for part in "qkv")
        weights[with_layer(FUSED, layer)] = fuse_qkv(q, k, v, config)
        weights |= {with_layer(name, layer): parts[part][layer] for part, name in NAME_OF_PART.items()}
    return weights


def initial_depth(plan: GrowthPlan, dtype: torch.dtype) -> dict[str, Tensor]:
    """Matrices with which every layer is the one that the layer map names: (L', L) each; none if the depth stays.

    Raises:
        ValueError: the map has new layers, of which nothing could be learned: they would be a sum over no layers.
    """
    layers = plan.layer_map
    if layers == tuple(range(plan.src.n_layer)):
        return {}
    if None in layers:
        raise ValueError(
            f"layer {layers.index(None) + 1} is new; learned growth mixes layers of the source, so name one"
        )
    matrix = torch.zeros(len(layers), plan.src.n_layer, dtype=dtype)
    matrix[torch.arange(len(layers)), torch.tensor(layers)] = 1.0
    return {part: matrix.clone() for part in PARTS}


def initial_width(plan: GrowthPlan, dtype: torch.dtype) -> dict[str, Tensor]:
    """[I; N(0, 1/n)] for every axis that grows to n: what has a source is it, what has none is a random mixture."""
    if plan.width is None:
        return {}
    width, q_per_kv = plan.width, plan.src.q_per_kv
    heads = tuple(
        None if group is None or slot is None else group * q_per_kv + slot
        for group in width.groups
        for slot in width.slots
    )
    maps = {"embd": width.channels, "q": heads, "k": width.groups, "v": width.groups, "mlp": width.neurons}
    sizes = {
        "embd": plan.src.n_embd,
        "q": plan.src.n_head,
        "k": plan.src.n_query_groups,
        "v": plan.src.n_query_groups,
        "mlp": plan.src.intermediate_size,
    }
    return {
        name: _identity_and_noise(index_map, sizes[name], plan.seed, name).to(dtype)
        for name, index_map in maps.items()
        if index_map != tuple(range(sizes[name]))
    }


def _identity_and_noise(index_map: IndexMap, n_src: int, seed: int, name: str) -> Tensor:
    matrix = torch.empty(len(index_map), n_src)
    matrix.normal_(0.0, len(index_map) ** -0.5, generator=generator(seed, "mixing", name))
    for row, source in enumerate(index_map):
        if source is not None:
            matrix[row] = torch.eye(1, n_src).roll(source)[0]
    return matrix


def mixed(
    source: Mapping[str, Tensor],
    depth: Mapping[str, Tensor],
    width: Mapping[str, Tensor],
    plan: GrowthPlan,
) -> dict[str, Tensor]:
    """The parts of the grown model, differentiable in the matrices.

    Args:
        source: parts of the source, as by `parts_of`.
        depth: kind of weight -> (L', L); may be empty.
        width: axis -> matrix; may be empty.
        plan: gives the sizes.
    """
    dtype = compute_dtype(source["wte"].dtype)
    depth, width = ({name: matrix.to(dtype) for name, matrix in each.items()} for each in (depth, width))
    grown = {}
    for part, tensor in source.items():
        wider = _widened(part, tensor.to(dtype), width, plan)
        grown[part] = (depth[part] @ wider.flatten(1)).unflatten(1, wider.shape[1:]) if part in depth else wider
    return grown


def _widened(part: str, tensor: Tensor, width: Mapping[str, Tensor], plan: GrowthPlan) -> Tensor:
    """A part (..., rows, columns) or (..., C) with B_out on its rows and B_in on its columns."""
    embd, mlp = width.get("embd"), width.get("mlp")
    match part:
        case "norm_1" | "norm_2" | "ln_f" | "wte" | "lm_head":
            return _on_columns(embd, tensor)
        case "q" | "k" | "v":
            return _on_heads(width.get(part), _on_columns(embd, tensor), plan.src.head_size)
        case "o":
            return _on_rows(embd, _output_heads(width.get("v"), tensor, plan))
        case "w3":
            return _on_rows(embd, _on_columns(mlp, tensor))
        case _:
            return _on_rows(mlp, _on_columns(embd, tensor))


def _on_rows(matrix: Tensor | None, tensor: Tensor) -> Tensor:
    return tensor if matrix is None else matrix @ tensor


def _on_columns(matrix: Tensor | None, tensor: Tensor) -> Tensor:
    return tensor if matrix is None else tensor @ matrix.T


def _on_heads(matrix: Tensor | None, tensor: Tensor, head_size: int) -> Tensor:
    """(B (x) I) on the rows of (L, n D, C): whole heads are mixed, so that a channel keeps its rotary frequency."""
    if matrix is None:
        return tensor
    heads = tensor.unflatten(1, (-1, head_size))  # (L, n, D, C)
    return torch.einsum("ij,ljdc->lidc", matrix, heads).flatten(1, 2)


def _output_heads(matrix: Tensor | None, tensor: Tensor, plan: GrowthPlan) -> Tensor:
    """What reads the heads, (L, C, H D): B_v for every query head of a group, new slots s as slot s mod q before."""
    src, dst = plan.src, plan.dst
    heads = tensor.unflatten(2, (src.n_query_groups, src.q_per_kv, src.head_size))  # (L, C, G, q, D)
    if dst.q_per_kv != src.q_per_kv:
        heads = heads[:, :, :, torch.arange(dst.q_per_kv, device=heads.device) % src.q_per_kv]
    if matrix is not None:
        heads = torch.einsum("ij,lcjsd->lcisd", matrix, heads)
    return heads.flatten(2)
