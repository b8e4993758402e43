"""`pretrain data`: which samples a step trained on, and whether token files are what they should be."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeVar

from lit_gpt.errors import EXIT_DATA, EXIT_OK, EXIT_USAGE

if TYPE_CHECKING:
    from lit_gpt.inspect_data import DataCheck, DataStats, SplitCheck, SplitStats
    from lit_gpt.token_text import Document
    from pretrain.step_samples import Sample, StepSamples

PROGRESS_SECONDS = 0.5
SHOWN_PROBLEMS = 50  # a terminal wants the first ones; --json has them all
Found = TypeVar("Found", "DataCheck", "DataStats")
DATA_FLAG = "--data."  # settings of a run, spelled as `pretrain` spells them


def add_show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--step", type=int, metavar="N", help="step of the run; the first one is 1")
    what.add_argument("--position", type=int, metavar="P", help="start at this sample, as `position` in logs counts")
    parser.add_argument("--samples", type=int, default=4, metavar="K", help="how many samples to show (%(default)s)")
    parser.add_argument(
        "--characters", type=int, default=300, metavar="C", help="text of each sample, at most (%(default)s)"
    )
    parser.epilog = (
        "Settings of the run may be replaced where its data has moved: --data.train DIR. "
        "The answer is checked against the fingerprints in the run's checkpoints."
    )


def run_show(args: argparse.Namespace) -> int:
    from pretrain.step_samples import samples_of

    found = samples_of(
        args.run,
        step=args.step,
        position=args.position,
        count=args.samples,
        characters=args.characters,
        data_flags=args.data_flags,
    )
    if args.json:
        print_json(dataclasses.asdict(found))
    else:
        say(*describe_step(found))
    return EXIT_OK


def add_files_arguments(parser: argparse.ArgumentParser) -> None:
    """What `check` and `stats` both take."""
    parser.add_argument("path", metavar="DIR", help="prepared folder, or a folder, file or 'pattern*' of token files")
    parser.add_argument("--split", metavar="S", help="only this split, train or validation; default: all there are")
    parser.add_argument("--tokenizer", metavar="PATH", help="what the ids mean, where the folder does not say it")
    parser.add_argument("--dtype", metavar="T", help="type of the tokens in raw files, e.g. uint16")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="number of ids, where no tokenizer says it")
    parser.add_argument("--separator-id", type=int, metavar="ID", help="token between documents; default: looked for")


def files_asked_for(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of add_files_arguments, as check_data and data_stats call them."""
    names = ("path", "split", "tokenizer", "dtype", "vocab_size", "separator_id")
    return {name: getattr(args, name) for name in names}


def report(found: Found, as_json: bool, describe: Callable[[Found], Iterable[str]]) -> int:
    """Print an outcome of inspect_data and give its exit code: bad data if anything is wrong."""
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        say(*describe(found))
        report_problems(found.problems)
    return EXIT_DATA if found.problems else EXIT_OK


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    add_files_arguments(parser)
    parser.add_argument("--documents", type=int, default=3, metavar="K", help="documents to show (%(default)s)")
    parser.add_argument("--characters", type=int, default=400, metavar="C", help="text of each, at most (%(default)s)")
    parser.epilog = "Exit code 3 if anything is wrong; all that is wrong is listed at once."


def run_check(args: argparse.Namespace) -> int:
    from lit_gpt.inspect_data import check_data

    refuse_below(1, documents=args.documents, characters=args.characters)
    with Meter() as meter:
        found = check_data(
            **files_asked_for(args),
            documents=args.documents,
            characters=args.characters,
            progress=meter,
        )
    return report(found, args.json, describe_check)


def add_stats_arguments(parser: argparse.ArgumentParser) -> None:
    add_files_arguments(parser)
    parser.add_argument("--block-size", type=int, default=2048, metavar="L", help="tokens of a sample (%(default)s)")
    parser.add_argument("--tokens", metavar="N", help="training tokens of a run, e.g. 10B: how many epochs that is")


