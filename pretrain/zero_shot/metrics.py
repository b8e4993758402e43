"""From log-likelihoods to scores with their standard errors and what chance would give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import grow.scores
from grow.scores import AVERAGE, AVERAGED
from pretrain.evaluate import ratio_stderr
from pretrain.zero_shot.examples import Example, Examples
from pretrain.zero_shot.scoring import LOG_PROB, MISSES

ACCURACIES = ("acc", "acc_norm")
LARGEST = 700.0  # exponent of a perplexity that is still a number


@dataclass(frozen=True)
class Score:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    """Of an accuracy a fraction, not per cent."""
    stderr: float | None
    """None for a single document."""
    chance: float | None
    """What guessing scores; None where that means nothing."""
    n: int
    """Documents."""
    limit: int | None
    """How many were wanted of more; None: all of the file."""
    data: str | None = None
    """sha256 of the file."""
    task_version: str | None = None
    """That of `Task`; None of an average."""

    @property
    def is_limited(self) -> bool:
        return self.limit is not None


def scores_of(examples: Examples, found: np.ndarray, data: str | None = None) -> list[Score]:
    """All metrics of a task.

    Args:
        examples: n documents.
        found: (n_requests, 2), from `scoring.score`.
        data: sha256 of the file they are from.
    """
    ends = np.cumsum([len(example.requests) for example in examples.examples])
    parts = np.split(found, ends[:-1])
    n, scores = len(parts), []
    for metric in examples.task.metrics:
        sums, counts = _counted(metric, examples.examples, parts)
        value, stderr = float(sums.sum() / counts.sum()), ratio_stderr(sums, counts)
        guessed = chance(examples) if metric in ACCURACIES else None
        if metric == "bits_per_byte":
            value, stderr = value / math.log(2), stderr and stderr / math.log(2)
        elif metric not in ACCURACIES:
            value = math.exp(min(value, LARGEST))
            stderr = stderr and stderr * value  # to first order
        task = examples.task
        scores.append(Score(task.name, metric, value, stderr, guessed, n, examples.limit, data, task.version))
    return scores


def _counted(metric: str, examples: Sequence[Example], parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(n,) and (n,) float64: each document's part of a metric, and what that is counted in.

    Documents right of documents, nats of tokens' words or bytes; the metric is the ratio of their sums.
    """
    log_probs = [part[:, LOG_PROB] for part in parts]
    ones = np.ones(len(parts))
    if metric == "acc" and examples[0].answer is None:
        return np.array([part[0, MISSES] == 0 for part in parts], dtype=float), ones
    if metric in ACCURACIES:
        divisors = [each.n_chars if metric == "acc_norm" else (1,) for each in examples]
        best = [int(np.argmax(each / np.array(by))) for each, by in zip(log_probs, divisors, strict=True)]
        return np.array([each.answer == number for each, number in zip(examples, best, strict=True)], float), ones
    nats = -np.array([each.sum() for each in log_probs])
    if metric == "perplexity":
        return nats, ones
    field = "n_words" if metric == "word_perplexity" else "n_bytes"
    return nats, np.array([getattr(each, field) for each in examples], dtype=float)


def chance(examples: Examples) -> float:
    """Accuracy of guessing: one of the choices; never the right one of all words."""
    return float(np.mean([0.0 if each.answer is None else 1 / len(each.requests) for each in examples.examples]))


def average(scores: Sequence[Score]) -> Score | None:
    """The paper's average: of the first metrics of its seven tasks; None unless all are there."""
    first = {score.task: score for score in reversed(scores)}
    mean = grow.scores.average(
        {task: grow.scores.Score(score.value, score.stderr, score.limit) for task, score in first.items()}
    )
    if mean is None:
        return None
    seven = [first[name] for name in AVERAGED]
    guessed = float(np.mean([score.chance or 0.0 for score in seven]))
    n = sum(score.n for score in seven)
    return Score(AVERAGE, "acc or acc_norm", mean.value, mean.stderr, guessed, n, mean.limit)


def shown(value: float, percent: bool) -> str:
    """A score, or its error, for people: accuracies in per cent."""
    return f"{100 * value:.2f} %" if percent else f"{value:.4g}" if value >= 1e5 else f"{value:.3f}"


def describe_scores(scores: Sequence[Score]) -> str:
    """The first metric of every task on one line, and how many documents where those are not all."""
    first = {score.task: score for score in reversed(scores)}
    values = [f"{score.task} {shown(score.value, score.chance is not None)}" for score in reversed(first.values())]
    limits = sorted({score.limit for score in scores if score.limit is not None})
    limited = f" (limited to the first {limits[0]:,} documents of a task)" if limits else ""
    return ", ".join(values) + limited
