"""`grow report RUN... --out DIR`: from run directories to report.html, report.json and figures."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from grow.report.extra import require


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `grow report`."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run directories: one that grew and one from scratch to compare it with; more of either add rows; "
        "files of JSON lines with the points of other people's models are drawn as they are",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for report.html, report.json, figures/ and tables/",
    )
    parser.add_argument("--json", action="store_true", help="print report.json instead of a summary")
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="beginning of a sample text; can be repeated"
    )
    parser.add_argument("--no-samples", action="store_true", help="do not load the models to generate sample texts")


def run(args: argparse.Namespace) -> int:
    """Write the report and say what came out.

    Raises:
        ValueError: a package of the `report` extra is missing, or a setting is wrong.
        FileNotFoundError: a run is not there. DataError: a run is damaged. OSError: the folder cannot be written.
    """
    require("the report", "jinja2", "matplotlib")
    report = make_report(args)
    write_report(report, args.out)
    sys.stdout.write(json.dumps(report, indent=1) + "\n" if args.json else summary(report, args.out))
    return 0


def make_report(args: argparse.Namespace) -> dict[str, Any]:
    """Read the runs; everything the report says."""
    from grow.report.compare import compare
    from grow.report.facts import build_report
    from grow.report.samples import PROMPTS, no_samples, sample_texts
    from grow.runs.gather import gather
    from grow.runs.units import in_comparable_unit
    from lit_gpt.versions import versions

    gathered = in_comparable_unit(gather(args.runs))
    comparisons = compare(gathered)
    pair = comparisons.pairs[0] if comparisons.pairs else None
    models = [pair.grown, pair.baseline] if pair else gathered.models[-1:]
    samples = no_samples("--no-samples") if args.no_samples else sample_texts(models, args.prompt or PROMPTS)
    command = ["grow", "report", *map(str, args.runs), "--out", str(args.out)]
    return build_report(gathered, comparisons, samples) | {"command": shlex.join(command), "versions": versions()}


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write figures, tables, report.json and, last, report.html."""
    from grow.report.figures import write_figures
    from grow.report.page import render
    from grow.report.tables import write_tables
    from lit_gpt.atomic import write_atomically

    page = render(report)
    facts = json.dumps(report, indent=1, allow_nan=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_figures(report["charts"], folder / "figures")
    write_tables(report["tables"], folder / "tables")
    write_atomically(folder / "report.json", facts.encode())
    write_atomically(folder / "report.html", page.encode())


def summary(report: dict[str, Any], folder: Path) -> str:
    """What came out, for a terminal: the headline, a table of the models, where the page is."""
    from grow.report import text

    head = ("model", "parameters", "own tokens", "FLOPs with base", "own time", "loss", "bits/byte", "speed-up")
    rows = [
        (
            row["name"],
            text.count(row["parameters"]),
            text.count(row["tokens"]),
            text.flops(row["flops_total"]),
            text.duration(row["seconds"]),
            text.loss(row["final_loss"]),
            text.loss(row["bpb"]),
            text.percent(row["speedup"]),
        )
        for row in report["runs"]
    ]
    table = [text.columns([head, *rows]), ""] if rows else []
    headline = report["headline"]
    number = [] if headline["verdict"] == "none" else [f"{headline['number']} {headline['label']}."]
    lines = [headline["sentence"], headline["detail"], *number, *headline["more"]]
    return "\n".join([*lines, "", *table, report["claim"], str(folder / "report.html")]) + "\n"
