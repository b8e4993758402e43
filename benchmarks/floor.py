"""What a training step costs at least on this machine: its products and its bytes at the rates that were measured.

The products of all linear layers, forward and backward, are run at the model's own shapes into memory that is there
already, and the products of attention are charged at the same rate. Bytes are those of perfectly fused element-wise
operations and of the optimizer, at the rate of a large copy: what a cache holds goes faster, so the second part can be
undercut, the first hardly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch

from benchmarks.timing import Sample, spread
from lit_gpt.axes import EMBEDDING, parameter_shapes
from lit_gpt.config import Config
from lit_gpt.flops import count_matmul_parameters, count_parameters, flops_per_token
from lit_gpt.kernels.products import cpu_multiplies_bf16

COPY_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}
# reads and writes of a tensor, forward and backward, with nothing gone over twice
NORM_PASSES = 8  # x, delta -> sum, normed; d normed, sum, d sum -> dx
ROPE_PASSES = 4  # x -> y; dy -> dx
GATE_PASSES = 8  # gate, up -> y; dy, gate, up -> d gate, d up
LOSS_PASSES = 3  # logits; logits -> d logits
ADAMW_BYTES = 28  # of fp32 parameter, gradient and two moments read, three of them written
CLIP_BYTES = 12  # gradient read for its norm; read and written to scale it


def product_dtype(precision: str, device: torch.device) -> torch.dtype:
    """In which products are fastest for a precision: a CPU without bf16 instructions computes them in fp32."""
    has_bf16 = device.type == "cuda" or cpu_multiplies_bf16()
    return torch.bfloat16 if precision == "bf16" and has_bf16 else torch.float32


def step_bytes(config: Config, tokens: int, precision: str) -> float:
    """Element-wise operations and the optimizer of one step."""
    size = 4 if precision == "fp32" else 2
    rotated = (config.n_head + config.n_query_groups) * config.rope_n_elem
    layer = 2 * NORM_PASSES * config.n_embd + ROPE_PASSES * rotated + GATE_PASSES * config.intermediate_size
    per_token = config.n_layer * layer + NORM_PASSES * config.n_embd + LOSS_PASSES * config.padded_vocab_size
    return size * tokens * per_token + (ADAMW_BYTES + CLIP_BYTES) * count_parameters(config)


def linear_flops(config: Config, tokens: int) -> int:
    return 6 * count_matmul_parameters(config) * tokens


def products(config: Config, tokens: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """A call that multiplies all that one step multiplies in its linear layers."""
    shapes = parameter_shapes(config)
    matrices = [shape for name, shape in shapes.items() if len(shape) == 2 and name != EMBEDDING]
    counts = {shape: matrices.count(shape) for shape in dict.fromkeys(matrices)}
    assert tokens * 6 * sum(prod(shape) * n for shape, n in counts.items()) == linear_flops(config, tokens)
    tensors = []
    for (n_out, n_in), count in counts.items():
        x, y, w = (
            torch.randn(shape, device=device).to(dtype) for shape in ((tokens, n_in), (tokens, n_out), (n_out, n_in))
        )
        tensors.append((count, x, y, w, torch.empty_like(x), torch.empty_like(y), torch.empty_like(w)))

    def run() -> None:
        for count, x, y, w, x_out, y_out, w_out in tensors:
            for _ in range(count):
                torch.mm(x, w.t(), out=y_out)
                torch.mm(y, w, out=x_out)
                torch.mm(y.t(), x, out=w_out)

    return run


def copy(device: torch.device) -> Callable[[], None]:
    """A call that reads and writes COPY_BYTES each."""
    src = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    dst = torch.empty_like(src)
    dst.copy_(src)
    return lambda: dst.copy_(src)


def tasks(
    config: Config, tokens: int, precisions: Sequence[str], device: torch.device
) -> dict[str, Callable[[], None]]:
    """What to measure in turns with the steps: the products of each precision, and the copy."""
    found = {p: products(config, tokens, product_dtype(p, device), device) for p in precisions}
    return {**found, "copy": copy(device)}


def floors(
    config: Config, tokens: int, samples: Mapping[str, Sequence[Sample]], clock: str, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Precision -> the floor of a step in each turn, and what it is made of. `samples`: of `tasks`."""
    copied = [2 * COPY_BYTES[device.type] / getattr(each, clock) for each in samples["copy"]]
    flops = flops_per_token(config).model * tokens
    found = {}
    for precision in samples:
        if precision == "copy":
            continue
        rates = [linear_flops(config, tokens) / getattr(each, clock) for each in samples[precision]]
        n_bytes = step_bytes(config, tokens, precision)
        pairs = list(zip(rates, copied, strict=True))
        found[precision] = {
            "flops": flops,
            "bytes": n_bytes,
            "product_dtype": str(product_dtype(precision, device)).removeprefix("torch."),
            "flops_per_sec": spread(rates),
            "bytes_per_sec": spread(copied),
            "secs": [flops / rate + n_bytes / bandwidth for rate, bandwidth in pairs],
            "products_secs": spread([flops / rate for rate in rates]),
        }
    return found
