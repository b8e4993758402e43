"""Files of TinyLlama, prts and lit-gpt, one generated in each of their layouts: read, never executed, sizes found."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_gpt.axes import EMBEDDING, HEAD, parameter_shapes
from lit_gpt.checkpoint import (
    EXCHANGE,
    TRAINING,
    detect_form,
    manifest_sha256,
    read_config,
    read_exchange,
    read_training,
    read_weights,
    verify,
)
from lit_gpt.config import NAMED_SIZES, Config
from lit_gpt.errors import DataError
from lit_gpt.hf import config_to_hf, hf_shapes, to_hf
from lit_gpt.legacy import plain_name, read_legacy
from lit_gpt.legacy_sizes import Sizes
from lit_gpt.model import GPT
from lit_gpt.pickles import PickledTensor
from tests.toys import toy_config, toy_weights

# What prts stores of its settings, paths included.
HPARAMS = {
    **{"model_name": "6L2048H", "name": "base", "out_dir": PosixPath("out/base"), "train_data_dir": Path("data")},
    **{"val_data_dir": None, "checkpoint_path": None, "devices": 8, "num_nodes": 4, "global_batch_size": 1024},
    **{"learning_rate": 6e-4, "micro_batch_size": 8, "decay_lr": True, "method": "scratch", "resume_id": 0},
}
CONFIG = toy_config(n_layer=3, padded_vocab_size=19)
SIZES = Sizes(n_head=CONFIG.n_head)


def lineage_order(config: Config = CONFIG) -> dict[str, Tensor]:
    """Weights in the order of TinyLlama's modules, which have the head first."""
    weights = toy_weights(config)
    return {HEAD: weights[HEAD], **{name: weights[name] for name in weights if name != HEAD}}


def moments(name: str, weight: Tensor) -> dict[str, Tensor]:
    fill = float(len(name))
    return {"step": torch.tensor(5.0), "exp_avg": torch.full_like(weight, fill), "exp_avg_sq": weight.square()}


def run_state(weights: dict[str, Tensor], optimizer: Any, **more: Any) -> dict[str, Any]:
    state = OrderedDict(weights)
    state._metadata = OrderedDict(version=1)  # as nn.Module.state_dict leaves it
    return {"model": state, "optimizer": optimizer, "hparams": HPARAMS, "iter_num": 40, "step_count": 10, **more}


def by_number(weights: dict[str, Tensor]) -> dict[str, Any]:
    states = {i: moments(name, weight) for i, (name, weight) in enumerate(weights.items())}
    return {"state": states, "param_groups": [{"lr": 6e-4, "betas": (0.9, 0.95), "params": list(states)}]}


def by_name(weights: dict[str, Tensor], prefix: str = "") -> dict[str, Any]:
    states = {prefix + name: moments(name, weight) for name, weight in weights.items()}
    return {"state": states, "param_groups": [{"lr": 6e-4, "params": list(states)}]}


def wrapped(name: str) -> str:
    """As FSDP names what it wraps block by block."""
    parts = name.split(".")
    inner = [*parts[:3], "_fsdp_wrapped_module", *parts[3:]] if name.startswith("transformer.h.") else parts
    return ".".join(["_fsdp_wrapped_module", *inner])


def masked(name: str) -> str:
    """As prts's masks name the modules that they wrap."""
    head, _, last = name.rpartition(".")
    return f"{head}.module.{last}"


LAYOUTS: dict[str, Any] = {
    "prts, one device": lambda w: run_state(w, by_number(w)),
    "TinyLlama, FSDP": lambda w: run_state({wrapped(n): t for n, t in w.items()}, by_name(w)),
    "FSDP, both wrapped": lambda w: run_state(
        {wrapped(n): t for n, t in w.items()},
        {**by_name(w), "state": {wrapped(n): moments(n, t) for n, t in w.items()}},
    ),
    "gradual stacking": lambda w: run_state({f"model.{n}": t for n, t in w.items()}, {}),
    "masked growth": lambda w: run_state({f"model.{masked(n)}": t for n, t in w.items()}, {}),
    "weights under model": lambda w: {"model": w},
    "plain state dict": lambda w: dict(w),
    "parameters": lambda w: {n: torch.nn.Parameter(t) for n, t in w.items()},
}


@pytest.fixture(params=LAYOUTS)
def layout(request, tmp_path) -> tuple[str, Path]:
    path = tmp_path / "iter-000040-ckpt.pth"
    torch.save(LAYOUTS[request.param](lineage_order()), path)
    return request.param, path


