"""Results as JSON: one record per file, or one for each kind of machine."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_gpt.atomic import write_atomically

RESULTS = Path(__file__).parent / "results"


def add_out(parser: argparse.ArgumentParser, default: Path, *, unless_quick: bool = False) -> None:
    """`--out`, the file that a benchmark writes; with `unless_quick` None if it is not given, as a smoke run keeps
    nothing."""
    what = f"file for the result; default: {os.path.relpath(default)}{', and none if quick' if unless_quick else ''}"
    parser.add_argument("--out", type=Path, default=None if unless_quick else default, help=what)


def write_result(path: Path, record: Mapping[str, Any]) -> None:
    """Write one record, as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())


def read_result(path: Path) -> dict[str, Any]:
    """A record, or the records by machine; empty where nothing was measured yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def add_result(path: Path, machine: str, record: Mapping[str, Any]) -> None:
    """Replace the record of one kind of machine in a file, keep the others."""
    write_result(path, dict(sorted({**read_result(path), machine: record}.items())))
