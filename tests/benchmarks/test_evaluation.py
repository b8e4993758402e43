"""The benchmark of evaluation runs, with and without the harness. Says nothing about speed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks import evaluation
from tests.zero_shot import write_data


def run(tmp_path: Path, tokenizer: str) -> dict:
    out = tmp_path / "evaluation.json"
    data = str(write_data(tmp_path / "evals"))
    assert (
        evaluation.main(["--quick", "--data", data, "--tokenizer", tokenizer, "--device", "cpu", "--out", str(out)])
        == 0
    )
    (result,) = json.loads(out.read_text()).values()
    return result


def test_without_the_harness_ours_is_measured_alone_and_the_result_says_so(tmp_path, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else real(name, *a))

    result = run(tmp_path, "bytes")

    assert list(result["tokens_per_sec"]) == [evaluation.OURS] and result["tokens"] > 0
    assert "lm_eval" in result["absent"][evaluation.ALONE]
    assert "left out" in capsys.readouterr().out
    assert {name.split()[0] for name in result["scores"][evaluation.OURS]} == set(evaluation.TASKS)


@pytest.mark.eval
@pytest.mark.filterwarnings("default")  # warnings are the harness's own
def test_the_harness_comes_to_the_same_scores(tmp_path, data_dir):
    pytest.importorskip("lm_eval", reason="the eval extra is not installed")

    result = run(tmp_path, str(data_dir("tokenizers/llama2")))

    assert set(result["tokens_per_sec"]) == {evaluation.OURS, evaluation.ADAPTED, evaluation.ALONE}
    assert result["absent"] == {} and set(result["ours_over"]) == {evaluation.ADAPTED, evaluation.ALONE}


def test_ways_that_come_to_other_scores_are_refused():
    with pytest.raises(RuntimeError, match="piqa acc is 0.6 by other"):
        evaluation.check_alike({evaluation.OURS: {"piqa acc": 0.5}, "other": {"piqa acc": 0.6}})
