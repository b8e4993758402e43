"""Checkpoints of several processes: each writes and reads its own parts; after kills and damage the last one holds."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kill_sweep
from benchmarks.forked import start_function
from grow.apply import grow_checkpoint
from grow.grown import GrownOptimizer, GrownWeights
from grow.operators import plan_growth
from lit_gpt import atomic, checkpoint, checkpoint_folder, sharded_writer
from lit_gpt.axes import parameter_shapes
from lit_gpt.checkpoint import checkpoint_path, latest, prune_temporaries, read_config, read_training, verify
from lit_gpt.errors import DataError
from lit_gpt.lazy_tensors import fill_from, is_shared, spec_of
from pretrain import checkpointing
from pretrain.checkpointing import RunCheckpoints
from pretrain.config import CheckpointConfig, OptimizerConfig, ParallelConfig
from pretrain.optim import build_optimizer, load_named_state, named_state
from pretrain.parallel import Compute, build_model, whole
from pretrain.state import TrainState
from pretrain.world import World, connected, find_world
from tests.pretrain.conftest import of_processes
from tests.pretrain.processes import run_on
from tests.pretrain.runs import assert_same_end, records
from tests.toys import toy_config, toy_weights

CONFIG = toy_config()
FP32 = Compute("fp32", "none", "")


# What two processes do together in this file; each function runs on both and asserts there


def shared_model(world: World, weights: dict[str, torch.Tensor] | None = None) -> tuple[Any, Any]:
    """A toy model that the processes share, and its optimizer after one step, so that it has moments."""
    weights = toy_weights(CONFIG) if weights is None else weights
    model = build_model(CONFIG, weights, FP32, ParallelConfig(), world, device=torch.device("cpu"))
    optimizer = build_optimizer(model, OptimizerConfig())
    for name, parameter in model.named_parameters():
        parameter.grad = torch.full_like(parameter, 1.0 + len(name))
    optimizer.step()
    return model, optimizer


def checkpoints_in(folder: Path, world: World, **settings: Any) -> RunCheckpoints:
    return RunCheckpoints(folder, CheckpointConfig(**settings), {"model_config": CONFIG.to_dict()}, world)


def gathered(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """Whole weights and moments, by the names they are stored under."""
    found = {f"model.{name}": whole(tensor).detach().clone() for name, tensor in model.state_dict().items()}
    for name, slots in named_state(model, optimizer).items():
        found |= {f"optimizer.{name}.{slot}": whole(tensor).clone() for slot, tensor in slots.items()}
    return found


def assert_stored(path: Path, expected: dict[str, torch.Tensor]) -> None:
    stored = read_training(path).tensors
    assert set(stored) == set(expected)
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())


def save_and_load(world: World, folder: Path) -> None:
    model, optimizer = shared_model(world)
    expected = gathered(model, optimizer)
    checkpoints = checkpoints_in(folder, world)
    torch.manual_seed(world.rank)
    states = torch.get_rng_state()
    checkpoints.save(model, optimizer, TrainState(step_count=1), learning={"of": world.rank})
    assert_stored(checkpoints.last, expected)
    assert verify(checkpoints.last) == []
    resumed = checkpoints_in(folder, world).resume()
    assert torch.equal(resumed.rng["torch"], states) and resumed.rng["learning"] == {"of": world.rank}

    opened: set[str] = set()
    reader = resumed.tensors._reader
    create_stream = reader.fs.create_stream
    reader.fs.create_stream = lambda path, mode: (opened.add(path.name), create_stream(path, mode))[1]
    other, other_optimizer = shared_model(world, {name: torch.zeros_like(w) for name, w in toy_weights(CONFIG).items()})
    for shared in (True, False):  # norms are whole on each, and one of the two wrote them
        for name, parameter in other.named_parameters():
            if is_shared(parameter) == shared:
                fill_from(resumed.model, name, parameter.data)
        assert not shared or opened == {f"__{world.rank}_0.distcp"}, "each reads what it wrote"
    load_named_state(other, other_optimizer, resumed.optimizer)
    after = gathered(other, other_optimizer)
    assert all(torch.equal(after[name], tensor) for name, tensor in expected.items())


def grow_into_parts(world: World, folder: Path) -> None:
    """A grown model is filled with what belongs on each process, moments too, and equals the one made whole."""
    model, optimizer = shared_model(world)
    checkpoints = checkpoints_in(folder, world)
    checkpoints.save(model, optimizer, TrainState(step_count=1))
    source = read_training(checkpoints.last)
    for operator, policy in (("stack", "map"), ("llama-pro", "map-old-zero-new"), ("zero-width", "map")):
        plan = plan_growth(operator, CONFIG, **({"n_layer": 3} if operator == "llama-pro" else {"factor": 2}))
        weights, moments = GrownWeights(plan, source.model), GrownOptimizer(plan, source.optimizer, policy)
        grown = build_model(plan.dst, weights, FP32, ParallelConfig(), world, device=torch.device("cpu"))
        state = build_optimizer(grown, OptimizerConfig())
        load_named_state(grown, state, moments)
        for name, tensor in gathered(grown, state).items():
            kind, _, rest = name.partition(".")
            name, _, slot = rest.rpartition(".")
            assert torch.equal(tensor, weights[rest] if kind == "model" else moments[name][slot]), (operator, rest)


def change_while_written(world: World, folder: Path) -> None:
    changed = threading.Event()
    write = checkpointing.write_training

    def late(*args: Any, **kwargs: Any) -> Path:
        assert changed.wait(60)
        return write(*args, **kwargs)

    checkpointing.write_training = late
    model, optimizer = shared_model(world)
    checkpoints = checkpoints_in(folder, world)
    for step in (1, 2):  # the second copy goes into the memory of the first
        expected = gathered(model, optimizer)
        changed.clear()
        checkpoints.save(model, optimizer, TrainState(step_count=step), periodic=True)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
            for slots in named_state(model, optimizer).values():
                for tensor in slots.values():
                    tensor.mul_(2.0)
        path = folder / "checkpoints" / "stage-01" / f"step-{step:010d}"
        assert not path.exists() and checkpoints.last != path, "nothing counts before it is complete"
        world.barrier()
        changed.set()
        checkpoints._collect(stop=True)
        assert checkpoints.last == path
        assert_stored(path, expected)


def fail_on_one_process(world: World, folder: Path) -> None:
    """The disk of the second process is full, in the foreground and in the background, under both policies."""
    model, optimizer = shared_model(world)
    write = checkpoint.write_synced
    for policy, in_background in (("continue", True), ("stop", True), ("stop", False)):
        run = folder / f"{policy}-{in_background}"
        checkpoints = checkpoints_in(run, world, on_failure=policy, async_save=in_background)
        checkpoints.save(model, optimizer, TrainState(step_count=1))
        good = checkpoints.last
        if world.rank == 1:
            checkpoint.write_synced = full_disk
        try:
            checkpoints.save(model, optimizer, TrainState(step_count=2), periodic=True)
            while checkpoints._saving is not None:
                checkpoints.poll()
            stopped = None
        except OSError as error:
            stopped = error.errno
        except SystemExit as leaving:
            stopped = leaving.code
        checkpoint.write_synced = write
        expected = {"continue": [None, None], "stop": [errno.ENOSPC, 3]}[policy]
        assert world.gather(stopped) == expected, (policy, in_background)
        assert checkpoints.last == good and latest(run / "checkpoints", deep=True) == good
        world.barrier()
        assert {path.name for path in good.parent.iterdir()} == {good.name}
        checkpoints.save(model, optimizer, TrainState(step_count=3))
        assert checkpoints.last.name.endswith("3") and verify(checkpoints.last) == []
        world.barrier()


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


TOGETHER = (save_and_load, grow_into_parts, change_while_written, fail_on_one_process)


def all_of_them(folder: Path) -> None:
    world = find_world()
    with connected(world, "cpu"):
        for each in TOGETHER:
            each(world, folder / each.__name__)
            (folder / f"{each.__name__}.{world.rank}").touch()


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Callable[[str], None]:
    """Whether a function of this file went through on both processes; they are started once for all."""
    folder = tmp_path_factory.mktemp("together")
    started = start_function(all_of_them, (folder,), 2, folder / "logs")
    started.wait()

    def check(name: str) -> None:
        for rank in range(2):
            assert (folder / f"{name}.{rank}").exists(), started.errors(rank)

    return check


@pytest.mark.slow
@pytest.mark.parametrize("function", TOGETHER, ids=lambda function: function.__name__)
def test_on_two_processes(together, function):
    together(function.__name__)


# Whole runs


def cut_back(run: Path, copied: Path, stage: int = 2, step: int = 10) -> Path:
    kill_sweep.cut_back(run, copied, stage, step)
    return copied


@pytest.mark.parametrize(
    ("size", "parallel"),
    [
        (1, {}),
        (2, {}),
        pytest.param(2, {"strategy": "ddp"}, marks=pytest.mark.slow),
        pytest.param(4, {}, marks=pytest.mark.slow),
        pytest.param(4, {"replicas": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_two_processes_saved_goes_on_in_any_world(of_two, prepared, tmp_path, size, parallel):
    run = cut_back(of_two, tmp_path / "run")
    started = run_on(of_processes(run, prepared, parallel=parallel), size, tmp_path / "start")
    assert "resumed from" in started.output(), started.errors()
    if (size, parallel) == (2, {}):
        assert_same_end(run, of_two)
    ours, theirs = ([line["loss"] for line in records(folder)] for folder in (run, of_two))
    assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.slow
def test_growth_may_begin_with_another_number_of_processes_than_the_stage_before_ended_with(of_two, prepared, tmp_path):
    run = cut_back(of_two, tmp_path / "run", 1, 6)
    started = run_on(of_processes(run, prepared), 1, tmp_path / "start")
    assert "growth: stack 1 -> 3" in started.output(), started.errors()
    ours, theirs = ([line["loss"] for line in records(folder)] for folder in (run, of_two))
    assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_grows_by_links(of_two, tmp_path):
    source = latest(of_two / "checkpoints")
    plan = plan_growth("stack", read_config(source), factor=2)
    grow_checkpoint(source, tmp_path / "grown", plan, "map")
    assert verify(tmp_path / "grown") == []
    grown, before = read_training(tmp_path / "grown"), read_training(source)
    expected = GrownWeights(plan, before.model)
    assert all(torch.equal(grown.model[name], expected[name]) for name in parameter_shapes(plan.dst))
    linked = {path.name for path in (tmp_path / "grown").glob("*.distcp") if path.stat().st_nlink == 2}
    assert linked == {path.name for path in source.glob("*.distcp")}
    assert spec_of(grown.optimizer["lm_head.weight"], "exp_avg").shape == (320, 16)


def missing(path: Path, earlier: Path) -> str:
    (path / "__1_0.distcp").unlink()
    return "is missing"


def flipped(path: Path, earlier: Path) -> str:
    content = bytearray((path / "__1_1.distcp").read_bytes())
    content[len(content) // 2] ^= 4
    (path / "__1_1.distcp").write_bytes(content)
    return "crc32"


def mixed(path: Path, earlier: Path) -> str:
    shutil.copy(earlier / "__0_0.distcp", path / "__0_0.distcp")
    return "crc32"


def without_a_process(path: Path, earlier: Path) -> str:
    (path / "rng-00001.pt").unlink()
    return "is missing"


@pytest.mark.slow
@pytest.mark.parametrize("damage", [missing, flipped, mixed, without_a_process])
def test_a_damaged_checkpoint_is_passed_over_by_name_for_the_one_before(of_two, tmp_path, capsys, damage):
    run = cut_back(of_two, tmp_path / "run")
    last, before = (run / "checkpoints" / "stage-02" / f"step-{step:010d}" for step in (10, 8))
    what = damage(last, before)
    checkpoints = checkpoints_in(run, World())
    checkpoint = checkpoints.resume()
    assert checkpoints.last == before and checkpoint.state["step_count"] == 8
    told = capsys.readouterr().err
    assert f"warning: {last} is passed over" in told and what in told


@pytest.mark.slow
def test_a_folder_on_a_read_only_file_system_is_refused_before_the_first_step(of_two, settings, pretrain, tmp_path):
    mount = tmp_path / "mount"
    mount.mkdir()
    options = ["mount", "-t", "tmpfs", "tmpfs", str(mount)]
    if subprocess.run(options, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount here")
    try:
        (mount / "run").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
        result = pretrain({**settings, "out_dir": str(mount / "run")})
    finally:
        subprocess.run(["umount", str(mount)], check=True)
    assert result.returncode == 3 and "Read-only" in result.stderr and "step" not in result.stdout.split("FLOPs")[-1]


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch, capsys):
    model, optimizer = shared_model(World())
    checkpoints = checkpoints_in(tmp_path, World(), on_failure="continue")
    checkpoints.save(model, optimizer, TrainState(step_count=1))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    checkpoints.save(model, optimizer, TrainState(step_count=2), periodic=True)
    assert "could not be saved" in capsys.readouterr().err and checkpoints.last.name.endswith("1")
    with pytest.raises(OSError, match="1,000 are free"):
        checkpoints.save(model, optimizer, TrainState(step_count=2))
    assert prune_temporaries(checkpoints.folder) == []


def assert_only_the_first_is_there(checkpoints: RunCheckpoints) -> None:
    """Whole, and nothing beside it that could be taken for another."""
    kept = checkpoint_path(checkpoints.folder, 1, 1)
    assert latest(checkpoints.folder) == kept == checkpoints.last and verify(kept) == []
    assert list(checkpoints.folder.rglob("step-*")) == [kept] and prune_temporaries(checkpoints.folder) == []


# name: owner and name of the function in which the disk turns out to be full
WRITERS = {
    "tensors": (sharded_writer._CountingStream, "write"),
    "metadata": (sharded_writer._Writer, "finish"),
    "state": (checkpoint, "write_synced"),
    "manifest": (atomic, "write_synced"),
    "fsync": (atomic.os, "fsync"),
}


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_fills_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch, name, async_save):
    model, optimizer = shared_model(World())
    with checkpoints_in(tmp_path, World(), async_save=async_save) as checkpoints:
        checkpoints.save(model, optimizer, TrainState(step_count=1))
        monkeypatch.setattr(*WRITERS[name], full_disk)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(model, optimizer, TrainState(step_count=2), periodic=True)
            checkpoints.save(model, optimizer, TrainState(step_count=3), periodic=True)  # waits for the one before
    monkeypatch.undo()
    assert_only_the_first_is_there(checkpoints)


@pytest.mark.parametrize(("policy", "async_save"), [("stop", False), ("continue", True)])
def test_a_run_whose_disk_is_full_for_a_while_loses_no_step(
    settings, pretrain, finished_run, monkeypatch, policy, async_save
):
    settings["checkpoints"] = {"every_steps": 2, "async_save": async_save, "on_failure": policy}
    original = sharded_writer.write_tensors

    def full_at_step_4(directory, *arguments, **keywords):
        with monkeypatch.context() as patch:
            if "step-0000000004" in directory.name:
                patch.setattr(sharded_writer._CountingStream, "write", full_disk)
            return original(directory, *arguments, **keywords)

    monkeypatch.setattr(sharded_writer, "write_tensors", full_at_step_4)
    result = pretrain(settings)
    assert "The disk is full" in result.stderr
    if policy == "stop":
        assert result.returncode == 3
        monkeypatch.undo()
        result = pretrain(settings)
    assert result.returncode == 0, result.stderr
    assert_same_end(Path(settings["out_dir"]), finished_run)


@pytest.mark.slow
def test_a_disk_that_is_really_full_leaves_the_one_before(tmp_path, monkeypatch):
    """Four megabytes, of which all but a few pages are taken; and nobody looks at the free space before."""
    mount = tmp_path / "mount"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    monkeypatch.setattr(checkpoint, "check_free_space", lambda *_: None)
    try:
        model, optimizer = shared_model(World())
        checkpoints = checkpoints_in(mount / "run", World())
        checkpoints.save(model, optimizer, TrainState(step_count=1))
        free = shutil.disk_usage(mount).free
        (mount / "taken").write_bytes(bytes(free - (16 << 10)))
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(model, optimizer, TrainState(step_count=2))
        assert_only_the_first_is_there(checkpoints)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_an_old_checkpoint_that_cannot_be_removed_does_not_make_the_new_one_fail(tmp_path, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    model, optimizer = shared_model(World())
    checkpoints = checkpoints_in(tmp_path, World(), keep_last=1)
    checkpoints.save(model, optimizer, TrainState(step_count=1))
    monkeypatch.setattr(checkpointing, "remove_directory", refuse)
    checkpoints.save(model, optimizer, TrainState(step_count=2))
    assert checkpoints.last == checkpoint_path(checkpoints.folder, 1, 2)
    assert "step-0000000001 could not be removed" in capsys.readouterr().err


def test_a_single_process_may_write_in_the_background_too(tmp_path):
    model, optimizer = shared_model(World())
    with checkpoints_in(tmp_path, World(), async_save=True) as checkpoints:
        checkpoints.save(model, optimizer, TrainState(step_count=1), periodic=True)
    assert_stored(checkpoints.last, gathered(model, optimizer))


def test_a_checkpoint_that_is_being_written_is_waited_for_and_not_written_again(tmp_path):
    model, optimizer = shared_model(World())
    with checkpoints_in(tmp_path, World(), async_save=True) as checkpoints:
        checkpoints.save(model, optimizer, TrainState(step_count=1), periodic=True)
        assert checkpoints.holds(TrainState(step_count=1)) and not checkpoints.holds(TrainState(step_count=2))


def test_how_long_a_save_takes_is_not_how_long_training_stands(tmp_path, monkeypatch):
    """The run has to stop early enough for a save that nobody waits for as a rule."""
    model, optimizer = shared_model(World())
    monkeypatch.setattr(checkpointing, "BackgroundWork", ThousandSeconds)
    with checkpoints_in(tmp_path, World(), async_save=True) as checkpoints:
        checkpoints.save(model, optimizer, TrainState(step_count=1), periodic=True)
        checkpoints.poll()
        assert checkpoints.longest_secs == 1000.0


class ThousandSeconds:
    """Work that is done at once and says that it took long."""

    seconds = 1000.0

    def __init__(self, work, world):
        self.result = work

    def is_done(self) -> bool:
        return True


def test_a_single_cpu_process_writes_in_the_foreground_unless_told_otherwise(tmp_path):
    model, optimizer = shared_model(World())
    checkpoints = checkpoints_in(tmp_path, World())
    checkpoints.save(model, optimizer, TrainState(step_count=1), periodic=True)
    assert checkpoints.last is not None


@pytest.mark.parametrize("look", ["on resume", "at a parent"])
def test_two_processes_share_the_checking(finished_run, look):
    """Each looks at some of the files, together at all of them."""
    path = latest(finished_run / "checkpoints")
    files = read_training(path).manifest["files"]
    looked_at: list[str] = []

    class Half(World):
        def gather(self, value):
            return [value]

    def note(directory, manifest, **_):
        looked_at.extend(manifest["files"])
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_folder, "directory_problems", note)
        for rank in range(2):
            half = Half(rank=rank, size=2)
            if look == "on resume":
                assert checkpoint_folder.reason_to_skip(path, deep=True, processes=half) is None
            else:
                read_training(path, processes=half)
    assert sorted(looked_at) == sorted(files)


def test_one_process_finds_the_damage_for_all(finished_run, tmp_path):
    """Of the two largest files, weights and moments, each looks at one."""
    path = Path(shutil.copytree(latest(finished_run / "checkpoints"), tmp_path / "parent"))
    damaged = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    of_the_other: list[Any] = []

    class Half(World):
        def gather(self, value):
            of_the_other.append(value)
            return of_the_other

    with pytest.raises(DataError, match=f"{damaged.name}.*crc32"):
        read_training(path, processes=Half(rank=0, size=2))
    with pytest.raises(DataError, match=f"{damaged.name}.*crc32"):
        read_training(path, processes=Half(rank=1, size=2))


@pytest.mark.slow
def test_a_growth_that_is_being_learned_goes_on_to_the_bit_on_two_processes(prepared, tmp_path):
    stages = [
        {"name": "base", "n_layer": 1, "max_steps": 3},
        {"name": "grown", "operator": "ligo", "options": {"learn_steps": 3}, "max_steps": 6},
    ]
    keep = {"every_steps": 1, "keep_every_steps": 1}
    whole_run = of_processes(tmp_path / "whole", prepared, stages=stages, checkpoints=keep)
    run_on(whole_run, 2, tmp_path / "first")
    run = cut_back(tmp_path / "whole", tmp_path / "run", 2, 5)
    again = run_on(of_processes(run, prepared, stages=stages, checkpoints=keep), 2, tmp_path / "second")
    assert "resumed from" in again.output()
    assert_same_end(run, tmp_path / "whole")


@pytest.mark.slow
def test_kills_at_every_moment_lose_nothing(tmp_path):
    kills = kill_sweep.sweep(tmp_path, 5, [], 900, tmp_path / "result.json")
    assert len(kills) == 5 and [kill for kill in kills if not kill_sweep.is_good(kill)] == []
    assert json.loads((tmp_path / "result.json").read_text())["summary"]["kills"] == 5
