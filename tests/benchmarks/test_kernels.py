"""The benchmark of the kernels runs every backend that can run here. Says nothing about speed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import kernels
from lit_gpt.kernels.choice import BACKENDS
from lit_gpt.kernels.self_check import Shape, cases


def test_a_quick_run_measures_every_operation_by_every_backend(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "loss_peaks", lambda device, shape: {"torch": 2**20, "chunked": 2**19})
    out = tmp_path / "kernels.json"

    assert kernels.main(["--quick", "--device", "cpu", "--out", str(out)]) == 0

    (result,) = json.loads(out.read_text()).values()
    rows = result["shapes"][0]["results"]
    assert {row["operation"] for row in rows} == {*BACKENDS, "norm after adding"}
    assert {row["backend"] for row in rows if row["operation"] == "attention"} == {"math", "sdpa"}
    assert all(row["error"] < 1e-4 and row["secs"]["median"] > 0 for row in rows)
    plainest = [row for row in rows if row["backend"] == kernels.PLAINEST.get(row["operation"])]
    assert plainest and all(row["times_as_fast_as_plainest"]["median"] == 1 for row in plainest)
    assert "loss chunked" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no figures on a process")
def test_the_memory_of_a_loss_is_that_of_its_process_however_large_the_one_that_starts_it():
    """All logits, 32 MiB, and their gradients; the chunked loss holds some rows of them at a time."""
    torch.ones(2**28)  # 1 GiB, which a process that is started inherits as its peak by another reckoning
    peaks = kernels.loss_peaks(torch.device("cpu"), Shape(4, 256, 2, 2, 32, 32, 8192))
    assert peaks["torch"] > 2**25 and 0 < 2 * peaks["chunked"] < peaks["torch"], peaks


def test_the_triton_interpreter_is_not_timed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    situation = kernels.situation_of(torch.device("cpu"), Shape())
    assert all("triton" not in kernels.usable(operation, situation) for operation in BACKENDS)


def test_cases_have_the_shape_that_was_asked_for():
    shape = Shape(3, 5, 4, 2, 32, 48, 7)
    situation = kernels.situation_of(torch.device("cpu"), shape)
    resolved = kernels.resolve(kernels.KernelConfig(), situation)
    found = {
        case.operation: [tuple(x.shape) for x in case.inputs]
        for case in cases(resolved, situation, torch.device("cpu"), shape)
    }
    assert found["attention"] == [(3, 4, 5, 64), (3, 2, 5, 64), (3, 2, 5, 64)]
    assert found["mlp"] == [(3, 5, 48)] * 2 and found["loss"] == [(15, 32), (7, 32)]
