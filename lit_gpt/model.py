"""A Llama-style decoder, small enough to read in one sitting. Read lit_gpt/config.py first.

Legend: B batch, T tokens, C n_embd, H n_head, G n_query_groups, D head_size, F intermediate_size, V padded_vocab_size.

Parameters are created uninitialised-by-us; `init_weights` fills them. Initialisation (TinyLlama's):

    parameter                          distribution
    wte, attn, w1, w2, lm_head         N(0, sqrt(2 / (5 C)))
    attn.proj, mlp.swiglu.w3           N(0, 1 / (sqrt(C) n_layer))      they write into the residual stream
    norms                              1, or 0 where they multiply by 1 + weight
    biases                             0

Numbers: the weights may be fp32 while the computation runs in bf16 (`compute_dtype`): the residual stream has the
compute dtype and weights are cast where they are used. Norm, RoPE, softmax and loss are computed in at least fp32,
and a float64 model computes in float64 throughout.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
import torch.nn as nn
from torch import Tensor

from lit_gpt.axes import EMBEDDING, WRITERS, name_in_block, parameter_shapes
from lit_gpt.config import Config, RopeScaling
from lit_gpt.kernels.attention import causal_attention, document_mask, window_mask
from lit_gpt.kernels.choice import Kernels
from lit_gpt.kernels.loss import token_scores
from lit_gpt.kernels.products import cpu_multiplies_bf16, linear, product_dtype
from lit_gpt.kernels.recompute import recomputed
from lit_gpt.kernels.rope import cos_sin


class KVStore(Protocol):
    """What attention needs of a key/value cache; see lit_gpt/generate.py."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, G, T, D) keys and values of one layer, return all that are stored for it."""


class Linear(nn.Linear):
    """A linear layer whose weight is cast to its input's dtype where it is used.

    `weight_scale`, None or broadcasting over the weight, multiplies it there: growth masks new parts with it, and the
    state dict knows nothing of it.
    """

    weight_scale: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.cpu_has_bf16 = cpu_multiplies_bf16()
        self.register_buffer("weight_scale", None, persistent=False)

    def reset_parameters(self) -> None:
        """Nothing: `init_weights` fills the weight, by name and seed."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.weight_scale is not None:
            weight = weight.to(x.dtype) * self.weight_scale  # cast first, as processes that share it do
        y = linear(x, weight, cpu_has_bf16=self.cpu_has_bf16)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467), statistics in fp32 or wider. Scales the last dimension, or parts of it.

    Args:
        size: channels that are normed together.
        eps: added to the mean square.
        plus_one: whether it multiplies by 1 + weight.
    """

    def __init__(self, size: int, eps: float, plus_one: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.plus_one = plus_one
        self.kernels = Kernels()

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.norm.alone(x, self._factor(), self.eps)

    def after_adding(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """x + delta, and the norm of that."""
        return self.kernels.norm.after_adding(x, delta, self._factor(), self.eps)

    def _factor(self) -> Tensor:
        if not self.plus_one:
            return self.weight
        return 1 + self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))


class CausalSelfAttention(nn.Module):
    """Attention over query groups; q, k and v come from one matrix whose rows are q..q k v, group after group."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.cpu_has_bf16 = cpu_multiplies_bf16()
        self.kernels = Kernels()
        self.rotates = config.rotates(layer)
        self.attn = Linear(config.n_embd, config.qkv_size, config.qkv_bias)
        self.proj = Linear(config.n_head * config.head_size, config.n_embd, config.proj_bias)
        self.norm_q = self.norm_k = None
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.norm_q = RMSNorm(config.head_size * (config.n_head if full else 1), config.norm_eps)
            self.norm_k = RMSNorm(config.head_size * (config.n_query_groups if full else 1), config.norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, kv_store: KVStore | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x (B, T, C); cos, sin (T, 1, rope_n_elem); mask (B or 1, 1, T, S) instead of causal. Returns (B, T, C)."""
        B, T, _ = x.shape
        config = self.config
        qkv = self.attn(x).view(B, T, config.n_query_groups, config.q_per_kv + 2, config.head_size)
        q, k, v = qkv.split((config.q_per_kv, 1, 1), dim=3)
        q, k, v = q.reshape(B, T, config.n_head, config.head_size), k.squeeze(3), v.squeeze(3)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = _norm_heads(self.norm_q, q), _norm_heads(self.norm_k, k)
        if self.rotates:
            q, k = self.kernels.rope(q, cos, sin), self.kernels.rope(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D), (B, G, T, D), (B, G, T, D)
        if kv_store is not None:
            k, v = kv_store.extend(self.layer, k, v)
        y = causal_attention(q, k, v, cpu_has_bf16=self.cpu_has_bf16, mask=mask, by=self.kernels.attention)
        return self.proj(y.transpose(1, 2).reshape(B, T, -1))


