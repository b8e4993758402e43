"""Before anything is trained: does every chosen kernel compute what its reference does, forward and backward?"""

from __future__ import annotations

from collections.abc import Callable, Iterable

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

ROWS, TOKENS, HEADS, GROUPS, CHANNELS, VOCAB = 2, 16, 4, 2, 64, 96


def self_check(kernels: Kernels, situation: Situation, device: torch.device) -> None:
    """Compare each operation on a tiny input; a fraction of a second once a GPU is awake.

    Raises:
        BackendUnavailable: naming the first that is off, and by how much.
    """
    for operation, function, oracle, inputs in _cases(kernels, situation, device):
        name, allowed = getattr(kernels.names, operation), tolerance(situation.dtype)
        try:
            found = values_and_gradients(function, inputs)
        except RuntimeError as error:
            raise BackendUnavailable(
                f"kernels.{operation}={name!r} fails on its first input: {error}. {_advice(operation)}"
            ) from error
        # both start from the same rounded numbers, and the oracle computes with them in float64
        exact = values_and_gradients(oracle, [x.double() if x.is_floating_point() else x for x in inputs])
        errors = [relative_error(one, other) for one, other in zip(found, exact, strict=True)]
        wrong = [error for error in errors if not error <= allowed]  # NaN is wrong
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


def _cases(
    kernels: Kernels, situation: Situation, device: torch.device
) -> list[tuple[str, Function, Function, list[Tensor]]]:
    """Operation, what was chosen, the reference, and an input for both."""
    generator = torch.Generator().manual_seed(0)
    has_bf16 = device.type != "cpu" or cpu_multiplies_bf16()

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, situation.dtype)

    def stored(*shape: int) -> Tensor:  # weights are wider than what blocks compute with
        return torch.randn(shape, generator=generator).to(device, torch.promote_types(situation.dtype, torch.float32))

    D, C = max(situation.head_sizes), CHANNELS
    q, k, v = random(ROWS, HEADS, TOKENS, D), random(ROWS, GROUPS, TOKENS, D), random(ROWS, GROUPS, TOKENS, D)
    x, delta, weight = random(ROWS, TOKENS, C), random(ROWS, TOKENS, C), stored(C)
    hidden, head = random(ROWS * TOKENS, C), stored(VOCAB, C)
    targets = torch.arange(ROWS * TOKENS, device=device)
    targets[0] = -100
    angles = torch.arange(TOKENS)[:, None] * torch.linspace(1.0, 0.1, D // 2)
    cos, sin = (t.to(device) for t in cos_sin(angles))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(q, k, v, cpu_has_bf16=has_bf16, by=kernels.attention)

    return [
        ("attention", attention, reference.attention, [q, k, v]),
        ("norm", lambda x, w: kernels.norm.alone(x, w, 1e-5), lambda x, w: reference.rms_norm(x, w, 1e-5), [x, weight]),
        (
            "norm",
            lambda x, d, w: kernels.norm.after_adding(x, d, w, 1e-5),
            lambda x, d, w: reference.add_rms_norm(x, d, w, 1e-5),
            [x, delta, weight],
        ),
        ("mlp", lambda g, u: kernels.mlp(g, u, False), lambda g, u: reference.gated(g, u, False), [x, delta]),
        (
            "rope",
            lambda x: kernels.rope(x, cos, sin),
            lambda x: reference.rope(x, cos.double(), sin.double()),
            [q.transpose(1, 2)],
        ),
        (
            "loss",
            lambda h, w: kernels.loss(h, w, targets, reduction="mean"),
            lambda h, w: reference.linear_cross_entropy(h, w, targets),
            [hidden, head],
        ),
    ]
