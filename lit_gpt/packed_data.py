"""Samples of token files in the order of a run: reading by position, and the state that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_gpt.data_order import PROPORTIONAL, DataOrder, fingerprint

if TYPE_CHECKING:
    from lit_gpt.token_source import TokenSource

STATE_VERSION = 1
LOCATED_AHEAD = 1024  # locating costs 64 ns per position in large calls and 4 us in calls for 8


class PackedData:
    """Token sources read in a given order. Holds no position: `samples` is a pure function of its arguments.

    A prefetch thread may therefore call `samples` ahead of the loop, as long as it is the only one that does.

    sources: one TokenSource per source of `order`, all with the same block_size.
    """

    def __init__(self, sources: Mapping[str, TokenSource], order: DataOrder) -> None:
        self.order = order
        counts = {name: source.n_samples for name, source in sources.items()}
        if counts != order.samples:
            raise ValueError(f"the order was made for {order.samples} samples, but the sources hold {counts}")
        block_sizes = {name: source.block_size for name, source in sources.items()}
        if len(set(block_sizes.values())) > 1:
            raise ValueError(f"all sources of a run need the same block_size, got {block_sizes}")
        self.sources = [sources[name] for name in order.names]
        self.block_size = self.sources[0].block_size
        self._located_from = 0
        self._located = (np.empty(0, dtype=np.int64),) * 2

    def samples(self, start: int, count: int) -> np.ndarray:
        """The samples at positions start .. start + count - 1: (count, block_size + 1) int64."""
        source, sample = self._locate(start, count)
        if len(self.sources) == 1:
            return self.sources[0].read(sample)
        rows = np.empty((count, self.block_size + 1), dtype=np.int64)
        for i in np.unique(source):
            inside = source == i
            rows[inside] = self.sources[i].read(sample[inside])
        return rows

    def _locate(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
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
        problems = [
            f"data.{field}: the checkpoint has {then!r}, this run has {now!r}"
            for field, then, now in self._compared(state)
            if then != now
        ]
        if problems:
            problems.append(
                "the run would not see the data it would have seen; restore the settings, or pass "
                "--data.allow_order_change true to go on at the same position of the new order"
            )
            raise ValueError("\n".join(problems))

    def _description(self) -> dict[str, Any]:
        description = {"block": self.block_size, "stride": self.block_size, **self.order.to_dict()}
        for name, source in zip(self.order.names, self.sources, strict=True):
            description["sources"][name]["fingerprint"] = source.fingerprint
        return description

    def _compared(self, state: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """(field, value in the checkpoint, value here) for all that had an effect before the state's position."""
        now = self._description()
        saved_order = DataOrder(
            {name: source["samples"] for name, source in state["sources"].items()},
            state["seed"],
            segments=[(start, None if each == PROPORTIONAL else each) for start, each in state["segments"]],
            skips=state["skips"],
        )
        then, here = saved_order.past(state["position"]), self.order.past(state["position"])
        fields = [(field, state[field], now[field]) for field in ("seed", "block", "stride", "window")]
        fields += [(field, then[field], here[field]) for field in ("segments", "skips", "sources")]
        for name in set(then["sources"]) & set(here["sources"]):
            for key in ("samples", "fingerprint"):
                fields.append((f"sources.{name}.{key}", state["sources"][name][key], now["sources"][name][key]))
        return fields
