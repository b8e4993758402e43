"""Checkpoints and tokenizers of llama2.c: read into our names and layout, or rewritten in exchange form.

The formats are those of github.com/karpathy/llama2.c, export.py: "legacy" (version 0: seven int32, then fp32 tensors)
and version 1 (the same with a magic number and a header of 256 bytes). Little-endian, every tensor stacked over the
layers, row-major. RoPE rotates neighbours (2i, 2i+1) there and halves (i, i + D/2) here, so the rows of q and k move.

Legend: C n_embd, H n_head, G n_query_groups, D head_size, F intermediate_size, V vocabulary, L layers, T block_size.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lit_gpt.axes import EMBEDDING, FINAL_NORM, HEAD, parameter_shapes, with_layer
from lit_gpt.config import Config
from lit_gpt.errors import DataError
from lit_gpt.exchange import SENTENCEPIECE, write_exchange
from lit_gpt.hf import fuse_qkv
from lit_gpt.text_cuts import SPACE_PIECE
from lit_gpt.tokenizer import file_sha256

MAGIC = 0x616B3432  # "ak42", of every version but the first
SIZES = struct.Struct("<7i")  # dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len
VERSION_1 = struct.Struct("<Ii7iB")
VERSION_1_BYTES = 256
NORM_EPS = 1e-5  # this and the next are constants of run.c, not in the file
ROPE_BASE = 10000.0
QKV = ("q", "k", "v")
COS, SIN = "cos", "sin"
TOKENIZERS, CHECKPOINTS = "tok*.bin", "*.bin"
FIRST_BYTE_ID = 3
CONTROL = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2
WAY_OUT = "get it again, or give another file"


@dataclass(frozen=True)
class Layout:
    """What a header says: which tensors follow it, and in which order."""

    config: Config
    version: int
    offset: int
    """Bytes before the first tensor."""
    shapes: dict[str, tuple[int, ...]]
    """Our name (the one within a block, with L in front of the shape), q, k, v, cos or sin -> shape, as in the file."""

    @property
    def n_bytes(self) -> int:
        """Size of the whole file."""
        return self.offset + 4 * sum(map(prod, self.shapes.values()))


def read_llama2c(path: str | Path) -> tuple[Config, dict[str, Tensor]]:
    """A model of llama2.c: its sizes, and its weights under our names, fp32.

    Args:
        path: the `.bin` file, or a folder that holds one beside its tokenizer.

    Returns:
        The Config, and a state dict with the names and shapes of `parameter_shapes`.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: the folder holds several checkpoints.
        DataError: not a checkpoint of llama2.c, of a version that is not read, truncated, or its sizes do not add up.
    """
    path = checkpoint_file(Path(path))
    layout = _read_layout(path)
    arrays = _map_arrays(path, layout)
    _check_rope(path, arrays)
    config = layout.config
    weights = {}
    for name in parameter_shapes(config):
        if name in arrays:
            weights[name] = _tensor(arrays[name])
    for layer in range(config.n_layer):
        q, k, v = (_tensor(arrays[part][layer]) for part in QKV)
        q, k = (_halves_from_neighbours(part, config.head_size) for part in (q, k))
        weights[with_layer("attn.attn.weight", layer)] = fuse_qkv(q, k, v, config)
        for name in ("norm_1", "attn.proj", "norm_2", "mlp.swiglu.w1", "mlp.swiglu.w2", "mlp.swiglu.w3"):
            weights[with_layer(f"{name}.weight", layer)] = _tensor(arrays[f"{name}.weight"][layer])
    return config, {name: weights[name] for name in parameter_shapes(config)}


def to_exchange(src: str | Path, dst: str | Path) -> Path:
    """Rewrite a model of llama2.c in exchange form, with the tokenizer (`tok*.bin`) that lies beside it, if any.

    Args:
        src: the `.bin` file, or a folder that holds one beside its tokenizer.
        dst: the directory to make; must not exist.

    Raises:
        FileNotFoundError, ValueError, DataError: as `read_llama2c` and `sentencepiece_model`; or tokenizers lie there
            and none has the model's number of tokens, or several have.
        OSError: `dst` exists already or cannot be written.
    """
    path = checkpoint_file(Path(src))
    config, weights = read_llama2c(path)
    provenance = {"converted_from": {"format": "llama2.c", "file": path.name, "sha256": file_sha256(path)}}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_dir = rewrite_tokenizer(path, config.vocab_size, Path(folder))
        return write_exchange(dst, config, weights, tokenizer_dir=tokenizer_dir, provenance=provenance)


def rewrite_tokenizer(checkpoint: Path, vocab_size: int, folder: Path) -> Path | None:
    """Write the tokenizer beside a checkpoint into `folder` as SentencePiece has it; None if there is none."""
    tokenizer = _tokenizer_beside(checkpoint, vocab_size)
    if tokenizer is None:
        return None
    (folder / SENTENCEPIECE).write_bytes(sentencepiece_model(tokenizer))
    return folder


def is_llama2c(path: Path) -> bool:
    """Whether a path means a checkpoint of llama2.c, by its header and size."""
    try:
        _read_layout(checkpoint_file(path))
    except (DataError, ValueError, OSError):
        return False
    return True


def checkpoint_file(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the one inside a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several.
    """
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"checkpoint {path} does not exist; give a .bin file of llama2.c, or its folder")
        return path
    tokenizers = set(path.glob(TOKENIZERS))
    found = sorted(each for each in path.glob(CHECKPOINTS) if each not in tokenizers)
    if not found:
        raise FileNotFoundError(f"folder {path} holds no checkpoint of llama2.c; looked for {CHECKPOINTS}")
    if len(found) > 1:
        names = ", ".join(each.name for each in found)
        raise ValueError(f"folder {path} holds several checkpoints: {names}; give the path of one")
    return found[0]


