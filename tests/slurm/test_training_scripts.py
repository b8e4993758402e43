"""The batch scripts without SLURM: what they call with which settings, and what they refuse."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = ("base_model.sh", "g_stack.sh", "grow.sh", "evaluate.sh", "recipe.sh", "job.sh")

# srun notes the call; "leaves" makes the run stop early, as the first process of several does
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$CALLS"
if [ -n "${LEAVES:-}" ]; then touch "$OUT_DIR/REQUEUE"; fi
if [ -n "${TERMINATES:-}" ]; then kill -TERM "$PPID"; fi
exit "${SRUN_STATUS:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
printf 'scontrol %s\\n' "$*" >>"$CALLS"
printf '%s\\n' "${SCONTROL_SAYS:-}"
exit "${SCONTROL_STATUS:-0}"
"""


@pytest.fixture
def run(root: Path, tmp_path: Path):
    """Run a copy of a script from a folder of its own, as SLURM does; gives (exit code, calls, output)."""
    bin_folder, calls = tmp_path / "bin", tmp_path / "calls"
    bin_folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sleep", "#!/bin/sh\n"), ("python", "#!/bin/sh\n")):
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    (tmp_path / "run").mkdir()

    def call(script: str, *arguments: str, **settings: str) -> tuple[int, list[str], str]:
        copy = Path(shutil.copy(root / "scripts" / "slurm" / script, tmp_path / "slurm_script"))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        done = subprocess.run(
            ["bash", str(copy), *arguments],
            env={
                **kept,
                "PATH": f"{bin_folder}:{kept['PATH']}",
                "PYTHON": "python",
                "LIT_GROW_ROOT": str(root),
                "CALLS": str(calls),
                "SLURM_JOB_ID": "7",
                "OUT_DIR": "run",
                **settings,
            },
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        return done.returncode, calls.read_text().splitlines() if calls.exists() else [], done.stdout

    return call


@pytest.mark.parametrize("script", SCRIPTS)
def test_they_parse(root: Path, script: str):
    subprocess.run(["bash", "-n", str(root / "scripts" / "slurm" / script)], check=True)


def test_shellcheck_finds_nothing(root: Path):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [
        *(root / "scripts" / "slurm").glob("*.sh"),
        root / "scripts" / "launch_local.sh",
        root / "scripts" / "help.sh",
    ]
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_base_is_trained_with_the_papers_settings_which_flags_replace(run):
    status, (call,), _ = run("base_model.sh", "--precision", "bf16", TRAIN_DATA_DIR="data", MAX_STEP="10")
    assert status == 0
    assert call.startswith(
        "--kill-on-bad-exit=1 python -m pretrain --out_dir run --model.name 6L2048H --data.train data"
    )
    assert "--stages [{name: scratch, max_steps: 10}]" in call
    assert "--batch.global_batch_size 1024 --batch.micro_batch_size 32" in call
    assert call.endswith("--precision bf16")


def test_all_settings_of_the_scripts_are_settings_of_a_run(run):
    from pretrain.command_line import parse

    _, (call,), _ = run("base_model.sh", TRAIN_DATA_DIR="data")
    before, _, rest = call.partition("--stages ")
    stages, _, after = rest.partition(" --batch")
    flags = [*before.split("-m pretrain ")[1].split(), "--stages", stages, *f"--batch{after}".split()]
    config = parse(flags).config
    assert (config.optimizer.learning_rate, config.schedule.warmup_steps) == (1e-3, 3000)


def test_a_target_is_grown_first_and_then_trained_from_what_grew(run, tmp_path: Path):
    status, calls, _ = run("g_stack.sh", "--seed", "1", TRAIN_DATA_DIR="data", BASE="base", GROWN="grown")
    assert status == 0
    grow, train = calls
    assert grow.endswith("python -m grow apply base grown --operator stack --factor 4")
    assert "--model.name 24L2048H" in train and "{name: stacking, max_steps: 300000}" in train
    assert "--batch.micro_batch_size 8 --optimizer.learning_rate 3e-4" in train
    assert train.endswith("--init_from grown --seed 1")

    (tmp_path / "grown").mkdir()
    (tmp_path / "grown" / "MANIFEST.json").touch()
    (tmp_path / "calls").unlink()
    _, calls, _ = run("g_stack.sh", TRAIN_DATA_DIR="data", GROWN="grown")
    assert len(calls) == 1 and "-m pretrain" in calls[0]


@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        ("base_model.sh", {}, "TRAIN_DATA_DIR is not set"),
        ("g_stack.sh", {"TRAIN_DATA_DIR": "data"}, "BASE is not set: the run or checkpoint to grow, as out/grown/"),
        ("grow.sh", {"BASE": "base"}, "GROWN is not set"),
        ("evaluate.sh", {}, "RUN is not set"),
        ("recipe.sh", {}, "TRAIN_DATA_DIR is not set"),
        ("base_model.sh", {"TRAIN_DATA_DIR": "data", "PYTHON": "python-of-nowhere"}, "no python-of-nowhere"),
    ],
)
def test_what_is_missing_is_one_clear_error(run, script: str, settings: dict[str, str], message: str):
    status, calls, err = run(script, **settings)
    assert status == 2
    assert message in err and calls == []


