"""The tables of docs/study.md from what `scripts/study.sh` trained.

    python -m benchmarks.study           reads out/study, writes results/study.json and the tables in docs/study.md
    python -m benchmarks.study --check   writes nothing; fails unless the tables are those of results/study.json

The seeds of a comparison are blocks, its arms treatments, and every arm has every seed (a randomized complete block
design): what is left of the losses without the means of arms and seeds is the noise, pooled over all arms. From that
come the intervals of differences, by Student's t and widened for all comparisons with one arm (Bonferroni). It assumes
that all arms are equally noisy; the loss of every seed is in the JSON, to be analysed in other ways.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import tables
from benchmarks.machine import describe
from benchmarks.result_files import RESULTS, write_result
from grow.compare.plan import PlannedRun, planned_runs
from grow.compare.settings import CompareConfig, read_settings, stages_of
from grow.layer_map import connection_rate_text
from grow.operators import operator, plan_growth
from lit_gpt.errors import DataError

ROOT = Path(__file__).resolve().parent.parent
SETTINGS, RESULT, PAGE = ROOT / "configs/study", RESULTS / "study.json", ROOT / "docs/study.md"
COMMON = "common"  # settings that the comparisons share
REFERENCES = ("scratch", "stack")
CONFIDENCE = 0.95


def noise(losses: np.ndarray) -> tuple[float, int]:
    """Standard deviation of one loss once the means of its arm and of its seed are known, and its degrees of freedom.

    losses: (arms, seeds).
    """
    left = losses - losses.mean(1, keepdims=True) - losses.mean(0, keepdims=True) + losses.mean()
    degrees = (losses.shape[0] - 1) * (losses.shape[1] - 1)
    return math.sqrt(float((left**2).sum()) / degrees), degrees


def half_width(losses: np.ndarray) -> float:
    """Of the interval of a difference of two arms' means that holds for all differences to one of them together."""
    from scipy.stats import t

    deviation, degrees = noise(losses)
    each = 1 - (1 - CONFIDENCE) / (losses.shape[0] - 1)
    return float(t.ppf((1 + each) / 2, degrees)) * deviation * math.sqrt(2 / losses.shape[1])


def collect(names: Iterable[str]) -> dict[str, Any]:
    """What is known of every comparison that was trained to its end.

    Raises:
        DataError: the results of one are of other settings than those that are here.
    """
    found = {}
    for name in names:
        path = SETTINGS / f"{name}.yaml"
        config = read_settings(path)
        ranked = ROOT / config.out_dir / f"{name}.json"
        if ranked.is_file():
            found[name] = _comparison(config, json.loads(ranked.read_text(encoding="utf-8")), name)
    return found


def _comparison(config: CompareConfig, ranked: Mapping[str, Any], name: str) -> dict[str, Any]:
    arms = {arm["name"]: arm for arm in ranked["arms"]}
    if list(ranked["seeds"]) != config.seeds or arms.keys() != config.arms.keys():
        raise DataError(f"the results of {name} are not those of configs/study/{name}.yaml; train it again")
    planned = {run.name: run for run in planned_runs(config, config.seeds[0])}
    rows = [{**_kept(arm), **_planned(planned[arm["name"]], config.arms[arm["name"]])} for arm in arms.values()]
    losses = np.array([row["losses"] for row in rows])
    deviation, degrees = noise(losses)
    return {
        "measured": ranked["measured"],
        "seeds": ranked["seeds"],
        "arms": rows,
        "noise": deviation,
        "degrees_of_freedom": degrees,
        "half_width": half_width(losses),
        "out_dir": config.out_dir,
        "runs": ranked["runs"],
        "versions": ranked["versions"],
    }


def _kept(arm: Mapping[str, Any]) -> dict[str, Any]:
    return {key: arm[key] for key in ("name", "losses", "spike", "speedup", "speedup_is_bound", "flops")}


