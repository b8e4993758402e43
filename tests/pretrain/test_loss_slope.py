"""A stage that ends when its loss falls too slowly: the slope itself, and that a resumed run decides the same."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from lit_gpt.flops import Flops
from pretrain.command_line import Invocation, config_of, parse
from pretrain.loop import is_too_slow
from pretrain.loss_slope import BINS, add_loss, loss_slope
from pretrain.preflight import preflight
from pretrain.run import run
from pretrain.stages import Learning, plan_stages
from pretrain.state import TrainState
from pretrain.status import status_of
from pretrain.step_samples import samples_of
from tests.pretrain.conftest import command_for, two_stages
from tests.pretrain.runs import assert_same_end, records

STEPS = 120


def bins_of(losses):
    bins = []
    for flops, loss in losses:
        bins = add_loss(bins, flops, loss)
    return bins


def power_law(exponent, *, steps, first=1):
    return [(1e9 * step, 5.0 * step**exponent) for step in range(first, steps)]


@pytest.mark.parametrize("exponent", [-0.3, -0.05, 0.1])
def test_the_slope_of_a_power_law_is_its_exponent(exponent):
    assert loss_slope(bins_of(power_law(exponent, steps=4000))) == pytest.approx(exponent, abs=2e-3)


def test_only_the_last_doubling_counts():
    fast = power_law(-0.3, steps=1000)
    flat = [(1e9 * step, fast[-1][1]) for step in range(1000, 2200)]
    assert loss_slope(bins_of(fast + flat)) == pytest.approx(0, abs=1e-3)


def test_there_is_no_slope_before_the_flops_have_doubled_since_the_first_loss():
    assert loss_slope(bins_of(power_law(-0.3, first=1000, steps=1950))) is None
    assert loss_slope(bins_of(power_law(-0.3, first=1000, steps=2100))) is not None
    assert loss_slope(bins_of(power_law(-0.3, steps=6))) is None, "six points make no slope"


def test_what_is_kept_stays_small_however_often_is_logged():
    assert len(bins_of(power_law(-0.3, steps=20_000))) <= BINS + 3


def slow_settings(folder: Path, data: Path, **base) -> dict[str, object]:
    settings = two_stages(folder, data)
    settings["stages"][0] = {"name": "base", "n_layer": 1, "max_steps": STEPS, "grow_when": "loss_slope", **base}
    settings["checkpoints"] = {"every_steps": 4, "keep_every_steps": 4}
    settings["validation"] = {"every_steps": 0}
    return {**settings, "data": {"train": str(data), "max_epochs": 100}}


def finish(settings: dict[str, object], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    run(parse(command_for(settings, folder)), command=["pretrain"])
    return Path(settings["out_dir"])


@pytest.fixture(scope="module")
def ended(tmp_path_factory, prepared) -> Path:
    """A run whose first stage ends once its loss falls more slowly than any does that falls at all."""
    folder = tmp_path_factory.mktemp("slope")
    return finish(slow_settings(folder / "run", prepared, slope=-0.3), folder)


def test_a_stage_ends_early_and_the_model_grows(ended):
    lines = records(ended)
    base = [line for line in lines if line["stage"] == 1]
    assert 10 < len(base) < STEPS and [line["stage_step"] for line in lines if line["stage"] == 2] == [*range(1, 9)]
    bins = []
    slopes = []
    for line in base[2:]:  # after the warm-up
        bins = add_loss(bins, line["flops_total"], line["loss"])
        slopes.append(loss_slope(bins))
    assert slopes[-1] >= -0.3 and all(slope is None or slope < -0.3 for slope in slopes[:-1])
    measured = {line["when"]: line["step"] for line in records(ended, "evals.jsonl")}
    assert measured["before_growth"] == measured["after_growth"] == len(base)


def test_a_run_that_goes_on_from_any_checkpoint_grows_at_the_same_step(ended, prepared, tmp_path):
    steps = sorted(int(path.name[5:]) for path in (ended / "checkpoints" / "stage-01").iterdir())
    last = steps[-1]
    assert last == len([line for line in records(ended) if line["stage"] == 1])
    for step in (steps[0], steps[-2], last):
        folder = tmp_path / str(step)
        folder.mkdir()
        copy = Path(shutil.copytree(ended, folder / "run"))
        shutil.rmtree(copy / "checkpoints" / "stage-02")
        for later in steps[steps.index(step) + 1 :]:
            shutil.rmtree(copy / "checkpoints" / "stage-01" / f"step-{later:010d}")
        finish(slow_settings(copy, prepared, slope=-0.3), folder)
        assert_same_end(copy, ended)


def test_what_a_step_trained_on_knows_when_the_stage_ended(ended):
    last = len([line for line in records(ended) if line["stage"] == 1])
    found = [samples_of(ended, step=step) for step in (last, last + 1)]
    assert [each.stage for each in found] == ["base", "grown"] and found[0].planned_steps == last + 8


def test_a_loss_that_falls_fast_enough_trains_to_the_stages_last_step(prepared, tmp_path):
    settings = slow_settings(tmp_path / "run", prepared, slope=-1e-6)
    settings["stages"][0]["max_steps"] = 24
    lines = records(finish(settings, tmp_path))
    assert len([line for line in lines if line["stage"] == 1]) == 24


def test_a_stage_is_not_judged_while_its_growth_is_learned_or_its_rate_rises(prepared, tmp_path):
    config = config_of(slow_settings(tmp_path, prepared, slope=-0.3))
    stage = plan_stages(config, config.model.resolve(259))[0]
    stage = dataclasses.replace(stage, learning=Learning(steps=5, rate=0.1))
    state = TrainState(flops=Flops(1e9, 1e9, 1e9))
    judged = []
    for state.stage_step in range(1, 10):
        assert not is_too_slow(stage, state, 5.0)
        judged += [state.stage_step] if state.slope_bins else []
    assert judged == [8, 9], "after 5 steps that learn and 2 of warm-up"


@pytest.mark.parametrize(("every", "warned"), [(1, False), (6, False), (7, True), (40, True)])
def test_a_stage_that_is_logged_too_seldom_for_a_slope_is_warned_of(prepared, tmp_path, every, warned):
    """The last doubling of the FLOPs of 120 steps are 60."""
    config = config_of({**slow_settings(tmp_path, prepared), "logging": {"every_steps": every}})
    lines = preflight(Invocation(config)).data_lines
    assert any("grow_when, which has no effect" in line for line in lines) == warned


def test_status_knows_when_the_stage_ended(ended):
    last = len([line for line in records(ended) if line["stage"] == 1])
    found = status_of(ended)
    assert (found.state, found.step, found.planned_steps) == ("finished", last + 8, last + 8)


def staged(*stages: dict[str, object]) -> dict[str, object]:
    return {"out_dir": "out", "model": {"name": "4L128H"}, "data": {"train": "data"}, "stages": list(stages)}


BASE = {"name": "base", "n_layer": 2, "max_steps": 9, "grow_when": "loss_slope"}
GROWN = {"name": "grown", "operator": "stack", "max_steps": 9}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((BASE,), "needs a next stage that grows"),
        ((BASE, {"name": "more", "n_layer": 2, "max_steps": 9}), "needs a next stage that grows"),
        ((BASE, {**GROWN, "continue_schedule": True}), "cannot continue_schedule"),
        (({**BASE, "slope": 0.1}, GROWN), "slope=0.1 must be below 0"),
        (({**BASE, "grow_when": None, "slope": -0.1}, GROWN), "slope belongs to grow_when"),
        (({**BASE, "grow_when": "loss"}, GROWN), "grow_when"),
    ],
)
def test_a_rule_that_cannot_work_is_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        config_of(staged(*stages))


@pytest.mark.parametrize(
    ("grown", "slope"),
    [({"operator": "stack"}, -0.0575), ({"operator": "split-width"}, -0.0475), ({"operator": "lemon"}, -0.0475)],
)
def test_the_default_slope_is_that_of_the_paper_for_what_grows(grown, slope):
    base = {**BASE, "n_embd": 128 if grown["operator"] == "stack" else 64}
    base["n_layer"] = 4 if grown["operator"] == "split-width" else 2
    config = config_of(staged(base, {**GROWN, **grown}))
    first, second = plan_stages(config, config.model.resolve(64))
    assert first.slope == slope and second.slope is None


def test_a_baseline_of_unknown_length_is_refused(prepared, tmp_path):
    settings = slow_settings(tmp_path / "run", prepared)
    with pytest.raises(ValueError, match="replace it by the max_steps that the stage had"):
        run(parse(command_for(settings, tmp_path, "--scratch", "--dry-run")), command=["pretrain"])
