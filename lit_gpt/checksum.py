"""The crc32 of a file from those of its parts, so that bytes which are copied need not be read again."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

_POLYNOMIAL = 0xEDB88320  # of zlib's crc32, lowest bit = highest power
_ONE, _X = 1 << 31, 1 << 30


def combined_crc32(parts: Iterable[tuple[int, int]]) -> int:
    """crc32 of a sequence of bytes, given (crc32, number of bytes) of the pieces that it consists of, in order.

    A crc32 is a remainder modulo a polynomial over GF(2). To append n bytes is to multiply by x^(8 n) and to add, so
    `crc(a b) = crc(a) x^(8 |b|) + crc(b)`; zlib's inversions of all bits cancel out.
    """
    total = 0
    for crc32, n_bytes in parts:
        total = _times(_shift(n_bytes), total) ^ crc32
    return total


def _times(a: int, b: int) -> int:
    """Product of two polynomials, modulo that of crc32."""
    product, bit = 0, _ONE
    while bit:
        if a & bit:
            product ^= b
        bit >>= 1
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


@lru_cache(maxsize=256)  # a model has a dozen sizes of tensors
def _shift(n_bytes: int) -> int:
    """x^(8 n_bytes), by squaring."""
    exponent, power, result = 8 * n_bytes, _X, _ONE
    while exponent:
        if exponent & 1:
            result = _times(power, result)
        power = _times(power, power)
        exponent >>= 1
    return result
