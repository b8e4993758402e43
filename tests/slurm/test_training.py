"""Training under a real SLURM: who is who, signals, requeue, the time limit, a lost task, and the whole recipe."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lit_gpt.tokenizer import Tokenizer
from tests.pretrain.conftest import write_prepared

pytestmark = pytest.mark.slurm

TOY = {
    "model": {"name": "2L16H", "block_size": 16, "n_head": 2, "intermediate_size": 32, "head_size": 8},
    "precision": "fp32",
    "device": "cpu",
    "logging": {"tensorboard": False},
    "validation": {"max_tokens": 160},
    "data": {"max_epochs": 10_000},
}
QUICK = ("--gres=none", "--cpus-per-task=1", "--time=10")
STARTED_SECS = 240  # SLURM queues a job again, two minutes later, whose launch failed on a busy machine


@pytest.fixture(scope="module")
def data(tmp_path_factory, root: Path) -> Path:
    text = (root / "LICENSE").read_text(encoding="utf-8")
    return write_prepared(tmp_path_factory.mktemp("training") / "data", Tokenizer.load("bytes").encode(text))


@pytest.fixture(scope="module")
def toy(data: Path) -> Path:
    """Settings that make a model small."""
    path = data.parent / "toy.yaml"
    path.write_text(yaml.safe_dump(TOY))
    return path


@pytest.fixture(scope="module")
def variables(data: Path, root: Path) -> dict[str, str]:
    """What the batch scripts are told, with a Python whose steps take a little longer."""
    python = data.parent / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {root / "tests" / "slow_pretrain.py"} "$@"\n')
    python.chmod(0o755)
    return {
        "LIT_GROW_ROOT": str(root),
        "PYTHON": str(python),
        "TRAIN_DATA_DIR": str(data),
        "MODEL_NAME": "2L16H",
        "GLOBAL_BATCH_SIZE": "4",
        "MICRO_BATCH_SIZE": "2",
        "WARMUP_STEPS": "2",
        "EVAL_STEP_INTERVAL": "10",
        "STEP_SECS": "0.05",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def submit(slurm, toy: Path, variables, root: Path):
    """Submit base_model.sh; every job names its own folder."""

    def call(out: Path, *options: str, **more: str) -> int:
        out.parent.mkdir(exist_ok=True, parents=True)
        return slurm.submit(
            root / "scripts" / "slurm" / "base_model.sh",
            *("--config", toy),
            options=(*QUICK, *options),
            cwd=out.parent,
            environment={**variables, "OUT_DIR": str(out), **more},
        )

    return call


@pytest.fixture(scope="module", autouse=True)
def limited(submit, tmp_path_factory) -> tuple[int, Path]:
    """A job that has less time than it needs; the other tests go on meanwhile."""
    out = tmp_path_factory.mktemp("limited") / "run"
    one = ("--nodes=1", "--ntasks-per-node=1")
    unwarned = ("--time=1", "--signal=USR1@0")  # 0 seconds before the limit: never
    return submit(out, *one, *unwarned, MAX_STEP="100000", STEP_SECS="0.3"), out


def lines(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def loss_log(out: Path) -> list[bytes]:
    """The lines of metrics.jsonl as they stand in the file, without what tells the time."""
    timing = rb', "(?:tokens_per_sec|seconds|time)": [^,}]*'
    return [re.sub(timing, b"", line) for line in (out / "metrics.jsonl").read_bytes().splitlines()]


def field(slurm, job: int, name: str) -> str:
    return re.search(rf"\b{name}=(\S*)", slurm.command("scontrol", "--oneliner", "show", "job", str(job)))[1]


def start_again_soon(slurm, job: int) -> None:
    """SLURM would wait two minutes; not at once, as the node refuses a job in the second in which it lost it."""
    slurm.wait_until(lambda: field(slurm, job, "JobState") == "PENDING", "the job to be queued again")
    slurm.command("scontrol", "update", f"jobid={job}", "starttime=now+3")


WHO = "from pretrain.world import find_world as f; w = f(); print('place', w.rank, w.size, w.local_rank, w.launcher)"
MEET = "from pretrain.world import *\nwith connected(find_world(), 'cpu'): print('met')"


def test_every_start_is_understood_or_refused(slurm, tmp_path: Path, root: Path):
    script = tmp_path / "job.sh"
    script.write_text(f"""#!/usr/bin/env bash
