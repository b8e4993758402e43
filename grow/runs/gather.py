"""From run directories to the models that were trained in them: curves, checkpoints, how each came to be."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grow.curves import RunLog, read_run_log
from grow.runs.trained_model import Behind, TrainedModel
from grow.scores import ExternalModel, of_stage, read_external, read_scores
from lit_gpt.atomic import MANIFEST, read_manifest
from lit_gpt.checkpoint_folder import newest_first
from lit_gpt.errors import DataError
from lit_gpt.settings_files import read_settings_file

CONFIG_FILE = "config.yaml"
NATS_PER_TOKEN = "nats per token"


@dataclass(frozen=True)
class Gathered:
    """Everything that was found in the run directories."""

    models: tuple[TrainedModel, ...]
    notes: tuple[str, ...]
    external: tuple[ExternalModel, ...] = ()
    unit: str = NATS_PER_TOKEN
    """Of every loss of the models."""
    left_out: tuple[str, ...] = ()
    """Names of models whose losses are not in that unit; a note says why."""

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
    try:
        return read_settings_file(path)
    except ValueError as error:
        raise DataError(f"{error}; the file was damaged") from error


def _last_checkpoint(run_dir: Path, stage: int, notes: list[str]) -> tuple[Path | None, dict[str, Any]]:
    """The newest checkpoint of a stage with a valid manifest, and its state.json."""
    paths = [path for path in newest_first(run_dir / "checkpoints") if path.parent.name == f"stage-{stage:02d}"]
    for path in paths:
        try:
            read_manifest(path)
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            if not isinstance(state, dict):
                raise DataError(f"{path / 'state.json'} is not a JSON object")
            return path, state
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
