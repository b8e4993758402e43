"""Our Triton kernels in Triton's interpreter, without a GPU: numbers, gradients, the compiler, a whole model.

The interpreter cuts fp32 off to bf16 instead of rounding, so fp32 and fp16 are the sharp tests. In a process of its
own: `TRITON_INTERPRET=1 pytest -m triton tests/lit_gpt/test_triton_interpreter.py`.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_gpt.kernels import reference, triton_ops
from lit_gpt.kernels.backend import Situation
from lit_gpt.kernels.choice import Kernels, resolve
from lit_gpt.kernels.loss import linear_cross_entropy
from lit_gpt.kernels.rope import cos_sin
from lit_gpt.kernels.self_check import relative_error, self_check, values_and_gradients
from lit_gpt.kernels.settings import KernelConfig
from lit_gpt.kernels.triton_kernels import triton
from lit_gpt.model import GPT
from tests.toys import toy_config, toy_model, toy_tokens

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(triton is None, reason="no triton: pip install 'lit-grow[triton]'"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs a process of its own with TRITON_INTERPRET=1"
    ),
]

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2**-7}
DTYPES = st.sampled_from(list(TOLERANCE))
TRITON = KernelConfig(attention="sdpa", norm="triton", mlp="triton", rope="triton", loss="triton")
CPU = torch.device("cpu")
few = settings(max_examples=15)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_as_reference(found, expected, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Outputs and gradients against those of the reference in float64."""
    ours = values_and_gradients(found, inputs)
    exact = values_and_gradients(expected, [x.double() for x in inputs])
    for one, other in zip(ours, exact, strict=True):
        assert relative_error(one, other) <= TOLERANCE[dtype]


@few
@given(rows=st.integers(1, 9), channels=st.integers(4, 70), dtype=DTYPES, weight_dtype=DTYPES)
def test_norms_of_any_shape_are_the_references(rows, channels, dtype, weight_dtype):
    x, delta = random(2, rows, channels, dtype=dtype), random(2, rows, channels, seed=1, dtype=dtype)
    weight = random(channels, seed=2, dtype=weight_dtype)
    coarser = max(dtype, weight_dtype, key=TOLERANCE.__getitem__)

    assert_as_reference(
        lambda x, w: triton_ops.triton_rms_norm(x, w, 1e-5),
        lambda x, w: reference.rms_norm(x, w, 1e-5),
        [x, weight],
        coarser,
    )
    assert_as_reference(
        lambda x, d, w: triton_ops.triton_add_rms_norm(x, d, w, 1e-5),
        lambda x, d, w: reference.add_rms_norm(x, d, w, 1e-5),
        [x, delta, weight],
        coarser,
    )


def test_a_norm_of_strided_rows_whose_gradients_are_strided():
    x, weight = random(6, 4, 24).transpose(0, 1), random(24, seed=1)

    def summed(norm):
        return lambda x, w: norm(x, w, 1e-5).transpose(0, 2) * random(24, 6, 4, seed=3).to(x.dtype)

    assert_as_reference(summed(triton_ops.triton_rms_norm), summed(reference.rms_norm), [x, weight], torch.float32)


@few
@given(n=st.integers(1, 1500), gelu=st.booleans(), dtype=DTYPES)
def test_gates_of_any_length_are_the_references(n, gelu, dtype):
    gate, up = 3 * random(n, dtype=dtype), random(n, seed=1, dtype=dtype)
    assert_as_reference(
        lambda g, u: triton_ops.triton_gated(g, u, gelu), lambda g, u: reference.gated(g, u, gelu), [gate, up], dtype
    )


@few
@given(
    tokens=st.integers(1, 5),
    heads=st.integers(1, 6),
    half=st.integers(1, 9),
    rest=st.integers(0, 3),
    dtype=DTYPES,
)
def test_rotations_of_any_shape_are_the_references(tokens, heads, half, rest, dtype):
    x = random(2, tokens, heads, 2 * half + rest, dtype=dtype)
    cos, sin = cos_sin(random(tokens, half, seed=1))
    assert_as_reference(
        lambda x: triton_ops.triton_rope(x, cos, sin),
        lambda x: reference.rope(x, cos.double(), sin.double()),
        [x],
        dtype,
    )


def test_more_heads_than_one_program_takes_are_all_rotated(monkeypatch):
    monkeypatch.setattr(triton_ops, "ROTATE_ELEMENTS", 8)
    x, (cos, sin) = random(1, 2, 5, 8), cos_sin(random(2, 4, seed=1))
    assert_as_reference(
        lambda x: triton_ops.triton_rope(x, cos, sin),
        lambda x: reference.rope(x, cos.double(), sin.double()),
        [x],
        torch.float32,
    )


def test_heads_are_rotated_where_they_lie_between_others():
    qkv, (cos, sin) = random(2, 3, 2, 4, 8), cos_sin(random(3, 4, seed=1))
    part = qkv[..., 2, :]
    torch.testing.assert_close(triton_ops.triton_rope(part, cos, sin), reference.rope(part, cos, sin))


