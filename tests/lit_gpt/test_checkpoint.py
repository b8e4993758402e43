"""Checkpoints in training form: bitwise round trips, damage is always found, a kill leaves nothing or everything."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt import atomic
from lit_gpt.axes import parameter_shapes
from lit_gpt.checkpoint import (
    EXCHANGE,
    TRAINING,
    atomic_directory,
    checkpoint_path,
    detect_form,
    latest,
    manifest_sha256,
    prune_temporaries,
    read_config,
    read_training,
    read_weights,
    verify,
    write_exchange,
    write_training,
)
from lit_gpt.config import Config
from lit_gpt.errors import DataError
from lit_gpt.problems import raise_problems

CONFIG = Config(n_layer=2, n_head=2, n_embd=8, intermediate_size=12, vocab_size=40, block_size=16)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Every bit pattern is possible, NaN and infinity too."""
    n_bytes = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (n_bytes,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def random_model(config: Config, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: random_bits(shape, dtype, generator) for name, shape in parameter_shapes(config).items()}


def random_moments(config: Config, seed: int = 1) -> dict[str, dict[str, torch.Tensor]]:
    first, second = random_model(config, seed=seed), random_model(config, seed=seed + 1)
    return {
        name: {"exp_avg": first[name], "exp_avg_sq": second[name], "step": torch.tensor(7.0)}
        for name in parameter_shapes(config)
    }


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    as_bytes = [t.contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


def state_of(config: Config) -> dict:
    return {"format": 1, "model_config": config.to_dict(), "step_count": 7}


def save(path: Path, config: Config = CONFIG, seed: int = 0, **options) -> Path:
    rng = {"torch": torch.get_rng_state(), "python": (3, (1, 2), None)}
    return write_training(
        path, random_model(config, seed=seed), random_moments(config), state_of(config), rng, **options
    )


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("pristine") / "step-0000000007")


@pytest.fixture
def checkpoint(pristine, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "copy" / "stage-01" / "step-0000000007"))


def resign(checkpoint: Path) -> None:
    """What an attacker can do, or a later tool: make the manifest fit the files."""
    atomic._write_manifest(checkpoint, TRAINING)


