"""What a run writes about itself: JSON lines, TensorBoard, and a progress bar or plain lines on the terminal."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from grow.curves import EVALS_FILE, METRICS_FILE
from lit_gpt.atomic import write_atomically
from pretrain.heartbeat import ENDED, Heartbeat
from pretrain.run_lock import check_held

if TYPE_CHECKING:
    from lightning_fabric.loggers import TensorBoardLogger

    from pretrain.state import TrainState

TENSORBOARD_FOLDER = "tensorboard"


def cut_back(path: Path, stage: int, step: int, owed: str | None = None) -> None:
    """Drop the lines after (stage, step) and a half-written one, so that a resumed run does not repeat itself.

    owed: `when` of a validation at (stage, step) that is about to be measured again.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # a killed run may leave half a line
        moment = (record["stage"], record["step"])
        is_owed = moment == (stage, step) and owed is not None and record.get("when") == owed
        of_no_run = record["stage"] is None  # scores of another model, which somebody has put here
        if of_no_run or (moment <= (stage, step) and not is_owed):
            kept.append(line)
    write_atomically(path, "".join(f"{line}\n" for line in kept).encode())


class Log(Protocol):
    """Where the records of a run go."""

    def metrics(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""

    def evaluation(self, records: list[dict[str, Any]]) -> None:
        """Lines of evals.jsonl."""

    def alive(self, doing: str, state: TrainState) -> None:
        """The run is at work; cheap enough for every step."""

    def close(self) -> None:
        """Nothing more will come."""


class NoLog:
    """Of processes beside the first, which logs for all."""

    def metrics(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def evaluation(self, records: list[dict[str, Any]]) -> None:
        """Nothing."""

    def alive(self, doing: str, state: TrainState) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class RunLog:
    """Appends to metrics.jsonl, evals.jsonl and TensorBoard; one that fails is reported once and stops no run.

    Only a folder that was taken over does, as a DataError: see pretrain/run_lock.py.
    """

    def __init__(self, out_dir: Path, *, stage: int, step: int, tensorboard: bool, owed: str | None = None) -> None:
        """Continue the logs after (stage, step); stage 0 starts them anew. owed: see `cut_back`."""
        self.out_dir = out_dir
        self._failed: set[str] = set()
        if stage == 0:
            shutil.rmtree(out_dir / TENSORBOARD_FOLDER, ignore_errors=True)
        for name in (METRICS_FILE, EVALS_FILE):
            cut_back(out_dir / name, stage, step, owed)
        self._heartbeat = Heartbeat(out_dir, check=lambda: check_held(out_dir))
        self._tensorboard = self._open_tensorboard(step) if tensorboard else None

    def metrics(self, record: dict[str, Any]) -> None:
        self._append(METRICS_FILE, record)
        numbers = {f"train/{key}": record[key] for key in ("loss", "lr", "grad_norm", "tokens_per_sec")}
        self._scalars({**numbers, "tokens": record["tokens"], "flops_total": record["flops_total"]}, record["step"])

    def evaluation(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            self._append(EVALS_FILE, record)
            # growth does not advance the step, so the values on both its sides would fall on one point
            suffix = "_after_growth" if record["when"] == "after_growth" else ""
            kind, measured_on = ("zero_shot", record["task"]) if "task" in record else ("validation", record["set"])
            name = f"{kind}/{measured_on}/{record['metric'].replace(' ', '_')}{suffix}"
            self._scalars({name: record["value"]}, record["step"])

    def alive(self, doing: str, state: TrainState) -> None:
        self._heartbeat.beat(doing, step=state.step_count, stage=state.stage, stage_step=state.stage_step)

    def close(self) -> None:
        self._heartbeat.beat(ENDED)
        if self._tensorboard is None:
            return
        try:
            self._tensorboard.finalize("success")
        except Exception as error:
            self._give_up_tensorboard(error)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        check_held(self.out_dir)
        try:
            with (self.out_dir / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            self._report(name, error)

    def _open_tensorboard(self, step: int) -> TensorBoardLogger | None:
        from lightning_fabric.loggers import TensorBoardLogger

        try:
            return TensorBoardLogger(self.out_dir, name=TENSORBOARD_FOLDER, version="", purge_step=step + 1)
        except Exception as error:
            self._give_up_tensorboard(error)
            return None

    def _scalars(self, values: dict[str, float | None], step: int) -> None:
        if self._tensorboard is None:
            return
        try:
            self._tensorboard.log_metrics({key: value for key, value in values.items() if value is not None}, step)
        except Exception as error:
            self._give_up_tensorboard(error)

    def _give_up_tensorboard(self, error: Exception) -> None:
        """It writes in a thread, and Fabric wraps what that met (a full disk, say) in a ValueError about the value."""
        self._tensorboard = None
        self._report("TensorBoard", error.__cause__ or error)

    def _report(self, name: str, error: BaseException) -> None:
        if name not in self._failed:
            self._failed.add(name)
            sys.stderr.write(f"warning: {name} cannot be written ({error}); training goes on without it\n")


class Progress:
    """One stage on the terminal: a bar where there is one, a plain line per log line elsewhere.

    The time left is the FLOPs left over the FLOPs per second of the last log intervals in which nothing was compiled,
    so a later, larger stage is charged at its own price.
    """

    def __init__(self, title: str, total_steps: int, done_steps: int, flops_left: float, shown: bool = True) -> None:
        self.title = title
        self.total_steps = total_steps
        self.flops_left = flops_left
        self._flops_per_sec: float | None = None
        self._bar = self._task = None
        if shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}")
            self._bar = Progress(
                *columns,
                TextColumn("{task.fields[status]}"),
                console=Console(stderr=True),
                redirect_stdout=sys.stdout.isatty(),
            )
            self._task = self._bar.add_task(title, total=total_steps, completed=done_steps, status="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, stage_step: int, flops: float) -> None:
        """After every optimizer step."""
        self.flops_left -= flops
        if self._bar is not None:
            self._bar.update(self._task, completed=stage_step)

    def status(
        self, stage_step: int, loss: float | None, tokens_per_sec: float, flops_per_sec: float, compile_secs: float = 0
    ) -> None:
        """After every log line. compile_secs: what went into compiling since the last one."""
        if not compile_secs:  # which does not go on, and may lie outside the steps that the rate is of
            previous = self._flops_per_sec or flops_per_sec
            self._flops_per_sec = 0.7 * previous + 0.3 * flops_per_sec
        left = format_seconds(self.flops_left / self._flops_per_sec) if self._flops_per_sec else "?"
        shown = "every step skipped" if loss is None else f"loss {loss:.4f}"
        compiling = f"  {compile_secs:.1f} s of compiling" if compile_secs else ""
        status = f"{shown}  {tokens_per_sec:,.0f} tokens/s{compiling}  {left} left in this run"
        if self._bar is not None:
            self._bar.update(self._task, status=status)
        else:
            say(f"[{time.strftime('%H:%M:%S')}] {self.title} {stage_step}/{self.total_steps}  {status}")


def say(line: str) -> None:
    """One line on stdout, at once: a log file is read while the run goes on."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def format_seconds(seconds: float) -> str:
    """`95` -> `1m35s`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
