"""Measurements of this code, beside those of others: list them, run them, and renew the tables of docs/performance.md.

    python -m benchmarks                       the light ones: training, kernels, data, evaluation
    python -m benchmarks training grow         some, the heavy ones too
    python -m benchmarks --quick               do they run? seconds each, on toy sizes, results thrown away
    python -m benchmarks --list                what there is, what it needs and how long it takes
    python -m benchmarks --check               fails unless the page has the tables of results/

Each runs in a process of its own, with one thread, and writes results/NAME.json; one that fails loses nothing of the
others, and the exit code is 1. Then the ratio tables are printed and the page is written. A missed goal is no failure:
the tables say it. Peers that are not named or not installed are left out, and the tables say that too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import performance, tables
from benchmarks.result_files import RESULTS


@dataclass(frozen=True)
class Benchmark:
    """A module of this package, and how it is run."""

    module: str
    about: str
    minutes: float
    """On two idle cores of 2.5 GHz, roughly."""
    peers: tuple[str, ...] = ()
    """Options that it takes if they are given."""
    quick: tuple[str, ...] | None = ("--quick",)
    """Arguments of a smoke run; None: there is none."""


GROUPS: dict[str, tuple[Benchmark, ...]] = {
    "training": (
        Benchmark(
            "training",
            "one training step by backend, transformers, litgpt, nanochat, naive, and the floor",
            20,
            ("litgpt", "nanochat"),
        ),
    ),
    "kernels": (Benchmark("kernels", "every operation by backend: time, error, memory of the loss", 4),),
    "data": (
        Benchmark(
            "data_loader",
            "tokens per CPU-second of the loader, TinyLlama's beside it; 0.4 GB of disk",
            4,
            ("tinyllama",),
        ),
        Benchmark("data_index", "index of a trillion tokens, and a jump into it", 0.2, quick=()),
        Benchmark(
            "data_prep",
            "text to tokens, datatrove and TinyLlama beside it; needs LIT_GROW_DATA",
            3,
            ("tinyllama", "datatrove"),
        ),
    ),
    "evaluation": (Benchmark("evaluation", "zero-shot tasks, the harness beside it; needs LIT_GROW_DATA", 6),),
    "grow": (
        Benchmark(
            "grow_speed",
            "growth of a checkpoint to 5.5 GB, cp beside it; 30 GB of disk",
            30,
            quick=("--n-layer", "4", "--n-embd", "128", "--repeats", "1"),
        ),
    ),
    "convert": (
        Benchmark(
            "convert_speed",
            "conversion of 4.4 GB, cp and litgpt beside it; 20 GB of disk",
            10,
            ("litgpt-python",),
            quick=("--model", "1L128H", "--repeats", "1"),
        ),
    ),
    "save-stall": (Benchmark("save_stall", "how long a save holds training up", 3, quick=None),),
    "prep-memory": (Benchmark("prep_memory", "memory of preparing 2 GB of text; 7 GB of disk", 10, quick=None),),
    "operators": (
        Benchmark("operators_after_growth", "loss after growth by every operator; needs LIT_GROW_DATA", 40, quick=None),
    ),
    "chance": (
        Benchmark("zero_shot_chance", "random weights score as chance does; needs LIT_GROW_DATA", 60, quick=None),
    ),
    "kill-sweep": (Benchmark("kill_sweep", "a hundred killed runs go on as if nothing had been", 60, quick=None),),
}
"""Name on the command line -> what it runs. The study has a command of its own, see docs/study.md."""
LIGHT = ("training", "kernels", "data", "evaluation")
USUAL = (*LIGHT, "grow", "convert")
PEERS = {
    "litgpt": "site-packages of an environment with litgpt, of this Python version",
    "nanochat": "a checkout of github.com/karpathy/nanochat",
    "tinyllama": "a checkout of github.com/jzhang38/TinyLlama",
    "datatrove": "Python of an environment with datatrove[io] regex nltk",
    "litgpt-python": "Python of an environment with litgpt",
}
"""Option -> what its PATH is."""


def listing() -> str:
    """What there is."""
    lines = []
    for name, benchmarks in GROUPS.items():
        for each in benchmarks:
            option = "".join(f" --{peer} PATH" for peer in each.peers)
            lines.append(f"{name:12} {each.minutes:5g} min  {each.about}{option and f' [{option.strip()}]'}")
    return "\n".join([*lines, "", f"without names: {' '.join(LIGHT)}; with --quick: {' '.join(USUAL)}"])


def command(each: Benchmark, args: argparse.Namespace, out: Path) -> list[str]:
    """What runs it."""
    python = args.eval_python if each.module == "evaluation" and args.eval_python else sys.executable
    found = [python, "-m", f"benchmarks.{each.module}", "--out", str(out)]
    for peer in each.peers:
        path = getattr(args, peer.replace("-", "_"))
        found += [] if path is None else [f"--{peer}", path]
    return [*found, *((each.quick or ()) if args.quick else ())]


def run(each: Benchmark, args: argparse.Namespace, results: Path) -> bool:
    """One benchmark in a process of its own; whether it wrote its result."""
    out = results / f"{each.module}.json"
    before = out.stat().st_mtime_ns if out.exists() else None
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
    print(f"== {each.module}: {each.about}", flush=True)
    started = time.monotonic()
    done = subprocess.run(command(each, args, out), cwd=root, env=environment)
    written = out.exists() and out.stat().st_mtime_ns != before
    ending = "written" if written else f"FAILED with exit code {done.returncode}"
    print(f"== {each.module}: {ending} after {time.monotonic() - started:.0f} s\n", flush=True)
    return written


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=listing(),
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to run; default: the light ones")
    parser.add_argument("--list", action="store_true", help="say what there is, and stop")
    parser.add_argument("--quick", action="store_true", help="toy sizes; the page stays as it is")
    parser.add_argument("--check", action="store_true", help="run nothing; fail if the page has other tables")
    parser.add_argument("--results", type=Path, help="folder for the JSON; default: results/, a temporary one if quick")
    parser.add_argument("--eval-python", metavar="PATH", help="Python of an environment with ours and the extra eval")
    for option, what in PEERS.items():
        parser.add_argument(f"--{option}", metavar="PATH", help=what)
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.names) - set(GROUPS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(GROUPS)}")
    return args


def measure(args: argparse.Namespace, results: Path) -> list[str]:
    """Run what was asked for and print its tables; returns the modules that failed."""
    chosen = args.names or (USUAL if args.quick else LIGHT)
    benchmarks = [each for name in chosen for each in GROUPS[name]]
    if args.quick:
        for each in benchmarks:
            if each.quick is None:
                print(f"{each.module} has no quick run and is left out", file=sys.stderr)
        benchmarks = [each for each in benchmarks if each.quick is not None]
    print(f"{', '.join(each.module for each in benchmarks)}", end="")
    print("" if args.quick else f": about {sum(each.minutes for each in benchmarks):g} minutes", flush=True)
    failed = [each.module for each in benchmarks if not run(each, args, results)]
    table = performance.table_of(results)
    for name, (file, _) in performance.TABLES.items():
        if file in {each.module for each in benchmarks} - set(failed):
            print(f"{name}\n\n{table(name)}\n", flush=True)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.list:
        print(listing())
        return 0
    if args.check:
        return tables.check(performance.PAGE, performance.table_of(), "python -m benchmarks")
    with tempfile.TemporaryDirectory() as folder:
        results = args.results or (Path(folder) if args.quick else RESULTS)
        failed = measure(args, results.resolve())
    if not args.quick and args.results is None:
        tables.renew(performance.PAGE, performance.table_of())
        print(f"{performance.PAGE.name} has the tables of {RESULTS.name}/")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
