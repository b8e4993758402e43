"""Speed of our training step, by backend, beside that of others, and how far both are from what the machine allows.

    OMP_NUM_THREADS=1 python -m benchmarks.training --litgpt SITE_PACKAGES --nanochat CHECKOUT

One step is forward, backward, clipping and AdamW on one batch, on the GPU where there is one, else on the CPU. Every
variant starts from the same weights, sees the same batches and must have the same first loss, except nanochat's GPT,
which is another model (benchmarks/peers.py). The variants take turns, a step each in changing order, and so does the
floor (benchmarks/floor.py); ratios are taken within a turn. On a CPU tokens per CPU-second count, which hardly depend
on neighbours, on a GPU tokens per second. Peers that are not there are left out, and the result says so. Results are
added to results/training.json under their number of threads or their GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from benchmarks import floor, peers
from benchmarks.result_files import RESULTS, add_result
from benchmarks.timing import (
    Sample,
    circumstances,
    clock,
    device_key,
    find_device,
    in_turns,
    say,
    spread,
    spread_of_ratios,
)
from benchmarks.variants import Variant, all_variants, are_compared
from lit_gpt.config import Config
from lit_gpt.flops import Flops, count_matmul_parameters, flops_per_token
from lit_gpt.kernels.backend import find_cpp_compiler
from lit_gpt.model import InitialWeights
from pretrain.config import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from pretrain.optim import build_optimizer
from pretrain.parallel import Compute, build_model, choose_compute, with_kernels
from pretrain.world import ALONE

RESULT = RESULTS / "training.json"
SIZES = ("n_layer", "n_embd", "n_head", "intermediate_size", "vocab_size", "block_size", "batch_size")
SHAPES = {"cpu": (8, 256, 4, 704, 4096, 256, 8), "cuda": (12, 1024, 16, 2816, 32000, 2048, 8)}
"""Device -> sizes, in the order of SIZES. Of all variants weights and moments are held at a time."""
TINY = (1, 32, 2, 24, 64, 8, 2)
RUN_TOKENS = 1_000_000  # `auto` depends on the length of the run: this is the demo's, a few minutes
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product")


@dataclass
class Measured:
    """What one variant took."""

    first_secs: float
    first_loss: float
    matmul_parameters: int
    samples: list[Sample] = field(default_factory=list)
    """One per turn."""
    products_share: float | None = None
    """Share of a step in matrix products and attention: torch's own, the same for every variant of one precision."""

    def secs(self, by: str) -> list[float]:
        return [getattr(each, by) for each in self.samples]


def build(
    variant: Variant, config: Config, device: torch.device
) -> tuple[peers.LossFn, nn.Module, torch.optim.Optimizer]:
    """(idx, targets) -> loss, the model behind it with the weights of seed 0, and its optimizer."""
    if variant.family == "ours":
        run = dataclasses.replace(some_run(config), kernels=variant.kernels)
        compute = Compute(variant.precision, variant.compile, "benchmark")
        compute = with_kernels(compute, run, device, [config], separator_id=None)
        weights = InitialWeights(config, seed=0)
        ours = build_model(config, weights, compute, ParallelConfig(), ALONE, device=device)
        return ours, ours, build_optimizer(ours, OptimizerConfig())
    loss, model = peers.build_peer(variant.family, config, variant.precision, variant.compile == "model", device)
    if variant.family == "naive":
        return loss, model, torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    return loss, model, build_optimizer(model, OptimizerConfig())


