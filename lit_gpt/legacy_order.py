"""The sample order of TinyLlama and prts, bit for bit, as a function of the position: no file is read to get there."""

from __future__ import annotations

import itertools
import random
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lit_gpt.data_order import Weights, fingerprint, weight_problems
from lit_gpt.permutation import distinct

LEGACY = "legacy"
FILES_PER_GROUP = 8  # n_chunks in their trainers
PICKS = 1 << 16  # draws of the source that are made at a time: 0.6 MB
SAVED_EVERY_PICKS = 16  # times PICKS; a state is 2.5 KB, so 1e9 draws keep 2.5 MB of them
SAVED_EVERY_GROUPS = 64  # a state is 0.7 KB
CACHED_PICKS = 4
JUMP_THREADS = 8  # numpy shuffles outside the interpreter's lock; a jump to 1e12 tokens on 32 ranks is 60,000 shuffles
CACHED_GROUPS = 3  # per source: a read touches one or two
KNOWN_SHUFFLE = [7, 5, 3, 0, 4, 1, 2, 6]  # numpy.random.default_rng(3407).permutation(8) of numpy 1.17 to 2.4


class LegacyOrder:
    """position -> (source, sample) as `lit_gpt.packed_dataset` of TinyLlama and prts would read them.

    There each of `world_size` ranks takes every world_size-th file of a shuffled list, reads groups of 8 files in a
    shuffled order of their blocks, and draws the source of every sample at random. Position g is sample
    g // world_size of rank g % world_size, so that G samples in a row are those of one of their steps with
    global_batch_size G, on any number of devices of ours. Files that do not fill a group are never read: see
    `unread_files`. To continue such a run, start at (micro-batches done) * micro_batch_size * world_size.

    files: number of files of each source, in the order of the old run's data config.
    blocks_per_file: samples of each file, that is, tokens // (block_size + 1). A sample's number is its file's number
        in `sorted(glob(...))` times blocks_per_file, plus its block.
    seed: of the old run's loaders; 3407 in their trainers.
    weights: share of each source; they are divided by their sum. None: equal shares.
    world_size: ranks of the old run. This order is another one for every world size, as theirs was.

    Raises:
        ValueError: a list of all problems, one per line. RuntimeError: numpy shuffles otherwise than it did.
    """

    def __init__(
        self,
        files: Mapping[str, int],
        blocks_per_file: Mapping[str, int],
        seed: int,
        weights: Weights | None,
        world_size: int,
        files_per_group: int = FILES_PER_GROUP,
    ) -> None:
        self.names = tuple(files)
        """In the order of the data config: the draw of the source depends on it."""
        self.files, self.blocks_per_file = dict(files), dict(blocks_per_file)
        self.seed, self.world_size, self.files_per_group = seed, world_size, files_per_group
        self.weights = dict.fromkeys(self.names, 1.0) if weights is None else dict(weights)
        problems = self._problems()
        if problems:
            raise ValueError("\n".join(problems))
        _check_numpy()
        self.samples = {name: self.files[name] * self.blocks_per_file[name] for name in self.names}
        self._picks = _Picks(seed, [self.weights[name] for name in self.names])
        self._streams = [
            _Stream(self.files[name], self.blocks_per_file[name], seed, world_size, files_per_group)
            for name in self.names
        ]

    @property
    def order_id(self) -> str:
        """sha256 of everything that decides which sample a position means."""
        return fingerprint(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        return {
            "order": LEGACY,
            "seed": self.seed,
            "weights": [[name, self.weights[name]] for name in self.names],
            "world_size": self.world_size,
            "files_per_group": self.files_per_group,
            "sources": {
                name: {
                    "samples": self.samples[name],
                    "files": self.files[name],
                    "blocks_per_file": self.blocks_per_file[name],
                }
                for name in self.names
            },
        }

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """positions: (k,) integers >= 0. Returns (index into `names`, sample of that source), (k,) int64 each."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError(f"position {positions.min()} is negative; positions count samples from 0")
        numbers, ranks = np.divmod(positions, self.world_size)
        source, index = self._picks.locate(numbers)
        sample = np.empty_like(index)
        for i in distinct(source):
            inside = source == i
            sample[inside] = self._streams[i].locate(ranks[inside], index[inside])
        return source, sample

    def epochs(self, stop: int) -> dict[str, float]:
        """How often each source will have been read once positions 0 .. stop - 1 are done.

        Only samples that this order reads at all are counted: files beyond the last whole group of every rank never
        are, so at 1.0 the other files have been read once.
        """
        numbers, rest = divmod(stop, self.world_size)
        used = self._picks.consumed(numbers) * self.world_size
        if rest:
            used[self._picks.locate(np.array([numbers]))[0]] += rest
        readable = [stream.group_samples * stream.groups * self.world_size for stream in self._streams]
        return {name: int(used[i]) / readable[i] for i, name in enumerate(self.names)}

    def unread_files(self) -> dict[str, int]:
        """How many files of each source are never read, as in the old run."""
        read = [stream.groups * self.files_per_group * self.world_size for stream in self._streams]
        return {name: self.files[name] - read[i] for i, name in enumerate(self.names)}

    def _problems(self) -> list[str]:
        if not self.names:
            return ["no data sources; name at least one"]
        if self.world_size < 1 or self.files_per_group < 1:
            return [f"world_size={self.world_size} and files_per_group={self.files_per_group} must be at least 1"]
        problems = weight_problems(self.weights, self.files)
        missing = [name for name in self.names if name not in self.weights]
        problems += [f"source {name!r} has no weight; give those of the old run's data config" for name in missing]
        if self.seed < 0:
            problems.append(f"seed={self.seed} must not be negative")
        for name in self.names:
            if self.blocks_per_file.get(name, 0) < 1:
                problems.append(f"the files of source {name!r} are shorter than one sample; lower block_size")
            problems += self._file_problems(name)
        return problems

    def _file_problems(self, name: str) -> list[str]:
        n_files, needed = self.files[name], self.files_per_group * self.world_size
        if n_files >= needed:
            return []
        most = n_files // self.files_per_group
        way_out = f"world_size {most} or less, or at least {needed} files" if most else f"at least {needed} files"
        return [
            f"source {name!r} has {n_files} files for world_size={self.world_size}: the old loader needs "
            f"{self.files_per_group} files for each rank and would fail; use {way_out}, or order=permuted"
        ]


class _Picks:
    """The source of every sample: `random.Random(seed).choices(sources, weights)` once per sample, on every rank alike.

    CPython's Mersenne Twister continues inside numpy's, which gives the same doubles, thousands at a time.
    """

    def __init__(self, seed: int, weights: list[float]) -> None:
        *_, total = itertools.accumulate(weights)  # sum() rounds otherwise since Python 3.12
        cumulative = list(itertools.accumulate(weight / total for weight in weights))
        self._total, self._bounds = cumulative[-1] + 0.0, np.array(cumulative[:-1])
        self._n_sources = len(weights)
        _, state, _ = random.Random(seed).getstate()
        start = ("MT19937", np.array(state[:-1], dtype=np.uint32), state[-1])
        self._saved = [(np.zeros(self._n_sources, dtype=np.int64), start)]
        """Samples of each source so far and the generator's state, before every SAVED_EVERY_PICKS-th chunk."""
        self._generator = np.random.RandomState()
        self._chunks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._next, self._counts = 0, self._saved[0][0]
        self._generator.set_state(start)

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """numbers: (k,) samples of a rank. Returns the source and the index inside the source's stream, (k,) each."""
        source, index = np.empty_like(numbers), np.empty_like(numbers)
        chunks, places = np.divmod(numbers, PICKS)
        for chunk in distinct(chunks):
            inside = chunks == chunk
            chunk_source, chunk_index = self._chunk(int(chunk))
            source[inside], index[inside] = chunk_source[places[inside]], chunk_index[places[inside]]
        return source, index

    def consumed(self, stop: int) -> np.ndarray:
        """How many of the draws before `stop` gave each source: (sources,) int64."""
        chunk, place = divmod(stop, PICKS)
        self._go_to(chunk)
        counts = self._counts.copy()
        return counts + np.bincount(self._chunk(chunk)[0][:place], minlength=self._n_sources) if place else counts

    def _chunk(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and index of PICKS draws: (PICKS,) int8 and int64."""
        if number not in self._chunks:
            self._go_to(number)
            before = self._counts
            source = self._draw()
            index = np.empty(PICKS, dtype=np.int64)
            for i in range(self._n_sources):
                places = np.flatnonzero(source == i)
                index[places] = np.arange(before[i], before[i] + len(places))
            self._chunks[number] = source, index
            if len(self._chunks) > CACHED_PICKS:
                self._chunks.popitem(last=False)
        return self._chunks[number]

    def _go_to(self, number: int) -> None:
        """Bring the generator to the beginning of a chunk, from the nearest state before it."""
        nearest = min(number // SAVED_EVERY_PICKS, len(self._saved) - 1)
        if not nearest * SAVED_EVERY_PICKS <= self._next <= number:
            self._counts, state = self._saved[nearest]
            self._generator.set_state(state)
            self._next = nearest * SAVED_EVERY_PICKS
        while self._next < number:
            self._draw()

    def _draw(self) -> np.ndarray:
        """The sources of the next chunk: (PICKS,) int8."""
        draws = self._generator.random_sample(PICKS) * self._total
        source = np.searchsorted(self._bounds, draws, side="right").astype(np.int8)
        self._counts = self._counts + np.bincount(source, minlength=self._n_sources)
        self._next += 1
        if self._next == len(self._saved) * SAVED_EVERY_PICKS:
            self._saved.append((self._counts, self._generator.get_state()))
        return source


class _Stream:
    """The samples of one source in the order of each rank: groups of files, their blocks shuffled."""

    def __init__(self, n_files: int, blocks_per_file: int, seed: int, world_size: int, files_per_group: int) -> None:
        self.blocks_per_file, self.files_per_group, self.world_size = blocks_per_file, files_per_group, world_size
        self.groups = n_files // world_size // files_per_group
        """Of each rank; the ranks then begin again."""
        self.group_samples = files_per_group * blocks_per_file
        numbers = list(range(n_files))
        random.Random(seed).shuffle(numbers)
        self._shuffled_files = np.array(numbers, dtype=np.int32)
        self._ranks = [_Shuffles(seed + rank, self.group_samples) for rank in range(world_size)]
        self._cached: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def locate(self, ranks: np.ndarray, index: np.ndarray) -> np.ndarray:
        """ranks, index: (k,). The sample that a rank reads index-th of this source: (k,) int64."""
        groups, places = np.divmod(index, self.group_samples)
        blocks = np.empty_like(index)
        for group in distinct(groups):
            inside = groups == group
            shuffles = self._group(int(group), distinct(ranks[inside]))
            blocks[inside] = shuffles[ranks[inside], places[inside]]
        number, block = np.divmod(blocks, self.blocks_per_file)
        number += groups % self.groups * self.files_per_group
        return self._shuffled_files[ranks + number * self.world_size] * np.int64(self.blocks_per_file) + block

    def _group(self, group: int, ranks: np.ndarray) -> np.ndarray:
        """The shuffled blocks of a group, (world_size, group_samples), made for the given ranks at least."""
        if group not in self._cached:
            shape = self.world_size, self.group_samples
            dtype = np.min_scalar_type(self.group_samples - 1)
            self._cached[group] = np.empty(shape, dtype), np.zeros(self.world_size, dtype=bool)
            if len(self._cached) > CACHED_GROUPS:
                self._cached.popitem(last=False)
        shuffles, made = self._cached[group]
        missing = ranks[~made[ranks]]
        if missing.size:
            with ThreadPoolExecutor(min(JUMP_THREADS, len(missing))) as pool:
                shuffles[missing] = list(pool.map(lambda rank: self._ranks[rank].shuffle(group), missing.tolist()))
            made[missing] = True
        self._cached.move_to_end(group)
        return shuffles


class _Shuffles:
    """The shuffles that one rank makes for its groups, one after the other with one generator."""

    def __init__(self, seed: int, n: int) -> None:
        self._generator = np.random.default_rng(seed)
        self._n = n
        self._saved = [self._generator.bit_generator.state]
        """Before every SAVED_EVERY_GROUPS-th shuffle."""
        self._next = 0

    def shuffle(self, number: int) -> np.ndarray:
        """The number-th permutation: (n,) int64."""
        nearest = min(number // SAVED_EVERY_GROUPS, len(self._saved) - 1)
        if not nearest * SAVED_EVERY_GROUPS <= self._next <= number:
            self._generator.bit_generator.state = self._saved[nearest]
            self._next = nearest * SAVED_EVERY_GROUPS
        while True:
            permutation = self._generator.permutation(self._n)
            self._next += 1
            if self._next == len(self._saved) * SAVED_EVERY_GROUPS:
                self._saved.append(self._generator.bit_generator.state)
            if self._next > number:
                return permutation


def _check_numpy() -> None:
    """numpy may improve its shuffle in any version; another one would silently be another order."""
    if np.random.default_rng(3407).permutation(8).tolist() != KNOWN_SHUFFLE:
        raise RuntimeError(
            f"numpy {np.__version__} shuffles otherwise than the numpy of TinyLlama's runs; order=legacy needs one "
            f"that shuffles as numpy 1.17 to 2.4 do"
        )
