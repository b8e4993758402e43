"""Where a run computes: the Fabric frame, precision and compilation, and how processes share a model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_gpt.config import Config
from lit_gpt.kernels.backend import Situation, find_cpp_compiler
from lit_gpt.kernels.choice import Kernels, resolve
from lit_gpt.kernels.fp8 import missing, to_fp8
from lit_gpt.kernels.products import multiplies_bf16
from lit_gpt.kernels.self_check import self_check
from lit_gpt.kernels.settings import BackendUnavailable
from lit_gpt.lazy_tensors import fill_from, is_shared
from lit_gpt.model import GPT, RMSNorm
from pretrain.compilation import compile_model
from pretrain.config import ParallelConfig, RunConfig
from pretrain.optimizers import adamw8bit_missing
from pretrain.world import World, device_index

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from pretrain.training import Trained

# Compiling blocks and loss costs 5 to 20 s cold on a CPU and is repaid after about this many tokens of a small model
REPAID_AFTER_TOKENS = 400_000


@dataclass(frozen=True)
class Compute:
    """How the model computes, and why."""

    precision: str
    """fp32, bf16 or bf16-true."""
    compile: str
    """none, block or model."""
    reason: str
    """For the log: what decided."""
    recompute: str = "none"
    """none, selective or full: activation checkpointing."""
    kernels: Kernels = Kernels()
    """What the operations are computed by."""
    fp8: str = "none"
    """none, tensorwise or rowwise: scales of 8-bit products in blocks."""

    def __str__(self) -> str:
        fp8 = "" if self.fp8 == "none" else f", fp8 {self.fp8}"
        return f"{self.precision}, compile {self.compile}{fp8} ({self.reason})"

    @property
    def dtype(self) -> torch.dtype:
        """In which blocks compute."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    @property
    def compute_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.precision == "bf16" else None


