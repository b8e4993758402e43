"""Steps that would do harm are skipped to the bit, counted, and in the end the run gives up by name or goes round."""

from __future__ import annotations

import json

import pytest
import torch

from lit_gpt.checkpoint import latest, read_training
from lit_gpt.settings_files import merge
from pretrain import loop
from pretrain.command_line import parse
from pretrain.config import GuardConfig
from pretrain.guards import NOTHING_SKIPPED, Diverged, Guard
from pretrain.run import run
from pretrain.training import Trained
from tests.pretrain.conftest import two_stages
from tests.pretrain.runs import assert_same_end, records

CPU = torch.device("cpu")


def judged(guard: Guard, losses: list[float], norms: list[float] | None = None, first_step: int = 1) -> list[bool]:
    pairs = zip(losses, norms or [1.0] * len(losses), strict=True)
    return [
        bool(guard.judge(torch.tensor(loss), torch.tensor(norm), step))
        for step, (loss, norm) in enumerate(pairs, first_step)
    ]


def test_what_is_no_number_is_skipped_and_does_not_enter_the_mean():
    guard = Guard(GuardConfig(), CPU)
    bad = judged(guard, [1.0, float("nan"), 2.0, float("inf"), 3.0], [1.0, 1.0, float("nan"), 1.0, 1.0])
    assert bad == [False, True, True, True, False]
    assert guard.total == 3 and guard.take_mean_loss() == 2.0 and guard.take_mean_loss() is None


def test_a_spike_is_measured_against_accepted_steps_once_the_window_is_full():
    guard = Guard(GuardConfig(spike_sigmas=4.0, window_steps=4), CPU)
    assert judged(guard, [1.0, 9.0, 1.0, 1.2]) == [False] * 4  # the window fills up first
    guard = Guard(GuardConfig(spike_sigmas=4.0, window_steps=4), CPU)
    assert judged(guard, [1.0, 1.1, 0.9, 1.0, 9.0, float("nan"), 9.0, 1.05]) == [False] * 4 + [True] * 3 + [False]
    assert judged(guard, [1.0, 1.0], [1.0, 50.0]) == [False, True]


@pytest.mark.parametrize("stop", range(1, 12))
def test_a_guard_that_goes_on_from_what_it_wrote_judges_the_same(stop):
    settings = GuardConfig(spike_sigmas=2.0, window_steps=3)
    losses = [1.0, 1.2, 0.8, 5.0, 1.0, float("nan"), 1.1, 1.0, 1.3, 4.0, 4.0, 1.0]
    whole, first = Guard(settings, CPU), Guard(settings, CPU)
    expected = judged(whole, losses)
    found = judged(first, losses[:stop])
    state = json.loads(json.dumps(first.to_dict()))
    found += judged(Guard(settings, CPU, state), losses[stop:], first_step=stop + 1)
    assert found == expected


def test_enough_skipped_steps_in_a_row_end_the_run_with_the_first_of_them():
    guard = Guard(GuardConfig(max_skipped_steps=2), CPU)
    nan = float("nan")
    for step, loss in enumerate([1.0, nan, 1.0, nan], 1):
        judged(guard, [loss], first_step=step)
        guard.check(step)
    judged(guard, [nan], first_step=5)
    with pytest.raises(Diverged) as found:
        guard.check(5)
    assert (found.value.first_step, found.value.last_step) == (4, 5)


@pytest.fixture
def go(tmp_path, prepared):
    def start(name="run", **changes):
        settings = merge(two_stages(tmp_path / name, prepared), changes)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(settings))
        run(parse(["--config", str(path)]), command=["pretrain"])
        return tmp_path / name

    return start


@pytest.fixture
def poison(monkeypatch):
    """Make steps bad by number: their loss is NaN, or the gradient of one parameter is, while the loss is a number."""
    steps: dict[int, str] = {}
    original = loop.train_step

    def poisoned(this_run, stage, trained: Trained, state, batches):
        kind = steps.get(state.step_count + 1)
        if kind is None:
            return original(this_run, stage, trained, state, batches)
        target = trained.module.register_forward_hook(lambda *_: _[-1] * float("nan")) if kind == "loss" else None
        if target is None:
            parameter = trained.model.transformer.h[0].norm_1.weight
            target = parameter.register_hook(lambda gradient: gradient * float("nan"))
        try:
            return original(this_run, stage, trained, state, batches)
        finally:
            target.remove()

    monkeypatch.setattr(loop, "train_step", poisoned)
    return steps


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_skipped_step_changes_no_bit_but_the_counters(go, poison, kind):
    poison[4] = kind
    folder = go(checkpoints={"every_steps": 1, "keep_every_steps": 1})
    before, after = (read_training(folder / f"checkpoints/stage-01/step-{step:010d}") for step in (3, 4))
    assert all(torch.equal(weight, before.model[name]) for name, weight in after.model.items())
    for name, slots in after.optimizer.items():
        assert all(torch.equal(value, before.optimizer[name][slot]) for slot, value in slots.items())
    assert after.state["position"] == before.state["position"] + 4
    lines = records(folder)
    assert [line["skipped_steps"] for line in lines[:6]] == [0, 0, 0, 1, 1, 1]
    assert lines[3]["loss"] is None and lines[4]["loss"] is not None


