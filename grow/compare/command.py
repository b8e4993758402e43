"""The `grow compare` command."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grow.compare.settings import CompareConfig, read_settings
from grow.compare.text import PLANNED_HEAD, left_to_do, planned_rows, sentences, table
from grow.report.extra import require
from grow.report.text import columns
from lit_gpt.atomic import write_atomically
from lit_gpt.versions import versions

if TYPE_CHECKING:
    from grow.compare.plan import PlannedRun
    from grow.compare.ranking import Ranking


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="what to compare, e.g. configs/compare.yaml")
    parser.add_argument("--out-dir", metavar="DIR", help="replaces out_dir of the file")
    parser.add_argument("--train", metavar="DATA", help="replaces data.train of the file: your own prepared folder")
    parser.add_argument(
        "--seed",
        type=int,
        action="append",
        metavar="N",
        help="train the runs of this seed alone, one of the file's; can be repeated",
    )
    parser.add_argument("--dry-run", action="store_true", help="check the settings, list the runs, train nothing")
    parser.add_argument("--verbose", action="store_true", help="show what the runs say while they train")


def run(args: argparse.Namespace) -> int | None:
    """Train what is not trained yet, rank, write NAME.json and NAME.html, NAME that of the file of settings.

    Raises:
        ValueError: a setting is wrong, or a package of the `report` extra is missing. DataError, OSError: a run or its
            folder is damaged or cannot be read.
    """
    if not args.dry_run:
        require("the comparison", "jinja2", "scipy")
    from grow.compare.runs import RunFailed, missing_runs, run_all, try_out

    config = _with_flags(read_settings(args.config), args)
    seeds = _seeds(config, args.seed)
    try:
        if args.dry_run:
            try_out(config, seeds)
            return _print_plan(config, seeds, as_json=args.json)
        run_all(config, seeds, verbose=args.verbose)
    except RunFailed as failed:
        sys.stderr.write(f"error: {failed}\n")
        return failed.code
    missing = missing_runs(config)
    if missing:
        return _print_missing(missing, as_json=args.json)
    return _rank(config, args)


def _seeds(config: CompareConfig, wanted: Sequence[int] | None) -> list[int]:
    """Those that are asked for, in the order of the file."""
    unknown = [seed for seed in wanted or [] if seed not in config.seeds]
    if unknown:
        raise ValueError(f"--seed {unknown[0]} is none of the file's seeds, {config.seeds}; add it there")
    return [seed for seed in config.seeds if not wanted or seed in wanted]


def _print_plan(config: CompareConfig, seeds: Sequence[int], *, as_json: bool) -> None:
    from grow.compare.plan import planned_runs
    from grow.compare.runs import states

    planned = [run for seed in seeds for run in planned_runs(config, seed)]
    runs = list(zip(planned, states(config, planned), strict=True))
    if as_json:
        sys.stdout.write(json.dumps({"runs": [_planned(run, state) for run, state in runs]}, indent=1) + "\n")
    else:
        sys.stdout.write(f"{columns([PLANNED_HEAD, *planned_rows(runs)])}\n\n{left_to_do(runs)}\n")


def _planned(run: PlannedRun, state: str) -> dict[str, Any]:
    stages = [
        {
            "operator": stage.operator,
            "n_layer": stage.config.n_layer,
            "n_embd": stage.config.n_embd,
            "steps": stage.steps,
            "flops": stage.flops,
        }
        for stage in run.stages
    ]
    costs = {"steps": run.steps, "tokens": run.tokens, "flops": run.flops, "behind_flops": run.behind_flops}
    return {"seed": run.seed, "name": run.name, "stages": stages, **costs, "state": state}


def _print_missing(missing: Mapping[int, Sequence[str]], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps({"missing": [{"seed": s, "arms": list(n)} for s, n in missing.items()]}) + "\n")
        return
    for seed, names in missing.items():
        sys.stdout.write(f"seed {seed}: not trained yet: {', '.join(names)}\n")
    sys.stdout.write("Nothing is ranked before all runs of all seeds are there.\n")


def _rank(config: CompareConfig, args: argparse.Namespace) -> None:
    from grow.compare.ranking import rank
    from grow.compare.runs import spent

    ranking = rank(config)
    facts = {
        "runs": spent(config),
        "command": shlex.join(["grow", "compare", "--config", args.config, *_flags(args)]),
        "files": {path: Path(path).read_text(encoding="utf-8") for path in (args.config, *config.config)},
        "versions": versions(),
    }
    page = _write(Path(config.out_dir) / Path(args.config).stem, ranking, facts)
    if args.json:
        sys.stdout.write(_as_json(ranking, facts))
    else:
        sys.stdout.write("\n".join([*sentences(ranking), "", table(ranking), "", str(page)]) + "\n")


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


def _write(stem: Path, ranking: Ranking, facts: Mapping[str, Any]) -> Path:
    """NAME.json and NAME.html beside the folders of the seeds, where another file of settings may have its own."""
    from grow.compare.page import render

    page = stem.with_name(f"{stem.name}.html")
    write_atomically(stem.with_name(f"{stem.name}.json"), _as_json(ranking, facts).encode())
    write_atomically(page, render(ranking, facts).encode())
    return page
