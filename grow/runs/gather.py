"""From run directories to the models that were trained in them: curves, checkpoints, how each came to be."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from grow.curves import Curve, Evaluation, Metric, RunLog, read_run_log, training_curve
from grow.scores import ExternalModel, ScoredPoint, of_stage, read_external, read_scores
from lit_gpt.atomic import MANIFEST, read_manifest
from lit_gpt.config import Config
from lit_gpt.errors import DataError
from lit_gpt.flops import count_non_embedding, count_parameters
from lit_gpt.packed_dataset import load_manifest

CONFIG_FILE = "config.yaml"
NATS_PER_TOKEN = "nats per token"


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


@dataclass(frozen=True)
class Gathered:
    """Everything that was found in the run directories."""

    models: tuple[TrainedModel, ...]
    notes: tuple[str, ...]
    external: tuple[ExternalModel, ...] = ()
    unit: str = NATS_PER_TOKEN
    """Of every loss of the models."""

    def of_role(self, role: str) -> list[TrainedModel]:
        return [model for model in self.models if model.role == role]


def gather(paths: Sequence[Path]) -> Gathered:
    """Read run directories, and files with the points of models that others trained.

    Raises:
        FileNotFoundError: a path is not there. DataError: it holds no run or no point, or a damaged one.
        ValueError: the same path is given twice.
    """
    resolved = Counter(path.resolve() for path in paths)
    twice = [path for path in paths if resolved[path.resolve()] > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given twice; name every run once")
    notes: list[str] = []
    external: list[ExternalModel] = []
    for path in (path for path in paths if path.is_file()):
        found, more = read_external(path)
        external, notes = external + found, notes + more
    models: list[TrainedModel] = []
    run_dirs = [path for path in paths if not path.is_file()]
    for path, name in zip(run_dirs, _distinct([path.resolve() for path in run_dirs]), strict=True):
        log = read_run_log(path)
        notes += log.notes
        models += _models_of_run(path, name, log, notes)
    linked = _with_parents(_with_unique_names(models))
    used = Counter(model.name for model in (*linked, *external))
    renamed = [
        dataclasses.replace(model, name=f"{model.name} ({model.path})") if used[model.name] > 1 else model
        for model in external
    ]
    return Gathered(tuple(linked), tuple(notes), tuple(renamed))


def _distinct(paths: Sequence[Path]) -> list[str]:
    """The last part of each path; more of it where that is not enough to tell them apart."""
    depth = 1
    longest = max((len(path.parts) for path in paths), default=0)
    while depth < longest and len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def _models_of_run(run_dir: Path, run: str, log: RunLog, notes: list[str]) -> list[TrainedModel]:
    stages = sorted({metric.stage for metric in log.metrics})
    run_config = _read_run_config(run_dir)
    planned = len(run_config.get("stages") or stages)
    scored, more = read_scores(run_dir)
    notes += more
    models: list[TrainedModel] = []
    for stage in stages:
        checkpoint, state = _last_checkpoint(run_dir, stage, notes)
        history = state.get("history") or []
        metrics = [metric for metric in log.metrics if metric.stage == stage]
        before = models[-1] if models else None
        from_checkpoint = _began_from_checkpoint(state, run_config)
        if before is None:
            behind = Behind(state.get("parent_tokens") or 0, None if history or from_checkpoint else 0.0)
        else:
            behind = Behind(before.behind.tokens + before.tokens, before.total_seconds)
        start = before.end if before else None
        models.append(
            TrainedModel(
                name=metrics[-1].stage_name,
                run=run,
                run_dir=run_dir,
                stage=stage,
                metrics=metrics,
                evaluations=[evaluation for evaluation in log.evaluations if evaluation.stage == stage],
                start=start,
                behind=behind,
                state=state,
                checkpoint=checkpoint,
                growth=history[-1] if history else {} if before else None,
                is_base=stage != stages[-1] or stage < planned,
                began_from_checkpoint=from_checkpoint,
                run_config=run_config,
                scores=of_stage(scored, stage),
            )
        )
    notes += _unfinished(run, models[-1], planned)
    return models


def _began_from_checkpoint(state: Mapping[str, Any], run_config: Mapping[str, Any]) -> bool:
    settings = (state.get("run_config") or {}, run_config)
    return bool(state.get("parent_tokens")) or any(values.get("init_from") for values in settings)


def _unfinished(run: str, last: TrainedModel, planned: int) -> list[str]:
    if last.stage < planned:
        return [f"{run}: only {last.stage} of {planned} stages have begun; the rest of the run is missing here."]
    if last.evaluations and not any(evaluation.when == "end" for evaluation in last.evaluations):
        return [f"{run}: the run has not reached its end; its last logged values stand where final ones would."]
    return []


def _read_run_config(run_dir: Path) -> dict[str, Any]:
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        return {}
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not YAML: {error}; the file was damaged") from error
    return values if isinstance(values, dict) else {}


def _last_checkpoint(run_dir: Path, stage: int, notes: list[str]) -> tuple[Path | None, dict[str, Any]]:
    """The newest checkpoint of a stage with a valid manifest, and its state.json."""
    folder = run_dir / "checkpoints" / f"stage-{stage:02d}"
    paths = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    for path in sorted(paths, key=lambda path: int(path.name[5:]), reverse=True):
        try:
            read_manifest(path)
            return path, json.loads((path / "state.json").read_text(encoding="utf-8"))
        except (DataError, OSError, json.JSONDecodeError) as error:
            notes.append(f"A checkpoint was passed over: {error}.")
    notes.append(
        f"{run_dir.name}: no checkpoint of stage {stage} was found, so its layer map, seed and versions are not known."
    )
    return None, {}


def _with_parents(models: list[TrainedModel]) -> list[TrainedModel]:
    """Link each grown model to the one it grew from: the stage before, or a checkpoint of another run."""
    by_stage = {(model.run_dir, model.stage): model for model in models}
    by_digest = {digest: model for model in models for digest in _manifest_digests(model)}
    last_of_run = {model.run_dir.resolve(): model for model in models}
    linked = []
    for model in models:
        parent = by_stage.get((model.run_dir, model.stage - 1))
        if parent is None and model.growth is not None:
            parent = by_digest.get(model.growth.get("parent", "")) or last_of_run.get(_origin_run(model))
            model = dataclasses.replace(model, behind=Behind(model.behind.tokens, _seconds_behind(model, parent)))
        linked.append(dataclasses.replace(model, parent=None if parent is None else parent.name))
    parents = {model.parent for model in linked}
    return [dataclasses.replace(model, is_base=model.is_base or model.name in parents) for model in linked]


def _origin_run(model: TrainedModel) -> Path | None:
    """Folder of the run whose checkpoint a run began with; seen from its own, as both may have been moved since."""
    start, out_dir = (model.run_config.get(key) for key in ("init_from", "out_dir"))
    if start is None or out_dir is None:
        return None
    parts = Path(start).parts
    folder = parts[: parts.index("checkpoints")] if "checkpoints" in parts else parts
    return (model.run_dir / os.path.relpath(Path(*folder), out_dir)).resolve()


def _seconds_behind(model: TrainedModel, parent: TrainedModel | None) -> float | None:
    """Those of the parent, unless the model began elsewhere than at its end: half-way, or some training later."""
    if parent is None or parent.behind.tokens + parent.tokens != model.behind.tokens:
        return None
    return parent.total_seconds


def _manifest_digests(model: TrainedModel) -> list[str]:
    folder = model.run_dir / "checkpoints" / f"stage-{model.stage:02d}"
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob(f"step-*/{MANIFEST}"))]


def _with_unique_names(models: list[TrainedModel]) -> list[TrainedModel]:
    used = Counter(model.name for model in models)
    return [dataclasses.replace(m, name=_name_with_run(m)) if used[m.name] > 1 else m for m in models]


def _name_with_run(model: TrainedModel) -> str:
    """seed-1/stack for the stage `stack` of that run, as `grow compare` names them; two/grown for the others."""
    return model.run if model.run.rpartition("/")[2] == model.name else f"{model.run}/{model.name}"
