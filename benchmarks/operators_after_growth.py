"""What every operator does to a real model: its loss before growth, right after it, and 50, 100 and 200 steps later.

The model is stories260K (llama2.c, 5 layers of width 64), the text Tiny Shakespeare: the first nine tenths train, the
rest is what the losses are of. Both lie under --data. Run `python -m benchmarks.operators_after_growth`; one core is
enough, and --estimate says for how long. It prints a table and writes results/operators_after_growth.json.

Operators in width that have a choice of --residual are measured by each rule that makes other weights: all rules start
from the same function where they keep it, but a channel that is written a times as large moves 1/a as far, relative to
what it is, in a step of AdamW.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.result_files import RESULTS, write_result
from grow.apply import make_weights
from grow.operators import OPERATORS, needs_data, operator, plan_growth
from grow.plan import GrowthPlan, Reference
from grow.samples import Samples, open_samples
from lit_gpt.axes import EMBEDDING, layer_of
from lit_gpt.config import Config
from lit_gpt.flops import count_parameters
from lit_gpt.llama2c import read_llama2c, to_exchange
from lit_gpt.model import GPT
from lit_gpt.packed_dataset import token_dtype, write_token_file
from lit_gpt.tokenizer import Tokenizer
from pretrain.config import OptimizerConfig, ScheduleConfig
from pretrain.optim import build_optimizer, learning_rate, set_learning_rate

MODEL, TEXT = "checkpoints/stories260K", "tinyshakespeare/input.txt"
RESULT = RESULTS / "operators_after_growth.json"
STEPS = (50, 100, 200)
SEEDS = (0, 1, 2)
TRAIN_TOKENS, TRAIN_ROWS = 64, 2  # of one sample; samples of one step
HELD_OUT_ROWS = 32
OTHER_SEED = 1000  # added for what is trained before growth: other samples than after it
TIMED_STEPS = 10
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, min_learning_rate=1e-3)
SCHEDULE = ScheduleConfig(kind="wsd", warmup_steps=10)

Request = Mapping[str, Any]
"""Keywords of `plan_growth`."""
DEPTHS: tuple[Request, ...] = ({"n_layer": 10}, {"n_layer": 7})
WIDTHS: tuple[Request, ...] = ({"n_embd": 128}, {"n_embd": 96}, {"n_embd": 96, "n_query_groups": 4})
BOTH: tuple[Request, ...] = ({"n_embd": 128}, {"n_layer": 10, "n_embd": 128}, {"n_layer": 7, "n_embd": 96})
REQUESTS_BY_AXIS = {"depth": DEPTHS, "width": WIDTHS, "both": BOTH}
TWICE: tuple[Request, ...] = ({"n_embd": 128}, {"n_embd": 128, "n_query_groups": 4})
REQUESTS: dict[str, tuple[Request, ...]] = {
    "stack": ({"n_layer": 10}, {"n_layer": 15}),
    "partial": ({"layer_map": "123-2345*1-345"}, {"layer_map": "12345-new"}),
    "solar": ({"n_layer": 8},),
    "gradual": ({"n_layer": 8}, {"n_layer": 10}),
    "mslt": ({"n_layer": 8},),
    "llama-pro": ({"n_layer": 6}, {"n_layer": 10}),
    "midas": ({"n_layer": 6},),
    "lidas": ({"n_layer": 6},),
    "staged-depth": ({"n_layer": 10},),
    "one-layer": ({"n_layer": 5},),
    "inheritune": ({"n_layer": 3},),
    "opt-deus": ({"n_layer": 7}, {"n_layer": 9}),
    "lesa": ({"n_layer": 7}, {"n_layer": 6}),
    "aki-pro": BOTH[1:],
    "lemon": BOTH[1:],
    "hypercloning": TWICE,
    "staged-width": TWICE[:1],
    "gradmax": ({"intermediate_size": 344}, {"intermediate_size": 200}),
}
"""Where the axis does not say it all. The first request of an operator is the one that is measured."""
RULES = ("M", "U", "Z", "E")
"""For residual channels; the first is the default, with which an operator is measured anyhow."""
OTHER_WIDTHS: dict[str, tuple[Request, ...]] = {"split-width": ({"n_embd": 96},), "lemon": ({"n_embd": 96},)}
"""Where rules are compared too: at twice the width some of them make the same weights."""
LAYERS_OF_SOURCE = {"lidas": 4, "one-layer": 1}
"""Operators that five layers do not suit grow from the first few of them."""


@dataclass(frozen=True)
class Growth:
    """One growth of the real model."""

    operator: str
    request: Request
    n_layer_src: int | None = None
    """Layers of the real model that are there before growth, from the first on. None: all."""
    trained_first: bool = False
    """Whether these layers are trained before growth, which then takes further ones from the real model."""

    def plan(self, src: Config, seed: int = 0) -> GrowthPlan:
        return plan_growth(self.operator, src, seed=seed, **self.request)

    def with_reference(self, config: Config) -> Growth:
        """The same growth, by layers of a model of this configuration."""
        return replace(self, request={**self.request, "reference": Reference(config, "", MODEL)})

    def __str__(self) -> str:
        shown = {key: MODEL if key == "reference" else value for key, value in self.request.items()}
        return f"{self.operator} {' '.join(f'{key}={value}' for key, value in shown.items())}"


def growths_of(name: str) -> list[Growth]:
    """Sizes that an operator of the registry can grow the real model to.

    Raises:
        ValueError: its axis is not known here.
    """
    requests = REQUESTS.get(name) or REQUESTS_BY_AXIS.get(OPERATORS[name].axis)
    if requests is None:
        raise ValueError(f"operator {name!r} grows {OPERATORS[name].axis!r}; add sizes for it to REQUESTS")
    return [Growth(name, request, LAYERS_OF_SOURCE.get(name)) for request in requests]


APPENDED = Growth("inheritune", {"n_layer": 5}, n_layer_src=3, trained_first=True)


@dataclass(frozen=True)
class Rules:
    """One growth by every rule for residual channels that it can have."""

    growth: Growth
    same_weights: dict[str, list[str]] = field(default_factory=dict)
    """Rule -> those that make the same weights as it, and are not measured."""

    @classmethod
    def of(cls, growth: Growth, src: Config) -> Rules:
        found: dict[tuple[object, ...], list[str]] = {}
        for rule in RULES:
            try:
                width = replace(growth, request={**growth.request, "residual": rule}).plan(src).width
            except ValueError:
                continue  # not a rule for this growth
            assert width is not None
            found.setdefault((*width.channel_scales(src), width.norm_scale(src)), []).append(rule)
        return cls(growth, {first: others for first, *others in found.values()})

    def growths(self) -> list[Growth]:
        """The default first, and under the name that it has without a choice."""
        named = [replace(self.growth, request={**self.growth.request, "residual": rule}) for rule in self.same_weights]
        return [self.growth, *named[1:]]

    def notes(self) -> list[str]:
        """What is not in the table, as text."""
        return [
            f"{self.growth} residual={' and '.join(others)}: the same weights as {rule}"
            for rule, others in self.same_weights.items()
            if others
        ]


def measured(name: str, src: Config) -> tuple[list[Growth], list[str]]:
    """The growths of an operator that are in the table, and notes on what is not."""
    first = growths_of(name)[0]
    if name == "inheritune":
        return [first, APPENDED.with_reference(src)], []
    if "residual" not in OPERATORS[name].options:
        return [first], []
    compared = [
        Rules.of(replace(first, request=request), src) for request in (first.request, *OTHER_WIDTHS.get(name, ()))
    ]
    return [growth for rules in compared for growth in rules.growths()], [
        n for rules in compared for n in rules.notes()
    ]


def first_layers(
    config: Config, weights: Mapping[str, Tensor], n_layer: int | None
) -> tuple[Config, dict[str, Tensor]]:
    """The model without its last layers; None keeps all."""
    if n_layer is None:
        return config, dict(weights)
    kept = {name: weight for name, weight in weights.items() if (layer_of(name) or 0) < n_layer}
    return replace(config, n_layer=n_layer), kept


def samples_of(ids: Tensor, config: Config, path: Path, *, seed: int = 0) -> Samples:
    """For operators that read data: ids (n,) written to a token file at `path`, in samples of config.block_size."""
    write_token_file(path, ids.numpy(), token_dtype(config.vocab_size))
    return open_samples(path, config, seed=seed)


@dataclass(frozen=True)
class Bench:
    """The model and the text."""

    config: Config
    weights: dict[str, Tensor]
    train_ids: Tensor
    """(n,) int64"""
    held_out: Tensor
    """(HELD_OUT_ROWS, TRAIN_TOKENS + 1) int64"""

    @classmethod
    def load(cls, data: Path) -> Bench:
        config, weights = read_llama2c(data / MODEL)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = Tokenizer.load(to_exchange(data / MODEL, Path(folder, "stories")))
            text = (data / TEXT).read_text(encoding="utf-8")
            cut = len(text) * 9 // 10
            train_ids, held_out = (torch.from_numpy(tokenizer.encode(part)) for part in (text[:cut], text[cut:]))
        n_held_out = HELD_OUT_ROWS * (TRAIN_TOKENS + 1)
        return cls(config, weights, train_ids, held_out[:n_held_out].view(HELD_OUT_ROWS, -1))

    def grow(self, plan: GrowthPlan, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Grown weights. Operators that read data get batches of the size of those that are trained on."""
        if not needs_data(plan):
            reference = None if plan.reference is None else self.weights
            return dict(make_weights(plan, weights, reference=reference).weights)
        with_batch = replace(plan, options={**plan.options, "batch_size": TRAIN_ROWS})
        with tempfile.TemporaryDirectory() as folder:
            short = replace(self.config, block_size=TRAIN_TOKENS)
            samples = samples_of(self.train_ids, short, Path(folder, "train.bin"), seed=plan.seed)
            return dict(make_weights(with_batch, weights, samples=samples).weights)

    def batch(self, generator: torch.Generator) -> Tensor:
        """(TRAIN_ROWS, TRAIN_TOKENS + 1)"""
        starts = torch.randint(len(self.train_ids) - TRAIN_TOKENS, (TRAIN_ROWS, 1), generator=generator)
        return self.train_ids[starts + torch.arange(TRAIN_TOKENS + 1)]

    @torch.no_grad()
    def loss(self, model: GPT) -> float:
        """On the text that is not trained on, nats per token."""
        return model(self.held_out[:, :-1], self.held_out[:, 1:]).item()