@few
@given(n=st.integers(1, 9), vocab=st.integers(2, 70), chunk_rows=st.integers(1, 9), block=st.sampled_from([16, 4096]))
def test_the_loss_in_place_is_the_references(n, vocab, chunk_rows, block):
    hidden, weight = random(n, 8), random(vocab, 8, seed=1)
    targets = torch.arange(n) % vocab
    targets[:: max(2, n // 2)] = -100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_ops, "LOSS_BLOCK", block)
        ours = values_and_gradients(
            lambda h, w: linear_cross_entropy(
                h, w, targets, chunk_rows=chunk_rows, kernel=triton_ops.triton_chunk_loss
            ),
            [hidden, weight],
        )
    exact = values_and_gradients(
        lambda h, w: reference.linear_cross_entropy(h, w, targets), [hidden.double(), weight.double()]
    )
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


def test_the_gradients_of_logits_take_their_memory_and_large_logits_do_not_overflow():
    logits = 1e4 * random(3, 40)
    before, targets = logits.clone(), torch.tensor([0, 39, -100])
    losses, grads = triton_ops.triton_chunk_loss(logits, targets)
    assert grads.data_ptr() == logits.data_ptr()
    expected = torch.nn.functional.cross_entropy(before, targets.clamp(min=0), reduction="none")
    torch.testing.assert_close(losses, expected)
    assert grads.isfinite().all()


def samples() -> dict[str, tuple[object, tuple[object, ...]]]:
    x, delta, weight = (random(*shape, seed=seed) for seed, shape in enumerate([(4, 24), (4, 24), (24,)]))
    cos, sin = (t.squeeze(1) for t in cos_sin(random(3, 4)))
    learns = {id(t): t.requires_grad_() for t in (x, delta, weight)}
    assert len(learns) == 3
    return {
        "rms_norm": (triton_ops._rms_norm, (x, weight, 1e-5)),
        "add_rms_norm": (triton_ops._add_rms_norm, (x, delta, weight, 1e-5)),
        "rms_norm_backward": (
            triton_ops._rms_norm_backward,
            (x.detach(), delta.detach(), x.detach(), weight.detach(), random(4)),
        ),
        "gated": (triton_ops._gated, (x, delta, True)),
        "gated_backward": (triton_ops._gated_backward, (x.detach(), x.detach(), delta.detach(), False)),
        "rotate": (triton_ops._rotate, (random(2, 3, 2, 8).requires_grad_(), cos, sin)),
        "cross_entropy": (triton_ops._cross_entropy, (random(4, 24), torch.arange(4))),
    }


@pytest.mark.parametrize("name", samples())
def test_torch_finds_each_operation_in_order(name):
    operation, inputs = samples()[name]
    results = torch.library.opcheck(operation, inputs)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"qk_norm": "head", "activation": "gelu_tanh", "rotary_percentage": 0.5, "norm_plus_one": True},
        {"norm_placement": "after", "n_query_groups": 1},
    ],
    ids=["llama", "gemma and others", "norms after"],
)
def test_a_model_of_triton_kernels_is_the_plain_one(sizes):
    config = toy_config(**sizes)
    tokens = toy_tokens(config)
    results = []
    for wanted in (KernelConfig(), TRITON):
        model = toy_model(config)
        model.use_kernels(resolve(wanted, Situation()))
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for plain, ours in zip(*results, strict=True):
        assert relative_error(ours, plain) < 5e-6


def test_a_block_of_triton_kernels_is_one_graph_to_the_compiler():
    config = toy_config()
    model = toy_model(config)
    model.use_kernels(resolve(TRITON, Situation(compiled=True)))
    x = random(2, config.block_size, config.n_embd)
    angles = cos_sin(random(config.block_size, config.rope_n_elem // 2, seed=1))
    block = model.transformer.h[0]

    eager = values_and_gradients(lambda x: block(x, *angles), [x])
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found = values_and_gradients(lambda x: compiled(x, *angles), [x])

    for one, other in zip(found, eager, strict=True):
        assert relative_error(one, other) < 1e-6


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # dynamo does
def test_a_whole_compiled_model_whose_loss_overwrites_its_logits_is_the_plain_one():
    config = toy_config()
    model, tokens = toy_model(config), toy_tokens(config)
    expected = model(tokens[:, :-1], tokens[:, 1:])
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    model.use_kernels(resolve(TRITON, Situation(compiled=True)))

    found = torch.compile(model, backend="aot_eager", dynamic=False)(tokens[:, :-1], tokens[:, 1:])

    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for ours, plain in zip(torch.autograd.grad(found, list(model.parameters())), gradients, strict=True):
        assert relative_error(ours, plain) < 5e-6


def test_sharded_triton_kernels_compute_what_one_process_does(tmp_path):
    from pretrain.config import ParallelConfig
    from pretrain.parallel import Compute, build_model, whole
    from pretrain.world import ALONE, connected
    from tests.toys import toy_weights

    config = toy_config()
    tokens = toy_tokens(config)
    gradients = []
    with connected(ALONE, "cpu", alone_too=True):
        for strategy, kernels in (("auto", Kernels()), ("fsdp", resolve(TRITON, Situation()))):
            compute = Compute("fp32", "none", "", kernels=kernels)
            model: GPT = build_model(config, toy_weights(config), compute, ParallelConfig(strategy), ALONE, device=CPU)
            model(tokens[:, :-1], tokens[:, 1:]).backward()
            gradients.append([whole(parameter.grad) for parameter in model.parameters()])
    for plain, ours in zip(*gradients, strict=True):
        assert relative_error(ours, plain) < 5e-6


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_the_self_check_accepts_them(dtype):
    situation = Situation(dtype=dtype, head_sizes=(32,))
    self_check(resolve(TRITON, situation), situation, CPU)
