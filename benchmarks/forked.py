"""`pretrain` on several processes of this machine, forked from one that has imported torch already.

They are real processes, which meet by a file and can be killed; only the seconds of importing are spared.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from pretrain.world import STORE_FILE

PRELOADED = ["pretrain.run", "torch.distributed.fsdp", "torch.distributed.checkpoint", "lightning_fabric"]


@dataclass(frozen=True)
class Started:
    """The processes of one command, by rank, and what they wrote."""

    processes: list[BaseProcess]
    folder: Path

    @property
    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        """SIGKILL, all of them."""
        for process in self.processes:
            process.kill()
        self.wait()

    def wait(self, seconds: float = 300) -> list[int]:
        """Exit codes, by rank.

        Raises:
            TimeoutError: after so many seconds; they are killed then.
        """
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        if self.is_alive:
            for process in self.processes:
                process.kill()
            raise TimeoutError(f"still running after {seconds} s; {self.errors(0)}")
        return [process.exitcode or 0 for process in self.processes]

    def output(self, rank: int = 0) -> str:
        return (self.folder / f"{rank}.out").read_text()

    def errors(self, rank: int = 0) -> str:
        """stderr without a remark of torch's, made where its modules were imported before the processes met."""
        lines = (self.folder / f"{rank}.err").read_text().splitlines(keepends=True)
        return "".join(line for line in lines if "Assuming no hooks are registered" not in line)


def start(arguments: list[str], size: int, folder: Path) -> Started:
    """`pretrain` with these arguments as `size` processes; their output goes to files in a new `folder`."""
    return start_function(pretrain, (arguments,), size, folder)


def start_function(function: Callable[..., None], arguments: tuple[Any, ...], size: int, folder: Path) -> Started:
    """A function of a module as `size` processes that find each other; their output goes to files in a new `folder`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    folder.mkdir(parents=True)
    for rank in range(size):
        (folder / f"{rank}.out").touch()
        (folder / f"{rank}.err").touch()
    processes = [
        context.Process(target=_run, args=(function, arguments, rank, size, folder), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return Started(processes, folder)


def _run(function: Callable[..., None], arguments: tuple[Any, ...], rank: int, size: int, folder: Path) -> None:
    for descriptor, suffix in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{rank}.{suffix}", os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.update(place(rank, size, folder / "store"))
    function(*arguments)


def place(rank: int, size: int, store: Path) -> dict[str, str]:
    """The variables by which a process knows its place among `size` that meet by the file `store`."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, STORE_FILE: store}
    return {name: str(value) for name, value in own.items()} if size > 1 else {}


def pretrain(arguments: list[str]) -> None:
    """The command with these arguments, in this process, which ends with it."""
    sys.argv = ["pretrain", *arguments]
    from pretrain.__main__ import main

    sys.exit(main())