def _read_layout(path: Path) -> Layout:
    with open(path, "rb") as file:
        head = file.read(VERSION_1.size)
    if len(head) < SIZES.size:
        raise DataError(f"{path} has {len(head)} bytes, no room for a header of llama2.c; {WAY_OUT}")
    if int.from_bytes(head[:4], "little") == MAGIC:
        layout = _layout_of_version_1(path, head)
    else:
        sizes = SIZES.unpack_from(head)
        config = _config(path, sizes, tied=sizes[5] > 0)
        layout = Layout(config, 0, SIZES.size, _legacy_shapes(config))
    size = path.stat().st_size
    if size != layout.n_bytes:
        what = "is cut off" if size < layout.n_bytes else "is not what its header says"
        raise DataError(
            f"{path} {what}: it has {size:,} bytes, and {_described(layout.config)} take {layout.n_bytes:,} in a "
            f"version {layout.version} file of llama2.c; {WAY_OUT}"
        )
    return layout


def _layout_of_version_1(path: Path, head: bytes) -> Layout:
    version = int.from_bytes(head[4:8], "little", signed=True)
    if version != 1:
        raise DataError(
            f"{path} is a version {version} file of llama2.c, and only 0 and 1 are read (2 is quantised to 8 bits); "
            f"export the model again with `export.py --version 1`"
        )
    if len(head) < VERSION_1.size:
        raise DataError(f"{path} is cut off in its header; {WAY_OUT}")
    *sizes, tied = VERSION_1.unpack(head)[2:]
    if tied not in (0, 1):
        raise DataError(f"{path}: its header says {tied} where 0 or 1 tells whether the head is tied; {WAY_OUT}")
    config = _config(path, sizes, tied=bool(tied))
    return Layout(config, 1, VERSION_1_BYTES, _version_1_shapes(config))


