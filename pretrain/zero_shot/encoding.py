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
        ValueError: one that is longer than the model reads, or nothing to put before a text.
    """
    requests = [request for example in examples.examples for request in example.requests]
    rolling = examples.task.kind == "text"
    rows: list[Row] = []
    for start in range(0, len(requests), TEXTS_AT_A_TIME):
        part = requests[start : start + TEXTS_AT_A_TIME]
        ids = _ids_of(part, tokenizer)
        for number, (context, continuation) in enumerate(part, start):
            try:
                if rolling:
                    rows += _windows(number, _with_first(ids[continuation], first), first, block_size)
                else:
                    rows.append(_row(number, *_pair(context, continuation, ids, first), block_size))
            except ValueError as error:
                text = (context + continuation)[-60:]
                kind = DataError if isinstance(error, _NoToken) else ValueError
                raise kind(f"task {examples.task.name}, ... {text!r}: {error}") from None
    return rows


class _NoToken(ValueError):
    """A continuation is not seen by the tokenizer."""


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
        raise ValueError("nothing can stand before the text: its tokenizer has neither bos nor eos; give --first-id ID")
    return np.array([first.prefix_id], dtype=np.int64)


def _row(request: int, before: np.ndarray, after: np.ndarray, block_size: int) -> Row:
    """The last block_size + 1 tokens: the last is not read, the first not scored."""
    if not len(after):
        raise _NoToken("the tokenizer makes no token of the continuation")
    if len(after) > block_size:
        raise ValueError(f"{len(after)} tokens to score, and the model reads block_size={block_size}")
    return Row(request, np.concatenate((before, after))[-(block_size + 1) :], len(after))


def _windows(request: int, ids: np.ndarray, first: FirstToken, block_size: int) -> Iterator[Row]:
    """A text in parts that the model can read. Each token is scored once, given all of its part's tokens before it.

    The first part begins with the prefix, so that its first token, too, is scored - also where that is the first
    token of all texts. The last part reads as far back as the model can.
    """
    prefixed = np.concatenate((_prefix(first), ids))
    for done in range(0, len(ids), block_size):
        end = min(done + block_size, len(ids))
        yield Row(request, prefixed[max(0, end - block_size) : end + 1], end - done)
