"""The estimate of memory against the tensors of real training steps: what lives, and when most of it does."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lit_gpt.axes import parameter_shapes
from lit_gpt.config import Config
from lit_gpt.flops import count_parameters
from lit_gpt.kernels import loss
from lit_gpt.kernels.recompute import RECOMPUTE as RECOMPUTE_OF_KERNELS
from lit_gpt.memory import (
    CHUNK_ROWS,
    CPU_CHUNK_ROWS,
    HEAP_TOP,
    RECOMPUTE,
    Computation,
    Memory,
    kept_by_layer,
    memory_per_device,
    memory_text,
)
from lit_gpt.model import GPT
from pretrain.config import OptimizerConfig
from pretrain.optim import build_optimizer
from pretrain.parallel import clip_gradients
from tests.toys import toy_config, toy_tokens, toy_weights

PRECISIONS = ("fp32", "bf16", "bf16-true")


class Live(TorchDispatchMode):
    """Bytes of the tensors that are there, and the most of them that ever were."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self._at_most = 0
        self._add(given)

    def _add(self, made: Any) -> None:
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self._at_most += storage.nbytes()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self._add(made)
        if self._at_most > self.peak:  # looking which are still there takes long
            self._at_most = self.bytes()
            self.peak = max(self.peak, self._at_most)
        return made

    def bytes(self) -> int:
        self.storages = {at: kept for at, kept in self.storages.items() if not kept[0].expired()}
        return sum(size for _, size in self.storages.values())