def contents(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@settings(max_examples=6)
@given(
    n_layer=st.integers(1, 3),
    groups=st.sampled_from([(2, 2), (4, 2), (4, 1)]),
    head_size=st.sampled_from([2, 6]),
    tied=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_what_is_read_is_bit_for_bit_what_was_written(tmp_path, n_layer, groups, head_size, tied, dtype, seed):
    n_head, n_query_groups = groups
    config = Config(
        n_layer=n_layer,
        n_head=n_head,
        n_query_groups=n_query_groups,
        head_size=head_size,
        n_embd=8,
        intermediate_size=5,
        vocab_size=9,
        padded_vocab_size=10,
        tie_embeddings=tied,
    )
    model, moments = random_model(config, dtype, seed), random_moments(config, seed)

    write_training(tmp_path / "checkpoint", model, moments, state_of(config), replace=True)
    read = read_training(tmp_path / "checkpoint")

    assert read.model.keys() == model.keys()
    assert all(same_bits(read.model[name], model[name]) for name in model)
    assert read.optimizer.keys() == moments.keys()
    assert all(same_bits(read.optimizer[name][slot], moments[name][slot]) for name in moments for slot in moments[name])
    assert read_config(tmp_path / "checkpoint") == config


def test_state_and_random_state_come_back(pristine):
    read = read_training(pristine)

    assert read.state == state_of(CONFIG)
    assert torch.equal(read.rng["torch"], torch.get_rng_state())
    assert read.rng["python"] == (3, (1, 2), None)


def test_a_checkpoint_without_moments_and_without_random_state_is_valid(tmp_path):
    write_training(tmp_path / "checkpoint", random_model(CONFIG), {}, state_of(CONFIG))

    read = read_training(tmp_path / "checkpoint")

    assert (read.optimizer, read.rng) == ({}, None)
    assert verify(tmp_path / "checkpoint") == []


def test_views_and_aliases_are_stored_as_tensors_of_their_own(tmp_path):
    model = random_model(CONFIG)
    name_0, name_1 = (f"transformer.h.{layer}.attn.proj.weight" for layer in (0, 1))
    model[name_0] = torch.arange(128.0).view(8, 16).t()[::2]  # neither contiguous nor alone in its storage
    model[name_1] = model[name_0]

    write_training(tmp_path / "checkpoint", model, {}, state_of(CONFIG))
    read = read_training(tmp_path / "checkpoint").model
    first = read[name_0]
    first.zero_()

    assert same_bits(read[name_0], model[name_0])
    assert same_bits(read[name_1], model[name_1])


def test_both_forms_give_the_same_weights(tmp_path, pristine):
    write_exchange(tmp_path / "exchange", CONFIG, read_weights(pristine))

    ours, theirs = read_weights(pristine), read_weights(tmp_path / "exchange")

    assert all(same_bits(ours[name], theirs[name]) for name in ours)
    assert (detect_form(pristine), detect_form(tmp_path / "exchange")) == (TRAINING, EXCHANGE)
    assert read_config(pristine) == read_config(tmp_path / "exchange") == CONFIG


def test_nothing_of_the_writer_is_in_the_files(tmp_path):
    """Two writes of the same tensors are the same bytes: no path, no time, no random id."""
    first, second = save(tmp_path / "a"), save(tmp_path / "b")

    assert manifest_sha256(first) == manifest_sha256(second)


# All or nothing


def test_an_error_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), atomic_directory(tmp_path / "new") as directory:
        (directory / "half").write_bytes(b"x")
        raise KeyError

    assert contents(tmp_path) == set()


def test_an_error_while_writing_leaves_no_parents_either_but_those_in_use(tmp_path):
    with pytest.raises(KeyError), atomic_directory(tmp_path / "a" / "b" / "new"):
        raise KeyError
    assert contents(tmp_path) == set()

    with pytest.raises(KeyError), atomic_directory(tmp_path / "a" / "b" / "new"):
        (tmp_path / "a" / "theirs").mkdir()
        raise KeyError
    assert contents(tmp_path / "a") == {"theirs"}


def test_a_folder_that_cannot_be_written_is_named_and_not_the_temporary_in_it(tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def refuse(path: Path, *arguments, **options) -> None:
        if path.name.startswith("."):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError) as failure, atomic_directory(tmp_path / "new"):
        pass
    assert failure.value.filename == str(tmp_path)


def test_a_way_out_is_said_once():
    for problem in ("it is damaged", "it is damaged; use an earlier checkpoint"):
        with pytest.raises(DataError) as failure:
            raise_problems([problem], "use an earlier checkpoint, or write it again")
        assert str(failure.value) == "it is damaged; use an earlier checkpoint, or write it again"


def test_an_existing_directory_is_kept_unless_it_may_be_replaced(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    save(target)  # an empty directory is as good as none
    before = manifest_sha256(target)

    with pytest.raises(FileExistsError, match="exists already; choose another name"):
        save(target, seed=5)
    assert manifest_sha256(target) == before

    save(target, seed=5, replace=True)
    assert manifest_sha256(target) != before
    assert contents(tmp_path) == {"target"}


def test_pruning_removes_what_was_abandoned_and_spares_what_is_being_written(tmp_path):
    abandoned = tmp_path / "stage-01" / ".step-0000000007.lit-tmp-0123abcd"
    abandoned.mkdir(parents=True)
    (abandoned / "half").write_bytes(b"x")
    for name in (".git", ".mine.lit-tmp-zz", "step-0000000007"):
        (tmp_path / "stage-01" / name).mkdir()

    with atomic_directory(tmp_path / "stage-01" / "step-0000000008") as living:
        assert prune_temporaries(tmp_path) == [abandoned]
        assert living.exists()

    assert contents(tmp_path / "stage-01") == {".git", ".mine.lit-tmp-zz", "step-0000000007", "step-0000000008"}


def test_what_cannot_be_read_back_is_refused_before_anything_is_written(tmp_path):
    model, moments, state = random_model(CONFIG), random_moments(CONFIG), state_of(CONFIG)
    wider = dataclasses.replace(CONFIG, intermediate_size=13)
    without = {name: tensor for name, tensor in model.items() if name != "transformer.ln_f.weight"}
    cases = [
        (DataError, "w1.weight has shape", (model, moments, state_of(wider))),
        (DataError, "tensor model.transformer.ln_f.weight is missing", (without, {}, state)),
        (
            DataError,
            "unexpected tensor model.transformer.wpe.weight",
            ({**model, "transformer.wpe.weight": 0 * torch.ones(2)}, {}, state),
        ),
        (
            DataError,
            "unexpected tensor optimizer.transformer.wpe.weight.step",
            (model, {"transformer.wpe.weight": {"step": torch.ones(())}}, state),
        ),
        (DataError, "exp_avg has shape", (model, {"lm_head.weight": {"exp_avg": torch.ones(2)}}, state)),
        (ValueError, "no model_config", (model, moments, {})),
        (ValueError, "what JSON cannot", (model, moments, {**state, "path": Path("x")})),
        (ValueError, "rng holds more", (model, moments, state, {"path": Path("x")})),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            write_training(tmp_path / "checkpoint", *arguments)

    assert contents(tmp_path) == set()


def test_too_little_free_space_is_found_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))

    with pytest.raises(OSError, match="bytes are needed and 1 are free") as training:
        save(tmp_path / "not" / "yet" / "there")
    with pytest.raises(OSError, match="bytes are needed and 1 are free") as exchange:
        write_exchange(tmp_path / "exchange", CONFIG, random_model(CONFIG))

    assert training.value.errno == exchange.value.errno == errno.ENOSPC
    assert contents(tmp_path) == set()


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("form", [TRAINING, EXCHANGE])
def test_a_full_disk_publishes_nothing_and_keeps_what_was_there(small_disk, monkeypatch, form):
    monkeypatch.setattr("lit_gpt.checkpoint.check_free_space", lambda *_: None)
    monkeypatch.setattr("lit_gpt.exchange.check_free_space", lambda *_: None)
    old = save(small_disk / "step-0000000001")
    larger = dataclasses.replace(CONFIG, vocab_size=4000, padded_vocab_size=4000)

    with pytest.raises(OSError) as error:
        if form == TRAINING:
            save(small_disk / "step-0000000002", larger)
        else:
            write_exchange(small_disk / "step-0000000002", larger, random_model(larger))

    assert error.value.errno == errno.ENOSPC
    assert contents(small_disk) == {"step-0000000001"}
    assert verify(old) == []


def test_a_target_that_cannot_be_written_is_an_error_of_the_file_system(tmp_path):
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(OSError, match="file"):
        save(tmp_path / "file" / "step-0000000007")

    assert contents(tmp_path) == {"file"}


KILLED_WRITERS = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import test_checkpoint as given
import lit_gpt.sharded
from tests.kills import kill_at, start_child

target, n_timed, chance = given.Path(sys.argv[2]), int(sys.argv[3]), random.Random(0)
model, moments = given.random_model(given.CONFIG), given.random_moments(given.CONFIG)

def start_writing(name, *before):
    state = given.state_of(given.CONFIG)
    return start_child(lambda: given.write_training(target / name, model, moments, state, replace=True), *before)

start = time.perf_counter()
os.waitpid(start_writing("step-0000000000"), 0)
whole_secs = time.perf_counter() - start
for number in range(n_timed):
    child = start_writing(f"step-1{number:09d}")
    time.sleep(chance.uniform(0, 1.3) * whole_secs)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

event_number = status = 1
while status:
    _, status = os.waitpid(start_writing(f"step-2{event_number:09d}", lambda: kill_at(event_number)), 0)
    event_number += 1
n_events = event_number

last = f"step-2{n_events - 1:09d}"
for event_number in range(n_events - 8, n_events + 8):  # now the renames and removals of replacing a whole one
    os.waitpid(start_writing(last, lambda: kill_at(event_number)), 0)
    given.prune_temporaries(target)
    assert not given.verify(target / last, deep=False), event_number
print(n_events)
"""


def test_a_kill_at_any_moment_leaves_nothing_or_a_whole_checkpoint(tmp_path):
    """Killed at random moments, then before every single call to the file system that Python makes, then while one
    checkpoint takes the place of another."""
    stage = tmp_path / "stage-01"

    command = [sys.executable, "-c", KILLED_WRITERS, str(Path(__file__).parent), str(stage), "8"]
    done = subprocess.run(command, check=True, cwd=Path(__file__).parents[2], timeout=600, stdout=subprocess.PIPE)

    published = set(stage.iterdir())  # the script has pruned
    assert all(path.name.startswith("step-") for path in published)
    assert all(verify(path) == [] for path in published)
    assert latest(tmp_path) == max(published)
    assert int(done.stdout) > 10


# Damage


@settings(max_examples=30)
@given(chance=st.randoms(use_true_random=False))
def test_a_file_cut_short_anywhere_is_found(pristine, tmp_path, chance: random.Random):
    damaged = Path(shutil.copytree(pristine, tmp_path / "stage-01" / "step-0000000007", dirs_exist_ok=True))
    victim = chance.choice(sorted(damaged.iterdir()))
    os.truncate(victim, chance.randrange(victim.stat().st_size))
    skipped = []

    assert latest(tmp_path, on_skip=lambda path, reason: skipped.append((path, reason))) is None
    assert skipped[0][0] == damaged
    assert victim.name in skipped[0][1]
    with pytest.raises(DataError, match=victim.name):
        read_training(damaged, verify=False)


@settings(max_examples=60)
@given(chance=st.randoms(use_true_random=False))
def test_one_changed_byte_anywhere_is_found(pristine, tmp_path, chance: random.Random):
    damaged = Path(shutil.copytree(pristine, tmp_path / "stage-01" / "step-0000000007", dirs_exist_ok=True))
    victim = chance.choice(sorted(damaged.iterdir()))
    content = bytearray(victim.read_bytes())
    content[chance.randrange(len(content))] ^= chance.randrange(1, 256)
    victim.write_bytes(content)

    assert any(victim.name in problem for problem in verify(damaged))
    assert latest(tmp_path, deep=True, on_skip=lambda *_: None) is None
    with pytest.raises(DataError, match=victim.name):
        read_training(damaged)


def test_a_manifest_that_differs_by_a_blank_is_not_the_one_that_was_written(checkpoint):
    """Children name their parent by the hash of this file."""
    manifest = checkpoint / "MANIFEST.json"
    manifest.write_text(manifest.read_text().replace(": ", ":  ", 1))

    assert "was damaged or changed" in verify(checkpoint)[0]


def test_every_missing_file_is_named(pristine, tmp_path):
    for name in sorted(contents(pristine)):
        damaged = Path(shutil.copytree(pristine, tmp_path / name.strip(".")))
        (damaged / name).unlink()
        with pytest.raises(DataError, match=name):
            read_training(damaged)


def test_parts_of_another_checkpoint_are_named(checkpoint):
    (checkpoint / "__1_0.distcp").write_bytes(b"")
    (checkpoint / "notes.txt").write_text("mine")

    assert verify(checkpoint) == [
        f"{checkpoint / '__1_0.distcp'} is not listed in MANIFEST.json; use an earlier checkpoint"
    ]


def test_a_config_that_is_not_that_of_the_tensors_is_refused(checkpoint):
    for change, message in [
        ({"n_layer": 3}, "model.transformer.h.2.norm_1.weight is missing"),
        ({"n_layer": 1}, "unexpected tensor model.transformer.h.1.norm_1.weight"),
        ({"n_layer": 10**12}, "1000000000000 layers, but there are"),
        ({"n_embd": 10**400}, "state.json"),
        ({"padded_vocab_size": 128}, r"wte.weight has shape \(64, 8\), the configuration wants \(128, 8\)"),
        ({"n_layers": 2}, "unknown key 'n_layers'; did you mean 'n_layer'"),
    ]:
        state = state_of(CONFIG)
        state["model_config"] |= change
        (checkpoint / "state.json").write_text(json.dumps(state))
        resign(checkpoint)
        with pytest.raises(DataError, match=message):
            read_training(checkpoint)


def test_what_is_no_checkpoint_says_what_it_is(tmp_path, pristine):
    other = tmp_path / "other"
    with atomic_directory(other, "a report"):
        pass
    (tmp_path / "model.pth").write_bytes(b"")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "state.json").write_text("{}")
    run = tmp_path / "run"
    shutil.copytree(pristine, run / "checkpoints" / "stage-01" / "step-0000000007")
    (tmp_path / "empty").mkdir()

    for path, error, message in [
        (other, DataError, "is a report, not a checkpoint"),
        (tmp_path / "model.pth", DataError, "is not a whole file of torch.save"),
        (tmp_path / "unfinished", DataError, "has no MANIFEST.json: it was never completed"),
        (run, DataError, "give one of them, e.g. .*step-0000000007"),
        (tmp_path / "empty", DataError, "is not a checkpoint; give a directory"),
        (tmp_path / "nowhere", FileNotFoundError, "no such checkpoint"),
    ]:
        with pytest.raises(error, match=message):
            read_config(path)
    with pytest.raises(DataError, match="is a report, not training form"):
        read_training(other)


# The newest


def test_latest_goes_by_number_not_by_name(pristine, tmp_path):
    assert latest(tmp_path) is None
    for name in (
        "stage-01/step-9999999999",
        "stage-02/step-960000",
        "stage-02/step-1000000",
        "stage-10/step-0000000003",
    ):
        shutil.copytree(pristine, tmp_path / name)
        assert latest(tmp_path) == tmp_path / name
    assert checkpoint_path(tmp_path, 10, 3) == tmp_path / "stage-10/step-0000000003"


def test_latest_falls_back_and_says_what_it_skipped(pristine, tmp_path, caplog):
    good, damaged, unfinished = (checkpoint_path(tmp_path, 1, step) for step in (1, 2, 3))
    for path in (good, damaged, unfinished):
        shutil.copytree(pristine, path)
    os.truncate(damaged / "__0_0.distcp", 10)
    (unfinished / "MANIFEST.json").unlink()

    assert latest(tmp_path) == good

    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert f"{unfinished} has no MANIFEST.json" in caplog.messages[0]
    assert f"{damaged / '__0_0.distcp'} has 10 bytes" in caplog.messages[1]


# Files that want to do harm


class Calls:
    """Pickles into a call."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def global_by_name(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls module.name(argument), written by hand so that any name can be tried."""
    strings = [b"\x8c" + bytes([len(text.encode())]) + text.encode() for text in (module, name)]
    return b"\x80\x04" + b"".join(strings) + b"\x93" + b"\x8c" + bytes([len(argument)]) + argument.encode() + b"\x85R."


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("subprocess", "check_output"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("builtins", "__import__"),
        ("builtins", "getattr"),
        ("importlib", "import_module"),
        ("runpy", "run_path"),
        ("pickle", "loads"),
        ("torch", "load"),
        ("torch", "Size.__class__"),
        ("torch", "hub.load"),
        ("torch.serialization", "os.system"),
        ("torch.serialization", "load"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.filesystem", "os.system"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__.__globals__"),
        ("numpy", "load"),
        ("pathlib", "PosixPath"),
    ],
)
def test_metadata_that_names_anything_but_its_own_classes_is_refused(checkpoint, tmp_path, module, name):
    marker = tmp_path / "executed"
    (checkpoint / ".metadata").write_bytes(global_by_name(module, name, f"touch {marker}"))
    resign(checkpoint)

    with pytest.raises(DataError, match=r"\.metadata asks for .* \(refused, not run\)"):
        read_training(checkpoint)

    assert not marker.exists()


