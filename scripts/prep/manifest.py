"""The end of a preparation: receipts are added up to the manifest, and told to the user."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.atomic import write_atomically
from lit_gpt.errors import DataError
from lit_gpt.packed_dataset import HEADER, MANIFEST, read_header, source_of, token_dtype
from lit_gpt.tokenizer import Tokenizer
from prep.corpus import SPLIT_BUCKETS, InputFile, kinds_of
from prep.plan import warn
from prep.units import SPLITS, Unit, to_json

FORMAT = 1
MIN_TOKENS = 16  # below this no model has a use for the corpus, whatever its block_size
BOUNDARY_SEARCH_TOKENS = 2_000_000
LISTED = 10
OPTIONS = ("text_key", "drop", "document_bytes", "split", "percentage", "separator", "unit_bytes")


def finish(
    out: Path, plan: dict[str, Any], units: list[Unit], tokenizer: Tokenizer, max_bad: float, *, skip_bad_files: bool
) -> dict[str, Any]:
    """Add up the receipts and write the manifest: a function of the plan, whoever writes it.

    Raises:
        DataError: too many broken lines, damaged files that nobody allowed to skip, or no text.
    """
    receipts = {split: [unit.receipt(split) for unit in units] for split in SPLITS}
    counters: Counter[str] = Counter()
    for receipt in receipts[SPLITS[0]]:
        counters.update(receipt["counters"])
    bad_files = [bad for receipt in receipts[SPLITS[0]] for bad in receipt["bad_files"]]
    splits = {split: _totals(each) for split, each in receipts.items()}
    _check_lines(counters, max_bad)
    check_bad_files(bad_files, skip_bad_files=skip_bad_files)
    _check_totals(splits, units, "validation" if plan["split"] == "validation" else "train")
    texts = "".join(receipt["text_sha256"] for split in SPLITS for receipt in receipts[split])
    separator_id = units[0].separator_id
    manifest = {
        "format": FORMAT,
        "plan_id": plan["plan_id"],
        "source": plan["source"],
        "options": {
            **{key: plan[key] for key in OPTIONS},
            "validation_fraction": plan["validation_buckets"] / SPLIT_BUCKETS,
        },
        "tokenizer": {
            "kind": tokenizer.kind,
            "sha256": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
        },
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "separator_id": separator_id,
        "add_bos": False,
        "add_eos": separator_id is not None and separator_id == tokenizer.eos_id,
        "splits": splits,
        "corpus_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        "counters": dict(sorted(counters.items())),
        "bad_files": bad_files,
    }
    write_atomically(out / MANIFEST, to_json(manifest))
    return manifest


def _totals(receipts: list[dict[str, Any]]) -> dict[str, Any]:
    written = [receipt for receipt in receipts if receipt["file"]]
    sums = {key: sum(receipt[key] for receipt in written) for key in ("tokens", "documents", "text_bytes")}
    table = [receipt["table_bytes"] for receipt in written]
    return {
        "files": [receipt["file"] for receipt in written],
        **sums,
        "table_bytes": None if None in table else sum(table),
        "bytes_per_token": sums["text_bytes"] / sums["tokens"] if sums["tokens"] else None,
        "file_tokens": {receipt["file"]: receipt["tokens"] for receipt in written},
        "crc32": {receipt["file"]: receipt["crc32"] for receipt in written},
    }


def _check_lines(counters: Counter[str], max_bad: float) -> None:
    if counters["bad_json"] > max_bad * counters["rows"]:
        raise DataError(
            f"{counters['bad_json']} of {counters['rows']} lines are not JSON objects, more than --max-bad {max_bad} "
            f"allows; mend the files, or raise --max-bad and repeat the command"
        )


def check_bad_files(bad_files: list[dict[str, Any]], *, skip_bad_files: bool) -> None:
    """Raises DataError where an earlier run of the same plan left out what this one was not told to leave out."""
    if bad_files and not skip_bad_files:
        names = ", ".join(bad["name"] for bad in bad_files[:LISTED])
        raise DataError(
            f"of {len(bad_files)} damaged files only what is before the damage was kept, by a run with --on-bad-file "
            f"skip: {names}. Get them again and choose another --out, or accept it with --on-bad-file skip"
        )


def _check_totals(splits: dict[str, dict[str, Any]], units: list[Unit], needed: str) -> None:
    split = splits[needed]
    if split["tokens"] >= MIN_TOKENS:
        return
    for unit in units:  # so that a second try with more text finds the folder free
        unit.discard()
    name = {"train": "training"}.get(needed, needed)
    if not split["documents"]:
        raise DataError(f"the corpus is empty: no {name} document holds any text; check --input and --drop")
    raise DataError(
        f"the corpus has {split['tokens']} {name} tokens; a single sample needs at least block_size + 1, "
        f"and nothing can be learned from fewer than {MIN_TOKENS}; add text"
    )


def report(out: Path, manifest: dict[str, Any], tokenizer: Tokenizer | None, files: list[InputFile]) -> None:
    kind = manifest["tokenizer"]
    source = f"{source_of(manifest)} ({kinds_of(files)})"
    print(f"{out}: {source}; tokenizer {kind['kind']} with {kind['vocab_size']} ids ({manifest['dtype']})")
    for name, split in manifest["splits"].items():
        per_token = f", {split['bytes_per_token']:.2f} bytes/token" if split["tokens"] else ""
        counts = f"{split['documents']} documents, {split['tokens']} tokens in {len(split['files'])} "
        counts += "file" if len(split["files"]) == 1 else "files"
        print(f"  {name}: {counts}{per_token}")
    notable = {key: n for key, n in manifest["counters"].items() if n and key != "rows"}
    if notable:
        print("  on the way: " + ", ".join(f"{key} {n}" for key, n in notable.items()))
    for bad in manifest["bad_files"]:
        print(f"  kept {bad['documents']} documents of {bad['name']}: {bad['reason']}")
    print(f"  corpus sha256 {manifest['corpus_sha256']}")
    if tokenizer is not None and manifest["separator_id"] is not None:
        print(f"  a boundary: {boundary(out, manifest, tokenizer)}")


def boundary(out: Path, manifest: dict[str, Any], tokenizer: Tokenizer) -> str:
    """The first place in the data where one document ends, as text, for the eye to judge."""
    name = next(name for split in manifest["splits"].values() for name in split["files"])
    file = read_header(out / name)
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
    options = manifest["options"]
    wanted = options["split"] == "auto" and options["validation_fraction"] > 0
    if wanted and not manifest["splits"]["validation"]["documents"]:
        warn("no document fell into the validation split; use --validation-input, or --document-bytes on long texts")
