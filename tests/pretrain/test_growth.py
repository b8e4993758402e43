"""Stages that do more than stack: width, masks, frozen layers, a teacher, one schedule over several stages."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

from grow.apply import grow_checkpoint
from grow.masks import MaskSchedule, mask_scales
from grow.operators import plan_growth
from grow.plan import GrowthPlan
from grow.tensors import with_noise
from lit_gpt.axes import FINAL_NORM, HEAD, layer_of, parameter_shapes
from lit_gpt.checkpoint import latest, manifest_sha256, read_config, read_training
from lit_gpt.config import Config
from lit_gpt.errors import DataError
from lit_gpt.flops import computed_share, count_parameters
from lit_gpt.settings_files import merge
from pretrain.command_line import parse
from pretrain.config import GuardConfig, OptimizerConfig, ScheduleConfig, StageConfig
from pretrain.growth import set_masks
from pretrain.guards import Guard
from pretrain.run import run
from pretrain.stages import plan_stages
from pretrain.training import Trained, stage_flops, step_flops
from tests.pretrain.conftest import two_stages
from tests.pretrain.runs import assert_same_end, records
from tests.pretrain.test_stages import MODEL, run_config
from tests.toys import toy_config, toy_model, toy_tokens, toy_weights

EVERY_STEP = {"checkpoints": {"every_steps": 1, "keep_every_steps": 1}}
AT_REST = {"learning_rate": 0.0, "min_learning_rate": 0.0}
BASE = {"name": "base", "n_layer": 1, "max_steps": 3}
RUNS = {
    "masks": [BASE, {"name": "grown", "operator": "random-depth", "mask_steps": 4, "max_steps": 6}],
    "masks in turn": [
        {"name": "base", "n_embd": 8, "intermediate_size": 16, "max_steps": 3},
        {"name": "grown", "operator": "msg", "mask_steps": 2, "mask_phases": "in-turn", "max_steps": 7},
    ],
    "frozen": [
        {"name": "base", "n_layer": 2, "max_steps": 3},
        {"name": "new", "operator": "mslt", "max_steps": 3},
        {"name": "all", "max_steps": 3, "continue_schedule": True, "rewarmup_steps": 2},
    ],
    "taught": [BASE, {"name": "grown", "operator": "distill", "distill_steps": 3, "max_steps": 5}],
    "learned and taught": [
        {**BASE, "max_steps": 2},
        {"name": "grown", "operator": "ligo", "options": {"learn_steps": 2}, "distill_weight": 0.5, "max_steps": 5},
    ],
    "learned": [BASE, {"name": "grown", "operator": "ligo", "options": {"learn_steps": 3}, "max_steps": 6}],
    "gradmax": [
        {"name": "base", "intermediate_size": 16, "max_steps": 3},
        {"name": "grown", "operator": "gradmax", "max_steps": 4},
    ],
    "wider": [
        {"name": "base", "n_embd": 8, "max_steps": 3},
        {"name": "grown", "operator": "split-width", "options": {"seed": 1}, "optimizer_policy": "map", "max_steps": 4},
    ],
}


@pytest.fixture(scope="module")
def finish(tmp_path_factory, prepared):
    """Run settings to the end in this process; returns the run's folder."""

    def go(stages, out_dir=None, **changes):
        out_dir = out_dir or tmp_path_factory.mktemp("runs") / "run"
        settings = merge(two_stages(out_dir, prepared), {**EVERY_STEP, "stages": stages, **changes})
        path = out_dir.with_suffix(".json")
        path.write_text(json.dumps(settings))
        run(parse(["--config", str(path)]), command=["pretrain"])
        return out_dir

    return go


@pytest.fixture(scope="module")
def finished(finish):
    """Each of the runs above, made once."""
    made: dict[str, Path] = {}

    def get(name):
        if name not in made:
            made[name] = finish(RUNS[name])
        return made[name]

    return get


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("stage-*/step-*"))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_goes_on_from_any_of_its_checkpoints_ends_the_same(name, finished, finish, tmp_path):
    undisturbed = finished(name)
    for last in (4, 6):  # early in a stage that began by growing, and late in it or in the stage after
        folder = Path(shutil.copytree(undisturbed, tmp_path / f"stopped-{last}"))
        for path in checkpoints(folder):
            if int(path.name[5:]) > last:
                shutil.rmtree(path)
        finish(RUNS[name], folder)
        assert_same_end(folder, undisturbed)


