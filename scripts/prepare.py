"""Turn raw text into token files: plan the units of work, write shards with receipts, then one manifest.

Every byte of the output is a function of the plan alone. A killed run is continued by the same command; a finished
folder is left as it is; a folder made from other inputs or options is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from prep.bpe import train_bpe
from prep.corpus import SPLIT_BUCKETS, InputFile, Reading, content_digests, find_inputs, stdlib_inputs
from prep.units import SPLITS, Unit, group_files, read_json, run_units, to_json

from lit_gpt.atomic import write_atomically
from lit_gpt.errors import EXIT_STOPPED, DataError, run_command
from lit_gpt.packed_dataset import HEADER, MANIFEST, read_header, token_dtype
from lit_gpt.tokenizer import BYTES_MARKER, Tokenizer, file_sha256, tokenizer_file
from lit_gpt.tokenizer import FILE_NAMES as TOKENIZER_FILES

PLAN = "plan.json"
FORMAT = 1
DEFAULT_VALIDATION_FRACTION = 0.05
MIN_TRAIN_TOKENS = 16  # below this no model has a use for the corpus, whatever its block_size
BOUNDARY_SEARCH_TOKENS = 2_000_000


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="prepare.py", description=__doc__)
    parser.add_argument("--input", nargs="+", default=[], metavar="PATH", help=".txt .md .py .jsonl, gzip, or folders")
    parser.add_argument("--validation-input", nargs="+", default=[], metavar="PATH", help="held-out text, if separate")
    parser.add_argument("--stdlib", action="store_true", help="use the interpreter's own sources: needs no download")
    parser.add_argument("--tokenizer", metavar="PATH", help="a file, a folder, or `bytes`; default: train one")
    parser.add_argument("--vocab-size", type=int, default=4096, help="pieces of the tokenizer to train (%(default)s)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the token files")
    parser.add_argument("--text-key", default="text", help="key of the text in JSON lines (%(default)s)")
    parser.add_argument("--document-bytes", type=int, default=0, help="cut text files into documents of this size")
    parser.add_argument(
        "--validation-fraction", type=float, help=f"share of documents held out ({DEFAULT_VALIDATION_FRACTION})"
    )
    parser.add_argument("--separator-id", type=int, help="token after each document (default: the tokenizer's eos)")
    parser.add_argument("--no-separator", action="store_true", help="write documents without a token between them")
    parser.add_argument("--max-bad", type=float, default=1e-3, help="share of broken JSON lines to bear (%(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON and nothing else")
    return parser.parse_args([_dashed(argument) for argument in argv])


def _dashed(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def check_args(args: argparse.Namespace) -> None:
    problems = []
    if args.stdlib == bool(args.input):
        problems.append("give either --input PATH... or --stdlib")
    if args.stdlib and (args.validation_fraction is not None or args.validation_input):
        problems.append("--stdlib has its own validation split; leave out --validation-fraction and --validation-input")
    if args.validation_fraction is not None and not 0 <= args.validation_fraction < 1:
        problems.append(f"--validation-fraction {args.validation_fraction} must be in [0, 1)")
    if args.no_separator and args.separator_id is not None:
        problems.append("--separator-id and --no-separator exclude each other")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        problems.append(f"--out {args.out} is a file; give a folder")
    if args.workers < 1:
        problems.append(f"--workers {args.workers} must be at least 1")
    if args.document_bytes < 0:
        problems.append(f"--document-bytes {args.document_bytes} must not be negative")
    if problems:
        raise ValueError("\n".join(problems))


def gather(args: argparse.Namespace) -> tuple[list[InputFile], str]:
    """All input files and a short description of what they are."""
    if args.stdlib:
        return stdlib_inputs()
    held_out, _ = find_inputs(args.validation_input, "validation")
    files, ignored = find_inputs(args.input, "train" if held_out else "auto")
    both = {os.path.realpath(file.path) for file in files} & {os.path.realpath(file.path) for file in held_out}
    if both:
        raise ValueError(f"{min(both)} is both training and validation input; leave it out of one of them")
    if ignored:
        warn(f"ignored {len(ignored)} files that are not text, e.g. {ignored[0]}")
    return files + held_out, f"{len(files) + len(held_out)} files"


def make_plan(args: argparse.Namespace, files: list[InputFile], source: str) -> dict[str, Any]:
    """All that decides the output, as plain data. Does not depend on the number of workers or on folder names."""
    fraction = DEFAULT_VALIDATION_FRACTION if args.validation_fraction is None else args.validation_fraction
    inputs = [
        {"name": file.name, "bytes": file.n_bytes, "split": file.split, "digest": digest}
        for file, digest in zip(files, content_digests(files), strict=True)
    ]
    plan = {
        "format": FORMAT,
        "source": source,
        "inputs": inputs,
        "tokenizer": _planned_tokenizer(args),
        "separator": "none" if args.no_separator else "eos" if args.separator_id is None else args.separator_id,
        "text_key": args.text_key,
        "document_bytes": args.document_bytes,
        "validation_buckets": round(fraction * SPLIT_BUCKETS),
    }
    return {**plan, "plan_id": hashlib.sha256(to_json(plan)).hexdigest()}


def _planned_tokenizer(args: argparse.Namespace) -> dict[str, Any]:
    if args.tokenizer is None:
        return {"train": "sentencepiece bpe", "vocab_size": args.vocab_size}
    if args.tokenizer == "bytes":
        return {"file": BYTES_MARKER}
    path = tokenizer_file(Path(args.tokenizer))
    config = path.with_name("tokenizer_config.json")  # says which token is eos
    return {"file": path.name, "sha256": [file_sha256(each) for each in (path, config) if each.is_file()]}


def open_out(out: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """See whether the folder is free for this plan; returns its manifest if all is done already.

    Raises:
        ValueError: the folder holds token files of another plan.
    """
    found = read_json(out / PLAN) if (out / PLAN).is_file() else {}
    if found.get("plan_id") == plan["plan_id"]:
        return _finished(out, plan)
    if any(out.glob("*.bin")):
        differing = [key for key in plan if key != "plan_id" and found.get(key) != plan[key]]
        raise ValueError(
            f"{out} holds token files that were prepared from something else (different: {', '.join(differing)}); "
            f"choose another --out, or delete the folder to prepare it anew"
        )
    return None


def clear_out(out: Path, args: argparse.Namespace) -> None:
    """Remove what a failed run of another plan left behind: a tokenizer found here would be taken for ours."""
    given = Path(args.tokenizer).resolve() if args.tokenizer else None
    for name in (PLAN, *TOKENIZER_FILES):
        path = out / name
        if given not in (path.resolve(), out.resolve()):
            path.unlink(missing_ok=True)


def _finished(out: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    if not (out / MANIFEST).is_file():
        return None
    manifest = read_json(out / MANIFEST)
    try:
        for split in manifest["splits"].values():
            for name in split["files"]:
                read_header(out / name)
    except (FileNotFoundError, DataError):
        return None  # the receipts find out which shard to write again
    return manifest if manifest.get("plan_id") == plan["plan_id"] else None


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep a second run out of the folder; the system lets go of the lock even after a kill -9."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise DataError(f"{out} is being written by another run of this command; wait for it") from error
        warn(f"{out} cannot be locked ({error.strerror}); do not start a second run on it")
    try:
        yield
    finally:
        os.close(descriptor)


def place_tokenizer(args: argparse.Namespace, files: list[InputFile], out: Path, reading: Reading) -> Tokenizer:
    """Put the tokenizer's file into the folder, training it if none was given."""
    if args.tokenizer is not None:
        tokenizer = Tokenizer.load(args.tokenizer)
        tokenizer.save(out)
        return tokenizer
    path = out / "tokenizer.model"
    if not path.is_file():
        train_bpe(path, files, args.vocab_size, reading)
    return Tokenizer.load(path)


