"""Growth from checkpoint to checkpoint: one tensor in memory, copies never read into it, nothing half-finished."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from grow.apply import grow_checkpoint, grow_optimizer, grow_weights, make_weights
from grow.grown import GrownWeights, copied_parameters
from grow.operators import needs_data, plan_growth
from grow.plan import OPTIMIZER_POLICIES, GrowthPlan
from grow.registry import OPERATORS
from grow.samples import open_samples
from lit_gpt import atomic
from lit_gpt.axes import parameter_shapes
from lit_gpt.checkpoint import (
    TRAINING,
    prune_temporaries,
    read_config,
    read_exchange,
    read_training,
    read_weights,
    verify,
    write_exchange,
    write_training,
)
from lit_gpt.config import Config
from lit_gpt.errors import DataError
from lit_gpt.exchange_writer import Copies
from lit_gpt.lazy_tensors import LazyTensors, TensorSpec
from lit_gpt.packed_dataset import write_token_file
from tests.grow.test_apply import digest, toy_moments, training_state, tree_digest
from tests.toys import toy_config, toy_weights

CONFIG = toy_config(vocab_size=20)
SIZES = {"solar": {"n_layer": 2}, "one-layer": {"n_layer": 3}, "lidas": {"n_layer": 6}, "inheritune": {"n_layer": 1}}
SIZES |= {name: {"n_layer": 3} for name in ("llama-pro", "midas", "gradual", "mslt", "random-depth")}
SIZES |= {name: {"n_layer": 4, "n_embd": 32} for name, op in OPERATORS.items() if op.axis == "both"}
SIZES |= {
    "opt-deus": {"n_layer": 5},
    "lesa": {"n_layer": 5},
    "partial": {"layer_map": "1-12*2-2"},
    "learn-depth": {"n_layer": 4, "learn_steps": 2},
}
SIZES["learn-width"] |= {"learn_steps": 2}


def plan_of(name: str) -> GrowthPlan:
    """A growth of a two-layer model by any operator; some of them need another depth."""
    src = toy_config(vocab_size=20, n_layer={"one-layer": 1, "lidas": 4, "opt-deus": 3, "lesa": 3}.get(name, 2))
    default = {"factor": 2} if "factor" in OPERATORS[name].options else {"n_layer": 4}
    return plan_growth(name, src, **SIZES.get(name, default))


def write_source(path: Path, config: Config = CONFIG, *, weights: dict | None = None, form: str = TRAINING) -> Path:
    weights = toy_weights(config) if weights is None else weights
    if form == TRAINING:
        return write_training(path, weights, toy_moments(config), training_state(config))
    return write_exchange(path, config, weights, max_shard_bytes=5000)


@pytest.fixture
def trained(tmp_path) -> Path:
    return write_source(tmp_path / "src")


@pytest.fixture
def exchanged(tmp_path) -> Path:
    """Several files, so that tensors move from one into another."""
    return write_source(tmp_path / "src", form="exchange")


def inodes(path: Path) -> set[int]:
    return {file.stat().st_ino for file in path.glob("*.distcp")}


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_makes_the_same_weights_from_file_to_file_as_in_memory(tmp_path, name):
    plan = plan_of(name)
    ids = torch.randint(20, (400,), generator=torch.Generator().manual_seed(0)).numpy()
    write_token_file(tmp_path / "tokens.bin", ids, np.dtype("uint16"))
    samples = open_samples(tmp_path / "tokens.bin", plan.src) if needs_data(plan) else None
    expected = digest(make_weights(plan, toy_weights(plan.src), samples=samples).weights)
    for form in (TRAINING, "exchange"):
        source = write_source(tmp_path / form, plan.src, form=form)
        before = tree_digest(source)

        grow_checkpoint(source, tmp_path / f"{form}-grown", plan, samples=samples)

        assert digest(read_weights(tmp_path / f"{form}-grown")) == expected, form
        assert verify(tmp_path / f"{form}-grown") == [] and tree_digest(source) == before


@pytest.mark.parametrize("policy", OPTIMIZER_POLICIES)
@pytest.mark.parametrize("name", ["stack", "llama-pro", "random-depth", "lemon"])
def test_moments_are_the_same_from_file_to_file_as_in_memory(trained, tmp_path, name, policy):
    plan = plan_of(name)

    grow_checkpoint(trained, tmp_path / "grown", plan, policy)

    expected = grow_optimizer(plan, toy_moments(CONFIG), policy)
    found = read_training(tmp_path / "grown").optimizer
    assert {name: digest(slots) for name, slots in found.items()} == {
        name: digest(slots) for name, slots in expected.items()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_reaches_every_weight(trained, tmp_path, dtype):
    plan = plan_of("stack")

    grow_checkpoint(trained, tmp_path / "grown", plan, dtype=dtype)

    expected = grow_weights(plan, {name: weight.to(dtype) for name, weight in toy_weights(CONFIG).items()})
    assert digest(read_training(tmp_path / "grown").model) == digest(expected)
    assert not inodes(tmp_path / "grown") & inodes(trained)


# Nothing is read that need not be


def no_reading(*_: object) -> None:
    raise AssertionError("a tensor was made")


def test_a_copy_in_depth_makes_no_tensor(exchanged, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_gpt.exchange_files.read_tensor", no_reading)
    grow_checkpoint(exchanged, tmp_path / "grown", plan_of("stack"))
    assert (tmp_path / "grown").is_dir()


def test_copies_go_from_several_files_into_several_others(exchanged, tmp_path):
    plan = plan_of("stack")
    source = read_exchange(exchanged).weights
    grown = GrownWeights(plan, source)

    write_exchange(
        tmp_path / "dst", plan.dst, grown, max_shard_bytes=7000, copies=Copies(source, copied_parameters(plan))
    )

    assert len(list((tmp_path / "dst").glob("*.safetensors"))) > len(list(exchanged.glob("*.safetensors"))) > 2
    assert verify(tmp_path / "dst") == []
    assert digest(read_exchange(tmp_path / "dst").weights) == digest(grow_weights(plan, toy_weights(CONFIG)))


@pytest.mark.parametrize("policy", ["reset", "map"])
def test_a_copy_in_depth_of_training_form_links_the_files_and_reads_none(trained, tmp_path, monkeypatch, policy):
    monkeypatch.setattr("lit_gpt.sharded.StoredTensors.__getitem__", no_reading)
    data = {file.name for file in trained.glob("*.distcp")}
    read = []
    monkeypatch.setattr(
        atomic, "_describe", lambda path, *more, given=atomic._describe: read.append(path) or given(path, *more)
    )
    monkeypatch.setattr(
        "grow.apply.SMALL_FILE_BYTES", min(file.stat().st_size for file in trained.glob("*.distcp")) - 1
    )

    grow_checkpoint(trained, tmp_path / "grown", plan_of("stack"), policy)

    linked = {"map": data, "reset": {"__0_0.distcp"}}[policy]  # moments have a file of their own, which reset leaves
    assert {file.name for file in (tmp_path / "grown").glob("*.distcp")} == linked
    assert inodes(tmp_path / "grown") == {(trained / name).stat().st_ino for name in linked}
    assert {path.name for path in read if path.parent == trained}.isdisjoint(data)


def test_only_what_is_not_a_copy_is_written_anew(trained, tmp_path):
    plan = plan_of("llama-pro")  # layer 2 of 3 is an identity layer

    grow_checkpoint(trained, tmp_path / "grown", plan)

    tensors = read_training(tmp_path / "grown").tensors
    linked = {file.name for file in (tmp_path / "grown").glob("*.distcp") if file.stat().st_ino in inodes(trained)}
    new = {name for name in tensors if tensors.places[name][0][1].relative_path not in linked}
    assert new == {f"model.{name}" for name in parameter_shapes(plan.dst) if plan.is_silenced(name)}


def test_a_chain_of_growths_outlives_its_sources(trained, tmp_path):
    weights, plans = toy_weights(CONFIG), []
    for number, name in enumerate(("llama-pro", "random-depth", "stack")):
        source = tmp_path / f"{number - 1}" if number else trained
        config = read_config(source)
        sizes = {"factor": 2} if name == "stack" else {"n_layer": config.n_layer + 1}
        plans.append(plan_growth(name, config, **sizes))
        grow_checkpoint(source, tmp_path / f"{number}", plans[-1], "map")
        weights = grow_weights(plans[-1], weights)
        shutil.rmtree(source)

    assert verify(tmp_path / "2") == [] and digest(read_training(tmp_path / "2").model) == digest(weights)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM])
def test_where_links_are_impossible_the_files_are_copied(trained, tmp_path, monkeypatch, number):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    plan = plan_of("stack")

    grow_checkpoint(trained, tmp_path / "grown", plan, "map")

    assert not inodes(tmp_path / "grown") & inodes(trained)
    assert verify(tmp_path / "grown") == []
    assert digest(read_training(tmp_path / "grown").model) == digest(grow_weights(plan, toy_weights(CONFIG)))


# One tensor at a time


class Counted(LazyTensors):
    """Tensors that are made on access; knows how many of them were alive at once."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        self.most = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = torch.ones(self.shapes[name])
        self.alive.add(tensor)
        self.most = max(self.most, len(self.alive))
        return tensor

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(self.shapes[name], torch.float32)


