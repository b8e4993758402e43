"""One number for the weights of a model: the same however they are shared, another one for other weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from lit_gpt.fingerprint import weights_sha256

WEIGHTS = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(2, 2)}


@dataclass
class Others:
    """One of several processes, which is told what the others gave."""

    rank: int
    size: int
    given: list[Any] = field(default_factory=list)
    group: Any = None

    def broadcast(self, value: Any) -> Any:
        raise AssertionError("nobody needs it")

    def gather(self, value: Any) -> list[Any]:
        self.given.append(value)
        return list(self.given)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_it_is_the_same_for_every_number_of_processes(size):
    shared: list[Any] = []
    found = [weights_sha256(WEIGHTS, Others(rank, size, shared)) for rank in range(size)]
    assert sorted(name for part in shared for name in part) == sorted(WEIGHTS), "each is read once"
    assert found[-1] == weights_sha256(WEIGHTS)


def test_it_depends_neither_on_the_order_of_names_nor_on_how_a_tensor_lies_in_memory():
    other = {name: WEIGHTS[name] for name in sorted(WEIGHTS)}
    other["b"] = WEIGHTS["b"].t().contiguous().t()
    assert weights_sha256(other) == weights_sha256(WEIGHTS)


@pytest.mark.parametrize(
    "changed",
    [
        {"b": torch.arange(6.0).view(2, 3) + torch.tensor([0.0, 0.0, 1e-6])},
        {"b": torch.arange(6.0).view(3, 2)},
        {"b": torch.arange(6.0, dtype=torch.float64).view(2, 3)},
        {"d": torch.zeros(1)},
    ],
    ids=["a bit", "shape", "dtype", "one more"],
)
def test_other_weights_have_another(changed):
    assert weights_sha256({**WEIGHTS, **changed}) != weights_sha256(WEIGHTS)


def test_weights_of_other_names_have_another():
    assert weights_sha256({"b": WEIGHTS["c"], "c": WEIGHTS["b"]}) != weights_sha256(
        {"b": WEIGHTS["b"], "c": WEIGHTS["c"]}
    )
