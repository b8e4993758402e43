"""8-bit products in blocks: what they compute, what they leave as it is, what refuses them.

A CPU makes them too, slowly and of any size. What is asked of a GPU is marked so, and no GPU has run it yet.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from grow.apply import grow_weights
from grow.operators import plan_growth
from lit_gpt.axes import layer_of, parameter_shapes
from lit_gpt.checkpoint import latest, read_training
from lit_gpt.kernels import fp8
from lit_gpt.kernels.backend import Situation
from lit_gpt.settings_files import merge
from pretrain import parallel
from pretrain.command_line import parse
from pretrain.config import ParallelConfig
from pretrain.config_checks import config_problems
from pretrain.parallel import Compute, build_model, choose_compute, with_kernels
from pretrain.run import run
from pretrain.stages import plan_stages
from pretrain.validate_command import validate
from pretrain.world import ALONE, connected
from tests.pretrain.conftest import two_stages
from tests.pretrain.processes import run_on
from tests.pretrain.runs import assert_same_end, cut_off_after, records
from tests.pretrain.test_stages import MODEL, StageConfig, run_config
from tests.toys import toy_config, toy_tokens, toy_weights

CPU = torch.device("cpu")
CONFIG = toy_config(n_embd=64, n_head=4, n_query_groups=4, intermediate_size=96, qkv_bias=True)
RECIPES = ["tensorwise", "rowwise"]
ROUNDING = 0.08
"""Of a product, relative: e4m3 has 4 bits and e5m2 3, so single factors are off by up to 1/16 and 1/8, by a half of
that and less on average."""


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao", reason="the fp8 extra is not installed")


def model_of(recipe: str, config=CONFIG, weights=None, *, strategy="auto", device=CPU, recompute="none"):
    compute = Compute("bf16", "none", "", recompute, fp8=recipe)
    return build_model(config, weights or toy_weights(config), compute, ParallelConfig(strategy), ALONE, device=device)


def step(model, device=CPU):
    """Loss and gradients by name of one batch."""
    tokens = toy_tokens(model.config).to(device)
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return loss.detach(), {name: parallel.whole(p.grad) for name, p in model.named_parameters()}


def off(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_layer_computes_its_product_and_both_gradients_within_the_rounding(torchao, recipe):
    eight, half = (model_of(each).transformer.h[0].mlp.swiglu.w1 for each in (recipe, "none"))
    x = torch.randn(2, 16, CONFIG.n_embd, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = []
    for layer in (eight, half):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).bfloat16())
        assert (y.dtype, leaf.grad.dtype, layer.weight.grad.dtype) == (x.dtype, x.dtype, torch.float32)
        found.append((y.detach(), leaf.grad, layer.weight.grad))
    for ours, expected in zip(*found, strict=True):
        assert 1e-3 < off(ours, expected) < ROUNDING  # and it is no bf16 product


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_computes_what_torchao_emulates(torchao, recipe, monkeypatch):
    from torchao.float8 import Float8LinearConfig

    loss, gradients = step(model_of(recipe))
    original = Float8LinearConfig.from_recipe_name
    emulated = staticmethod(lambda name: dataclasses.replace(original(name), emulate=True))
    monkeypatch.setattr(Float8LinearConfig, "from_recipe_name", emulated)
    expected_loss, expected = step(model_of(recipe))
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-3)
    assert max(off(gradients[name], expected[name]) for name in expected) < 0.02  # sums in another order, in bf16
    assert float(loss) == pytest.approx(float(step(model_of("none"))[0]), rel=0.02)


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_names_shapes_and_dtypes_of_the_state_stay_and_all_blocks_layers_change(torchao, strategy):
    from torchao.float8.float8_linear import Float8Linear

    with connected(ALONE, "cpu", alone_too=strategy == "fsdp"):
        model = model_of("tensorwise", strategy=strategy)
        changed = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
        assert changed == {
            name.removesuffix(".weight")
            for name, shape in parameter_shapes(CONFIG).items()
            if layer_of(name) is not None and len(shape) == 2
        }
        state = model.state_dict()
        assert {name: tuple(each.shape) for name, each in state.items()} == dict(parameter_shapes(CONFIG))
        assert {each.dtype for each in state.values()} == {torch.float32}
        for name, weight in toy_weights(CONFIG).items():
            assert torch.equal(parallel.whole(state[name]), weight)
        _, gradients = step(model)
        assert {each.dtype for each in gradients.values()} == {torch.float32}


def test_sharded_it_computes_what_it_does_alone(torchao):
    loss, gradients = step(model_of("tensorwise"))
    with connected(ALONE, "cpu", alone_too=True):
        sharded_loss, sharded = step(model_of("tensorwise", strategy="fsdp"))
    assert float(sharded_loss) == pytest.approx(float(loss), rel=5e-3)  # weights are rounded to bf16 on their way
    assert max(off(sharded[name], gradients[name]) for name in gradients) < 2 * ROUNDING


def test_sizes_that_are_no_multiples_of_16_stay_in_bf16(torchao):
    from torchao.float8.float8_linear import Float8Linear

    config = toy_config(n_embd=16, n_head=2, n_query_groups=2, intermediate_size=24)
    model = model_of("tensorwise", config)
    changed = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    assert changed == {f"transformer.h.{layer}.attn.{name}" for layer in range(2) for name in ("attn", "proj")}
    assert fp8.count_fp8(config) == (4, 10)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_layers_have_the_same_gradients(torchao, recompute):
    loss, gradients = step(model_of("tensorwise"))
    again_loss, again = step(model_of("tensorwise", recompute=recompute))
    assert torch.equal(loss, again_loss)
    assert all(torch.equal(again[name], gradient) for name, gradient in gradients.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # dynamo does
def test_a_block_is_one_graph_for_the_compiler(torchao):
    """Traced, and computed as it was traced: what Inductor makes of it is for a GPU to show. Norms are computed in
    another order when they are compiled; where that moves the largest number of a tensor, all of it is rounded anew."""
    loss, gradients = step(model_of("tensorwise"))
    model = model_of("tensorwise")
    for block in model.transformer.h:
        block.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    traced_loss, traced = step(model)
    assert float(traced_loss) == pytest.approx(float(loss), rel=0.01)
    assert max(off(traced[name], gradients[name]) for name in gradients) < 3 * ROUNDING


@pytest.mark.parametrize("sizes", [{"operator": "stack", "n_layer": 4}, {"operator": "split-width", "n_embd": 128}])
def test_a_model_grows_by_its_plain_weights_and_is_changed_again(torchao, sizes):
    plan = plan_growth(sizes["operator"], CONFIG, **{key: n for key, n in sizes.items() if key != "operator"})
    trained = {name: tensor.clone() for name, tensor in model_of("tensorwise").state_dict().items()}
    grown = grow_weights(plan, trained)
    loss, _ = step(model_of("tensorwise", plan.dst, grown))
    assert float(loss) == pytest.approx(float(step(model_of("none", plan.dst, grown))[0]), rel=0.03)


BASE = StageConfig("base", max_steps=10, n_layer=2)
NO_MULTIPLES = {"n_embd": 72, "n_head": 9, "n_query_groups": 9, "head_size": 8, "intermediate_size": 72}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compile": "none"}, "fp8=tensorwise is slower than bf16 unless blocks are compiled"),
        ({"precision": "fp32"}, "fp8=tensorwise multiplies what is bf16 otherwise, not fp32"),
    ],
)
def test_settings_that_do_not_go_with_it(settings, message):
    problems = config_problems(run_config(BASE, fp8="tensorwise", **settings))
    assert len(problems) == 1 and message in problems[0]
    assert not config_problems(run_config(BASE, fp8="tensorwise"))
    assert not config_problems(run_config(BASE, **settings))


@pytest.mark.parametrize(
    ("grown", "model", "message"),
    [
        ({"operator": "random-depth", "mask_steps": 3}, {}, "stage 'grown': the mask of a growth.*mask_steps: 0"),
        ({"operator": "stack"}, {"block_size": 24}, "stage 'base': fp8 needs a block_size that is a multiple of 16"),
        ({"operator": "stack"}, NO_MULTIPLES, "stage 'base': fp8 has no effect"),
    ],
)
def test_stages_that_do_not_go_with_it(grown, model, message):
    config = dataclasses.replace(MODEL, **model)
    stages = (BASE, StageConfig("grown", max_steps=20, n_layer=4, **grown))
    with pytest.raises(ValueError, match=message):
        plan_stages(run_config(*stages, fp8="rowwise"), config)
    plan_stages(run_config(*stages), config)


def test_it_is_refused_on_a_cpu_on_an_old_gpu_and_without_the_package(monkeypatch):
    config = run_config(BASE, fp8="rowwise", precision="bf16")
    compute = choose_compute(config, CPU, 0)
    with pytest.raises(ValueError, match="fp8=rowwise cannot be used here: needs a CUDA device, this run is on cpu"):
        with_kernels(compute, config, CPU, [CONFIG], None)
    with_kernels(dataclasses.replace(compute, fp8="none"), config, CPU, [CONFIG], None)
    assert "sm_89 or newer, this one is sm_86" in fp8.missing(Situation("cuda", capability=(8, 6)))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs the package torchao; pip install 'lit-grow[fp8]'" in fp8.missing(Situation("cuda", capability=(8, 9)))


def test_a_command_refuses_it_on_a_cpu_and_its_dry_run_says_so(pretrain, settings, tmp_path):
    settings["fp8"] = "tensorwise"
    settings["precision"] = "bf16"
    refused = pretrain(settings)
    assert refused.returncode == 2 and "fp8=tensorwise cannot be used here" in refused.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
    dry = pretrain(settings, "--dry-run")
    assert dry.returncode == 0
    assert "compute: bf16, compile none, fp8 tensorwise" in dry.stdout
    assert "5 of 5 linear layers of blocks multiply in fp8" in dry.stdout
    assert "warning: fp8=tensorwise cannot be used here: needs a CUDA device" in dry.stderr


def allow() -> None:
    """On a CPU, for tests."""
    parallel.missing = lambda _: None


@pytest.fixture
def go(torchao, tmp_path, prepared, monkeypatch):
    monkeypatch.setattr(parallel, "missing", lambda _: None)

    def start(name):
        settings = merge(two_stages(tmp_path / name, prepared), {"fp8": "tensorwise", "precision": "bf16"})
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(settings))
        run(parse(["--config", str(path)]), command=["pretrain"])
        return tmp_path / name

    return start


@pytest.mark.slow
def test_a_run_grows_and_resumes_in_it(go, monkeypatch):
    whole = go("whole")
    losses = [line["loss"] for line in records(whole)]
    assert losses[-1] < losses[0] - 1.0

    with cut_off_after(9):
        go("stopped")
    assert_same_end(go("stopped"), whole)
    monkeypatch.setattr(parallel, "missing", lambda _: "is missing")
    assert validate(str(whole), [])  # where it cannot run, in bf16
    stored = read_training(latest(whole / "checkpoints"))
    assert stored.state["compute"]["fp8"] == "tensorwise"
    assert {tensor.dtype for tensor in stored.model.values()} == {torch.float32}


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(torchao, tmp_path, prepared):
    losses = []
    for size in (1, 2):
        settings = merge(two_stages(tmp_path / f"run {size}", prepared), {"fp8": "tensorwise", "precision": "bf16"})
        settings |= {"batch": {"global_batch_size": 4, "micro_batch_size": 1}}
        run_on(settings, size, tmp_path / f"of {size}", prepare=allow)
        losses.append([line["loss"] for line in records(tmp_path / f"run {size}")])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_compiled_on_a_gpu_it_trains_as_bf16_does(torchao, recipe):
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no GPU of sm_89 or newer")
    config = toy_config(n_embd=256, n_head=4, n_query_groups=4, intermediate_size=512, block_size=64)
    device, losses = torch.device("cuda"), []
    for how in ("none", recipe):
        compute = Compute("bf16", "block", "", fp8=how)
        model = build_model(config, toy_weights(config), compute, ParallelConfig(), ALONE, device=device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(30):
            loss, _ = step(model, device)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
