"""A prepared folder of tiny real text, and runs on it as a user starts them: by command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lit_gpt.packed_dataset import write_token_file
from lit_gpt.tokenizer import Tokenizer
from pretrain.signals import StopSignal

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


def two_stages(out_dir: Path, data: Path) -> dict[str, object]:
    """Settings of a run that grows from 1 to 3 layers after 6 steps."""
    return {
        "out_dir": str(out_dir),
        "model": {"name": "3L16H", "block_size": BLOCK_SIZE, "n_head": 2, "intermediate_size": 32, "head_size": 8},
        "data": {"train": str(data)},
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
def settings(tmp_path: Path, prepared: Path) -> dict[str, object]:
    return two_stages(tmp_path / "run", prepared)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    """The folder of such a run that nothing disturbed. Copy it before changing it."""
    from pretrain.command_line import parse
    from pretrain.run import run

    folder = tmp_path_factory.mktemp("finished")
    run(parse(command_for(two_stages(folder / "run", prepared), folder)), command=["pretrain"])
    return folder / "run"


def of_processes(out_dir: Path, data: Path, **changes: object) -> dict[str, object]:
    """The same run in micro-batches that up to four processes can share; validation on 10 rows, as it meets often."""
    settings = {
        **two_stages(out_dir, data),
        "batch": {"global_batch_size": 4, "micro_batch_size": 1},
        "validation": {"every_steps": 4, "max_tokens": 160},
    }
    return {**settings, **changes}


@pytest.fixture(scope="session")
def of_two(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    """The folder of a run of two processes that nothing disturbed, all of its checkpoints kept. Copy it first."""
    from tests.pretrain.processes import run_on

    folder = tmp_path_factory.mktemp("of_two")
    settings = of_processes(folder / "run", prepared, checkpoints={"every_steps": 2, "keep_every_steps": 1})
    started = run_on(settings, 2, folder / "start")
    assert "training stood" in started.output() and "written in" in started.output(), started.errors()
    assert started.errors(1).count("Traceback") == 0
    return folder / "run"


def command_for(settings: dict[str, object], folder: Path, *flags: str) -> list[str]:
    """The arguments of a `pretrain` on these settings, which are written to a file in `folder`."""
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["--config", str(path), *flags]


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def pretrain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Finished]:
    """Run the `pretrain` command in this process: importing torch again for every error message takes seconds."""
    from pretrain.__main__ import main

    def run(settings: dict[str, object], *flags: str) -> Finished:
        monkeypatch.setattr(sys, "argv", ["pretrain", *command_for(settings, tmp_path, *flags)])
        capsys.readouterr()
        before = {number: signal.getsignal(number) for number in StopSignal.SIGNALS}
        try:
            code = main()
        finally:
            for number, handler in before.items():  # the command listens until its process ends
                signal.signal(number, handler)
        return Finished(code, *capsys.readouterr())

    return run


@pytest.fixture
def data_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finished]:
    """Run `pretrain data ...` in this process."""
    from pretrain.__main__ import main

    def run(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["pretrain", "data", *map(str, arguments)])
        capsys.readouterr()
        try:
            code = main()
        except SystemExit as leaving:  # argparse
            code = int(leaving.code or 0)
        return Finished(code, *capsys.readouterr())

    return run


@pytest.fixture
def pretrain_process(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start `pretrain` as a process of its own, for what only happens to processes."""

    def start(settings: dict[str, object], *flags: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "pretrain", *command_for(settings, tmp_path, *flags)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": "1"},
        )

    return start


@pytest.fixture
def batches_of(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Every batch that the runs of a test train on, (micro_batch_size, block_size + 1) each."""
    from pretrain.data import TrainData

    batches: list[np.ndarray] = []
    original = TrainData.batches

    @contextmanager
    def recording(*arguments: Any) -> Iterator[Iterator[np.ndarray]]:
        with original(*arguments) as rows:
            yield (batches.append(np.array(each)) or each for each in rows)

    monkeypatch.setattr(TrainData, "batches", recording)
    return batches
