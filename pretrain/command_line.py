"""From argv to a checked RunConfig: defaults, then YAML files in order, then flags (jsonargparse)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from pretrain.config import RunConfig, config_problems, known_keys, unknown_key_problems

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def normalise(argv: list[str]) -> list[str]:
    """Dashes and underscores are equal in option names; jsonargparse knows the field's own spelling only."""
    return [
        "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") and len(name) > 2 else argument
        for argument in argv
        for name, equals, value in [argument.partition("=")]
    ]


def build_parser() -> ArgumentParser:
    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(
        prog="pretrain",
        description="Train a model in one or more stages, growing it between two stages. Repeat the command to resume.",
        exit_on_error=False,
        default_meta=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; may be given several times")
    parser.add_argument("--dry_run", action="store_true", help="print sizes, FLOPs and the plan, then stop")
    parser.add_argument("--fresh", action="store_true", help="delete the run folder's earlier run first")
    parser.add_class_arguments(RunConfig)
    return parser


def _yaml_problems(argv: list[str]) -> list[str]:
    """Unknown keys in the YAML files that argv names, all of them at once."""
    paths = [value for name, value in zip(argv, [*argv[1:], ""], strict=True) if name == "--config"]
    paths += [argument.partition("=")[2] for argument in argv if argument.startswith("--config=")]
    problems = []
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"--config {path}: there is no such file")
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise ValueError(f"--config {path} must hold a mapping of settings")
        problems += [f"{path}: {problem}" for problem in unknown_key_problems(values)]
    return problems


def _flag_problems(argv: list[str]) -> list[str]:
    """Unknown `--section.key` flags, with the nearest known one."""
    nested = {key: value for key, value in known_keys(RunConfig).items() if value is not None}
    known = {"config", "dry_run", "fresh", "help", "print_config", *known_keys(RunConfig)}
    known |= {f"{key}.{name}" for key, section in nested.items() for name in known_keys(section)}
    given = [argument[2:].partition("=")[0] for argument in argv if argument.startswith("--")]
    unknown = [name for name in given if name.rstrip("+") not in known and not _inside_mapping(name)]
    return [problem for name in unknown for problem in [_unknown_flag(name, sorted(known))]]


def _inside_mapping(name: str) -> bool:
    return name.startswith(("data.train.", "data.weights.", "data.validation."))


def _unknown_flag(name: str, known: list[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=1, cutoff=0.4)
    return f"unknown option --{name}" + (f"; did you mean --{near[0]}?" if near else "; see pretrain --help")


def parse(argv: list[str]) -> tuple[RunConfig, bool, bool]:
    """Settings, whether it is a dry run, and whether to start afresh.

    Raises:
        ValueError: unknown keys (with the nearest known), wrong types, or settings that do not fit together.
    """
    from jsonargparse import ArgumentError

    argv = normalise(argv)
    problems = [*_yaml_problems(argv), *_flag_problems(argv)]
    if problems:
        raise ValueError("\n".join(problems))
    parser = build_parser()
    try:
        values = parser.parse_args(argv)
        initialised = parser.instantiate_classes(values)
    except ArgumentError as error:
        raise ValueError(f"{error}. See pretrain --help and configs/demo.yaml") from error
    settings = {key: getattr(initialised, key) for key in known_keys(RunConfig)}
    config = RunConfig(**settings)
    problems = config_problems(config)
    if problems:
        raise ValueError("\n".join(problems))
    return config, initialised.dry_run, initialised.fresh
