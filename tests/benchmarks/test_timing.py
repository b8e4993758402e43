"""Whose turn it is, and what is made of the samples."""

from __future__ import annotations

import pytest
import torch

from benchmarks.timing import find_device, in_turns, spread, spread_of_ratios


def test_every_task_has_one_call_per_turn_and_none_always_follows_the_same_one():
    calls: list[str] = []
    tasks = {name: lambda name=name: calls.append(name) for name in "abcd"}

    samples = in_turns(tasks, 8, torch.device("cpu"))

    turns = [calls[start : start + 4] for start in range(0, len(calls), 4)]
    assert all(sorted(turn) == list("abcd") for turn in turns) and len(turns) == 8
    assert len({tuple(turn) for turn in turns}) > 1
    assert all(len(each) == 8 for each in samples.values())
    assert samples["a"][0].peak_bytes is None, "a CPU's memory is not asked for"


def test_a_spread_is_the_median_and_the_quartiles():
    assert spread([4, 1, 3, 2, 5]) == {"median": 3, "q1": 2, "q3": 4}
    assert spread([7]) == {"median": 7, "q1": 7, "q3": 7}


def test_ratios_are_taken_within_a_turn():
    """A slow turn slows both: the ratio does not see it."""
    assert spread_of_ratios([2, 20, 200], [1, 10, 100]) == {"median": 2, "q1": 2, "q3": 2}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    assert find_device(None).type == "cpu"
    with pytest.raises(ValueError, match="no CUDA device"):
        find_device("cuda")