def model_of(config: Config, weights: Mapping[str, Tensor]) -> GPT:
    """In the dtype of the embedding."""
    model = GPT(config).to(weights[EMBEDDING].dtype)
    model.load_state_dict(dict(weights))
    return model


def train(bench: Bench, model: GPT, steps: Sequence[int], seed: int) -> dict[int, float]:
    """Train in place; returns the loss after 0 steps and after each number of `steps`."""
    optimizer = build_optimizer(model, OPTIMIZER)
    generator = torch.Generator().manual_seed(seed)
    losses = {0: bench.loss(model)}
    for step in range(max(steps)):
        set_learning_rate(optimizer, learning_rate(step, max(steps), OPTIMIZER, SCHEDULE))
        rows = bench.batch(generator)
        model(rows[:, :-1], rows[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in steps:
            losses[step + 1] = bench.loss(model)
    return losses


def measure(bench: Bench, growth: Growth | None, steps: Sequence[int], seeds: Sequence[int]) -> dict[str, Any]:
    """One row of the table. Without a growth the model trains on as it is."""
    started_secs = time.process_time()
    config, weights = first_layers(bench.config, bench.weights, growth.n_layer_src if growth else None)
    before, runs = [], []
    grown = config
    for seed in seeds:
        source = model_of(config, weights)
        if growth is not None and growth.trained_first:
            train(bench, source, [max(steps)], seed + OTHER_SEED)
        before.append(bench.loss(source))
        grown_tensors: Mapping[str, Tensor] = source.state_dict()
        if growth is not None:
            plan = growth.plan(config, seed)
            grown, grown_tensors = plan.dst, bench.grow(plan, grown_tensors)
        runs.append(train(bench, model_of(grown, grown_tensors), steps, seed))
    return {
        "operator": growth.operator if growth else None,
        "growth": str(growth) if growth else "not grown",
        "preserves": operator(growth.operator).preserves if growth else None,
        "n_layer_before": config.n_layer,
        "sizes": {key: getattr(grown, key) for key in ("n_layer", "n_embd", "n_head", "n_query_groups")},
        "parameters": count_parameters(grown),
        "loss_before": mean(before),
        "loss_after": {str(step): [run[step] for run in runs] for step in (0, *steps)},
        "cpu_secs": round(time.process_time() - started_secs, 1),
    }


def estimate_secs(bench: Bench, growths: Sequence[Growth | None], steps: Sequence[int], n_seeds: int) -> float:
    """CPU seconds that the table takes, from some steps of the source: time rises as depth and the root of width."""
    train(bench, model_of(bench.config, bench.weights), [TIMED_STEPS], 0)  # the first steps are slower
    started_secs = time.process_time()
    train(bench, model_of(bench.config, bench.weights), [TIMED_STEPS], 0)
    per_step_secs = (time.process_time() - started_secs) / TIMED_STEPS
    n_models = 0.0
    for growth in growths:
        src = (
            bench.config
            if growth is None
            else replace(bench.config, n_layer=growth.n_layer_src or bench.config.n_layer)
        )
        dst = src if growth is None else growth.plan(src).dst
        width = (dst.n_embd / bench.config.n_embd) ** 0.5
        n_models += dst.n_layer * width / bench.config.n_layer + (growth is not None and growth.trained_first)
    return n_models * per_step_secs * max(steps) * n_seeds


def print_table(rows: Sequence[dict[str, Any]], steps: Sequence[int]) -> None:
    width = max(len(row["growth"]) for row in rows) + 2
    heads = "".join(f"{head:>16}" for head in ("right after", *(f"{step} steps" for step in steps)))
    print(f"{'':{width}}{'parameters':>10}{'before':>9}{heads}")
    for row in rows:
        cells = "".join(f"{_cell(losses):>16}" for losses in row["loss_after"].values())
        print(f"{row['growth']:{width}}{row['parameters']:>10,}{row['loss_before']:>9.3f}{cells}")


def _cell(losses: Sequence[float]) -> str:
    spread = stdev(losses) if len(losses) > 1 else 0.0
    return f"{mean(losses):.3f} ±{spread:.3f}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = os.environ.get("LIT_GROW_DATA")
    parser.add_argument("--data", type=Path, default=default, help=f"folder with {MODEL} and {TEXT}; LIT_GROW_DATA")
    parser.add_argument("--only", nargs="+", choices=list(OPERATORS), help="operators to measure; default all")
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS, help="when to measure (%(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="of growth and of the data's order")
    parser.add_argument("--estimate", action="store_true", help="say how long it will take, and stop")
    parser.add_argument("--out", type=Path, help=f"file to write; default {RESULT.name} for a run of all operators")
    args = parser.parse_args(arguments)
    if args.data is None:
        parser.error("--data or LIT_GROW_DATA must say where the model and the text are")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    torch.set_num_threads(1)
    bench = Bench.load(args.data)
    growths: list[Growth | None] = [None]
    notes = []
    for name in args.only or OPERATORS:
        more, said = measured(name, bench.config)
        growths += more
        notes += said
    secs = estimate_secs(bench, growths, args.steps, len(args.seeds))
    sys.stderr.write(f"{len(growths)} rows, about {secs / 60:.0f} minutes of one core\n")
    if args.estimate:
        return 0
    rows = []
    for growth in growths:
        rows.append(measure(bench, growth, args.steps, args.seeds))
        sys.stderr.write(f"{rows[-1]['growth']}: {rows[-1]['cpu_secs']} s\n")
    print_table(rows, args.steps)
    for note in notes:
        print(note)
    is_default = args.only is None and tuple(args.steps) == STEPS and tuple(args.seeds) == SEEDS
    if args.out or is_default:
        write(args.out or RESULT, rows, args.steps, args.seeds, notes)
    return 0


def write(
    path: Path, rows: Sequence[dict[str, Any]], steps: Sequence[int], seeds: Sequence[int], notes: Sequence[str]
) -> None:
    record = {
        "command": "python -m benchmarks.operators_after_growth",
        "what": f"loss of {MODEL} on held-out {TEXT}, nats per token, before growth, right after and while it trains",
        "training": {
            "steps": list(steps),
            "seeds": list(seeds),
            "samples_per_step": TRAIN_ROWS,
            "tokens_per_sample": TRAIN_TOKENS,
            "held_out_tokens": HELD_OUT_ROWS * TRAIN_TOKENS,
            "trained": "all parameters, also where the paper of an operator freezes some",
            "operators_that_read_data": "learn-depth and learn-width train mixing matrices for 100 steps of as many "
            "tokens first, gradmax reads one batch; none of it counts as a step",
            "learning_rate": OPTIMIZER.learning_rate,
            "warmup_steps": SCHEDULE.warmup_steps,
        },
        "results": list(rows),
        "notes": list(notes),
        "cpu_secs": round(sum(row["cpu_secs"] for row in rows)),
        "threads": torch.get_num_threads(),
        "machine": {**describe(), "load_average": os.getloadavg()},
    }
    write_result(path, record)


if __name__ == "__main__":
    raise SystemExit(main())
