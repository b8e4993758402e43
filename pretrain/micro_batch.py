"""The micro-batch that a device has room for, where the settings leave it open (`batch.auto`).

Results do not depend on it but for rounding: a step's gradients are the same sum in another order. The choice goes into
the run's settings and checkpoints, and is made again only where another number of processes or kind of device goes on.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lit_gpt.model import InitialWeights
from pretrain.config import RunConfig, divisors
from pretrain.footprint import available_bytes, per_process, stage_memory
from pretrain.loggers import say
from pretrain.optim import build_optimizer
from pretrain.parallel import Compute, build_model, clip_gradients, device_type
from pretrain.stages import Stage
from pretrain.world import ALONE, World, in_turn

USABLE = 0.9  # of what is free: the estimate is no measurement, and others use a machine too
CPU_TOKENS = 2048  # larger micro-batches are no faster on a CPU: docs/performance.md


def undecided(config: RunConfig) -> RunConfig:
    """Settings that leave the micro-batch open, with one that fits any batch until it is chosen."""
    return with_micro_batch(config, 1) if config.batch.auto else config


def with_micro_batch(config: RunConfig, size: int) -> RunConfig:
    return dataclasses.replace(config, batch=dataclasses.replace(config.batch, micro_batch_size=size))


def as_before(config: RunConfig, own: dict[str, Any] | None, world: World) -> RunConfig:
    """With what the run chose when it began, if as many processes on the same kind of device go on.

    own: state.json of the run's last checkpoint.
    """
    size = chosen_before(config, own, world)
    return config if size is None else with_micro_batch(config, size)


def chosen_before(config: RunConfig, own: dict[str, Any] | None, world: World) -> int | None:
    """The micro-batch that a run goes on with; None: it chooses, or its settings say it."""
    if not config.batch.auto or own is None:
        return None
    compute, batch = own.get("compute", {}), own["run_config"]["batch"]
    alike = (compute.get("processes"), compute.get("device")) == (world.size, device_type(config))
    return batch["micro_batch_size"] if alike and batch.get("auto") else None


def decided(
    config: RunConfig,
    stages: Sequence[Stage],
    compute: Compute,
    world: World,
    device: torch.device,
    own: dict[str, Any] | None,
) -> RunConfig:
    """Settings with a micro-batch, chosen now if it is open; every process calls this.

    Raises:
        ValueError: not even one sequence fits.
    """
    if not config.batch.auto or chosen_before(config, own, world) is not None:
        return config
    size = choose_micro_batch(config, stages, compute, world, device)
    in_turn(world, lambda: check_chosen(size, device))
    say(f"micro-batch: {size} of {config.batch.global_batch_size} sequences (batch.auto)")
    return with_micro_batch(config, size)


def check_chosen(size: int, device: torch.device) -> None:
    """Refuse a micro-batch of nothing.

    Raises:
        ValueError: with what would help.
    """
    if size == 0:
        raise ValueError(
            f"batch.auto: not even one sequence at a time fits the memory of the {device.type}; use a smaller "
            f"model.block_size, activation_checkpointing=full, or more processes (pretrain --dry-run shows all terms)"
        )


def choose_micro_batch(
    config: RunConfig,
    stages: Sequence[Stage],
    compute: Compute,
    world: World,
    device: torch.device,
    *,
    may_try: bool = True,
) -> int:
    """The largest one that divides the batch and fits every stage, the same on every process; 0 if none does.

    On a CUDA device of its own a process tries real steps. By the estimate go several processes, as one of them that
    runs out of memory leaves the others waiting for it; a CPU; a run with a teacher, which is not in those steps; and
    all without `may_try`.
    """
    sizes = divisors(config.batch.global_batch_size // world.size)
    if device.type == "cpu":
        tokens = max(stage.config.block_size for stage in stages)
        sizes = [size for size in sizes if size == 1 or size * tokens <= CPU_TOKENS]
    free = per_process(available_bytes(device), device, world)

    def needs(stage: Stage, size: int) -> float:
        return stage_memory(with_micro_batch(config, size), stage, compute, world, device.type).total

    def is_estimated_to_fit(size: int) -> bool:
        return free is None or max(needs(stage, size) for stage in stages) <= USABLE * free

    fits = is_estimated_to_fit
    taught = any(stage.teaching is not None for stage in stages)
    if may_try and device.type == "cuda" and world.size == 1 and not taught:
        largest = max(stages, key=lambda stage: needs(stage, 1))

        def fits(size: int) -> bool:
            return survives_a_step(with_micro_batch(config, size), largest, compute, device)

    return min(world.gather(largest_that_fits(sizes, fits)))


def largest_that_fits(sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The largest of ascending sizes that fits, 0 if none does; asked from small to large, about doubling each time,
    so that nothing far too large is tried."""
    low, high, at = -1, len(sizes), 0
    while at < high:
        if not fits(sizes[at]):
            high = at
            break
        low = at
        at = next((n for n in range(at + 1, high) if sizes[n] >= 2 * sizes[at]), max(at + 1, high - 1))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low] if low >= 0 else 0


def survives_a_step(config: RunConfig, stage: Stage, compute: Compute, device: torch.device) -> bool:
    """Whether two steps (the second has all moments) of the stage's model end without running out of the device's
    memory, of which all is free again afterwards. Blocks run eagerly, which takes more than compiled ones."""
    try:
        _two_steps(config, stage, dataclasses.replace(compute, compile="none"), device)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _two_steps(config: RunConfig, stage: Stage, compute: Compute, device: torch.device) -> None:
    weights = InitialWeights(stage.config, config.seed)
    model = build_model(stage.config, weights, compute, config.parallel, ALONE, device=device, frozen=stage.frozen)
    optimizer = build_optimizer(model, stage.optimizer)
    shape = config.batch.micro_batch_size, stage.config.block_size
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    iters = min(2, config.batch.iters_per_step(1))  # from the second on the gradients of others are there
    for _ in range(2):
        for _ in range(iters):
            model(tokens, tokens).backward()
        clip_gradients([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
