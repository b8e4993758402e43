"""Directories and files that appear whole or not at all; a MANIFEST.json tells whether a directory is still whole."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

from lit_gpt.errors import DataError
from lit_gpt.processes import ONE_PROCESS, Processes, first

MANIFEST = "MANIFEST.json"
MANIFEST_FORMAT = 1
CHUNK_BYTES = 1 << 22
VISIBLE_SECS = 120  # that long a file of another node may take to appear
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.lit-(?P<kind>tmp|old)-[0-9a-f]{8}")

_FULL_DISK = re.compile(r"No space left|os error (28|122)|unexpected pos")  # of C, of Rust, of PyTorchFileWriter


@dataclass(frozen=True)
class Known:
    """What is known of a directory when it is built; its manifest takes this instead of reading the files again."""

    crc32: dict[str, str] = field(default_factory=dict)
    """File name -> crc32 of its content, eight hexadecimal digits; filled while the directory is built."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Further entries of the manifest."""


@contextmanager
def atomic_directory(
    path: str | Path,
    form: str = "",
    *,
    replace: bool = False,
    known: Known | None = None,
    processes: Processes = ONE_PROCESS,
) -> Iterator[Path]:
    """Build a directory under a temporary name beside `path`; publish it when the block ends without an error.

    Publishing is: fsync every file, write the manifest, fsync the directories, rename, fsync the parent. After an
    error the temporary is removed and `path` is as before; after a kill it stays, for `prune_temporaries`.

    Args:
        path: where the directory shall appear. Missing parents are made.
        form: what the directory is, for the manifest.
        replace: whether a directory that is there already may go. It goes after the new one is complete; a kill
            between the two renames leaves it for `prune_temporaries` to put back.
        known: what need not be read for the manifest; the block fills it.
        processes: that build it together. The first one makes and publishes the directory; the block of each must
            have fsynced what it wrote, and must raise on all of them or on none.

    Raises:
        FileExistsError: `path` exists, is not an empty directory, and `replace` is False.
    """
    path = Path(path)
    missing = [parent for parent in path.parents if not parent.exists()]
    is_first, temporary = processes.rank == 0, None
    try:
        temporary = first(processes, lambda: _make_temporary(path, replace))
        with _locked(temporary) if is_first else nullcontext():
            yield temporary
            first(processes, lambda: _complete(temporary, path, form, known))
    except BaseException:
        if is_first:
            _withdraw(temporary, missing)
        raise


def _make_temporary(path: Path, replace: bool) -> Path:
    _check_target(path, replace)
    temporary = _temporary_name(path, "tmp")
    _make_directory(temporary)
    return temporary


def _withdraw(temporary: Path | None, missing: list[Path]) -> None:
    """Remove what an attempt that failed has made: the temporary, and parents that were not there before."""
    if temporary is not None:
        shutil.rmtree(temporary, ignore_errors=True)
    for parent in missing:  # innermost first
        with suppress(OSError):  # not made, or another process uses it by now
            parent.rmdir()


def _complete(temporary: Path, path: Path, form: str, known: Known | None) -> None:
    _write_manifest(temporary, form, known)
    _publish(temporary, path)


def _make_directory(temporary: Path) -> None:
    """Make a temporary and its parents; an error names the folder that cannot be written, not the hidden name."""
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(temporary.parent)
        raise


def _check_target(path: Path, replace: bool) -> None:
    if path.is_dir() and (replace or not any(path.iterdir())):
        return
    if path.exists():
        raise FileExistsError(errno.EEXIST, "exists already; choose another name or remove it first", str(path))


def _temporary_name(path: Path, kind: str) -> Path:
    return path.parent / f".{path.name}.lit-{kind}-{secrets.token_hex(4)}"


