"""Every backend that a GPU can run, against the reference, and a compiled block. No GPU has run these yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from lit_gpt.kernels.backend import Situation
from lit_gpt.kernels.choice import BACKENDS, PLAIN, Kernels, resolve
from lit_gpt.kernels.doctor import examine
from lit_gpt.kernels.rope import cos_sin
from lit_gpt.kernels.self_check import relative_error, self_check, values_and_gradients
from lit_gpt.kernels.settings import KernelConfig
from tests.toys import toy_config, toy_model, toy_tokens

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
# heads of 64 channels, in groups, and widths that tensor cores multiply
CONFIG = toy_config(n_embd=256, n_head=4, n_query_groups=2, intermediate_size=512, block_size=256)
EACH = [(operation, name) for operation, backends in BACKENDS.items() for name in backends]


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    yield
    if torch.nn.attention.current_flash_attention_impl() is not None:  # fa3 or fa4 took its place
        torch.nn.attention.restore_flash_attention_impl()


def only(operation: str, name: str, situation: Situation) -> Kernels:
    """One backend, all else plain."""
    reason = BACKENDS[operation][name].missing(situation)
    if reason is not None:
        pytest.skip(f"{operation} by {name} {reason}")
    return resolve(dataclasses.replace(PLAIN, **{operation: name}), situation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("operation", "name"), EACH)
def test_each_agrees_with_its_reference(operation, name, dtype):
    situation = Situation.on(DEVICE, dtype=dtype)
    self_check(only(operation, name, situation), situation, DEVICE)


@pytest.mark.parametrize(("operation", "name"), EACH)
def test_a_model_has_the_loss_and_gradients_of_plain_fp32(operation, name):
    situation = Situation.on(DEVICE, dtype=torch.bfloat16)
    kernels = only(operation, name, situation)
    tokens = toy_tokens(CONFIG, n_rows=4).to(DEVICE)
    results = []
    for compute_dtype, chosen in ((None, Kernels()), (torch.bfloat16, kernels)):
        model = toy_model(CONFIG).to(DEVICE)
        model.compute_dtype = compute_dtype
        model.use_kernels(chosen)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results.append((loss.detach(), [parameter.grad for parameter in model.parameters()]))
    (expected, exact), (found, ours) = results
    assert float(found) == pytest.approx(float(expected), rel=1e-2)
    for one, other in zip(ours, exact, strict=True):
        assert relative_error(one, other) < 5e-2


@pytest.mark.parametrize("channels", [64, 256, 2048, 4096, 5120, 8192])
@pytest.mark.parametrize("rows", [1, 37, 4096])
def test_the_norm_kernel_is_the_reference_at_every_width(channels, rows):
    norms = [only("norm", name, Situation.on(DEVICE)).norm for name in ("triton", "reference")]
    inputs = [torch.randn(*shape, device=DEVICE) for shape in ((rows, channels), (rows, channels), (channels,))]
    ours, exact = (
        values_and_gradients(lambda x, d, w, norm=norm: norm.after_adding(x, d, w, 1e-5), each)
        for norm, each in zip(norms, (inputs, [x.double() for x in inputs]), strict=True)
    )
    assert max(relative_error(one, other) for one, other in zip(ours, exact, strict=True)) < 1e-5


@pytest.mark.parametrize("vocab", [32000, 50304, 128256])
def test_the_loss_kernel_is_the_reference_at_every_vocabulary(vocab):
    losses = [only("loss", name, Situation.on(DEVICE)).loss for name in ("triton", "torch")]
    hidden, weight = torch.randn(512, 64, device=DEVICE), torch.randn(vocab, 64, device=DEVICE) / 8
    targets = torch.arange(512, device=DEVICE) * 61 % vocab
    ours, exact = (
        values_and_gradients(lambda h, w, loss=loss: loss(h, w, targets, reduction="mean"), [hidden, weight])
        for loss in losses
    )
    assert max(relative_error(one, other) for one, other in zip(ours, exact, strict=True)) < 1e-4


@pytest.mark.parametrize("wanted", [KernelConfig(), KernelConfig(norm="triton", mlp="triton", rope="triton")])
def test_a_block_compiles_into_one_graph_and_computes_the_same(wanted):
    situation = Situation.on(DEVICE, dtype=torch.bfloat16, compiled=True)
    model = toy_model(CONFIG).to(DEVICE)
    model.use_kernels(resolve(wanted, situation))
    block = model.transformer.h[0]
    angles = [each.to(DEVICE) for each in cos_sin(torch.rand(CONFIG.block_size, CONFIG.rope_n_elem // 2))]
    x = torch.randn(2, CONFIG.block_size, CONFIG.n_embd, device=DEVICE, dtype=torch.bfloat16)
    eager = values_and_gradients(lambda x: block(x, *angles), [x])
    compiled = torch.compile(block, fullgraph=True, dynamic=False)
    for one, other in zip(values_and_gradients(lambda x: compiled(x, *angles), [x]), eager, strict=True):
        assert relative_error(one, other) < 2e-2


def test_the_doctor_finds_the_gpu_and_what_auto_takes_agrees_with_its_reference(capsys):
    assert examine(None) == 0
    out = capsys.readouterr().out
    assert torch.cuda.get_device_name(DEVICE) in out and "torch's own order of attention kernels" in out
