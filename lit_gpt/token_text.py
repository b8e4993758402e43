"""Tokens as text for the eye: separators stay visible, and documents are found by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lit_gpt.packed_dataset import TokenFile
from lit_gpt.token_scan import read_tokens
from lit_gpt.tokenizer import Tokenizer

SEARCH_TOKENS = (1 << 14, 1 << 22)  # how far the ends of a document are looked for: most are short
TOKENS_PER_CHARACTER = 4  # a character may be four byte tokens
TOKENS_BEFORE = 16  # shown of what comes before a document
TOKENS_WITHOUT_SEPARATOR = 64  # shown where nothing says where documents begin


class TokenText:
    """Tokens as text in which separators, other control tokens and ids that do not exist are written as <|eos 2|>.

    Without a tokenizer the ids are written.
    """

    def __init__(self, tokenizer: Tokenizer | None, separator_id: int | None = None) -> None:
        self.tokenizer, self.separator_id = tokenizer, separator_id
        self._names = {} if separator_id is None else {separator_id: "separator"}
        if tokenizer is not None:
            named = {tokenizer.bos_id: "bos", tokenizer.eos_id: "eos"}
            self._names |= {token: name for token, name in named.items() if token is not None}
            self._is_text = self._ids_of_text(tokenizer)

    def _ids_of_text(self, tokenizer: Tokenizer) -> np.ndarray:
        """(vocab_size,) bool: ids that stand for text."""
        try:
            is_text = tokenizer.byte_lengths() > 0
        except ValueError:  # a kind of model whose pieces have no known bytes
            is_text = np.ones(tokenizer.vocab_size, dtype=bool)
        is_text[[token for token in self._names if token < len(is_text)]] = False
        return is_text

    def __call__(self, tokens: np.ndarray) -> str:
        """tokens: (k,) integers."""
        tokens = np.asarray(tokens, dtype=np.int64)
        if self.tokenizer is None:
            return " ".join(self.mark(token) if token in self._names else str(token) for token in tokens.tolist())
        exists = (tokens >= 0) & (tokens < len(self._is_text))
        is_text = exists & self._is_text[np.where(exists, tokens, 0)]
        starts = np.flatnonzero(np.diff(is_text, prepend=~is_text[:1]))
        runs = np.split(tokens, starts[1:])
        return "".join(
            self.tokenizer.decode(run) if is_text[start] else "".join(map(self.mark, run.tolist()))
            for start, run in zip(starts.tolist(), runs, strict=False)
        )

    def mark(self, token: int) -> str:
        """How a token that stands for no text is written."""
        name = self._names.get(token)
        return f"<|{token}|>" if name is None else f"<|{name} {token}|>"

    def piece(self, token: int) -> str:
        """The text of one id, with the space that tokenizers drop at the beginning of a text."""
        one, two = self(np.array([token])), self(np.array([token, token]))
        return two[len(one) :] if self.tokenizer is not None and two.startswith(one) else one

    def start(self, tokens: np.ndarray, characters: int) -> str:
        """At most this many characters of the beginning."""
        return self(tokens[: characters * TOKENS_PER_CHARACTER])[:characters]

    def end(self, tokens: np.ndarray, characters: int) -> str:
        """At most this many characters of the end."""
        text = self(tokens[max(0, len(tokens) - characters * TOKENS_PER_CHARACTER) :])
        return text[max(0, len(text) - characters) :]

    def is_longer(self, tokens: np.ndarray, characters: int) -> bool:
        """Whether the tokens have more text than this."""
        return len(tokens) > characters * TOKENS_PER_CHARACTER or len(self(tokens)) > characters


def visible(text: str) -> str:
    r"""One line that any terminal can show: line breaks and other invisible characters as \n, \t, \xa0."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True)
class Document:
    """A document as it lies in the file; its boundaries stand in the text as <|eos 2|>."""

    file: str
    first_token: int
    """Inside the file."""
    n_tokens: int
    before: str
    """The last tokens before it; empty at the beginning of the file."""
    start: str
    end: str
    """Empty if `start` is all of it."""
    is_whole: bool
    """Whether both its ends were found; without a known separator they never are."""


