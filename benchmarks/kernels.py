"""Every operation of the model by every backend that can run here: time, error and, of the loss, memory.

    OMP_NUM_THREADS=1 python -m benchmarks.kernels

Forward and backward at two shapes, on the GPU in bf16 where there is one, else on the CPU in fp32. The backends of one
operation take turns. Times are compared with the plainest one's in the same turn; the error is the largest
||found - exact|| / ||exact|| of values and gradients, exact being the reference in float64. The memory of the loss is
what a process of its own takes beyond what it held before. Results are added to results/kernels.json under their number
of threads or their GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import own_memory
from benchmarks.result_files import RESULTS, add_out, add_result
from benchmarks.timing import circumstances, clock, device_key, find_device, in_turns, say, spread, spread_of_ratios
from lit_gpt.kernels.backend import Situation, dtype_name, interprets_triton
from lit_gpt.kernels.choice import BACKENDS, auto, resolve
from lit_gpt.kernels.self_check import Case, Shape, cases, errors_of, values_and_gradients
from lit_gpt.kernels.settings import KernelConfig

RESULT = RESULTS / "kernels.json"
PLAINEST = {"attention": "math", "norm": "reference", "mlp": "reference", "rope": "reference", "loss": "torch"}
HEAD_SIZE = 64
SHAPES = {
    "cpu": (Shape(8, 256, 4, 4, 256, 704, 4096), Shape(2, 512, 16, 16, 1024, 2816, 32000)),
    "cuda": (Shape(8, 2048, 16, 16, 1024, 2816, 32000), Shape(8, 2048, 32, 32, 2048, 5632, 32000)),
}
TINY = (Shape(), Shape(1, 8, 2, 2, 32, 48, 64))


def situation_of(device: torch.device, shape: Shape) -> Situation:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Situation.on(device, dtype=dtype, head_sizes=(HEAD_SIZE,), n_embd=shape.channels)


def usable(operation: str, situation: Situation) -> list[str]:
    """The plainest first. Triton's interpreter computes, but says nothing about speed."""
    found = [name for name, backend in BACKENDS[operation].items() if backend.missing(situation) is None]
    found = [name for name in found if not (name == "triton" and interprets_triton())]
    return sorted(found, key=lambda name: name != PLAINEST[operation])


def cases_of(operation: str, name: str, device: torch.device, shape: Shape) -> dict[str, Case]:
    """What of an operation is measured, by name."""
    situation = situation_of(device, shape)
    kernels = resolve(dataclasses.replace(KernelConfig(), **{operation: name}), situation)
    found = [each for each in cases(kernels, situation, device, shape) if each.operation == operation]
    return {operation if i == 0 else f"{operation} after adding": each for i, each in enumerate(found)}


def there_and_back(case: Case) -> Callable[[], object]:
    """One forward and backward."""
    inputs = [x.detach().requires_grad_() for x in case.inputs]

    def outputs() -> tuple[Tensor, ...]:
        returned = case.function(*inputs)
        return returned if isinstance(returned, tuple) else (returned,)

    directions = [torch.ones_like(each) for each in outputs()]
    return lambda: torch.autograd.grad(outputs(), inputs, directions)


def measure(operation: str, device: torch.device, shape: Shape, turns: int) -> list[dict[str, Any]]:
    """One operation by its backends."""
    situation, by = situation_of(device, shape), clock(device)
    names = usable(operation, situation)
    found = {name: cases_of(operation, name, device, shape) for name in names}
    rows = []
    for label in found[names[0]]:
        tasks = {name: there_and_back(found[name][label]) for name in names}
        for task in tasks.values():
            task()
        samples = in_turns(tasks, turns, device, say_turns=False)
        secs = {name: [getattr(each, by) for each in samples[name]] for name in names}
        for name in names:
            case = found[name][label]
            rows.append(
                {
                    "operation": label,
                    "backend": name,
                    "is_auto": name == auto(operation, situation),
                    "secs": spread(secs[name]),
                    "times_as_fast_as_plainest": spread_of_ratios(secs[names[0]], secs[name]),
                    "error": max(errors_of(values_and_gradients(case.function, case.inputs), case)),
                }
            )
    return rows


def loss_peaks(device: torch.device, shape: Shape) -> dict[str, int]:
    """Backend of the loss -> bytes, each in a process of its own."""
    found = {}
    for name in usable("loss", situation_of(device, shape)):
        sizes = [str(size) for size in asdict(shape).values()]
        command = [sys.executable, "-m", "benchmarks.kernels", "--device", device.type, "--peak", name, *sizes]
        found[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def print_peak(name: str, device: torch.device, shape: Shape) -> None:
    """What forward and backward of a loss take beyond its inputs, in bytes."""
    run = there_and_back(cases_of("loss", name, device, dataclasses.replace(shape, rows=1, tokens=8))["loss"])
    run()  # loads what it loads
    situation = situation_of(device, shape)
    kernels = resolve(dataclasses.replace(KernelConfig(), loss=name), situation)
    held = cases(kernels, situation, device, shape)  # all of them: what is freed would be taken again, and not count
    (case,) = (each for each in held if each.operation == "loss")
    inputs = [x.detach().requires_grad_() for x in case.inputs]
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        case.function(*inputs).backward()
        print(torch.cuda.max_memory_allocated(device) - before)
        return
    before = own_memory("VmHWM")
    case.function(*inputs).backward()
    print(own_memory("VmHWM") - before)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=15, help="timed calls of every backend (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two turns")
    add_out(parser, RESULT, unless_quick=True)
    parser.add_argument("--peak", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    device = find_device(args.device)
    if args.peak:
        print_peak(args.peak[0], device, Shape(*map(int, args.peak[1:])))
        return 0
    turns, shapes = (2, TINY) if args.quick else (args.turns, SHAPES[device.type])
    measured = []
    for shape in shapes:
        say(f"{shape}")
        rows = [row for operation in BACKENDS for row in measure(operation, device, shape, turns)]
        measured.append({"shape": asdict(shape), "results": rows, "loss_peak_bytes": loss_peaks(device, shape)})
    result = {
        "command": f"python -m benchmarks.kernels --turns {turns}",
        "what": "forward and backward of every operation by every backend that can run here",
        **circumstances(device, turns),
        "dtype": dtype_name(situation_of(device, shapes[0]).dtype),
        "head_size": HEAD_SIZE,
        "shapes": measured,
    }
    print_table(result)
    if args.out or not args.quick:
        add_result(args.out or RESULT, device_key(device), result)
    return 0


def print_table(result: dict[str, Any]) -> None:
    for measured in result["shapes"]:
        print(json.dumps(measured["shape"]))
        for row in measured["results"]:
            name = f"{row['operation']} {row['backend']}{'*' if row['is_auto'] else ''}"
            ratio = row["times_as_fast_as_plainest"]
            spreads = f"{ratio['median']:6.2f} ({ratio['q1']:.2f} - {ratio['q3']:.2f})"
            print(f"{name:32}{1e3 * row['secs']['median']:10.3f} ms{spreads} of the plainest, error {row['error']:.1e}")
        for name, peak in measured["loss_peak_bytes"].items():
            print(f"loss {name:27}{peak / 2**20:10.1f} MiB at most")


if __name__ == "__main__":
    raise SystemExit(main())
