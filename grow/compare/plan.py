"""The runs of a comparison: what each trains, what it goes on from, what it costs. Nothing is trained here."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from grow.compare.settings import BASE, CompareConfig, is_from_scratch, stages_of
from grow.operators import in_sizes
from grow.plan import differing_sizes
from grow.registry import SIZES
from lit_gpt.checkpoint import TRAINING, detect_form, find_checkpoint, read_config, read_exchange, read_training
from lit_gpt.config import Config
from lit_gpt.counts import parse_count, parse_token_count
from lit_gpt.flops import flops_per_token
from lit_gpt.packed_dataset import manifest_of
from lit_gpt.settings_files import merge, read_settings_file
from lit_gpt.stored_state import FLOPS, flops_behind
from lit_gpt.token_listing import is_there
from lit_gpt.tokenizer import Tokenizer

DONE = "done.json"
GLOBAL_BATCH_SIZE = 512  # where the settings have none; written into every run's
LENGTHS = frozenset({"max_tokens", "max_steps"})
LONGEST_NAME = 120  # of a folder, in characters; file systems take 255 bytes


@dataclass(frozen=True)
class Origin:
    """What the arms of one seed go on from."""

    checkpoint: Path
    """Where it is, or, for a base that is not trained yet, the folder it will be in."""
    config: Config
    flops: float | None
    """Behind it, in the paper's convention; None: nobody wrote that down."""


@dataclass(frozen=True)
class PlannedStage:
    """What is trained for some steps."""

    operator: str | None
    """That it grows by first."""
    config: Config
    steps: int
    flops: float
    """Of these steps; what an operator or a teacher computes beside them is not in it."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of `pretrain`: a base or an arm."""

    seed: int
    name: str
    """Of its folder, and of the arm."""
    settings: dict[str, Any]
    """Of `pretrain`, over those of the comparison."""
    stages: tuple[PlannedStage, ...]
    """Those that train."""
    tokens_per_step: int
    base: PlannedRun | None = None
    """What it goes on from; None for a base, an arm from scratch, and where a checkpoint is the base."""
    behind_flops: float | None = 0.0
    """Of what it goes on from; None: nobody knows."""

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def flops(self) -> float:
        """Of its own steps."""
        return sum(stage.flops for stage in self.stages)

    def folder(self, config: CompareConfig) -> Path:
        return seed_folder(config, self.seed) / self.name


def seed_folder(config: CompareConfig, seed: int) -> Path:
    return Path(config.out_dir) / f"seed-{seed}"


def planned_runs(config: CompareConfig, seed: int) -> list[PlannedRun]:
    """All runs of a seed: every base that an arm goes on from, once, and then the arms.

    Raises:
        ValueError: an arm that does not grow, or that base and probe do not pay for. DataError, OSError: a checkpoint
            or a folder is damaged.
    """
    stages = {BASE: base_stage(config, {})}
    stages |= {base_name(config, arm): base_stage(config, arm.get("base", {})) for arm in config.arms.values()}
    bases, used = {}, []
    if "checkpoint" in config.base:
        origins = dict.fromkeys(stages, _read_origin(find_checkpoint(str(config.base["checkpoint"]))))
    else:
        bases = {name: _base(config, seed, name, stage) for name, stage in stages.items()}
        origins = {name: _origin(config, base) for name, base in bases.items()}
        names = dict.fromkeys(base_name(config, arm) for arm in config.arms.values() if not is_from_scratch(arm))
        used = [bases[name] for name in names]
    return [*used, *(_arm(config, seed, name, origins, bases) for name in config.arms)]


def _base(config: CompareConfig, seed: int, name: str, stage: Mapping[str, Any]) -> PlannedRun:
    model, steps = _base_length(config, seed, stage)
    return _planned(config, seed, name, {"stages": [stage]}, [(None, model, steps)])


def _arm(
    config: CompareConfig, seed: int, name: str, origins: Mapping[str, Origin], bases: Mapping[str, PlannedRun]
) -> PlannedRun:
    arm = config.arms[name]
    common, own = origins[BASE], origins[base_name(config, arm)]
    steps, target = arm_steps(config, name, common, own), _target(merged_settings(config), common.config.vocab_size)
    parts = [
        (stage.get("operator"), in_sizes(target, stage), n) for stage, n in zip(stages_of(arm), steps, strict=True)
    ]
    settings = _arm_settings(config, name, own, steps)
    if is_from_scratch(arm):
        return _planned(config, seed, name, settings, parts)
    base = bases.get(base_name(config, arm))
    return _planned(config, seed, name, settings, parts, base=base, behind_flops=own.flops)


def _planned(
    config: CompareConfig,
    seed: int,
    name: str,
    settings: Mapping[str, Any],
    parts: list[tuple[str | None, Config, int]],
    **more: Any,
) -> PlannedRun:
    per_step = merged_settings(config)["batch"]["global_batch_size"] * parts[-1][1].block_size
    stages = [
        PlannedStage(operator, model, steps, flops_per_token(model).paper * per_step * steps)
        for operator, model, steps in parts
    ]
    return PlannedRun(seed, name, {"seed": seed, **settings}, tuple(stages), per_step, **more)