@pytest.mark.parametrize("form", [TRAINING, "exchange"])
def test_a_tensor_is_let_go_before_the_next_but_one_is_made(tmp_path, form):
    weights = Counted(parameter_shapes(CONFIG))
    gc.disable()  # what is held in a cycle counts
    try:
        if form == TRAINING:
            moments = {
                name: Counted(dict.fromkeys(("exp_avg", "exp_avg_sq"), weights.shapes[name])) for name in weights
            }
            write_training(tmp_path / "dst", weights, moments, training_state(CONFIG))
            assert max(slots.most for slots in moments.values()) <= 2
        else:
            write_exchange(tmp_path / "dst", CONFIG, weights)
    finally:
        gc.enable()
    assert 0 < weights.most <= 2  # the name of the last one is bound until the next is there


# Weights that are no numbers, damage, disks that are full


@pytest.mark.parametrize("form", [TRAINING, "exchange"])
@pytest.mark.parametrize("name", ["stack", "split-width"])
def test_weights_that_are_not_numbers_are_refused_by_name_and_grow_on_request(tmp_path, form, name):
    weights = toy_weights(CONFIG)
    weights["transformer.h.0.attn.attn.weight"][5, 3] = float("inf")
    weights["transformer.h.1.norm_2.weight"][3] = float("nan")
    source = write_source(tmp_path / "src", weights=weights, form=form)

    with pytest.raises(DataError) as failure:
        grow_checkpoint(source, tmp_path / "grown", plan_of(name))
    assert [line.split()[1] for line in str(failure.value).splitlines()] == [
        "transformer.h.0.attn.attn.weight",
        "transformer.h.1.norm_2.weight",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]

    grow_checkpoint(source, tmp_path / "grown", plan_of(name), allow_non_finite=True)
    with pytest.raises(DataError, match="holds NaN or infinity"):
        grow_checkpoint(tmp_path / "grown", tmp_path / "again", plan_growth("stack", plan_of(name).dst, factor=2))


