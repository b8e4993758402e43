"""From argv to a checked RunConfig: defaults, then YAML files in order, then flags.

jsonargparse checks types and writes the help. Files and flags are merged here, because it merges lists item by item,
and a list of stages has to replace another one as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from lit_gpt.config import unknown_key
from lit_gpt.settings_files import merge, read_settings_file
from pretrain.config import RunConfig, known_keys, null_problems, unknown_key_problems
from pretrain.config_checks import config_problems

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


SWITCHES = {
    "dry_run": "print sizes, FLOPs and the plan, then stop",
    "fresh": "delete the run folder's earlier run first",
    "take_over": "train in a folder whose lock is held by a process that you know to be gone",
    "scratch": "train the last stage's model from its first step, for the FLOPs of all stages together: the baseline",
}

OPEN_ENDED = ("data.train.", "data.weights.", "data.validation.")  # the user's names of folders follow


@dataclass(frozen=True)
class Invocation:
    """What a command line asks for."""

    config: RunConfig
    dry_run: bool = False
    fresh: bool = False
    scratch: bool = False
    take_over: bool = False


def normalise(argv: list[str]) -> list[str]:
    """Dashes and underscores are equal in option names; a folder's name in one, `--data.train.my-corpus`, stays."""
    normalised = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        if name.startswith("--") and len(name) > 2 and not name[2:].startswith(OPEN_ENDED):
            argument = "--" + name[2:].replace("-", "_") + equals + value
        normalised.append(argument)
    return normalised


def build_parser() -> ArgumentParser:
    from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="pretrain",
        description="Train a model in one or more stages, growing it between two stages. Repeat the command to resume.",
        epilog="Token files, and which of them a step trained on: pretrain data --help. How a run is doing: "
        "pretrain status RUN. The validation loss of a checkpoint: pretrain validate CHECKPOINT.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; may be given several times")
    for name, meaning in SWITCHES.items():
        parser.add_argument(f"--{name}", action="store_true", help=meaning)
    parser.add_class_arguments(RunConfig)
    return parser


def split_arguments(argv: list[str]) -> tuple[list[str], dict[str, str], set[str]]:
    """Config files, `--section.key value` flags, and switches.

    Raises:
        ValueError: something that is no option, or an option without its value.
    """
    files: list[str] = []
    flags: dict[str, str] = {}
    switches: set[str] = set()
    rest = iter(argv)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if not name.startswith("--"):
            raise ValueError(f"{argument!r} is not an option; settings are given as --section.key value")
        if name[2:] in SWITCHES:
            if value not in ("", "true", "false"):
                raise ValueError(f"{argument!r}: {name} is a switch; give it alone, or as {name}=true or {name}=false")
            if value != "false":
                switches.add(name[2:])
            continue
        if not equals:
            value = next(rest, None)
            if value is None:
                raise ValueError("\n".join(_flag_problems([name[2:]])) or f"{name} needs a value")
        if name == "--config":
            files.append(value)
        else:
            flags[name[2:]] = value
    return files, flags, switches


def _flag_problems(flags: Iterable[str]) -> list[str]:
    """Unknown `--section.key` flags, with the nearest known one."""
    nested = {key: section for key, section in known_keys(RunConfig).items() if section is not None}
    known = [*SWITCHES, "config", *known_keys(RunConfig)]
    known += [f"{key}.{name}" for key, section in nested.items() for name in known_keys(section)]
    unknown = [name for name in flags if name not in known and not name.startswith(OPEN_ENDED)]
    return [f"--{name}: {unknown_key(name, known)}" for name in unknown]


def _nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def _parse_flag(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--{name} {text!r} cannot be read: {' '.join(str(error).split())}") from error


def parse(argv: list[str]) -> Invocation:
    """Settings and switches, checked.

    Raises:
        ValueError: unknown keys (with the nearest known), wrong types, or settings that do not fit together.
    """
    files, flags, switches = split_arguments(normalise(argv))
    settings = [read_settings_file(path) for path in files]
    problems = [f"{path}: {p}" for path, read in zip(files, settings, strict=True) for p in unknown_key_problems(read)]
    problems += _flag_problems(flags)
    given = {} if problems else settings_of(flags)
    problems += [f"flags: {problem}" for problem in unknown_key_problems(given)]
    if problems:
        raise ValueError("\n".join(problems))
    merged: dict[str, Any] = {}
    for values in [*settings, given]:
        merged = merge(merged, values)
    return Invocation(config_of(merged), **dict.fromkeys(switches, True))


def settings_of(flags: Mapping[str, str]) -> dict[str, Any]:
    """`{"data.window": "8"}` as nested settings, the values read as YAML."""
    settings: dict[str, Any] = {}
    for name, text in flags.items():
        settings = merge(settings, _nested(name, _parse_flag(name, text)))
    return settings


def config_of(settings: Mapping[str, Any]) -> RunConfig:
    """Nested settings, as they stand in a file, checked.

    Raises:
        ValueError: wrong types, or settings that do not fit together.
    """
    from jsonargparse import ArgumentError

    if problems := null_problems(settings):
        raise ValueError("\n".join(problems))
    parser = build_parser()
    try:
        parsed = parser.instantiate(parser.parse_object(dict(settings)))
    except ArgumentError as error:
        raise ValueError(f"{error}. See pretrain --help and configs/demo.yaml") from error
    config = RunConfig(**{key: getattr(parsed, key) for key in known_keys(RunConfig)})
    problems = config_problems(config)
    if problems:
        raise ValueError("\n".join(problems))
    return config
