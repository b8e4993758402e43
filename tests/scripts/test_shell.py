"""The shell scripts, with a stand-in for Python that notes how it was called: install once, in order, stop cleanly."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), ROOT / ".ci" / "run"])

# `python -m venv DIR` puts a copy of this file into DIR; everything else is noted, then behaves as the test asks.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  --version) echo "Python $FAKE_VERSION"; exit ;;
  "-c import sys"*) [ "$FAKE_VERSION" = 3.9.1 ] && exit 1; exit 0 ;;
  "-c import venv"*) exit "${FAKE_NO_VENV:-0}" ;;
  "-m pip --version") exit ;;
esac
echo "$*" >>"$FAKE_CALLS"
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
if [ -n "${FAKE_SLOW:-}" ] && [[ "$*" == *"$FAKE_SLOW"* ]]; then exec "$REAL_PYTHON" -c "$FAKE_STEP"; fi
if [ -n "${FAKE_FAIL:-}" ] && [[ "$*" == *"$FAKE_FAIL"* ]]; then echo "what went wrong"; exit "$FAKE_STATUS"; fi
exit 0
"""

# A step like `pretrain`: at a signal it notes the name, saves, and exits with 75.
FAKE_STEP = """
import os, signal, sys, time

def note(text):
    with open(os.environ["FAKE_CALLS"], "a") as calls:
        calls.write(text + "\\n")

def stop(number, frame):
    note(f"got {signal.Signals(number).name}")
    time.sleep(0.1)
    sys.exit(75)

signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
note("waiting")
time.sleep(10)
note("not stopped")
"""


class Checkout:
    """A copy of what the scripts need, and the calls that the stand-in noted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "scripts").mkdir(parents=True)
        for name in ("demo.sh", "test.sh", "venv.sh", "help.sh", "launch_local.sh"):
            shutil.copy(ROOT / "scripts" / name, path / "scripts")
        for name in ("setup.py", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, path)
        self.python = path / "fake-python"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)
        self.notes = path.parent / "calls"

    def environment(self, **settings: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("TORCH_INDEX_URL", "PYTHON")}
        return kept | {
            "PYTHON": str(self.python),
            "FAKE_CALLS": str(self.notes),
            "FAKE_VERSION": "3.12.1",
            "FAKE_STEP": FAKE_STEP,
            "REAL_PYTHON": sys.executable,
            **settings,
        }

    def start(self, script: str, *arguments: str, **settings: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(self.path / "scripts" / script), *arguments],
            cwd="/",
            env=self.environment(**settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *arguments: str, **settings: str) -> tuple[int, str, str]:
        process = self.start(script, *arguments, **settings)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def calls(self) -> list[str]:
        """What the stand-in was called with since this was last asked."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        self.notes.unlink(missing_ok=True)
        return lines

    def wait_until_slow(self) -> None:
        deadline = time.monotonic() + 30
        while not self.notes.exists() or "waiting" not in self.notes.read_text():
            assert time.monotonic() < deadline, "the step that should be slow did not start"
            time.sleep(0.02)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "a folder")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script: Path):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", ["demo.sh", "test.sh", "launch_local.sh"])
def test_help_says_how_to_use_it_and_installs_nothing(checkout: Checkout, script: str):
    status, out, _ = checkout.run(script, "--help")

    assert status == 0
    assert f"bash scripts/{script} " in out
    assert checkout.calls() == []
    assert not (checkout.path / ".venv").exists()


def test_an_unknown_option_is_refused_before_anything_happens(checkout: Checkout):
    status, _, err = checkout.run("demo.sh", "--quick")

    assert status == 2
    assert "unknown option --quick" in err and "usage:" in err
    assert checkout.calls() == []


def test_the_demo_installs_then_runs_its_steps_in_order(checkout: Checkout):
    status, _, err = checkout.run("demo.sh")

    assert status == 0, err
    calls = checkout.calls()
    assert calls[0] == "-m venv .venv"
    assert "--constraint constraints.txt" in calls[1] and "setuptools" in calls[1]
    assert "--constraint constraints.txt" in calls[2] and calls[2].endswith("--editable .[prep,report]")
    assert calls[3] == "scripts/prepare.py --stdlib --vocab-size 2048 --out out/demo/data"
    assert [call.split()[:2] for call in calls[4:]] == [["-m", "pretrain"], ["-m", "pretrain"], ["-m", "grow"]]
    assert "out/demo/stacked" in calls[4] and "out/demo/scratch" in calls[5]
    assert "--scratch" in calls[5] and "--scratch" not in calls[4]
    assert calls[6].startswith("-m grow report out/demo/stacked out/demo/scratch")


def test_smoke_uses_a_folder_of_its_own(checkout: Checkout):
    status, _, err = checkout.run("demo.sh", "--smoke")

    assert status == 0, err
    steps = checkout.calls()[3:]
    assert all("out/smoke" in step and "out/demo" not in step for step in steps)
    assert all("configs/smoke.yaml" in step for step in steps[1:3])


def test_a_second_run_calls_no_pip(checkout: Checkout):
    checkout.run("demo.sh")
    first = checkout.calls()

    checkout.run("demo.sh")

    assert checkout.calls() == first[3:]


def test_test_sh_hands_its_arguments_to_pytest_and_adds_to_the_same_venv(checkout: Checkout):
    checkout.run("demo.sh")
    checkout.calls()

    status, _, err = checkout.run("test.sh", "tests/grow", "-k", "stack or map")
    calls = checkout.calls()
    checkout.run("demo.sh")

    assert status == 0, err
    assert "-m venv .venv" not in calls
    assert calls[-2].endswith("--editable .[prep,report,test]")
    assert calls[-1] == "-m pytest -n auto --maxprocesses 4 --dist worksteal tests/grow -k stack or map"
    assert not any("pip" in call for call in checkout.calls())


