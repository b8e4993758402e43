"""From any checkpoint into exchange form, or into a file for TinyLlama and prts, with a receipt of what was done."""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from lit_gpt.atomic import sync_directory
from lit_gpt.axes import EMBEDDING, HEAD, parameter_shapes
from lit_gpt.checkpoint import TRAINING, detect_form, read_config, read_exchange, read_training, write_exchange
from lit_gpt.config import Config
from lit_gpt.exchange_files import LitWeights
from lit_gpt.exchange_writer import Copies
from lit_gpt.flops import count_parameters
from lit_gpt.hf import hf_names, hf_shapes
from lit_gpt.lazy_tensors import CastWeights, spec_of
from lit_gpt.legacy import is_legacy, legacy_file, plain_name, read_legacy
from lit_gpt.legacy_sizes import HF_CONFIG, LIT_CONFIG, Sizes
from lit_gpt.legacy_writer import write_legacy
from lit_gpt.llama2c import checkpoint_file, is_llama2c, read_llama2c, rewrite_tokenizer
from lit_gpt.parity import agreement, batches, fits_in_memory, has_transformers, our_model, their_model
from lit_gpt.stored_state import check_open, flops_behind, flops_entries, tokens_behind, trained_on
from lit_gpt.tokenizer import Tokenizer, file_sha256, holds_tokenizer, tokenizer_files
from lit_gpt.versions import versions

TO = ("exchange", "legacy")
PARITY = ("auto", "always", "never")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
RECEIPT, WRONG, UNCHECKED = ".receipt.json", ".wrong", ".unchecked"
GAP = 1e-3  # of the largest logit; rounding in fp32 stays a hundred times below, a wrong layout far above
BYTES = "bytes"  # as `Tokenizer.load` has it


@dataclass(frozen=True)
class Source:
    """An opened checkpoint of any kind."""

    kind: str
    config: Config
    weights: Mapping[str, Tensor]
    stored: tuple[str, ...]
    """Names of the tensors in the files."""
    files: tuple[Path, ...]
    """What was read."""
    tokenizer_dir: Path | None
    provenance: dict[str, Any]
    counters: dict[str, int]
    """iter_num and step_count, where they are known."""
    special_ids: Mapping[str, Any] | None = None
    """As in `write_exchange`."""


def open_source(path: Path, sizes: Sizes) -> Source:
    """Open a checkpoint: a Hugging Face folder, training form, or a file of the older tools.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: sizes are missing, or are given where the checkpoint says them.
        DataError: it is no checkpoint, or a damaged one.
    """
    folder = path if path.is_dir() else path.parent
    tokenizer_dir = folder if holds_tokenizer(folder) else None
    if is_legacy(path) and not is_llama2c(path):
        return _legacy_source(path, sizes, tokenizer_dir)
    source = _other_source(path, tokenizer_dir)
    _check_given(path, source.config, sizes)
    return source


def _other_source(path: Path, tokenizer_dir: Path | None) -> Source:
    """One that says its own sizes."""
    if is_llama2c(path):
        file = checkpoint_file(path)
        config, weights = read_llama2c(file)
        origin = {"converted_from": {"format": "llama2.c", "file": file.name}}
        return Source("llama2.c", config, weights, tuple(weights), (file,), tokenizer_dir, origin, {})
    if detect_form(path) == TRAINING:
        return _training_source(path)
    folder = read_exchange(path)
    files = [each for each in sorted(path.iterdir()) if each.suffix in (".safetensors", ".bin", ".json")]
    origin = folder.provenance or {"converted_from": {"format": "Hugging Face folder", "folder": path.name}}
    return Source(
        *("Hugging Face folder", folder.config, folder.weights, folder.stored, tuple(files), tokenizer_dir, origin),
        *({}, folder.special_ids),
    )


def _check_given(path: Path, config: Config, sizes: Sizes) -> None:
    """Refuse sizes that are given and are not those of a checkpoint that says them."""
    fields = ("n_head", "block_size", "vocab_size")
    given = {field: getattr(sizes, field) for field in fields if getattr(sizes, field) is not None}
    if sizes.model_name is not None:
        named = Config.from_name(sizes.model_name)
        fields = ("n_layer", "n_head", "n_embd", "n_query_groups", "intermediate_size")
        given = {field: getattr(named, field) for field in fields} | given
    wrong = [
        f"{field} {value} given, {getattr(config, field)} there"
        for field, value in given.items()
        if value != getattr(config, field)
    ]
    if wrong:
        raise ValueError(f"{path} says its own sizes, which are others: {'; '.join(wrong)}; leave them out")


