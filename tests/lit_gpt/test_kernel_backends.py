"""Backends of every operation: each that runs here against the reference in float64, and how one is chosen."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_gpt.kernels import reference, self_check
from lit_gpt.kernels.attention import causal_attention, document_mask
from lit_gpt.kernels.backend import Backend, Situation
from lit_gpt.kernels.choice import BACKENDS, PLAIN, Kernels, auto, resolve
from lit_gpt.kernels.rope import cos_sin
from lit_gpt.kernels.self_check import relative_error, values_and_gradients
from lit_gpt.kernels.settings import BackendUnavailable, KernelConfig
from tests.toys import toy_config, toy_model, toy_tokens

CPU = torch.device("cpu")
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2e-2}
DTYPES = st.sampled_from(list(TOLERANCE))
H100 = Situation("cuda", torch.bfloat16, capability=(9, 0), cudnn=91900)
A100 = dataclasses.replace(H100, capability=(8, 0))
OPERATIONS = [field.name for field in dataclasses.fields(KernelConfig)]


def usable(operation: str) -> list[str]:
    return [name for name, backend in BACKENDS[operation].items() if backend.missing(Situation()) is None]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_as_reference(found, expected, inputs: list[Tensor]) -> None:
    """Outputs and gradients against those of the reference in float64; rounding is that of the first input's dtype."""
    ours = values_and_gradients(found, inputs)
    exact = values_and_gradients(expected, [x.double() for x in inputs])
    for one, other in zip(ours, exact, strict=True):
        room = TOLERANCE[inputs[0].dtype] * (1 + float(other.norm()))
        assert float((one.double() - other).norm()) <= room


@settings(max_examples=20)
@given(
    length=st.integers(1, 12),
    groups=st.integers(1, 3),
    repeats=st.integers(1, 3),
    head_size=st.sampled_from([1, 8, 20]),
    dtype=DTYPES,
    masked=st.booleans(),
)
@pytest.mark.parametrize("name", usable("attention"))
def test_attention_is_the_references(name, length, groups, repeats, head_size, dtype, masked):
    q = random(2, groups * repeats, length, head_size, dtype=dtype)
    k, v = (random(2, groups, length, head_size, seed=seed, dtype=dtype) for seed in (1, 2))
    mask = document_mask(torch.arange(2 * length).view(2, length) % 5, 0) if masked else None
    by = BACKENDS["attention"][name].op

    assert_as_reference(
        lambda q, k, v: causal_attention(q, k, v, cpu_has_bf16=False, mask=mask, by=by),
        lambda q, k, v: reference.attention(q, k, v, mask),
        [q, k, v],
    )


@settings(max_examples=20)
@given(rows=st.integers(1, 9), channels=st.integers(4, 40), dtype=DTYPES)
@pytest.mark.parametrize("name", usable("norm"))
def test_norms_are_the_references(name, rows, channels, dtype):
    norm = BACKENDS["norm"][name].op
    x, delta = random(2, rows, channels, dtype=dtype), random(2, rows, channels, seed=1, dtype=dtype)
    weight = random(channels, seed=2, dtype=torch.promote_types(dtype, torch.float32))

    assert_as_reference(lambda x, w: norm.alone(x, w, 1e-5), lambda x, w: reference.rms_norm(x, w, 1e-5), [x, weight])
    assert_as_reference(
        lambda x, d, w: norm.after_adding(x, d, w, 1e-5),
        lambda x, d, w: reference.add_rms_norm(x, d, w, 1e-5),
        [x, delta, weight],
    )


@settings(max_examples=20)
@given(n=st.integers(1, 40), gelu=st.booleans(), dtype=DTYPES)
@pytest.mark.parametrize("name", usable("mlp"))
def test_gates_are_the_references(name, n, gelu, dtype):
    gate, up = random(2, n, dtype=dtype), random(2, n, seed=1, dtype=dtype)
    assert_as_reference(
        lambda g, u: BACKENDS["mlp"][name].op(g, u, gelu), lambda g, u: reference.gated(g, u, gelu), [gate, up]
    )


@settings(max_examples=20)
@given(tokens=st.integers(1, 6), half=st.integers(1, 5), rest=st.integers(0, 3), dtype=DTYPES)
@pytest.mark.parametrize("name", usable("rope"))
def test_rotations_are_the_references(name, tokens, half, rest, dtype):
    x = random(2, tokens, 3, 2 * half + rest, dtype=dtype)
    angles = cos_sin(random(tokens, half, seed=1, dtype=torch.promote_types(dtype, torch.float32)))
    exact = [each.double() for each in angles]
    assert_as_reference(lambda x: BACKENDS["rope"][name].op(x, *angles), lambda x: reference.rope(x, *exact), [x])


