"""evaluate.py as a user starts it: a table, records, and one clear error for everything that is wrong."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from lit_gpt.checkpoint import manifest_sha256, write_exchange, write_training
from lit_gpt.errors import EXIT_DATA, EXIT_NON_FINITE, EXIT_OK, EXIT_USAGE, run_command
from lit_gpt.fingerprint import weights_sha256
from lit_gpt.flops import Flops
from lit_gpt.tokenizer import Tokenizer, file_sha256
from pretrain.zero_shot.task import built_in_tasks
from tests.toys import toy_config, toy_weights
from tests.zero_shot import DOCUMENTS, NAMES, write_data

CONFIG = toy_config(vocab_size=259, padded_vocab_size=260, block_size=64)


@pytest.fixture
def evaluate(root, monkeypatch, capsys):
    """Run the command in this process; gives (exit code, stdout, stderr)."""
    monkeypatch.syspath_prepend(str(root / "scripts"))
    monkeypatch.delenv("LIT_GROW_DATA", raising=False)
    module = importlib.import_module("evaluate")

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_command(lambda: module.main([str(argument) for argument in arguments]))
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path / "data" / "evals")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Exchange form with its tokenizer."""
    Tokenizer.load("bytes").save(_made(tmp_path / "tokenizer"))
    provenance = {"step_count": 7, "tokens": 900, "flops_total": 1e9}
    write_exchange(
        *(tmp_path / "model", CONFIG, toy_weights(CONFIG)),
        tokenizer_dir=tmp_path / "tokenizer",
        provenance=provenance,
    )
    return tmp_path / "model"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def training_form(path: Path, **state: object) -> Path:
    counters = {"step_count": 12, "iter_num": 48, "stage": 2, "stage_name": "grown", "tokens": 9000, "history": []}
    flops = {
        "flops": vars(Flops(paper=2.0, model=3.0, palm=4.0)),
        "parent_flops": vars(Flops(paper=1.0)),
        "parent_tokens": 500,
    }
    state = {"model_config": CONFIG.to_dict(), **counters, **flops, "separator_id": 2, **state}
    return write_training(path, toy_weights(CONFIG), {}, state)


def table_of(out: str) -> dict[tuple[str, str], list[str]]:
    """(task, metric) -> value, stderr and the rest of a printed table."""
    rows = [line.replace(" %", "%").replace("acc or acc_norm", "acc_or_acc_norm").split() for line in out.splitlines()]
    return {(row[0], row[1]): row[2:] for row in rows[1:] if row and row[0] in (*NAMES, "average")}


def test_a_table_has_every_task_and_the_average_with_errors_chance_and_numbers(evaluate, folder, data):
    code, out, _ = evaluate(folder, "--data", data)

    assert code == EXIT_OK
    table = table_of(out)
    assert {task for task, _ in table} == {*NAMES, "average"}
    assert table["arc_easy", "acc_norm"][2:] == ["25.00%", str(DOCUMENTS)]
    assert table["wikitext", "word_perplexity"][2:] == ["-", str(DOCUMENTS)]
    assert table["average", "acc_or_acc_norm"][2:] == ["28.57%", str(7 * DOCUMENTS)]
    assert "limited" not in out and "token 1 is put before every text" in out


def test_scores_of_a_part_are_marked_in_every_row_and_there_is_no_average_of_six(evaluate, folder, data):
    code, out, _ = evaluate(folder, "--data", data, "--tasks", "piqa,sciq,wikitext", "--limit", DOCUMENTS - 1)

    rows = table_of(out)
    assert code == EXIT_OK and len(rows) == 2 + 2 + 3
    assert all(row[-2:] == [str(DOCUMENTS - 1), "limited"] for row in rows.values())
    assert "not to be compared with scores of whole sets" in out


def test_records_say_which_checkpoint_which_file_and_how(evaluate, folder, data, tmp_path):
    for _ in range(2):
        code, out, _ = evaluate(folder, "--data", data, "--tasks", "piqa", "--out", tmp_path / "o.jsonl", "--json")
    assert code == EXIT_OK

    records = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert records[:2] == records[2:] == json.loads(out)["scores"], "lines are appended"
    first = records[0]
    assert (first["task"], first["metric"], first["n"], first["limit"]) == ("piqa", "acc_norm", DOCUMENTS, None)
    assert first["checkpoint"] == manifest_sha256(folder)
    assert first["data"] == file_sha256(data / "piqa" / "valid_docs.jsonl")
    assert (first["step"], first["stage"], first["flops_total"]) == (7, None, 1e9)
    assert (first["tokens"], first["tokens_total"]) == (None, 900), "growth.json knows what all runs have seen"
    assert first["weights"] == weights_sha256(toy_weights(CONFIG))
    assert first["task_version"] == built_in_tasks()["piqa"].version
    assert (first["evaluator"], first["num_fewshot"], first["first_id"], first["dtype"]) == (
        "lit-grow",
        0,
        1,
        "float32",
    )
    assert first["chance"] == 0.5 and 0 <= first["value"] <= 1


