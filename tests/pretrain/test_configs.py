"""Every file in configs/ is a run that starts, and those of the paper have its models, growths, tokens and FLOPs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from grow.layer_map import parse_layer_map
from lit_gpt.config import Config
from lit_gpt.flops import count_parameters
from pretrain.command_line import Invocation, parse
from pretrain.run import run
from pretrain.stages import Stage, plan_stages
from pretrain.training import stage_flops
from tests.pretrain.conftest import write_prepared

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "configs" / "paper"
TOKENS_PER_STEP = 1024 * 2048
B = 10**9

MODELS = {  # layers, width and parameters of the paper's sizes, and the rate of its table 1
    "410M": (24, 1024, 373_867_520, 6e-4),
    "1.1B": (24, 2048, 1_364_297_728, 3e-4),
    "3B": (32, 2560, 2_397_473_280, 1.6e-4),
    "7B": (32, 4096, 5_933_109_248, 1e-4),
}


@dataclass(frozen=True)
class Experiment:
    """One run of the paper."""

    layers: tuple[int, ...]
    """Of the stages before the last."""
    base_tokens: int
    """Of each of them."""
    budget_flops: float
    operator: str = "stack"
    layer_map: str | None = None
    """Of the last growth, where it is neither stacking nor interpolation."""
    width: int | None = None
    """Of the base, where the width grows."""
    options: dict[str, object] = field(default_factory=dict)


def wide(operator: str, tokens: int, **options: object) -> Experiment:
    return Experiment((24,), tokens, 8e20, operator, width=1024, options=options)


def partial(layer_map: str) -> Experiment:
    return Experiment((6,), 10 * B, 8e20, "partial", layer_map=layer_map)


ISO_FLOP = {"410M": 2.2e20, "1.1B": 8e20, "3B": 1.2e21}  # the largest budgets of figures 8 and 10
BASES = {"410M": 6, "1.1B": 6, "3B": 8}
EXPERIMENTS = {
    "410M": Experiment((6,), 10 * B, 2.2e20),
    "410M/750B": Experiment((6,), 10 * B, 6 * 373_867_520 * 750e9),
    "1.1B": Experiment((6,), 10 * B, 8e20),
    "3B": Experiment((8,), 10 * B, 6 * 2_397_473_280 * 300e9),
    "7B": Experiment((8,), 10 * B, 6 * 5_933_109_248 * 300e9),
    **{
        f"{size}/d{d:02d}B": Experiment((BASES[size],), d * B, ISO_FLOP[size])
        for size in BASES
        for d in (0, 1, 5, 20, 50)
    },
    **{f"1.1B/g{g:02d}": Experiment((24 // g,), 10 * B, 8e20) for g in (2, 8, 24)},
    **{f"3B/g{g:02d}": Experiment((32 // g,), 10 * B, 1.2e21) for g in (8, 16, 32)},
    **{
        f"1.1B/{operator}-{d}B": Experiment((6,), d * B, 8e20, operator)
        for operator in ("zero-depth", "random-depth", "learn-depth")
        for d in (10, 50)
    },
    **{
        f"1.1B/{operator}-{d}B": wide(operator, d * B, residual="published")
        for operator in ("split-width", "zero-width", "random-width")
        for d in (10, 50)
    },
    **{f"1.1B/learn-width-{d}B": wide("learn-width", d * B) for d in (10, 50)},
    "1.1B/gradual": Experiment((6, 12), 10 * B, 8e20),
    "1.1B/stack-8L": Experiment((8,), 10 * B, 8e20),
    "1.1B/interpolate-8L": Experiment((8,), 10 * B, 8e20, "interpolate"),
    "1.1B/stack-8L-noise": Experiment((8,), 10 * B, 8e20, options={"noise": 0.2}),
    "1.1B/split-width-10B-noise": wide("split-width", 10 * B, residual="published", noise=0.2),
    "1.1B/partial-12-3456x5-56": partial("12-3456*5-56"),
    "1.1B/partial-12-345x7-6": partial("12-345*7-6"),
    "1.1B/partial-123-456x7": partial("123-456*7"),
    "1.1B/partial-1234-56x10": partial("1234-56*10"),
    "1.1B/partial-12-34x10-56": partial("12-34*10-56"),
    "1.1B/partial-1-234x7-56": partial("1-234*7-56"),
    "1.1B/partial-123x7-456": partial("123*7-456"),
}


@pytest.fixture(scope="module")
def tokens_of_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of prepared tokens, a thousand times too few, that says it has a vocabulary of 32,000."""
    return write_prepared(tmp_path_factory.mktemp("data"), np.arange(30_000) % 250, vocab_size=32000)


def files_of(name: str) -> list[Path]:
    """The chain of files of an experiment: what all share, the size, and what is its own."""
    parts = name.split("/")
    return [PAPER / "common.yaml", *(PAPER / f"{'/'.join(parts[: n + 1])}.yaml" for n in range(len(parts)))]


def invocation(files: list[Path], data: Path, *flags: str) -> Invocation:
    configs = [word for file in files for word in ("--config", str(file))]
    return parse([*configs, "--data.train", str(data), "--data.max_epochs", "1e9", *flags])


