"""The runs of a comparison, each a `python -m pretrain` of its own: a base for every seed, then the arms."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from grow.compare.settings import BASE, OWN_BASE, CompareConfig, is_from_scratch, stages_of
from grow.operators import in_sizes
from grow.plan import differing_sizes
from grow.registry import SIZES
from lit_gpt.atomic import write_atomically
from lit_gpt.checkpoint import TRAINING, detect_form, find_checkpoint, read_config, read_exchange, read_training
from lit_gpt.config import Config
from lit_gpt.counts import parse_token_count
from lit_gpt.errors import EXIT_DATA, EXIT_NON_FINITE, EXIT_OK, EXIT_STOPPED, EXIT_USAGE, DataError
from lit_gpt.flops import flops_per_token
from lit_gpt.settings_files import merge, read_settings_file
from lit_gpt.stored_state import FLOPS, flops_behind

DONE = "done.json"
GLOBAL_BATCH_SIZE = 512  # where the settings have none; written into every run's
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
LENGTHS = frozenset({"max_tokens", "max_steps"})


class RunFailed(Exception):
    """A run of the comparison ended with an error; its own message is on the terminal."""

    def __init__(self, name: str, code: int) -> None:
        again = "the reason stands above; mend it and " if code in (EXIT_USAGE, EXIT_DATA, EXIT_NON_FINITE) else ""
        super().__init__(f"{name} ended with exit code {code}; {again}repeat the command to go on from there")
        self.code = code


@dataclass(frozen=True)
class Origin:
    """What the arms of one seed go on from."""

    checkpoint: Path
    config: Config
    flops: float | None
    """Behind it, in the paper's convention; None: nobody wrote that down."""


def run_all(config: CompareConfig) -> None:
    """Train what is not trained yet; everything that is done already is left alone.

    Raises:
        RunFailed: one of the runs did not come to its end.
        ValueError: settings that do not fit, found before the arms of a seed are trained. DataError, OSError: a
            checkpoint or a folder is damaged.
    """
    for seed in config.seeds:
        origin = _origin(config, seed, BASE, {})
        bases = {
            name: _origin(config, seed, f"{name}{OWN_BASE}", arm["base"]) if "base" in arm else origin
            for name, arm in config.arms.items()
        }
        steps = {name: arm_steps(config, name, origin, own) for name, own in bases.items()}
        settings = {name: {"seed": seed, **_arm_settings(config, name, bases[name], steps[name])} for name in bases}
        if seed == config.seeds[0]:
            for name in bases:
                try_out(config, f"seed-{seed}/{name}", settings[name])
        for name in bases:
            run_once(config, f"seed-{seed}/{name}", settings[name])


def run_dirs(config: CompareConfig, name: str) -> list[Path]:
    """The folder of every run of an arm, by seed."""
    return [Path(config.out_dir) / f"seed-{seed}" / name for seed in config.seeds]


def _origin(config: CompareConfig, seed: int, name: str, changes: Mapping[str, Any]) -> Origin:
    """What arms go on from, trained if it is not yet; `changes` to the base make it another one, of that name."""
    if "checkpoint" in config.base:
        checkpoint = find_checkpoint(str(config.base["checkpoint"]))
    else:
        replaced = LENGTHS if LENGTHS & set(changes) else frozenset()
        stage = {"name": BASE, **{key: config.base[key] for key in config.base if key not in replaced}, **changes}
        run_once(config, f"seed-{seed}/{name}", {"seed": seed, "stages": [stage]})
        checkpoint = find_checkpoint(Path(config.out_dir) / f"seed-{seed}" / name)
    if detect_form(checkpoint) == TRAINING:
        flops: float | None = flops_behind(read_training(checkpoint, verify=False).state).paper
    else:
        flops = (read_exchange(checkpoint, verify=False).provenance or {}).get(FLOPS["paper"])
    return Origin(checkpoint, read_config(checkpoint), flops)


def arm_steps(config: CompareConfig, name: str, base: Origin, own: Origin) -> list[int]:
    """Optimizer steps of every stage of an arm, so that with what it goes on from it costs what base and probe do.

    Args:
        name: of the arm.
        base: the comparison's.
        own: what the arm goes on from, which is mostly the same.

    Raises:
        ValueError: the FLOPs behind the base are not known and matter, or do not pay for a step.
    """
    arm, settings = config.arms[name], merged_settings(config)
    target = _target(settings, base.config)
    tokens_per_step = settings["batch"]["global_batch_size"] * target.block_size
    left = flops_per_token(target).paper * tokens_per_step * _probe_steps(config, tokens_per_step)
    if is_from_scratch(arm) and base.flops is None:
        raise ValueError(
            f"nobody wrote down the FLOPs behind {base.checkpoint}, so {name} cannot be given as many; leave it out"
        )
    left += (base.flops or 0.0) - (0.0 if is_from_scratch(arm) else own.flops or 0.0)
    stages, found = stages_of(arm), []
    grown = in_sizes(target, stages[-1])
    if not is_from_scratch(arm) and not differing_sizes(own.config, grown):
        raise ValueError(
            f"arm {name!r} does not grow: its base has the sizes of the grown model; give base fewer layers"
        )
    for stage in stages:
        per_step = flops_per_token(in_sizes(target, stage)).paper * tokens_per_step
        taken = sum(other["share"] for other in stages[:-1])
        found.append(round(left * stage.get("share", 1 - taken) / per_step))
        if found[-1] < 1:
            raise ValueError(
                f"arm {name!r}: after its base {max(0.0, left):.3g} FLOPs are left, and a step costs {per_step:.3g}; "
                f"lengthen the probe"
            )
    return found


