"""The benchmark of the training step runs, and what it compares is the same step. Says nothing about speed."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import floor, peers, training, variants  # noqa: E402
from benchmarks.timing import Sample  # noqa: E402
from benchmarks.variants import Variant  # noqa: E402
from lit_gpt.config import Config  # noqa: E402
from lit_gpt.kernels.settings import KernelConfig  # noqa: E402

CPU = torch.device("cpu")
EAGER = [("ours", "fp32"), ("naive", "fp32"), ("transformers", "fp32"), ("ours", "bf16"), ("transformers", "bf16")]
NANOCHAT = """
import os
from dataclasses import dataclass
from torch import nn
DTYPE = os.environ["NANOCHAT_DTYPE"]
@dataclass
class GPTConfig:
    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    window_pattern: str = "SSSL"
class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.window_pattern == "L" and DTYPE == "float32"
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
    def init_weights(self):
        nn.init.zeros_(self.head.weight)
    def forward(self, idx, targets):
        return nn.functional.cross_entropy(self.head(self.wte(idx)).flatten(0, 1), targets.flatten())
"""


@pytest.fixture
def no_other_peers(monkeypatch):
    """litgpt and nanochat as if they were nowhere, and the path as it was."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    real = importlib.util.find_spec
    hidden = ("litgpt", "nanochat")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in hidden else real(name, *a))


def test_a_quick_run_measures_every_eager_variant_that_is_there_and_writes_it_down(no_other_peers, tmp_path, capsys):
    out = tmp_path / "training.json"

    assert training.main(["--quick", "--device", "cpu", "--json", "--out", str(out)]) == 0

    result = json.loads(capsys.readouterr().out)
    assert list(json.loads(out.read_text()).values()) == [result]
    names = [variant["name"] for variant in result["variants"]]
    plain = [f"{family} {precision} eager" for family, precision in EAGER]
    assert names[: len(plain)] == plain
    assert "ours fp32 eager norm=reference" in names and "ours fp32 eager loss=torch" in names
    assert result["absent"].keys() == {"litgpt", "nanochat"}
    for variant in result["variants"]:
        assert variant["tokens_per_cpu_sec"]["median"] > 0 and len(variant["secs"]) == 2
        assert 0 < variant["products_share"] < 1
        assert variant["model_flops_per_token"] == result["variants"][0]["model_flops_per_token"]
    for precision in ("fp32", "bf16"):
        reached = result["floors"][precision]["share_reached"]
        assert f"ours {precision} eager" in reached and all(each["median"] > 0 for each in reached.values())
    pairs = {(ratio["ours"], ratio["against"]) for ratio in result["ratios_cpu_secs"]}
    assert ("ours bf16 eager", "transformers bf16 eager") in pairs
    assert ("ours fp32 eager", "transformers bf16 eager") not in pairs, "another policy is another computation"


