"""Runs that are cut off, and what finished ones left behind, for comparing them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lit_gpt.checkpoint import latest, read_training
from pretrain import loop

TIMING = ("tokens_per_sec", "compile_secs", "seconds", "time")


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The lines of a log without what depends on the clock."""
    lines = (folder / name).read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in lines]


class Stopped(Exception):
    """In the middle of a stage."""


@contextmanager
def cut_off_after(step: int) -> Iterator[None]:
    """What is run inside ends by an exception when it has made that many steps."""
    original = loop.train_step

    def train_step(this_run, stage, trained, state, batches):
        if state.step_count == step:
            raise Stopped
        return original(this_run, stage, trained, state, batches)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(loop, "train_step", train_step)
        yield


def assert_same_end(folder: Path, undisturbed: Path) -> None:
    """Two runs logged the same and ended with the same weights and moments, to the bit."""
    for name in ("metrics.jsonl", "evals.jsonl"):
        assert records(folder, name) == records(undisturbed, name)
    ended, expected = (read_training(latest(f / "checkpoints")) for f in (folder, undisturbed))
    assert all(torch.equal(ended.model[name], tensor) for name, tensor in expected.model.items())
    assert set(ended.optimizer) == set(expected.optimizer)
    for name, slots in expected.optimizer.items():
        assert all(torch.equal(ended.optimizer[name][slot], tensor) for slot, tensor in slots.items())
