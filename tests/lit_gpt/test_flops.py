"""Parameter and FLOPs arithmetic against the paper's numbers, hand arithmetic, and what PyTorch counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from torch.utils.flop_counter import FlopCounterMode

from lit_gpt.config import Config
from lit_gpt.flops import Flops, count_matmul_parameters, count_non_embedding, count_parameters, flops_per_token
from lit_gpt.model import GPT
from tests.toys import toy_config, toy_configs, toy_model, toy_tokens


@pytest.mark.parametrize(
    ("name", "giga_per_token"),
    [("24L1024H", 2.243), ("24L2048H", 8.186), ("tiny_LLaMA_3B", 14.385), ("tiny_LLaMA_7B", 35.599)],
)
def test_the_papers_axis(name, giga_per_token):
    assert round(flops_per_token(Config.from_name(name)).paper / 1e9, 3) == giga_per_token


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("24L1024H", 0.3083),
        ("6L1024H", 0.0771),
        ("24L2048H", 1.2332),
        ("6L2048H", 0.3083),
        ("tiny_LLaMA_3B", 2.2336),
        ("tiny_LLaMA_750M_like3B", 0.5584),
        ("tiny_LLaMA_7B", 5.6710),
        ("tiny_LLaMA_1.7B_like7B", 1.4177),
    ],
)
def test_the_papers_counts_without_embeddings(name, billions):
    assert round(count_non_embedding(Config.from_name(name)) / 1e9, 4) == billions


@given(toy_configs())
def test_all_parameters_are_counted_and_shared_ones_once(config):
    model = GPT(config)
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())
    embeddings = (1 if config.tie_embeddings else 2) * 20 * 16
    assert count_non_embedding(config) == count_parameters(config) - embeddings


def test_three_conventions_by_hand():
    config = toy_config()  # L 2, C 16, H 4, G 2, D 4, F 24, V 20, T 16
    matmul = 2 * ((4 + 2 * 2) * 4 * 16 + 16 * 16 + 3 * 16 * 24) + 20 * 16
    attention = 12 * 2 * 4 * 4 * 16

    found = flops_per_token(config)

    assert count_matmul_parameters(config) == matmul
    assert found.paper == 6 * (matmul + 20 * 16 + 5 * 16)
    assert found.model == 6 * matmul + attention / 2
    assert found.palm == 6 * matmul + attention


def test_tying_saves_parameters_but_no_multiplication():
    tied, untied = (flops_per_token(toy_config(tie_embeddings=tie)) for tie in (True, False))
    assert untied.paper - tied.paper == 6 * 20 * 16
    assert (tied.model, tied.palm) == (untied.model, untied.palm)


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("n_query_groups", [1, 2, 4])
def test_a_training_step_multiplies_what_the_arithmetic_says(n_query_groups, tie_embeddings):
    """PyTorch's own counter sees two FLOPs per multiplied parameter and token forward, four backward."""
    config = toy_config(n_query_groups=n_query_groups, tie_embeddings=tie_embeddings)
    model, tokens = toy_model(config), toy_tokens(config)

    with FlopCounterMode(display=False) as counter:
        model(tokens[:, :-1], tokens[:, 1:]).backward()

    counted = counter.get_flop_counts()["Global"]
    matmul = sum(flops for op, flops in counted.items() if "attention" not in str(op))
    assert matmul == 6 * count_matmul_parameters(config) * 2 * config.block_size


def test_flops_add_and_scale():
    assert Flops(1, 2, 3) + Flops(10, 20, 30) == Flops(11, 22, 33)
    assert Flops(1, 2, 3).times(5) == Flops(5, 10, 15)
