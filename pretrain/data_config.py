"""Which token files a run reads, and in which order: settings, checked on their own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lit_gpt.token_formats import DTYPES

ORDER_SETTINGS = ("weights", "segments", "skips", "window", "order", "legacy_world_size")
"""Fields of DataConfig that decide, with the seed and the files, which sample a position means."""


@dataclass(frozen=True)
class SegmentConfig:
    """A stretch of the run with its own weights; it ends where the next one starts."""

    start: int
    """Samples of the global order before it, skipped ones included, unlike `position` in logs; 0 for the first."""
    weights: dict[str, float]
    """Share of each named source of `train`."""


@dataclass(frozen=True)
class DataConfig:
    """Token files: folders that scripts/prepare.py wrote, or what other tools left (LITPKDS, .ds, Megatron, raw)."""

    train: str | dict[str, str]
    """A folder, a file or a glob pattern of token files, or several with a name for each."""
    weights: dict[str, float] | None = None
    """Share of each named source. Default: proportional to their sizes, each sample once per epoch."""
    validation: str | dict[str, str] = field(default_factory=dict)
    """Held-out token files, given like `train`. Default: the validation splits beside the training data."""
    tokenizer: str | None = None
    """What the token ids mean: `bytes`, a tokenizer file or a folder with one. Prepared folders bring their own."""
    dtype: str | None = None
    """Type of the tokens in raw files, which do not say it themselves, e.g. uint16."""
    order: Literal["permuted", "legacy"] | None = None
    """permuted: every sample once per epoch; legacy: what TinyLlama and prts read. Default: permuted."""
    legacy_world_size: int | None = None
    """legacy only: number of devices of the TinyLlama or prts run; its order depends on it, ours does not."""
    segments: list[SegmentConfig] | None = None
    """Weights that change during the run, instead of `weights`; those of the future may still be edited."""
    skips: list[list[int]] | None = None
    """[start, stop) stretches of the global order, in samples, that are not trained on. Counts skipped samples too,
    unlike `position` in logs; `pretrain data show` prints both."""
    window: int | None = None
    """Files that are read at a time, for storage that dislikes random access. Default: all files at once."""
    document_mask: bool = False
    """Tokens attend to their own document only, in training and validation, instead of to all of the sample."""
    separator_id: int | None = None
    """document_mask only: the token that ends a document, where the files do not say it. Default: looked for."""
    start_position: int | None = None
    """First sample of the global order; by hand only, a continued run takes it from its checkpoint."""
    allow_order_change: bool = False
    """Continue although the data differs from what the checkpoint was trained on."""
    max_epochs: float = 4.0
    """Refuse a run that would read any part of the data more often."""

    def train_paths(self) -> dict[str, str]:
        """Name -> path of each source of the training stream."""
        return self.train if isinstance(self.train, dict) else {source_name(self.train): self.train}

    def validation_paths(self) -> dict[str, str]:
        """Name -> path of each validation set that was asked for; empty if none was."""
        if isinstance(self.validation, dict):
            return self.validation
        return {source_name(self.validation): self.validation}

    @property
    def is_legacy(self) -> bool:
        return self.order == "legacy"


def source_name(path: str) -> str:
    """The name of a source that was given none: the last part of its path, without wildcards."""
    name = Path(path).name
    stem = re.split(r"[*?[]", name)[0]
    return name if stem == name and name else stem.rstrip("._-") or Path(path).parent.name or "train"


def data_problems(data: DataConfig) -> list[str]:
    """What is wrong with the data settings on their own, one line each."""
    problems = [*_source_problems(data), *_order_problems(data)]
    if data.dtype is not None and data.dtype not in DTYPES:
        problems.append(f"data.dtype={data.dtype!r} is no type of tokens; known: {', '.join(DTYPES)}")
    if data.separator_id is not None and not data.document_mask:
        problems.append("data.separator_id has no effect without data.document_mask; remove it or turn the mask on")
    if not data.max_epochs > 0:
        problems.append(f"data.max_epochs={data.max_epochs} must be above 0")
    return problems


def _source_problems(data: DataConfig) -> list[str]:
    names = sorted(data.train_paths())
    problems = []
    if not names or not all(data.train_paths().values()):
        problems.append("data.train names no files; give a folder, a file or a pattern, or several with a name each")
    if data.weights is not None and sorted(data.weights) != names:
        problems.append(
            f"data.weights names {sorted(data.weights)}, data.train names {names};"
            " give a weight to every source and to no other"
        )
    problems += _weight_problems("data.weights", data.weights or {})
    for number, segment in enumerate(data.segments or [], 1):
        unknown = sorted(set(segment.weights) - set(names))
        if unknown:
            problems.append(f"data.segments[{number}] names {unknown}, data.train names {names}")
        problems += _weight_problems(f"data.segments[{number}]", segment.weights)
    return problems


def _weight_problems(where: str, weights: Mapping[str, float]) -> list[str]:
    bad = [name for name, weight in weights.items() if not (math.isfinite(weight) and weight >= 0)]
    problems = [f"{where}: {weights[name]} of {name!r} must be a number of at least 0" for name in bad]
    if weights and not bad and not sum(weights.values()):
        problems.append(f"{where}: all weights are 0; at least one must be positive")
    return problems


def _order_problems(data: DataConfig) -> list[str]:
    problems = []
    if data.segments is not None:
        if data.weights is not None:
            problems.append("give data.weights or data.segments, not both: weights are segments [{start: 0, weights}]")
        starts = [segment.start for segment in data.segments]
        if not starts or starts[0] != 0 or any(b <= a for a, b in zip(starts, starts[1:], strict=False)):
            problems.append(f"data.segments start at {starts}; the first must start at 0, and the starts must increase")
    if data.window is not None and data.window < 1:
        problems.append(f"data.window={data.window} must be at least 1 file; leave it out to read from all files")
    return [*problems, *_skip_problems(data.skips or []), *_legacy_problems(data)]


def _skip_problems(skips: Sequence[Sequence[int]]) -> list[str]:
    bad = [skip for skip in skips if len(skip) != 2 or not 0 <= skip[0] < skip[1]]
    if bad:
        return [f"data.skips: {list(skip)} must be [start, stop] with 0 <= start < stop" for skip in bad]
    ordered = sorted(skips)
    return [
        f"data.skips: {list(a)} and {list(b)} overlap; join them"
        for a, b in zip(ordered, ordered[1:], strict=False)
        if b[0] < a[1]
    ]


def _legacy_problems(data: DataConfig) -> list[str]:
    if not data.is_legacy:
        if data.legacy_world_size is None:
            return []
        return ["data.legacy_world_size has no effect without data.order=legacy; remove it or choose order=legacy"]
    problems = []
    if data.legacy_world_size is None or data.legacy_world_size < 1:
        problems.append(
            f"data.legacy_world_size={data.legacy_world_size}: order=legacy depends on the number of devices that the "
            f"TinyLlama or prts run had; give it (nodes * devices of the old run)"
        )
    if len(data.train_paths()) > 1 and data.weights is None:
        problems.append("data.order=legacy with several sources needs data.weights, those of the old run's data config")
    for name in ("segments", "skips", "window"):
        if getattr(data, name):
            problems.append(f"data.{name} cannot be used with order=legacy, which is fixed; remove one of the two")
    return problems
