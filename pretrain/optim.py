"""The optimizer of named parameters, and the learning rate as a pure function of the stage's step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lit_gpt.axes import layer_of
from lit_gpt.lazy_tensors import fill_from, is_shared, spec_of
from pretrain.config import OptimizerConfig, ScheduleConfig
from pretrain.optimizers import ADAMW_SLOTS, AdamW8bit, PlainMoments, SkippedByHost

OptimizerState = Mapping[str, Mapping[str, Tensor]]
"""Parameter name -> its slots: ADAMW_SLOTS or MUON_SLOTS."""


def learning_rate(stage_step: int, total_steps: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Learning rate of the update after `stage_step` finished ones.

    Linear warm-up to the peak, then cosine (arXiv 1608.03983, one cycle) or stable-then-decay (arXiv 2404.06395).
    """
    peak, low = optimizer.learning_rate, optimizer.min_learning_rate
    if stage_step < schedule.warmup_steps:
        return peak * (stage_step + 1) / schedule.warmup_steps
    if schedule.kind == "wsd":
        left = total_steps - stage_step
        return peak if left > schedule.decay_steps else low + (peak - low) * left / schedule.decay_steps
    horizon = schedule.horizon_steps or total_steps
    done = (stage_step - schedule.warmup_steps) / max(1, horizon - schedule.warmup_steps)
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def build_optimizer(model: nn.Module, settings: OptimizerConfig) -> torch.optim.Optimizer:
    """Over what trains, as the settings say; matrices are decayed, norm weights only with decay="all"."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in trained.items() if p.dim() == 2 and layer_of(name) is not None}
    if settings.name == "adamw8bit":
        return AdamW8bit(_groups(trained.values(), settings), settings)
    if settings.name == "adamw" or not matrices:
        return _adamw(trained.values(), settings)
    rest = [p for name, p in trained.items() if name not in matrices]
    muon = torch.optim.Muon(
        list(matrices.values()),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return SkippedByHost(muon, *([_adamw(rest, settings)] if rest else []))


def _adamw(parameters: Iterable[nn.Parameter], settings: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        _groups(parameters, settings),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def _groups(parameters: Iterable[nn.Parameter], settings: OptimizerConfig) -> list[dict[str, Any]]:
    trained = list(parameters)
    decayed = [p for p in trained if p.dim() >= 2 or settings.decay == "all"]
    plain = [p for p in trained if p.dim() < 2 and settings.decay != "all"]
    groups = [  # fused AdamW takes no group of which processes share a part
        {"params": [p for p in parameters if is_shared(p) == shared], "weight_decay": decay}
        for parameters, decay in ((decayed, settings.weight_decay), (plain, 0.0))
        for shared in (True, False)
    ]
    return [group for group in groups if group["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # what was compiled with it sees the same tensor
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> OptimizerState:
    """The moments by parameter name; independent of group order and of the AdamW implementation.

    Those in 8 bits are made from them on every access, so that they are never there at once.
    """
    made = PlainMoments if isinstance(optimizer, AdamW8bit) else lambda _, slots: dict(slots)
    return {name: made(p, optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}


def load_named_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Mapping[str, Tensor]]
) -> int:
    """Put moments back; parameters that `state` does not name, or names with another optimizer's, start without.

    Returns:
        How many `state` has nothing but another optimizer's moments for.

    Raises:
        ValueError: `state` names a parameter that the model does not have.
    """
    parameters = dict(model.named_parameters())
    unknown = sorted(set(state) - set(parameters))
    if unknown:
        raise ValueError(f"optimizer state for unknown parameters: {', '.join(unknown[:5])}")
    n_without = 0
    for name in state:
        # fused AdamW wants its step counter as fp32 beside the parameter
        moments, parameter = state[name], parameters[name]
        slots = optimizer.slots(parameter) if isinstance(optimizer, SkippedByHost) else ADAMW_SLOTS
        if slots <= set(moments):
            made = optimizer.stored if isinstance(optimizer, AdamW8bit) else lambda _, __, moment: moment
            optimizer.state[parameter] = {
                slot: made(parameter, slot, _slot(parameter, moments, slot)) for slot in sorted(slots)
            }
        else:
            n_without += 1
    return n_without


@torch.no_grad()
def _slot(parameter: Tensor, moments: Mapping[str, Tensor], slot: str) -> Tensor:
    """A part of a parameter's state, shared among processes as the parameter is; no more of it is read than that."""
    spec = spec_of(moments, slot)
    if not spec.shape:
        return moments[slot].to(device=parameter.device, copy=True)
    filled = torch.empty_like(parameter, dtype=spec.dtype, requires_grad=False)
    fill_from(moments, slot, filled)
    return filled
