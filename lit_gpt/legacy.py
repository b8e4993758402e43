"""Checkpoints of TinyLlama, prts and lit-gpt, and released weights: single files of torch.save, or folders with one.

Three things differ between them: what lies around the weights, what stands in front of their names, and who knows the
sizes. Nothing is unpickled (lit_gpt/pickles.py), and tensors are read when they are asked for.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_gpt.axes import EMBEDDING, HEAD, parameter_shapes
from lit_gpt.config import Config
from lit_gpt.errors import DataError
from lit_gpt.flops import Flops, flops_per_token
from lit_gpt.hf import IGNORED, family_of, from_hf, hf_names, hf_shapes
from lit_gpt.lazy_tensors import LazyTensors, TensorSpec, promoted
from lit_gpt.legacy_sizes import OWN_SIZES, WAY_OUT, Sizes, config_of
from lit_gpt.packed_dataset import MANIFEST as PREPARED
from lit_gpt.packed_dataset import PLAN
from lit_gpt.pickles import PickledTensor, read_pickle
from lit_gpt.problems import raise_problems, read_json, shape_problems

LEGACY_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")
PICKLED_INDEX = "pytorch_model.bin.index.json"
OTHER_FORMS = (
    *("MANIFEST.json", "state.json", ".metadata"),
    *("model.safetensors", "model.safetensors.index.json"),
    *(PREPARED, PLAN),
)
"""Files of folders that hold weights in another way, or tokens."""
NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth")
WRAPPERS = frozenset({"_fsdp_wrapped_module", "_forward_module", "_orig_mod", "module"})
"""Parts of names that FSDP, Fabric, torch.compile and prts's masks put around modules."""
SLOTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class LegacyCheckpoint:
    """An opened file of the older tools; the fields are those of a training form."""

    config: Config
    model: Mapping[str, Tensor]
    """Our names -> tensors on the CPU, read from the file on every access."""
    optimizer: Mapping[str, Mapping[str, Tensor]]
    """Parameter name -> slot (exp_avg, exp_avg_sq, step) -> tensor; empty where there is none."""
    state: dict[str, Any]
    """What state.json of a training form says: counters, position, where it is from."""
    stored: tuple[str, ...]
    """Names of the tensors among the weights, as the file has them."""


