"""WidthPlan: how a model grows in width, as data and without tensors. grow/width_tensors.py carries it out.

Channel j of the grown residual stream that copies channel i is written a_j times as large, and the norms multiply what
is read from it by K / a_j, so that every reader sees what it saw before. With D and D' the widths before and after and
c_i the number of copies of channel i:

    rule         a_j                   K             the function is kept
    M            sqrt(D' / (D c_i))    1             always
    E            1 / sqrt(c_i)         sqrt(D/D')    if norm_eps becomes K^2 norm_eps, otherwise nearly
    Z            1                     sqrt(kD/D')   as E; every channel has k copies, the rest are new
    U            1                     1             always; D' = kD, every channel has k copies
    bert2bert    1                     norms copied  only where U does          (arXiv 2110.07143)
    published    1                     sqrt(D/D')    only where Z with k=1 does (arXiv 2405.15319)
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_gpt.config import Config, unknown_key

IndexMap = tuple[int | None, ...]
"""For every channel, group, slot or neuron of the grown model the one of the source that it copies; None: a new one."""

RULES = ("M", "U", "E", "Z", "bert2bert", "published")
SHARES = {
    "even": "copies share what is read from them evenly, and stay equal for ever in training without noise",
    "random": "every weight draws its own share, U(0.05, 1.05) over the sum of its copies: one step separates copies",
    "block": "the n-th copy reads only n-th copies: block-diagonal matrices",
}
FILLS = {
    "closed": "new heads and neurons are random inside, and nothing reads them yet",
    "block": "new heads and neurons read only new channels, which are zero: [[W, A], [0, C]]",
    "random": "every new entry is random: the function is not kept",
}
SIZES = ("n_embd", "n_head", "n_query_groups", "intermediate_size", "norm_eps")
"""Fields of a Config that a width plan may change."""
EPS_TOLERANCE = 1e-9  # relative; K^2 norm_eps is a rounded product


@dataclass(frozen=True)
class WidthPlan:
    """From the sizes of a source to larger ones: what every channel, head and neuron starts from."""

    channels: IndexMap
    """Residual channels."""
    groups: IndexMap
    """Query groups: k, v and the query heads that share them."""
    slots: IndexMap
    """Query heads within a group, alike in every group."""
    neurons: IndexMap
    """Neurons of the SwiGLU."""
    rule: str = "M"
    """One of RULES: how residual channels and norms are scaled."""
    shares: str = "even"
    """One of SHARES: how much of what was read from a channel is read from each of its copies."""
    fill: str = "closed"
    """One of FILLS: what new channels, heads and neurons start with."""
    rows_from_next_layer: bool = False
    """Whether the outputs that are further copies come from the layer after (advanced knowledge initialisation)."""
    twin_noise: float = 0.0
    """Noise on the columns that read copies, over the root mean square of the matrix; it cancels out over copies."""

    def __post_init__(self) -> None:
        for name in MAPS:
            object.__setattr__(self, name, tuple(getattr(self, name)))  # the dataclass is frozen

    def problems(self, src: Config, dst: Config) -> list[str]:
        """A line for every way in which this plan does not lead from `src` to `dst`, or to weights that never train."""
        sizes = {
            "channels": (src.n_embd, dst.n_embd),
            "groups": (src.n_query_groups, dst.n_query_groups),
            "slots": (src.q_per_kv, dst.q_per_kv),
            "neurons": (src.intermediate_size, dst.intermediate_size),
        }
        problems = [
            problem for name, pair in sizes.items() for problem in _map_problems(name, getattr(self, name), *pair)
        ]
        problems += _family_problems(src)
        if src.head_size != dst.head_size:
            problems.append(
                f"head_size changes from {src.head_size} to {dst.head_size}, and rotary positions depend on it; "
                f"grow the number of heads and keep n_embd / n_head, or give head_size={src.head_size}"
            )
        for name, known in (("rule", RULES), ("shares", SHARES), ("fill", FILLS)):
            if getattr(self, name) not in known:
                problems.append(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        if not 0 <= self.twin_noise < math.inf:
            problems.append(f"twin_noise={self.twin_noise} must be a number of at least 0")
        return problems or [*self._rule_problems(src, dst), *self._dead_starts()]

    def _rule_problems(self, src: Config, dst: Config) -> list[str]:
        problems = []
        equal = len(set(copies(self.channels).values())) == 1
        if self.rule in ("U", "Z") and not equal:
            problems.append(
                f"rule {self.rule} needs equally many copies of every channel; use rule M, or pad with new ones"
            )
        elif self.rule == "U" and None in self.channels:
            problems.append(f"rule U needs a whole factor, and n_embd={src.n_embd} grows to {dst.n_embd}; use rule M")
        elif not any(
            math.isclose(dst.norm_eps, eps, rel_tol=EPS_TOLERANCE) for eps in (src.norm_eps, self.exact_eps(src))
        ):
            problems.append(
                f"norm_eps changes from {src.norm_eps} to {dst.norm_eps}; keep it"
                + (f", or make it {self.exact_eps(src)} for rule {self.rule}" if self.norm_scale(src) != 1 else "")
            )
        if self.shares == "block" and len(self._factors()) > 1:
            problems.append(
                "block-diagonal growth multiplies n_embd, n_query_groups and intermediate_size by one factor"
            )
        return problems

    def _factors(self) -> set[float]:
        """How often each channel, group and neuron occurs; query slots have to stay as they are."""
        found = {
            float(count) for name in ("channels", "groups", "neurons") for count in copies(getattr(self, name)).values()
        }
        stays = self.slots == tuple(range(len(self.slots))) and not any(None in getattr(self, name) for name in MAPS)
        return found if stays else found | {math.nan}

    def _dead_starts(self) -> list[str]:
        if self.fill == "block" and None not in self.channels and None in (*self.neurons, *self.groups):
            return [
                "new neurons and heads that read only new channels never train where n_embd does not grow: "
                "all they compute and all their gradients are zero; use fill='closed'"
            ]
        return []

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes."""
        return all(getattr(self, name) == tuple(range(len(getattr(self, name)))) for name in MAPS)

    def is_exact(self, src: Config, dst: Config) -> bool:
        """Whether the grown model computes the function of its source, up to rounding."""
        if self.is_identity:
            return True
        if self.rows_from_next_layer or (self.fill == "random" and any(None in getattr(self, name) for name in MAPS)):
            return False
        if self.rule in ("bert2bert", "published") and not self._published_is_exact(src):
            return False
        return math.isclose(dst.norm_eps, self.exact_eps(src), rel_tol=EPS_TOLERANCE)

    def _published_is_exact(self, src: Config) -> bool:
        """Whether a = 1 with the norms of this rule is one of the exact rules."""
        counts = set(copies(self.channels).values())
        if len(counts) > 1 or (src.tie_embeddings and counts != {1}):
            return False
        return math.isclose(self.norm_scale(src), math.sqrt(max(counts) * src.n_embd / len(self.channels)))

    @property
    def stays_symmetric(self) -> bool:
        """Whether there are copies that deterministic training can never tell apart."""
        has_copies = any(max(copies(getattr(self, name)).values()) > 1 for name in MAPS)
        return has_copies and self.shares != "random" and not self.twin_noise and not self.rows_from_next_layer

    def channel_scales(self, src: Config) -> list[float]:
        """a_j of every residual channel of the grown model; 1 for new ones."""
        counts, width = copies(self.channels), len(self.channels)
        scale = {
            "M": lambda count: math.sqrt(width / (src.n_embd * count)),
            "E": lambda count: 1 / math.sqrt(count),
        }.get(self.rule, lambda count: 1.0)
        return [1.0 if channel is None else scale(counts[channel]) for channel in self.channels]

    def norm_scale(self, src: Config) -> float:
        """K: the root mean square of the grown residual stream over that of the source, as the rule has it."""
        kept = src.n_embd / len(self.channels)
        factor = {"E": kept, "published": kept, "Z": kept * max(copies(self.channels).values())}
        return math.sqrt(factor.get(self.rule, 1.0))

    def exact_eps(self, src: Config) -> float:
        """The norm_eps with which a grown model of rule E or Z computes exactly what its source does."""
        return self.norm_scale(src) ** 2 * src.norm_eps

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; maps as runs, [[first, length], ...]."""
        return dataclasses.asdict(self) | {name: to_runs(getattr(self, name)) for name in MAPS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WidthPlan:
        """The inverse of `to_dict`.

        Raises:
            ValueError: unknown or missing keys.
        """
        known = [part.name for part in dataclasses.fields(cls)]
        problems = [f"width plan: {unknown_key(key, known)}" for key in values if key not in known]
        problems += [f"width plan: key {key!r} is missing" for key in MAPS if key not in values]
        if problems:
            raise ValueError("\n".join(problems))
        return cls(**{**values, **{name: from_runs(values[name]) for name in MAPS}})


MAPS = ("channels", "groups", "slots", "neurons")


def copies(index_map: IndexMap) -> Counter[int]:
    """How often each index of the source occurs."""
    return Counter(index for index in index_map if index is not None)


def copy_numbers(index_map: IndexMap) -> list[int]:
    """For every entry how many entries before it have the same source: 0 is the first copy; 0 for new entries."""
    seen: Counter[int] = Counter()
    numbers = []
    for index in index_map:
        numbers.append(0 if index is None else seen[index])
        if index is not None:
            seen[index] += 1
    return numbers


def to_runs(index_map: IndexMap) -> list[list[int | None]]:
    """Runs of consecutive indices, [first, length]; a first of None is a run of new entries."""
    runs: list[list[Any]] = []
    for index in index_map:
        first, length = runs[-1] if runs else (-2, 0)
        expected = None if first is None else first + length
        if runs and index == expected:
            runs[-1][1] += 1
        else:
            runs.append([index, 1])
    return runs


def from_runs(runs: Iterable[Sequence[int | None]]) -> IndexMap:
    """The inverse of `to_runs`."""
    return tuple(None if first is None else first + i for first, length in runs for i in range(length or 0))


def _family_problems(src: Config) -> list[str]:
    """Lines about what in a model does not let its width grow: a widened norm has to see the stream as before."""
    reasons = {
        "norms after attention and MLP, whose size they set": src.norm_placement == "after",
        "one norm over all queries and keys": src.qk_norm == "full",
        "norms that multiply by 1 + weight": src.norm_plus_one,
        "scaled embeddings": src.embedding_scale != 1.0,
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if not found:
        return []
    return [f"{src.family} cannot grow in width: it has {' and '.join(found)}; grow it in depth, e.g. by stack"]


def _map_problems(name: str, index_map: IndexMap, before: int, after: int) -> list[str]:
    """Lines about a map of `before` onto `after` entries; growth keeps every entry of the source."""
    what = {
        "channels": "residual channels (n_embd)",
        "groups": "query groups (n_query_groups)",
        "slots": "query heads per group (n_head / n_query_groups)",
        "neurons": "neurons (intermediate_size)",
    }[name]
    if after < before:
        return [f"{what} shrink from {before} to {after}, and growth in width keeps all; ask for {before} or more"]
    if len(index_map) != after:
        return [f"the map of {what} has {len(index_map)} entries, but the grown model has {after}; make them equal"]
    used = set(copies(index_map))
    if used != set(range(before)):
        wrong = min(used ^ set(range(before)))
        return [f"the map of {what} must have every index from 0 to {before - 1} and no other; look at {wrong}"]
    return []
