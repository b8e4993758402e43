"""How much memory a training step takes on each device: the tensors that live at its peak, term by term.

Legend: T tokens of a micro-batch, C n_embd, F intermediate_size, V padded_vocab_size.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import prod

from lit_gpt.axes import EMBEDDING, HEAD, layer_of, parameter_shapes
from lit_gpt.config import Config

RECOMPUTE = ("none", "selective", "full")
"""Values of pretrain's activation_checkpointing."""
CHUNK_ROWS, CPU_CHUNK_ROWS = 1024, 128  # rows of logits that exist at a time, see lit_gpt/kernels/loss.py
FP32, BF16 = 4, 2
HEAP_TOP = 64 * 2**20
"""Bytes that glibc keeps free at the top of a heap: twice the largest block that it puts there, which is 32 MiB."""
HOLES = 4
"""Of a layer's results of the residual stream's width, those whose place between tensors that stay is left empty (glibc
2.36): a hole that an aligned block leaves does not take an aligned block of the same size. With every block mapped on
its own (MALLOC_MMAP_THRESHOLD_=131072, half a second of system time per GB) peaks are the sum of the tensors to 5 %;
what they are more without it was 60 MB at two layers and 4 results per layer more at sixteen."""


@dataclass(frozen=True)
class Computation:
    """All of how a model trains that its memory depends on."""

    micro_batch_size: int
    """Sequences at a time on one device."""
    precision: str = "bf16"
    """fp32, bf16 (over fp32 weights) or bf16-true."""
    recompute: str = "none"
    """One of RECOMPUTE."""
    compiled: bool = False
    """Whether blocks are compiled."""
    accumulates: bool = True
    """Whether a step has several micro-batches: the gradients of those before are there from the start."""
    device: str = "cuda"
    """cuda or cpu."""
    cpu_has_bf16: bool = True
    """Whether a CPU multiplies bf16; else products are made in fp32, from wider copies."""
    shards: int = 1
    """Processes over which weights, gradients and moments are sharded (FSDP2); their replicas do not count."""
    stays_gathered: bool = False
    """Whether a block's gathered weights stay until its backward pass."""
    replicated: bool = False
    """Whether processes with whole models average gradients (DDP), in buckets that are copies of them."""
    muon: bool = False
    """Whether matrices of blocks have one moment instead of two."""
    eight_bit: bool = False
    """Whether moments take a byte per number, and a scale for 256 of them."""
    frozen: Collection[str] = frozenset()
    """Parameters that do not train."""

    @property
    def stored(self) -> int:
        """Bytes of a number in weights, gradients and moments."""
        return BF16 if self.precision == "bf16-true" else FP32

    @property
    def residual(self) -> int:
        """Bytes of a number in the residual stream."""
        return FP32 if self.precision == "fp32" else BF16

    @property
    def widens(self) -> bool:
        """Whether factors of products are widened to fp32."""
        return self.residual == BF16 and self.device == "cpu" and not self.cpu_has_bf16

    @property
    def product(self) -> int:
        """Bytes of a number in the factors of products."""
        return FP32 if self.widens else self.residual

    @property
    def copied(self) -> int:
        """Bytes of a number in the copy of a weight that its product keeps for backward; 0: it takes the weight."""
        return 0 if self.product == self.stored and not self.widens else self.product


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: float
    gradients: float
    moments: float
    copies: float
    """Weights in the dtype of products, gathered from other processes, or gradients in DDP's buckets."""
    activations: float
    """What is kept for backward, with what a layer's backward pass makes on its way."""
    logits: float
    """A chunk of them, and what the loss makes of it: gradients of the head's input and weight."""
    heap: float
    """Holes in the heap of a CPU process."""
    reused: float
    """Of all this, what is not there at one time: gradients that are made when activations are gone."""

    @property
    def total(self) -> float:
        parts = self.weights + self.gradients + self.moments + self.copies + self.activations + self.logits
        return parts + self.heap - self.reused


