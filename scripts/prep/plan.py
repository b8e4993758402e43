"""The plan of a preparation: all that decides its bytes, written down first; and who may work on a folder."""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import hashlib
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_gpt.atomic import write_atomically
from lit_gpt.errors import DataError
from lit_gpt.packed_dataset import MANIFEST, PLAN, read_header
from lit_gpt.tokenizer import BYTES_MARKER, CONFIG, FILE_NAMES, Tokenizer, file_sha256, tokenizer_file, tokenizer_files
from prep.bpe import train_bpe
from prep.corpus import SPLIT_BUCKETS, InputFile, Reading, content_digests
from prep.units import Unit, bytes_per_unit, group_files, read_json, to_json

FORMAT = 2
TOKENIZER_FILES = (*FILE_NAMES, CONFIG)
DEFAULT_VALIDATION_FRACTION = 0.05
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)  # what file systems without links say
TEMPORARY = re.compile(r".+\.(bin|json|model)\.(?P<host>.+)\.(?P<pid>\d+)\.tmp")  # as what is written here is called
ABANDONED_SECS = 86_400  # a temporary of another machine's process, of which we cannot see whether it lives


def make_plan(args: argparse.Namespace, files: list[InputFile], source: str) -> dict[str, Any]:
    """All that decides the output, as plain data. Does not depend on workers, on tasks, or on folder names."""
    fraction = DEFAULT_VALIDATION_FRACTION if args.validation_fraction is None else args.validation_fraction
    if args.split != "auto":
        fraction = 0.0
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
        "drop": [list(each) for each in args.drop],
        "document_bytes": args.document_bytes,
        "split": args.split,
        "validation_buckets": round(fraction * SPLIT_BUCKETS),
        "percentage": args.percentage,
        "unit_bytes": args.unit_bytes or bytes_per_unit(files),
    }
    return {**plan, "plan_id": hashlib.sha256(to_json(plan)).hexdigest()}


def _planned_tokenizer(args: argparse.Namespace) -> dict[str, Any]:
    if args.tokenizer is None:
        return {"train": "sentencepiece bpe", "vocab_size": args.vocab_size}
    if args.tokenizer == "bytes":
        return {"file": BYTES_MARKER}
    files = tokenizer_files(Path(args.tokenizer))
    return {"file": files[0].name, "sha256": [file_sha256(each) for each in files]}


def reading_of(plan: dict[str, Any]) -> Reading:
    drop = tuple((key, value) for key, value in plan["drop"])
    return Reading(plan["text_key"], plan["document_bytes"], plan["validation_buckets"], drop)


def units_of(
    plan: dict[str, Any], files: list[InputFile], out: Path, tokenizer: Tokenizer, *, skip_bad_files: bool
) -> list[Unit]:
    """The work, cut into units: the same for every number of workers and tasks."""
    separator_id, reading = separator_of(plan, tokenizer), reading_of(plan)
    return [
        Unit(number, group, str(out), plan["plan_id"], tokenizer.fingerprint, separator_id, reading, skip_bad_files)
        for number, group in enumerate(group_files(files, plan["unit_bytes"]))
    ]


def separator_of(plan: dict[str, Any], tokenizer: Tokenizer) -> int | None:
    if plan["separator"] == "none":
        return None
    separator_id = tokenizer.eos_id if plan["separator"] == "eos" else plan["separator"]
    if separator_id is None:
        raise ValueError("the tokenizer has no eos token; choose --separator-id N, or --no-separator")
    if not 0 <= separator_id < tokenizer.vocab_size:
        raise ValueError(f"--separator-id {separator_id} is outside the vocabulary of {tokenizer.vocab_size}")
    return separator_id


def open_out(out: Path, plan: dict[str, Any], args: argparse.Namespace) -> dict[str, Any] | None:
    """See whether the folder is free for this plan; returns its manifest if all is done already.

    Raises:
        ValueError: the folder holds token files of another plan, or something that no run of this command wrote.
    """
    is_taken = any(out.glob("*.bin"))
    tokenizers = _tokenizers_in(out, args)
    found = _found_plan(out)  # is looked for last, as it is written first
    if found is None:
        if is_taken or tokenizers:
            what = "token files" if is_taken else tokenizers[0].name
            raise ValueError(f"{out} holds {what}, but no {PLAN} of the run that wrote them; choose another --out")
        return None
    if found["plan_id"] == plan["plan_id"]:
        return _finished(out, plan)
    if is_taken:
        raise _another_plan(out, plan, found)
    return None


def _found_plan(out: Path) -> dict[str, Any] | None:
    if not (out / PLAN).is_file():
        return None
    found = read_json(out / PLAN)
    if not isinstance(found, dict) or "plan_id" not in found:
        raise ValueError(f"{out / PLAN} is not of this command; choose another --out")
    return found


def _tokenizers_in(out: Path, args: argparse.Namespace) -> list[Path]:
    """The files of tokenizers in the folder, but for a given one."""
    given = Path(args.tokenizer).resolve() if args.tokenizer else None
    if given == out.resolve():
        return []
    return [path for name in TOKENIZER_FILES if (path := out / name).is_file() and path.resolve() != given]


