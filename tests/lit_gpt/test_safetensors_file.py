"""Safetensors files written and read one tensor at a time, against the library."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lit_gpt.errors import DataError
from lit_gpt.lazy_tensors import TensorSpec
from lit_gpt.safetensors_file import DTYPES, SafetensorsWriter, read_entries, read_tensor

Tensors = dict[str, torch.Tensor]


@st.composite
def tensors(draw) -> Tensors:
    """A few tensors of any stored dtype and of up to three dimensions, some of them empty."""
    shapes = st.lists(st.integers(0, 5), min_size=1, max_size=3)
    found = {}
    for name in draw(st.lists(st.text('abc.é"', min_size=1, max_size=6), min_size=1, max_size=5, unique=True)):
        dtype = draw(st.sampled_from(list(DTYPES.values())))
        found[name] = torch.randn(draw(shapes), generator=torch.Generator().manual_seed(len(found))).to(dtype)
    return found


def write(path: Path, content: Tensors, order: list[str]) -> int:
    """Write a new file in some order; returns what the writer says is its crc32."""
    path.unlink(missing_ok=True)
    specs = [(name, TensorSpec(tuple(tensor.shape), tensor.dtype)) for name, tensor in content.items()]
    with SafetensorsWriter(path, specs) as writer:
        for name in order:
            writer.write(name, content[name])
        return writer.finish()


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@given(tensors(), st.randoms(use_true_random=False))
def test_the_library_reads_what_is_written_in_any_order_and_the_crc32_is_that_of_the_file(tmp_path, content, chance):
    path = tmp_path / "model.safetensors"
    order = chance.sample(list(content), len(content))

    crc32 = write(path, content, order)

    assert_same(load_file(path), content)
    assert crc32 == zlib.crc32(path.read_bytes())


@given(tensors())
def test_what_the_library_wrote_is_read(tmp_path, content):
    path = tmp_path / "model.safetensors"
    save_file(content, path)

    assert_same({entry.name: read_tensor(path, entry) for entry in read_entries(path)}, content)


@given(tensors())
def test_every_tensor_is_aligned_to_its_entries(tmp_path, content):
    write(tmp_path / "model.safetensors", content, list(content))
    for entry in read_entries(tmp_path / "model.safetensors"):
        assert entry.offset % DTYPES[entry.dtype].itemsize == 0


def test_a_copied_tensor_is_that_of_the_other_file(tmp_path):
    content = {"a": torch.arange(5.0), "b": torch.arange(7.0).bfloat16()}
    write(tmp_path / "src", content, ["a", "b"])
    specs = [(name, TensorSpec((7,), torch.bfloat16)) for name in ("x", "y")]
    _, entry = read_entries(tmp_path / "src")
    crc32 = zlib.crc32((tmp_path / "src").read_bytes()[entry.offset :])

    with SafetensorsWriter(tmp_path / "dst", specs) as writer, (tmp_path / "src").open("rb") as source:
        for name in ("y", "x"):
            writer.copy(name, source.fileno(), entry.offset, crc32)
        assert writer.finish() == zlib.crc32((tmp_path / "dst").read_bytes())

    assert_same(load_file(tmp_path / "dst"), {"x": content["b"], "y": content["b"]})


def test_a_tensor_that_is_not_what_was_announced_or_is_forgotten_is_a_mistake_of_ours(tmp_path):
    with SafetensorsWriter(tmp_path / "f", [("a", TensorSpec((2,), torch.float32))]) as f:
        with pytest.raises(AssertionError, match="a is not what was announced"):
            f.write("a", torch.zeros(3))
        with pytest.raises(AssertionError, match="never written"):
            f.finish()


def test_a_file_that_ends_early_is_not_a_safetensors_file(tmp_path):
    path = tmp_path / "model.safetensors"
    write(path, {"a": torch.ones(9)}, ["a"])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="is not a whole safetensors file"):
        read_entries(path)