def base_stage(config: CompareConfig, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The stage that trains a base, with `changes` to that of the comparison."""
    replaced = LENGTHS if LENGTHS & set(changes) else frozenset()
    return {"name": BASE, **{key: config.base[key] for key in config.base if key not in replaced}, **changes}


def base_name(config: CompareConfig, arm: Mapping[str, Any]) -> str:
    """Folder of the base of an arm: `base`, or that and what is changed, so that equal changes share it."""
    stage, common = base_stage(config, arm.get("base", {})), base_stage(config, {})
    changed = ", ".join(f"{key} {stage[key]}" for key in sorted(stage) if stage[key] != common.get(key))
    if not changed:
        return BASE
    readable = re.sub(r"[^\w ,.+=-]", "_", changed)[:LONGEST_NAME]
    mark = "" if readable == changed else f" {hashlib.sha256(changed.encode()).hexdigest()[:8]}"
    return f"{BASE}, {readable}{mark}"


def _origin(config: CompareConfig, base: PlannedRun) -> Origin:
    """What arms go on from: a base that is trained, or what it will be."""
    folder = base.folder(config)
    if (folder / DONE).is_file() and (folder / "checkpoints").is_dir():
        return _read_origin(find_checkpoint(folder))
    return Origin(folder, base.stages[-1].config, base.flops)


def _read_origin(checkpoint: Path) -> Origin:
    if detect_form(checkpoint) == TRAINING:
        flops: float | None = flops_behind(read_training(checkpoint, verify=False).state).paper
    else:
        flops = (read_exchange(checkpoint, verify=False).provenance or {}).get(FLOPS["paper"])
    return Origin(checkpoint, read_config(checkpoint), flops)


def _base_length(config: CompareConfig, seed: int, stage: Mapping[str, Any]) -> tuple[Config, int]:
    """Model and steps of a base."""
    settings = merged_settings(config)
    vocab_size = (
        settings["model"].get("vocab_size") or _vocab_size_of_data(settings) or _vocab_size_of_runs(config, seed)
    )
    model = in_sizes(_target(settings, vocab_size), stage)
    return model, _steps(stage, settings["batch"]["global_batch_size"] * model.block_size)


def _vocab_size_of_data(settings: Mapping[str, Any]) -> int | None:
    """Of the tokenizer that is named or stands in a folder of the data, as `pretrain` finds it."""
    data, paths = settings.get("data") or {}, _train_paths(settings)
    manifests = [manifest for path in paths if (manifest := manifest_of(path)) is not None]
    if manifests:
        return manifests[0]["tokenizer"]["vocab_size"]
    for place in [data["tokenizer"]] if data.get("tokenizer") else paths:
        with suppress(FileNotFoundError, ValueError):
            return Tokenizer.load(str(place)).vocab_size
    return None


def _train_paths(settings: Mapping[str, Any]) -> list[str]:
    train = (settings.get("data") or {}).get("train")
    return [str(path) for path in (train.values() if isinstance(train, Mapping) else [train]) if path is not None]


def _vocab_size_of_runs(config: CompareConfig, seed: int) -> int:
    """Of a run that is done, where the data is gone."""
    for done in sorted(seed_folder(config, seed).glob(f"*/{DONE}")):
        return read_config(find_checkpoint(done.parent)).vocab_size
    paths = _train_paths(merged_settings(config))
    for path in paths:
        if not is_there(path):
            raise FileNotFoundError(f"data {path} does not exist; make it with scripts/prepare.py, or name other data")
    raise ValueError(
        f"data.train={paths} does not say how many token ids there are; give a folder of "
        f"scripts/prepare.py, data.tokenizer or model.vocab_size"
    )


def arm_steps(config: CompareConfig, name: str, base: Origin, own: Origin) -> list[int]:
    """Optimizer steps of every stage of an arm, so that with what it goes on from it costs what base and probe do.

    Args:
        config: the comparison.
        name: of the arm.
        base: the comparison's.
        own: what the arm goes on from, which is mostly the same.

    Raises:
        ValueError: the FLOPs behind the base are not known and matter, or do not pay for a step.
    """
    arm, settings = config.arms[name], merged_settings(config)
    target = _target(settings, base.config.vocab_size)
    tokens_per_step = settings["batch"]["global_batch_size"] * target.block_size
    left = flops_per_token(target).paper * tokens_per_step * _steps(config.probe, tokens_per_step)
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
    taken = sum(stage["share"] for stage in stages[:-1])
    for stage in stages:
        per_step = flops_per_token(in_sizes(target, stage)).paper * tokens_per_step
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
    merged = merge({"batch": {"global_batch_size": GLOBAL_BATCH_SIZE}}, files_merged(tuple(config.config)))
    merged = merge(merged, config.settings)
    if not isinstance(merged.get("model"), dict) or "name" not in merged["model"]:
        raise ValueError(f"none of {', '.join(config.config)} names a model; give model: {{name: ...}}")
    return merged


@cache
def files_merged(paths: tuple[str, ...]) -> dict[str, Any]:
    """What the files say, the later over the earlier. Read once: every arm of every seed asks."""
    merged: dict[str, Any] = {}
    for path in paths:
        merged = merge(merged, read_settings_file(path))
    return merged


def _target(settings: Mapping[str, Any], vocab_size: int) -> Config:
    """The model that the settings name, with a vocabulary if they have none."""
    given = {key: value for key, value in settings["model"].items() if value is not None and key != "name"}
    return Config.from_name(settings["model"]["name"], **{"vocab_size": vocab_size, **given})


def _steps(length: Mapping[str, Any], tokens_per_step: int) -> int:
    """Of {max_steps: N} or {max_tokens: N}."""
    if "max_steps" in length:
        return parse_count(length["max_steps"], "steps")
    return parse_token_count(length["max_tokens"]) // tokens_per_step


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