def test_a_run_that_was_stopped_among_skipped_steps_judges_as_one_that_was_not(go, poison, tmp_path):
    import shutil

    poison.update({4: "loss", 5: "loss", 9: "gradient"})
    changes = {
        "checkpoints": {"every_steps": 1, "keep_every_steps": 1},
        "guards": {"spike_sigmas": 3.0, "window_steps": 3},
    }
    whole = go("whole", **changes)
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    for path in stopped.glob("checkpoints/stage-*/step-*"):
        if int(path.name[5:]) > 4:
            shutil.rmtree(path)
    go("stopped", **changes)
    assert_same_end(stopped, whole)


def test_a_run_that_diverges_ends_with_the_samples_and_the_way_out(go, poison, tmp_path, prepared, pretrain):
    poison.update(dict.fromkeys(range(3, 100), "loss"))
    settings = merge(two_stages(tmp_path / "run", prepared), {"guards": {"max_skipped_steps": 3}})
    done = pretrain(settings)
    assert done.returncode == 4
    assert "steps 3 to 5 were not made" in done.stderr
    assert "Samples 8 to 19 of the data order" in done.stderr
    assert f"pretrain data show {tmp_path / 'run'} --step 3" in done.stderr
    assert "add [16, 20] to data.skips" in done.stderr  # those before the checkpoint are behind the run
    last = latest(tmp_path / "run" / "checkpoints")
    assert last.name == "step-0000000004"
    assert f"--init-from {last} --out-dir NEW --optimizer.learning_rate RATE" in done.stderr
    poison.clear()
    way_out = ("--init-from", str(last), "--out-dir", str(tmp_path / "new"), "--optimizer.learning_rate", "1e-3")
    again = pretrain({**settings, "stages": [{"name": "base", "n_layer": 1, "max_steps": 2}]}, *way_out)
    assert again.returncode == 0, again.stderr


def test_a_run_that_diverges_before_its_first_checkpoint_has_a_way_out_too(poison, tmp_path, prepared, pretrain):
    poison.update(dict.fromkeys(range(1, 100), "loss"))
    settings = {**two_stages(tmp_path / "run", prepared), "guards": {"max_skipped_steps": 2}}
    settings["checkpoints"] = {"every_steps": 100}
    assert "--fresh --optimizer.learning_rate RATE" in pretrain(settings).stderr
    poison.clear()
    again = pretrain(settings, "--fresh", "--optimizer.learning_rate", "1e-3")
    assert again.returncode == 0, again.stderr


@pytest.fixture
def poison_once(poison, monkeypatch):
    """As `poison`, until the run is given up for the first time: other samples, other losses."""
    original = Guard.check

    def check(self, step):
        try:
            original(self, step)
        except Diverged:
            poison.clear()
            raise

    monkeypatch.setattr(Guard, "check", check)
    return poison


def test_a_rollback_goes_round_the_samples_and_the_run_ends(go, poison_once):
    poison_once.update({5: "loss", 6: "loss"})
    folder = go(guards={"max_skipped_steps": 2, "rollbacks": 1})
    state = read_training(latest(folder / "checkpoints")).state
    assert state["auto_skips"] == [[16, 24]]
    lines = records(folder)
    assert [line["step"] for line in lines] == list(range(1, 15)) and lines[-1]["skipped_steps"] == 0
    assert (
        go(guards={"max_skipped_steps": 2, "rollbacks": 1}) == folder
    )  # finished; its own skips are no other settings


@pytest.mark.parametrize("every_steps", [5, 1])
def test_a_rollback_goes_round_the_samples_although_a_checkpoint_lies_among_them(go, poison_once, every_steps):
    poison_once.update({5: "loss", 6: "loss"})
    folder = go(guards={"max_skipped_steps": 2, "rollbacks": 1}, checkpoints={"every_steps": every_steps})
    assert [line["step"] for line in records(folder)] == list(range(1, 15))


def test_a_growth_that_is_learned_is_not_measured_against_the_smaller_model(go, monkeypatch):
    windows = {}
    original = Guard.judge

    def judge(self, loss, grad_norm, step):
        windows[step] = self.to_dict()["window"]
        return original(self, loss, grad_norm, step)

    monkeypatch.setattr(Guard, "judge", judge)
    stages = [
        {"name": "base", "n_layer": 1, "max_steps": 4},
        {"name": "grown", "operator": "ligo", "options": {"learn_steps": 2}, "max_steps": 5},
    ]
    go(stages=stages, guards={"spike_sigmas": 100.0, "window_steps": 8})
    assert [len(windows[step]) for step in range(1, 10)] == [0, 1, 2, 3, 0, 1, 0, 1, 2]


def test_settings_of_before_there_were_guards_resume():
    assert Guard(GuardConfig(), CPU, NOTHING_SKIPPED).to_dict() == dict(NOTHING_SKIPPED)
