"""Which samples a step of a run trained on, from what the run wrote down and the code that the trainer reads with."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lit_gpt.atomic import file_problem, read_manifest
from lit_gpt.checkpoint import STATE, manifest_sha256
from lit_gpt.errors import DataError
from lit_gpt.problems import raise_problems, read_json
from lit_gpt.settings_files import merge
from lit_gpt.token_text import TokenText
from lit_gpt.tokenizer import Tokenizer
from pretrain.command_line import config_of, normalise, settings_of, split_arguments
from pretrain.config import RunConfig, unknown_key_problems
from pretrain.corpus import Corpus, model_config_for, read_corpus
from pretrain.data import TrainData
from pretrain.loggers import METRICS_FILE
from pretrain.origin import check_stream, growth_behind, with_saved_name
from pretrain.preflight import INDEX_FOLDER, open_stream
from pretrain.run import CONFIG_FILE
from pretrain.stages import Stage, plan_stages


@dataclass(frozen=True)
class Sample:
    """One sample of the global order, and where its tokens lie."""

    position: int
    source: str
    sample: int
    """Inside its source."""
    file: str
    byte_offset: int
    """Of the first token, in the file."""
    first_token: int
    """Inside the file."""
    n_tokens: int
    """All of them: the targets and the token before the first."""
    text: str
    """The beginning of it; ids where no tokenizer is known."""


@dataclass(frozen=True)
class StepSamples:
    """The samples of one step, or as many of them as were asked for."""

    run: str
    step: int
    planned_steps: int
    stage: str
    trained: bool
    """Whether the step is done."""
    first_position: int
    stop_position: int
    """The step's samples are first_position .. stop_position - 1 of the global order."""
    order_start: int
    order_stop: int
    """The same stretch counted with the samples that data.skips leaves out."""
    order: str
    order_id: str
    verified: str
    """What says that the order is the one that was trained on."""
    samples: tuple[Sample, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Saved:
    """A checkpoint of the run, without its tensors."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step_count"]


@dataclass(frozen=True)
class _Opened:
    """A run's settings and data, as they were when it trained on the samples in question."""

    config: RunConfig
    corpus: Corpus
    stages: list[Stage]
    train: TrainData
    first_position: int
    """Of step 1."""
    verified: str


def samples_of(
    run: str | os.PathLike[str],
    *,
    step: int | None = None,
    position: int | None = None,
    count: int = 4,
    characters: int = 300,
    data_flags: Sequence[str] = (),
) -> StepSamples:
    """The samples of a step; or those from a position on, to the end of the step that it belongs to.

    Args:
        run: the run's folder.
        step: counts from 1; or else give `position`, a sample of the global order.
        count: how many samples, at most.
        characters: how much text of each, at most.
        data_flags: settings of the run to replace, e.g. ["--data.train", "moved/here"].

    Raises:
        ValueError: a step that the run will never make, or bad settings.
        DataError: the data is not what the run was trained on; the field that differs is named.
        FileNotFoundError: no such run, or its data is not there.
    """
    if min(count, characters) < 1:
        raise ValueError(f"--samples {count} and --characters {characters} must both be at least 1")
    folder = Path(run)
    saved = _checkpoints(folder)
    opened = _open(folder, saved, step, position, data_flags)
    batch = opened.config.batch.global_batch_size
    if step is None:
        assert position is not None, "one of the two is given"
        stop = opened.first_position + batch * sum(each.steps for each in opened.stages)
        if not opened.first_position <= position < stop:
            raise ValueError(
                f"--position {position:,} is no sample of this run, which reads samples {opened.first_position:,} to "
                f"{stop - 1:,}; give one of these"
            )
        step = (position - opened.first_position) // batch + 1
    stage = _stage_of(step, opened)
    first = opened.first_position + (step - 1) * batch
    start = first if position is None else position
    stretch = opened.train.stretch(first, first + batch) or (first, first + batch)
    text_of, notes = _texts(opened)
    return StepSamples(
        run=str(run),
        step=step,
        planned_steps=sum(each.steps for each in opened.stages),
        stage=stage.name,
        trained=step <= _steps_done(folder, saved),
        first_position=first,
        stop_position=first + batch,
        order_start=stretch[0],
        order_stop=stretch[1],
        order=opened.train.settings.order or "permuted",
        order_id=opened.train.packed.order_id,
        verified=opened.verified,
        samples=tuple(_samples(opened, start, min(count, first + batch - start), characters, text_of)),
        notes=notes,
    )


def _checkpoints(folder: Path) -> list[_Saved]:
    """What the run's checkpoints say, by step; damaged ones are left out."""
    if not folder.is_dir():
        raise FileNotFoundError(f"run {folder} does not exist; give the out_dir of a run")
    found = []
    for path in folder.glob("checkpoints/stage-*/step-*"):
        try:
            raise_problems([file_problem(path, read_manifest(path), STATE, deep=True)], "another one is used")
            found.append(_Saved(path, read_json(path / STATE)))
        except (DataError, OSError):
            continue  # as resuming does, which says so
    return sorted(found, key=lambda saved: saved.step)


def _logged(folder: Path) -> Iterator[tuple[int, int]]:
    """(step, samples used up after it) of every line that the run logged."""
    path = folder / METRICS_FILE
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                record = json.loads(line)
                yield record["step"], record["position"]
            except (ValueError, KeyError, TypeError):
                return  # a killed run may leave half a line, always the last


def _steps_done(folder: Path, saved: Sequence[_Saved]) -> int:
    return max([0, *(each.step for each in saved), *(step for step, _ in _logged(folder))])


def _open(
    folder: Path, saved: list[_Saved], step: int | None, position: int | None, data_flags: Sequence[str]
) -> _Opened:
    """The data as the trainer opens it, under the settings of the first checkpoint after the samples in question.

    Settings that may change in the course of a run (weights, the place of the data) are those in force at the time.

    Raises:
        DataError: it is not what that checkpoint was trained on.
    """
    newest = saved[-1] if saved else None
    covering = next((each for each in saved if _covers(each, step, position)), newest)
    settings = _settings_file(folder) if covering is None else covering.state["run_config"]
    own = None if covering is None else covering.state
    config = config_of(merge(merge(settings, {"out_dir": str(folder)}), _replaced(data_flags)))
    config = with_saved_name(config, own)
    data = dataclasses.replace(config.data, validation={})
    corpus = read_corpus(data, look_beside=config.model.vocab_size is None)
    model_config = model_config_for(corpus, config.model)
    cache = folder / INDEX_FOLDER
    if data_flags or not cache.is_dir():
        cache = None  # the run's index is of the run's data, wherever we look for it
    train, first = open_stream(config, model_config, corpus, own, cache)
    batch = config.batch.global_batch_size
    wanted = step if step is not None else ((position or 0) - first) // batch + 1
    nearest = min(_logged(folder), key=lambda moment: abs(moment[0] - wanted), default=None)
    if nearest is not None:
        first = nearest[1] - nearest[0] * batch
    stages = _as_they_went(plan_stages(config, model_config, growth_behind(config, own)), saved)
    return _Opened(config, corpus, stages, train, first, _verified(train, covering))


def _as_they_went(stages: Sequence[Stage], saved: Sequence[_Saved]) -> list[Stage]:
    """The stages with their true lengths: the last checkpoint of one that ended before its time says it."""
    ended = {
        each.state["stage"]: each.state["stage_step"]
        for each in saved
        if each.state.get("ended_stage") == each.state["stage"]
    }
    return [dataclasses.replace(stage, steps=ended.get(stage.index, stage.steps)) for stage in stages]


def _replaced(data_flags: Sequence[str]) -> dict[str, Any]:
    _, flags, _ = split_arguments(normalise(list(data_flags)))
    settings = settings_of(flags)
    problems = unknown_key_problems(settings)
    if problems:
        raise ValueError("\n".join(problems))
    return settings


def _covers(saved: _Saved, step: int | None, position: int | None) -> bool:
    return saved.step >= step if step is not None else saved.state["position"] > (position or 0)


def _settings_file(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_FILE} and no checkpoint: it is not the folder of a run")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({' '.join(str(error).split())}); restore it") from error
    if not isinstance(settings, dict):
        raise DataError(f"{path} holds no settings; restore it")
    return settings


