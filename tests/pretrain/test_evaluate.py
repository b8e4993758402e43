"""Validation: every held-out target once, and one number for every world size."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from benchmarks.forked import start_function
from lit_gpt.config import Config
from lit_gpt.errors import DataError
from lit_gpt.model import GPT, init_weights
from lit_gpt.packed_dataset import write_token_file
from lit_gpt.token_files import find_token_files
from lit_gpt.token_source import TokenSource
from lit_gpt.tokenizer import Tokenizer
from pretrain.command_line import config_of
from pretrain.evaluate import evaluate, measure, summarise
from pretrain.held_out import ValidationSet
from pretrain.preflight import limit_notes
from pretrain.world import connected, find_world

BLOCK_SIZE = 8
VOCAB_SIZE = 259
LENGTHS = (50, 9, 3, 1, 35)
"""Tokens of each file: rows of 8 targets and a rest, exactly one row, a short row, no target at all, more rows."""


def held_out(folder: Path, lengths=LENGTHS, byte_lengths: np.ndarray | None = None) -> ValidationSet:
    random = np.random.default_rng(0)
    for number, length in enumerate(lengths):
        tokens = random.integers(0, VOCAB_SIZE, length)
        write_token_file(folder / f"validation_{number}.bin", tokens, np.dtype("uint16"))
    source = TokenSource(find_token_files(folder, "validation"), BLOCK_SIZE, VOCAB_SIZE)
    return ValidationSet("text", source, byte_lengths)


@pytest.fixture
def validation_set(tmp_path) -> ValidationSet:
    return held_out(tmp_path, byte_lengths=Tokenizer.load("bytes").byte_lengths())


def make_model() -> GPT:
    sizes = {"n_embd": 16, "n_head": 2, "head_size": 8, "intermediate_size": 32}
    model = GPT(Config(n_layer=2, block_size=BLOCK_SIZE, vocab_size=VOCAB_SIZE, **sizes))
    init_weights(model, 1)
    return model


@pytest.fixture(scope="module")
def model() -> GPT:
    return make_model()


def on_ranks(model, validation_set, world_size, micro_batch_size=4, n_rows=None):
    """What all ranks together find: the sum of their tables, as the all-reduce makes it."""
    n_rows = n_rows or validation_set.n_rows
    device = torch.device("cpu")
    tables = [
        measure(model, validation_set, micro_batch_size, n_rows, device, rank, world_size) for rank in range(world_size)
    ]
    return summarise(sum(tables), limited=False)


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_every_number_of_ranks_finds_the_same_to_the_bit(model, validation_set, world_size, micro_batch_size):
    alone = on_ranks(model, validation_set, 1, micro_batch_size)
    assert on_ranks(model, validation_set, world_size, micro_batch_size) == alone


def test_the_micro_batch_size_changes_rounding_only(model, validation_set):
    reference = on_ranks(model, validation_set, 1, 1)
    for micro_batch_size in (3, 16):
        other = on_ranks(model, validation_set, 1, micro_batch_size)
        assert other.nats_per_token == pytest.approx(reference.nats_per_token, rel=1e-6)
        assert other.n_tokens == reference.n_tokens


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_ranks_compute_equally_many_batches_of_one_shape(model, validation_set, world_size):
    """Sharded models compute together: a rank that is done earlier would let the others wait for ever."""
    shapes = []

    def spy(tokens, targets, **options):
        shapes[-1].append(tuple(tokens.shape))
        return model(tokens, targets, **options)

    for rank in range(world_size):
        shapes.append([])
        measure(spy, validation_set, 4, validation_set.n_rows, torch.device("cpu"), rank, world_size)
    assert all(each == shapes[0] for each in shapes)
    assert set(shapes[0]) == {(4, BLOCK_SIZE)}
    assert len(shapes[0]) == math.ceil(math.ceil(validation_set.n_rows / 4) / world_size)


def test_every_target_of_every_file_counts_once(model, validation_set):
    result = on_ranks(model, validation_set, 1)
    assert result.n_tokens == sum(length - 1 for length in LENGTHS)

    nats = 0.0
    for file in validation_set.source.files:
        tokens = torch.from_numpy(np.fromfile(file.path, file.dtype, offset=file.byte_offset).astype(np.int64))
        for start in range(0, len(tokens) - 1, BLOCK_SIZE):
            row = tokens[start : start + BLOCK_SIZE + 1]
            with torch.no_grad():
                nats += float(cross_entropy(model(row[None, :-1])[0].double(), row[1:], reduction="sum"))
    assert result.nats_per_token == pytest.approx(nats / result.n_tokens, rel=1e-6)


def test_bits_per_byte_count_the_targets_that_stand_for_text_on_both_sides(model, tmp_path):
    byte_lengths = np.arange(VOCAB_SIZE) % 3  # a third of the ids are controls
    validation_set = held_out(tmp_path, byte_lengths=byte_lengths)
    table = measure(model, validation_set, 4, validation_set.n_rows, torch.device("cpu"))
    files = [np.fromfile(f.path, f.dtype, offset=f.byte_offset) for f in validation_set.source.files]
    assert table[:, 3].sum() == sum(byte_lengths[tokens[1:]].sum() for tokens in files)
    assert 0 < table[:, 2].sum() < table[:, 1].sum()
    assert summarise(table, limited=False).bits_per_byte == pytest.approx(
        table[:, 2].sum() / math.log(2) / table[:, 3].sum()
    )


def test_without_a_tokenizer_there_are_no_bits_per_byte(model, tmp_path):
    assert on_ranks(model, held_out(tmp_path), 1).bits_per_byte is None


def test_the_error_of_equally_long_rows_is_that_of_their_mean():
    row_means = np.array([1.0, 2.0, 4.0, 1.5])
    table = np.stack([np.full(4, 8.0), 8.0 * row_means, np.zeros(4), np.zeros(4)], axis=1)
    assert summarise(table, limited=False).stderr == pytest.approx(row_means.std(ddof=1) / math.sqrt(4))
    assert summarise(table[:1], limited=False).stderr is None


@given(max_tokens=st.integers(1, 120))
def test_a_limit_takes_rows_from_the_start_and_at_least_one(tmp_path_factory, max_tokens):
    validation_set = held_out(tmp_path_factory.mktemp("held_out"))
    rows = validation_set.rows_within(max_tokens)
    targets = validation_set.read(np.arange(rows))[1].sum()
    assert rows >= 1
    assert targets <= max(max_tokens, BLOCK_SIZE)
    assert (rows == validation_set.n_rows) == (max_tokens >= validation_set.n_targets)


@pytest.mark.parametrize(("limit", "said"), [(None, False), ("1k", False), (40, True)])
def test_a_run_says_that_it_measures_a_part_of_a_set(validation_set, tmp_path, limit, said):
    config = config_of(
        {
            "out_dir": str(tmp_path),
            "model": {"name": "2L64H"},
            "data": {"train": "somewhere"},
            "stages": [{"name": "main", "max_steps": 1}],
            "validation": {"max_tokens": limit},
        }
    )
    assert any("the first 40 targets" in line for line in limit_notes(config, [validation_set])) == said


@given(data=st.data())
def test_rows_are_the_same_however_they_are_asked_for(tmp_path_factory, data):
    validation_set = held_out(tmp_path_factory.mktemp("held_out"))
    all_samples, all_targets = validation_set.read(np.arange(validation_set.n_rows))
    start = data.draw(st.integers(0, validation_set.n_rows))
    stop = data.draw(st.integers(start, validation_set.n_rows))
    samples, targets = validation_set.read(np.arange(start, stop))
    assert np.array_equal(samples, all_samples[start:stop])
    assert np.array_equal(targets, all_targets[start:stop])


def test_a_short_row_that_lost_its_end_is_an_error(validation_set):
    path = Path(validation_set.source.files[2].path)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match="truncated"):
        validation_set.read(np.arange(validation_set.n_rows))


def test_a_token_outside_the_vocabulary_is_an_error_in_a_short_row_too(tmp_path):
    write_token_file(tmp_path / "validation_0.bin", np.array([*range(9), 300, 1]), np.dtype("uint16"))
    source = TokenSource(find_token_files(tmp_path, "validation"), BLOCK_SIZE, VOCAB_SIZE)
    with pytest.raises(DataError, match=r"300.*259"):
        ValidationSet("text", source, None).read(np.arange(2))


def evaluate_together(folder: Path) -> None:
    """Each process writes down what all of them found."""
    world = find_world()
    own = folder / f"{world.size}-{world.rank}"
    own.mkdir()
    with connected(world, "cpu"):
        result = evaluate(make_model(), held_out(own), 4, None, torch.device("cpu"), world)
    (own / "result").write_text(repr(result))


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    for size in (1, 2):
        started = start_function(evaluate_together, (tmp_path,), size, tmp_path / f"logs of {size}")
        assert started.wait() == [0] * size, started.errors()
    results = {folder.name: (folder / "result").read_text() for folder in tmp_path.glob("?-?")}
    assert len(results) == 3
    assert len(set(results.values())) == 1
