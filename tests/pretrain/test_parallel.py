"""However many processes share a run, and however they share the model: the same losses, the same growth."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from lit_gpt.checkpoint import latest, read_training
from lit_gpt.kernels.recompute import RECOMPUTE
from lit_gpt.model import InitialWeights
from lit_gpt.settings_files import merge
from pretrain.config import BatchConfig, ParallelConfig
from pretrain.parallel import Compute, build_model, check_world, clip_gradients, whole
from pretrain.world import ALONE, World, connected
from tests.pretrain.conftest import two_stages
from tests.pretrain.processes import finish, run_on, start
from tests.pretrain.runs import records
from tests.pretrain.test_stages import StageConfig, run_config
from tests.toys import toy_config, toy_tokens, toy_weights

STAGES = [
    {"name": "base", "n_layer": 1, "max_steps": 50},
    {"name": "grown", "operator": "stack", "max_steps": 50, "optimizer_policy": "map"},
]
CHANGES = {
    "stages": STAGES,
    "batch": {"global_batch_size": 4, "micro_batch_size": 1},
    "checkpoints": {"every_steps": 20, "keep_last": 10},
    "validation": {"every_steps": 50},
}
# name: processes and what is set beside
WAYS = {
    "alone": (1, {}),
    "sharded, alone": (1, {"parallel": {"strategy": "fsdp"}}),
    "sharded over 2": (2, {}),
    "sharded over 4": (4, {}),
    "2 replicas sharded over 2": (4, {"parallel": {"replicas": 2}}),
    "weights stay gathered": (2, {"parallel": {"reshard_after_forward": False}}),
    "replicated": (2, {"parallel": {"strategy": "ddp"}}),
    "recomputed, larger micro-batch": (2, {"activation_checkpointing": "full", "batch": {"micro_batch_size": 2}}),
}


@pytest.fixture(scope="module")
def settings_of(prepared):
    def settings(out_dir: Path, **changes: object) -> dict[str, object]:
        return merge(merge(two_stages(out_dir, prepared), CHANGES), changes)

    return settings


@pytest.fixture(scope="module")
def finished(tmp_path_factory, settings_of):
    """Each of the runs above, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            n_processes, changes = WAYS[name]
            folder = tmp_path_factory.mktemp("ways")
            run_on(settings_of(folder / "run", **changes), n_processes, folder)
            made[name] = folder / "run"
        return made[name]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WAYS if name != "alone"])
def test_a_hundred_steps_have_the_losses_of_a_single_process_however_they_are_shared(finished, name):
    expected, found = records(finished("alone")), records(finished(name))
    assert len(found) == 100
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-6, abs=1e-6)
    assert [line["grad_norm"] for line in found] == pytest.approx([line["grad_norm"] for line in expected], rel=1e-4)
    assert [line["position"] for line in found] == [line["position"] for line in expected]
    values = [[r["value"] for r in records(finished(each), "evals.jsonl")] for each in ("alone", name)]
    assert values[1] == pytest.approx(values[0], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "bf16-true"])
def test_in_bf16_the_first_loss_is_that_of_a_single_process_and_the_others_are_near(settings_of, tmp_path, precision):
    """Gradients of a micro-batch are rounded alike; their sum over micro-batches has another order."""
    stages = [{"name": "base", "n_layer": 1, "max_steps": 10}, {"name": "grown", "operator": "stack", "max_steps": 10}]
    changes = {"stages": stages, "precision": precision, "optimizer": {"learning_rate": 1e-3}}
    losses = []
    for n_processes in (1, 2):
        folder = tmp_path / str(n_processes)
        run_on(settings_of(folder, **changes), n_processes, tmp_path / f"of {n_processes}")
        losses.append([line["loss"] for line in records(folder)])
    assert len(losses[0]) == 20
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-6)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if precision == "bf16" else 2e-3)