@dataclass(frozen=True)
class _Stretch:
    """Tokens of a file that belong together."""

    first_token: int
    tokens: np.ndarray
    is_whole: bool


def show_documents(files: Sequence[TokenFile], text: TokenText, count: int, characters: int) -> list[Document]:
    """`count` documents spread evenly over the tokens of all files, the first and the last of all among them.

    text: says which token separates them; without one, stretches of TOKENS_WITHOUT_SEPARATOR are shown.
    """
    places = _spread(files, count)
    if not places:
        return []
    at_start = _tokens(places[0][0], 0, 1)[0] == text.separator_id
    found: dict[tuple[str, int], Document] = {}
    for file, token in places:
        stretch = _document_around(file, token, text.separator_id, at_start)
        found[file.path, stretch.first_token] = _shown(file, stretch, text, characters)
    return list(found.values())


def _spread(files: Sequence[TokenFile], count: int) -> list[tuple[TokenFile, int]]:
    """(file, token inside it) of `count` tokens spread evenly over all, the first and the last among them."""
    n_tokens = np.fromiter((file.n_tokens for file in files), np.int64, len(files))
    ends = np.cumsum(n_tokens)
    total = int(n_tokens.sum())
    wanted = sorted({round(i * (total - 1) / max(1, count - 1)) for i in range(count)}) if total else []
    numbers = [int(np.searchsorted(ends, token, side="right")) for token in wanted]
    return [
        (files[number], token - int(ends[number] - n_tokens[number]))
        for number, token in zip(numbers, wanted, strict=True)
    ]


def _document_around(file: TokenFile, token: int, separator_id: int | None, at_start: bool) -> _Stretch:
    """The document that a token of a file belongs to; one that is very long is cut.

    at_start: whether documents begin with the separator; otherwise they end with it.
    """
    if separator_id is None:
        first = max(0, min(token, file.n_tokens - TOKENS_WITHOUT_SEPARATOR))
        return _Stretch(first, _tokens(file, first, first + TOKENS_WITHOUT_SEPARATOR), False)
    for reach in SEARCH_TOKENS:
        stretch = _document_within(file, token, separator_id, at_start, reach)
        if stretch.is_whole:
            break
    return stretch


def _document_within(file: TokenFile, token: int, separator_id: int, at_start: bool, reach: int) -> _Stretch:
    low, high = max(0, token - reach), min(file.n_tokens, token + reach)
    tokens = _tokens(file, low, high)
    starts = np.flatnonzero(tokens == separator_id) + (0 if at_start else 1)
    before, after = starts[starts <= token - low], starts[starts > token - low]
    start = int(before[-1]) if len(before) else 0
    stop = int(after[0]) if len(after) else len(tokens)
    has_start = bool(len(before)) or low == 0
    has_end = bool(len(after)) or (at_start and high == file.n_tokens)
    return _Stretch(low + start, tokens[start:stop], has_start and has_end)


def _tokens(file: TokenFile, start: int, stop: int) -> np.ndarray:
    """The tokens [start, stop) of a file, as far as it goes: (k,)."""
    stop = min(stop, file.n_tokens)
    return np.concatenate([np.empty(0, file.dtype), *read_tokens(file, start, stop - start)])


def _shown(file: TokenFile, stretch: _Stretch, text: TokenText, characters: int) -> Document:
    tokens, first = stretch.tokens, stretch.first_token
    is_longer = text.is_longer(tokens, characters)
    return Document(
        file=file.path,
        first_token=first,
        n_tokens=len(tokens),
        before=text(_tokens(file, max(0, first - TOKENS_BEFORE), first)),
        start=text.start(tokens, characters - characters // 3 if is_longer else characters),
        end=text.end(tokens, characters // 3) if is_longer else "",
        is_whole=stretch.is_whole,
    )
