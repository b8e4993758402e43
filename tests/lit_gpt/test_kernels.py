"""Norm, RoPE and products: each against the plain formula, values and gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from lit_gpt.kernels.attention import causal_attention
from lit_gpt.kernels.norm import rms_norm
from lit_gpt.kernels.products import linear, multiplies_bf16, product_dtype
from lit_gpt.kernels.rope import apply_rope, cos_sin
from lit_gpt.model import GPT, CausalSelfAttention, Linear
from tests.toys import toy_config, toy_tokens, toy_weights


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(function, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of the sum of the output times fixed random numbers."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    output = function(*inputs)
    return torch.autograd.grad(output, inputs, random(*output.shape, dtype=output.dtype, seed=9))


def test_the_norm_passes_gradcheck():
    inputs = (random(2, 3, 5).requires_grad_(), random(5, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-2), inputs)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 6e-3)]
)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
def test_the_norm_is_torchs_in_value_and_gradient(dtype, tolerance, weight_dtype):
    x, weight = random(4, 7, 32, dtype=dtype), random(32, dtype=weight_dtype or dtype, seed=1)

    def reference(x, weight):
        return F.rms_norm(x.double(), (32,), weight.double(), 1e-5)

    ours = (rms_norm(x, weight, 1e-5), *gradients(lambda x, w: rms_norm(x, w, 1e-5), x, weight))
    exact = (reference(x, weight), *gradients(reference, x, weight))

    assert [t.dtype for t in ours] == [dtype, dtype, weight.dtype]
    for found, expected in zip(ours, exact, strict=True):
        assert (found.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("n", [4, 8])
def test_rope_is_a_complex_product_and_its_gradient_is_that_of_autograd(n):
    x, angles = random(2, 5, 3, 8), random(5, n // 2, seed=1)
    cos, sin = cos_sin(angles)

    def reference(x):
        turned = (
            torch.complex(x[..., : n // 2], x[..., n // 2 : n]) * torch.polar(torch.ones(1).double(), angles)[:, None]
        )
        return torch.cat((turned.real, turned.imag, x[..., n:]), dim=-1)

    torch.testing.assert_close(apply_rope(x, cos, sin), reference(x))
    torch.testing.assert_close(gradients(lambda x: apply_rope(x, cos, sin), x), gradients(reference, x))


def test_bf16_is_widened_on_a_cpu_that_would_emulate_it_and_nothing_else_is():
    assert product_dtype(random(1, dtype=torch.bfloat16), cpu_has_bf16=False) == torch.float32
    assert product_dtype(random(1, dtype=torch.bfloat16), cpu_has_bf16=True) == torch.bfloat16
    assert product_dtype(torch.empty(1, dtype=torch.bfloat16, device="meta"), cpu_has_bf16=False) == torch.bfloat16
    assert product_dtype(random(1), cpu_has_bf16=False) == torch.float64


@pytest.mark.parametrize(("major", "expected"), [(7, False), (8, True)])
def test_a_gpu_that_emulates_bf16_does_not_multiply_it(monkeypatch, major, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    assert multiplies_bf16(torch.device("cuda")) is expected


def test_widened_products_are_those_of_bf16():
    x, weight = random(64, 48, dtype=torch.bfloat16), random(32, 48, dtype=torch.float32, seed=1)
    q, k, v = (random(2, 2, 16, 8, dtype=torch.bfloat16, seed=seed) for seed in (1, 2, 3))

    for function, inputs in ((linear, (x, weight)), (causal_attention, (q, k, v))):
        plain, wide = (
            (
                function(*inputs, cpu_has_bf16=has),
                *gradients(lambda *t, f=function, h=has: f(*t, cpu_has_bf16=h), *inputs),
            )
            for has in (True, False)
        )
        assert [t.dtype for t in plain] == [t.dtype for t in wide]
        for one, other in zip(plain, wide, strict=True):
            assert (one.double() - other.double()).norm() <= 2**-7 * one.double().norm()


def test_a_bf16_model_has_the_same_loss_with_and_without_bf16_instructions():
    config = toy_config()
    tokens, losses = toy_tokens(config), []
    for has in (True, False):
        model = GPT(config, compute_dtype=torch.bfloat16)
        model.load_state_dict(toy_weights(config))
        for module in model.modules():
            if isinstance(module, (Linear, CausalSelfAttention)):
                module.cpu_has_bf16 = has
        losses.append(model(tokens[:, :-1], tokens[:, 1:]).item())
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_attention_over_a_cache_sees_the_keys_up_to_its_own_position():
    q, k, v = (random(1, 2, 6, 4, seed=seed) for seed in (1, 2, 3))
    whole = causal_attention(q, k, v, cpu_has_bf16=True)
    for T in (1, 2, 5):
        torch.testing.assert_close(causal_attention(q[:, :, -T:], k, v, cpu_has_bf16=True), whole[:, :, -T:])