@pytest.mark.slow
def test_a_student_has_the_losses_of_a_single_process_however_it_is_shared(settings_of, tmp_path):
    """In training steps its teacher's module calls it, not that which averages gradients under DDP."""
    stages = [
        {"name": "base", "n_layer": 1, "max_steps": 2},
        {"name": "grown", "operator": "stack", "distill_weight": 0.5, "distill_steps": 4, "max_steps": 6},
    ]
    for name, n_processes, strategy in (("alone", 1, "auto"), ("sharded", 2, "fsdp"), ("replicated", 2, "ddp")):
        changes = {"stages": stages, "parallel": {"strategy": strategy}}
        run_on(settings_of(tmp_path / name, **changes), n_processes, tmp_path / f"of {name}")
    expected = [line["loss"] for line in records(tmp_path / "alone")]
    for name in ("sharded", "replicated"):
        assert [line["loss"] for line in records(tmp_path / name)] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_processes(finished, settings_of, tmp_path):
    """2 processes to step 40, 4 to step 60, in which the model grows, and 1 to the end."""
    folder = Path(shutil.copytree(finished("sharded over 2"), tmp_path / "run"))
    for n_processes, first, last in ((4, 40, 60), (1, 60, 100)):
        for path in folder.glob("checkpoints/stage-*/step-*"):
            if int(path.name[5:]) > first:
                shutil.rmtree(path)
        run_on(settings_of(folder, batch={"micro_batch_size": 1}), n_processes, tmp_path / str(n_processes))
        assert int(latest(folder / "checkpoints").name[5:]) == 100 >= last
    expected = records(finished("alone"))
    assert [line["loss"] for line in records(folder)] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
    assert [line["position"] for line in records(folder)] == [line["position"] for line in expected]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_sharded_run_that_was_stopped_ends_as_one_that_was_not_to_the_bit(settings_of, tmp_path, precision):
    stages = [{"name": "base", "n_layer": 1, "max_steps": 6}, {"name": "grown", "operator": "stack", "max_steps": 6}]
    changes = {
        "stages": stages,
        "precision": precision,
        "checkpoints": {"every_steps": 2, "keep_last": 10},
        "activation_checkpointing": "selective",
    }
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_on(settings_of(whole, **changes), 2, tmp_path / "first")
    shutil.copytree(whole, stopped)
    for path in stopped.glob("checkpoints/stage-*/step-*"):
        if int(path.name[5:]) > 4:
            shutil.rmtree(path)
    run_on(settings_of(stopped, **changes), 2, tmp_path / "second")
    assert records(stopped) == records(whole)
    ended, expected = (read_training(latest(each / "checkpoints")) for each in (stopped, whole))
    assert all(torch.equal(ended.model[name], weight) for name, weight in expected.model.items())
    for name, slots in expected.optimizer.items():
        assert all(torch.equal(ended.optimizer[name][slot], value) for slot, value in slots.items())


POISONED = """
import sys
from pretrain import loop
from pretrain.world import find_world
from pretrain.__main__ import main

original = loop.train_step

def train_step(run, stage, trained, state, batches):
    if find_world().rank == 1 and state.step_count == 3:
        hook = trained.module.register_forward_hook(lambda module, inputs, loss: loss * float("nan"))
        try:
            return original(run, stage, trained, state, batches)
        finally:
            hook.remove()
    return original(run, stage, trained, state, batches)

loop.train_step = train_step
sys.exit(main())
"""


@pytest.mark.slow
def test_a_loss_that_is_no_number_on_one_process_lets_all_skip_the_step(settings_of, tmp_path):
    changes = {
        "stages": [{"name": "base", "n_layer": 1, "max_steps": 6}],
        "checkpoints": {"every_steps": 1, "keep_every_steps": 1},
    }
    run_on(settings_of(tmp_path / "run", **changes), 2, tmp_path, script=POISONED)
    before, after = (
        read_training(tmp_path / f"run/checkpoints/stage-01/step-{step:010d}", verify=False) for step in (3, 4)
    )
    assert [line["skipped_steps"] for line in records(tmp_path / "run")] == [0, 0, 0, 1, 1, 1]
    assert all(torch.equal(weight, before.model[name]) for name, weight in after.model.items())
    for name, slots in after.optimizer.items():
        assert all(torch.equal(value, before.optimizer[name][slot]) for slot, value in slots.items())


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused_once_with_what_does(settings_of, tmp_path):
    settings = settings_of(tmp_path / "run", batch={"global_batch_size": 4, "micro_batch_size": 1})
    done = finish(start(settings, 3, tmp_path))
    assert [process.returncode for process in done] == [2, 2, 2]
    assert sum("must be a multiple" in process.stderr for process in done) == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_what_all_processes_come_to_is_said_once(settings_of, tmp_path):
    settings = settings_of(tmp_path / "run", stop={"after": "1s"}, data={"max_epochs": 10})
    settings["stages"] = [{"name": "base", "n_layer": 1, "max_steps": 1000}]
    done = finish(start(settings, 2, tmp_path))
    assert [process.returncode for process in done] == [75, 75]
    told = [process.stderr for process in done]
    assert "stopped by stop.after=1s" in told[0] and "read more than once" in told[0]
    assert told[1] == ""