def test_masked_growth_keeps_the_loss_and_ends_as_the_plain_model(finished):
    folder = finished("masks")
    losses = {r["when"]: r["value"] for r in records(folder, "evals.jsonl") if r["metric"] == "loss"}
    assert losses["after_growth"] == pytest.approx(losses["before_growth"], abs=0.05)  # c is 1/4 in the first step
    masked = [read_training(path).state["mask"] for path in checkpoints(folder)]
    assert masked[:3] == [None] * 3 and masked[3] == dict.fromkeys(("layers", "intermediate", "embd", "heads"), 0.25)
    assert masked[-3:] == [None] * 3


def test_a_masked_model_computes_with_scaled_weights_and_an_open_one_with_none():
    config = toy_config()
    plan = plan_growth("random-width", config, n_embd=32, n_query_groups=2, seed=1)
    first = plan_stages(run_config(StageConfig("base", max_steps=1)), MODEL)[0]
    stage = dataclasses.replace(first, plan=plan, mask=MaskSchedule(4), config=plan.dst)
    model, scaled = toy_model(plan.dst), toy_model(plan.dst)
    plain = toy_weights(plan.dst)
    scales = mask_scales(plan, stage.mask.openness(1))
    scaled.load_state_dict({name: weight * scales.get(name, 1) for name, weight in plain.items()})
    tokens = toy_tokens(config)[:, :-1]
    trained = Trained(model, model, None, Guard(GuardConfig(), torch.device("cpu")))

    unmasked = model(tokens)
    set_masks(stage, trained, 1)
    assert torch.equal(model(tokens), scaled(tokens))
    assert list(model.state_dict()) == list(plain)
    set_masks(stage, trained, 3)
    assert torch.equal(model(tokens), unmasked)


def test_frozen_parameters_stay_to_the_bit_and_all_others_are_in_the_optimizer(finished):
    folder = finished("frozen")
    stages = {path.parent.name: read_training(path) for path in checkpoints(folder)}
    base, new, last = (stages[f"stage-{n:02d}"] for n in (1, 2, 3))
    trained = {name for name in new.model if layer_of(name) == 2} | {FINAL_NORM, HEAD}
    assert set(new.optimizer) == trained
    for name, weight in new.model.items():
        if layer_of(name) == 2:
            continue
        assert torch.equal(weight, base.model[name]) == (name not in trained), name
    assert set(last.optimizer) == set(last.model)
    assert {int(slots["step"]) for name, slots in last.optimizer.items() if name in trained} == {6}
    assert {int(slots["step"]) for name, slots in last.optimizer.items() if name not in trained} == {3}
    assert all(not torch.equal(weight, new.model[name]) for name, weight in last.model.items())


def test_flops_of_frozen_stages_are_charged_in_full_and_what_was_computed_stands_beside(finished):
    lines = records(finished("frozen"))
    config = read_config(checkpoints(finished("frozen"))[-1])
    per_step = 6 * count_parameters(config) * 4 * 16
    charged, computed = (
        [after[key] - before[key] for before, after in itertools.pairwise(lines)]
        for key in ("flops_total", "flops_computed")
    )
    frozen = frozenset(parameter_shapes(config)) - {
        FINAL_NORM,
        HEAD,
        *(n for n in parameter_shapes(config) if layer_of(n) == 2),
    }
    assert charged[3:] == pytest.approx([per_step] * 5)
    assert computed[3:5] == pytest.approx([per_step * computed_share(config, frozen)] * 2)
    assert computed[5:] == pytest.approx([per_step] * 3)


def test_a_teacher_is_charged_a_forward_pass_as_long_as_it_stays(finished):
    lines = records(finished("taught"))
    student, teacher = (
        count_parameters(read_config(path)) for path in (checkpoints(finished("taught"))[i] for i in (-1, 0))
    )
    charged = [after["flops_total"] - before["flops_total"] for before, after in itertools.pairwise(lines[2:])]
    assert charged == pytest.approx([4 * 16 * (6 * student + 2 * teacher)] * 3 + [4 * 16 * 6 * student] * 2)