def test_test_sh_runs_marked_tests_in_one_process(checkout: Checkout):
    assert checkout.run("test.sh", "-q", "-m", "slow")[0] == 0
    assert checkout.calls()[-1] == "-m pytest -q -m slow"


@pytest.mark.parametrize("name", ["setup.py", "pyproject.toml", "constraints.txt"])
def test_a_changed_description_is_installed_again(checkout: Checkout, name: str):
    checkout.run("demo.sh")
    checkout.calls()
    with (checkout.path / name).open("a") as file:
        file.write("\n")

    checkout.run("demo.sh")

    assert sum("pip install" in call for call in checkout.calls()) == 2


def test_torch_comes_from_its_own_index_when_one_is_named(checkout: Checkout):
    checkout.run("demo.sh", TORCH_INDEX_URL="file:///wheels")

    assert any("--index-url file:///wheels --no-deps torch" in call for call in checkout.calls())


def test_a_failed_install_shows_its_log_and_is_repaired_by_repeating(checkout: Checkout):
    status, _, err = checkout.run("demo.sh", FAKE_FAIL="--editable", FAKE_STATUS="1")
    checkout.calls()

    assert status == 1
    assert "what went wrong" in err
    assert checkout.run("demo.sh")[0] == 0
    assert checkout.calls()[0] == "-m venv .venv"


def test_an_install_that_was_killed_is_repaired_by_repeating(checkout: Checkout):
    process = checkout.start("demo.sh", FAKE_SLOW="--editable")
    checkout.wait_until_slow()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    checkout.calls()

    assert checkout.run("demo.sh")[0] == 0
    assert checkout.calls()[0] == "-m venv .venv"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"PYTHON": "python-of-nowhere"}, "no python-of-nowhere here"),
        ({"FAKE_VERSION": "3.9.1"}, "is Python 3.9.1; lit-grow needs Python 3.10 or newer"),
        ({"FAKE_NO_VENV": "1"}, "apt-get install python3-venv"),
    ],
)
def test_a_python_that_will_not_do_is_one_clear_error(checkout: Checkout, settings: dict[str, str], message: str):
    status, _, err = checkout.run("demo.sh", **settings)

    assert status == 2
    assert message in err and len(err.splitlines()) == 1
    assert not (checkout.path / ".venv").exists()


@pytest.mark.parametrize("status", [3, 4, 75])
def test_the_exit_status_of_a_failed_step_is_the_demos(checkout: Checkout, status: int):
    returned, _, err = checkout.run("demo.sh", FAKE_FAIL="-m pretrain", FAKE_STATUS=str(status))

    assert returned == status
    assert ("repeat the same command" in err) == (status == 75)
    assert ("another version of the demo left out/demo, --fresh removes that" in err) == (status != 75)
    assert sum("-m pretrain" in call for call in checkout.calls()) == 1


def _interrupt_the_group(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGINT)


def _terminate_the_script_alone(process: subprocess.Popen[str]) -> None:
    process.terminate()


@pytest.mark.parametrize(
    ("send", "name"), [(_interrupt_the_group, "SIGINT"), (_terminate_the_script_alone, "SIGTERM")], ids=["INT", "TERM"]
)
def test_a_signal_lets_the_step_save_and_ends_the_demo_with_a_hint(
    checkout: Checkout, send: Callable[[subprocess.Popen[str]], None], name: str
):
    process = checkout.start("demo.sh", FAKE_SLOW="-m pretrain")
    checkout.wait_until_slow()
    send(process)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 75
    assert "repeat the same command" in err
    assert [call for call in checkout.calls() if call.startswith("got")] == [f"got {name}"]


def test_killing_the_demo_kills_its_step(checkout: Checkout):
    process = checkout.start("demo.sh", FAKE_SLOW="-m pretrain")
    checkout.wait_until_slow()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)  # returns when the last holder of the pipes is gone

    assert "not stopped" not in checkout.calls()


@pytest.mark.parametrize("smoke", [False, True])
def test_fresh_removes_only_what_the_demo_writes(checkout: Checkout, smoke: bool):
    written = ["data", "stacked", "scratch", "figures", "tables", "report.html", "report.json"]
    for name in ("demo", "smoke", "mine"):
        for entry in (*written, "notes"):
            (checkout.path / "out" / name / entry).mkdir(parents=True)

    checkout.run("demo.sh", "--fresh", *(["--smoke"] if smoke else []))

    fresh = "smoke" if smoke else "demo"
    for name in ("demo", "smoke", "mine"):
        left = {path.name for path in (checkout.path / "out" / name).iterdir()}
        assert left == ({"notes"} if name == fresh else {*written, "notes"})


def test_out_is_where_everything_goes(checkout: Checkout):
    checkout.run("demo.sh", "--out", "elsewhere")
    steps = [call for call in checkout.calls() if not call.startswith("-m pip") and not call.startswith("-m venv")]
    assert steps
    assert all("elsewhere" in call and "out/demo" not in call for call in steps)


def test_a_checkout_that_was_moved_is_installed_again(checkout: Checkout):
    checkout.run("demo.sh")
    moved = checkout.path.rename(checkout.path.parent / "moved")
    checkout.path = moved
    checkout.calls()

    checkout.run("demo.sh", PYTHON=str(moved / "fake-python"))

    assert any("--editable" in call for call in checkout.calls())


def test_ready_scripts_start_at_once(checkout: Checkout):
    checkout.run("demo.sh", "--smoke")
    start = time.monotonic()

    checkout.run("demo.sh", "--smoke")

    assert time.monotonic() - start < 3, "the promise is under 3 s; it takes about 0.1 s"
