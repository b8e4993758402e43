"""Cut token files into chunks of one size, as TinyLlama, lit-gpt and prts expect them: their readers take the size of
the first file for that of all. The tokens run on from file to file in the order of the source."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.atomic import check_free_space, write_atomically
from lit_gpt.errors import DataError
from lit_gpt.packed_dataset import (
    HEADER,
    MANIFEST,
    TokenFile,
    TokenFileWriter,
    load_manifest,
    read_header,
    token_dtype,
)
from lit_gpt.token_files import TokenFiles, find_token_files
from lit_gpt.tokenizer import Tokenizer, tokenizer_file
from prep.plan import TOKENIZER_FILES, locked, without_left_overs
from prep.units import read_json, to_json

CHUNK_TOKENS = 2049 * 1024  # TinyLlama's: 1024 rows of 2048 + 1
READ_TOKENS = 1 << 22
FILES_PER_DEVICE = 8  # what TinyLlama's reader opens at once; with fewer it fails
FORMAT = 1


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="prepare.py export", description=__doc__)
    parser.add_argument(
        "source", metavar="DIR", help="what prepare.py wrote, or token files: a folder, file or pattern"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the chunks; may hold other exports")
    parser.add_argument("--split", default="train", help="split to export (%(default)s)")
    parser.add_argument("--prefix", help="files are PREFIX_0_0000000000.bin and so on (default: the split)")
    parser.add_argument("--chunk", type=int, default=CHUNK_TOKENS, metavar="N", help="tokens per file (%(default)s)")
    parser.add_argument(
        "--tail", choices=("drop", "pad"), default="drop", help="leave out the last, incomplete chunk, or fill it up"
    )
    parser.add_argument("--pad-id", type=int, help="what --tail pad fills with (default: the separator, else eos)")
    parser.add_argument(
        "--vocab-size", type=int, help="ids are below this (default: as the tokenizer beside the files)"
    )
    parser.add_argument("--dtype", help="type of the tokens, for files without a header only")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    problems = []
    if args.chunk < 1:
        problems.append(f"--chunk {args.chunk} must be at least 1 token; TinyLlama's is {CHUNK_TOKENS}")
    if args.prefix is not None and (not args.prefix or "/" in args.prefix):
        problems.append(f"--prefix {args.prefix!r} must be the beginning of a file name")
    if args.pad_id is not None and args.tail != "pad":
        problems.append("--pad-id has a meaning with --tail pad only")
    if args.vocab_size is not None and args.vocab_size < 1:
        problems.append(f"--vocab-size {args.vocab_size} must be at least 1")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        problems.append(f"--out {args.out} is a file; give a folder")
    if problems:
        raise ValueError("\n".join(problems))


@dataclass(frozen=True)
class Export:
    """Everything that decides the bytes of the chunks, and where they go."""

    files: TokenFiles
    out: Path
    prefix: str
    chunk_tokens: int
    dtype: np.dtype
    vocab_size: int
    """Ids are below this number."""
    pad_id: int | None
    """What the last chunk is filled with; None leaves its tokens out."""

    @property
    def n_tokens(self) -> int:
        return int(np.sum(self.files.n_tokens))

    @property
    def n_chunks(self) -> int:
        return self.n_tokens // self.chunk_tokens + bool(self.pad_id is not None and self.tail_tokens)

    @property
    def tail_tokens(self) -> int:
        """Tokens behind the last full chunk."""
        return self.n_tokens % self.chunk_tokens

    def path(self, counter: int) -> Path:
        return self.out / f"{self.prefix}_0_{counter:010d}.bin"

    def record(self, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """What the chunks were made from, to tell whether a folder can be continued."""
        return {
            "format": FORMAT,
            "source": self.files.fingerprint,
            "prefix": self.prefix,
            "chunk_tokens": self.chunk_tokens,
            "chunks": self.n_chunks,
            "tokens": self.n_tokens,
            "pad_id": self.pad_id,
            "dtype": self.dtype.name,
            "vocab_size": self.vocab_size,
            "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
        }


def stream(files: Sequence[TokenFile], n_tokens: np.ndarray, first: int, count: int) -> Iterator[np.ndarray]:
    """`count` tokens from number `first` on, in pieces, of the files read one after the other.

    n_tokens: (files,) tokens in each.

    Raises:
        DataError: a file has become shorter.
    """
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(n_tokens, dtype=np.int64)])
    while count:
        number = int(np.searchsorted(starts, first, side="right")) - 1
        file, skipped = files[number], first - int(starts[number])
        wanted = min(count, file.n_tokens - skipped, READ_TOKENS)
        offset = file.byte_offset + skipped * file.dtype.itemsize
        tokens = np.fromfile(file.path, file.dtype, count=wanted, offset=offset)
        if len(tokens) < wanted:
            raise DataError(f"{file.path} has become shorter while it was read; copy or prepare it again")
        yield tokens
        first, count = first + wanted, count - wanted


def write_chunk(export: Export, counter: int) -> None:
    first = counter * export.chunk_tokens
    count = min(export.chunk_tokens, export.n_tokens - first)
    with TokenFileWriter(export.path(counter), export.dtype) as writer:
        for tokens in stream(export.files, export.files.n_tokens, first, count):
            check_ids(tokens, export)
            writer.write(tokens)
        if count < export.chunk_tokens:
            writer.write(np.full(export.chunk_tokens - count, export.pad_id))


def check_ids(tokens: np.ndarray, export: Export) -> None:
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= export.vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise DataError(
            f"the source holds the id {wrong}, outside the vocabulary of {export.vocab_size}; give the right "
            f"--vocab-size, or prepare the data again"
        )


def is_done(export: Export, counter: int) -> bool:
    try:
        found = read_header(export.path(counter))
    except (FileNotFoundError, DataError):
        return False
    return found.n_tokens == export.chunk_tokens and found.dtype == export.dtype


def record_path(out: Path, prefix: str) -> Path:
    return out / f"export_{prefix}.json"  # does not begin with the prefix: readers glob for PREFIX*


def open_out(out: Path, record: dict[str, Any]) -> None:
    """See whether the folder is free for this export.

    Raises:
        ValueError: it holds something else under this prefix, tokens of another tokenizer, or files not from here.
    """
    records = {path.name: read_json(path) for path in sorted(out.glob("export_*.json"))}
    for name, other in records.items():
        if other["prefix"] == record["prefix"] and other != record:
            differing = ", ".join(key for key in record if other.get(key) != record[key])
            raise ValueError(
                f"{out} holds an export of something else with the prefix {record['prefix']!r} "
                f"(different: {differing}); choose another --out or --prefix, or delete the folder"
            )
        if other["tokenizer"] != record["tokenizer"]:
            raise ValueError(f"{out} holds tokens of another tokenizer, see {name}; choose another --out")
    ours = ("export_", *TOKENIZER_FILES, *(f"{other['prefix']}_0_" for other in records.values()))
    foreign = sorted(path.name for path in out.glob("*") if not path.name.startswith(ours))
    if foreign:
        raise ValueError(f"{out} holds what no export wrote, e.g. {foreign[0]}; choose another --out")


def tokenizer_beside(files: Sequence[TokenFile]) -> Tokenizer | None:
    try:
        path = tokenizer_file(Path(files[0].path).parent)
    except FileNotFoundError:
        return None
    return Tokenizer.load(path)


def pad_id_of(args: argparse.Namespace, tokenizer: Tokenizer | None) -> int | None:
    if args.tail == "drop":
        return None
    pad_id = args.pad_id
    if pad_id is None and Path(args.source, MANIFEST).is_file():
        pad_id = load_manifest(args.source).get("separator_id")
    if pad_id is None and tokenizer is not None:
        pad_id = tokenizer.eos_id
    if pad_id is None:
        raise ValueError(f"--tail pad: {args.source} says of no separator or eos to fill with; add --pad-id N")
    return pad_id


def ids_of(args: argparse.Namespace, files: TokenFiles, tokenizer: Tokenizer | None) -> tuple[int, np.dtype]:
    """The number that ids are below, and the type that holds them for lit-gpt's readers."""
    vocab_size = tokenizer.vocab_size if args.vocab_size is None and tokenizer is not None else args.vocab_size
    if vocab_size is not None:
        return vocab_size, token_dtype(vocab_size)
    fits = np.iinfo(files.dtype).max <= np.iinfo(np.uint16).max
    dtype = np.dtype("<u2" if fits else "<i4")
    return int(np.iinfo(dtype).max) + 1, dtype


