"""prepare.py as the tests of preparation use it: as a module in this process, or as a program of its own."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

from lit_gpt.errors import run_command


@pytest.fixture(scope="module")
def prepare(root):
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "scripts"))
        yield importlib.import_module("prepare")


@pytest.fixture
def units(prepare):
    return sys.modules["prep.units"]


@pytest.fixture
def corpus(prepare):
    return sys.modules["prep.corpus"]


@pytest.fixture
def run(prepare, capsys):
    """Run the command in this process; gives (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_command(lambda: prepare.main([str(argument) for argument in arguments]))
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def start(root):
    """Start a program that has the script's modules and the given arguments, in a process of its own."""

    def call(program: str, *arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            cwd=root / "scripts",
            env={**os.environ, "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return call
