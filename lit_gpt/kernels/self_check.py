"""Before anything is trained: does every chosen kernel compute what its reference does, forward and backward?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt.kernels import reference
from lit_gpt.kernels.attention import causal_attention
from lit_gpt.kernels.backend import HALF, Situation
from lit_gpt.kernels.choice import Kernels
from lit_gpt.kernels.products import cpu_multiplies_bf16
from lit_gpt.kernels.rope import cos_sin
from lit_gpt.kernels.settings import DOCTOR, BackendUnavailable

Function = Callable[..., "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Shape:
    """Of the inputs, by default so small that nobody waits; the size of a head is the situation's."""

    rows: int = 2
    tokens: int = 16
    heads: int = 4
    groups: int = 2
    channels: int = 64
    intermediate_size: int = 64
    vocab: int = 96


@dataclass(frozen=True)
class Case:
    """An operation on an input, beside its reference."""

    operation: str
    """As in KernelConfig."""
    function: Function
    oracle: Function
    inputs: list[Tensor]


def self_check(kernels: Kernels, situation: Situation, device: torch.device) -> None:
    """Compare each operation on a tiny input; a fraction of a second once a GPU is awake.

    Raises:
        BackendUnavailable: naming the first that is off, and by how much.
    """
    for case in cases(kernels, situation, device):
        operation, allowed = case.operation, tolerance(situation.dtype)
        name = getattr(kernels.names, operation)
        try:
            found = values_and_gradients(case.function, case.inputs)
        except Exception as error:  # of any package: those of Triton are no RuntimeErrors
            raise BackendUnavailable(
                f"kernels.{operation}={name!r} fails on its first input: {error}. {_advice(operation)}"
            ) from error
        wrong = [error for error in errors_of(found, case) if not error <= allowed]  # NaN is wrong
        if wrong:
            raise BackendUnavailable(
                f"kernels.{operation}={name!r} computes something else than the reference: relative error "
                f"{wrong[0]:.2g}, where {allowed:.2g} is allowed in {situation.dtype}. {_advice(operation)}"
            )


def _advice(operation: str) -> str:
    return f"Choose another kernels.{operation}; {DOCTOR} lists them"


def tolerance(dtype: torch.dtype) -> float:
    """Largest ||found - exact|| / ||exact|| that rounding explains, with room: a wrong formula is off by much more."""
    return 3e-2 if dtype in HALF else 1e-4


def errors_of(found: Iterable[Tensor], case: Case) -> list[float]:
    """Relative errors of values and gradients. The oracle computes in float64, from the same rounded numbers."""
    exact = values_and_gradients(case.oracle, [x.double() if x.is_floating_point() else x for x in case.inputs])
    return [relative_error(one, other) for one, other in zip(found, exact, strict=True)]


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def values_and_gradients(function: Function, inputs: Iterable[Tensor]) -> list[Tensor]:
    """What it returns, and the gradients of its floating-point inputs for fixed weights of all that it returns."""
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    with torch.enable_grad():
        returned = function(*inputs)
        outputs = returned if isinstance(returned, tuple) else (returned,)
        weights = [_ramp(each) for each in outputs]
        gradients = torch.autograd.grad(
            outputs, [x for x in inputs if x.requires_grad], weights, materialize_grads=True
        )
    return [*(each.detach() for each in outputs), *gradients]


def _ramp(like: Tensor) -> Tensor:
    """Numbers between 0.5 and 1.5, no two neighbours alike, the same on every device."""
    steps = torch.arange(like.numel(), device=like.device) * 7 % 16
    return (0.5 + steps / 16).to(like.dtype).view(like.shape)


def cases(kernels: Kernels, situation: Situation, device: torch.device, shape: Shape = Shape()) -> list[Case]:
    """What was chosen, the reference, and an input for both; of `norm` alone, and after adding."""
    generator = torch.Generator().manual_seed(0)
    has_bf16 = device.type != "cpu" or cpu_multiplies_bf16()

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, situation.dtype)

    def stored(*shape: int) -> Tensor:  # weights are wider than what blocks compute with
        return torch.randn(shape, generator=generator).to(device, torch.promote_types(situation.dtype, torch.float32))

    B, T, C, D, n = shape.rows, shape.tokens, shape.channels, max(situation.head_sizes), shape.rows * shape.tokens
    q, k, v = random(B, shape.heads, T, D), random(B, shape.groups, T, D), random(B, shape.groups, T, D)
    x, delta, weight = random(B, T, C), random(B, T, C), stored(C)
    gate, up = random(B, T, shape.intermediate_size), random(B, T, shape.intermediate_size)
    hidden, head = random(n, C), stored(shape.vocab, C) / C**0.5  # or its gradients would be subnormal numbers
    targets = torch.arange(n, device=device) % shape.vocab
    targets[0] = -100
    angles = torch.arange(T)[:, None] * torch.linspace(1.0, 0.1, D // 2)
    cos, sin = (t.to(device) for t in cos_sin(angles))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(q, k, v, cpu_has_bf16=has_bf16, by=kernels.attention)

    return [
        Case("attention", attention, reference.attention, [q, k, v]),
        Case(
            "norm",
            lambda x, w: kernels.norm.alone(x, w, 1e-5),
            lambda x, w: reference.rms_norm(x, w, 1e-5),
            [x, weight],
        ),
        Case(
            "norm",
            lambda x, d, w: kernels.norm.after_adding(x, d, w, 1e-5),
            lambda x, d, w: reference.add_rms_norm(x, d, w, 1e-5),
            [x, delta, weight],
        ),
        Case("mlp", lambda g, u: kernels.mlp(g, u, False), lambda g, u: reference.gated(g, u, False), [gate, up]),
        Case(
            "rope",
            lambda x: kernels.rope(x, cos, sin),
            lambda x: reference.rope(x, cos.double(), sin.double()),
            [q.transpose(1, 2)],
        ),
        Case(
            "loss",
            lambda h, w: kernels.loss(h, w, targets, reduction="mean"),
            lambda h, w: reference.linear_cross_entropy(h, w, targets),
            [hidden, head],
        ),
    ]
