"""Sampling: the cache changes nothing, seeds decide, the settings cut what they say, and nonsense is refused."""

from __future__ import annotations

import pytest
import torch

from lit_gpt.generate import KVCache, generate, pick_token
from lit_gpt.model import GPT
from tests.toys import toy_config, toy_model, toy_tokens, toy_weights


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("n_query_groups", [1, 2, 4])
@pytest.mark.parametrize("n_prompt", [1, 5])
def test_greedy_with_cache_is_greedy_without(n_prompt, n_query_groups, tie_embeddings):
    config = toy_config(n_query_groups=n_query_groups, tie_embeddings=tie_embeddings)
    model = toy_model(config, dtype=torch.float64)
    prompt = toy_tokens(config)[0, :n_prompt].tolist()

    expected = list(prompt)
    with torch.no_grad():
        while len(expected) < config.block_size:
            logits = model(torch.tensor([expected]))[0, -1, : config.vocab_size]
            expected.append(int(logits.argmax()))

    assert generate(model, prompt, config.block_size - n_prompt, temperature=0) == expected


@pytest.mark.parametrize("pieces", [(16,), (1, 15), (5, 1, 10), (4, 4, 4, 4)])
def test_a_text_fed_in_pieces_gives_the_logits_of_the_whole(pieces):
    config = toy_config()
    model = toy_model(config, dtype=torch.float64)
    idx = toy_tokens(config, n_rows=1)[:, :-1]
    cache = KVCache(model, config.block_size)

    found, start = [], 0
    with torch.no_grad():
        for length in pieces:
            part = idx[:, start : start + length]
            found.append(model(part, first_position=start, kv_store=cache))
            start += length
        whole = model(idx)

    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-12, atol=1e-12)


def test_the_seed_decides_and_nothing_else_does():
    config = toy_config()
    model = toy_model(config)
    first = generate(model, [1], 15, seed=0)
    torch.manual_seed(1234)

    assert generate(model, [1], 15, seed=0) == first
    assert len({tuple(generate(model, [1], 15, seed=seed)) for seed in range(4)}) == 4


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_settings_that_leave_one_token_are_greedy(settings):
    model = toy_model(toy_config())
    assert generate(model, [1, 2], 10, **settings) == generate(model, [1, 2], 10, temperature=0)


def draws(logits: torch.Tensor, n: int, **settings) -> torch.Tensor:
    """How often each id was drawn."""
    defaults = {"temperature": 1.0, "top_k": None, "top_p": None, "generator": torch.Generator().manual_seed(0)}
    picked = [pick_token(logits, **{**defaults, **settings}) for _ in range(n)]
    return torch.bincount(torch.tensor(picked), minlength=logits.numel())


def test_tokens_are_drawn_as_often_as_their_probability_says():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    counts = draws(probabilities.log(), 2000)
    spread = (2000 * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - 2000 * probabilities).abs() < 4 * spread).all()


def test_temperature_sharpens():
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    expected = 2000 * torch.tensor([0.25, 0.09, 0.04]) / 0.38
    assert ((draws(logits, 2000, temperature=0.5) - expected).abs() < 100).all()


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2}, [0, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.3}, [3]),
        ({"top_p": 0.6}, [0, 3]),
        ({"top_p": 0.85}, [0, 1, 3]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"top_k": 3, "top_p": 0.6}, [0, 3]),
    ],
)
def test_the_tail_is_cut_where_the_setting_says(settings, kept):
    logits = torch.tensor([0.3, 0.2, 0.1, 0.4]).log()
    counts = draws(logits, 300, **settings)
    assert counts.nonzero().flatten().tolist() == kept


def test_rows_that_only_pad_the_vocabulary_are_never_drawn():
    config = toy_config(padded_vocab_size=64)
    model = toy_model(config)
    with torch.no_grad():
        model.lm_head.weight[19:] *= 100
    assert max(generate(model, [1], 15)) < 19


def test_generation_ends_with_the_end_of_text():
    model = toy_model(toy_config())
    free = generate(model, [1], 15, temperature=0)
    end = free[4]

    stopped = generate(model, [1], 15, temperature=0, eos_ids=[19, end])

    assert stopped == free[: free.index(end, 1) + 1]


def test_no_new_tokens_are_no_new_tokens():
    assert generate(toy_model(toy_config()), [1, 2], 0) == [1, 2]


@pytest.mark.parametrize(
    ("prompt", "n_new", "settings", "message"),
    [
        ([], 3, {}, "prompt is empty"),
        ([1] * 10, 7, {}, "do not fit block_size=16"),
        ([20], 3, {}, r"must be in \[0, 20\)"),
        ([-1], 3, {}, r"must be in \[0, 20\)"),
        ([1], -1, {}, "max_new_tokens"),
        ([1], 3, {"temperature": -1.0}, "temperature 0 or from"),
        ([1], 3, {"temperature": float("nan")}, "temperature 0 or from"),
        ([1], 3, {"temperature": float("inf")}, "temperature 0 or from"),
        ([1], 3, {"temperature": 1e-42}, "temperature 0 or from"),
        ([1], 3, {"top_p": float("nan")}, "top_p in"),
        ([1], 3, {"seed": 1 << 70}, "between -2"),
        ([1], 3, {"top_k": 0}, "top_k >= 1"),
        ([1], 3, {"top_p": 0.0}, "top_p in"),
    ],
)
def test_requests_that_make_no_sense_are_refused(prompt, n_new, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(toy_model(toy_config()), prompt, n_new, **settings)


def test_a_model_trains_on_after_it_generated():
    config = toy_config()
    model, tokens = toy_model(config), toy_tokens(config)
    generate(model, [1], 5)

    model(tokens[:, :-1], tokens[:, 1:]).backward()

    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_model_that_computes_in_bf16_generates_too():
    config = toy_config()
    model = GPT(config, compute_dtype=torch.bfloat16)
    model.load_state_dict(toy_weights(config))
    assert len(generate(model, [1], 10)) == 11