def _norm_heads(norm: RMSNorm, x: Tensor) -> Tensor:
    """x (B, T, heads, D), normed head by head or over all heads, whichever the norm is for."""
    return norm(x.reshape(*x.shape[:2], -1, norm.weight.numel())).view(x.shape)


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x), arXiv 2002.05202. w1 is the gate, w2 the up and w3 the down projection."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gelu = config.activation == "gelu_tanh"
        self.kernels = Kernels()
        self.w1 = Linear(config.n_embd, config.intermediate_size, config.mlp_bias)
        self.w2 = Linear(config.n_embd, config.intermediate_size, config.mlp_bias)
        self.w3 = Linear(config.intermediate_size, config.n_embd, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C). Returns (B, T, C)."""
        return self.w3(self.kernels.mlp(self.w1(x), self.w2(x), self.gelu))


class LLaMAMLP(nn.Module):
    """Holds the SwiGLU under the name it has in TinyLlama's checkpoints."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.swiglu = SwiGLU(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.swiglu(x)


class Block(nn.Module):
    """One layer: attention, then MLP, each normed (before or after) and added to the residual stream.

    `recompute` says which activations are kept for backward, see lit_gpt/kernels/recompute.py.
    """

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.slides = config.slides(layer)
        self.norms_after = config.norm_placement == "after"
        self.norm_1 = RMSNorm(config.n_embd, config.norm_eps, config.norm_plus_one)
        self.attn = CausalSelfAttention(config, layer)
        self.norm_2 = RMSNorm(config.n_embd, config.norm_eps, config.norm_plus_one)
        self.mlp = LLaMAMLP(config)
        self.recompute = "none"

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, kv_store: KVStore | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x (B, T, C). Returns (B, T, C)."""
        return recomputed(self._layer, self.recompute, x, cos, sin, kv_store, mask)

    def _layer(self, x: Tensor, cos: Tensor, sin: Tensor, kv_store: KVStore | None, mask: Tensor | None) -> Tensor:
        if self.norms_after:
            x = x + self.norm_1(self.attn(x, cos, sin, kv_store, mask))
            return x + self.norm_2(self.mlp(x))
        x, normed = self.norm_2.after_adding(x, self.attn(self.norm_1(x), cos, sin, kv_store, mask))
        return x + self.mlp(normed)


class Embedding(nn.Embedding):
    """Token embedding; `weight_scale` as in `Linear`, (1, C)."""

    weight_scale: Tensor | None

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(rows, columns, _weight=torch.empty(rows, columns), _freeze=False)
        self.register_buffer("weight_scale", None, persistent=False)

    def forward(self, idx: Tensor) -> Tensor:
        """idx (B, T). Returns (B, T, C)."""
        x = super().forward(idx)
        return x if self.weight_scale is None else (x * self.weight_scale).to(x.dtype)


class Transformer(nn.Module):
    """Embedding, blocks and final norm under the names of TinyLlama's checkpoints."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.wte = Embedding(config.padded_vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = RMSNorm(config.n_embd, config.norm_eps, config.norm_plus_one)


