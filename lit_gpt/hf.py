"""Between our tensors and configs and those of Hugging Face; both directions derive from lit_gpt/hf_families.py.

RoPE is half-split on both sides, so no row moves but those of the fused qkv. Legend: C n_embd, H n_head,
G n_query_groups, D head_size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lit_gpt.axes import layer_of, name_in_block, with_layer
from lit_gpt.config import WITHOUT_EFFECT, Config
from lit_gpt.errors import DataError
from lit_gpt.hf_families import FAMILIES, LLAMA, REFUSED, Family
from lit_gpt.hf_rules import is_number

LAYER_PREFIX = "model.layers.{}."
IGNORED = (".rotary_emb.inv_freq",)
"""Ends of tensor names that old files carry and no model needs."""
FUSED = ("attn.attn.weight", "attn.attn.bias")
MAX_LAYERS = 10_000  # a damaged file may ask for 1e12 of them


def family_of(config: Config) -> Family:
    """The family a model is exported as.

    Raises:
        ValueError: there is none of that name.
    """
    if config.family not in FAMILIES:
        raise ValueError(f"family={config.family!r} is unknown; known: {', '.join(FAMILIES)}")
    return FAMILIES[config.family]


def hf_names(name: str, family: Family = LLAMA) -> tuple[str, ...]:
    """The Hugging Face names of one of our tensors: one, or those of q, k and v.

    Raises:
        ValueError: the family has no such tensor.
    """
    key = name_in_block(name)
    if key not in family.names:
        raise ValueError(f"{name!r} has no counterpart in {family.architecture}; known: {', '.join(family.names)}")
    layer = layer_of(name)
    prefix = "" if layer is None else LAYER_PREFIX.format(layer)
    return tuple(prefix + theirs for theirs in family.names[key])


def to_hf(name: str, read: Callable[[str], Tensor], config: Config) -> dict[str, Tensor]:
    """One of our tensors, as `read` returns it, under its Hugging Face names; a fused qkv becomes three.

    Nothing for one that lies in a matrix of theirs that begins with another of ours.
    """
    family, key = family_of(config), name_in_block(name)
    names, alike = hf_names(name, family), family.named_alike(key)
    if key in FUSED:
        parts = split_qkv(read(name), config)
        return dict(zip(names, parts if len(names) == 3 else (torch.cat(parts),), strict=True))
    if len(alike) == 1:
        return {names[0]: read(name)}
    if key != alike[0]:
        return {}
    return {names[0]: torch.cat([read(with_layer(each, layer_of(name) or 0)) for each in alike])}


def from_hf(name: str, read: Callable[[str], Tensor], config: Config) -> Tensor:
    """Our tensor `name`, made of what `read` returns for its Hugging Face names."""
    family, key = family_of(config), name_in_block(name)
    parts = [read(theirs) for theirs in hf_names(name, family)]
    if key in FUSED:
        heads = (config.n_head, config.n_query_groups, config.n_query_groups)
        q, k, v = parts if len(parts) == 3 else parts[0].split([count * config.head_size for count in heads])
        return fuse_qkv(q, k, v, config)
    alike = family.named_alike(key)
    return parts[0] if len(alike) == 1 else parts[0].chunk(len(alike))[alike.index(key)].clone()


def hf_shapes(name: str, shape: tuple[int, ...], config: Config) -> dict[str, tuple[int, ...]]:
    """The shapes that one of our tensors of shape `shape` has under its Hugging Face names, see `to_hf`."""
    family, key = family_of(config), name_in_block(name)
    names, alike = hf_names(name, family), family.named_alike(key)
    if len(names) == 1:
        return {names[0]: (shape[0] * len(alike), *shape[1:])} if key == alike[0] else {}
    heads = (config.n_head, config.n_query_groups, config.n_query_groups)
    return {theirs: (count * config.head_size, *shape[1:]) for theirs, count in zip(names, heads, strict=True)}


def fuse_qkv(q: Tensor, k: Tensor, v: Tensor, config: Config) -> Tensor:
    """Interleave per query group: its query heads, then its key head, then its value head.

    Args:
        q: (H D, ...), head-major.
        k: (G D, ...).
        v: (G D, ...).
        config: gives H, G and D.

    Returns:
        ((H + 2 G) D, ...), a new tensor.
    """
    G, D = config.n_query_groups, config.head_size
    parts = (q.view(G, config.q_per_kv, D, *q.shape[1:]), k.view(G, 1, D, *k.shape[1:]), v.view(G, 1, D, *v.shape[1:]))
    return torch.cat(parts, dim=1).reshape(config.qkv_size, *q.shape[1:])


def split_qkv(qkv: Tensor, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `fuse_qkv`: ((H + 2 G) D, ...) -> q (H D, ...), k (G D, ...), v (G D, ...), all contiguous."""
    rest = qkv.shape[1:]
    grouped = qkv.reshape(config.n_query_groups, config.q_per_kv + 2, config.head_size, *rest)
    q, k, v = grouped.split((config.q_per_kv, 1, 1), dim=1)
    return tuple(part.reshape(-1, *rest).contiguous() for part in (q, k, v))