def run_stats(args: argparse.Namespace) -> int:
    from lit_gpt.counts import parse_token_count
    from lit_gpt.inspect_data import data_stats

    budget = None if args.tokens is None else parse_token_count(args.tokens)
    with Meter() as meter:
        found = data_stats(
            **files_asked_for(args),
            block_size=args.block_size,
            budget_tokens=budget,
            progress=meter,
        )
    return report(found, args.json, describe_stats)


def refuse_below(least: int, **values: int) -> None:
    """Raises ValueError naming every option whose value is too small."""
    problems = [f"--{name} {value} must be at least {least}" for name, value in values.items() if value < least]
    if problems:
        raise ValueError("\n".join(problems))


class Meter:
    """How far reading is, on a terminal; nothing elsewhere."""

    def __init__(self) -> None:
        self._shown = self._started = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown > self._started:
            sys.stderr.write("\r\x1b[K")

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self._is_terminal or now < self._shown + PROGRESS_SECONDS:
            return
        self._shown = now
        left = (now - self._started) * (total - done) / max(done, 1)
        sys.stderr.write(f"\r{done:,} of {total:,} tokens read, {left:.0f} s left\x1b[K")
        sys.stderr.flush()


def describe_step(found: StepSamples) -> list[str]:
    """What `show` prints."""
    when = "trained on" if found.trained else "not trained on yet"
    place = (
        f" ({found.order_start:,} to {found.order_stop - 1:,} of the order, skipped ones included)"
        if (found.order_start, found.order_stop) != (found.first_position, found.stop_position)
        else ""
    )
    lines = [
        f"{found.run}: step {found.step:,} of {found.planned_steps:,} (stage {found.stage}), {when}: "
        f"samples {found.first_position:,} to {found.stop_position - 1:,}{place or f' of the {found.order} order'}",
        f"order {found.order_id[:12]}, {found.verified}",
    ]
    lines += [f"note: {note}" for note in found.notes]
    return lines + [line for sample in found.samples for line in describe_sample(sample)]


def describe_sample(sample: Sample) -> list[str]:
    from lit_gpt.token_text import visible

    where = f"{sample.file} from byte {sample.byte_offset:,} (token {sample.first_token:,}), {sample.n_tokens:,} tokens"
    return [f"{sample.position:>12,}  {sample.source}: {where}", f"              {visible(sample.text)}"]


def describe_check(found: DataCheck) -> list[str]:
    """What `check` prints before the problems."""
    vocabulary = "unknown vocabulary" if found.vocab_size is None else f"vocabulary of {found.vocab_size:,} ids"
    lines = [f"{found.path}: {'prepared data' if found.prepared else 'token files'}, {vocabulary}"]
    lines += [line for split in found.splits for line in describe_split(split)]
    lines += [f"note: {note}" for note in found.notes]
    return lines if found.problems else [*lines, "nothing is wrong"]


def describe_split(split: SplitCheck) -> list[str]:
    boundaries = ", ".join(f"{count:,} {mark}" for mark, count in split.boundaries.items())
    if split.separator_id is None:
        boundaries = f"not known; seen of what it could be: {boundaries or 'nothing'}"
    checksums = f"; {split.checksums:,} of {split.files:,} checksums compared and right" if split.checksums else ""
    return [
        f"{split.name}: {count_of(split.files, f'{split.kind} file')}, {split.tokens:,} tokens ({split.dtype}), "
        f"ids {split.lowest_id:,} to {split.highest_id:,}{checksums}",
        f"  between documents: {boundaries}",
        *(line for document in split.documents for line in describe_document(document)),
    ]


def describe_document(document: Document) -> list[str]:
    from lit_gpt.token_text import visible

    what = "document" if document.is_whole else "stretch"
    lines = [
        f"  {what} of {document.n_tokens:,} tokens at token {document.first_token:,} of {document.file}",
        f"    before  {visible(document.before) or '(the file begins)'}",
        f"    start   {visible(document.start)}",
    ]
    return [*lines, f"    end     {visible(document.end)}"] if document.end else lines


def describe_stats(found: DataStats) -> list[str]:
    """What `stats` prints."""
    lines = [line for split in found.splits for line in describe_split_stats(split, found)]
    return [found.path, *lines, *(f"note: {note}" for note in found.notes)]