@pytest.mark.parametrize("finite", [True, False])
def test_a_checkpoint_that_does_not_say_whether_it_is_finite_is_read(tmp_path, finite):
    weights = toy_weights(CONFIG)
    if not finite:
        weights["lm_head.weight"][0, 0] = float("nan")
    source = write_source(tmp_path / "src", weights=weights)
    atomic._write_manifest(source, TRAINING)  # as earlier versions wrote it

    if finite:
        grow_checkpoint(source, tmp_path / "grown", plan_of("stack"))
        assert inodes(tmp_path / "grown") <= inodes(source)
        assert read_training(tmp_path / "grown").is_finite, "now it was looked at"
    else:
        with pytest.raises(DataError, match=r"lm_head.weight holds NaN or infinity"):
            grow_checkpoint(source, tmp_path / "grown", plan_of("stack"))


@pytest.mark.parametrize("name", ["stack", "zero-width"])
def test_a_changed_byte_in_any_file_of_weights_is_found_while_it_is_copied(exchanged, tmp_path, name):
    for file in sorted(exchanged.glob("*.safetensors")):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DataError, match=f"{file.name} does not have the crc32"):
            grow_checkpoint(exchanged, tmp_path / "grown", plan_of(name))
        file.write_bytes(content)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


@pytest.mark.parametrize("name", ["opt-deus", "lesa"])
def test_no_layer_is_made_from_a_damaged_file_though_its_copies_are_linked(tmp_path, monkeypatch, name):
    monkeypatch.setattr("grow.apply.SMALL_FILE_BYTES", 0)
    src = toy_config(vocab_size=20, n_layer=4)
    source = write_source(tmp_path / "source", src)
    file = source / "__0_0.distcp"  # of the weights
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="does not have the crc32"):
        grow_checkpoint(source, tmp_path / "grown", plan_growth(name, src, n_layer=5))
    assert not (tmp_path / "grown").exists()


