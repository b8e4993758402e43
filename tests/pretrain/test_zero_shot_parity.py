"""Our evaluator against lm-evaluation-harness: the same requests, the same log-likelihoods, the same scores.

Three readings of a task: ours; the harness on our model, through the adapter behind `evaluate.py --harness`; and the
harness alone, its own YAML files for the prompts, its own model class and transformers for the tokens and the numbers.
"""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_gpt.checkpoint import write_exchange
from lit_gpt.config import Config
from lit_gpt.generate import load_for_inference
from lit_gpt.llama2c import to_exchange
from lit_gpt.model import GPT, InitialWeights, init_weights
from lit_gpt.tokenizer import Tokenizer
from pretrain.zero_shot.documents import read_documents
from pretrain.zero_shot.encoding import first_token
from pretrain.zero_shot.evaluator import Scored, evaluate_tasks
from pretrain.zero_shot.examples import read_examples
from pretrain.zero_shot.task import data_file, find_tasks
from tests.zero_shot import NAMES

pytestmark = [pytest.mark.eval, pytest.mark.filterwarnings("default")]  # warnings are the harness's own

LIMIT = 50
LIMIT_PROMPTS = 300  # the harness takes a minute for all of LAMBADA
LIMIT_ARTICLES = 3  # of the harness's own model with 32,000 tokens: an article has thousands
GAP = 1e-5  # nats, of a request
GAP_OF_TRANSFORMERS = 1e-5  # of a request's log-likelihood: another order of sums in fp32, over hundreds of tokens
OWN_FILES = {
    **{"lambada_openai": "lambada/lambada_openai.yaml", "arc_easy": "arc/arc_easy.yaml"},
    **{"arc_challenge": "arc/arc_challenge.yaml", "piqa": "piqa/piqa.yaml", "sciq": "sciq/sciq.yaml"},
    **{"winogrande": "winogrande/default.yaml", "hellaswag": "hellaswag/hellaswag.yaml"},
    **{"logiqa": "logiqa/logiqa.yaml", "wikitext": "wikitext/wikitext.yaml"},
}
"""Where the harness keeps what it says of each task."""


@pytest.fixture
def harness(root, monkeypatch, tmp_path) -> Any:
    """The script's module with the adapter; the harness finds no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    pytest.importorskip("lm_eval", reason="the eval extra is not installed")
    monkeypatch.syspath_prepend(str(root / "scripts"))
    return importlib.import_module("harness")


@pytest.fixture
def evals(data_dir) -> Path:
    return data_dir("evals")


def small_model(vocab_size: int) -> GPT:
    """One layer of random weights, in float64."""
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_query_groups": 1, "intermediate_size": 32, "block_size": 128}
    model = GPT(Config(vocab_size=vocab_size, padded_vocab_size=vocab_size, **sizes)).double()
    init_weights(model, 0)
    return model.requires_grad_(False)


def model_of_llamas_tokens(folder: Path, tokenizer_dir: Path) -> Path:
    """A tiny random model with Llama's tokenizer in both its forms: ours reads the one, transformers the other."""
    config = Config(
        **{"block_size": 256, "vocab_size": 32000, "padded_vocab_size": 32000, "n_layer": 2, "n_head": 4, "n_embd": 32},
        **{"n_query_groups": 2, "intermediate_size": 64},
    )
    described = folder.with_name("tokenizer")
    shutil.copytree(tokenizer_dir, described, copy_function=shutil.copyfile)
    described.chmod(0o755)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (described / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names})
    )
    return write_exchange(folder, config, InitialWeights(config, 0), tokenizer_dir=described)


def log_likelihoods(found: dict[str, Any]) -> np.ndarray:
    """(n_requests,) of what the harness returned, in the order of the documents."""
    ((_, samples),) = found["samples"].items()
    answers = [answer[0] for sample in sorted(samples, key=lambda each: each["doc_id"]) for answer in sample["resps"]]
    return np.array([answer[0] if isinstance(answer, list | tuple) else answer for answer in answers], dtype=float)


def values(scored: Any) -> dict[str, float]:
    return {score.metric: score.value for score in scored.scores}


