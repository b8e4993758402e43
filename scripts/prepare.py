"""Turn raw text into token files: plan the units of work, write shards with receipts, then one manifest.

Every byte of the output is a function of the plan alone. A killed run is continued by the same command; a finished
folder is left as it is; a folder made from other inputs or options is refused.

  prepare.py --input PATH... --out DIR    prepare; on several machines with --task, see there
  prepare.py check DIR                    read a prepared folder again and compare it with its manifest
  prepare.py export DIR --out DIR         cut it into the chunks that TinyLlama and prts read
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import Any

from prep.corpus import SPLIT_BUCKETS, InputFile, find_inputs, stdlib_inputs
from prep.manifest import check_bad_files, finish, report, warn_about
from prep.plan import (
    DEFAULT_VALIDATION_FRACTION,
    locked,
    make_plan,
    open_out,
    place_tokenizer,
    publish_plan,
    units_of,
    warn,
    withdrawn_on_error,
    without_left_overs,
)
from prep.pool import run_units
from prep.progress import choose_progress
from prep.units import Unit

from lit_gpt.errors import EXIT_STOPPED, DataError, run_command
from lit_gpt.tokenizer import Tokenizer

LISTED = 10


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="prepare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_corpus(parser.add_argument_group("what to read"))
    _add_form(parser.add_argument_group("what to write"))
    _add_work(parser.add_argument_group("how to work; changes nothing in the output"))
    args = parser.parse_args([dashed(argument) for argument in argv])
    args.drop = tuple((key, value) for key, _, value in (each.partition("=") for each in args.drop))
    return args


def _add_corpus(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--input", nargs="+", default=[], metavar="PATH", help="text, JSON lines, parquet, packed too, or folders of it"
    )
    group.add_argument("--validation-input", nargs="+", default=[], metavar="PATH", help="held-out text, if separate")
    group.add_argument("--stdlib", action="store_true", help="use the interpreter's own sources: needs no download")
    group.add_argument("--percentage", type=float, default=1.0, metavar="F", help="the first share F of the files (1)")
    group.add_argument("--text-key", default="text", help="key of the text in JSON lines and tables (%(default)s)")
    group.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="leave out rows with this value; a.b looks in a",
    )
    group.add_argument("--document-bytes", type=int, default=0, help="cut text files into documents of this size")
    group.add_argument("--max-bad", type=float, default=1e-3, help="share of broken JSON lines to bear (%(default)s)")
    group.add_argument(
        "--on-bad-file", choices=("fail", "skip"), default="fail", help="skip: keep what is before the damage, and list"
    )


def _add_form(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--out", required=True, metavar="DIR", help="folder for the token files")
    group.add_argument("--tokenizer", metavar="PATH", help="a file, a folder, or `bytes`; default: train one")
    group.add_argument("--vocab-size", type=int, default=4096, help="pieces of the tokenizer to train (%(default)s)")
    group.add_argument(
        "--validation-fraction", type=float, help=f"share of documents held out ({DEFAULT_VALIDATION_FRACTION})"
    )
    group.add_argument(
        "--split", choices=("auto", "train", "validation"), default="auto", help="what all documents belong to (auto)"
    )
    group.add_argument("--separator-id", type=int, help="token after each document (default: the tokenizer's eos)")
    group.add_argument("--no-separator", action="store_true", help="write documents without a token between them")
    group.add_argument("--unit-bytes", type=int, help="text for one token file, about (at most 2 GB, by the corpus)")


def _add_work(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--workers", type=int, default=1, help="processes (%(default)s)")
    group.add_argument(
        "--task", metavar="I/N", help="do the I-th of N shares, I from 0 (default: this job's place in a SLURM array)"
    )
    group.add_argument("--plan-only", action="store_true", help="write plan and tokenizer, tell the units, and stop")
    group.add_argument("--quiet", action="store_true", help="show no progress")
    group.add_argument("--json", action="store_true", help="print the manifest as JSON and nothing else")


def dashed(argument: str) -> str:
    """`--text_key=a_b` as `--text-key=a_b`."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def task_of(given: str | None, environment: Mapping[str, str]) -> tuple[int, int] | None:
    """(i, n) of `i/n`, or of a SLURM array, whose numbers may begin anywhere; None for a command on its own.

    Raises:
        ValueError: not a share.
    """
    if given is None and not {"SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"} <= environment.keys():
        return None
    try:
        if given is not None:
            number, n_tasks = map(int, given.split("/"))
        else:
            first = int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
            step = int(environment.get("SLURM_ARRAY_TASK_STEP", 1))
            number = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // step
            n_tasks = int(environment["SLURM_ARRAY_TASK_COUNT"])
    except ValueError:
        number, n_tasks = -1, 0
    if not 0 <= number < n_tasks:
        source = f"--task {given}" if given is not None else "this job's place in the SLURM array"
        raise ValueError(f"{source} must be I/N with 0 <= I < N, as in --task 0/8, or sbatch --array=0-7 without gaps")
    return number, n_tasks


