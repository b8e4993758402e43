"""Learning from a teacher: the loss is the published one, the teacher stays as it is."""

from __future__ import annotations

import math

import pytest
import torch

from grow import distill
from grow.distill import Distillation, soft_cross_entropy
from tests.toys import toy_config, toy_model, toy_tokens


def test_the_loss_of_a_two_token_vocabulary_is_the_value_on_paper():
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)  # 3/4 and 1/4
    student = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    assert soft_cross_entropy(student, teacher).item() == pytest.approx(math.log(2))
    student = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64)
    expected = -(0.75 * math.log(0.25) + 0.25 * math.log(0.75))
    assert soft_cross_entropy(student, teacher).item() == pytest.approx(expected)


def test_a_student_that_agrees_pays_the_entropy_of_its_teacher():
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert torch.allclose(soft_cross_entropy(logits, logits), entropy)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk_rows", [5, 1000])
def test_the_loss_is_the_mixture_of_hard_and_soft_in_any_chunks(monkeypatch, share, chunk_rows):
    monkeypatch.setattr(distill, "CHUNK_ROWS", chunk_rows)
    config = toy_config()
    student, teacher = (toy_model(config, seed=seed, dtype=torch.float64) for seed in (0, 1))
    tokens = toy_tokens(config)
    idx, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, 3] = -100

    loss = Distillation(student, teacher, share)(idx, targets)

    counted = targets.flatten() >= 0
    soft = soft_cross_entropy(student(idx).flatten(0, 1), teacher(idx).flatten(0, 1))[counted].mean()
    hard = student(idx, targets)
    assert loss.item() == pytest.approx((share * soft + (1 - share) * hard).item(), rel=1e-12)
    wanted = torch.autograd.grad(share * soft + (1 - share) * hard, list(student.parameters()))
    found = torch.autograd.grad(loss, list(student.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-14) for a, b in zip(found, wanted, strict=True))


def test_the_teacher_has_no_gradient_and_may_be_of_another_size():
    student = toy_model(toy_config(n_layer=3))
    teacher = toy_model(toy_config(n_layer=1, n_embd=8, n_head=2, n_query_groups=1, intermediate_size=8))
    tokens = toy_tokens(student.config)

    Distillation(student, teacher)(tokens[:, :-1], tokens[:, 1:]).backward()

    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())


def test_another_vocabulary_and_an_impossible_share_are_refused():
    student = toy_model(toy_config())
    with pytest.raises(ValueError, match="24 embedding rows, the student 20"):
        Distillation(student, toy_model(toy_config(padded_vocab_size=24)))
    with pytest.raises(ValueError, match="distill_weight=1.5"):
        Distillation(student, toy_model(toy_config()), 1.5)