def test_the_table_can_be_printed_and_another_shape_leaves_the_committed_result_alone(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(training, "RESULT", tmp_path / "untouched.json")

    assert training.main(["--quick", "--device", "cpu", "--only", "ours fp32 eager", "naive"]) == 0

    printed = capsys.readouterr().out
    assert "ours fp32 eager against naive fp32 eager" in printed and "floor fp32" in printed
    assert not list(tmp_path.iterdir())


def test_a_variant_that_computes_something_else_is_refused(monkeypatch):
    def doubled(variant, config, device):
        step, model = training_step(variant, config, device)
        return (lambda rows: 2 * step(rows)) if variant.family == "naive" else step, model

    training_step = training.training_step
    monkeypatch.setattr(training, "training_step", doubled)
    with pytest.raises(RuntimeError, match="first loss of naive fp32 eager"):
        training.main(["--quick", "--device", "cpu", "--only", "ours fp32 eager", "naive"])


def test_a_checkout_of_nanochat_is_measured_as_another_model(monkeypatch, tmp_path, capsys):
    (tmp_path / "nanochat").mkdir()
    (tmp_path / "nanochat" / "__init__.py").touch()
    (tmp_path / "nanochat" / "gpt.py").write_text(NANOCHAT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        arguments = [
            "--quick",
            "--device",
            "cpu",
            "--nanochat",
            str(tmp_path),
            "--only",
            "ours fp32 eager",
            "nanochat",
            "--json",
        ]
        assert training.main(arguments) == 0
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "nanochat"]:
            del sys.modules[name]

    result = json.loads(capsys.readouterr().out)
    assert "nanochat" not in result["absent"]
    (theirs,) = (each for each in result["variants"] if each["name"] == "nanochat fp32 eager")
    assert theirs["model_flops_per_token"] < result["variants"][0]["model_flops_per_token"]
    assert "nanochat fp32 eager" not in result["floors"]["fp32"]["share_reached"], "its floor is another one"
    assert all(str(tmp_path) not in part for part in (result["command"], json.dumps(result["absent"])))


def test_a_peer_that_cannot_be_imported_is_left_out_with_the_reason(monkeypatch, tmp_path):
    (tmp_path / "nanochat").mkdir()
    (tmp_path / "nanochat" / "__init__.py").write_text("import nowhere_at_all\n")
    monkeypatch.setattr(sys, "path", list(sys.path))

    assert "nowhere_at_all" in peers.find_peers(CPU, nanochat=tmp_path)["nanochat"]


def test_litgpt_computes_our_loss():
    pytest.importorskip("litgpt", reason="litgpt is not installed")
    config = Config(name="toy", n_layer=2, n_embd=32, n_head=4, n_query_groups=2, vocab_size=64, block_size=8)
    rows = next(training.batches(config, 2, CPU))
    ours, theirs = (training.training_step(Variant(family, "fp32"), config, CPU)[0] for family in ("ours", "litgpt"))
    assert theirs(rows) == pytest.approx(ours(rows), rel=1e-5)


def test_weights_for_litgpt_are_all_of_ours():
    config = Config(name="toy", n_layer=2, n_embd=32, n_head=4, n_query_groups=2, vocab_size=64, block_size=8)
    theirs, hf = peers.litgpt_weights(config), peers.hf_weights(config)
    assert sum(each.numel() for each in theirs.values()) == sum(each.numel() for each in hf.values())
    qkv = theirs["transformer.h.1.attn.qkv.weight"]
    assert torch.equal(qkv[-16:], hf["model.layers.1.self_attn.v_proj.weight"])
    assert torch.equal(theirs["transformer.h.0.mlp.fc_1.weight"], hf["model.layers.0.mlp.gate_proj.weight"])


def test_what_auto_gives_is_compared_and_other_backends_only_as_the_other_side():
    auto, block = Variant("ours", "fp32"), Variant("ours", "fp32", "block")
    other = Variant("ours", "fp32", kernels=KernelConfig(norm="reference"))
    assert variants.are_compared(auto, other) and not variants.are_compared(other, auto)
    assert variants.are_compared(block, auto) and not variants.are_compared(block, other)
    assert variants.are_compared(auto, Variant("naive", "fp32")) and not variants.are_compared(auto, auto)
    assert not variants.are_compared(auto, Variant("litgpt", "bf16"))


def test_a_goal_that_was_not_measured_is_not_reached():
    ratio = {"median": 1.2, "q1": 1.1, "q3": 1.3}
    pair = {"ours": "ours fp32 block-compiled", "against": "transformers fp32 eager"}
    result = {"ratios_cpu_secs": [{**pair, **ratio}], "variants": [{"name": "ours fp32 block-compiled"}]}
    result["clock"] = "cpu_secs"

    rows = variants.targets(result)

    assert {row[0] for row in rows} == {"ours fp32 block-compiled"}, "bf16 was not measured at all"
    found = {row[1]: row[3] for row in rows}
    assert found["transformers fp32 eager"]["median"] == 1.2 and found["litgpt fp32 model-compiled"] is None


def test_the_floor_is_flops_over_their_rate_and_bytes_over_theirs():
    config = Config(name="toy", n_layer=1, n_embd=32, n_head=2, vocab_size=64, block_size=8, intermediate_size=24)
    tokens = 16
    samples = {"fp32": [Sample(2.0, 9.0, None)], "copy": [Sample(0.5, 9.0, None)]}

    found = floor.floors(config, tokens, samples, "cpu_secs", CPU)["fp32"]

    assert found["flops_per_sec"]["median"] == floor.linear_flops(config, tokens) / 2
    attention = found["flops"] - floor.linear_flops(config, tokens)
    assert attention == 6 * 32 * 8 * tokens, "causal attention"
    products = found["products_secs"]["median"]
    assert products == pytest.approx(2 * found["flops"] / floor.linear_flops(config, tokens))
    assert found["secs"] == [pytest.approx(products + found["bytes"] * 0.5 / (2 * floor.COPY_BYTES["cpu"]))]
    assert floor.step_bytes(config, tokens, "fp32") > floor.step_bytes(config, tokens, "bf16") > 0


def test_no_place_of_this_machine_is_in_a_recorded_command():
    given = ["--litgpt", "/somewhere/site-packages", "--turns", "3", "--out", "x.json"]
    assert training.without_paths(given) == ["--litgpt", "PATH", "--turns", "3", "--out", "PATH"]
