"""Mappings that make a tensor on access, and whether tensors are finite."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.lazy_tensors import FINITE_BLOCK, CastWeights, Renamed, TensorSpec, all_finite, one_ahead, spec_of

DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
BAD = st.sampled_from([float("nan"), float("inf"), float("-inf")])


@given(DTYPES, st.integers(0, 3 * FINITE_BLOCK), st.sampled_from([0.0, 1.0, -1.0]))
def test_numbers_are_finite_even_where_their_sum_is_not(dtype, n, sign):
    assert all_finite(torch.full((n,), sign * torch.finfo(dtype).max, dtype=dtype))


@given(DTYPES, st.lists(st.tuples(st.integers(0, 2 * FINITE_BLOCK + 4), BAD), min_size=1, max_size=3))
def test_one_entry_that_is_no_number_is_found_wherever_it_is(dtype, places):
    tensor = torch.ones(2 * FINITE_BLOCK + 5, dtype=dtype)
    for place, value in places:
        tensor[place] = value
    assert not all_finite(tensor)
    assert not all_finite(tensor.view(5, -1).t() if len(tensor) % 5 == 0 else tensor[None])


class Unreadable(Renamed):
    def __getitem__(self, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")


def test_what_a_tensor_will_be_and_whether_it_is_there_are_known_without_reading_it():
    stored = Unreadable({"a": ({"x": torch.ones(2, 3)}, "x")})
    renamed = Renamed({"b": (CastWeights(stored, torch.bfloat16), "a")})

    assert "b" in renamed and "a" not in renamed
    assert spec_of(renamed, "b") == TensorSpec((2, 3), torch.bfloat16)
    assert spec_of(renamed, "b").n_bytes == 12
    with pytest.raises(AssertionError, match="a was read"):
        renamed["b"]


def test_jobs_are_done_one_ahead_in_order_and_an_error_comes_in_its_place():
    begun: list[int] = []

    def job(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise ValueError("three")
        return number

    results = one_ahead([partial(job, number) for number in range(5)])

    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert begun[:4] == [0, 1, 2, 3] and list(one_ahead([])) == []
