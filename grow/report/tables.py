"""Tables as plain data, for the page, CSV and Markdown: scores, operators against metrics, speed-ups, runs."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grow.report import text
from grow.report.compare import Comparison, Comparisons, have_same_data, over_seeds
from grow.report.paper import models_like, speedups_like
from grow.report.score_charts import HOW_TO_SCORE
from grow.runs.gather import NATS_PER_TOKEN, Gathered
from grow.runs.trained_model import TrainedModel
from grow.scores import AVERAGE, LABELS, METRICS, WIKITEXT, Score

Row = dict[str, Any]
Cell = dict[str, Any]
LESS_IS_BETTER = {LABELS[WIKITEXT], "Loss"}
EQUAL_FLOPS = 0.05  # budgets that differ by less are equal enough to rank what was made of them
MANY_RUNS = 6  # more columns than these are hard to read: they become rows
TASKS = (*(task for task in METRICS if task != WIKITEXT), AVERAGE, WIKITEXT)


def build_tables(
    gathered: Gathered, comparisons: Comparisons, runs: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The tables that the runs can feed, and what is missing for the others.

    Each has id, title, caption, columns, rows of cells with value, stderr, limit, text and shade, and whether the page
    shows it; `runs` are the report's rows.
    """
    rows = [_score_row(model.name, "run", model.parameters, _final(model.scores)) for model in gathered.models]
    rows += [_score_row(m.name, "external", m.parameters, _final(m.points)) for m in gathered.external]
    rows = [row for row in rows if row["scores"]]
    sizes = {row["parameters"] for row in rows if row["parameters"]}
    printed = [_printed_row(model) for model in models_like(sizes, operators=False)]
    tables, missing = [_runs_table(runs)] if runs else [], []
    if rows:
        caption = "The last scores of every model; accuracies in per cent, zero-shot, ± one standard error."
        tables.append(_table("scores", "Scores of tasks", caption, [*rows, *printed]))
    else:
        missing.append({"figure": "Table of scores", "needs": HOW_TO_SCORE})
    operators = _operator_rows(gathered, comparisons)
    if operators:
        caption = (
            "Better is greener in every column, own and printed rows apart. Of our own, those are shaded that were "
            f"trained on the same data with FLOPs, base included, within {100 * EQUAL_FLOPS:g} % of each other: others "
            "do not rank. Loss: the final training loss; speed-ups are at equal loss."
        )
        tables.append(_table("operators", "Operators against metrics", caption, operators, shaded=True))
    else:
        missing.append(
            {"figure": "Operators against metrics", "needs": "runs that grew by two or more operators to one size"}
        )
    return [*tables, *_speedup_tables(gathered, comparisons)], missing


def _final(points: Sequence[Any]) -> dict[str, Score]:
    """The last score of every task; the average only where all of it is of one moment."""
    last: dict[str, Score] = {}
    for point in points:
        last |= point.scores
    if AVERAGE in last and AVERAGE not in points[-1].scores:
        del last[AVERAGE]
    return last


def _score_row(name: str, kind: str, parameters: float | None, scores: Mapping[str, Score], **more: Any) -> Row:
    return {"name": name, "kind": kind, "parameters": parameters, "scores": dict(scores), **more}


def _printed_row(model: Mapping[str, Any]) -> Row:
    name = f"paper, {model['where']}: {model['name']}, {text.count(model['tokens'])} tokens"
    more = {"loss": model["loss"], "speedup": model["speedup"]} if model["loss"] else {}
    return _score_row(name, "paper", model["parameters"], model["scores"], **more)


