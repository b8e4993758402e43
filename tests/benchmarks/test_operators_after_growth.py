"""The benchmark of the operators runs on the real model and writes down what it measured. Says nothing about losses."""

from __future__ import annotations

import json

import pytest

from benchmarks import operators_after_growth


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
