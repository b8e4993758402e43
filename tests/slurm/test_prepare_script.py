"""scripts/slurm/prepare.sh without SLURM: where it finds the checkout and Python, and what it calls."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def run(root: Path, tmp_path: Path):
    """Run a copy of the script from a folder of its own, as SLURM does; gives (exit code, stdout, stderr)."""
    spool = tmp_path / "spool"
    spool.mkdir()
    copy = spool / "slurm_script"
    copy.write_text((root / "scripts" / "slurm" / "prepare.sh").read_text())
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\nprintf "%s|" "$PWD" "$@"\n')
    python.chmod(0o755)

    def call(*arguments: str, cwd: Path = tmp_path, **settings: str) -> tuple[int, str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "LIT_GROW_ROOT"))}
        done = subprocess.run(
            ["bash", str(copy), *arguments],
            env=kept | {"PYTHON": str(python)} | settings,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout, done.stderr

    return call


def make_checkout(path: Path) -> Path:
    (path / "scripts").mkdir(parents=True)
    shutil.copy(Path(__file__).parents[2] / "scripts" / "help.sh", path / "scripts")
    for name in ("prepare.py", "prepare_slimpajama.py"):
        (path / "scripts" / name).touch()
    return path


def test_it_parses(root: Path):
    for script in (root / "scripts" / "slurm" / "prepare.sh", root / "tests" / "slurm" / "mini_slurm.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("where", [".", "a/b"])
def test_the_checkout_is_found_at_or_above_the_folder_of_submission(run, tmp_path: Path, where: str):
    checkout = make_checkout(tmp_path / "a checkout")
    submitted_from = checkout / where
    submitted_from.mkdir(parents=True, exist_ok=True)

    status, out, err = run(
        *("--input", "two words", "--out", "here"),
        cwd=submitted_from,
        SLURM_SUBMIT_DIR=str(submitted_from),
        SLURM_CPUS_PER_TASK="5",
        SLURM_ARRAY_TASK_ID="3",
    )

    assert status == 0, err
    first, call = out.splitlines()
    assert "task 3" in first and "5 workers" in first
    script = checkout / "scripts" / "prepare.py"
    assert call == f"{submitted_from.resolve()}|{script}|--workers|5|--input|two words|--out|here|"


def test_from_outside_a_variable_names_the_checkout(run, tmp_path: Path):
    checkout = make_checkout(tmp_path / "checkout")

    status, out, err = run(LIT_GROW_ROOT=str(checkout), SLURM_SUBMIT_DIR="/", PREPARE="scripts/prepare_slimpajama.py")

    assert status == 0, err
    assert f"|{checkout / 'scripts' / 'prepare_slimpajama.py'}|--workers|1|" in out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"SLURM_SUBMIT_DIR": "/"},
            "no checkout of lit-grow at or above /; call sbatch inside it, or set",
        ),
        ({"LIT_GROW_ROOT": "/nowhere"}, "LIT_GROW_ROOT=/nowhere holds no scripts/prepare.py"),
        ({"LIT_GROW_ROOT": "checkout", "PYTHON": "python-of-nowhere"}, "no python-of-nowhere"),
        ({"LIT_GROW_ROOT": "checkout", "PREPARE": "scripts/other.py"}, "scripts/other.py; PREPARE names a script"),
    ],
)
def test_what_it_cannot_find_is_one_clear_error(run, tmp_path: Path, settings: dict[str, str], message: str):
    make_checkout(tmp_path / "checkout")

    status, out, err = run("--out", "here", **settings)

    assert status == 2
    assert message in err and len(err.splitlines()) == 1
    assert out == ""


def test_the_status_of_prepare_is_the_scripts(run, tmp_path: Path):
    checkout = make_checkout(tmp_path / "checkout")
    failing = tmp_path / "failing"
    failing.write_text("#!/usr/bin/env bash\nexit 75\n")
    failing.chmod(0o755)

    assert run(LIT_GROW_ROOT=str(checkout), PYTHON=str(failing))[0] == 75
