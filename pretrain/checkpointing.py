"""A run's folder of checkpoints: what is saved, what stays, and where a repeated command takes up again."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from lit_gpt.checkpoint import TrainingCheckpoint, latest, manifest_sha256, prune_temporaries, read_training
from lit_gpt.checkpoint import write_training as write_checkpoint
from lit_gpt.model import GPT
from pretrain.config import CheckpointConfig, RunConfig, to_plain
from pretrain.optim import named_state
from pretrain.state import TrainState, versions

# Settings that may change between two sittings of a run: they do not touch what is trained on what
FREE_TO_CHANGE = ("logging", "checkpoints", "validation", "out_dir")
_NAME = re.compile(r"stage-(\d+)/step-(\d+)")


def checkpoint_path(folder: Path, state: TrainState) -> Path:
    return folder / f"stage-{state.stage:02d}" / f"step-{state.step_count:010d}"


class RunCheckpoints:
    """Writes the checkpoints of one run and removes those that need not stay."""

    def __init__(self, out_dir: Path, settings: CheckpointConfig, metadata: dict[str, Any]) -> None:
        self.folder = out_dir / "checkpoints"
        self.settings = settings
        self.metadata = metadata
        """Parts of state.json that do not change during the run."""
        self.last: Path | None = None

    def save(self, model: GPT, optimizer: torch.optim.Optimizer, state: TrainState, **changing: Any) -> str:
        """Write a checkpoint of this moment; returns the sha256 of its manifest. `changing` goes into state.json."""
        path = checkpoint_path(self.folder, state)
        if not path.exists():
            write_checkpoint(
                path,
                model=model.state_dict(),
                optimizer=named_state(model, optimizer),
                state={"format": 1, **self.metadata, **changing, **state.to_dict(), "versions": versions()},
                rng={"torch": torch.get_rng_state()},
            )
        self.last = path
        self._remove_superseded(state.stage)
        return manifest_sha256(path)

    def resume(self) -> TrainingCheckpoint | None:
        """The newest valid checkpoint, None when there is none."""
        if self.folder.exists():
            for stage_folder in sorted(self.folder.glob("stage-*")):
                prune_temporaries(stage_folder)
        self.last = latest(self.folder) if self.folder.exists() else None
        return None if self.last is None else read_training(self.last)

    def _remove_superseded(self, stage: int) -> None:
        """Keep the newest of the current stage, multiples of keep_every_steps, and every earlier stage's last one."""
        for stage_folder in sorted(self.folder.glob("stage-*")):
            paths = sorted(path for path in stage_folder.glob("step-*") if path.name[5:].isdigit())
            keep_last = self.settings.keep_last if stage_folder.name == f"stage-{stage:02d}" else 1
            for path in paths[:-keep_last]:
                every = self.settings.keep_every_steps
                if not every or int(path.name[5:]) % every:
                    shutil.rmtree(path)


def changed_settings(saved: dict[str, Any], config: RunConfig) -> list[str]:
    """One line for every setting that differs from the checkpoint's and decides what is trained on what."""
    now = to_plain(config)
    lines = []
    for key in sorted(set(saved) | set(now)):
        if key in FREE_TO_CHANGE:
            continue
        lines += _differences(key, saved.get(key), now.get(key))
    return lines


def _differences(key: str, before: Any, after: Any) -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(set(before) | set(after))
        return [line for k in keys for line in _differences(f"{key}.{k}", before.get(k), after.get(k))]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True), 1)
        return [line for number, (b, a) in pairs for line in _differences(f"{key}[{number}]", b, a)]
    return [] if before == after else [f"{key}: {before!r} in the checkpoint, {after!r} now"]


def check_settings(checkpoint: TrainingCheckpoint, config: RunConfig) -> None:
    """Refuse to resume under settings that would make it another run.

    Raises:
        ValueError: naming every setting that differs.
    """
    lines = changed_settings(checkpoint.state["run_config"], dataclasses.replace(config))
    if lines:
        raise ValueError(
            "\n".join([f"{config.out_dir} holds a run with other settings:", *(f"  {line}" for line in lines)])
            + "\nUse the old settings to resume, another --out_dir, or --fresh to start over"
        )
