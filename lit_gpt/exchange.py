"""Exchange form of a checkpoint: a directory that Hugging Face loads unaided, plus what only we know."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt.atomic import Known, atomic_directory, check_free_space, file_problem, full_disk_as_os_error
from lit_gpt.axes import parameter_shapes
from lit_gpt.config import Config
from lit_gpt.errors import DataError
from lit_gpt.exchange_files import (
    ACCEPT_CHANGES,
    LitWeights,
    TensorFiles,
    manifest_if_ours,
    tensor_problems,
)
from lit_gpt.exchange_writer import Copies, plan_shards, write_json, write_shards
from lit_gpt.flops import Flops
from lit_gpt.hf import config_from_hf, config_to_hf
from lit_gpt.lazy_tensors import LazyTensors
from lit_gpt.legacy import LegacyCheckpoint, is_legacy, read_legacy
from lit_gpt.problems import check_names, raise_problems, read_json
from lit_gpt.stored_state import flops_entries

EXCHANGE = "exchange"
HF_CONFIG = "config.json"
LIT_CONFIG = "lit_config.json"
PROVENANCE = "growth.json"
GENERATION_CONFIG = "generation_config.json"
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
MAX_SHARD_BYTES = 5 * 10**9  # above this Hugging Face shards as well
SENTENCEPIECE = "tokenizer.model"
TOKENIZER_EXTRAS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class ExchangeCheckpoint:
    """An opened exchange form."""

    config: Config
    weights: LazyTensors
    """Our names -> tensors on the CPU, read from the files on every access; `LitWeights` over safetensors files."""
    provenance: dict[str, Any] | None
    """The content of growth.json."""
    stored: tuple[str, ...] = ()
    """Names of the tensors in the files."""
    special_ids: Mapping[str, Any] = field(default_factory=dict)
    """Keys of config.json that are about the tokenizer, SPECIAL_IDS, as far as they are there."""


def write_exchange(
    path: str | Path,
    config: Config,
    weights: Mapping[str, Tensor],
    *,
    tokenizer_dir: str | Path | None = None,
    provenance: dict[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    replace: bool = False,
    copies: Copies | None = None,
    special_ids: Mapping[str, Any] | None = None,
    ahead: bool = False,
) -> Path:
    """Write weights so that `AutoModelForCausalLM.from_pretrained(path)` loads them; all or nothing.

    One tensor is in memory at a time.

    Args:
        path: the directory to make.
        config: sizes of the model.
        weights: our names -> tensors of any device; a lazy mapping is read one tensor after the other. Dtypes are kept.
        tokenizer_dir: holds the tokenizer to go along.
        provenance: written as growth.json.
        max_shard_bytes: size above which the weights go into several files with an index.
        replace: whether a directory that is there already may go.
        special_ids: what config.json shall say of SPECIAL_IDS, where that is not what the tokenizer says.
        ahead: whether each tensor is read while the one before is written, which takes the memory of two.
        copies: another exchange form that is checked while this one is written, and the weights that are copies of its.

    Raises:
        ValueError: the model cannot be expressed by its family of Hugging Face's, or the tokenizer is not the model's.
        DataError: `weights` are not those of `config`, or what is copied from is damaged.
        OSError: `path` exists already, cannot be written, or the disk is full.
    """
    path = Path(path)
    config_to_hf(config, torch.float32, bos_id=None, eos_id=None)  # refuse before anything is read
    check_names(parameter_shapes(config), weights, "the weights to write")
    shards = plan_shards(config, weights, copies, max_shard_bytes)
    check_free_space(path, sum(spec.n_bytes for shard in shards for _, spec in shard))
    known = Known()
    with full_disk_as_os_error(path), atomic_directory(path, EXCHANGE, replace=replace, known=known) as directory:
        bos_id, eos_id = _write_tokenizer(directory, tokenizer_dir, config)
        known.crc32.update(write_shards(directory, config, weights, shards, copies, ahead=ahead))
        _, first = shards[0][0]
        values = config_to_hf(config, first.dtype, bos_id=bos_id, eos_id=eos_id) | dict(special_ids or {})
        write_json(directory / HF_CONFIG, values)
        write_json(directory / GENERATION_CONFIG, {key: values[key] for key in ("bos_token_id", "eos_token_id")})
        write_json(directory / LIT_CONFIG, _lit_config(config))
        if provenance is not None:
            write_json(directory / PROVENANCE, provenance)
    return path


def read_exchange(path: str | Path, *, verify: bool = True, verify_weights: bool = True) -> ExchangeCheckpoint:
    """Open an exchange form of ours, any Hugging Face folder of a family in lit_gpt/hf_families.py, or a legacy file.

    Args:
        path: the directory, or the file.
        verify: whether each file is checked against MANIFEST.json, where there is one, before it is read.
        verify_weights: False leaves the content of the weights' files to the `scan` of the weights.

    Raises:
        FileNotFoundError: there is no such directory.
        DataError: a file is damaged or missing, or the tensors are not those of config.json.
    """
    if is_legacy(path):
        return _exchange_of_legacy(read_legacy(path))
    directory = Path(path)
    config = read_exchange_config(directory, verify=verify)
    files = TensorFiles(directory, manifest_if_ours(directory) if verify else None, check_on_open=verify_weights)
    problems = tensor_problems(files, config)
    raise_problems(problems, "convert the folder again, or take its weights from where they came")
    provenance = read_json(directory / PROVENANCE) if (directory / PROVENANCE).is_file() else None
    ids = _special_ids(directory)
    return ExchangeCheckpoint(config, LitWeights(files, config), provenance, tuple(files), ids)


def _special_ids(directory: Path) -> dict[str, Any]:
    """Those of generation_config.json, which is what decides where generation ends, or else of config.json."""
    found: dict[str, Any] = {}
    for name in (HF_CONFIG, GENERATION_CONFIG):
        values = read_json(directory / name) if (directory / name).is_file() else {}
        found |= {key: values[key] for key in SPECIAL_IDS if _is_token_id(values.get(key))}
    return found


def _is_token_id(value: Any) -> bool:
    """Whether it is a number of a token, or a list of several."""
    each = value if isinstance(value, list) else [value]
    return bool(each) and all(type(number) is int and number >= 0 for number in each)


def _exchange_of_legacy(checkpoint: LegacyCheckpoint) -> ExchangeCheckpoint:
    state = checkpoint.state
    known = {
        "step_count": state["step_count"] or None,
        "tokens": state["tokens"] or None,
        **{key: value or None for key, value in flops_entries(Flops(**state["flops"])).items()},
        "converted_from": state["converted_from"],
    }
    return ExchangeCheckpoint(checkpoint.config, checkpoint.model, known, checkpoint.stored)


def read_exchange_config(path: str | Path, *, verify: bool = True) -> Config:
    """The Config of an exchange form: config.json, with what only lit_config.json knows.

    Raises:
        FileNotFoundError: there is no such directory.
        DataError: a file is damaged, describes what this model cannot express, or the two contradict each other.
    """
    if is_legacy(path):
        return read_legacy(path).config
    directory = Path(path)
    if not directory.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such directory", str(directory))
    manifest = manifest_if_ours(directory) if verify else None
    for name in (HF_CONFIG, LIT_CONFIG, PROVENANCE):
        if manifest is not None and (directory / name).is_file():
            raise_problems([file_problem(directory, manifest, name, deep=True)], ACCEPT_CHANGES)
    config = config_from_hf(read_json(directory / HF_CONFIG), str(directory / HF_CONFIG))
    if not (directory / LIT_CONFIG).is_file():
        return config
    ours = _our_config(directory / LIT_CONFIG)
    for size in (each for each in config.to_dict() if each not in ("name", "vocab_size")):
        if getattr(ours, size) != getattr(config, size):
            raise DataError(
                f"{directory}: {size} is {getattr(ours, size)} in {LIT_CONFIG} and {getattr(config, size)} in "
                f"{HF_CONFIG}; remove {LIT_CONFIG} if {HF_CONFIG} is right"
            )
    return ours


def _our_config(path: Path) -> Config:
    try:
        return Config.from_dict(read_json(path)["model_config"])
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: {error}; remove the file to use {HF_CONFIG} alone") from error


def _lit_config(config: Config) -> dict[str, Any]:
    values: dict[str, Any] = {"format": 1, "model_config": config.to_dict()}
    if config.padded_vocab_size > config.vocab_size:
        values["note"] = (
            f"the tokenizer has {config.vocab_size} tokens; {HF_CONFIG} says vocab_size={config.padded_vocab_size}, "
            f"the rows of the embedding, because Hugging Face does not tell one from the other"
        )
    return values


def _write_tokenizer(directory: Path, source: str | Path | None, config: Config) -> tuple[int | None, int | None]:
    """Copy the tokenizer's files; returns its beginning-of-text and end-of-text ids."""
    if source is None:
        return None, None
    from lit_gpt.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(source)
    if tokenizer.vocab_size > config.padded_vocab_size:
        raise ValueError(
            f"the tokenizer in {source} has {tokenizer.vocab_size} tokens, the model {config.padded_vocab_size} rows; "
            f"give the tokenizer that the model was trained with"
        )
    tokenizer.save(directory)
    for name in TOKENIZER_EXTRAS:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, directory / name)
    described = any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    if (directory / SENTENCEPIECE).is_file() and not described:
        write_json(directory / "tokenizer_config.json", _tokenizer_config(directory / SENTENCEPIECE))
    return tokenizer.bos_id, tokenizer.eos_id


def _tokenizer_config(model_file: Path) -> dict[str, Any]:
    """Enough for AutoTokenizer of transformers 5 to encode as we do, without adding tokens.

    Its LlamaTokenizer drops one space of texts that begin with one; its SentencePieceBackend is exact at encoding,
    not at decoding, and serves the models that the former would read wrongly without a word.
    """
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(model_file))
    ids = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
    tokens = {token: processor.id_to_piece(number) for token, number in ids.items() if number >= 0}
    kind = "LlamaTokenizer" if _is_like_llama(processor) else "SentencePieceBackend"
    return {"tokenizer_class": kind, **tokens, "add_bos_token": False, "add_eos_token": False}


def _is_like_llama(processor: Any) -> bool:
    """A byte-fallback BPE that puts a space in front of the text and otherwise leaves it as it is."""
    probe = "a  b \ufb01\U0010fffd "  # two spaces, a ligature that normalising would undo, a character nobody trains on
    ranks_not_probabilities = all(processor.get_score(number).is_integer() for number in range(processor.vocab_size()))
    return (
        ranks_not_probabilities
        and processor.encode("a", out_type=str)[0].startswith("\u2581")
        and processor.decode(processor.encode(probe)) == probe
    )
