"""The Llama family of Hugging Face: one table of names, layouts and fields; both directions derive from it.

RoPE is half-split on both sides, so no row moves but those of the fused qkv. Legend: C n_embd, H n_head,
G n_query_groups, D head_size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_gpt.axes import EMBEDDING, FINAL_NORM, HEAD, layer_of, name_in_block
from lit_gpt.config import Config
from lit_gpt.errors import DataError


@dataclass(frozen=True)
class Family:
    """How Hugging Face names what we have."""

    model_type: str
    architecture: str
    layer_prefix: str
    """Tensor names inside a block; `{}` is the layer."""
    names: Mapping[str, tuple[str, ...]]
    """Our name (the one within a block) -> theirs. Three names are q, k and v, which we hold fused."""
    ignored: tuple[str, ...]
    """Ends of tensor names that old files carry and no model needs."""
    fields: Mapping[str, str]
    """Our Config field -> key of config.json."""
    defaults: Mapping[str, Any]
    """What an absent key of config.json means; keys that are not here must be present."""
    required: Mapping[str, tuple[tuple[Any, ...], str]]
    """Key of config.json -> values that this model can express, and what another value would mean."""


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    layer_prefix="model.layers.{}.",
    names={
        EMBEDDING: ("model.embed_tokens.weight",),
        "norm_1.weight": ("input_layernorm.weight",),
        "attn.attn.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "attn.proj.weight": ("self_attn.o_proj.weight",),
        "norm_2.weight": ("post_attention_layernorm.weight",),
        "mlp.swiglu.w1.weight": ("mlp.gate_proj.weight",),
        "mlp.swiglu.w2.weight": ("mlp.up_proj.weight",),
        "mlp.swiglu.w3.weight": ("mlp.down_proj.weight",),
        FINAL_NORM: ("model.norm.weight",),
        HEAD: ("lm_head.weight",),
    },
    ignored=(".rotary_emb.inv_freq",),
    fields={
        "padded_vocab_size": "vocab_size",
        "block_size": "max_position_embeddings",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
        "n_query_groups": "num_key_value_heads",
        "head_size": "head_dim",
        "intermediate_size": "intermediate_size",
        "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
    },
    defaults={
        "max_position_embeddings": 2048,
        "num_key_value_heads": None,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    required={
        "hidden_act": (("silu", "swish"), "another activation than SwiGLU's"),
        "attention_bias": ((False,), "biases in attention"),
        "mlp_bias": ((False,), "biases in the MLP"),
        "sliding_window": ((None,), "attention over a window"),
        "partial_rotary_factor": ((1.0,), "heads that are rotated in part"),
        "quantization_config": ((None,), "quantised weights"),
        "pruned_heads": ((None, {}), "heads that were removed"),
    },
)
DEFAULT_ROPE_BASE = 10000.0


def hf_names(name: str, family: Family = LLAMA) -> tuple[str, ...]:
    """The Hugging Face names of one of our tensors: one, or those of q, k and v.

    Raises:
        ValueError: the family has no such tensor.
    """
    key = name_in_block(name)
    if key not in family.names:
        raise ValueError(f"{name!r} has no counterpart in {family.architecture}; known: {', '.join(family.names)}")
    layer = layer_of(name)
    prefix = "" if layer is None else family.layer_prefix.format(layer)
    return tuple(prefix + theirs for theirs in family.names[key])


def to_hf(name: str, tensor: Tensor, config: Config) -> dict[str, Tensor]:
    """One of our tensors under its Hugging Face names; a fused qkv becomes three."""
    names = hf_names(name)
    parts = (tensor,) if len(names) == 1 else split_qkv(tensor, config)
    return dict(zip(names, parts, strict=True))


def from_hf(name: str, read: Callable[[str], Tensor], config: Config) -> Tensor:
    """Our tensor `name`, made of what `read` returns for its Hugging Face names."""
    parts = [read(theirs) for theirs in hf_names(name)]
    return parts[0] if len(parts) == 1 else fuse_qkv(*parts, config)


def hf_shapes(name: str, shape: tuple[int, ...], config: Config) -> dict[str, tuple[int, ...]]:
    """The shapes that one of our tensors of shape `shape` has under its Hugging Face names."""
    names = hf_names(name)
    if len(names) == 1:
        return {names[0]: shape}
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
        ValueError: the model is not one that Hugging Face's Llama can express.
    """
    problems = []
    if config.rotary_percentage != 1.0:
        problems.append(f"rotary_percentage={config.rotary_percentage}: {LLAMA.architecture} rotates whole heads only")
    if config.n_embd % config.n_head:
        problems.append(
            f"n_embd={config.n_embd}, n_head={config.n_head}: {LLAMA.architecture} wants a multiple, even with head_dim"
        )
    if problems:
        raise ValueError("\n".join(f"{problem}; keep this model in training form" for problem in problems))
    return {
        "architectures": [LLAMA.architecture],
        "model_type": LLAMA.model_type,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        **{theirs: getattr(config, ours) for ours, theirs in LLAMA.fields.items()},
        "rope_theta": config.rope_base,  # read by transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},  # read by transformers 5
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
    }


