"""Run logs as loss curves: reading metrics.jsonl and evals.jsonl, smoothing, FLOPs at equal loss, speed-up."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lit_gpt.errors import DataError

METRICS_FILE = "metrics.jsonl"
EVALS_FILE = "evals.jsonl"
OPTIONAL = {"bpb", "time", "stderr", "n", "limit", "data"}
KINDS = {
    **dict.fromkeys(("step", "stage", "stage_step", "tokens", "n", "limit"), "a whole number"),
    **dict.fromkeys(("flops_total", "seconds", "time", "bpb", "stderr"), "a number"),
    **dict.fromkeys(("stage_name", "when", "set", "metric", "data"), "text"),
}
"""What every field but the measured one must be."""
WINDOW_SHARE = 0.1  # of the shortest curve: less leaves the noise of small batches in, more blurs the end of the run
WINDOW_INTERVALS = 2  # at least this many log intervals, or the smoothed curve would be the logged one


@dataclass(frozen=True)
class Metric:
    """One line of metrics.jsonl. Totals count from the start of the run; `flops_total` also holds its parents."""

    step: int
    stage: int
    stage_name: str
    stage_step: int
    tokens: int
    flops_total: float
    loss: float
    """Nats per token, the mean since the line before."""
    bpb: float | None
    seconds: float
    time: float | None
    """Unix time."""


@dataclass(frozen=True)
class Evaluation:
    """One line of evals.jsonl: one metric of one validation set at one moment."""

    step: int
    stage: int
    stage_name: str
    when: str
    tokens: int
    flops_total: float
    set: str
    metric: str
    value: float | None
    """None only for bits per byte of text that has no bytes."""
    stderr: float | None
    n: int | None
    """Tokens that were counted."""
    limit: int | None
    data: str | None
    """Fingerprint of the set."""


@dataclass(frozen=True)
class RunLog:
    """Everything a run wrote about itself while it trained."""

    metrics: tuple[Metric, ...]
    evaluations: tuple[Evaluation, ...]
    notes: tuple[str, ...]
    """What was left out while reading, in sentences."""


Record = TypeVar("Record", Metric, Evaluation)


def read_run_log(run_dir: Path) -> RunLog:
    """Both logs of a run directory. A half-written last line, which a killed run leaves, is dropped with a note.

    Raises:
        FileNotFoundError: there is no such directory.
        DataError: no metrics in it, a damaged line, or a loss that is not a number.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir}: no such run directory; give the folder that holds {METRICS_FILE}")
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise DataError(f"{run_dir} has no {METRICS_FILE}: it is not a run directory, or the run has not begun")
    metrics, notes = _read_records(path, Metric, "loss")
    if not metrics:
        raise DataError(f"{path} has no complete line: the run has not logged a step yet")
    evaluations, more_notes = _read_records(run_dir / EVALS_FILE, Evaluation, "value")
    return RunLog(tuple(_without_repeats(metrics)), tuple(evaluations), tuple(notes + more_notes))


def _read_records(path: Path, kind: type[Record], value_field: str) -> tuple[list[Record], list[str]]:
    if not path.is_file():
        return [], []
    lines, notes = read_json_lines(path)
    records, skipped = [], 0
    for where, values in lines:
        if kind is Evaluation and "task" in values:
            continue  # the score of a task, not a loss on a set; see grow/scores.py
        if kind is Metric and values.get("loss", 0) is None:
            skipped += 1  # by the guards: no step of this interval was made, so there is no loss, and the run went on
            continue
        records.append(_record(values, kind, value_field, where))
    if skipped:
        what = f"{skipped} line{'s' * (skipped != 1)} without a loss"
        notes.append(f"{path.parent.name}/{path.name}: {what} left out; every step there was skipped.")
    return records, notes


