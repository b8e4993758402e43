"""`pretrain status RUN`: where a run stands and whether it is alive, from the files that it leaves. Reads no tensor."""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grow.curves import METRICS_FILE
from lit_gpt.atomic import MANIFEST, directory_problems, read_manifest
from lit_gpt.checkpoint_folder import newest_first
from lit_gpt.counts import parse_token_count
from lit_gpt.errors import EXIT_OK, DataError
from pretrain.heartbeat import ENDED, read_heartbeat
from pretrain.run_lock import LOCK_FILE, read_owner

STATE_FILE = "state.json"
QUIET_SECS = 120.0  # no step of a model that fits its machine takes so long, nor does a batch of validation
QUIET_STEPS = 10
SAVING_SECS = 1800.0  # as long as the processes of a run wait for one another
STARTING = "starting"
TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class LastCheckpoint:
    """The newest one whose files are all there."""

    path: str
    step: int
    age_secs: float


@dataclass(frozen=True)
class Owner:
    """Who holds the run's lock."""

    pid: int | None
    host: str | None
    job: str | None
    """Number of the SLURM job."""
    since: float | None = None
    """Seconds since 1970, if the lock says so."""


@dataclass(frozen=True)
class Status:
    """What is known of a run."""

    run: str
    state: str
    """running, stuck, stopped or finished."""
    step: int | None
    planned_steps: int | None
    """Of all stages; None before the first checkpoint."""
    stage: int | None
    stage_name: str | None
    logged_step: int | None
    """Of the last line of metrics.jsonl, whose loss, tokens_per_sec and tokens follow; `step` may be later."""
    loss: float | None
    tokens_per_sec: float | None
    tokens: int | None
    doing: str | None
    """What the run was doing when it last said so."""
    silent_secs: float | None
    """How long ago that was."""
    stuck_since: float | None
    """Seconds since 1970; None unless it holds the lock and has been silent for too long."""
    checkpoint: LastCheckpoint | None
    owner: Owner | None
    """None when nobody trains in the folder, as far as this machine can see."""
    finished: bool


def status_of(run: str | Path, now: float | None = None) -> Status:
    """Where a run stands.

    Raises:
        FileNotFoundError: there is no such run.
    """
    folder, now = Path(run), time.time() if now is None else now
    if not (folder / LOCK_FILE).is_file() and not (folder / "checkpoints").is_dir():
        raise FileNotFoundError(f"{folder} holds no run; give the out_dir of one")
    metrics, beat = _last_record(folder / METRICS_FILE), read_heartbeat(folder)
    checkpoint, saved = _last_checkpoint(folder / "checkpoints", now)
    finished = saved is not None and _is_finished(saved)
    owner = _owner(folder / LOCK_FILE, beat)
    beat = _own_beat(owner, beat)
    silent = None if beat is None else max(0.0, now - beat["time"])
    is_quiet = silent is not None and silent > _patience(beat, metrics)
    owner = owner or (None if is_quiet else _owner_elsewhere(beat))
    stuck = owner is not None and is_quiet
    state = "finished" if finished and owner is None else "stuck" if stuck else "running" if owner else "stopped"
    latest = _latest(beat if owner is not None else None, metrics, saved)
    return Status(
        run=str(run),
        state=state,
        step=latest.get("step", checkpoint.step if checkpoint else None),
        planned_steps=None if saved is None else _planned_steps(saved),
        stage=latest.get("stage"),
        stage_name=latest.get("stage_name"),
        logged_step=metrics.get("step"),
        loss=metrics.get("loss"),
        tokens_per_sec=metrics.get("tokens_per_sec"),
        tokens=metrics.get("tokens"),
        doing=None if beat is None else beat["doing"],
        silent_secs=silent,
        stuck_since=beat["time"] if stuck and beat is not None else None,
        checkpoint=checkpoint,
        owner=owner,
        finished=finished,
    )