def _verified(train: TrainData, saved: _Saved | None) -> str:
    """Compare the stream with what a checkpoint says it was trained on.

    Raises:
        DataError: naming the fields that differ.
    """
    if saved is None:
        return "not verified: the run has no checkpoint yet"
    try:
        check_stream(train, saved.state["data"])
    except ValueError as error:
        way_out = str(error).splitlines()[-1]
        if way_out.startswith("the data is the same"):
            raise DataError(str(error)) from error
        differences = "\n".join(line for line in str(error).splitlines() if line.startswith("data"))
        raise DataError(
            f"this is not the data that {saved.path} was trained on:\n{differences or error}\n"
            f"put the old files back, or name them: --data.train PATH"
        ) from error
    return f"verified against {saved.path} ({manifest_sha256(saved.path)[:12]})"


def _stage_of(step: int, opened: _Opened) -> Stage:
    if step < 1:
        raise ValueError(
            f"step {step} does not exist: steps count from 1, and step 1 begins at sample {opened.first_position:,}"
        )
    left = step
    for stage in opened.stages:
        left -= stage.steps
        if left <= 0:
            return stage
    raise ValueError(f"step {step:,} is beyond the run's plan of {step - left:,} steps")


def _texts(opened: _Opened) -> tuple[Mapping[str, TokenText], tuple[str, ...]]:
    """How the tokens of each source are shown, and why not as text, if so."""
    tokenizer: Tokenizer | None = None
    notes: tuple[str, ...] = ()
    try:
        tokenizer = opened.corpus.tokenizer
    except (ValueError, DataError, OSError) as error:
        notes = (f"token ids are shown: {error}",)
    if tokenizer is None and not notes:
        notes = ("token ids are shown: no tokenizer is known; name it with --data.tokenizer",)
    manifests = {name: opened.corpus.manifests.get(path, {}) for name, path in opened.config.data.train_paths().items()}
    return {name: TokenText(tokenizer, each.get("separator_id")) for name, each in manifests.items()}, notes


def _samples(
    opened: _Opened, start: int, count: int, characters: int, text_of: Mapping[str, TokenText]
) -> Iterator[Sample]:
    packed = opened.train.packed
    for position, tokens in zip(range(start, start + count), packed.samples(start, count), strict=True):
        place = packed.place(position)
        yield Sample(
            position=position,
            source=place.source,
            sample=place.sample,
            file=place.path,
            byte_offset=place.byte_offset,
            first_token=place.first_token,
            n_tokens=len(tokens),
            text=text_of[place.source].start(np.asarray(tokens), characters),
        )
