"""Growth by learned mixing matrices, in depth and in width: LiGO (arXiv 2303.00980). Read grow/mixing.py first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from grow.check import check_weights
from grow.mixing import initial_depth, initial_width, mixed, parts_of, weights_of
from grow.plan import GrowthPlan
from grow.registry import LEARN_STEPS
from grow.width_tensors import compute_dtype
from lit_gpt.axes import parameter_shapes
from lit_gpt.errors import NonFiniteError
from lit_gpt.model import GPT

# The best of 0.003 to 0.3 (depth), 0.001 to 0.03 (width), after 100 steps of 8 x 128 tokens of Tiny Shakespeare, from
# stories260K to twice its depth or width; for both at once matrices over layers want the smaller rate too.
DEPTH_RATE, WIDTH_RATE = 0.03, 0.002
BETAS = (0.9, 0.95)
GRAD_CLIP = 1.0


class LearnedGrowth(nn.Module):
    """The grown model as a function of mixing matrices, which are its only parameters.

    The source's weights are buffers outside the state dict: they move with the module and are never trained or saved.
    At first every layer is the one that the plan's layer map names, and every channel, head and neuron with a source is
    that. The grown weights are made anew in every forward, and exist beside their gradients for that long.

    Args:
        plan: sizes, layer map and seed; its operator need not be one that learns.
        weights: of the source, name -> tensor; they are copied.

    Raises:
        ValueError: the plan has new layers.
        DataError: the weights are not those of a model of the plan's source sizes.
    """

    def __init__(self, plan: GrowthPlan, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        check_weights(plan.src, weights, "the source", allow_non_finite=True)
        self.plan = plan
        for part, tensor in parts_of(weights, plan.src).items():
            self.register_buffer(part, tensor.detach(), persistent=False)
        dtype, device = compute_dtype(self.wte.dtype), self.wte.device
        self.depth = _parameters(initial_depth(plan, dtype), device)
        self.width = _parameters(initial_width(plan, dtype), device)
        with torch.device("meta"):
            self._grown = (GPT(plan.dst),)  # in a tuple, so that its parameters are not this module's

    @property
    def model(self) -> GPT:
        """The model that computes; its own weights are on no device. For compute_dtype, kernels and compiling."""
        return self._grown[0]

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, reduction: str = "mean", separator_id: int | None = None
    ) -> Tensor:
        """Logits or loss of the grown model, as `lit_gpt.model.GPT.forward`; idx and targets (B, T)."""
        options = {"reduction": reduction, "separator_id": separator_id}
        return functional_call(self.model, self.grown_weights(), (idx, targets), options)

    def grown_weights(self) -> dict[str, Tensor]:
        """Weights of the grown model, differentiable in the matrices, in fp32 or float64; some share storage."""
        source = dict(self.named_buffers())
        return weights_of(mixed(source, dict(self.depth), dict(self.width), self.plan), self.plan.dst)

    @torch.no_grad()
    def materialise(self) -> dict[str, Tensor]:
        """Weights of the plain grown model in the order of the model: detached, in the source's dtype, own storage."""
        weights = self.grown_weights()
        return {name: weights[name].to(self.wte.dtype, copy=True) for name in parameter_shapes(self.plan.dst)}


def _parameters(matrices: Mapping[str, Tensor], device: torch.device) -> nn.ParameterDict:
    return nn.ParameterDict({name: nn.Parameter(matrix.to(device)) for name, matrix in matrices.items()})


def default_rate(plan: GrowthPlan) -> float:
    """The learning rate of the mixing matrices, where nobody gives one."""
    return DEPTH_RATE if plan.width is None else WIDTH_RATE


def learn(
    growth: LearnedGrowth,
    batches: Iterator[Tensor],
    *,
    steps: int = LEARN_STEPS,
    rate: float | None = None,
) -> list[float]:
    """Train the mixing matrices in place by AdamW, at a rate that falls linearly to 0. Deterministic.

    Without weight decay, which would pull the matrices towards 0.

    Args:
        growth: what is trained.
        batches: (B, T + 1) int64 each; the last column is only a target. `steps` of them are read.
        steps: updates.
        rate: of the first step; None takes `default_rate`.

    Returns:
        The loss before each update, nats per token.

    Raises:
        ValueError: no steps.
        NonFiniteError: a loss or a gradient is not a number; the update was not made.
    """
    if steps < 1:
        raise ValueError(f"learn_steps={steps} must be at least 1; stack grows by what learning starts from in depth")
    rate = default_rate(growth.plan) if rate is None else rate
    parameters = list(growth.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=BETAS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses: list[float] = []
    for step in range(steps):
        rows = next(batches).to(growth.wte.device)
        loss = growth(rows[:, :-1], rows[:, 1:])
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(parameters, GRAD_CLIP))
        losses.append(loss.item())
        if not (math.isfinite(losses[-1]) and math.isfinite(norm)):
            raise NonFiniteError(
                f"step {step + 1} of learned growth: loss {losses[-1]}, gradient norm {norm}; nothing was grown. "
                f"Lower --learn-rate (now {rate:g}), or look at the data and at the source's weights"
            )
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return losses
