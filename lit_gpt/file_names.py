"""Half a million file names in a few megabytes: what names share is stored once, and of each file only its number."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

DIGITS = "0123456789"
LONGEST_NUMBER = 18  # digits; fits an int64
_AFTER_NUMBERS = "".join(chr(code) for code in range(128) if chr(code) not in f"{DIGITS}/")
ITERATED_AT_ONCE = 4096  # single numbers out of an array cost ten times as much
_NUMBERS = re.compile(r"([0-9]+)")


class FileNames(Sequence[str]):
    """A list of paths. One such as `slim/train_7_0000000042.bin` is stored as group, number and width of the number.

    groups: (text before the number, text after it); a path without a number is all in the first, with width 0.
    group, number, width: (files,) integers each.
    """

    def __init__(
        self, groups: Sequence[tuple[str, str]], group: np.ndarray, number: np.ndarray, width: np.ndarray
    ) -> None:
        self.groups, self.group, self.number, self.width = tuple(groups), group, number, width

    @classmethod
    def of(cls, paths: Iterable[str]) -> FileNames:
        known: dict[tuple[str, str], int] = {}
        group, number, width = array("i"), array("q"), array("B")
        for path in paths:
            before, digits, after = split_number(path)
            group.append(known.setdefault((before, after), len(known)))
            number.append(int(digits or 0))
            width.append(len(digits))
        arrays = (np.frombuffer(each, each.typecode) if each else np.empty(0, int) for each in (group, number, width))
        return cls(list(known), *arrays)

    def __len__(self) -> int:
        return len(self.group)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        before, after = self.groups[self.group[index]]
        width = int(self.width[index])
        return f"{before}{str(self.number[index]).zfill(width)}{after}" if width else before

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), ITERATED_AT_ONCE):
            columns = (each[start : start + ITERATED_AT_ONCE] for each in (self.group, self.number, self.width))
            for group, number, width in zip(*(each.tolist() for each in columns), strict=True):
                before, after = self.groups[group]
                yield f"{before}{str(number).zfill(width)}{after}" if width else before

    def without_folders(self) -> FileNames:
        """The last parts of the paths."""
        groups = [(os.path.basename(before), after) for before, after in self.groups]
        return FileNames(groups, self.group, self.number, self.width)

    def take(self, indices: np.ndarray) -> FileNames:
        """The paths at (k,) indices, in that order."""
        return FileNames(self.groups, self.group[indices], self.number[indices], self.width[indices])

    def natural_order(self) -> np.ndarray:
        """(files,) indices that sort the paths with their numbers as numbers: `x_2.bin` comes before `x_10.bin`."""
        before, after = (_ranks([ends[side] for ends in self.groups]) for side in (0, 1))
        leading_zeros_first = -self.width.astype(np.int64)
        return np.lexsort((after[self.group], leading_zeros_first, self.number, before[self.group]))

    def last_of_each_group(self) -> np.ndarray:
        """The index of the file with the highest number in every group, ascending."""
        if not len(self):
            return np.empty(0, dtype=np.int64)
        order = np.lexsort((self.number, self.group))
        ends = np.flatnonzero(np.append(np.diff(self.group[order]) != 0, True))
        return np.sort(order[ends])


def split_number(path: str) -> tuple[str, str, str]:
    """The last number of a file's name, and what is before and after it; all is before where there is none."""
    stem = path.rstrip(_AFTER_NUMBERS)
    while stem and not stem[-1].isascii():
        stem = stem[:-1].rstrip(_AFTER_NUMBERS)
    before = stem.rstrip(DIGITS)
    if before == stem:
        return path, "", ""
    before = stem[: max(len(before), len(stem) - LONGEST_NUMBER)]
    return before, stem[len(before) :], path[len(stem) :]


def _ranks(texts: Sequence[str]) -> np.ndarray:
    """(groups,) place of each text in the natural order; equal texts have equal places."""
    place = {text: i for i, text in enumerate(sorted(set(texts), key=_natural_key))}
    return np.array([place[text] for text in texts], dtype=np.int64)


def _natural_key(text: str) -> list[tuple[int, str]]:
    return [(int(part) if part.isdigit() else -1, part) for part in _NUMBERS.split(text)]
