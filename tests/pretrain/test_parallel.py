"""However many processes share a run, and however they share the model: the same losses, the same growth."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.kill_sweep import cut_back
from lit_gpt.checkpoint import latest, read_training
from lit_gpt.kernels.recompute import RECOMPUTE
from lit_gpt.model import InitialWeights
from lit_gpt.settings_files import merge
from pretrain import loop, parallel
from pretrain.config import BatchConfig, ParallelConfig
from pretrain.parallel import Compute, build_model, check_world, clip_gradients, whole
from pretrain.world import ALONE, World, connected
from tests.pretrain.conftest import of_processes, two_stages
from tests.pretrain.processes import run_on
from tests.pretrain.runs import assert_same_end, records
from tests.pretrain.test_stages import StageConfig, run_config
from tests.toys import toy_config, toy_tokens, toy_weights

STAGES = [
    {"name": "base", "n_layer": 1, "max_steps": 50},
    {"name": "grown", "operator": "stack", "max_steps": 50, "optimizer_policy": "map"},
]
CHANGES = {
    "stages": STAGES,
    "batch": {"global_batch_size": 4, "micro_batch_size": 1},
    "checkpoints": {"every_steps": 20},
    "validation": {"every_steps": 50, "max_tokens": 320},
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
    "recomputed selectively": (2, {"activation_checkpointing": "selective"}),
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


EXACT = {
    "fp32, recomputed": {"activation_checkpointing": "selective"},
    "bf16, recomputed, accumulated": {
        "precision": "bf16",
        "activation_checkpointing": "full",
        "batch": {"global_batch_size": 8},
    },
    "replicated": {"parallel": {"strategy": "ddp"}},
    "compiled": {"compile": "block", "stages": [{"name": "base", "n_layer": 1, "max_steps": 6}]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_a_shared_run_that_was_stopped_ends_as_one_that_was_not_to_the_bit(settings_of, tmp_path, name):
    if name == "compiled" and parallel.find_cpp_compiler() is None:
        pytest.skip("no C++ compiler to compile with")
    changes = {
        "stages": [
            {"name": "base", "n_layer": 1, "max_steps": 6},
            {"name": "grown", "operator": "stack", "max_steps": 6},
        ],
        "precision": "fp32",
        "checkpoints": {"every_steps": 2, "keep_every_steps": 1},
        **EXACT[name],
    }
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_on(settings_of(whole, **changes), 2, tmp_path / "first")
    cut_back(whole, stopped, 1, 4)
    assert "resumed from" in run_on(settings_of(stopped, **changes), 2, tmp_path / "second").output()
    assert_same_end(stopped, whole)
    if name == "compiled":
        run_on(settings_of(tmp_path / "eager", **{**changes, "compile": "none"}), 2, tmp_path / "third")
        eager, compiled = ([line["loss"] for line in records(folder)] for folder in (tmp_path / "eager", whole))
        assert compiled == pytest.approx(eager, rel=1e-5)


def poison_weight(hooks: ExitStack, module: torch.nn.Module, inputs: object) -> None:
    hooks.callback(module.weight.register_hook(lambda gradient: gradient * torch.nan).remove)


def poison_one_process(kind: str, steps: tuple[int, ...], *, once: bool = False) -> None:
    """In these steps the second process's loss is no number, or the gradient of one parameter there is none.

    once: each of them is good when it is repeated.
    """
    original, bad = loop.train_step, set(steps)

    def train_step(run, stage, trained, state, batches):
        step = state.step_count + 1
        if run.world.rank != 1 or step not in bad:
            return original(run, stage, trained, state, batches)
        bad.difference_update({step} if once else ())
        with ExitStack() as hooks:
            if kind == "loss":
                hooks.callback(trained.module.register_forward_hook(lambda _, __, loss: loss * torch.nan).remove)
            else:  # of the gathered weight, which is there when the forward pass comes to it
                norm = trained.model.transformer.h[0].norm_1
                hooks.callback(norm.register_forward_pre_hook(partial(poison_weight, hooks)).remove)
            return original(run, stage, trained, state, batches)

    loop.train_step = train_step


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_no_number_on_one_process_lets_all_skip_the_step(settings_of, tmp_path, kind, strategy):
    changes = {
        "stages": [{"name": "base", "n_layer": 1, "max_steps": 6}],
        "checkpoints": {"every_steps": 1, "keep_every_steps": 1},
        "parallel": {"strategy": strategy},
    }
    settings = settings_of(tmp_path / "run", **changes)
    run_on(settings, 2, tmp_path, prepare=partial(poison_one_process, kind, (4,)))
    before, after = (
        read_training(tmp_path / f"run/checkpoints/stage-01/step-{step:010d}", verify=False) for step in (3, 4)
    )
    assert [line["skipped_steps"] for line in records(tmp_path / "run")] == [0, 0, 0, 1, 1, 1]
    assert all(torch.equal(weight, before.model[name]) for name, weight in after.model.items())
    for name, slots in after.optimizer.items():
        assert all(torch.equal(value, before.optimizer[name][slot]) for slot, value in slots.items())


DIVERGES = {
    "stages": [{"name": "base", "n_layer": 1, "max_steps": 8}],
    "checkpoints": {"every_steps": 2},
    "guards": {"max_skipped_steps": 2},
}


@pytest.mark.slow
def test_a_shared_run_that_diverges_on_one_process_gives_up_with_one_voice(settings_of, tmp_path):
    poison = partial(poison_one_process, "loss", (5, 6))
    ended = run_on(settings_of(tmp_path / "run", **DIVERGES), 2, tmp_path, prepare=poison, code=4)
    assert "steps 5 to 6 were not made" in ended.errors() and "Samples 16 to 23 of the data order" in ended.errors()
    assert ended.errors(1) == ""


@pytest.mark.slow
def test_a_shared_run_goes_round_samples_that_are_bad_on_one_process(settings_of, tmp_path):
    settings = merge(settings_of(tmp_path / "run", **DIVERGES), {"guards": {"rollbacks": 1}})
    ended = run_on(settings, 2, tmp_path, prepare=partial(poison_one_process, "gradient", (5, 6), once=True))
    assert "back to the last checkpoint, without these samples" in ended.output()
    assert read_training(latest(tmp_path / "run" / "checkpoints")).state["auto_skips"] == [[16, 24]]
    assert [line["skipped_steps"] for line in records(tmp_path / "run")] == [0] * 8


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused_once_with_what_does(settings_of, tmp_path):
    settings = settings_of(tmp_path / "run", batch={"global_batch_size": 12, "micro_batch_size": 3})
    refused = run_on(settings, 3, tmp_path, code=2)
    assert "must be a multiple" in refused.errors() and "micro_batch_size can be 1, 2, 4" in refused.errors()
    assert [refused.errors(rank) for rank in (1, 2)] == ["", ""]
    assert not (tmp_path / "run" / "checkpoints").exists()


def without_bf16(on_rank: int) -> None:
    parallel.multiplies_bf16 = lambda _: int(os.environ["RANK"]) != on_rank


def without_compiler(on_rank: int) -> None:
    if int(os.environ["RANK"]) == on_rank:
        parallel.find_cpp_compiler = lambda: None


@pytest.mark.slow
def test_processes_that_would_not_compute_alike_are_refused_once_and_nothing_is_deleted(settings_of, of_two, tmp_path):
    run = Path(shutil.copytree(of_two, tmp_path / "run"))
    settings = settings_of(run, precision="auto")
    refused = run_on(settings, 2, tmp_path / "start", "--fresh", prepare=partial(without_bf16, 1), code=2)
    assert "bf16 on cpu: process 0\n" in refused.errors() and "fp32 on cpu: process 1\n" in refused.errors()
    assert refused.errors(1) == "" and latest(run / "checkpoints") is not None


@pytest.mark.slow
def test_what_one_process_alone_cannot_do_ends_all_with_its_message_and_code(settings_of, tmp_path):
    settings = settings_of(tmp_path / "run", compile="block")
    refused = run_on(settings, 2, tmp_path / "start", prepare=partial(without_compiler, 1), code=2)
    assert "needs a C++ compiler" in refused.errors(1) and refused.errors(0) == ""


def below_a_file(settings: dict, tmp_path: Path) -> tuple[dict, int, str]:
    (tmp_path / "file").touch()
    return {**settings, "out_dir": str(tmp_path / "file" / "run")}, 3, "file"


def with_another_seed(settings: dict, tmp_path: Path) -> tuple[dict, int, str]:
    return {**settings, "seed": 1}, 2, "seed: 3407 in the checkpoint, 1 now"


def with_another_job_there(settings: dict, tmp_path: Path) -> tuple[dict, int, str]:
    lock = (tmp_path / "run" / "run.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return {**settings, "held": lock}, 3, "another process"


@pytest.mark.slow
@pytest.mark.parametrize("case", [below_a_file, with_another_seed, with_another_job_there])
def test_what_one_process_refuses_all_refuse_with_one_voice_and_nothing_is_touched(of_two, prepared, tmp_path, case):
    run = Path(shutil.copytree(of_two, tmp_path / "run"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "run.lock"}
    settings, code, message = case(of_processes(run, prepared), tmp_path)
    held = settings.pop("held", None)
    refused = run_on(settings, 2, tmp_path / "start", code=code)
    assert message in refused.errors(0) and refused.errors(1) == ""
    assert {path: path.read_bytes() for path in before} == before
    if held is not None:
        held.close()


@pytest.mark.slow
def test_what_all_processes_come_to_is_said_once(settings_of, tmp_path):
    settings = settings_of(tmp_path / "run", stop={"after": "1s"}, data={"max_epochs": 10})
    settings["stages"] = [{"name": "base", "n_layer": 1, "max_steps": 1000}]
    stopped = run_on(settings, 2, tmp_path, code=75)
    assert stopped.errors().count("repeat the command to go on") == 1  # whichever clock was ahead
    assert "read more than once" in stopped.errors()
    assert stopped.errors(1) == ""


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
