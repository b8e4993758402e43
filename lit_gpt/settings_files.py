"""YAML files of settings, and how one lies over another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml


def read_settings_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file of settings")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of settings")
    return values


def merge(low: dict[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`high` over `low`: mappings key by key, anything else, lists too, as a whole."""
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


def differences(key: str, before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value before, value after) of every leaf in which two trees of settings differ; None: not there."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted({*before, *after}):
            yield from differences(f"{key}.{name}" if key else name, before.get(name), after.get(name))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (old, new) in enumerate(zip(before, after, strict=True), 1):
            yield from differences(f"{key}[{number}]", old, new)
    elif before != after:
        yield key, before, after