def check_args(args: argparse.Namespace) -> None:
    problems = [*_contradictions(args), *_out_of_range(args)]
    if Path(args.out).exists() and not Path(args.out).is_dir():
        problems.append(f"--out {args.out} is a file; give a folder")
    problems += [f"--drop {key or '='}: give KEY=VALUE" for key, value in args.drop if not key or not value]
    if problems:
        raise ValueError("\n".join(problems))


def _contradictions(args: argparse.Namespace) -> Iterator[str]:
    own_split = args.validation_fraction is not None or args.validation_input
    if args.stdlib == bool(args.input):
        yield "give either --input PATH... or --stdlib"
    if args.stdlib and own_split:
        yield "--stdlib has its own validation split; leave out --validation-fraction and --validation-input"
    if args.split != "auto" and (own_split or args.stdlib):
        yield (
            f"--split {args.split} says what all documents are; "
            f"leave out --validation-fraction, --validation-input and --stdlib"
        )
    if args.split == "validation" and args.tokenizer is None:
        yield "--split validation needs --tokenizer: that of the training data"
    if args.no_separator and args.separator_id is not None:
        yield "--separator-id and --no-separator exclude each other"


def _out_of_range(args: argparse.Namespace) -> Iterator[str]:
    if args.validation_fraction is not None and not 0 <= args.validation_fraction < 1:
        yield f"--validation-fraction {args.validation_fraction} must be in [0, 1)"
    if args.validation_fraction and round(args.validation_fraction * SPLIT_BUCKETS) == 0:
        yield f"--validation-fraction {args.validation_fraction} must be 0 or at least {1 / SPLIT_BUCKETS}"
    if not 0 <= args.max_bad <= 1:
        yield f"--max-bad {args.max_bad} must be in [0, 1]: it is a share of the lines"
    if not 0 < args.percentage <= 1:
        yield f"--percentage {args.percentage} must be in (0, 1]: it is a share of the files"
    if args.workers < 1:
        yield f"--workers {args.workers} must be at least 1"
    if args.document_bytes < 0:
        yield f"--document-bytes {args.document_bytes} must not be negative"
    if args.unit_bytes is not None and args.unit_bytes < 1:
        yield f"--unit-bytes {args.unit_bytes} must be at least 1"


def gather(args: argparse.Namespace) -> tuple[list[InputFile], str]:
    """All input files and a short description of what they are."""
    if args.stdlib:
        files, source = stdlib_inputs()
        return first_share(files, args.percentage), source
    held_out, ignored = find_inputs(args.validation_input, "validation")
    files, ignored_too = find_inputs(args.input, "train" if held_out else args.split)
    both = {os.path.realpath(file.path) for file in files} & {os.path.realpath(file.path) for file in held_out}
    if both:
        raise ValueError(f"{min(both)} is both training and validation input; leave it out of one of them")
    if ignored := [*ignored_too, *ignored]:
        warn(f"left out {len(ignored)} files or splits of other kinds, e.g. {ignored[0]}")
    files = first_share(files, args.percentage) + held_out
    return files, f"{len(files)} files"


def first_share(files: list[InputFile], share: float) -> list[InputFile]:
    kept = files[: int(len(files) * Fraction(str(share)))]  # as floats, 0.29 of 100 are 28
    if files and not kept:
        raise ValueError(f"--percentage {share} of {len(files)} files is none; it must be {1 / len(files):.2g} or more")
    return kept


