"""Shuffles of any number of things that are computed, not stored: keyed bijections of range(n)."""

from __future__ import annotations

import hashlib
import math

import numpy as np

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd: the multiplier of Fibonacci hashing
HALF = np.uint64(32)


def derive_keys(rounds: int, *parts: object) -> list[np.uint64]:
    """One 64-bit key per round from any printable parts. Fixed for ever: another definition is another data order."""
    digest = hashlib.blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=8 * rounds).digest()
    return [np.uint64(key) for key in np.frombuffer(digest, dtype="<u8")]


class Permutation:
    """A keyed bijection of range(n), computed point by point: an alternating Feistel network on a grid a x b >= n.

    The grid exceeds n by less than sqrt(n), so hardly any point has to be mapped twice. Integers only: the same
    numbers on every CPU and numpy version.
    """

    ROUNDS = 6  # 3 rounds fail a chi-square test of neighbouring triples, 4 and 6 pass

    def __init__(self, n: int, *key: object) -> None:
        if n < 0:
            raise ValueError(f"a permutation of range({n}) does not exist; n must not be negative")
        self.n = n
        self.rows = math.isqrt(max(n - 1, 0)) + 1
        self.columns = -(-n // self.rows)
        self.keys = derive_keys(self.ROUNDS, *key)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """points: (k,) integers in range(n). Returns (k,) int64."""
        if self.n <= 1:
            return np.zeros(points.shape, dtype=np.int64)
        image = self._once(points.astype(np.uint64))
        outside = image >= np.uint64(self.n)
        while outside.any():
            image[outside] = self._once(image[outside])
            outside = image >= np.uint64(self.n)
        return image.astype(np.int64)

    def _once(self, points: np.ndarray) -> np.ndarray:
        rows, columns = np.uint64(self.rows), np.uint64(self.columns)
        high = points // rows
        low = points - high * rows
        for i, key in enumerate(self.keys):
            if i % 2 == 0:
                low += _hash_below(high, key, rows)
                np.subtract(low, rows, out=low, where=low >= rows)
            else:
                high += _hash_below(low, key, columns)
                np.subtract(high, columns, out=high, where=high >= columns)
        return high * rows + low


class WindowedPermutation:
    """A keyed bijection of range(sum(sizes)) that leaves one window of parts before it enters the next.

    The parts, files say, are shuffled; every `window` of them in a row then have their elements shuffled together.
    For storage that dislikes random access: a reader holds `window` files at a time. 16 bytes are kept per part.

    sizes: (parts,) int64 number of elements of each part, 0 included.
    """

    def __init__(self, sizes: np.ndarray, window: int, *key: object) -> None:
        order = Permutation(len(sizes), *key, "files")(np.arange(len(sizes)))
        self._key = key
        self._first = (np.cumsum(sizes) - sizes)[order]
        stops = np.cumsum(sizes[order])
        self._starts = stops - sizes[order]
        self._bounds = np.append(self._starts[::window], stops[-1:])  # of the windows

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """points: (k,) int64 in range(sum(sizes)). Returns (k,) int64."""
        shuffled = np.empty_like(points)
        windows = np.searchsorted(self._bounds, points, side="right") - 1
        for window in distinct(windows):
            start, stop = self._bounds[window : window + 2].tolist()
            inside = windows == window
            shuffle = Permutation(stop - start, *self._key, "window", window)
            shuffled[inside] = shuffle(points[inside] - start) + start
        parts = np.searchsorted(self._starts, shuffled, side="right") - 1
        return self._first[parts] + shuffled - self._starts[parts]


def distinct(values: np.ndarray) -> np.ndarray:
    """The different values of a (k,) array, sorted."""
    if values.size and values.min() == values.max():  # by far the most frequent case, and cheaper than a sort
        return values[:1]
    return np.unique(values)


def _hash_below(values: np.ndarray, key: np.uint64, limit: np.uint64) -> np.ndarray:
    """Hashes in [0, limit). The high bits decide, which leaves no modulo bias worth naming."""
    hashed = (values + key) * MULTIPLIER
    hashed ^= hashed >> HALF
    hashed *= MULTIPLIER
    hashed >>= HALF
    hashed *= limit
    hashed >>= HALF
    return hashed
