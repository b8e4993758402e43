"""SIGKILL on two processes of a run while it saves, saves in the background, grows or changes stage.

Run `python -m benchmarks.kill_sweep --kills 100`; it writes results/kill_sweep.json after every kill, and goes on from
there when it is repeated. Each kill begins in a copy of an undisturbed run that is cut back to shortly before the
moment, waits until the moment is there (a checkpoint is being built, the stage before growth was validated, ...) and
some seeded time longer, and kills. Then there must be a valid checkpoint, not older than any that the run called saved,
and the same command must end with the undisturbed run's losses, weights and moments, to the bit.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.forked import Started, start
from benchmarks.machine import describe
from benchmarks.result_files import RESULTS, add_out, read_result, write_result
from lit_gpt.checkpoint_folder import checkpoint_path

RESULT = RESULTS / "kill_sweep.json"
SIZE = 2
SEED = 20261125
VOCABULARY = 96
TIMING = ("tokens_per_sec", "seconds", "time")
SAVED = re.compile(r"checkpoint stage-(\d+)/step-(\d+) saved")
WAIT_SECS = 120


@dataclass(frozen=True)
class Moment:
    """Where in a run it is killed."""

    async_save: bool
    begins_at: tuple[int, int]
    """(stage, step) of the checkpoint that the run takes up at."""
    is_there: Callable[[Path, str], bool]
    """From the run's folder and what it has said since."""
    within_secs: float
    """The kill comes at most so much later."""


def building(folder: Path, said: str) -> bool:
    """Whether a checkpoint is under construction."""
    return any((folder / "checkpoints").glob("*/.step-*.lit-tmp-*"))


def told(text: str, folder: Path, said: str) -> bool:
    return text in said


MOMENTS = {
    "save": Moment(False, (1, 2), building, 0.4),
    "async save": Moment(True, (1, 2), building, 0.4),
    "growth": Moment(True, (1, 4), partial(told, "(base, before_growth)"), 0.8),
    "stage transition": Moment(True, (2, 10), partial(told, "(grown, end)"), 0.8),
}


def settings_of(folder: Path, name: str, *, async_save: bool, keep_every_steps: int) -> list[str]:
    """The arguments of `pretrain` for a run that grows from 1 to 3 layers at step 6 and changes its rate at step 12."""
    settings = {
        "out_dir": str(folder / name),
        "model": {
            "name": "3L32H",
            "block_size": 16,
            "n_head": 2,
            "head_size": 16,
            "intermediate_size": 64,
            "vocab_size": VOCABULARY,
        },
        "data": {"train": str(folder / "tokens.bin"), "validation": str(folder / "tokens.bin")},
        "stages": [
            {"name": "base", "n_layer": 1, "max_steps": 6},
            {"name": "grown", "operator": "stack", "optimizer_policy": "map", "max_steps": 6},
            {"name": "last", "max_steps": 4, "learning_rate": 3e-3},
        ],
        "batch": {"global_batch_size": 4, "micro_batch_size": 2},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"kind": "wsd", "warmup_steps": 2},
        "checkpoints": {
            "every_steps": 1,
            "keep_last": 1,
            "keep_every_steps": keep_every_steps,
            "async_save": async_save,
        },
        "validation": {"max_tokens": 256},
        "logging": {"every_steps": 1, "tensorboard": False},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["--config", str(path)]


def undisturbed(folder: Path) -> Path:
    """A run that nobody kills, all its checkpoints kept; made once."""
    run, done = folder / "undisturbed", folder / "undisturbed.done"
    if not done.exists():
        for left in (run, folder / "undisturbed-logs"):
            shutil.rmtree(left, ignore_errors=True)
        tokens = np.random.default_rng(SEED).integers(0, VOCABULARY, 4096, dtype=np.uint16)
        tokens.tofile(folder / "tokens.bin")
        arguments = settings_of(folder, "undisturbed", async_save=True, keep_every_steps=1)
        finish(start(arguments, SIZE, folder / "undisturbed-logs"))
        done.touch()
    return run


def finish(started: Started) -> str:
    """What a run said that must end well."""
    codes = started.wait()
    if any(codes):
        raise RuntimeError(f"exit codes {codes}: {started.errors(0)}{started.errors(1)}")
    return started.output()


def cut_back(run: Path, copied: Path, stage: int, step: int) -> None:
    """A copy of a run as it was when it had saved (stage, step)."""
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(run, copied)
    for path in (copied / "checkpoints").glob("stage-*/step-*"):
        if (int(path.parent.name[6:]), int(path.name[5:])) > (stage, step):
            shutil.rmtree(path)
    assert checkpoint_path(copied / "checkpoints", stage, step).is_dir(), "the undisturbed run keeps all of them"