def prepare(args: argparse.Namespace, out: Path) -> None:
    """Everything between the arguments and the report."""
    files, source = gather(args)
    if not sum(file.n_bytes for file in files):
        raise DataError(f"the corpus is empty: {len(files)} files with 0 bytes; check --input")
    plan = make_plan(args, files, source)
    manifest = open_out(out, plan, args)
    if manifest is not None:
        check_bad_files(manifest["bad_files"], skip_bad_files=args.on_bad_file == "skip")
        tell(args, manifest, lambda: report(out, manifest, None, files))
        return
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, shared=args.task is not None), without_left_overs(out):
        with withdrawn_on_error(out, args):
            publish_plan(out, plan, args)
            tokenizer = place_tokenizer(args, plan, files, out)
        units = units_of(plan, files, out, tokenizer, skip_bad_files=args.on_bad_file == "skip")
        if args.plan_only:
            tell(args, outline(plan, units), lambda: report_units(out, units))
        else:
            work(args, plan, units, tokenizer)


def work(args: argparse.Namespace, plan: dict[str, Any], units: list[Unit], tokenizer: Tokenizer) -> None:
    """Do our share of the units; if that leaves none, write the manifest."""
    number, n_tasks = args.task or (0, 1)
    todo = [unit for unit in units[number::n_tasks] if not unit.is_done()]
    with choose_progress(sum(unit.n_bytes for unit in todo), len(todo), quiet=args.quiet) as progress:
        run_units(todo, tokenizer, args.workers, progress)
    out = Path(args.out)
    missing = [unit.number for unit in units if not unit.is_done()]
    if missing and n_tasks > 1:
        tell(args, {"missing_units": missing}, lambda: report_missing(out, missing, len(units)))
        return
    if missing:
        raise DataError(f"{out}: units {listed(missing)} were finished and are gone again; repeat the command")
    manifest = finish(out, plan, units, tokenizer, args.max_bad, skip_bad_files=args.on_bad_file == "skip")
    warn_about(manifest)
    tell(args, manifest, lambda: report(out, manifest, tokenizer, [file for unit in units for file in unit.files]))


def tell(args: argparse.Namespace, value: dict[str, Any], report_it: Callable[[], None]) -> None:
    """The outcome, for a program or for a person."""
    if args.json:
        print(json.dumps(value))
    else:
        report_it()


def outline(plan: dict[str, Any], units: list[Unit]) -> dict[str, Any]:
    """The plan in short, as data."""
    each = [{"unit": unit.number, "files": len(unit.files), "text_bytes": unit.n_bytes} for unit in units]
    return {"plan_id": plan["plan_id"], "units": each}


def report_units(out: Path, units: list[Unit]) -> None:
    sizes = [unit.n_bytes / 1e6 for unit in units]
    done = sum(unit.is_done() for unit in units)
    print(f"{out}: {len(units)} units of about {min(sizes):,.1f} to {max(sizes):,.1f} MB of text, {done} of them done")
    for unit in units[:LISTED]:
        print(f"  unit {unit.number}: {len(unit.files)} files from {unit.files[0].name}, {unit.n_bytes / 1e6:,.1f} MB")
    if len(units) > LISTED:
        print(f"  and {len(units) - LISTED} more")
    if len(units) > 1:
        print(f"up to {len(units)} processes have work: tasks times workers, e.g. --task I/{len(units)} for each I, or")
        print(f"  sbatch --array=0-{len(units) - 1}; with --workers W a W-th of that")
    else:
        print("one process does it all; a smaller --unit-bytes makes more units, where there are more files")


def report_missing(out: Path, missing: list[int], n_units: int) -> None:
    print(f"{out}: this task is done; {len(missing)} of {n_units} units are missing: {listed(missing)}")
    print("  the task that finishes last writes the manifest; the command without --task does what is missing then")


def listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:LISTED])) + (", ..." if len(numbers) > LISTED else "")


@contextlib.contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """SIGTERM, with which batch systems announce the end, is answered as Ctrl-C is."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one would disturb tidying up
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # text is shown where the locale may know ASCII alone
    if argv and argv[0] == "check":
        from pretrain.data_command import main as data_command

        return data_command(argv)
    try:
        with termination_as_interrupt():
            if argv and argv[0] == "export":
                from prep.export import main as export

                export([dashed(argument) for argument in argv[1:]])
            else:
                args = parse_args(argv)
                args.task = None if args.plan_only else task_of(args.task, os.environ)
                check_args(args)
                prepare(args, Path(args.out))
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return EXIT_STOPPED
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
