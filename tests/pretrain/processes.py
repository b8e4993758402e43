"""Runs of several processes, started by hand: they meet by a file, so that no test needs a port."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml


def start(settings: dict[str, object], n_processes: int, folder: Path, *, script: str | None = None) -> list:
    """`pretrain` on these settings, or a script that is given their path, as so many processes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    store = folder / "meeting"
    store.unlink(missing_ok=True)
    what = ["-m", "pretrain"] if script is None else ["-c", script]
    meeting = {} if n_processes == 1 else {"WORLD_SIZE": str(n_processes), "PRETRAIN_STORE": str(store)}
    return [
        subprocess.Popen(
            [sys.executable, *what, "--config", str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(n_processes)
    ]


def finish(processes: list, timeout_secs: float = 300) -> list[subprocess.CompletedProcess]:
    """Wait for all of them; what is left after a time is killed."""
    done = []
    try:
        for process in processes:
            stdout, stderr = process.communicate(timeout=timeout_secs)
            done.append(subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr))
    finally:
        for process in processes:
            process.kill()
    return done


def run_on(settings: dict[str, object], n_processes: int, folder: Path, **options: str) -> None:
    """Start, wait, and see that all of them ended well."""
    for process in finish(start(settings, n_processes, folder, **options)):
        assert process.returncode == 0, process.stderr