def _publish(temporary: Path, path: Path) -> None:
    for directory, _, _ in os.walk(temporary):
        sync_directory(directory)
    aside = None
    if path.is_dir() and any(path.iterdir()):
        aside = _temporary_name(path, "old")
        path.rename(aside)
    temporary.rename(path)
    sync_directory(path.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def sync_directory(path: str | Path) -> None:
    """Make the renames inside a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Replace one file by another content, so that it is never there in part."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        write_synced(temporary, data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = error.filename or str(path)  # a failed write does not say where
        raise
    sync_directory(path.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and see it on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def await_file(path: Path, size: int | None = None) -> None:
    """Wait until this process sees what another one wrote; network file systems may take a while.

    Raises:
        OSError: it is still not there, or not of this size.
    """
    deadline = time.monotonic() + VISIBLE_SECS
    while not path.is_file() or (size is not None and path.stat().st_size != size):
        if time.monotonic() > deadline:
            what = (
                f"another process wrote it, and it is not here {VISIBLE_SECS} s later; do all nodes share the folder?"
            )
            raise OSError(errno.EIO, what, str(path))
        time.sleep(0.05)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a lock that the system drops when the process dies, so that pruning spares what is still being built."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def prune_temporaries(directory: str | Path, *, of: str | None = None) -> list[Path]:
    """Remove what killed processes left half-built in `directory` and in its sub-directories; returns what went.

    A directory that was moved aside for a successor that never came is put back. With `of`, only what would have become
    the entry of that name in `directory` is looked at.
    """
    if of is None:
        found = [entry for pattern in (".*", "*/.*") for entry in Path(directory).glob(pattern)]
    else:
        found = list(Path(directory).glob(f".{escape(of)}.lit-*"))
    removed = []
    for entry in sorted(found):
        match = _TEMPORARY.fullmatch(entry.name)
        if match is None or entry.is_symlink() or not entry.is_dir() or not _is_abandoned(entry):
            continue
        if match["kind"] == "old" and not entry.with_name(match["name"]).exists():
            entry.rename(entry.with_name(match["name"]))
        else:
            shutil.rmtree(entry, ignore_errors=True)
            removed.append(entry)
    return removed


def remove_directory(path: str | Path) -> None:
    """Remove a directory so that it is never there in part: it is renamed to a temporary first."""
    path = Path(path)
    temporary = _temporary_name(path, "tmp")
    path.rename(temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def _is_abandoned(temporary: Path) -> bool:
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def check_free_space(path: str | Path, needed_bytes: int) -> None:
    """Refuse before the first byte is written.

    Raises:
        OSError: ENOSPC, with the bytes needed and the bytes free, when `needed_bytes` do not fit where `path` is.
    """
    existing = next(parent for parent in (Path(path), *Path(path).absolute().parents) if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if needed_bytes > free_bytes:
        raise OSError(errno.ENOSPC, f"{needed_bytes:,} bytes are needed and {free_bytes:,} are free", str(path))


@contextmanager
def full_disk_as_os_error(path: str | Path) -> Iterator[None]:
    """Writers that are not Python's report a full disk in errors of their own; turn those into OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if not _FULL_DISK.search(str(error)):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def _write_manifest(directory: Path, form: str, known: Known | None = None) -> None:
    target = directory / MANIFEST
    target.unlink(missing_ok=True)
    write_synced(target, render_manifest(manifest_of(directory, form, sync=True, known=known)))


def manifest_of(directory: Path, form: str, *, sync: bool = False, known: Known | None = None) -> dict[str, Any]:
    """The manifest that `directory` would get: size and crc32 of every file, and a digest over all that.

    Args:
        directory: what to describe; a MANIFEST.json in it is left out.
        form: what the directory is.
        sync: also fsync every file.
        known: what need not be read.
    """
    known = Known() if known is None else known
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    files = {name: _describe(directory / name, sync, known.crc32.get(name)) for name in names if name != MANIFEST}
    manifest = {**known.notes, "format": MANIFEST_FORMAT, "form": form, "files": files}
    return {**manifest, "digest": _digest(manifest)}


def _describe(path: Path, sync: bool = False, crc32: str | None = None) -> dict[str, Any]:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if crc32 is None:
            size = crc = 0
            while chunk := file.read(CHUNK_BYTES):
                size, crc = size + len(chunk), zlib.crc32(chunk, crc)
            crc32 = crc32_text(crc)
        if sync:
            os.fsync(file.fileno())
    return {"size": size, "crc32": crc32}


def crc32_text(crc32: int) -> str:
    """As it stands in a manifest."""
    return f"{crc32:08x}"


def render_manifest(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(
        render_manifest({key: value for key, value in manifest.items() if key != "digest"})
    ).hexdigest()


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a directory, after checking that it is byte for byte what was written.

    Raises:
        FileNotFoundError: there is no such directory.
        DataError: it has no manifest, or the manifest was changed.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    if not directory.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such directory", str(directory))
    if not path.is_file():
        raise DataError(
            f"{directory} has no {MANIFEST}: it was never completed, so it does not count as a checkpoint; "
            f"use an earlier one or write it again"
        )
    written = path.read_bytes()
    manifest = _parse(written)
    if manifest is None or render_manifest(manifest) != written or manifest.get("digest") != _digest(manifest):
        raise DataError(f"{path} was damaged or changed after it was written; use an earlier checkpoint")
    if manifest.get("format") != MANIFEST_FORMAT or not _is_well_formed(manifest):
        raise DataError(
            f"{path} has format {manifest.get('format')!r} or files this version cannot read; it reads format "
            f"{MANIFEST_FORMAT}; use the version of lit-grow that wrote it"
        )
    return manifest


def _parse(written: bytes) -> dict[str, Any] | None:
    try:
        manifest = json.loads(written)
    except (ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) else None


def _is_well_formed(manifest: dict[str, Any]) -> bool:
    files = manifest.get("files")
    return (
        isinstance(manifest.get("form"), str)
        and isinstance(files, dict)
        and all(_is_inside(name) and _is_entry(entry) for name, entry in files.items())
    )


def _is_inside(name: str) -> bool:
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("size")) is int and isinstance(entry.get("crc32"), str)


def file_problem(directory: str | Path, manifest: dict[str, Any], name: str, *, deep: bool) -> str | None:
    """What is wrong with one file of a directory, None if nothing is; the crc32 is computed when `deep`."""
    path, entry = Path(directory) / name, manifest["files"].get(name)
    if entry is None:
        return f"{path} is not listed in {MANIFEST}: it does not belong to this checkpoint"
    if not path.is_file():
        return f"{path} is missing: {MANIFEST} lists it with {entry['size']:,} bytes"
    size = path.stat().st_size
    if size != entry["size"]:
        return f"{path} has {size:,} bytes, {MANIFEST} says {entry['size']:,}: it was cut short or changed"
    return crc32_problem(path, entry, _describe(path)["crc32"]) if deep else None


def crc32_problem(path: Path, entry: dict[str, Any], crc32: str) -> str | None:
    """What it means that a file has this crc32, given its entry in the manifest; None if nothing is wrong."""
    if crc32 != entry["crc32"]:
        return f"{path} does not have the crc32 {entry['crc32']} of {MANIFEST}: its content was damaged or changed"
    return None


def directory_problems(
    directory: str | Path, manifest: dict[str, Any], *, deep: bool, deep_up_to_bytes: float = math.inf
) -> list[str]:
    """One line for every file of the manifest that is missing, of another size or, when `deep`, of other content.

    Of files larger than `deep_up_to_bytes` only the size is looked at.
    """
    found = (
        file_problem(directory, manifest, name, deep=deep and entry["size"] <= deep_up_to_bytes)
        for name, entry in manifest["files"].items()
    )
    return [problem for problem in found if problem is not None]


def unlisted_files(directory: str | Path, manifest: dict[str, Any], suffixes: tuple[str, ...]) -> list[str]:
    """One line for every file with such a suffix that the manifest does not list."""
    found = sorted(path for path in Path(directory).iterdir() if path.suffix in suffixes)
    return [f"{path} is not listed in {MANIFEST}" for path in found if path.name not in manifest["files"]]
