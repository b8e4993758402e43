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
from lit_gpt.config import NAMED_SIZES, Config
from lit_gpt.errors import DataError
from lit_gpt.flops import Flops, flops_per_token
from lit_gpt.hf import IGNORED, config_from_hf, family_of, from_hf, hf_names, hf_shapes
from lit_gpt.lazy_tensors import LazyTensors, TensorSpec
from lit_gpt.pickles import PickledTensor, read_pickle
from lit_gpt.problems import raise_problems, read_json, shape_problems

LEGACY_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")
HF_CONFIG, LIT_CONFIG = "config.json", "lit_config.json"
OTHER_FORMS = (
    *("MANIFEST.json", "state.json", ".metadata"),
    *("model.safetensors", "model.safetensors.index.json"),
)
"""Files of folders that hold weights in another way."""
NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth")
WRAPPERS = frozenset({"_fsdp_wrapped_module", "_forward_module", "_orig_mod", "module"})
"""Parts of names that FSDP, Fabric, torch.compile and prts's masks put around modules."""
SLOTS = ("exp_avg", "exp_avg_sq", "step")
BLOCK = "transformer.h.0."
WAY_OUT = "use the configuration that belongs to these weights"


@dataclass(frozen=True)
class Sizes:
    """What nobody can read off the weights, where it is given."""

    model_name: str | None = None
    """A name that `Config.from_name` knows."""
    n_head: int | None = None
    """Query heads."""
    block_size: int | None = None
    vocab_size: int | None = None
    """Tokens of the tokenizer, where the embedding has more rows."""


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
        first = hf_names(name, family_of(self._config))[0]
        return TensorSpec(self._names[name], self._stored[first].dtype)


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
    usual = [each for each in found if each.name == "pytorch_model.bin"]
    return usual or [each for each in found if each.name not in NO_WEIGHTS]


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
    content = read_pickle(file)
    stored, given = _weights(file, content)
    hparams = _plain_values(content.get("hparams"))
    foreign = EMBEDDING not in stored
    config = _config(file, stored, hparams, sizes)
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


# Sizes


def _config(file: Path, stored: Mapping[str, PickledTensor], hparams: Mapping[str, Any], sizes: Sizes) -> Config:
    """By what lies beside the file, by a name, or by the weights; what is given goes first."""
    config = None
    if sizes.model_name is not None:
        config = Config.from_name(sizes.model_name)
    elif (file.parent / HF_CONFIG).is_file():
        config = config_from_hf(read_json(file.parent / HF_CONFIG), str(file.parent / HF_CONFIG))
    elif (file.parent / LIT_CONFIG).is_file():
        config = _lit_config(file.parent / LIT_CONFIG)
    if config is None:
        config = _config_by_shapes(file, stored, hparams, sizes.n_head)
    elif sizes.n_head is not None and sizes.n_head != config.n_head:
        raise ValueError(f"n_head={sizes.n_head} is given, and the configuration of {file} says {config.n_head}")
    return _with_given(config, _rows(stored), sizes)


def _rows(stored: Mapping[str, PickledTensor]) -> int:
    embedding = stored.get(EMBEDDING) or stored[hf_names(EMBEDDING)[0]]
    return embedding.shape[0] if len(embedding.shape) == 2 else 0


def _with_given(config: Config, rows: int, sizes: Sizes) -> Config:
    given = {key: getattr(sizes, key) for key in ("block_size", "vocab_size") if getattr(sizes, key) is not None}
    if given.get("vocab_size", 0) > rows:
        raise ValueError(f"vocab_size={sizes.vocab_size} is more than the {rows} rows of the embedding; give fewer")
    return dataclasses.replace(config, **given)


def _lit_config(path: Path) -> Config:
    """lit-gpt's own file: all of its Config, of which the sizes count."""
    values = read_json(path)
    values = values.get("model_config", values)
    known = {field.name for field in dataclasses.fields(Config)}
    try:
        return Config(**{key: value for key, value in values.items() if key in known})
    except (ValueError, TypeError, ArithmeticError) as error:
        raise DataError(f"{path}: {error}; remove the file to go by the weights") from error