def read_json_lines(path: Path) -> tuple[list[tuple[str, Mapping[str, Any]]], list[str]]:
    """Every object of a file of JSON lines with where it stands, and notes on what was left out.

    A half-written last line, which a killed program leaves, is dropped with a note; empty ones say nothing.

    Raises:
        DataError: another line is not a JSON object.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    found, notes = [], []
    for number, line in lines:
        where = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            if number < lines[-1][0]:
                raise DataError(f"{where} is not JSON ({error.msg}); the file was damaged") from error
            notes.append(f"{path.parent.name}/{path.name}: the last line is incomplete and was left out.")
            break
        if not isinstance(values, Mapping):
            raise DataError(f"{where} is not a JSON object; the file was damaged")
        found.append((where, values))
    return found, notes


def _record(values: Mapping[str, Any], kind: type[Record], value_field: str, where: str) -> Record:
    fields = [field.name for field in dataclasses.fields(kind)]
    missing = [name for name in fields if name not in values and name not in OPTIONAL]
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)}; it was not written by this version of pretrain")
    value, metric = values[value_field], values.get("metric", "loss")
    if not _is_number(value) and (metric == "loss" or value is not None):
        raise DataError(
            f"{where}: the {metric} of step {values['step']} is {value}; the run diverged "
            f"there, so its curve ends in no loss to compare. Leave this run out or train it again"
        )
    for name in fields:
        is_absent = name in OPTIONAL and values.get(name) is None
        if name != value_field and not is_absent and not _is(KINDS[name], values[name]):
            raise DataError(f"{where}: {name} is {values[name]!r}, not {KINDS[name]}; the file was damaged")
    return kind(**{name: values.get(name) for name in fields})


def _is(kind: str, value: Any) -> bool:
    if kind == "text":
        return isinstance(value, str)
    return type(value) is int if kind == "a whole number" else _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _without_repeats(metrics: Sequence[Metric]) -> list[Metric]:
    """Steps that a resumed run took again replace what it had logged of them before."""
    kept: list[Metric] = []
    for metric in metrics:
        while kept and kept[-1].step >= metric.step:
            kept.pop()
        kept.append(metric)
    return kept


@dataclass(frozen=True)
class Curve:
    """Losses of one model along its training."""

    tokens: np.ndarray
    """(n,) int64, increasing: tokens trained when the loss was noted, counted from wherever the run counts."""
    flops: np.ndarray
    """(n,) float64, increasing: training FLOPs so far, the base model's included."""
    loss: np.ndarray
    """(n,) float64, nats per token."""
    start_tokens: int = 0
    """Where this model's training began, on the scale of `tokens`."""

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.flops) == len(self.loss) > 0
        if np.any(np.diff(self.tokens) <= 0) or np.any(np.diff(self.flops) <= 0) or self.tokens[0] < self.start_tokens:
            raise DataError("the tokens and FLOPs of a run must grow from line to line; its log is damaged or mixed up")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def length_tokens(self) -> int:
        """Tokens from the start of this model's training to the last loss."""
        return int(self.tokens[-1] - self.start_tokens)

    @property
    def interval_tokens(self) -> int:
        """The most tokens between two losses."""
        return int(np.diff(self.tokens, prepend=self.start_tokens).max())


def training_curve(metrics: Sequence[Metric], start_tokens: int) -> Curve:
    """The logged losses of one stage, in order."""
    return Curve(
        np.array([metric.tokens for metric in metrics], dtype=np.int64),
        np.array([metric.flops_total for metric in metrics], dtype=np.float64),
        np.array([metric.loss for metric in metrics], dtype=np.float64),
        start_tokens,
    )


def validation_curve(evaluations: Sequence[Evaluation], set_name: str) -> Curve | None:
    """The losses on one validation set, in order; of several at the same moment the last. None when there are none."""
    points = {
        evaluation.tokens: evaluation
        for evaluation in evaluations
        if evaluation.set == set_name and evaluation.metric == "loss"
    }
    if not points:
        return None
    ordered = [points[tokens] for tokens in sorted(points)]
    tokens = np.array([point.tokens for point in ordered], dtype=np.int64)
    flops, loss = (np.array([getattr(point, name) for point in ordered], float) for name in ("flops_total", "value"))
    return Curve(tokens, flops, loss, int(tokens[0]))


def smooth(curve: Curve, window_tokens: float) -> Curve:
    """The mean loss of the last `window_tokens`, wherever a whole window lies behind.

    A logged loss is the mean of its interval, so the integral of the loss over tokens is piecewise linear, and a
    window may begin inside an interval: the result hardly depends on how often the run logged.

    Raises:
        ValueError: the window is not positive, or longer than the curve.
    """
    if not 0 < window_tokens <= curve.length_tokens:
        raise ValueError(f"a window of {window_tokens:g} tokens does not fit a curve of {curve.length_tokens} tokens")
    edges = np.concatenate([[curve.start_tokens], curve.tokens]).astype(np.float64)
    integral = np.concatenate([[0.0], np.cumsum(curve.loss * np.diff(edges))])
    whole = curve.tokens - window_tokens >= curve.start_tokens
    ends = curve.tokens[whole].astype(np.float64)
    means = (np.interp(ends, edges, integral) - np.interp(ends - window_tokens, edges, integral)) / window_tokens
    return Curve(curve.tokens[whole], curve.flops[whole], means, curve.start_tokens)


