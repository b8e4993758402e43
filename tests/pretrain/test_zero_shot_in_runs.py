"""Tasks that are scored while a run trains: the numbers of evaluate.py, however it is shared and whatever stops it."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from grow.runs.gather import gather
from grow.scores import AVERAGE, AVERAGED, LABELS, METRICS
from lit_gpt.checkpoint import latest, manifest_sha256, read_training
from lit_gpt.errors import EXIT_DATA, EXIT_OK, EXIT_USAGE, NonFiniteError
from lit_gpt.fingerprint import weights_sha256
from pretrain.command_line import parse
from pretrain.run import run
from pretrain.zero_shot import scoring
from pretrain.zero_shot.suite import Suite
from tests.pretrain.conftest import command_for, of_processes, two_stages
from tests.pretrain.processes import run_on
from tests.pretrain.runs import assert_same_end, records
from tests.reports import facts_on
from tests.zero_shot import DOCUMENTS, NAMES, write_data

SETTINGS = {"tasks": "all", "every_steps": 3}
MOMENTS = [
    *[("start", 0, 1), ("every", 3, 1), ("before_growth", 6, 1)],
    *[("after_growth", 6, 2), ("every", 9, 2), ("every", 12, 2), ("end", 14, 2)],
]


@pytest.fixture(scope="session")
def evals(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "evals")


def scored(settings: dict[str, object], data: Path, **changes: object) -> dict[str, object]:
    return {**settings, "zero_shot": {**SETTINGS, "data": str(data), **changes}}


@pytest.fixture
def scored_settings(settings, evals) -> dict[str, object]:
    return scored(settings, evals)


@pytest.fixture(scope="module")
def scored_run(tmp_path_factory, prepared, evals) -> Path:
    """The folder of a run with all nine tasks that nothing disturbed; every third checkpoint is there."""
    folder = tmp_path_factory.mktemp("scored")
    settings = scored(two_stages(folder / "run", prepared), evals)
    settings["checkpoints"] = {"every_steps": 3, "keep_every_steps": 1}
    settings["logging"] = {"every_steps": 1, "tensorboard": True}
    run(parse(command_for(settings, folder)), command=["pretrain"])
    return folder / "run"


@pytest.fixture
def offline(root, monkeypatch, capsys, evals) -> Callable[..., list[dict]]:
    """The records that evaluate.py prints of a checkpoint."""
    monkeypatch.syspath_prepend(str(root / "scripts"))
    command = importlib.import_module("evaluate")

    def records_of(checkpoint: Path, *arguments: str) -> list[dict]:
        capsys.readouterr()
        assert command.main([str(checkpoint), "--data", str(evals), "--json", *arguments]) == EXIT_OK
        return json.loads(capsys.readouterr().out)["scores"]

    return records_of


def scores(folder: Path, when: str | None = None, step: int | None = None) -> list[dict]:
    """The records of tasks of a run, or of one moment of it."""
    return [
        line
        for line in records(folder, "evals.jsonl")
        if "task" in line and when in (None, line["when"]) and step in (None, line["step"])
    ]


def checkpoint_at(folder: Path, stage: int, step: int) -> Path:
    return folder / "checkpoints" / f"stage-{stage:02d}" / f"step-{step:010d}"


def test_every_task_has_every_metric_at_every_moment_and_the_seven_have_their_average(scored_run):
    found = scores(scored_run)
    moments = list(dict.fromkeys((line["when"], line["step"], line["stage"]) for line in found))
    assert moments == MOMENTS
    assert len(found) == len(MOMENTS) * (9 + 6 + 1 + 2 + 1), "first metrics, acc, perplexities, the average"
    at_end = {line["task"]: line for line in reversed(scores(scored_run, "end"))}
    assert at_end.keys() == {*NAMES, AVERAGE}
    assert at_end[AVERAGE]["value"] == pytest.approx(sum(at_end[task]["value"] for task in AVERAGED) / 7)
    assert all(line["n"] == DOCUMENTS and line["limit"] is None for task, line in at_end.items() if task != AVERAGE)


def test_records_stand_where_the_losses_of_the_moment_stand(scored_run):
    place = ("step", "stage", "stage_name", "when", "tokens", "tokens_total", "flops_total", "weights")
    losses = {
        tuple(line[key] for key in place) for line in records(scored_run, "evals.jsonl") if line.get("metric") == "loss"
    }
    both = {tuple(line[key] for key in place) for line in scores(scored_run) if line["when"] != "every"}
    assert both <= losses


@pytest.mark.parametrize(
    ("when", "stage", "step"), [("every", 1, 3), ("before_growth", 1, 6), ("every", 2, 12), ("end", 2, 14)]
)
def test_the_numbers_are_to_the_bit_those_of_evaluate_on_the_checkpoint_of_the_moment(
    scored_run, offline, when, stage, step
):
    checkpoint = checkpoint_at(scored_run, stage, step)
    expected = offline(checkpoint)
    own = {"when": when, "checkpoint": None}
    assert all(line["when"] == "evaluate" and line["checkpoint"] == manifest_sha256(checkpoint) for line in expected)
    assert scores(scored_run, when, step) == [{**line, **own} for line in expected]


def test_training_is_the_same_to_the_bit_without(scored_run, finished_run):
    assert records(scored_run) == records(finished_run)
    ours, theirs = (read_training(latest(folder / "checkpoints")) for folder in (scored_run, finished_run))
    assert weights_sha256(dict(ours.model)) == weights_sha256(dict(theirs.model)) == scores(scored_run)[-1]["weights"]


class Sender:
    """Sends SIGTERM to this process before a certain batch of tasks, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.batches = 0
        original = scoring._score_batch

        def watched(*arguments):
            self.batches += 1
            if self.batches == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments)

        monkeypatch.setattr(scoring, "_score_batch", watched)


