"""The second half of Inheritune: a trained prefix of a larger model takes that model's next layers."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from grow.__main__ import main
from grow.apply import grow_checkpoint, grow_optimizer, grow_weights, read_reference
from grow.operators import function_of, plan_growth
from grow.plan import GrowthPlan, Reference
from lit_gpt.axes import layer_of
from lit_gpt.checkpoint import manifest_sha256, read_exchange, read_weights, write_exchange, write_training
from lit_gpt.config import Config
from lit_gpt.errors import DataError
from lit_gpt.model import GPT
from tests.toys import toy_config, toy_tokens, toy_weights

LARGE = toy_config(vocab_size=20, n_layer=5)
PREFIX = dataclasses.replace(LARGE, n_layer=2)


def reference_of(config: Config) -> Reference:
    return Reference(config, "0" * 64, "large")


@pytest.fixture
def large(tmp_path):
    return write_exchange(tmp_path / "large", LARGE, toy_weights(LARGE, seed=1))


@pytest.fixture
def prefix(tmp_path):
    """A model that was trained further since it was cut: all its weights are others."""
    return write_exchange(tmp_path / "prefix", PREFIX, toy_weights(PREFIX, seed=2))


def grow(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main(["apply", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("n_layer", [3, 5])
@pytest.mark.parametrize("n_query_groups", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_layers_of_the_prefix_stay_and_the_next_ones_are_those_of_the_reference(n_layer, n_query_groups, tied):
    large = dataclasses.replace(LARGE, n_query_groups=n_query_groups, tie_embeddings=tied)
    src = dataclasses.replace(large, n_layer=2)
    plan = plan_growth("inheritune", src, n_layer=n_layer, reference=reference_of(large))
    own, others = toy_weights(src, seed=2), toy_weights(large, seed=1)

    grown = grow_weights(plan, own, others)

    assert plan.layer_map == tuple(range(n_layer)) and plan.connection_rate == f"{n_layer - 1}/{n_layer - 1}"
    assert function_of(plan) == "no" and not plan.is_identity
    for name, weight in grown.items():
        source = others if (layer_of(name) or 0) >= 2 else own
        assert torch.equal(weight, source[name]) and weight.data_ptr() != source[name].data_ptr(), name


def test_a_prefix_that_was_not_trained_grows_into_the_larger_model_again():
    weights = toy_weights(LARGE)
    cut = plan_growth("inheritune", LARGE, n_layer=2)
    plan = plan_growth("inheritune", cut.dst, n_layer=5, reference=reference_of(LARGE))

    grown = grow_weights(plan, grow_weights(cut, weights), weights)

    model, original = GPT(plan.dst), GPT(LARGE)
    model.load_state_dict(grown)
    original.load_state_dict(weights)
    idx = toy_tokens(LARGE)[:, :-1]
    assert torch.equal(model(idx), original(idx))


def test_layers_take_the_dtype_of_the_model_that_they_join():
    plan = plan_growth("inheritune", PREFIX, n_layer=3, reference=reference_of(LARGE))
    others = toy_weights(LARGE, dtype=torch.bfloat16)
    grown = grow_weights(plan, toy_weights(PREFIX), others)
    name = "transformer.h.2.attn.proj.weight"
    assert grown[name].dtype == torch.float32 and torch.equal(grown[name], others[name].float())


def test_moments_of_appended_layers_start_from_zero():
    plan = plan_growth("inheritune", PREFIX, n_layer=4, reference=reference_of(LARGE))
    moments = {
        name: {"exp_avg": weight, "exp_avg_sq": weight.square(), "step": torch.tensor(7.0)}
        for name, weight in toy_weights(PREFIX).items()
    }

    for name, slots in grow_optimizer(plan, moments, "map").items():
        if (layer_of(name) or 0) >= 2:
            assert not any(value.any() for value in slots.values()), name
        else:
            assert all(torch.equal(value, moments[name][key]) for key, value in slots.items()), name


def test_a_checkpoint_grows_by_layers_of_another_and_remembers_which(prefix, large, tmp_path, capsys):
    arguments = (prefix, tmp_path / "grown", "--operator", "inheritune", "--n-layer", 4, "--reference", large)

    code, out, err = grow(capsys, *arguments)

    assert (code, err) == (0, "")
    for words in (
        "inheritune: 2 -> 4 layers",
        "1 2 [3] [4]",
        "3/3 = 100.0%",
        f"layer n of large, {manifest_sha256(large)}",
    ):
        assert words in out
    found = read_exchange(tmp_path / "grown")
    (record,) = found.provenance["history"]
    assert record["reference"] == manifest_sha256(large) and record["parent"] == manifest_sha256(prefix)
    plan = GrowthPlan.from_dict(json.loads(json.dumps(record["plan"])))
    assert plan.reference == Reference(LARGE, manifest_sha256(large), "large")
    again = grow_weights(plan, read_weights(prefix), read_weights(large))
    assert all(torch.equal(weight, again[name]) for name, weight in found.weights.items()) and len(again) == len(
        found.weights
    )
    assert main(["inspect", str(tmp_path / "grown")]) == 0
    assert f"reference   large {manifest_sha256(large)}" in capsys.readouterr().out


def test_the_receipt_names_the_reference_and_a_training_form_grows_too(large, tmp_path, capsys):
    weights = toy_weights(PREFIX)
    moments = {n: {"exp_avg": w, "exp_avg_sq": w.square(), "step": torch.tensor(3.0)} for n, w in weights.items()}
    flops = {"paper": 6.0, "model": 4.0, "palm": 5.0}
    state = {"model_config": PREFIX.to_dict(), "step_count": 3, "tokens": 10, "flops": flops, "history": []}
    write_training(tmp_path / "trained", weights, moments, state)
    arguments = (tmp_path / "trained", tmp_path / "grown", "--operator", "prefix", "--factor", 2, "--reference", large)

    code, out, _ = grow(capsys, *arguments, "--optimizer-policy", "map", "--json")

    receipt = json.loads(out)
    assert code == 0 and receipt["reference"] == manifest_sha256(large) and receipt["form"] == "training"
    assert receipt["layer_map"] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("n_layer", "changes", "message"),
    [
        (6, {}, "the 5 layers of the reference large a source of 2 layers grows to 3 to 5, and not to 6"),
        (2, {}, "grows to 3 to 5, and not to 2; ask for one of these, or leave the reference out"),
        (4, {"n_layer": 2}, "the reference large has 2 layers, and the source has 2 already"),
        (4, {"n_embd": 32, "head_size": 4}, "does not fit the source: n_embd is 32, not 16"),
        (4, {"vocab_size": 18, "padded_vocab_size": 18}, "vocab_size is 18, not 20; padded_vocab_size is 18, not 20"),
        (4, {"rope_base": 5e5}, "rope_base is 500000.0, not 10000.0"),
    ],
)
def test_references_that_do_not_fit_are_refused(n_layer, changes, message):
    with pytest.raises(ValueError, match=message):
        plan_growth(
            "inheritune", PREFIX, n_layer=n_layer, reference=reference_of(dataclasses.replace(LARGE, **changes))
        )


def test_another_context_length_of_the_reference_does_not_matter():
    longer = reference_of(dataclasses.replace(LARGE, block_size=64))
    assert plan_growth("inheritune", PREFIX, n_layer=3, reference=longer).dst.block_size == PREFIX.block_size


def test_a_reference_is_for_inheritune_and_what_it_needs_is_asked_for():
    with pytest.raises(ValueError, match="stack takes .* and not reference; leave it out. .*: inheritune"):
        plan_growth("stack", PREFIX, n_layer=4, reference=reference_of(LARGE))
    with pytest.raises(ValueError, match="Give inheritune n_layer or factor$"):
        plan_growth("inheritune", PREFIX, reference=reference_of(LARGE))
    with pytest.raises(
        ValueError, match="1 to 2 of them, and not 4; to append more layers .* by `grow apply --reference`"
    ):
        plan_growth("inheritune", PREFIX, n_layer=4)


def test_plans_with_a_reference_that_cannot_be_are_refused():
    parts = ("x", PREFIX, dataclasses.replace(PREFIX, n_layer=3))
    with pytest.raises(ValueError, match=r"layers \(2,\) come from a reference; name it"):
        GrowthPlan(*parts, (0, 1, 2), reference_layers=(2,))
    with pytest.raises(ValueError, match="the reference has 5 layers, and none is 5 from 0"):
        GrowthPlan(*parts, (0, 1, 5), reference=reference_of(LARGE), reference_layers=(2,))


def test_a_layer_of_a_reference_is_another_one_under_the_same_number():
    plan = GrowthPlan("x", PREFIX, PREFIX, (0, 1), reference=reference_of(LARGE), reference_layers=(1,))
    assert function_of(plan) == "no" and not plan.is_identity


def test_the_reference_on_disk_must_be_the_one_of_the_plan(prefix, large, tmp_path):
    plan = plan_growth("inheritune", PREFIX, n_layer=3, reference=read_reference(large))
    other = write_exchange(tmp_path / "other", LARGE, toy_weights(LARGE, seed=5))

    with pytest.raises(ValueError, match="takes layers from large; give the path"):
        grow_checkpoint(prefix, tmp_path / "grown", plan)
    with pytest.raises(DataError, match="is not the reference that this growth was planned with"):
        grow_checkpoint(prefix, tmp_path / "grown", plan, reference_path=other)
    with pytest.raises(ValueError, match="comes from the reference large; give its weights too"):
        grow_weights(plan, toy_weights(PREFIX))
    assert not (tmp_path / "grown").exists()


def test_a_reference_that_is_not_there_or_does_not_fit_is_one_error_and_writes_nothing(prefix, large, tmp_path, capsys):
    arguments = (prefix, tmp_path / "grown", "--operator", "inheritune", "--n-layer", 4, "--reference")
    narrow = toy_config(vocab_size=20, n_layer=5, intermediate_size=16)
    write_exchange(tmp_path / "narrow", narrow, toy_weights(narrow))

    for reference, code, message in (("nowhere", 3, "nowhere"), ("narrow", 2, "intermediate_size is 16, not 24")):
        found, out, err = grow(capsys, *arguments, tmp_path / reference)
        assert found == code and message in err and "Traceback" not in err
    assert not (tmp_path / "grown").exists()
