"""The processes of a run: who started them, which one this is, how they meet and agree. No device is touched here.

torchrun, srun and a single process are recognised by what each leaves in the environment; what would hang or train
several times in silence is refused with the command that works.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lit_gpt.errors import exit_code

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store

T = TypeVar("T")
STORE_FILE = "PRETRAIN_STORE"
"""Environment variable: a file by which processes on one machine meet, instead of MASTER_ADDR and MASTER_PORT."""
MEETING_SECS = 120  # a process that does not come in this time does not come
COLLECTIVE_SECS = 1800  # a checkpoint of a slow file system lies between two collectives


@dataclass(frozen=True)
class World:
    """The processes of a run and this one's place among them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this node: the number of its device."""
    local_size: int = 1
    launcher: str = "single"
    """single, torchrun, srun or environment (RANK and WORLD_SIZE set by hand)."""
    attempt: int = 0
    """How often the processes were started again under the same launcher."""
    group: Any = None
    """Whose collectives are used; None: those of the group of all, which belong to the main thread."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @property
    def n_nodes(self) -> int:
        return max(1, self.size // self.local_size)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process; every process must ask."""
        if self.size == 1:
            return flag
        import torch
        import torch.distributed as dist

        answer = torch.tensor(int(flag))
        dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=self.group)
        return bool(answer)

    def sum(self, table: np.ndarray) -> np.ndarray:
        """The sum over all processes of a table that each has in the same shape."""
        if self.size == 1:
            return table
        import torch
        import torch.distributed as dist

        total = torch.from_numpy(table.copy())
        dist.all_reduce(total, group=self.group)
        return total.numpy()

    def mean_(self, value: Tensor) -> Tensor:
        """The mean over all processes of a tensor on the training device, in place."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(value)
            value /= self.size
        return value

    def broadcast(self, value: Any) -> Any:
        """What the first process passes, on every process."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """What every process passes, by rank, on every process."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.any(False)

    def apart(self) -> World:
        """The same processes with collectives of their own, on the CPU, for a thread; every process must ask."""
        if self.size == 1:
            return self
        import torch.distributed as dist

        return replace(self, group=dist.new_group(backend="gloo", timeout=timedelta(seconds=COLLECTIVE_SECS)))


ALONE = World()
"""A single process."""


def in_turn(world: World, work: Callable[[], T]) -> T:
    """What `work` returns, done by the first process and then by all others, which find what it left behind.

    If it fails on any, all processes end, and only those on which it failed say why.
    """
    if world.size == 1:
        return work()
    result: Any = None
    for has_turn in (world.is_first, not world.is_first):
        failed: Exception | None = None
        try:
            result = work() if has_turn else result
        except Exception as error:
            failed = error
        codes = world.gather(None if failed is None else exit_code(failed))
        if failed is not None:
            raise failed
        code = next((code for code in codes if code is not None), None)
        if code is not None:
            raise SystemExit(code)
    return result


