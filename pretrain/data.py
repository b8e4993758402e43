"""From the data settings to batches: prepared folders, their agreement with the model, and position-addressed rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt.config import Config
from lit_gpt.data_order import DataOrder
from lit_gpt.packed_data import PackedData
from lit_gpt.packed_dataset import load_manifest
from lit_gpt.token_files import find_token_files
from lit_gpt.token_source import TokenSource
from lit_gpt.tokenizer import Tokenizer
from pretrain.config import DataConfig
from pretrain.held_out import ValidationSet


@dataclass(frozen=True)
class TrainData:
    """The training stream of a run."""

    packed: PackedData
    bytes_per_token: float | None
    """Text bytes per training token, for the bits-per-byte estimate."""

    def rows(self, position: int, count: int) -> Tensor:
        """(count, block_size + 1) int64: the samples [position, position + count) of the global order."""
        return torch.from_numpy(self.packed.samples(position, count))


def read_manifests(data: DataConfig) -> dict[str, dict[str, Any]]:
    """Folder -> manifest of every folder the run reads.

    Raises:
        FileNotFoundError: a folder is not there. DataError: it was not prepared. ValueError: two tokenizers.
    """
    folders = [*data.train_paths().values(), *(data.validation_paths() or data.train_paths()).values()]
    manifests = {folder: load_manifest(Path(folder)) for folder in dict.fromkeys(folders)}
    tokenizers = {folder: manifest["tokenizer"]["sha256"] for folder, manifest in manifests.items()}
    if len(set(tokenizers.values())) > 1:
        listed = "; ".join(f"{folder}: {digest[:12]}" for folder, digest in tokenizers.items())
        raise ValueError(f"the data folders were prepared with different tokenizers ({listed}); prepare them with one")
    return manifests


def tokenizer_of(manifests: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The tokenizer entry that all manifests share."""
    return next(iter(manifests.values()))["tokenizer"]


def check_vocabulary(config: Config, tokenizer: Mapping[str, Any]) -> None:
    """Refuse a model that was not made for the data's tokenizer.

    Raises:
        ValueError: the vocabularies differ in size.
    """
    if config.vocab_size != tokenizer["vocab_size"]:
        raise ValueError(
            f"model.vocab_size={config.vocab_size}, but the data was prepared with a tokenizer of "
            f"{tokenizer['vocab_size']} tokens; leave model.vocab_size out to follow the data, or prepare the data "
            f"with the model's tokenizer"
        )


def open_train_data(data: DataConfig, config: Config, manifests: Mapping[str, dict[str, Any]], seed: int) -> TrainData:
    """Index the training files.

    Raises:
        DataError: a damaged file, or fewer tokens than one sample.
    """
    sources = {
        name: TokenSource(find_token_files(Path(folder), "train"), config.block_size, config.vocab_size)
        for name, folder in data.train_paths().items()
    }
    order = DataOrder({name: source.n_samples for name, source in sources.items()}, seed=seed, weights=data.weights)
    splits = [manifests[folder]["splits"]["train"] for folder in data.train_paths().values()]
    tokens, text_bytes = (sum(split[key] for split in splits) for key in ("tokens", "text_bytes"))
    return TrainData(
        packed=PackedData(sources, order),
        bytes_per_token=text_bytes / tokens if tokens else None,
    )


def open_validation_sets(data: DataConfig, config: Config) -> list[ValidationSet]:
    """Index the validation files.

    Raises:
        FileNotFoundError: a folder has no validation split. DataError: a damaged file.
    """
    sets = []
    for name, folder in (data.validation_paths() or data.train_paths()).items():
        source = TokenSource(find_token_files(Path(folder), "validation"), config.block_size, config.vocab_size)
        sets.append(ValidationSet(name, source, Tokenizer.load(Path(folder)).byte_lengths()))
    return sets


def check_epochs(data: DataConfig, train: TrainData, samples: int) -> None:
    """Refuse a run that would repeat its data more often than it may.

    Raises:
        ValueError: with the largest number of epochs that was planned.
    """
    epochs = train.packed.order.epochs(samples)
    name, most = max(epochs.items(), key=lambda item: item[1])
    if most > data.max_epochs:
        raise ValueError(
            f"the run reads {name!r} {most:.1f} times, data.max_epochs={data.max_epochs:g}; "
            f"train on fewer tokens, prepare more data, or raise data.max_epochs"
        )