def test_records_begin_on_a_line_of_their_own(evaluate, folder, data, tmp_path):
    (tmp_path / "o.jsonl").write_text('{"step": 3, "lo')

    evaluate(folder, "--data", data, "--tasks", "piqa", "--out", tmp_path / "o.jsonl")

    half, *records = (tmp_path / "o.jsonl").read_text().splitlines()
    assert half == '{"step": 3, "lo' and [json.loads(line)["metric"] for line in records] == ["acc_norm", "acc"]


def test_a_run_is_its_last_checkpoint_and_texts_begin_with_its_separator(evaluate, data, tmp_path):
    run = tmp_path / "run"
    training_form(run / "checkpoints" / "stage-02" / "step-0000000012")
    arguments = ("--data", data, "--tasks", "arc_easy", "--tokenizer", "bytes", "--json")

    code, out, _ = evaluate(run, *arguments)

    record = json.loads(out)["scores"][0]
    assert code == EXIT_OK and record["first_id"] == 2
    assert (record["step"], record["stage"], record["stage_name"]) == (12, 2, "grown")
    assert (record["tokens"], record["tokens_total"], record["flops_total"]) == (9000, 9500, 3.0)
    _, out, _ = evaluate(run, *arguments, "--first-id", "bos")
    assert json.loads(out)["scores"][0]["first_id"] == 1


def test_a_file_that_does_not_say_what_was_spent_has_no_place_on_an_axis(evaluate, data, tmp_path):
    unknown = {"tokens": 0, "flops": vars(Flops()), "parent_flops": vars(Flops()), "parent_tokens": 0}
    training_form(tmp_path / "training", **unknown, converted_from={"format": "torch.save"})
    arguments = ("--data", data, "--tasks", "piqa", "--tokenizer", "bytes", "--json")
    _, out, _ = evaluate(tmp_path / "training", *arguments)
    record = json.loads(out)["scores"][0]
    assert [record[key] for key in ("tokens", "tokens_total", "flops_total")] == [None] * 3


def test_a_bos_that_the_tokenizer_would_not_put_first_is_not_put_first(evaluate, data, folder, monkeypatch):
    monkeypatch.setattr("lit_gpt.tokenizer.BytesTokenizer.puts_bos_first", False)
    arguments = (folder, "--data", data, "--tasks", "piqa,wikitext")
    code, out, _ = evaluate(*arguments)
    assert code == EXIT_OK and "nothing is put before every text" in out
    _, out, _ = evaluate(*arguments, "--first-id", "bos")
    assert "token 1 is put before every text" in out


def test_every_form_of_a_checkpoint_scores_the_same(evaluate, folder, data, tmp_path):
    training_form(tmp_path / "training")
    shared = ("--data", data, "--tasks", "sciq,lambada_openai", "--tokenizer", "bytes", "--first-id", "1", "--json")
    values = []
    for checkpoint in (folder, tmp_path / "training"):
        code, out, _ = evaluate(checkpoint, *shared)
        assert code == EXIT_OK
        values.append([score["value"] for score in json.loads(out)["scores"]])
    assert values[0] == values[1]


def test_a_task_of_the_users_is_scored_beside_ours(evaluate, folder, data, tmp_path):
    own = _made(tmp_path / "mine")
    values = {"kind": "continuation", "files": ["rhymes.jsonl"], "prompt": "{first}", "continuation": "{last}"}
    (own / "rhymes.yaml").write_text(yaml.safe_dump({**values, "metrics": ["acc"]}))
    (own / "rhymes.jsonl").write_text('{"first": "A cat sat on the", "last": "mat"}\n')

    code, out, _ = evaluate(folder, "--data", data, "--tasks-dir", own, "--tasks", "rhymes,piqa")

    assert code == EXIT_OK and out.splitlines()[1].split()[:2] == ["rhymes", "acc"]


def test_data_is_found_by_the_environment_and_bf16_runs(evaluate, folder, data, monkeypatch):
    monkeypatch.setenv("LIT_GROW_DATA", str(data.parent))
    code, out, _ = evaluate(folder, "--tasks", "piqa", "--dtype", "bf16")
    assert code == EXIT_OK and "bfloat16" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tasks", "pika"], EXIT_USAGE, "unknown task 'pika'; did you mean 'piqa'"),
        (["--tasks", ","], EXIT_USAGE, "--tasks names no task"),
        (["--limit", 0], EXIT_USAGE, "--limit 0 must be at least 1"),
        (["--batch-size", -1], EXIT_USAGE, "--batch-size -1 must be at least 1"),
        (["--block-size", 65], EXIT_USAGE, "--block-size 65 is above the model's, 64"),
        (["--first-id", "eos"], EXIT_USAGE, "--first-id eos must be a token's number, bos, or none"),
        (["--first-id", "260"], EXIT_USAGE, "the first token, 260, must be below the 260 rows"),
        (["--device", "tpu"], EXIT_USAGE, "--device tpu is not here"),
        (["--data", "nowhere"], EXIT_DATA, "nowhere is not a folder"),
        (["--tasks-dir", "nowhere"], EXIT_DATA, "nowhere is not a folder"),
        (["--tokenizer", "nowhere"], EXIT_DATA, "tokenizer nowhere does not exist"),
        (["--out", "/dev/null/o.jsonl"], EXIT_DATA, "/dev/null: Not a directory"),
    ],
)
def test_a_wrong_setting_is_one_line(arguments, code, message, evaluate, folder, data):
    found, out, error = evaluate(folder, *(() if "--data" in arguments else ("--data", data)), *arguments)
    assert (found, out) == (code, "")
    assert message in error and error.startswith("error: ") and len(error.splitlines()) == 1