def _operator_rows(gathered: Gathered, comparisons: Comparisons) -> list[Row]:
    """Grown models and those from scratch of the size at which most operators were tried; none below two operators."""
    by_size: dict[Any, list[TrainedModel]] = {}
    for model in gathered.of_role("grown"):
        if model.operator:
            by_size.setdefault(model.parameters, []).append(model)
    tried = {size: {model.operator for model in models} for size, models in by_size.items()}
    size = max(tried, key=lambda size: len(tried[size]), default=None)
    if size is None or len(tried[size]) < 2:
        return []
    models = [*by_size[size], *(model for model in gathered.of_role("baseline") if model.parameters == size)]
    speedups = {pair.grown.name: pair.train["speedup"] for pair in comparisons.pairs}
    comparable = _comparable(models)
    rows = []
    for model in models:
        more = {
            "flops": model.end.flops_total,
            "loss": float(comparisons.smoothed(model).loss[-1]),
            "speedup": speedups.get(model.name),
            "ranked": model in comparable,
        }
        name = f"{model.name}: {model.operator}" if model.operator else model.name
        name += "" if have_same_data(model, comparable[0]) else " (other data)"
        rows.append(_score_row(name, "run", size, _final(model.scores), **more))
    if gathered.unit != NATS_PER_TOKEN:
        return rows  # the paper's losses are nats per token
    return [*rows, *(_printed_row(model) for model in models_like([size], operators=True))]


def _comparable(models: Sequence[TrainedModel]) -> list[TrainedModel]:
    """The most models that were trained on the data of one of them and spent its FLOPs or hardly more."""
    groups = [
        [
            model
            for model in models
            if have_same_data(model, first)
            and first.end.flops_total <= model.end.flops_total <= (1 + EQUAL_FLOPS) * first.end.flops_total
        ]
        for first in models
    ]
    return max(groups, key=len)


def _table(name: str, title: str, caption: str, rows: Sequence[Row], *, shaded: bool = False) -> dict[str, Any]:
    """Models against metrics: the columns are those that any row has. Rows that are not `ranked` are not shaded."""
    tasks = [task for task in TASKS if any(task in row["scores"] for row in rows)]
    labels = [
        "Parameters",
        *(["FLOPs"] if shaded else []),
        *(LABELS[task] for task in tasks),
        *(["Loss", "Speed-up"] if shaded else []),
    ]
    cells = []
    for row in rows:
        of_row = [_cell(row["parameters"], text.count), *([_cell(row.get("flops"), text.flops)] if shaded else [])]
        of_row += [_score_cell(row["scores"].get(task), task) for task in tasks]
        of_row += [_cell(row.get("loss"), text.loss), _cell(row.get("speedup"), text.percent)] if shaded else []
        cells.append({"name": row["name"], "kind": row["kind"], "cells": of_row})
    if shaded:
        for place, label in list(enumerate(labels))[2:]:
            for kind in ("run", "paper"):
                of_kind = [
                    drawn["cells"][place]
                    for row, drawn in zip(rows, cells, strict=True)
                    if row["kind"] == kind and row.get("ranked", True)
                ]
                _shade(of_kind, down=label in LESS_IS_BETTER)
    if any(cell["limit"] is not None for row in cells for cell in row["cells"]):
        caption += " * Limited to the first documents of the set: not comparable with whole sets."
    return {
        "id": name,
        "title": title,
        "caption": caption,
        "first": "Model",
        "columns": labels,
        "rows": cells,
        "page": True,
    }


def _cell(value: float | None, write: Callable[[float | None], str]) -> Cell:
    return {"value": value, "stderr": None, "limit": None, "text": write(value), "shade": None}


def _score_cell(score: Score | None, task: str) -> Cell:
    if score is None:
        return _cell(None, text.loss)
    scale = 1 if task == WIKITEXT else 100
    value, stderr = scale * score.value, None if score.stderr is None else scale * score.stderr
    words = text.score(value, stderr) + ("*" if score.limit is not None else "")
    return {"value": value, "stderr": stderr, "limit": score.limit, "text": words, "shade": None}


def _shade(cells: Sequence[Cell], *, down: bool) -> None:
    """From 0, the worst of a column, to 1, its best."""
    values = [cell["value"] for cell in cells if cell["value"] is not None]
    if not values or min(values) == max(values):
        return
    for cell in cells:
        if cell["value"] is not None:
            share = (cell["value"] - min(values)) / (max(values) - min(values))
            cell["shade"] = round(1 - share if down else share, 3)


