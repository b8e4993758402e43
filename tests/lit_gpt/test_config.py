"""Sizes: the named ones to the last parameter, and nonsense refused with every reason at once."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given

from lit_gpt.config import NAMED_SIZES, Config, default_intermediate_size
from lit_gpt.flops import count_parameters
from tests.toys import toy_config, toy_configs

# n_layer, n_embd, n_head, n_query_groups, intermediate_size, parameters with both embeddings at V = 32000
NAMED = {
    "tiny_LLaMA_1b": (22, 2048, 32, 4, 5632, 1_100_048_384),
    "tiny_LLaMA_120M": (12, 768, 12, 1, 2048, 121_129_728),
    "code_tiny_LLaMA_1b": (22, 2048, 32, 4, 5632, 1_100_048_384),
    "tiny_LLaMA_160M": (12, 768, 12, 1, 3072, 149_441_280),
    "tiny_LLaMA_160M_128h": (12, 768, 6, 1, 3072, 150_620_928),
    "tiny_LLaMA_240M": (18, 768, 12, 1, 3072, 199_585_536),
    "tiny_LLaMA_310M": (24, 768, 12, 1, 3072, 249_729_792),
    "tiny_LLaMA_410M": (24, 1024, 16, 1, 4096, 421_053_440),
    "tiny_LLaMA_410M_128h": (24, 1024, 8, 1, 4096, 424_199_168),
    "tiny_LLaMA_410M_wo_gqa": (24, 1024, 16, 16, 4096, 468_239_360),
    "tiny_LLaMA_750M": (36, 1024, 16, 1, 4096, 598_811_648),
    "tiny_LLaMA_400M_like1.1B": (8, 2048, 16, 4, 5632, 491_816_960),
    "tiny_LLaMA_1.1B": (24, 2048, 16, 4, 5632, 1_213_302_784),
    "tiny_LLaMA_1.1B_1kv": (24, 2048, 16, 1, 5632, 1_175_554_048),
    "tiny_LLaMA_1.1B_64h_wo_gqa": (24, 2048, 32, 32, 5632, 1_364_297_728),
    "tiny_LLaMA_80M_like3B": (1, 2560, 20, 4, 7040, 233_643_520),
    "tiny_LLaMA_190M_like3B": (2, 2560, 20, 4, 7040, 303_444_480),
    "tiny_LLaMA_375M_like3B": (4, 2560, 20, 4, 7040, 443_046_400),
    "tiny_LLaMA_750M_like3B": (8, 2560, 20, 4, 7040, 722_250_240),
    "tiny_LLaMA_1.1B_like3B": (12, 2560, 20, 4, 7040, 1_001_454_080),
    "tiny_LLaMA_3B": (32, 2560, 20, 4, 7040, 2_397_473_280),
    "tiny_LLaMA_3B_1kv": (32, 2560, 20, 1, 7040, 2_334_558_720),
    "tiny_LLaMA_3B_1kv_64h": (32, 2560, 40, 1, 7040, 2_324_072_960),
    "tiny_LLaMA_850M_like7B": (4, 4096, 32, 8, 11008, 971_018_240),
    "tiny_LLaMA_1.7B_like7B": (8, 4096, 32, 8, 11008, 1_679_888_384),
    "tiny_LLaMA_7B": (32, 4096, 32, 8, 11008, 5_933_109_248),
    "6L1024H": (6, 1024, 16, 16, 2816, 142_619_648),
    "24L1024H": (24, 1024, 16, 16, 2816, 373_867_520),
    "12L1536H": (12, 1536, 24, 24, 4224, 445_158_912),
    "6L2048H": (6, 2048, 32, 32, 5632, 439_379_968),
    "24L2048H": (24, 2048, 32, 32, 5632, 1_364_297_728),
    "8L2560H": (8, 2560, 20, 4, 7040, 722_250_240),
    "32L2560H": (32, 2560, 20, 4, 7040, 2_397_473_280),
    "8L4096H": (8, 4096, 32, 32, 11008, 1_881_214_976),
    "32L4096H": (32, 4096, 32, 32, 11008, 6_738_415_616),
    "2L128H": (2, 128, 2, 2, 512, 8_716_928),
    "12L768H": (12, 768, 12, 12, 2048, 134_105_856),
    "4L3072H": (4, 3072, 24, 24, 8192, 649_620_480),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_size_has_its_sizes_and_exactly_its_parameters(name):
    config = Config.from_name(name)

    sizes = (config.n_layer, config.n_embd, config.n_head, config.n_query_groups, config.intermediate_size)
    assert (*sizes, count_parameters(config)) == NAMED[name]
    assert config.name == name
    assert config.head_size == config.n_embd // config.n_head
    assert config.block_size == (8192 if name == "code_tiny_LLaMA_1b" else 2048)
    assert (config.vocab_size, config.padded_vocab_size, config.norm_eps) == (32000, 32000, 1e-5)


def test_the_table_of_this_test_is_complete():
    assert set(NAMED_SIZES) <= set(NAMED)


@pytest.mark.parametrize(
    ("name", "per_block", "n_layer", "total"),
    [
        ("24L1024H", 12_847_104, 24, 373_867_520),
        ("24L2048H", 51_384_320, 24, 1_364_297_728),
        ("tiny_LLaMA_3B", 69_800_960, 32, 2_397_473_280),
        ("tiny_LLaMA_7B", 177_217_536, 32, 5_933_109_248),
    ],
)
def test_the_papers_sizes_add_up(name, per_block, n_layer, total):
    """Against arithmetic done here: V C rows twice, the blocks, the final norm."""
    config = Config.from_name(name)
    C, D, F = config.n_embd, config.n_embd // config.n_head, config.intermediate_size
    attention = (config.n_head + 2 * config.n_query_groups) * D * C + config.n_head * D * C

    assert 2 * C + attention + 3 * C * F == per_block
    assert 2 * 32000 * C + n_layer * per_block + C == total == count_parameters(config)
    shallower = Config.from_name(name, n_layer=n_layer - 1)
    assert count_parameters(config) - count_parameters(shallower) == per_block


def test_what_is_left_out_follows_from_the_rest():
    config = Config(vocab_size=257, n_embd=192, n_head=6)

    assert config.padded_vocab_size == 320
    assert config.n_query_groups == 6 and config.head_size == 32
    assert config.intermediate_size == 512
    assert config.q_per_kv == 1 and config.qkv_size == 3 * 192 and config.rope_n_elem == 32


def test_mlp_width_is_eight_thirds_on_a_multiple_of_256():
    assert [default_intermediate_size(width) for width in (64, 768, 1024, 4096)] == [256, 2048, 2816, 11008]


def test_overrides_replace_single_fields():
    config = Config.from_name("6L2048H", block_size=64, vocab_size=100)
    assert (config.block_size, config.padded_vocab_size, config.n_layer) == (64, 128, 6)


def test_a_multi_head_size_stays_multi_head_with_another_number_of_heads():
    assert Config.from_name("6L1024H", n_head=8).n_query_groups == 8
    assert Config.from_name("tiny_LLaMA_1b", n_head=16).n_query_groups == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny_llama_1b", "did you mean .*tiny_LLaMA_1b"),
        ("6L2048", "pattern <layers>L<width>H"),
        ("x6L2048H", "unknown model name"),
        ("0L2048H", "n_layer=0 must be at least 1"),
    ],
)
def test_unknown_names_are_refused_with_a_hint(name, message):
    with pytest.raises(ValueError, match=message):
        Config.from_name(name)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_layer": 0}, "n_layer=0 must be at least 1"),
        ({"n_head": 0}, "n_head=0 must be at least 1"),
        ({"n_query_groups": 3}, "n_head=4 must be a multiple of n_query_groups=3"),
        ({"n_embd": 18}, "n_embd=18 must be a multiple of n_head=4"),
        ({"head_size": 5}, "RoPE needs an even number"),
        ({"rotary_percentage": 0.3}, "rotates 1 channels"),
        ({"rotary_percentage": 1.5}, r"must be in \(0, 1\]"),
        ({"padded_vocab_size": 7}, "must not be smaller than vocab_size=19"),
        ({"norm_eps": 0.0}, "norm_eps=0.0 must be positive"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        toy_config(**sizes)


def test_all_reasons_come_at_once():
    with pytest.raises(ValueError) as failure:
        toy_config(n_query_groups=3, norm_eps=-1.0, padded_vocab_size=7)
    assert len(str(failure.value).split("\n")) == 3


def test_a_config_with_unknown_keys_is_refused_and_each_is_named():
    values = {**toy_config().to_dict(), "n_layers": 3, "colour": "red"}

    with pytest.raises(ValueError) as failure:
        Config.from_dict(values)

    first, second = str(failure.value).split("\n")
    assert first == "unknown key 'n_layers'; did you mean 'n_layer'?"
    assert second.startswith("unknown key 'colour'; known: ")


@given(toy_configs())
def test_a_config_survives_its_dict(config):
    assert Config.from_dict(config.to_dict()) == config


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        toy_config().n_layer = 3
