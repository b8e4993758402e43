"""lm-evaluation-harness on a model of ours: an adapter, and its tasks made from our YAML files. Needs the extra `eval`.

What is shared with our own evaluator is the reading of files and the model. Encoding, windows, choosing the best answer
and aggregating are the harness's.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from lit_gpt.model import GPT
from lit_gpt.tokenizer import Tokenizer, file_sha256
from pretrain.zero_shot.encoding import FirstToken, Row, rows_of
from pretrain.zero_shot.examples import Example, Examples, read_examples
from pretrain.zero_shot.metrics import ACCURACIES, Score, chance
from pretrain.zero_shot.scoring import LOG_PROB, MISSES, score, token_scores
from pretrain.zero_shot.task import Task, data_file

NAME = f"lm-eval {version('lm-eval')}"
OUTPUT_TYPES = {
    "choices": "multiple_choice",
    "contexts": "multiple_choice",
    "continuation": "loglikelihood",
    "text": "loglikelihood_rolling",
}
"""Kind of a task of ours -> what the harness calls it."""


class OwnModel(TemplateLM):
    """A model of ours with its own tokenizer; scores what the harness has encoded."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, first: FirstToken, batch_size: int, block_size: int | None = None
    ) -> None:
        super().__init__()
        self.model, self.own_tokenizer, self.first, self.batch_size = model.eval(), tokenizer, first, batch_size
        self.max_length = block_size or model.config.block_size

    @property
    def eot_token_id(self) -> int:
        return self.prefix_token_id if self.own_tokenizer.eos_id is None else self.own_tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        if self.first.prefix_id is None:
            raise ValueError("the tokenizer has neither bos nor eos to put before a text; give --first-id ID")
        return self.first.prefix_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids = self.own_tokenizer.encode(string).tolist()
        return ids if self.first.id is None or add_special_tokens is False else [self.first.id, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        rows: list[Row] = []
        for number, (_, context, continuation) in enumerate(requests):
            rows += rows_of(number, np.array(context + continuation), len(continuation), self.max_length)
        device = self.model.lm_head.weight.device
        found = score(rows, partial(token_scores, self.model), self.batch_size, device)
        assert found is not None, "nobody interrupts it"
        return [(float(values[LOG_PROB]), bool(values[MISSES] == 0)) for values in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        owners, windows = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            parts = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for part in parts:
                owners.append(number)
                windows.append((None, *utils.make_disjoint_window(part)))
        totals = np.zeros(len(requests))
        np.add.at(totals, owners, [log_prob for log_prob, _ in self._loglikelihood_tokens(windows)])
        return totals.tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("no task here generates text")


def harness_task(task: Task, examples: Examples) -> dict[str, Any]:
    """A task of ours, its documents rendered, as a configuration of the harness."""
    rows = [_row(task, example) for example in examples.examples]
    fields: dict[str, Any] = {
        "choices": {"doc_to_text": "context", "doc_to_target": "answer", "doc_to_choice": "choices"},
        # for the harness the choices are then the contexts, and the text to score is the target
        "contexts": {"doc_to_text": _answer, "doc_to_target": _continuation, "doc_to_choice": "choices"},
        "continuation": {"doc_to_text": _context, "doc_to_target": _continuation},
        "text": {"doc_to_text": "", "doc_to_target": _continuation, "process_results": _text_results},
    }[task.kind]
    if task.kind in ("choices", "contexts"):
        fields["target_delimiter"] = task.delimiter
    return {
        "task": task.name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": OUTPUT_TYPES[task.kind],
        "metric_list": [{"metric": metric} for metric in task.metrics],
        "num_fewshot": 0,
        **fields,
    }


def _row(task: Task, example: Example) -> dict[str, Any]:
    """What the harness is told of a document; the delimiter it adds itself, but for a continuation."""
    contexts, continuations = zip(*example.requests, strict=True)
    if task.kind == "choices":
        choices = [each[len(task.delimiter) :] for each in continuations]
        return {"context": contexts[0], "choices": choices, "answer": example.answer}
    if task.kind == "contexts":
        continuation = continuations[0][len(task.delimiter) :]
        return {"choices": list(contexts), "continuation": continuation, "answer": example.answer}
    counts = {"n_words": example.n_words, "n_bytes": example.n_bytes}
    return {"context": contexts[0], "continuation": continuations[0], **counts}


def _answer(document: dict[str, Any]) -> int:
    return document["answer"]


def _context(document: dict[str, Any]) -> str:
    return document["context"]


def _continuation(document: dict[str, Any]) -> str:
    return document["continuation"]


def _text_results(document: dict[str, Any], results: Sequence[float]) -> dict[str, tuple[float, int]]:
    (log_prob,) = results
    by_bytes = (log_prob, document["n_bytes"])
    return {
        "word_perplexity": (log_prob, document["n_words"]),
        "byte_perplexity": by_bytes,
        "bits_per_byte": by_bytes,
    }


@dataclass(frozen=True)
class Judged:
    """What the harness made of a task."""

    scores: list[Score]
    found: dict[str, Any]
    """As `lm_eval.simple_evaluate` returns it, with samples."""


def evaluate_tasks(
    model: GPT,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    data: Path | None,
    first: FirstToken,
    *,
    block_size: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    on_task: Callable[[Judged], None] = lambda judged: None,
) -> list[Judged]:
    """As `pretrain.zero_shot.evaluator.evaluate_tasks`, by the harness."""
    return run(OwnModel(model, tokenizer, first, batch_size, block_size), tasks, data, limit=limit, on_task=on_task)


def run(
    model: TemplateLM,
    tasks: Sequence[Task],
    data: Path | None,
    *,
    limit: int | None = None,
    on_task: Callable[[Judged], None] = lambda judged: None,
) -> list[Judged]:
    """Score tasks with the harness, one after the other.

    Args:
        model: `OwnModel`, or any other of the harness.
        tasks: which; data: the folder with their files.
        limit: documents of each; None: all.
        on_task: called with each result when it is there.

    Raises:
        ValueError, FileNotFoundError, DataError: as `data_file` and `read_examples`, before anything is scored.
    """
    paths = [data_file(task, data) for task in tasks]
    read = [read_examples(task, path, limit) for task, path in zip(tasks, paths, strict=True)]
    results = []
    for task, path, examples in zip(tasks, paths, read, strict=True):
        with contextlib.redirect_stdout(sys.stderr):  # where it prints as it likes
            found = lm_eval.simple_evaluate(
                model,
                tasks=[harness_task(task, examples)],
                task_manager=TaskManager(include_defaults=False),
                bootstrap_iters=0,
                log_samples=True,
            )
        judged = Judged(_scores(task, examples, found["results"][task.name], file_sha256(path)), found)
        on_task(judged)
        results.append(judged)
    return results


def _scores(task: Task, examples: Examples, results: dict[str, Any], data: str) -> list[Score]:
    """Values as the harness has them. It gives errors of accuracies, by this formula, only where it resamples too."""
    n, scores = len(examples.examples), []
    for metric in task.metrics:
        value = float(results[f"{metric},none"])
        accuracy = metric in ACCURACIES
        stderr = (value * (1 - value) / (n - 1)) ** 0.5 if accuracy and n > 1 else None
        guessed = chance(examples) if accuracy else None
        scores.append(Score(task.name, metric, value, stderr, guessed, n, examples.limit, data, task.version))
    return scores