def _latest(
    beat: Mapping[str, Any] | None, metrics: Mapping[str, Any], saved: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """step, stage and stage_name of the later one of the heartbeat and the last line of the log."""
    beat = beat or {}
    stage = beat.get("stage", metrics.get("stage"))
    if "step" not in beat or (beat["step"], stage or 0) <= (metrics.get("step", -1), metrics.get("stage", 0)):
        return metrics
    stages = saved["run_config"]["stages"] if saved else []
    name = stages[stage - 1]["name"] if stages and stage else metrics.get("stage_name")
    return {"step": beat["step"], "stage": stage, "stage_name": name}


def _patience(beat: Mapping[str, Any] | None, metrics: Mapping[str, Any]) -> float:
    """Seconds of silence that are nothing unusual."""
    if beat is not None and beat["doing"] in (STARTING, "saving", "growing"):
        return SAVING_SECS
    steps, seconds = metrics.get("step"), metrics.get("seconds")
    return max(QUIET_SECS, QUIET_STEPS * seconds / steps) if steps and seconds else QUIET_SECS


def _last_record(path: Path) -> dict[str, Any]:
    """The last whole line of a log; nothing where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            return json.loads(line)
        except ValueError:
            continue
    return {}


def _last_checkpoint(folder: Path, now: float) -> tuple[LastCheckpoint | None, dict[str, Any] | None]:
    """The newest one whose files have their sizes, and its state.json."""
    for path in newest_first(folder):
        try:
            if not directory_problems(path, read_manifest(path), deep=False):
                age = max(0.0, now - (path / MANIFEST).stat().st_mtime)
                saved = json.loads((path / STATE_FILE).read_bytes())
                return LastCheckpoint(str(path), int(path.name.removeprefix("step-")), age), saved
        except (DataError, OSError, ValueError):
            continue
    return None, None


def _steps(stage: Mapping[str, Any], saved: Mapping[str, Any]) -> int:
    if stage.get("max_steps") is not None:
        return stage["max_steps"]
    tokens_per_step = saved["run_config"]["batch"]["global_batch_size"] * saved["model_config"]["block_size"]
    return parse_token_count(stage["max_tokens"]) // tokens_per_step


def _planned_steps(saved: Mapping[str, Any]) -> int:
    """Stages that are done had as many as they made: one may have ended before its time."""
    done, current = saved["step_count"] - saved["stage_step"], saved["stage"]
    steps = [_steps(stage, saved) for stage in saved["run_config"]["stages"][current - 1 :]]
    if saved.get("ended_stage") == current:
        steps[0] = saved["stage_step"]
    return done + sum(steps)


def _is_finished(saved: Mapping[str, Any]) -> bool:
    stages = saved["run_config"]["stages"]
    is_last = saved["stage"] == len(stages) and saved["stage_step"] >= _steps(stages[-1], saved)
    return is_last and saved.get("validation_owed") is None


def _owner(lock_file: Path, beat: Mapping[str, Any] | None) -> Owner | None:
    """Who holds the lock, as its file says; while that is being written, as the sign of life does."""
    try:
        with lock_file.open("r") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                named = read_owner(lock_file)
            else:
                return None
    except OSError:
        return None
    if named is not None:
        return Owner(named.pid, named.host, named.job, named.since)
    beat = beat or {}
    return Owner(None, beat.get("host"), beat.get("job"))


def _own_beat(owner: Owner | None, beat: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The sign of life of who holds the lock: one of an earlier start says nothing about this one."""
    if owner is None or owner.since is None:
        return beat
    is_own = beat is not None and (beat.get("pid"), beat.get("host")) == (owner.pid, owner.host)
    is_own = is_own and beat["time"] >= owner.since  # every start in a container may be process 1 of the same host
    return beat if is_own else {"time": owner.since, "doing": STARTING}


def _owner_elsewhere(beat: Mapping[str, Any] | None) -> Owner | None:
    """Of a run on another machine, whose lock may not be seen here."""
    if beat is None or beat["doing"] == ENDED or beat.get("host") == socket.gethostname():
        return None
    return Owner(beat.get("pid"), beat.get("host"), beat.get("job"))


def describe(status: Status) -> list[str]:
    """What the command prints."""
    planned = "" if status.planned_steps is None else f" of {status.planned_steps:,}"
    name = "" if status.stage_name is None else f" ({status.stage_name})"
    stage = "" if status.stage is None else f", stage {status.stage}{name}"
    rows = [("step", f"{'none' if status.step is None else format(status.step, ',')}{planned}{stage}")]
    if status.loss is not None:
        at = "" if status.logged_step == status.step else f" (at step {status.logged_step:,})"
        rate = f"{status.tokens_per_sec or 0:,.0f} tokens/s"
        rows.append(("loss", f"{status.loss:.4f}, {rate}, {status.tokens:,} tokens{at}"))
    last = status.checkpoint
    rows.append(("checkpoint", "none" if last is None else f"{last.path}, {_duration(last.age_secs)} old"))
    if status.owner is not None:
        job = "" if status.owner.job is None else f", SLURM job {status.owner.job}"
        rows.append(("held by", f"process {status.owner.pid} on {status.owner.host}{job}"))
    if status.silent_secs is not None:
        what = "silent for" if status.owner is not None else "last seen"
        rows.append(("heartbeat", f"{status.doing}; {what} {_duration(status.silent_secs)}"))
    if status.stuck_since is not None:
        since = time.strftime("%F %T", time.localtime(status.stuck_since))
        rows.append(("stuck since", f"{since}; see docs/cluster.md, Troubleshooting"))
    return [f"{status.run}: {status.state}", *(f"  {name:<12}{value}" for name, value in rows)]


def _duration(seconds: float) -> str:
    """`4000` -> `1h06m`."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"


def main(argv: Sequence[str]) -> int:
    """Run what follows `pretrain status`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="pretrain status", description="Where a run stands and whether it is alive.")
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args(argv)
    found = status_of(args.run)
    if args.json:
        sys.stdout.write(json.dumps(dataclasses.asdict(found), indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(describe(found)) + "\n")
    return EXIT_OK
