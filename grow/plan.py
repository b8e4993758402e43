"""GrowthPlan: everything about one growth, as data and without tensors. grow/apply.py carries it out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from grow.layer_map import check_layer_map, connection_rate_text
from lit_gpt.axes import layer_of, parameter_shapes, with_layer
from lit_gpt.config import Config, unknown_key

OPTIMIZER_POLICIES = {
    "reset": "the optimizer starts anew",
    "map": "every layer takes the moments and the step of the layer it was copied from",
    "map-old-zero-new": "the first copy of each layer keeps moments and step, further copies start from zero",
}


@dataclass(frozen=True)
class GrowthPlan:
    """From a source model to a larger one. Depth growth copies whole layers; all other sizes stay.

    Raises:
        ValueError: one message with a line for every way in which the parts do not fit each other.
    """

    operator: str
    """Name of the operator that made the plan, as in grow/operators.py."""
    src: Config
    """Sizes before growth."""
    dst: Config
    """Sizes after growth."""
    layer_map: tuple[int, ...]
    """layer_map[i] is the source layer, counted from 0, that layer i of the grown model starts from."""
    seed: int = 0
    """Seed of whatever the operator draws; copies draw nothing."""
    options: dict[str, Any] = field(default_factory=dict)
    """What the operator was asked for beyond the sizes, as the user wrote it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_map", tuple(self.layer_map))  # the dataclass is frozen
        changed = [name for name in differing_sizes(self.src, self.dst) if name != "n_layer"]
        if changed:
            raise ValueError("\n".join(_change(name, self.src, self.dst) for name in changed))
        check_layer_map(self.layer_map, self.src.n_layer, self.dst.n_layer)

    @property
    def connection_rate(self) -> str | None:
        """R_c, unreduced: "k/(n-1)"; None for a grown model of one layer."""
        return connection_rate_text(self.layer_map)

    @property
    def is_identity(self) -> bool:
        """Whether the grown model is the source."""
        return self.layer_map == tuple(range(self.src.n_layer))

    def sources(self) -> dict[str, str]:
        """Every parameter of the grown model, in the order of the model -> the source parameter it starts from."""
        layers = {name: layer_of(name) for name in parameter_shapes(self.dst)}
        return {
            name: name if layer is None else with_layer(name, self.layer_map[layer]) for name, layer in layers.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, layers counted from 0."""
        return dataclasses.asdict(self) | {"layer_map": list(self.layer_map)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GrowthPlan:
        """The inverse of `to_dict`.

        Raises:
            ValueError: unknown or missing keys, or values that do not fit.
        """
        known = [part.name for part in dataclasses.fields(cls)]
        problems = [f"growth plan: {unknown_key(key, known)}" for key in values if key not in known]
        problems += [f"growth plan: key {key!r} is missing" for key in known if key not in values]
        if problems:
            raise ValueError("\n".join(problems))
        configs = {key: Config.from_dict(values[key]) for key in ("src", "dst")}
        return cls(**{**values, **configs, "options": dict(values["options"])})


def differing_sizes(a: Config, b: Config) -> list[str]:
    """Fields in which two configurations describe different models; their names are no difference."""
    return [
        part.name
        for part in dataclasses.fields(Config)
        if part.name != "name" and getattr(a, part.name) != getattr(b, part.name)
    ]


def _change(name: str, src: Config, dst: Config) -> str:
    before, after = getattr(src, name), getattr(dst, name)
    return f"{name} changes from {before} to {after}, but growing in depth keeps it; make them equal"