def _legacy_source(path: Path, sizes: Sizes, tokenizer_dir: Path | None) -> Source:
    legacy, file = read_legacy(path, sizes), legacy_file(path)
    state = legacy.state
    counters = {key: state[key] for key in ("iter_num", "step_count")}
    known = {key: state[key] for key in ("step_count", "tokens") if state[key]}
    known |= flops_entries(flops_behind(state)) if state["tokens"] else {}
    known |= {"converted_from": state["converted_from"]}
    parts = sorted(file.parent.glob("*.bin")) if file.suffix == ".json" else []
    sizes_in = [each for name in (HF_CONFIG, LIT_CONFIG) if (each := file.parent / name).is_file()]
    files = (file, *parts, *sizes_in)
    return Source("torch.save", legacy.config, legacy.model, legacy.stored, files, tokenizer_dir, known, counters)


def _training_source(path: Path) -> Source:
    training = read_training(path)
    state = training.state
    check_open(state, path)
    keys = ("history", "step_count", "tokenizer", "separator_id")
    provenance = {key: state[key] for key in keys if state.get(key) is not None}
    if "tokens" in state:
        provenance["tokens"] = tokens_behind(state)
    if "flops" in state:
        provenance |= flops_entries(flops_behind(state))
    counters = {key: state[key] for key in ("iter_num", "step_count") if key in state}
    stored = tuple(f"model.{name}" for name in training.model)
    files = tuple(each for each in sorted(path.iterdir()) if each.is_file())
    provenance |= {"converted_from": {"format": "training form", "folder": path.name}}
    place = tokenizer_place(path, state)
    return Source("training form", read_config(path), training.model, stored, files, place, provenance, counters)


def tokenizer_place(path: Path, state: Mapping[str, Any]) -> Path | None:
    """Where a checkpoint's tokenizer is: beside it, or where its run had it from; None if it is not there any more.

    Args:
        path: the checkpoint.
        state: what it says of itself: the settings of its run, and which tokenizer that was.
    """
    data = trained_on(state)
    train = data.get("train") or {}
    folders = list(train.values()) if isinstance(train, dict) else [train]
    named = [data["tokenizer"]] if data.get("tokenizer") else []
    for place in (path if path.is_dir() else path.parent, *map(Path, [*(each for each in folders if each), *named])):
        if place.is_file() or str(place) == BYTES or holds_tokenizer(place):
            found = Tokenizer.load(place)
            if found.fingerprint == (state.get("tokenizer") or {}).get("sha256", found.fingerprint):
                return place
    return None


def left_out(source: Source) -> list[str]:
    """Tensors of the source's files that its model does not need, with the reason."""
    wanted = {name: name for name in parameter_shapes(source.config)}
    for name, shape in parameter_shapes(source.config).items():
        wanted |= dict.fromkeys(hf_shapes(name, shape, source.config))
    tied = {HEAD, *hf_names(HEAD)} if source.config.tie_embeddings else set()
    found = []
    for name in source.stored:
        if plain_name(name) in tied:
            found.append(f"{name} (the embedding, to which the head is tied)")
        elif plain_name(name) not in wanted:
            found.append(f"{name} (a table that is computed)")
    return found