def separator_of(plan: dict[str, Any], tokenizer: Tokenizer) -> int | None:
    if plan["separator"] == "none":
        return None
    separator_id = tokenizer.eos_id if plan["separator"] == "eos" else plan["separator"]
    if separator_id is None:
        raise ValueError("the tokenizer has no eos token; choose --separator-id N, or --no-separator")
    if not 0 <= separator_id < tokenizer.vocab_size:
        raise ValueError(f"--separator-id {separator_id} is outside the vocabulary of {tokenizer.vocab_size}")
    return separator_id


def finish(out: Path, plan: dict[str, Any], units: list[Unit], tokenizer: Tokenizer, max_bad: float) -> dict[str, Any]:
    """Add up the receipts and write the manifest.

    Raises:
        DataError: too many broken lines, or no training text.
    """
    receipts = {split: [unit.receipt(split) for unit in units] for split in SPLITS}
    counters: Counter[str] = Counter()
    for receipt in receipts["train"]:
        counters.update(receipt["counters"])
    check_counters(counters, max_bad)
    splits = {split: _totals(each) for split, each in receipts.items()}
    check_totals(splits, units)
    texts = "".join(receipt["text_sha256"] for split in SPLITS for receipt in receipts[split])
    manifest = {
        "format": FORMAT,
        "plan_id": plan["plan_id"],
        "source": plan["source"],
        "tokenizer": {
            "kind": tokenizer.kind,
            "sha256": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
        },
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "separator_id": units[0].separator_id,
        "splits": splits,
        "corpus_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        "counters": dict(sorted(counters.items())),
    }
    write_atomically(out / MANIFEST, to_json(manifest))
    return manifest


def check_counters(counters: Counter[str], max_bad: float) -> None:
    if counters["bad_json"] > max_bad * counters["rows"]:
        raise DataError(
            f"{counters['bad_json']} of {counters['rows']} lines are not JSON objects, more than --max-bad {max_bad} "
            f"allows; mend the files, or raise --max-bad and repeat the command"
        )