def same_weights(found: Any, wanted: dict[str, Tensor]) -> bool:
    return set(found) == set(wanted) and all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_every_layout_gives_the_weights_under_plain_names(layout):
    checkpoint = read_legacy(layout[1], SIZES)

    assert same_weights(checkpoint.model, lineage_order())
    assert (checkpoint.config.n_layer, checkpoint.config.n_head, checkpoint.config.n_query_groups) == (3, 4, 2)
    GPT(checkpoint.config).load_state_dict(dict(checkpoint.model), strict=True)


def test_moments_counters_and_position_come_along_where_they_are(layout):
    name, path = layout
    checkpoint = read_legacy(path, SIZES)
    is_run = name in ("prts, one device", "TinyLlama, FSDP", "FSDP, both wrapped")

    assert bool(checkpoint.optimizer) == is_run
    for parameter, slots in checkpoint.optimizer.items():
        wanted = moments(parameter, lineage_order()[parameter])
        assert all(torch.equal(slots[slot], value) for slot, value in wanted.items()), parameter
    if is_run:
        assert (checkpoint.state["step_count"], checkpoint.state["iter_num"]) == (10, 40)
        assert checkpoint.state["position"] == 40 * 8 * 8 * 4
        assert checkpoint.state["converted_from"]["hparams"]["out_dir"] == "out/base"


# Sizes


def sizes_found(monkeypatch, tmp_path: Path, config: Config, names: dict[str, tuple[int, ...]] | None = None) -> Config:
    """What is made of a file with the shapes of `config` and nothing else known; no tensor is ever allocated."""
    shapes = parameter_shapes(config) if names is None else names
    stored = {name: PickledTensor(None, 0, shape, ()) for name, shape in shapes.items()}
    monkeypatch.setattr("lit_gpt.legacy.read_pickle", lambda file: stored)
    (tmp_path / "lit_model.pth").touch()
    return read_legacy(tmp_path / "lit_model.pth").config


SHAPE_FIELDS = ("n_layer", "n_head", "n_embd", "n_query_groups", "head_size", "intermediate_size", "padded_vocab_size")
RELEASED = {
    "LLM_410M_750BToken": "24L1024H",
    "StackLLM_410M_750BToken": "24L1024H",
    "StackLLM_3B_300BToken": "tiny_LLaMA_3B",
    "StackLLM_7B_300BToken": "32L4096H",
    "PartialStackLLM_7B_130BToken": "32L4096H",
}


@pytest.mark.parametrize("name", [*NAMED_SIZES, *RELEASED.values(), "6L2048H", "96L2048H"])
def test_the_heads_of_every_size_of_the_lineage_are_found_by_width_and_rows(monkeypatch, tmp_path, name):
    config = Config.from_name(name, vocab_size=32000)

    found = sizes_found(monkeypatch, tmp_path, config)

    assert [getattr(found, field) for field in SHAPE_FIELDS] == [getattr(config, field) for field in SHAPE_FIELDS]


def test_the_two_7b_models_are_told_apart_by_the_rows_of_the_fused_matrix(monkeypatch, tmp_path):
    for name, groups in (("32L4096H", 32), ("tiny_LLaMA_7B", 8)):
        assert sizes_found(monkeypatch, tmp_path, Config.from_name(name)).n_query_groups == groups


def test_released_weights_under_hugging_faces_names_are_found_the_same_way(monkeypatch, tmp_path):
    config = Config.from_name("tiny_LLaMA_3B", n_layer=2)
    names: dict[str, tuple[int, ...]] = {}
    for name, shape in parameter_shapes(config).items():
        names |= hf_shapes(name, shape, config)

    found = sizes_found(monkeypatch, tmp_path, config, names)

    assert (found.n_head, found.n_query_groups, found.head_size) == (20, 4, 128)


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def hf_named(config: Config) -> dict[str, Tensor]:
    weights, found = toy_weights(config), {}
    for name in weights:
        found |= to_hf(name, weights.__getitem__, config)
    return found


def test_without_a_table_entry_the_heads_are_asked_for_and_checked(tmp_path):
    path = write(tmp_path / "model.pth", lineage_order())
    with pytest.raises(ValueError, match="3 layers of width 16 with 24 neurons and 32 rows .*; give it with --n-head"):
        read_legacy(path)
    for wrong in (3, 0, -1):
        with pytest.raises(ValueError, match="give another --n-head"):
            read_legacy(path, Sizes(n_head=wrong))
    assert read_legacy(path, Sizes(n_head=4, block_size=64, vocab_size=17)).config == toy_config(
        n_layer=3, block_size=64, vocab_size=17, padded_vocab_size=19
    )
    with pytest.raises(ValueError, match="vocab_size=20 is more than the 19 rows"):
        read_legacy(path, Sizes(n_head=4, vocab_size=20))