def _config(path: Path, sizes: Sequence[int], *, tied: bool) -> Config:
    n_embd, intermediate_size, n_layer, n_head, n_query_groups, vocab_size, block_size = sizes
    try:
        return Config(
            block_size=block_size,
            vocab_size=abs(vocab_size),  # the sign is version 0's flag of an untied head
            padded_vocab_size=abs(vocab_size),
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_embd,
            n_query_groups=n_query_groups,
            intermediate_size=intermediate_size,
            norm_eps=NORM_EPS,
            rope_base=ROPE_BASE,
            tie_embeddings=tied,
        )
    except (ValueError, ArithmeticError) as error:
        reasons = str(error).replace("\n", "; ")
        raise DataError(f"{path} is not a checkpoint of llama2.c, or its header is damaged: {reasons}") from error


def _described(config: Config) -> str:
    return (
        f"{config.n_layer} layers of width {config.n_embd} with {config.n_head} heads in {config.n_query_groups} "
        f"groups, {config.intermediate_size} neurons, {config.vocab_size} tokens and {config.block_size} positions"
    )


def _matrices(config: Config) -> dict[str, tuple[int, ...]]:
    """The matrices of the blocks. Their w1, w2, w3 are gate, down and up; ours gate, up and down."""
    L, C, F = config.n_layer, config.n_embd, config.intermediate_size
    heads, groups = config.n_head * config.head_size, config.n_query_groups * config.head_size
    return {
        "q": (L, heads, C),
        "k": (L, groups, C),
        "v": (L, groups, C),
        "attn.proj.weight": (L, C, heads),
        "mlp.swiglu.w1.weight": (L, F, C),
        "mlp.swiglu.w3.weight": (L, C, F),
        "mlp.swiglu.w2.weight": (L, F, C),
    }


def _legacy_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    L, C, V = config.n_layer, config.n_embd, config.padded_vocab_size
    matrices = _matrices(config)
    attention = {name: matrices.pop(name) for name in (*QKV, "attn.proj.weight")}
    table = (config.block_size, config.head_size // 2)
    head = {} if config.tie_embeddings else {HEAD: (V, C)}
    norms_and_matrices = {"norm_1.weight": (L, C), **attention, "norm_2.weight": (L, C), **matrices}
    return {EMBEDDING: (V, C), **norms_and_matrices, FINAL_NORM: (C,), COS: table, SIN: table, **head}


def _version_1_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    L, C, V = config.n_layer, config.n_embd, config.padded_vocab_size
    norms = {"norm_1.weight": (L, C), "norm_2.weight": (L, C), FINAL_NORM: (C,)}
    head = {} if config.tie_embeddings else {HEAD: (V, C)}
    return {**norms, EMBEDDING: (V, C), **_matrices(config), **head}


def _map_arrays(path: Path, layout: Layout) -> dict[str, np.ndarray]:
    """Every tensor of the file as a view of it; nothing is read yet."""
    floats = np.memmap(path, dtype="<f4", mode="r", offset=layout.offset)
    arrays, start = {}, 0
    for name, shape in layout.shapes.items():
        arrays[name] = floats[start : start + prod(shape)].reshape(shape)
        start += prod(shape)
    return arrays


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))


