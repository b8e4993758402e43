"""Loss curves that later changes must not move: within 1e-4, since CPUs round differently.

A change that is meant to move them writes new ones: `python -m tests.golden.test_losses`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_gpt.config import Config
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

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = {
    f"configs/{path.name}": path
    for path in sorted(CONFIGS.glob("*.yaml"))
    if "stages" in yaml.safe_load(path.read_text())  # others are of other commands
}
LAID_OVER = {"smoke.yaml": "demo.yaml"}
"""What does not stand alone: the config below it."""
TOY_STEPS, TOY_LAYERS = 12, 4


def as_a_toy(path: Path, out_dir: Path, data: Path) -> dict[str, Any]:
    """A shipped config with a small model, few steps and other data; schedule, rates, operators are its own."""
    below = LAID_OVER.get(path.name)
    settings = yaml.safe_load(path.read_text())
    if below is not None:
        settings = merge(yaml.safe_load((CONFIGS / below).read_text()), settings)
    layers = Config.from_name(settings["model"]["name"], vocab_size=100).n_layer
    sizes = ("name", "block_size", "vocab_size", "n_head", "n_query_groups", "head_size", "intermediate_size")
    own = {key: value for key, value in settings["model"].items() if key not in sizes}
    stages = []
    for stage in settings["stages"]:
        small = {key: value for key, value in stage.items() if key not in ("max_tokens", "max_steps")}
        if "n_layer" in small:
            small["n_layer"] = max(1, small["n_layer"] * TOY_LAYERS // layers)
        stages.append({**small, "max_steps": TOY_STEPS})
    toy = {
        "out_dir": str(out_dir),
        "model": {**own, **two_stages(out_dir, data)["model"], "name": f"{TOY_LAYERS}L16H"},
        "data": {"train": str(data)},
        "stages": stages,
        "batch": two_stages(out_dir, data)["batch"],
        "validation": {"max_tokens": 320},
        "logging": {"every_steps": 1, "tensorboard": False},
        "precision": "fp32",
        "device": "cpu",
    }
    return {**settings, **toy}


def settings_of(name: str, folder: Path) -> dict[str, Any]:
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    data = write_prepared(folder / "data", Tokenizer.load("bytes").encode(text))
    if name in SHIPPED:
        return as_a_toy(SHIPPED[name], folder / "run", data)
    return merge(two_stages(folder / "run", data), {**RUNS[name], "checkpoints": {"every_steps": 100}})


def losses_of(name: str, folder: Path) -> list[float]:
    """The loss of every step of one of the runs."""
    settings = settings_of(name, folder)
    path = folder / "settings.json"
    path.write_text(json.dumps(settings))
    run(parse(["--config", str(path)]), command=["pretrain"])
    return [line["loss"] for line in records(folder / "run")]


@pytest.mark.parametrize("name", [*RUNS, *SHIPPED])
def test_losses_are_what_they_were(name, tmp_path):
    expected = json.loads(LOSSES.read_text())
    assert name in expected, "a new config needs a curve: python -m tests.golden.test_losses"
    expected = expected[name]
    tolerance = 1e-2 if "bf16" in name else 1e-4  # sums of other lengths round other bits of bf16
    assert losses_of(name, tmp_path) == pytest.approx(expected, rel=tolerance)


def main() -> None:
    found = {}
    for name in [*RUNS, *SHIPPED]:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = losses_of(name, Path(folder))
    LOSSES.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
