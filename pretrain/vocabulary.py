"""What the token ids of a run's data mean: the tokenizer of prepared folders, or the one that is named for others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.config import Config
from lit_gpt.errors import DataError
from lit_gpt.packed_dataset import MANIFEST, load_manifest
from lit_gpt.tokenizer import Tokenizer
from pretrain.data_config import DataConfig

PLAN = "plan.json"  # scripts/prepare.py writes it first and the manifest last
WILDCARDS = set("*?[")


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer that all data of a run share, as far as it is known."""

    entry: dict[str, Any] | None
    """kind, sha256 and vocab_size, as manifests and checkpoints keep them; None if nobody knows."""
    path: str | None
    """Where the tokenizer is: what `Tokenizer.load` takes."""

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        return None if self.path is None else Tokenizer.load(self.path)

    @cached_property
    def _byte_lengths(self) -> tuple[np.ndarray | None, str]:
        if self.tokenizer is None:
            return None, "no tokenizer is known; name it with data.tokenizer"
        try:
            return self.tokenizer.byte_lengths(), ""
        except ValueError as error:
            return None, str(error)

    @property
    def byte_lengths(self) -> np.ndarray | None:
        """(vocab_size,) int64: UTF-8 bytes that each id stands for; None if that is not known."""
        return self._byte_lengths[0]

    @property
    def notes(self) -> tuple[str, ...]:
        """Why there will be no bits per byte, if so."""
        reason = self._byte_lengths[1]
        return (f"bits per byte are not measured: {reason}",) if reason else ()

    @property
    def separator_candidates(self) -> tuple[int, ...] | None:
        """Ids that may stand between documents; None if nobody knows."""
        if self.tokenizer is None:
            return None
        return tuple(each for each in (self.tokenizer.bos_id, self.tokenizer.eos_id) if each is not None)


def read_manifests(data: DataConfig) -> dict[str, dict[str, Any]]:
    """Path -> manifest of every prepared folder that the run reads; other paths are left out.

    Raises:
        FileNotFoundError: a path does not exist.
        DataError: a manifest cannot be read, or a folder was not prepared to its end.
    """
    manifests = {}
    for path in dict.fromkeys([*data.train_paths().values(), *data.validation_paths().values()]):
        if (Path(path) / MANIFEST).is_file():
            manifests[path] = load_manifest(path)
        elif (Path(path) / PLAN).is_file():
            raise DataError(
                f"{path} holds a {PLAN} but no {MANIFEST}: it was not prepared to the end; repeat the command of "
                f"scripts/prepare.py"
            )
        elif not (Path(path).exists() or set(path) & WILDCARDS):
            raise FileNotFoundError(
                f"data {path} does not exist; give token files, or make some: scripts/prepare.py --out {path} with "
                f"--input PATH... or --stdlib"
            )
    return manifests


def read_vocabulary(data: DataConfig, manifests: Mapping[str, dict[str, Any]]) -> Vocabulary:
    """The one tokenizer of prepared folders and of `data.tokenizer`.

    Raises:
        FileNotFoundError: there is no such tokenizer. ValueError: two different ones.
    """
    digests = {path: manifest["tokenizer"]["sha256"] for path, manifest in manifests.items()}
    named = None if data.tokenizer is None else Tokenizer.load(data.tokenizer)
    if named is not None:
        digests[f"data.tokenizer {data.tokenizer}"] = named.fingerprint
    if len(set(digests.values())) > 1:
        listed = "; ".join(f"{path}: {digest[:12]}" for path, digest in digests.items())
        raise ValueError(f"the data folders were prepared with different tokenizers ({listed}); prepare them with one")
    for path, manifest in manifests.items():
        return Vocabulary(manifest["tokenizer"], data.tokenizer or path)
    if named is None:
        return Vocabulary(None, None)
    entry = {"kind": named.kind, "sha256": named.fingerprint, "vocab_size": named.vocab_size}
    return Vocabulary(entry, data.tokenizer)


def check_vocabulary(config: Config, vocabulary: Vocabulary) -> None:
    """Refuse a model that was not made for the data's tokenizer.

    Raises:
        ValueError: the vocabularies differ in size.
    """
    if vocabulary.entry is not None and config.vocab_size != vocabulary.entry["vocab_size"]:
        raise ValueError(
            f"model.vocab_size={config.vocab_size}, but the data was prepared with a tokenizer of "
            f"{vocabulary.entry['vocab_size']} tokens; leave model.vocab_size out to follow the data, or prepare the "
            f"data with the model's tokenizer"
        )


def vocabulary_size(given: int | None, vocabulary: Vocabulary) -> int:
    """Ids of the model: as many as the tokenizer has, or as the settings say where no tokenizer is known.

    Raises:
        ValueError: nobody says.
    """
    if vocabulary.entry is not None:
        return vocabulary.entry["vocab_size"]
    if given is None:
        raise ValueError(
            "the data does not say how many token ids there are; give data.tokenizer, the tokenizer that it was made "
            "with, or model.vocab_size if there is none (then there are no bits per byte)"
        )
    return given
