"""The `grow compare` command."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grow.compare.settings import CompareConfig, read_settings
from grow.compare.text import sentences, table
from grow.report.extra import require
from lit_gpt.atomic import write_atomically
from lit_gpt.versions import versions

if TYPE_CHECKING:
    from grow.compare.ranking import Ranking


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="what to compare, e.g. configs/compare.yaml")
    parser.add_argument("--out-dir", metavar="DIR", help="replaces out_dir of the file")
    parser.add_argument("--train", metavar="DATA", help="replaces data.train of the file: your own prepared folder")


def run(args: argparse.Namespace) -> int | None:
    """Train what is not trained yet, rank, write compare.json and compare.html.

    Raises:
        ValueError: a setting is wrong, or a package of the `report` extra is missing. DataError, OSError: a run or its
            folder is damaged or cannot be read.
    """
    require("the comparison", "jinja2", "scipy")
    from grow.compare.runs import RunFailed, run_all

    config = _with_flags(read_settings(args.config), args)
    try:
        run_all(config)
    except RunFailed as failed:
        sys.stderr.write(f"error: {failed}\n")
        return failed.code
    from grow.compare.ranking import rank

    ranking = rank(config)
    facts = {
        "command": shlex.join(["grow", "compare", "--config", args.config, *_flags(args)]),
        "files": {path: Path(path).read_text(encoding="utf-8") for path in (args.config, *config.config)},
        "versions": versions(),
    }
    page = _write(Path(config.out_dir), ranking, facts)
    if args.json:
        sys.stdout.write(_as_json(ranking, facts))
    else:
        sys.stdout.write("\n".join([*sentences(ranking), "", table(ranking), "", str(page)]) + "\n")
    return None


def _with_flags(config: CompareConfig, args: argparse.Namespace) -> CompareConfig:
    if args.out_dir is not None:
        config = dataclasses.replace(config, out_dir=args.out_dir)
    if args.train is not None:
        data = {**config.settings.get("data", {}), "train": args.train}
        config = dataclasses.replace(config, settings={**config.settings, "data": data})
    return config


def _flags(args: argparse.Namespace) -> list[str]:
    given = {"--out-dir": args.out_dir, "--train": args.train}
    return [part for name, value in given.items() if value is not None for part in (name, value)]


def _as_json(ranking: Ranking, facts: Mapping[str, Any]) -> str:
    return json.dumps({**ranking.to_dict(), **facts}, indent=1, allow_nan=False) + "\n"


def _write(folder: Path, ranking: Ranking, facts: Mapping[str, Any]) -> Path:
    from grow.compare.page import render

    page = folder / "compare.html"
    write_atomically(folder / "compare.json", _as_json(ranking, facts).encode())
    write_atomically(page, render(ranking, facts).encode())
    return page