export PYTHONPATH={root}
who() {{ echo "== $1"; shift; "$@" {sys.executable} -c "{WHO}" 2>&1 | grep -E '^place|^ValueError' | sort; }}
who all srun --ntasks-per-node=2
who one-node srun -N1 -n2
who uneven srun -n3
who no-srun env
echo "== no-name"
srun -N1 -n2 -r1 {sys.executable} -c "{MEET}" 2>&1 | grep -E '^met|^ValueError' | sort -u
""")
    job = slurm.submit(
        script, options=["--nodes=2", "--ntasks-per-node=2", "--job-name=bash", "--time=5"], cwd=tmp_path
    )
    slurm.wait(job)
    _, *parts = slurm.output(job).split("== ")
    found = {part.split("\n")[0]: part.split("\n")[1:-1] for part in parts}

    assert found["all"] == [f"place {rank} 4 {rank % 2} srun" for rank in range(4)]
    assert found["one-node"] == [f"place {rank} 2 {rank} srun" for rank in range(2)]
    assert len(found["uneven"]) == 3
    assert all("not equally many on every node (2,1)" in line for line in found["uneven"])
    (refused,) = found["no-srun"]
    assert "start it with srun: srun python -m pretrain" in refused
    (unresolved,) = found["no-name"]
    assert "'zz2', which does not resolve" in unresolved and "set MASTER_ADDR" in unresolved


def test_a_job_that_names_its_tasks_alone_is_understood(slurm, tmp_path: Path, root: Path):
    """--ntasks without --ntasks-per-node, which Lightning refuses."""
    script = tmp_path / "job.sh"
    script.write_text(f"""#!/usr/bin/env bash
export PYTHONPATH={root}
srun {sys.executable} -c "{WHO}" 2>&1 | grep -E '^place|^ValueError' | sort
""")
    job = slurm.submit(script, options=["--nodes=1", "--ntasks=2", "--time=5"], cwd=tmp_path)
    assert set(slurm.wait(job).values()) == {"COMPLETED"}
    assert slurm.output(job).splitlines() == [f"place {rank} 2 {rank} srun" for rank in range(2)]


def test_a_signalled_job_is_queued_again_and_ends_with_the_same_losses(slurm, submit, tmp_path: Path):
    four = ("--nodes=2", "--ntasks-per-node=2")
    settings = {"MAX_STEP": "40", "MICRO_BATCH_SIZE": "1"}
    job = submit(tmp_path / "run", *four, **settings)
    undisturbed = submit(tmp_path / "undisturbed", *four, **settings)
    after = tmp_path / "after.sh"
    after.write_text("#!/bin/sh\necho ran\n")
    dependent = slurm.submit(after, options=[f"--dependency=afterok:{job}"], cwd=tmp_path)
    slurm.wait_until(lambda: len(lines(tmp_path / "run")) >= 4, "four steps")

    slurm.command("scancel", "--signal=USR1", str(job))
    start_again_soon(slurm, job)
    stopped_at = len(lines(tmp_path / "run"))
    assert field(slurm, dependent, "JobState") == "PENDING", "who waits for a job waits for its last start"

    assert set(slurm.wait(job).values()) == {"COMPLETED"}, slurm.output(job)
    assert set(slurm.wait(undisturbed).values()) == {"COMPLETED"}, slurm.output(undisturbed)
    assert 4 <= stopped_at < 40
    assert field(slurm, job, "Restarts") == "1"
    assert "resumed from" in slurm.output(job) and "start 2" in slurm.output(job)
    assert "4 on 2 node(s), started by srun, the model sharded over 4" in slurm.output(job)
    log, expected = (loss_log(tmp_path / each) for each in ("run", "undisturbed"))
    assert log == expected and len(log) == 40
    assert not (tmp_path / "run" / "REQUEUE").exists()
    assert set(slurm.wait(dependent).values()) == {"COMPLETED"}


SIGNALLED_EARLY = """
import os, runpy, signal, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" and os.environ["SLURM_PROCID"] == "1" and not os.path.exists(__file__ + ".sent"):
            open(__file__ + ".sent", "x").close()
            os.kill(os.getpid(), signal.SIGUSR1)

sys.meta_path.insert(0, Watch())
sys.argv = sys.argv[sys.argv.index("-m") + 1 :]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def test_a_job_that_is_signalled_before_it_has_imported_torch_is_queued_again(slurm, submit, tmp_path: Path):
    """The second task alone gets the signal, in the first start alone."""
    script, python, out = tmp_path / "early.py", tmp_path / "python", tmp_path / "run"
    script.write_text(SIGNALLED_EARLY)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    python.chmod(0o755)
    job = submit(out, "--nodes=1", "--ntasks-per-node=2", MAX_STEP="4", PYTHON=str(python))
    slurm.wait_until(lambda: field(slurm, job, "Restarts") == "1", "the first start to be over")
    start_again_soon(slurm, job)
    assert not (out / "checkpoints").exists() and not lines(out)

    assert set(slurm.wait(job).values()) == {"COMPLETED"}, slurm.output(job)
    assert "SIGUSR1: stopping before the first step" in slurm.output(job)
    assert field(slurm, job, "Restarts") == "1"
    assert len(lines(out)) == 4 and not (out / "REQUEUE").exists()


