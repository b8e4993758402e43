"""The tasks that a run scores its model on: opened and encoded once, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lit_gpt.tokenizer import Tokenizer
from pretrain.world import World
from pretrain.zero_shot.encoding import FirstToken, default_first_id, first_token
from pretrain.zero_shot.evaluator import Prepared, check_vocabulary, evaluate_task, prepare
from pretrain.zero_shot.metrics import Score
from pretrain.zero_shot.scoring import token_scores
from pretrain.zero_shot.task import data_folder, find_tasks

if TYPE_CHECKING:
    from lit_gpt.config import Config
    from pretrain.config import ZeroShotConfig


@dataclass(frozen=True)
class Suite:
    """Tasks that wait for a model."""

    prepared: list[Prepared]
    first: FirstToken
    micro_batch_size: int

    def score(
        self, task: Prepared, module: nn.Module, device: torch.device, world: World, interrupted: Callable[[], bool]
    ) -> list[Score] | None:
        """Of one of the tasks, on all processes, with the same result on each; None when `interrupted` says so.

        module: the model as a step of training calls it.

        Raises:
            NonFiniteError: as `scoring.score`.
        """
        found = evaluate_task(task, partial(token_scores, module), self.micro_batch_size, device, world, interrupted)
        return None if found is None else found.scores


def open_suite(
    settings: ZeroShotConfig, tokenizer: Tokenizer | None, config: Config, separator_id: int | None
) -> tuple[Suite | None, list[str]]:
    """The tasks that the settings name, None if they name none; and lines for the log.

    Args:
        settings: of the run.
        tokenizer: of its data; None if nobody knows it.
        config: sizes of its model.
        separator_id: as its checkpoints say it.

    Raises:
        ValueError, FileNotFoundError, DataError: an unknown task, a tokenizer that is unknown or not the model's, a
            file that is missing or damaged.
    """
    if not settings.names:
        return None, []
    tasks = find_tasks(settings.names, None if settings.tasks_dir is None else Path(settings.tasks_dir))
    folder = data_folder(settings.data)
    if tokenizer is None:
        raise ValueError("zero_shot.tasks needs the tokenizer of the data; name it with data.tokenizer")
    first = first_token(tokenizer, default_first_id(tokenizer, separator_id))
    check_vocabulary(tokenizer, config.padded_vocab_size, first.id)
    prepared = [prepare(task, folder, tokenizer, first, config.block_size, settings.limit) for task in tasks]
    return Suite(prepared, first, settings.micro_batch_size), [_line(task) for task in prepared]


def _line(task: Prepared) -> str:
    found = task.examples
    limited = "" if found.limit is None else f", the first {found.limit:,} of its file"
    tokens = sum(len(row.tokens) - 1 for row in task.rows)
    return f"zero-shot {found.task.name}: {len(found.examples):,} documents{limited}, {tokens:,} tokens"