@pytest.mark.parametrize(
    ("script", "reads"),
    [
        ("base_model.sh", "  LEARNING_RATE=1e-3"),
        ("g_stack.sh", "  GROWN=out/grown/$MODEL_NAME"),
        ("grow.sh", "  OPERATOR=stack"),
        ("evaluate.sh", "  RUN="),
        ("recipe.sh", "  BASE_MODEL      size of the base (6L2048H)"),
        ("prepare.sh", "  PYTHON          interpreter with lit-grow[prep]"),
    ],
)
def test_help_says_what_is_read_from_the_environment_and_needs_nothing(root: Path, tmp_path, script: str, reads: str):
    path = root / "scripts" / "slurm" / script
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "LIT_GROW_ROOT"))}
    for cwd, name in ((tmp_path, str(path)), (path.parent, script)):
        done = subprocess.run(["bash", name, "--help"], env=kept, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert reads in done.stdout and "#" not in done.stdout and script in done.stdout


@pytest.mark.parametrize("how", [{"LEAVES": "yes"}, {"SRUN_STATUS": "75"}])
def test_a_run_that_stopped_early_queues_its_job_again(run, tmp_path: Path, how: dict[str, str]):
    _, calls, _ = run("base_model.sh", TRAIN_DATA_DIR="data", **how)
    assert calls[1] == "scontrol requeue 7"
    assert not (tmp_path / "run" / "REQUEUE").exists()


@pytest.mark.parametrize(
    ("state", "starts", "said"),
    [
        ("Requeue=1 Restarts=1 BatchFlag=1 JobState=COMPLETING Reason=None X", 0, "queued again by somebody else"),
        ("Requeue=1 Restarts=2 BatchFlag=1 JobState=COMPLETING Reason=None X", 1, "queued again by somebody else"),
        ("Requeue=1 Restarts=1 BatchFlag=1 JobState=COMPLETING Reason=None X", 1, "was cancelled"),
        ("Requeue=1 Restarts=0 BatchFlag=1 JobState=COMPLETING Reason=None X", 0, "was cancelled"),
    ],
)
def test_a_job_that_somebody_cancelled_or_queued_again_is_left_as_it_is(run, state: str, starts: int, said: str):
    restarts = {"SLURM_RESTART_COUNT": str(starts)} if starts else {}  # SLURM sets none at the first start
    terminated = {"TERMINATES": "yes", "SRUN_STATUS": "75", "SCONTROL_SAYS": state}
    status, calls, output = run("base_model.sh", TRAIN_DATA_DIR="data", **terminated, **restarts)
    assert status == 75
    assert said in output
    assert calls[1:] == ["scontrol --oneliner show job 7"]


def test_a_job_at_its_time_limit_is_queued_again(run):
    terminated = {"TERMINATES": "yes", "SRUN_STATUS": "75", "SCONTROL_SAYS": "Restarts=0 Reason=TimeLimit X"}
    _, calls, _ = run("base_model.sh", TRAIN_DATA_DIR="data", **terminated)
    assert calls[2] == "scontrol requeue 7"


def test_where_requeue_is_off_the_script_says_so_and_fails_for_those_behind_it(run):
    status, _, err = run("base_model.sh", TRAIN_DATA_DIR="data", LEAVES="yes", SCONTROL_STATUS="1")
    assert status == 75
    assert "submit it again to go on" in err


def test_a_failed_run_is_not_queued_again_and_a_file_of_an_earlier_stop_means_nothing(run, tmp_path: Path):
    (tmp_path / "run" / "REQUEUE").touch()
    status, calls, _ = run("base_model.sh", TRAIN_DATA_DIR="data", SRUN_STATUS="4")
    assert status == 4
    assert len(calls) == 1
