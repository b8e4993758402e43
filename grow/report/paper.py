"""The paper's printed numbers (arXiv 2405.15319v2), to stand beside models of the same size."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from typing import Any

from grow.scores import AVERAGE, Score, average

SAME_SIZE = 0.15  # names of sizes are round: "410M" counts 0.37e9 to 0.41e9 parameters, depending on the vocabulary


@cache
def _numbers() -> dict[str, Any]:
    return json.loads(files("grow.report").joinpath("paper.json").read_text(encoding="utf-8"))


def models_like(sizes: Iterable[float], *, operators: bool) -> list[dict[str, Any]]:
    """Printed models of about one of these sizes; `operators` takes those of the comparison of operators, else others.

    Each has name, where, parameters, tokens, loss, speedup (a share) and scores as `grow.scores` has them; the average
    is computed, for one of the printed ones is not the mean of its row.
    """
    wanted = list(sizes)
    found = []
    for model in _numbers()["models"]:
        if (model["speedup"] is not None) == operators and _is_like(model["parameters"], wanted):
            scores = {
                task: Score(value if task == "wikitext" else value / 100) for task, value in model["scores"].items()
            }
            mean = average(scores)
            scores |= {AVERAGE: mean} if mean else {}
            speedup = None if model["speedup"] is None else model["speedup"] / 100
            found.append({**model, "scores": scores, "speedup": speedup})
    return found


def speedups_like(sizes: Iterable[float]) -> list[dict[str, Any]]:
    """Printed speed-ups of stacking at about one of these sizes, as shares."""
    wanted = list(sizes)
    return [
        {**each, "speedup": each["speedup"] / 100}
        for each in _numbers()["speedups"]
        if _is_like(each["parameters"], wanted)
    ]


def _is_like(parameters: float, sizes: Iterable[float]) -> bool:
    return any(abs(math.log(parameters / size)) <= math.log(1 + SAME_SIZE) for size in sizes)
