"""Fields of a Config that are more than one key of config.json under another name. For lit_gpt/hf_families.py.

A rule's two functions are each other's inverse; both raise ValueError with one line for what cannot be said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lit_gpt.config import Config, RopeScaling

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Rule:
    """Some of our fields, and how they are read from and written to config.json."""

    ours: tuple[str, ...]
    """Fields of Config."""
    keys: tuple[str, ...]
    """Keys of config.json."""
    to_hf: Callable[[Config], dict[str, Any]]
    from_hf: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Of the whole config.json, absent keys filled in."""


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and no flag."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


# Rotary positions


def _rope(kinds: tuple[str, ...], partial: bool) -> Rule:
    """transformers 5 nests the base in rope_parameters, 4 has it beside rope_scaling; both are written."""

    def to_hf(config: Config) -> dict[str, Any]:
        if config.rotary_percentage != 1.0 and not partial:
            raise ValueError(f"rotary_percentage={config.rotary_percentage} rotates heads in part")
        scaling = _scaling_to_hf(config.rope_scaling)
        if scaling["rope_type"] not in kinds:
            raise ValueError(f"rope_scaling={config.rope_scaling} changes the rotary frequencies")
        share = {"partial_rotary_factor": config.rotary_percentage} if partial else {}
        before = {} if config.rope_scaling is None else {"rope_scaling": scaling}
        nested = {**scaling, "rope_theta": config.rope_base, **share}
        return {"rope_theta": config.rope_base, **share, **before, "rope_parameters": nested}

    def from_hf(values: Mapping[str, Any]) -> dict[str, Any]:
        base, scaling, share = values["rope_theta"], None, values.get("partial_rotary_factor", 1.0)
        for key, nested in _nested_rope(values):
            kind = nested.get("rope_type", nested.get("type", "default"))
            share = nested.get("partial_rotary_factor", share)
            if kind not in kinds or (share != 1.0 and not partial):
                raise ValueError(
                    f"{key}={dict(nested)!r} means scaled or partial RoPE, which this model does not have; it has "
                    f"{', '.join(kinds)}"
                )
            scaling = _scaling_from_hf(kind, nested, values) if kind != "default" else scaling
            base = nested.get("rope_theta", base)
        if not is_number(base) or base <= 0:
            raise ValueError(f"rope_theta={base!r} is not a positive number")
        if not is_number(share):
            raise ValueError(f"partial_rotary_factor={share!r} is not a number")
        return {"rope_base": base, "rope_scaling": scaling, "rotary_percentage": share}

    keys = ("rope_theta", "rope_scaling", "rope_parameters", *(("partial_rotary_factor",) if partial else ()))
    return Rule(("rope_base", "rope_scaling", "rotary_percentage"), keys, to_hf, from_hf)


