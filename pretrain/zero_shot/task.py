"""A task: which file, what is asked of the model for each document, and what is measured. Read from a YAML file.

Four kinds, by what is scored: `choices` the likeliest of several continuations of one prompt, `contexts` one
continuation under several contexts, `continuation` whether a text is what the model would write, `text` a whole text.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from grow.scores import AVERAGED
from lit_gpt.config import unknown_key
from lit_gpt.settings_files import read_settings_file
from pretrain.zero_shot.documents import FORMATS
from pretrain.zero_shot.templates import Template, did_you_mean

NAME = re.compile(r"[A-Za-z0-9_.-]+")
ALL, PAPER = "all", "paper"
"""Names that stand for several tasks: all there are; the seven of the paper's average."""
DATA_VARIABLE, DATA_FOLDER = "LIT_GROW_DATA", "evals"


@dataclass(frozen=True)
class Kind:
    """What the file of a task of this kind says, beside what all say."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    metrics: tuple[str, ...]


KINDS = {
    "choices": Kind(("prompt", "choices", "answer"), ("labels", "delimiter"), ("acc", "acc_norm")),
    "contexts": Kind(("contexts", "continuation", "answer"), ("labels", "delimiter"), ("acc",)),
    "continuation": Kind(("prompt", "continuation"), ("delimiter",), ("acc", "perplexity")),
    "text": Kind(("text",), ("counted",), ("word_perplexity", "byte_perplexity", "bits_per_byte")),
}
COMMON_REQUIRED = ("kind", "files", "metrics")
COMMON_OPTIONAL = ("about", "format", "lines")
ANSWERS = ("answer", "labels")  # what may be a number or a list of them, and so no template


@dataclass(frozen=True)
class Task:
    """A task as its file describes it."""

    name: str
    """The file's name without its ending."""
    kind: str
    """One of KINDS."""
    files: tuple[str, ...]
    """Names under the folder of evaluation data; the first that exists is read."""
    metrics: tuple[str, ...]
    """The first is the one that counts."""
    templates: Mapping[str, Template | tuple[Template, ...]]
    """prompt, continuation, text and counted are one template each; contexts several; choices either."""
    folder: Path
    """Of the YAML file: where its data may lie, too."""
    answer: Template | int = 0
    """The number of the right choice, from 0, or its label."""
    labels: Template | tuple[str, ...] = ()
    """What answers are called, in the order of the choices."""
    delimiter: str = " "
    """Between what is given and what is scored."""
    format: str = "jsonl"
    """One of FORMATS."""
    lines: tuple[str, ...] = ()
    """Names of the lines of a block."""
    version: str = ""
    """Digest of what the file says, but `about`: scores of another version are another task's."""


def read_task(path: Path) -> Task:
    """The task in a YAML file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no task; all that is wrong with it.
    """
    values = read_settings_file(path)
    problems = _problems(values)
    templates: dict[str, Any] = {}
    for field in ("prompt", "choices", "contexts", "continuation", "text", "counted", *ANSWERS):
        try:
            templates |= {field: _parsed(field, values[field])} if field in values else {}
        except ValueError as error:
            problems.append(f"{field}: {error}")
    if not NAME.fullmatch(path.stem):
        problems.append(f"the file's name is the task's, and {path.stem!r} has more than letters, digits and _ - .")
    if problems:
        raise ValueError("\n".join(f"{path}: {problem}" for problem in problems))
    rest = {field: templates.pop(field) for field in ANSWERS if field in templates}
    rest |= {field: values[field] for field in ("delimiter", "format") if field in values}
    listed = {field: tuple(values.get(field, ())) for field in ("files", "metrics", "lines")}
    return Task(
        name=path.stem,
        kind=values["kind"],
        templates=templates,
        folder=path.parent,
        version=_version(values),
        **listed,
        **rest,
    )