class Tensors(LazyTensors):
    """Name -> tensor, read on every access."""

    def __init__(self, stored: Mapping[str, PickledTensor]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(self._stored[name].shape, self._stored[name].dtype)


class _FromHuggingFace(LazyTensors):
    """Our names over tensors with Hugging Face's; q, k and v are fused on access."""

    def __init__(self, stored: Mapping[str, PickledTensor], config: Config) -> None:
        self._stored, self._config, self._names = stored, config, parameter_shapes(config)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return from_hf(name, lambda theirs: self._stored[theirs].read(), self._config)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def spec(self, name: str) -> TensorSpec:
        dtypes = {self._stored[theirs].dtype for theirs in hf_names(name, family_of(self._config))}
        return TensorSpec(self._names[name], promoted(dtypes))


def is_legacy(path: str | Path) -> bool:
    """Whether a path means a file of the older tools: itself, or one in a folder that has no other weights."""
    path = Path(path)
    if path.is_file():
        return path.suffix in LEGACY_SUFFIXES
    if not path.is_dir() or any((path / name).exists() for name in OTHER_FORMS):
        return False
    return bool(_files_in(path))


def legacy_file(path: str | Path) -> Path:
    """The file of the older tools that a path means.

    Raises:
        FileNotFoundError: there is none.
        DataError: a folder with several, of which one has to be named.
    """
    path = Path(path)
    if path.is_file():
        return path
    found = _files_in(path) if path.is_dir() else []
    if not found:
        raise FileNotFoundError(errno.ENOENT, "no checkpoint of the older tools (.pth, .bin)", str(path))
    if len(found) > 1:
        names = ", ".join(each.name for each in found[-5:])
        raise DataError(f"{path} holds {len(found)} checkpoints ({names}); give the path of one of them")
    return found[0]


def _files_in(folder: Path) -> list[Path]:
    found = sorted(each for each in folder.iterdir() if each.suffix in LEGACY_SUFFIXES and each.is_file())
    usual = [folder / name for name in ("pytorch_model.bin", PICKLED_INDEX) if (folder / name).is_file()]
    return usual[:1] or [each for each in found if each.name not in NO_WEIGHTS]


def read_legacy(path: str | Path, sizes: Sizes | None = None) -> LegacyCheckpoint:
    """Open a checkpoint of the older tools.

    Args:
        path: the file, or a folder with one; a config.json or lit_config.json beside it says the sizes.
        sizes: what is known otherwise.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: nobody knows the number of heads, or the sizes that are given are not those of the weights.
        DataError: the file is damaged, would run code, or holds other tensors than its model has.
    """
    file = legacy_file(path)
    sizes = sizes or Sizes()
    content = _read_parts(file) if file.name == PICKLED_INDEX else read_pickle(file)
    stored, given = _weights(file, content)
    hparams = _plain_values(content.get("hparams"))
    foreign = EMBEDDING not in stored
    own = content.get(OWN_SIZES)
    config = config_of(file, stored, hparams, sizes, own if isinstance(own, dict) else None)
    if foreign:
        model: Mapping[str, Tensor] = _FromHuggingFace(stored, config)
        wanted: dict[str, tuple[int, ...]] = {}
        for name, shape in parameter_shapes(config).items():
            wanted |= hf_shapes(name, shape, config)
        spare = set(hf_names(HEAD)) if config.tie_embeddings else set()
    else:
        model, wanted = Tensors(stored), parameter_shapes(config)
        spare = {HEAD} if config.tie_embeddings else set()
    found = {name: tensor.shape for name, tensor in stored.items() if name not in spare}
    raise_problems(shape_problems(wanted, found, str(file)), WAY_OUT)
    if not foreign:
        model = Tensors({name: stored[name] for name in wanted})
    optimizer = {} if foreign else _optimizer(content.get("optimizer"), list(stored), wanted)
    state = _state(file, config, content, hparams)
    return LegacyCheckpoint(config, model, optimizer, state, tuple(given))


def _read_parts(index: Path) -> dict[str, Any]:
    """The tensors of several files, which an index lists, as if they were one."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise DataError(f"{index} has no weight_map of tensor names to names of files beside it")
    parts: dict[str, Any] = {}
    for name in dict.fromkeys(weight_map.values()):
        if not (index.parent / name).is_file():
            raise DataError(f"{index.parent / name} is missing, the index lists it; get the folder again")
        part = read_pickle(index.parent / name)
        if not isinstance(part, dict):
            raise DataError(f"{index.parent / name} holds a {type(part).__name__}, not weights; get the folder again")
        parts |= part
    raise_problems([f"{index} lists {name}, which no file has" for name in weight_map if name not in parts], WAY_OUT)
    return parts


def plain_name(name: str) -> str:
    """A parameter's name without what was wrapped around its module."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    if parts[0] == "model" and parts[1:2] and parts[1] in ("transformer", "lm_head"):
        parts = parts[1:]
    return ".".join(parts)


def _weights(file: Path, content: Any) -> tuple[dict[str, PickledTensor], list[str]]:
    """The tensors under plain names, in the file's order; and all names as the file has them."""
    if not isinstance(content, dict):
        raise DataError(f"{file} holds a {type(content).__name__}, not a checkpoint; give another file")
    weights = content
    for key in ("model", "state_dict"):
        if isinstance(weights.get(key), dict):
            weights = weights[key]
    stored: dict[str, PickledTensor] = {}
    for name, tensor in weights.items():
        plain = plain_name(str(name))
        if not isinstance(tensor, PickledTensor):
            raise DataError(f"{file}: {name} is a {type(tensor).__name__} among the weights; {WAY_OUT}")
        if plain in stored:
            raise DataError(f"{file} holds {plain} twice, once as {name}; {WAY_OUT}")
        if not plain.endswith(IGNORED):
            stored[plain] = tensor
    if EMBEDDING not in stored and hf_names(EMBEDDING)[0] not in stored:
        shown = ", ".join(list(stored)[:3]) or "nothing"
        raise DataError(f"{file} has neither {EMBEDDING} nor {hf_names(EMBEDDING)[0]}, but {shown}; give another file")
    return stored, [str(name) for name in weights]


# What lies around the weights


def _plain_values(values: Any) -> dict[str, Any]:
    """Text and numbers of the settings a run was started with."""
    if not isinstance(values, dict):
        return {}
    return {str(key): value for key, value in values.items() if isinstance(value, str | int | float | None)}


def _optimizer(
    content: Any, order: list[str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Mapping[str, Tensor]]:
    """Moments by parameter, if every parameter has them; FSDP stores them by name, others by number."""
    states = content.get("state") if isinstance(content, dict) else None
    if not isinstance(states, dict):
        return {}
    found: dict[str, Mapping[str, Tensor]] = {}
    for key, slots in states.items():
        known = isinstance(key, str) or (isinstance(key, int) and 0 <= key < len(order))
        name = plain_name(key) if isinstance(key, str) else order[key] if known else None
        if name not in shapes or not isinstance(slots, dict):
            return {}
        kept = {slot: slots[slot] for slot in SLOTS if isinstance(slots.get(slot), PickledTensor)}
        fits = all(kept[slot].shape in (shapes[name], ()) for slot in kept)
        if len(kept) != len(SLOTS) or not fits:
            return {}
        found[name] = Tensors(kept)
    return found if found.keys() == shapes.keys() else {}


def _state(file: Path, config: Config, content: Mapping[str, Any], hparams: Mapping[str, Any]) -> dict[str, Any]:
    """The counters of a training form, as far as the file tells them; what it does not tell is 0."""
    counters = {key: _count(content.get(key)) for key in ("step_count", "iter_num")}
    samples = _samples(counters["iter_num"], hparams)
    tokens = samples * config.block_size
    return {
        "model_config": config.to_dict(),
        "run_config": None,
        "stage": 1,
        "stage_name": "legacy",
        "stage_step": counters["step_count"],
        **counters,
        "grown_into_stage": 1,
        "position": samples,
        "tokens": tokens,
        "flops": dataclasses.asdict(flops_per_token(config).times(tokens)),
        "parent_tokens": 0,
        "parent_flops": dataclasses.asdict(Flops()),
        "seconds": 0.0,
        "loss_sum": 0.0,
        "loss_count": 0,
        "history": [],
        "converted_from": {"format": "torch.save", "file": file.name, "hparams": dict(hparams)},
    }


def _count(value: Any) -> int:
    return value if type(value) is int and value >= 0 else 0


def _samples(iter_num: int, hparams: Mapping[str, Any]) -> int:
    """Samples used up: an iter is one micro-batch on every device. TinyLlama does not store its number of nodes: 0."""
    per_iter = [_count(hparams.get(key)) for key in ("micro_batch_size", "devices", "num_nodes")]
    return iter_num * per_iter[0] * per_iter[1] * per_iter[2]