def model_of(config: Config, how: Computation) -> GPT:
    model = GPT(config, torch.bfloat16 if how.precision == "bf16" else None)
    model.load_state_dict(toy_weights(config))
    if how.precision == "bf16-true":
        model.to(torch.bfloat16)
    for module in model.modules():
        if hasattr(module, "cpu_has_bf16"):
            module.cpu_has_bf16 = how.cpu_has_bf16
    for block in model.transformer.h:
        block.recompute = how.recompute
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in how.frozen)
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, iters: int) -> None:
    for _ in range(iters):
        (model(tokens[:, :-1], tokens[:, 1:]) / iters).backward()
    clip_gradients(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def measured_peak(config: Config, how: Computation) -> int:
    """Of the second step: the first makes the moments."""
    model = model_of(config, how)
    optimizer = build_optimizer(model, OptimizerConfig(name="muon" if how.muon else "adamw"))
    tokens = toy_tokens(config, n_rows=how.micro_batch_size)
    iters = 2 if how.accumulates else 1
    step(model, optimizer, tokens, iters)
    slots = [tensor for state in optimizer.state.values() for tensor in state.values()]
    with Live([*model.parameters(), *slots]) as live:
        step(model, optimizer, tokens, iters)
    return live.peak


COMMON = {"block_size": 256, "n_query_groups": 4, "padded_vocab_size": 256, "n_embd": 64}
SHAPES = {
    "deep": {"n_layer": 6, "intermediate_size": 192},
    "wide": {"block_size": 64, "n_embd": 256, "intermediate_size": 512},
    "many words": {"n_layer": 1, "padded_vocab_size": 8192},
    "many words, tied": {"padded_vocab_size": 8192, "tie_embeddings": True},
    "long": {"block_size": 768, "n_layer": 3, "n_embd": 32},
    "grouped": {"n_layer": 4, "n_query_groups": 2, "intermediate_size": 192},
}
WAYS = [(p, False, r, a) for p, r, a in product(PRECISIONS, RECOMPUTE, (False, True))]
WAYS += [("bf16", True, r, True) for r in RECOMPUTE]


def assert_estimated(shape: str, ways: list[tuple[str, bool, str, bool]]) -> None:
    """To an eighth; the heap's holes are no tensors."""
    config = toy_config(**{**COMMON, **SHAPES[shape]})
    for precision, has_bf16, recompute, accumulates in ways:
        how = Computation(2, precision, recompute, False, accumulates, "cpu", has_bf16)
        memory = memory_per_device(config, how)
        estimated, measured = memory.total - memory.heap, measured_peak(config, how)
        assert estimated == pytest.approx(measured, rel=0.125), (precision, has_bf16, recompute, accumulates)


@pytest.mark.parametrize(("precision", "has_bf16"), [("fp32", True), ("bf16", False), ("bf16", True)])
def test_the_sum_is_what_lives_at_the_peak_of_a_step(precision, has_bf16):
    assert_estimated("grouped", [(precision, has_bf16, recompute, True) for recompute in RECOMPUTE])


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_the_sum_is_what_lives_at_the_peak_of_a_step_of_any_shape(shape):
    assert_estimated(shape, WAYS)


@pytest.mark.parametrize("name", ["muon", "half frozen", "all but the last layer and the head"])
def test_what_does_not_train_or_has_one_moment_takes_less(name):
    config = toy_config(n_layer=4, n_embd=64, intermediate_size=192, block_size=64)
    shapes = parameter_shapes(config)
    frozen = {
        "muon": (),
        "half frozen": [each for each in shapes if ".h.1." in each or ".h.3." in each],
        "all but the last layer and the head": [each for each in shapes if ".h.3." not in each and "head" not in each],
    }
    how = Computation(2, "fp32", accumulates=False, device="cpu", muon=name == "muon", frozen=frozen[name])
    whole = memory_per_device(config, Computation(2, "fp32", accumulates=False, device="cpu"))
    memory = memory_per_device(config, how)
    assert memory.moments < whole.moments and memory.total < whole.total
    assert memory.total - memory.heap == pytest.approx(measured_peak(config, how), rel=0.125)


@pytest.mark.parametrize("n_query_groups", [1, 2, 4])
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize(("precision", "has_bf16"), [("fp32", True), ("bf16", False), ("bf16", True)])
def test_a_layer_keeps_just_what_is_said(precision, has_bf16, recompute, n_query_groups):
    """Also the copies of its weights, unless it makes them again. On a bf16 CPU attention's numbers per head are
    what they are: fp32."""
    sizes = {"n_query_groups": n_query_groups, "block_size": 64, "n_embd": 64, "intermediate_size": 96}
    how = Computation(1, precision, recompute, device="cpu", cpu_has_bf16=has_bf16)

    def kept(n_layer: int) -> int:
        config = toy_config(n_layer=n_layer, **sizes)
        model = model_of(config, how)
        tokens = toy_tokens(config, n_rows=1)
        given = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        with Live([]) as live:
            found = model(tokens[:, :-1], tokens[:, 1:])
        assert found.requires_grad
        live.bytes()
        return sum(size for at, (_, size) in live.storages.items() if at not in given)

    config = toy_config(n_layer=1, **sizes)
    matrices = sum(rows[0] * rows[1] for name, rows in parameter_shapes(config).items() if ".h." in name and rows[1:])
    copies = how.copied * matrices if recompute == "none" else 0
    assert (kept(6) - kept(2)) / 4 == 64 * kept_by_layer(config, how) + copies


def saved_for_backward(loss: torch.Tensor, model: nn.Module) -> int:
    """Bytes that the graph of a loss holds beside parameters, in nodes of whole compiled blocks too."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages: dict[int, int] = {}
    todo, done = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in done:
            continue
        done.add(node)
        todo += [following for following, _ in node.next_functions]
        for tensor in getattr(node, "saved_tensors", ()):
            if tensor is not None and tensor.untyped_storage()._cdata not in own:
                storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks
@pytest.mark.parametrize(("precision", "has_bf16"), [("fp32", True), ("bf16", False), ("bf16", True)])
def test_a_compiled_layer_keeps_just_what_is_said(precision, has_bf16):
    """By torch's own choice of what to make again (its min-cut partitioner), the graphs then run eagerly."""
    sizes = {"n_query_groups": 4, "block_size": 64, "n_embd": 64, "intermediate_size": 96}
    how = Computation(1, precision, compiled=True, device="cpu", cpu_has_bf16=has_bf16)

    def kept(n_layer: int) -> int:
        torch._dynamo.reset()
        config = toy_config(n_layer=n_layer, **sizes)
        model = model_of(config, how)
        for block in model.transformer.h:
            block.compile(backend="aot_eager_decomp_partition", dynamic=False)
        tokens = toy_tokens(config, n_rows=1)
        return saved_for_backward(model(tokens[:, :-1], tokens[:, 1:]), model)

    config = toy_config(n_layer=1, **sizes)
    matrices = sum(rows[0] * rows[1] for name, rows in parameter_shapes(config).items() if ".h." in name and rows[1:])
    assert (kept(4) - kept(2)) / 2 == 64 * kept_by_layer(config, how) + how.copied * matrices


def test_the_chunks_of_logits_are_the_losss():
    assert (CHUNK_ROWS, CPU_CHUNK_ROWS) == (loss.CHUNK_ROWS, loss.CPU_CHUNK_ROWS)
    assert tuple(RECOMPUTE_OF_KERNELS) == RECOMPUTE


def test_weights_gradients_and_moments_are_sharded_and_activations_are_not():
    config = Config.from_name("24L2048H")
    one, eight = (memory_per_device(config, Computation(8, shards=n)) for n in (1, 8))

    assert one.weights == one.gradients == one.moments / 2 == 4 * count_parameters(config)
    assert eight.weights == one.weights / 8 and eight.activations == one.activations
    full, selective = (memory_per_device(config, Computation(8, recompute=r, shards=8)) for r in ("full", "selective"))
    assert full.activations < selective.activations < eight.activations
    gathered = memory_per_device(config, Computation(8, shards=8, stays_gathered=True))
    assert gathered.copies > eight.copies
    assert memory_per_device(config, Computation(8, replicated=True)).copies == one.copies + one.gradients


def test_what_else_a_setting_changes():
    config = Config.from_name("24L2048H")
    plain = memory_per_device(config, Computation(8))
    assert memory_per_device(config, Computation(8, compiled=True)).activations < plain.activations
    assert memory_per_device(config, Computation(8, "bf16-true")).weights == plain.weights / 2
    on_cpu = memory_per_device(config, Computation(8, device="cpu"))
    assert plain.heap == 0
    assert on_cpu.heap > HEAP_TOP
    with pytest.raises(ValueError, match="recompute='some' must be one of none, selective, full"):
        memory_per_device(config, Computation(8, recompute="some"))


def test_the_text_leaves_out_what_is_nothing():
    memory = Memory(4e9, 4e9, 8e9, 0.0, 1.5e9, 2e8, 0.0, 3e9)
    assert memory.total == pytest.approx(14.7e9)
    assert memory_text(memory) == (
        "in GB: weights 4, gradients 4, moments 8, activations 1.5, logits 0.2; 3 of it not at one time"
    )