BATCHES = 9  # of all tasks: each task's documents fit one


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "when"),
    [
        (1, "every"),
        (3, "after_growth"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [(2, "before_growth"), (6, "end")]),
    ],
)
def test_a_run_that_was_stopped_while_it_scored_has_the_records_of_one_that_was_not(
    scored_settings, pretrain, scored_run, monkeypatch, moment, when
):
    folder = Path(scored_settings["out_dir"])
    sender = Sender(monkeypatch, moment * BATCHES + 2)
    stopped = pretrain(scored_settings)
    assert stopped.returncode == 75, stopped.stderr
    assert sender.batches == moment * BATCHES + 2, "the next batch is not computed"
    assert read_training(latest(folder / "checkpoints")).state["validation_owed"] == when

    assert pretrain(scored_settings).returncode == 0
    assert_same_end(folder, scored_run)


def test_a_kill_between_the_scores_and_the_next_checkpoint_repeats_them_once(scored_settings, pretrain, scored_run):
    folder = Path(shutil.copytree(scored_run, scored_settings["out_dir"]))
    for path in folder.glob("checkpoints/stage-*/step-*"):
        if int(path.name[5:]) >= 6:
            shutil.rmtree(path)  # the logs go on to the end
    assert pretrain(scored_settings).returncode == 0
    assert_same_end(folder, scored_run)


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_two_processes_score_to_the_bit_what_one_does(prepared, evals, offline, scored_run, tmp_path, strategy):
    settings = scored(of_processes(tmp_path / "run", prepared), evals, micro_batch_size=2)
    settings |= {"parallel": {"strategy": strategy}, "checkpoints": {"every_steps": 3, "keep_every_steps": 1}}

    run_on(settings, 2, tmp_path / "start")

    for when, stage, step in (("every", 1, 3), ("before_growth", 1, 6), ("end", 2, 14)):
        expected = offline(checkpoint_at(tmp_path / "run", stage, step), "--batch-size", "2")
        found = scores(tmp_path / "run", when, step)
        assert found == [{**line, "when": when, "checkpoint": None} for line in expected]
    at_start, alone = (scores(folder, "start") for folder in (tmp_path / "run", scored_run))
    assert [line["weights"] for line in at_start] == [line["weights"] for line in alone]
    assert [line["value"] for line in at_start] == pytest.approx([line["value"] for line in alone], rel=1e-6)


@pytest.mark.slow
def test_the_weights_of_a_record_are_those_that_are_saved_also_where_shared_ones_stay_gathered(
    prepared, evals, tmp_path
):
    """They are gathered in bf16 for products, and saved in fp32."""
    settings = scored(of_processes(tmp_path / "run", prepared), evals, tasks="piqa", every_steps=0)
    settings |= {"stages": [{"name": "base", "max_steps": 1}], "precision": "bf16"}
    settings |= {"parallel": {"strategy": "fsdp", "reshard_after_forward": False}}
    run_on(settings, 2, tmp_path / "start")
    saved = read_training(latest(tmp_path / "run" / "checkpoints")).model
    assert scores(tmp_path / "run", "end")[0]["weights"] == weights_sha256(dict(saved))


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_while_they_score_stops_both(prepared, evals, tmp_path):
    settings = scored(of_processes(tmp_path / "run", prepared), evals, tasks=["sciq", "arc_easy"], micro_batch_size=2)
    run_on(settings, 2, tmp_path / "stopped", prepare=_signal_to_the_second, code=75)
    assert read_training(latest(tmp_path / "run" / "checkpoints")).state["validation_owed"] == "every"
    run_on(settings, 2, tmp_path / "more")

    undisturbed = {**settings, "out_dir": str(tmp_path / "undisturbed")}
    run_on(undisturbed, 2, tmp_path / "start")
    assert_same_end(tmp_path / "run", tmp_path / "undisturbed")


