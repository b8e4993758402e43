"""Loss curves that later changes must not move: within 1e-4, since CPUs round differently.

A change that is meant to move them writes new ones: `python -m tests.golden.test_losses`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from lit_gpt.settings_files import merge
from lit_gpt.tokenizer import Tokenizer
from pretrain.command_line import parse
from pretrain.run import run
from tests.pretrain.conftest import two_stages, write_prepared
from tests.pretrain.runs import records

LOSSES = Path(__file__).with_name("losses.json")
STACKED = [{"name": "base", "n_layer": 1, "max_steps": 12}, {"name": "grown", "operator": "stack", "max_steps": 12}]
RUNS = {
    "stacked in fp32": {"stages": STACKED, "precision": "fp32"},
    "stacked in bf16": {"stages": STACKED, "precision": "bf16"},
    "stacked, moments mapped, one schedule": {
        "stages": [
            STACKED[0],
            {**STACKED[1], "optimizer_policy": "map", "continue_schedule": True, "rewarmup_steps": 4},
        ],
        "precision": "fp32",
    },
    "width and depth behind a mask": {
        "stages": [
            {"name": "base", "n_embd": 8, "intermediate_size": 16, "max_steps": 12},
            {"name": "grown", "operator": "random-width", "mask_steps": 8, "max_steps": 12},
        ],
        "precision": "fp32",
    },
    "learned, taught": {
        "stages": [
            STACKED[0],
            {"name": "g", "operator": "ligo", "options": {"learn_steps": 4}, "distill_weight": 0.5, "max_steps": 12},
        ],
        "precision": "fp32",
    },
}


def losses_of(name: str, folder: Path) -> list[float]:
    """The loss of every step of one of the runs."""
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    data = write_prepared(folder / "data", Tokenizer.load("bytes").encode(text))
    settings = merge(two_stages(folder / "run", data), {**RUNS[name], "checkpoints": {"every_steps": 100}})
    path = folder / "settings.json"
    path.write_text(json.dumps(settings))
    run(parse(["--config", str(path)]), command=["pretrain"])
    return [line["loss"] for line in records(folder / "run")]


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_what_they_were(name, tmp_path):
    expected = json.loads(LOSSES.read_text())[name]
    tolerance = 1e-4 if RUNS[name]["precision"] == "fp32" else 1e-2  # sums of other lengths round other bits of bf16
    assert losses_of(name, tmp_path) == pytest.approx(expected, rel=tolerance)


def main() -> None:
    found = {}
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = losses_of(name, Path(folder))
    LOSSES.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