def _version(values: Mapping[str, Any]) -> str:
    said = {key: value for key, value in values.items() if key != "about"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def _problems(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the fields of a task, templates left aside."""
    kind = KINDS.get(values["kind"]) if isinstance(values.get("kind"), str) else None
    if kind is None:
        return [f"kind is {values.get('kind')!r}; it must be one of {', '.join(KINDS)}"]
    known = [*COMMON_REQUIRED, *COMMON_OPTIONAL, *kind.required, *kind.optional]
    found = [unknown_key(str(key), known) for key in values if key not in known]
    found += [f"{key} is missing" for key in (*COMMON_REQUIRED, *kind.required) if key not in values]
    for field in ("files", "metrics", "lines"):
        if field in values and not _is_list_of_texts(values[field]):
            found.append(f"{field} is {values[field]!r}; it must be a list of names")
    if found:
        return found
    found += [
        f"metric {metric!r} is not one of a task of kind {values['kind']}: {', '.join(kind.metrics)}"
        for metric in values["metrics"]
        if metric not in kind.metrics
    ]
    file_format = values.get("format", "jsonl")
    if not isinstance(file_format, str) or file_format not in FORMATS:
        found.append(f"format is {file_format!r}; it must be one of {', '.join(FORMATS)}")
    if (file_format == "blocks") != ("lines" in values):
        found.append("format blocks needs lines, the names of the lines of a block, and no other format has them")
    if not isinstance(values.get("delimiter", ""), str):
        found.append(f"delimiter is {values['delimiter']!r}; it must be text")
    return found


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) and each for each in value)


def _parsed(field: str, value: Any) -> Template | tuple[Any, ...] | int:
    """A template, several, or what an answer is."""
    if field == "answer" and type(value) is int and value >= 0:
        return value
    if field == "labels" and isinstance(value, list):
        return tuple(str(each) for each in value)
    if field in ("choices", "contexts") and _is_list_of_texts(value):
        return tuple(Template(each) for each in value)
    if field == "contexts":
        raise ValueError(f"{value!r} must be a list of templates")
    if not isinstance(value, str):
        raise ValueError(f"{value!r} must be a template, e.g. '{{question}}'; quote it")
    return Template(value)


def built_in_tasks() -> dict[str, Task]:
    """Name -> task, of those that come with the package."""
    return _tasks_in(_built_in_folder())


def _built_in_folder() -> Path:
    return Path(str(files("pretrain.zero_shot").joinpath("tasks")))


def find_tasks(wanted: Sequence[str] = (ALL,), more: Path | None = None) -> list[Task]:
    """Tasks by their names, in the order they are asked for.

    Args:
        wanted: names of tasks, ALL, or PAPER.
        more: a folder with YAML files of the user's.

    Raises:
        FileNotFoundError: there is no such folder, or no task in it.
        ValueError: an unknown name, a name that is there twice, or a file that is no task.
    """
    known = built_in_tasks()
    if more is not None:
        if not more.is_dir():
            raise FileNotFoundError(f"{more} is not a folder; give one that holds the YAML files of tasks")
        own = _tasks_in(more)
        if not own:
            raise FileNotFoundError(f"{more} holds no .yaml file of a task; see docs/evaluation.md")
        twice = sorted({*known, ALL, PAPER} & own.keys())
        if twice:
            raise ValueError(f"{more / twice[0]}.yaml has a name that is taken already; rename it")
        known |= own
    groups = {ALL: list(known), PAPER: list(AVERAGED)}
    for name in wanted:
        if name not in known and name not in groups:
            raise ValueError(f"unknown task {name!r}; {did_you_mean(name, {**known, **groups})}")
    return [known[name] for name in dict.fromkeys(name for each in wanted for name in groups.get(each, [each]))]


def _tasks_in(folder: Path) -> dict[str, Task]:
    return {path.stem: read_task(path) for path in sorted(folder.iterdir()) if path.suffix in (".yaml", ".yml")}


def names_in(text: str) -> list[str]:
    """`piqa,sciq` -> its names."""
    return [name.strip() for name in text.split(",") if name.strip()]


def data_folder(given: str | Path | None) -> Path | None:
    """The folder of evaluation files: what is given, or `evals` in $LIT_GROW_DATA; None where neither is.

    Raises:
        FileNotFoundError: it is no folder.
    """
    base = os.environ.get(DATA_VARIABLE)
    folder = Path(given) if given else Path(base) / DATA_FOLDER if base else None
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give that of the evaluation files, see docs/evaluation.md")
    return folder


def data_file(task: Task, data: Path | None) -> Path:
    """The file that a task reads, in the folder of evaluation data or beside its YAML file.

    Raises:
        ValueError: no folder was given.
        FileNotFoundError: none of its files is there.
    """
    for folder in (data, task.folder):
        for name in task.files if folder is not None else ():
            if (folder / name).is_file():
                return folder / name
    if data is None:
        raise ValueError(
            f"task {task.name} needs {task.files[0]}; give --data DIR (in a run --zero_shot.data DIR), the folder of "
            f"evaluation files"
        )
    beside = "" if task.folder == _built_in_folder() else f", nor has {task.folder}"
    raise FileNotFoundError(
        f"task {task.name}: {data} has no {' nor '.join(task.files)}{beside}; see docs/evaluation.md"
    )
