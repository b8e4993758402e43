"""The study's settings hold together, and its statistics find what was put into made-up losses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks import study, tables
from grow.compare.plan import planned_runs
from grow.compare.settings import read_settings
from lit_gpt.packed_dataset import write_token_file

NAMES = sorted(path.stem for path in study.SETTINGS.glob("*.yaml") if path.stem != study.COMMON)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    write_token_file(folder / "train.bin", np.arange(4096) % 1024, np.dtype(np.uint16))
    return str(folder)


def losses_of(effects: list[float], deviation: float, n_seeds: int, rng: np.random.Generator) -> np.ndarray:
    seeds = rng.normal(0, 1, n_seeds)  # what a seed does to all arms must not matter
    return np.array(effects)[:, None] + seeds + rng.normal(0, deviation, (len(effects), n_seeds))


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_costs_what_scratch_costs(name, data, monkeypatch):
    monkeypatch.chdir(study.ROOT)
    config = read_settings(study.SETTINGS / f"{name}.yaml")
    settings = {**config.settings, "data": {"train": data}}
    settings["model"] = {**settings["model"], "vocab_size": 1024}
    config = dataclasses.replace(config, settings=settings)
    runs = [run for run in planned_runs(config, config.seeds[0]) if run.name in config.arms]
    costs = {run.name: run.flops + (run.base.flops if run.base else 0.0) for run in runs}
    assert costs.keys() == config.arms.keys()
    assert max(costs.values()) / min(costs.values()) < 1.01


def test_the_noise_is_what_seeds_and_arms_do_not_explain():
    rng = np.random.default_rng(0)
    found = [study.noise(losses_of([3.0, 3.1, 3.5, 4.0], 0.02, 3, rng))[0] ** 2 for _ in range(2000)]
    assert np.mean(found) == pytest.approx(0.02**2, rel=0.05)


def test_the_interval_holds_for_all_differences_to_one_arm_at_the_stated_confidence():
    rng = np.random.default_rng(1)
    held = []
    for _ in range(2000):
        losses = losses_of([3.0] * 6, 0.02, 3, rng)
        differences = losses.mean(1)[1:] - losses.mean(1)[0]
        held.append(bool((np.abs(differences) < study.half_width(losses)).all()))
    assert 0.95 <= np.mean(held) < 0.98  # Bonferroni is a little wide


def test_the_page_has_the_tables_of_the_results():
    assert study.main(["--check"]) == 0


def test_a_table_of_other_numbers_is_noticed(tmp_path, monkeypatch, capsys):
    page = tmp_path / "study.md"
    page.write_text(
        study.PAGE.read_text(encoding="utf-8").replace("| stack, 4e-3 |", "| stuck, 4e-3 |"), encoding="utf-8"
    )
    monkeypatch.setattr(study, "PAGE", page)
    assert study.main(["--check"]) == 1
    assert "python -m benchmarks.study" in capsys.readouterr().out


def test_results_of_other_settings_are_refused(monkeypatch, tmp_path):
    ranked = {"seeds": [1, 2], "arms": []}
    with pytest.raises(study.DataError, match="not those of configs/study/rates.yaml"):
        study._comparison(read_settings(study.SETTINGS / "rates.yaml"), ranked, "rates")


def test_a_comparison_that_was_not_trained_is_said_to_be_missing():
    assert "Not trained yet." in tables.with_tables("<!-- table: rates -->\n<!-- end -->\n", study.table_of({}))


def test_a_run_that_two_comparisons_share_is_charged_once():
    run = {"seed": 1, "name": "stack", "cpu_seconds": 1800.0}
    unmeasured = {"seed": 2, "name": "stack", "cpu_seconds": None}
    first = {"out_dir": "out/a", "runs": [run, unmeasured]}
    other = {"out_dir": "out/b", "runs": [run]}
    assert study.cpu_hours({"x": first, "y": first, "z": other}) == (1.0, 1)
