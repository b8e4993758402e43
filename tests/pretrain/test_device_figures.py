"""What a run says of its GPU: the share of its peak that it reaches, and the memory it needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from grow.planning.devices import DEVICES, peak_flops_per_sec
from lit_gpt.config import Config
from pretrain.training import mfu, peak_memory
from pretrain.world import World


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_a_gpu_is_found_by_the_name_that_torch_gives_it(name, key):
    assert peak_flops_per_sec(name) == DEVICES[key].flops_per_sec


def test_it_is_palms_convention_over_the_peak_of_all_devices_and_unknown_without_one(monkeypatch):
    """9.00 GFLOP per token of 24L2048H: 55,000 tokens per second are half of an H200."""
    stage = SimpleNamespace(config=Config.from_name("24L2048H"))

    def of(device: str, gpu: str, size: int = 1) -> float | None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: gpu)
        run = SimpleNamespace(fabric=SimpleNamespace(device=torch.device(device)), world=World(0, size))
        return mfu(run, stage, 55_000.0)

    assert of("cuda", "NVIDIA H200") == pytest.approx(0.50, abs=0.005)
    assert of("cuda", "NVIDIA H200", size=2) == pytest.approx(0.25, abs=0.005)
    assert of("cuda", "Tesla T4") is None
    assert of("cpu", "NVIDIA H200") is None


def test_the_peak_of_memory_is_that_of_the_runs_device_and_unknown_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000 + device.index)

    def of(device: str) -> int | None:
        return peak_memory(SimpleNamespace(fabric=SimpleNamespace(device=torch.device(device))))

    assert of("cuda:3") == 1003
    assert of("cpu") is None