@pytest.mark.parametrize("name", [".metadata", "rng-00000.pt", "__0_0.distcp"])
def test_a_pickle_that_calls_the_shell_is_not_executed(checkpoint, tmp_path, name):
    marker = tmp_path / "executed"
    payload = Calls(os.system, f"touch {marker}")
    if name == ".metadata":
        (checkpoint / name).write_bytes(pickle.dumps(payload))
    elif name == "rng-00000.pt":
        torch.save({"torch": payload}, checkpoint / name)
    else:
        size = (checkpoint / name).stat().st_size
        torch.save(payload, checkpoint / name)
        os.truncate(checkpoint / name, size)  # the first tensor's place now holds the payload
    resign(checkpoint)

    with pytest.raises(DataError, match="cannot be read|refused, not run"):
        dict(read_training(checkpoint).model)

    assert not marker.exists()


def test_metadata_cannot_reach_outside_or_ask_for_more_memory_than_there_is_data(checkpoint):
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
    )

    path = checkpoint / ".metadata"
    untouched = path.read_bytes()
    name = "model.lm_head.weight"

    def elsewhere(metadata: Metadata) -> None:
        next(iter(metadata.storage_data.values())).relative_path = "../../secret"

    def huge(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata[name]
        entry.size = entry.chunks[0].sizes = torch.Size((10**9, 10**6))

    def pickled_object(metadata: Metadata) -> None:
        metadata.state_dict_metadata[name] = BytesStorageMetadata()

    def parts_missing(metadata: Metadata) -> None:
        metadata.state_dict_metadata[name].chunks.clear()

    def overlapping(metadata: Metadata) -> None:
        entry, index = metadata.state_dict_metadata[name], MetadataIndex(name, entry_offset := torch.Size((0, 0)))
        half = torch.Size((entry.size[0] // 2, entry.size[1]))
        entry.chunks = [ChunkStorageMetadata(entry_offset, half), ChunkStorageMetadata(entry_offset, half)]
        metadata.storage_data[MetadataIndex(name, torch.Size((half[0], 0)))] = metadata.storage_data[index]

    def on_each_other(metadata: Metadata) -> None:
        entry, place = metadata.state_dict_metadata[name], metadata.storage_data[MetadataIndex(name, (0, 0))]
        rows, columns = entry.size
        entry.size = torch.Size((1000 * rows, columns))
        entry.chunks = [
            ChunkStorageMetadata(torch.Size((i * rows, 0)), torch.Size((rows, columns))) for i in range(1000)
        ]
        metadata.storage_data |= {MetadataIndex(name, chunk.offsets): place for chunk in entry.chunks}

    def unnamed(metadata: Metadata) -> None:
        del metadata.state_dict_metadata[name].size

    def nonsense(metadata: Metadata) -> None:
        metadata.storage_data = [1, 2]

    for change, message in [
        (elsewhere, "lies outside the files"),
        (huge, "longer than what is stored"),
        (pickled_object, "BytesStorageMetadata|not a tensor"),
        (parts_missing, "do not add up"),
        (overlapping, "do not add up"),
        (on_each_other, "longer than what is stored"),
        (nonsense, "a Metadata whose storage_data is a list"),
        (unnamed, "does not hold together"),
    ]:
        metadata = pickle.loads(untouched)
        change(metadata)
        path.write_bytes(pickle.dumps(metadata))
        resign(checkpoint)
        with pytest.raises(DataError, match=message):
            read_training(checkpoint)


@settings(max_examples=80)
@given(chance=st.randoms(use_true_random=False))
def test_damaged_metadata_is_an_error_of_ours_or_harmless(pristine, tmp_path, chance: random.Random):
    """Without the manifest's protection: whatever the bytes, reading ends in a DataError or in tensors."""
    from lit_gpt.sharded import StoredTensors

    content = bytearray((pristine / ".metadata").read_bytes())
    for _ in range(chance.randrange(1, 6)):
        content[chance.randrange(len(content))] = chance.randrange(256)
    (tmp_path / ".metadata").write_bytes(content)
    shutil.copyfile(pristine / "__0_0.distcp", tmp_path / "__0_0.distcp")
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}

    try:
        dict(StoredTensors(tmp_path, sizes))
    except DataError:
        pass


def test_a_manifest_cannot_name_files_outside(checkpoint):
    for files in ({"../secret": {"size": 1, "crc32": "00000000"}}, {"state.json": {"size": "1"}}, []):
        manifest = {"format": 1, "form": TRAINING, "files": files}
        manifest["digest"] = atomic._digest(manifest)
        (checkpoint / "MANIFEST.json").write_bytes(atomic.render_manifest(manifest))
        with pytest.raises(DataError, match="files this version cannot read"):
            read_training(checkpoint)
