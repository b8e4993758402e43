"""A run's folder of checkpoints: what is saved, what stays, and where a repeated command takes up again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

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
from pretrain.config import CheckpointConfig, RunConfig, to_plain
from pretrain.optim import named_state
from pretrain.state import TrainState

# Settings that may change between two sittings of a run: they do not touch what is trained on what
FREE_TO_CHANGE = ("logging", "checkpoints", "validation", "out_dir")


def report_skipped(path: Path, reason: str) -> None:
    sys.stderr.write(f"warning: {path} is passed over: {reason}\n")


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
        path = checkpoint_path(self.folder, state.stage, state.step_count)
        write_training(
            path,
            model=model.state_dict(),
            optimizer=named_state(model, optimizer),
            state={"format": 1, **self.metadata, **changing, **state.to_dict(), "versions": versions()},
            rng={"torch": torch.get_rng_state()},
            replace=True,  # what is there already was found damaged on resume
        )
        self.last = path
        self._remove_superseded(state.stage)
        return manifest_sha256(path)

    def resume(self) -> TrainingCheckpoint | None:
        """The newest valid checkpoint, None when there is none."""
        prune_temporaries(self.folder)
        self.last = latest(self.folder, deep=True, on_skip=report_skipped)
        return None if self.last is None else read_training(self.last, verify=False)

    def _remove_superseded(self, stage: int) -> None:
        """Keep the newest of the current stage, multiples of keep_every_steps, and every earlier stage's last one."""
        for stage_folder in sorted(self.folder.glob("stage-*")):
            paths = sorted(path for path in stage_folder.glob("step-*") if path.name[5:].isdigit())
            keep_last = self.settings.keep_last if stage_folder.name == f"stage-{stage:02d}" else 1
            for path in paths[:-keep_last]:
                every = self.settings.keep_every_steps
                if not every or int(path.name[5:]) % every:
                    remove_directory(path)


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
    lines = changed_settings(checkpoint.state["run_config"], config)
    if lines:
        raise ValueError(
            "\n".join([f"{config.out_dir} holds a run with other settings:", *(f"  {line}" for line in lines)])
            + "\nUse the old settings to resume, another --out_dir, or --fresh to start over"
        )