def _signal_to_the_second() -> None:
    from pretrain import measuring

    original, asked = measuring._is_interrupted, []

    def watched(run, state, doing):
        asked.append(doing)
        if doing == "scoring tasks" and state.step_count == 3 and run.world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, state, doing)

    measuring._is_interrupted = watched


@pytest.mark.parametrize("precision", ["bf16", pytest.param("bf16-true", marks=pytest.mark.slow)])
def test_in_bf16_and_with_activations_made_again_scores_are_near_those_of_evaluate(
    scored_settings, pretrain, offline, precision
):
    changes = {"precision": precision, "activation_checkpointing": "full"}
    assert pretrain({**scored_settings, **changes}).returncode == 0

    found = scores(Path(scored_settings["out_dir"]), "end")
    expected = offline(Path(scored_settings["out_dir"]), "--dtype", "bf16")
    perplexity = [next(line["value"] for line in each if line["task"] == "wikitext") for each in (found, expected)]
    assert {line["dtype"] for line in found} == {"bfloat16"}
    assert math.log(perplexity[0]) == pytest.approx(math.log(perplexity[1]), rel=0.01)


@pytest.mark.slow
def test_nothing_is_compiled_for_the_lengths_of_tasks(scored_settings, offline, tmp_path):
    compiled = {**scored_settings, "compile": "block", "precision": "fp32"}
    folder = Path(scored_settings["out_dir"])
    without = {**compiled, "zero_shot": {}, "out_dir": str(tmp_path / "without")}
    run_on(compiled, 1, tmp_path / "with", prepare=partial(_counting_graphs, tmp_path / "graphs"))
    run_on(without, 1, tmp_path / "start", prepare=partial(_counting_graphs, tmp_path / "graphs without"))

    graphs = [json.loads((tmp_path / name).read_text())["unique_graphs"] for name in ("graphs", "graphs without")]
    assert graphs[0] == graphs[1] > 0
    assert scores(folder, "end") == [{**line, "when": "end", "checkpoint": None} for line in offline(folder)]
    assert records(folder) == records(tmp_path / "without")


def _counting_graphs(file: Path) -> None:
    """Write what was compiled to a file when the run ends."""
    from pretrain.loggers import RunLog

    def close(log: RunLog) -> None:
        from torch._dynamo.utils import counters

        file.write_text(json.dumps(counters["stats"]))

    RunLog.close = close


def test_a_growth_that_is_being_learned_is_scored_as_what_it_grows(scored_settings, pretrain):
    scored_settings["stages"][1] |= {"operator": "ligo", "options": {"learn_steps": 4}}
    scored_settings["zero_shot"] |= {"tasks": ["piqa"], "every_steps": 8}

    assert pretrain(scored_settings).returncode == 0

    found = scores(Path(scored_settings["out_dir"]))
    moments = list(dict.fromkeys((line["when"], line["step"], line["stage"]) for line in found))
    assert moments == [
        ("start", 0, 1),
        ("before_growth", 6, 1),
        ("every", 8, 2),
        ("after_growth", 10, 2),
        ("end", 14, 2),
    ]
    weights = list(dict.fromkeys(line["weights"] for line in found))
    assert len(weights) == len(moments)


def test_a_run_that_goes_on_from_another_counts_its_tokens_too(scored_settings, pretrain, finished_run, offline):
    scored_settings |= {"init_from": str(finished_run), "stages": [{"name": "more", "max_steps": 2}]}
    scored_settings["zero_shot"] |= {"tasks": "piqa", "every_steps": 0}
    assert pretrain(scored_settings).returncode == 0
    folder = Path(scored_settings["out_dir"])
    before = read_training(latest(finished_run / "checkpoints")).state["tokens"]

    for line in (scores(folder, "end")[0], offline(folder, "--tasks", "piqa")[0]):
        assert (line["tokens"], line["tokens_total"]) == (2 * 64, before + 2 * 64)
    (model,) = gather([folder]).models
    assert [point.tokens for point in model.scores] == [before, before + 2 * 64]


def test_scores_of_a_part_are_marked_everywhere(scored_settings, pretrain):
    scored_settings["zero_shot"] |= {"tasks": "paper", "limit": 2, "every_steps": 0}
    done = pretrain(scored_settings)
    assert "zero-shot piqa: 2 documents, the first 2 of its file" in done.stdout
    assert done.stdout.count(" (limited to the first 2 documents of a task)\n") == 4
    found = scores(Path(scored_settings["out_dir"]))
    assert all(line["limit"] == 2 for line in found if line["task"] != "logiqa")