def memory_per_device(config: Config, how: Computation) -> Memory:
    """The peak of a training step. Not in it: what the process had before, masks of documents, kernels' workspaces,
    and on CUDA the allocator's fragments; all in all about 1 GB there.
    """
    if how.recompute not in RECOMPUTE:
        raise ValueError(f"recompute={how.recompute!r} must be one of {', '.join(RECOMPUTE)}")
    sizes = _Sizes(config, how)
    n_tokens = how.micro_batch_size * config.block_size
    weights = how.stored * sizes.all / how.shards
    gradients = how.stored * sizes.trained / how.shards
    moments = (
        (1 + FP32 / 256 if how.eight_bit else how.stored)
        * (2 * sizes.trained - (sizes.muon if how.muon else 0))
        / how.shards
    )
    copies, logits = _copies(sizes, how), _loss_bytes(config, how, n_tokens)
    kept = n_tokens * sum(kept_by_layer(config, how, layer) for layer in range(config.n_layer))
    passing = n_tokens * _made_in_backward(config, how)
    into_head = n_tokens * config.n_embd * ((FP32 if how.device == "cpu" else how.residual) + how.product)
    # gradients that were accumulated are there from the start, and a new one until it is added to them
    held, head = (gradients, 0) if how.accumulates else (0.0, how.stored * sizes.head)
    new = sizes.largest_in_block * ((how.stored if how.accumulates else 0) + _gradient_on_its_way(how))
    embedding, block = how.stored * sizes.embedding, how.stored * sizes.block
    above = gradients if how.accumulates else max(0.0, gradients - (embedding + block) / how.shards)
    copied = copies / config.n_layer if how.recompute == "none" and how.shards == 1 else copies
    in_first_layer = kept / config.n_layer + copied
    at_peak = max(
        held + copies + kept + into_head + logits,  # at the loss
        held + head + new + copies + kept + passing,  # in the backward pass of the last layer
        above + new + in_first_layer + passing,  # in that of the first
        gradients + (embedding if how.accumulates or config.tie_embeddings else 0),  # at its end
    )
    activations = kept + max(passing + new, into_head)
    live = weights + moments + at_peak
    heap = HEAP_TOP + n_tokens * config.n_layer * _holes(config, how) if how.device == "cpu" else 0.0
    reused = weights + gradients + moments + copies + activations + logits - live
    return Memory(weights, gradients, moments, copies, activations, logits, heap, reused)


def memory_text(memory: Memory) -> str:
    """The terms in GB, those that are nothing left out."""
    parts = {name: value / 1e9 for name, value in vars(memory).items() if name != "reused" and value}
    text = ", ".join(f"{name} {value:.3g}" for name, value in parts.items())
    at_one_time = f"; {memory.reused / 1e9:.3g} of it not at one time" if memory.reused else ""
    return f"in GB: {text}{at_one_time}"


class _Sizes:
    """Numbers of parameters of one kind and another."""

    def __init__(self, config: Config, how: Computation) -> None:
        shapes = parameter_shapes(config)
        counts = {name: prod(shape) for name, shape in shapes.items()}
        trained = {name: count for name, count in counts.items() if name not in how.frozen}
        in_blocks = {name: count for name, count in counts.items() if layer_of(name) is not None}
        matrices = {name: count for name, count in in_blocks.items() if len(shapes[name]) == 2}
        self.all, self.trained = sum(counts.values()), sum(trained.values())
        self.block_matrices = sum(matrices.values())
        self.muon = sum(count for name, count in matrices.items() if name in trained)
        self.block = sum(in_blocks.values()) // config.n_layer
        self.largest_in_block = max((trained[name] for name in in_blocks if name in trained), default=0)
        self.embedding = trained.get(EMBEDDING, 0)
        self.head = self.embedding if config.tie_embeddings else trained.get(HEAD, 0)
        self.ends = counts[EMBEDDING] + counts.get(HEAD, 0)


def _copies(sizes: _Sizes, how: Computation) -> float:
    """Of blocks' weights; the head's copy is there as long as logits are."""
    if how.shards > 1:
        in_products = how.residual if how.precision == "bf16" else how.stored
        blocks = sizes.block_matrices if how.stays_gathered else 2 * sizes.block  # the next one is fetched ahead
        return how.stored * sizes.ends + in_products * blocks + FP32 * sizes.block  # and gradients to be reduced
    at_a_time = sizes.block_matrices if how.recompute == "none" else sizes.block
    return how.copied * at_a_time + (how.stored * sizes.trained if how.replicated else 0)


def _gradient_on_its_way(how: Computation) -> int:
    """Bytes of a number in the gradient of a weight's copy, and of what that was cast to, before it is the weight's."""
    return how.copied + (how.residual if how.widens and how.copied else 0)


