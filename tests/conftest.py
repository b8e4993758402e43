"""Settings and fixtures that every test shares: one thread, repeatable examples, real data where it exists."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported anywhere: tests compare numbers bit for bit, and several may share the machine.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

# A test run that a shell started in the background ignores SIGINT, and so would all the commands that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent

# Function-scoped fixtures under @given hold paths and plain values here, which do not go stale between examples.
settings.register_profile(
    "lit-grow",
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("lit-grow")


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def data_dir() -> Callable[[str], Path]:
    """`data_dir("books")` is a path among the real data under LIT_GROW_DATA; the test is skipped where it is absent."""
    base = Path(os.environ.get("LIT_GROW_DATA") or ROOT.parent / "shared" / "data")

    def find(relative: str = ".") -> Path:
        path = base / relative
        if not path.exists():
            pytest.skip(f"real data {relative!r} is not under {base}; set LIT_GROW_DATA to the folder that holds it")
        return path

    return find