def test_a_released_folder_goes_by_its_config_json(tmp_path):
    folder = tmp_path / "StackLLM"
    write(folder / "pytorch_model.bin", hf_named(CONFIG))
    values = config_to_hf(CONFIG, torch.float32, bos_id=1, eos_id=2)
    (folder / "config.json").write_text(json.dumps(values))
    write(folder / "training_args.bin", {"lr": 1.0})

    assert detect_form(folder) == EXCHANGE
    assert read_config(folder) == CONFIG
    assert same_weights(read_weights(folder), toy_weights(CONFIG))
    assert verify(folder) == []
    assert len(manifest_sha256(folder)) == 64

    write(folder / "pytorch_model.bin", lineage_order())
    assert same_weights(read_weights(folder), lineage_order())


def test_weights_in_several_pickles_with_an_index_are_a_hugging_face_folder(tmp_path):
    folder, tensors = tmp_path / "folder", hf_named(CONFIG)
    names = sorted(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in parts.items():
        write(folder / file, {name: tensors[name] for name in part})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config_to_hf(CONFIG, torch.float32, bos_id=1, eos_id=2)))

    assert same_weights(read_exchange(folder).weights, toy_weights(CONFIG))


def test_lit_gpts_own_config_file_says_the_sizes(tmp_path):
    path = write(tmp_path / "lit_model.pth", lineage_order())
    values = {**toy_config(n_layer=3, padded_vocab_size=19).to_dict(), "org": "StatNLP-research", "bias": False}
    (tmp_path / "lit_config.json").write_text(json.dumps(values))

    assert read_config(path) == CONFIG
    with pytest.raises(ValueError, match="n_head=2 is given, and the configuration of .* says 4"):
        read_legacy(path, Sizes(n_head=2))


# As one of the two forms


def test_a_file_with_moments_is_read_as_training_form_and_one_without_as_exchange_form(monkeypatch, tmp_path):
    monkeypatch.setattr("lit_gpt.legacy_sizes.NAMED_SIZES", {"toy": None})
    monkeypatch.setattr("lit_gpt.legacy_sizes._named", lambda name: CONFIG)
    monkeypatch.setattr(Config, "from_name", classmethod(lambda cls, name: CONFIG))
    run = write(tmp_path / "iter-000040-ckpt.pth", run_state(lineage_order(), by_number(lineage_order())))
    weights = write(tmp_path / "model.pth", {"model": lineage_order()})

    assert (detect_form(run), detect_form(weights)) == (TRAINING, EXCHANGE)
    assert read_training(run).state["step_count"] == 10
    assert read_exchange(weights).provenance["converted_from"]["file"] == "model.pth"
    with pytest.raises(
        DataError, match=r"holds 2 checkpoints \(iter-000040-ckpt.pth, model.pth\); give the path of one"
    ):
        read_config(tmp_path)


# What does not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("transformer.ln_f.weight"), "tensor transformer.ln_f.weight is missing"),
        (lambda w: w.update({"mask": torch.ones(3)}), "unexpected tensor mask"),
        (lambda w: w.update({"transformer.ln_f.weight": torch.ones(3)}), r"has shape \(3,\), .* wants \(16,\)"),
        (lambda w: w.update({"epoch": 3}), "epoch is a int among the weights"),
        (lambda w: w.update({f"model.{EMBEDDING}": w[EMBEDDING]}), "holds transformer.wte.weight twice"),
        (lambda w: w.pop(EMBEDDING), "has neither transformer.wte.weight nor model.embed_tokens.weight"),
        (lambda w: w.pop("transformer.h.0.attn.proj.weight"), "has no matrix transformer.h.0.attn.proj.weight"),
    ],
)
def test_other_tensors_than_the_model_has_are_named(tmp_path, change, message):
    weights = lineage_order()
    change(weights)
    with pytest.raises(DataError, match=message):
        read_legacy(write(tmp_path / "model.pth", weights), SIZES)


def test_moments_that_are_not_those_of_every_parameter_are_left_out(tmp_path):
    weights = lineage_order()
    for damage in (
        lambda states: states.pop(0),
        lambda states: states[1].pop("step"),
        lambda states: states.update({99: states[0]}),
        lambda states: states[2].update(exp_avg=torch.ones(5)),
    ):
        optimizer = by_number(weights)
        damage(optimizer["state"])
        path = write(tmp_path / "run.pth", run_state(weights, optimizer))
        assert read_legacy(path, SIZES).optimizer == {}


def test_names_lose_their_wrappers_and_nothing_else():
    plain = "transformer.h.3.attn.attn.weight"
    for name in (plain, wrapped(plain), f"_forward_module.{plain}", f"model.{masked(plain)}", f"_orig_mod.{plain}"):
        assert plain_name(name) == plain
    assert plain_name("model.layers.3.mlp.up_proj.weight") == "model.layers.3.mlp.up_proj.weight"
