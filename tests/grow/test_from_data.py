"""Operators that read data: which samples they read, what a checkpoint remembers of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from grow.__main__ import main
from grow.apply import grow_checkpoint, grow_optimizer, grow_weights, make_weights
from grow.check import compare, load_model
from grow.learned import LearnedGrowth
from grow.operators import function_of, needs_data, plan_growth
from grow.plan import GrowthPlan
from grow.samples import check_tokenizer, open_samples
from grow.tensors import with_noise
from lit_gpt.checkpoint import read_exchange, read_training, read_weights, write_exchange, write_training
from lit_gpt.config import Config
from lit_gpt.errors import DataError
from lit_gpt.flops import flops_per_token
from lit_gpt.model import GPT
from lit_gpt.packed_dataset import write_token_file
from tests.toys import toy_config, toy_tokens, toy_weights

BRIEFLY = {"learn_steps": 3, "batch_size": 2}
N_SAMPLES = 20
CONFIG = toy_config(vocab_size=20)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """20 samples of 16 targets in one file."""
    ids = np.random.default_rng(0).integers(0, 20, N_SAMPLES * CONFIG.block_size + 1)
    write_token_file(tmp_path / "tokens.bin", ids, np.dtype("u2"))
    return tmp_path / "tokens.bin"


@pytest.fixture
def prepared(tokens: Path, tmp_path: Path):
    """A folder as scripts/prepare.py leaves it, with what its manifest says of the tokenizer."""

    def make(vocab_size: int = 20, sha256: str = "a" * 64) -> Path:
        folder = tmp_path / "prepared"
        folder.mkdir(exist_ok=True)
        (folder / "train_0.bin").write_bytes(tokens.read_bytes())
        split = {"files": ["train_0.bin"], "tokens": N_SAMPLES * CONFIG.block_size + 1, "text_bytes": 999}
        manifest = {"tokenizer": {"sha256": sha256, "vocab_size": vocab_size}, "splits": {"train": split}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return make


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return write_exchange(tmp_path / "model", CONFIG, toy_weights(CONFIG), provenance={"flops_total": 7.0, "tokens": 2})


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    flops = {"paper": 6.0, "model": 4.0, "palm": 5.0}
    state = {"model_config": CONFIG.to_dict(), "step_count": 3, "tokens": 10, "flops": flops, "history": []}
    moments = {
        name: {"exp_avg": weight, "exp_avg_sq": weight.square(), "step": torch.tensor(3.0)}
        for name, weight in toy_weights(CONFIG).items()
    }
    return write_training(tmp_path / "trained", toy_weights(CONFIG), moments, state)


def grow(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    return (code, *capsys.readouterr())


def test_every_sample_is_read_once_before_one_is_read_again_in_the_order_of_the_seed(tokens):
    samples = open_samples(tokens, CONFIG, seed=3)
    batches = samples.batches(5)
    epoch = torch.cat([next(batches) for _ in range(N_SAMPLES // 5)])

    assert epoch.shape == (N_SAMPLES, CONFIG.block_size + 1) and epoch.dtype == torch.int64
    in_file = torch.from_numpy(samples.source.read(np.arange(N_SAMPLES)))
    assert sorted(epoch.tolist()) == sorted(in_file.tolist()) and not torch.equal(epoch, in_file)
    assert torch.equal(samples.batch(3, 4), epoch[3:7])
    assert torch.equal(next(samples.batches(5, position=10)), epoch[10:15])
    assert torch.equal(next(open_samples(tokens, CONFIG, seed=3).batches(5)), epoch[:5])
    assert not torch.equal(next(open_samples(tokens, CONFIG, seed=4).batches(5)), epoch[:5])


def test_whoever_waits_is_told_of_every_batch_that_is_done(tokens):
    told: list[int] = []
    plan = plan_growth("learn-depth", CONFIG, factor=2, learn_steps=3, batch_size=2)
    make_weights(plan, toy_weights(CONFIG), samples=open_samples(tokens, CONFIG, on_batch=told.append))
    assert told == [1, 2]  # the last one is done when the work is


def test_a_batch_larger_than_the_data_is_refused(tokens):
    with pytest.raises(DataError, match="holds 20 samples of 16 targets, and a batch has 21; add data, or lower"):
        open_samples(tokens, CONFIG).batches(21)


@pytest.mark.parametrize(("vocab_size", "fits"), [(20, True), (19, False), (21, False), (400, False)])
def test_prepared_data_of_another_vocabulary_is_refused(prepared, vocab_size, fits):
    folder = prepared(vocab_size)
    if fits:
        assert open_samples(folder, CONFIG).source.n_samples == N_SAMPLES
    else:
        with pytest.raises(DataError, match=f"tokenizer of {vocab_size} tokens, and the model knows 20"):
            open_samples(folder, CONFIG)


def test_a_tokenizer_whose_embedding_was_padded_fits(prepared):
    padded = toy_config(vocab_size=64, padded_vocab_size=64)  # as Hugging Face's config.json has it
    assert open_samples(prepared(20), padded).source.n_samples == N_SAMPLES


def test_data_too_short_or_with_ids_outside_the_vocabulary_is_refused(tmp_path, tokens):
    write_token_file(tmp_path / "short.bin", np.arange(5), np.dtype("u2"))
    with pytest.raises(DataError, match="make no sample of block_size=16"):
        open_samples(tmp_path / "short.bin", CONFIG)
    with pytest.raises(DataError, match="outside the vocabulary of 10"):
        next(open_samples(tokens, toy_config(vocab_size=10)).batches(8))
    with pytest.raises(FileNotFoundError, match="no such data"):
        open_samples(tmp_path / "nowhere", CONFIG)


def test_data_of_another_tokenizer_than_the_checkpoints_is_refused(prepared, tmp_path):
    state = {"model_config": CONFIG.to_dict(), "tokenizer": {"sha256": "b" * 64}}
    checkpoint = write_training(tmp_path / "checkpoint", toy_weights(CONFIG), {}, state)

    check_tokenizer(open_samples(prepared(sha256="b" * 64), CONFIG), checkpoint)
    with pytest.raises(DataError, match=r"another tokenizer \(aaaaaaaaaaaa\) than that of .*\(bbbbbbbbbbbb\)"):
        check_tokenizer(open_samples(prepared(), CONFIG), checkpoint)


@pytest.mark.parametrize("name", ["learn-depth", "learn-width", "gradmax"])
def test_a_plan_that_needs_data_is_not_carried_out_without(name, model_folder, tmp_path):
    plan = plan_growth(name, CONFIG, factor=2)

    assert needs_data(plan) and not needs_data(plan_growth(name, CONFIG, factor=1))
    message = f"{name} makes weights from training samples, and there are none; name some: grow apply --data"
    for carry_out in (
        lambda: grow_weights(plan, toy_weights(CONFIG)),
        lambda: make_weights(plan, toy_weights(CONFIG)),
        lambda: grow_checkpoint(model_folder, tmp_path / "grown", plan),
    ):
        with pytest.raises(ValueError, match=message):
            carry_out()
    assert not (tmp_path / "grown").exists()


def test_moments_do_not_follow_learned_mixtures(trained, tokens, tmp_path):
    plan = plan_growth("learn-depth", CONFIG, factor=2, **BRIEFLY)
    for policy in ("map", "map-old-zero-new"):
        with pytest.raises(ValueError, match=f"'{policy}' does not go with learn-depth.*use 'reset'"):
            grow_optimizer(plan, {}, policy)
        with pytest.raises(ValueError, match="use 'reset'"):
            grow_checkpoint(trained, tmp_path / "grown", plan, policy, samples=open_samples(tokens, CONFIG))


@pytest.mark.parametrize("name", ["learn-depth", "learn-width"])
def test_a_learned_checkpoint_says_what_it_learned_from_and_is_charged_for_it(name, trained, tokens, tmp_path):
    plan = plan_growth(name, CONFIG, factor=2, seed=5, **BRIEFLY)

    receipt = grow_checkpoint(trained, tmp_path / "grown", plan, samples=open_samples(tokens, CONFIG, seed=5))

    found = read_training(tmp_path / "grown")
    spent = flops_per_token(plan.dst).times(3 * 2 * CONFIG.block_size)
    assert found.state["flops"] == {"paper": spent.paper, "model": spent.model, "palm": spent.palm}
    assert found.state["parent_flops"]["paper"] == 6.0 and dict(found.optimizer) == {}
    (record,) = found.state["history"]
    assert (record["growth_flops"], record["flops_total"]) == (spent.paper, 6.0 + spent.paper)
    stored = GrowthPlan.from_dict(record["plan"])
    assert stored.options == BRIEFLY and stored.dst == plan.dst
    data = stored.data
    assert (data["steps"], data["batch_size"], data["samples"], data["tokens"], data["seed"]) == (3, 2, 6, 96, 5)
    assert data["path_name"] == "tokens.bin" and len(data["fingerprint"]) == 64
    assert data["samples_in_files"] == N_SAMPLES and data["first_loss"] > 0
    assert (receipt["growth_flops"], receipt["data"]) == (spent.paper, data)
    expected = make_weights(plan, toy_weights(CONFIG), samples=open_samples(tokens, CONFIG, seed=5)).weights
    assert all(torch.equal(found.model[param], weight) for param, weight in expected.items())


def test_gradmax_on_disk_keeps_the_function_and_maps_moments(trained, tokens, tmp_path):
    plan = plan_growth("gradmax", CONFIG, factor=2, batch_size=4)

    receipt = grow_checkpoint(trained, tmp_path / "grown", plan, "map", samples=open_samples(tokens, CONFIG))

    assert receipt["function"] == function_of(plan) == "exactly"
    found = compare(load_model(trained), load_model(tmp_path / "grown"), toy_tokens(CONFIG))
    assert found.max_abs_logit_gap < 1e-4
    grown = read_training(tmp_path / "grown")
    moment = grown.optimizer["transformer.h.0.mlp.swiglu.w3.weight"]["exp_avg"]
    assert not moment[:, 24:].any() and moment[:, :24].all()
    assert grown.state["flops"]["paper"] > flops_per_token(CONFIG).times(4 * CONFIG.block_size).paper
    assert receipt["data"]["samples"] == 4 and receipt["data"]["neurons_not_converged"] == 0


def test_an_exchange_form_carries_the_cost_of_growth_from_one_growth_to_the_next(model_folder, tokens, tmp_path):
    samples = open_samples(tokens, CONFIG)
    first = plan_growth("learn-depth", CONFIG, n_layer=3, **BRIEFLY)
    grow_checkpoint(model_folder, tmp_path / "first", first, samples=samples)
    grow_checkpoint(tmp_path / "first", tmp_path / "second", plan_growth("stack", first.dst, factor=2))

    provenance = read_exchange(tmp_path / "second").provenance
    spent = flops_per_token(first.dst).times(96).paper
    assert [record["growth_flops"] for record in provenance["history"]] == [spent, 0.0]
    assert [record["flops_total"] for record in provenance["history"]] == [7.0 + spent, 7.0 + spent]


@pytest.mark.parametrize("request_", [("gradmax", {"factor": 2}), ("learn-depth", {"n_layer": 3, "learn_steps": 2})])
def test_noise_goes_once_on_top_of_what_was_made_from_data(tokens, request_):
    (name, options), samples = request_, open_samples(tokens, CONFIG)
    plans = [plan_growth(name, CONFIG, noise=noise, batch_size=2, **options) for noise in (0.0, 0.1)]
    clean, noisy = (make_weights(plan, toy_weights(CONFIG), samples=samples).weights for plan in plans)
    for parameter, weight in clean.items():
        expected = weight if weight.dim() == 1 else with_noise(weight, plans[1], parameter)
        assert torch.equal(noisy[parameter], expected), parameter


def test_the_command_learns_and_says_what_it_cost(capsys, model_folder, tokens, tmp_path):
    arguments = ("apply", model_folder, tmp_path / "grown", "--method", "ligo", "--n_layer", 5, "--learn-steps=3")

    dry = grow(capsys, *arguments, "--dry-run")
    code, out, err = grow(capsys, *arguments, "--batch-size", 8, "--data", tokens)

    assert dry[0] == 0 and "trained for 3 steps of 8 samples of 16 tokens" in dry[1]
    assert (code, err) == (0, "")
    spent = flops_per_token(toy_config(vocab_size=20, n_layer=5)).times(3 * 8 * 16).paper
    for words in (
        "learn-depth: 2 -> 5 layers",
        "1 2 | 1 2 | 1",
        "the loss jumps",
        f"growth      {spent:.4g} FLOPs on 384 tokens of tokens.bin",
        "nats per token",
        "24 samples were read, and there are 20",
    ):
        assert words in out
    assert "grown by learn-depth: 2 -> 5 layers" in grow(capsys, "inspect", tmp_path / "grown")[1]


def test_the_same_command_gives_the_same_bits_and_another_seed_others(capsys, model_folder, tokens, tmp_path):
    grown = {}
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        arguments = ("--operator=ligo", "--n-embd=24", "--learn-steps=2", "--batch-size=2", "--seed", seed)
        assert grow(capsys, "apply", model_folder, tmp_path / name, *arguments, "--data", tokens)[0] == 0
        grown[name] = dict(read_weights(tmp_path / name))

    assert all(torch.equal(weight, grown["again"][name]) for name, weight in grown["first"].items())
    assert any(not torch.equal(weight, grown["other"][name]) for name, weight in grown["first"].items())


LIGO = ("--operator=ligo", "--factor=2", "--data=tokens.bin")
GRADMAX = ("--operator=gradmax", "--factor=2", "--data=tokens.bin")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (GRADMAX[:2], 2, "give --data PATH, a folder that scripts/prepare.py made"),
        ((*GRADMAX[:2], "--data=short.bin"), 3, "make no sample of block_size=16"),
        ((*GRADMAX, "--batch-size=21"), 3, "lower --batch-size"),
        ((*GRADMAX, "--batch-size=0"), 2, "batch_size=0 must be at least 1"),
        ((*GRADMAX, "--learn-steps=9"), 2, "and not learn_steps"),
        ((*LIGO, "--learn-rate=0"), 2, "learn_rate=0.0 must be a positive number"),
        ((*LIGO, "--learn-rate=1e30", "--learn-steps=9"), 4, "Lower --learn-rate (now 1e+30)"),
        (
            (*LIGO[::2], "--n-embd=32", "--learn-rate=1e30", "--learn-steps=1"),
            4,
            "ended in weights that are no numbers",
        ),
        ((*LIGO, "--optimizer-policy=map"), 2, "use 'reset'"),
        (("--operator=lemon", "--n-layer=4", "--data=tokens.bin"), 2, "lemon reads no data"),
    ],
)
def test_what_cannot_be_learned_exits_with_one_message_and_writes_nothing(
    capsys, model_folder, tokens, tmp_path, monkeypatch, arguments, code, message
):
    write_token_file(tmp_path / "short.bin", np.arange(5), np.dtype("u2"))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    found, out, err = grow(capsys, "apply", "model", "grown", *arguments, "--json")

    assert (found, out) == (code, "") and err.startswith("error: ") and message in err
    assert sorted(tmp_path.rglob("*")) == before


def test_growth_to_the_same_sizes_needs_no_data_for_noise_either():
    plan = plan_growth("learn-depth", CONFIG, factor=1, noise=0.1)
    grown = grow_weights(plan, toy_weights(CONFIG))
    assert not torch.equal(grown["lm_head.weight"], toy_weights(CONFIG)["lm_head.weight"])


def test_growth_to_the_same_sizes_needs_no_data(capsys, model_folder, tmp_path):
    assert grow(capsys, "apply", model_folder, tmp_path / "grown", "--operator=learn-depth", "--factor=1")[0] == 0
    weights = read_weights(tmp_path / "grown")
    assert all(torch.equal(weights[name], weight) for name, weight in toy_weights(CONFIG).items())


def test_a_plan_stored_before_operators_read_data_is_still_read():
    values = plan_growth("stack", toy_config(), factor=2).to_dict()
    del values["data"]
    assert GrowthPlan.from_dict(values).data == {} and isinstance(GrowthPlan.from_dict(values).dst, Config)


def test_the_loss_before_and_after_learning_is_that_of_one_batch_that_it_did_not_learn_from(tmp_path):
    config = toy_config()
    write_token_file(tmp_path / "tokens.bin", np.arange(400) % 19, np.dtype("u2"))
    samples = open_samples(tmp_path / "tokens.bin", config)
    weights = toy_weights(config)
    plan = plan_growth("learn-depth", config, n_layer=3, learn_steps=2, batch_size=2)
    held = samples.batch(4, 2)

    made = make_weights(plan, weights, samples=samples)

    grown = GPT(plan.dst)
    grown.load_state_dict(dict(made.weights))
    with torch.no_grad():
        before = LearnedGrowth(plan, weights)(held[:, :-1], held[:, 1:]).item()
        after = grown(held[:, :-1], held[:, 1:]).item()
    assert made.plan.data["first_loss"] == pytest.approx(before, rel=1e-5)
    assert made.plan.data["last_loss"] == pytest.approx(after, rel=1e-5)
