"""The prepare scripts of lit-gpt and TinyLlama by their old options: translates them into those of prepare.py."""

from __future__ import annotations

import argparse
import glob
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import prepare

from lit_gpt.errors import EXIT_OK
from lit_gpt.packed_dataset import MANIFEST, load_manifest
from prep.formats import WrongKeyError

OWN_OPTIONS = {"--input": "--source_path", "--tokenizer": "--tokenizer_path", "--out": "--destination_path"}
HELD_OUT = ("validation", "test")


@dataclass(frozen=True)
class Corpus:
    """One of the corpora that the lineage has a script for: where its files lie and how they are read."""

    name: str
    sets: dict[str, tuple[str, ...]]
    """Patterns under the source folder for each set; every set gets a folder of its own. `{split}` is filled in."""
    splits: tuple[str, ...] = ()
    """What the source has, where the script has an option for it."""
    options: tuple[str, ...] = ()
    """Of prepare.py, to read this corpus as the lineage does."""
    why: str = ""
    """Why these, for somebody whose files they do not fit."""
    sample_sets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """`sets` of the small sample, where there is one."""
    subset_patterns: tuple[str, ...] = ()
    """Patterns for --filenames_subset, with `{subset}`, where the script has that option."""


@dataclass(frozen=True)
class Step:
    """One call of prepare.py: the files of one set into one folder."""

    out: Path
    patterns: tuple[str, ...]


def main(corpus: Corpus, description: str | None, argv: Sequence[str] | None = None) -> int:
    """Run prepare.py for every set that is asked for; returns the first exit code that is not 0."""
    args, passed_on = parse_args(corpus, description, sys.argv[1:] if argv is None else argv)
    check_args(corpus, args, passed_on)
    steps = plan(corpus, args)
    for step in steps:
        try:
            code = prepare.main(prepare_arguments(corpus, args, step) + passed_on)
        except WrongKeyError as error:
            if not corpus.why:
                raise
            raise WrongKeyError(f"{error}. {corpus.why}") from error
        if code != EXIT_OK:
            return code
    if args.chunk_size is not None:
        warn_about_chunk_size(args, steps)
    if "--json" not in passed_on:
        report(Path(args.destination_path))
    return EXIT_OK


