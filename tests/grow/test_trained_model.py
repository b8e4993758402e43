"""Every operator on a real trained model: what promises the function keeps its text and its logits, the rest does not.

Random weights hide mistakes that trained ones show: stories260K has grouped queries, a tied head, norms far from 1.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks.operators_after_growth import Growth, first_layers, growths_of, model_of, samples_of
from grow.apply import grow_checkpoint, make_weights
from grow.operators import OPERATORS, function_of
from grow.plan import GrowthPlan
from grow.registry import PRESERVING
from grow.samples import Samples
from lit_gpt.checkpoint import read_exchange
from lit_gpt.config import Config
from lit_gpt.generate import generate
from lit_gpt.llama2c import read_llama2c, to_exchange
from lit_gpt.tokenizer import Tokenizer

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10}
"""Of the largest logit."""
EPS_TOLERANCE = 1e-3  # of what keeps the function but for norm_eps
COMPARED = 100  # tokens
CHANGED = 1e-2  # more than this is another function
CONFIG = Config(
    block_size=512,
    vocab_size=512,
    n_layer=5,
    n_head=8,
    n_embd=64,
    n_query_groups=4,
    intermediate_size=172,
    tie_embeddings=True,
)
GROWTHS = [growth for name in OPERATORS for growth in growths_of(name)]
OPTIONS = [
    *(Growth("split-width", {"n_embd": 96, "residual": rule}) for rule in ("E", "bert2bert", "published")),
    Growth("split-width", {"n_embd": 128, "residual": "bert2bert"}),  # the tied head reads both copies of a channel
    Growth("split-width", {"n_embd": 96, "residual": "E", "adjust_eps": True}),
    Growth("split-width", {"n_embd": 96, "shares": "even", "order": "random"}),
    Growth("split-width", {"intermediate_size": 200}),
    Growth("zero-width", {"intermediate_size": 200}),
    Growth("zero-width", {"n_embd": 96, "residual": "Z"}),
    Growth("zero-width", {"n_embd": 96, "residual": "Z", "adjust_eps": True}),
    Growth("lemon", {"n_embd": 160, "residual": "Z"}),
    Growth("hypercloning", {"n_embd": 128, "twin_noise": 0.316}),
    Growth("zero-depth", {"n_layer": 10, "noise": 0.2}),
    Growth("zero-depth", {"layer_map": "1123345"}),
]
"""What an operator can be asked for beyond sizes."""


@pytest.fixture(scope="module")
def stories(data_dir) -> Path:
    return data_dir("checkpoints/stories260K")


@pytest.fixture(scope="module")
def source(stories):
    return read_llama2c(stories)


@pytest.fixture(scope="module")
def exchange(stories, tmp_path_factory) -> Path:
    return to_exchange(stories, tmp_path_factory.mktemp("stories") / "exchange")


@pytest.fixture(scope="module")
def known_text(stories) -> str:
    return (stories / "expected_greedy_200.txt").read_text()


@pytest.fixture(scope="module")
def greedy_ids(source) -> torch.Tensor:
    """(1, 201): what the real model writes, with bos before it; another test says that this is the known text."""
    return torch.tensor([generate(model_of(*source), [1], 200, temperature=0)])


@pytest.fixture(scope="module")
def samples(greedy_ids, tmp_path_factory) -> Samples:
    """Of what the real model writes, 64 tokens at a time, for operators that read data."""
    path = tmp_path_factory.mktemp("data") / "train.bin"
    return samples_of(greedy_ids[0], dataclasses.replace(CONFIG, block_size=64), path)


def made_briefly(plan: GrowthPlan) -> GrowthPlan:
    """The plan with less to learn from, where it learns."""
    return dataclasses.replace(plan, options={**plan.options, "learn_steps": 2, "batch_size": 2})


def logits_before_and_after(source, growth: Growth, idx, samples: Samples, dtype=torch.float32, seed=0):
    config, weights = first_layers(*source, growth.n_layer_src)
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    plan = growth.plan(config, seed)
    grown = dict(make_weights(made_briefly(plan), weights, samples=samples).weights)
    assert all(weight.dtype == dtype for weight in grown.values())
    with torch.no_grad():
        return plan, model_of(config, weights)(idx), model_of(plan.dst, grown)(idx)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("growth", GROWTHS + OPTIONS, ids=str)
def test_an_operator_keeps_logits_and_text_if_it_says_so_and_else_changes_the_logits(
    source, greedy_ids, samples, growth, dtype
):
    """Text: where the likeliest tokens after every beginning are the same, greedy writing is."""
    plan, before, after = logits_before_and_after(source, growth, greedy_ids[:, :COMPARED], samples, dtype)

    gap = ((after - before).abs().max() / before.abs().max()).item()
    same_text = torch.equal(after.argmax(-1), before.argmax(-1))
    match function_of(plan):
        case "bitwise":
            assert gap == 0 and same_text
        case "exactly":
            assert gap <= TOLERANCES[dtype] and same_text
        case "up to eps":
            assert gap <= EPS_TOLERANCE
        case _:
            assert gap > CHANGED


def test_the_text_in_these_tests_is_the_known_one(source, exchange, greedy_ids, known_text):
    assert source[0] == CONFIG
    assert Tokenizer.load(exchange).decode(greedy_ids[0]) == known_text


def preserving() -> list[Growth]:
    """Of every operator that can keep the function of the whole model one growth that does."""
    growths = [each for each in GROWTHS if each.n_layer_src is None and function_of(each.plan(CONFIG)) in PRESERVING]
    return list({growth.operator: growth for growth in growths}.values())


@pytest.mark.parametrize("growth", preserving(), ids=str)
def test_a_checkpoint_that_was_grown_on_disk_goes_on_with_the_known_text(
    exchange, known_text, samples, tmp_path, growth
):
    grow_checkpoint(exchange, tmp_path / "grown", made_briefly(growth.plan(CONFIG, seed=1)), samples=samples)

    found, tokenizer = read_exchange(tmp_path / "grown"), Tokenizer.load(tmp_path / "grown")
    ids = generate(model_of(found.config, found.weights), [1], 50, temperature=0)
    assert known_text.startswith(tokenizer.decode(ids)) and len(ids) == 51


def test_every_operator_that_promises_the_function_is_seen_to_keep_it():
    assert {growth.operator for growth in preserving()} == {op.name for op in OPERATORS.values() if op.preserves}


def test_every_operator_has_sizes_to_be_tried_with():
    assert {growth.operator for growth in GROWTHS} == set(OPERATORS)
