"""The learning rate as a function of the step, and AdamW's state by name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.config import Config
from lit_gpt.model import GPT, init_weights
from pretrain.config import OptimizerConfig, ScheduleConfig
from pretrain.optim import build_optimizer, learning_rate, load_named_state, named_state

TINY = Config(block_size=8, vocab_size=64, n_layer=1, n_embd=16, n_head=2, intermediate_size=32)
PEAK_AND_LOW = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1)


def tiny_model():
    model = GPT(TINY)
    init_weights(model, 0)
    return model


def train(model, optimizer, steps):
    for step in range(steps):
        ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(step))
        model(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_cosine_rises_linearly_then_falls_to_the_minimum():
    schedule = ScheduleConfig(kind="cosine", warmup_steps=4)
    rates = [learning_rate(step, 104, PEAK_AND_LOW, schedule) for step in range(105)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[54] == pytest.approx(0.55)
    assert rates[104] == pytest.approx(0.1)


def test_wsd_is_constant_and_then_falls_linearly():
    schedule = ScheduleConfig(kind="wsd", warmup_steps=2, decay_steps=10)
    rates = [learning_rate(step, 100, PEAK_AND_LOW, schedule) for step in range(100)]
    assert set(rates[2:90]) == {1.0}
    assert rates[95] == pytest.approx(0.55)


def test_wsd_without_decay_stays_at_the_peak():
    assert learning_rate(99, 100, PEAK_AND_LOW, ScheduleConfig(kind="wsd")) == 1.0


@given(
    kind=st.sampled_from(["cosine", "wsd"]),
    warmup=st.integers(0, 50),
    decay=st.integers(0, 50),
    step=st.integers(0, 200),
)
def test_the_rate_never_leaves_zero_to_peak_and_stays_above_the_minimum_after_warm_up(kind, warmup, decay, step):
    schedule = ScheduleConfig(kind=kind, warmup_steps=warmup, decay_steps=decay)
    rate = learning_rate(step, 200, PEAK_AND_LOW, schedule)
    assert 0 < rate <= 1.0
    assert step < warmup or rate >= 0.1 - 1e-12


@pytest.mark.parametrize(("decay", "decayed_norms"), [("matrices", False), ("all", True)])
def test_weight_decay_falls_on_matrices_and_only_if_asked_on_norms(decay, decayed_norms):
    model = tiny_model()
    optimizer = build_optimizer(model, OptimizerConfig(decay=decay))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    everything = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert everything == {id(p) for p in model.parameters()}
    assert all((id(p) in decayed) == (p.dim() == 2 or decayed_norms) for p in model.parameters())


def test_state_by_name_continues_to_the_bit():
    straight = tiny_model()
    optimizer = build_optimizer(straight, OptimizerConfig())
    train(straight, optimizer, 2)
    weights = {name: p.detach().clone() for name, p in straight.named_parameters()}
    moments = {k: {s: t.clone() for s, t in slots.items()} for k, slots in named_state(straight, optimizer).items()}
    train(straight, optimizer, 3)

    resumed = GPT(TINY)
    resumed.load_state_dict(weights)
    other = build_optimizer(resumed, OptimizerConfig())
    load_named_state(resumed, other, moments)
    train(resumed, other, 3)

    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_state_of_an_unknown_parameter_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"transformer\.h\.7"):
        load_named_state(model, build_optimizer(model, OptimizerConfig()), {"transformer.h.7.norm_1.weight": {}})