def merged_settings(config: CompareConfig) -> dict[str, Any]:
    """What the files and `settings` say of a run, with the defaults of what is needed here.

    Raises:
        ValueError: a file that is no YAML mapping, or no model in any.
    """
    merged = merge({"batch": {"global_batch_size": GLOBAL_BATCH_SIZE}}, _files_merged(tuple(config.config)))
    merged = merge(merged, config.settings)
    if not isinstance(merged.get("model"), dict) or "name" not in merged["model"]:
        raise ValueError(f"none of {', '.join(config.config)} names a model; give model: {{name: ...}}")
    return merged


@cache
def _files_merged(paths: tuple[str, ...]) -> dict[str, Any]:
    """Read once: every arm of every seed asks."""
    merged: dict[str, Any] = {}
    for path in paths:
        merged = merge(merged, read_settings_file(path))
    return merged


def _target(settings: Mapping[str, Any], base: Config) -> Config:
    """The model that the settings name, with the vocabulary of the base."""
    given = {key: value for key, value in settings["model"].items() if value is not None and key != "name"}
    return Config.from_name(settings["model"]["name"], **{"vocab_size": base.vocab_size, **given})


def _probe_steps(config: CompareConfig, tokens_per_step: int) -> int:
    if "max_steps" in config.probe:
        return int(config.probe["max_steps"])
    return parse_token_count(config.probe["max_tokens"]) // tokens_per_step


def _arm_settings(config: CompareConfig, name: str, origin: Origin, steps: list[int]) -> dict[str, Any]:
    arm = config.arms[name]
    parts = stages_of(arm)
    names = [*(f"{name}, hop {number}" for number in range(1, len(parts))), name]
    stages = [
        {"name": each, "max_steps": n, **{key: part[key] for key in part if key != "share"}}
        for each, n, part in zip(names, steps, parts, strict=True)
    ]
    if is_from_scratch(arm):
        return {"stages": stages}
    start = {"name": BASE, "max_steps": 0, "n_layer": origin.config.n_layer}
    start |= {size: getattr(origin.config, size) for size in SIZES}
    by_hand = {"data": {"start_position": 0}} if "checkpoint" in config.base else {}
    return {"init_from": str(origin.checkpoint), "stages": [start, *stages], **by_hand}


def run_once(config: CompareConfig, name: str, settings: Mapping[str, Any]) -> None:
    """Run `pretrain` in the folder `name`, or go on there; does nothing where that was done with the same settings.

    Raises:
        RunFailed: it did not come to its end.
        DataError: the folder holds a finished run of other settings.
    """
    folder, own = Path(config.out_dir) / name, _own_settings(config, name, settings)
    if _is_done(config, folder, own):
        return
    sys.stderr.write(f"== {name}\n")
    _check_code(name, _pretrain(config, folder, own, []))
    write_atomically(folder / DONE, json.dumps({"settings": _as_trained(config, own)}).encode())


def try_out(config: CompareConfig, name: str, settings: Mapping[str, Any]) -> None:
    """Have `pretrain` check what it would do in the folder `name`, before any arm is trained.

    Raises:
        RunFailed: it would refuse.
        DataError: the folder holds a finished run of other settings.
    """
    folder, own = Path(config.out_dir) / name, _own_settings(config, name, settings)
    if not _is_done(config, folder, own):
        _check_code(name, _pretrain(config, folder, own, ["--dry-run"], stdout=subprocess.DEVNULL))


def _own_settings(config: CompareConfig, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    batch = {"global_batch_size": merged_settings(config)["batch"]["global_batch_size"]}
    folder = str(Path(config.out_dir) / name)
    return merge(merge(dict(config.settings), {"batch": batch}), {**settings, "out_dir": folder})


def _as_trained(config: CompareConfig, own: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a run is made with, files and all."""
    return json.loads(json.dumps(merge(_files_merged(tuple(config.config)), own)))


def _is_done(config: CompareConfig, folder: Path, own: Mapping[str, Any]) -> bool:
    if not (folder / DONE).is_file():
        return False
    before, now = json.loads((folder / DONE).read_text())["settings"], _as_trained(config, own)
    different = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if different:
        raise DataError(
            f"{folder} was trained with other settings ({', '.join(different)}); choose another out_dir, or remove it"
        )
    return True


def _pretrain(config: CompareConfig, folder: Path, own: Mapping[str, Any], flags: list[str], **streams: Any) -> int:
    path = folder.parent / f"{folder.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, yaml.safe_dump(dict(own), sort_keys=False).encode())
    files = [part for each in (*config.config, str(path)) for part in ("--config", each)]
    command = [sys.executable, "-m", "pretrain", *files, *flags]
    return _ended(subprocess.Popen(command, **{"stdout": sys.stderr, **streams}))


def _check_code(name: str, code: int) -> None:
    if code:
        raise RunFailed(name, code if code in (EXIT_USAGE, EXIT_DATA, EXIT_NON_FINITE, EXIT_STOPPED) else 1)


def _ended(process: subprocess.Popen[bytes]) -> int:
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
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return EXIT_STOPPED if asked and code == EXIT_OK else code