def _config_by_shapes(
    file: Path, stored: Mapping[str, PickledTensor], hparams: Mapping[str, Any], n_head: int | None
) -> Config:
    shape = _Shapes.of(file, stored)
    named = _named(hparams.get("model_name"))
    candidates = [named] if named is not None else []
    candidates += [Config.from_name(name) for name in (*NAMED_SIZES, f"{shape.n_layer}L{shape.n_embd}H")]
    fitting = {(each.n_head, each.n_query_groups): each for each in reversed(candidates) if shape.fits(each)}
    if named is not None and shape.fits(named):
        fitting = {(named.n_head, named.n_query_groups): named}
    if n_head is not None:
        fitting = {heads: each for heads, each in fitting.items() if heads[0] == n_head}
        return shape.config(n_head, next(iter(fitting.values()), None))
    if len(fitting) != 1:
        raise ValueError(
            f"{file}: {shape} are {'not those' if not fitting else 'those of several'} of prts's and TinyLlama's "
            f"models, so the number of heads is not known; give it with --n-head "
            f"(scripts/convert_hf_checkpoint.py, which writes a folder that says it)"
        )
    ((heads, like),) = fitting.items()
    return shape.config(heads[0], like)


def _named(name: Any) -> Config | None:
    try:
        return Config.from_name(name) if isinstance(name, str) else None
    except ValueError:
        return None


@dataclass(frozen=True)
class _Shapes:
    """Sizes that the weights tell."""

    file: Path
    n_layer: int
    n_embd: int
    rows: int
    intermediate_size: int
    query_rows: int
    """n_head * head_size."""
    key_rows: int
    """n_query_groups * head_size."""
    tied: bool

    @classmethod
    def of(cls, file: Path, stored: Mapping[str, PickledTensor]) -> _Shapes:
        def shape(name: str) -> tuple[int, int]:
            if name not in stored or len(stored[name].shape) != 2:
                raise DataError(f"{file} has no matrix {name}; {WAY_OUT}")
            return stored[name].shape  # type: ignore[return-value]

        if EMBEDDING in stored:
            rows, n_embd = shape(EMBEDDING)
            neurons, query_rows = shape(f"{BLOCK}mlp.swiglu.w1.weight")[0], shape(f"{BLOCK}attn.proj.weight")[1]
            key_rows = (shape(f"{BLOCK}attn.attn.weight")[0] - query_rows) // 2
            layers = {name.split(".")[2] for name in stored if name.startswith("transformer.h.")}
        else:
            rows, n_embd = shape(hf_names(EMBEDDING)[0])
            query, key, _ = (shape(name)[0] for name in hf_names(f"{BLOCK}attn.attn.weight"))
            query_rows, key_rows = query, key
            neurons = shape(hf_names(f"{BLOCK}mlp.swiglu.w1.weight")[0])[0]
            layers = {name.split(".")[2] for name in stored if name.startswith("model.layers.")}
        return cls(file, len(layers), n_embd, rows, neurons, query_rows, key_rows, HEAD not in stored)

    def fits(self, config: Config) -> bool:
        """Whether a model has these widths; any number of layers may have been stacked."""
        return (config.n_embd, config.intermediate_size) == (self.n_embd, self.intermediate_size) and (
            config.n_head * config.head_size,
            config.n_query_groups * config.head_size,
        ) == (self.query_rows, self.key_rows)

    def config(self, n_head: int, like: Config | None) -> Config:
        head_size = self.query_rows // n_head if n_head > 0 else 0
        if not head_size or self.query_rows % n_head or self.key_rows % head_size:
            raise ValueError(
                f"{self.file}: {n_head} heads do not divide {self.query_rows} rows of queries and {self.key_rows} of "
                f"keys; give another --n-head"
            )
        return Config(
            name=like.name if like is not None and like.n_layer == self.n_layer else "",
            block_size=like.block_size if like is not None else 2048,
            vocab_size=self.rows,
            padded_vocab_size=self.rows,
            n_layer=self.n_layer,
            n_head=n_head,
            n_embd=self.n_embd,
            n_query_groups=self.key_rows // head_size,
            head_size=head_size,
            intermediate_size=self.intermediate_size,
            tie_embeddings=self.tied,
        )

    def __str__(self) -> str:
        return (
            f"{self.n_layer} layers of width {self.n_embd} with {self.intermediate_size} neurons and "
            f"{self.query_rows + 2 * self.key_rows} rows of queries, keys and values"
        )


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
