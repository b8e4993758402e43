"""Requests as tokens, by the rules of lm-evaluation-harness: what comes first, where two texts part, what is cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lit_gpt.errors import DataError
from lit_gpt.tokenizer import Tokenizer
from pretrain.zero_shot.examples import Examples

TEXTS_AT_A_TIME = 4096  # distinct ones whose ids are in memory


@dataclass(frozen=True)
class Row:
    """One sequence for the model; its last tokens are scored."""

    request: int
    """To which request's log-likelihood it adds."""
    tokens: np.ndarray
    """(k,) int64, k <= block_size + 1: each but the last is read, each but the first may be scored."""
    n_scored: int


@dataclass(frozen=True)
class FirstToken:
    """What every text begins with."""

    id: int | None
    """None: nothing is put before a text."""
    prefix_id: int | None
    """What stands before a text that is scored from its first token on."""


def default_first_id(tokenizer: Tokenizer, separator_id: int | None) -> int | None:
    """What a text begins with where nobody says it: what separates documents in training, else bos where it belongs.

    separator_id: as state.json says it; None if it does not.
    """
    if separator_id is not None:
        return separator_id
    return tokenizer.bos_id if tokenizer.puts_bos_first else None


def first_token(tokenizer: Tokenizer, first_id: int | None) -> FirstToken:
    """As the harness chooses the prefix: the first token, else the beginning or the end of a text."""
    for each in (first_id, tokenizer.bos_id, tokenizer.eos_id):
        if each is not None:
            return FirstToken(first_id, each)
    return FirstToken(None, None)


def encode(examples: Examples, tokenizer: Tokenizer, first: FirstToken, block_size: int) -> list[Row]:
    """Rows of all requests, in order.

    Raises:
        DataError: a continuation that has no token of its own.
        ValueError: nothing can be put before a text.
    """
    requests = [request for example in examples.examples for request in example.requests]
    rolling = examples.task.kind == "text"
    rows: list[Row] = []
    for start in range(0, len(requests), TEXTS_AT_A_TIME):
        part = requests[start : start + TEXTS_AT_A_TIME]
        ids = _ids_of(part, tokenizer)
        for number, (context, continuation) in enumerate(part, start):
            if rolling:  # the first token, too, is scored, as the harness does it
                before, after = _prefix(first), _with_first(ids[continuation], first)
            else:
                before, after = _pair(context, continuation, ids, first)
            if not len(after):
                text = (context + continuation)[-60:]
                raise DataError(f"task {examples.task.name}: the tokenizer makes no token of the end of ...{text!r}")
            rows += rows_of(number, np.concatenate((before, after)), len(after), block_size)
    return rows


def parted(context: str, continuation: str) -> tuple[str, str]:
    """Spaces at the end of a context belong to its continuation: tokens of most tokenizers begin with their space."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _ids_of(requests: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """The ids of every text that is needed: contexts, and what they make with their continuations."""
    texts: dict[str, None] = {}
    for context, continuation in requests:
        needed = (parted(context, continuation)[0], context + continuation) if context else (continuation,)
        texts |= dict.fromkeys(needed)
    return dict(zip(texts, tokenizer.encode_batch(list(texts)), strict=True))


def _with_first(ids: np.ndarray, first: FirstToken) -> np.ndarray:
    return ids if first.id is None else np.concatenate(([first.id], ids))


def _pair(
    context: str, continuation: str, ids: dict[str, np.ndarray], first: FirstToken
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a context and of its continuation: what both together have beyond the context's number of tokens."""
    if context:
        before = _with_first(ids[parted(context, continuation)[0]], first)
        whole = _with_first(ids[context + continuation], first)
        after = whole[len(before) :]
        if len(before):
            return before, after
        return _prefix(first), after  # a context of spaces alone, and no first token
    after, prefix = ids[continuation], _prefix(first)
    if len(after) and after[0] == prefix[0]:
        return after[:1], after[1:]
    return prefix, after


def _prefix(first: FirstToken) -> np.ndarray:
    if first.prefix_id is None:
        raise ValueError(
            "nothing can stand before the text: its tokenizer has neither bos nor eos; give --first-id ID, or "
            "leave out tasks whose texts are scored from their beginning on"
        )
    return np.array([first.prefix_id], dtype=np.int64)


def rows_of(request: int, tokens: np.ndarray, n_scored: int, block_size: int) -> Iterator[Row]:
    """A sequence (k,) as rows that the model can read, each of its last n_scored < k tokens scored once.

    Mostly that is one row, the last block_size + 1 tokens: the last is not read, the first not scored. With more to
    score, as in a whole text, every row scores block_size tokens and the last row the rest, reading as far back as the
    model can.
    """
    for start in range(len(tokens) - n_scored, len(tokens), block_size):
        end = min(start + block_size, len(tokens))
        yield Row(request, tokens[max(0, end - block_size - 1) : end], end - start)