def launch(config: RunConfig, world: World) -> Fabric:
    """The Fabric frame of this process, on its device; how processes share the work is `build_model`'s business.

    Raises:
        ValueError: the device is not there.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment

    check_device(config)
    accelerator = device_type(config)
    device = [device_index(world, torch.cuda.device_count())] if accelerator == "cuda" else 1
    # each process is one to Fabric, also under SLURM: it would look for srun and start a process group of its own
    fabric = Fabric(accelerator=accelerator, devices=device, precision="32-true", plugins=[LightningEnvironment()])
    fabric.launch()
    return fabric


def device_type(config: RunConfig) -> str:
    """cuda or cpu: what this process would train on, see `check_device`."""
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def check_device(config: RunConfig) -> None:
    """Refuse a device that this process does not have, and an optimizer that cannot run on it.

    Raises:
        ValueError: neither cuda nor cpu is asked for, or CUDA where there is none, or what the optimizer needs is not.
    """
    if config.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={config.device!r} must be auto, cpu or cuda")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA device; use device=auto or cpu")
    reason = adamw8bit_missing(device_type(config)) if config.optimizer.name == "adamw8bit" else None
    if reason:
        raise ValueError(f"optimizer.name=adamw8bit {reason}; or use optimizer.name=adamw")


def check_alike(found_by_rank: Sequence[str]) -> None:
    """Refuse processes that would wait for one another in collectives of other kinds.

    found_by_rank: precision and device that each process comes to.

    Raises:
        ValueError: naming them.
    """
    ranks: dict[str, list[int]] = {}
    for rank, found in enumerate(found_by_rank):
        ranks.setdefault(found, []).append(rank)
    if len(ranks) > 1:
        lines = [f"  {found}: process {', '.join(map(str, each))}" for found, each in ranks.items()]
        raise ValueError(
            "\n".join(["the processes of a run must compute alike, and they found", *lines])
            + "\nLeave out the nodes that differ (a CUDA driver that does not answer, say), or give --device and "
            + "--precision that all of them have"
        )


def check_world(config: RunConfig, world: World) -> None:
    """Refuse what these processes cannot share evenly.

    Raises:
        ValueError: with the values that can be.
    """
    config.batch.iters_per_step(world.size)
    if config.optimizer.name == "muon" and is_sharded(config.parallel, world):
        raise ValueError(
            "optimizer.name=muon needs whole matrices, and here every process holds a part of each; use "
            "--parallel.strategy ddp, or optimizer.name=adamw"
        )
    replicas = config.parallel.replicas
    if replicas is not None and (replicas < 1 or world.size % replicas):
        fits = [n for n in range(1, world.size + 1) if world.size % n == 0]
        raise ValueError(
            f"parallel.replicas={replicas} must divide the {world.size} processes; "
            f"it can be {', '.join(map(str, fits))}"
        )
    if replicas not in (None, 1) and config.parallel.strategy == "ddp":
        raise ValueError("parallel.replicas has no effect with strategy=ddp, where each process is one; remove it")


def describe_world(parallel: ParallelConfig, world: World) -> str:
    """For the log: how many processes share the work, and how."""
    how = "each with the whole model (DDP)"
    if is_sharded(parallel, world):
        replicas = parallel.replicas or 1
        how = f"the model sharded over {world.size // replicas}" + (f", {replicas} replicas" if replicas > 1 else "")
    return f"{world.size} on {world.n_nodes} node(s), started by {world.launcher}, {how}"


def choose_compute(config: RunConfig, device: torch.device, total_tokens: int) -> Compute:
    """Resolve `precision` and `compile`.

    Raises:
        ValueError: compile was asked for on a CPU without a C++ compiler.
    """
    compute = _choose_compute(config, device, total_tokens)
    return dataclasses.replace(compute, recompute=config.activation_checkpointing, fp8=config.fp8)


def _choose_compute(config: RunConfig, device: torch.device, total_tokens: int) -> Compute:
    has_bf16 = multiplies_bf16(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    hardware = f"{name} {'multiplies' if has_bf16 else 'does not multiply'} bf16"
    precision = config.precision if config.precision != "auto" else "bf16" if has_bf16 else "fp32"
    compiler = find_cpp_compiler()
    if config.compile != "auto":
        if config.compile != "none" and device.type == "cpu" and compiler is None:
            raise ValueError(f"compile={config.compile} needs a C++ compiler (g++, clang++ or $CXX); use compile=none")
        return Compute(precision, config.compile, f"{hardware}; compile as asked")
    if device.type == "cuda":
        return Compute(precision, "block", hardware)
    if precision == "fp32":
        return Compute(precision, "none", f"{hardware}, fp32 runs eagerly")
    if compiler is None:
        return Compute(precision, "none", f"{hardware}, no C++ compiler to compile with")
    if total_tokens < REPAID_AFTER_TOKENS:
        return Compute(precision, "none", f"{hardware}, {total_tokens:,} tokens do not repay compiling")
    return Compute(precision, "block", f"{hardware}, compiled with {os.path.basename(compiler)}")


def _fp8_missing(compute: Compute, device: torch.device) -> str | None:
    """Why 8-bit products that are asked for cannot be made on a device; None if they can, or are not asked for."""
    reason = None if compute.fp8 == "none" else missing(Situation.on(device))
    return reason and f"fp8={compute.fp8} cannot be used here: {reason}; or leave fp8 out"


def with_kernels(
    compute: Compute, config: RunConfig, device: torch.device, models: Sequence[Config], separator_id: int | None
) -> Compute:
    """Resolve `kernels` for all models of a run, and see that what was chosen computes as it should.

    Raises:
        BackendUnavailable: one that was named, or fp8, cannot run here, or is wrong.
    """
    situation = Situation.on(
        device,
        dtype=compute.dtype,
        compiled=compute.compile != "none",
        masked=separator_id is not None or any(m.slides(layer) for m in models for layer in range(m.n_layer)),
        head_sizes=tuple(sorted({model.head_size for model in models})),
        n_embd=max(model.n_embd for model in models),
    )
    if reason := _fp8_missing(compute, device):
        raise BackendUnavailable(reason)
    kernels = resolve(config.kernels, situation)
    self_check(kernels, situation, device)
    return dataclasses.replace(compute, kernels=kernels)


def build_model(
    config: Config,
    weights: Mapping[str, Tensor],
    compute: Compute,
    parallel: ParallelConfig,
    world: World,
    *,
    device: torch.device,
    frozen: Collection[str] = (),
) -> GPT:
    """A model that computes as it is to, its parts where they belong, with its weights.

    It is built without memory first; then every process makes room for its own part and fills it, one parameter at a
    time, so that no process ever holds the whole of a sharded model.

    Args:
        config: sizes.
        weights: parameter name -> whole tensor; a lazy mapping is read one tensor after the other.
        compute: precision and compilation.
        parallel: how processes share the model.
        world: the processes.
        device: of this process.
        frozen: parameters that do not train.
    """
    with torch.device("meta"):
        model = GPT(config)
    if compute.precision == "bf16-true":
        model.to(torch.bfloat16)
    model.compute_dtype = compute.compute_dtype
    for block in model.transformer.h:
        block.recompute = compute.recompute
    model.use_kernels(compute.kernels)
    if compute.fp8 != "none":
        to_fp8(model, compute.fp8)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    compile_model(model, compute.compile)
    if is_sharded(parallel, world):
        _shard(model, compute, parallel, world, device)
    model.to_empty(device=device)
    if config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight  # each got a memory of its own
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill_from(weights, name, parameter)
    return model


def is_sharded(parallel: ParallelConfig, world: World) -> bool:
    """Whether every process holds a part of the model only."""
    return parallel.strategy == "fsdp" or (parallel.strategy == "auto" and world.size > 1)


def _shard(model: GPT, compute: Compute, parallel: ParallelConfig, world: World, device: torch.device) -> None:
    """FSDP2: a unit per block, and one of embedding and head; it computes what a single process does.

    A block's weights travel in the dtype in which its products take them. Embedding and head stay in their own, as
    their gradients are summed in it. So do norm weights, which every process holds whole: they are small, and a unit
    has one dtype.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    replicas = parallel.replicas or 1
    if replicas > 1:
        mesh = init_device_mesh(device.type, (replicas, world.size // replicas), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (world.size,), mesh_dim_names=("shard",))
    norms = {p for module in model.modules() if isinstance(module, RMSNorm) for p in module.parameters()}
    # inputs are not cast: RoPE wants its angles in fp32
    policy = MixedPrecisionPolicy(compute.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard(
            block,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=parallel.reshard_after_forward,
            ignored_params=norms,
        )
    own = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=own, ignored_params=norms)
    register_fsdp_forward_method(model, "hidden")  # a student's and a teacher's door


def replicate(module: nn.Module, parallel: ParallelConfig, world: World, device: torch.device) -> nn.Module:
    """The module behind DDP where that is asked for; a sharded or single one as it is."""
    if parallel.strategy != "ddp" or world.size == 1:
        return module
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)


@contextmanager
def gradients_shared(trained: Trained, world: World, *, last: bool) -> Iterator[None]:
    """Around one forward and backward: gradients are averaged over the processes in the last one of a step.

    With Fabric's `no_backward_sync` a sharded model is left without gradients (seen in 2.6.6), so it is not used.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    module = trained.module.module  # what Fabric wraps
    if isinstance(module, DistributedDataParallel) and trained.taught is None:
        with nullcontext() if last else module.no_sync():
            yield
        return
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
        module.set_is_last_backward(last)
    yield
    if last:
        # what is not sharded: norms, a growth that is learned, and all of a student, whose teacher's module calls it
        # past DDP, which then does nothing
        average([p.grad for p in trained.parameters if p.grad is not None and not is_shared(p)], world)


def average(gradients: Sequence[Tensor], world: World) -> None:
    """Replace gradients that every process holds whole by their means over the processes, summed in fp32, at once."""
    if world.size == 1 or not gradients:
        return
    means = world.mean_(torch.cat([gradient.float().flatten() for gradient in gradients]))
    for gradient, mean in zip(gradients, means.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients in place so that their norm is at most `max_norm`.

    As torch's clip_grad_norm_, which refuses parameters of which some are shared and others are whole on each process.

    Returns:
        The norm that they had: a scalar, the same on every process, that is not waited for.
    """
    trained = [p for p in parameters if p.grad is not None]
    kinds = [kind for shared in (True, False) if (kind := [p for p in trained if is_shared(p) == shared])]
    norms = [whole(nn.utils.get_total_norm([p.grad for p in kind])) for kind in kinds]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, max_norm, norm)
    return norm


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which every process holds a part, gathered; any other one as it is."""
    return tensor.full_tensor() if is_shared(tensor) else tensor
