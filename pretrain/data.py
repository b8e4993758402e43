"""From the data settings to a training stream: token files of any format, their order, and what is known of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.config import Config
from lit_gpt.data_order import DataOrder
from lit_gpt.legacy_order import LegacyOrder
from lit_gpt.packed_data import PackedData
from lit_gpt.prefetch import batches
from lit_gpt.token_files import Separator, TokenFiles, find_token_files
from lit_gpt.token_listing import NoTokenFilesError
from lit_gpt.token_source import TokenSource
from pretrain.config import BatchConfig
from pretrain.corpus import Corpus
from pretrain.data_config import DataConfig
from pretrain.held_out import ValidationSet
from pretrain.world import World

SAMPLED_TOKENS = 2**20  # that many tell the bytes per token of a source to better than one percent


@dataclass(frozen=True)
class TrainData:
    """The training stream of a run."""

    packed: PackedData
    settings: DataConfig
    """With what was taken over from a checkpoint."""
    bytes_per_token_of: Mapping[str, float] | None
    """Text bytes per token of each source; None if that is not known of every one."""
    notes: tuple[str, ...]
    """What was found, for the log."""
    separator_id: int | None = None
    """Ends a document, beyond which no token sees; None: all tokens of a sample see one another."""

    def batches(
        self,
        start: int,
        steps: int,
        batch: BatchConfig,
        world: World,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> AbstractContextManager[Iterator[np.ndarray]]:
        """This rank's (micro_batch_size, block_size + 1) int64 batches of `steps` steps from a position on.

        They raise WaitInterrupted when rows do not come and `interrupted` says so.
        """
        return batches(
            self.packed,
            start=start,
            steps=steps,
            global_batch_size=batch.global_batch_size,
            micro_batch_size=batch.micro_batch_size,
            rank=world.rank,
            world_size=world.size,
            interrupted=interrupted,
        )

    def stretch(self, start: int, stop: int) -> tuple[int, int] | None:
        """What to write into data.skips so that positions start .. stop - 1 are not trained on; None: nothing helps.

        Skips count samples that are skipped already, positions do not.
        """
        order = self.packed.order
        return None if isinstance(order, LegacyOrder) else (order.raw_stop(start + 1) - 1, order.raw_stop(stop))

    def bytes_per_token(self, position: int) -> float | None:
        """Text bytes per training token under the weights in force before `position`: estimates bits per byte."""
        if self.bytes_per_token_of is None:
            return None
        weights = self._weights(position)
        return sum(weights[name] * each for name, each in self.bytes_per_token_of.items()) / sum(weights.values())

    def _weights(self, position: int) -> Mapping[str, float]:
        """Share of each source, up to a common factor."""
        names = self.packed.order.names
        given = self.settings.weights
        if self.settings.segments:
            last = self.packed.order.raw_stop(position) - 1
            given = [each for each in self.settings.segments if each.start <= max(last, 0)][-1].weights
        if given is None:
            return {name: source.n_tokens for name, source in zip(names, self.packed.sources, strict=True)}
        return {name: given.get(name, 0.0) for name in names}


def open_train_data(
    data: DataConfig,
    config: Config,
    corpus: Corpus,
    seed: int,
    cache: Path | None = None,
) -> TrainData:
    """Index the training files.

    Args:
        data: the settings.
        config: sizes of the model.
        corpus: what is known of it, see `read_corpus`.
        seed: of the order.
        cache: folder where finished indices are kept; None keeps none.

    Raises:
        ValueError: settings that do not fit the files.
        DataError: a damaged file, or fewer tokens than one sample.
    """
    files = {name: _find(name, path, "train", data, corpus, cache) for name, path in data.train_paths().items()}
    sources = {name: _open(each, data, config) for name, each in files.items()}
    order = build_order(data, sources, seed)
    notes: list[str] = []
    separators: dict[str, Separator] = {}
    for name, path in data.train_paths().items():
        notes += _source_notes(name, files[name], sources[name])
        if path not in corpus.manifests:  # these say it themselves
            separators[path] = corpus.look_for_separator(files[name], config.vocab_size)
            notes.append(_separator_note(name, separators[path], corpus))
            notes += [f"  {each}" for each in corpus.assumption(path)]
    separator_id = corpus.separator_id(data, separators, config.vocab_size)
    if separator_id is not None:
        notes.append(f"documents do not see one another; token {separator_id} ends each")
    if isinstance(order, LegacyOrder):
        notes += _unread_notes(order)
    rates = {
        name: _bytes_per_token(sources[name], corpus.manifests.get(path), corpus)
        for name, path in data.train_paths().items()
    }
    known = {name: rate for name, rate in rates.items() if rate is not None}
    return TrainData(
        packed=PackedData(sources, order),
        settings=data,
        bytes_per_token_of=known if len(known) == len(rates) else None,
        notes=tuple(notes),
        separator_id=separator_id,
    )


def _find(name: str, path: str, split: str, data: DataConfig, corpus: Corpus, cache: Path | None) -> TokenFiles:
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
    return find_token_files(
        path,
        split,
        dtype=None if path in corpus.manifests else data.dtype,
        trim=split != "train" or not data.is_legacy,
        cache=None if cache is None else cache / f"{split}_{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.npz",
    )


def _open(files: TokenFiles, data: DataConfig, config: Config) -> TokenSource:
    if data.is_legacy:
        return TokenSource(files.by_name(), config.block_size, config.vocab_size, stride=config.block_size + 1)
    return TokenSource(files, config.block_size, config.vocab_size, windowed=data.window is not None)


def build_order(data: DataConfig, sources: Mapping[str, TokenSource], seed: int) -> DataOrder | LegacyOrder:
    """The order that the settings ask for.

    Raises:
        ValueError: settings that do not fit the sources.
    """
    if data.is_legacy:
        return _legacy_order(data, sources, seed)
    return DataOrder(
        {name: source.n_samples for name, source in sources.items()},
        seed,
        data.weights,
        segments=None if data.segments is None else [(each.start, each.weights) for each in data.segments],
        skips=[(start, stop) for start, stop in data.skips or []],
        window=data.window,
        files=None if data.window is None else {name: each.samples_per_file for name, each in sources.items()},
    )


def _legacy_order(data: DataConfig, sources: Mapping[str, TokenSource], seed: int) -> LegacyOrder:
    return LegacyOrder(
        {name: len(source.files) for name, source in sources.items()},
        {name: int(source.samples_per_file[0]) for name, source in sources.items()},
        seed,
        data.weights,
        data.legacy_world_size or 1,
    )


def _separator_note(name: str, found: Separator, corpus: Corpus) -> str:
    if found.id is not None or corpus.tokenizer is None:
        return f"  {found.describe()}"
    return (
        f"warning: data {name}: {found.describe()}; see with `pretrain data check` whether {corpus.tokenizer_path} is "
        f"the tokenizer that it was made with"
    )


def _unread_notes(order: LegacyOrder) -> list[str]:
    return [
        f"data {name}: {count:,} of {order.files[name]:,} files are never read, as by the old reader, which "
        f"takes whole groups of {order.files_per_group} per device"
        for name, count in order.unread_files().items()
        if count
    ]


def _source_notes(name: str, files: TokenFiles, source: TokenSource) -> list[str]:
    """What a source holds."""
    return [
        f"data {name}: {len(files):,} {files.kind} {'file' if len(files) == 1 else 'files'}, {source.n_tokens:,} "
        f"tokens, {source.n_samples:,} samples of {source.block_size:,} targets",
        *(f"  {note}" for note in files.notes),
    ]


def _bytes_per_token(source: TokenSource, manifest: dict[str, Any] | None, corpus: Corpus) -> float | None:
    """Counted when the text was prepared, or estimated from rows spread evenly over the source."""
    if manifest is not None:
        split = manifest["splits"]["train"]
        return split["text_bytes"] / split["tokens"] if split["tokens"] else None
    if corpus.byte_lengths is None:
        return None
    count = min(source.n_samples, max(1, SAMPLED_TOKENS // source.block_size))
    rows = source.read(np.linspace(0, source.n_samples - 1, count).astype(np.int64))
    return float(corpus.byte_lengths[rows[:, 1:]].mean())


def open_validation_sets(
    data: DataConfig,
    config: Config,
    corpus: Corpus,
    cache: Path | None = None,
    *,
    separator_id: int | None = None,
) -> tuple[list[ValidationSet], list[str]]:
    """Index the held-out files; returns the sets, and lines for the log. separator_id: see TrainData.

    Raises:
        FileNotFoundError: a set that was asked for is not there. DataError: a damaged file.
    """
    sets, notes = [], []
    asked = data.validation_paths()
    for name, path in (asked or data.train_paths()).items():
        try:
            if not asked and not Path(path).is_dir():
                raise NoTokenFilesError(path)  # single files and patterns name training data and nothing else
            files = _find(name, path, "validation", data, corpus, cache)
        except NoTokenFilesError:
            if asked:
                raise
            notes.append(f"no validation data beside {path}; name some with data.validation to see how the model does")
            continue
        source = TokenSource(files, config.block_size, config.vocab_size)
        sets.append(ValidationSet(name, source, corpus.byte_lengths, separator_id))
        notes.append(f"validation {name}: {sets[-1].n_targets:,} targets")
        notes += [f"  {note}" for note in (*files.notes, *(corpus.assumption(path) if asked else ()))]
    return sets, notes


def check_epochs(train: TrainData, start: int, stop: int) -> list[str]:
    """Refuse a run that would repeat its data more often than it may; returns lines for the log.

    Args:
        train: the stream.
        start: position of the run's first sample; what was read before it, by a base run say, counts too.
        stop: position behind its last sample.

    Raises:
        ValueError: with the largest number of epochs that was planned.
    """
    epochs, before = train.packed.order.epochs(stop), train.packed.order.epochs(start)
    name, most = max(epochs.items(), key=lambda item: item[1])
    if most > train.settings.max_epochs:
        if train.settings.start_position is not None and before[name] + 1 > train.settings.max_epochs:
            raise ValueError(
                f"data.start_position={train.settings.start_position:,} is too far: {name!r} counts as read "
                f"{before[name]:.2f} times before it, {most:.2f} times at the run's end, and "
                f"data.max_epochs={train.settings.max_epochs:g}; give the sample at which an earlier run stopped"
            )
        raise ValueError(
            f"by sample {stop:,}, its end, the run will have read {name!r} {most:.2f} times ({before[name]:.2f} times "
            f"before its start), data.max_epochs={train.settings.max_epochs:g}; train on fewer tokens, prepare more "
            f"data, or raise data.max_epochs"
        )
    lines = ["epochs in this run: " + ", ".join(f"{name} {before[name]:.3g} -> {epochs[name]:.3g}" for name in epochs)]
    repeated = [name for name, each in epochs.items() if each > 1]
    return [*lines, f"warning: read more than once: {', '.join(repeated)}"] if repeated else lines