def make_export(args: argparse.Namespace) -> tuple[Export, Tokenizer | None]:
    """What to do, from the arguments and the source.

    Raises:
        DataError: the source has too few tokens for one chunk.
    """
    files = find_token_files(args.source, args.split, dtype=args.dtype)
    for note in files.notes:
        print(f"note: {note}")
    tokenizer = tokenizer_beside(files)
    pad_id = pad_id_of(args, tokenizer)
    vocab_size, dtype = ids_of(args, files, tokenizer)
    if pad_id is not None and not 0 <= pad_id < vocab_size:
        raise ValueError(f"--pad-id {pad_id} is outside the vocabulary of {vocab_size}")
    export = Export(files, Path(args.out), args.prefix or args.split, args.chunk, dtype, vocab_size, pad_id)
    if not export.n_chunks:
        raise DataError(
            f"{args.source} has {export.n_tokens} tokens, too few for one chunk of {args.chunk}; "
            f"choose a smaller --chunk, or --tail pad"
        )
    return export, tokenizer


def run_export(export: Export, tokenizer: Tokenizer | None) -> int:
    """Write the chunks that are not there yet; returns how many were."""
    record = export.record(tokenizer)
    open_out(export.out, record)
    export.out.mkdir(parents=True, exist_ok=True)
    with locked(export.out), without_left_overs(export.out):
        open_out(export.out, record)  # again: others may have been here before we had the lock
        missing = [counter for counter in range(export.n_chunks) if not is_done(export, counter)]
        check_free_space(export.out, len(missing) * (HEADER.size + export.chunk_tokens * export.dtype.itemsize))
        write_atomically(record_path(export.out, export.prefix), to_json(record))
        if tokenizer is not None:
            tokenizer.save(export.out)
        for counter in missing:
            write_chunk(export, counter)
    return export.n_chunks - len(missing)


def report(export: Export, found: int) -> None:
    kind = f"{export.chunk_tokens} tokens ({export.dtype.name})"
    print(
        f"{export.out}: {export.n_chunks} files {export.prefix}_0_*.bin of {kind}, {found} of them were there already"
    )
    if export.tail_tokens and export.pad_id is None:
        print(f"  the last {export.tail_tokens} of {export.n_tokens} tokens make no full chunk and were dropped")
    elif export.tail_tokens:
        padding = export.chunk_tokens - export.tail_tokens
        print(f"  the last file ends in {padding} times the id {export.pad_id}; a reader cannot tell them from text")
    if export.n_chunks < FILES_PER_DEVICE:
        print(
            f"warning: TinyLlama's reader opens {FILES_PER_DEVICE} files per device and fails with fewer; "
            f"choose a smaller --chunk for it",
            file=sys.stderr,
        )


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    check_args(args)
    export, tokenizer = make_export(args)
    report(export, run_export(export, tokenizer))
