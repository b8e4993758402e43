"""Our Triton kernels compiled ahead of time for GPUs that are not there: registers spilled, width of loads.

In a process without TRITON_INTERPRET: `pytest -m triton tests/lit_gpt/test_triton_aot.py`.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lit_gpt.kernels import triton_kernels as kernels
from lit_gpt.kernels.triton_ops import GATE_BLOCK, LOSS_BLOCK, ROTATE_ELEMENTS, norm_warps, power_of_2

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(kernels.triton is None, reason="no triton: pip install 'lit-grow[triton]'"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 turns compilation off"),
]

FP32 = ("weight_ptr", "grad_weight_ptr", "scale_ptr", "cos_ptr", "sin_ptr", "losses_ptr")


def norm(n: int, kernel: str, *, adds: bool = True, warps: int | None = None) -> dict[str, Any]:
    block = power_of_2(n)
    constants = {"ADDS": adds, "BLOCK": block, **({"ROWS": 32} if kernel == "norm_backward" else {})}
    return {"kernel": kernel, "constants": constants, "num_warps": warps or norm_warps(block)}


def rope(heads: int, half: int) -> dict[str, Any]:
    constants = {"HALF": half, "BLOCK_HEADS": min(power_of_2(heads), ROTATE_ELEMENTS // half), "BLOCK_PAIRS": half}
    return {"kernel": "rotate", "constants": constants, "num_warps": 4}


def loss(vocab: int) -> dict[str, Any]:
    constants = {"N_COLS": vocab, "BLOCK": min(LOSS_BLOCK, power_of_2(vocab))}
    return {"kernel": "cross_entropy", "constants": constants, "num_warps": 8}


def gate(kernel: str, gelu: bool) -> dict[str, Any]:
    return {"kernel": kernel, "constants": {"GELU": gelu, "BLOCK": GATE_BLOCK}, "num_warps": 4}


VARIANTS = {
    **{f"norm_forward, {n} channels": norm(n, "norm_forward") for n in (1024, 2048, 4096, 8192)},
    **{f"norm_backward, {n} channels": norm(n, "norm_backward") for n in (1024, 2048, 4096, 8192)},
    "norm_forward alone": norm(2048, "norm_forward", adds=False),
    "norm_backward alone": norm(2048, "norm_backward", adds=False),
    "gate_forward": gate("gate_forward", False),
    "gate_backward": gate("gate_backward", False),
    "gate_backward, gelu": gate("gate_backward", True),
    "rope, 32 heads of 64": rope(32, 32),
    "rope, 8 heads of 128": rope(8, 64),
    "cross_entropy, 32000": loss(32000),
    "cross_entropy, 50304": loss(50304),
}


def compiled(variant: dict[str, Any], sm: int, folder: Path, *, divisible: bool = True) -> dict[str, int]:
    """What one kernel needs on a GPU: registers, bytes of stack and local memory, and its 16-byte loads.

    divisible: whether pointers and sizes are known to be multiples of 16, as those of a model are.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(kernels, variant["kernel"])
    constants = {(function.arg_names.index(name),): value for name, value in variant["constants"].items()}
    signature = {name: type_of(name, variant) for name in function.arg_names}
    known = [["tt.divisibility", 16]]
    attrs = {
        (i,): known
        for i, name in enumerate(function.arg_names)
        if divisible and signature[name] not in ("constexpr", "fp32")
    }
    made = triton.compile(
        ASTSource(function, signature=signature, constexprs=constants, attrs=attrs),
        target=GPUTarget("cuda", sm, 32),
        options={"num_warps": variant["num_warps"]},
    )
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"  # of the wheel: no CUDA toolkit needed
    usage = subprocess.run(
        [cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    needs = {key: int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")}
    return needs | {"wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", made.asm["ptx"]))}


def type_of(name: str, variant: dict[str, Any]) -> str:
    """Of an argument, in Triton's words: activations and gradients are bf16, weights and sums fp32."""
    if name in variant["constants"]:
        return "constexpr"
    if name == "targets_ptr":
        return "*i64"
    if name.endswith("_ptr"):
        return "*fp32" if name in FP32 else "*bf16"
    return "fp32" if name == "eps" else "i32"


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("name", VARIANTS)
def test_no_kernel_spills_and_all_load_16_bytes_at_a_time(name, sm, tmp_path):
    found = compiled(VARIANTS[name], sm, tmp_path)
    assert found["STACK"] == found["LOCAL"] == 0, found
    assert found["wide_loads"] > 0, found
    assert found["REG"] <= 128, found


@pytest.mark.parametrize("sm", [80, 90])
def test_a_row_too_wide_for_its_warps_is_seen_to_spill(sm, tmp_path):
    found = compiled(norm(16384, "norm_backward", warps=4), sm, tmp_path)
    assert found["STACK"] > 0, found


def test_pointers_that_may_be_odd_are_seen_to_load_narrowly(tmp_path):
    found = compiled(gate("gate_forward", False), 90, tmp_path, divisible=False)
    assert found["wide_loads"] == 0, found
