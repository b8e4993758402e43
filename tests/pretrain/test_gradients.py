"""Every parameter has its gradient after every pattern of accumulation, and its initial value in every world."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.forked import start_function
from lit_gpt.config import Config
from lit_gpt.model import GPT, InitialWeights
from pretrain.config import ParallelConfig, StageConfig
from pretrain.guards import Guard
from pretrain.parallel import Compute, average, build_model, gradients_shared, launch, replicate, whole
from pretrain.training import Trained
from pretrain.world import World, connected, find_world
from tests.pretrain.test_stages import run_config
from tests.toys import toy_config, toy_model, toy_tokens, toy_weights

CPU = torch.device("cpu")
# name: how the model is shared, what is recomputed, and whether its embedding is its head
WAYS = {
    "sharded": (ParallelConfig("fsdp"), "none", False),
    "weights stay gathered": (ParallelConfig("fsdp", reshard_after_forward=False), "none", True),
    "two replicas": (ParallelConfig("fsdp", replicas=2), "selective", False),
    "sharded, recomputed, tied": (ParallelConfig("fsdp"), "full", True),
    "replicated": (ParallelConfig("ddp"), "none", True),
}
PATTERN = (1, 3, 2, 1)
"""Forward passes of steps in a row: after an accumulation gradients must be shared again, and the other way round."""


def shared(config: Config, weights, world: World, way: str) -> GPT:
    parallel, recompute, _ = WAYS[way]
    compute = Compute("fp32", "none", "", recompute)
    return build_model(config, weights, compute, parallel, world, device=CPU)


def as_it_trains(model: GPT, world: World, parallel: ParallelConfig) -> Trained:
    """A model as the loop calls it, without an optimizer: nothing is updated here."""
    settings = run_config(StageConfig("main", max_steps=1), device="cpu")
    fabric = launch(settings, world)
    module = fabric.setup_module(replicate(model, parallel, world, CPU), move_to_device=False)
    return Trained(model, module, None, Guard(settings.guards, CPU))


def accumulate(trained: Trained, world: World, rows: torch.Tensor, iters: int) -> None:
    """What a training step does before its update. rows: (iters * world.size, T + 1), those of all processes."""
    own = rows.reshape(world.size, iters, 1, -1)[world.rank]
    for i in range(iters):
        with gradients_shared(trained, world, last=i == iters - 1):
            (trained.module(own[i][:, :-1], own[i][:, 1:]) / iters).backward()


def check_gradients(world: World, way: str) -> None:
    parallel, _, tied = WAYS[way]
    config = toy_config(tie_embeddings=tied)
    trained = as_it_trains(shared(config, toy_weights(config), world, way), world, parallel)
    for step, iters in enumerate(PATTERN):
        rows = toy_tokens(config, n_rows=iters * world.size, seed=step)
        accumulate(trained, world, rows, iters)
        plain = toy_model(config)
        plain(rows[:, :-1], rows[:, 1:]).backward()
        for name, expected in plain.named_parameters():
            parameter = trained.model.get_parameter(name)
            assert parameter.grad is not None, (way, step, name)
            found = whole(parameter.grad)
            torch.testing.assert_close(found, expected.grad, rtol=1e-4, atol=1e-6, msg=f"{way}, step {step}: {name}")
            parameter.grad = None


def check_initial_weights(world: World, way: str) -> None:
    """A layer's first weights depend on the seed and its name: on no generator, no process and no number of them."""
    torch.manual_seed(world.rank)
    config = toy_config(tie_embeddings=WAYS[way][2])
    initial = InitialWeights(config, 7)
    model = shared(config, initial, world, way)
    for name, parameter in model.named_parameters():
        assert torch.equal(whole(parameter.detach()), initial[name]), (way, name)
    one, other = (initial[f"transformer.h.{layer}.attn.attn.weight"] for layer in (0, 1))
    assert not torch.equal(one, other)


def check_sums(folder: Path) -> None:
    """256 + 1 is 256 in bf16, so that a sum in it depends on who comes first; the mean of 256, 1, 1 is 86."""
    world = find_world()
    values = torch.tensor([256.0, 1.0, 1.0]).roll(world.rank)
    gradients = [values.bfloat16().reshape(3, 1), values.clone()]
    with connected(world, "cpu"):
        average(gradients, world)
    for gradient in gradients:
        assert torch.equal(gradient.flatten(), torch.full((3,), 86.0, dtype=gradient.dtype)), gradient
    (folder / f"{world.rank}").touch()


def check_all(folder: Path) -> None:
    world = find_world()
    with connected(world, "cpu", alone_too=True):
        for way, (parallel, _, _) in WAYS.items():
            if world.size % (parallel.replicas or 1):
                continue
            check_gradients(world, way)
            check_initial_weights(world, way)
    (folder / f"{world.rank}").touch()


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
def test_gradients_are_there_after_every_accumulation_and_weights_begin_the_same(size, tmp_path):
    run_checks(check_all, size, tmp_path)


@pytest.mark.slow
def test_gradients_in_bf16_are_summed_in_fp32(tmp_path):
    run_checks(check_sums, 3, tmp_path)


def run_checks(checks: Callable[[Path], None], size: int, folder: Path) -> None:
    started = start_function(checks, (folder,), size, folder / "logs")
    assert started.wait() == [0] * size, started.errors()
    assert all((folder / f"{rank}").exists() for rank in range(size))