def test_a_lost_process_ends_the_job_and_a_cancelled_one_does_not_come_back(slurm, submit, tmp_path: Path):
    out = tmp_path / "run"
    job = submit(out, "--nodes=1", "--ntasks-per-node=2", MAX_STEP="10000", SAVE_STEP_INTERVAL="5")
    slurm.wait_until(lambda: len(lines(out)) >= 7, "seven steps", STARTED_SECS)

    os.kill(json.loads((out / "heartbeat.json").read_text())["pid"], signal.SIGKILL)
    assert set(slurm.wait(job, 60).values()) == {"FAILED"}
    assert field(slurm, job, "Restarts") == "0"

    job = submit(out, "--nodes=1", "--ntasks-per-node=1", MAX_STEP="10000", SAVE_STEP_INTERVAL="10000")
    slurm.wait_until(lambda: "resumed from" in slurm.output(job), "the run to go on, on one process")
    done = len(lines(out))
    slurm.wait_until(lambda: len(lines(out)) > done, "a step")
    slurm.command("scancel", str(job))

    assert set(slurm.wait(job, 60).values()) == {"CANCELLED"}
    slurm.wait_until(lambda: "the run has saved" in slurm.output(job), "the script's last word")
    assert max(int(path.name[5:]) for path in out.glob("checkpoints/stage-*/step-*")) == lines(out)[-1]["step"]


def test_a_job_that_is_queued_again_by_hand_is_told_from_a_cancelled_one(slurm, submit, tmp_path: Path):
    out = tmp_path / "run"
    job = submit(out, "--nodes=1", "--ntasks-per-node=1", MAX_STEP="100")
    slurm.wait_until(lambda: len(lines(out)) >= 2, "two steps", STARTED_SECS)
    slurm.requeue(job)
    start_again_soon(slurm, job)
    assert set(slurm.wait(job).values()) == {"COMPLETED"}, slurm.output(job)
    assert "queued again by somebody else" in slurm.output(job) and "was cancelled" not in slurm.output(job)
    assert len(lines(out)) == 100 and field(slurm, job, "Restarts") == "1"


def test_the_whole_recipe_runs_as_a_chain(slurm, toy: Path, variables, root: Path, tmp_path: Path):
    done = subprocess.run(
        ["bash", root / "scripts" / "slurm" / "recipe.sh", *QUICK],
        env=slurm.environment(
            **{name: value for name, value in variables.items() if name not in ("LIT_GROW_ROOT", "STEP_SECS")},
            NAME="toy",
            BASE_MODEL="1L16H",
            TARGET_MODEL="4L16H",
            BASE_STEPS="6",
            TARGET_STEPS="5",
            TRAIN_SBATCH="--nodes=1 --ntasks-per-node=1",
            SETTINGS=f"--config {toy}",
        ),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    jobs = dict(line.split() for line in done.stdout.splitlines())
    assert list(jobs) == ["base", "grow", "target", "evaluate"]
    assert set(slurm.wait(int(jobs["evaluate"])).values()) == {"COMPLETED"}

    out = tmp_path / "out" / "toy"
    (found,) = json.loads((out / "target" / "validation.json").read_text())["sets"]
    evals = [json.loads(line) for line in (out / "target" / "evals.jsonl").read_text().splitlines()]
    assert found["loss"] == next(r["value"] for r in evals if r["when"] == "end" and r["metric"] == "loss")
    assert [line["position"] for line in lines(out / "target")] == [4 * step for step in range(7, 12)]


def test_at_the_time_limit_the_run_has_saved_and_is_queued_again(slurm, limited: tuple[int, Path]):
    job, out = limited
    slurm.wait_until(lambda: field(slurm, job, "Restarts") != "0", "the time limit", 180)
    slurm.command("scancel", str(job))

    assert "only a signal will stop the run before its end" in slurm.output(job)
    assert "DUE TO TIME LIMIT" in slurm.output(job)
    assert "stopped by SIGTERM; repeat the command to go on" in slurm.output(job)

    def saved() -> int:
        return max(int(path.name[5:]) for path in out.glob("checkpoints/stage-01/step-*"))

    # At once where the next start had not begun; else when it, cancelled, has saved as well
    slurm.wait_until(lambda: saved() == lines(out)[-1]["step"], "a checkpoint of the last step", 60)