class GPT(nn.Module):
    """The whole model. Call `init_weights` or load a state dict before use: the constructor leaves weights undefined.

    Args:
        config: its sizes.
        compute_dtype: dtype of the residual stream and of all products; None is the weights' own.

    It computes with what runs everywhere until `use_kernels` chooses something else.
    """

    def __init__(self, config: Config, compute_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size)
        self.kernels = Kernels()
        if config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
            self._register_load_state_dict_pre_hook(_tie_in_state_dict)
            self._register_state_dict_hook(_untie_in_state_dict)

    def use_kernels(self, kernels: Kernels) -> None:
        """Compute with these from now on; see docs/kernels.md."""
        for module in self.modules():
            if isinstance(module, GPT | CausalSelfAttention | SwiGLU | RMSNorm):
                module.kernels = kernels

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: str = "mean",
        first_position: int = 0,
        kv_store: KVStore | None = None,
        separator_id: int | None = None,
    ) -> Tensor:
        """Logits, or the loss when targets are given.

        Args:
            idx: (B, T) int64 token ids, T <= block_size.
            targets: (B, T) int64; -100 does not count.
            reduction: of the loss: "mean", or "none" for one value per target, without gradients; or "scores".
            first_position: position of idx[:, 0], for generation with a cache.
            kv_store: keys and values of the tokens before idx.
            separator_id: token that ends a document; tokens of other documents are not seen. None: they are. Not
                with a kv_store.

        Returns:
            Without targets logits (B, T, V); with targets the cross-entropy in nats, fp32 (float64 for float64
            weights): a scalar, or (B, T) with reduction "none"; with "scores" (N, 2), see `token_scores`.

        Raises:
            ValueError: more positions than block_size.
        """
        x = self.hidden(idx, first_position=first_position, kv_store=kv_store, separator_id=separator_id)
        if targets is None:
            return self.lm_head(x)
        if reduction == "scores":
            return token_scores(x, targets, self.lm_head)
        loss = self.kernels.loss(
            x.reshape(-1, x.size(-1)).to(product_dtype(x, self.lm_head.cpu_has_bf16)),
            self.lm_head.weight,
            targets.reshape(-1),
            reduction=reduction,
        )
        return loss if reduction == "mean" else loss.view(targets.shape)

    def hidden(
        self,
        idx: Tensor,
        *,
        first_position: int = 0,
        kv_store: KVStore | None = None,
        separator_id: int | None = None,
    ) -> Tensor:
        """What the head reads, (B, T, C); arguments as in `forward`."""
        T = idx.size(1)
        if first_position + T > self.config.block_size:
            raise ValueError(
                f"{first_position + T} tokens do not fit block_size={self.config.block_size}; shorten the input"
            )
        assert separator_id is None or kv_store is None, "the mask covers idx alone"
        x = self.transformer.wte(idx)  # (B, T, C)
        cos, sin = rope_cos_sin(self.config, first_position, T, x)
        if self.config.embedding_scale != 1.0:
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype, device=x.device)
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        mask = None if separator_id is None else document_mask(idx, separator_id)
        window = window_mask(self.config.sliding_window, first_position, T, mask, idx.device)
        for block in self.transformer.h:
            x = block(x, cos, sin, kv_store, window if block.slides else mask)
        return self.transformer.ln_f(x)


def rope_cos_sin(config: Config, first_position: int, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (length, 1, rope_n_elem) for `apply_rope` on the device of `like`, in fp32 or float64.

    They are made in every forward: the cost is nothing beside a block, and a buffer would have to survive meta
    devices, casts and sharding.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, config.rope_n_elem, 2, device=like.device, dtype=dtype) / config.rope_n_elem
    positions = torch.arange(first_position, first_position + length, device=like.device, dtype=dtype)
    frequencies = config.rope_base**-exponents
    if config.rope_scaling is not None:
        frequencies = scaled_frequencies(frequencies, config.rope_scaling)
    return cos_sin(torch.outer(positions, frequencies))


def scaled_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Rotary frequencies (n/2), in radians per token, slowed down; see `RopeScaling`."""
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_block_size * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def init_std(name: str, config: Config) -> float:
    """Standard deviation of a matrix's initial weights; the table is at the top of this file."""
    if name_in_block(name) in WRITERS and name != EMBEDDING:
        return 1 / (math.sqrt(config.n_embd) * config.n_layer)
    return math.sqrt(2 / (5 * config.n_embd))


def init_tensor(name: str, config: Config, seed: int) -> Tensor:
    """The initial value of one parameter, a function of seed, name and sizes alone: fp32, on the CPU.

    Any process can make any part of a model, so every world size starts from identical weights.
    """
    shape = parameter_shapes(config)[name]
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.full(shape, 0.0 if config.norm_plus_one else 1.0)
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return torch.normal(0.0, init_std(name, config), shape, generator=generator)


class InitialWeights(Mapping[str, Tensor]):
    """Parameter name -> its initial value, made on every access."""

    def __init__(self, config: Config, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._names = parameter_shapes(config)

    def __getitem__(self, name: str) -> Tensor:
        return init_tensor(name, self._config, self._seed)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def init_weights(model: GPT, seed: int) -> None:
    """Fill every parameter in place with its initial value."""
    initial = InitialWeights(model.config, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial[name])


def _tie_in_state_dict(state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """A tied model's files hold the shared matrix once; loading needs it under both names."""
    if f"{prefix}{EMBEDDING}" in state_dict:
        state_dict.setdefault(f"{prefix}lm_head.weight", state_dict[f"{prefix}{EMBEDDING}"])


def _untie_in_state_dict(_: nn.Module, state_dict: dict[str, Tensor], prefix: str, __: object) -> None:
    del state_dict[f"{prefix}lm_head.weight"]
