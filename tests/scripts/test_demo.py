"""The demo at toy size, undisturbed and killed at any moment: the same end, and a report whose numbers are its own."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from lit_gpt.checkpoint import latest, read_training

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def start_demo(out: Path) -> subprocess.Popen[str]:
    """`demo.sh --smoke` in a process group of its own, with one thread so that the numbers are the same to the bit."""
    command = ["bash", "scripts/demo.sh", "--smoke", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a demo that ran through, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    demo = start_demo(out)
    printed, _ = demo.communicate(timeout=600)
    assert demo.returncode == 0, printed
    return out, printed


def final_losses(out: Path) -> dict[str, float]:
    return {run["name"]: run["final_loss"] for run in json.loads((out / "report.json").read_text())["runs"]}


def test_it_prints_a_table_and_the_path_of_the_page(undisturbed):
    out, printed = undisturbed
    assert str(out / "report.html") in printed
    for name in ("base", "grown", "scratch"):
        assert name in printed


def test_its_report_holds_the_three_runs_and_a_speedup_or_the_reason_why_not(undisturbed):
    out, _ = undisturbed
    report = json.loads((out / "report.json").read_text())
    assert {"base", "grown", "scratch"} <= {run["name"] for run in report["runs"]}
    for run in report["runs"]:
        assert {"name", "tokens", "flops_total", "final_loss", "bpb", "seconds"} <= set(run)
    assert report["speedup_at_equal_loss"] is not None or report["reason"]


def test_a_second_call_finds_everything_done(undisturbed):
    out, _ = undisturbed
    demo = start_demo(out)
    printed, _ = demo.communicate(timeout=300)
    assert demo.returncode == 0, printed
    assert printed.count("is finished") == 2


def test_kill_9_at_any_moment_then_the_same_command_ends_the_same(undisturbed, tmp_path):
    expected, _ = undisturbed
    out, moments = tmp_path / "out", random.Random(1)
    for _ in range(5):
        demo = start_demo(out)
        time.sleep(moments.uniform(1, 15))
        os.killpg(demo.pid, signal.SIGKILL)
        demo.communicate()
    demo = start_demo(out)
    printed, _ = demo.communicate(timeout=600)
    assert demo.returncode == 0, printed
    assert final_losses(out) == final_losses(expected)
    for run in ("stacked", "scratch"):
        weights, others = (read_training(latest(folder / run / "checkpoints")).model for folder in (out, expected))
        assert all(torch.equal(weights[name], other) for name, other in others.items())