def model_of(parallel: ParallelConfig, config=None, precision: str = "fp32", **compute: str):
    config = config or toy_config(n_layer=3)
    settings = Compute(precision, "none", "", **compute)
    weights = toy_weights(config)
    return build_model(config, weights, settings, parallel, ALONE, device=torch.device("cpu"))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-true"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_loss_and_gradients_are_those_of_the_plain_model_to_the_bit(strategy, recompute, precision):
    """A family whose norms and embedding are no plain Llama's, so that a weight in another dtype shows."""
    family = {"norm_plus_one": True, "embedding_scale": 3.7, "qk_norm": "head", "qkv_bias": True}
    config = toy_config(n_layer=3, **family)
    tokens = toy_tokens(config)
    plain = model_of(ParallelConfig(), config, precision)
    expected_loss = plain(tokens[:, :-1], tokens[:, 1:])
    expected_loss.backward()
    with connected(ALONE, "cpu", alone_too=strategy == "fsdp"):
        model = model_of(ParallelConfig(strategy), config, precision, recompute=recompute)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        assert torch.equal(loss, expected_loss)
        expected = dict(plain.named_parameters())
        for name, parameter in model.named_parameters():
            assert torch.equal(whole(parameter.grad), expected[name].grad), name


def test_a_mask_scales_a_shared_weight_as_it_does_a_whole_one():
    config = toy_config(n_layer=3)
    tokens, losses = toy_tokens(config), []
    with connected(ALONE, "cpu", alone_too=True):
        for strategy in ("auto", "fsdp"):
            model = model_of(ParallelConfig(strategy), config, "bf16")
            model.transformer.h[1].mlp.swiglu.w3.weight_scale = torch.full((config.n_embd, 1), 0.3)
            losses.append(float(model(tokens[:, :-1], tokens[:, 1:]).detach()))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_gradients_are_clipped_by_the_norm_of_all_of_them(strategy, max_norm):
    config = toy_config(n_layer=3)
    tokens = toy_tokens(config)
    plain = model_of(ParallelConfig(), config)
    plain(tokens[:, :-1], tokens[:, 1:]).backward()
    expected_norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
    with connected(ALONE, "cpu", alone_too=strategy == "fsdp"):
        model = model_of(ParallelConfig(strategy), config)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        norm = clip_gradients(model.parameters(), max_norm)
        torch.testing.assert_close(norm, expected_norm)
        expected = dict(plain.named_parameters())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(whole(parameter.grad), expected[name].grad)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_filled_from_whole_tensors_and_keeps_its_ties(tied):
    config = toy_config(tie_embeddings=tied)
    initial = InitialWeights(config, 3)
    with connected(ALONE, "cpu", alone_too=True):
        settings = Compute("fp32", "none", "")
        model = build_model(
            config,
            initial,
            settings,
            ParallelConfig("fsdp"),
            ALONE,
            device=torch.device("cpu"),
            frozen=["lm_head.weight"],
        )
        assert (model.lm_head.weight is model.transformer.wte.weight) == tied
        state = {name: whole(tensor) for name, tensor in model.state_dict().items()}
        assert all(torch.equal(state[name], initial[name]) for name in initial) and set(state) == set(initial)
        if not tied:
            assert not model.lm_head.weight.requires_grad


def test_worlds_that_cannot_share_a_run_are_refused_with_what_they_can():
    config = run_config(StageConfig("main", max_steps=1), parallel=ParallelConfig(replicas=3))
    with pytest.raises(ValueError, match="replicas=3 must divide the 4 processes; it can be 1, 2, 4"):
        check_world(dataclasses.replace(config, batch=BatchConfig(4, 1)), World(0, 4))