@settings(max_examples=20)
@given(n=st.integers(2, 20), vocab=st.integers(2, 30), dtype=DTYPES, ignored=st.integers(0, 3))
@pytest.mark.parametrize("name", usable("loss"))
def test_losses_are_the_references(name, n, vocab, dtype, ignored):
    hidden, weight = random(n, 8, dtype=dtype), random(vocab, 8, seed=1, dtype=dtype)
    targets = torch.arange(n) % vocab
    targets[:ignored] = -100
    loss = BACKENDS["loss"][name].op

    assert_as_reference(
        lambda h, w: loss(h, w, targets, reduction="mean"),
        lambda h, w: reference.linear_cross_entropy(h, w, targets),
        [hidden, weight],
    )
    with torch.no_grad():
        each = loss(hidden, weight, targets, reduction="none")
        exact = reference.linear_cross_entropy(hidden.double(), weight.double(), targets, reduction="none")
    assert float((each - exact).norm()) <= TOLERANCE[dtype] * (1 + float(exact.norm()))


@pytest.mark.parametrize("name", usable("loss"))
def test_in_bf16_the_loss_is_off_by_less_than_1e_4(name):
    """A mean over 4,096 rows; a sum or a scalar in bf16 would be off by hundreds of times as much."""
    hidden = random(4096, 256, dtype=torch.bfloat16)
    weight = (random(4096, 256, seed=1) / 10).bfloat16()
    targets = torch.arange(4096) * 7 % 4096
    exact = reference.linear_cross_entropy(hidden.double(), weight.double(), targets)
    found = BACKENDS["loss"][name].op(hidden, weight, targets, reduction="mean")
    assert found.dtype == torch.float32
    assert abs(found.double() - exact) < 1e-4