def own_scores(folder: Path, names: list[str], evals: Path, limit: int, first_id: int | None) -> list[Scored]:
    tokenizer = Tokenizer.load(folder)
    model = load_for_inference(folder, torch.float32)
    return evaluate_tasks(model, tokenizer, find_tasks(names), evals, first_token(tokenizer, first_id), limit=limit)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_those_of_the_harness(name, harness, evals):
    task_of_theirs = _their_task(name, evals)
    (task,) = find_tasks([name])
    examples = read_examples(task, data_file(task, evals), LIMIT_PROMPTS).examples

    task_of_theirs.build_all_requests(limit=LIMIT_PROMPTS)

    theirs = [instance.args for instance in task_of_theirs.instances]
    ours = [request if name != "wikitext" else request[1:] for example in examples for request in example.requests]
    assert ours == theirs
    if task.kind in ("choices", "contexts"):
        find_answer = task_of_theirs.doc_to_text if task.kind == "contexts" else task_of_theirs.doc_to_target
        answers = [int(find_answer(document)) for document in list(task_of_theirs.eval_docs)[:LIMIT_PROMPTS]]
        assert [example.answer for example in examples] == answers


def _their_task(name: str, evals: Path) -> Any:
    """A task by the harness's own file, on our data in the shape of the data set that the file names."""
    import datasets
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    (task,) = find_tasks([name])
    documents = read_documents(data_file(task, evals), task.format, task.lines)
    rows = [_in_their_shape(name, document.values) for document in documents]
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / OWN_FILES[name])
    for field in ("dataset_path", "dataset_name", "process_docs", "tag"):
        config.pop(field, None)
    split = config.get("test_split") or config["validation_split"]
    config |= {"custom_dataset": lambda **_: {split: datasets.Dataset.from_list(rows)}, "training_split": None}
    config |= {"validation_split": None, "test_split": split}
    return ConfigurableTask(config=config)


def _in_their_shape(name: str, values: dict[str, Any]) -> dict[str, Any]:
    if name == "lambada_openai":
        return {"text": f"{values['context']} {values['continuation']}"}
    if name.startswith("arc"):
        labels = [str(number) for number in range(len(values["choices"]))]
        question = values["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        choices = {"text": values["choices"], "label": labels}
        return {"question": question, "choices": choices, "answerKey": labels[values["gold"]]}
    if name == "logiqa":
        texts = {key: text.replace(".", ". ").strip() for key, text in values.items() if len(key) > 1}
        options = [values[letter][2:].replace(".", ". ").strip() for letter in "abcd"]
        return {**texts, "options": options}
    return {**values, "label": values["gold"]} if name == "hellaswag" else values


@pytest.mark.parametrize("name", NAMES)
def test_the_harness_on_our_model_gives_our_log_likelihoods_and_scores(name, harness, data_dir, evals, tmp_path):
    """In float64, where batches of another size do not round otherwise; long prompts are cut."""
    folder = to_exchange(data_dir("checkpoints/stories260K"), tmp_path / "stories")
    tokenizer = Tokenizer.load(folder)
    first = first_token(tokenizer, tokenizer.bos_id)
    model = load_for_inference(folder, torch.float64)
    if name == "wikitext":  # whole articles take minutes with the trained model
        model = small_model(tokenizer.vocab_size)
    tasks = find_tasks([name])

    (own,) = evaluate_tasks(model, tokenizer, tasks, evals, first, limit=LIMIT)
    (their,) = harness.evaluate_tasks(model, tokenizer, tasks, evals, first, limit=LIMIT, batch_size=7)

    assert np.abs(own.requests[:, 0] - log_likelihoods(their.found)).max() <= GAP
    assert values(own) == pytest.approx(values(their), rel=1e-9)
    assert [score.n for score in own.scores] == [score.n for score in their.scores] == [LIMIT] * len(own.scores)
    accuracies = [(one.stderr, two.stderr) for one, two in zip(own.scores, their.scores, strict=True) if one.chance]
    assert all(one == pytest.approx(two) for one, two in accuracies)


@pytest.mark.parametrize("bos", [True, False])
def test_the_harness_with_transformers_gives_our_log_likelihoods_and_scores(bos, harness, data_dir, evals, tmp_path):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    folder = model_of_llamas_tokens(tmp_path / "model", data_dir("tokenizers/llama2"))
    names = NAMES if bos else ["lambada_openai", "winogrande", "wikitext"]

    for name in names:
        limit = LIMIT_ARTICLES if name == "wikitext" else LIMIT
        (own,) = own_scores(folder, [name], evals, limit, 1 if bos else None)
        settings = {"device": "cpu", "dtype": "float32", "batch_size": 8, "add_bos_token": bos}
        model = huggingface.HFLM(pretrained=str(folder), **settings)
        (their,) = harness.run(model, find_tasks([name]), evals, limit=limit)

        found = log_likelihoods(their.found)
        np.testing.assert_allclose(own.requests[:, 0], found, rtol=GAP_OF_TRANSFORMERS, err_msg=name)
        assert values(own) == pytest.approx(values(their), rel=1e-4), name
