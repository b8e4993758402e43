"""What a model is: frozen sizes with their invariants, and the table of named sizes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

VOCAB_MULTIPLE = 64  # TinyLlama pads the embedding to a multiple of 64 rows
PER_LAYER = ("rope_layers", "sliding_layers")  # fields with an entry for every layer; growth in depth maps them
WITHOUT_EFFECT = ("name", "family")  # fields in which two equal models may differ


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are slowed down for more positions than a model was trained with at first.

    Raises:
        ValueError: an unknown kind, or numbers out of range.
    """

    kind: str
    """linear: all of them (arXiv 2306.15595); llama3: the slow ones, a blend in between (arXiv 2407.21783)."""
    factor: float
    """How much slower."""
    low_freq_factor: float = 1.0
    """llama3: frequencies that turn less than this often within original_block_size are slowed down."""
    high_freq_factor: float = 4.0
    """llama3: frequencies that turn more than this often stay."""
    original_block_size: int = 8192
    """llama3: positions it was trained with at first."""

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rope_scaling kind {self.kind!r} is unknown; known: linear, llama3")
        if not (self.factor >= 1 and 0 < self.low_freq_factor < self.high_freq_factor and self.original_block_size > 0):
            raise ValueError(f"rope_scaling {self} needs factor >= 1 and 0 < low_freq_factor < high_freq_factor")


