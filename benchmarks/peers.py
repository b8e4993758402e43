"""Llama by others, behind one interface: transformers, litgpt, nanochat, and the model that one would write first.

All but nanochat's compute the same function from the same weights. nanochat's GPT is another model (norms without
weights, squared ReLU in an MLP of four times the width, value embeddings, gates): it is given the same layers, width,
heads, vocabulary and full attention, and what it multiplies is counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import site
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.axes import parameter_shapes
from lit_gpt.config import Config
from lit_gpt.hf import config_to_hf, to_hf
from lit_gpt.model import init_tensor

LossFn = Callable[[Tensor, Tensor], Tensor]
"""idx, targets (B, T) -> mean loss."""
MODULES = {"transformers": "transformers", "litgpt": "litgpt.model", "nanochat": "nanochat.gpt"}
"""Family -> what must be importable."""
SAME_FUNCTION = ("ours", "transformers", "litgpt", "naive")


def find_peers(device: torch.device, litgpt: Path | None = None, nanochat: Path | None = None) -> dict[str, str]:
    """Make the peers importable; returns those that are not, with the reason.

    Args:
        device: that they are to run on.
        litgpt: a site-packages folder with litgpt; it comes last on the path, so that everything else stays ours.
        nanochat: a checkout of nanochat.
    """
    for path in (litgpt, nanochat):
        if path is not None:
            site.addsitedir(str(path))  # at the end, once
    absent = {}
    for family, module in MODULES.items():
        if importlib.util.find_spec(module.split(".")[0]) is None:
            absent[family] = "not installed" if family == "transformers" else f"not there; name it by --{family} PATH"
            continue
        try:
            with nanochat_dtype(device):
                importlib.import_module(module)
        except ImportError as error:
            absent[family] = f"cannot be imported: {error}"
    return absent


@contextlib.contextmanager
def nanochat_dtype(device: torch.device) -> Iterator[None]:
    """nanochat decides when it is imported what it computes in; it is measured in that precision alone."""
    before = os.environ.get("NANOCHAT_DTYPE")
    os.environ["NANOCHAT_DTYPE"] = "bfloat16" if nanochat_precision(device) == "bf16" else "float32"
    try:
        yield
    finally:
        del os.environ["NANOCHAT_DTYPE"]
        if before is not None:
            os.environ["NANOCHAT_DTYPE"] = before


def nanochat_precision(device: torch.device) -> str:
    return "bf16" if device.type == "cuda" else "fp32"


def build_peer(
    family: str, config: Config, precision: str, compiled: bool, device: torch.device
) -> tuple[LossFn, nn.Module]:
    """A peer's loss and the model behind it, on the device, with fp32 weights.

    bf16 is autocast, as their own recipes have it; nanochat casts by itself. Whole models are compiled, as there.
    """
    model, loss = PEERS[family](config)
    model.to(device)
    forward = torch.compile(model, dynamic=False) if compiled else model
    autocast = precision == "bf16" and family != "nanochat"

    def loss_of_peer(idx: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
            return loss(forward, idx, targets)

    return loss_of_peer, model


PeerLoss = Callable[[Callable[..., Any], Tensor, Tensor], Tensor]


def transformers_llama(config: Config) -> tuple[nn.Module, PeerLoss]:
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {**config_to_hf(config, torch.float32, bos_id=None, eos_id=None), "use_cache": False}
    model = LlamaForCausalLM(LlamaConfig.from_dict(fields, attn_implementation="sdpa"))
    model.load_state_dict(hf_weights(config))
    return model, lambda forward, idx, targets: forward(idx, labels=targets, shift_labels=targets).loss


def litgpt_gpt(config: Config) -> tuple[nn.Module, PeerLoss]:
    """litgpt's GPT, and the loss of its `pretrain` command."""
    from litgpt.config import Config as LitGPTConfig
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    same = ("block_size", "vocab_size", "padded_vocab_size", "n_layer", "n_head", "n_embd", "n_query_groups")
    same += ("intermediate_size", "norm_eps", "rope_base")
    model = GPT(
        LitGPTConfig(
            **{name: getattr(config, name) for name in same},
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
        )
    )
    model.load_state_dict(litgpt_weights(config))
    return model, lambda forward, idx, targets: chunked_cross_entropy(forward(idx), targets)


def nanochat_gpt(config: Config) -> tuple[nn.Module, PeerLoss]:
    from nanochat.gpt import GPT, GPTConfig

    sizes = {"sequence_len": config.block_size, "vocab_size": config.padded_vocab_size, "n_layer": config.n_layer}
    sizes |= {"n_head": config.n_head, "n_kv_head": config.n_query_groups, "n_embd": config.n_embd}
    known = {field.name for field in dataclasses.fields(GPTConfig)}
    model = GPT(GPTConfig(**sizes, **({"window_pattern": "L"} if "window_pattern" in known else {})))
    torch.manual_seed(0)
    model.init_weights()
    return model, lambda forward, idx, targets: forward(idx, targets)


