"""The benchmark of the training step runs, and what it compares is the same step. Says nothing about speed."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")

from benchmarks import cpu_training  # noqa: E402

TINY = ["--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--intermediate-size", "24", "--vocab-size", "64"]
TINY += ["--block-size", "8", "--batch-size", "2", "--turns", "2"]
EAGER = [("ours", "fp32"), ("transformers", "fp32"), ("naive", "fp32"), ("ours", "bf16"), ("transformers", "bf16")]


def test_a_tiny_run_measures_every_eager_variant_and_writes_it_down(tmp_path, capsys):
    out = tmp_path / "cpu_training.json"

    assert cpu_training.main([*TINY, "--only", "eager", "--json", "--out", str(out)]) == 0

    result = json.loads(capsys.readouterr().out)
    assert list(json.loads(out.read_text()).values()) == [result]
    names = [variant["name"] for variant in result["variants"]]
    assert names == [f"{family} {precision} eager" for family, precision in EAGER]
    for variant in result["variants"]:
        assert variant["tokens_per_cpu_sec"]["median"] > 0 and len(variant["secs"]) == 2
        assert 0 < variant["products_share"] < 1
    pairs = {(ratio["ours"], ratio["against"]) for ratio in result["ratios_cpu_secs"]}
    assert ("ours bf16 eager", "transformers bf16 eager") in pairs
    assert ("ours fp32 eager", "transformers bf16 eager") not in pairs, "another policy is another computation"


def test_the_table_can_be_printed_and_another_shape_leaves_the_committed_result_alone(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_training, "RESULT", tmp_path / "untouched.json")

    assert cpu_training.main([*TINY, "--only", "fp32 eager"]) == 0

    assert "ours fp32 eager against naive fp32 eager" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_variant_that_computes_something_else_is_refused(monkeypatch):
    def doubled(variant, config):
        step = training_step(variant, config)
        return (lambda rows: 2 * step(rows)) if variant.family == "naive" else step

    training_step = cpu_training.training_step
    monkeypatch.setattr(cpu_training, "training_step", doubled)
    with pytest.raises(RuntimeError, match="first loss of naive fp32 eager"):
        cpu_training.main([*TINY, "--only", "ours fp32 eager", "naive"])
