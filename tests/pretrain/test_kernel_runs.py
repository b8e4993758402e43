"""Kernels as a run's settings: chosen once, said, recorded, checked, and free to change when the run goes on."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path

import pytest
import torch

from benchmarks.kill_sweep import cut_back
from lit_gpt.checkpoint import latest
from lit_gpt.kernels import choice
from lit_gpt.kernels.backend import Situation
from lit_gpt.kernels.choice import BACKENDS
from lit_gpt.kernels.settings import BackendUnavailable, KernelConfig
from lit_gpt.settings_files import merge
from pretrain.changed_settings import changed_settings
from pretrain.command_line import config_of, parse
from pretrain.config import ParallelConfig, to_plain
from pretrain.parallel import Compute, build_model, find_cpp_compiler
from pretrain.run import run
from pretrain.validate_command import validate
from pretrain.world import ALONE
from tests.pretrain.conftest import command_for, two_stages
from tests.pretrain.runs import records
from tests.toys import toy_config, toy_tokens, toy_weights

CHOSEN = {"attention": "math", "norm": "reference", "mlp": "reference", "rope": "reference", "loss": "torch"}


def train(settings: dict[str, object], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    run(parse(command_for(settings, folder)), command=["pretrain"])
    return Path(settings["out_dir"])


def recorded(folder: Path) -> dict[str, str]:
    """The kernels that a run's last checkpoint names."""
    return json.loads((latest(folder / "checkpoints") / "state.json").read_text())["kernels"]


def test_a_run_says_and_records_what_auto_is_here(finished_run):
    assert recorded(finished_run) == dataclasses.asdict(choice.PLAIN)


def test_a_run_goes_on_with_other_kernels_says_so_and_keeps_its_losses(settings, finished_run, tmp_path, capsys):
    cut_back(finished_run, Path(settings["out_dir"]), 1, 6)

    folder = train({**settings, "kernels": CHOSEN}, tmp_path / "again")

    out = capsys.readouterr().out
    assert out.count("kernels: attention=math norm=reference mlp=reference rope=reference loss=torch\n") == 1
    assert recorded(folder) == CHOSEN
    expected = [line["loss"] for line in records(finished_run)]
    assert [line["loss"] for line in records(folder)] == pytest.approx(expected, rel=1e-4)
    # a checkpoint is measured by what its own machine can do, not by what trained it
    (measured,) = validate(str(folder), [])
    values = [each["value"] for each in records(folder, "evals.jsonl") if each["metric"] == "loss"]
    assert measured.loss == pytest.approx(values[-1], rel=1e-4)


def test_kernels_are_free_to_change_and_unknown_to_runs_that_were_before_them(settings):
    config = config_of(settings)
    saved = to_plain(config)
    other = dataclasses.replace(config, kernels=KernelConfig(attention="math"))
    assert changed_settings(saved, other) == []
    del saved["kernels"]
    assert changed_settings(saved, other) == []


def test_a_kernel_that_cannot_run_here_ends_the_command_with_2_before_anything_is_written(settings, pretrain):
    refused = pretrain({**settings, "kernels": {"attention": "fa3", "norm": "triton"}})
    assert refused.returncode == 2
    lines = [line for line in refused.stderr.splitlines() if "kernels." in line]
    assert len(lines) == 2
    assert "kernels.attention='fa3' cannot be used: needs a CUDA device, this run is on cpu" in lines[0]
    assert "python -m lit_gpt.kernels.doctor" in lines[1]
    assert not Path(settings["out_dir"], "checkpoints").exists()


def test_a_dry_run_warns_of_a_kernel_that_cannot_run_here(settings, pretrain):
    dry = pretrain({**settings, "kernels": {"attention": "fa3"}}, "--dry-run")
    assert dry.returncode == 0
    assert "warning: kernels.attention='fa3' cannot be used: needs a CUDA device" in dry.stderr


def test_an_unknown_kernel_is_refused(settings):
    with pytest.raises(ValueError, match="flesh"):
        config_of({**settings, "kernels": {"attention": "flesh"}})
    with pytest.raises(ValueError, match="atention"):
        parse(["--kernels.atention", "sdpa"])


