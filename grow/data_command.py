"""The part of `grow apply` that concerns operators which read data: options, samples, what is said of them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grow.operators import is_learned, needs_data, operator
from grow.plan import GrowthPlan
from grow.registry import BATCH_SIZE, LEARN_STEPS, OPERATORS

if TYPE_CHECKING:
    from grow.samples import Samples


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", metavar="PATH", help="samples for operators that read data: a prepared folder, or token files"
    )
    parser.add_argument("--learn-steps", type=int, metavar="N", help="updates of the mixing matrices; default 100")
    parser.add_argument("--learn-rate", type=float, metavar="R", help="of the mixing matrices; default by their kind")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="samples per step of an operator that reads data; default 8"
    )


def open_data(args: argparse.Namespace, plan: GrowthPlan, src: Path) -> Samples | None:
    """The samples of --data, checked against the source; None for plans that need none, and for a dry run without.

    Raises:
        ValueError: --data is missing, or the operator reads none.
        FileNotFoundError: there is no such data.
        DataError: it does not fit the source.
    """
    if args.data is not None and not operator(plan.operator).needs_data:
        readers = ", ".join(op.name for op in OPERATORS.values() if op.needs_data)
        raise ValueError(f"{plan.operator} reads no data; leave --data out. Operators that do: {readers}")
    if args.data is None and needs_data(plan) and not args.dry_run:
        raise ValueError(
            f"{plan.operator} makes weights from training samples: give --data PATH, a folder that scripts/prepare.py "
            f"made with the model's tokenizer, or token files"
        )
    if args.data is None or not needs_data(plan):
        return None
    from grow.samples import check_tokenizer, open_samples

    samples = open_samples(args.data, plan.src, seed=plan.seed, on_batch=_show_progress if is_learned(plan) else None)
    check_tokenizer(samples, src)
    return samples


def _show_progress(n_batches: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r  step {n_batches:,}\x1b[K\r")


def describe_learning(plan: GrowthPlan) -> str:
    """What is made from how much data, before it is."""
    n_rows = plan.options.get("batch_size", BATCH_SIZE)
    if not is_learned(plan):
        return f"the gradient on {n_rows} samples of {plan.src.block_size:,} tokens points new neurons their way"
    steps = plan.options.get("learn_steps", LEARN_STEPS)
    return f"mixing matrices are trained for {steps} steps of {n_rows} samples of {plan.src.block_size:,} tokens"


def describe_learned(data: dict[str, Any], flops: float) -> list[str]:
    """Lines for the receipt: what an operator that reads data has read, and what came of it."""
    lines = [f"  growth      {flops:.4g} FLOPs on {data['tokens']:,} tokens of {data['path_name']}"]
    if "last_loss" in data:
        losses = f"{data['first_loss']:.4f} -> {data['last_loss']:.4f}"
        lines.append(f"  loss        {losses} nats per token, on the batch after those it learned from")
    if data["samples"] > data["samples_in_files"]:
        lines.append(f"  repeated    {data['samples']:,} samples were read, and there are {data['samples_in_files']:,}")
    if data.get("neurons_not_converged"):
        lines.append(f"  open        directions of {data['neurons_not_converged']:,} neurons, used as far as they came")
    return lines