def _another_plan(out: Path, plan: dict[str, Any], found: dict[str, Any]) -> ValueError:
    if found.get("format") != plan["format"]:
        return ValueError(
            f"{out} was prepared by another version of this command (format {found.get('format')} of {PLAN}, this one "
            f"writes {plan['format']}). Finished data can be trained on as it is, but not continued; choose another "
            f"--out, or delete the folder to prepare it anew"
        )
    differing = [key for key in plan if key != "plan_id" and found.get(key) != plan[key]]
    return ValueError(
        f"{out} holds token files that were prepared from something else (different: {', '.join(differing)}); "
        f"choose another --out, or delete the folder to prepare it anew"
    )


def _finished(out: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    if not (out / MANIFEST).is_file():
        return None
    manifest = read_json(out / MANIFEST)
    if manifest.get("plan_id") != plan["plan_id"]:
        return None
    try:
        if file_sha256(tokenizer_file(out)) != manifest["tokenizer"]["sha256"]:
            return None
        for split in manifest["splits"].values():
            for name in split["files"]:
                if read_header(out / name).n_tokens != split["file_tokens"][name]:
                    return None
    except (FileNotFoundError, DataError):
        return None  # the receipts find out which shard to write again
    return manifest


def publish_plan(out: Path, plan: dict[str, Any], args: argparse.Namespace) -> None:
    """Write the plan, unless it is there.

    Raises:
        ValueError: the folder is no longer free; or a task finds another plan, and its neighbours may be at work on it.
    """
    path = out / PLAN
    open_out(out, plan, args)  # again: others may have been here before we had the lock
    found = _found_plan(out)
    if args.task is not None:
        if found is None:
            _write_once(path, to_json(plan))
            found = read_json(path)
        if found["plan_id"] != plan["plan_id"]:
            raise _another_plan(out, plan, found)
    elif found is None or found["plan_id"] != plan["plan_id"]:
        for left_over in _tokenizers_in(out, args):  # of a failed run of another plan; would be taken for ours
            left_over.unlink()
        write_atomically(path, to_json(plan))


@contextlib.contextmanager
def withdrawn_on_error(out: Path, args: argparse.Namespace) -> Iterator[None]:
    """Remove a plan that was written in vain: no tokenizer came of it. Tasks leave it, their neighbours may need it."""
    had_plan = (out / PLAN).is_file()
    try:
        yield
    except (ValueError, DataError):
        if args.task is None and not had_plan:
            (out / PLAN).unlink(missing_ok=True)
        raise


def _write_once(path: Path, data: bytes) -> None:
    """Write a file completely, or leave the one that another process was faster to write."""
    whole = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        write_atomically(whole, data)
        os.link(whole, path)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        os.replace(whole, path)
    finally:
        whole.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(out: Path, *, shared: bool = False) -> Iterator[None]:
    """Keep a second run out of the folder, or all but tasks; the system lets go of the lock even after a kill -9."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise DataError(f"{out} is being written by another run of this command; wait for it") from error
        warn(f"{out} cannot be locked ({error.strerror}); do not start a second run on it")
    try:
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def without_left_overs(out: Path) -> Iterator[None]:
    """Remove what killed processes have not finished, before and after; what may still be written stays."""
    remove_left_overs(out)
    try:
        yield
    finally:
        remove_left_overs(out)


def remove_left_overs(out: Path) -> None:
    """Remove the temporaries of dead processes of this machine, and old ones of others. No own one may be in use."""
    for path in out.glob("*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # of a task that is just done with it
            if (named := TEMPORARY.fullmatch(path.name)) and _is_abandoned(path, named["host"], int(named["pid"])):
                path.unlink()


def _is_abandoned(path: Path, host: str, pid: int) -> bool:
    if f".{host}".endswith(f".{socket.gethostname()}"):
        return pid == os.getpid() or not _is_alive(pid)  # nothing of ours is being written now
    return time.time() - path.stat().st_mtime > ABANDONED_SECS


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (OSError, IndexError):  # no Linux
        return True
    return state not in "ZX"  # dead, but nobody asked how it ended


def place_tokenizer(args: argparse.Namespace, plan: dict[str, Any], files: list[InputFile], out: Path) -> Tokenizer:
    """Put the tokenizer's file into the folder, training it if none was given.

    Raises:
        ValueError: a task without a tokenizer. DataError: another one is in the folder.
    """
    if args.tokenizer is not None:
        return _copy_tokenizer(Tokenizer.load(args.tokenizer), out)
    path = out / "tokenizer.model"
    if not path.is_file():
        if args.task is not None and args.task[1] > 1:
            raise ValueError(
                f"{out} holds no tokenizer, and every task must use the same: run the command once with --plan-only, "
                f"which trains one, or give --tokenizer PATH"
            )
        train_bpe(path, files, args.vocab_size, reading_of(plan), skip_bad_files=args.on_bad_file == "skip")
    return Tokenizer.load(path)


def _copy_tokenizer(tokenizer: Tokenizer, out: Path) -> Tokenizer:
    tokenizer.save(out)
    placed = Tokenizer.load(out)
    if placed.fingerprint != tokenizer.fingerprint:
        raise DataError(f"{out} holds another tokenizer as well, {tokenizer_file(out).name}; delete that file")
    return placed


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
