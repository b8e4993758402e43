"""Exchange form of a checkpoint: a directory that Hugging Face loads unaided, plus what only we know."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_gpt.atomic import (
    MANIFEST,
    atomic_directory,
    check_free_space,
    file_problem,
    full_disk_as_os_error,
    read_manifest,
)
from lit_gpt.axes import HEAD, parameter_shapes
from lit_gpt.config import Config
from lit_gpt.errors import DataError
from lit_gpt.hf import LLAMA, config_from_hf, config_to_hf, from_hf, hf_names, hf_shapes, to_hf
from lit_gpt.problems import bounded_shapes, check_names, raise_problems, read_json, shape_problems

EXCHANGE = "exchange"
MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
HF_CONFIG = "config.json"
LIT_CONFIG = "lit_config.json"
PROVENANCE = "growth.json"
MAX_SHARD_BYTES = 5 * 10**9  # above this Hugging Face shards as well
SENTENCEPIECE = "tokenizer.model"
TOKENIZER_EXTRAS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
LEGACY_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")
ACCEPT_CHANGES = f"restore the file, or remove {MANIFEST} to accept the folder as it is"


@dataclass(frozen=True)
class ExchangeCheckpoint:
    """An opened exchange form."""

    config: Config
    weights: Mapping[str, Tensor]
    """Our names -> tensors on the CPU, read from the files on every access."""
    provenance: dict[str, Any] | None
    """The content of growth.json."""


def write_exchange(
    path: str | Path,
    config: Config,
    weights: Mapping[str, Tensor],
    *,
    tokenizer_dir: str | Path | None = None,
    provenance: dict[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    replace: bool = False,
) -> Path:
    """Write weights so that `AutoModelForCausalLM.from_pretrained(path)` loads them; all or nothing.

    Args:
        path: the directory to make.
        config: sizes of the model.
        weights: our names -> tensors of any device; a lazy mapping is read one tensor after the other. Dtypes are kept.
        tokenizer_dir: holds the tokenizer to go along.
        provenance: written as growth.json.
        max_shard_bytes: size above which the weights go into several files with an index; also the memory needed.
        replace: whether a directory that is there already may go.

    Raises:
        ValueError: the model cannot be expressed by Hugging Face's Llama, or the tokenizer is not the model's.
        DataError: `weights` are not those of `config`.
        OSError: `path` exists already, cannot be written, or the disk is full.
    """
    path = Path(path)
    config_to_hf(config, torch.float32, bos_id=None, eos_id=None)  # refuse before anything is read
    shapes = parameter_shapes(config)
    check_names(shapes, weights, "the weights to write")
    check_free_space(path, sum(map(prod, shapes.values())) * weights[next(iter(shapes))].itemsize)
    with full_disk_as_os_error(path), atomic_directory(path, EXCHANGE, replace=replace) as directory:
        bos_id, eos_id = _write_tokenizer(directory, tokenizer_dir, config)
        dtype = _write_shards(directory, _in_hf_names(config, weights), max_shard_bytes)
        _write_json(directory / HF_CONFIG, config_to_hf(config, dtype, bos_id=bos_id, eos_id=eos_id))
        _write_json(directory / "generation_config.json", {"bos_token_id": bos_id, "eos_token_id": eos_id})
        _write_json(directory / LIT_CONFIG, _lit_config(config))
        if provenance is not None:
            _write_json(directory / PROVENANCE, provenance)
    return path


def read_exchange(path: str | Path, *, verify: bool = True) -> ExchangeCheckpoint:
    """Open an exchange form of ours, or any Hugging Face folder of a Llama with safetensors.

    Args:
        path: the directory.
        verify: whether each file is checked against MANIFEST.json, where there is one, before it is read.

    Raises:
        FileNotFoundError: there is no such directory.
        DataError: a file is damaged or missing, or the tensors are not those of config.json.
    """
    directory = Path(path)
    config = read_exchange_config(directory, verify=verify)
    files = _TensorFiles(directory, _manifest(directory) if verify else None)
    problems = _tensor_problems(files, config)
    raise_problems(problems, "convert the folder again, or take its weights from where they came")
    provenance = read_json(directory / PROVENANCE) if (directory / PROVENANCE).is_file() else None
    return ExchangeCheckpoint(config, _LitWeights(files, config), provenance)


def read_exchange_config(path: str | Path, *, verify: bool = True) -> Config:
    """The Config of an exchange form: config.json, with what only lit_config.json knows.

    Raises:
        FileNotFoundError: there is no such directory.
        DataError: a file is damaged, describes what this model cannot express, or the two contradict each other.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such directory", str(directory))
    manifest = _manifest(directory) if verify else None
    for name in (HF_CONFIG, LIT_CONFIG, PROVENANCE):
        if manifest is not None and (directory / name).is_file():
            raise_problems([file_problem(directory, manifest, name, deep=True)], ACCEPT_CHANGES)
    config = config_from_hf(read_json(directory / HF_CONFIG), str(directory / HF_CONFIG))
    if not (directory / LIT_CONFIG).is_file():
        return config
    ours = _our_config(directory / LIT_CONFIG)
    for field in (*LLAMA.fields, "rope_base", "rotary_percentage"):
        if getattr(ours, field) != getattr(config, field):
            raise DataError(
                f"{directory}: {field} is {getattr(ours, field)} in {LIT_CONFIG} and {getattr(config, field)} in "
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


def _in_hf_names(config: Config, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor as Hugging Face has them, one of our tensors in memory at a time; none shares its memory."""
    for name, shape in parameter_shapes(config).items():
        tensor = weights[name].detach()
        if tuple(tensor.shape) != shape:
            raise DataError(f"{name} has shape {tuple(tensor.shape)}, the configuration wants {shape}")
        for theirs, part in to_hf(name, tensor, config).items():
            yield theirs, part.to("cpu", copy=True).contiguous()


def _write_shards(directory: Path, tensors: Iterator[tuple[str, Tensor]], max_shard_bytes: int) -> torch.dtype:
    """Write shard after shard as they fill up, then give them their names; returns the dtype of the first tensor."""
    shard: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    shard_bytes = total_bytes = 0
    dtype = None

    def flush() -> None:
        part = directory / f"{len(shards)}.part"
        save_file(shard, part, metadata={"format": "pt"})
        part.chmod(directory.stat().st_mode & 0o666)  # safetensors leaves it to its owner alone
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        dtype = dtype or tensor.dtype
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            flush()
            shard_bytes = 0
        shard[name] = tensor
        shard_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    _name_shards(directory, shards, total_bytes)
    return dtype


def _name_shards(directory: Path, shards: list[list[str]], total_bytes: int) -> None:
    if len(shards) == 1:
        (directory / "0.part").rename(directory / MODEL)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{number}.part").rename(directory / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    _write_json(directory / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


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
        _write_json(directory / "tokenizer_config.json", _tokenizer_config(directory / SENTENCEPIECE))
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


class _TensorFiles(Mapping[str, Tensor]):
    """Hugging Face name -> tensor, over one safetensors file or several with an index.

    Args:
        directory: the folder.
        manifest: what each file is checked against before its first tensor is read; None checks nothing.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any] | None) -> None:
        self.directory = directory
        self._manifest = manifest
        self._open: dict[str, Any] = {}
        self._file_of = self._find()

    def _find(self) -> dict[str, str]:
        if (self.directory / MODEL).is_file():
            return dict.fromkeys(self._file(MODEL).keys(), MODEL)
        if (self.directory / INDEX).is_file():
            return self._indexed()
        legacy = sorted(path.name for path in self.directory.iterdir() if path.suffix in LEGACY_SUFFIXES)
        if legacy:
            raise DataError(legacy_refusal(self.directory / legacy[0]))
        raise DataError(f"{self.directory} has neither {MODEL} nor {INDEX}; it is not a complete Hugging Face folder")

    def _indexed(self) -> dict[str, str]:
        if self._manifest is not None:
            raise_problems([file_problem(self.directory, self._manifest, INDEX, deep=True)], ACCEPT_CHANGES)
        weight_map = read_json(self.directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in weight_map.values()
        ):
            raise DataError(f"{self.directory / INDEX} has no weight_map of tensor names to names of files beside it")
        missing = [f"{file}: {name}" for name, file in weight_map.items() if name not in self._file(file).keys()]
        raise_problems(
            [f"{self.directory}/{entry} is in the index, not in the file" for entry in missing], "get it again"
        )
        return weight_map

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = self._checked(name)
        return self._open[name]

    def _checked(self, name: str) -> Any:
        path = self.directory / name
        if self._manifest is not None:
            raise_problems([file_problem(self.directory, self._manifest, name, deep=True)], ACCEPT_CHANGES)
        if not path.is_file():
            raise DataError(f"{path} is missing, {INDEX} lists it; get the folder again")
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} is not a whole safetensors file: {error}; get it again") from error

    def __getitem__(self, name: str) -> Tensor:
        file = self._file(self._file_of[name])
        try:
            return file.get_tensor(name).clone()  # safetensors hands out views of one mapping of the file
        except (SafetensorError, RuntimeError, TypeError) as error:
            raise DataError(f"{name} in {self.directory / self._file_of[name]}: {error}; get it again") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file(self._file_of[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        return self._file(self._file_of[name]).get_slice(name).get_dtype()


class _LitWeights(Mapping[str, Tensor]):
    """Our names over Hugging Face's files; q, k and v are fused on access."""

    def __init__(self, files: _TensorFiles, config: Config) -> None:
        self._files = files
        self._config = config
        self._names = parameter_shapes(config)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return from_hf(name, self._files.__getitem__, self._config)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _tensor_problems(files: _TensorFiles, config: Config) -> list[str]:
    wanted: dict[str, tuple[int, ...]] = {}
    for name, shape in bounded_shapes(config, len(files), str(files.directory)).items():
        wanted |= hf_shapes(name, shape, config)
    spare = set(hf_names(HEAD)) if config.tie_embeddings else set()
    found = {name: files.shape(name) for name in files if name not in spare and not name.endswith(tuple(LLAMA.ignored))}
    problems = shape_problems(wanted, found, str(files.directory))
    return problems + [
        f"{files.directory}: {name} has dtype {files.dtype(name)}; weights have one of {', '.join(WEIGHT_DTYPES)}"
        for name in wanted
        if name in found and files.dtype(name) not in WEIGHT_DTYPES
    ]


def legacy_refusal(path: Path) -> str:
    return (
        f"{path} is a pickle of the older tools; it is not read yet. Load it where it was made and save it with "
        f"save_pretrained(..., safe_serialization=True)"
    )


def _manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a folder that we wrote; a plain Hugging Face folder has none."""
    return read_manifest(directory) if (directory / MANIFEST).exists() else None


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
