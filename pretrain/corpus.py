"""What the token ids of a run's data mean: the tokenizer of prepared folders, or the one that is named for others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.config import Config
from lit_gpt.packed_dataset import manifest_of
from lit_gpt.token_files import Separator, TokenFiles, detect_separator, likely_separators
from lit_gpt.token_listing import is_there, list_files
from lit_gpt.tokenizer import Tokenizer
from pretrain.config import DataConfig, ModelConfig


@dataclass(frozen=True)
class Corpus:
    """What is known of a run's data before its files are opened."""

    manifests: dict[str, dict[str, Any]]
    """Path -> manifest of every prepared folder; token files from elsewhere have none."""
    tokenizer_entry: dict[str, Any] | None
    """kind, sha256 and vocab_size of the one tokenizer, as manifests and checkpoints keep them; None: nobody knows."""
    tokenizer_path: str | None
    """Where the tokenizer is: what `Tokenizer.load` takes."""
    beside_files: bool = False
    """Whether nobody named it: it was found in the folder of the token files."""

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        return None if self.tokenizer_path is None else Tokenizer.load(self.tokenizer_path)

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
        """Where the tokenizer comes from if nobody named it, and why there will be no bits per byte, if so."""
        found = (f"tokenizer: that of {self.tokenizer_path}, beside the token files",) if self.beside_files else ()
        reason = self._byte_lengths[1]
        return (*found, f"bits per byte are not measured: {reason}") if reason else found

    def assumption(self, path: str) -> tuple[str, ...]:
        """What is taken for granted of a path without a manifest beside prepared folders, if it is."""
        if path in self.manifests or self.tokenizer_path not in self.manifests:
            return ()
        return (f"its token ids are taken to be those of the tokenizer in {self.tokenizer_path}",)

    def look_for_separator(self, files: TokenFiles, vocab_size: int) -> Separator:
        """What seems to stand between the documents of files that no manifest describes."""
        return detect_separator(files, likely_separators(self.tokenizer, vocab_size))

    def separator_id(self, data: DataConfig, found: Mapping[str, Separator], vocab_size: int) -> int | None:
        """The token that ends a document in all of a run's data; None if documents are not told apart.

        found: path -> what was found in files that no manifest describes.

        Raises:
            ValueError: the data does not say it, or not with one voice.
        """
        if not data.document_mask:
            return None
        eos_id = None if self.tokenizer is None else self.tokenizer.eos_id
        ids = {path: manifest.get("separator_id") for path, manifest in self.manifests.items()}
        for path, separator in found.items():
            ids[path] = next((i for i in (data.separator_id, separator.id, eos_id) if i is not None), None)
        listed = "; ".join(f"{path}: {'none known' if each is None else each}" for path, each in ids.items())
        if None in ids.values() or len(set(ids.values())) > 1:
            raise ValueError(
                f"data.document_mask needs one token that ends the documents of all data, found {listed}; turn it off, "
                f"or prepare the data alike (scripts/prepare.py --separator-id), or give data.separator_id or "
                f"data.tokenizer for files of others"
            )
        separator_id = next(iter(ids.values()))
        if data.separator_id not in (None, separator_id) or not 0 <= separator_id < vocab_size:
            raise ValueError(
                f"data.separator_id={data.separator_id} does not fit the data ({listed}) and its vocabulary of "
                f"{vocab_size}; leave it out where manifests say it"
            )
        return separator_id


def read_corpus(data: DataConfig, look_beside: bool = False) -> Corpus:
    """Manifests and the tokenizer that all data share.

    look_beside: where neither a manifest nor a setting names a tokenizer, take the one in the token files' folders.

    Raises:
        FileNotFoundError: a path or the tokenizer does not exist, or there are no token files.
        DataError: a folder was not prepared to its end.
        ValueError: two different tokenizers.
    """
    manifests = _read_manifests(data)
    digests = {path: manifest["tokenizer"]["sha256"] for path, manifest in manifests.items()}
    named = None if data.tokenizer is None else Tokenizer.load(data.tokenizer)
    if named is not None:
        digests[f"data.tokenizer {data.tokenizer}"] = named.fingerprint
    if len(set(digests.values())) > 1:
        listed = "; ".join(f"{path}: {digest[:12]}" for path, digest in digests.items())
        raise ValueError(f"the data folders were prepared with different tokenizers ({listed}); prepare them with one")
    for path, manifest in manifests.items():
        return Corpus(manifests, manifest["tokenizer"], data.tokenizer or path)
    beside = _beside_all(data) if named is None and look_beside else None
    if named is None and beside is not None:
        return Corpus(manifests, _entry(Tokenizer.load(beside)), beside, beside_files=True)
    if named is None:
        if look_beside:  # nobody will know how many ids there are; but is there any data at all?
            for path in data.train_paths().values():
                list_files(path, "train")
        return Corpus(manifests, None, None)
    return Corpus(manifests, _entry(named), data.tokenizer)


def _entry(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"kind": tokenizer.kind, "sha256": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}


def _beside_all(data: DataConfig) -> str | None:
    """The first folder of token files, if all of them hold one and the same tokenizer."""
    paths = [*data.train_paths().values(), *data.validation_paths().values()]
    folders = list(dict.fromkeys(path if Path(path).is_dir() else str(Path(path).parent) for path in paths))
    try:
        fingerprints = {Tokenizer.load(folder).fingerprint for folder in folders}
    except (FileNotFoundError, ValueError):  # none, or several of which nobody says which
        return None
    return folders[0] if len(fingerprints) == 1 else None


def _read_manifests(data: DataConfig) -> dict[str, dict[str, Any]]:
    """Path -> manifest of every prepared folder that the run reads; other paths are left out.

    Raises:
        FileNotFoundError: a path does not exist.
        DataError: a manifest cannot be read, or a folder was not prepared to its end.
    """
    manifests = {}
    for path in dict.fromkeys([*data.train_paths().values(), *data.validation_paths().values()]):
        manifest = manifest_of(path)
        if manifest is not None:
            manifests[path] = manifest
        elif not is_there(path):
            raise FileNotFoundError(
                f"data {path} does not exist; give token files, or make some: scripts/prepare.py --out {path} with "
                f"--input PATH... or --stdlib"
            )
    return manifests


def model_config_for(corpus: Corpus, model: ModelConfig, origin: Config | None = None) -> Config:
    """The model's sizes, with as many ids as the data's tokenizer has; `origin` as in `ModelConfig.resolve`.

    Raises:
        ValueError: sizes that break a rule, or a vocabulary that is not the data's, or that nobody tells.
    """
    entry = corpus.tokenizer_entry
    if entry is None and model.vocab_size is None:
        raise ValueError(
            "the data does not say how many token ids there are; give data.tokenizer, the tokenizer that it was made "
            "with, or model.vocab_size if there is none (then there are no bits per byte)"
        )
    config = model.resolve(model.vocab_size or 0 if entry is None else entry["vocab_size"], origin)
    if entry is not None and config.vocab_size != entry["vocab_size"]:
        raise ValueError(
            f"model.vocab_size={config.vocab_size}, but the data was prepared with a tokenizer of "
            f"{entry['vocab_size']} tokens; leave model.vocab_size out to follow the data, or prepare the data with "
            f"the model's tokenizer"
        )
    return config