def test_a_kernel_that_computes_something_else_stops_the_run_before_its_first_step(settings, tmp_path, monkeypatch):
    wrong = choice.Backend(lambda gate, up, gelu: gate * up)
    monkeypatch.setitem(BACKENDS["mlp"], "reference", wrong)
    with pytest.raises(BackendUnavailable, match="kernels.mlp='reference' computes something else"):
        train({**settings, "kernels": {"mlp": "reference"}}, tmp_path / "settings")
    assert not Path(settings["out_dir"], "checkpoints").exists()


def test_all_models_of_a_run_compute_with_what_was_chosen(settings, tmp_path, monkeypatch):
    """The one that trains, its teacher, and the one whose growth is learned: what is plain is not called."""
    stages = [
        {"name": "base", "n_layer": 1, "max_steps": 2},
        {"name": "g", "operator": "ligo", "options": {"learn_steps": 2}, "distill_weight": 0.5, "max_steps": 4},
    ]

    def forbidden(*_: object) -> None:
        raise AssertionError("the plain gate was called")

    own = BACKENDS["mlp"]["torch"].op
    monkeypatch.setitem(BACKENDS["mlp"], "reference", choice.Backend(lambda *inputs: own(*inputs)))
    monkeypatch.setattr("lit_gpt.model.Kernels", lambda: dataclasses.replace(choice.Kernels(), mlp=forbidden))
    train({**settings, "stages": stages, "kernels": {"mlp": "reference"}}, tmp_path / "settings")


@pytest.mark.slow
@pytest.mark.skipif(find_cpp_compiler() is None, reason="no C++ compiler to compile with")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks
def test_a_compiled_model_that_grew_in_depth_compiles_nothing_new():
    graphs = []
    for n_layer in (2, 4, 6):
        config = toy_config(n_layer=n_layer)
        parts = Compute("fp32", "block", ""), ParallelConfig(), ALONE
        model = build_model(config, toy_weights(config), *parts, device=torch.device("cpu"))
        tokens = toy_tokens(config)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[1] == graphs[2]


WAYS = {
    **{
        f"{operation} by {name}": {"kernels": {operation: name}}
        for operation, backends in BACKENDS.items()
        for name, backend in backends.items()
        if backend.missing(Situation()) is None
    },
    "all others": {"kernels": CHOSEN},
    "block": {"compile": "block"},
    "block, all others": {"compile": "block", "kernels": CHOSEN},
    "model": {"compile": "model"},
    "bf16": {"precision": "bf16"},
    "bf16, block": {"precision": "bf16", "compile": "block"},
}


@pytest.fixture(scope="module")
def last_20(prepared, tmp_path_factory):
    """The mean loss of steps 81 to 100 of a run with changed settings."""
    made: dict[str, float] = {}

    def mean(name: str, **changes: object) -> float:
        if name not in made:
            folder = tmp_path_factory.mktemp("ways")
            stages = [{"name": "only", "max_steps": 100}]
            plain = {
                "precision": "fp32",
                "compile": "none",
                "model": {"name": "2L64H", "head_size": 32, "intermediate_size": 128},
                "stages": stages,
                "batch": {"global_batch_size": 8, "micro_batch_size": 8},
                "optimizer": {"learning_rate": 1e-3},
                "validation": {"every_steps": 0, "max_tokens": 160},
                "checkpoints": {"every_steps": 1000},
            }
            settings = merge(two_stages(folder / "run", prepared), plain)
            losses = [line["loss"] for line in records(train(merge(settings, changes), folder / "settings"))]
            assert len(losses) == 100
            made[name] = statistics.mean(losses[-20:])
        return made[name]

    return mean


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # so does it here
def test_a_hundred_steps_end_where_fp32_eager_ends(name, last_20):
    if "compile" in WAYS[name] and find_cpp_compiler() is None:
        pytest.skip("no C++ compiler to compile with")
    assert last_20(name, **WAYS[name]) == pytest.approx(last_20("fp32 eager"), abs=2e-3)
