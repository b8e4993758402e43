"""The page has the tables of the results, and what they say is what was measured."""

from __future__ import annotations

import json

import pytest

from benchmarks import performance, tables
from benchmarks.__main__ import main

SPREAD = {"median": 2.0, "q1": 1.5, "q3": 2.5}


def training_record(ratio: float, **more) -> dict:
    pair = {"ours": "ours bf16 block-compiled", "against": "transformers bf16 eager", "q1": ratio, "q3": ratio}
    names = ("ours bf16 block-compiled", "transformers bf16 eager")
    rate = {"tokens_per_cpu_sec": SPREAD, "tokens_per_sec": SPREAD, "palm_flops_per_sec": 98.94e12}
    rate |= {"model_flops_per_token": 48e6}
    floor = {"tokens_per_sec": SPREAD, "share_reached": {names[0]: SPREAD}}
    machine = {"cpu": "Toy", "flags": [], "torch": "2", "cores": 1, "load_average": [0.5]}
    ratios = [{**pair, "median": ratio}]
    return {
        "variants": [{"name": name, **rate, "peak_bytes": 2**20} for name in names],
        "ratios_cpu_secs": ratios,
        "ratios_secs": ratios,
        "auto": {"variant": names[0], "why": "so"},
        "absent": {"litgpt": "not there"},
        "clock": "cpu_secs",
        "floors": {"bf16": floor},
        "threads": 1,
        "machine": machine,
        **more,
    }


def test_the_page_has_the_tables_of_the_results():
    assert main(["--check"]) == 0


def test_a_table_of_other_numbers_is_noticed(tmp_path, monkeypatch, capsys):
    page = tmp_path / "performance.md"
    text = performance.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(performance, "PAGE", page)

    page.write_text(text.replace("| not grown | 260,032 |", "| not grown | 260,033 |"), encoding="utf-8")
    assert main(["--check"]) == 1
    assert "run python -m benchmarks" in capsys.readouterr().out

    tables.renew(page, performance.table_of())
    assert page.read_text(encoding="utf-8") == text and main(["--check"]) == 0


def test_every_table_has_its_place_on_the_page():
    found = {match[1] for match in tables.NAME_AND_TABLE.findall(performance.PAGE.read_text(encoding="utf-8"))}
    assert found == set(performance.TABLES)


def test_what_was_not_measured_is_said_to_be_missing(tmp_path):
    table = performance.table_of(tmp_path)
    assert {table(name) for name in performance.TABLES} == {performance.NOTHING}
    with pytest.raises(ValueError, match="'prices'; known: training"):
        table("prices")


@pytest.mark.parametrize(("ratio", "said"), [(1.5, "reached"), (1.49, "**missed**")])
def test_a_missed_goal_is_said_to_be_missed(tmp_path, ratio, said):
    (tmp_path / "training.json").write_text(json.dumps({"threads=1": training_record(ratio)}))
    table = performance.table_of(tmp_path)("training-targets")
    (line,) = (line for line in table.splitlines() if "transformers bf16 eager" in line)
    assert line.endswith(f"| {said} |")
    assert "litgpt bf16 model-compiled | 1.00 | – | – | not measured |" in table


def test_absent_peers_are_named_under_the_table(tmp_path):
    (tmp_path / "training.json").write_text(json.dumps({"threads=1": training_record(1.6)}))
    assert "litgpt: not there." in performance.table_of(tmp_path)("training")


def test_on_a_gpu_the_clock_counts_and_utilisation_and_memory_are_shown(tmp_path):
    record = training_record(1.6, clock="secs", gpu="NVIDIA H200")
    (tmp_path / "training.json").write_text(json.dumps({"NVIDIA H200": record}))
    table = performance.table_of(tmp_path)("training")
    assert "tokens per second" in table and "| 10.0 % | 1 |" in table
