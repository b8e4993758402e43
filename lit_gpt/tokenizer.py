"""Tokenizers behind one interface: SentencePiece `.model`, Hugging Face's files, or plain bytes."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from lit_gpt.atomic import write_atomically
from lit_gpt.errors import DataError
from lit_gpt.text_cuts import SPACE_PIECE, can_cut, parts

BOS_NAMES = ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>")
EOS_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>")
BYTES_MARKER = "tokenizer_bytes.json"
BYTES_DESCRIPTION = '{"kind": "bytes", "pad_id": 0, "bos_id": 1, "eos_id": 2, "first_byte_id": 3}\n'
FILE_NAMES = ("tokenizer.model", "tokenizer.json", BYTES_MARKER)  # in this order: both forms of Llama's are the same
VOCABULARY, MERGES = "vocab.json", "merges.txt"  # the two files of GPT-2, often with a prefix before both names
CONFIG = "tokenizer_config.json"


class Tokenizer(ABC):
    """Text to ids and back. Ids are int64; a missing bos or eos is None."""

    kind: str
    vocab_size: int
    """Ids are below this number."""
    bos_id: int | None
    eos_id: int | None
    puts_bos_first: bool
    """Whether models of this tokenizer expect bos before a text, as far as its files say; `encode` leaves it out."""
    fingerprint: str
    """sha256 of the file that `save` writes."""
    bytes_added_per_text: int
    """What `byte_lengths` counts beyond the text: 1 where encoding puts a space before it."""

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Tokenizer:
        """`bytes`, a SentencePiece `.model`, a `tokenizer.json`, GPT-2's `vocab.json` or `merges.txt` with the other
        beside it, or a folder that holds one of them.

        Raises:
            FileNotFoundError: nothing there.
            DataError: the file cannot be read as a tokenizer.
            ValueError: the file is of a kind that needs an extra which is not installed.
        """
        if str(path) == "bytes":
            return BytesTokenizer()
        file = tokenizer_file(Path(path))
        if file.name == BYTES_MARKER:
            return BytesTokenizer()
        return JsonTokenizer(file) if file.suffix == ".json" else SentencePieceTokenizer(file)

    def encode(self, text: str) -> np.ndarray:
        """(k,) int64 ids without bos and eos. Literal names of control tokens in the text stay text."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` for several texts at once."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids; control tokens leave no trace."""

    @abstractmethod
    def byte_lengths(self) -> np.ndarray:
        """(vocab_size,) int64: bytes of text that each id stands for; 0 for control tokens and unknown.

        The sum over the ids of an encoded text is its length in UTF-8 bytes, plus `bytes_added_per_text`, unless the
        tokenizer normalises the text or meets pieces it does not know.
        """

    @abstractmethod
    def save(self, directory: str | os.PathLike[str]) -> None:
        """Put the tokenizer's file into a folder, where `load` finds it."""


