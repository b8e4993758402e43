"""Our Triton kernels as operations of torch: with shapes for the compiler and gradients for autograd.

The compiler and FSDP see one opaque operation each. All inputs are fp32, bf16 or fp16; sums are in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from lit_gpt.kernels import triton_kernels as kernels

MAX_COLS = 8192  # of a row that a program holds in registers; wider ones spill
GATE_BLOCK = 1024
LOSS_BLOCK = 4096
ROTATE_ELEMENTS = 2048  # of each half, per program
PROGRAMS_PER_SM = 4  # of the norm's backward: its registers leave room for so many, and one alone waits for memory


def power_of_2(n: int) -> int:
    """The smallest one that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def norm_warps(block: int) -> int:
    return 4 if block <= 1024 else 8 if block <= 4096 else 16


@custom_op("lit_grow::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (..., C), contiguous. Returns y (..., C), and what its rows were scaled by, (...) fp32."""
    y, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    _launch_norm(x, x, weight, x, y, scale, eps, adds=False)
    return y, scale


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


@custom_op("lit_grow::add_rms_norm", mutates_args=())
def _add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x, delta (..., C), contiguous, of one dtype. Returns x + delta, y and the scales."""
    total, y, scale = torch.empty_like(x), torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    _launch_norm(x, delta, weight, total, y, scale, eps, adds=True)
    return total, y, scale


@_add_rms_norm.register_fake
def _(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _launch_norm(
    x: Tensor, delta: Tensor, weight: Tensor, total: Tensor, y: Tensor, scale: Tensor, eps: float, *, adds: bool
) -> None:
    rows, cols = scale.numel(), x.size(-1)
    block = power_of_2(cols)
    with torch.cuda.device_of(x):
        kernels.norm_forward[(rows,)](
            *(x, delta, weight, total, y, scale, cols, eps), ADDS=adds, BLOCK=block, num_warps=norm_warps(block)
        )


@custom_op("lit_grow::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    grad_y: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """grad_y, grad_total, total (..., C), contiguous. Returns the gradients of total (..., C) and of weight (C,)."""
    rows, cols = scale.numel(), total.size(-1)
    programs = min(rows, PROGRAMS_PER_SM * _multiprocessors(total.device))
    rows_each = -(-rows // programs)
    grad_x = torch.empty_like(total)
    parts = total.new_empty(programs, cols, dtype=torch.float32)
    block = power_of_2(cols)
    adds = grad_total is not None
    with torch.cuda.device_of(total):
        kernels.norm_backward[(programs,)](
            *(grad_y, grad_total if adds else grad_y, total, weight, scale, grad_x, parts, rows, cols),
            **{"ROWS": rows_each, "ADDS": adds, "BLOCK": block, "num_warps": norm_warps(block)},
        )
    return grad_x, parts.sum(0).to(weight.dtype)


@_rms_norm_backward.register_fake
def _(grad_y: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(total), torch.empty_like(weight)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _norm_gradients(ctx: Any, grad_y: Tensor, _: Any) -> tuple[Tensor, Tensor, None]:
    x, weight, scale = ctx.saved_tensors
    return *_rms_norm_backward(grad_y.contiguous(), None, x, weight, scale), None


def _keep_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    total, _, scale = output
    ctx.save_for_backward(total, inputs[2], scale)


def _add_norm_gradients(ctx: Any, grad_total: Tensor, grad_y: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor, None]:
    total, weight, scale = ctx.saved_tensors
    grad_x, grad_weight = _rms_norm_backward(grad_y.contiguous(), grad_total.contiguous(), total, weight, scale)
    return grad_x, grad_x, grad_weight, None


_rms_norm.register_autograd(_norm_gradients, setup_context=_keep_norm)
_add_rms_norm.register_autograd(_add_norm_gradients, setup_context=_keep_add_norm)


def triton_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `lit_gpt.kernels.reference.rms_norm`."""
    return _rms_norm(x.contiguous(), weight, eps)[0]


def triton_add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `lit_gpt.kernels.reference.add_rms_norm`, in one pass over memory."""
    total, y, _ = _add_rms_norm(x.contiguous(), delta.to(x.dtype).contiguous(), weight, eps)
    return total, y


@custom_op("lit_grow::gated", mutates_args=())
def _gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """gate, up: contiguous, of one shape and dtype. Returns the same."""
    y = torch.empty_like(gate)
    with torch.cuda.device_of(gate):
        kernels.gate_forward[_gate_grid(gate)](gate, up, y, gate.numel(), GELU=gelu, BLOCK=GATE_BLOCK)
    return y


@_gated.register_fake
def _(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    return torch.empty_like(gate)


@custom_op("lit_grow::gated_backward", mutates_args=())
def _gated_backward(grad: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """All contiguous and of one shape. Returns the gradients of gate and up."""
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    with torch.cuda.device_of(gate):
        kernels.gate_backward[_gate_grid(gate)](
            *(grad, gate, up, grad_gate, grad_up, gate.numel()), GELU=gelu, BLOCK=GATE_BLOCK
        )
    return grad_gate, grad_up


@_gated_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


def _gate_grid(gate: Tensor) -> tuple[int]:
    return (-(-gate.numel() // GATE_BLOCK),)


def _keep_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.gelu = inputs
    ctx.save_for_backward(gate, up)


def _gated_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_gated_backward(grad.contiguous(), *ctx.saved_tensors, ctx.gelu), None


_gated.register_autograd(_gated_gradients, setup_context=_keep_gated)


def triton_gated(gate: Tensor, up: Tensor, gelu: bool = False) -> Tensor:
    """As `lit_gpt.kernels.reference.gated`."""
    return _gated(gate.contiguous(), up.contiguous(), gelu)


@custom_op("lit_grow::rotate", mutates_args=())
def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, n) of any strides but the last, cos and sin (T, n), contiguous, fp32. Returns (B, T, H, n)."""
    B, T, H, n = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    pairs = power_of_2(n // 2)
    heads = min(power_of_2(H), max(1, ROTATE_ELEMENTS // pairs))
    with torch.cuda.device_of(x):
        kernels.rotate[(B * T, -(-H // heads))](
            *(x, cos, sin, y, T, H, *x.stride()[:3]), HALF=n // 2, BLOCK_HEADS=heads, BLOCK_PAIRS=pairs
        )
    return y


@_rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _keep_angles(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _rotate_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    cos, sin = ctx.saved_tensors
    return _rotate(_dense_channels(grad), cos, -sin), None, None


_rotate.register_autograd(_rotate_back, setup_context=_keep_angles)


def triton_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `lit_gpt.kernels.reference.rope`."""
    n = cos.size(-1)
    angles = cos.reshape(-1, n), sin.reshape(-1, n)
    if n == x.size(-1):
        return _rotate(_dense_channels(x), *angles)
    return torch.cat((_rotate(_dense_channels(x[..., :n]), *angles), x[..., n:]), dim=-1)


def _dense_channels(x: Tensor) -> Tensor:
    """The kernel takes any strides but of the last dimension: heads are views of q, k and v in one tensor."""
    return x if x.stride(-1) == 1 else x.contiguous()


@custom_op("lit_grow::cross_entropy_", mutates_args=("logits",))
def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (n, V), contiguous: replaced by their gradient; targets (n,). Returns losses (n,) in fp32."""
    n, vocab = logits.shape
    losses = logits.new_empty(n, dtype=torch.float32)
    block = min(LOSS_BLOCK, power_of_2(vocab))
    with torch.cuda.device_of(logits):
        kernels.cross_entropy[(n,)](logits, targets, losses, N_COLS=vocab, BLOCK=block, num_warps=8)
    return losses


@_cross_entropy.register_fake
def _(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.new_empty(logits.size(0), dtype=torch.float32)


def triton_chunk_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As `lit_gpt.kernels.loss.chunk_loss`; the gradients take the memory of the logits."""
    losses = _cross_entropy(logits, targets.contiguous())
    return losses, logits
