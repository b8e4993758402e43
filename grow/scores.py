"""Scores of benchmark tasks: which metric of which task counts, averages, and where they are read from.

The metrics are those of the paper's tables (arXiv 2405.15319), zero-shot, as lm-evaluation-harness names them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grow.curves import EVALS_FILE, read_json_lines
from lit_gpt.errors import DataError

AVERAGED = {
    "lambada_openai": "acc",
    "arc_challenge": "acc_norm",
    "arc_easy": "acc_norm",
    "logiqa": "acc_norm",
    "piqa": "acc_norm",
    "sciq": "acc_norm",
    "winogrande": "acc",
}
"""Task -> metric of the seven accuracies whose plain mean the paper calls average."""
FURTHER = {"hellaswag": "acc_norm", "openbookqa": "acc_norm", "boolq": "acc"}
AVERAGE, WIKITEXT = "average", "wikitext"
METRICS = {**AVERAGED, **FURTHER, WIKITEXT: "word_perplexity"}
LABELS = {
    "lambada_openai": "Lambada",
    "arc_challenge": "ARC-c",
    "arc_easy": "ARC-e",
    "logiqa": "LogiQA",
    "piqa": "PIQA",
    "sciq": "SciQ",
    "winogrande": "Winogrande",
    "hellaswag": "HellaSwag",
    "openbookqa": "OBQA",
    "boolq": "BoolQ",
    AVERAGE: "Average",
    WIKITEXT: "Wikitext perplexity",
}


@dataclass(frozen=True)
class Score:
    """The metric that counts of one task."""

    value: float
    """An accuracy as a share, or a perplexity per word."""
    stderr: float | None = None
    limit: float | None = None
    """How many documents were scored of more; None: all of them."""


@dataclass(frozen=True)
class ScoredPoint:
    """The scores of one model at one moment."""

    tokens: float | None
    """Trained on by then, those of the models it grew from included."""
    flops: float | None
    """Spent by then, those of parents included."""
    scores: Mapping[str, Score]
    """Task -> score; AVERAGE among them when all seven tasks are there."""
    stage: int | None = None


def average(scores: Mapping[str, Score]) -> Score | None:
    """The mean of the seven accuracies; None unless all are there."""
    seven = [scores[task] for task in AVERAGED if task in scores]
    if len(seven) < len(AVERAGED):
        return None
    errors = [score.stderr for score in seven if score.stderr is not None]
    limits = [score.limit for score in seven if score.limit is not None]
    stderr = math.sqrt(sum(error**2 for error in errors)) / len(seven) if len(errors) == len(seven) else None
    return Score(sum(score.value for score in seven) / len(seven), stderr, min(limits, default=None))


def read_scores(run_dir: Path) -> tuple[list[ScoredPoint], list[str]]:
    """The scored moments in the evals.jsonl of a run, in order, and notes on what was left out."""
    path = run_dir / EVALS_FILE
    if not path.is_file():
        return [], []
    lines, _ = read_json_lines(path)  # its notes are those of the validation losses
    scored = [line for line in lines if "task" in line[1]]
    points, notes = _points(scored)
    return points, [*notes, *_not_drawn(run_dir.name, scored)]


def _not_drawn(name: str, lines: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """A note on the tasks of a model that have no metric here, as those of a user's own."""
    others = sorted({str(values["task"]) for _, values in lines} - {*METRICS, AVERAGE})
    return [f"{name}: scores of {', '.join(others)} were left out; these tasks have no figure here."] if others else []