def parse_args(corpus: Corpus, description: str | None, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the lineage, and the rest, which is for prepare.py."""
    parser = argparse.ArgumentParser(
        prog=f"prepare_{corpus.name}.py",
        description=description,
        epilog="Every other option goes to prepare.py, for example --workers, --task or --on-bad-file; see its --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def add(name: str, **settings: Any) -> None:
        parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **settings)

    add("source_path", required=True, metavar="DIR", help="the corpus as it was downloaded")
    if corpus.sample_sets:
        add("checkpoint_dir", required=True, dest="tokenizer_path", metavar="DIR", help="folder with the tokenizer")
        add("sample", type=_truth, nargs="?", const=True, default=True, metavar="BOOL", help="the small sample (true)")
        add("match", default="", help="only sets, or sample files, whose name holds this")
    else:
        add("tokenizer_path", required=True, metavar="PATH", help="the tokenizer, or its folder")
    add("destination_path", required=True, metavar="DIR", help="gets a folder for each split and set")
    if corpus.splits:
        add("split", choices=corpus.splits, help="(%(default)s)")
    parser.set_defaults(split="train")
    add("percentage", default="1.0", help="share of the files to read, the first by name (%(default)s)")
    add("chunk_size", type=int, help="has no effect; see prepare.py export")
    if corpus.subset_patterns:
        add(
            "filenames_subset", nargs="+", default=[], metavar="NAME", help="only files with one of these in their path"
        )
    return parser.parse_known_args(argv)


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def check_args(corpus: Corpus, args: argparse.Namespace, passed_on: Sequence[str]) -> None:
    given = {prepare.dashed(argument).split("=")[0] for argument in passed_on}
    problems = [f"{name} is called {ours} here" for name, ours in OWN_OPTIONS.items() if name in given]
    if not Path(args.source_path).is_dir():
        problems.append(f"--source_path {args.source_path} is not a folder; give the one that {corpus.name} lies in")
    if problems:
        raise ValueError("\n".join(problems))


def plan(corpus: Corpus, args: argparse.Namespace) -> list[Step]:
    """What to prepare where. All sets are looked for before the first is begun.

    Raises:
        ValueError: nothing has the name asked for.
        FileNotFoundError: the source lacks a set.
    """
    steps = []
    for name, patterns in wanted_sets(corpus, args).items():
        wanted = [pattern.format(split=args.split) for pattern in patterns]
        found = [_in_source(args, pattern) for pattern in wanted]
        absent = [pattern for pattern, path in zip(wanted, found, strict=True) if not _matches(path)]
        if absent:
            raise FileNotFoundError(
                f"{args.source_path} holds no {name}: there is no {Path(args.source_path, absent[0])}; download it, "
                f"or check --source_path"
            )
        suffix = name if name == corpus.name else f"{corpus.name}_{name}"
        steps.append(Step(Path(args.destination_path, f"{args.split}_{suffix}"), tuple(found)))
    return steps


def wanted_sets(corpus: Corpus, args: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """The sets, or parts of them, that the options pick."""
    if corpus.subset_patterns and args.filenames_subset:
        return {corpus.name: tuple(pattern for name in _names(args) for pattern in _subset(corpus, args, name))}
    if not corpus.sample_sets:
        return corpus.sets
    if args.sample:
        sets = {name: tuple(file for file in files if args.match in file) for name, files in corpus.sample_sets.items()}
        wanted = {name: files for name, files in sets.items() if files}
    else:
        wanted = {name: patterns for name, patterns in corpus.sets.items() if args.match in name}
    if not wanted:
        raise ValueError(f"--match {args.match!r} is part of none of the names; known: {', '.join(corpus.sets)}")
    return wanted


def _names(args: argparse.Namespace) -> list[str]:
    """`python go`, `python,go`, `["python","go"]` and what a shell leaves of it, `[python,go]`, are the same."""
    parts = ",".join(args.filenames_subset).strip("[]").split(",")
    return [name for name in (part.strip(" []\"'") for part in parts) if name]


def _subset(corpus: Corpus, args: argparse.Namespace, name: str) -> list[str]:
    patterns = [pattern.format(subset=glob.escape(name)) for pattern in corpus.subset_patterns]
    found = {pattern: _matches(_in_source(args, pattern)) for pattern in patterns}
    folders = sorted({Path(path).parent.name for paths in found.values() for path in paths})
    if not folders:
        raise ValueError(f"--filenames_subset {name}: no file under {args.source_path} has this in its path")
    print(f"{name}: {', '.join(folders)}", file=sys.stderr)
    return [pattern for pattern, paths in found.items() if paths]


def _in_source(args: argparse.Namespace, pattern: str) -> str:
    return os.path.join(glob.escape(args.source_path), pattern)


def _matches(pattern: str) -> list[str]:
    return glob.glob(pattern, recursive=True)


def prepare_arguments(corpus: Corpus, args: argparse.Namespace, step: Step) -> list[str]:
    """The options of prepare.py for one step, before those that are passed on and may overrule them."""
    split = "validation" if args.split in HELD_OUT else "train"
    return [
        *("--input", *step.patterns, "--split", split, "--percentage", args.percentage, *corpus.options),
        *("--tokenizer", args.tokenizer_path, "--out", str(step.out), "--workers", str(cores())),
    ]


def cores() -> int:
    """The cores that this process may use: the scripts of the lineage use them all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def warn_about_chunk_size(args: argparse.Namespace, steps: Sequence[Step]) -> None:
    out = steps[0].out
    print(
        f"warning: --chunk_size {args.chunk_size} has no effect: files are as long as their text. For readers with "
        f"fixed chunks: prepare.py export {out} --out {out}_chunks --chunk {args.chunk_size}",
        file=sys.stderr,
    )


def report(destination: Path) -> None:
    """Everything prepared under `destination` so far, by this script or another, as settings for `pretrain`."""
    held: dict[str, dict[str, str]] = {"train": {}, "validation": {}}
    for path in sorted(destination.glob(f"*/{MANIFEST}")):
        folder, splits = path.parent, load_manifest(path.parent)["splits"]
        for split, folders in held.items():
            if splits.get(split, {}).get("tokens"):
                folders[folder.name.split("_", 1)[-1]] = str(folder)
    if any(held.values()):
        print("in the configuration of pretrain:\ndata:")
    for split, folders in held.items():
        if folders:
            print(f"  {split}: {{{', '.join(f'{name}: {_yaml(folder)}' for name, folder in folders.items())}}}")


def _yaml(text: str) -> str:
    """A path as YAML takes it inside braces."""
    return text if re.fullmatch(r"[\w./][\w./ -]*", text) else json.dumps(text, ensure_ascii=False)
