"""For every parameter: what each of its dimensions is. The single source for growth, conversion and sharding."""

from __future__ import annotations

import re

from lit_gpt.config import Config

VOCAB = "vocab"  # padded_vocab_size token rows
EMBD = "embd"  # n_embd residual channels
QKV = "qkv"  # per query group: its query heads, then k, then v, head_size rows each
HEADS = "heads"  # n_head * head_size channels, head-major
INTERMEDIATE = "intermediate"  # neurons of the SwiGLU
QUERY_NORM = "query_norm"  # what qk_norm scales in queries: head_size channels, or those of all heads
KEY_NORM = "key_norm"  # the same in keys

BLOCK_PREFIX = "transformer.h."
EMBEDDING = "transformer.wte.weight"
FINAL_NORM = "transformer.ln_f.weight"
HEAD = "lm_head.weight"

# Dimensions in the order of the tensor, i.e. rows (outputs) first.
AXES_IN_BLOCK: dict[str, tuple[str, ...]] = {
    "norm_1.weight": (EMBD,),
    "attn.attn.weight": (QKV, EMBD),
    "attn.attn.bias": (QKV,),
    "attn.proj.weight": (EMBD, HEADS),
    "attn.proj.bias": (EMBD,),
    "attn.norm_q.weight": (QUERY_NORM,),
    "attn.norm_k.weight": (KEY_NORM,),
    "norm_2.weight": (EMBD,),
    "mlp.swiglu.w1.weight": (INTERMEDIATE, EMBD),
    "mlp.swiglu.w1.bias": (INTERMEDIATE,),
    "mlp.swiglu.w2.weight": (INTERMEDIATE, EMBD),
    "mlp.swiglu.w2.bias": (INTERMEDIATE,),
    "mlp.swiglu.w3.weight": (EMBD, INTERMEDIATE),
    "mlp.swiglu.w3.bias": (EMBD,),
}
# Parameters that a plain Llama does not have -> the field of Config and its values with which a model has them.
OPTIONAL_IN_BLOCK: dict[str, tuple[str, tuple[object, ...]]] = {
    "attn.attn.bias": ("qkv_bias", (True,)),
    "attn.proj.bias": ("proj_bias", (True,)),
    "attn.norm_q.weight": ("qk_norm", ("head", "full")),
    "attn.norm_k.weight": ("qk_norm", ("head", "full")),
    "mlp.swiglu.w1.bias": ("mlp_bias", (True,)),
    "mlp.swiglu.w2.bias": ("mlp_bias", (True,)),
    "mlp.swiglu.w3.bias": ("mlp_bias", (True,)),
}
AXES_OUTSIDE: dict[str, tuple[str, ...]] = {
    EMBEDDING: (VOCAB, EMBD),
    FINAL_NORM: (EMBD,),
    HEAD: (VOCAB, EMBD),
}
WRITERS = frozenset({EMBEDDING, "attn.proj.weight", "mlp.swiglu.w3.weight"})
"""Parameters that write into the residual stream; within a block by their name there."""

_IN_BLOCK = re.compile(r"transformer\.h\.(\d+)\.(.+)")


def layer_of(name: str) -> int | None:
    """The block a parameter belongs to, None for the embedding, the final norm and the head."""
    match = _IN_BLOCK.fullmatch(name)
    return int(match[1]) if match else None


def name_in_block(name: str) -> str:
    """`transformer.h.3.norm_1.weight` -> `norm_1.weight`; names outside the blocks stay as they are."""
    match = _IN_BLOCK.fullmatch(name)
    return match[2] if match else name


def with_layer(name: str, layer: int) -> str:
    """The same parameter of another block."""
    return f"{BLOCK_PREFIX}{layer}.{name_in_block(name)}"


def axes_of(name: str) -> tuple[str, ...]:
    """What each dimension of the parameter `name` is.

    Raises:
        ValueError: no parameter of the model has this name.
    """
    axes = AXES_OUTSIDE.get(name) if layer_of(name) is None else AXES_IN_BLOCK.get(name_in_block(name))
    if axes is None:
        raise ValueError(f"{name!r} is not a parameter of this model; known in a block: {', '.join(AXES_IN_BLOCK)}")
    return axes


def axis_sizes(config: Config) -> dict[str, int]:
    """Size of every axis in a model of this configuration."""
    return {
        VOCAB: config.padded_vocab_size,
        EMBD: config.n_embd,
        QKV: config.qkv_size,
        HEADS: config.n_head * config.head_size,
        INTERMEDIATE: config.intermediate_size,
        QUERY_NORM: config.head_size * (config.n_head if config.qk_norm == "full" else 1),
        KEY_NORM: config.head_size * (config.n_query_groups if config.qk_norm == "full" else 1),
    }


def names_in_block(config: Config) -> list[str]:
    """What the parameters of every block are called in it, in the order of the model."""
    return [
        name
        for name in AXES_IN_BLOCK
        if name not in OPTIONAL_IN_BLOCK or getattr(config, OPTIONAL_IN_BLOCK[name][0]) in OPTIONAL_IN_BLOCK[name][1]
    ]


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter, in the order of the model. A tied head is listed once, as the embedding."""
    size = axis_sizes(config)
    names, in_block = [EMBEDDING], names_in_block(config)
    names += [f"{BLOCK_PREFIX}{layer}.{name}" for layer in range(config.n_layer) for name in in_block]
    names += [FINAL_NORM] if config.tie_embeddings else [FINAL_NORM, HEAD]
    return {name: tuple(size[axis] for axis in axes_of(name)) for name in names}
