"""Task scores: which metric counts, what the average is, and what reading them leaves out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from grow.scores import AVERAGE, AVERAGED, Score, average, of_stage, read_external, read_scores
from lit_gpt.errors import DataError


def record(task: str, metric: str, value: float | None, **changes: Any) -> dict[str, Any]:
    common = {"step": 10, "stage": 1, "stage_name": "x", "when": "every", "tokens": 100, "flops_total": 6e9}
    return {
        **common,
        "task": task,
        "metric": metric,
        "value": value,
        "stderr": 0.01,
        "n": 500,
        "limit": None,
        **changes,
    }


def written(path: Path, *lines: dict[str, Any] | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def evals(folder: Path, *lines: dict[str, Any] | str) -> Path:
    return written(folder / "evals.jsonl", *lines).parent


def test_of_every_task_the_papers_metric_counts(tmp_path):
    run = evals(
        tmp_path / "run",
        record("sciq", "acc", 0.84),
        record("sciq", "acc_norm", 0.77),
        record("winogrande", "acc", 0.51),
        record("wikitext", "word_perplexity", 16.7, stderr=None),
        record("wikitext", "bits_per_byte", 0.8),
        record("average", "acc or acc_norm", 0.5),
        {"set": "a", "metric": "loss", "value": 3.0},
    )

    (point,), notes = read_scores(run)

    assert {task: score.value for task, score in point.scores.items()} == {
        "sciq": 0.77,
        "winogrande": 0.51,
        "wikitext": 16.7,
    }
    assert notes == [] and (point.tokens, point.flops, point.stage) == (100, 6e9, 1)


def test_a_task_of_the_users_own_is_left_out_with_a_note(tmp_path):
    lines = (record("boolq", "acc", 0.6), record("capitals", "acc", 0.4), record("capitals", "acc_norm", 0.5))
    note = "scores of capitals were left out; these tasks have no figure here."

    (point,), notes = read_scores(evals(tmp_path / "run", *lines))
    assert list(point.scores) == ["boolq"] and notes == [f"run: {note}"]

    _, notes = read_external(written(tmp_path / "theirs.jsonl", *lines))
    assert notes == [f"theirs: {note}"]


def test_the_average_is_of_all_seven_or_not_there():
    scores = {task: Score(0.5, 0.07) for task in AVERAGED}

    assert average(scores) == Score(0.5, pytest.approx(0.07 / math.sqrt(7)), None)
    assert average({**scores, "piqa": Score(0.5, 0.07, limit=100)}).limit == 100
    assert average({**scores, "piqa": Score(0.5)}).stderr is None
    del scores["piqa"]
    assert average(scores) is None


def test_scores_of_different_moments_are_not_mixed_into_an_average(tmp_path):
    tasks = list(AVERAGED)
    early = [record(task, AVERAGED[task], 0.3, tokens=10, flops_total=6e8) for task in tasks[:6]]
    late = [record(tasks[6], AVERAGED[tasks[6]], 0.4)]

    points, _ = read_scores(evals(tmp_path / "run", *late, *early))

    assert [point.tokens for point in points] == [10, 100]
    assert not any(AVERAGE in point.scores for point in points)


def test_a_score_that_is_no_number_is_left_out_with_a_note(tmp_path):
    points, notes = read_scores(
        evals(tmp_path / "run", record("sciq", "acc_norm", float("nan")), record("boolq", "acc", 0.6))
    )

    assert [list(point.scores) for point in points] == [["boolq"]]
    assert len(notes) == 1 and "line 1" in notes[0] and "nan" in notes[0]


def test_a_stage_has_its_own_scores_and_counts_the_tokens_behind_it(tmp_path):
    second = record("boolq", "acc", 0.5, stage=2, tokens_total=140)
    points, _ = read_scores(evals(tmp_path / "run", record("boolq", "acc", 0.6), second))

    assert [(point.tokens, point.scores["boolq"].value) for point in of_stage(points, 2)] == [(140, 0.5)]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"tokens": "many"}, "tokens is 'many'"),
        ({"limit": "few"}, "limit is 'few'"),
        ({"task": ["boolq"]}, r"task is \['boolq'\], not a name"),
    ],
)
def test_a_field_of_another_kind_is_damage(tmp_path, damage, message):
    with pytest.raises(DataError, match=message):
        read_scores(evals(tmp_path / "run", {**record("boolq", "acc", 0.6), **damage}))


def test_an_external_file_may_hold_results_of_the_harness_losses_and_several_models(tmp_path):
    new_style = {"boolq": {"acc,none": 0.6, "acc_stderr,none": 0.02}, "unknown": {"acc": 1.0}}
    path = written(
        tmp_path / "theirs.jsonl",
        {"model": "a", "tokens": 2e9, "parameters": 1e8, "results": new_style, "loss": 2.5},
        {"model": "a", "tokens": 1e9, "parameters": 1e8, "results": {"boolq": {"acc": 0.5}}},
        {"model": "b", "tokens": 1e9, "flops_total": 3e18, "loss": 2.9},
        record("boolq", "acc", 0.7),
        '{"model": "a", "tok',
    )

    models, notes = read_external(path)

    a, b, unnamed = models
    assert (a.name, b.name, unnamed.name) == ("a", "b", "theirs")
    assert [(p.tokens, p.flops, p.scores["boolq"]) for p in a.points] == [
        (1e9, 6e17, Score(0.5)),
        (2e9, 1.2e18, Score(0.6, 0.02)),
    ]
    assert (list(a.losses), list(b.losses)) == ([(2e9, 1.2e18, 2.5)], [(1e9, 3e18, 2.9)])
    assert len(notes) == 1 and "incomplete" in notes[0]


def test_the_size_that_one_line_says_counts_for_every_line_of_the_model(tmp_path):
    unknown = {"step": None, "stage": None, "flops_total": None}
    path = written(
        tmp_path / "theirs.jsonl",
        record("boolq", "acc", 0.5, **unknown),
        {"parameters": 1e8, "tokens": 200, "loss": 2.5},
        {"tokens": 300, "loss": 2.4, "results": {"boolq": {"acc": 0.6}}},
        record("boolq", "acc", 0.7, tokens=None, tokens_total=400, flops_total=7.0),
    )

    ((model,), _) = read_external(path)

    assert model.parameters == 1e8
    assert [(point.tokens, point.flops) for point in model.points] == [(100, 6e10), (300, 1.8e11), (400, 7.0)]
    assert [flops for _, flops, _ in model.losses] == [1.2e11, 1.8e11]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "has no point"),
        ([{"model": "a", "tokens": 1}], "has no point"),
        ([{"tokens": -1, "loss": 2.0}], "tokens is -1"),
        ([{"tokens": 1, "results": {"boolq": 0.5}}], "results must map tasks to metrics"),
        (["{nonsense", {"tokens": 1}], "line 1 is not JSON"),
        (["[1]"], "not a JSON object"),
    ],
)
def test_an_external_file_without_points_is_one_clear_error(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        read_external(written(tmp_path / "theirs.jsonl", *lines))


def test_the_published_curve_of_pythia_1b_gives_the_papers_column_of_table_3(data_dir):
    """Step 53,000 is the paper's "Pythia-1B, 100B tokens": its metrics and its average come out as printed."""
    path = data_dir("reference_results/pythia_zero_shot/pythia-1b-deduped.jsonl")
    printed = {"lambada_openai": 53.52, "arc_challenge": 25.59, "arc_easy": 47.26, "piqa": 69.31, "logiqa": 29.49}
    printed |= {"sciq": 77.3, "winogrande": 51.22, AVERAGE: 50.53}

    (model,), notes = read_external(path)
    point = next(point for point in model.points if point.tokens == 53_000 * 2_097_152)

    assert notes == [] and len(model.points) == 27
    for task, value in printed.items():
        assert 100 * point.scores[task].value == pytest.approx(value, abs=0.01), task
    assert 100 * point.scores[AVERAGE].stderr == pytest.approx(0.5, abs=0.1)