def config_from_hf(values: Mapping[str, Any], where: str = "config.json") -> Config:
    """The Config of a Llama's config.json, as written by transformers 4 or 5.

    Args:
        values: the parsed file.
        where: its name, for messages.

    Raises:
        DataError: a line for every field that is missing, wrong, or says something this model cannot express.
    """
    model_type = values.get("model_type")
    if model_type != LLAMA.model_type:
        raise DataError(f"{where}: model_type={model_type!r} is not supported; supported: {LLAMA.model_type!r}")
    rope, problems = _rope(values)
    problems += _unsupported(values)
    fields = {ours: values.get(theirs, LLAMA.defaults.get(theirs)) for ours, theirs in LLAMA.fields.items()}
    problems += [_wrong_type(ours, theirs, fields[ours]) for ours, theirs in LLAMA.fields.items()]
    problems = [problem for problem in problems if problem]
    if problems:
        raise DataError("\n".join(f"{where}: {problem}" for problem in problems))
    try:
        return Config(vocab_size=fields["padded_vocab_size"], rope_base=rope, **fields)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise DataError(f"{where}: {error}") from error


def _wrong_type(ours: str, theirs: str, value: Any) -> str | None:
    if value is None:
        return None if LLAMA.defaults.get(theirs, "") is None else f"{theirs} is missing"
    if ours == "tie_embeddings":
        return None if isinstance(value, bool) else f"{theirs}={value!r} is not true or false"
    if ours == "norm_eps":
        return None if _is_number(value) else f"{theirs}={value!r} is not a number"
    return None if type(value) is int else f"{theirs}={value!r} is not a whole number"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # not inf, not nan


def _unsupported(values: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}={values[key]!r} means {meaning}, which this model does not have"
        for key, (expressible, meaning) in LLAMA.required.items()
        if key in values and values[key] not in expressible
    ]


def _rope(values: Mapping[str, Any]) -> tuple[float, list[str]]:
    """The base, and what is not plain RoPE. transformers 5 nests the base, 4 has it beside rope_scaling."""
    base, problems = values.get("rope_theta", DEFAULT_ROPE_BASE), []
    for key in ("rope_parameters", "rope_scaling"):
        nested = values.get(key)
        if nested is None:
            continue
        if not isinstance(nested, Mapping):
            problems.append(f"{key}={nested!r} is not an object")
            continue
        kind = nested.get("rope_type", nested.get("type", "default"))
        if kind != "default" or nested.get("partial_rotary_factor", 1.0) != 1.0:
            problems.append(f"{key}={dict(nested)!r} means scaled or partial RoPE, which this model does not have")
        base = nested.get("rope_theta", base)
    if not _is_number(base) or base <= 0:
        problems.append(f"rope_theta={base!r} is not a positive number")
    return base, problems
