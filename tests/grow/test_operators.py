"""Operators by name, and how a name and a depth become a plan."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from grow.apply import grow_weights
from grow.check import zero_gradient
from grow.layer_map import MAX_LAYERS
from grow.operators import function_of, operator, plan_growth
from grow.plan import SILENCED, GrowthPlan, differing_sizes
from grow.registry import BY_NAME, FUNCTION, OPERATORS, UNAVAILABLE
from grow.sizes import with_depth
from lit_gpt.axes import EMBEDDING, FINAL_NORM, HEAD, layer_of, name_in_block, with_layer
from lit_gpt.config import Config
from lit_gpt.flops import count_non_embedding, count_parameters
from lit_gpt.model import GPT, init_tensor
from tests.toys import toy_config, toy_model, toy_tokens, toy_weights

# operator, source depth, grown depth, the map counted from 0
COPIES = [
    ("stack", 3, 6, [0, 1, 2, 0, 1, 2]),
    ("interpolate", 3, 6, [0, 0, 1, 1, 2, 2]),
    ("partial", 3, 5, [0, 1, 0, 1, 2]),
    ("gradual", 3, 5, [0, 1, 2, 1, 2]),
    ("mslt", 3, 5, [0, 1, 2, 1, 2]),
    ("solar", 3, 4, [0, 1, 1, 2]),
    ("midas", 4, 6, [0, 1, 0, 1, 2, 3]),
    ("lidas", 4, 6, [0, 1, 1, 2, 2, 3]),
    ("one-layer", 1, 3, [0, 0, 0]),
    ("inheritune", 4, 2, [0, 1]),
]
# operator, source depth, grown depth, the map, its identity layers
PRESERVING = [
    ("zero-depth", 3, 6, [0, 0, 1, 1, 2, 2], (1, 3, 5)),
    ("zero-depth", 3, 5, [0, 0, 1, 1, 2], (1, 3)),
    ("llama-pro", 4, 6, [0, 1, 1, 2, 3, 3], (2, 5)),
    ("staged-depth", 2, 4, [0, 0, 1, 1], (1, 3)),
]
ACCEPTED = """stack gstack interpolate partial gradual zero-depth random-depth split-width zero-width random-width
mslt solar llama-pro midas lidas one-layer inheritune fpi aki aki-pro lemon hypercloning staged-width staged-depth
learn-depth learn-width gradmax lesa opt-deus distill""".split()
PRTS_METHODS = {"stacking": "stack", "gs": "gradual", "mslt": "mslt", "solar": "solar"}


def plan_of(name: str, n_layer_src: int, n_layer_dst: int, layers: list[int], **sizes: object) -> GrowthPlan:
    given = {"layer_map": layers} if name == "partial" else {"n_layer": n_layer_dst}
    return plan_growth(name, toy_config(n_layer=n_layer_src, **sizes), **given)


def logits(config: Config, weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = GPT(config).to(dtype)
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(toy_tokens(config)[:, :-1])


@pytest.mark.parametrize(("name", "n_layer_src", "n_layer_dst", "layers"), COPIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_layer_is_the_one_its_map_names_and_the_function_changes(name, n_layer_src, n_layer_dst, layers, tied):
    plan = plan_of(name, n_layer_src, n_layer_dst, layers, tie_embeddings=tied)
    src = toy_weights(plan.src)

    dst = grow_weights(plan, src)

    assert list(plan.layer_map) == layers and plan.dst.n_layer == len(layers) and plan.identity_layers == ()
    for param, weight in dst.items():
        layer = layer_of(param)
        assert torch.equal(weight, src[param if layer is None else with_layer(param, layers[layer])]), param
    assert {EMBEDDING, FINAL_NORM} <= set(dst) and (HEAD in dst) is not tied
    assert (logits(plan.dst, dst) - logits(plan.src, src)).abs().max() > 0.1
    assert not operator(name).preserves and function_of(plan) == "no"


def test_one_step_separates_two_copies_of_a_layer():
    plan = plan_growth("stack", toy_config(), factor=2)
    model = GPT(plan.dst)
    model.load_state_dict(grow_weights(plan, toy_weights(plan.src)))
    tokens = toy_tokens(plan.dst)

    model(tokens[:, :-1], tokens[:, 1:]).backward()
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()

    weights = model.state_dict()
    copies = {name: with_layer(name, 2) for name in weights if layer_of(name) == 0}
    assert all(not torch.equal(weights[name], weights[copy]) for name, copy in copies.items())


@pytest.mark.parametrize(("name", "n_layer_src", "n_layer_dst", "layers", "identity"), PRESERVING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_query_groups", [1, 2, 4])
def test_identity_copies_keep_the_function_bit_for_bit(
    name, n_layer_src, n_layer_dst, layers, identity, dtype, n_query_groups
):
    plan = plan_of(name, n_layer_src, n_layer_dst, layers, n_query_groups=n_query_groups)
    src = toy_weights(plan.src, dtype=dtype)

    dst = grow_weights(plan, src)

    assert list(plan.layer_map) == layers and plan.identity_layers == identity and function_of(plan) == "bitwise"
    assert torch.equal(logits(plan.dst, dst, dtype), logits(plan.src, src, dtype))
    zero = {param for param, weight in dst.items() if not weight.any()}
    assert zero == {with_layer(part, layer) for part in SILENCED for layer in identity} & dst.keys()
    for param in set(dst) - zero:
        layer = layer_of(param)
        assert torch.equal(dst[param], src[param if layer is None else with_layer(param, layers[layer])]), param


@pytest.mark.parametrize(("name", "n_layer_src", "n_layer_dst", "layers", "identity"), PRESERVING)
def test_identity_layers_wake_by_their_writers_and_train_as_a_whole_after_one_step(
    name, n_layer_src, n_layer_dst, layers, identity
):
    plan = plan_of(name, n_layer_src, n_layer_dst, layers)
    model = GPT(plan.dst)
    model.load_state_dict(grow_weights(plan, toy_weights(plan.src)))
    tokens = toy_tokens(plan.dst)

    without = set(zero_gradient(model, tokens[:, :-1], tokens[:, 1:]))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()

    in_identity = {param for param, _ in model.named_parameters() if layer_of(param) in identity}
    assert without == {param for param in in_identity if name_in_block(param) not in SILENCED}
    assert zero_gradient(model, tokens[:, :-1], tokens[:, 1:]) == []


def test_an_explicit_map_of_zero_depth_may_put_its_copies_anywhere_but_must_keep_the_source():
    src = toy_config(n_layer=3)

    plan = plan_growth("zero-depth", src, layer_map="123*2")

    assert plan.identity_layers == (3, 4, 5)
    dst = grow_weights(plan, toy_weights(src))
    assert torch.equal(logits(plan.dst, dst), logits(src, toy_weights(src)))
    for text in ("213-3", "1-3-3*2", "123-new"):
        with pytest.raises(ValueError, match="zero-depth preserves the function.*use partial"):
            plan_growth("zero-depth", src, layer_map=text)


def test_random_growth_in_depth_adds_layers_of_initial_weights():
    plan = plan_growth("random-depth", toy_config(), n_layer=4, seed=3)
    src = toy_weights(plan.src)

    dst = grow_weights(plan, src)

    for param, weight in dst.items():
        new = layer_of(param) in (2, 3)
        assert torch.equal(weight, init_tensor(param, plan.dst, 3) if new else src[param]), param
    other = grow_weights(plan_growth("random-depth", toy_config(), n_layer=4, seed=4), src)
    assert not torch.equal(dst["transformer.h.3.attn.proj.weight"], other["transformer.h.3.attn.proj.weight"])
    assert (logits(plan.dst, dst) - logits(plan.src, src)).abs().max() > 1e-3
    assert function_of(plan) == "no"


def test_zero_layer_keeps_what_is_outside_the_layers():
    plan = plan_growth("zero-layer", toy_config(), n_layer=3)
    src = toy_weights(plan.src)

    dst = grow_weights(plan, src)

    assert all(torch.equal(dst[param], src[param]) for param in (EMBEDDING, FINAL_NORM, HEAD))
    assert all(torch.equal(dst[param], init_tensor(param, plan.dst, 0)) for param in dst if layer_of(param) is not None)


@pytest.mark.parametrize(
    ("name", "depths"), [("gradual", (3, 6, 12)), ("midas", (3, 6, 9, 12)), ("gs", (2, 4, 5)), ("lidas", (4, 6))]
)
def test_hops_are_stages_in_a_row(name, depths):
    config, layers = toy_config(n_layer=depths[0]), list(range(depths[0]))
    first = weights = toy_weights(config)
    for n_layer in depths[1:]:
        plan = plan_growth(name, config, n_layer=n_layer)
        config, layers, weights = plan.dst, [layers[i] for i in plan.layer_map], grow_weights(plan, weights)

    at_once = grow_weights(plan_growth("partial", toy_config(n_layer=depths[0]), layer_map=layers), first)
    assert all(torch.equal(weight, at_once[param]) for param, weight in weights.items())


@pytest.mark.parametrize("name", ACCEPTED)
def test_every_name_of_a_published_operator_is_known_or_refused_with_the_reason(name):
    if name.replace("-", "_") in UNAVAILABLE:
        with pytest.raises(ValueError, match=f"operator '{name}' is not available: .+ See `grow operators`"):
            operator(name)
    else:
        assert name in (operator(name).name, *operator(name).aliases)


@pytest.mark.parametrize(("method", "name"), PRTS_METHODS.items())
def test_methods_of_prts_are_names_of_operators(method, name):
    assert operator(method).name == name


@pytest.mark.parametrize("name", ["milk", "incubation", "gi", "gradual-incubation"])
def test_retired_methods_are_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=f"operator '{name}' is retired: .+"):
        operator(name)


def test_no_name_is_both_known_and_refused():
    assert not set(BY_NAME) & set(UNAVAILABLE)


@pytest.mark.parametrize("op", OPERATORS.values(), ids=list(OPERATORS))
def test_an_entry_of_the_registry_is_complete(op):
    assert op.function in FUNCTION and op.axis in ("depth", "width", "both")
    assert op.summary and op.paper and op.trained and op.options


def test_noise_ends_the_promise_of_an_operator():
    config = toy_config()
    assert function_of(plan_growth("zero-depth", config, factor=2)) == "bitwise"
    assert function_of(plan_growth("zero-depth", config, factor=2, noise=0.1)) == "no"
    assert function_of(plan_growth("stack", config, factor=1)) == "bitwise"


def test_the_source_model_is_left_alone():
    model = toy_model(toy_config())
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    grow_weights(plan_growth("zero-depth", model.config, factor=3), model.state_dict())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("name", ["stack", "gstack", "G_stack", "g-stack", "stacking"])
def test_stacking_goes_by_many_names(name):
    assert operator(name) is OPERATORS["stack"]


def test_no_two_operators_share_a_name():
    assert len(BY_NAME) == sum(1 + len(op.aliases) for op in OPERATORS.values())


def test_an_unknown_operator_is_met_with_the_nearest_and_all_known_ones():
    with pytest.raises(ValueError, match="did you mean 'interpolate'. Known: stack, interpolate, partial"):
        operator("interpolat")
    with pytest.raises(ValueError, match="did you mean 'llama-pro'"):
        operator("LLaMA_Pr")


def test_n_layer_factor_and_map_are_three_ways_to_say_the_same():
    src = toy_config(n_layer=3)

    by_depth = plan_growth("stack", src, n_layer=6, seed=5)
    by_factor = plan_growth("gstack", src, factor=2, seed=5)
    by_map = plan_growth("stack", src, layer_map=[0, 1, 2, 0, 1, 2], seed=5)

    assert by_depth == by_factor == by_map
    assert by_depth.operator == "stack" and by_depth.seed == 5 and by_depth.dst == toy_config(n_layer=6)


def test_a_fractional_factor_is_fine_where_the_depth_is_whole():
    assert plan_growth("interpolate", toy_config(n_layer=4), factor=1.5).layer_map == (0, 0, 1, 2, 2, 3)


def test_an_explicit_map_lifts_the_rule_of_whole_factors_and_is_kept_as_written():
    plan = plan_growth("stack", toy_config(n_layer=3), n_layer=5, layer_map="123-23")

    assert plan.layer_map == (0, 1, 2, 1, 2)
    assert plan.options == {"layer_map": "123-23"}


@pytest.mark.parametrize(
    ("name", "request_", "message"),
    [
        ("stack", {}, "how deep is the grown model"),
        ("stack", {"n_layer": 4}, "3 layers do not divide 4"),
        ("stack", {"n_layer": 2}, "cannot shrink 3 layers to 2"),
        ("stack", {"n_layer": 0}, "cannot shrink 3 layers to 0"),
        ("partial", {"n_layer": 2, "layer_map": "12"}, "cannot shrink 3 layers to 2"),
        ("partial", {"n_layer": 6}, "partial needs a layer map"),
        ("stack", {"n_layer": 6, "factor": 3}, "contradict each other: 3 layers times 3 is 9"),
        ("stack", {"factor": 2.5}, "7.5; the result must be a whole number"),
        ("stack", {"factor": 1 / 3}, "cannot shrink 3 layers to 1"),
        ("stack", {"factor": 0}, "must be above 0"),
        ("stack", {"factor": float("nan")}, "must be above 0"),
        ("stack", {"factor": float("inf")}, "at most 1024"),
        ("stack", {"n_layer": 3 * MAX_LAYERS}, "too deep"),
        ("partial", {"factor": 2, "layer_map": "12312"}, "has 5 layers, but n_layer=6"),
        ("partial", {"layer_map": "1234"}, "there is no layer 4"),
        (
            "solar",
            {"layer_map": "12-23"},
            "solar takes n_layer, factor, and not layer_map.*stack, interp",
        ),
        ("gradual", {"n_layer": 9}, "3 -> 6 -> 9"),
        ("inheritune", {"n_layer": 4}, "1 to 3 of them"),
        ("gradual", {}, "Give gradual n_layer or factor$"),
        ("stack", {"factor": 2, "noise": 1.5}, "noise=1.5 must be in"),
    ],
)
def test_requests_that_cannot_be_met(name, request_, message):
    with pytest.raises(ValueError, match=message):
        plan_growth(name, toy_config(n_layer=3), **request_)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("learn-depth", {"learn_steps": "10"}, "learn_steps='10' must be a whole number"),
        ("learn-depth", {"learn_steps": 2.5}, "learn_steps=2.5 must be a whole number"),
        ("learn-depth", {"learn_rate": "1e-3"}, "learn_rate='1e-3' must be a number; YAML reads 1.0e-3"),
        ("stack", {"noise": "a", "seed": True}, "seed=True must be a whole number\nnoise='a' must be a number"),
        ("zero-depth", {"seed": None}, "seed=None must be a whole number"),
        ("split-width", {"adjust_eps": 1, "n_layer": None}, "adjust_eps=1 must be true or false"),
    ],
)
def test_options_of_another_kind_are_refused_as_a_file_of_settings_may_hold_them(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_growth(name, toy_config(), **{"factor": 2, **options})


@pytest.mark.parametrize("name", sorted(set(OPERATORS) - {"zero-layer", "distill"}))
@pytest.mark.parametrize("n_query_groups", [1, 2, 4])
def test_growing_to_the_same_sizes_is_the_identity(name, n_query_groups):
    src = toy_config(n_layer=1 if name == "one-layer" else 3, n_query_groups=n_query_groups)
    sizes = {
        "depth": {"layer_map": range(3)} if name == "partial" else {"factor": 1},
        "width": {"factor": 1},
        "both": {"n_layer": 3, "n_embd": 16},
    }

    plan = plan_growth(name, src, **sizes[operator(name).axis], seed=9)

    assert plan.is_identity and plan.dst == src and function_of(plan) == "bitwise"
    weights = toy_weights(src, dtype=torch.bfloat16)
    grown = grow_weights(plan, weights)
    assert all(torch.equal(grown[param], weight) for param, weight in weights.items())


def test_a_model_that_is_to_learn_from_a_teacher_starts_like_any_new_one():
    src = toy_config(tie_embeddings=True)
    plan = plan_growth("distill", src, n_layer=3, n_embd=32, seed=5)

    grown = grow_weights(plan, toy_weights(src, dtype=torch.float64))

    assert GrowthPlan.from_dict(plan.to_dict()) == plan and function_of(plan) == "nothing"
    assert all(torch.equal(weight, init_tensor(name, plan.dst, 5).double()) for name, weight in grown.items())


# base, target at four times its depth; then billions of parameters of both, all and without embeddings
PAPER_SIZES = [
    ("6L1024H", "24L1024H", (0.1426, 0.3739), (0.0771, 0.3083)),
    ("6L2048H", "24L2048H", (0.4394, 1.3643), (0.3083, 1.2332)),
    ("tiny_LLaMA_750M_like3B", "tiny_LLaMA_3B", (0.7223, 2.3975), (0.5584, 2.2336)),
    ("tiny_LLaMA_1.7B_like7B", "tiny_LLaMA_7B", (1.6799, 5.9331), (1.4177, 5.6710)),
]


@pytest.mark.parametrize(("base", "target", "all_parameters", "non_embedding"), PAPER_SIZES)
def test_the_papers_bases_stack_to_its_targets(base, target, all_parameters, non_embedding):
    plan = plan_growth("stack", Config.from_name(base), factor=4)

    assert differing_sizes(plan.dst, Config.from_name(target)) == []
    for count, billions in ((count_parameters, all_parameters), (count_non_embedding, non_embedding)):
        assert [count(config) / 1e9 for config in (plan.src, plan.dst)] == pytest.approx(billions, abs=0.00005)


def test_the_papers_width_growth_goes_from_24_layers_of_1024_to_2048():
    plan = plan_growth("split-width", Config.from_name("24L1024H"), factor=2)
    assert plan.dst == Config.from_name("24L2048H")


def test_a_grown_model_is_named_after_its_sizes_or_not_at_all():
    assert with_depth(Config.from_name("6L2048H"), 24) == Config.from_name("24L2048H")
    assert with_depth(Config.from_name("tiny_LLaMA_750M_like3B"), 32).name == "32L2560H"
    assert with_depth(Config.from_name("tiny_LLaMA_1b"), 44).name == ""
    assert with_depth(toy_config(name="toy"), 2).name == "toy"


def test_planning_needs_no_torch():
    modules = "grow.layer_map, grow.plan, grow.depth, grow.operators, lit_gpt.config, lit_gpt.axes, lit_gpt.flops"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


COPYING = set(OPERATORS) - {"distill"}
WIDER = [name for name, op in OPERATORS.items() if op.width is not None and "n_embd" in op.options and name in COPYING]


@pytest.mark.parametrize("name", WIDER)
def test_operators_in_width_grow_what_they_are_asked_to_and_keep_the_rest(name):
    src = toy_config()

    plan = plan_growth(name, src, n_embd=32, seed=4)

    assert (plan.operator, plan.seed, plan.layer_map) == (name, 4, (0, 1))
    assert plan.dst == toy_config(n_embd=32, n_head=8, n_query_groups=4, intermediate_size=48)
    assert GrowthPlan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize("name", [name for name in WIDER if not OPERATORS[name].needs_data])
@pytest.mark.parametrize("n_query_groups", [1, 2, 4])
def test_operators_in_width_preserve_what_the_registry_says(name, n_query_groups):
    src = toy_config(n_query_groups=n_query_groups)
    if (name, n_query_groups) == ("staged-width", 1):
        plan = plan_growth(name, src, factor=2, n_query_groups=2)
    else:
        plan = plan_growth(name, src, n_embd=32)
    weights = toy_weights(src, dtype=torch.float64)

    before = logits(src, weights, torch.float64)
    gap = (logits(plan.dst, grow_weights(plan, weights), torch.float64) - before).abs().max()

    assert function_of(plan) == operator(name).function.removesuffix(" (width only)")
    assert bool(gap <= 1e-10 * before.abs().max()) is operator(name).preserves


@pytest.mark.parametrize(
    ("name", "request_", "layers", "function"),
    [
        ("fpi", {"n_layer": 5, "n_embd": 32}, [0, 1, 0, 1, 1], "no"),
        ("aki", {"n_layer": 4, "n_embd": 32}, [0, 1, 0, 1], "no"),
        ("aki-pro", {"n_layer": 4, "n_embd": 32}, [0, 0, 1, 1], "no"),
        ("lemon", {"n_layer": 4, "n_embd": 32}, [0, 0, 1, 1], "exactly"),
        ("lemon", {"n_layer": 4}, [0, 0, 1, 1], "bitwise"),
        ("b2b", {"n_layer": 4}, [0, 1, 0, 1], "no"),
        ("b2b", {"n_embd": 32}, [0, 1], "exactly"),
        ("msg", {"n_layer": 3}, [0, 1, None], "no"),
        ("msg", {"n_embd": 32}, [0, 1], "no"),
        ("zero", {"n_embd": 32}, [0, 1], "exactly"),
    ],
)
def test_growth_of_both_axes_and_methods_of_prts_that_are_two_operators(name, request_, layers, function):
    src = toy_config()

    plan = plan_growth(name, src, **request_)

    assert list(plan.layer_map) == layers and function_of(plan) == function
    assert (plan.width is None) is ("n_embd" not in request_)
    weights = toy_weights(src, dtype=torch.float64)
    gap = logits(plan.dst, grow_weights(plan, weights), torch.float64) - logits(src, weights, torch.float64)
    assert bool(gap.abs().max() < 1e-10) is (function != "no")


@pytest.mark.parametrize(
    ("residual", "adjust_eps", "function"),
    [
        ("M", None, "exactly"),
        ("E", None, "up to eps"),
        ("E", True, "exactly"),
        ("bert2bert", None, "no"),
        ("published", None, "no"),
    ],
)
def test_published_residual_rules_do_not_pass_for_preserving(residual, adjust_eps, function):
    src = toy_config(n_query_groups=4)

    plan = plan_growth(
        "split-width", src, n_embd=20, intermediate_size=24, residual=residual, adjust_eps=adjust_eps, seed=1
    )

    assert function_of(plan) == function
    weights = toy_weights(src, dtype=torch.float64)
    gap = logits(plan.dst, grow_weights(plan, weights), torch.float64) - logits(src, weights, torch.float64)
    bounds = {"exactly": (0, 1e-10), "up to eps": (1e-10, 1e-2), "no": (0.05, 1e3)}
    low, high = bounds[function]
    assert low <= gap.abs().max() <= high
    assert plan.options == {"residual": residual, **({"adjust_eps": True} if adjust_eps else {})}


@pytest.mark.parametrize(
    ("name", "request_", "message"),
    [
        ("split-width", {}, "how large is the grown model"),
        ("split-width", {"n_layer": 4, "factor": 2}, "grows width only, but n_layer goes 2 -> 4; .*lemon"),
        ("stack", {"n_embd": 32}, "stack takes n_layer, factor, layer_map, and not n_embd.*split-width"),
        ("lemon", {"factor": 2, "n_embd": 32}, "both give sizes"),
        ("lemon", {"n_layer": 1, "n_embd": 32}, "cannot shrink 2 layers to 1"),
        ("hypercloning", {"n_embd": 24}, "needs a whole factor"),
        ("hypercloning", {"factor": 2, "residual": "Z"}, "and not residual"),
        ("split-width", {"factor": 2, "residual": "Q"}, "unknown rule 'Q'"),
        ("split-width", {"factor": 2, "colour": "red"}, "unknown option colour; split-width takes .*noise"),
        ("zero-width", {"n_embd": 18}, "breaks head_size=4"),
    ],
)
def test_requests_in_width_that_cannot_be_met(name, request_, message):
    with pytest.raises(ValueError, match=message):
        plan_growth(name, toy_config(), **request_)