@dataclass(frozen=True)
class Config:
    """Sizes of one Llama-style decoder. Field names are those of lit-gpt, TinyLlama and prts.

    Raises:
        ValueError: one message with a line for every size that breaks a rule.
    """

    name: str = ""
    """Where the sizes come from; has no effect on the model."""
    block_size: int = 2048
    """Tokens the model sees at once."""
    vocab_size: int = 32000
    """Tokens the tokenizer knows."""
    padded_vocab_size: int | None = None
    """Rows of the embedding and of the head. Default: vocab_size rounded up to a multiple of 64."""
    n_layer: int = 22
    """Blocks."""
    n_head: int = 32
    """Query heads per block."""
    n_embd: int = 2048
    """Width of the residual stream."""
    n_query_groups: int | None = None
    """Key/value heads: n_head is multi-head, 1 multi-query, in between grouped-query. Default: n_head."""
    head_size: int | None = None
    """Channels of one head. Default: n_embd / n_head."""
    intermediate_size: int | None = None
    """Neurons of the SwiGLU. Default: 8/3 n_embd rounded up to a multiple of 256."""
    norm_eps: float = 1e-5
    """Added to the mean square inside RMSNorm."""
    rope_base: float = 10000.0
    """Base of the rotary frequencies."""
    rotary_percentage: float = 1.0
    """Share of a head's channels that are rotated."""
    tie_embeddings: bool = False
    """Whether lm_head shares the embedding matrix."""
    family: str = "llama"
    """Which of Hugging Face's families it is exported as, see lit_gpt/hf.py; has no effect on the model."""
    qkv_bias: bool = False
    """Whether q, k and v have biases."""
    proj_bias: bool = False
    """Whether the projection of attention has a bias."""
    mlp_bias: bool = False
    """Whether the matrices of the MLP have biases."""
    qk_norm: str = "none"
    """Norm of queries and keys before they are rotated: none, head (over each head) or full (over all of them)."""
    norm_placement: str = "before"
    """Norms before attention and MLP, or after, on what they add to the residual stream."""
    norm_plus_one: bool = False
    """Whether norms multiply by 1 + weight."""
    activation: str = "silu"
    """Of the gate: silu or gelu_tanh."""
    embedding_scale: float = 1.0
    """What embeddings are multiplied by."""
    rope_scaling: RopeScaling | None = None
    """None: frequencies as rope_base gives them."""
    rope_layers: tuple[bool, ...] | None = None
    """Which layers rotate; None: all."""
    sliding_window: int | None = None
    """Tokens that a token sees, itself included; None: all before it."""
    sliding_layers: tuple[bool, ...] | None = None
    """Which layers see sliding_window only; None: all."""

    def __post_init__(self) -> None:
        self._normalise()
        head_size_given = self.head_size is not None
        defaults = {
            "padded_vocab_size": round_up(self.vocab_size, VOCAB_MULTIPLE),
            "n_query_groups": self.n_head,
            "head_size": self.n_embd // self.n_head if self.n_head else 0,
            "intermediate_size": default_intermediate_size(self.n_embd),
        }
        for field, value in defaults.items():
            if getattr(self, field) is None:
                object.__setattr__(self, field, value)  # the dataclass is frozen
        problems = self._problems()
        if self.n_head > 0 and self.n_embd % self.n_head and not head_size_given:
            problems.append(
                f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}, or head_size must be given"
            )
        if problems:
            raise ValueError("\n".join(problems))

    def _normalise(self) -> None:
        """JSON has lists and objects where these fields have tuples and dataclasses; a list of only True is None."""
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        for field in PER_LAYER:
            flags = getattr(self, field)
            if flags is not None:
                object.__setattr__(self, field, None if all(flags) and flags else tuple(map(bool, flags)))

    def _kind_problems(self) -> list[str]:
        """Lines about fields that are not sizes."""
        kinds = {
            "qk_norm": ("none", "head", "full"),
            "norm_placement": ("before", "after"),
            "activation": ("silu", "gelu_tanh"),
        }
        problems = [
            f"{field}={getattr(self, field)!r} must be one of {', '.join(known)}"
            for field, known in kinds.items()
            if getattr(self, field) not in known
        ]
        problems += [
            f"{field} has {len(getattr(self, field))} entries, n_layer={self.n_layer}; give one for every layer"
            for field in PER_LAYER
            if getattr(self, field) is not None and len(getattr(self, field)) != self.n_layer
        ]
        if self.sliding_window is None and self.sliding_layers is not None:
            problems.append("sliding_layers without a sliding_window has no effect; give both or none")
        if self.sliding_window is not None and self.sliding_window < 1:
            problems.append(f"sliding_window={self.sliding_window} must be at least 1")
        return problems

    def _problems(self) -> list[str]:
        sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_query_groups", "intermediate_size")
        problems = [f"{size}={getattr(self, size)} must be at least 1" for size in sizes if getattr(self, size) < 1]
        if problems:
            return problems
        if self.n_head % self.n_query_groups:
            problems.append(
                f"n_head={self.n_head} must be a multiple of n_query_groups={self.n_query_groups}: "
                f"every group has the same number of query heads"
            )
        if self.head_size % 2 or self.rope_n_elem % 2 or self.rope_n_elem < 2:
            problems.append(
                f"head_size={self.head_size} with rotary_percentage={self.rotary_percentage} rotates "
                f"{self.rope_n_elem} channels; RoPE needs an even number of at least 2"
            )
        if not 0.0 < self.rotary_percentage <= 1.0:
            problems.append(f"rotary_percentage={self.rotary_percentage} must be in (0, 1]")
        if self.padded_vocab_size < self.vocab_size:
            problems.append(
                f"padded_vocab_size={self.padded_vocab_size} must not be smaller than vocab_size={self.vocab_size}"
            )
        if self.norm_eps <= 0:
            problems.append(f"norm_eps={self.norm_eps} must be positive")
        return problems + self._kind_problems()

    @property
    def q_per_kv(self) -> int:
        """Query heads that share one key/value head."""
        return self.n_head // self.n_query_groups

    @property
    def qkv_size(self) -> int:
        """Rows of the fused qkv matrix: per group its query heads, then k, then v."""
        return (self.n_head + 2 * self.n_query_groups) * self.head_size

    @property
    def rope_n_elem(self) -> int:
        """Channels of a head that are rotated."""
        return int(self.rotary_percentage * self.head_size)

    def rotates(self, layer: int) -> bool:
        """Whether a layer turns its queries and keys by their positions."""
        return self.rope_layers is None or self.rope_layers[layer]

    def slides(self, layer: int) -> bool:
        """Whether a layer sees a window only."""
        return self.sliding_window is not None and (self.sliding_layers is None or self.sliding_layers[layer])

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> Config:
        """The sizes behind a name, e.g. `tiny_LLaMA_1b` or `24L2048H`; `overrides` replace single fields.

        Raises:
            ValueError: the name is not known; the message lists what is near.
        """
        sizes = NAMED_SIZES.get(name) or _family_member(name)
        if sizes is None:
            near = get_close_matches(name, NAMED_SIZES, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else "."
            raise ValueError(
                f"unknown model name {name!r}{hint} Known: {', '.join(NAMED_SIZES)}, and the pattern <layers>L<width>H"
            )
        if "n_head" in overrides and sizes["n_query_groups"] == sizes["n_head"]:
            sizes = {**sizes, "n_query_groups": None}  # a multi-head size stays multi-head
        return cls(**{"name": name, **sizes, **overrides})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The inverse of `to_dict`; unknown keys are an error.

        Raises:
            ValueError: a key that is not a field, with the nearest field.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        problems = [unknown_key(key, known) for key in values if key not in known]
        if problems:
            raise ValueError("\n".join(problems))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def default_intermediate_size(n_embd: int) -> int:
    """8/3 n_embd, so that three matrices cost what two of 4 n_embd would (arXiv 2002.05202), on a multiple of 256."""
    return round_up(round(8 * n_embd / 3), 256)


def unknown_key(key: str, known: list[str], *, what: str = "key") -> str:
    """One line that names an unknown key, or another `what`, and the known one it is nearest to."""
    near = get_close_matches(key, known, n=1, cutoff=0.4)
    return f"unknown {what} {key!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")


