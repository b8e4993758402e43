"""A ranking for a terminal and in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from grow.compare.settings import FROM_SCRATCH
from grow.report.text import columns

if TYPE_CHECKING:
    from grow.compare.plan import PlannedRun, PlannedStage
    from grow.compare.ranking import Estimate, RankedArm, Ranking

PLANNED_HEAD = ("seed", "run", "stages", "steps", "tokens", "FLOPs", "with its base", "")
HEAD = ("", "loss", "behind the first", "against scratch", "after growth", "speed-up", "FLOPs")


def number(found: Estimate | None, digits: int = 4, *, signed: bool = False, scale: float = 1.0) -> str:
    """`3.5911 ± 0.0042`; an en dash where nothing was measured."""
    if found is None:
        return "–"
    sign = "+" if signed else ""
    error = "" if found.stderr is None else f" ± {scale * found.stderr:.{digits}f}"
    return f"{scale * found.mean:{sign}.{digits}f}{error}"


def speedup(arm: RankedArm, n_seeds: int) -> str:
    """`≥ +54 ± 3 % (2 of 3)`: a bound, and in how many seeds there was one."""
    if arm.speedup is None:
        return "–"
    seeds = "" if arm.speedup.n == n_seeds else f" ({arm.speedup.n} of {n_seeds})"
    return ("≥ " if arm.speedup_is_bound else "") + number(arm.speedup, 0, signed=True, scale=100.0) + f" %{seeds}"


def rows(ranking: Ranking) -> Iterator[tuple[str, ...]]:
    """Cells of every arm, under HEAD."""
    for place, arm in enumerate(ranking.arms):
        yield (
            arm.name,
            number(arm.loss),
            "–" if place == 0 else number(arm.behind_best, signed=True),
            number(arm.against_scratch, signed=True),
            number(arm.spike, signed=True),
            speedup(arm, len(ranking.seeds)),
            f"{arm.flops:.3g}",
        )


def sentences(ranking: Ranking) -> list[str]:
    """What may be concluded."""
    first, seeds = ranking.arms[0], len(ranking.seeds)
    close = [arm.name for arm in ranking.arms[1:] if not arm.is_told_apart]
    found = [f"{first.name} ends lowest: {number(first.loss)} nats per token ({ranking.measured}, {seeds} seeds)."]
    if seeds < 2:
        return [*found, "One seed says nothing about chance; give several.", *ranking.notes]
    if close:
        found.append(f"Not told apart from it with 95 % confidence in all arms together: {', '.join(close)}.")
    scratch = next((arm for arm in ranking.arms if arm.name == FROM_SCRATCH), None)
    if scratch is not None and first is not scratch:
        found.append(_against_scratch(first, scratch))
    if ranking.unequal:
        listed = ", ".join(f"{arm.name} ({arm.flops:.3g})" for arm in ranking.unequal)
        found.append(f"Not of equal FLOPs with the others: {listed}.")
    return [*found, *ranking.notes]


def _against_scratch(first: RankedArm, scratch: RankedArm) -> str:
    found = first.against_scratch
    assert found is not None
    wins = sum(a < b for a, b in zip(first.losses, scratch.losses, strict=True))
    seeds = f"{wins} of {found.n} seeds"
    return f"Against training from scratch for the same FLOPs that is {number(found, signed=True)}, lower in {seeds}."


def table(ranking: Ranking) -> str:
    """The ranking as columns of text."""
    return columns([HEAD, *rows(ranking)])


def planned_rows(runs: Sequence[tuple[PlannedRun, str]]) -> Iterator[tuple[str, ...]]:
    """Cells of every run and what became of it, under PLANNED_HEAD."""
    for run, state in runs:
        total = None if run.behind_flops is None else run.flops + run.behind_flops
        yield (
            str(run.seed),
            run.name,
            ", ".join(_stage(stage) for stage in run.stages),
            " + ".join(f"{stage.steps:,}" for stage in run.stages),
            f"{run.tokens:,}",
            f"{run.flops:.3g}",
            "–" if total is None else f"{total:.3g}",
            state,
        )


def _stage(stage: PlannedStage) -> str:
    sizes = f"{stage.config.n_layer}L{stage.config.n_embd}H"
    return f"{stage.operator} to {sizes}" if stage.operator else sizes


def left_to_do(runs: Sequence[tuple[PlannedRun, str]]) -> str:
    """How much of it is not done."""
    left = [run for run, state in runs if state not in ("done", "not needed")]
    tokens, flops = sum(run.tokens for run in left), sum(run.flops for run in left)
    return f"{len(left)} of {len(runs)} runs are left: {tokens:,} tokens, {flops:.3g} FLOPs."