def check_totals(splits: dict[str, dict[str, Any]], units: list[Unit]) -> None:
    train = splits["train"]
    if train["tokens"] >= MIN_TRAIN_TOKENS:
        return
    for unit in units:  # so that a second try with more text finds the folder free
        unit.discard()
    if not train["documents"]:
        raise DataError("the corpus is empty: no training document holds any text; check --input")
    raise DataError(
        f"the corpus has {train['tokens']} training tokens; a single sample needs at least block_size + 1, "
        f"and nothing can be learned from fewer than {MIN_TRAIN_TOKENS}; add text"
    )


def _totals(receipts: list[dict[str, Any]]) -> dict[str, Any]:
    sums = {key: sum(receipt[key] for receipt in receipts) for key in ("tokens", "documents", "text_bytes")}
    table = [receipt["table_bytes"] for receipt in receipts]
    files = [receipt["file"] for receipt in receipts if receipt["file"]]
    return {"files": files, **sums, "table_bytes": None if None in table else sum(table)}


def report(out: Path, manifest: dict[str, Any], tokenizer: Tokenizer | None) -> None:
    kind = manifest["tokenizer"]
    print(f"{out}: {manifest['source']}; tokenizer {kind['kind']} with {kind['vocab_size']} ids ({manifest['dtype']})")
    for name, split in manifest["splits"].items():
        per_token = f", {split['text_bytes'] / split['tokens']:.2f} bytes/token" if split["tokens"] else ""
        counts = f"{split['documents']} documents, {split['tokens']} tokens in {len(split['files'])} files"
        print(f"  {name}: {counts}{per_token}")
    notable = {key: n for key, n in manifest["counters"].items() if n and key != "rows"}
    if notable:
        print("  on the way: " + ", ".join(f"{key} {n}" for key, n in notable.items()))
    print(f"  corpus sha256 {manifest['corpus_sha256']}")
    if tokenizer is not None and manifest["separator_id"] is not None:
        print(f"  a boundary: {boundary(out, manifest, tokenizer)}")


def boundary(out: Path, manifest: dict[str, Any], tokenizer: Tokenizer) -> str:
    """The first place in the training data where one document ends, as text, for the eye to judge."""
    file = read_header(out / manifest["splits"]["train"]["files"][0])
    tokens = np.fromfile(file.path, file.dtype, count=BOUNDARY_SEARCH_TOKENS, offset=HEADER.size)
    ends = np.flatnonzero(tokens == manifest["separator_id"])
    if not ends.size:
        return f"none in the first {BOUNDARY_SEARCH_TOKENS} tokens"
    end = int(ends[0])
    before, after = tokens[max(0, end - 12) : end], tokens[end + 1 : end + 13]
    return f"{tokenizer.decode(before)!r} <{manifest['separator_id']}> {tokenizer.decode(after)!r}"


def warn_about(manifest: dict[str, Any]) -> None:
    for name, split in manifest["splits"].items():
        if split["table_bytes"] is None:
            warn("this tokenizer does not say how many bytes a token stands for; bits per byte will not be reported")
        elif split["table_bytes"] != split["text_bytes"]:
            warn(
                f"{name}: the tokenizer accounts for {split['table_bytes']} of {split['text_bytes']} bytes (it changes "
                f"or does not know some text); bits per byte will be off by that much"
            )
    if not manifest["splits"]["validation"]["documents"]:
        warn("no document fell into the validation split; use --validation-input, or --document-bytes on long texts")


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def prepare(args: argparse.Namespace, out: Path) -> tuple[dict[str, Any], Tokenizer | None]:
    """Everything between the arguments and the manifest. The tokenizer is None where nothing was left to do."""
    files, source = gather(args)
    if not sum(file.n_bytes for file in files):
        raise DataError(f"the corpus is empty: {len(files)} files with 0 bytes; check --input")
    plan = make_plan(args, files, source)
    manifest = open_out(out, plan)
    if manifest is not None:
        return manifest, None
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        if not (out / PLAN).is_file() or read_json(out / PLAN)["plan_id"] != plan["plan_id"]:
            clear_out(out, args)
            write_atomically(out / PLAN, to_json(plan))
        for left_over in out.glob("*.tmp"):  # of a run that was killed
            left_over.unlink()
        reading = Reading(args.text_key, args.document_bytes, plan["validation_buckets"])
        tokenizer = place_tokenizer(args, files, out, reading)
        separator_id = separator_of(plan, tokenizer)
        units = [
            Unit(number, group, str(out), plan["plan_id"], separator_id, reading)
            for number, group in enumerate(group_files(files))
        ]
        run_units(units, args.workers)
        return finish(out, plan, units, tokenizer, args.max_bad), tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    check_args(args)
    out = Path(args.out)
    try:
        manifest, tokenizer = prepare(args, out)
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return EXIT_STOPPED
    if tokenizer is not None:
        warn_about(manifest)
    if args.json:
        print(json.dumps(manifest))
    else:
        report(out, manifest, tokenizer)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