FAMILY = re.compile(r"(\d+)L(\d+)H")
FAMILY_BY_WIDTH = {  # n_embd: (n_head, n_query_groups, intermediate_size), the sizes of prts and TinyLlama
    1024: (16, 16, 2816),
    1536: (24, 24, 4224),
    2048: (32, 32, 5632),
    2560: (20, 4, 7040),
    4096: (32, 32, 11008),
}


def _family_member(name: str) -> dict[str, int] | None:
    match = FAMILY.fullmatch(name)
    if match is None:
        return None
    n_layer, n_embd = int(match[1]), int(match[2])
    head_size = 128 if n_embd >= 2560 else 64
    heads = max(1, n_embd // head_size)
    n_head, n_query_groups, intermediate_size = FAMILY_BY_WIDTH.get(
        n_embd, (heads, heads, default_intermediate_size(n_embd))
    )
    return _sizes(n_layer, n_embd, n_head, n_query_groups, intermediate_size)


def _sizes(
    n_layer: int, n_embd: int, n_head: int, n_query_groups: int, intermediate_size: int, block_size: int = 2048
) -> dict[str, int]:
    return {
        "block_size": block_size,
        "n_layer": n_layer,
        "n_embd": n_embd,
        "n_head": n_head,
        "n_query_groups": n_query_groups,
        "intermediate_size": intermediate_size,
    }


# Sizes of TinyLlama and of prts (its lit_gpt/config.py): n_layer, n_embd, n_head, n_query_groups, intermediate_size
NAMED_SIZES: dict[str, dict[str, int]] = {
    "tiny_LLaMA_1b": _sizes(22, 2048, 32, 4, 5632),
    "tiny_LLaMA_120M": _sizes(12, 768, 12, 1, 2048),
    "code_tiny_LLaMA_1b": _sizes(22, 2048, 32, 4, 5632, block_size=8192),
    "tiny_LLaMA_160M": _sizes(12, 768, 12, 1, 3072),
    "tiny_LLaMA_160M_128h": _sizes(12, 768, 6, 1, 3072),
    "tiny_LLaMA_240M": _sizes(18, 768, 12, 1, 3072),
    "tiny_LLaMA_310M": _sizes(24, 768, 12, 1, 3072),
    "tiny_LLaMA_410M": _sizes(24, 1024, 16, 1, 4096),
    "tiny_LLaMA_410M_128h": _sizes(24, 1024, 8, 1, 4096),
    "tiny_LLaMA_410M_wo_gqa": _sizes(24, 1024, 16, 16, 4096),
    "tiny_LLaMA_750M": _sizes(36, 1024, 16, 1, 4096),
    "tiny_LLaMA_400M_like1.1B": _sizes(8, 2048, 16, 4, 5632),
    "tiny_LLaMA_1.1B": _sizes(24, 2048, 16, 4, 5632),
    "tiny_LLaMA_1.1B_1kv": _sizes(24, 2048, 16, 1, 5632),
    "tiny_LLaMA_1.1B_64h_wo_gqa": _sizes(24, 2048, 32, 32, 5632),
    "tiny_LLaMA_80M_like3B": _sizes(1, 2560, 20, 4, 7040),
    "tiny_LLaMA_190M_like3B": _sizes(2, 2560, 20, 4, 7040),
    "tiny_LLaMA_375M_like3B": _sizes(4, 2560, 20, 4, 7040),
    "tiny_LLaMA_750M_like3B": _sizes(8, 2560, 20, 4, 7040),
    "tiny_LLaMA_1.1B_like3B": _sizes(12, 2560, 20, 4, 7040),
    "tiny_LLaMA_3B": _sizes(32, 2560, 20, 4, 7040),
    "tiny_LLaMA_3B_1kv": _sizes(32, 2560, 20, 1, 7040),
    "tiny_LLaMA_3B_1kv_64h": _sizes(32, 2560, 40, 1, 7040),
    "tiny_LLaMA_850M_like7B": _sizes(4, 4096, 32, 8, 11008),
    "tiny_LLaMA_1.7B_like7B": _sizes(8, 4096, 32, 8, 11008),
    "tiny_LLaMA_7B": _sizes(32, 4096, 32, 8, 11008),
}
