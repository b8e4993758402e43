"""The measurement of random weights: it takes the seven tasks, and chance is theirs."""

from __future__ import annotations

import pytest

from benchmarks.zero_shot_chance import measure
from grow.scores import AVERAGED
from lit_gpt.tokenizer import Tokenizer
from tests.zero_shot import DOCUMENTS, write_data


def test_a_seed_gives_the_average_of_seven_and_another_seed_another_model(tmp_path):
    data, tokenizer = write_data(tmp_path), Tokenizer.load("bytes")

    first, again, other = (measure(seed, tokenizer, data) for seed in (0, 0, 1))

    assert first["chance"] == pytest.approx(100 * (0 + 4 * 0.25 + 2 * 0.5) / 7)
    assert first["documents"] == len(AVERAGED) * DOCUMENTS
    assert {name.split()[0] for name in first if " " in name} == set(AVERAGED)
    without_time = [
        {key: value for key, value in each.items() if key not in ("secs", "seed")} for each in (first, again)
    ]
    assert without_time[0] == without_time[1]
    assert other["seed"] == 1
