"""Carry a width plan out on one tensor: a weight, or one of its optimizer moments. Read grow/width_plan.py first.

Whatever the plan and the model, a matrix of the grown model is, entry by entry,

    scale of its output * share of its input * (entry of the source at the mapped row and column + noise on copies)

where scales are 1 outside the residual stream, and entries without a source are zero or drawn. It is made in blocks of
rows, in fp32 or float64, and cast last: beside the result and its source only one block is ever in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from grow.width_plan import WidthPlan, copies, copy_numbers
from lit_gpt.axes import EMBD, EMBEDDING, FINAL_NORM, HEAD, HEADS, INTERMEDIATE, QKV, VOCAB, axes_of, parameter_shapes
from lit_gpt.config import Config
from lit_gpt.model import init_std

BLOCK_ENTRIES = 1 << 18  # of a matrix that are made at a time: 1 MB in fp32, which stays in the cache
SMALLEST_SHARE, LARGEST_SHARE = 0.05, 1.05  # before copies are normalised to sum to 1


@dataclass(frozen=True)
class AxisMap:
    """One dimension of a grown tensor, entry by entry; every tensor is of its grown size and on the CPU."""

    source: Tensor
    """int64: index in the source; 0 for new entries."""
    new: Tensor
    """bool: has no source."""
    copies: Tensor
    """float64: entries that share its source, itself included."""
    copy: Tensor
    """int64: entries before it that share its source."""
    reads_new: Tensor
    """bool: a new head or neuron that starts by reading new channels only."""
    n_src: int
    """Size of the dimension in the source."""


@dataclass(frozen=True)
class Widening:
    """A width plan between two models, as tensors."""

    width: WidthPlan
    src: Config
    dst: Config
    axes: dict[str, AxisMap]
    scale: Tensor
    """float64 (n_embd of the grown model): a_j."""
    norm_scale: float
    """K."""

    @property
    def energy(self) -> Tensor:
        """float64 (n_embd of the grown model): a_j^2 summed over all copies of what channel j copies."""
        channels = self.axes[EMBD]
        total = torch.zeros(channels.n_src, dtype=torch.float64)
        total.index_add_(0, channels.source, torch.where(channels.new, 0.0, self.scale.square()))
        return total[channels.source]


@lru_cache(maxsize=4)
def widening(width: WidthPlan, src: Config, dst: Config) -> Widening:
    """The plan as tensors."""
    blocks = width.fill == "block"
    heads = _head_units(width, src)
    axes = {
        VOCAB: _axis([(row, 1, 0, False) for row in range(src.padded_vocab_size)], src.padded_vocab_size),
        EMBD: _axis(_units(width.channels, False), src.n_embd),
        INTERMEDIATE: _axis(_units(width.neurons, blocks), src.intermediate_size),
        HEADS: _axis([unit for group in heads for unit in group[:-2]], src.n_head, src.head_size, src.q_per_kv),
        QKV: _axis([unit for group in heads for unit in group], src.qkv_size // src.head_size, src.head_size),
    }
    scale = torch.tensor(width.channel_scales(src), dtype=torch.float64)
    return Widening(width, src, dst, axes, scale, width.norm_scale(src))


Unit = tuple[int | None, int, int, bool]
"""Source, copies, number of the copy, whether it reads new channels only: of one head, neuron or channel."""


def _units(index_map: tuple[int | None, ...], reads_new: bool) -> list[Unit]:
    counts, numbers = copies(index_map), copy_numbers(index_map)
    return [
        (index, 1 if index is None else counts[index], number, reads_new and index is None)
        for index, number in zip(index_map, numbers, strict=True)
    ]


def _head_units(width: WidthPlan, src: Config) -> list[list[Unit]]:
    """For every query group of the grown model its query heads, k and v; sources count heads of the fused matrix.

    A new query head beside old keys would attend evenly over live values, so it is closed whatever the plan's fill.
    """
    per_group = src.q_per_kv + 2
    slots = _units(width.slots, False)
    tail: list[Unit] = [(src.q_per_kv, 1, 0, False), (src.q_per_kv + 1, 1, 0, False)]
    n_copies = 1 + max(number for _, _, number, _ in slots)
    found = []
    for group, group_copies, group_number, reads_new in _units(width.groups, width.fill == "block"):
        if group is None:
            found.append([(None, 1, 0, reads_new)] * (len(slots) + 2))
            continue
        found.append(
            [
                (
                    None if slot is None else group * per_group + slot,
                    group_copies * slot_copies,
                    group_number * n_copies + slot_number,
                    False,
                )
                for slot, slot_copies, slot_number, _ in (*slots, *tail)
            ]
        )
    return found


def _axis(units: list[Unit], n_src: int, head_size: int = 1, q_per_kv: int | None = None) -> AxisMap:
    """The map of a dimension whose units are `head_size` entries long.

    With `q_per_kv` the sources count heads of the fused matrix, two more per group than the dimension has.
    """
    if q_per_kv is not None:
        units = [
            (source if source is None else source - 2 * (source // (q_per_kv + 2)), *rest) for source, *rest in units
        ]
    source = torch.tensor([-1 if unit[0] is None else unit[0] for unit in units])
    new = (source < 0).repeat_interleave(head_size)
    within = torch.arange(head_size).repeat(len(units))
    return AxisMap(
        source=torch.where(new, 0, source.repeat_interleave(head_size) * head_size + within),
        new=new,
        copies=torch.tensor([float(unit[1]) for unit in units], dtype=torch.float64).repeat_interleave(head_size),
        copy=torch.tensor([unit[2] for unit in units]).repeat_interleave(head_size),
        reads_new=torch.tensor([unit[3] for unit in units]).repeat_interleave(head_size),
        n_src=n_src * head_size,
    )


def widened_weight(wide: Widening, name: str, seed: int, source: Tensor, following: Tensor | None = None) -> Tensor:
    """A parameter of the grown model, in dtype and on the device of its source.

    Args:
        wide: the plan.
        name: of the parameter in the grown model; with the seed the key of all that is drawn.
        seed: of the growth.
        source: the parameter that it starts from.
        following: the same one of the layer after, for plans with `rows_from_next_layer`.
    """
    dtype = compute_dtype(source.dtype)
    if axes_of(name) == (EMBD,) and not name.endswith("bias"):
        return _norm(wide, name, source.to(dtype)).to(source.dtype)
    if source.dim() == 1:
        return _vector(wide, name, source, following, _vector_scale(wide, name)).to(source.dtype)
    shape = parameter_shapes(wide.dst)[name]
    out = torch.empty(shape, dtype=source.dtype, device=source.device)
    for rows in _row_blocks(shape):
        out[rows] = _weight_rows(wide, name, seed, rows, source=source, following=following).to(source.dtype)
    return out


def _norm(wide: Widening, name: str, source: Tensor) -> Tensor:
    channels, rule = wide.axes[EMBD], wide.width.rule
    if rule in ("bert2bert", "published"):
        factor = torch.full_like(wide.scale, wide.norm_scale)
    elif name == FINAL_NORM and wide.dst.tie_embeddings:
        factor = wide.norm_scale / wide.energy  # the shared matrix holds a_j already, and copies of it add up
    else:
        factor = wide.norm_scale / wide.scale
    grown = source[channels.source.to(source.device)] * factor.to(source)
    return torch.where(channels.new.to(source.device), 1.0, grown)


def _vector_scale(wide: Widening, name: str) -> Tensor:
    """float64: what the entries of a bias are multiplied by, alike to the rows of its matrix; 1 for norms of heads."""
    return wide.scale if axes_of(name) == (EMBD,) else torch.ones(1, dtype=torch.float64)


def _vector(wide: Widening, name: str, source: Tensor, following: Tensor | None, factor: Tensor) -> Tensor:
    """A bias, or the norm of heads, in the dtype to compute in; new entries are zero."""
    axis = wide.axes.get(axes_of(name)[0])
    wider = source.to(compute_dtype(source.dtype))
    if axis is None:  # within a head, and heads stay as they are
        return wider * factor.to(wider)
    index = axis.source.to(source.device)
    grown = wider[index]
    if following is not None:
        grown = torch.where((axis.copy > 0).to(source.device), following.to(wider)[index], grown)
    return (grown * factor.to(grown)).masked_fill(axis.new.to(source.device), 0.0)


def _row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Whole rows, BLOCK_ENTRIES entries at a time: a function of the shape alone, as is what is drawn for them."""
    n_rows = max(1, BLOCK_ENTRIES // shape[1])
    return (slice(start, min(start + n_rows, shape[0])) for start in range(0, shape[0], n_rows))


def _weight_rows(
    wide: Widening, name: str, seed: int, rows: slice, *, source: Tensor, following: Tensor | None
) -> Tensor:
    """Some rows of a matrix of the grown model, in the dtype that it is computed in."""
    out_axis, in_axis = (wide.axes[axis] for axis in axes_of(name))
    block = _gather(out_axis, in_axis, source, following, rows)
    if name == EMBEDDING:
        block *= wide.scale.to(block)
    else:
        share = _shares(wide, name, seed, rows, block.dtype)
        if share is not None:
            block *= share.to(block)
        if wide.width.twin_noise and bool((in_axis.copies > 1).any()):
            block += _twin_noise(wide, name, seed, rows, block)
    if axes_of(name)[0] == EMBD:
        block *= wide.scale[rows, None].to(block)
    new = out_axis.new[rows, None] | in_axis.new
    if not bool(new.any()):
        return block
    fresh = torch.empty(block.shape, dtype=torch.float32)
    fresh.normal_(0.0, init_std(name, wide.dst), generator=generator(seed, "new", f"{name}/{rows.start}"))
    fresh[_silent(wide, name, rows)] = 0.0
    return torch.where(new.to(block.device), fresh.to(block), block)


def _gather(out_axis: AxisMap, in_axis: AxisMap, source: Tensor, following: Tensor | None, rows: slice) -> Tensor:
    """The entries of the source that some rows of the grown matrix start from, in the dtype to compute in."""
    index = out_axis.source[rows].to(source.device)
    block = source.index_select(0, index)
    if following is not None:
        further = (out_axis.copy[rows, None] > 0).to(source.device)
        block = torch.where(further, following.index_select(0, index), block)
    return block.index_select(1, in_axis.source.to(source.device)).to(compute_dtype(source.dtype))


def _shares(wide: Widening, name: str, seed: int, rows: slice, dtype: torch.dtype) -> Tensor | None:
    """How much each entry reads of what its column's source gave: (1 or rows, columns); None: everything."""
    out_axis, in_axis = (wide.axes[axis] for axis in axes_of(name))
    if not bool((in_axis.copies > 1).any()):
        return None
    if wide.width.shares == "even" or (wide.width.shares == "block" and name == HEAD):
        return 1 / in_axis.copies
    if wide.width.shares == "block":
        return (out_axis.copy[rows, None] == in_axis.copy).to(dtype)
    drawn = torch.empty(rows.stop - rows.start, len(in_axis.source), dtype=torch.float32)
    drawn.uniform_(SMALLEST_SHARE, LARGEST_SHARE, generator=generator(seed, "shares", f"{name}/{rows.start}"))
    drawn = drawn.to(dtype)
    return drawn / _sum_over_copies(drawn, in_axis)


def _sum_over_copies(values: Tensor, in_axis: AxisMap) -> Tensor:
    """For every column the sum of the columns with the same source; new ones do not count, and get any sum."""
    totals = values.new_zeros(len(values), in_axis.n_src)
    totals.index_add_(1, in_axis.source, values.masked_fill(in_axis.new, 0.0))
    return totals.index_select(1, in_axis.source)


def _twin_noise(wide: Widening, name: str, seed: int, rows: slice, block: Tensor) -> Tensor:
    """Noise that cancels out between columns that read copies of one thing, `twin_noise` times the rms of each row."""
    in_axis = wide.axes[axes_of(name)[1]]
    drawn = torch.empty(block.shape, dtype=torch.float32)
    drawn.normal_(generator=generator(seed, "twins", f"{name}/{rows.start}"))
    drawn = drawn.to(block.dtype)
    drawn -= _sum_over_copies(drawn, in_axis) / in_axis.copies.to(drawn)
    restored = (in_axis.copies / (in_axis.copies - 1).clamp(min=1)).sqrt()  # taking the mean away took variance away
    restored[(in_axis.copies == 1) | in_axis.new] = 0.0
    rms = block.square().mean(dim=1, keepdim=True).sqrt()
    return (drawn * (wide.width.twin_noise * restored).to(drawn)).to(block) * rms


def _silent(wide: Widening, name: str, rows: slice) -> Tensor:
    """bool (rows, columns): new entries that start at zero; the rest, all of the head, is drawn as initial weights."""
    axis, _ = axes_of(name)
    out_axis, in_axis = (wide.axes[axis] for axis in axes_of(name))
    shape = (rows.stop - rows.start, len(in_axis.source))
    if wide.width.fill == "random":
        return torch.zeros(shape, dtype=torch.bool)
    if name == EMBEDDING:
        return in_axis.new.expand(shape)
    if axis == EMBD:
        closed = in_axis.new & ~in_axis.reads_new
        return closed | (out_axis.new[rows, None] & ~in_axis.reads_new)
    return out_axis.reads_new[rows, None] & ~in_axis.new


def widened_moment(
    wide: Widening,
    name: str,
    source: Tensor,
    following: Tensor | None = None,
    *,
    power: int,
    first_copies: bool = False,
) -> Tensor:
    """An optimizer moment of a parameter of the grown model, in dtype and on the device of its source.

    What is done to the gradient of a parameter when the function is kept and copies share evenly is done to exp_avg
    (power 1), and its square to exp_avg_sq (power 2). New entries are zero; so are further copies with `first_copies`.
    """
    device = source.device
    if axes_of(name)[0] not in wide.axes:  # of a norm of heads; copies of heads add up to the gradient of one
        return source.clone()
    row_factor, column_factor = _gradient_factors(wide, name)
    axes = [wide.axes[axis] for axis in axes_of(name)]
    zero = [axis.new | (axis.copy > 0) if first_copies else axis.new for axis in axes]
    if source.dim() == 1:
        following = following if name.endswith("bias") else None  # norms stay with their layer
        grown = _vector(wide, name, source, following, row_factor.pow(power))
        return grown.masked_fill(zero[0].to(device), 0.0).to(source.dtype)
    shape = parameter_shapes(wide.dst)[name]
    out = torch.empty(shape, dtype=source.dtype, device=device)
    for rows in _row_blocks(shape):
        block = _gather(*axes, source, following, rows)
        block *= row_factor[rows, None].pow(power).to(block)
        block *= column_factor.pow(power).to(block)
        out[rows] = block.masked_fill_((zero[0][rows, None] | zero[1]).to(device), 0.0).to(source.dtype)
    return out


def _gradient_factors(wide: Widening, name: str) -> tuple[Tensor, Tensor]:
    """float64 (rows), (columns): what the gradient of each is multiplied by when the model grows."""
    axes = [wide.axes[axis] for axis in axes_of(name)]
    written = 1 / (wide.scale * wide.axes[EMBD].copies)
    if name.endswith("bias"):
        return written if axes_of(name) == (EMBD,) else 1 / axes[0].copies, torch.ones(1, dtype=torch.float64)
    if len(axes) == 1:
        tied = name == FINAL_NORM and wide.dst.tie_embeddings
        read = wide.scale if tied else 1 / wide.axes[EMBD].copies
        return wide.scale * read / wide.norm_scale, torch.ones(1, dtype=torch.float64)
    rows, columns = (torch.ones(len(axis.source), dtype=torch.float64) for axis in axes)
    if name == EMBEDDING:
        return rows, written
    if axes_of(name)[0] == EMBD:
        return written, columns
    return 1 / axes[0].copies, columns


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products with weights of this dtype are computed in; they are cast back last."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def generator(seed: int, purpose: str, name: str) -> torch.Generator:
    """The stream of random numbers for one purpose of one parameter, so that any process can make any part."""
    key = hashlib.sha256(f"{seed}/{purpose}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