def test_a_student_copies_nothing_of_its_teacher(finished):
    first = read_training(checkpoints(finished("taught"))[3])
    assert first.state["history"][-1]["plan"]["fresh"] is True


def test_a_learned_growth_trains_its_matrices_in_the_first_steps_of_the_stage_and_then_the_model(finished):
    folder = finished("learned")
    states = [read_training(path) for path in checkpoints(folder)]
    assert [each.state["model_config"]["n_layer"] for each in states] == [1] * 5 + [3] * 3
    assert [each.state["grown_into_stage"] for each in states] == [1] * 5 + [2] * 3
    assert all(torch.equal(states[4].model[name], weight) for name, weight in states[2].model.items())
    matrices = [each.rng["learning"]["matrices"]["depth.q"] for each in states[3:5]]
    assert not torch.equal(*matrices)
    assert "learning" not in states[5].rng and "learning" not in states[2].rng
    when = [r["when"] for r in records(folder, "evals.jsonl") if r["metric"] == "loss" and r["when"] != "every"]
    assert when == ["start", "before_growth", "after_growth", "end"]
    charged = [b["flops_total"] - a["flops_total"] for a, b in itertools.pairwise(records(folder)[2:])]
    assert charged == pytest.approx([6 * count_parameters(read_config(checkpoints(folder)[-1])) * 4 * 16] * 6)
    assert states[-1].state["history"][0]["plan"]["data"] == {"steps": 3, "rate": 0.03, "last_step": 6}


def test_the_parent_of_a_learned_growth_is_the_model_before_and_stays_on_the_disk(finish):
    folder = finish(RUNS["learned"], checkpoints={"every_steps": 1, "keep_last": 1, "keep_every_steps": 0})
    before, last = checkpoints(folder)
    (record,) = read_training(last).state["history"]
    assert record["parent"] == manifest_sha256(before) and record["parent_path_name"] == before.name


def test_a_growth_that_is_still_learned_does_not_go_on_from_a_damaged_parent(finished, finish, tmp_path):
    folder = Path(shutil.copytree(finished("learned"), tmp_path / "run"))
    for path in checkpoints(folder)[4:]:  # all but the first step of learning
        shutil.rmtree(path)
    file = checkpoints(folder)[2] / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="does not have the crc32"):
        finish(RUNS["learned"], folder)


def test_a_gradient_behind_new_neurons_is_charged_and_keeps_the_loss(finished):
    folder = finished("gradmax")
    losses = {r["when"]: r["value"] for r in records(folder, "evals.jsonl") if r["metric"] == "loss"}
    assert losses["after_growth"] == pytest.approx(losses["before_growth"], rel=1e-5)
    charged = [b["flops_total"] - a["flops_total"] for a, b in itertools.pairwise(records(folder))]
    assert charged[2] > charged[3] * 1.1 and charged[3] == charged[4]
    (record,) = read_training(latest(folder / "checkpoints")).state["history"]
    assert record["growth_flops"] == pytest.approx(charged[2] - charged[3])
    assert record["flops_total"] == pytest.approx(records(folder)[2]["flops_total"] + record["growth_flops"])


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["learn-depth", "gradmax"])
def test_noise_of_a_stage_reaches_weights_that_are_made_from_data(operator, finish):
    sizes = {"n_layer": 1} if operator == "learn-depth" else {"intermediate_size": 16}
    learning = {"learn_steps": 2} if operator == "learn-depth" else {}

    def grown(noise):
        grown = {"name": "grown", "operator": operator, "options": {"noise": noise, **learning}, "max_steps": 3}
        folder = finish([{"name": "base", "max_steps": 1, **sizes}, grown], optimizer=AT_REST)
        return read_training(latest(folder / "checkpoints"))

    clean, noisy = grown(0.0), grown(0.5)
    plan = GrowthPlan.from_dict(noisy.state["history"][0]["plan"])
    for name, weight in clean.model.items():
        expected = with_noise(weight, plan, name) if weight.dim() == 2 else weight
        assert torch.equal(noisy.model[name], expected), name