def test_the_report_draws_the_accuracies_of_a_run(scored_run):
    report = facts_on(scored_run)
    charts = {chart["id"]: chart for chart in report["charts"]}
    for task in (AVERAGE, *METRICS):
        if task in (*NAMES, AVERAGE):
            assert LABELS[task], task
            name = f"score-{task.replace('_', '-')}"
            assert name in charts, sorted(charts)
            points = [len(series["points"]) for series in charts[name]["series"]]
            assert points == [3, 4], "a base of three moments, a grown model of four"


def test_tensorboard_tells_the_scores_on_both_sides_of_growth_apart(scored_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(scored_run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("zero_shot/piqa/acc_norm")] == [0, 3, 6, 9, 12, 14]
    assert [event.step for event in events.Scalars("zero_shot/average/acc_or_acc_norm_after_growth")] == [6]


def test_a_task_on_which_the_model_gives_no_numbers_has_no_score_and_stops_no_run(
    scored_settings, pretrain, monkeypatch
):
    original = Suite.score

    def broken(suite, task, *rest):
        if task.examples.task.name == "sciq":
            raise NonFiniteError("the model's log-likelihoods are not finite numbers")
        return original(suite, task, *rest)

    monkeypatch.setattr(Suite, "score", broken)
    scored_settings["zero_shot"] |= {"tasks": "sciq,piqa", "every_steps": 0}
    done = pretrain(scored_settings)
    assert done.returncode == 0
    assert "warning: no score of sciq at step 0: the model's log-likelihoods" in done.stderr
    assert {line["task"] for line in scores(Path(scored_settings["out_dir"]))} == {"piqa"}


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"tasks": "pika"}, EXIT_USAGE, "unknown task 'pika'; did you mean 'piqa'"),
        ({"tasks": ["piqa", "papre"]}, EXIT_USAGE, "unknown task 'papre'; did you mean 'paper'"),
        ({"tasks": ""}, EXIT_USAGE, "zero_shot.data has no effect without zero_shot.tasks"),
        ({"limit": 0}, EXIT_USAGE, "zero_shot.limit=0 must be at least 1"),
        ({"every_steps": -1}, EXIT_USAGE, "zero_shot.every_steps=-1 must be at least 0"),
        ({"micro_batch_size": 0}, EXIT_USAGE, "zero_shot.micro_batch_size=0 must be at least 1"),
        ({"every_step": 5}, EXIT_USAGE, "did you mean 'every_steps'"),
        ({"data": "nowhere"}, EXIT_DATA, "nowhere is not a folder"),
        ({"tasks_dir": "nowhere"}, EXIT_DATA, "nowhere is not a folder"),
    ],
)
@pytest.mark.parametrize("flag", [(), ("--dry-run",)], ids=["run", "dry-run"])
def test_a_wrong_setting_is_refused_before_anything_is_trained(scored_settings, pretrain, changes, code, message, flag):
    scored_settings["zero_shot"] |= changes
    done = pretrain(scored_settings, *flag)
    assert done.returncode == code and message in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and not Path(scored_settings["out_dir"]).joinpath("metrics.jsonl").exists()


@pytest.mark.parametrize("flag", [(), ("--dry-run",)], ids=["run", "dry-run"])
def test_evaluation_files_are_read_before_anything_is_trained(scored_settings, pretrain, tmp_path, flag):
    folder = write_data(tmp_path / "own")
    scored_settings["zero_shot"] |= {"data": str(folder)}
    file = folder / "sciq" / "validation.jsonl"
    file.write_text(file.read_text() + '{"question": 1')
    done = pretrain(scored_settings, *flag)
    assert done.returncode == EXIT_DATA and f"validation.jsonl, line {DOCUMENTS + 1} is not JSON" in done.stderr

    file.unlink()
    done = pretrain(scored_settings, *flag)
    assert done.returncode == EXIT_DATA and "task sciq" in done.stderr and "has no sciq/test.jsonl" in done.stderr


def test_data_without_a_tokenizer_is_refused(scored_settings, pretrain, prepared, tmp_path):
    (tmp_path / "tokens").mkdir()
    shutil.copy(prepared / "train_000000.bin", tmp_path / "tokens")
    scored_settings |= {"data": {"train": str(tmp_path / "tokens")}}
    scored_settings["model"] = {**scored_settings["model"], "vocab_size": 259}
    done = pretrain(scored_settings)
    assert done.returncode == EXIT_USAGE
    assert "zero_shot.tasks needs the tokenizer of the data; name it with data.tokenizer" in done.stderr


def test_tasks_may_be_named_when_the_run_goes_on(settings, evals, pretrain, finished_run):
    folder = Path(shutil.copytree(finished_run, settings["out_dir"]))
    shutil.rmtree(checkpoint_at(folder, 2, 14))
    assert pretrain(scored(settings, evals, tasks="piqa")).returncode == 0
    assert [(line["when"], line["metric"]) for line in scores(folder)] == [("end", "acc_norm"), ("end", "acc")]
