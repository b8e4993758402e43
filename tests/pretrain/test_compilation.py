"""What growth compiles anew, what compiling cost, and when it is not worth it.

Graphs are made, counted and run eagerly (torch's backend "eager"): no C++ compiler is needed, and nothing takes long.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from lit_gpt.settings_files import merge
from pretrain import loop, parallel
from pretrain.command_line import parse
from pretrain.compilation import RECOMPILE_LIMIT, compile_model
from pretrain.parallel import REPAID_AFTER_TOKENS, choose_compute
from pretrain.run import run
from tests.pretrain.conftest import two_stages
from tests.pretrain.test_stages import StageConfig, run_config
from tests.toys import toy_config, toy_model, toy_tokens

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"  # dynamo looks
)


def n_graphs() -> int:
    """Graphs made since the start of the test."""
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are run without a compiler, and those of earlier tests are forgotten."""
    torch._dynamo.reset()
    counters.clear()
    compile_ = torch.compile  # nn.Module.compile calls it too
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile_(function, backend="eager", **how))
    monkeypatch.setattr(parallel, "find_cpp_compiler", lambda: "c++")
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs_by_stage(monkeypatch: pytest.MonkeyPatch, eagerly: None) -> dict[str, int]:
    """Filled by a run: the stage's name -> graphs that it made."""
    found: dict[str, int] = {}
    fit = loop.fit

    def counted(this_run, stage, *rest, **until):
        before = n_graphs()
        fit(this_run, stage, *rest, **until)
        found[stage.name] = n_graphs() - before

    monkeypatch.setattr(loop, "fit", counted)
    return found


def train(folder: Path, prepared: Path, **changes: object) -> list[dict]:
    """The lines of metrics.jsonl of a compiled run."""
    settings = merge(two_stages(folder / "run", prepared), {"compile": "block", **changes})
    folder.mkdir(exist_ok=True)
    path = folder / "settings.json"
    path.write_text(json.dumps(settings))
    run(parse(["--config", str(path)]), command=["pretrain"])
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_growth_in_depth_compiles_nothing_and_growth_in_width_one_block(graphs_by_stage, tmp_path, prepared):
    stages = [
        {"name": "2 blocks", "n_layer": 2, "n_embd": 8, "intermediate_size": 16, "max_steps": 2},
        {"name": "4 blocks", "operator": "stack", "n_layer": 4, "max_steps": 2},
        {"name": "8 blocks", "operator": "stack", "n_layer": 8, "max_steps": 2},
        {"name": "wider", "operator": "split-width", "max_steps": 2},
    ]
    for stage in stages[1:3]:
        stage |= {"n_embd": 8, "intermediate_size": 16}
    lines = train(tmp_path, prepared, model={"name": "8L16H"}, stages=stages)

    of_a_block_and_the_loss = graphs_by_stage["2 blocks"]
    assert of_a_block_and_the_loss > 0
    assert graphs_by_stage["4 blocks"] == graphs_by_stage["8 blocks"] == 0
    of_the_loss = 1  # of logits: its shape has no width
    assert graphs_by_stage["wider"] == of_a_block_and_the_loss - of_the_loss
    seconds = [line["compile_secs"] for line in lines]
    assert seconds[0] > 0 and seconds == sorted(seconds)
    assert seconds[-1] > seconds[5] == seconds[2] == seconds[1]


def test_what_was_compiled_for_one_depth_serves_every_other(eagerly):
    config = toy_config(n_layer=2)
    tokens = toy_tokens(config)
    made = []
    for n_layer in (2, 4, 8):
        model = toy_model(toy_config(n_layer=n_layer))
        compile_model(model, "block")
        before = n_graphs()
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        made.append(n_graphs() - before)
    assert made[0] > 0 and made[1:] == [0, 0]


@pytest.mark.slow
def test_a_schedule_of_many_widths_stays_compiled(eagerly):
    """torch's own limit is 8 graphs of one function, after which it computes eagerly."""
    made = []
    for heads in range(1, 13):
        config = toy_config(n_layer=1, n_embd=4 * heads, n_head=heads, n_query_groups=heads)
        tokens, model = toy_tokens(config), toy_model(config)
        compile_model(model, "block")
        before = n_graphs()
        model(tokens[:, :-1], tokens[:, 1:])
        made.append(n_graphs() - before)
    assert all(made)
    assert torch._dynamo.config.recompile_limit >= RECOMPILE_LIMIT


def test_the_log_tells_the_seconds_of_compiling_once(graphs_by_stage, tmp_path, prepared, capsys):
    train(tmp_path, prepared)
    said = [line for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
    assert "s of compiling" in said[0] and not any("compiling" in line for line in said[1:])


def test_a_run_that_compiles_nothing_says_zero(tmp_path, prepared, capsys):
    lines = train(tmp_path, prepared, compile="none", stages=[{"name": "base", "max_steps": 2}])
    assert lines[0]["compile_secs"] == lines[1]["compile_secs"]
    assert "of compiling" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("precision", "has_bf16", "compiler", "tokens", "expected"),
    [
        ("auto", True, "g++", REPAID_AFTER_TOKENS, ("bf16", "block")),
        ("auto", True, "g++", REPAID_AFTER_TOKENS - 1, ("bf16", "none")),
        ("auto", True, None, REPAID_AFTER_TOKENS, ("bf16", "none")),
        ("auto", False, "g++", 10**12, ("fp32", "none")),
        ("bf16", False, "g++", 10**12, ("bf16", "block")),
        ("fp32", True, "g++", 10**12, ("fp32", "none")),
    ],
)
def test_on_a_cpu_auto_compiles_where_bf16_repays_it(monkeypatch, precision, has_bf16, compiler, tokens, expected):
    monkeypatch.setattr(parallel, "multiplies_bf16", lambda device: has_bf16)
    monkeypatch.setattr(parallel, "find_cpp_compiler", lambda: compiler)
    compute = choose_compute(run_config(StageConfig("main", max_steps=1), precision=precision), CPU, tokens)
    assert (compute.precision, compute.compile) == expected
