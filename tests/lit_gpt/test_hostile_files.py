"""Files made to do harm: no code runs, nothing crashes, no memory is taken that no file backs, one clear error each."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt.atomic import MANIFEST, manifest_of, render_manifest
from lit_gpt.checkpoint import read_exchange, write_exchange, write_training
from lit_gpt.errors import DataError
from tests.lit_gpt.hostile_files import MARKER, write_all
from tests.toys import toy_config, toy_weights

ERRORS = ("DataError",)
CONFIG = toy_config(n_layer=1)


def sign(folder: Path) -> None:
    """Give a changed folder a manifest that fits, as whoever changed it would."""
    (folder / MANIFEST).write_bytes(render_manifest(manifest_of(folder, "training")))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, root) -> dict[str, Any]:
    """What a process of its own, with limited memory, made of every file."""
    folder = tmp_path_factory.mktemp("hostile")
    training = write_training(folder / "own", toy_weights(CONFIG), {}, {"model_config": CONFIG.to_dict()})
    paths = write_all(folder, sign, training)
    done = subprocess.run(
        [sys.executable, "-m", "tests.lit_gpt.hostile_files"],
        input="\n".join(json.dumps([name, str(path)]) for name, path in paths.items()),
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads(done.stdout), "executed": [str(path) for path in folder.rglob(MARKER)]}


def test_there_are_more_than_fifty_of_them(outcomes):
    assert len(outcomes) > 50


def test_none_of_them_runs_anything(outcomes):
    assert outcomes["executed"] == []
    ran = {name: found["events"] for name, found in outcomes.items() if isinstance(found, dict) and found["events"]}
    assert ran == {}


def says_something(message: str) -> bool:
    """Whether it gives a reason: an allocation that failed has none, "cannot be read: ; use another"."""
    return len(message) > 30 and ": ;" not in message


def test_each_ends_in_one_clear_error(outcomes):
    other = {
        name: (found["error"], found["message"])
        for name, found in outcomes.items()
        if isinstance(found, dict) and (found["error"] not in ERRORS or not says_something(found["message"]))
    }
    assert other == {}


def test_what_asks_for_code_is_told_apart_from_what_is_damaged(outcomes):
    calls = {name: found["message"] for name, found in outcomes.items() if name.startswith("pickle: calls ")}
    refused = {name for name, message in calls.items() if "refused, not run" in message}
    assert refused == set(calls)


def read_mutated(folder: Path, content: bytes, chance: random.Random) -> None:
    """Change one to four bytes of the header, read all of it; anything but an error of ours or tensors fails."""
    header_bytes = int.from_bytes(content[:8], "little") + 8
    changed = bytearray(content)
    for _ in range(chance.randrange(1, 5)):
        changed[chance.randrange(header_bytes)] = chance.randrange(256)
    (folder / "model.safetensors").write_bytes(changed)
    try:
        weights = read_exchange(folder).weights
        assert all(torch.is_tensor(weights[name]) for name in weights)
    except DataError as error:
        assert "model.safetensors" in str(error) or str(folder) in str(error)


def mutate(tmp_path: Path, times: int, seed: int) -> None:
    folder = write_exchange(tmp_path / "folder", CONFIG, toy_weights(CONFIG))
    for name in (MANIFEST, "lit_config.json"):
        (folder / name).unlink()
    content = (folder / "model.safetensors").read_bytes()
    chance = random.Random(seed)
    for _ in range(times):
        read_mutated(folder, content, chance)


def test_mutated_headers_end_in_an_error_of_ours_or_in_tensors(tmp_path):
    mutate(tmp_path, 500, seed=1)


@pytest.mark.slow
def test_ten_thousand_mutated_headers_do(tmp_path):
    mutate(tmp_path, 10_000, seed=2)
