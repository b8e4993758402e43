"""`grow plan`: when and how much to grow, what it costs, and what the other rules say."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from math import inf
from pathlib import Path
from textwrap import wrap
from typing import Any

from grow.layer_map import MAX_LAYERS
from grow.planning.devices import DEVICES
from grow.planning.guideline import COUNTS, Guideline, Phase, make_guideline, power, short
from grow.planning.model_sizes import named
from grow.planning.rules import Expectation, Rule, expected_speedup, rules
from lit_gpt.config import Config
from lit_gpt.counts import parse_count, parse_token_count
from lit_gpt.flops import count_non_embedding, count_parameters, flops_per_token
from lit_gpt.memory import RECOMPUTE, Computation, Memory, memory_per_device, memory_text

MICRO_BATCH_SIZE = 8
RECOMPUTED = "none"
USABLE = 0.9  # of a device's memory: the rest is the framework, workspaces and fragmentation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `grow plan`."""
    size = parser.add_argument_group("the model that is wanted, one of")
    size.add_argument("--params", metavar="N", help="parameters, e.g. 7e9 or 410M; sizes near it are proposed")
    size.add_argument("--model", metavar="NAME", help="a size by name, e.g. 24L2048H or tiny_LLaMA_3B")
    size.add_argument("--depth", "--n-layer", type=int, metavar="L", help="layers, with --width")
    size.add_argument("--width", "--n-embd", type=int, metavar="C", help="n_embd, with --depth")
    budget = parser.add_argument_group("the budget")
    budget.add_argument("--tokens", required=True, metavar="D", help="what training from scratch would take, e.g. 300B")
    budget.add_argument("--factor", type=float, metavar="G", help="layers after growth over before; default 4")
    budget.add_argument("--base-tokens", metavar="D", help="when to grow; default by eq. 2 of arXiv 2405.15319")
    budget.add_argument(
        "--count",
        choices=COUNTS,
        help="which number of parameters N is in the rules; default the given one, else total",
    )
    budget.add_argument("--vocab-size", type=int, default=32000, metavar="V", help="default 32000")
    speed = parser.add_argument_group("time and memory")
    speed.add_argument("--gpus", type=int, metavar="N", help="devices; default 1 with the options below")
    speed.add_argument("--tokens-per-sec", type=_rate, metavar="X", help="of the grown model, on all devices together")
    speed.add_argument(
        "--mfu", type=float, metavar="U", help="or the share of --device's peak that is reached, e.g. 0.4"
    )
    speed.add_argument("--device", choices=list(DEVICES), help="its peak rate (bf16) and memory")
    speed.add_argument(
        "--micro-batch-size", type=int, metavar="B", help=f"sequences at a time; default {MICRO_BATCH_SIZE}"
    )
    speed.add_argument("--activation-checkpointing", choices=RECOMPUTE, help=f"as pretrain's; default {RECOMPUTED}")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rules and this plan, as .png or .svg")
    parser.add_argument("--json", action="store_true", help="print one JSON value and nothing else")


