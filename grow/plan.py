"""GrowthPlan: everything about one growth, as data and without tensors. grow/apply.py carries it out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from grow.layer_map import check_layer_map, connection_rate_text
from grow.sizes import with_depth
from grow.width_plan import SIZES, WidthPlan
from lit_gpt.axes import layer_of, name_in_block, parameter_shapes, with_layer
from lit_gpt.config import PER_LAYER, WITHOUT_EFFECT, Config, unknown_key

OPTIMIZER_POLICIES = {
    "reset": "the optimizer starts anew",
    "map": "every copy takes the step of what it was copied from, and its moments as far as gradients are shared",
    "map-old-zero-new": "the first copy of each layer, channel and head keeps moments and step, the rest is zero",
}
SILENCED = ("attn.proj.weight", "attn.proj.bias", "mlp.swiglu.w3.weight", "mlp.swiglu.w3.bias")
"""What a block writes with; where all are zero it passes its input on unchanged, whatever else it holds."""
FUSIONS = {
    "aligned": "the mean of two neighbours, heads and neurons of the upper one matched to those of the lower one",
    "predicted": "what a network, fitted to the layers of the source, predicts between two neighbours",
}
"""How a layer is made from two layers of the source: grow/fused.py."""
SYMMETRY = "copies with even shares stay equal in training: the model never gets more than its source had"
NEEDS_SCIPY = (
    "heads and neurons of two layers are matched by scipy, which is not installed; "
    "install the [report] extra: pip install 'lit-grow[report]', or use llama-pro"
)
MIN_LAYERS_TO_PREDICT = 3  # a layer and its two neighbours are an example
MARKS = ("identity_layers", "fused_layers", "reference_layers")
"""Fields of a plan that name layers of the grown model which are no plain copies; see `grow.layer_map.layer_texts`."""
# plans written before these existed have none of them
ADDED_KEYS = (
    *("identity_layers", "width", "noise", "fusion", "fused_layers", "reference", "reference_layers", "fresh", "data"),
)


@dataclass(frozen=True)
class Reference:
    """A second model that a growth takes layers from."""

    config: Config
    """Its sizes."""
    manifest: str
    """Its identity, see `lit_gpt.checkpoint.manifest_sha256`."""
    path_name: str
    """Last part of its path."""

    def problems(self, src: Config) -> list[str]:
        """A line if its layers are none that a model of sizes `src` can have."""
        unlike = [name for name in differing_sizes(self.config, src) if name not in ("n_layer", "block_size")]
        values = "; ".join(f"{name} is {getattr(self.config, name)}, not {getattr(src, name)}" for name in unlike)
        reason = f"the reference {self.path_name} does not fit the source: {values}"
        return [f"{reason}; give the larger model that the source was cut from"] if unlike else []

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Reference:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**values, "config": Config.from_dict(values["config"])})


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
    fusion: str | None = None
    """How the fused layers are made: one of FUSIONS."""
    fused_layers: tuple[int, ...] = ()
    """Layers of the grown model that are made from two of the source: that in layer_map and the one after it."""
    reference: Reference | None = None
    """The model that the reference layers come from."""
    reference_layers: tuple[int, ...] = ()
    """Layers of the grown model whose layer in layer_map is one of the reference, and not of the source."""
    fresh: bool = False
    """Whether nothing is copied: every parameter has the initial weights of the grown model."""
    data: dict[str, Any] = field(default_factory=dict)
    """What the weights were made from beside the source's, and how; empty until an operator that reads data has."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_map", tuple(self.layer_map))  # the dataclass is frozen
        for mark in MARKS:
            object.__setattr__(self, mark, tuple(sorted(set(getattr(self, mark)))))
        explained = {"n_layer", *PER_LAYER}
        if self.fresh or self.width is not None:
            explained |= {"head_size", *SIZES}
        changed = [name for name in differing_sizes(self.src, self.dst) if name not in explained]
        problems = [_change(name, self.src, self.dst) for name in changed]
        if self.width is not None:
            problems += self.width.problems(self.src, self.dst)
        problems += self._mark_problems()
        if not 0 <= self.noise <= 1:
            problems.append(f"noise={self.noise} must be in [0, 1]: it is the share of the weights it replaces")
        if problems:
            raise ValueError("\n".join(problems))
        foreign = [i for i, layer in enumerate(self.layer_map) if layer is None or i in self.reference_layers]
        copied = [0 if i in foreign else layer for i, layer in enumerate(self.layer_map)]
        check_layer_map(copied, self.src.n_layer, self.dst.n_layer)
        if problems := [*self._fusion_problems(), *self._reference_problems(), *self._flag_problems()]:
            raise ValueError("\n".join(problems))

    def _flag_problems(self) -> list[str]:
        """What each layer is has to follow the layer map; layers of a reference are what they are there."""
        flags_of = self.src if self.reference is None else self.reference.config
        mapped = with_depth(flags_of, self.dst.n_layer, self.layer_map)
        changed = [name for name in PER_LAYER if getattr(self.dst, name) != getattr(mapped, name)]
        return [_change(name, mapped, self.dst) for name in changed]

    def _mark_problems(self) -> list[str]:
        found = []
        for mark in MARKS:
            outside = [layer for layer in getattr(self, mark) if not 0 <= layer < self.dst.n_layer]
            what = mark.removesuffix("_layers")
            found += [
                f"{what} layer {layer} (counted from 0) is none of the {self.dst.n_layer} layers"
                for layer in outside[:1]
            ]
        return found

    def _fusion_problems(self) -> list[str]:
        if self.fusion is None and not self.fused_layers:
            return []
        if self.fusion not in FUSIONS:
            return [f"fusion={self.fusion!r} is no way to make layers from two; known: {', '.join(FUSIONS)}"]
        if self.width is not None:
            return ["layers that are made from two cannot grow in width too; grow once in depth and once in width"]
        if self.fusion == "predicted" and self.src.n_layer < MIN_LAYERS_TO_PREDICT:
            return [
                f"layers are predicted from a source of {MIN_LAYERS_TO_PREDICT} layers or more, and it has "
                f"{self.src.n_layer}; use opt-deus or interpolate"
            ]
        lower = {i: self.layer_map[i] for i in self.fused_layers}
        return [
            f"fused layer {i} (counted from 0) lies above layer {layer} of the source, and no other comes after it"
            for i, layer in lower.items()
            if layer is None or layer + 1 >= self.src.n_layer
        ]

    def _reference_problems(self) -> list[str]:
        if self.reference is None:
            return [f"layers {self.reference_layers} come from a reference; name it"] if self.reference_layers else []
        if self.width is not None:
            return ["layers of a reference cannot grow in width too; grow once in depth and once in width"]
        named = {i: self.layer_map[i] for i in self.reference_layers}
        missing = [layer for layer in named.values() if layer is None or not 0 <= layer < self.reference.config.n_layer]
        problems = self.reference.problems(self.src)
        if missing:
            problems.append(
                f"the reference has {self.reference.config.n_layer} layers, and none is {missing[0]} from 0"
            )
        return problems

    @property
    def connection_rate(self) -> str | None:
        """R_c, unreduced: "k/(n-1)"; None for a grown model of one layer. A new layer is connected to no other."""
        return connection_rate_text([-2 if layer is None else layer for layer in self.layer_map])

    @property
    def is_identity(self) -> bool:
        """Whether the grown model is the source."""
        same_layers = self.layer_map == tuple(range(self.src.n_layer)) and not any(self.marks.values())
        return same_layers and not self.noise and (self.width is None or self.width.is_identity)

    @property
    def stays_symmetric(self) -> bool:
        """Whether there are copies that deterministic training can never tell apart."""
        return self.width is not None and self.width.stays_symmetric and not self.noise

    @property
    def marks(self) -> dict[str, tuple[int, ...]]:
        """The layers of the grown model that are no plain copies, by MARKS."""
        return {mark: getattr(self, mark) for mark in MARKS}

    def sources(self) -> dict[str, str | None]:
        """Every parameter of the grown model, in the order of the model -> the source parameter it starts from.

        None for those of a fresh model or a layer that is new, made from two or from a reference, and for those that
        are zero in an identity layer.
        """
        return {name: self.source_of(name) for name in parameter_shapes(self.dst)}

    def source_of(self, name: str) -> str | None:
        """The source parameter that the parameter `name` of the grown model starts from, see `sources`."""
        layer = layer_of(name)
        if self.fresh:
            return None
        if layer is None:
            return name
        source = self.layer_map[layer]
        is_copy = source is not None and layer not in (*self.fused_layers, *self.reference_layers)
        return with_layer(name, source) if is_copy and not self.is_silenced(name) else None

    def is_silenced(self, name: str) -> bool:
        """Whether the parameter `name` of the grown model is zero because its layer is an identity layer."""
        return layer_of(name) in self.identity_layers and name_in_block(name) in SILENCED

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, layers counted from 0."""
        lists = {"layer_map": list(self.layer_map), **{mark: list(layers) for mark, layers in self.marks.items()}}
        width = None if self.width is None else self.width.to_dict()
        return dataclasses.asdict(self) | lists | {"width": width}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GrowthPlan:
        """The inverse of `to_dict`; also for plans stored before ADDED_KEYS existed.

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
        if values.get("reference") is not None:
            parts["reference"] = Reference.from_dict(values["reference"])
        return cls(**{**values, **parts, "options": dict(values["options"])})


def differing_sizes(a: Config, b: Config) -> list[str]:
    """Fields in which two configurations describe different models; names are no difference."""
    return [
        part.name
        for part in dataclasses.fields(Config)
        if part.name not in WITHOUT_EFFECT and getattr(a, part.name) != getattr(b, part.name)
    ]


def _change(name: str, src: Config, dst: Config) -> str:
    before, after = getattr(src, name), getattr(dst, name)
    return f"{name} changes from {before} to {after}, but this growth keeps it; make them equal"
