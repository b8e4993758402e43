"""Which heads and neurons of a layer stand for which of the layer below it, by optimal transport (arXiv 2508.08011).

Heads and neurons of a layer have no order of their own: another order gives the same function. Two layers can therefore
be averaged only once the upper one is in the order of the lower. With as many on either side, each of the same weight,
the cheapest transport is a permutation. It is looked for among those that keep the function: neurons one by one (rows
of w1 and w2, columns of w3), query groups as a whole, and the query heads within a group; a head stays as it is, for
RoPE ties its channels to their place. Legend: C n_embd, D head_size, F neurons, G groups, H query heads, Q heads of a
group.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from grow.plan import NEEDS_SCIPY
from grow.width_tensors import compute_dtype
from lit_gpt.axes import HEADS, INTERMEDIATE, QKV, axes_of
from lit_gpt.config import Config

ALIGNED_BY = (
    *("attn.attn.weight", "attn.proj.weight"),
    *("mlp.swiglu.w1.weight", "mlp.swiglu.w2.weight", "mlp.swiglu.w3.weight"),
)
"""Parameters of a layer whose squared distances are the cost of transport."""


def align(lower: Mapping[str, Tensor], upper: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """For every axis that has an order, which entry of the upper layer stands for each entry of the lower.

    Args:
        lower: the matrices ALIGNED_BY of a layer, by their names in a block.
        upper: those of the layer after it.
        config: sizes of the model.

    Returns:
        Axis -> int64 index into the upper layer: QKV ((H + 2 G) D), HEADS (H D), INTERMEDIATE (F).

    Raises:
        ValueError: scipy is not installed.
    """
    dtype = compute_dtype(lower["attn.proj.weight"].dtype)
    lower, upper = ({part: layer[part].to(dtype) for part in ALIGNED_BY} for layer in (lower, upper))
    groups, heads = _match_heads(lower, upper, config)
    per_group, size = config.q_per_kv, config.head_size
    slots = torch.cat([heads % per_group, torch.tensor([[per_group, per_group + 1]]).expand(len(groups), 2)], dim=1)
    fused_heads = groups[:, None] * (per_group + 2) + slots  # (G, Q + 2): a group has its k and v after its q
    return {
        QKV: _channels(fused_heads.flatten(), size),
        HEADS: _channels(heads.flatten(), size),
        INTERMEDIATE: assign(_neuron_similarity(lower, upper)),
    }


def aligned_mean(name: str, lower: Tensor, upper: Tensor, alignment: Mapping[str, Tensor]) -> Tensor:
    """The mean of a parameter of two layers, the upper one in the order of the lower; dtype and shape of both."""
    for dim, axis in enumerate(axes_of(name)):
        if axis in alignment:
            upper = upper.index_select(dim, alignment[axis])
    wide = compute_dtype(lower.dtype)
    return ((lower.to(wide) + upper.to(wide)) / 2).to(lower.dtype)


def assign(similarity: Tensor) -> Tensor:
    """The permutation of columns with the largest sum of similarities, a column for every row.

    As lengths are the same in every order, it is also the one with the least sum of squared distances.

    Args:
        similarity: (n, n) inner products.

    Returns:
        int64 (n)

    Raises:
        ValueError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ValueError(NEEDS_SCIPY) from error
    return torch.from_numpy(linear_sum_assignment(similarity.numpy(), maximize=True)[1])


def _neuron_similarity(lower: Mapping[str, Tensor], upper: Mapping[str, Tensor]) -> Tensor:
    """(F, F)"""
    w1, w2, w3 = ((lower[part], upper[part]) for part in ALIGNED_BY[2:])
    return w1[0] @ w1[1].T + w2[0] @ w2[1].T + w3[0].T @ w3[1]


def _match_heads(lower: Mapping[str, Tensor], upper: Mapping[str, Tensor], config: Config) -> tuple[Tensor, Tensor]:
    """For every group of the lower layer one of the upper: (G); for every query head the one there: (G, Q)."""
    G, Q = config.n_query_groups, config.q_per_kv
    queries, keys = zip(*(_head_features(layer, config) for layer in (lower, upper)), strict=True)
    of_queries = (queries[0] @ queries[1].T).view(G, Q, G, Q).transpose(1, 2)  # (G, G, Q, Q)
    orders = torch.stack([torch.stack([assign(pair) for pair in row]) for row in of_queries])  # (G, G, Q)
    similarity = keys[0] @ keys[1].T + of_queries.gather(3, orders[..., None]).sum(dim=(2, 3))
    groups = assign(similarity)
    return groups, groups[:, None] * Q + orders[torch.arange(G), groups]


def _head_features(layer: Mapping[str, Tensor], config: Config) -> tuple[Tensor, Tensor]:
    """What tells query heads apart, their rows and what they write, (H, 2 D C); and groups, k and v, (G, 2 D C)."""
    G, H, D = config.n_query_groups, config.n_head, config.head_size
    qkv = layer["attn.attn.weight"].view(G, config.q_per_kv + 2, D * config.n_embd)
    writes = layer["attn.proj.weight"].T.reshape(H, D * config.n_embd)
    return torch.cat([qkv[:, :-2].reshape(H, -1), writes], dim=1), qkv[:, -2:].reshape(G, -1)


def _channels(heads: Tensor, head_size: int) -> Tensor:
    """Indices of heads -> those of their channels."""
    return (heads[:, None] * head_size + torch.arange(head_size)).flatten()