def default_window(curves: Sequence[Curve]) -> float:
    """The one window, in tokens, in which all these curves are smoothed; at most half of the shortest."""
    shortest = min(curve.length_tokens for curve in curves)
    wanted = max(WINDOW_SHARE * shortest, WINDOW_INTERVALS * max(curve.interval_tokens for curve in curves))
    return min(wanted, shortest / 2)


@dataclass(frozen=True)
class Crossing:
    """Where a curve first comes down to a loss."""

    flops: float
    at_most: bool
    """The curve was below the loss from its first point on, so the crossing lies there or before."""


def first_crossing(curve: Curve, loss: float) -> Crossing | None:
    """FLOPs at which the curve first reaches `loss`, log FLOPs interpolated; None if it never does.

    The first crossing of a curve is that of its running minimum, so later noise cannot move it. Points that cost
    nothing (an untrained model) have no logarithm and are passed over.
    """
    paid = curve.flops > 0
    flops, losses = curve.flops[paid], curve.loss[paid]
    reached = np.flatnonzero(losses <= loss)
    if not len(reached):
        return None
    at = reached[0]
    if at == 0:
        return Crossing(float(flops[0]), at_most=bool(losses[0] < loss))
    before, after = flops[at - 1], flops[at]
    part = (losses[at - 1] - loss) / (losses[at - 1] - losses[at])
    return Crossing(float(min(before * (after / before) ** part, after)), at_most=False)


@dataclass(frozen=True)
class Speedup:
    """FLOPs of a baseline over FLOPs of a grown model, minus one, at equal loss (arXiv 2405.15319, eq. 48)."""

    speedup: float | None
    """0.5: the baseline needs half as much again. Negative: growth lost. None: see `reason`."""
    target_loss: float | None
    flops_baseline: float | None
    flops_grown: float | None
    """The base model's FLOPs included."""
    reached: bool = False
    """Whether the grown model came down to the baseline's final loss; if not, its own final loss is the target."""
    lower_bound: bool = False
    """The grown curve was below the target from its first point on, so the true value is at least this."""
    reason: str | None = None


def loss_at(curve: Curve, flops: float) -> float | None:
    """The loss after these FLOPs, log FLOPs interpolated; None outside the curve, for nothing is extrapolated."""
    paid = curve.flops > 0
    if not np.any(paid) or not curve.flops[paid][0] <= flops <= curve.flops[-1]:
        return None
    return float(np.interp(np.log(flops), np.log(curve.flops[paid]), curve.loss[paid]))


def speedup(grown: Curve, baseline: Curve) -> Speedup:
    """Compare two curves that were smoothed in the same way; nothing is extrapolated.

    The target is the baseline's final loss if the grown model reached it, else the grown model's final loss.
    """
    target = float(baseline.loss[-1])
    reached = first_crossing(grown, target) is not None
    return speedup_at(grown, baseline, target if reached else float(grown.loss[-1]), reached=reached)


def speedup_at(grown: Curve, baseline: Curve, target: float, *, reached: bool = True) -> Speedup:
    """The speed-up at one loss; `reached` is passed on."""
    if np.count_nonzero(baseline.flops > 0) < 2:
        return no_speedup("the baseline was measured only once after its start; set validation.every_steps")
    needed, spent = first_crossing(baseline, target), first_crossing(grown, target)
    if spent is None and needed is not None:
        return dataclasses.replace(no_speedup("not reached"), target_loss=target, flops_baseline=needed.flops)
    if needed is None or spent is None or needed.at_most:
        ranges = [f"{curve.loss[0]:.4f} to {curve.loss[-1]:.4f}" for curve in (baseline, grown)]
        return no_speedup(f"the loss ranges do not overlap: baseline {ranges[0]}, grown model {ranges[1]}")
    return Speedup(needed.flops / spent.flops - 1, target, needed.flops, spent.flops, reached, spent.at_most)


def no_speedup(reason: str) -> Speedup:
    """What stands where a comparison is not possible."""
    return Speedup(None, None, None, None, reason=reason)