def _speedup_tables(gathered: Gathered, comparisons: Comparisons) -> list[dict[str, Any]]:
    rows = []
    for pair in comparisons.pairs:
        for result in [*pair.train.get("along", []), pair.train]:
            if result["target_loss"] is not None:
                rows.append(_speedup_row(f"{pair.grown.name} over {pair.baseline.name}", "run", result))
    if not rows:
        return []
    rows += [row for group in comparisons.groups for row in _mean_rows(group)]
    sizes = {pair.grown.parameters for pair in comparisons.pairs if pair.grown.parameters}
    for printed in speedups_like(sizes):
        name = f"paper, {printed.where}: {text.count(printed.tokens)} tokens"
        rows.append(_speedup_row(name, "paper", {"speedup": printed.speedup}))
    caption = "At equal training loss: two losses on the baseline's way and the last one. Nothing is extrapolated."
    columns = ["Loss", "FLOPs from scratch", "FLOPs grown", "Speed-up"]
    title = "Speed-up at equal loss"
    table = {"id": "speedups", "title": title, "caption": caption, "first": "Pair", "columns": columns, "rows": rows}
    return [{**table, "page": True}]


def _mean_rows(group: Sequence[Comparison]) -> list[Row]:
    """One for an experiment with several seeds."""
    found = over_seeds(group, "train")
    if found is None:
        return []
    name = group[0].grown.end.stage_name
    row = _speedup_row(f"{name}, mean over seeds {', '.join(map(str, found.seeds))}", "run", {"speedup": found.mean})
    row["cells"][-1] |= {"stderr": found.stderr, "text": text.percent_over_seeds(found.mean, found.stderr)}
    return [row]


def _speedup_row(name: str, kind: str, result: Mapping[str, Any]) -> Row:
    cells = [
        _cell(result.get("target_loss"), text.loss),
        _cell(result.get("flops_scratch"), text.flops),
        _cell(result.get("flops_grown"), text.flops),
        _cell(result["speedup"], text.percent),
    ]
    if result["speedup"] is None:
        cells[-1]["text"] = "not reached"
    return {"name": name, "kind": kind, "cells": cells}


RUN_COLUMNS: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "Layers": ("n_layer", text.whole),
    "Parameters": ("parameters", text.count),
    "Tokens": ("tokens", text.count),
    "Tokens with its base's": ("tokens_cumulative", text.count),
    "FLOPs, base included": ("flops_total", text.flops),
    "Seconds": ("seconds", text.whole),
    "Final training loss": ("final_train_loss", text.loss),
    "Final validation loss": ("final_validation_loss", text.loss),
    "Bits per byte": ("bpb", text.loss),
    "Speed-up": ("speedup", text.percent),
}


def _runs_table(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The runs in numbers; the page has a table of its own for a few."""
    rows = []
    for run in runs:
        cells = [_cell(run[key], write) for key, write in RUN_COLUMNS.values()]
        cells[list(RUN_COLUMNS).index("Final validation loss")]["stderr"] = run["validation_stderr"]
        rows.append({"name": run["name"], "kind": "run", "cells": cells})
    title, columns, many = "The runs in numbers", list(RUN_COLUMNS), len(runs) > MANY_RUNS
    return {
        "id": "runs",
        "title": title,
        "caption": "",
        "first": "Run",
        "columns": columns,
        "rows": rows,
        "page": many,
    }


def as_csv(table: Mapping[str, Any]) -> str:
    """Numbers in full, with columns for standard errors and limits where there are any."""
    extras = {
        place: [
            key for key in ("stderr", "limit") if any(row["cells"][place][key] is not None for row in table["rows"])
        ]
        for place in range(len(table["columns"]))
    }
    head = [table["first"], "kind"]
    for place, label in enumerate(table["columns"]):
        head += [label, *(f"{label} {key}" for key in extras[place])]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for row in table["rows"]:
        cells = [row["cells"][place][key] for place in extras for key in ("value", *extras[place])]
        writer.writerow([row["name"], row["kind"], *("" if value is None else value for value in cells)])
    return out.getvalue()


def as_markdown(table: Mapping[str, Any]) -> str:
    """What the page shows."""
    lines = [[table["first"], *table["columns"]], ["---"] + ["---:"] * len(table["columns"])]
    lines += [[row["name"], *(cell["text"] for cell in row["cells"])] for row in table["rows"]]
    drawn = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{drawn}\n\n{table['caption']}\n" if table["caption"] else f"{drawn}\n"


def write_tables(tables: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write every table as <id>.csv and <id>.md into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        for suffix, write in (("csv", as_csv), ("md", as_markdown)):
            (folder / f"{table['id']}.{suffix}").write_text(write(table), encoding="utf-8")
