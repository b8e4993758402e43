"""The model: what a token may see, agreement with Hugging Face's Llama, dtypes, ties, and the initial weights."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lit_gpt.axes import layer_of, name_in_block, parameter_shapes
from lit_gpt.config import Config
from lit_gpt.kernels.rope import apply_rope
from lit_gpt.model import GPT, RMSNorm, init_tensor, init_weights, rope_cos_sin
from tests.toys import toy_config, toy_model, toy_tokens, toy_weights

GROUPS = pytest.mark.parametrize("n_query_groups", [1, 2, 4])
TIES = pytest.mark.parametrize("tie_embeddings", [False, True])


@GROUPS
def test_a_token_sees_itself_and_all_before_it_and_nothing_after(n_query_groups):
    """The gradient of the logits at t with respect to the embedding at s is zero exactly for s > t."""
    config = toy_config(n_query_groups=n_query_groups)
    model = toy_model(config, dtype=torch.float64)
    embedded: list[Tensor] = []
    model.transformer.wte.register_forward_hook(lambda _, __, output: embedded.append(output))
    logits = model(toy_tokens(config, n_rows=1)[:, :-1])[0]

    for t in range(config.block_size):
        (gradient,) = torch.autograd.grad(logits[t].sum(), embedded[0], retain_graph=True)
        reached = gradient[0].abs().amax(dim=1) > 0
        assert reached.tolist() == [s <= t for s in range(config.block_size)]


def test_the_rows_of_a_batch_do_not_see_each_other():
    config = toy_config()
    model, idx = toy_model(config, dtype=torch.float64), toy_tokens(config)[:, :-1]
    torch.testing.assert_close(model(idx)[1:], model(idx[1:]), rtol=1e-12, atol=1e-12)


@GROUPS
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_with_a_separator_a_row_of_documents_is_as_if_each_stood_alone(n_query_groups, lengths):
    config = toy_config(n_query_groups=n_query_groups)
    model, separator_id = toy_model(config, dtype=torch.float64), 0
    documents = []
    for number, length in enumerate(lengths):
        body = 1 + (torch.arange(length) * 7 + number) % (config.vocab_size - 1)
        documents.append(torch.cat([body, torch.tensor([separator_id])]))
    row = torch.cat(documents)[None, : config.block_size]

    together = model(row, separator_id=separator_id)

    alone = torch.cat([model(document[None]) for document in documents], dim=1)[:, : config.block_size]
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


def hf_weights(weights: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Hugging Face's names, with q, k and v picked row by row: row (g (q+2) + s) D + t is slot s of group g."""
    names = {
        "transformer.wte.weight": "model.embed_tokens.weight",
        "transformer.ln_f.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
        "norm_1.weight": "input_layernorm.weight",
        "norm_2.weight": "post_attention_layernorm.weight",
        "attn.proj.weight": "self_attn.o_proj.weight",
        "mlp.swiglu.w1.weight": "mlp.gate_proj.weight",
        "mlp.swiglu.w2.weight": "mlp.up_proj.weight",
        "mlp.swiglu.w3.weight": "mlp.down_proj.weight",
    }
    q, D = config.n_head // config.n_query_groups, config.head_size
    slots = {"q_proj": range(q), "k_proj": [q], "v_proj": [q + 1]}
    theirs = {}
    for name, weight in weights.items():
        prefix = "" if layer_of(name) is None else f"model.layers.{layer_of(name)}."
        if name_in_block(name) != "attn.attn.weight":
            theirs[prefix + names[name_in_block(name)]] = weight
            continue
        for projection, chosen in slots.items():
            groups = range(config.n_query_groups)
            rows = [(g * (q + 2) + s) * D + t for g in groups for s in chosen for t in range(D)]
            theirs[f"{prefix}self_attn.{projection}.weight"] = weight[rows]
    return theirs


