"""Several things wrong with a file, one error that names them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_gpt.axes import parameter_shapes
from lit_gpt.config import Config
from lit_gpt.errors import DataError

SHOWN_PROBLEMS = 8  # a wrong configuration makes hundreds


def check_names(wanted: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
    """Raises DataError, naming them, if `found` lacks names of `wanted` or has others."""
    names = set(found)  # `in` would make every tensor of a lazy mapping
    problems = [f"{where} lack {name}" for name in wanted if name not in names]
    problems += [f"{where} have an unexpected {name}" for name in found if name not in wanted]
    raise_problems(problems, "use the configuration that belongs to these weights")


def bounded_shapes(config: Config, n_tensors: int, where: str) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters of a configuration that comes with `n_tensors` tensors.

    Raises:
        DataError: it has more layers than there are tensors. A damaged file may ask for 1e12 of them.
    """
    if config.n_layer > n_tensors:
        raise DataError(
            f"{where}: the configuration has {config.n_layer} layers, but there are {n_tensors} tensors; "
            f"use the configuration that belongs to these weights"
        )
    return parameter_shapes(config)


def shape_problems(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str
) -> list[str]:
    """One line for every tensor that is missing, unexpected, or of another shape than its configuration wants."""
    problems = [f"{where}: tensor {name} is missing" for name in wanted if name not in found]
    problems += [f"{where}: unexpected tensor {name}" for name in found if name not in wanted]
    return problems + [
        f"{where}: {name} has shape {found[name]}, the configuration wants {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]


def raise_problems(problems: Sequence[str | None], way_out: str) -> None:
    """Raises DataError with a line for each of the first problems, unless there are none."""
    real = [problem for problem in problems if problem]
    if not real:
        return
    lines = real[:SHOWN_PROBLEMS]
    if len(real) > SHOWN_PROBLEMS:
        lines.append(f"... and {len(real) - SHOWN_PROBLEMS} more")
    text = "\n".join(lines)
    before, _, said = text.rpartition("; ")
    raise DataError(f"{before if before and way_out.startswith(said) else text}; {way_out}")


def read_json(path: Path, way_out: str = "restore the file") -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        DataError: the file is missing or holds something else.
    """
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} is missing, the checkpoint is not complete; {way_out}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}; {way_out}") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} does not hold a JSON object; {way_out}")
    return values
