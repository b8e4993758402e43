"""Our Triton kernels: norm with the addition before it, gate, rotation, cross-entropy. lit_gpt/kernels/triton_ops.py
calls them.

They load in any dtype and compute in fp32. Written so that they run in Triton's interpreter as well, which wants loop
bounds that are constants, no conversion of loop variables, and masks of blocks.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # an extra; nothing below runs without it
    triton = tl = None


def jit(kernel: Any) -> Any:
    """triton.jit where there is Triton. The interpreter must have been asked for (TRITON_INTERPRET=1) before this."""
    return kernel if triton is None else triton.jit(kernel)


@jit
def norm_forward(
    x_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    total_ptr: tl.tensor,
    y_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    n_cols: int,
    eps: float,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A row per program: total = x + delta (if ADDS), y = total * scale * weight with scale = rsqrt(mean square)."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < n_cols
    x = tl.load(x_ptr + row * n_cols + cols, mask=mask, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(delta_ptr + row * n_cols + cols, mask=mask, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)  # rounded first: backward reads it again
        tl.store(total_ptr + row * n_cols + cols, total, mask=mask)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / n_cols + eps)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * n_cols + cols, (x * scale * weight).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + row, scale)


@jit
def norm_backward(
    grad_y_ptr: tl.tensor,
    grad_total_ptr: tl.tensor,
    total_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    grad_weight_ptr: tl.tensor,
    n_rows: int,
    n_cols: int,
    ROWS: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """ROWS rows per program, which sums their share of the weight's gradient into a row of its own."""
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    in_row = cols < n_cols
    weight = tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    first = program.to(tl.int64) * ROWS
    for i in range(ROWS):
        row = first + i
        mask = cols < tl.where(row < n_rows, n_cols, 0)
        start = row * n_cols  # added to pointers as a scalar, which takes fewer registers
        total = tl.load(total_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row, mask=row < n_rows, other=0.0)
        unit = total * scale
        weighted = weight * grad_y
        mean = tl.sum(unit * weighted, axis=0) / n_cols
        grad_x = (weighted - unit * mean) * scale
        if ADDS:
            grad_x += tl.load(grad_total_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + start + cols, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        grad_weight += grad_y * unit
    tl.store(grad_weight_ptr + program * n_cols + cols, grad_weight, mask=in_row)


@jit
def gate_forward(
    gate_ptr: tl.tensor, up_ptr: tl.tensor, y_ptr: tl.tensor, n_elements: int, GELU: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """y = gate * sigmoid(z) * up, where z = gate is silu and twice the argument of gelu's tanh is gelu."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n_elements
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    z = gate
    if GELU:
        z = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 sqrt(2 / pi)
    tl.store(y_ptr + at, (gate * tl.sigmoid(z) * up).to(y_ptr.dtype.element_ty), mask=mask)


@jit
def gate_backward(
    grad_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    up_ptr: tl.tensor,
    grad_gate_ptr: tl.tensor,
    grad_up_ptr: tl.tensor,
    n_elements: int,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n_elements
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    z = gate
    z_slope = tl.full((BLOCK,), 1.0, dtype=tl.float32)
    if GELU:
        z = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        z_slope = 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
    s = tl.sigmoid(z)
    slope = s + gate * s * (1.0 - s) * z_slope
    tl.store(grad_gate_ptr + at, (grad * up * slope).to(grad_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_up_ptr + at, (grad * gate * s).to(grad_up_ptr.dtype.element_ty), mask=mask)


@jit
def rotate(
    x_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    y_ptr: tl.tensor,
    n_tokens: int,
    n_heads: int,
    batch_stride: int,
    token_stride: int,
    head_stride: int,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
) -> None:
    """Some heads of one token per program: channel i turns with channel i + HALF. y is contiguous."""
    program = tl.program_id(0).to(tl.int64)
    token = program % n_tokens
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
    mask = (heads < n_heads) & (pairs < HALF)
    in_half = pairs < HALF
    x_at = x_ptr + program // n_tokens * batch_stride + token * token_stride + heads * head_stride + pairs
    first = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_at + HALF, mask=mask, other=0.0).to(tl.float32)
    angle_at = token * (2 * HALF) + pairs
    cos = tl.load(cos_ptr + angle_at, mask=in_half, other=0.0)
    sin = tl.load(sin_ptr + angle_at, mask=in_half, other=0.0)
    cos_second = tl.load(cos_ptr + angle_at + HALF, mask=in_half, other=0.0)
    sin_second = tl.load(sin_ptr + angle_at + HALF, mask=in_half, other=0.0)
    y_at = y_ptr + (program * n_heads + heads) * (2 * HALF) + pairs
    tl.store(y_at, (first * cos + second * sin).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_at + HALF, (second * cos_second + first * sin_second).to(y_ptr.dtype.element_ty), mask=mask)


@jit
def cross_entropy(
    logits_ptr: tl.tensor, targets_ptr: tl.tensor, losses_ptr: tl.tensor, N_COLS: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """A row per program: its loss, and the gradient softmax - onehot in the place of its logits."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.maximum(tl.load(targets_ptr + row), 0)
    picked = tl.load(logits_ptr + row * N_COLS + target).to(tl.float32)
    largest = -float("inf")
    total = 0.0
    for start in range(0, N_COLS, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row * N_COLS + cols, mask=cols < N_COLS, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), axis=0)
        largest = larger
    log_sum = largest + tl.log(total)
    tl.store(losses_ptr + row, log_sum - picked)
    for start in range(0, N_COLS, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < N_COLS
        x = tl.load(logits_ptr + row * N_COLS + cols, mask=mask, other=-float("inf")).to(tl.float32)
        grad = tl.exp(x - log_sum) - tl.where(cols == target, 1.0, 0.0)
        tl.store(logits_ptr + row * N_COLS + cols, grad.to(logits_ptr.dtype.element_ty), mask=mask)
