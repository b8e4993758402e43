"""The published tables of arXiv 2405.15319: what can be computed again from them comes out, or is known not to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from grow.curves import Curve, speedup
from grow.layer_map import connection_rate, parse_layer_map

SEVEN = ("lambada", "arc_c", "arc_e", "logiqa", "piqa", "sciq", "winogrande")
RATES = {  # exact values; the printed ones of the last two kinds cannot be reproduced
    "123456*4": (Fraction(20, 23), 87.0),
    "12-3456*5-56": (Fraction(18, 23), 78.3),
    "12-345*7-6": (Fraction(17, 23), 74.0),
    "123-456*7": (Fraction(17, 23), 74.0),
    "1234-56*10": (Fraction(14, 23), 60.7),
    "12-34*10-56": (Fraction(14, 23), 60.7),
    "1-234*7-56": (Fraction(17, 23), 74.0),
    "123*7-456": (Fraction(17, 23), 74.0),
}


@pytest.fixture
def tables(data_dir) -> dict[str, Any]:
    return json.loads(data_dir("reference_results/paper_tables.json").read_text())


def averaged(tables: dict[str, Any]) -> Iterator[tuple[str, dict[str, float], float]]:
    """Name, accuracies and printed average of every column that has one."""
    figure = tables["figure_3"]
    for i, name in enumerate(figure["columns"]):
        yield f"figure 3, {name}", {task: figure["rows"][task][i] for task in SEVEN}, figure["rows"]["avg"][i]
    for key, table in tables.items():
        if not key.startswith("table_") or not isinstance(table, dict):
            continue
        for name, values in table.items():
            if name == "columns" or None in values:
                continue
            row = dict(zip(table["columns"], values, strict=True))
            accuracies = {task: row[task] for task in row if task not in ("avg", "wikitext_word_ppl")}
            yield f"{key}, {name}", accuracies, row["avg"]


def test_averages_are_plain_means_of_the_accuracies_with_one_known_slip(tables):
    found = {name: (sum(tasks.values()) / len(tasks), printed) for name, tasks, printed in averaged(tables)}

    assert len(found) == 22
    off = {name: round(mean, 2) for name, (mean, printed) in found.items() if abs(mean - printed) > 0.0051}
    assert off == {"table_3_1B_100B_tokens, baseline_1.1b": 50.12}, "the paper prints 50.09"


def test_connection_rates_of_table_5_are_counted_per_adjacent_pair(tables):
    printed = {row["method"]: row["Rc"] for row in tables["table_5_partial_stacking"]}
    assert printed == {text: percent for text, (_, percent) in RATES.items()}
    for text, (exact, percent) in RATES.items():
        rate = connection_rate(parse_layer_map(text, n_layer_src=6, n_layer=24))
        assert rate == exact and abs(100 * float(rate) - percent) < 0.2


def test_the_headline_is_the_speed_up_of_194_b_tokens_in_all_over_300_b_from_scratch(tables):
    baseline = Curve(np.array([1, 300]), np.array([1.0, 300.0]), np.array([9.0, 2.0]))
    grown = Curve(np.array([1, 194]), np.array([1.0, 194.0]), np.array([9.0, 2.0]))

    assert round(100 * speedup(grown, baseline).speedup, 1) == tables["speedups"]["fig1_7B_300B"]