def one_kill(folder: Path, reference: Path, number: int) -> dict[str, Any]:
    """Kill number `number`, and what came of it."""
    from lit_gpt.checkpoint import latest, prune_temporaries, verify

    chance = random.Random(SEED + number)
    name = list(MOMENTS)[number % len(MOMENTS)]
    moment = MOMENTS[name]
    after_secs = chance.uniform(0, moment.within_secs)
    one_dies_first = chance.choice([None, None, 0, 1])
    run = folder / "killed"
    cut_back(reference, run, *moment.begins_at)
    arguments = settings_of(folder, "killed", async_save=moment.async_save, keep_every_steps=0)
    logs = [folder / f"killed-logs-{sitting}" for sitting in range(2)]
    for left in logs:
        shutil.rmtree(left, ignore_errors=True)

    started = start(arguments, SIZE, logs[0])
    deadline = time.monotonic() + WAIT_SECS
    while started.is_alive and not moment.is_there(run, started.output()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"kill {number}: {name} did not come; {started.output()}{started.errors()}")
        time.sleep(0.002)
    time.sleep(after_secs)
    was_alive = started.is_alive
    if one_dies_first is not None:
        started.processes[one_dies_first].kill()
        time.sleep(chance.uniform(0, 0.1))
    started.kill()

    half_built = building(run, "")
    acknowledged = max([moment.begins_at, *(tuple(map(int, found)) for found in SAVED.findall(started.output()))])
    found = latest(run / "checkpoints", deep=True)
    at = None if found is None else (int(found.parent.name[6:]), int(found.name[5:]))
    is_valid = found is not None and verify(found) == []
    finish(start(arguments, SIZE, logs[1]))
    return {
        "kill": number,
        "moment": name,
        "after_secs": round(after_secs, 4),
        "killed_first": one_dies_first,
        "was_running": was_alive,
        "left_half_built": half_built,
        "acknowledged": list(acknowledged),
        "latest": None if at is None else list(at),
        "loadable": is_valid,
        "nothing_lost": at is not None and at >= acknowledged,
        "same_end": same_end(run, reference),
        "nothing_left_over": prune_temporaries(run / "checkpoints") == [],
    }


def same_end(run: Path, reference: Path) -> bool:
    """Whether two runs logged the same and ended with the same weights and moments, to the bit."""
    import torch

    from lit_gpt.checkpoint import latest, read_training

    if any(records(run / log) != records(reference / log) for log in ("metrics.jsonl", "evals.jsonl")):
        return False
    ends = [latest(folder / "checkpoints") for folder in (run, reference)]
    if None in ends or ends[0].name != ends[1].name:
        return False
    ours, theirs = (dict(read_training(end).tensors) for end in ends)
    return set(ours) == set(theirs) and all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a log without what depends on the clock."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMING} for line in lines]


def is_good(kill: dict[str, Any]) -> bool:
    return all(kill[key] for key in ("loadable", "nothing_lost", "same_end", "nothing_left_over"))


def summarise(kills: list[dict[str, Any]]) -> dict[str, Any]:
    """How many kills there were of each kind, and what went wrong."""
    return {
        "kills": len(kills),
        "while_running": sum(kill["was_running"] for kill in kills),
        "left_a_half_built_checkpoint": sum(kill["left_half_built"] for kill in kills),
        "by_moment": {name: sum(kill["moment"] == name for kill in kills) for name in MOMENTS},
        "not_loadable": sum(not kill["loadable"] for kill in kills),
        "lost_what_was_acknowledged": sum(not kill["nothing_lost"] for kill in kills),
        "other_losses_or_weights": sum(not kill["same_end"] for kill in kills),
        "left_something_over": sum(not kill["nothing_left_over"] for kill in kills),
    }


def sweep(
    folder: Path, n_kills: int, earlier: list[dict[str, Any]], seconds: float, result: Path
) -> list[dict[str, Any]]:
    """Kill until there are `n_kills`, or until the time is over; the result is on the disk after each."""
    kills, deadline = list(earlier), time.monotonic() + seconds
    reference = undisturbed(folder)
    while len(kills) < n_kills and time.monotonic() < deadline:
        kills.append(one_kill(folder, reference, len(kills)))
        last = kills[-1]
        verdict = "good" if is_good(last) else f"BAD {last}"
        sys.stderr.write(f"{len(kills)}/{n_kills} {last['moment']} + {last['after_secs']:.2f} s: {verdict}\n")
        record = {
            "command": f"python -m benchmarks.kill_sweep --kills {n_kills}",
            "what": f"seeded SIGKILLs on {SIZE} processes (gloo, FSDP2), seed {SEED}",
            "summary": summarise(kills),
            "kills": kills,
            "machine": describe(),
        }
        write_result(result, record)
    return kills


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=60, help="stop after so many; repeat the command to go on")
    parser.add_argument("--fresh", action="store_true", help="count from the first kill again")
    add_out(parser, RESULT)
    args = parser.parse_args()
    earlier = [] if args.fresh else read_result(args.out).get("kills", [])
    with tempfile.TemporaryDirectory(prefix="kill_sweep-") as folder:
        kills = sweep(Path(folder), args.kills, earlier, 60 * args.minutes, args.out)
    print(json.dumps(summarise(kills), indent=1))
    return 0 if all(map(is_good, kills)) and len(kills) >= args.kills else 1


if __name__ == "__main__":
    raise SystemExit(main())
