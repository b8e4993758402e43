"""The chunked loss against the plain one: values, gradients, dtypes, and targets that do not count."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.kernels import reference
from lit_gpt.kernels.loss import chunk_loss, linear_cross_entropy


def inputs(n: int = 13, width: int = 8, vocab: int = 11, *, dtype=torch.float64, ignored: int = 3, seed: int = 0):
    """hidden (n, width), weight (vocab, width), targets (n,) of which the first `ignored` do not count."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (n,), generator=generator)
    targets[:ignored] = -100
    return hidden, weight, targets


def value_and_gradients(loss_fn, hidden, weight, targets, **options):
    loss = loss_fn(hidden, weight, targets, **options)
    return (loss, *torch.autograd.grad(loss, (hidden, weight)))


@given(
    n=st.integers(1, 20),
    vocab=st.integers(2, 12),
    chunk_rows=st.integers(1, 24),
    share=st.floats(0, 0.9),
    seed=st.integers(0, 99),
)
def test_any_chunking_gives_the_plain_loss_and_gradients(n, vocab, chunk_rows, share, seed):
    tensors = inputs(n, 6, vocab, ignored=int(share * n), seed=seed)

    chunked = value_and_gradients(linear_cross_entropy, *tensors, chunk_rows=chunk_rows)
    plain = value_and_gradients(reference.linear_cross_entropy, *tensors)

    for ours, expected in zip(chunked, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chunk_rows", [1, 5, 13, 64])
def test_gradients_pass_gradcheck_in_float64(chunk_rows):
    hidden, weight, targets = inputs(9, 4, 7)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, chunk_rows=chunk_rows), (hidden, weight)
    )


@pytest.mark.parametrize(
    ("dtype", "loss_dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 2e-6),
        (torch.bfloat16, torch.float32, 2e-2),
    ],
)
def test_each_dtype_is_as_exact_as_it_can_be(dtype, loss_dtype, tolerance):
    tensors = inputs(200, 32, 50, dtype=dtype, ignored=20)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors[:2]]

    ours = value_and_gradients(linear_cross_entropy, *tensors, chunk_rows=64)
    truth = value_and_gradients(reference.linear_cross_entropy, *exact, tensors[2])

    assert ours[0].dtype == loss_dtype and ours[1].dtype == ours[2].dtype == dtype
    for found, expected in zip(ours, truth, strict=True):
        assert (found.double() - expected).norm() <= tolerance * expected.norm()


def test_bf16_activations_over_fp32_weights_give_an_fp32_weight_gradient():
    hidden, weight, targets = inputs(200, 32, 50, dtype=torch.float32)

    loss, _, grad_weight = value_and_gradients(
        lambda h, w, t: linear_cross_entropy(h.bfloat16(), w, t, chunk_rows=64), hidden, weight, targets
    )

    expected = value_and_gradients(reference.linear_cross_entropy, hidden, weight, targets)
    assert loss.dtype == grad_weight.dtype == torch.float32
    assert (grad_weight - expected[2]).norm() <= 2e-2 * expected[2].norm()


def test_a_batch_in_which_nothing_counts_has_loss_and_gradients_zero():
    hidden, weight, targets = inputs(5, ignored=5)

    loss, grad_hidden, grad_weight = value_and_gradients(linear_cross_entropy, hidden, weight, targets, chunk_rows=2)

    assert loss == 0 and not grad_hidden.any() and not grad_weight.any()


def test_targets_that_do_not_count_get_no_gradient():
    hidden, weight, targets = inputs(6, ignored=2)
    _, grad_hidden, _ = value_and_gradients(linear_cross_entropy, hidden, weight, targets)
    assert not grad_hidden[:2].any() and grad_hidden[2:].any(dim=1).all()


def test_the_loss_can_be_scaled_before_backward():
    hidden, weight, targets = inputs()
    once = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    thrice = torch.autograd.grad(3 * linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    for one, three in zip(once, thrice, strict=True):
        torch.testing.assert_close(three, 3 * one)


def test_a_frozen_head_still_passes_the_gradient_on():
    hidden, weight, targets = inputs()
    (expected,) = torch.autograd.grad(reference.linear_cross_entropy(hidden, weight, targets), hidden)
    (found,) = torch.autograd.grad(linear_cross_entropy(hidden, weight.detach(), targets), hidden)
    torch.testing.assert_close(found, expected)


def test_without_reduction_there_is_one_loss_per_target():
    hidden, weight, targets = inputs()

    losses = linear_cross_entropy(hidden, weight, targets, reduction="none", chunk_rows=4)

    torch.testing.assert_close(losses, F.cross_entropy(hidden @ weight.t(), targets, reduction="none"))
    assert not losses.requires_grad and not losses[:3].any()
    torch.testing.assert_close(losses.sum() / 10, linear_cross_entropy(hidden, weight, targets))


def test_no_more_than_a_chunk_of_logits_exists_at_a_time():
    shapes = []

    def spy(logits, targets):
        shapes.append(tuple(logits.shape))
        return chunk_loss(logits, targets)

    hidden, weight, targets = inputs(10)
    linear_cross_entropy(hidden, weight, targets, chunk_rows=4, kernel=spy)

    assert shapes == [(4, 11), (4, 11), (2, 11)]


def test_without_gradients_the_loss_is_the_same_and_no_gradient_is_made(monkeypatch):
    hidden, weight, targets = inputs()
    expected = linear_cross_entropy(hidden, weight, targets, chunk_rows=4)
    monkeypatch.setattr(torch, "zeros_like", None)  # what the weight's gradient would be made with

    with torch.no_grad():
        found = linear_cross_entropy(hidden, weight, targets, chunk_rows=4)
        nothing = linear_cross_entropy(hidden[:2], weight, targets[:2])

    torch.testing.assert_close(found, expected.detach())
    assert nothing == 0 and not found.requires_grad


def test_very_large_logits_do_not_overflow():
    hidden, weight, targets = inputs(dtype=torch.float32)
    with torch.no_grad():
        weight *= 1e4
    loss, *gradients = value_and_gradients(linear_cross_entropy, hidden, weight, targets)
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction='sum' must be 'mean' or 'none'"):
        linear_cross_entropy(*inputs(), reduction="sum")
