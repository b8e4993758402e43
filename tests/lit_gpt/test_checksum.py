"""The crc32 of a whole from those of its parts."""

from __future__ import annotations

import zlib

from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.checksum import combined_crc32


@given(st.lists(st.binary(max_size=70), max_size=6))
def test_the_crc32_of_pieces_in_a_row_is_that_of_the_whole(pieces):
    assert combined_crc32((zlib.crc32(piece), len(piece)) for piece in pieces) == zlib.crc32(b"".join(pieces))


@given(st.binary(max_size=9), st.integers(0, 1 << 21), st.binary(max_size=9))
def test_pieces_may_be_long(head, n_zeros, tail):
    pieces = (head, bytes(n_zeros), tail)
    assert combined_crc32((zlib.crc32(piece), len(piece)) for piece in pieces) == zlib.crc32(b"".join(pieces))
