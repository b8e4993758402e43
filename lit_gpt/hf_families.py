"""The table of every family of Hugging Face that this model can be: names, layouts, fields. lit_gpt/hf.py uses it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lit_gpt.axes import EMBEDDING, FINAL_NORM, HEAD
from lit_gpt.hf_rules import (
    BIASES,
    EMBEDDING_SCALE,
    MLP_BIAS,
    NOPE_LAYERS,
    PARTIAL_ROPE,
    ROPE,
    WHOLE_HEADS,
    WINDOW,
    WINDOW_BESIDE_NOPE,
    WINDOW_FROM_LAYER,
    Rule,
)


@dataclass(frozen=True)
class Family:
    """How Hugging Face names what we have."""

    model_type: str
    architecture: str
    names: Mapping[str, tuple[str, ...]]
    """Our name (the one within a block) -> theirs, likewise. Three are q, k and v, which we hold fused; one name for
    the fused matrix holds q over k over v; one name for two of ours holds the first over the second."""
    fields: Mapping[str, str]
    """Our Config field -> key of config.json that holds the same."""
    rules: tuple[Rule, ...]
    """Fields that take more than a key."""
    fixed: Mapping[str, Any]
    """Our Config field -> what it is in every model of the family. Fields named nowhere have Config's default."""
    constants: Mapping[str, Any]
    """Further keys of config.json that are always written."""
    defaults: Mapping[str, Any]
    """What an absent key of config.json means; keys of `fields` that are not here must be present."""
    required: Mapping[str, tuple[tuple[Any, ...], str]]
    """Key of config.json -> values that this model can express, and what another value would mean."""

    def named_alike(self, key: str) -> list[str]:
        """Our names that share one of theirs with `key`, in their order there; mostly `key` alone."""
        return [ours for ours, theirs in self.names.items() if theirs == self.names[key]]


LLAMA = Family(
    model_type="llama",  # Llama 1 to 3.x, TinyLlama, SmolLM2
    architecture="LlamaForCausalLM",
    names={
        EMBEDDING: ("model.embed_tokens.weight",),
        "norm_1.weight": ("input_layernorm.weight",),
        "attn.attn.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "attn.attn.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        "attn.proj.weight": ("self_attn.o_proj.weight",),
        "attn.proj.bias": ("self_attn.o_proj.bias",),
        "attn.norm_q.weight": ("self_attn.q_norm.weight",),
        "attn.norm_k.weight": ("self_attn.k_norm.weight",),
        "norm_2.weight": ("post_attention_layernorm.weight",),
        "mlp.swiglu.w1.weight": ("mlp.gate_proj.weight",),
        "mlp.swiglu.w1.bias": ("mlp.gate_proj.bias",),
        "mlp.swiglu.w2.weight": ("mlp.up_proj.weight",),
        "mlp.swiglu.w2.bias": ("mlp.up_proj.bias",),
        "mlp.swiglu.w3.weight": ("mlp.down_proj.weight",),
        "mlp.swiglu.w3.bias": ("mlp.down_proj.bias",),
        FINAL_NORM: ("model.norm.weight",),
        HEAD: ("lm_head.weight",),
    },
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
    rules=(ROPE, BIASES, MLP_BIAS, WHOLE_HEADS),
    fixed={},
    constants={"hidden_act": "silu"},
    defaults={
        "max_position_embeddings": 2048,
        "num_key_value_heads": None,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
    },
    required={
        "hidden_act": (("silu", "swish"), "another activation than SwiGLU's"),
        "sliding_window": ((None,), "attention over a window"),
        "partial_rotary_factor": ((1.0,), "heads that are rotated in part"),
        "quantization_config": ((None,), "quantised weights"),
        "pruned_heads": ((None, {}), "heads that were removed"),
    },
)
_NO_BIASES = {
    "attention_bias": ((False,), "biases in attention"),
    "mlp_bias": ((False,), "biases in the MLP"),
}


def _family(base: Family, model_type: str, architecture: str, rules: tuple[Rule, ...], **changes: Any) -> Family:
    """A family that differs from another in what is given: tables are merged, rules replace the other's."""
    known = {key for rule in rules for key in rule.keys}
    required = {key: value for key, value in (_NO_BIASES | dict(base.required)).items() if key not in known}
    tables = {"required": required}
    for name, table in changes.items():
        tables[name] = {**tables.get(name, getattr(base, name)), **table}
    return dataclasses.replace(base, model_type=model_type, architecture=architecture, rules=rules, **tables)


