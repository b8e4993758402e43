"""What each precision promises: the dtype of weights, residual stream, products, loss, gradients, moments and sums."""

from __future__ import annotations

import pytest
import torch

from pretrain.config import OptimizerConfig, ParallelConfig
from pretrain.optim import build_optimizer, load_named_state, named_state
from pretrain.parallel import Compute, build_model
from pretrain.world import ALONE, connected
from tests.toys import toy_config, toy_tokens, toy_weights

CPU = torch.device("cpu")
CONFIG = toy_config(n_layer=2)
# precision: dtype of weights, gradients and moments, and of the residual stream with all that goes into products
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.float32, torch.bfloat16),
    "bf16-true": (torch.bfloat16, torch.bfloat16),
}


def model_of(precision: str, strategy: str = "auto"):
    compute = Compute(precision, "none", "")
    return build_model(CONFIG, toy_weights(CONFIG), compute, ParallelConfig(strategy), ALONE, device=CPU)


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
@pytest.mark.parametrize("precision", DTYPES)
def test_what_is_stored_and_what_is_computed_have_the_dtypes_that_are_promised(precision, strategy):
    stored, computed = DTYPES[precision]
    seen: dict[str, set[torch.dtype]] = {"into": set(), "out": set()}

    def note(module, inputs, output):
        seen["into"].add(inputs[0].dtype)
        seen["out"].add(output.dtype)

    with connected(ALONE, "cpu", alone_too=strategy == "fsdp"):
        model = model_of(precision, strategy)
        for block in model.transformer.h:
            for module in (block, block.norm_1, block.norm_2, block.attn, block.attn.attn, block.attn.proj, block.mlp):
                module.register_forward_hook(note)
        model.transformer.ln_f.register_forward_hook(note)
        tokens = toy_tokens(CONFIG)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer = build_optimizer(model, OptimizerConfig())
        optimizer.step()

        assert seen == {"into": {computed}, "out": {computed}}
        assert loss.dtype == torch.float32
        assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {stored}
        slots = [tensor for state in named_state(model, optimizer).values() for tensor in state.values()]
        assert {slot.dtype for slot in slots if slot.dim()} == {stored}


@pytest.mark.parametrize("precision", DTYPES)
def test_gradients_of_processes_are_summed_in_fp32(precision):
    with connected(ALONE, "cpu", alone_too=True):
        model = model_of(precision, "fsdp")
        units = [model, *model.transformer.h]
        assert {unit._get_fsdp_state()._mp_policy.reduce_dtype for unit in units} == {torch.float32}


def test_bf16_updates_what_bf16_weights_would_lose():
    """A step of 1e-4 beside a weight of 1 is less than half of bf16's spacing there."""
    moved = {}
    for precision in ("bf16", "bf16-true"):
        model = model_of(precision)
        weight = model.transformer.h[0].norm_1.weight
        before = weight.detach().clone()
        tokens = toy_tokens(CONFIG)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        build_optimizer(model, OptimizerConfig(learning_rate=1e-4)).step()
        moved[precision] = float((weight.detach() != before).float().mean())
    assert moved["bf16"] == 1.0 and moved["bf16-true"] < 0.2


@pytest.mark.parametrize("other", [{"foreach": True}, {"fused": False, "foreach": False}])
def test_moments_by_name_are_those_of_any_adamw(other):
    """The fused one is the default; a checkpoint does not know which it was, so the choice may change on resume."""
    ends = []
    for kind in ({"fused": True}, other):
        first = model_of("fp32")
        optimizer = build_optimizer(first, OptimizerConfig())
        assert optimizer.defaults["fused"]
        step(first, optimizer)
        second = model_of("fp32")
        second.load_state_dict(first.state_dict())
        groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups_of(second)]
        resumed = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, **kind)
        load_named_state(second, resumed, named_state(first, optimizer))
        step(second, resumed)
        ends.append(second.state_dict())
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-5, atol=1e-7)


def groups_of(model):
    return build_optimizer(model, OptimizerConfig()).param_groups


def step(model, optimizer):
    tokens = toy_tokens(CONFIG)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()
