"""GrowthPlan: everything about one growth, as data and without tensors. grow/apply.py carries it out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from grow.layer_map import check_layer_map, connection_rate_text
from grow.width_plan import SIZES, WidthPlan
from lit_gpt.axes import layer_of, name_in_block, parameter_shapes, with_layer
from lit_gpt.config import Config, unknown_key

OPTIMIZER_POLICIES = {
    "reset": "the optimizer starts anew",
    "map": "every copy takes the step of what it was copied from, and its moments as far as gradients are shared",
    "map-old-zero-new": "the first copy of each layer, channel and head keeps moments and step, the rest is zero",
}
SILENCED = ("attn.proj.weight", "mlp.swiglu.w3.weight")
"""What a block writes with; where both are zero it passes its input on unchanged, whatever else it holds."""
ADDED_KEYS = ("identity_layers", "width", "noise", "data")  # plans written before these existed have none of them


@dataclass(frozen=True)
class GrowthPlan:
    """From a source model to a larger one: whole layers are copied or added, then all of them grow in width.

    Raises:
        ValueError: one message with a line for every way in which the parts do not fit each other.
    """

    operator: str
    """Name of the operator that made the plan, as in grow/operators.py."""
    src: Config
    """Sizes before growth."""
    dst: Config
    """Sizes after growth."""
    layer_map: tuple[int | None, ...]
    """layer_map[i] is the source layer, counted from 0, that layer i of the grown model starts from. None: new."""
    seed: int = 0
    """Seed of new weights and of all else that is drawn; copies draw nothing."""
    options: dict[str, Any] = field(default_factory=dict)
    """What the operator was asked for beyond the sizes, as the user wrote it."""
    identity_layers: tuple[int, ...] = ()
    """Layers of the grown model that start as the identity: what they write into the residual stream is zero."""
    width: WidthPlan | None = None
    """How every layer grows in width; None: it does not."""
    noise: float = 0.0
    """Share of every grown matrix that is replaced by noise of its initial scale (arXiv 2405.15319, appendix I.2)."""
    data: dict[str, Any] = field(default_factory=dict)
    """What the weights were made from beside the source's, and how; empty until an operator that reads data has."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_map", tuple(self.layer_map))  # the dataclass is frozen
        object.__setattr__(self, "identity_layers", tuple(sorted(set(self.identity_layers))))
        explained = {"n_layer"} if self.width is None else {"n_layer", "head_size", *SIZES}
        changed = [name for name in differing_sizes(self.src, self.dst) if name not in explained]
        problems = [_change(name, self.src, self.dst) for name in changed]
        if self.width is not None:
            problems += self.width.problems(self.src, self.dst)
        outside = [layer for layer in self.identity_layers if not 0 <= layer < self.dst.n_layer]
        if outside:
            problems.append(f"identity layer {outside[0]} (counted from 0) is none of the {self.dst.n_layer} layers")
        if not 0 <= self.noise <= 1:
            problems.append(f"noise={self.noise} must be in [0, 1]: it is the share of the weights it replaces")
        if problems:
            raise ValueError("\n".join(problems))
        copied = [0 if layer is None else layer for layer in self.layer_map]
        check_layer_map(copied, self.src.n_layer, self.dst.n_layer)

    @property
    def connection_rate(self) -> str | None:
        """R_c, unreduced: "k/(n-1)"; None for a grown model of one layer. A new layer is connected to no other."""
        return connection_rate_text([-2 if layer is None else layer for layer in self.layer_map])

    @property
    def is_identity(self) -> bool:
        """Whether the grown model is the source."""
        same_layers = self.layer_map == tuple(range(self.src.n_layer)) and not self.identity_layers
        return same_layers and not self.noise and (self.width is None or self.width.is_identity)

    def sources(self) -> dict[str, str | None]:
        """Every parameter of the grown model, in the order of the model -> the source parameter it starts from.

        None for those of a new layer, and for those that are zero in an identity layer.
        """
        return {name: self.source_of(name) for name in parameter_shapes(self.dst)}

    def source_of(self, name: str) -> str | None:
        """The source parameter that the parameter `name` of the grown model starts from, see `sources`."""
        layer = layer_of(name)
        if layer is None:
            return name
        source = self.layer_map[layer]
        return None if source is None or self.is_silenced(name) else with_layer(name, source)

    def is_silenced(self, name: str) -> bool:
        """Whether the parameter `name` of the grown model is zero because its layer is an identity layer."""
        return layer_of(name) in self.identity_layers and name_in_block(name) in SILENCED

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, layers counted from 0."""
        lists = {"layer_map": list(self.layer_map), "identity_layers": list(self.identity_layers)}
        width = None if self.width is None else self.width.to_dict()
        return dataclasses.asdict(self) | lists | {"width": width}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GrowthPlan:
        """The inverse of `to_dict`; also for plans stored before width, identity layers and noise existed.

        Raises:
            ValueError: unknown or missing keys, or values that do not fit.
        """
        known = [part.name for part in dataclasses.fields(cls)]
        problems = [f"growth plan: {unknown_key(key, known)}" for key in values if key not in known]
        problems += [f"growth plan: key {key!r} is missing" for key in known if key not in (*values, *ADDED_KEYS)]
        if problems:
            raise ValueError("\n".join(problems))
        parts: dict[str, Any] = {key: Config.from_dict(values[key]) for key in ("src", "dst")}
        if values.get("width") is not None:
            parts["width"] = WidthPlan.from_dict(values["width"])
        return cls(**{**values, **parts, "options": dict(values["options"])})


def differing_sizes(a: Config, b: Config) -> list[str]:
    """Fields in which two configurations describe different models; their names are no difference."""
    return [
        part.name
        for part in dataclasses.fields(Config)
        if part.name != "name" and getattr(a, part.name) != getattr(b, part.name)
    ]


def _change(name: str, src: Config, dst: Config) -> str:
    before, after = getattr(src, name), getattr(dst, name)
    return f"{name} changes from {before} to {after}, but this growth keeps it; make them equal"
