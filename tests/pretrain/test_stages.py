"""Stages are resolved before step 0, so that a mistake in the last one does not cost the first one's training."""

from __future__ import annotations

import pytest

from lit_gpt.config import Config
from pretrain.config import BatchConfig, DataConfig, ModelConfig, OptimizerConfig, RunConfig, StageConfig
from pretrain.stages import plan_stages

MODEL = Config.from_name("8L64H", block_size=16, vocab_size=64)


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
