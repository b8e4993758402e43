"""Figures of task scores: average and single accuracies, and Wikitext perplexity, against FLOPs or tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grow.report.axes import chart, rounded, with_axes, zoomed
from grow.report.charts import flops_per_token
from grow.runs.gather import Gathered
from grow.scores import AVERAGE, AVERAGED, LABELS, METRICS, WIKITEXT, ScoredPoint

HOW_TO_SCORE = "train with zero_shot.tasks, or score checkpoints with `scripts/evaluate.py CKPT --out RUN/evals.jsonl`"

INSET_FROM = 0.6  # of the longest training: perplexities at its end, which lie close together
UNTRAINED = 2.0  # times the worst final perplexity: what lies above is not shown


@dataclass(frozen=True)
class Scored:
    """A model with task scores, its own or somebody else's."""

    name: str
    role: str
    style: int
    points: Sequence[ScoredPoint]


def scored_models(gathered: Gathered, styles: dict[str, int]) -> list[Scored]:
    """Every model with at least one score."""
    ours = [Scored(model.name, model.role, styles[model.name], model.scores) for model in gathered.models]
    others = [Scored(model.name, "external", styles[model.name], model.points) for model in gathered.external]
    return [model for model in [*ours, *others] if model.points]


def score_charts(gathered: Gathered, styles: dict[str, int]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The charts that the scores can feed, and what is missing for the others."""
    models = scored_models(gathered, styles)
    size = flops_per_token(gathered.models) if not gathered.external else None
    drawn = {task: _score_chart(models, task, size) for task in (AVERAGE, *METRICS)}
    missing = []
    if drawn[AVERAGE] is None:
        there = {task for model in models for point in model.points for task in point.scores}
        lacking = ", ".join(LABELS[task] for task in AVERAGED if task not in there)
        needs = f"scores of all seven tasks of one checkpoint{f' (there are none of {lacking})' if lacking else ''}"
        missing.append({"figure": "Average accuracy", "needs": f"{needs}; {HOW_TO_SCORE}"})
    if not any(drawn[task] for task in METRICS if task != WIKITEXT):
        missing.append({"figure": "Accuracy of single tasks", "needs": f"scores of tasks; {HOW_TO_SCORE}"})
    if drawn[WIKITEXT] is None:
        missing.append({"figure": LABELS[WIKITEXT], "needs": f"scores of the task wikitext; {HOW_TO_SCORE}"})
    return [with_axes(found) for found in drawn.values() if found is not None], missing


def _score_chart(models: Sequence[Scored], task: str, flops_per_token: float | None) -> dict[str, Any] | None:
    """One task. The x axis is FLOPs where they are known of every model, else tokens."""
    with_task = [(model, [p for p in model.points if task in p.scores and _is_placed(p)]) for model in models]
    with_task = [(model, points) for model, points in with_task if points]
    is_flops = all(point.flops is not None for _, points in with_task for point in points)
    series = [_series(model, points, task, is_flops) for model, points in with_task]
    series = [each for each in series if each["points"] and each["points"][-1][0] > 0]
    if not series:
        return None
    is_perplexity = task == WIKITEXT
    drawn = chart(
        f"score-{task.replace('_', '-')}",
        "scores",
        LABELS[task] if task != AVERAGE else "Average accuracy",
        series,
        caption=_caption(with_task, task),
        quantity="flops" if is_flops else "tokens",
        y_label="perplexity per word" if is_perplexity else f"{METRICS.get(task, 'mean accuracy')}, per cent",
        # untrained models have perplexities of millions
        y_limit=UNTRAINED * max(each["points"][-1][1] for each in series) if is_perplexity else None,
        flops_per_token=flops_per_token if is_flops else None,
    )
    return {**drawn, "inset": _end_of(drawn)} if is_perplexity else drawn


def _end_of(drawn: dict[str, Any]) -> dict[str, Any] | None:
    """What an inset shows: the end of the lines, if at least two have a course there."""
    end = zoomed(drawn, INSET_FROM * max(series["points"][-1][0] for series in drawn["series"]))
    if sum(len(series["points"]) > 1 for series in end["series"]) < 2:
        return None
    return with_axes({**end, "flops_per_token": None})


def _is_placed(point: ScoredPoint) -> bool:
    """Whether anybody knows how far the training had come; if not, the score stands in the table alone."""
    return point.flops is not None or point.tokens is not None


def _series(model: Scored, points: Sequence[ScoredPoint], task: str, is_flops: bool) -> dict[str, Any]:
    scale = 1.0 if task == WIKITEXT else 100.0
    drawn = []
    for point in points:
        x, score = point.flops if is_flops else point.tokens, point.scores[task]
        if x is not None:
            value, error = scale * score.value, scale * (score.stderr or 0.0)
            interval = None if score.stderr is None else [rounded(value - error), rounded(value + error)]
            drawn.append((rounded(x), rounded(value), interval))
    drawn.sort(key=lambda each: each[0])
    return {
        "name": model.name,
        "role": model.role,
        "style": model.style,
        "kind": "dots",
        "points": [[x, y] for x, y, _ in drawn],
        "intervals": [interval for _, _, interval in drawn],
    }


def _caption(with_task: Sequence[tuple[Scored, Sequence[ScoredPoint]]], task: str) -> str:
    words = ["The mean of the seven accuracies." if task == AVERAGE else "Zero-shot.", "Bars: one standard error."]
    limited = [
        model.name for model, points in with_task if any(point.scores[task].limit is not None for point in points)
    ]
    if limited:
        words.append(f"Limited to the first documents of the set, so not comparable: {', '.join(limited)}.")
    return " ".join(words)