STATUS = Path("/proc/self/status")
PEAK = """
import sys, torch
from benchmarks.machine import own_memory
from lit_gpt.kernels.choice import BACKENDS
torch.manual_seed(0)
hidden = torch.randn(8192, 64).requires_grad_()
weight = torch.randn(32000, 64).div_(8).requires_grad_()
targets = torch.randint(32000, (8192,))
BACKENDS["loss"]["chunked"].op(hidden[:8], weight, targets[:8], reduction="mean").backward()  # load what it loads
before = own_memory("VmHWM")
BACKENDS["loss"][sys.argv[1]].op(hidden, weight, targets, reduction="mean").backward()
print(own_memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="no /proc with figures on a process")
def test_the_chunked_loss_needs_at_most_a_quarter_of_the_memory_of_all_logits():
    """Of what the process takes beyond its inputs and the weight's gradient, 8,192 rows over 32,000 tokens."""
    peaks = {}
    for name in ("chunked", "torch"):
        done = subprocess.run([sys.executable, "-c", PEAK, name], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks[name] = int(done.stdout)
    assert 0 < peaks["chunked"] <= peaks["torch"] / 4, peaks


def test_every_name_in_the_settings_has_a_backend_and_the_other_way_round():
    for operation, hint in get_type_hints(KernelConfig).items():
        assert set(get_args(hint)) == {"auto", *BACKENDS[operation]}
    assert set(BACKENDS) == set(OPERATIONS)


def test_a_model_that_nobody_chose_for_computes_with_what_runs_everywhere():
    chosen = resolve(KernelConfig(), Situation())
    assert chosen == Kernels() and chosen.names == PLAIN
    assert str(chosen) == "attention=sdpa norm=torch mlp=torch rope=torch loss=chunked"
    assert all(BACKENDS[operation][getattr(PLAIN, operation)].needs == () for operation in OPERATIONS)


def all_installed(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib, "import_module", lambda name: name)


@pytest.mark.parametrize(
    ("situation", "expected"),
    [
        (H100, "cudnn triton triton triton chunked"),
        (dataclasses.replace(H100, compiled=True), "cudnn torch torch torch chunked"),
        (dataclasses.replace(H100, cudnn=91400), "flash triton triton triton chunked"),
        (dataclasses.replace(H100, head_sizes=(64, 256)), "flash triton triton triton chunked"),
        (dataclasses.replace(H100, head_sizes=(20,)), "sdpa triton triton triton chunked"),
        (dataclasses.replace(H100, masked=True), "sdpa triton triton triton chunked"),
        (dataclasses.replace(H100, dtype=torch.float32), "sdpa triton triton triton chunked"),
        (dataclasses.replace(H100, n_embd=16384), "cudnn torch triton triton chunked"),
        (A100, "flash triton triton triton chunked"),
        (dataclasses.replace(H100, capability=(10, 3)), "cudnn triton triton triton chunked"),
        (dataclasses.replace(H100, capability=(12, 0)), "flash triton triton triton chunked"),
        (dataclasses.replace(A100, capability=(7, 5)), "sdpa torch torch torch chunked"),
        (Situation(dtype=torch.bfloat16), "sdpa torch torch torch chunked"),
        (Situation(compiled=True), "sdpa torch torch torch chunked"),
    ],
)
def test_auto_takes_the_fastest_that_torch_brings_along_and_never_another_package(situation, expected, monkeypatch):
    all_installed(monkeypatch)
    assert " ".join(auto(operation, situation) for operation in OPERATIONS) == expected


def test_without_triton_auto_is_torch_on_a_gpu_too(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert auto("norm", H100) == "torch"


@pytest.mark.parametrize(
    ("wanted", "situation", "reason"),
    [
        ({"attention": "fa3"}, Situation(), "needs a CUDA device, this run is on cpu"),
        ({"attention": "fa3"}, A100, "needs a GPU of sm_9x, this one is sm_80"),
        ({"attention": "fa4"}, A100, "needs a GPU of sm_9x or sm_10x, this one is sm_80"),
        ({"attention": "flash"}, dataclasses.replace(A100, capability=(7, 5)), "needs a GPU of sm_80 or newer"),
        ({"attention": "cudnn"}, dataclasses.replace(H100, cudnn=91400), "needs cuDNN 9.15.1 or newer, found 9.14.0"),
        ({"attention": "cudnn"}, dataclasses.replace(H100, cudnn=None), "needs cuDNN 9.15.1 or newer, found none"),
        ({"attention": "flash"}, dataclasses.replace(H100, masked=True), "knows no mask"),
        ({"attention": "flash"}, dataclasses.replace(H100, head_sizes=(64, 20)), "this model has 20"),
        ({"attention": "flash"}, dataclasses.replace(H100, dtype=torch.float32), "this run computes in fp32"),
        ({"attention": "flash_attn"}, H100, "needs the package flash_attn; pip install"),
        ({"attention": "xformers"}, H100, "needs the package xformers.ops; pip install"),
        ({"norm": "triton"}, Situation(), "needs a CUDA device, this run is on cpu"),
        ({"norm": "triton"}, dataclasses.replace(H100, n_embd=9000), "norms at most 8192 channels together"),
        ({"loss": "triton"}, dataclasses.replace(H100, dtype=torch.float64), "computes in fp32 at most"),
        ({"rope": "triton"}, H100, "needs the package triton; it comes with torch's CUDA builds"),
    ],
)
def test_a_backend_that_cannot_run_is_refused_with_reason_and_way_out(wanted, situation, reason, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailable) as refused:
        resolve(KernelConfig(**wanted), situation)
    (operation, name), message = next(iter(wanted.items())), str(refused.value)
    assert message.startswith(f"kernels.{operation}={name!r} cannot be used: ") and reason in message
    assert f"Use kernels.{operation}=auto; python -m lit_gpt.kernels.doctor says what" in message


def test_all_that_cannot_run_are_named_at_once():
    with pytest.raises(BackendUnavailable) as refused:
        resolve(KernelConfig(attention="cudnn", mlp="triton", rope="triton"), Situation())
    assert [line.split("=")[0] for line in str(refused.value).splitlines()] == [
        *("kernels.attention", "kernels.mlp", "kernels.rope")
    ]


def test_a_package_that_is_there_and_does_not_load_is_refused_with_its_own_words(monkeypatch):
    def broken(name):
        raise ImportError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(BackendUnavailable, match=r"whose import fails \(libcudart.so.12: cannot open"):
        resolve(KernelConfig(attention="xformers"), H100)


def test_flash_attention_3_is_put_in_the_place_of_torchs_own(monkeypatch):
    activated = []
    all_installed(monkeypatch)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append)
    assert resolve(KernelConfig(attention="fa3"), H100).names.attention == "fa3"
    assert resolve(KernelConfig(attention="flash"), H100).names.attention == "flash"
    assert activated == ["FA3"]


def test_a_torch_that_does_not_know_it_and_a_package_of_another_version_are_refused(monkeypatch):
    all_installed(monkeypatch)

    def other_version(_):
        raise RuntimeError("Module 'flash_attn_interface' does not expose FA3 backward kernels")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", other_version)
    with pytest.raises(BackendUnavailable, match="kernels.attention='fa3' cannot be used: .*FA3 backward"):
        resolve(KernelConfig(attention="fa3"), H100)
    monkeypatch.setattr(torch.nn.attention, "list_flash_attention_impls", lambda: ["FA4"])
    with pytest.raises(BackendUnavailable, match="kernels.attention='fa3' cannot be used: needs a torch that knows"):
        resolve(KernelConfig(attention="fa3"), H100)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("wanted", [{}, {"attention": "math", "norm": "reference", "rope": "reference"}])
def test_the_self_check_accepts_what_runs_here(dtype, wanted):
    situation = Situation(dtype=dtype, head_sizes=(8, 20))
    self_check.self_check(resolve(KernelConfig(**wanted), situation), situation, CPU)


def off(operation: str) -> Kernels:
    """One operation that is not what it should be."""
    plain = Kernels()
    wrong = {
        "attention": {"attention": lambda q, k, v, mask: v.repeat_interleave(q.size(1) // k.size(1), dim=1)},
        "norm": {"norm": plain.norm._replace(alone=lambda x, w, eps: x * w)},
        "norm, adding": {
            "norm": plain.norm._replace(after_adding=lambda x, d, w, eps: (x, plain.norm.alone(x, w, eps)))
        },
        "mlp": {"mlp": lambda gate, up, gelu: gate * up},
        "rope": {"rope": lambda x, cos, sin: plain.rope(x, cos, -sin)},
        "rope, backward": {"rope": lambda x, cos, sin: plain.rope(x, cos, sin).detach() + 0 * x},
        "loss": {"loss": lambda h, w, t, reduction: plain.loss(h, w, t, reduction=reduction) * 1.1},
    }
    return dataclasses.replace(plain, **wrong[operation])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", ["attention", "norm", "norm, adding", "mlp", "rope", "rope, backward", "loss"])
def test_the_self_check_refuses_what_computes_something_else(operation, dtype):
    situation = Situation(dtype=dtype)
    named = operation.split(",")[0]
    with pytest.raises(BackendUnavailable, match=rf"kernels.{named}='\w+' computes something else than the reference"):
        self_check.self_check(off(operation), situation, CPU)


@pytest.mark.parametrize("kind", [RuntimeError, type("CompilationError", (Exception,), {})])
def test_the_self_check_refuses_what_fails_and_what_is_no_number(kind):
    def fails(q, k, v, mask):
        raise kind("No available kernel. Aborting execution.")

    for attention, message in ((fails, "fails on its first input: No available"), (lambda q, *_: q * torch.nan, "nan")):
        with pytest.raises(BackendUnavailable, match=message):
            self_check.self_check(dataclasses.replace(Kernels(), attention=attention), Situation(), CPU)


def test_the_self_check_leaves_the_random_numbers_alone():
    before = torch.random.get_rng_state()
    self_check.self_check(Kernels(), Situation(), CPU)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("placement", ["before", "after"])
def test_a_model_computes_every_operation_with_what_was_chosen(placement):
    config = toy_config(norm_placement=placement, qk_norm="head")
    called = []

    def spy(name, function):
        return lambda *arguments, **options: called.append(name) or function(*arguments, **options)

    plain = Kernels()
    kernels = Kernels(
        spy("attention", plain.attention),
        plain.norm._replace(alone=spy("norm", plain.norm.alone), after_adding=spy("adding", plain.norm.after_adding)),
        spy("mlp", plain.mlp),
        spy("rope", plain.rope),
        spy("loss", plain.loss),
    )
    model, tokens = toy_model(config), toy_tokens(config)
    expected = model(tokens[:, :-1], tokens[:, 1:])
    model.use_kernels(kernels)
    assert torch.equal(model(tokens[:, :-1], tokens[:, 1:]), expected)
    adds = placement == "before"
    per_layer = {"attention": 1, "mlp": 1, "rope": 2, "norm": 3 if adds else 4, "adding": int(adds)}
    counts = {name: count * config.n_layer for name, count in per_layer.items()}
    assert {name: called.count(name) for name in counts} == counts | {"norm": counts["norm"] + 1}
    assert called.count("loss") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wanted", "recompute"),
    [
        ({}, "none"),
        ({}, "selective"),
        ({}, "full"),
        ({"attention": "math", "norm": "reference", "mlp": "reference"}, "none"),
    ],
)
def test_a_block_is_one_graph_to_the_compiler(wanted, recompute):
    config = toy_config()
    model = toy_model(config)
    model.use_kernels(resolve(KernelConfig(**wanted), Situation(compiled=True)))
    model.transformer.h[0].recompute = recompute
    block, angles = model.transformer.h[0], cos_sin(random(16, config.rope_n_elem // 2, dtype=torch.float32))
    x = random(2, 16, config.n_embd, dtype=torch.float32)
    eager = values_and_gradients(lambda x: block(x, *angles), [x])
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for one, other in zip(values_and_gradients(lambda x: compiled(x, *angles), [x]), eager, strict=True):
        assert relative_error(one, other) < 1e-6


def test_a_backend_says_the_first_thing_that_it_lacks():
    backend = Backend(print, (lambda _: None, lambda _: "one", lambda _: "two"))
    assert backend.missing(Situation()) == "one"