def _nested_rope(values: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    found = [(key, values[key]) for key in ("rope_parameters", "rope_scaling") if values.get(key) is not None]
    for key, nested in found:
        if not isinstance(nested, Mapping):
            raise ValueError(f"{key}={nested!r} is not an object")
    return found


_LLAMA3 = {
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_block_size": "original_max_position_embeddings",
}


def _scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default"}
    more = {theirs: getattr(scaling, ours) for ours, theirs in _LLAMA3.items()} if scaling.kind == "llama3" else {}
    return {"rope_type": scaling.kind, "factor": scaling.factor, **more}


def _scaling_from_hf(kind: str, nested: Mapping[str, Any], values: Mapping[str, Any]) -> RopeScaling:
    nested = {"original_max_position_embeddings": values.get("max_position_embeddings"), **nested}
    wanted = {"factor": "factor", **(_LLAMA3 if kind == "llama3" else {})}
    wrong = [theirs for theirs in wanted.values() if not is_number(nested.get(theirs))]
    if wrong:
        raise ValueError(f"{kind} RoPE scaling needs the number {wrong[0]}, which is {nested.get(wrong[0])!r}")
    return RopeScaling(kind, **{ours: nested[theirs] for ours, theirs in wanted.items()})


ROPE = _rope(("default", "linear", "llama3"), partial=False)
PARTIAL_ROPE = _rope(("default",), partial=True)


# Biases, heads, embeddings


def _flag(values: Mapping[str, Any], key: str) -> bool:
    if not isinstance(values.get(key, False), bool):
        raise ValueError(f"{key}={values[key]!r} is not true or false")
    return values.get(key, False)


def _biases_to_hf(config: Config) -> dict[str, Any]:
    if config.qkv_bias != config.proj_bias:
        raise ValueError(f"qkv_bias={config.qkv_bias} and proj_bias={config.proj_bias} differ")
    return {"attention_bias": config.qkv_bias}


BIASES = Rule(
    ("qkv_bias", "proj_bias"),
    ("attention_bias",),
    _biases_to_hf,
    lambda values: dict.fromkeys(("qkv_bias", "proj_bias"), _flag(values, "attention_bias")),
)
MLP_BIAS = Rule(
    ("mlp_bias",),
    ("mlp_bias",),
    lambda config: {"mlp_bias": config.mlp_bias},
    lambda values: {"mlp_bias": _flag(values, "mlp_bias")},
)


def _whole_heads(config: Config) -> dict[str, Any]:
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd={config.n_embd}, n_head={config.n_head} is no multiple")
    return {}


WHOLE_HEADS = Rule((), (), _whole_heads, lambda values: {})


def _scale_to_hf(config: Config) -> dict[str, Any]:
    if config.embedding_scale != config.n_embd**0.5:
        raise ValueError(f"embedding_scale={config.embedding_scale} is not the root of n_embd={config.n_embd}")
    return {}


EMBEDDING_SCALE = Rule(
    ("embedding_scale",), (), _scale_to_hf, lambda values: {"embedding_scale": values["hidden_size"] ** 0.5}
)


# Layers without rotation, and layers that see a window


def _nope_from_hf(values: Mapping[str, Any]) -> dict[str, Any]:
    layers, every = values["num_hidden_layers"], values["no_rope_layer_interval"]
    given = values.get("no_rope_layers")
    if given is None:
        return {"rope_layers": [(layer + 1) % every != 0 for layer in range(layers)]}
    if not isinstance(given, list) or len(given) < layers or not all(entry in (0, 1) for entry in given):
        raise ValueError(f"no_rope_layers={given!r} is not a list with 1 or 0 for each of {layers} layers")
    return {"rope_layers": [bool(entry) for entry in given[:layers]]}


NOPE_LAYERS = Rule(
    ("rope_layers",),
    ("no_rope_layers", "no_rope_layer_interval"),
    lambda config: {"no_rope_layers": [int(config.rotates(layer)) for layer in range(config.n_layer)]},
    _nope_from_hf,
)


def _window(values: Mapping[str, Any]) -> int | None:
    window = values.get("sliding_window")
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"sliding_window={window!r} is neither null nor a number of tokens")
    return window


def _window_to_hf(config: Config) -> dict[str, Any]:
    if config.sliding_layers is not None:
        raise ValueError("sliding_layers has windows in some layers")
    return {"sliding_window": config.sliding_window}


WINDOW = Rule(
    ("sliding_window", "sliding_layers"),
    ("sliding_window",),
    _window_to_hf,
    lambda values: {"sliding_window": _window(values)},
)


def _typed_window(default_slides: Callable[[Mapping[str, Any], int], bool]) -> Rule:
    """A window that use_sliding_window turns on, for layers that layer_types names; older files have a rule instead."""

    def to_hf(config: Config) -> dict[str, Any]:
        slides = [config.slides(layer) for layer in range(config.n_layer)]
        return {
            "use_sliding_window": config.sliding_window is not None,
            "sliding_window": config.sliding_window,
            "max_window_layers": slides.index(True) if True in slides else config.n_layer,
            "layer_types": [SLIDING if each else FULL for each in slides],
        }

    def from_hf(values: Mapping[str, Any]) -> dict[str, Any]:
        window = _window(values) if _flag(values, "use_sliding_window") else None
        n_layer, types = values["num_hidden_layers"], values.get("layer_types")
        if types is not None and (not isinstance(types, list) or len(types) != n_layer):
            raise ValueError(f"layer_types={types!r} is not a list of {n_layer} layers")
        if types is None:
            slides = [window is not None and default_slides(values, layer) for layer in range(n_layer)]
        elif set(types) <= {FULL, SLIDING} and (window is not None or SLIDING not in types):
            slides = [each == SLIDING for each in types]
        else:
            raise ValueError(
                f"layer_types={sorted(map(str, set(types)))} with use_sliding_window="
                f"{values.get('use_sliding_window', False)} is another attention than {FULL} and {SLIDING}"
            )
        return {"sliding_window": window, "sliding_layers": slides if window is not None else None}

    keys = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
    return Rule(("sliding_window", "sliding_layers"), keys, to_hf, from_hf)


WINDOW_FROM_LAYER = _typed_window(lambda values, layer: layer >= values["max_window_layers"])
WINDOW_BESIDE_NOPE = _typed_window(lambda values, layer: not _nope_from_hf(values)["rope_layers"][layer])