class BytesTokenizer(Tokenizer):
    """Every byte is a token: 0 pad, 1 bos, 2 eos as in Llama, byte b is 3 + b; 259 ids. Needs no file."""

    kind = "bytes"
    vocab_size = 259
    bos_id = 1
    eos_id = 2
    puts_bos_first = True
    bytes_added_per_text = 0
    FIRST_BYTE_ID = 3

    def __init__(self) -> None:
        self.fingerprint = hashlib.sha256(BYTES_DESCRIPTION.encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [
            np.frombuffer(well_formed(text).encode(), dtype=np.uint8).astype(np.int64) + self.FIRST_BYTE_ID
            for text in texts
        ]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, dtype=np.int64)
        return (ids[ids >= self.FIRST_BYTE_ID] - self.FIRST_BYTE_ID).astype(np.uint8).tobytes().decode(errors="replace")

    def byte_lengths(self) -> np.ndarray:
        lengths = np.ones(self.vocab_size, dtype=np.int64)
        lengths[: self.FIRST_BYTE_ID] = 0
        return lengths

    def save(self, directory: str | os.PathLike[str]) -> None:
        write_atomically(Path(directory) / BYTES_MARKER, BYTES_DESCRIPTION.encode())


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file."""

    kind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self.path = path
        self.fingerprint = file_sha256(path)
        self._processor = SentencePieceProcessor()
        try:
            self._processor.Load(str(path))
        except RuntimeError as error:
            raise DataError(f"{path} is not a SentencePiece model, or is damaged: {error}") from error
        self.vocab_size = self._processor.vocab_size()
        self.bos_id, self.eos_id = (
            None if each < 0 else each for each in (self._processor.bos_id(), self._processor.eos_id())
        )
        self.puts_bos_first = self.bos_id is not None  # the files do not say; Llama and its kin do
        first = self._processor.encode("a", out_type=str)
        self.bytes_added_per_text = int(bool(first) and first[0].startswith(SPACE_PIECE))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(self._ids(well_formed(text)), dtype=np.int64) for text in texts]

    def _ids(self, text: str) -> Sequence[int]:
        if not self._can_cut:
            return self._processor.encode(text)
        ids = array("q")  # a list takes four times as much, which a text of 100 MB makes felt
        for part in parts(text):
            ids.extend(self._processor.encode(part))
        return ids

    @cached_property
    def _can_cut(self) -> bool:
        return can_cut(self._processor)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._processor.decode([int(i) for i in ids])

    def byte_lengths(self) -> np.ndarray:
        return np.array([self._bytes_of(i) for i in range(self.vocab_size)], dtype=np.int64)

    def _bytes_of(self, i: int) -> int:
        processor = self._processor
        if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
            return 0
        return 1 if processor.is_byte(i) else len(processor.id_to_piece(i).replace(SPACE_PIECE, " ").encode())

    def save(self, directory: str | os.PathLike[str]) -> None:
        _write(Path(directory) / "tokenizer.model", self.path.read_bytes())


class JsonTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`; bos and eos come from the `tokenizer_config.json` beside it, or by name.

    GPT-2's pair of files is turned into the `tokenizer.json` that means the same, and saved as that.
    """

    kind = "tokenizer.json"

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(
                f"{path} needs the package tokenizers, which is not installed; "
                f"install the [prep] extra: pip install 'lit-grow[prep]'"
            ) from error

        self.path = path
        try:
            self._content = _as_tokenizer_json(path) if path.name.endswith(VOCABULARY) else path.read_bytes()
            self._description = json.loads(self._content)
            self._tokenizer = tokenizers.Tokenizer.from_buffer(self._content)
            self._vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
            self.vocab_size = max(self._vocabulary.values()) + 1  # get_vocab_size() is too small where ids have holes
        except OSError:
            raise
        except Exception as error:  # the Rust side raises bare Exception
            raise DataError(f"{path} is not a tokenizer of Hugging Face, or is damaged: {error}") from error
        self.fingerprint = hashlib.sha256(self._content).hexdigest()
        self._tokenizer.no_truncation()  # a stored truncation would cut documents without a word
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "</s>" in a web page is text, as in SentencePiece
        self._special = {token["id"] for token in self._description.get("added_tokens", []) if token["special"]}
        self.bos_id = self._named_id("bos_token", BOS_NAMES)
        self.eos_id = self._named_id("eos_token", EOS_NAMES)
        self.puts_bos_first = self.bos_id is not None and self._tokenizer.encode("a").ids[:1] == [self.bos_id]
        self.bytes_added_per_text = self._count_added_bytes()

    def _named_id(self, role: str, names: Sequence[str]) -> int | None:
        config = self.path.with_name(CONFIG)
        if config.is_file():
            token = json.loads(config.read_text(encoding="utf-8")).get(role)
            return self._vocabulary.get(token["content"] if isinstance(token, dict) else token)
        return next((self._vocabulary[name] for name in names if name in self._vocabulary), None)

    def _count_added_bytes(self) -> int:
        if self._is_byte_level:
            return 0
        tokens = self._tokenizer.encode("a", add_special_tokens=False).tokens
        return int(bool(tokens) and tokens[0].startswith(SPACE_PIECE))

    @property
    def _is_byte_level(self) -> bool:
        parts = [self._description.get(part) or {} for part in ("pre_tokenizer", "decoder")]
        return any('"ByteLevel"' in json.dumps(part) for part in parts)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast([well_formed(text) for text in texts], add_special_tokens=False)
        return [np.array(each.ids, dtype=np.int64) for each in encoded]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def byte_lengths(self) -> np.ndarray:
        model = self._description["model"]
        if not self._is_byte_level and not model.get("byte_fallback"):
            raise ValueError(
                f"{self.path}: bytes per token are known for byte-level and byte-fallback models only, "
                f"and this is {model.get('type')!r} with neither"
            )
        added = {token["id"] for token in self._description.get("added_tokens", [])}
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, i in self._vocabulary.items():
            lengths[i] = 0 if i in self._special else self._bytes_of(token, i in added)
        return lengths

    def _bytes_of(self, token: str, added: bool) -> int:
        if added:
            return len(token.encode())
        if self._is_byte_level:
            return len(token)  # each character of the alphabet stands for one byte
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return 1
        return len(token.replace(SPACE_PIECE, " ").encode())

    def save(self, directory: str | os.PathLike[str]) -> None:
        _write(Path(directory) / "tokenizer.json", self._content)
        config = self.path.with_name(CONFIG)
        if config.is_file():
            _write(Path(directory) / CONFIG, config.read_bytes())


