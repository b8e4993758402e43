"""A grown model in the hands of others: transformers loads it unaided, and the evaluation harness scores it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grow.apply import grow_checkpoint
from grow.operators import plan_growth
from lit_gpt.checkpoint import read_config
from lit_gpt.llama2c import to_exchange

pytestmark = pytest.mark.eval

DOCUMENTS = 20
# Two tasks over local files; the wording is the harness's own.
TASKS = {
    "sciq_local": {
        "file": "evals/sciq/validation.jsonl",
        "doc_to_text": "{{support.lstrip()}}\nQuestion: {{question}}\nAnswer:",
        "doc_to_target": 3,
        "doc_to_choice": "{{[distractor1, distractor2, distractor3, correct_answer]}}",
    },
    "piqa_local": {
        "file": "evals/piqa/valid_docs.jsonl",
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": "{{[sol1, sol2]}}",
    },
}


@pytest.fixture
def tasks(tmp_path, data_dir) -> Path:
    """A folder of task definitions, as the harness reads them."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, task in TASKS.items():
        file = data_dir(task["file"])
        values = {key: value for key, value in task.items() if key != "file"}
        values |= {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"validation": str(file)}},
            "output_type": "multiple_choice",
            "validation_split": "validation",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (folder / f"{name}.yaml").write_text(json.dumps(values))  # JSON is YAML
    return folder


@pytest.mark.filterwarnings("default")  # the harness's own
def test_a_grown_model_loads_unaided_and_runs_two_tasks_of_the_harness(tmp_path, data_dir, tasks, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval", reason="the eval extra is not installed")
    huggingface, task_room = pytest.importorskip("lm_eval.models.huggingface"), pytest.importorskip("lm_eval.tasks")
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    source = to_exchange(data_dir("checkpoints/stories260K"), tmp_path / "source")
    grow_checkpoint(source, tmp_path / "grown", plan_growth("zero-depth", read_config(source), n_layer=10))

    def scores(folder: Path) -> dict[str, float]:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        harness = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=4)
        manager = task_room.TaskManager(include_path=str(tasks), include_defaults=False)
        found = lm_eval.simple_evaluate(
            harness, tasks=[*TASKS], task_manager=manager, limit=DOCUMENTS, bootstrap_iters=0
        )
        return {name: found["results"][name]["acc,none"] for name in TASKS}

    grown = scores(tmp_path / "grown")

    assert all(0 < score < 1 for score in grown.values())
    assert grown == scores(source)  # zero-depth keeps the function, to the bit
