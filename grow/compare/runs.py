"""Making the runs of a comparison: each is a `python -m pretrain` of its own, bases first. Read plan.py first."""

from __future__ import annotations

import fcntl
import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import yaml

from grow.compare.plan import DONE, PlannedRun, files_merged, merged_settings, planned_runs
from grow.compare.settings import CompareConfig
from grow.curves import METRICS_FILE, read_json_lines, read_run_log
from lit_gpt.atomic import write_atomically
from lit_gpt.errors import EXIT_DATA, EXIT_NON_FINITE, EXIT_OK, EXIT_STOPPED, EXIT_USAGE, DataError
from lit_gpt.settings_files import differences, merge

LOG = "log.txt"
STARTS = "starts.jsonl"
"""A line for every start of a run: how it ended and what it took."""
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
LOOK_SECS = 0.5  # how often --verbose looks for more to show
LAST_LINES = 12  # of the log of a run that failed
LONGEST_VALUE = 60  # of a setting that differs, in characters


class RunFailed(Exception):
    """A run of the comparison ended with an error, which is on the terminal."""

    def __init__(self, name: str, code: int) -> None:
        mend = code in (EXIT_USAGE, EXIT_DATA, EXIT_NON_FINITE)
        again = "the reason stands above; mend it and " if mend else ""
        super().__init__(f"{name} ended with exit code {code}; {again}repeat the command to go on from there")
        self.code = code if mend or code == EXIT_STOPPED else 1


def run_all(config: CompareConfig, seeds: Sequence[int], *, verbose: bool = False) -> None:
    """Train what is not trained yet; everything that is done already is left alone.

    Raises:
        RunFailed: one of the runs did not come to its end.
        ValueError: settings that do not fit, found before anything is trained. DataError, OSError: a checkpoint or a
            folder is damaged, or holds a run of other settings.
    """
    try_out(config, seeds)
    for seed in seeds:
        planned = planned_runs(config, seed)
        needed = {run.base.name: run.base for run in planned if run.base is not None and not is_done(config, run)}
        for base in needed.values():
            run_once(config, base, verbose=verbose)
        for run in planned_runs(config, seed):  # which knows the checkpoints of the bases now
            if run.name in config.arms:
                run_once(config, run, verbose=verbose)


def missing_runs(config: CompareConfig) -> dict[int, list[str]]:
    """Seed -> arms that are not trained to their end."""
    missing = {
        seed: [run.name for run in planned_runs(config, seed) if run.name in config.arms and not is_done(config, run)]
        for seed in config.seeds
    }
    return {seed: names for seed, names in missing.items() if names}


def run_once(config: CompareConfig, run: PlannedRun, *, verbose: bool) -> None:
    """Run `pretrain`, or go on in its folder; does nothing where that was done with the same settings.

    Raises:
        RunFailed: it did not come to its end.
        DataError: the folder holds a finished run of other settings, or another process makes it.
    """
    if is_done(config, run):
        return
    folder = run.folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f"{run.name}.yaml"
    own = _own_settings(config, run)
    write_atomically(path, yaml.safe_dump(own, sort_keys=False).encode())
    began, cpu_before = time.monotonic(), _cpu_seconds()
    with (folder / LOG).open("ab") as log:
        _hold(log, folder)
        _say(f"seed {run.seed} {run.name}: ", end="\n" if verbose else "")
        begins_at = log.tell()
        code = _pretrain(config, path, log, [], follow=folder / LOG if verbose else None)
    took = {"exit_code": code, "seconds": time.monotonic() - began, "cpu_seconds": _cpu_seconds() - cpu_before}
    with (folder / STARTS).open("a", encoding="utf-8") as starts:
        starts.write(json.dumps(took) + "\n")
    if code:
        _say(f"exit code {code}; {folder / LOG} ends with")
        _show_end((folder / LOG).read_bytes()[begins_at:].decode(errors="replace"))
        raise RunFailed(f"seed-{run.seed}/{run.name}", code)
    done = {"settings": _as_trained(config, own), **_spent(folder)}
    write_atomically(folder / DONE, json.dumps(done).encode())
    again = f"seed {run.seed} {run.name}: " if verbose else ""
    _say(f"{again}{_ended_with(folder)}, {took['seconds']:.0f} s")