def test_the_folder_of_out_is_made_with_the_first_scores_and_not_where_there_are_none(evaluate, folder, data, tmp_path):
    out = tmp_path / "new" / "folder" / "scores.jsonl"
    arguments = ("--data", data, "--tasks", "piqa", "--out", out)
    code, _, _ = evaluate(tmp_path / "no checkpoint", *arguments)
    assert code == EXIT_DATA and not (tmp_path / "new").exists()

    code, _, error = evaluate(folder, *arguments)
    assert code == EXIT_OK, error
    assert {json.loads(line)["task"] for line in out.read_text().splitlines()} == {"piqa"}


def test_files_that_are_missing_or_damaged_are_named(evaluate, folder, data):
    file = data / "sciq" / "validation.jsonl"
    file.write_text(file.read_text() + '{"question": 1')
    code, _, error = evaluate(folder, "--data", data)
    assert code == EXIT_DATA and f"validation.jsonl, line {DOCUMENTS + 1} is not JSON" in error

    file.unlink()
    code, _, error = evaluate(folder, "--data", data)
    assert code == EXIT_DATA and "task sciq" in error and "has no sciq/test.jsonl nor sciq/validation.jsonl" in error

    code, _, error = evaluate(folder)
    assert code == EXIT_USAGE and "give --data DIR" in error


def test_a_checkpoint_without_a_tokenizer_or_with_another_vocabulary_is_refused(evaluate, data, tmp_path):
    training_form(tmp_path / "training")
    code, _, error = evaluate(tmp_path / "training", "--data", data)
    assert code == EXIT_DATA and "has no tokenizer" in error

    small = toy_config()
    write_exchange(tmp_path / "small", small, toy_weights(small))
    code, _, error = evaluate(tmp_path / "small", "--data", data, "--tokenizer", "bytes")
    assert code == EXIT_USAGE and "the tokenizer has 259 tokens, the model 20 rows" in error

    code, _, error = evaluate(tmp_path / "nothing", "--data", data)
    assert code == EXIT_DATA and "no such checkpoint" in error


def test_another_tokenizer_than_in_training_is_a_warning(evaluate, data, tmp_path):
    training_form(tmp_path / "training", tokenizer={"sha256": "0" * 64})
    code, _, error = evaluate(tmp_path / "training", "--data", data, "--tokenizer", "bytes", "--tasks", "piqa")
    assert code == EXIT_OK and "warning: the tokenizer is another file" in error


def test_a_model_that_gives_no_numbers_has_no_scores(evaluate, data, tmp_path):
    weights = toy_weights(CONFIG)
    weights["transformer.ln_f.weight"][0] = float("nan")
    write_exchange(tmp_path / "broken", CONFIG, weights)
    code, out, error = evaluate(tmp_path / "broken", "--data", data, "--tokenizer", "bytes")
    assert (code, out) == (EXIT_NON_FINITE, "") and "the model's log-likelihoods are not finite numbers" in error


def test_the_harness_that_is_not_installed_is_an_extra_to_install(evaluate, folder, data, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name))
    code, _, error = evaluate(folder, "--data", data, "--harness")
    assert code == EXIT_USAGE and "not installed: lm_eval" in error and "pip install 'lit-grow[eval]'" in error


@pytest.mark.eval
@pytest.mark.filterwarnings("default")  # the harness's own
def test_the_harness_prints_the_same_table_and_nothing_else_on_stdout(evaluate, folder, data, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="the eval extra is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    arguments = (folder, "--data", data, "--limit", 2, "--json")
    _, ours, _ = evaluate(*arguments)

    code, theirs, _ = evaluate(*arguments, "--harness")

    assert code == EXIT_OK
    ours, theirs = json.loads(ours)["scores"], json.loads(theirs)["scores"]
    assert [score["value"] for score in theirs] == pytest.approx([score["value"] for score in ours], rel=1e-5)
    assert {score["evaluator"].split()[0] for score in theirs} == {"lm-eval"}
    same = ("task", "metric", "n", "limit", "chance", "checkpoint", "step", "first_id")
    assert [[score[key] for key in same] for score in theirs] == [[score[key] for key in same] for score in ours]
