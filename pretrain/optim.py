"""AdamW or Muon over named parameters, and the learning rate as a pure function of the stage's step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn as nn
from torch import Tensor

from lit_gpt.axes import layer_of
from lit_gpt.lazy_tensors import fill_from, is_shared, spec_of
from pretrain.config import OptimizerConfig, ScheduleConfig

OptimizerState = dict[str, dict[str, Tensor]]
"""Parameter name -> its slots: ADAMW_SLOTS or MUON_SLOTS."""
ADAMW_SLOTS, MUON_SLOTS = frozenset({"exp_avg", "exp_avg_sq", "step"}), frozenset({"momentum_buffer"})


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


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon (torch.optim.Muon) for some parameters and fused AdamW for the others, with one state and one step.

    Muon has no door like fused AdamW's `found_inf`, which skips a step on the device: the host reads whether a step is
    to be skipped before it is made, and so waits for the device once a step.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW | None) -> None:
        groups = [*muon.param_groups, *(adamw.param_groups if adamw else [])]
        super().__init__(groups, {})
        self.param_groups = groups  # the same dicts: both parts see a new learning rate
        self.muon, self.adamw = muon, adamw
        for part in filter(None, (muon, adamw)):
            part.state = self.state
        self.found_inf: Tensor | None = None

    def step(self, closure: None = None) -> None:
        """One update, or none where `found_inf` says so."""
        if self.found_inf is not None and bool(self.found_inf):
            return
        self.muon.step()
        if self.adamw is not None:
            self.adamw.step()

    def is_muons(self, parameter: Tensor) -> bool:
        return any(parameter is each for group in self.muon.param_groups for each in group["params"])


def build_optimizer(model: nn.Module, settings: OptimizerConfig) -> torch.optim.Optimizer:
    """Over what trains, as the settings say; matrices are decayed, norm weights only with decay="all"."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in trained.items() if p.dim() == 2 and layer_of(name) is not None}
    if settings.name == "adamw" or not matrices:
        return _adamw(trained.values(), settings)
    rest = [p for name, p in trained.items() if name not in matrices]
    muon = torch.optim.Muon(
        list(matrices.values()),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return MuonAndAdamW(muon, _adamw(rest, settings) if rest else None)


def _adamw(parameters: Iterable[nn.Parameter], settings: OptimizerConfig) -> torch.optim.AdamW:
    trained = list(parameters)
    decayed = [p for p in trained if p.dim() >= 2 or settings.decay == "all"]
    plain = [p for p in trained if p.dim() < 2 and settings.decay != "all"]
    groups = [  # fused AdamW takes no group of which processes share a part
        {"params": [p for p in parameters if is_shared(p) == shared], "weight_decay": decay}
        for parameters, decay in ((decayed, settings.weight_decay), (plain, 0.0))
        for shared in (True, False)
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> OptimizerState:
    """The moments by parameter name; independent of group order and of the AdamW implementation."""
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}


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
        is_muons = isinstance(optimizer, MuonAndAdamW) and optimizer.is_muons(parameter)
        slots = MUON_SLOTS if is_muons else ADAMW_SLOTS
        if slots <= set(moments):
            optimizer.state[parameter] = {slot: _slot(parameter, moments, slot) for slot in sorted(slots)}
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