@TIES
@GROUPS
def test_logits_and_loss_are_those_of_hugging_faces_llama(n_query_groups, tie_embeddings):
    transformers = pytest.importorskip("transformers")
    config = toy_config(n_layer=3, n_query_groups=n_query_groups, tie_embeddings=tie_embeddings)
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.padded_vocab_size,
            hidden_size=config.n_embd,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_query_groups,
            max_position_embeddings=config.block_size,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=tie_embeddings,
        )
    )
    weights = toy_weights(config)
    missing, unexpected = peer.load_state_dict(hf_weights(weights, config), strict=False)
    assert missing == (["lm_head.weight"] if tie_embeddings else []) and not unexpected
    tokens = toy_tokens(config, n_rows=3)
    idx = tokens[:, :-1]

    model = toy_model(config)
    with torch.no_grad():
        ours, theirs = model(idx), peer(idx).logits
        loss, their_loss = model(tokens[:, :-1], tokens[:, 1:]), peer(idx, labels=idx).loss

    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    expected = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    shifted = model(idx[:, :-1], idx[:, 1:])
    assert shifted.item() == pytest.approx(their_loss.item(), rel=1e-5)


@TIES
@GROUPS
def test_a_float64_model_is_float64_throughout(n_query_groups, tie_embeddings):
    config = toy_config(n_query_groups=n_query_groups, tie_embeddings=tie_embeddings)
    model, tokens = toy_model(config, dtype=torch.float64), toy_tokens(config)
    seen = set()
    for module in model.modules():
        module.register_forward_hook(lambda _, __, output: seen.add(output.dtype))

    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()

    assert seen == {torch.float64} and model(tokens[:, :-1]).dtype == torch.float64
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float64}
    single = toy_model(config)(tokens[:, :-1], tokens[:, 1:])
    assert single.dtype == torch.float32 and abs(single.item() - loss.item()) < 1e-5


def test_bf16_computes_in_bf16_and_keeps_weights_and_gradients_in_fp32():
    config = toy_config()
    weights, tokens = toy_weights(config), toy_tokens(config)
    model = GPT(config, compute_dtype=torch.bfloat16)
    model.load_state_dict(weights)

    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()

    assert model(tokens[:, :-1]).dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    exact = toy_model(config)
    exact_loss = exact(tokens[:, :-1], tokens[:, 1:])
    exact_loss.backward()
    assert loss.item() == pytest.approx(exact_loss.item(), rel=2e-2)
    for (name, ours), reference in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (ours.grad - reference.grad).norm() <= 0.1 * reference.grad.norm(), name


def test_the_norm_of_a_bf16_model_has_fp32_statistics():
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = RMSNorm(512, 1e-5).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    # rounding once to bf16 is an error of at most 2^-8; statistics in bf16 would add errors of their own
    assert ((norm(x).double() - exact).abs() <= 1.001 * 2**-8 * exact.abs()).all()


def test_losses_per_target_average_to_the_loss():
    config = toy_config()
    model, tokens = toy_model(config), toy_tokens(config)
    targets = tokens[:, 1:].clone()
    targets[0, :5] = -100

    losses = model(tokens[:, :-1], targets, reduction="none")

    assert losses.shape == targets.shape and not losses[0, :5].any()
    mean = losses.sum() / (targets != -100).sum()
    torch.testing.assert_close(mean, model(tokens[:, :-1], targets).detach())


def test_more_tokens_than_the_block_are_refused():
    config = toy_config()
    with pytest.raises(ValueError, match="17 tokens do not fit block_size=16"):
        toy_model(config)(toy_tokens(config))


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500), st.sampled_from([0.5, 1.0]))
def test_rope_makes_scores_depend_on_distance_alone(first, second, shift, rotary_percentage):
    config = toy_config(head_size=8, rotary_percentage=rotary_percentage)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 8, generator=generator, dtype=torch.float64)

    def score(m: int, n: int) -> float:
        at_m, at_n = (apply_rope(x.view(1, 1, 1, 8), *rope_cos_sin(config, p, 1, x)) for x, p in ((q, m), (k, n)))
        return (at_m * at_n).sum().item()

    assert score(first, second) == pytest.approx(score(first + shift, second + shift), abs=1e-9)


