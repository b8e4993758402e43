"""Speed of our training step on a CPU, beside transformers' Llama and beside the step one would write first.

    OMP_NUM_THREADS=1 python -m benchmarks.cpu_training

One step is forward, backward, clipping and AdamW on one batch. Every variant starts from the same weights, sees the
same batches and must have the same first loss. The variants take turns, a step each in changing order, so that
whatever else the machine does hits them alike; ratios are taken within a turn. Tokens per CPU-second hardly depend on
neighbours, tokens per second do. Results are added to results/cpu_training.json under their number of threads.
docs/performance.md explains the numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import describe
from lit_gpt.axes import parameter_shapes
from lit_gpt.config import Config
from lit_gpt.hf import config_to_hf, to_hf
from lit_gpt.model import InitialWeights, init_tensor
from pretrain.config import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from pretrain.optim import build_optimizer
from pretrain.parallel import Compute, build_model, choose_compute, find_cpp_compiler
from pretrain.world import ALONE

RESULT = Path(__file__).parent / "results" / "cpu_training.json"
FREE = ("turns", "json", "out")  # arguments that change nothing about what is measured
RUN_TOKENS = 1_000_000  # `auto` depends on the length of the run: this is the demo's, a few minutes
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product")


@dataclass(frozen=True)
class Variant:
    """One way to make the same training step."""

    family: str
    """ours, transformers or naive."""
    precision: str
    """fp32, or bf16: fp32 weights and optimizer, bf16 computation."""
    compile: str = "none"
    """none, block (blocks and loss, ours alone) or model."""

    @property
    def name(self) -> str:
        return f"{self.family} {self.precision} {'eager' if self.compile == 'none' else f'{self.compile}-compiled'}"


VARIANTS = (
    Variant("ours", "fp32"),
    Variant("transformers", "fp32"),
    Variant("ours", "fp32", "block"),
    Variant("transformers", "fp32", "model"),
    Variant("naive", "fp32"),
    Variant("ours", "bf16"),
    Variant("transformers", "bf16"),
    Variant("ours", "bf16", "block"),
    Variant("transformers", "bf16", "model"),
)


@dataclass
class Measured:
    """What one variant took, one entry per turn."""

    first_secs: float
    first_loss: float
    cpu_secs: list[float]
    secs: list[float]
    products_share: float = 0.0
    """Share of a step in matrix products and attention: torch's own, the same for every variant of one precision."""


