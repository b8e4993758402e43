"""The sizes of a model whose file holds weights only: from what lies beside it, from a name, or from the shapes.

Widths and rows are in the shapes; that rows of queries are so many heads is not. The models of the lineage are known by
their widths and by the rows of the fused matrix, whatever their depth: stacking changes that alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_gpt.axes import EMBEDDING, HEAD
from lit_gpt.config import NAMED_SIZES, Config
from lit_gpt.errors import DataError
from lit_gpt.hf import config_from_hf, hf_names
from lit_gpt.pickles import PickledTensor
from lit_gpt.problems import read_json

HF_CONFIG, LIT_CONFIG = "config.json", "lit_config.json"
OWN_SIZES = "lit_grow_config"
"""Key of a file that was written here: all of its Config."""
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


def config_of(
    file: Path,
    stored: Mapping[str, PickledTensor],
    hparams: Mapping[str, Any],
    sizes: Sizes,
    own: Mapping[str, Any] | None = None,
) -> Config:
    """By what the file says, what lies beside it, by a name, or by the weights; a name that is given goes first."""
    config = None
    if sizes.model_name is not None:
        config = Config.from_name(sizes.model_name)
    elif own is not None:
        config = _own_config(file, own)
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


def _own_config(file: Path, values: Mapping[str, Any]) -> Config:
    try:
        return Config.from_dict(dict(values))
    except (ValueError, TypeError, ArithmeticError, KeyError) as error:
        raise DataError(f"{file} says sizes that are none: {error}; get it again") from error


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
