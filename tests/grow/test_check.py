"""Checks of checkpoints and of growths: what is missing, what changed, what would not train."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grow.apply import grow_weights
from grow.check import check_weights, compare, load_model, random_tokens, tokens_from_file
from grow.operators import plan_growth
from lit_gpt.checkpoint import write_exchange
from lit_gpt.errors import DataError
from lit_gpt.model import GPT
from lit_gpt.packed_dataset import write_token_file
from tests.toys import toy_config, toy_model, toy_tokens, toy_weights


def test_all_problems_of_a_state_dict_are_listed_at_once():
    config = toy_config()
    weights = toy_weights(config)
    del weights["transformer.h.1.norm_1.weight"]
    weights["transformer.h.9.norm_1.weight"] = torch.ones(16)
    weights["transformer.ln_f.weight"] = torch.full((8,), float("inf"))

    with pytest.raises(DataError) as failure:
        check_weights(config, weights, "the file")

    lines = str(failure.value).split("\n")
    assert "transformer.h.1.norm_1.weight is missing" in lines[0]
    assert "unexpected tensor transformer.h.9.norm_1.weight" in lines[1]
    assert "transformer.ln_f.weight has shape (8,), the configuration wants (16,)" in lines[2]
    assert "transformer.ln_f.weight holds NaN or infinity" in lines[3]


def test_a_model_does_not_differ_from_itself():
    config = toy_config()
    found = compare(toy_model(config), toy_model(config), toy_tokens(config))

    assert found.max_abs_logit_gap == 0 and found.max_abs_logit > 0
    assert found.zero_gradient == []
    assert found.n_tokens == 2 * config.block_size


def test_the_gap_is_the_largest_difference_of_two_logits():
    config = toy_config(tie_embeddings=False)
    src, dst = toy_model(config, dtype=torch.float64), toy_model(config, dtype=torch.float64)
    with torch.no_grad():
        dst.lm_head.weight[7] = 0  # the logit of token 7 becomes 0 everywhere
    tokens = toy_tokens(config)

    found = compare(src, dst, tokens)

    with torch.no_grad():
        expected = src(tokens[:, :-1])[..., 7].abs().max().item()
    assert found.max_abs_logit_gap == pytest.approx(expected, rel=1e-12)


def test_parameters_that_would_not_train_are_named():
    """A block whose two output projections are zero passes nothing on, so only these two get a gradient."""
    config = toy_config()
    plan = plan_growth("stack", config, factor=2)
    dst = GPT(plan.dst)
    weights = grow_weights(plan, toy_weights(config))
    for name in ("attn.proj", "mlp.swiglu.w3"):
        weights[f"transformer.h.2.{name}.weight"].zero_()
    dst.load_state_dict(weights)

    found = compare(toy_model(config), dst, toy_tokens(config))

    dead = ("norm_1", "attn.attn", "norm_2", "mlp.swiglu.w1", "mlp.swiglu.w2")
    assert found.zero_gradient == [f"transformer.h.2.{name}.weight" for name in dead]
    assert found.waiting == found.zero_gradient
    assert all(parameter.grad is None for parameter in dst.parameters())


def test_parameters_of_a_layer_that_can_never_train_do_not_wait():
    """Zero norms, as staged training had them, leave the output projections without a gradient too."""
    model = toy_model(toy_config())
    with torch.no_grad():
        for name in ("norm_1.weight", "attn.proj.weight"):
            model.get_parameter(f"transformer.h.1.{name}").zero_()
    found = compare(model, model, toy_tokens(model.config))
    assert "transformer.h.1.attn.attn.weight" in found.zero_gradient and found.waiting == []


@pytest.mark.parametrize(
    ("operator", "sizes"),
    [
        ("fpi", {"factor": 2}),
        ("fpi", {"n_embd": 24, "n_head": 6, "n_query_groups": 3, "intermediate_size": 40, "n_layer": 3}),
        ("aki", {"factor": 2}),
        ("aki", {"n_embd": 24, "n_head": 6, "n_query_groups": 3, "intermediate_size": 40, "n_layer": 3}),
        ("hypercloning", {"factor": 2}),
        ("hypercloning", {"factor": 3, "twin_noise": 0.01}),
        ("staged-width", {"factor": 2}),
        ("staged-depth", {"factor": 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_after_growth_every_parameter_gets_a_gradient_at_once_or_behind_a_closed_layer(operator, sizes, tied):
    config = toy_config(tie_embeddings=tied)
    plan = plan_growth(operator, config, **sizes)
    src, dst, tokens = toy_model(config), GPT(plan.dst), toy_tokens(config, n_rows=4)
    dst.load_state_dict(grow_weights(plan, toy_weights(config)))

    found = compare(src, dst, tokens)

    assert found.zero_gradient == found.waiting
    assert bool(found.waiting) == bool(plan.identity_layers)
    dst(tokens[:, :-1], tokens[:, 1:]).backward()
    torch.optim.AdamW(dst.parameters(), lr=1e-3).step()
    assert compare(src, dst, tokens).zero_gradient == []


def test_models_of_two_vocabularies_cannot_be_compared():
    one, other = toy_config(), toy_config(padded_vocab_size=24)
    with pytest.raises(ValueError, match="20 and 24 embedding rows"):
        compare(toy_model(one), toy_model(other), toy_tokens(one))
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 20\)"):
        compare(toy_model(one), toy_model(one), torch.full((1, 4), 20))


def test_random_tokens_depend_on_the_seed_alone():
    config = toy_config()
    assert torch.equal(random_tokens(config, seed=1), random_tokens(config, seed=1))
    assert not torch.equal(random_tokens(config, seed=1), random_tokens(config, seed=2))
    assert random_tokens(config).shape == (2, config.block_size + 1)


def test_tokens_come_from_a_token_file_too(tmp_path):
    config = toy_config()
    ids = np.arange(100) % 19
    write_token_file(tmp_path / "a.bin", ids, np.dtype("u2"))
    write_token_file(tmp_path / "short.bin", ids[:3], np.dtype("u2"))

    tokens = tokens_from_file(tmp_path / "a.bin", config)

    assert tokens.tolist() == [ids[:17].tolist(), ids[16:33].tolist()]
    with pytest.raises(DataError):
        tokens_from_file(tmp_path / "short.bin", config)


@pytest.mark.parametrize(
    ("stored", "computed"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_a_stored_model_is_compared_in_full_precision(tmp_path, stored, computed):
    config = toy_config(vocab_size=20)
    weights = toy_weights(config, dtype=stored)
    write_exchange(tmp_path / "model", config, weights)

    model = load_model(tmp_path / "model")

    assert {parameter.dtype for parameter in model.parameters()} == {computed}
    assert all(torch.equal(weight, weights[name].to(computed)) for name, weight in model.state_dict().items())
