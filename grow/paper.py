"""Numbers that the stacking paper (arXiv 2405.15319v2) prints, from paper.json: scores of models, and speed-ups.

Sizes are named as there, in round numbers. The speed-ups whose place is the project page were read off its plot.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class PrintedSpeedup:
    """What stacking gained at one size and one number of tokens."""

    where: str
    """The figure."""
    parameters: float
    """The name of the size, in numbers."""
    tokens: float
    """Of training from scratch."""
    speedup: float
    """A share: FLOPs from scratch over FLOPs of growing, minus one, at equal training loss."""


@cache
def _numbers() -> dict[str, Any]:
    return json.loads(files("grow").joinpath("paper.json").read_text(encoding="utf-8"))


def printed_models() -> Sequence[Mapping[str, Any]]:
    """Each has where, name, group ("operators" for those of the comparison of operators, "models" for others),
    parameters, tokens, scores and speedup in per cent, and loss."""
    return _numbers()["models"]


def printed_speedups() -> list[PrintedSpeedup]:
    """Of stacking, size by size as they stand in the file."""
    return [PrintedSpeedup(**{**each, "speedup": round(each["speedup"] / 100, 3)}) for each in _numbers()["speedups"]]
