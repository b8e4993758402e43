"""The benchmark of the operators runs on the real model and writes down what it measured. Says nothing about losses."""

from __future__ import annotations

import json

import pytest

from benchmarks import operators_after_growth
from benchmarks.operators_after_growth import Growth, Rules, measured
from grow.registry import OPERATORS
from tests.toys import toy_config


@pytest.fixture
def arguments(data_dir) -> list[str]:
    return ["--data", str(data_dir()), "--only", "stack", "zero-depth", "--steps", "1", "2", "--seeds", "0", "1"]


def test_a_short_run_measures_every_growth_and_the_model_left_as_it_is(arguments, tmp_path, capsys):
    assert operators_after_growth.main([*arguments, "--out", str(tmp_path / "out.json")]) == 0

    not_grown, stack, zero = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [row["operator"] for row in (not_grown, stack, zero)] == [None, "stack", "zero-depth"]
    for row in (not_grown, stack, zero):
        assert row["loss_before"] == not_grown["loss_before"]
        assert [len(losses) for losses in row["loss_after"].values()] == [2, 2, 2]
    assert list(stack["loss_after"]) == ["0", "1", "2"]
    assert zero["loss_after"]["0"] == [zero["loss_before"]] * 2, "this operator keeps the function"
    assert stack["loss_after"]["0"] != [stack["loss_before"]] * 2
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4 and table[2].startswith("stack n_layer=10")


def test_a_run_of_a_few_operators_leaves_the_committed_result_alone(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(operators_after_growth, "RESULT", tmp_path / "untouched.json")

    assert operators_after_growth.main(arguments) == 0

    assert capsys.readouterr().out and not list(tmp_path.iterdir())


def test_rules_for_residual_channels_are_compared_where_they_make_other_weights():
    src = toy_config()
    doubled, wider = (Rules.of(Growth("split-width", {"n_embd": n_embd}), src) for n_embd in (32, 24))

    assert doubled.same_weights == {"M": ["U", "Z"], "E": []} and wider.same_weights == {"M": [], "E": []}
    assert [str(growth) for growth in doubled.growths()] == [
        "split-width n_embd=32",
        "split-width n_embd=32 residual=E",
    ]
    assert doubled.notes() == ["split-width n_embd=32 residual=U and Z: the same weights as M"]
    padded = Rules.of(Growth("zero-width", {"n_embd": 24}), src)
    assert padded.same_weights == {"M": [], "Z": ["E"]}, "U needs copies of every channel"


def test_every_operator_is_in_the_table_and_those_with_rules_by_more_than_one():
    src = toy_config(n_layer=5, n_head=8, n_embd=64, n_query_groups=4)
    for name, op in OPERATORS.items():
        growths, _ = measured(name, src)
        assert all(growth.operator == name for growth in growths)
        assert (len(growths) > 1) is ("residual" in op.options or name == "inheritune"), name


def test_a_prefix_that_was_trained_takes_the_next_layers_of_the_real_model(data_dir, capsys):
    assert (
        operators_after_growth.main(["--data", str(data_dir()), "--only", "inheritune", "--steps", "1", "--seeds", "0"])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[3].startswith("inheritune n_layer=5 reference=checkpoints/stories260K")


def test_an_estimate_trains_nothing_to_the_end(data_dir, capsys):
    assert operators_after_growth.main(["--data", str(data_dir()), "--only", "stack", "--estimate"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("2 rows, about ") and err.endswith(" minutes of one core\n")
