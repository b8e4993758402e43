"""The order of training samples as a pure function of one integer: permutation, window, mixture, segments, skips.

A position counts samples of the global order: 0, 1, 2, ... Nothing is stored per sample, per rank or per worker, so a
run that stops at a position continues there exactly, on any number of devices and with any micro-batch size.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from lit_gpt.permutation import Permutation, WindowedPermutation, distinct

PROPORTIONAL = "proportional"
BLOCK_POSITIONS = 4096  # a weight is exact to 1/4096 of every 4096 samples; smaller weights need the larger block
LARGE_BLOCK_POSITIONS = 65536
CACHED_BLOCKS = 8  # 8 * 65,536 seats are 5 MB; reading forwards touches one or two blocks at a time
CACHED_PERMUTATIONS = 64

Weights = Mapping[str, float]


def quotas(weights: Sequence[float]) -> tuple[int, tuple[int, ...]]:
    """The block length and each source's exact number of places in a block, by largest remainder.

    Raises:
        ValueError: a weight so small that its source would never be read.
    """
    total = sum(Fraction(weight) for weight in weights)
    shares = [Fraction(weight) / total for weight in weights]
    small = any(0 < share < Fraction(1, BLOCK_POSITIONS) for share in shares)
    length = LARGE_BLOCK_POSITIONS if small else BLOCK_POSITIONS
    places = [math.floor(share * length) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (places[i] - shares[i] * length, i))
    for i in by_remainder[: length - sum(places)]:
        places[i] += 1
    for weight, place in zip(weights, places, strict=True):
        if weight > 0 and place == 0:
            raise ValueError(f"weight {weight} is below 1/{length} of the sum of weights; drop the source or raise it")
    return length, tuple(places)


class _Mixture:
    """One stretch of positions with fixed weights. Every source's own stream is read as a prefix, at any cut."""

    def __init__(self, seed: int, start: int, names: Sequence[str], weights: Weights, base: np.ndarray) -> None:
        self.seed, self.start, self.base = seed, start, base
        self.length, places = quotas([weights.get(name, 0.0) for name in names])
        self.places = np.array(places, dtype=np.int64)
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """For each place of a block: its source, and how many places of that source come before it in the block."""
        if number not in self._blocks:
            seats = Permutation(self.length, self.seed, self.start, number)(np.arange(self.length))
            source = np.searchsorted(np.cumsum(self.places), seats, side="right")
            rank = np.empty(self.length, dtype=np.int64)
            rank[np.argsort(source, kind="stable")] = _counters(self.places)
            self._blocks[number] = source, rank
        self._blocks.move_to_end(number)
        while len(self._blocks) > CACHED_BLOCKS:
            self._blocks.popitem(last=False)
        return self._blocks[number]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """positions: (k,), none before the start. Returns source and index inside the source's stream, (k,) each."""
        numbers, places = np.divmod(positions - self.start, self.length)
        source, index = np.empty_like(positions), np.empty_like(positions)
        for number in distinct(numbers):
            inside = numbers == number
            block_source, block_rank = self.block(int(number))
            source[inside], index[inside] = block_source[places[inside]], block_rank[places[inside]]
        return source, index + self.base[source] + numbers * self.places[source]

    def consumed(self, stop: int) -> np.ndarray:
        """How many samples of each source the positions before `stop` have used, all segments together: (sources,)."""
        number, place = divmod(max(stop - self.start, 0), self.length)
        counts = self.base + number * self.places
        return counts + np.bincount(self.block(number)[0][:place], minlength=len(counts)) if place else counts