def test_a_prefix_takes_the_next_layers_of_its_reference_between_two_stages(finish, tmp_path):
    large = latest(finish([{"name": "large", "max_steps": 2}]) / "checkpoints")
    stages = [
        {"name": "small", "n_layer": 1, "max_steps": 2},
        {"name": "grown", "operator": "inheritune", "options": {"reference": str(large)}, "max_steps": 1},
    ]
    folder = finish(stages, optimizer=AT_REST)
    grown, reference = read_training(latest(folder / "checkpoints")), read_training(large)
    above = [name for name in grown.model if layer_of(name) in (1, 2)]
    assert all(torch.equal(grown.model[name], reference.model[name]) for name in above)
    assert grown.state["history"][0]["reference"] == manifest_sha256(large)


def test_width_grows_between_stages_with_its_moments(finished):
    folder = finished("wider")
    assert [read_config(path).n_embd for path in checkpoints(folder)] == [8] * 3 + [16] * 4
    assert {int(s["step"]) for s in read_training(latest(folder / "checkpoints")).optimizer.values()} == {7}
    losses = {r["when"]: r["value"] for r in records(folder, "evals.jsonl") if r["metric"] == "loss"}
    assert losses["after_growth"] == pytest.approx(losses["before_growth"], rel=1e-5)
    assert read_training(latest(folder / "checkpoints")).state["history"][0]["plan"]["seed"] == 1


def test_a_continued_schedule_spans_its_stages_and_rises_again_after_growth():
    wsd = ScheduleConfig(kind="wsd", warmup_steps=2, decay_steps=4)
    stages = [
        StageConfig("base", max_steps=6, n_layer=2),
        StageConfig("grown", max_steps=8, operator="stack", continue_schedule=True, rewarmup_steps=2),
        StageConfig("again", max_steps=3),
    ]
    rates = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.0)
    first, second, third = plan_stages(run_config(*stages, optimizer=rates, schedule=wsd), MODEL)
    assert [first.learning_rate(step) for step in range(6)] == [0.5, 1, 1, 1, 1, 1]
    assert [second.learning_rate(step) for step in range(8)] == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert [third.learning_rate(step) for step in range(3)] == [0.5, 1.0, 0.25]


def test_block_expansion_between_runs_trains_the_new_layers_alone(finish, tmp_path):
    parent = finish([{"name": "base", "n_layer": 2, "max_steps": 2}])
    source = latest(parent / "checkpoints")
    grow_checkpoint(source, tmp_path / "grown", plan_growth("llama-pro", read_config(source), n_layer=3))
    stages = [{"name": "new", "trainable": "new", "max_steps": 2}]
    folder = finish(stages, tmp_path / "run", init_from=str(tmp_path / "grown"))
    shutil.rmtree(checkpoints(folder)[-1])
    finish(stages, folder, init_from=str(tmp_path / "grown"))  # and so it does when it goes on
    grown, ended = read_training(tmp_path / "grown").model, read_training(latest(folder / "checkpoints")).model
    changed = {name for name in grown if not torch.equal(grown[name], ended[name])}
    assert changed == {name for name in grown if layer_of(name) == 2}