def _points(lines: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[list[ScoredPoint], list[str]]:
    """Lines of one score each, as evaluation writes them -> one point per moment; the last of equal scores counts."""
    moments: dict[tuple[Any, ...], dict[str, Score]] = {}
    notes: list[str] = []
    for where, values in lines:
        if not isinstance(values["task"], str):
            raise DataError(f"{where}: task is {values['task']!r}, not a name; the file was damaged")
        if values.get("metric") != METRICS.get(values["task"]):
            continue  # another metric of the task, or the average: that is computed here
        moment = (_tokens(values, where), *(_number(values, name, where) for name in ("flops_total", "stage")))
        score = _score(values, "value", "stderr", _number(values, "limit", where), where, notes)
        if score is not None:
            moments.setdefault(moment, {})[values["task"]] = score
    ordered = sorted(moments, key=lambda moment: [value or 0 for value in moment])
    return [_point(tokens, flops, moments[tokens, flops, stage], stage) for tokens, flops, stage in ordered], notes


def _point(
    tokens: float | None, flops: float | None, scores: dict[str, Score], stage: int | None = None
) -> ScoredPoint:
    mean = average(scores)
    return ScoredPoint(tokens, flops, scores if mean is None else {**scores, AVERAGE: mean}, stage)


def _tokens(values: Mapping[str, Any], where: str) -> float | None:
    """Those of all runs behind a model, where a line tells them from those of its last run."""
    return _number(values, "tokens" if values.get("tokens_total") is None else "tokens_total", where)


def _number(values: Mapping[str, Any], name: str, where: str) -> float | None:
    value = values.get(name)
    if value is not None and not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
        raise DataError(f"{where}: {name} is {value!r}, not a number of at least 0; the file was damaged")
    return value


def _score(
    values: Mapping[str, Any], name: str, stderr: str, limit: float | None, where: str, notes: list[str]
) -> Score | None:
    value, error = values.get(name), values.get(stderr)
    if not (isinstance(value, int | float) and math.isfinite(value)):
        notes.append(f"{where}: the score is {value}, not a number, and was left out.")
        return None
    is_known = isinstance(error, int | float) and math.isfinite(error)
    return Score(float(value), float(error) if is_known else None, limit)


@dataclass(frozen=True)
class ExternalModel:
    """Points of a model that somebody else trained, from a file of JSON lines."""

    name: str
    path: Path
    points: Sequence[ScoredPoint]
    """With at least one score, in order."""
    losses: Sequence[tuple[float | None, float | None, float]]
    """Tokens, FLOPs and training loss, in order."""
    parameters: float | None
    """The last that a line says."""

    @property
    def end(self) -> ScoredPoint | None:
        return self.points[-1] if self.points else None


def read_external(path: Path) -> tuple[list[ExternalModel], list[str]]:
    """Models from a file in which every line is a point: `model`, `tokens` and one or more of `results`, `loss`.

    `results` maps a task to the metrics of lm-evaluation-harness; lines of `scripts/evaluate.py` (`task`, `metric`,
    `value`) do as well. `flops_total`, or `parameters` (then FLOPs are 6 per parameter and token), puts a point on the
    axis of FLOPs; the last `parameters` of a model count for all of its lines. A line without `model` belongs to a
    model with the file's name.

    Raises:
        DataError: a damaged line, or no point at all.
    """
    lines, notes = read_json_lines(path)
    by_name: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for line in lines:
        by_name.setdefault(str(line[1].get("model") or path.stem), []).append(line)
    models = [_external(name, path, of_model, notes) for name, of_model in by_name.items()]
    found = [model for model in models if model.points or model.losses]
    if not found:
        raise DataError(f"{path} has no point: give JSON lines with tokens, and results, loss or task and value")
    return found, notes


def _external(name: str, path: Path, lines: Sequence[tuple[str, Mapping[str, Any]]], notes: list[str]) -> ExternalModel:
    sizes = [size for where, values in lines if (size := _number(values, "parameters", where)) is not None]
    parameters = sizes[-1] if sizes else None
    lines = [(where, _with_flops(values, parameters, where)) for where, values in lines]
    scored = [line for line in lines if "task" in line[1]]
    points, more = _points(scored)
    notes += [*more, *_not_drawn(name, scored)]
    losses = []
    for where, values in lines:
        tokens, flops = values.get("tokens"), values["flops_total"]
        if "results" in values:
            points.append(_point(tokens, flops, _harness_scores(values["results"], where, notes)))
        if "loss" in values:
            loss = _score(values, "loss", "", None, where, notes)
            losses += [(tokens, flops, loss.value)] if loss else []
    in_order = sorted((point for point in points if point.scores), key=lambda point: point.tokens or 0)
    return ExternalModel(name, path, in_order, sorted(losses, key=lambda loss: loss[0] or 0), parameters)


def _with_flops(values: Mapping[str, Any], parameters: float | None, where: str) -> Mapping[str, Any]:
    """A line with the FLOPs that it says, or those that follow from the size of its model."""
    tokens, flops = _tokens(values, where), _number(values, "flops_total", where)
    if flops is None and tokens is not None and parameters is not None:
        flops = 6.0 * parameters * tokens
    return {**values, "flops_total": flops}


def _harness_scores(results: Any, where: str, notes: list[str]) -> dict[str, Score]:
    if not isinstance(results, Mapping) or not all(isinstance(found, Mapping) for found in results.values()):
        raise DataError(f"{where}: results must map tasks to metrics, as lm-evaluation-harness writes them")
    scores = {}
    for task, metric in METRICS.items():
        # newer versions of the harness append the name of a filter to the metric's
        values = {key.partition(",")[0]: value for key, value in results.get(task, {}).items()}
        if metric in values:
            score = _score(values, metric, f"{metric}_stderr", values.get("limit"), f"{where}, {task}", notes)
            scores |= {task: score} if score else {}
    return scores


def of_stage(points: Iterable[ScoredPoint], stage: int) -> list[ScoredPoint]:
    """The points of one stage of a run."""
    return [point for point in points if point.stage == stage]
