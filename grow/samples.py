"""Training samples for operators that read data, in an order that a seed decides."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_gpt.checkpoint import TRAINING, detect_form, read_training
from lit_gpt.config import Config, round_up
from lit_gpt.data_order import DataOrder
from lit_gpt.errors import DataError
from lit_gpt.packed_dataset import manifest_of
from lit_gpt.token_files import find_token_files
from lit_gpt.token_listing import is_there
from lit_gpt.token_source import TokenSource
from lit_gpt.tokenizer import tokenizer_beside

SOURCE = "growth"  # its name in the order; the order depends on it


@dataclass(frozen=True)
class Samples:
    """The samples of a path, shuffled; each is read once before one is read again."""

    path: str
    source: TokenSource
    order: DataOrder
    tokenizer_sha256: str | None
    """Of the tokenizer that the data was prepared with, where its manifest says."""
    on_batch: Callable[[int], None] | None = None
    """Called with the number of batches read so far, for whoever waits."""

    def batch(self, position: int, n_rows: int) -> Tensor:
        """The samples at positions position .. position + n_rows - 1 of the order: (n_rows, block_size + 1) int64."""
        _, samples = self.order.locate(np.arange(position, position + n_rows))
        return torch.from_numpy(self.source.read(samples))

    def batches(self, n_rows: int, position: int = 0) -> Iterator[Tensor]:
        """Batches of consecutive positions without end: (n_rows, block_size + 1) int64 each.

        Raises:
            DataError: there are fewer samples than one batch has rows.
        """
        if n_rows > self.source.n_samples:
            raise DataError(
                f"{self.path} holds {self.source.n_samples} samples of {self.source.block_size} targets, "
                f"and a batch has {n_rows}; add data, or lower --batch-size"
            )
        return self._read(n_rows, position)

    def _read(self, n_rows: int, position: int) -> Iterator[Tensor]:
        for number in itertools.count():
            yield self.batch(position + number * n_rows, n_rows)
            if self.on_batch is not None:
                self.on_batch(number + 1)

    def to_dict(self, n_read: int) -> dict[str, Any]:
        """What was read, for the growth history: plain values.

        Args:
            n_read: samples that were read, from position 0 on.
        """
        return {
            "path_name": os.path.basename(os.path.normpath(self.path)),
            "files": len(self.source.files),
            "fingerprint": self.source.fingerprint,
            "tokenizer_sha256": self.tokenizer_sha256,
            "seed": self.order.seed,
            "samples": n_read,
            "samples_in_files": self.source.n_samples,
            "tokens": n_read * self.source.block_size,
        }


def open_samples(
    path: str | os.PathLike[str], config: Config, *, seed: int = 0, on_batch: Callable[[int], None] | None = None
) -> Samples:
    """Samples of block_size targets for a model of this configuration.

    Args:
        path: a prepared folder, of which the training split is read, or whatever `find_token_files` takes.
        config: of the model.
        seed: of the order.
        on_batch: see Samples.

    Raises:
        FileNotFoundError: there is no such data.
        DataError: it is damaged, too short for one sample, or of another vocabulary.
    """
    source, manifest = open_tokens(path, config, config.block_size)
    order = DataOrder({SOURCE: source.n_samples}, seed)
    tokenizer_sha256 = None if manifest is None else manifest["tokenizer"]["sha256"]
    return Samples(os.fspath(path), source, order, tokenizer_sha256, on_batch)


def open_tokens(
    path: str | os.PathLike[str], config: Config, block_size: int
) -> tuple[TokenSource, dict[str, Any] | None]:
    """Token files for a model, in samples of `block_size` targets, and the manifest that lies beside them, if any.

    Raises:
        FileNotFoundError: there is no such data.
        DataError: it is damaged, too short for one sample, or of another vocabulary.
    """
    if not is_there(os.fspath(path)):
        raise FileNotFoundError(errno.ENOENT, "no such data; prepare some with scripts/prepare.py", os.fspath(path))
    manifest = manifest_of(path)
    if manifest is not None:
        _check_vocabulary(path, manifest["tokenizer"]["vocab_size"], config)
    return TokenSource(find_token_files(path), block_size, config.vocab_size), manifest


def _check_vocabulary(path: str | os.PathLike[str], vocab_size: int, config: Config) -> None:
    rows = config.padded_vocab_size
    if vocab_size == config.vocab_size or (vocab_size <= rows and rows in (vocab_size, round_up(vocab_size, 64))):
        return
    raise DataError(
        f"{os.fspath(path)} was prepared with a tokenizer of {vocab_size} tokens, and the model knows "
        f"{config.vocab_size} ({rows} rows); prepare the text with the model's own: scripts/prepare.py --tokenizer PATH"
    )


def check_tokenizer(samples: Samples, checkpoint: Path) -> None:
    """Refuse data of another tokenizer than the checkpoint's, where both are known.

    Raises:
        DataError: they differ.
    """
    known = _tokenizer_of(checkpoint)
    if known is not None and samples.tokenizer_sha256 not in (None, known):
        raise DataError(
            f"{samples.path} was prepared with another tokenizer ({samples.tokenizer_sha256[:12]}) than that of "
            f"{checkpoint} ({known[:12]}); prepare the text with the latter: scripts/prepare.py --tokenizer PATH"
        )


def _tokenizer_of(checkpoint: Path) -> str | None:
    if detect_form(checkpoint) == TRAINING:
        entry = read_training(checkpoint, verify=False).state.get("tokenizer")
        return None if entry is None else entry.get("sha256")
    beside = tokenizer_beside(checkpoint)
    return None if beside is None else beside.fingerprint
