"""Tasks on a model: read, encode, score, count. For a command and for a loop of training alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lit_gpt.model import GPT
from lit_gpt.tokenizer import Tokenizer, file_sha256
from pretrain.world import ALONE, World
from pretrain.zero_shot.encoding import FirstToken, Row, encode
from pretrain.zero_shot.examples import Examples, read_examples
from pretrain.zero_shot.metrics import Score, scores_of
from pretrain.zero_shot.scoring import TokenScores, score, token_scores
from pretrain.zero_shot.task import Task, data_file


@dataclass(frozen=True)
class Prepared:
    """A task's documents as tokens: made once, scored as often as a model changes."""

    examples: Examples
    rows: list[Row]
    data: str
    """sha256 of the file."""


@dataclass(frozen=True)
class Scored:
    """What a model made of a task."""

    scores: list[Score]
    requests: np.ndarray
    """(n_requests, 2) float64, the columns of `scoring`."""


def check_vocabulary(tokenizer: Tokenizer, padded_vocab_size: int, first_id: int | None = None) -> None:
    """Refuse a tokenizer that makes tokens which the model does not know.

    Raises:
        ValueError: it does, or the first token is one.
    """
    if tokenizer.vocab_size > padded_vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {padded_vocab_size} rows; "
            f"give the tokenizer that the model was trained with"
        )
    if first_id is not None and not 0 <= first_id < padded_vocab_size:
        raise ValueError(f"the first token, {first_id}, must be below the {padded_vocab_size} rows of the model")


def prepare(
    task: Task, data: Path | None, tokenizer: Tokenizer, first: FirstToken, block_size: int, limit: int | None = None
) -> Prepared:
    """Read a task's file and encode its first `limit` documents, or all.

    Raises:
        ValueError, FileNotFoundError, DataError: as `data_file`, `read_examples` and `encode`.
    """
    path = data_file(task, data)
    examples = read_examples(task, path, limit)
    return Prepared(examples, encode(examples, tokenizer, first, block_size), file_sha256(path))


def evaluate_task(
    prepared: Prepared,
    scores: TokenScores,
    batch_size: int,
    device: torch.device | str,
    world: World = ALONE,
    interrupted: Callable[[], bool] = lambda: False,
) -> Scored | None:
    """Score a task; every process gets the same result. Arguments, errors and None as in `scoring.score`."""
    found = score(prepared.rows, scores, batch_size, device, world, interrupted)
    return None if found is None else Scored(scores_of(prepared.examples, found, prepared.data), found)


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
    on_task: Callable[[Scored], None] = lambda scored: None,
) -> list[Scored]:
    """One task after the other on one model in this process.

    Args:
        model: on any device, in any dtype.
        tokenizer: its tokenizer.
        tasks: which; data: the folder with their files.
        first: what texts begin with.
        block_size: tokens that are read at a time; default: the model's.
        limit: documents of each task; None: all.
        batch_size: rows at a time.
        on_task: called with each result when it is there.

    Raises:
        ValueError, FileNotFoundError, DataError: as `check_vocabulary` and `prepare`, before anything is scored.
        NonFiniteError: as `score`.
    """
    check_vocabulary(tokenizer, model.config.padded_vocab_size, first.id)
    size = block_size or model.config.block_size
    prepared = [prepare(task, data, tokenizer, first, size, limit) for task in tasks]
    device, results = model.lm_head.weight.device, []
    model.eval()
    for each in prepared:
        scored = evaluate_task(each, partial(token_scores, model), batch_size, device)
        assert scored is not None, "nobody interrupts it"
        on_task(scored)
        results.append(scored)
    return results
