"""Activation checkpointing (arXiv 1604.06174): a layer's activations are made again in backward instead of kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

RECOMPUTE = {
    "none": "all activations are kept",
    "selective": "results of matrix products and attention are kept, the rest is made again",
    "full": "only a layer's input is kept",
}
KEPT_OPS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._scaled_mm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)
"""Costly to compute beside the memory that they take."""


def recomputed(layer: Callable[..., Tensor], how: str, *inputs: Any) -> Tensor:
    """`layer(*inputs)`, of whose activations as much is kept for backward as `how`, one of RECOMPUTE, says.

    Gradients are the same to the bit. Nothing in a layer draws random numbers, so none are kept.
    """
    if how == "none" or not torch.is_grad_enabled():
        return layer(*inputs)
    keep = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if how == "selective" else {}
    return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False, **keep)


def _policy(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE
