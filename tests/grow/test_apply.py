"""Growing weights, moments and checkpoints: exact copies, nothing shared, nothing lost, the source untouched."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grow.apply import GrownOptimizer, GrownWeights, grow_checkpoint, grow_optimizer, grow_weights
from grow.check import load_model, zero_gradient
from grow.layer_map import parse_layer_map
from grow.operators import plan_growth
from grow.plan import GrowthPlan
from grow.width import split_width, zero_width
from lit_gpt.axes import layer_of, parameter_shapes, with_layer
from lit_gpt.checkpoint import (
    manifest_sha256,
    read_config,
    read_exchange,
    read_training,
    read_weights,
    write_exchange,
    write_training,
)
from lit_gpt.config import Config
from lit_gpt.errors import DataError
from lit_gpt.flops import count_parameters
from lit_gpt.model import GPT, init_tensor
from tests.toys import toy_config, toy_configs, toy_model, toy_tokens, toy_weights

EIGHT_MAPS = (
    "123456*4",
    "12-3456*5-56",
    "12-345*7-6",
    "123-456*7",
    "1234-56*10",
    "12-34*10-56",
    "1-234*7-56",
    "123*7-456",
)


def digest(tensors) -> str:
    """One hash over names, shapes, dtypes and bytes."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


@st.composite
def depth_plans(draw, max_layers: int = 4):
    """Any depth growth of any toy model: stacking, interpolation, or an explicit map."""
    src = draw(toy_configs(max_layers))
    name = draw(st.sampled_from(["stack", "interpolate", "partial"]))
    if name == "stack":
        return plan_growth(name, src, factor=draw(st.integers(1, 3)))
    n_layer = draw(st.integers(src.n_layer, 2 * max_layers))
    layers = st.lists(st.integers(0, src.n_layer - 1), min_size=n_layer, max_size=n_layer)
    return plan_growth(name, src, n_layer=n_layer, layer_map=draw(layers) if name == "partial" else None)


@given(depth_plans())
def test_a_grown_state_dict_is_that_of_a_fresh_model_of_the_grown_sizes(plan):
    grown = grow_weights(plan, toy_weights(plan.src))

    model = GPT(plan.dst)
    assert {name: tuple(weight.shape) for name, weight in grown.items()} == parameter_shapes(plan.dst)
    assert list(grown) == list(model.state_dict())
    model.load_state_dict(grown, strict=True)
    assert model.config == plan.dst


@given(depth_plans(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_every_layer_is_an_exact_copy_of_its_source_and_all_else_stays(plan, dtype):
    src = toy_weights(plan.src, dtype=dtype)

    grown = grow_weights(plan, src)

    for name, weight in grown.items():
        layer = layer_of(name)
        source = name if layer is None else with_layer(name, plan.layer_map[layer])
        assert weight.dtype == dtype and weight.isfinite().all()
        assert torch.equal(weight, src[source]), f"{name} is not {source}"


@given(depth_plans())
def test_growth_leaves_the_source_alone_and_shares_nothing_with_it(plan):
    src = toy_weights(plan.src)
    before = digest(src)

    grown = grow_weights(plan, src)

    storages = [weight.untyped_storage().data_ptr() for weight in [*src.values(), *grown.values()]]
    assert len(set(storages)) == len(storages)
    layer = plan.dst.n_layer - 1
    others = digest({name: weight for name, weight in grown.items() if layer_of(name) != layer})
    for name, weight in grown.items():
        if layer_of(name) == layer:
            weight.fill_(7.0)
    assert digest({name: weight for name, weight in grown.items() if layer_of(name) != layer}) == others
    assert digest(src) == before


@given(depth_plans(), st.integers(0, 3))
def test_copies_depend_on_no_seed(plan, seed):
    src = toy_weights(plan.src)
    assert digest(grow_weights(dataclasses.replace(plan, seed=seed), src)) == digest(grow_weights(plan, src))


@given(toy_configs(), st.sampled_from(["stack", "interpolate"]))
def test_growing_to_the_same_size_is_the_identity(config, name):
    src = toy_weights(config)
    assert digest(grow_weights(plan_growth(name, config, factor=1), src)) == digest(src)


def with_new_layers(**changes) -> GrowthPlan:
    """Two layers become five: one of them is new, one copied and silenced, one new and silenced."""
    src = toy_config()
    dst = dataclasses.replace(src, n_layer=5)
    return GrowthPlan("partial", src, dst, (0, None, 1, 1, None), **{"identity_layers": (3, 4), "seed": 5, **changes})


def test_new_layers_start_from_the_grown_models_initial_weights():
    plan = with_new_layers()

    grown = grow_weights(plan, toy_weights(plan.src, dtype=torch.bfloat16))

    for name, weight in grown.items():
        assert weight.dtype == torch.bfloat16
        if plan.is_silenced(name):
            assert not weight.any(), name
        elif layer_of(name) in (1, 4):
            assert torch.equal(weight, init_tensor(name, plan.dst, 5).bfloat16()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_layers_leave_the_function_untouched_to_the_last_bit(dtype):
    config = toy_config()
    plan = GrowthPlan("x", config, dataclasses.replace(config, n_layer=4), (0, None, 1, 1), identity_layers=(1, 3))
    src = toy_model(config, dtype=dtype)
    dst = GPT(plan.dst).to(dtype)
    dst.load_state_dict(grow_weights(plan, src.state_dict()))

    idx, targets = toy_tokens(config)[:, :-1], toy_tokens(config)[:, 1:]
    assert torch.equal(dst(idx), src(idx))
    writers = {name for name in dst.state_dict() if plan.is_silenced(name)}
    quiet = set(zero_gradient(dst, idx, targets))
    assert quiet == {name for name in dst.state_dict() if layer_of(name) in (1, 3)} - writers


def test_moments_of_new_and_of_silenced_parameters_are_zero_with_step_0():
    plan = with_new_layers()
    moments = toy_moments(plan.src)

    grown = grow_optimizer(plan, moments, "map")

    assert {name: tuple(slots["exp_avg_sq"].shape) for name, slots in grown.items()} == parameter_shapes(plan.dst)
    for name, source in plan.sources().items():
        if source is None:
            assert not any(value.any() for value in grown[name].values()), name
        else:
            assert digest(grown[name]) == digest(moments[source])


def test_noise_replaces_its_share_of_every_matrix_and_no_norm():
    config = toy_config(n_embd=128, intermediate_size=256)
    src = toy_weights(config)

    def noisy(noise: float, seed: int = 0) -> dict[str, torch.Tensor]:
        return grow_weights(GrowthPlan("x", config, config, (0, 1), seed, noise=noise), src)

    assert digest(noisy(0.0)) == digest(src)
    assert digest(noisy(0.2)) == digest(noisy(0.2)) != digest(noisy(0.2, seed=1))
    for name, weight in noisy(1.0).items():
        if weight.dim() == 1:
            assert torch.equal(weight, src[name])
            continue
        writes = name.endswith(("attn.proj.weight", "w3.weight"))
        std = 1 / (128**0.5 * 2) if writes else (2 / (5 * 128)) ** 0.5
        assert weight.std().item() == pytest.approx(std, rel=0.03), name
        torch.testing.assert_close(noisy(0.2)[name], 0.8 * src[name] + 0.2 * weight)


@given(depth_plans())
def test_growing_twice_is_growing_by_the_composed_map(plan):
    further = plan_growth("interpolate", plan.dst, n_layer=plan.dst.n_layer + 1)
    composed = tuple(plan.layer_map[layer] for layer in further.layer_map)
    at_once = GrowthPlan("partial", plan.src, further.dst, composed)
    src = toy_weights(plan.src)

    assert digest(grow_weights(further, grow_weights(plan, src))) == digest(grow_weights(at_once, src))


def test_weights_without_storage_can_be_grown_too():
    config = toy_config()
    meta = {name: torch.empty(shape, device="meta") for name, shape in parameter_shapes(config).items()}

    grown = grow_weights(plan_growth("stack", config, factor=2), meta)

    assert all(weight.is_meta for weight in grown.values()) and len(grown) == 3 + 7 * 4


@pytest.mark.parametrize("text", EIGHT_MAPS)
def test_the_eight_maps_of_the_paper_are_grown_tensor_for_tensor(text):
    config = toy_config(n_layer=6)
    src = toy_weights(config)

    grown = grow_weights(plan_growth("partial", config, n_layer=24, layer_map=text), src)

    for layer, source in enumerate(parse_layer_map(text)):
        for name in src:
            if layer_of(name) == source:
                assert torch.equal(grown[with_layer(name, layer)], src[name])
    for name in ("transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight"):
        assert torch.equal(grown[name], src[name])


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("n_query_groups", [1, 2, 4])
@pytest.mark.parametrize("name", ["stack", "interpolate"])
def test_depth_growth_changes_the_function_and_one_step_separates_the_copies(name, n_query_groups, tie_embeddings):
    config = toy_config(n_query_groups=n_query_groups, tie_embeddings=tie_embeddings)
    plan = plan_growth(name, config, factor=2)
    src, dst = toy_model(config), GPT(plan.dst)
    dst.load_state_dict(grow_weights(plan, src.state_dict()))
    tokens = toy_tokens(config)
    with torch.no_grad():
        gap = (dst(tokens[:, :-1]) - src(tokens[:, :-1])).abs().max()
    assert gap > 0.1, "a grown model that computes the same was not grown"

    optimizer = torch.optim.AdamW(dst.parameters(), lr=1e-3)
    dst(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()

    weights = dst.state_dict()
    for first, second in ((i, j) for i in range(4) for j in range(i) if plan.layer_map[i] == plan.layer_map[j]):
        for parameter in weights:
            if layer_of(parameter) == first:
                assert not torch.equal(weights[parameter], weights[with_layer(parameter, second)]), parameter


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda weights: weights.pop("transformer.ln_f.weight"), "tensor transformer.ln_f.weight is missing"),
        (lambda weights: weights.update(extra=torch.ones(1)), "unexpected tensor extra"),
        (
            lambda weights: weights.update({"lm_head.weight": torch.ones(20, 8)}),
            r"lm_head.weight has shape \(20, 8\), the configuration wants \(20, 16\)",
        ),
    ],
)
def test_weights_of_another_model_are_refused_by_name(spoil, message):
    config = toy_config()
    weights = toy_weights(config)
    spoil(weights)

    with pytest.raises(DataError, match=message):
        grow_weights(plan_growth("stack", config, factor=2), weights)


def toy_moments(config: Config, step: float = 7.0) -> dict[str, dict[str, torch.Tensor]]:
    first, second = toy_weights(config, seed=1), toy_weights(config, seed=2)
    return {
        name: {"exp_avg": first[name], "exp_avg_sq": second[name].square(), "step": torch.tensor(step)}
        for name in first
    }


def test_a_reset_optimizer_knows_nothing():
    config = toy_config()
    assert grow_optimizer(plan_growth("stack", config, factor=2), toy_moments(config), "reset") == {}


@given(depth_plans())
def test_mapped_moments_follow_their_weights(plan):
    moments = toy_moments(plan.src)

    grown = grow_optimizer(plan, moments, "map")

    assert {name: slots["exp_avg"].shape for name, slots in grown.items()} == parameter_shapes(plan.dst)
    for name, source in plan.sources().items():
        assert digest(grown[name]) == digest(moments[source])
        assert grown[name]["exp_avg"].data_ptr() != moments[source]["exp_avg"].data_ptr()


@given(depth_plans())
def test_further_copies_start_from_zero_under_map_old_zero_new(plan):
    moments = toy_moments(plan.src)

    grown = grow_optimizer(plan, moments, "map-old-zero-new")

    for name, source in plan.sources().items():
        layer = layer_of(name)
        if layer is not None and plan.layer_map[layer] in plan.layer_map[:layer]:
            assert not any(value.any() for value in grown[name].values())
            assert grown[name]["exp_avg_sq"].shape == parameter_shapes(plan.dst)[name]
        else:
            assert digest(grown[name]) == digest(moments[source])


def test_policies_that_cannot_be_served_are_refused():
    config = toy_config()
    plan = plan_growth("stack", config, factor=2)
    moments = toy_moments(config)

    with pytest.raises(ValueError, match="unknown optimizer policy 'keep'; known: reset, map, map-old-zero-new"):
        grow_optimizer(plan, moments, "keep")
    with pytest.raises(ValueError, match="'map' needs moments, and the source has none; use 'reset'"):
        grow_optimizer(plan, {}, "map")
    moments["transformer.h.9.norm_1.weight"] = moments["transformer.ln_f.weight"]
    with pytest.raises(DataError, match="e.g. transformer.h.9.norm_1.weight"):
        grow_optimizer(plan, moments, "map")


def test_what_was_frozen_and_has_no_moments_starts_from_zero_under_map():
    config = toy_config()
    moments = toy_moments(config)
    frozen = {name for name in moments if layer_of(name) == 0}

    grown = grow_optimizer(
        plan_growth("stack", config, factor=2), {n: s for n, s in moments.items() if n not in frozen}, "map"
    )

    for name, slots in grown.items():
        if layer_of(name) in (0, 2):
            assert not any(value.any() for value in slots.values())
            assert slots["exp_avg"].shape == moments[with_layer(name, 0)]["exp_avg"].shape
        else:
            assert any(value.any() for value in slots.values())


def test_mapped_moments_let_adamw_take_the_step_it_would_have_taken():
    """At factor 1 growth is the identity, so a continued run must not notice it, moments included."""
    config = toy_config()
    tokens = toy_tokens(config)
    plan = plan_growth("stack", config, factor=1)
    model = toy_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train_step(model, optimizer, tokens)
    grown = GPT(plan.dst)
    grown.load_state_dict(grow_weights(plan, model.state_dict()))
    grown_optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-2)
    states = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    moments = grow_optimizer(plan, states, "map")
    for name, parameter in grown.named_parameters():
        grown_optimizer.state[parameter] = moments[name]

    train_step(model, optimizer, tokens)
    train_step(grown, grown_optimizer, tokens)

    assert digest(grown.state_dict()) == digest(model.state_dict())


def train_step(model: GPT, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()


def training_state(config: Config) -> dict:
    return {
        "format": 1,
        "run_config": {"seed": 3},
        "model_config": config.to_dict(),
        "stage": 2,
        "stage_name": "base",
        "stage_step": 5,
        "step_count": 12,
        "iter_num": 24,
        "grown_into_stage": 2,
        "tokens": 1000,
        "flops": {"paper": 6.0, "model": 4.0, "palm": 5.0},
        "parent_tokens": 500,
        "parent_flops": {"paper": 3.0, "model": 1.0, "palm": 2.0},
        "seconds": 9.5,
        "data": {"position": 77, "order": "o", "sources": [{"name": "a"}]},
        "history": [],
        "seed": 3,
        "command": ["pretrain"],
        "versions": {},
        "tokenizer": {"kind": "bytes"},
    }


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A training form of a two-layer model, moments included."""
    config = toy_config()
    path = tmp_path / "run" / "checkpoints" / "stage-02" / "step-0000000012"
    rng = {"torch": torch.get_rng_state()}
    return write_training(path, toy_weights(config), toy_moments(config), training_state(config), rng)


@pytest.fixture
def exchanged(tmp_path: Path) -> Path:
    config = toy_config(vocab_size=20)
    return write_exchange(tmp_path / "exchange", config, toy_weights(config))


def tree_digest(path: Path) -> dict[str, str]:
    files = (file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_grown_training_form_is_a_new_run_that_remembers_its_parent(trained, tmp_path):
    before = tree_digest(trained)
    plan = plan_growth("stack", read_config(trained), factor=2)

    receipt = grow_checkpoint(trained, tmp_path / "grown", plan, "map")

    grown = read_training(tmp_path / "grown")
    old = training_state(plan.src)
    assert digest(grown.model) == digest(grow_weights(plan, toy_weights(plan.src)))
    expected = grow_optimizer(plan, toy_moments(plan.src), "map")
    assert {name: digest(slots) for name, slots in grown.optimizer.items()} == {
        name: digest(slots) for name, slots in expected.items()
    }
    assert read_config(tmp_path / "grown") == plan.dst
    state = grown.state
    for counter in ("stage_step", "step_count", "iter_num", "tokens", "seconds"):
        assert state[counter] == 0, counter
    assert state["stage"] == state["grown_into_stage"] == 1
    assert state["parent_tokens"] == 1500
    assert state["parent_flops"] == {"paper": 9.0, "model": 5.0, "palm": 7.0}
    assert state["flops"] == {"paper": 0, "model": 0, "palm": 0}
    assert {key: state[key] for key in ("data", "seed", "tokenizer")} == {
        key: old[key] for key in ("data", "seed", "tokenizer")
    }
    (record,) = state["history"]
    assert record["parent"] == manifest_sha256(trained) and record["parent_path_name"] == "step-0000000012"
    assert (record["step_count"], record["tokens"], record["flops_total"]) == (12, 1500, 9.0)
    assert GrowthPlan.from_dict(record["plan"]) == plan
    assert tree_digest(trained) == before
    assert receipt["manifest"] == manifest_sha256(tmp_path / "grown") and receipt["parent"] == record["parent"]
    assert receipt["parameters_after"] == count_parameters(plan.dst) > receipt["parameters_before"]
    json.dumps(receipt)


def test_a_grown_checkpoint_can_be_grown_again_and_keeps_its_whole_history(trained, tmp_path):
    for source, target in ((trained, tmp_path / "a"), (tmp_path / "a", tmp_path / "b")):
        grow_checkpoint(source, target, plan_growth("interpolate", read_config(source), n_layer=3))

    history = read_training(tmp_path / "b").state["history"]

    assert [record["parent_path_name"] for record in history] == ["step-0000000012", "a"]
    assert [record["tokens"] for record in history] == [1500, 1500]
    assert [record["flops_total"] for record in history] == [9.0, 9.0]


def test_checkpoints_grow_in_width_and_depth_at_once_moments_included(trained, tmp_path):
    src = read_config(trained)
    dst = dataclasses.replace(src, n_layer=4, n_embd=24, n_head=6, n_query_groups=3, intermediate_size=30)
    plan = split_width(src, dst, seed=3, layer_map=(0, 1, 0, 1))

    receipt = grow_checkpoint(trained, tmp_path / "grown", plan, "map-old-zero-new")

    grown = read_training(tmp_path / "grown")
    assert read_config(tmp_path / "grown") == dst and receipt["parameters_after"] == count_parameters(dst)
    assert digest(grown.model) == digest(grow_weights(plan, toy_weights(src)))
    expected = grow_optimizer(plan, toy_moments(src), "map-old-zero-new")
    for name, slots in expected.items():
        assert digest(grown.optimizer[name]) == digest(slots)
        assert slots["step"] == (0 if layer_of(name) in (2, 3) else 7)
    assert GrowthPlan.from_dict(grown.state["history"][0]["plan"]) == plan


def test_exchange_form_grows_in_width(exchanged, tmp_path):
    src = read_config(exchanged)
    plan = zero_width(src, dataclasses.replace(src, n_embd=24, n_head=6, n_query_groups=3), seed=1)

    grow_checkpoint(exchanged, tmp_path / "grown", plan)

    grown = read_exchange(tmp_path / "grown")
    assert grown.config == plan.dst and digest(grown.weights) == digest(grow_weights(plan, toy_weights(src)))
    idx = toy_tokens(src)[:, :-1]
    torch.testing.assert_close(load_model(tmp_path / "grown")(idx), load_model(exchanged)(idx), rtol=1e-4, atol=1e-4)


def test_exchange_form_is_grown_into_exchange_form(exchanged, tmp_path):
    plan = plan_growth("partial", read_config(exchanged), layer_map="1-12*2-2")

    receipt = grow_checkpoint(exchanged, tmp_path / "grown", plan)

    grown = read_exchange(tmp_path / "grown")
    assert receipt["form"] == "exchange" and receipt["tokens"] is None
    assert grown.config == plan.dst
    assert digest(grown.weights) == digest(grow_weights(plan, toy_weights(plan.src)))
    (record,) = grown.provenance["history"]
    assert record["connection_rate"] == "2/5" and record["parent"] == manifest_sha256(exchanged)


def test_a_tokenizer_goes_along(exchanged, tmp_path):
    from lit_gpt.tokenizer import Tokenizer

    config = toy_config(vocab_size=Tokenizer.load("bytes").vocab_size, padded_vocab_size=320)
    Tokenizer.load("bytes").save(tmp_path)
    write_exchange(tmp_path / "src", config, toy_weights(config), tokenizer_dir=tmp_path)

    grow_checkpoint(tmp_path / "src", tmp_path / "grown", plan_growth("stack", config, factor=2))

    assert Tokenizer.load(tmp_path / "grown").fingerprint == Tokenizer.load("bytes").fingerprint


def test_places_that_cannot_be_a_destination_are_refused_and_nothing_is_written(exchanged, tmp_path):
    plan = plan_growth("stack", read_config(exchanged), factor=2)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "note.txt").write_text("mine")
    before = tree_digest(tmp_path)

    for target in (exchanged, exchanged / "inside", tmp_path / "x" / ".." / exchanged.name):
        with pytest.raises(ValueError, match="lies in the source"):
            grow_checkpoint(exchanged, target, plan)
    with pytest.raises(FileExistsError, match="exists already"):
        grow_checkpoint(exchanged, taken, plan)
    with pytest.raises(FileNotFoundError):
        grow_checkpoint(tmp_path / "nowhere", tmp_path / "grown", plan)

    assert tree_digest(tmp_path) == before


def test_a_source_that_does_not_fit_the_plan_is_diagnosed_in_one_line(exchanged, tmp_path):
    plan = plan_growth("stack", toy_config(vocab_size=20, n_layer=3, intermediate_size=32), factor=2)

    with pytest.raises(DataError) as failure:
        grow_checkpoint(exchanged, tmp_path / "grown", plan)

    assert str(failure.value).endswith(
        "is not the model this growth was planned for: n_layer is 2, not 3; intermediate_size is 24, not 32"
    )
    assert not (tmp_path / "grown").exists()


@pytest.mark.parametrize("use", [read_weights, load_model, None], ids=["weights", "check", "apply"])
def test_weights_behind_a_mask_that_still_opens_are_not_taken_for_the_model(tmp_path, use):
    config = toy_config(vocab_size=20)
    state = {**training_state(config), "mask": {"layers": 0.25}}
    masked = write_training(tmp_path / "masked", toy_weights(config), toy_moments(config), state)
    grow = use or (lambda path: grow_checkpoint(path, tmp_path / "grown", plan_growth("stack", config, factor=2)))
    with pytest.raises(DataError, match="while the mask of its growth was still opening"):
        grow(masked)
    assert not (tmp_path / "grown").exists()


def test_moments_that_are_not_there_cannot_be_mapped(exchanged, tmp_path):
    plan = plan_growth("stack", read_config(exchanged), factor=2)

    with pytest.raises(ValueError, match="needs moments"):
        grow_checkpoint(exchanged, tmp_path / "grown", plan, "map")

    assert not (tmp_path / "grown").exists()


def test_weights_that_are_not_numbers_grow_only_on_request(tmp_path):
    config = toy_config(vocab_size=20)
    weights = toy_weights(config)
    weights["transformer.h.1.norm_2.weight"][3] = float("nan")
    write_exchange(tmp_path / "src", config, weights)
    plan = plan_growth("stack", config, factor=2)

    with pytest.raises(DataError, match="transformer.h.1.norm_2.weight holds NaN or infinity"):
        grow_checkpoint(tmp_path / "src", tmp_path / "grown", plan)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]

    grow_checkpoint(tmp_path / "src", tmp_path / "grown", plan, allow_non_finite=True)
    assert read_exchange(tmp_path / "grown").weights["transformer.h.3.norm_2.weight"][3].isnan()


def test_a_damaged_source_is_refused_and_nothing_is_written(trained, tmp_path):
    plan = plan_growth("stack", read_config(trained), factor=2)
    largest = max((file for file in trained.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])

    with pytest.raises(DataError, match="was cut short or changed"):
        grow_checkpoint(trained, tmp_path / "grown", plan)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_grown_moments_are_made_one_at_a_time():
    plan = plan_growth("stack", toy_config(), factor=2)
    lazy = GrownOptimizer(plan, toy_moments(plan.src), "map-old-zero-new")

    assert list(lazy) == list(parameter_shapes(plan.dst)) and len(lazy) == len(list(lazy))
    first, again = (lazy["transformer.h.0.norm_1.weight"]["exp_avg"] for _ in range(2))
    assert torch.equal(first, again) and first.data_ptr() != again.data_ptr()
    assert lazy["transformer.h.0.norm_1.weight"]["step"] == 7 and lazy["transformer.h.2.norm_1.weight"]["step"] == 0
    assert dict(GrownOptimizer(plan, toy_moments(plan.src), "reset")) == {}
    with pytest.raises(KeyError):
        lazy["transformer.h.4.norm_1.weight"]


def test_grown_weights_are_made_one_at_a_time():
    config = toy_config()
    plan = plan_growth("stack", config, factor=2)
    lazy = GrownWeights(plan, toy_weights(config))

    name = "transformer.h.2.attn.attn.weight"
    assert len(lazy) == len(parameter_shapes(plan.dst))
    assert lazy[name].data_ptr() != lazy[name].data_ptr()


@pytest.mark.parametrize("form", ["trained", "exchanged"])
def test_a_growth_that_is_repeated_finds_its_result_and_touches_nothing(form, request, tmp_path):
    source = request.getfixturevalue(form)
    plan = plan_growth("stack", read_config(source), factor=2)
    first = grow_checkpoint(source, tmp_path / "grown", plan)
    before = tree_digest(tmp_path)

    again = grow_checkpoint(source, tmp_path / "grown", plan)

    assert (first["repeated"], again["repeated"]) == (False, True)
    assert {**again, "repeated": False} == first and tree_digest(tmp_path) == before
    for other in (plan_growth("interpolate", read_config(source), factor=2), dataclasses.replace(plan, seed=1)):
        with pytest.raises(FileExistsError, match="exists already"):
            grow_checkpoint(source, tmp_path / "grown", other)
    file = max((path for path in (tmp_path / "grown").iterdir()), key=lambda path: path.stat().st_size)
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-1])
    with pytest.raises(FileExistsError, match="exists already"):
        grow_checkpoint(source, tmp_path / "grown", plan)
