"""Counts as people write them on a command line: 10B tokens, 7e9 parameters."""

from __future__ import annotations

import re
from decimal import Decimal

SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_COUNT = re.compile(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)\s*([kmbt]?)", re.IGNORECASE)


def parse_count(text: int | float | str, what: str) -> int:
    """`10B`, `600M`, `20k`, `15e12` or a plain number as an int; `what` is counted, in the plural.

    Raises:
        ValueError: anything else, or less than one.
    """
    match = _COUNT.fullmatch(str(text).strip().replace("_", ""))
    if match is None:
        raise ValueError(f"{text!r} is not a number of {what}; write 10B, 600M, 20k, 15e12 or plain digits")
    count = Decimal(match[1]) * SUFFIXES[match[2].lower()]  # binary fractions would make 4.1M no whole number
    if count < 1 or count != int(count):
        raise ValueError(f"{text!r} is not a whole, positive number of {what}")
    return int(count)


def parse_token_count(text: int | float | str) -> int:
    """A number of tokens, see `parse_count`."""
    return parse_count(text, "tokens")