def _hold(log: IO[bytes], folder: Path) -> None:
    """Keep the log to one run at a time, which inherits the lock; `pretrain` has its own, also between machines."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(
            f"another process makes the run in {folder}, and {LOG} there says how far it is; wait for it or stop it, "
            f"then repeat the command"
        ) from error
    except OSError:  # a file system without locks
        return


def _say(words: str, end: str = "\n") -> None:
    sys.stderr.write(f"{words}{end}")
    sys.stderr.flush()


def _cpu_seconds() -> float:
    """Of all processes that this one started and that have ended, user and system."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _spent(folder: Path) -> dict[str, float]:
    """CPU and wall time of all starts of a run, its imports and validation included."""
    starts, _ = read_json_lines(folder / STARTS)
    return {key: sum(start[key] for _, start in starts) for key in ("cpu_seconds", "seconds")}


def _ended_with(folder: Path) -> str:
    log = read_run_log(folder)
    losses = [e.value for e in log.evaluations if (e.metric, e.when) == ("loss", "end")]
    loss = losses[-1] if losses else log.metrics[-1].loss
    return f"{log.metrics[-1].step:,} steps, loss {loss:.4g}"


def _show_end(log: str) -> None:
    """The error that ended a run, or else the last lines."""
    lines = log.splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    for line in lines[errors[-1] :][:LAST_LINES] if errors else lines[-LAST_LINES:]:
        _say(f"  {line}")


def try_out(config: CompareConfig, seeds: Sequence[int]) -> None:
    """Have `pretrain` check every arm of the first seed, from its base on, before anything is trained.

    Raises:
        RunFailed: it would refuse.
        DataError: a folder holds a finished run of other settings.
    """
    planned = [run for seed in seeds for run in planned_runs(config, seed)]
    left = [run for run in planned if not is_done(config, run)]
    warnings: dict[str, None] = {}
    for run in (run for run in left if run.seed == seeds[0] and run.name in config.arms):
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
            path = Path(folder) / "settings.yaml"
            path.write_text(yaml.safe_dump(_trial_settings(config, run, folder), sort_keys=False), encoding="utf-8")
            code = _pretrain(config, path, log, ["--dry-run"])
            log.seek(0)
            said = log.read().decode(errors="replace").replace(str(path), f"arm {run.name!r}")
        if code == EXIT_STOPPED:
            _say(f"seed {run.seed} {run.name}: stopped while its settings were checked")
        elif code:
            _say(f"seed {run.seed} {run.name}: refused")
            _show_end(said)
        if code:
            raise RunFailed(f"seed-{run.seed}/{run.name}", code)
        warnings |= {line: None for line in said.splitlines() if line.startswith("warning:")}
    for line in warnings:
        _say(line)


def _trial_settings(config: CompareConfig, run: PlannedRun, folder: str) -> dict[str, Any]:
    """Those of the run; where its base is not there yet, of a run that begins with its base."""
    own = _own_settings(config, run)
    if run.base is None or is_done(config, run.base):
        return own
    whole = {key: value for key, value in own.items() if key != "init_from"}
    return whole | {"stages": [*run.base.settings["stages"], *own["stages"][1:]], "out_dir": str(Path(folder) / "run")}


def _own_settings(config: CompareConfig, run: PlannedRun) -> dict[str, Any]:
    batch = {"global_batch_size": merged_settings(config)["batch"]["global_batch_size"]}
    return merge(merge(dict(config.settings), {"batch": batch}), {**run.settings, "out_dir": str(run.folder(config))})


