"""The paper's printed numbers, see grow/paper.py, to stand beside models of the same size."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from grow.paper import PrintedSpeedup, printed_models, printed_speedups
from grow.scores import AVERAGE, Score, average

SAME_SIZE = 0.15  # names of sizes are round: "410M" counts 0.37e9 to 0.41e9 parameters, depending on the vocabulary


def models_like(sizes: Iterable[float], *, operators: bool) -> list[dict[str, Any]]:
    """Printed models of about one of these sizes; `operators` takes those of the comparison of operators, else others.

    Each has name, where, parameters, tokens, loss, speedup (a share) and scores as `grow.scores` has them; the average
    is computed, for one of the printed ones is not the mean of its row.
    """
    wanted = list(sizes)
    found = []
    for model in printed_models():
        if (model["group"] == "operators") == operators and _is_like(model["parameters"], wanted):
            scores = {
                task: Score(value if task == "wikitext" else value / 100) for task, value in model["scores"].items()
            }
            mean = average(scores)
            scores |= {AVERAGE: mean} if mean else {}
            speedup = None if model["speedup"] is None else model["speedup"] / 100
            found.append({**model, "scores": scores, "speedup": speedup})
    return found


def speedups_like(sizes: Iterable[float]) -> list[PrintedSpeedup]:
    """Printed speed-ups of stacking at about one of these sizes."""
    wanted = list(sizes)
    return [each for each in printed_speedups() if _is_like(each.parameters, wanted)]


def _is_like(parameters: float, sizes: Iterable[float]) -> bool:
    return any(abs(math.log(parameters / size)) <= math.log(1 + SAME_SIZE) for size in sizes)