def kept_by_layer(config: Config, how: Computation, layer: int = 0) -> float:
    """Bytes per token that a layer keeps for its backward pass."""
    frozen = frozenset(how.frozen)
    if not frozen:
        return _kept(config, how, how.recompute)
    layers = {name: -1 if name == EMBEDDING else layer_of(name) for name in parameter_shapes(config)}
    if frozen.issuperset(name for name, number in layers.items() if number is not None and number <= layer):
        return 0  # nothing below trains
    own = [name for name, number in layers.items() if number == layer]
    kept = _kept(config, how, how.recompute)
    if how.recompute == "none" and frozen.issuperset(own):  # a weight's gradient alone needs its product's input
        kept -= _into_products(config, how)
    return kept


def _kept(config: Config, how: Computation, recompute: str) -> float:
    """none: of each norm what went in (on a CPU the normed values, in fp32) and its scale; what goes into products;
    q, k and v as attention takes them (and as they were made, where they are views of one product), its result and a
    number per head; gate, silu of it, up projection. Compiled, silu and normed values are made again. full: the
    layer's input. selective: that, and the results of products and of attention.
    """
    r, p = how.residual, how.product
    heads = config.n_head * config.head_size
    if recompute == "full":
        return r * config.n_embd
    of_attention = p * heads + FP32 * config.n_head
    if recompute == "selective":
        products = 2 * config.n_embd + config.qkv_size + 2 * config.intermediate_size
        return r * config.n_embd + p * products + of_attention
    scales = 2 * FP32
    if how.widens or config.q_per_kv > 1:
        attention = 3 * p * heads
    else:
        attention = r * (config.qkv_size + 2 * heads)
    if how.compiled:
        into_proj = p * heads if how.widens else 0
        channels = (2 * r + 2 * p) * config.n_embd
        return channels + scales + attention + of_attention + into_proj + (2 * r + p) * config.intermediate_size
    norm = FP32 if how.device == "cpu" else r
    qk_norms = 0 if config.qk_norm == "none" else norm * (config.n_head + config.n_query_groups) * config.head_size
    neurons = 3 * r * config.intermediate_size
    into = _into_products(config, how)
    return 2 * norm * config.n_embd + scales + qk_norms + into + attention + of_attention + neurons


def _into_products(config: Config, how: Computation) -> float:
    """Bytes per token of the inputs of a layer's products that nothing else keeps."""
    p, heads = how.product, config.n_head * config.head_size
    if how.widens:  # the two products of the MLP's input each widen it, and the last one of attention its result
        return p * (3 * config.n_embd + heads + config.intermediate_size)
    return p * (2 * config.n_embd + config.intermediate_size)


def _holes(config: Config, how: Computation) -> float:
    """Bytes per token and layer that a heap does not fill again."""
    if how.recompute == "selective":  # what is made again lay between what is kept
        return _kept(config, how, "none") - _kept(config, how, "selective")
    holes = HOLES * FP32 * config.n_embd
    if how.accumulates and how.recompute == "none":
        # gradients of the first micro-batch come to lie where its activations were: seen, half of the places are lost
        holes += _kept(config, how, "none") / 2
    return holes


def _made_in_backward(config: Config, how: Computation) -> float:
    """Bytes per token beside what is kept, while a layer goes backward: two gradients of the MLP's width and two of
    the residual stream's; and first what the layer keeps of itself, where it is made again."""
    made = 2 * how.residual * (config.n_embd + config.intermediate_size)
    if how.recompute == "none":
        return made
    there = how.product * config.n_head * config.head_size  # attention's result; those of products are cast again
    if how.recompute == "full":
        there = 0
    elif not how.widens:
        there = _kept(config, how, "selective")
    return made + max(0.0, _kept(config, how, "none") - there)


def _loss_bytes(config: Config, how: Computation, n_tokens: int) -> float:
    """A chunk of logits, their logarithmic probabilities and the gradients of the chunk before, beside the head's
    weight in the dtype of products, and gradients of the head's input and weight: these are there twice in the end,
    when they are scaled."""
    rows = CHUNK_ROWS
    if how.device == "cpu" and how.product == FP32:
        rows = min(max(config.n_embd // 2, CPU_CHUNK_ROWS), CHUNK_ROWS)
    rows = min(rows, n_tokens)
    head = config.padded_vocab_size * config.n_embd
    in_chunk = how.product + FP32 + (FP32 if rows < n_tokens or how.product != FP32 else 0)
    in_chunk += BF16 if how.product != FP32 and rows < n_tokens else 0
    copy = head * how.product if how.product != how.stored else 0
    trains_head = (EMBEDDING if config.tie_embeddings else HEAD) not in how.frozen
    gradients = how.product * n_tokens * config.n_embd + (FP32 * head if trains_head else 0)
    return max(copy + gradients + rows * config.padded_vocab_size * in_chunk, 2 * gradients)