def _as_tokenizer_json(vocabulary: Path) -> bytes:
    """The `tokenizer.json` of a byte-level BPE that is given as GPT-2's pair of files. Puts no space before a text."""
    ids = json.loads(vocabulary.read_text(encoding="utf-8"))
    lines = _merges_beside(vocabulary).read_text(encoding="utf-8").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    special = [name for name in (*BOS_NAMES, *EOS_NAMES) if name in ids]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[name], "content": name, **flags} for name in sorted(special, key=ids.get)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": ids, "merges": merges},
    }
    return (json.dumps(description, ensure_ascii=False, indent=1) + "\n").encode()


def _merges_beside(vocabulary: Path) -> Path:
    return vocabulary.with_name(vocabulary.name.removesuffix(VOCABULARY) + MERGES)


def well_formed(text: str) -> str:
    """The text with every lone surrogate replaced: such text, which JSON allows, has no UTF-8 form."""
    if text.isascii():  # known without looking at the characters
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def holds_tokenizer(folder: Path) -> bool:
    """Whether one of FILE_NAMES is in a folder."""
    return any((folder / name).is_file() for name in FILE_NAMES)


def tokenizer_beside(checkpoint: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer in the folder of a checkpoint, or None; one that cannot be read is none."""
    path = Path(checkpoint)
    folder = path if path.is_dir() else path.parent
    if not holds_tokenizer(folder):
        return None
    try:
        return Tokenizer.load(folder)
    except (DataError, ValueError):
        return None


def tokenizer_file(path: Path) -> Path:
    """The tokenizer file that a path means: itself, or the one inside a folder; of a pair, the vocabulary."""
    if not path.exists():
        raise FileNotFoundError(f"tokenizer {path} does not exist; give a file, a folder that holds one, or 'bytes'")
    if path.is_file():
        return _vocabulary_of_pair(path)
    for name in FILE_NAMES:
        if (path / name).is_file():
            return path / name
    pairs = [each for each in sorted(path.glob(f"*{VOCABULARY}")) if _merges_beside(each).is_file()]
    if len(pairs) > 1:
        raise ValueError(f"folder {path} holds several tokenizers: {', '.join(each.name for each in pairs)}; name one")
    if not pairs:
        known = ", ".join((*FILE_NAMES, f"{VOCABULARY} with {MERGES}"))
        raise FileNotFoundError(f"folder {path} holds no tokenizer; looked for {known}")
    return pairs[0]


def _vocabulary_of_pair(path: Path) -> Path:
    """The vocabulary where the path is one of GPT-2's two files, else the path."""
    if path.name.endswith(MERGES):
        vocabulary = path.with_name(path.name.removesuffix(MERGES) + VOCABULARY)
    elif path.name.endswith(VOCABULARY):
        vocabulary = path
    else:
        return path
    for file in (vocabulary, _merges_beside(vocabulary)):
        if not file.is_file():
            raise FileNotFoundError(f"tokenizer {path} is one of two files, and {file.name} is not beside it; add it")
    return vocabulary


def tokenizer_files(path: Path) -> list[Path]:
    """Every file that decides what the tokenizer behind a path does."""
    file = tokenizer_file(path)
    pair = [_merges_beside(file)] if file.name.endswith(VOCABULARY) else []
    config = file.with_name(CONFIG)  # says which token is eos
    return [file, *pair, *([config] if config.is_file() else [])]


def _write(dst: Path, content: bytes) -> None:
    """Also where the file is in its place already, which is then left as it is."""
    if not (dst.is_file() and dst.read_bytes() == content):
        write_atomically(dst, content)