def _planned(run: PlannedRun, arm: Mapping[str, Any]) -> dict[str, Any]:
    """Training tokens with those of the base, and the connection rate of what grew in depth in one hop."""
    tokens, stages = run.tokens, stages_of(arm)
    if run.base is None:
        return {"tokens": tokens, "connection_rate": None}
    tokens += run.base.tokens
    if len(stages) > 1 or operator(stages[0]["operator"]).axis != "depth":
        return {"tokens": tokens, "connection_rate": None}
    src, layer_map = run.base.stages[-1].config, stages[0].get("layer_map")
    size = {"n_layer": run.stages[-1].config.n_layer} if layer_map is None else {"layer_map": layer_map}
    plan = plan_growth(stages[0]["operator"], src, **size)
    return {"tokens": tokens, "connection_rate": connection_rate_text(plan.layer_map)}


def cpu_hours(comparisons: Mapping[str, Any]) -> tuple[float, int]:
    """CPU time of all runs, one that several comparisons share once, and of how many runs nobody measured it."""
    runs = {
        (found["out_dir"], run["seed"], run["name"]): run["cpu_seconds"]
        for found in comparisons.values()
        for run in found["runs"]
    }
    known = [seconds for seconds in runs.values() if seconds is not None]
    return sum(known) / 3600, len(runs) - len(known)


def table(found: Mapping[str, Any]) -> str:
    """The arms of a comparison in order of their loss, in Markdown."""
    means = {arm["name"]: float(np.mean(arm["losses"])) for arm in found["arms"]}
    references = [name for name in REFERENCES if name in means]
    with_rate = len({arm["connection_rate"] for arm in found["arms"]}) > 3
    head = ["arm", *(["R_c"] if with_rate else []), "loss", *(f"− {name}" for name in references)]
    head += ["at growth", "speed-up", "tokens"]
    rows = []
    for arm in sorted(found["arms"], key=lambda arm: means[arm["name"]]):
        mean = means[arm["name"]]
        cells = [arm["name"], *([arm["connection_rate"] or "–"] if with_rate else []), f"{mean:.4f}"]
        cells += ["–" if name == arm["name"] else f"{mean - means[name]:+.4f}" for name in references]
        cells += [_mean(arm["spike"], "+.2f"), _speedup(arm, len(found["seeds"])), f"{arm['tokens'] / 1e3:,.0f} k"]
        rows.append(cells)
    seeds = ", ".join(map(str, found["seeds"]))
    note = (
        f"{found['measured'].capitalize()}, nats per token, seeds {seeds}. Differences from "
        f"**{found['half_width']:.4f}** on are told apart: 95 % for all differences to one arm together, from a noise "
        f"of {found['noise']:.4f} with {found['degrees_of_freedom']} degrees of freedom."
    )
    return f"{tables.markdown(head, rows)}\n\n{note}"


def _mean(found: Mapping[str, Any] | None, form: str) -> str:
    return "–" if found is None else format(found["mean"], form)


def _speedup(arm: Mapping[str, Any], n_seeds: int) -> str:
    found = arm["speedup"]
    if found is None:
        return "–"
    seeds = "" if found["n"] == n_seeds else f" ({found['n']} of {n_seeds})"
    return f"{'≥ ' if arm['speedup_is_bound'] else ''}{100 * found['mean']:+.0f} %{seeds}"


def table_of(comparisons: Mapping[str, Any]) -> Callable[[str], str]:
    """Name of a comparison -> its table."""
    return lambda name: table(comparisons[name]) if name in comparisons else "Not trained yet."


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The tables of docs/study.md.")
    parser.add_argument("--check", action="store_true", help="fail unless the tables are those of results/study.json")
    if parser.parse_args(arguments).check:
        comparisons = json.loads(RESULT.read_text(encoding="utf-8"))["comparisons"]
        return tables.check(PAGE, table_of(comparisons), "python -m benchmarks.study")
    names = sorted(path.stem for path in SETTINGS.glob("*.yaml") if path.stem != COMMON)
    comparisons = collect(names)
    hours, unmeasured = cpu_hours(comparisons)
    result = {"machine": describe(), "cpu_hours": hours, "runs_of_unknown_cost": unmeasured}
    write_result(RESULT, {**result, "comparisons": comparisons})
    tables.renew(PAGE, table_of(comparisons))
    left = [name for name in names if name not in comparisons]
    sys.stdout.write(
        f"{len(comparisons)} comparisons, {hours:.2f} CPU-hours; not trained: {', '.join(left) or 'none'}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
