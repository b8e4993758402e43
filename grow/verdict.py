"""What a comparison of two checkpoints means, given what the history of the later one says of its growth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from grow.check import Comparison, inspect_checkpoint
from grow.operators import function_of
from grow.plan import GrowthPlan
from grow.registry import FUNCTION, PRESERVING
from lit_gpt.checkpoint import manifest_sha256

ROUNDING = 1e-4  # of the largest logit; fp32 rounding in growth stays a hundred times below


@dataclass(frozen=True)
class Promise:
    """What the growths between two checkpoints do to the function."""

    operators: tuple[str, ...] = ()
    """Oldest first; empty: no history leads from the one to the other."""
    function: str | None = None
    """Key of FUNCTION, the weakest of all growths; None: nothing is known."""
    trained: bool = False
    """Whether tokens were trained on since the first of these growths."""


def promise(src: Path, dst: Path) -> Promise:
    """From `src` to `dst`, by the history of the latter."""
    found = inspect_checkpoint(dst)
    parents = [record["parent"] for record in found["history"]]
    parent = manifest_sha256(src)
    if parent not in parents:
        return Promise()
    records = found["history"][parents.index(parent) :]
    functions = [function_of(GrowthPlan.from_dict(record["plan"])) for record in records]
    progress = found["progress"]
    tokens = progress.get("tokens", 0) + progress.get("parent_tokens", 0)
    return Promise(
        tuple(record["operator"] for record in records),
        max(functions, key=list(FUNCTION).index),
        tokens > (records[0]["tokens"] or 0),
    )


def verdict(found: Comparison, promised: Promise) -> str:
    """One line: kept or not, and whether that was to be expected."""
    kept = found.max_abs_logit_gap <= ROUNDING * found.max_abs_logit
    state = "kept, up to rounding" if found.max_abs_logit_gap else "kept, to the bit"
    state = state if kept else "not kept"
    if promised.function is None:
        return f"{state}; the history of DST does not name SRC as a parent, so nothing was promised"
    by = f"{', '.join(promised.operators)} keeps {FUNCTION[promised.function]}"
    if promised.trained:
        return f"{state}; it was trained since, before which {by}"
    if promised.function not in PRESERVING:
        return f"{state}, and not expected to be: {by}"
    if kept or promised.function == "up to eps":
        return f"{state}, as expected: {by}"
    return f"NOT KEPT, although {by}; weights stored in bfloat16 round shares, see --dtype float32 of grow apply"
