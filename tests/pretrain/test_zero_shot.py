"""The evaluator: tokens by the harness's rules, log-likelihoods and metrics by hand, and batches that do not matter."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grow.scores import AVERAGED
from lit_gpt.errors import DataError
from lit_gpt.kernels.loss import IGNORE_INDEX
from lit_gpt.model import GPT
from lit_gpt.tokenizer import Tokenizer
from pretrain.world import World
from pretrain.zero_shot.encoding import FirstToken, Row, encode, first_token
from pretrain.zero_shot.evaluator import check_vocabulary, evaluate_tasks
from pretrain.zero_shot.examples import Example, Examples
from pretrain.zero_shot.metrics import Score, average, scores_of
from pretrain.zero_shot.scoring import score, token_scores
from pretrain.zero_shot.task import built_in_tasks, find_tasks
from tests.toys import toy_config, toy_model
from tests.zero_shot import DOCUMENTS, NAMES, write_data

BYTES = Tokenizer.load("bytes")
BOS = FirstToken(BYTES.bos_id, BYTES.bos_id)
BLOCK_SIZE = 64


def bytes_model(seed: int = 0, **sizes: object) -> GPT:
    """A toy for the bytes tokenizer, in float64: nothing is lost in rounding."""
    config = toy_config(vocab_size=259, padded_vocab_size=260, block_size=BLOCK_SIZE, **sizes)
    return toy_model(config, seed=seed, dtype=torch.float64).requires_grad_(False)


def ids(text: str) -> list[int]:
    return BYTES.encode(text).tolist()


def examples(name: str, *found: Example) -> Examples:
    return Examples(built_in_tasks()[name], found, None)


def asked(*requests: tuple[str, str], name: str = "piqa", **rest: object) -> Examples:
    return examples(name, Example(requests, **rest))


def one_row(context: str, continuation: str, *, first: FirstToken = BOS, block_size: int = BLOCK_SIZE) -> Row:
    (row,) = encode(asked((context, continuation)), BYTES, first, block_size)
    return row


# Tokens


def test_bos_comes_before_context_and_continuation_as_one_text():
    row = one_row("a b", " cd")
    assert row.tokens.tolist() == [1, *ids("a b cd")] and row.n_scored == 3


def test_spaces_at_the_end_of_a_context_are_scored_with_the_continuation():
    row = one_row("a b \n", "cd")
    assert row.tokens.tolist() == [1, *ids("a b \ncd")] and row.n_scored == 4


def test_what_is_scored_begins_where_the_tokens_of_the_context_end(data_dir):
    tokenizer = Tokenizer.load(data_dir("tokenizers/sp1000/test_model.model"))
    context, continuation = "The water", "fall is here"

    (row,) = encode(asked((context, continuation)), tokenizer, FirstToken(1, 1), BLOCK_SIZE)

    before, whole = tokenizer.encode(context).tolist(), tokenizer.encode(context + continuation).tolist()
    assert row.tokens.tolist() == [1, *before, *whole[len(before) :]] and row.n_scored == len(whole) - len(before)


def test_what_does_not_fit_is_cut_off_at_the_left():
    row = one_row("abcdefgh", " ij", block_size=6)
    assert row.tokens.tolist() == ids("efgh ij") and row.n_scored == 3  # 7 tokens: 6 are read, 6 could be scored


def test_without_a_first_token_nothing_is_put_before_a_text_but_what_is_needed():
    first = first_token(BYTES, None)
    assert first == FirstToken(None, BYTES.bos_id)
    assert one_row("ab", " c", first=first).tokens.tolist() == ids("ab c")
    row = one_row("", "ab", first=first)
    assert row.tokens.tolist() == [1, *ids("ab")] and row.n_scored == 2


def test_an_empty_context_whose_continuation_begins_with_the_prefix_is_not_prefixed_again():
    first = FirstToken(ids("a")[0], ids("a")[0])
    row = one_row("", "ab", first=first)
    assert row.tokens.tolist() == ids("ab") and row.n_scored == 1


@pytest.mark.parametrize("length", [1, 5, 6, 7, 11, 12, 13, 40])
def test_a_whole_text_is_scored_once_per_token_the_first_one_too(length):
    text = "".join(chr(ord("a") + i % 26) for i in range(length))
    tokens = [1, *ids(text)]

    rows = encode(asked(("", text), name="wikitext"), BYTES, BOS, 6)

    scored = [token for row in rows for token in row.tokens[len(row.tokens) - row.n_scored :].tolist()]
    assert scored == tokens, "bos is put before the text and scored, given another one"
    assert rows[0].tokens[0] == 1
    stream = [1, *tokens]
    ends = np.cumsum([row.n_scored for row in rows])
    for row, end in zip(rows, ends, strict=True):
        assert row.tokens.tolist() == stream[max(0, end - 6) : end + 1], "as much context as the model can read"


def test_a_continuation_longer_than_the_model_reads_is_scored_in_parts():
    rows = encode(asked(("abcd", " efghijkl")), BYTES, BOS, 6)
    assert [(row.tokens.tolist(), row.n_scored) for row in rows] == [(ids("d efghi"), 6), (ids("fghijkl"), 3)]


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(DataError, match="piqa: the tokenizer makes no token of the end of ...'ab'"):
        one_row("ab", "")
    with pytest.raises(ValueError, match="neither bos nor eos"):
        one_row("", "ab", first=FirstToken(None, None))
    with pytest.raises(ValueError, match="the tokenizer has 259 tokens, the model 258 rows"):
        check_vocabulary(BYTES, 258)
    with pytest.raises(ValueError, match="the first token, 300, must be below the 260 rows"):
        check_vocabulary(BYTES, 260, 300)


# Log-likelihoods


def by_hand(model: GPT, row: Row) -> tuple[float, int]:
    """One row by itself, from all its logits: the sum of log-probabilities, and tokens that were not the likeliest."""
    log_probs = model(torch.from_numpy(row.tokens[None, :-1])).log_softmax(-1)[0]
    total, misses = 0.0, 0
    for position in range(len(row.tokens) - 1 - row.n_scored, len(row.tokens) - 1):
        target = int(row.tokens[position + 1])
        total += log_probs[position, target].item()
        misses += int(log_probs[position].argmax()) != target
    return total, misses


def test_log_likelihoods_are_those_computed_by_hand():
    model = bytes_model()
    text = asked(("", "a text that is longer than one window, " * 3), name="wikitext")
    pairs = asked(("Why?", " so"), ("Why not?", " because of that"), ("x" * 80, " cut off"))
    for each in (text, pairs):
        rows = encode(each, BYTES, BOS, BLOCK_SIZE)
        expected = np.zeros((rows[-1].request + 1, 2))
        for row in rows:
            expected[row.request] += by_hand(model, row)

        found = score(rows, partial(token_scores, model), 4, "cpu")

        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_continuation_that_the_model_would_write_has_no_misses():
    model = bytes_model()
    tokens = [1, *ids("ab")]
    for _ in range(3):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    greedy, other = np.array(tokens), np.array([*tokens[:-1], (tokens[-1] + 1) % 259])

    found = score([Row(0, greedy, 3), Row(1, other, 3)], partial(token_scores, model), 2, "cpu")

    assert found[:, 1].tolist() == [0, 1]


@given(
    batch_size=st.integers(1, 9),
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=9),
)
def test_batches_do_not_matter(batch_size, lengths):
    model = bytes_model()
    random = np.random.default_rng(0)
    rows = [Row(i // 2, random.integers(0, 259, a + b), b) for i, (a, b) in enumerate(lengths)]

    alone = score(rows, partial(token_scores, model), 1, "cpu")
    together = score(rows, partial(token_scores, model), batch_size, "cpu")

    np.testing.assert_allclose(together, alone, rtol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_processes_that_take_turns_score_to_the_bit_what_one_does(size):
    """Also requests whose rows fall to several processes: sums are not made in another order."""
    model = bytes_model()
    random = np.random.default_rng(0)
    rows = [Row(i // 5, random.integers(0, 259, 3 + i), 2) for i in range(11)]
    calls, tables = [], []

    class Part(World):
        def sum(self, table: np.ndarray) -> np.ndarray:
            tables.append(table)
            return sum(tables)

    def counted(idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(idx.shape)
        return token_scores(model, idx, targets)

    parts = [score(rows, counted, 2, "cpu", Part(rank=rank, size=size)) for rank in range(size)]

    assert np.array_equal(parts[-1], score(rows, partial(token_scores, model), 2, "cpu")), "the last one saw all"
    assert len(calls) == size * math.ceil(6 / size), "all compute equally many batches"
    assert score(rows, counted, 2, "cpu", interrupted=lambda: True) is None


def test_the_head_is_computed_for_scored_tokens_alone():
    model = bytes_model()
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    targets = torch.full((2, 8), IGNORE_INDEX)
    targets[:, -2:] = 5

    found = token_scores(model, torch.ones((2, 8), dtype=torch.int64), targets)

    assert seen == [4] and found.shape == (4, 2)


# Metrics


def test_accuracies_are_those_of_the_likeliest_choice_and_of_the_likeliest_per_character():
    each = [Example((("q", " a"), ("q", " bbbb")), answer, (1, 4)) for answer in (1, 0, 1)]
    found = np.array([[-2.0, 1], [-4.0, 1]] * 3)  # the first is likelier, the second per character

    acc_norm, acc = scores_of(examples("piqa", *each), found, "digest")

    assert (acc.metric, acc_norm.metric) == ("acc", "acc_norm")
    assert acc.value == pytest.approx(1 / 3) and acc_norm.value == pytest.approx(2 / 3)
    assert acc.stderr == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 2))
    assert acc.chance == 0.5 and acc.n == 3 and acc.data == "digest" and not acc.is_limited


def test_chance_counts_the_choices_of_every_document():
    each = [Example((("q", " a"),) * n, 0, (1,) * n) for n in (3, 5)]
    scores = scores_of(examples("arc_easy", *each), np.zeros((8, 2)))
    assert scores[0].chance == pytest.approx((1 / 3 + 1 / 5) / 2)


def test_a_continuation_is_right_when_no_token_is_missed_and_its_perplexity_is_per_document():
    each = [Example((("q", " a"),))] * 3
    found = np.array([[-1.0, 0], [-2.0, 1], [-6.0, 0]])

    acc, perplexity = scores_of(examples("lambada_openai", *each), found)

    assert acc.value == pytest.approx(2 / 3) and acc.chance == 0
    assert perplexity.value == pytest.approx(math.exp(3))
    assert perplexity.stderr == pytest.approx(math.exp(3) * np.std([1, 2, 6], ddof=1) / math.sqrt(3))
    assert perplexity.chance is None


def test_perplexities_of_texts_are_per_word_and_byte_of_all_of_them():
    each = [Example((("", "t"),), n_words=10, n_bytes=40), Example((("", "t"),), n_words=30, n_bytes=160)]
    scores = scores_of(examples("wikitext", *each), np.array([[-50.0, 1], [-70.0, 1]]))

    values = {score.metric: score.value for score in scores}
    assert values == {
        "word_perplexity": pytest.approx(math.exp(120 / 40)),
        "byte_perplexity": pytest.approx(math.exp(120 / 200)),
        "bits_per_byte": pytest.approx(120 / 200 / math.log(2)),
    }


def test_one_document_has_no_standard_error():
    assert scores_of(asked(("q", " a"), ("q", " b"), answer=0, n_chars=(1, 1)), np.zeros((2, 2)))[0].stderr is None


def test_the_average_is_that_of_the_first_metrics_of_all_seven_and_of_nothing_less():
    firsts = [Score(name, "acc", 0.1 * i, 0.01, 0.25, 100, None) for i, name in enumerate(AVERAGED)]
    seconds = [Score(name, "acc", 9.0, 9.0, 0.5, 100, None) for name in AVERAGED]
    more = [Score("hellaswag", "acc", 9.0, 9.0, 0.25, 100, None)]

    mean = average([score for pair in zip(firsts, seconds, strict=True) for score in pair] + more)

    assert mean is not None
    assert mean.value == pytest.approx(0.3) and mean.n == 700 and not mean.is_limited
    assert mean.stderr == pytest.approx(0.01 * math.sqrt(7) / 7) and mean.chance == pytest.approx(0.25)
    assert average(firsts[1:] + more) is None
    limited = [*firsts[1:], Score(list(AVERAGED)[0], "acc", 0.0, None, 0.0, 10, 10)]
    mean = average(limited)
    assert mean is not None and mean.is_limited and mean.stderr is None
    two = [dataclasses.replace(score, limit=limit) for score, limit in zip(firsts, (20, 10, *[None] * 5), strict=True)]
    assert average(two).limit == 10, "the fewest documents of any task"


# All of it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_nine_tasks_run_and_repeat_themselves(dtype, tmp_path):
    model = bytes_model().to(dtype)
    data = write_data(tmp_path)

    def run(batch_size: int) -> list[np.ndarray]:
        scored = evaluate_tasks(model, BYTES, find_tasks(), data, BOS, batch_size=batch_size)
        assert [each.scores[0].task for each in scored] == NAMES
        assert [each.scores[0].n for each in scored] == [DOCUMENTS] * len(NAMES)
        return [each.requests for each in scored]

    first, again, other = run(4), run(4), run(1)

    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    rtol = 1e-5 if dtype == torch.float32 else 2e-2
    assert all(np.allclose(a[:, 0], b[:, 0], rtol=rtol) for a, b in zip(first, other, strict=True))


def test_a_damaged_file_of_the_last_task_stops_the_evaluation_before_the_first(tmp_path):
    data = write_data(tmp_path)
    (data / "winogrande" / "validation.jsonl").write_text("{}\n")
    done = []
    with pytest.raises(DataError, match="winogrande"):
        evaluate_tasks(bytes_model(), BYTES, find_tasks(), data, BOS, on_task=done.append)
    assert done == []
