"""A model as a run left it: its logged losses, its checkpoint, and how it came to be."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from grow.curves import Curve, Evaluation, Metric, training_curve
from grow.scores import ScoredPoint
from lit_gpt.atomic import MANIFEST
from lit_gpt.config import Config
from lit_gpt.errors import DataError
from lit_gpt.flops import count_non_embedding, count_parameters
from lit_gpt.packed_dataset import load_manifest


@dataclass(frozen=True)
class Behind:
    """What was spent before this model's own training began; None where nobody wrote it down."""

    tokens: int
    seconds: float | None


@dataclass(frozen=True)
class TrainedModel:
    """One model: a stage of a run."""

    name: str
    """Unique in the report: the stage's name; where two runs use the same, the run's, with it unless it ends so."""
    run: str
    run_dir: Path
    stage: int
    metrics: Sequence[Metric]
    evaluations: Sequence[Evaluation]
    start: Metric | None
    """The last line of the stage before, where this one's training begins; None for the first."""
    behind: Behind
    state: Mapping[str, Any] = field(default_factory=dict)
    """state.json of the stage's last valid checkpoint; empty when there is none."""
    checkpoint: Path | None = None
    parent: str | None = None
    """Name of the model it grew from, where that is in the report."""
    growth: Mapping[str, Any] | None = None
    """The growth this model came from; an empty record when a stage before shows that there was one."""
    is_base: bool = False
    """Whether another model of the report grew from this one, or was to."""
    began_from_checkpoint: bool = False
    """Whether its run began with the weights of a checkpoint, not with random ones."""
    run_config: Mapping[str, Any] = field(default_factory=dict)
    scores: Sequence[ScoredPoint] = ()
    """Scores of tasks, in order; their tokens include those of the models before."""

    @property
    def role(self) -> str:
        """One of "grown", "base", "continued" (a checkpoint's weights, no growth) and "baseline" (from scratch)."""
        if self.growth is not None:
            return "grown"
        if self.is_base:
            return "base"
        return "continued" if self.began_from_checkpoint else "baseline"

    @property
    def flops_are_whole(self) -> bool:
        """Whether its FLOPs hold those behind the checkpoint its run began with; a foreign one tells none."""
        return not self.began_from_checkpoint or bool(self.state.get("parent_tokens"))

    @property
    def seed(self) -> int | None:
        return self.state.get("seed", self.run_config.get("seed"))

    @property
    def end(self) -> Metric:
        return self.metrics[-1]

    @cached_property
    def curve(self) -> Curve:
        """Logged training losses."""
        return training_curve(self.metrics, self.start.tokens if self.start else 0)

    @property
    def tokens(self) -> int:
        """Tokens that this model itself was trained on."""
        return self.curve.length_tokens

    @property
    def seconds(self) -> float:
        """Wall time of this model's own training steps."""
        return self.end.seconds - (self.start.seconds if self.start else 0.0)

    @property
    def total_seconds(self) -> float | None:
        """Wall time of this model's training and of everything behind it."""
        return None if self.behind.seconds is None else self.behind.seconds + self.seconds

    @cached_property
    def config(self) -> Config | None:
        values = self.state.get("model_config")
        return None if values is None else Config.from_dict(values)

    @property
    def parameters(self) -> int | None:
        """All parameters. Without a checkpoint they follow from the log: FLOPs are six per parameter and token."""
        if self.config is not None:
            return count_parameters(self.config)
        if len(self.metrics) < 2:
            return None
        first, last = self.metrics[0], self.metrics[-1]
        return round((last.flops_total - first.flops_total) / (last.tokens - first.tokens) / 6)

    @property
    def non_embedding(self) -> int | None:
        return None if self.config is None else count_non_embedding(self.config)

    @property
    def operator(self) -> str | None:
        """Name of the growth operator; None for a model that did not grow, or whose growth is not known."""
        return ((self.growth or {}).get("plan") or {}).get("operator")

    @property
    def grown_after_tokens(self) -> int | None:
        """Tokens behind its base when it grew: d in the paper."""
        return (self.growth or {}).get("tokens")

    @property
    def growth_factor(self) -> float | None:
        """Parameters after growth over those before, embeddings out: g in the paper. In depth, the ratio of layers."""
        plan = (self.growth or {}).get("plan") or {}
        if not plan:
            return None
        src, dst = (Config.from_dict(plan[side]) for side in ("src", "dst"))
        if src.n_embd == dst.n_embd:
            return dst.n_layer / src.n_layer
        return count_non_embedding(dst) / count_non_embedding(src)

    @property
    def single_growth(self) -> tuple[float, float] | None:
        """d and g; None where they are not known, or of a model that grew several times: neither is one number."""
        d, g = self.grown_after_tokens, self.growth_factor
        return None if not d or g is None or len(self.state["history"]) > 1 else (float(d), g)

    @property
    def tokenizer(self) -> str | None:
        """Identity of the tokenizer behind the data."""
        return (self.state.get("tokenizer") or {}).get("sha256")

    @property
    def data_fingerprints(self) -> dict[str, str]:
        """Name of a training set -> fingerprint."""
        sources = (self.state.get("data") or {}).get("sources") or {}
        return {name: source.get("fingerprint") for name, source in sources.items()}

    @property
    def train_folders(self) -> dict[str, str]:
        """Name of a training set -> the prepared folder it was read from."""
        train = (self.run_config.get("data") or {}).get("train") or {}
        return dict(train) if isinstance(train, Mapping) else {Path(train).name: train}

    @property
    def corpora(self) -> dict[str, dict[str, Any]]:
        """Name of a training set -> what its folder's manifest says."""
        return {name: read_corpus_manifest(self.train_folders.get(name)) for name in self.data_fingerprints}

    @property
    def manifest_sha256(self) -> str | None:
        """Identity of the checkpoint."""
        if self.checkpoint is None:
            return None
        return hashlib.sha256((self.checkpoint / MANIFEST).read_bytes()).hexdigest()

    @cached_property
    def epochs(self) -> float | None:
        """How often the most-read training set was read through by the end of this model's training."""
        return _epochs(self.state.get("data") or {})

    def seconds_at(self) -> np.ndarray | None:
        """(n,) wall time behind each logged loss, that of the models before included."""
        if self.behind.seconds is None:
            return None
        return np.array([metric.seconds for metric in self.metrics]) - self.end.seconds + (self.total_seconds or 0.0)

    def tokens_at(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens as the run counts them -> tokens with those of the models before."""
        return tokens - self.curve.start_tokens + self.behind.tokens

    def evaluation(self, metric: str, set_name: str | None, whens: Sequence[str]) -> Evaluation | None:
        """The last record of one metric on one set at one of these moments."""
        found = [e for e in self.evaluations if e.metric == metric and e.set == set_name and e.when in whens]
        return found[-1] if found else None


def read_corpus_manifest(folder: str | None) -> dict[str, Any]:
    """manifest.json of a prepared folder; empty when it is not where the run found it."""
    try:
        return load_manifest(folder) if folder else {}
    except (OSError, DataError):
        return {}


def _epochs(data: Mapping[str, Any]) -> float | None:
    samples = {name: source.get("samples") for name, source in (data.get("sources") or {}).items()}
    position = data.get("position")
    if not samples or position is None or not all(samples.values()):
        return None
    segments = data.get("segments") or []
    if not segments or not all(isinstance(weights, Mapping) for _, weights in segments):
        return position / sum(samples.values())  # proportional: every set is read equally often
    ends = [start for start, _ in segments[1:]] + [position]
    read = Counter[str]()
    for (start, weights), end in zip(segments, ends, strict=True):
        for name, weight in weights.items():
            read[name] += max(0, min(end, position) - start) * weight / sum(weights.values())
    return max(read[name] / samples[name] for name in samples)
