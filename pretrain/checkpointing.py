"""A run's folder of checkpoints: what is saved, what stays, and where a repeated command takes up again."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt.atomic import remove_directory
from lit_gpt.checkpoint import (
    TrainingCheckpoint,
    checkpoint_path,
    latest,
    manifest_sha256,
    prune_temporaries,
    read_training,
    write_training,
)
from lit_gpt.model import GPT
from lit_gpt.versions import versions
from pretrain.config import LISTS, CheckpointConfig, RunConfig, known_keys, to_plain
from pretrain.optim import named_state
from pretrain.parallel import whole
from pretrain.state import TrainState
from pretrain.world import ALONE, World, in_turn

# Settings that may change between two sittings of a run: they do not touch what is trained on what
# (what the data holds is checked by its fingerprint, wherever it lies, and its order up to here by the data object)
FREE_TO_CHANGE = (
    "logging",
    "checkpoints",
    "parallel",
    "activation_checkpointing",
    "stop",
    "batch.micro_batch_size",
    "validation",
    "out_dir",
    "data.train",
    "data.validation",
    "data.tokenizer",
    "data.weights",
    "data.segments",
    "data.skips",
    "data.max_epochs",
    "data.allow_order_change",
)


LEARNING = "learning"
"""Beside the random states: mixing matrices and their moments, by name."""


class RunCheckpoints:
    """Writes the checkpoints of one run and removes those that need not stay."""

    def __init__(
        self, out_dir: Path, settings: CheckpointConfig, metadata: dict[str, Any], world: World = ALONE
    ) -> None:
        self.folder = out_dir / "checkpoints"
        self.world = world
        self.settings = settings
        self.metadata = metadata
        """Parts of state.json that do not change during the run."""
        self.last: Path | None = None
        self.learning: dict[str, Any] | None = None
        """What the checkpoint that the run resumed from says of a growth that was being learned."""
        self._passed_over: list[Path] = []

    def save(
        self,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        state: TrainState,
        *,
        learning: dict[str, Any] | None = None,
        **changing: Any,
    ) -> str:
        """Write a checkpoint of this moment; returns the sha256 of its manifest.

        `learning` is what a growth that is being learned has learned so far; `changing` goes into state.json.
        """
        path = checkpoint_path(self.folder, state.stage, state.step_count)
        weights = {name: whole(tensor) for name, tensor in model.state_dict().items()}
        moments = {
            name: {slot: whole(tensor) for slot, tensor in slots.items()}
            for name, slots in named_state(model, optimizer).items()
        }
        in_turn(self.world, lambda: self._write(path, weights, moments, state, learning, changing))
        self.last = path
        return manifest_sha256(path)

    def _write(
        self,
        path: Path,
        weights: dict[str, Tensor],
        moments: dict[str, dict[str, Tensor]],
        state: TrainState,
        learning: dict[str, Any] | None,
        changing: dict[str, Any],
    ) -> None:
        if not self.world.is_first:
            return
        write_training(
            path,
            model=weights,
            optimizer=moments,
            state={"format": 1, **self.metadata, **changing, **state.to_dict(), "versions": versions()},
            rng={"torch": torch.get_rng_state(), **({} if learning is None else {LEARNING: learning})},
            replace=True,  # what is there already was found damaged on resume
        )
        self._remove_superseded(path)

    def holds(self, state: TrainState) -> bool:
        """Whether the last checkpoint is of this moment."""
        return self.last == checkpoint_path(self.folder, state.stage, state.step_count)

    def resume(self) -> TrainingCheckpoint | None:
        """The newest valid checkpoint, None when there is none; those passed over go with the next save."""
        self.last = self.world.broadcast(in_turn(self.world, self._find))
        checkpoint = None if self.last is None else read_training(self.last, verify=False)
        if checkpoint is not None and checkpoint.rng is not None:
            self.learning = checkpoint.rng.get(LEARNING)
        return checkpoint

    def _find(self) -> Path | None:
        """Looked for, and read through, by the first process alone."""
        if not self.world.is_first:
            return None
        prune_temporaries(self.folder)
        return latest(self.folder, deep=True, on_skip=self._pass_over)

    def _pass_over(self, path: Path, reason: str) -> None:
        sys.stderr.write(f"warning: {path} is passed over: {reason}\n")
        self._passed_over.append(path)

    def _remove_superseded(self, written: Path) -> None:
        """Keep the newest of this stage, multiples of keep_every_steps, and every earlier stage's last one."""
        superseded = [path for path in self._passed_over if path.exists() and path != written]
        self._passed_over = []
        for stage_folder in sorted(self.folder.glob("stage-*")):
            paths = [path for path in sorted(stage_folder.glob("step-*")) if path not in superseded]
            keep_last = self.settings.keep_last if stage_folder == written.parent else 1
            every = self.settings.keep_every_steps
            superseded += [path for path in paths[:-keep_last] if not every or int(path.name[5:]) % every]
        for path in superseded:
            remove_directory(path)


def changed_settings(saved: dict[str, Any], config: RunConfig) -> list[str]:
    """One line for every setting that differs from the checkpoint's and decides what is trained on what."""
    differences = _differences("", _completed(saved, RunConfig), to_plain(config))
    return [
        f"{key}: {before!r} in the checkpoint, {after!r} now"
        for key, before, after in differences
        if not any(key == free or key.startswith(f"{free}.") for free in FREE_TO_CHANGE)
    ]


def _completed(saved: dict[str, Any], section: type) -> dict[str, Any]:
    """Saved settings with the defaults of those that did not exist yet when they were saved."""
    completed = dict(saved)
    sections = known_keys(section)
    for field in dataclasses.fields(section):
        inner = sections[field.name]
        if field.name not in saved and field.default is not dataclasses.MISSING:
            completed[field.name] = dataclasses.asdict(field.default) if inner else field.default
        elif field.name not in saved and field.default_factory is not dataclasses.MISSING:
            completed[field.name] = field.default_factory()
        elif inner and field.name in saved:
            completed[field.name] = _completed(saved[field.name], inner)
        elif (section, field.name) in LISTS and saved[field.name] is not None:
            completed[field.name] = [_completed(item, LISTS[section, field.name][1]) for item in saved[field.name]]
    return completed


def _differences(key: str, before: Any, after: Any) -> list[tuple[str, Any, Any]]:
    """(dotted key, value before, value after) of every leaf in which two trees of settings differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        parts = [(f"{key}.{k}" if key else k, before.get(k), after.get(k)) for k in sorted({*before, *after})]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        parts = [(f"{key}[{n}]", b, a) for n, (b, a) in enumerate(zip(before, after, strict=True), 1)]
    else:
        return [] if before == after else [(key, before, after)]
    return [leaf for part in parts for leaf in _differences(*part)]


def check_settings(saved: dict[str, Any], config: RunConfig) -> None:
    """Refuse to resume under settings that would make it another run.

    Raises:
        ValueError: naming every setting that differs.
    """
    lines = changed_settings(saved, config)
    if lines:
        raise ValueError(
            "\n".join([f"{config.out_dir} holds a run with other settings:", *(f"  {line}" for line in lines)])
            + "\nUse the old settings to resume, another --out_dir, or --fresh to start over"
        )
