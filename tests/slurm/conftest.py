"""A private SLURM of two nodes for the tests of this folder: `slurm.submit()`, `slurm.wait()`, `slurm.output()`."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("mini_slurm.sh")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("sbatch", "scontrol", "slurmctld", "slurmd", "munged")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")
NO_TASK = 4294967294  # what SLURM calls the task of a job that is no array


class Slurm:
    """A running SLURM. Jobs write their output to one file per task."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs = folder / "output"
        self.logs.mkdir()

    def environment(self, **more: str) -> dict[str, str]:
        """The variables of this process without those of a SLURM around it, and with the private one's."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        path = f"{own.get('PATH', os.defpath)}:/usr/sbin:/sbin"
        return own | {"PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf"), **more}

    def command(self, *arguments: str | Path) -> str:
        """stdout of a command such as scontrol or scancel; fails with its stderr."""
        done = subprocess.run(
            list(map(str, arguments)), env=self.environment(), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{shlex.join(map(str, arguments))}: {done.stderr}"
        return done.stdout

    def submit(
        self,
        script: Path,
        *arguments: str | Path,
        options: Sequence[str] = (),
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> int:
        """Submit a batch script; returns the job's number.

        options: of sbatch, for example `--array=0-2`. cwd: where the user stands.
        """
        command = ["sbatch", "--parsable", f"--output={self.logs}/%A_%a.log", *options, script, *arguments]
        done = subprocess.run(
            list(map(str, command)),
            env=self.environment(**(environment or {})),
            cwd=cwd or self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split(";")[0])

    def states(self, job: int) -> dict[int, str]:
        """State of each task that SLURM knows; a job that is no array has the single task `NO_TASK`."""
        records = self.command("scontrol", "--oneliner", "show", "job", str(job)).splitlines()
        found = {}
        for record in records:
            fields = dict(re.findall(r"(\w+)=(\S*)", record))
            task = fields.get("ArrayTaskId", str(NO_TASK))
            if task.isdigit():  # a list such as 1-2%1 stands for tasks that wait
                found[int(task)] = fields["JobState"]
            else:
                found.update({int(each): "PENDING" for each in _numbers(task)})
        return found

    def wait(self, job: int, timeout_s: float = 120) -> dict[int, str]:
        """Wait until every task has ended; returns their states."""
        states: dict[int, str] = {}

        def has_ended() -> bool:
            nonlocal states
            states = self.states(job)
            return all(state in ENDED for state in states.values())

        self.wait_until(has_ended, f"the end of job {job}", timeout_s)
        return states

    def requeue(self, job: int, task: int = NO_TASK) -> None:
        """Take a job or task from its node, and let it start again in three seconds, where SLURM would take minutes."""
        name = str(job) if task == NO_TASK else f"{job}_{task}"
        self.command("scontrol", "requeue", name)
        self.wait_until(lambda: self.states(job)[task] == "PENDING", f"{name} to be queued again")
        # not at once: in the same second the node refuses it, as one that was revoked
        self.command("scontrol", "update", f"jobid={name}", "starttime=now+3")

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
        """Wait for anything; fails with SLURM's queue when it does not come."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {what}:\n{self.command('squeue')}"
            time.sleep(0.05)

    def output(self, job: int, task: int = NO_TASK) -> str:
        """What a task has printed so far, stdout and stderr together."""
        path = self.logs / f"{job}_{task}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _numbers(tasks: str) -> Iterator[int]:
    """0,2-3%1 -> 0, 2, 3"""
    for part in tasks.split("%")[0].split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _free_port() -> int:
    """A port that is free, as are the two after it."""
    for port in range(20_000 + os.getpid() % 10_000, 60_000, 3):
        with socket.socket() as one, socket.socket() as two, socket.socket() as three:
            try:
                for offset, each in enumerate((one, two, three)):
                    each.bind(("127.0.0.1", port + offset))
            except OSError:
                continue
            return port
    pytest.skip("no three free ports in a row")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """SLURM's own daemons under a temporary folder, stopped at the end."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(
            f"{', '.join(missing)} not installed; on Debian: apt-get install slurmctld slurmd slurm-client munge"
        )
    folder = tmp_path_factory.mktemp("slurm")
    private = Slurm(folder)
    log = folder / "start.log"

    def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        with log.open("a") as out:  # not a pipe: the daemons inherit it, and it would never end
            command = ["bash", str(SCRIPT), *arguments]
            return subprocess.run(command, env=private.environment(), stdout=out, stderr=out, timeout=120)

    try:
        started = run("start", str(folder), str(_free_port()))
        assert started.returncode == 0, f"SLURM did not start:\n{log.read_text()}"
        yield private
    finally:
        run("stop", str(folder))
