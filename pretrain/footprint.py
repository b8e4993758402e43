"""What the stages of a run take of each device's memory, and how much of it there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lit_gpt.available_memory import available_memory
from lit_gpt.flops import count_parameters
from lit_gpt.kernels.products import cpu_multiplies_bf16
from lit_gpt.memory import Computation, Memory, memory_per_device, memory_text
from pretrain.config import RunConfig
from pretrain.parallel import Compute, is_sharded
from pretrain.stages import Stage
from pretrain.world import World


def computation(config: RunConfig, stage: Stage, compute: Compute, world: World, device_type: str) -> Computation:
    """How a stage computes, as far as its memory depends on it."""
    sharded = is_sharded(config.parallel, world)
    return Computation(
        micro_batch_size=config.batch.micro_batch_size,
        precision=compute.precision,
        recompute=compute.recompute,
        compiled=compute.compile != "none",
        accumulates=config.batch.iters_per_step(world.size) > 1,
        device=device_type,
        cpu_has_bf16=device_type != "cpu" or cpu_multiplies_bf16(),
        shards=world.size // (config.parallel.replicas or 1) if sharded else 1,
        stays_gathered=not config.parallel.reshard_after_forward,
        replicated=config.parallel.strategy == "ddp" and world.size > 1,
        muon=stage.optimizer.name == "muon",
        eight_bit=stage.optimizer.name == "adamw8bit",
        frozen=stage.frozen,
    )


def stage_memory(config: RunConfig, stage: Stage, compute: Compute, world: World, device_type: str) -> Memory:
    """Of a stage's training steps; a teacher counts by its weights. A growth that is learned is not in it."""
    how = computation(config, stage, compute, world, device_type)
    memory = memory_per_device(stage.config, how)
    if stage.teaching is None:
        return memory
    return replace(memory, weights=memory.weights + how.stored * count_parameters(stage.teaching.config) / how.shards)


def memory_lines(
    config: RunConfig, stages: Sequence[Stage], compute: Compute, world: World, device: torch.device
) -> list[str]:
    """One line per stage, and what there is."""
    lines = [f"compute: {compute}"]
    for stage in stages:
        memory = stage_memory(config, stage, compute, world, device.type)
        lines.append(
            f"memory of stage {stage.index} {stage.name}: about {memory.total / 1e9:.3g} GB per device beside the "
            f"process itself, micro-batch {config.batch.micro_batch_size}; {memory_text(memory)}"
        )
    free = per_process(available_bytes(device), device, world)
    return lines if free is None else [*lines, f"memory that is free: {free / 1e9:.3g} GB"]


def available_bytes(device: torch.device) -> int | None:
    """Free on a CUDA device; for a CPU process what the machine and its control groups still have. None: not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()


def per_process(free: int | None, device: torch.device, world: World) -> int | None:
    """What a process may take of it: those of a node share its memory, and have a CUDA device each."""
    return free if free is None or device.type == "cuda" else free // world.local_size