def convert(
    source_path: Path,
    destination: Path,
    *,
    to: str = "exchange",
    dtype: torch.dtype | None = None,
    sizes: Sizes | None = None,
    tokenizer_dir: Path | None = None,
    parity: str = "auto",
    hash_inputs: bool = True,
) -> dict[str, Any]:
    """Convert a checkpoint; one tensor in memory at a time, but for the parity check.

    Args:
        source_path: any checkpoint.
        destination: the folder, or for `to="legacy"` the file, to make. A receipt is written beside it.
        to: one of TO.
        dtype: of the weights; None keeps theirs.
        sizes: of a file that does not tell.
        tokenizer_dir: the tokenizer to go along, where it is not beside the source.
        parity: whether logits are compared: always, never, or where two models fit in memory.
        hash_inputs: whether the receipt has the sha256 of what was read; a processor without instructions for it makes
            less of it in a second than a disk reads.

    Returns:
        The receipt, which is also in `receipt_path` of its "destination". Where the logits of its "wrong" batches
        differ by more than rounding, that is not `destination`, which is not made, but a name that ends in .wrong.

    Raises:
        ValueError: settings that do not fit, or a model that the destination cannot express.
        DataError: a damaged source, or one with a tensor that its model does not have.
        OSError: the destination exists or cannot be written.
    """
    began = time.perf_counter()
    if destination.is_file() or (destination.is_dir() and any(destination.iterdir())):
        raise FileExistsError(errno.EEXIST, "exists already; choose another name or remove it first", str(destination))
    source = open_source(source_path, sizes or Sizes())
    unchecked = destination.with_name(f".{destination.name}{UNCHECKED}")  # has its name once it was compared
    _remove(unchecked)
    tokenizer_dir = tokenizer_dir or source.tokenizer_dir
    weights = source.weights if dtype is None else CastWeights(source.weights, dtype)
    with ThreadPoolExecutor(1) as background, TemporaryDirectory() as folder:
        files = dict.fromkeys([*source.files, *_tokenizer_files(tokenizer_dir)])  # each once
        hashes = background.submit(lambda: [_described(file, hash_inputs) for file in files])
        if to == "legacy":
            write_legacy(unchecked, source.config, weights, source.counters)
        else:
            if source.kind == "llama2.c" and tokenizer_dir is None:
                tokenizer_dir = rewrite_tokenizer(source.files[0], source.config.vocab_size, Path(folder))
            write_exchange(
                unchecked,
                source.config,
                weights,
                tokenizer_dir=tokenizer_dir,
                provenance=source.provenance,
                special_ids=source.special_ids,
                copies=_copies(source, weights),
                ahead=True,
            )
            tokenizer_dir = tokenizer_dir and unchecked
        inputs = hashes.result()
    skipped = left_out(source)
    parity_found = _parity(source, unchecked, to, tokenizer_dir, parity)
    wrong = [name for name, batch in parity_found.items() if not _agrees(batch, was_cast=dtype is not None)]
    destination = unchecked.replace(_free_name(destination) if wrong else destination)
    sync_directory(destination.parent)
    receipt = {
        "source": str(source_path),
        "source_kind": source.kind,
        "destination": str(destination),
        "destination_kind": to,
        "tokenizer": tokenizer_dir is not None,
        "family": source.config.family,
        "parameters": count_parameters(source.config),
        "dtype": str(spec_of(weights, EMBEDDING).dtype).removeprefix("torch."),
        "tensors": {"mapped": len(source.stored) - len(skipped), "unmapped": 0, "left_out": skipped},
        "inputs": inputs,
        "parity": parity_found,
        "wrong": wrong,
        "secs": round(time.perf_counter() - began, 3),
        "versions": versions(*(["transformers"] if parity_found.get("against") == "transformers" else [])),
    }
    receipt_path(destination).write_text(json.dumps(receipt, indent=1) + "\n")
    return receipt


def receipt_path(destination: Path) -> Path:
    """Where the receipt of a conversion lies: beside its destination."""
    return destination.with_name(destination.name + RECEIPT)


def _agrees(batch: Any, *, was_cast: bool) -> bool:
    """Whether a batch's logits are the same up to rounding; a cast of the weights rounds more than any limit knows."""
    return was_cast or not isinstance(batch, dict) or batch["max_abs_logit_gap"] <= GAP * batch["max_abs_logit"]


def _free_name(destination: Path) -> Path:
    """Where what came out wrong goes, so that nobody takes it for the model."""
    names = (f"{destination.name}{WRONG}{'' if number == 1 else f'-{number}'}" for number in count(1))
    return next(each for name in names if not (each := destination.with_name(name)).exists())


def _remove(unchecked: Path) -> None:
    """What a conversion left that was killed before its end."""
    if unchecked.is_dir():
        shutil.rmtree(unchecked)
    unchecked.unlink(missing_ok=True)


def _tokenizer_files(place: Path | None) -> list[Path]:
    return [] if place is None or str(place) == BYTES else [file for file in tokenizer_files(place) if file.is_file()]


def _copies(source: Source, weights: Mapping[str, Tensor]) -> Copies | None:
    """Weights of a folder that stay as they are go from file to file as bytes."""
    if weights is not source.weights or not isinstance(weights, LitWeights):
        return None
    return Copies(weights, {name: name for name in weights}, allow_non_finite=True)


def _described(file: Path, with_hash: bool) -> dict[str, Any]:
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": file_sha256(file) if with_hash else None}


def _parity(source: Source, destination: Path, to: str, tokenizer_dir: Path | None, wish: str) -> dict[str, Any]:
    """What the comparison of the logits showed, or the reason why there was none."""
    if wish == "never":
        return {"skipped": "it was not asked for"}
    if wish == "auto" and not fits_in_memory(source.config):
        return {"skipped": f"two models of {count_parameters(source.config):,} parameters do not fit in memory"}
    independent = to == "exchange" and has_transformers()
    ours = our_model(source.config, source.weights)
    if independent:
        other, against = their_model(destination), "transformers"
    else:
        written = read_legacy(destination, Sizes(n_head=source.config.n_head)) if to == "legacy" else None
        found = written.model if written is not None else read_exchange(destination).weights
        config = source.config if written is None else written.config
        other, against = our_model(config, found), "this model, read back"
    found_batches = batches(source.config, tokenizer_dir)
    compared = {name: agreement(ours, other, idx).to_dict() for name, idx in found_batches.items()}
    return {"against": against, **compared}