MISTRAL = _family(
    LLAMA,
    "mistral",
    "MistralForCausalLM",
    (ROPE, WINDOW),
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
)
QWEN2 = _family(
    LLAMA,
    "qwen2",
    "Qwen2ForCausalLM",
    (ROPE, WINDOW_FROM_LAYER),
    fixed={"qkv_bias": True},
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
)
QWEN3 = _family(
    QWEN2,
    "qwen3",
    "Qwen3ForCausalLM",
    (ROPE, BIASES, WINDOW_FROM_LAYER),
    fixed={"qkv_bias": False, "qk_norm": "head"},
    defaults={"head_dim": 128},
)
SMOLLM3 = _family(
    LLAMA,
    "smollm3",
    "SmolLM3ForCausalLM",
    (ROPE, BIASES, MLP_BIAS, NOPE_LAYERS, WINDOW_BESIDE_NOPE),
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_theta": 2000000.0,
        "sliding_window": None,
        "no_rope_layer_interval": 4,
    },
)
OLMO2 = _family(
    LLAMA,
    "olmo2",
    "Olmo2ForCausalLM",
    (ROPE, BIASES),
    names={
        "norm_1.weight": ("post_attention_layernorm.weight",),
        "norm_2.weight": ("post_feedforward_layernorm.weight",),
    },
    fixed={"norm_placement": "after", "qk_norm": "full"},
    defaults={"rms_norm_eps": 1e-5},
    required={"clip_qkv": ((None,), "clipped queries, keys and values")},
)
PHI3 = _family(
    LLAMA,
    "phi3",
    "Phi3ForCausalLM",
    (PARTIAL_ROPE, WINDOW),
    names={
        "attn.attn.weight": ("self_attn.qkv_proj.weight",),
        "mlp.swiglu.w1.weight": ("mlp.gate_up_proj.weight",),
        "mlp.swiglu.w2.weight": ("mlp.gate_up_proj.weight",),
    },
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": None},
)
GEMMA = _family(
    LLAMA,
    "gemma",
    "GemmaForCausalLM",
    (ROPE, BIASES, EMBEDDING_SCALE),
    fixed={"activation": "gelu_tanh", "norm_plus_one": True},
    constants={"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
    defaults={
        "max_position_embeddings": 8192,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "tie_word_embeddings": True,
    },
    required={
        "hidden_act": (("gelu", "gelu_pytorch_tanh"), "another activation than GeGLU's"),
        "hidden_activation": ((None, "gelu_pytorch_tanh"), "another activation than GeGLU's"),
        "use_bidirectional_attention": ((None, False), "tokens that see those after them"),
    },
)
FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, OLMO2, PHI3, GEMMA)}
_EXPERTS = "it is a mixture of experts"
_LAYER_NORMS = "it has LayerNorms, with means and biases"
REFUSED = {
    "gemma2": "its attention and its logits are soft-capped",
    "gemma3": "it has two rotary bases and norms on both sides of attention and MLP",
    "gemma3_text": "it has two rotary bases and norms on both sides of attention and MLP",
    "olmo": "its norms have no weights",
    "olmo3": "its rotary frequencies are not those of every layer",
    "granite": "it has multipliers for residuals, attention and logits",
    "cohere": f"{_LAYER_NORMS}, and attention beside the MLP",
    "phi": f"{_LAYER_NORMS}, and attention beside the MLP",
    "gpt_neox": f"{_LAYER_NORMS}, and attention beside the MLP",
    "falcon": f"{_LAYER_NORMS}, and attention beside the MLP",
    "gpt2": f"{_LAYER_NORMS}, and learned positions",
    "opt": f"{_LAYER_NORMS}, and learned positions",
    "starcoder2": _LAYER_NORMS,
    "stablelm": _LAYER_NORMS,
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "olmoe": _EXPERTS,
    "deepseek_v2": f"{_EXPERTS}, with latent attention",
    "deepseek_v3": f"{_EXPERTS}, with latent attention",
    "llama4": _EXPERTS,
}
