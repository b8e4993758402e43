"""Stages are resolved before step 0, so that a mistake in the last one does not cost the first one's training."""

from __future__ import annotations

import pytest

from lit_gpt.config import Config
from pretrain.config import (
    BatchConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    StageConfig,
)
from pretrain.stage_text import stage_lines
from pretrain.stages import plan_stages

MODEL = Config.from_name("8L64H", block_size=16, vocab_size=64, n_head=4)


def run_config(*stages, **settings):
    return RunConfig(
        out_dir="out",
        model=ModelConfig("8L64H"),
        data=DataConfig("data"),
        stages=list(stages),
        batch=BatchConfig(global_batch_size=4, micro_batch_size=4),
        **settings,
    )


def test_a_stage_takes_the_runs_settings_unless_it_has_its_own():
    base = StageConfig("base", max_tokens=640, n_layer=2, learning_rate=0.5, warmup_steps=7)
    grown = StageConfig("grown", max_steps=3, operator="stack")
    first, second = plan_stages(run_config(base, grown, optimizer=OptimizerConfig(learning_rate=0.25)), MODEL)
    assert (first.config.n_layer, first.steps, first.optimizer.learning_rate, first.schedule.warmup_steps) == (
        2,
        10,
        0.5,
        7,
    )
    assert (second.config.n_layer, second.steps, second.optimizer.learning_rate) == (8, 3, 0.25)
    assert second.plan.layer_map == (0, 1) * 4


def test_several_hops_grow_from_one_stage_to_the_next():
    stages = [
        StageConfig("a", max_steps=1, n_layer=2),
        StageConfig("b", max_steps=1, n_layer=4, operator="stack"),
        StageConfig("c", max_steps=1, operator="interpolate"),
    ]
    assert [s.plan.layer_map if s.plan else None for s in plan_stages(run_config(*stages), MODEL)] == [
        None,
        (0, 1, 0, 1),
        (0, 0, 1, 1, 2, 2, 3, 3),
    ]


@pytest.mark.parametrize(
    ("layer_map", "message"), [("12*3", "8"), ("123*2-12", "layer 3"), ("1?2", "[?]"), ("01*4", "count from 1")]
)
def test_a_layer_map_that_does_not_fit_is_refused_before_training(layer_map, message):
    base = StageConfig("base", max_steps=1, n_layer=2)
    with pytest.raises(ValueError, match=f"(?s)stage 'grown'.*{message}"):
        plan_stages(run_config(base, StageConfig("grown", max_steps=1, operator="partial", layer_map=layer_map)), MODEL)


@pytest.mark.parametrize("name", ["learn-depth", "ligo"])
def test_a_growth_that_is_learned_needs_steps_to_learn_in_and_takes_the_batches_of_the_run(name):
    base = StageConfig("base", max_steps=1, n_layer=2)
    with pytest.raises(ValueError, match="stage 'grown'.*learns for 100 steps and the stage has 8.*learn_steps: 2"):
        plan_stages(run_config(base, StageConfig("grown", max_steps=8, operator=name)), MODEL)
    options = {"learn_steps": 2, "batch_size": 4}
    with pytest.raises(ValueError, match="stage 'grown'.*the batches of its own run"):
        plan_stages(run_config(base, StageConfig("grown", max_steps=8, operator=name, options=options)), MODEL)


def test_a_stage_shorter_than_a_step_is_refused():
    with pytest.raises(ValueError, match="less than one step of 64 tokens"):
        plan_stages(run_config(StageConfig("main", max_tokens=63)), MODEL)


def test_a_stage_shorter_than_a_step_names_what_makes_a_step_long():
    with pytest.raises(ValueError, match=r"batch.global_batch_size=4 samples of block_size=16\); give more tokens"):
        plan_stages(run_config(StageConfig("main", max_tokens=63)), MODEL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"operator": "inheritune", "n_layer": 4}, r"options: \{reference: PATH\}"),
        ({"operator": "stack", "options": {"noize": 3}}, "unknown option noize; did you mean noise.*stack takes"),
        ({"operator": "stack", "options": {"data": "x"}}, "options holds data; a stage grows"),
        ({"n_layer": 2, "distill_weight": 0.5, "distill_steps": 9, "teacher": "nowhere"}, "no such checkpoint"),
    ],
)
def test_a_growth_that_cannot_be_says_what_to_write(settings, message):
    base = StageConfig("base", max_steps=1, n_layer=2)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        plan_stages(run_config(base, StageConfig("grown", max_steps=8, **settings)), MODEL)


def lines_of(*stages: StageConfig, **settings: object) -> list[str]:
    """What is said of the last of some stages."""
    return list(stage_lines(plan_stages(run_config(*stages, **settings), MODEL)[-1]))


BASE = StageConfig("base", max_steps=10, n_layer=2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"operator": "stack", "options": {"noise": 0.1}}, "grown by stack: 2 -> 8 layers (noise 0.1, seed 3407)"),
        ({"operator": "stack", "optimizer_policy": "map"}, "optimizer state: map"),
        (
            {"operator": "stack", "learning_rate": 0.25, "warmup_steps": 3},
            "learning rate 0.25, cosine to 3e-05; 3 steps",
        ),
        ({"operator": "llama-pro", "n_layer": 4}, "frozen: 17 of 31 tensors; 14 train"),
        ({"operator": "random-depth", "mask_steps": 7, "mask_phases": "in-turn"}, "open over 21 steps, in-turn"),
        ({"operator": "learn-depth", "options": {"learn_steps": 5}}, "the first 5 steps learn the growth"),
        ({"operator": "distill", "distill_steps": 9}, "stage before, weight 1 of the loss until step 9"),
        (
            {"operator": "stack", "continue_schedule": True, "rewarmup_steps": 4},
            "continues the schedule at step 10 of 40, rises again over 4 steps",
        ),
    ],
)
def test_a_run_says_of_every_stage_in_what_it_is_its_own(settings, said):
    assert said in "\n".join(lines_of(BASE, StageConfig("grown", max_steps=30, **settings)))


def test_a_growth_in_width_has_no_layer_map_and_a_model_without_a_name_none():
    wide = lines_of(
        StageConfig("base", max_steps=10, n_embd=32), StageConfig("wide", max_steps=3, operator="split-width")
    )
    assert "grown by split-width: n_embd 32 -> 64, " in wide[1]
    assert not any("layer map" in line or "R_c" in line or "layers" in line for line in wide[1:])
    assert "name=" not in lines_of(StageConfig("base", max_steps=10, n_embd=32))[0]


def test_the_decay_of_a_schedule_is_told_with_its_length():
    schedule = ScheduleConfig(kind="wsd", decay_steps=4)
    going_on = StageConfig("grown", max_steps=30, operator="stack", continue_schedule=True)
    assert "falls to 3e-05 over the last 4 of 40 steps" in "\n".join(lines_of(BASE, going_on, schedule=schedule))