def _rate(words: str) -> float:
    """12345.6 or 10k tokens a second."""
    try:
        return float(words)
    except ValueError:
        pass
    try:
        return float(parse_count(words, "tokens a second"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run(args: argparse.Namespace) -> dict[str, Any] | list[str]:
    """What `grow plan` prints: a value for JSON where it is asked for, else lines.

    Raises:
        ValueError: settings that contradict each other, a base that costs the whole budget, matplotlib is missing.
        OSError: the plot cannot be written.
    """
    if args.plot is not None:
        from grow.planning.plot import check_plot_path, write_plot

        check_plot_path(args.plot)
    plan = make_guideline(
        parse_token_count(args.tokens),
        parameters=None if args.params is None else parse_count(args.params, "parameters"),
        model=_model(args),
        vocab_size=args.vocab_size,
        count=args.count,
        factor=args.factor,
        base_tokens=None if args.base_tokens is None else parse_token_count(args.base_tokens),
    )
    hours, memory = _hours(plan, args), _memory(plan, args)
    warnings = [*plan.warnings(), *_memory_warnings(memory, args)]
    if args.plot is not None:
        write_plot(plan, args.plot)
    if args.json:
        return to_dict(plan, hours, memory, warnings)
    return [part for line in plan_lines(plan, hours, memory, warnings, args) for part in _wrapped(line)]


def _model(args: argparse.Namespace) -> Config | None:
    """The model that was named, or made of its depth and width; None for a number of parameters.

    Raises:
        ValueError: none of these, several, or half of one.
    """
    ways = [args.params is not None, args.model is not None, args.depth is not None or args.width is not None]
    if sum(ways) != 1:
        raise ValueError("give the size of the model in one way: --params N, --model NAME, or --depth L --width C")
    if args.params is not None:
        return None
    if args.model is not None:
        return Config.from_name(args.model, vocab_size=args.vocab_size)
    if args.depth is None or args.width is None:
        raise ValueError("--depth and --width go together; give both, or --params or --model")
    if not 1 <= args.depth <= MAX_LAYERS or args.width < 1:
        raise ValueError(
            f"--depth {args.depth} --width {args.width}: layers must be from 1 to {MAX_LAYERS}, as grow apply makes "
            f"them, and the width at least 1"
        )
    return named(Config.from_name(f"{args.depth}L{args.width}H", vocab_size=args.vocab_size))


def _hours(plan: Guideline, args: argparse.Namespace) -> dict[str, float] | None:
    """Device-hours of each phase and of training from scratch; None if nobody says how fast the devices are.

    Raises:
        ValueError: half of a statement, or two of them.
    """
    if args.gpus is not None and args.gpus < 1:
        raise ValueError(f"--gpus {args.gpus} must be at least 1")
    if args.tokens_per_sec is None and args.mfu is None:
        return None
    if args.tokens_per_sec is not None and args.mfu is not None:
        raise ValueError("--tokens-per-sec and --mfu both give the speed; give one of the two")
    devices = args.gpus or 1
    if args.mfu is not None:
        if args.device is None:
            raise ValueError(f"--mfu {args.mfu:g} needs the device whose peak it is of; give --device, e.g. h100")
        if not 0 < args.mfu <= 1:
            raise ValueError(f"--mfu {args.mfu:g} must be above 0 and at most 1")
        flops_per_sec = args.mfu * DEVICES[args.device].flops_per_sec
    else:
        if not 0 < args.tokens_per_sec < inf:
            raise ValueError(f"--tokens-per-sec {args.tokens_per_sec:g} must be above 0 and finite")
        flops_per_sec = args.tokens_per_sec * flops_per_token(plan.target.config).palm / devices

    def device_hours(phase: Phase, tokens: float) -> float:
        return flops_per_token(phase.config).palm * tokens / flops_per_sec / 3600

    base, target = device_hours(plan.base, plan.base.tokens), device_hours(plan.target, plan.target.tokens)
    return {
        "base": base,
        "target": target,
        "total": base + target,
        "scratch": device_hours(plan.target, plan.tokens),
        "wall_days": (base + target) / devices / 24,
    }


def _memory(plan: Guideline, args: argparse.Namespace) -> Memory | None:
    """Bytes on one device; None if nobody names a device or says how many there are."""
    micro_batch_size, recompute = _memory_settings(args)
    if micro_batch_size < 1:
        raise ValueError(f"--micro-batch-size {micro_batch_size} must be at least 1")
    if args.gpus is None and args.device is None:
        return None
    how = Computation(micro_batch_size, recompute=recompute, shards=args.gpus or 1)
    return memory_per_device(plan.target.config, how)


def _memory_settings(args: argparse.Namespace) -> tuple[int, str]:
    """Micro-batch size and activation checkpointing."""
    size = MICRO_BATCH_SIZE if args.micro_batch_size is None else args.micro_batch_size
    return size, args.activation_checkpointing or RECOMPUTED


def _memory_warnings(memory: Memory | None, args: argparse.Namespace) -> Iterator[str]:
    if memory is None:
        for option in ("micro_batch_size", "activation_checkpointing"):
            if getattr(args, option) is not None:
                name = f"--{option.replace('_', '-')}"
                yield f"{name} changes nothing here: memory is computed with --gpus or --device only"
        return
    if args.device is None:
        return
    there = DEVICES[args.device].memory_bytes
    if memory.total > USABLE * there:
        where = "one device" if args.gpus in (None, 1) else f"each of {args.gpus} devices"
        yield (
            f"training takes about {memory.total / 1e9:.3g} GB on {where}, and {args.device} has "
            f"{there / 1e9:.3g} GB; use more devices, a smaller --micro-batch-size, or "
            f"--activation-checkpointing full"
        )


def phase_dict(phase: Phase) -> dict[str, Any]:
    """One of the two models, for JSON."""
    config = phase.config
    return {
        "name": config.name,
        **{key: getattr(config, key) for key in ("n_layer", "n_embd", "n_head", "n_query_groups")},
        "intermediate_size": config.intermediate_size,
        "parameters": count_parameters(config),
        "non_embedding": count_non_embedding(config),
        "tokens": phase.tokens,
        "flops": phase.flops,
    }


def to_dict(
    plan: Guideline, hours: dict[str, float] | None, memory: Memory | None, warnings: list[str]
) -> dict[str, Any]:
    """The whole plan as plain values for JSON."""
    return {
        "growth_timing_tokens": plan.base.tokens,
        "growth_factor": plan.factor,
        "count": plan.count,
        "parameters": plan.parameters,
        "growth_timing_by_count": {name: round(d) for name, d in plan.timing.items()},
        "tokens": plan.tokens,
        "budget_flops": plan.budget_flops,
        "rule_parameters": plan.rule_parameters,
        "rule_flops": plan.rule_flops,
        "base": phase_dict(plan.base),
        "target": phase_dict(plan.target),
        "stages": stages(plan),
        "expected_speedup": expected_speedup(plan).to_dict(),
        "device_hours": hours,
        "memory_bytes": None if memory is None else {**dataclasses.asdict(memory), "total": memory.total},
        "warnings": warnings,
        "rules": [rule.to_dict() for rule in rules(plan)],
    }


def stages(plan: Guideline) -> list[dict[str, Any]]:
    """The stages of a `pretrain` run that follows the plan."""
    return [
        {"name": "base", "n_layer": plan.base.config.n_layer, "max_tokens": plan.base.tokens},
        {"name": "grown", "operator": "stack", "max_tokens": plan.target.tokens},
    ]


def plan_lines(
    plan: Guideline,
    hours: dict[str, float] | None,
    memory: Memory | None,
    warnings: list[str],
    args: argparse.Namespace,
) -> Iterator[str]:
    """The plan for a terminal."""
    base, target = plan.base, plan.target
    yield f"target     {_model_text(target.config)}"
    yield f"budget     6 x {short(target.parameters)} x {short(plan.tokens)} tokens = {power(plan.budget_flops)} FLOPs"
    yield f"base       {_model_text(base.config)}"
    rule = f"eq. 2 with N = {short(plan.rule_parameters)} ({plan.count}), C = 6 N D = {power(plan.rule_flops)}"
    how = "as asked" if plan.base_tokens_given else rule
    share = f"{base.flops / plan.budget_flops:.1%} of the budget"
    yield f"           {short(base.tokens)} tokens ({how}), {power(base.flops)} FLOPs, {share}"
    if not plan.base_tokens_given:
        each = ", ".join(f"{name} {short(plan.timing[name])}" for name in plan.timing)
        yield f"           d by what is counted as N: {each}"
    yield (
        f"then       stack {base.config.n_layer} -> {target.config.n_layer} layers (g = {plan.factor:g}), "
        f"{short(target.tokens)} tokens, {power(target.flops)} FLOPs"
    )
    yield f"stages     - {_flow(stages(plan)[0])}"
    yield f"           - {_flow(stages(plan)[1])}"
    yield from _expectation_lines(plan, expected_speedup(plan))
    if hours is not None:
        yield (
            f"time       {hours['base']:,.4g} + {hours['target']:,.4g} = {hours['total']:,.4g} device-hours "
            f"({hours['wall_days']:,.3g} days on {args.gpus or 1}); from scratch {hours['scratch']:,.4g}"
        )
    if memory is not None:
        yield from _memory_lines(memory, args)
    for warning in warnings:
        yield f"warning    {warning}"
    yield ""
    yield "Published rules, which disagree; none was measured here:"
    for rule in rules(plan):
        yield from _rule_lines(rule)


def _model_text(config: Config) -> str:
    sizes = f"{config.n_layer} layers of width {config.n_embd}"
    counts = f"{short(count_parameters(config))} parameters, {short(count_non_embedding(config))} without embeddings"
    return f"{config.name + ', ' if config.name else ''}{sizes}, {counts}"


def _flow(stage: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in stage.items()) + "}"


def _expectation_lines(plan: Guideline, expected: Expectation) -> Iterator[str]:
    ends = dict.fromkeys((expected.low, expected.high))
    gains = " to ".join(f"{each:.0%}" for each in ends)
    yield f"speed-up   {gains} was measured at {expected.size} ({expected.source}): {expected.domain}"
    if expected.in_domain:
        costs = " to ".join(power(plan.budget_flops / (1 + each)) for each in reversed(ends))
        yield (
            f"           at that, the loss of {short(plan.tokens)} tokens from scratch takes {costs} FLOPs instead of "
            f"{power(plan.budget_flops)}, the base included"
        )
    else:
        yield "           this plan is not near that: nobody has measured what it gains"


def _memory_lines(memory: Memory, args: argparse.Namespace) -> Iterator[str]:
    micro_batch_size, recompute = _memory_settings(args)
    yield (
        f"memory     about {memory.total / 1e9:.3g} GB a device after growth, sharded over {args.gpus or 1}, "
        f"micro-batch {micro_batch_size}, activation checkpointing {recompute}"
    )
    yield f"           {memory_text(memory)}"


def _rule_lines(rule: Rule) -> Iterator[str]:
    where = {True: "this plan lies in it", False: "this plan lies outside", None: "judge whether yours is like that"}
    yield f"{rule.about:11}{rule.name}: {rule.says}"
    yield f"{'':11}{rule.source}. Domain: {rule.domain}; {where[rule.in_domain]}"


def _wrapped(line: str) -> list[str]:
    """Lines of at most 120 columns, further ones under the second column."""
    return wrap(line, 120, subsequent_indent=" " * 11, break_on_hyphens=False) or [""]
