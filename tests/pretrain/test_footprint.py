"""The estimate of memory against what processes really take: on a CPU to a quarter, on a GPU to a tenth."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from lit_gpt.memory import Computation, memory_per_device
from lit_gpt.tokenizer import Tokenizer
from pretrain.config import BatchConfig, OptimizerConfig, ParallelConfig, StageConfig
from pretrain.footprint import computation, stage_memory
from pretrain.micro_batch import choose_micro_batch
from pretrain.optim import build_optimizer
from pretrain.parallel import Compute, build_model, clip_gradients
from pretrain.stages import Teaching, plan_stages
from pretrain.world import ALONE, World
from tests.pretrain.conftest import command_for, two_stages, write_prepared
from tests.pretrain.test_stages import MODEL, run_config
from tests.toys import toy_config, toy_tokens, toy_weights

# sizes and sequences of a micro-batch: 50 to 600 MB
SHAPES = {
    "deep": ({"name": "16L128H", "n_head": 4, "block_size": 256, "padded_vocab_size": 512}, 8),
    "wide": ({"name": "2L768H", "block_size": 256, "padded_vocab_size": 512}, 2),
    "many words": ({"name": "2L256H", "block_size": 256, "padded_vocab_size": 32000}, 4),
    "long": ({"name": "2L128H", "n_head": 2, "block_size": 4096, "padded_vocab_size": 512}, 1),
}
# shape, precision, recompute, micro-batches of a step
CASES = [
    ("deep", "fp32", "none", 1),
    ("deep", "fp32", "none", 2),
    ("deep", "bf16", "none", 2),
    ("deep", "fp32", "selective", 2),
    ("deep", "bf16", "full", 1),
    ("wide", "fp32", "full", 2),
    ("wide", "bf16", "none", 1),
    ("wide", "bf16", "selective", 1),
    ("many words", "fp32", "none", 1),
    ("many words", "bf16", "selective", 2),
    ("long", "fp32", "none", 1),
    ("long", "bf16", "none", 1),
    ("long", "fp32", "full", 1),
]


@pytest.fixture(scope="module")
def much_data(tmp_path_factory, root):
    """The licence many times, so that a long block fits into what is held out."""
    text = (root / "LICENSE").read_text(encoding="utf-8")
    return write_prepared(tmp_path_factory.mktemp("much"), Tokenizer.load("bytes").encode(20 * text))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the estimate of the heap is glibc's; the measurement reads /proc")
@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_the_estimate_is_what_a_run_takes_on_a_cpu_to_a_quarter(case, tmp_path, much_data, root):
    shape, precision, recompute, iters = case
    sizes, micro_batch_size = SHAPES[shape]
    settings = {
        **two_stages(tmp_path / "run", much_data),
        "model": sizes,
        "stages": [{"name": "main", "max_steps": 6}],
        "batch": {"global_batch_size": micro_batch_size * iters, "micro_batch_size": micro_batch_size},
        "validation": {"max_tokens": sizes["block_size"]},
        "checkpoints": {"every_steps": 100},
        "precision": precision,
        "compile": "none",
        "activation_checkpointing": recompute,
    }
    command = [sys.executable, "-m", "tests.pretrain.peak_memory", tmp_path / "found.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*command, *command_for(settings, tmp_path)], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["estimated"] == pytest.approx(found["peak"], rel=0.25)


def test_what_a_run_sets_is_what_is_estimated():
    stage = StageConfig("main", max_steps=1, n_layer=2)
    config = run_config(stage, optimizer=OptimizerConfig(name="muon"), activation_checkpointing="full")
    config = dataclasses.replace(config, batch=BatchConfig(8, 2))
    (planned,) = plan_stages(config, MODEL)
    compute = Compute("bf16", "block", "", "full")
    assert computation(config, planned, compute, ALONE, "cuda") == Computation(
        2, "bf16", "full", compiled=True, accumulates=True, device="cuda", muon=True
    )
    eight_bit = dataclasses.replace(planned, optimizer=OptimizerConfig(name="adamw8bit"))
    assert computation(config, eight_bit, compute, ALONE, "cuda").eight_bit
    sharded = dataclasses.replace(config, parallel=ParallelConfig(replicas=2, reshard_after_forward=False))
    found = computation(sharded, planned, compute, World(0, 4), "cuda")
    assert (found.shards, found.stays_gathered, found.replicated, found.accumulates) == (2, True, False, False)
    ddp = dataclasses.replace(config, parallel=ParallelConfig("ddp"))
    found = computation(ddp, planned, compute, World(0, 2), "cuda")
    assert (found.shards, found.replicated) == (1, True)


def test_a_teacher_takes_its_weights():
    config = run_config(StageConfig("main", max_steps=1))
    (stage,) = plan_stages(config, MODEL)
    taught = dataclasses.replace(stage, teaching=Teaching(0.5, 1, stage.config, None))
    compute = Compute("fp32", "none", "")
    alone, beside = (stage_memory(config, each, compute, ALONE, "cuda") for each in (stage, taught))
    assert beside.weights == 2 * alone.weights and beside.total == alone.total + alone.weights


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-true"])
@pytest.mark.parametrize("sizes", [{"n_layer": 16}, {"n_layer": 2, "n_embd": 2048, "intermediate_size": 5632}])
def test_the_estimate_is_what_a_step_takes_on_a_gpu_to_a_tenth(sizes, precision, recompute):
    """Of what tensors take, as torch counts it. No GPU has run it yet."""
    common = {"n_embd": 1024, "n_head": 16, "n_query_groups": 16, "intermediate_size": 2816, "block_size": 1024}
    config = toy_config(**{**common, "padded_vocab_size": 32000, **sizes})
    device, compute = torch.device("cuda"), Compute(precision, "none", "", recompute)
    model = build_model(config, toy_weights(config), compute, ParallelConfig(), ALONE, device=device)
    optimizer = build_optimizer(model, OptimizerConfig())
    tokens = toy_tokens(config, n_rows=8).to(device)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            model(tokens[:, :-1], tokens[:, 1:]).backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    estimated = memory_per_device(config, Computation(8, precision, recompute)).total
    assert estimated == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_on_a_gpu_the_largest_micro_batch_that_survives_is_chosen():
    """A share of the device's memory is all there is, so that the trial meets an end. No GPU has run it yet."""
    config = run_config(StageConfig("main", max_steps=1))
    config = dataclasses.replace(config, batch=BatchConfig(4096, auto=True))
    (stage,) = plan_stages(config, dataclasses.replace(MODEL, n_embd=512, n_head=8, block_size=512))
    device, compute = torch.device("cuda"), Compute("bf16", "none", "")
    torch.cuda.set_per_process_memory_fraction(0.1)
    try:
        size = choose_micro_batch(config, [stage], compute, ALONE, device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 < size < 4096
    assert torch.cuda.memory_allocated() == 0
