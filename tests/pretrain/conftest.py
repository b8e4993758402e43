"""A prepared folder of tiny real text, and runs on it as a user starts them: by command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from lit_gpt.packed_dataset import write_token_file
from lit_gpt.tokenizer import Tokenizer

BLOCK_SIZE = 16


def write_prepared(folder: Path, tokens: np.ndarray, **tokenizer: object) -> Path:
    """What scripts/prepare.py leaves behind, in its smallest form: bytes tokenizer, nine tenths for training."""
    folder.mkdir(parents=True, exist_ok=True)
    bytes_tokenizer = Tokenizer.load("bytes")
    bytes_tokenizer.save(folder)
    cut = len(tokens) * 9 // 10
    splits = {"train": tokens[:cut], "validation": tokens[cut:]}
    for split, part in splits.items():
        write_token_file(folder / f"{split}_000000.bin", part, np.dtype("uint16"))
    manifest = {
        "tokenizer": {
            "kind": "bytes",
            "sha256": bytes_tokenizer.fingerprint,
            "vocab_size": bytes_tokenizer.vocab_size,
            **tokenizer,
        },
        "splits": {
            split: {"files": [f"{split}_000000.bin"], "tokens": len(part), "documents": 1, "text_bytes": len(part)}
            for split, part in splits.items()
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """The licence text, byte by byte: about 11,000 tokens of English."""
    text = (root / "LICENSE").read_text(encoding="utf-8")
    return write_prepared(tmp_path_factory.mktemp("prepared"), Tokenizer.load("bytes").encode(text))


@pytest.fixture
def settings(tmp_path: Path, prepared: Path) -> dict[str, object]:
    """A run of two stages that grows from 1 to 3 layers after 6 steps."""
    return {
        "out_dir": str(tmp_path / "run"),
        "model": {"name": "3L16H", "block_size": BLOCK_SIZE, "n_head": 2, "intermediate_size": 32, "head_size": 8},
        "data": {"train": str(prepared)},
        "stages": [
            {"name": "base", "n_layer": 1, "max_steps": 6},
            {"name": "grown", "operator": "stack", "max_steps": 8},
        ],
        "batch": {"global_batch_size": 4, "micro_batch_size": 2},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"kind": "wsd", "warmup_steps": 2},
        "checkpoints": {"every_steps": 2},
        "validation": {"every_steps": 4},
        "logging": {"every_steps": 1, "tensorboard": False},
    }


@pytest.fixture
def pretrain(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `pretrain` as a process on settings; `start_only` returns the running process instead."""

    def command(settings: dict[str, object], *flags: str) -> list[str]:
        path = tmp_path / "settings.yaml"
        path.write_text(yaml.safe_dump(settings))
        return [sys.executable, "-m", "pretrain", "--config", str(path), *flags]

    def run(settings: dict[str, object], *flags: str, start_only: bool = False) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": "1"}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
        if start_only:
            return subprocess.Popen(command(settings, *flags), **options)
        return subprocess.run(command(settings, *flags), timeout=300, check=False, **options)

    return run