def _as_trained(config: CompareConfig, own: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a run is made with, files and all."""
    return json.loads(json.dumps(merge(files_merged(tuple(config.config)), own)))


def is_done(config: CompareConfig, run: PlannedRun) -> bool:
    """Whether a run came to its end.

    Raises:
        DataError: one of other settings did.
    """
    path = run.folder(config) / DONE
    if not path.is_file():
        return False
    now, before = _compared(_as_trained(config, _own_settings(config, run))), _compared(_read_done(path)["settings"])
    different = [f"  {key}: {_shown(b)} then, {_shown(n)} now" for key, b, n in differences("", before, now)]
    if different:
        what = f"{path.parent} was trained with other settings; choose another out_dir, or remove it:"
        raise DataError("\n".join([what, *different]))
    return True


def _shown(value: Any) -> str:
    """A value of a setting, in a part of a line."""
    text = "not set" if value is None else repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _read_done(path: Path) -> dict[str, Any]:
    try:
        done = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); remove it and repeat the command") from error
    if not isinstance(done.get("settings"), dict):
        raise DataError(
            f"{path} does not hold the settings of its run; choose another out_dir, or remove {path.parent}"
        )
    return done


def _compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the place of the folder, which may have been moved; of a base in it, its name."""
    compared = {key: value for key, value in settings.items() if key != "out_dir"}
    folder, start = Path(settings["out_dir"]).parent, settings.get("init_from")
    if start is not None and folder in Path(start).parents:
        compared["init_from"] = Path(start).relative_to(folder).parts[0]
    return compared


def spent(config: CompareConfig) -> list[dict[str, Any]]:
    """What every run of the comparison that is there took: steps, tokens, FLOPs and times."""
    planned = [run for seed in config.seeds for run in planned_runs(config, seed)]
    return [_cost(run, run.folder(config)) for run in planned if (run.folder(config) / DONE).is_file()]


def _cost(run: PlannedRun, folder: Path) -> dict[str, Any]:
    end, behind = read_run_log(folder).metrics[-1], run.behind_flops
    return {
        **{"seed": run.seed, "name": folder.name, "steps": end.step, "tokens": end.tokens},
        "flops": None if behind is None else end.flops_total - behind,
        "training_seconds": end.seconds,
        "cpu_seconds": _read_done(folder / DONE).get("cpu_seconds"),
    }


def states(config: CompareConfig, runs: Sequence[PlannedRun]) -> list[str]:
    """Of each: done, begun, not needed (a base of which all arms are done), or an empty word."""
    needed = {(run.seed, run.base.name) for run in runs if run.base is not None and not is_done(config, run)}
    return [_state(config, run, run.name in config.arms or (run.seed, run.name) in needed) for run in runs]


def _state(config: CompareConfig, run: PlannedRun, is_needed: bool) -> str:
    if is_done(config, run):
        return "done"
    if not is_needed:
        return "not needed"
    return "begun" if (run.folder(config) / METRICS_FILE).is_file() else ""


def _pretrain(
    config: CompareConfig, path: Path, log: IO[bytes], flags: list[str], *, follow: Path | None = None
) -> int:
    """Its exit code; what it says goes into `log`, and from there, with `follow`, to the terminal."""
    files = [part for each in (*config.config, str(path)) for part in ("--config", each)]
    command = [sys.executable, "-m", "pretrain", *files, *flags]
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    if follow is None:
        return _ended(process)
    with follow.open("rb") as shown:
        shown.seek(0, 2)
        return _ended(process, shown)


def _ended(process: subprocess.Popen[bytes], shown: IO[bytes] | None = None) -> int:
    """Its exit code. What asks this process to stop asks it too, and it saves: that is waited for.

    Where it was asked when it had just come to its end, that counts as stopped, so that the next run is not begun.
    """
    asked: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        asked.append(number)
        if number != signal.SIGINT:  # Ctrl-C reaches all processes of a terminal
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        code = _wait(process, shown)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return EXIT_STOPPED if asked and code == EXIT_OK else code


def _wait(process: subprocess.Popen[bytes], shown: IO[bytes] | None) -> int:
    if shown is None:
        return process.wait()
    code = None
    while code is None:
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(LOOK_SECS)
        _say(shown.read().decode(errors="replace"), end="")
    return code