def training_step(
    variant: Variant, config: Config, device: torch.device
) -> tuple[Callable[[Tensor], float], nn.Module]:
    """rows (B, T + 1) -> loss before the update that it makes, what pretrain's train_step computes; and the model."""
    loss_fn, model, optimizer = build(variant, config, device)

    def step(rows: Tensor) -> float:
        loss = loss_fn(rows[:, :-1], rows[:, 1:].contiguous())  # transformers flattens its labels by a view
        loss.backward()
        float(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step, model


def batches(config: Config, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Endless batches (B, T + 1) of random ids; the speed does not depend on what they are."""
    generator = torch.Generator().manual_seed(1)
    while True:
        rows = torch.randint(config.vocab_size, (batch_size, config.block_size + 1), generator=generator)
        yield rows.to(device)


def measure(
    variants: Sequence[Variant], config: Config, batch_size: int, turns: int, device: torch.device
) -> tuple[dict[Variant, Measured], dict[str, dict[str, Any]]]:
    """Each variant's first two steps, which compile and allocate, then `turns` timed steps of each in turn.

    Returns:
        What each took, and the floor of each precision.

    Raises:
        RuntimeError: a variant computes another loss, so it does not do the same work.
    """
    data = batches(config, batch_size, device)
    first_rows, second_rows, rows = next(data), next(data), next(data)
    steps: dict[Variant, Callable[[Tensor], float]] = {}
    measured: dict[Variant, Measured] = {}
    for variant in variants:
        say(f"{variant.name}: first steps")
        started = time.perf_counter()
        steps[variant], model = training_step(variant, config, device)
        first_loss = steps[variant](first_rows)
        measured[variant] = Measured(time.perf_counter() - started, first_loss, multiplied_parameters(model))
        steps[variant](second_rows)
        check_first_loss(variant, measured)
    tokens = batch_size * config.block_size
    precisions = list(dict.fromkeys(variant.precision for variant in variants))
    tasks: dict[Any, Callable[[], object]] = {**floor.tasks(config, tokens, precisions, device)}
    tasks |= {variant: lambda step=step: step(rows) for variant, step in steps.items()}
    samples = in_turns(tasks, turns, device)
    for variant in variants:
        measured[variant].samples = samples.pop(variant)
        if device.type == "cpu":
            measured[variant].products_share = products_share(steps[variant], rows)
    return measured, floor.floors(config, tokens, samples, clock(device), device)


def multiplied_parameters(model: nn.Module) -> int:
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def check_first_loss(variant: Variant, measured: dict[Variant, Measured]) -> None:
    found = measured[variant].first_loss
    if not math.isfinite(found):
        raise RuntimeError(f"first loss of {variant.name} is {found}")
    alike = [each for each in measured if each.family in peers.SAME_FUNCTION]
    if variant not in alike:
        return
    expected = measured[alike[0]].first_loss
    if abs(found - expected) > LOSS_TOLERANCE[variant.precision] * expected:
        raise RuntimeError(f"first loss of {variant.name} is {found}, of {alike[0].name} {expected}")


def products_share(step: Callable[[Tensor], float], rows: Tensor) -> float:
    """Share of one step that torch spends in products and attention, forward and backward; slightly low, as profiling
    makes the many small operations slower."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(rows)
    events = profile.key_averages()
    products = sum(event.self_cpu_time_total for event in events if event.key.startswith(PRODUCTS))
    return products / sum(event.self_cpu_time_total for event in events)


def ratios(measured: dict[Variant, Measured], by: str) -> list[dict[str, Any]]:
    """How many times faster ours is than each other variant of its policy: medians over the turns."""
    return [
        {"ours": ours.name, "against": other.name, **spread_of_ratios(theirs.secs(by), mine.secs(by))}
        for ours, mine in measured.items()
        for other, theirs in measured.items()
        if are_compared(ours, other)
    ]


def record(
    arguments: argparse.Namespace,
    config: Config,
    measured: dict[Variant, Measured],
    floors: dict[str, dict[str, Any]],
    absent: dict[str, str],
    device: torch.device,
) -> dict[str, Any]:
    """Everything of one run as plain data."""
    tokens, by = arguments.batch_size * config.block_size, clock(device)
    chosen = auto_variant(config, device)
    for precision, each in floors.items():
        each["tokens_per_sec"] = spread([tokens / secs for secs in each["secs"]])
        each["share_reached"] = {
            variant.name: spread_of_ratios(each["secs"], m.secs(by))
            for variant, m in measured.items()
            if variant.precision == precision and variant.family in peers.SAME_FUNCTION
        }
    return {
        "command": shlex.join(["python", "-m", "benchmarks.training", *without_paths(sys.argv[1:])]),
        "what": "one training step: forward, backward, clipping, AdamW",
        **circumstances(device, arguments.turns, **software()),
        "gpu": device_key(device) if device.type == "cuda" else None,
        "shape": asdict(config),
        "batch_size": arguments.batch_size,
        "auto": {"variant": chosen[0].name, "why": chosen[1]},
        "absent": absent,
        "variants": [variant_record(variant, m, config, tokens) for variant, m in measured.items()],
        "floors": floors,
        "ratios_cpu_secs": ratios(measured, "cpu_secs"),
        "ratios_secs": ratios(measured, "secs"),
    }


def variant_record(variant: Variant, m: Measured, config: Config, tokens: int) -> dict[str, Any]:
    flops = flops_of(m, config)
    by_clock = spread([tokens / secs for secs in m.secs("secs")])
    return {
        "name": variant.name,
        "tokens_per_cpu_sec": spread([tokens / secs for secs in m.secs("cpu_secs")]),
        "tokens_per_sec": by_clock,
        "palm_flops_per_sec": flops.palm * by_clock["median"],
        "model_flops_per_token": flops.model,
        "peak_bytes": m.samples[-1].peak_bytes,
        "first_step_secs": m.first_secs,
        "first_loss": m.first_loss,
        "products_share": m.products_share,
        "cpu_secs": m.secs("cpu_secs"),
        "secs": m.secs("secs"),
    }


def flops_of(m: Measured, config: Config) -> Flops:
    """Of a token; attention is the same for every variant."""
    ours, more = flops_per_token(config), 6 * (m.matmul_parameters - count_matmul_parameters(config))
    return Flops(ours.paper, ours.model + more, ours.palm + more)


def without_paths(arguments: Sequence[str]) -> list[str]:
    """A command line whose values of options that name a place are PATH."""
    options = ("--litgpt", "--nanochat", "--out")
    return ["PATH" if i and arguments[i - 1] in options else each for i, each in enumerate(arguments)]


def some_run(config: Config) -> RunConfig:
    return RunConfig(out_dir="", model=ModelConfig(config.name), data=DataConfig(train=""), stages=[])


def auto_variant(config: Config, device: torch.device) -> tuple[Variant, str]:
    """What `pretrain` would run here with precision and compile left at auto, and why."""
    compute = choose_compute(some_run(config), device, RUN_TOKENS)
    return Variant("ours", compute.precision, compute.compile), compute.reason


def software() -> dict[str, str | None]:
    compiler = find_cpp_compiler()
    version = compiler and subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.split("\n")[0]
    modules = {family: sys.modules.get(family) for family in ("transformers", "litgpt")}
    found = {name: getattr(module, "__version__", None) for name, module in modules.items() if module is not None}
    return {**found, "compiler": version or None}


def print_table(result: dict[str, Any]) -> None:
    units = f"{'CPU-second':>10}{'quartiles':>16}{'second':>9}{'quartiles':>16}"
    print(f"{'tokens per':40}{units}{'products':>10}{'first step':>12}")
    for row in result["variants"]:
        cells = (
            f"{row[unit]['median']:>{width},.0f}{row[unit]['q1']:>9,.0f} -{row[unit]['q3']:>5,.0f}"
            for unit, width in (("tokens_per_cpu_sec", 10), ("tokens_per_sec", 9))
        )
        mark = "*" if row["name"] == result["auto"]["variant"] else ""
        share = "" if row["products_share"] is None else f"{row['products_share']:.0%}"
        print(f"{row['name'] + mark:40}{''.join(cells)}{share:>10}{row['first_step_secs']:>10.1f} s")
    for precision, each in result["floors"].items():
        print(f"{f'floor {precision}':40}{each['tokens_per_sec']['median']:>10,.0f}")
    print(f"* what precision=auto compile=auto gives here: {result['auto']['why']}")
    print("\n".join(f"{family} left out: {why}" for family, why in result["absent"].items()))
    print(f"{'times faster, by':66}{'CPU time':>9}{'quartiles':>14}{'clock':>9}")
    for by_cpu, by_clock in zip(result["ratios_cpu_secs"], result["ratios_secs"], strict=True):
        quartiles = f"{by_cpu['q1']:.2f} - {by_cpu['q3']:.2f}"
        pair = f"{by_cpu['ours']} against {by_cpu['against']}"
        print(f"{pair:66}{by_cpu['median']:>9.2f}{quartiles:>14}{by_clock['median']:>9.2f}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for size in SIZES:
        parser.add_argument(f"--{size.replace('_', '-')}", type=int)
    parser.add_argument("--turns", type=int, default=7, help="timed steps of every variant")
    parser.add_argument("--only", nargs="+", default=[""], help="run the variants whose name contains one of these")
    parser.add_argument("--litgpt", type=Path, metavar="PATH", help="site-packages of an environment with litgpt")
    parser.add_argument("--nanochat", type=Path, metavar="PATH", help="a checkout of nanochat")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, two turns, nothing compiled")
    parser.add_argument("--json", action="store_true", help="print the result as JSON and nothing else")
    parser.add_argument(
        "--out",
        type=Path,
        help=f"file to add the result to; default: {RESULT.name}, for a run of the default shape and all variants",
    )
    return parser.parse_args(arguments)


def choose_variants(args: argparse.Namespace, config: Config, device: torch.device) -> tuple[list[Variant], dict]:
    """What to measure, and what is absent and why."""
    absent = peers.find_peers(device, args.litgpt, args.nanochat)
    variants = [each for each in all_variants(config, device) if any(part in each.name for part in args.only)]
    if args.quick:
        variants = [each for each in variants if each.compile == "none"]
    if device.type == "cpu" and find_cpp_compiler() is None:
        say("no C++ compiler: the compiled variants are left out")
        variants = [each for each in variants if each.compile == "none"]
    return [each for each in variants if each.family not in absent], absent


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    device = find_device(args.device)
    sizes = TINY if args.quick else SHAPES[device.type]
    is_default = args.only == [""] and not args.quick and all(getattr(args, size) is None for size in SIZES)
    for size, value in zip(SIZES, sizes, strict=True):
        if getattr(args, size) is None:
            setattr(args, size, value)
    if args.quick:
        args.turns = 2
    config = Config(name="benchmark", **{size: getattr(args, size) for size in SIZES[:-1]})
    variants, absent = choose_variants(args, config, device)
    result = record(args, config, *measure(variants, config, args.batch_size, args.turns, device), absent, device)
    if args.json:
        print(json.dumps(result))
    else:
        print_table(result)
    if args.out or is_default:
        add_result(args.out or RESULT, device_key(device), result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
