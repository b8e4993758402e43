"""The benchmark of growth from file to file grows what it says and compares what it says. Says nothing about speed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import grow_speed
from lit_gpt.checkpoint import read_config, verify


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    return grow_speed.make_sources(tmp_path_factory.mktemp("sources"), 4, 128)


@pytest.mark.parametrize(
    ("name", "source"),
    [("stack", "shallow"), ("zero-width", "narrow"), ("stack of training form, map", "training")],
)
def test_every_growth_ends_at_the_same_sizes(sources, tmp_path, capsys, name, source):
    grow_speed.measure_here(name, sources[source], tmp_path / "dst")

    measured = json.loads(capsys.readouterr().out)
    assert 0 < measured["import_rss_bytes"] <= measured["peak_rss_bytes"] and measured["secs"] > 0
    assert verify(tmp_path / "dst") == []
    config = read_config(tmp_path / "dst")
    assert (config.n_layer, config.n_embd, config.intermediate_size) == (4, 128, 512)


def test_what_growth_is_compared_with_writes_as_many_bytes(sources, tmp_path):
    grow_speed.copy()(sources["shallow"], tmp_path / "copied")
    grow_speed.load_and_save()(sources["state dict"], tmp_path / "naive.pth")
    grow_speed.MEASURED["stack"]()(sources["shallow"], tmp_path / "stack")

    name = "model.safetensors"
    assert (tmp_path / "copied" / name).read_bytes() == (sources["shallow"] / name).read_bytes()
    sizes = [path.stat().st_size for path in (tmp_path / "naive.pth", tmp_path / "stack" / name)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_ratios_are_medians_of_those_of_the_same_repeat():
    def sample(secs: float, peak_rss_bytes: float = 0) -> dict[str, float]:
        return {"secs": secs, "import_rss_bytes": 50, "peak_rss_bytes": peak_rss_bytes}

    secs = {"cp and fsync": (1, 2, 4), "stack": (2, 2, 4), "torch.load and torch.save": (9, 9, 9)}
    samples = {name: [sample(each) for each in values] for name, values in secs.items()}
    samples |= {"zero-width": [sample(7, 271)], "stack of training form, map": [sample(0.5)]}

    summary = grow_speed.summarise({"samples": samples, "largest_tensor_bytes": 110})

    assert summary["over_cp"] == {"stack": 1, "torch.load and torch.save": 4.5, "zero-width": 7}
    assert summary["medians"]["stack"]["secs"] == 2
    assert list(summary["kept"].values()) == [True, True, False, True]