def naive_llama(config: Config) -> tuple[nn.Module, PeerLoss]:
    model = NaiveLlama(config)
    model.load_state_dict(hf_weights(config))
    return model, lambda forward, idx, targets: forward(idx, targets)


PEERS: dict[str, Callable[[Config], tuple[nn.Module, PeerLoss]]] = {
    "transformers": transformers_llama,
    "litgpt": litgpt_gpt,
    "nanochat": nanochat_gpt,
    "naive": naive_llama,
}


def hf_weights(config: Config) -> dict[str, Tensor]:
    """The weights of seed 0 under transformers' names."""
    weights: dict[str, Tensor] = {}
    for name in parameter_shapes(config):
        weights |= to_hf(name, lambda each: init_tensor(each, config, seed=0), config)
    return weights


def litgpt_weights(config: Config) -> dict[str, Tensor]:
    """The weights of seed 0 under the names of litgpt 0.5, whose q, k and v follow one another."""
    theirs = hf_weights(config)
    names = {"model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f", "lm_head": "lm_head"}
    for i in range(config.n_layer):
        here, there = f"model.layers.{i}", f"transformer.h.{i}"
        qkv = [theirs.pop(f"{here}.self_attn.{part}_proj.weight") for part in "qkv"]
        theirs[f"{here}.self_attn.qkv.weight"] = torch.cat(qkv)
        names |= {f"{here}.input_layernorm": f"{there}.norm_1", f"{here}.post_attention_layernorm": f"{there}.norm_2"}
        names |= {f"{here}.self_attn.qkv": f"{there}.attn.qkv", f"{here}.self_attn.o_proj": f"{there}.attn.proj"}
        mlp = {"gate_proj": "fc_1", "up_proj": "fc_2", "down_proj": "proj"}
        names |= {f"{here}.mlp.{old}": f"{there}.mlp.{new}" for old, new in mlp.items()}
    return {f"{names[name.removesuffix('.weight')]}.weight": weight for name, weight in theirs.items()}


class NaiveNorm(nn.Module):
    """RMSNorm as its formula reads."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(config.n_embd)), config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class NaiveBlock(nn.Module):
    """A Llama layer as one would write it first; its parameters have transformers' names."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, width = config, config.n_embd
        kv_width = config.n_query_groups * config.head_size
        linears = {"q": (width, width), "k": (width, kv_width), "v": (width, kv_width), "o": (width, width)}
        self.self_attn = nn.ModuleDict({f"{k}_proj": nn.Linear(*size, bias=False) for k, size in linears.items()})
        inner = config.intermediate_size
        linears = {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
        self.mlp = nn.ModuleDict({f"{k}_proj": nn.Linear(*size, bias=False) for k, size in linears.items()})
        self.input_layernorm, self.post_attention_layernorm = NaiveNorm(config), NaiveNorm(config)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C). Returns (B, T, C)."""
        B, T, C = x.shape
        attn, mlp = self.self_attn, self.mlp
        h = self.input_layernorm(x)
        q, k, v = (attn[f"{name}_proj"](h).view(B, T, -1, self.config.head_size).transpose(1, 2) for name in "qkv")
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True, enable_gqa=True)
        x = x + attn["o_proj"](y.transpose(1, 2).reshape(B, T, C))
        h = self.post_attention_layernorm(x)
        return x + mlp["down_proj"](F.silu(mlp["gate_proj"](h)) * mlp["up_proj"](h))

    def rotate(self, x: Tensor) -> Tensor:
        """RoPE of x (B, H, T, D)."""
        T, half = x.size(2), x.size(3) // 2
        steps = torch.arange(half, device=x.device) / half
        angles = torch.outer(torch.arange(T, device=x.device), self.config.rope_base**-steps)
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class NaiveLlama(nn.Module):
    """The same model without a thought for speed: all logits at once, one tensor operation per operation."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        body = {"embed_tokens": nn.Embedding(config.padded_vocab_size, config.n_embd), "norm": NaiveNorm(config)}
        self.model = nn.ModuleDict({**body, "layers": nn.ModuleList(NaiveBlock(config) for _ in range(config.n_layer))})
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """idx and targets (B, T). Returns the mean loss."""
        x = self.model["embed_tokens"](idx)
        for layer in self.model["layers"]:
            x = layer(x)
        logits = self.lm_head(self.model["norm"](x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