def describe_split_stats(split: SplitStats, found: DataStats) -> list[str]:
    from lit_gpt.token_text import visible

    rows = [("tokens", f"{split.tokens:,} ({split.dtype}) in {count_of(split.files, f'{split.kind} file')}")]
    if split.documents is not None:
        rows.append(("documents", f"{split.documents:,}, separated by {split.separator_id}"))
    if split.tokens_per_document:
        values = ", ".join(f"{name} {value:,.0f}" for name, value in split.tokens_per_document.items())
        rows.append(("per document", f"{values} tokens"))
    if split.bytes_per_token is not None:
        rows.append(("bytes/token", f"{split.bytes_per_token:.3f}"))
    lost = split.unused_tokens / split.tokens if split.tokens else 0.0
    samples = f"{split.samples:,} of {split.block_size:,} tokens; {split.unused_tokens:,} tokens ({lost:.3%}) in none"
    rows.append(("samples", samples))
    if split.epochs is not None:
        rows.append(("epochs", f"{found.budget_tokens:,} training tokens read this {split.epochs:.3g} times"))
    unused = "" if split.unused_ids is None else f"; {split.unused_ids:,} of {found.vocab_size:,} never occur"
    rows.append(("highest id", f"{split.highest_id:,}{unused}"))
    frequent = (f"{each.id} '{visible(each.text)}' {each.share:.1%}" for each in split.most_frequent)
    rows.append(("most frequent", ", ".join(frequent)))
    return [f"{split.name}:", *(f"  {name:<14}{value}" for name, value in rows)]


def count_of(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def say(*lines: str) -> None:
    """Lines on stdout; characters that the terminal cannot show are escaped instead of being an error."""
    encoding = sys.stdout.encoding or "utf-8"
    for line in lines:
        sys.stdout.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def report_problems(problems: Sequence[str]) -> None:
    if not problems:
        return
    sys.stdout.flush()
    sys.stderr.write(f"{count_of(len(problems), 'problem')}:\n")
    for problem in problems[:SHOWN_PROBLEMS]:
        sys.stderr.write(f"  {problem}\n")
    if len(problems) > SHOWN_PROBLEMS:
        sys.stderr.write(f"  ... and {len(problems) - SHOWN_PROBLEMS:,} more; --json lists them all\n")


@dataclass(frozen=True)
class Command:
    """One word after `pretrain data`."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS = {
    "show": Command("the samples that a step of a run trained on", add_show_arguments, run_show),
    "check": Command("whether token files are whole and what they should be", add_check_arguments, run_check),
    "stats": Command("numbers of a set of token files", add_stats_arguments, run_stats),
}


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of all commands, and those of the single ones."""
    parser = argparse.ArgumentParser(prog="pretrain data", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    subparsers = {}
    for name, command in COMMANDS.items():
        subparsers[name] = commands.add_parser(name, help=command.help, description=f"{command.help.capitalize()}.")
        subparsers[name].allow_abbrev = False
        command.add_arguments(subparsers[name])
        subparsers[name].add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser, subparsers


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """As argparse does it; settings `--data.name value` are set aside for `show`, other unknown options refused."""
    parser, subparsers = build_parser()
    args, unknown = parser.parse_known_args([normalise(argument) for argument in argv])
    args.data_flags = unknown
    if unknown and not (args.command == "show" and unknown[0].startswith(DATA_FLAG)):
        known = re.findall(r"--[a-z-]+", subparsers[args.command].format_help())
        near = get_close_matches(unknown[0].partition("=")[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else "see --help"
        subparsers[args.command].error(f"unknown argument {unknown[0]}; {hint}")
    return args


def normalise(argument: str) -> str:
    """`-` and `_` are equal in option names."""
    name, equals, value = argument.partition("=")
    if not name.startswith("--") or name.startswith(DATA_FLAG):
        return argument
    return name.replace("_", "-") + equals + value


def main(argv: Sequence[str]) -> int:
    """Run what follows `pretrain data`; returns the exit code.

    Raises:
        ValueError, DataError, OSError: see lit_gpt.errors.run_command.
    """
    if not argv:
        build_parser()[0].print_help(sys.stderr)
        return EXIT_USAGE
    args = parse_arguments(argv)
    return COMMANDS[args.command].run(args)