def _counters(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ..., lengths[0] - 1, 0, 1, ..., lengths[1] - 1, ..."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


class DataOrder:
    """position -> (source, sample) for a set of sources, as a pure function.

    samples: number of samples of each source.
    weights: share of each source; None reads everything once per epoch in one permutation over all of it.
    segments: [(start_position, weights), ...] for weights that change during the run; replaces `weights`.
    skips: [(start, stop), ...]: stretches of the order that are never trained on, e.g. around a loss spike.
    window: this many files, shuffled, are read before the next ones are; None shuffles the samples of all files.
    files: (files,) samples of each file, for each source; only needed with a window. Without weights a window holds
        files of any source, with weights every source has windows of its own.

    Segments and skips are counted in the order itself, that is, with skipped samples included; see `unskipped`.

    Raises:
        ValueError: a list of all problems, one per line.
    """

    def __init__(
        self,
        samples: Mapping[str, int],
        seed: int,
        weights: Weights | None = None,
        *,
        segments: Sequence[tuple[int, Weights]] | None = None,
        skips: Sequence[tuple[int, int]] = (),
        window: int | None = None,
        files: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.samples = dict(samples)
        self.seed = seed
        self.window = window
        self.names = tuple(sorted(samples))
        """source_index refers to this tuple: sorted, so that the order of keys in a file has no effect."""
        if weights is not None and segments is not None:
            raise ValueError("give weights or segments, not both: [[0, weights]] is the same as weights")
        self.segments = [(0, weights)] if segments is None else [(int(start), each) for start, each in segments]
        self.skips = sorted((int(start), int(stop)) for start, stop in skips)
        self._files = {} if window is None else {name: np.asarray(each) for name, each in (files or {}).items()}
        problems = self._problems() + self._window_problems()
        if problems:
            raise ValueError("\n".join(problems))
        self._sizes = np.array([self.samples[name] for name in self.names], dtype=np.int64)
        self._first = np.cumsum(self._sizes) - self._sizes
        self._skip_after, self._skip_length = self._skip_table()
        self._mixtures = [] if self.proportional else self._build_mixtures()
        self._permutations: OrderedDict[tuple[str, int], Permutation | WindowedPermutation] = OrderedDict()
        self._cached_permutations = CACHED_PERMUTATIONS if window is None else 2 * len(self.names)

    @property
    def proportional(self) -> bool:
        """Whether the sources are read as one, each sample once per epoch."""
        return self.segments[0][1] is None

    @property
    def order_id(self) -> str:
        """sha256 of everything that decides which sample a position means."""
        return fingerprint(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        segments = [[start, PROPORTIONAL if each is None else dict(each)] for start, each in self.segments]
        return {
            "seed": self.seed,
            "window": self.window,
            "segments": segments,
            "skips": [list(skip) for skip in self.skips],
            "sources": {name: self._source_to_dict(name) for name in self.names},
        }

    def _source_to_dict(self, name: str) -> dict[str, Any]:
        if self.window is None:
            return {"samples": self.samples[name]}
        digest = hashlib.sha256(self._files[name].astype("<i8").tobytes()).hexdigest()
        return {"samples": self.samples[name], "samples_per_file": digest}

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """positions: (k,) integers >= 0. Returns (index into `names`, sample of that source), (k,) int64 each."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError(f"position {positions.min()} is negative; positions count samples from 0")
        raw = self.unskipped(positions)
        if self.proportional:
            sample = self._shuffled(PROPORTIONAL, int(self._sizes.sum()), raw)
            source = np.searchsorted(self._first, sample, side="right") - 1
            return source, sample - self._first[source]
        return self._locate_mixed(raw)

    def unskipped(self, positions: np.ndarray) -> np.ndarray:
        """Positions of the run -> positions of the order, which also counts the samples that were skipped. (k,)."""
        if not self.skips:
            return positions
        return positions + self._skip_length[np.searchsorted(self._skip_after, positions, side="right")]

    def epochs(self, stop: int) -> dict[str, float]:
        """How often each source will have been read once positions 0 .. stop - 1 are done."""
        if stop <= 0:
            return dict.fromkeys(self.names, 0.0)
        raw_stop = self.raw_stop(stop)
        if self.proportional:
            return dict.fromkeys(self.names, raw_stop / int(self._sizes.sum()))
        active = [mixture for mixture in self._mixtures if mixture.start < raw_stop]
        used = active[-1].consumed(raw_stop)
        return {name: int(used[i]) / self.samples[name] for i, name in enumerate(self.names) if self.samples[name]}

    def raw_stop(self, position: int) -> int:
        """The first place of the order that lies behind all that a run has read when it stands at `position`."""
        return raw_stop(self.skips, position)

    def _locate_mixed(self, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts = np.array([mixture.start for mixture in self._mixtures])
        segment_of = np.searchsorted(starts, raw, side="right") - 1
        source, index = np.empty_like(raw), np.empty_like(raw)
        for segment in distinct(segment_of):
            inside = segment_of == segment
            source[inside], index[inside] = self._mixtures[segment].locate(raw[inside])
        sample = np.empty_like(raw)
        for i in np.unique(source):
            inside = source == i
            sample[inside] = self._shuffled(self.names[i], int(self._sizes[i]), index[inside])
        return source, sample

    def _shuffled(self, name: str, n_samples: int, index: np.ndarray) -> np.ndarray:
        """Index in an endless stream -> sample: every epoch is its own permutation of all samples."""
        epochs, rest = np.divmod(index, n_samples)
        sample = np.empty_like(index)
        for epoch in distinct(epochs):
            inside = epochs == epoch
            sample[inside] = self._permutation(name, int(epoch), n_samples)(rest[inside])
        return sample

    def _permutation(self, name: str, epoch: int, n_samples: int) -> Permutation | WindowedPermutation:
        key = name, epoch
        if key not in self._permutations:
            self._permutations[key] = self._new_permutation(name, epoch, n_samples)
            if len(self._permutations) > self._cached_permutations:
                self._permutations.popitem(last=False)
        self._permutations.move_to_end(key)
        return self._permutations[key]

    def _new_permutation(self, name: str, epoch: int, n_samples: int) -> Permutation | WindowedPermutation:
        if self.window is None:
            return Permutation(n_samples, self.seed, name, epoch)
        names = self.names if name == PROPORTIONAL else (name,)
        sizes = np.concatenate([self._files[each] for each in names])
        return WindowedPermutation(sizes, self.window, self.seed, name, epoch)

    def _skip_table(self) -> tuple[np.ndarray, np.ndarray]:
        starts = np.array([start for start, _ in self.skips], dtype=np.int64)
        lengths = np.array([stop - start for start, stop in self.skips], dtype=np.int64)
        skipped = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        return starts - skipped[:-1], skipped

    def _build_mixtures(self) -> list[_Mixture]:
        mixtures: list[_Mixture] = []
        for start, weights in self.segments:
            base = mixtures[-1].consumed(start) if mixtures else np.zeros(len(self.names), dtype=np.int64)
            mixtures.append(_Mixture(self.seed, start, self.names, weights, base))
        return mixtures

    def _problems(self) -> list[str]:
        problems = [f"source {name!r} has {n} samples; needs at least 1" for name, n in self.samples.items() if n < 1]
        if not self.samples:
            problems.append("no data sources; name at least one")
        if PROPORTIONAL in self.samples:
            problems.append(f"a source must not be called {PROPORTIONAL!r}; choose another name")
        starts = [start for start, _ in self.segments]
        if not starts or starts[0] != 0 or any(b <= a for a, b in zip(starts, starts[1:], strict=False)):
            problems.append(f"segments start at {starts}; the first must start at 0, and the starts must increase")
        if len(self.segments) > 1 and any(weights is None for _, weights in self.segments):
            problems.append("weights cannot change in a proportional order; start the run with explicit weights")
        for _, weights in self.segments:
            problems += weight_problems(weights, self.samples)
        for i, (start, stop) in enumerate(self.skips):
            if start < 0 or stop <= start:
                problems.append(f"skip [{start}, {stop}) must have 0 <= start < stop")
            if i and start < self.skips[i - 1][1]:
                problems.append(f"skips {list(self.skips[i - 1])} and {[start, stop]} overlap; join them")
        return problems

    def _window_problems(self) -> list[str]:
        if self.window is None:
            return []
        if self.window < 1:
            return [f"window={self.window} must be at least 1 file; leave it out to shuffle the samples of all files"]
        counts = {name: int(each.sum()) for name, each in self._files.items()}
        if counts != self.samples:
            return [f"the files of a windowed order hold {counts} samples, the sources {self.samples}; give all files"]
        return []


def weight_problems(weights: Weights | None, samples: Mapping[str, int]) -> list[str]:
    if weights is None:
        return []
    unknown = [name for name in weights if name not in samples]
    problems = [f"weight of unknown source {name!r}; known: {', '.join(samples)}" for name in unknown]
    bad = [name for name, weight in weights.items() if not (math.isfinite(weight) and weight >= 0)]
    problems += [f"weight {weights[name]} of source {name!r} must be a number of at least 0" for name in bad]
    if not bad and not sum(weights.values()):
        problems.append("all weights are 0; at least one must be positive")
    return problems


def raw_stop(skips: Sequence[Sequence[int]], position: int) -> int:
    """The first place of an order with these skips that a run has not passed when it stands at `position`."""
    if position <= 0:
        return 0
    last = position - 1
    for start, stop in sorted(skips):
        if start <= last:
            last += stop - start
    return last + 1


def fingerprint(value: object) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
