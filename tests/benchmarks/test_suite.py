"""`python -m benchmarks` runs each benchmark by itself, and loses nothing when one fails. Says nothing about speed."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as suite
from benchmarks import data_loader, data_prep, performance
from benchmarks.result_files import RESULTS, add_out

MODULES = [each for group in suite.GROUPS.values() for each in group]
FAILS = suite.Benchmark("no_such_module", "fails", 1, quick=())


def test_one_that_fails_does_not_lose_the_others(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(suite, "GROUPS", {"broken": (FAILS,), "index": (suite.GROUPS["data"][1],)})

    assert suite.main(["broken", "index", "--quick", "--results", str(tmp_path)]) == 1

    printed = capfd.readouterr()
    assert json.loads((tmp_path / "data_index.json").read_text())["machine"]
    assert "FAILED" in printed.out and "failed: no_such_module" in printed.err
    assert "ms to build" in printed.out, "the table of what was measured"


def test_the_help_of_a_benchmark_says_where_its_result_goes(monkeypatch):
    monkeypatch.chdir(RESULTS.parents[1])
    parser = argparse.ArgumentParser()
    add_out(parser, RESULTS / "data_index.json")
    assert "default: benchmarks/results/data_index.json" in " ".join(parser.format_help().split())


def test_an_old_result_of_a_benchmark_that_fails_is_not_taken_for_a_new_one(tmp_path, monkeypatch):
    (tmp_path / "no_such_module.json").write_text("{}")
    monkeypatch.setattr(suite, "GROUPS", {"broken": (FAILS,)})
    assert suite.main(["broken", "--quick", "--results", str(tmp_path)]) == 1


def test_a_quick_run_leaves_the_page_and_the_results_alone(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    monkeypatch.setattr(performance, "PAGE", page)
    monkeypatch.setattr(suite, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(suite, "run", lambda each, args, results: True)
    assert suite.main(["--quick"]) == 0
    assert not list(tmp_path.iterdir())


def test_without_names_nothing_heavy_runs(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(suite, "run", lambda each, args, results: not started.append(each.module))
    assert suite.main(["--results", str(tmp_path)]) == 0
    assert started == ["training", "kernels", "data_loader", "data_index", "data_prep", "evaluation"]


def test_peers_reach_those_that_know_them(tmp_path):
    args = suite.parse(["training", "--litgpt", "there", "--tinyllama", "elsewhere", "--eval-python", "theirs"])
    (training,), (evaluation,) = suite.GROUPS["training"], suite.GROUPS["evaluation"]
    assert suite.command(training, args, tmp_path)[3:] == ["--out", str(tmp_path), "--litgpt", "there"]
    assert suite.command(evaluation, args, tmp_path)[0] == "theirs"
    assert suite.command(suite.GROUPS["data"][0], args, tmp_path)[-2:] == ["--tinyllama", "elsewhere"]


@pytest.mark.parametrize("each", MODULES, ids=[each.module for each in MODULES])
def test_every_benchmark_takes_what_it_is_given(each, capsys, monkeypatch):
    """Its --help names all options that the suite would use."""
    used = {"--out", *(f"--{peer}" for peer in each.peers), *(o for o in each.quick or () if o[:2] == "--")}
    monkeypatch.setattr(sys, "argv", [each.module, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(f"benchmarks.{each.module}").main()
    assert used <= set(re.findall(r"--[\w-]+", capsys.readouterr().out))


def test_an_unknown_name_is_refused_with_those_that_are_known(capsys):
    with pytest.raises(SystemExit) as stopped:
        suite.main(["speed"])
    assert stopped.value.code == 2 and "known: training, kernels" in capsys.readouterr().err


def test_the_list_says_what_there_is(capsys):
    assert suite.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in suite.GROUPS)


def test_the_loader_alone_runs_on_small_files(tmp_path, monkeypatch):
    out = tmp_path / "data_loader.json"
    monkeypatch.setattr(sys, "argv", ["data_loader", "--quick", "--out", str(out)])
    assert data_loader.main() == 0
    result = json.loads(out.read_text())
    assert result["results"]["ours, micro-batch 8"]["million_tokens_per_cpu_sec"] > 0
    assert result["over_tinyllama_by_micro_batch"] == {}
    assert performance.data_loader(result)


def test_a_quick_run_of_one_that_is_not_told_where_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["data_loader", "--quick"])
    monkeypatch.setattr(data_loader, "RESULT", tmp_path / "data_loader.json")
    assert data_loader.main() == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_preparation_alone_runs_on_a_little_text(tmp_path, monkeypatch, data_dir):
    data_dir("books")
    out = tmp_path / "data_prep.json"
    monkeypatch.setattr(sys, "argv", ["data_prep", "--quick", "--out", str(out)])
    assert data_prep.main() == 0
    assert json.loads(out.read_text())["megabytes_per_cpu_sec"].keys() == {"ours"}


@pytest.mark.slow
def test_everything_runs_at_toy_size(tmp_path, data_dir):
    environment = {**os.environ, "LIT_GROW_DATA": str(data_dir("evals").parent)}
    command = [sys.executable, "-m", "benchmarks", "--quick", "--results", str(tmp_path)]
    root = Path(suite.__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    quick = {each.module for name in suite.USUAL for each in suite.GROUPS[name]}
    assert {path.stem for path in tmp_path.glob("*.json")} == quick
