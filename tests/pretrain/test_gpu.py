"""What must hold on a GPU as on the CPU: a step, a skipped step, a checkpoint that is written meanwhile, a resume.

With DEVICE = "cpu" they pass; no GPU has run them yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kill_sweep import cut_back
from lit_gpt.checkpoint import read_training, verify
from lit_gpt.model import GPT
from lit_gpt.settings_files import merge
from pretrain.checkpointing import RunCheckpoints
from pretrain.config import CheckpointConfig, GuardConfig, OptimizerConfig, ParallelConfig
from pretrain.guards import Guard
from pretrain.optim import build_optimizer, named_state
from pretrain.parallel import Compute, build_model, whole
from pretrain.state import TrainState
from pretrain.world import ALONE, connected
from tests.pretrain.conftest import of_processes
from tests.pretrain.processes import run_on
from tests.pretrain.runs import assert_same_end
from tests.toys import toy_config, toy_tokens, toy_weights

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# heads of 64 channels and widths that tensor cores multiply
CONFIG = toy_config(n_embd=256, n_head=4, n_query_groups=2, intermediate_size=512, block_size=64)


@pytest.fixture(autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")


@contextmanager
def model_on(device: str, precision: str, strategy: str = "auto") -> Iterator[tuple[GPT, torch.optim.AdamW]]:
    """The same toy model on a device, behind FSDP2 where that is asked for, and its optimizer."""
    with connected(ALONE, device, alone_too=strategy == "fsdp"):
        compute, parallel = Compute(precision, "none", ""), ParallelConfig(strategy)
        model = build_model(CONFIG, toy_weights(CONFIG), compute, parallel, ALONE, device=torch.device(device))
        yield model, build_optimizer(model, OptimizerConfig(learning_rate=1e-3))


def backward(model: GPT, device: str, *, seed: int = 0) -> torch.Tensor:
    """The loss of one batch, whose gradients are there afterwards."""
    tokens = toy_tokens(CONFIG, n_rows=4, seed=seed).to(device)
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return loss.detach()


def copied(model: GPT, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """Weights, moments and step counters, whole and on the CPU, by the names they are stored under."""
    found = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    for name, slots in named_state(model, optimizer).items():
        found |= {f"optimizer.{name}.{slot}": tensor for slot, tensor in slots.items()}
    return {name: whole(tensor.detach()).to("cpu", copy=True) for name, tensor in found.items()}


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_a_step_in_bf16_is_that_of_the_cpu_up_to_rounding(strategy):
    """bf16 has 8 bits: sums in another order differ by some of their last ones."""
    with model_on("cpu", "bf16") as (model, optimizer):
        expected_loss = backward(model, "cpu")
        expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    with model_on(DEVICE, "bf16", strategy) as (model, optimizer):
        loss = backward(model, DEVICE)
        gradients = {name: whole(parameter.grad).cpu() for name, parameter in model.named_parameters()}
        before = copied(model, optimizer)
        optimizer.step()
        after = copied(model, optimizer)

    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-2)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert float((gradient - expected[name]).norm() / expected[name].norm()) < 5e-2, name
        moved = (after[f"model.{name}"] - before[f"model.{name}"]).abs().max()
        assert 0 < float(moved) < 2e-3, name  # AdamW's first step is as long as the rate, and a little decay


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_step_that_is_no_number_changes_no_bit_on_the_device(strategy, value):
    guard = Guard(GuardConfig(), torch.device(DEVICE))
    with model_on(DEVICE, "bf16", strategy) as (model, optimizer):
        for step, factor in enumerate((1.0, float(value), 1.0), 1):
            before = copied(model, optimizer)
            loss = backward(model, DEVICE, seed=step)
            for parameter in model.parameters():
                parameter.grad.mul_(factor)
            grad_norm = torch.stack([whole(parameter.grad).norm() for parameter in model.parameters()]).norm()
            optimizer.found_inf = guard.judge(loss, grad_norm, step)
            optimizer.step()
            optimizer.zero_grad()
            after = copied(model, optimizer)
            stays = step == 2
            assert all(torch.equal(after[name], tensor) for name, tensor in before.items()) == stays, step
    assert guard.total == 1


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_a_checkpoint_of_device_memory_is_that_of_its_moment_although_training_goes_on(tmp_path, strategy):
    with model_on(DEVICE, "bf16", strategy) as (model, optimizer):
        metadata: dict[str, Any] = {"model_config": CONFIG.to_dict()}
        with RunCheckpoints(tmp_path, CheckpointConfig(keep_last=9), metadata, device_type=DEVICE) as checkpoints:
            expected = {}
            for step in (1, 2, 3):  # the second copy goes into the memory of the first
                backward(model, DEVICE, seed=step)
                optimizer.step()
                expected[step] = copied(model, optimizer)
                checkpoints.save(model, optimizer, TrainState(step_count=step), periodic=True)
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(1.0)
                    for slots in named_state(model, optimizer).values():
                        for tensor in slots.values():
                            tensor.mul_(2.0)
        for step, tensors in expected.items():
            path = tmp_path / "checkpoints" / "stage-01" / f"step-{step:010d}"
            assert verify(path) == []
            stored = read_training(path).tensors
            assert set(stored) == set(tensors)
            assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items()), step


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not_to_the_bit(prepared, tmp_path: Path, size, precision):
    if DEVICE == "cuda" and torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    changes = {
        "device": DEVICE,
        "precision": precision,
        "compile": "none",
        "checkpoints": {"every_steps": 2, "keep_every_steps": 1},
    }
    whole_run, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_on(merge(of_processes(whole_run, prepared), changes), size, tmp_path / "first")
    cut_back(whole_run, stopped, 1, 4)
    again = run_on(merge(of_processes(stopped, prepared), changes), size, tmp_path / "second")
    assert "resumed from" in again.output()
    assert_same_end(stopped, whole_run)