@pytest.mark.slow
def test_a_first_stage_without_steps_hands_on_the_checkpoint_that_the_second_one_grows(finish, tmp_path):
    base = {"name": "base", "n_layer": 1}
    grown = {"name": "grown", "operator": "stack", "optimizer_policy": "map", "max_steps": 3}
    whole = finish([{**base, "max_steps": 3}, grown])
    parent = latest(finish([{**base, "max_steps": 3}]) / "checkpoints")
    stages = [{**base, "max_steps": 0}, grown]

    folder = finish(stages, tmp_path / "run", init_from=str(parent))
    for last in checkpoints(folder)[1:]:
        shutil.rmtree(last)
    finish(stages, folder, init_from=str(parent))  # and so it does when it goes on

    ended, expected = (read_training(latest(each / "checkpoints")) for each in (folder, whole))
    assert all(torch.equal(ended.model[name], tensor) for name, tensor in expected.model.items())
    assert [record["operator"] for record in ended.state["history"]] == ["stack"]
    assert records(folder)[-1]["flops_total"] == records(whole)[-1]["flops_total"]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"max_steps": 1}, "the model grows .n_layer 2 -> 8., and no operator says how"),
        ({"operator": "stack", "options": {"n_layer": 4}}, "options holds n_layer"),
        (
            {"operator": "stack", "options": {"shares": "even"}},
            "stack takes n_layer, factor, layer_map, and not shares",
        ),
        ({"operator": "stack", "mask_steps": 3}, "mask_steps belongs to"),
        ({"operator": "random-depth", "max_steps": 10}, "opens over 5,000 steps and the stage has 10"),
        ({"operator": "stack", "trainable": "new", "n_layer": 2}, "added none"),
        (
            {"operator": "learn-depth", "optimizer_policy": "map", "max_steps": 200},
            "'map' does not go with learn-depth",
        ),
        ({"operator": "ligo", "distill_weight": 1, "distill_steps": 100, "max_steps": 200}, "distill_steps=100 has no"),
        ({"operator": "stack", "teacher": "x"}, "no effect without distill_weight"),
        ({"operator": "split-width"}, "split-width grows width only, but n_layer goes 2 -> 8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_stage_that_does_not_fit_is_refused_before_training(stage, message):
    stages = [StageConfig("base", max_steps=1, n_layer=2), StageConfig("grown", **{"max_steps": 4, **stage})]
    with pytest.raises(ValueError, match=f"stage 'grown'.*{message}"):
        plan_stages(run_config(*stages), MODEL)


@pytest.mark.parametrize("first_step", [0, 5, 20])
def test_what_a_stage_will_cost_is_the_sum_over_its_steps(first_step):
    learnt = StageConfig("grown", max_steps=30, operator="ligo", options={"learn_steps": 10}, distill_weight=0.5)
    config = run_config(StageConfig("base", max_steps=1, n_layer=2), dataclasses.replace(learnt, distill_steps=25))
    stage = plan_stages(config, MODEL)[1]
    expected = sum(step_flops(config, stage, step).paper for step in range(first_step, 30))
    assert stage_flops(config, stage, first_step).paper == pytest.approx(expected)


def test_a_first_stage_has_nothing_new_to_train_and_no_teacher_of_its_own():
    with pytest.raises(ValueError, match="trainable='new' needs a growth"):
        plan_stages(run_config(StageConfig("base", max_steps=1, trainable="new")), MODEL)
    with pytest.raises(ValueError, match="give teacher: PATH"):
        plan_stages(run_config(StageConfig("base", max_steps=1, distill_weight=0.5)), MODEL)


def test_copies_that_can_never_part_are_a_warning(finish, capsys):
    cloned = {"name": "grown", "operator": "hypercloning", "max_steps": 1}
    base = {"name": "base", "n_embd": 8, "max_steps": 1}
    finish([base, cloned])
    assert "warning: stage 'grown': copies with even shares stay equal" in capsys.readouterr().err
    finish([base, {**cloned, "options": {"twin_noise": 0.3}}])
    assert "stay equal" not in capsys.readouterr().err


def test_a_teacher_that_went_is_named(finished, finish, tmp_path):
    folder = Path(shutil.copytree(finished("taught"), tmp_path / "run"))
    for path in [*checkpoints(folder)[:3], *checkpoints(folder)[4:]]:
        shutil.rmtree(path)
    with pytest.raises(DataError, match="from which stage 'grown' grows or learns, is not in .*--fresh"):
        finish(RUNS["taught"], folder)


def test_computed_share_counts_the_gradients_that_are_needed():
    config = Config(n_layer=2, n_embd=8, n_head=1, intermediate_size=8, vocab_size=64, block_size=8)
    names = list(parameter_shapes(config))
    assert computed_share(config, frozenset()) == 1
    assert computed_share(config, frozenset(names)) == pytest.approx(1 / 3)
    only_head = frozenset(names) - {HEAD}
    assert computed_share(config, only_head) == pytest.approx((1 + 2 * 64 * 8 / count_parameters(config)) / 3)