class NaiveNorm(nn.Module):
    """RMSNorm as its formula reads."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(config.n_embd)), config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class NaiveBlock(nn.Module):
    """A Llama layer as one would write it first; its parameters have transformers' names."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, width = config, config.n_embd
        kv_width = config.n_query_groups * config.head_size
        linears = {"q": (width, width), "k": (width, kv_width), "v": (width, kv_width), "o": (width, width)}
        self.self_attn = nn.ModuleDict({f"{k}_proj": nn.Linear(*size, bias=False) for k, size in linears.items()})
        inner = config.intermediate_size
        linears = {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
        self.mlp = nn.ModuleDict({f"{k}_proj": nn.Linear(*size, bias=False) for k, size in linears.items()})
        self.input_layernorm, self.post_attention_layernorm = NaiveNorm(config), NaiveNorm(config)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C). Returns (B, T, C)."""
        B, T, C = x.shape
        attn, mlp = self.self_attn, self.mlp
        h = self.input_layernorm(x)
        q, k, v = (attn[f"{name}_proj"](h).view(B, T, -1, self.config.head_size).transpose(1, 2) for name in "qkv")
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True, enable_gqa=True)
        x = x + attn["o_proj"](y.transpose(1, 2).reshape(B, T, C))
        h = self.post_attention_layernorm(x)
        return x + mlp["down_proj"](F.silu(mlp["gate_proj"](h)) * mlp["up_proj"](h))

    def rotate(self, x: Tensor) -> Tensor:
        """RoPE of x (B, H, T, D)."""
        T, half = x.size(2), x.size(3) // 2
        angles = torch.outer(torch.arange(T), self.config.rope_base ** -(torch.arange(half) / half))
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class NaiveLlama(nn.Module):
    """The same model without a thought for speed: all logits at once, one tensor operation per operation."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        body = {"embed_tokens": nn.Embedding(config.padded_vocab_size, config.n_embd), "norm": NaiveNorm(config)}
        self.model = nn.ModuleDict({**body, "layers": nn.ModuleList(NaiveBlock(config) for _ in range(config.n_layer))})
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """idx and targets (B, T). Returns the mean loss."""
        x = self.model["embed_tokens"](idx)
        for layer in self.model["layers"]:
            x = layer(x)
        logits = self.lm_head(self.model["norm"](x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


LossFn = Callable[[Tensor, Tensor], Tensor]


def build(variant: Variant, config: Config) -> tuple[LossFn, nn.Module, torch.optim.Optimizer]:
    """(idx, targets) -> loss, the model behind it with the weights of seed 0, and its optimizer."""
    if variant.family == "ours":
        compute = Compute(variant.precision, variant.compile, "benchmark")
        weights = InitialWeights(config, seed=0)
        model: nn.Module = build_model(config, weights, compute, ParallelConfig(), ALONE, device=torch.device("cpu"))
        return model, model, build_optimizer(model, OptimizerConfig())
    if variant.family == "naive":
        model = NaiveLlama(config)
        load_hf_names(model, config)
        return model, model, torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    model = transformers_llama(config)
    load_hf_names(model, config)
    forward = torch.compile(model, dynamic=False) if variant.compile == "model" else model

    def loss_of_transformers(idx: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if variant.precision == "bf16" else contextlib.nullcontext():
            return forward(idx, labels=targets, shift_labels=targets).loss

    return loss_of_transformers, model, build_optimizer(model, OptimizerConfig())


def transformers_llama(config: Config) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {**config_to_hf(config, torch.float32, bos_id=None, eos_id=None), "use_cache": False}
    return LlamaForCausalLM(LlamaConfig.from_dict(fields, attn_implementation="sdpa"))


def load_hf_names(model: nn.Module, config: Config) -> None:
    """The weights of seed 0 under transformers' names."""
    weights: dict[str, Tensor] = {}
    for name in parameter_shapes(config):
        weights |= to_hf(name, lambda each: init_tensor(each, config, seed=0), config)
    model.load_state_dict(weights)


def training_step(variant: Variant, config: Config) -> Callable[[Tensor], float]:
    """rows (B, T + 1) -> loss before the update that it makes; what pretrain's train_step computes."""
    loss_fn, model, optimizer = build(variant, config)

    def step(rows: Tensor) -> float:
        loss = loss_fn(rows[:, :-1], rows[:, 1:].contiguous())  # transformers flattens its labels by a view
        loss.backward()
        float(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def batches(config: Config, batch_size: int) -> Iterator[Tensor]:
    """Endless batches (B, T + 1) of random ids; the speed does not depend on what they are."""
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randint(config.vocab_size, (batch_size, config.block_size + 1), generator=generator)


def measure(variants: list[Variant], config: Config, batch_size: int, turns: int) -> dict[Variant, Measured]:
    """Each variant's first two steps, which compile and allocate, then `turns` timed steps of each in turn.

    Raises:
        RuntimeError: a variant computes another loss, so it does not do the same work.
    """
    data = batches(config, batch_size)
    first_rows, second_rows = next(data), next(data)
    steps, measured = {}, {}
    for variant in variants:
        say(f"{variant.name}: first steps")
        started = time.perf_counter()
        steps[variant] = training_step(variant, config)
        first_loss = steps[variant](first_rows)
        measured[variant] = Measured(time.perf_counter() - started, first_loss, [], [])
        steps[variant](second_rows)
        expected = measured[variants[0]].first_loss
        if abs(first_loss - expected) > LOSS_TOLERANCE[variant.precision] * expected:
            raise RuntimeError(f"first loss of {variant.name} is {first_loss}, of {variants[0].name} {expected}")
    for turn in range(turns):
        say(f"turn {turn + 1} of {turns}")
        rows = next(data)
        for variant in random.Random(turn).sample(variants, len(variants)):  # so that none always follows the same one
            cpu, wall = time.process_time(), time.perf_counter()
            steps[variant](rows)
            measured[variant].cpu_secs.append(time.process_time() - cpu)
            measured[variant].secs.append(time.perf_counter() - wall)
    for variant in variants:
        measured[variant].products_share = products_share(steps[variant], next(data))
    return measured


def products_share(step: Callable[[Tensor], float], rows: Tensor) -> float:
    """Share of one step that torch spends in products and attention, forward and backward; slightly low, as profiling
    makes the many small operations slower."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(rows)
    events = profile.key_averages()
    products = sum(event.self_cpu_time_total for event in events if event.key.startswith(PRODUCTS))
    return products / sum(event.self_cpu_time_total for event in events)


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "q1": low, "q3": high}


def ratios(measured: dict[Variant, Measured], clock: str) -> list[dict[str, Any]]:
    """How many times faster ours is than each other variant of its policy: medians over the turns."""
    found = []
    for ours, mine in measured.items():
        for other, theirs in measured.items():
            if ours.family == "ours" != other.family and (ours.precision == other.precision or other.family == "naive"):
                per_turn = [b / a for a, b in zip(getattr(mine, clock), getattr(theirs, clock), strict=True)]
                found.append({"ours": ours.name, "against": other.name, **spread(per_turn)})
    return found


def record(arguments: argparse.Namespace, config: Config, measured: dict[Variant, Measured]) -> dict[str, Any]:
    """Everything of one run as plain data."""
    tokens = arguments.batch_size * config.block_size
    auto = auto_variant(config)
    return {
        "command": shlex.join(["python", "-m", "benchmarks.cpu_training", *sys.argv[1:]]),
        "what": "one training step: forward, backward, clipping, AdamW",
        "shape": asdict(config),
        "batch_size": arguments.batch_size,
        "turns": arguments.turns,
        "threads": torch.get_num_threads(),
        "auto": {"variant": auto[0].name, "why": auto[1]},
        "variants": [
            {
                "name": variant.name,
                "tokens_per_cpu_sec": spread([tokens / secs for secs in m.cpu_secs]),
                "tokens_per_sec": spread([tokens / secs for secs in m.secs]),
                "first_step_secs": m.first_secs,
                "first_loss": m.first_loss,
                "products_share": m.products_share,
                "cpu_secs": m.cpu_secs,
                "secs": m.secs,
            }
            for variant, m in measured.items()
        ],
        "ratios_cpu_secs": ratios(measured, "cpu_secs"),
        "ratios_secs": ratios(measured, "secs"),
        "machine": {**describe(), **software(), "load_average": os.getloadavg()},
    }


def auto_variant(config: Config) -> tuple[Variant, str]:
    """What `pretrain` would run here with precision and compile left at auto, and why."""
    run = RunConfig(out_dir="", model=ModelConfig(config.name), data=DataConfig(train=""), stages=[])
    compute = choose_compute(run, torch.device("cpu"), RUN_TOKENS)
    return Variant("ours", compute.precision, compute.compile), compute.reason


def software() -> dict[str, str | None]:
    import transformers

    compiler = find_cpp_compiler()
    version = compiler and subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.split("\n")[0]
    return {"transformers": transformers.__version__, "compiler": version or None}


def print_table(result: dict[str, Any]) -> None:
    units = f"{'CPU-second':>10}{'quartiles':>16}{'second':>9}{'quartiles':>16}"
    print(f"{'tokens per':34}{units}{'products':>10}{'first step':>12}")
    for row in result["variants"]:
        cells = (
            f"{row[unit]['median']:>{width},.0f}{row[unit]['q1']:>9,.0f} -{row[unit]['q3']:>5,.0f}"
            for unit, width in (("tokens_per_cpu_sec", 10), ("tokens_per_sec", 9))
        )
        mark = "*" if row["name"] == result["auto"]["variant"] else ""
        rest = f"{row['products_share']:>10.0%}{row['first_step_secs']:>10.1f} s"
        print(f"{row['name'] + mark:34}{''.join(cells)}{rest}")
    print(f"* what precision=auto compile=auto gives here: {result['auto']['why']}\n")
    print(f"{'times faster, by':60}{'CPU time':>9}{'quartiles':>14}{'clock':>9}")
    for by_cpu, by_clock in zip(result["ratios_cpu_secs"], result["ratios_secs"], strict=True):
        quartiles = f"{by_cpu['q1']:.2f} - {by_cpu['q3']:.2f}"
        pair = f"{by_cpu['ours']} against {by_cpu['against']}"
        print(f"{pair:60}{by_cpu['median']:>9.2f}{quartiles:>14}{by_clock['median']:>9.2f}")


def write(result: dict[str, Any], path: Path) -> None:
    """Replace the run with this number of threads, keep the others."""
    runs = json.loads(path.read_text()) if path.exists() else {}
    runs[f"threads={result['threads']}"] = result
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(sorted(runs.items())), indent=1) + "\n", encoding="utf-8")


def say(text: str) -> None:
    """Progress, beside the result."""
    print(text, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n-layer", type=int, default=8)
    parser.add_argument("--n-embd", type=int, default=256)
    parser.add_argument("--n-head", type=int, default=4)
    parser.add_argument("--intermediate-size", type=int, default=704)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--turns", type=int, default=7, help="timed steps of every variant")
    parser.add_argument("--only", nargs="+", default=[""], help="run the variants whose name contains one of these")
    parser.add_argument("--json", action="store_true", help="print the result as JSON and nothing else")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help=f"file to add the result to; default: {RESULT.name}, for a run of the default shape and all variants",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    sizes = ("n_layer", "n_embd", "n_head", "intermediate_size", "vocab_size", "block_size")
    config = Config(name="benchmark", **{size: getattr(args, size) for size in sizes})
    variants = [variant for variant in VARIANTS if any(part in variant.name for part in args.only)]
    if find_cpp_compiler() is None:
        say("no C++ compiler: the compiled variants are left out")
        variants = [variant for variant in variants if variant.compile == "none"]
    result = record(args, config, measure(variants, config, args.batch_size, args.turns))
    if args.json:
        print(json.dumps(result))
    else:
        print_table(result)
    is_default = all(getattr(args, key) == value for key, value in vars(parse([])).items() if key not in FREE)
    if args.out or is_default:
        write(result, args.out or RESULT)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
