"""What `grow report` makes of run directories."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from grow.report.command import add_arguments, make_report, run
from grow.report.page import render


def arguments(*runs: Path, out: Path, options: tuple[str, ...]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([*map(str, runs), "--out", str(out), *options])


def facts_on(*runs: Path, options: tuple[str, ...] = ("--no-samples",)) -> dict[str, Any]:
    """What report.json would hold; the page is rendered, for its template must take every report, and thrown away."""
    report = make_report(arguments(*runs, out=Path("out"), options=options))
    render(report)
    return json.loads(json.dumps(report, allow_nan=False))


def report_on(*runs: Path, out: Path, options: tuple[str, ...] = ("--no-samples",)) -> dict[str, Any]:
    """What report.json holds after the command."""
    assert run(arguments(*runs, out=out, options=options)) == 0
    return json.loads((out / "report.json").read_text())


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report["runs"]}