@pytest.mark.parametrize("change", [lambda tensors: tensors.popitem(), lambda tensors: tensors.update(x=torch.ones(2))])
def test_missing_and_unexpected_tensors_are_refused_and_nothing_is_written(exchanged, tmp_path, change):
    from safetensors.torch import load_file, save_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(exchanged.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    change(tensors)
    (exchanged / "MANIFEST.json").unlink()
    (exchanged / "model.safetensors.index.json").unlink()
    save_file(tensors, exchanged / "model.safetensors")

    with pytest.raises(DataError, match=r"is missing|unexpected tensor x"):
        grow_checkpoint(exchanged, tmp_path / "grown", plan_of("stack"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


@pytest.mark.parametrize("form", [TRAINING, "exchange"])
@pytest.mark.parametrize("where", ["found before", "met on the way"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, form, where):
    source = write_source(tmp_path / "src", form=form)
    if where == "found before":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    else:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        for name in ("link", "pwrite", "copy_file_range"):
            monkeypatch.setattr(os, name, full, raising=False)

    with pytest.raises(OSError) as failure:
        grow_checkpoint(source, tmp_path / "grown", plan_of("llama-pro"))

    assert failure.value.errno == errno.ENOSPC
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


# Killed


def test_what_a_killed_growth_left_goes_with_the_next_and_nothing_else_does(exchanged, tmp_path):
    for name in (".grown.lit-tmp-01234567", ".other.lit-tmp-01234567"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_bytes(b"x" * 99)

    grow_checkpoint(exchanged, tmp_path / "grown", plan_of("stack"))

    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.lit-tmp-01234567", "grown", "src"]
    assert [path.name for path in prune_temporaries(tmp_path)] == [".other.lit-tmp-01234567"]


KILLED_GROWTHS = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from grow.apply import grow_checkpoint
from tests.grow.test_streaming import plan_of
from tests.kills import kill_at, start_child
from lit_gpt import sharded_writer
from lit_gpt.checkpoint import verify

src, folder, chance = Path(sys.argv[1]), Path(sys.argv[2]), random.Random(0)
plan = plan_of("llama-pro")

def start(*before):
    return start_child(lambda: grow_checkpoint(src, folder / "grown", plan), *before)

killed, event_number, status = 0, -1, 1
while status:
    event_number += 3
    by_chance = event_number % 8 == 0
    if by_chance:
        child = start()
        time.sleep(chance.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
    else:
        child = start(lambda: kill_at(event_number))
    _, status = os.waitpid(child, 0)
    if (folder / "grown").exists():
        assert verify(folder / "grown") == [], event_number
        if not by_chance:
            break
        shutil.rmtree(folder / "grown")  # chance came late, or it was published before it was killed
        status = 1
        continue
    killed += 1
if status:
    shutil.rmtree(folder / "grown")
    _, status = os.waitpid(start(), 0)
print(killed, status)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", [TRAINING, "exchange"])
def test_a_growth_killed_at_any_moment_leaves_nothing_or_a_whole_checkpoint_and_can_be_repeated(tmp_path, root, form):
    """Killed before every third call to the file system that Python makes, and at random moments, until one ends."""
    source = write_source(tmp_path / "src", form=form)
    before = tree_digest(source)

    done = subprocess.run(
        [sys.executable, "-c", KILLED_GROWTHS, str(source), str(tmp_path / "out")],
        check=True,
        cwd=root,
        timeout=120,
        stdout=subprocess.PIPE,
        text=True,
    )

    killed, status = map(int, done.stdout.split())
    assert killed > 20 and status == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["grown"], "what was killed has gone"
    assert digest(read_weights(tmp_path / "out" / "grown")) == digest(
        grow_weights(plan_of("llama-pro"), toy_weights(CONFIG))
    )
    assert verify(tmp_path / "out" / "grown") == [] and tree_digest(source) == before
