"""What `grow compare` is asked for: a base, arms that go on from it, seeds. From a YAML file, checked as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grow.operators import operator
from lit_gpt.config import unknown_key
from lit_gpt.counts import parse_count
from lit_gpt.settings_files import read_settings_file

FROM_SCRATCH = "scratch"
BASE = "base"
"""Folder of the base of all arms, and the beginning of the names of other bases."""


KINDS: dict[str, tuple[type, str, str]] = {
    "config": (list, "a list", "[configs/demo.yaml]"),
    "base": (dict, "a mapping", "{n_layer: 2, max_tokens: 10M}"),
    "probe": (dict, "a mapping", "{max_tokens: 10M}"),
    "arms": (dict, "a mapping", "{scratch: {}, stack: {operator: stack}}"),
    "out_dir": (str, "a text", "out/compare"),
    "seeds": (list, "a list", "[1, 2, 3]"),
    "settings": (dict, "a mapping", "{batch: {global_batch_size: 64}}"),
}
"""Key -> type, its name, example."""


@dataclass(frozen=True)
class CompareConfig:
    """One comparison. Repeating the command goes on where it was stopped."""

    config: list[str]
    """YAML files of `pretrain`, in order: model, data, batch, optimizer. Their stages and out_dir are not used."""
    base: dict[str, Any]
    """The stage that arms go on from, as in `pretrain`; or {checkpoint: PATH}."""
    probe: dict[str, Any]
    """{max_tokens: N} or {max_steps: N} of `model` after growth. Base and probe together are what every arm costs."""
    arms: dict[str, dict[str, Any]]
    """Name -> the stage that follows, as in `pretrain`: operator, options, sizes, optimizer_policy, learning_rate, ...
    Or {stages: [...]}, several of them, each but the last with its `share` of the FLOPs after the base. `base` in an
    arm replaces settings of the base, for it alone. An arm without an operator is the model from its first step on,
    for the FLOPs of base and probe; `scratch` is the one that others are compared with."""
    out_dir: str = "out/compare"
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Each has a base of its own, and is that of the weights, the data order and whatever an operator draws."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further settings of `pretrain`, laid over the files'."""


def read_settings(path: str | Path) -> CompareConfig:
    """A comparison from its file.

    Raises:
        ValueError: there is no such file, or a line for everything that is wrong with it.
    """
    values = read_settings_file(path)
    if isinstance(values.get("config"), str):
        values = {**values, "config": [values["config"]]}
    problems = list(_problems(values))
    if problems:
        raise ValueError("\n".join(f"{path}: {problem}" for problem in problems))
    return CompareConfig(**values)


def _problems(values: Mapping[str, Any]) -> list[str]:
    fields = dataclasses.fields(CompareConfig)
    known = [each.name for each in fields]
    problems = [unknown_key(str(key), known) for key in values if key not in known]
    needed = [each.name for each in fields if each.default is each.default_factory is dataclasses.MISSING]
    problems += [f"{key} is missing" for key in needed if key not in values]
    wrong = [key for key, (kind, _, _) in KINDS.items() if key in values and not isinstance(values[key], kind)]
    problems += [f"{key}={values[key]!r} is not {KINDS[key][1]}, e.g. {key}: {KINDS[key][2]}" for key in wrong]
    return problems or [*_seed_problems(values), *_length_problems(values), *_arm_problems(values)]


def _seed_problems(values: Mapping[str, Any]) -> list[str]:
    seeds = values.get("seeds", [1])
    if not seeds or any(type(seed) is not int or seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        return [f"seeds={seeds} must be different whole numbers from 0 on, at least one"]
    return []


def _length_problems(values: Mapping[str, Any]) -> list[str]:
    base, probe = values["base"], values["probe"]
    problems = []
    if set(probe) not in ({"max_tokens"}, {"max_steps"}):
        problems.append(f"probe={probe} must be {{max_tokens: N}} or {{max_steps: N}}")
    else:
        problems += _count_problems("probe", probe)
    problems += _count_problems("base", base)
    if "checkpoint" in base and set(base) != {"checkpoint"}:
        problems.append(f"base names a checkpoint, so {', '.join(sorted({*base} - {'checkpoint'}))} has no effect")
    if "checkpoint" not in base and ("max_tokens" in base) == ("max_steps" in base):
        problems.append("base needs exactly one of max_tokens and max_steps, or a checkpoint")
    return problems


def _count_problems(where: str, lengths: Mapping[str, Any]) -> list[str]:
    try:
        for key, count in (("max_tokens", "tokens"), ("max_steps", "steps")):
            if key in lengths:
                parse_count(lengths[key], count)
    except ValueError as error:
        return [f"{where}: {error}"]
    return []


def _arm_problems(values: Mapping[str, Any]) -> list[str]:
    arms, problems = values["arms"], []
    if len(arms) < 2:
        problems.append("arms must hold at least two, e.g. {scratch: {}, stack: {operator: stack}}")
    for name, arm in arms.items():
        if not isinstance(name, str) or not name.strip() or set(name) & set("/\\\0") or name.startswith("."):
            problems.append(f"arm {name!r} needs a name that a folder can have")
        elif name == BASE or name.startswith(f"{BASE}, "):
            problems.append(f"arm {name!r} has the name of a base's folder; choose another")
        elif not isinstance(arm, dict):
            problems.append(f"arm {name!r} must be a mapping, e.g. {{operator: stack}}")
        else:
            problems += [f"arm {name!r}: {problem}" for problem in _stage_problems(name, arm, values["base"])]
    return problems


def stages_of(arm: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stages of an arm after its base, without what is not for `pretrain`."""
    return list(arm["stages"]) if "stages" in arm else [{key: arm[key] for key in arm if key != "base"}]


def is_from_scratch(arm: Mapping[str, Any]) -> bool:
    return "stages" not in arm and "operator" not in arm


def _stage_problems(name: str, arm: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    if not isinstance(arm.get("base", {}), dict):
        return [f"base={arm['base']!r} is not a mapping"]
    if "base" in arm and ("checkpoint" in base or is_from_scratch(arm)):
        return ["base has no effect: " + ("a checkpoint is the base" if "checkpoint" in base else "it has no operator")]
    if "stages" in arm and set(arm) - {"stages", "base"}:
        return [f"{', '.join(sorted(set(arm) - {'stages', 'base'}))} belongs into one of its stages"]
    if name == FROM_SCRATCH and not is_from_scratch(arm):
        return ["it is the baseline and has no operator; choose another name"]
    stages = arm.get("stages", [arm])
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        return ["stages must be a list of stages, e.g. [{operator: stack, n_layer: 4, share: 0.5}, {operator: stack}]"]
    lengths = {"max_tokens", "max_steps", "name"} & {key for stage in stages for key in stage}
    if lengths:
        return [f"{', '.join(sorted(lengths))} is not for arms; probe says how long they are"]
    return _operator_problems(stages) or _share_problems([stage.get("share") for stage in stages])


def _operator_problems(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    try:
        for stage in stages:
            if "operator" in stage:
                operator(str(stage["operator"]))
    except ValueError as error:
        return [str(error)]
    return []


def _share_problems(shares: Sequence[Any]) -> list[str]:
    if shares[-1] is not None or not all(isinstance(each, int | float) and 0 < each < 1 for each in shares[:-1]):
        return ["every stage but the last needs a share of the FLOPs after the base, between 0 and 1"]
    return [] if sum(shares[:-1]) < 1 else ["the shares of its stages leave nothing for the last one"]