def test_rope_rotates_channel_t_with_channel_t_plus_half_and_leaves_the_rest():
    config = toy_config(head_size=8, rotary_percentage=0.5)
    x = torch.arange(1.0, 9.0, dtype=torch.float64).view(1, 1, 1, 8)

    rotated = apply_rope(x, *rope_cos_sin(config, 3, 1, x)).flatten()

    angles = [3.0, 3.0 * 10000 ** (-2 / 4)]
    expected = [math.cos(angles[t]) * x[..., t] - math.sin(angles[t]) * x[..., t + 2] for t in (0, 1)]
    expected += [math.cos(angles[t]) * x[..., t + 2] + math.sin(angles[t]) * x[..., t] for t in (0, 1)]
    torch.testing.assert_close(rotated[:4], torch.cat([value.flatten() for value in expected]))
    assert torch.equal(rotated[4:], x.flatten()[4:])


@TIES
def test_a_state_dict_has_the_lineages_names_and_loads_strictly(tie_embeddings):
    config = toy_config(tie_embeddings=tie_embeddings)
    model = toy_model(config)
    state = model.state_dict()
    other = GPT(config)

    assert {name: tuple(weight.shape) for name, weight in state.items()} == parameter_shapes(config)
    other.load_state_dict(state, strict=True)

    assert list(state) == list(parameter_shapes(config)), "loading must not change the caller's dict"
    tokens = toy_tokens(config)[:, :-1]
    assert torch.equal(model(tokens), other(tokens))


@TIES
def test_a_state_dict_that_lacks_the_embedding_is_refused_by_name(tie_embeddings):
    config = toy_config(tie_embeddings=tie_embeddings)
    weights = toy_weights(config)
    del weights["transformer.wte.weight"]
    with pytest.raises(RuntimeError, match=re.escape("transformer.wte.weight")):
        GPT(config).load_state_dict(weights)


def test_a_tied_head_is_the_embedding_and_stays_so():
    config = toy_config(tie_embeddings=True)
    model = toy_model(config)

    for tied in (model, copy.deepcopy(model), toy_model(config).double()):
        assert tied.lm_head.weight is tied.transformer.wte.weight
    model(toy_tokens(config)[:, :-1]).sum().backward()
    assert [name for name, _ in model.named_parameters()] == list(parameter_shapes(config))


def test_initial_weights_follow_the_table():
    config = toy_config(n_layer=3, n_embd=128, vocab_size=512, padded_vocab_size=512, intermediate_size=256)
    model = GPT(config)
    init_weights(model, seed=1)

    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones(128)), name
            continue
        writes = name.endswith(("attn.proj.weight", "w3.weight"))
        std = 1 / (math.sqrt(128) * 3) if writes else math.sqrt(2 / (5 * 128))
        assert weight.std().item() == pytest.approx(std, rel=0.03), name
        assert abs(weight.mean().item()) < 4 * std / math.sqrt(weight.numel()), name


def test_a_fresh_model_guesses():
    config = toy_config(n_embd=64, vocab_size=512, padded_vocab_size=512)
    model = GPT(config)
    init_weights(model, seed=0)
    tokens = toy_tokens(config, n_rows=8)
    assert model(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(math.log(512), abs=0.35)


def test_an_initial_weight_depends_on_seed_name_and_shape_and_on_nothing_else():
    small, large = toy_config(n_layer=2), toy_config(n_layer=6, n_query_groups=2, block_size=8, norm_eps=1e-3)
    torch.manual_seed(99)
    state = torch.get_rng_state()

    for name in parameter_shapes(small):
        one, other = init_tensor(name, small, 5), init_tensor(name, large, 5)
        if name.endswith(("attn.proj.weight", "w3.weight")):
            other = other * 3  # their scale is that of a deeper model
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
        assert torch.equal(one, init_tensor(name, small, 5))
        if one.dim() == 2:
            assert not torch.equal(one, init_tensor(name, small, 6))
    first, second = (init_tensor(f"transformer.h.{layer}.attn.attn.weight", small, 5) for layer in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state), "nobody else's random numbers are used up"


@TIES
def test_init_weights_is_init_tensor_for_every_parameter(tie_embeddings):
    config = toy_config(tie_embeddings=tie_embeddings)
    model = GPT(config)
    init_weights(model, seed=3)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, init_tensor(name, config, 3))
