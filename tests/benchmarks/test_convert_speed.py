"""The benchmark of conversion converts what it says and compares what it says. Says nothing about speed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import convert_speed
from lit_gpt.checkpoint import read_weights, write_exchange
from tests.toys import toy_config, toy_weights


@pytest.fixture
def source(tmp_path) -> Path:
    config = toy_config()
    path = write_exchange(tmp_path / "source", config, toy_weights(config))
    (path / "MANIFEST.json").unlink()
    return path


@pytest.mark.parametrize("name", [convert_speed.EXCHANGE, convert_speed.HASHED, convert_speed.LEGACY])
def test_every_conversion_ends_with_the_weights_of_its_source(source, tmp_path, capsys, name):
    destination = tmp_path / ("out.pth" if name == convert_speed.LEGACY else "out")

    convert_speed.measure_here(name, source, destination)

    measured = json.loads(capsys.readouterr().out)
    assert 0 < measured["import_rss_bytes"] <= measured["peak_rss_bytes"] and measured["secs"] > 0
    if name == convert_speed.LEGACY:
        found = torch.load(destination, weights_only=True)["model"]
    else:
        found = read_weights(destination)
    assert all(torch.equal(found[key], weight) for key, weight in toy_weights(toy_config()).items())


def test_a_measurement_removes_what_the_last_one_left(source, tmp_path):
    destination = tmp_path / "out"
    destination.mkdir()
    (tmp_path / "out.receipt.json").touch()
    command = [sys.executable, "-c", "print('{\"secs\": 1}')"]

    assert convert_speed.measure("x", source, destination, command) == {"secs": 1}
    assert not destination.exists() and not (tmp_path / "out.receipt.json").exists()


def test_ratios_are_medians_of_those_of_the_same_repeat_and_goals_follow():
    def samples(*secs: float, peak: float = 5e8) -> list[dict[str, float]]:
        return [{"secs": each, "import_rss_bytes": 1, "peak_rss_bytes": peak} for each in secs]

    summary = convert_speed.summarise(
        {
            convert_speed.CP: samples(1, 2, 4),
            convert_speed.EXCHANGE: samples(1.5, 2, 20),
            convert_speed.LEGACY: samples(3, 3, 3, peak=2e9),
            convert_speed.LITGPT: samples(2, 4, 4),
        }
    )

    assert summary["over_cp"][convert_speed.EXCHANGE] == 1.5
    assert list(summary["kept"].values()) == [True, True, True, False, True]