@cache  # parsing takes longer than what is tested
def experiment(name: str, data: Path) -> tuple[Invocation, list[Stage]]:
    asked = invocation(files_of(name), data)
    model = asked.config.model.resolve(32000)
    return asked, plan_stages(asked.config, model)


def test_every_file_of_the_paper_is_an_experiment_and_the_other_way_round():
    found = {path.relative_to(PAPER).with_suffix("").as_posix() for path in PAPER.rglob("*.yaml")}
    assert found - {"common"} == set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_has_the_models_growths_tokens_and_flops_of_the_paper(name, tokens_of_llama):
    expected = EXPERIMENTS[name]
    asked, stages = experiment(name, tokens_of_llama)
    n_layer, n_embd, parameters, rate = MODELS[name.split("/")[0]]

    assert [stage.config.n_layer for stage in stages] == [*expected.layers, n_layer]
    assert [stage.config.n_embd for stage in stages] == [expected.width or n_embd] * len(expected.layers) + [n_embd]
    assert count_parameters(stages[-1].config) == parameters
    for stage in stages[:-1]:
        assert stage.steps == max(1, expected.base_tokens // TOKENS_PER_STEP)
    spent = sum(stage_flops(asked.config, stage).paper for stage in stages)
    assert spent == pytest.approx(expected.budget_flops, rel=1e-3)
    assert asked.config.batch.global_batch_size * stages[-1].config.block_size == TOKENS_PER_STEP
    last = stages[-1]
    assert (last.optimizer.learning_rate, last.optimizer.min_learning_rate) == (rate, pytest.approx(rate / 10))
    assert (last.schedule.kind, last.schedule.warmup_steps, last.optimizer_policy) == ("cosine", 3000, "reset")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_grows_as_the_paper_does(name, tokens_of_llama):
    expected = EXPERIMENTS[name]
    _, stages = experiment(name, tokens_of_llama)
    last, src = stages[-1].plan, stages[-2].config.n_layer

    assert last.operator == expected.operator
    for key, value in expected.options.items():
        assert {**last.options, "noise": last.noise}[key] == value
    maps = {
        "stack": tuple(i % src for i in range(last.dst.n_layer)),
        "interpolate": tuple(i * src // last.dst.n_layer for i in range(last.dst.n_layer)),
        "zero-depth": tuple(i * src // last.dst.n_layer for i in range(last.dst.n_layer)),
        "random-depth": (*range(src), *[None] * (last.dst.n_layer - src)),
        "learn-depth": tuple(i % src for i in range(last.dst.n_layer)),
    }
    if expected.width is not None:
        assert (last.src.n_embd, last.src.n_head, last.src.intermediate_size) == (1024, 16, 2816)
    elif expected.layer_map is not None:
        assert last.layer_map == parse_layer_map(expected.layer_map, n_layer_src=6, n_layer=24)
    else:
        assert last.layer_map == maps[expected.operator]


# one of each size at once, the others with the slow ones: their stages are planned above
@pytest.mark.parametrize("name", [n if n in MODELS else pytest.param(n, marks=pytest.mark.slow) for n in EXPERIMENTS])
def test_an_experiment_passes_a_dry_run(name, tokens_of_llama, tmp_path, capsys):
    asked, _ = experiment(name, tokens_of_llama)
    config = dataclasses.replace(asked.config, out_dir=str(tmp_path / "run"))
    run(Invocation(config, dry_run=True), command=["pretrain"])

    out = capsys.readouterr().out
    assert f"stage {len(EXPERIMENTS[name].layers) + 1} grown:" in out
    assert not (tmp_path / "run").exists()


def test_the_baseline_of_an_experiment_spends_the_same(tokens_of_llama, capsys):
    run(invocation(files_of("1.1B"), tokens_of_llama, "--dry-run", "--scratch"), command=["pretrain"])
    assert "1,364,297,728 parameters, 8e+20 FLOPs" in capsys.readouterr().out


def test_every_out_dir_is_another_one(tokens_of_llama):
    folders = [experiment(name, tokens_of_llama)[0].config.out_dir for name in EXPERIMENTS]
    assert len(set(folders)) == len(folders)


def test_tinyllama_is_that_of_its_authors(tokens_of_llama, capsys):
    file = ROOT / "configs" / "tinyllama.yaml"
    folders = (f"--data.train.{name}={tokens_of_llama}" for name in ("slimpajama", "starcoder"))
    asked = parse(["--config", str(file), *folders, "--data.max_epochs", "1e9", "--dry-run"])
    run(asked, command=["pretrain"])

    out = capsys.readouterr().out
    assert "1,100,048,384 parameters" in out and "1,430,512 steps of 2,097,152 tokens" in out
    assert asked.config.data.weights == {"slimpajama": 0.693584, "starcoder": 0.306416}
    assert 1_430_512 * TOKENS_PER_STEP == pytest.approx(3e12, rel=1e-3)
    assert Config.from_name(asked.config.model.name) == Config.from_name("tiny_LLaMA_1b")
