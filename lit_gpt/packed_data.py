"""Samples of token files in the order of a run: reading by position, and the state that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_gpt.data_order import PROPORTIONAL, DataOrder, fingerprint, raw_stop
from lit_gpt.errors import DataError
from lit_gpt.legacy_order import LEGACY, LegacyOrder
from lit_gpt.permutation import distinct

if TYPE_CHECKING:
    from lit_gpt.token_source import TokenSource

STATE_VERSION = 1
PERMUTED = "permuted"
LOCATED_AHEAD = 1024  # locating costs 64 ns per position in large calls and 4 us in calls for 8


@dataclass(frozen=True)
class Place:
    """Where the tokens of a position are."""

    position: int
    source: str
    sample: int
    """Inside the source."""
    path: str
    byte_offset: int
    """Of the sample's first token, in the file."""
    first_token: int
    """Inside the file."""
    dtype: np.dtype


class PackedData:
    """Token sources read in a given order. Holds no position: what it reads is a pure function of the arguments.

    A prefetch thread may therefore read ahead of the loop, as long as it is the only one that reads.

    sources: one TokenSource per source of `order`, all with the same block_size and stride; a LegacyOrder needs
        stride block_size + 1 and files of one size.

    Raises:
        ValueError: order and sources do not belong together. DataError: files whose sizes the legacy order forbids.
    """

    def __init__(self, sources: Mapping[str, TokenSource], order: DataOrder | LegacyOrder) -> None:
        self.order = order
        cuts = {name: (source.block_size, source.stride) for name, source in sources.items()}
        if len(set(cuts.values())) > 1:
            raise ValueError(f"all sources of a run need the same block_size and stride, got {cuts}")
        counts = {name: source.n_samples for name, source in sources.items()}
        if isinstance(order, LegacyOrder) and counts.keys() == order.samples.keys():
            _check_legacy(sources, order)
        if counts != order.samples:
            raise ValueError(f"the order was made for {order.samples} samples, but the sources hold {counts}")
        self.sources = [sources[name] for name in order.names]
        self.block_size, self.stride = next(iter(cuts.values()))
        self._located_from = 0
        self._located = (np.empty(0, dtype=np.int64),) * 2

    def samples(self, start: int, count: int) -> np.ndarray:
        """The samples at positions start .. start + count - 1: (count, block_size + 1) int64."""
        return self.read_samples(*self._locate_ahead(start, count))

    def read(self, positions: np.ndarray) -> np.ndarray:
        """positions: (k,) integers >= 0, in any order. Returns (k, block_size + 1) int64."""
        return self.read_samples(*self.order.locate(positions))

    def read_samples(self, source: np.ndarray, sample: np.ndarray) -> np.ndarray:
        """source, sample: (k,) each, as `order.locate` gives them. Returns (k, block_size + 1) int64."""
        if len(self.sources) == 1:
            return self.sources[0].read(sample)
        rows = np.empty((len(sample), self.block_size + 1), dtype=np.int64)
        for i in distinct(source):
            inside = source == i
            rows[inside] = self.sources[i].read(sample[inside])
        return rows

    def place(self, position: int) -> Place:
        """Where the sample at a position lies, without reading it."""
        source, sample = (int(each[0]) for each in self.order.locate(np.array([position])))
        file, first_token = self.sources[source].place(sample)
        return Place(
            position=position,
            source=self.order.names[source],
            sample=sample,
            path=file.path,
            byte_offset=file.byte_offset + first_token * file.dtype.itemsize,
            first_token=first_token,
            dtype=file.dtype,
        )

    def _locate_ahead(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`order.locate`, done for many positions at a time."""
        skip = start - self._located_from
        if skip < 0 or skip + count > len(self._located[0]):
            self._located = self.order.locate(np.arange(start, start + max(count, LOCATED_AHEAD)))
            self._located_from, skip = start, 0
        source, sample = self._located
        return source[skip : skip + count], sample[skip : skip + count]

    @property
    def order_id(self) -> str:
        """sha256 of all that decides what `samples` returns: the order and the fingerprints of the files."""
        return fingerprint(self._description())

    def state(self, position: int) -> dict[str, Any]:
        """The `data` object of a checkpoint. The next sample to train on is `position`; all else is for checking."""
        return {"v": STATE_VERSION, "position": position, "order_id": self.order_id, **self._description()}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Whether a run saved with `state` continues here with the same samples; later segments and skips may differ.

        Raises:
            ValueError: one line for each field that differs, and how to go on regardless.
        """
        if state.get("v") != STATE_VERSION:
            raise ValueError(f"data state has version {state.get('v')!r}; this program reads version {STATE_VERSION}")
        if state["order_id"] == self.order_id:
            return
        then = settings_before(state, state["position"])
        now = settings_before(self._description(), state["position"])
        problems = [
            f"data.{field}: the checkpoint has {then[field]!r}, this run has {now[field]!r}"
            for field in then
            if field in now and then[field] != now[field]
        ]
        if not problems:
            return
        if then["block"] != now["block"] or then["stride"] != now["stride"]:
            problems.append(
                "a sample is another piece of text now, so the checkpoint's position means nothing here: begin a new "
                f"phase at position 0 of the new order with --data.start_position 0. {describe_overlap(state)}"
            )
        else:
            problems.append(
                "the run would not see the data it would have seen; restore the settings, or pass "
                "--data.allow_order_change true to go on at the same position of the new order"
            )
        raise ValueError("\n".join(problems))

    def _description(self) -> dict[str, Any]:
        description = {"block": self.block_size, "stride": self.stride, **self.order.to_dict()}
        for name, source in zip(self.order.names, self.sources, strict=True):
            description["sources"][name]["fingerprint"] = source.fingerprint
        return description


def settings_before(described: Mapping[str, Any], position: int) -> dict[str, Any]:
    """Field -> value of all that had an effect before a position, in the data object of a checkpoint or a run.

    What is still to come, later segments and skips and the sources that only they read, is left out.
    """
    settings = {"order": described.get("order", PERMUTED)}
    settings |= {field: described[field] for field in ("seed", "block", "stride")}
    names = list(described["sources"])
    if settings["order"] == LEGACY:
        settings |= {field: described[field] for field in ("weights", "world_size", "files_per_group")}
    else:
        stop = raw_stop(described["skips"], position)
        segments = [[start, weights] for start, weights in described["segments"] if start < stop]
        skips = [list(skip) for skip in described["skips"] if skip[0] < stop]
        names = [name for name in names if any(_reads(weights, name) for _, weights in segments)]
        settings |= {"window": described["window"], "segments": segments, "skips": skips}
    settings["sources"] = sorted(names)
    for name in names:
        settings |= {f"sources.{name}.{field}": value for field, value in described["sources"][name].items()}
    return settings


def _reads(weights: Mapping[str, float] | str, name: str) -> bool:
    return weights == PROPORTIONAL or weights.get(name, 0) > 0


def expected_overlap(state: Mapping[str, Any]) -> dict[str, float]:
    """Share of each source's samples that a run saved with `state` has read.

    It is also the chance that a sample of a new order, with another block_size or seed say, was read before.
    """
    sources = state["sources"]
    samples = {name: source["samples"] for name, source in sources.items()}
    if state.get("order") == LEGACY:
        files, blocks = ({name: each[key] for name, each in sources.items()} for key in ("files", "blocks_per_file"))
        files = {name: files[name] for name, _ in state["weights"]}
        fixed = state["seed"], dict(state["weights"]), state["world_size"], state["files_per_group"]
        legacy = LegacyOrder(files, blocks, *fixed)
        readable = {name: 1 - count / files[name] for name, count in legacy.unread_files().items()}
        return {name: min(1.0, read) * readable[name] for name, read in legacy.epochs(state["position"]).items()}
    segments = [(start, None if weights == PROPORTIONAL else weights) for start, weights in state["segments"]]
    order = DataOrder(samples, state["seed"], segments=segments, skips=state["skips"])  # windows change no counts
    return {name: min(1.0, read) for name, read in order.epochs(state["position"]).items()}


def describe_overlap(state: Mapping[str, Any]) -> str:
    """`expected_overlap` as a sentence."""
    shares = ", ".join(f"{share:.2%} of {name}" for name, share in expected_overlap(state).items())
    return f"The run has read {shares} so far: expect as large a part of what is read from now on to be a repeat."


def _check_legacy(sources: Mapping[str, TokenSource], order: LegacyOrder) -> None:
    for name, source in sources.items():
        if source.stride != source.block_size + 1:
            raise ValueError(f"stride={source.stride} of source {name!r}; order=legacy needs {source.block_size + 1}")
        expected = order.blocks_per_file[name]
        odd = np.flatnonzero(source.samples_per_file != expected)
        if odd.size:
            raise DataError(
                f"{source.files[int(odd[0])].path} holds {source.samples_per_file[odd[0]]} samples of "
                f"{source.stride} tokens, the other files of {name!r} {expected}; the old loader takes the size of one "
                f"file for all: leave this file out, or use order=permuted"
            )
