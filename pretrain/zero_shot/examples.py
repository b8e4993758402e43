"""What is asked of a model: a document of a task as requests, texts given and texts scored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_gpt.errors import DataError
from pretrain.zero_shot.documents import Document, read_documents
from pretrain.zero_shot.task import Task
from pretrain.zero_shot.templates import FieldError, Template


@dataclass(frozen=True)
class Example:
    """One document's requests, and what scoring them needs."""

    requests: tuple[tuple[str, str], ...]
    """(context, continuation); of a `text` one, whose context is empty."""
    answer: int | None = None
    """Number of the request that should be the likeliest, where there are several."""
    n_chars: tuple[int, ...] = ()
    """Of each choice, without the delimiter."""
    n_words: int = 0
    n_bytes: int = 0
    """Of a `text`: what is counted of it."""


@dataclass(frozen=True)
class Examples:
    """Those of one file, up to a limit."""

    task: Task
    examples: tuple[Example, ...]
    limit: int | None
    """How many were wanted; None if that left nothing out."""


def read_examples(task: Task, path: Path, limit: int | None = None) -> Examples:
    """The first `limit` documents of a task's file, or all of them.

    Raises:
        DataError: the file is damaged, or a document does not have what the task asks for.
    """
    documents = read_documents(path, task.format, task.lines)
    examples = tuple(_example(task, document, path) for document in documents[:limit])
    return Examples(task, examples, limit if limit is not None and limit < len(documents) else None)


def _example(task: Task, document: Document, path: Path) -> Example:
    try:
        return RENDERERS[task.kind](task, document.values)
    except FieldError as error:
        raise DataError(f"{path}, line {document.line}: {error}, which task {task.name} needs; see its YAML") from None


def _choices(task: Task, values: Mapping[str, Any]) -> Example:
    prompt, choices = _text(task, "prompt", values), _choices_of(task.templates["choices"], values)
    requests = tuple((prompt, task.delimiter + choice) for choice in choices)
    return Example(requests, _answer(task, values, len(choices)), tuple(len(choice) for choice in choices))


def _contexts(task: Task, values: Mapping[str, Any]) -> Example:
    contexts = _choices_of(task.templates["contexts"], values)
    continuation = task.delimiter + _scored(task, "continuation", values)
    return Example(tuple((context, continuation) for context in contexts), _answer(task, values, len(contexts)))


def _continuation(task: Task, values: Mapping[str, Any]) -> Example:
    return Example(((_text(task, "prompt", values), task.delimiter + _scored(task, "continuation", values)),))


def _whole_text(task: Task, values: Mapping[str, Any]) -> Example:
    text = _scored(task, "text", values)
    counted = _scored(task, "counted", values) if "counted" in task.templates else text
    return Example((("", text),), n_words=len(re.split(r"\s+", counted)), n_bytes=len(counted.encode(errors="replace")))


RENDERERS = {"choices": _choices, "contexts": _contexts, "continuation": _continuation, "text": _whole_text}
"""Kind -> how its documents become examples."""


def _text(task: Task, field: str, values: Mapping[str, Any]) -> str:
    template = task.templates[field]
    assert isinstance(template, Template)
    return template.render(values)


def _scored(task: Task, field: str, values: Mapping[str, Any]) -> str:
    text = _text(task, field, values)
    if not text:
        raise FieldError(f"its {field} is empty")
    return text


def _choices_of(template: Template | Sequence[Template], values: Mapping[str, Any]) -> list[str]:
    """At least two texts that are not empty: of as many templates, or a field that is a list."""
    found = template.value(values) if isinstance(template, Template) else [each.render(values) for each in template]
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(each, str) and each for each in found):
        raise FieldError(f"its choices are {found!r}, not a list of two texts or more")
    return found


def _answer(task: Task, values: Mapping[str, Any], n_choices: int) -> int:
    """The number of the right choice."""
    found = task.answer.value(values) if isinstance(task.answer, Template) else task.answer
    labels = task.labels.value(values) if isinstance(task.labels, Template) else task.labels
    if labels:
        names = [str(each) for each in labels]
        if str(found) not in names:
            raise FieldError(f"its answer is {found!r}, not one of {', '.join(names)}")
        found = names.index(str(found))
    number = int(found) if type(found) is int or (isinstance(found, str) and found.isdecimal()) else None
    if number is None or not 0 <= number < n_choices:
        raise FieldError(f"its answer is {found!r}, not a number from 0 to {n_choices - 1}")
    return number