def _halves_from_neighbours(rows: Tensor, head_size: int) -> Tensor:
    """(heads D, C) whose pairs are neighbours -> the same whose pairs are i and i + D/2."""
    pairs = rows.view(-1, head_size // 2, 2, rows.size(1))
    return pairs.transpose(1, 2).reshape(rows.shape)


def _check_rope(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Version 0 carries tables that run.c no longer reads: zeros are fine, another base than run.c's is not."""
    if COS not in arrays or len(arrays[COS]) < 2 or not (arrays[COS].any() or arrays[SIN].any()):
        return
    cos, sin = arrays[COS][1], arrays[SIN][1]
    angles = ROPE_BASE ** (-np.arange(cos.size) / cos.size)
    if not (np.allclose(cos, np.cos(angles), atol=1e-5) and np.allclose(sin, np.sin(angles), atol=1e-5)):
        raise DataError(
            f"{path}: its rotary tables are not those of base {ROPE_BASE:g}, the one that llama2.c has; "
            f"the file is damaged, or the model is none of llama2.c's"
        )


def read_tokenizer(path: str | Path) -> list[tuple[bytes, float]]:
    """Every token of a `tok*.bin` with its score, in the order of the ids.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is not such a file, or is cut off.
    """
    content = Path(path).read_bytes()
    tokens = []
    try:
        (longest,) = struct.unpack_from("<I", content)
        at = 4
        while at < len(content):
            score, length = struct.unpack_from("<fI", content, at)
            at += 8 + length
            if length > longest or at > len(content):
                raise DataError(f"{path}: token {len(tokens)} runs past its limit or the end of the file; {WAY_OUT}")
            tokens.append((content[at - length : at], score))
    except struct.error as error:
        raise DataError(f"{path} is no tokenizer of llama2.c, or is cut off: {error}; {WAY_OUT}") from error
    return tokens


def sentencepiece_model(path: str | Path) -> bytes:
    """The content of a SentencePiece `.model` that encodes as llama2.c does with a `tok*.bin`.

    A byte-fallback BPE with a space before the text, and no other normalising.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is not such a file, is cut off, or its first 259 tokens are not the control tokens and the bytes.
    """
    tokens = read_tokenizer(path)
    pieces = [_piece(path, number, token) for number, (token, _) in enumerate(tokens)]
    fixed = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256))]
    if pieces[: len(fixed)] != fixed:
        raise DataError(f"{path} does not begin with {', '.join(CONTROL)} and the 256 bytes; llama2.c needs them there")
    repeated = len(pieces) - len(set(pieces))
    if repeated:
        raise DataError(f"{path} holds {repeated} tokens twice; {WAY_OUT}")
    model = b""
    for number, (piece, (_, score)) in enumerate(zip(pieces, tokens, strict=True)):
        model += _field(1, _field(1, piece.encode()) + _float_field(2, score) + _field(3, _piece_type(number)))
    bpe = 2
    trainer = _field(3, bpe) + _field(4, len(pieces)) + _field(35, True)  # model_type, vocab_size, byte_fallback
    normalizer = _field(1, b"identity") + _field(4, False)  # name, remove_extra_whitespaces
    return model + _field(2, trainer) + _field(3, normalizer)


def _piece(path: str | Path, number: int, token: bytes) -> str:
    """export.py writes spaces for SentencePiece's marks, and line breaks around bos and eos."""
    try:
        text = token.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: token {number} is not UTF-8 ({error}); {WAY_OUT}") from error
    if not text:
        raise DataError(f"{path}: token {number} is empty; {WAY_OUT}")
    return text.strip("\n") if number in (1, 2) else text.replace(" ", SPACE_PIECE)


def _piece_type(number: int) -> int:
    normal, unknown, control, byte = 1, 2, 3, 6  # ModelProto.SentencePiece.Type
    if number < FIRST_BYTE_ID:
        return control if number else unknown
    return byte if number < FIRST_BYTE_ID + 256 else normal


def _field(number: int, value: int | bytes) -> bytes:
    """One field of a protocol buffer: a varint, or a string with its length."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3) + _varint(value)


def _float_field(number: int, value: float) -> bytes:
    return _varint(number << 3 | 5) + struct.pack("<f", value)


def _varint(value: int) -> bytes:
    def parts() -> Iterator[int]:
        rest = int(value)
        while rest > 127:
            yield rest & 127 | 128
            rest >>= 7
        yield rest

    return bytes(parts())


def _tokenizer_beside(checkpoint: Path, vocab_size: int) -> Path | None:
    found = {path: len(read_tokenizer(path)) for path in sorted(checkpoint.parent.glob(TOKENIZERS))}
    fitting = [path for path, size in found.items() if size == vocab_size]
    if len(fitting) == 1 or not found:
        return fitting[0] if fitting else None
    sizes = ", ".join(f"{path.name} ({size})" for path, size in found.items())
    problem = "several fit" if fitting else "none fits"
    raise DataError(
        f"{checkpoint} has {vocab_size} tokens, and of the tokenizers beside it {problem}: {sizes}; "
        f"leave the one that belongs to it in the folder"
    )
