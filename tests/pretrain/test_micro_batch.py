"""The micro-batch that is chosen: it divides, fits, is the same everywhere, stays on resume, and changes no number."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import pytest
import torch

from lit_gpt.checkpoint import latest, read_training
from lit_gpt.settings_files import merge
from pretrain import micro_batch
from pretrain.command_line import parse
from pretrain.config import BatchConfig
from pretrain.footprint import stage_memory
from pretrain.micro_batch import CPU_TOKENS, choose_micro_batch, largest_that_fits, survives_a_step
from pretrain.parallel import Compute
from pretrain.run import run
from pretrain.stages import plan_stages
from pretrain.world import ALONE, World
from tests.pretrain.conftest import of_processes, two_stages
from tests.pretrain.processes import run_on
from tests.pretrain.runs import records
from tests.pretrain.test_stages import MODEL, StageConfig, run_config

CPU = torch.device("cpu")
FP32 = Compute("fp32", "none", "")


@pytest.mark.parametrize("sizes", [[1], [1, 2, 3, 4, 6, 12], [1, 2, 4, 8, 16, 32, 64], [1, 3, 9], list(range(1, 30))])
def test_the_largest_that_fits_is_found_and_nothing_much_larger_tried(sizes):
    for limit in range(max(sizes) + 2):
        tried = []

        def fits(size, limit=limit, tried=tried):
            tried.append(size)
            return size <= limit

        assert largest_that_fits(sizes, fits) == max((size for size in sizes if size <= limit), default=0)
        assert len(set(tried)) == len(tried)
        assert all(size <= max(1, 4 * limit) for size in tried)


@pytest.fixture
def two_stages_of_24():
    """Settings and stages of a run whose steps have 24 sequences."""
    config = run_config(StageConfig("base", n_layer=2, max_steps=1), StageConfig("all", operator="stack", max_steps=1))
    config = dataclasses.replace(config, batch=BatchConfig(24, auto=True))
    return config, plan_stages(config, dataclasses.replace(MODEL, block_size=512))


@pytest.mark.parametrize("size", [1, 2, 4, 3])
def test_on_a_cpu_it_is_what_the_estimate_of_the_largest_stage_allows(monkeypatch, two_stages_of_24, size):
    config, stages = two_stages_of_24
    config_of_size = dataclasses.replace(config, batch=BatchConfig(24, size))
    needed = stage_memory(config_of_size, stages[-1], FP32, ALONE, "cpu").total
    monkeypatch.setattr(micro_batch, "available_bytes", lambda _: needed / micro_batch.USABLE + 1)
    assert choose_micro_batch(config, stages, FP32, ALONE, CPU) == size


def test_on_a_cpu_it_is_no_larger_than_is_fast_and_divides_each_processs_share(monkeypatch, two_stages_of_24):
    config, stages = two_stages_of_24
    monkeypatch.setattr(micro_batch, "available_bytes", lambda _: None)
    assert choose_micro_batch(config, stages, FP32, ALONE, CPU) == CPU_TOKENS // 512 == 4
    world = World(0, 3)
    monkeypatch.setattr(World, "gather", lambda self, value: [value] * self.size)
    config = dataclasses.replace(config, batch=BatchConfig(18, auto=True))
    assert choose_micro_batch(config, stages, FP32, world, CPU) == 3


def test_processes_of_a_node_share_its_memory(monkeypatch, two_stages_of_24):
    config, stages = two_stages_of_24
    on_one_node = World(0, 2, local_size=2)
    config_of_size = dataclasses.replace(config, batch=BatchConfig(24, 2))
    needed = max(stage_memory(config_of_size, stage, FP32, on_one_node, "cpu").total for stage in stages)
    monkeypatch.setattr(micro_batch, "available_bytes", lambda _: 2 * int(needed / micro_batch.USABLE + 1))
    monkeypatch.setattr(World, "gather", lambda self, value: [value] * self.size)
    assert choose_micro_batch(config, stages, FP32, on_one_node, CPU) == 2
    assert choose_micro_batch(config, stages, FP32, World(0, 2), CPU) > 2


def test_the_smallest_of_all_processes_is_everybodys(monkeypatch, two_stages_of_24):
    monkeypatch.setattr(World, "gather", lambda self, value: [value, 2])
    config, stages = two_stages_of_24
    assert choose_micro_batch(config, stages, FP32, World(0, 2), CPU) == 2


def test_a_trial_that_runs_out_of_memory_does_not_fit(monkeypatch, two_stages_of_24):
    """The OOM is made: a CPU has none that could be caught."""
    config, stages = two_stages_of_24
    config = dataclasses.replace(config, batch=BatchConfig(4, 2))
    assert survives_a_step(config, stages[0], FP32, CPU)

    def clip_gradients(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(micro_batch, "clip_gradients", clip_gradients)
    assert not survives_a_step(config, stages[0], FP32, CPU)


@pytest.fixture
def go(tmp_path, prepared):
    def start(name, *flags, **changes):
        settings = merge(two_stages(tmp_path / name, prepared), changes)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(settings))
        run(parse(["--config", str(path), *flags]), command=["pretrain"])
        return tmp_path / name

    return start


def test_a_run_keeps_its_choice_when_it_goes_on_although_there_is_less_memory(go, monkeypatch, capsys):
    folder = go("run", "--batch.auto", "true", stages=[{"name": "base", "n_layer": 1, "max_steps": 3}])
    assert "micro-batch: 4 of 4 sequences (batch.auto)" in capsys.readouterr().out
    batch = read_training(latest(folder / "checkpoints")).state["run_config"]["batch"]
    assert batch == {"global_batch_size": 4, "micro_batch_size": 4, "auto": True}
    for path in folder.glob("checkpoints/stage-*/step-0000000003"):
        path.rename(path.with_name("gone"))
    monkeypatch.setattr(micro_batch, "available_bytes", lambda _: 1)
    go("run", "--batch.auto", "true", stages=[{"name": "base", "n_layer": 1, "max_steps": 3}])
    assert records(folder)[-1]["step"] == 3
    assert "(batch.auto)" not in capsys.readouterr().out


def test_a_run_may_go_on_with_it_that_began_without(go, capsys):
    stages = [{"name": "base", "n_layer": 1, "max_steps": 3}]
    folder = go("run", stages=stages)
    for path in folder.glob("checkpoints/stage-*/step-0000000003"):
        path.rename(path.with_name("gone"))
    capsys.readouterr()
    go("run", "--batch.auto", "true", stages=stages)
    assert "micro-batch: 4 of 4 sequences (batch.auto)" in capsys.readouterr().out


def test_numbers_do_not_depend_on_it(go):
    auto, plain = go("auto", batch={"auto": True}), go("plain", batch={"micro_batch_size": 1})
    losses = [[line["loss"] for line in records(folder)] for folder in (auto, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_dry_run_shows_the_choice_that_a_run_goes_on_with(go, monkeypatch, capsys):
    stages = [{"name": "base", "n_layer": 1, "max_steps": 3}]
    go("run", "--batch.auto", "true", stages=stages)
    monkeypatch.setattr(micro_batch, "available_bytes", lambda _: 1)
    capsys.readouterr()
    go("run", "--batch.auto", "true", "--dry-run", stages=stages)
    assert "micro-batch 4" in capsys.readouterr().out


def test_where_nothing_fits_it_is_refused(pretrain, settings, monkeypatch):
    monkeypatch.setattr(micro_batch, "available_bytes", lambda _: 1)
    done = pretrain(settings, "--batch.auto", "true")
    assert done.returncode == 2 and "not even one sequence at a time fits the memory of the cpu" in done.stderr


def test_a_dry_run_prints_the_memory_of_every_stage_and_what_there_is(pretrain, settings):
    done = pretrain(settings, "--dry-run", "--batch.auto", "true")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("memory")]
    assert [line.split(":")[0] for line in lines] == [
        "memory of stage 1 base",
        "memory of stage 2 grown",
        "memory that is free",
    ]
    assert "micro-batch 4" in lines[0] and "moments" in lines[0] and "micro_batch_size" not in lines[0]


def only_so_much(bytes_by_rank: list[float]) -> None:
    import os

    micro_batch.available_bytes = lambda _: bytes_by_rank[int(os.environ["RANK"])]
    micro_batch.CPU_TOKENS = 10**9


@pytest.mark.slow
def test_processes_agree_on_it_although_their_nodes_differ(prepared, tmp_path):
    settings = of_processes(tmp_path / "run", prepared, batch={"global_batch_size": 8, "auto": True})
    started = run_on(settings, 2, tmp_path / "start", prepare=partial(only_so_much, [1e12, 1e12]))
    assert "micro-batch: 4 of 8 sequences" in started.output()
    again = of_processes(tmp_path / "again", prepared, batch={"global_batch_size": 8, "auto": True})
    refused = run_on(again, 2, tmp_path / "again-start", prepare=partial(only_so_much, [1e12, 1.0]), code=2)
    assert "not even one sequence" in refused.errors() and refused.errors(1) == ""