def find_world(env: Mapping[str, str] = os.environ) -> World:
    """Which processes there are, from what launchers leave in the environment.

    Raises:
        ValueError: a start that would hang, or train several times; the message has the command that works.
    """
    if "TORCHELASTIC_RUN_ID" in env:
        return World(
            rank=_number(env, "RANK"),
            size=_number(env, "WORLD_SIZE"),
            local_rank=_number(env, "LOCAL_RANK"),
            local_size=_number(env, "LOCAL_WORLD_SIZE"),
            launcher="torchrun",
            attempt=int(env.get("TORCHELASTIC_RESTART_COUNT", 0)),
        )
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        return _slurm_step(env)
    tasks, nodes = (_count(env.get(name)) for name in ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES"))
    if "SLURM_JOB_ID" in env and max(tasks, nodes) > 1:
        raise ValueError(
            f"this is an allocation of {nodes} node(s) and {tasks} SLURM task(s), and pretrain was started outside a "
            f"step, where it would be one process that has to do all; start it with srun: srun python -m pretrain ..."
        )
    if int(env.get("WORLD_SIZE") or 1) > 1:
        return _by_hand(env)
    return World()


def is_started_again(world: World, env: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher repeated the command: torchrun after a death, SLURM in a job that it queued again."""
    return world.attempt > 0 or int(env.get("SLURM_RESTART_COUNT") or 0) > 0


def _slurm_step(env: Mapping[str, str]) -> World:
    """A task of a step; SLURM's names for the job, and not those for the step, would be wrong in a part of a job."""
    size = _number(env, "SLURM_STEP_NUM_TASKS")
    per_node = env.get("SLURM_STEP_TASKS_PER_NODE") or str(size)
    local_sizes = {int(count) for count in re.findall(r"(\d+)(?:\(x\d+\))?", per_node)}  # of SLURM's 2(x3),1
    if len(local_sizes) != 1:
        raise ValueError(
            f"the step has {size} tasks, and not equally many on every node ({per_node}); give srun --ntasks-per-node"
        )
    return World(
        rank=_number(env, "SLURM_PROCID"),
        size=size,
        local_rank=_number(env, "SLURM_LOCALID"),
        local_size=local_sizes.pop(),
        launcher="srun",
        attempt=int(env.get("SLURM_RESTART_COUNT", 0)),
    )


def _count(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 1


def device_index(world: World, visible: int, env: Mapping[str, str] = os.environ) -> int:
    """Which of the CUDA devices that this process sees is its own.

    Raises:
        ValueError: there are fewer devices than processes.
    """
    if world.local_size <= visible:
        return world.local_rank
    if visible == 1 and world.launcher == "srun" and _binds_devices(env):
        return 0  # each task sees another one
    raise ValueError(
        f"{world.local_size} processes on this node and {visible} CUDA device(s); start one process per device "
        f"(srun --ntasks-per-node, torchrun --nproc-per-node)"
    )


def _binds_devices(env: Mapping[str, str]) -> bool:
    """Whether SLURM shows every task devices of its own; the names changed over its versions."""
    named = ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND")
    return any(env.get(name) for name in named) or "gpu" in env.get("SLURM_TRES_PER_TASK", "")


def _by_hand(env: Mapping[str, str]) -> World:
    if "RANK" not in env:
        raise ValueError(
            f"WORLD_SIZE={env['WORLD_SIZE']} without RANK: start the processes with torchrun or srun, "
            f"or unset WORLD_SIZE"
        )
    size = _number(env, "WORLD_SIZE")
    return World(
        rank=_number(env, "RANK"),
        size=size,
        local_rank=int(env.get("LOCAL_RANK", env["RANK"])),
        local_size=int(env.get("LOCAL_WORLD_SIZE", size)),
        launcher="environment",
    )


def _number(env: Mapping[str, str], name: str) -> int:
    value = env.get(name, "")
    if not value.isdecimal():
        raise ValueError(f"{name}={value!r} must be a number; start with torchrun, srun, or as a single process")
    return int(value)


@contextmanager
def connected(
    world: World, device_type: str, env: Mapping[str, str] = os.environ, *, alone_too: bool = False
) -> Iterator[None]:
    """The processes of a world, met: collectives work inside. A single process meets nobody, or itself `alone_too`.

    Raises:
        ValueError: the name of the first node does not resolve, or nobody came in time.
    """
    if world.size == 1 and not alone_too:
        yield
        return
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _set_pg_timeout  # torchtitan's way too: there is no public one

    try:
        store = dist.PrefixStore(f"attempt-{world.attempt}", _store(world, env))
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "cpu:gloo"
        dist.init_process_group(
            backend,
            store=store,
            rank=world.rank,
            world_size=world.size,
            timeout=timedelta(seconds=MEETING_SECS),
        )
        world.barrier()
        _set_pg_timeout(timedelta(seconds=COLLECTIVE_SECS))
    except RuntimeError as error:
        if dist.is_initialized():
            dist.destroy_process_group()
        why = str(error).splitlines()[0]
        raise ValueError(
            f"process {world.rank} of {world.size} could not meet the others within {MEETING_SECS} s ({why}); "
            f"see whether all of them run, and whether MASTER_ADDR and MASTER_PORT reach the first"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def _store(world: World, env: Mapping[str, str]) -> Store:
    """Where the processes meet. torchrun's own store survives a restart, and so do the addresses of the dead in it."""
    import torch.distributed as dist

    timeout = timedelta(seconds=MEETING_SECS)
    if world.size == 1:
        return dist.HashStore()
    if env.get(STORE_FILE):
        store = dist.FileStore(env[STORE_FILE], world.size)
        store.set_timeout(timeout)
        return store
    address, port = _meeting_point(world, env)
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        raise ValueError(
            f"the first node is called {address!r}, which does not resolve ({error}); set MASTER_ADDR to its address"
        ) from error
    hosts = world.launcher != "torchrun" and world.is_first  # torchrun's agent hosts it
    return dist.TCPStore(address, port, world.size, is_master=hosts, timeout=timeout, wait_for_workers=False)


def _meeting_point(world: World, env: Mapping[str, str]) -> tuple[str, int]:
    if env.get("MASTER_ADDR") and env.get("MASTER_PORT"):
        return env["MASTER_ADDR"], _number(env, "MASTER_PORT")
    if world.launcher != "srun":
        raise ValueError("MASTER_ADDR and MASTER_PORT must be set where processes are started by hand; use torchrun")
    job, step = _number(env, "SLURM_JOB_ID"), _number(env, "SLURM_STEP_ID")
    return env.get("MASTER_ADDR") or _first_node(env), 20000 + (job * 31 + step) % 20000


def _first_node(env: Mapping[str, str]) -> str:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    try:
        found = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return found.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise ValueError(f"scontrol cannot name the nodes of {nodes!r} ({error}); set MASTER_ADDR") from error