def config_to_hf(config: Config, dtype: torch.dtype, *, bos_id: int | None, eos_id: int | None) -> dict[str, Any]:
    """What config.json shall say. `vocab_size` is padded_vocab_size: Hugging Face knows rows, not tokens.

    Raises:
        ValueError: the model is not one that Hugging Face can express in its family.
    """
    family = family_of(config)
    problems = _inexpressible(config, family)
    if problems:
        others = [other.model_type for other in FAMILIES.values() if not _inexpressible(config, other)]
        way_out = f"family {' or '.join(others)} has it" if others else "keep this model in training form"
        raise ValueError("\n".join(f"{problem}; {way_out}" for problem in problems))
    from_rules: dict[str, Any] = {}
    for rule in family.rules:
        from_rules |= rule.to_hf(config)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.constants,
        **{theirs: getattr(config, ours) for ours, theirs in family.fields.items()},
        **from_rules,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": None,
    }


def _inexpressible(config: Config, family: Family) -> list[str]:
    """A line for every field of a model that its family cannot have, or always has otherwise."""
    problems = []
    for rule in family.rules:
        try:
            rule.to_hf(config)
        except ValueError as error:
            problems.append(f"{error}, and {family.architecture} does not")
    free = {*family.fields, *WITHOUT_EFFECT, "vocab_size", *(field for rule in family.rules for field in rule.ours)}
    for field in dataclasses.fields(Config):
        wanted = family.fixed.get(field.name, field.default)
        if field.name not in free and getattr(config, field.name) != wanted:
            found = getattr(config, field.name)
            problems.append(f"{field.name}={found}: {family.architecture} always has {field.name}={wanted}")
    return problems


def config_from_hf(values: Mapping[str, Any], where: str = "config.json") -> Config:
    """The Config of a config.json of one of the families, as written by transformers 4 or 5.

    Args:
        values: the parsed file.
        where: its name, for messages.

    Raises:
        DataError: a line for every field that is missing, wrong, or says something this model cannot express.
    """
    family = _supported(values.get("model_type"), where)
    given = {**family.defaults, **values}
    problems = _unsupported(values, family)
    fields = {ours: given.get(theirs) for ours, theirs in family.fields.items()}
    problems += [_wrong_type(family, ours, theirs, fields[ours]) for ours, theirs in family.fields.items()]
    for rule in family.rules if _is_depth(fields["n_layer"]) else ():
        try:
            fields |= rule.from_hf(given)
        except (ValueError, TypeError, KeyError, IndexError, ArithmeticError) as error:
            problems.append(str(error))
    problems = [problem for problem in problems if problem]
    if problems:
        raise DataError("\n".join(f"{where}: {problem}" for problem in problems))
    try:
        return Config(family=family.model_type, vocab_size=fields["padded_vocab_size"], **{**family.fixed, **fields})
    except (ValueError, TypeError, ArithmeticError) as error:
        raise DataError(f"{where}: {error}") from error


def _supported(model_type: Any, where: str) -> Family:
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    reason = REFUSED.get(model_type) if isinstance(model_type, str) else None
    why = f", because {reason}" if reason else ""
    raise DataError(
        f"{where}: model_type={model_type!r} is not supported{why}; supported: {', '.join(map(repr, FAMILIES))}"
    )


def _is_depth(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_LAYERS


def _wrong_type(family: Family, ours: str, theirs: str, value: Any) -> str | None:
    if value is None:
        optional = theirs in ("num_key_value_heads", "head_dim")
        return None if optional else f"{theirs} is missing"
    if ours == "tie_embeddings":
        return None if isinstance(value, bool) else f"{theirs}={value!r} is not true or false"
    if ours == "norm_eps":
        return None if is_number(value) else f"{theirs}={value!r} is not a number"
    if ours == "n_layer" and type(value) is int and value > MAX_LAYERS:
        return f"{theirs}={value} is more than {MAX_LAYERS} layers"
    return None if type(value) is int else f"{theirs}={value!r} is not a whole number"


def _unsupported(values: Mapping[str, Any], family: Family) -> list[str | None]:
    return [
        f"{key}={values[key]!r} means {meaning}, which this model does not have"
        for key, (expressible, meaning) in family.required.items()
        if key in values and values[key] not in expressible
    ]
