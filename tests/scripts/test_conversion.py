"""convert_hf_checkpoint.py, convert_lit_checkpoint.py and generate.py as a user starts them."""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grow.apply import grow_checkpoint
from grow.operators import plan_growth
from lit_gpt import conversion
from lit_gpt.axes import HEAD, parameter_shapes
from lit_gpt.checkpoint import (
    TRAINING,
    detect_form,
    read_config,
    read_exchange,
    read_training,
    read_weights,
    verify,
    write_training,
)
from lit_gpt.config import Config
from lit_gpt.conversion import tokenizer_place
from lit_gpt.errors import run_command
from lit_gpt.exchange import write_exchange
from lit_gpt.flops import flops_per_token
from lit_gpt.generate import generate, load_for_inference
from lit_gpt.legacy import read_legacy
from lit_gpt.legacy_sizes import Sizes
from lit_gpt.tokenizer import Tokenizer
from tests.toys import toy_config, toy_weights

CONFIG = toy_config(n_layer=3, padded_vocab_size=19)
BYTES = Tokenizer.load("bytes").vocab_size


@pytest.fixture
def script(root, monkeypatch, capsys):
    """Run one of the scripts in this process; gives (exit code, stdout, stderr)."""
    monkeypatch.syspath_prepend(str(root / "scripts"))

    def call(name: str, *arguments: object) -> tuple[int, str, str]:
        module = importlib.import_module(name)
        capsys.readouterr()
        code = run_command(lambda: module.main([str(argument) for argument in arguments]))
        return code, *capsys.readouterr()

    return call


def same_weights(path: Path, wanted: dict[str, torch.Tensor]) -> bool:
    found = read_weights(path)
    return set(found) == set(wanted) and all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def foreign_folder(path: Path, config: Config = CONFIG) -> Path:
    write_exchange(path, config, toy_weights(config))
    for name in ("MANIFEST.json", "lit_config.json"):
        (path / name).unlink()
    return path


def training_form(path: Path, config: Config = CONFIG) -> Path:
    state = {"model_config": config.to_dict(), "step_count": 12, "iter_num": 48, "tokens": 9000, "history": []}
    return write_training(path, toy_weights(config), {}, state)


# Receipts


def test_a_hugging_face_folder_becomes_exchange_form_with_a_receipt(script, tmp_path):
    pytest.importorskip("transformers")
    source = foreign_folder(tmp_path / "source")

    code, out, _ = script("convert_hf_checkpoint", source, tmp_path / "out")

    assert code == 0
    assert same_weights(tmp_path / "out", toy_weights(CONFIG)) and verify(tmp_path / "out") == []
    receipt = json.loads((tmp_path / "out.receipt.json").read_text())
    assert receipt["tensors"] == {"mapped": len(read_exchange(source).stored), "unmapped": 0, "left_out": []}
    assert receipt["parity"]["against"] == "transformers"
    assert receipt["parity"]["random"]["max_abs_logit_gap"] <= 1e-5 * receipt["parity"]["random"]["max_abs_logit"]
    assert receipt["parity"]["random"]["top1_agreement"] == 1.0
    digest = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    assert digest in [each["sha256"] for each in receipt["inputs"]] and digest in out
    assert "unmapped, 0 left out" in out and "top-1 agreement 100.00%" in out


def test_special_tokens_that_only_the_config_knows_come_along_through_conversion_and_growth(script, tmp_path):
    from grow.apply import grow_checkpoint
    from grow.operators import plan_growth

    source = foreign_folder(tmp_path / "source")
    (source / "generation_config.json").unlink()
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "bos_token_id": 3, "eos_token_id": [4, 5]}))

    assert script("convert_hf_checkpoint", source, tmp_path / "out", "--parity", "never")[0] == 0
    grow_checkpoint(tmp_path / "out", tmp_path / "grown", plan_growth("stack", CONFIG, factor=2))

    for name in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / "grown" / name).read_text())
        assert (found["bos_token_id"], found["eos_token_id"]) == (3, [4, 5])


def test_what_is_left_out_is_named(script, tmp_path):
    from safetensors.torch import load_file, save_file

    source = foreign_folder(tmp_path / "source", toy_config(n_layer=1, tie_embeddings=True))
    tensors = load_file(source / "model.safetensors")
    tensors |= {"lm_head.weight": torch.ones(20, 16), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})

    code, out, _ = script("convert_hf_checkpoint", source, tmp_path / "out", "--parity", "never", "--json")

    assert code == 0
    assert json.loads(out)["tensors"]["left_out"] == [
        "lm_head.weight (the embedding, to which the head is tied)",
        "model.layers.0.self_attn.rotary_emb.inv_freq (a table that is computed)",
    ]


def test_a_text_is_compared_too_where_there_is_a_tokenizer(script, tmp_path):
    config = toy_config(vocab_size=BYTES, padded_vocab_size=BYTES)
    source = training_form(tmp_path / "source", config)
    Tokenizer.load("bytes").save(tmp_path)

    code, out, _ = script("convert_lit_checkpoint", source, tmp_path / "out", "--tokenizer", tmp_path, "--json")

    assert code == 0
    assert json.loads(out)["parity"]["text"]["tokens"] == config.block_size
    assert (tmp_path / "out" / "tokenizer_bytes.json").is_file()


def test_logits_that_differ_are_an_error_that_says_so(script, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "has_transformers", lambda: False)
    monkeypatch.setattr(
        conversion, "read_exchange", lambda path: read_exchange(other if path.name == ".out.unchecked" else path)
    )
    source, other = foreign_folder(tmp_path / "source"), tmp_path / "other"
    write_exchange(other, CONFIG, toy_weights(CONFIG, seed=1))

    code, out, _ = script("convert_hf_checkpoint", source, tmp_path / "out")

    assert code == 3
    assert "against this model, read back" in out and "WRONG      the logits of the random batch differ" in out
    assert sorted(each.name for each in tmp_path.glob("out*")) == ["out.wrong", "out.wrong.receipt.json"]


def test_a_conversion_that_ends_before_it_was_compared_leaves_nothing_under_its_name(script, tmp_path, monkeypatch):
    source, out = foreign_folder(tmp_path / "source"), tmp_path / "out"
    with monkeypatch.context() as broken:
        broken.setattr(conversion, "_parity", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            script("convert_hf_checkpoint", source, out)
    assert [each.name for each in tmp_path.glob("*out*")] == [".out.unchecked"]

    code, printed, _ = script("convert_hf_checkpoint", source, out)

    assert code == 0 and "tokenizer  none was found" in printed
    assert sorted(each.name for each in tmp_path.glob("*out*")) == ["out", "out.receipt.json"]


def test_a_file_that_was_written_here_knows_its_sizes(script, tmp_path):
    config = toy_config(n_layer=1, block_size=48)
    source = training_form(tmp_path / "source", config)

    assert script("convert_lit_checkpoint", source, tmp_path / "lit.pth")[0] == 0

    assert read_config(tmp_path / "lit.pth") == config


def test_a_grown_checkpoint_still_finds_the_tokenizer_of_its_data(tmp_path):
    data = {"train": str(tmp_path / "data"), "tokenizer": None}
    (tmp_path / "data").mkdir()
    Tokenizer.load("bytes").save(tmp_path / "data")
    config = toy_config(n_layer=1)
    state = {"model_config": config.to_dict(), "run_config": {"data": data}, "history": [], "flops": {}}
    state |= {"tokens": 0, "step_count": 0}
    source = write_training(tmp_path / "source", toy_weights(config), {}, state)

    grow_checkpoint(source, tmp_path / "grown", plan_growth("stack", config, n_layer=2))

    assert tokenizer_place(tmp_path / "grown", read_training(tmp_path / "grown").state) == tmp_path / "data"


def test_two_models_that_do_not_fit_in_memory_are_not_compared(script, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_gpt.parity.available_bytes", lambda: 1000)

    _, out, _ = script("convert_hf_checkpoint", foreign_folder(tmp_path / "source"), tmp_path / "out")

    assert "parity     not measured: two models of" in out


# Forms


def test_training_form_becomes_what_hugging_face_loads(script, tmp_path):
    transformers = pytest.importorskip("transformers")

    code, _, _ = script(
        "convert_lit_checkpoint", training_form(tmp_path / "step"), tmp_path / "out", "--dtype", "bfloat16"
    )

    assert code == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    provenance = json.loads((tmp_path / "out" / "growth.json").read_text())
    assert provenance["tokens"] == 9000 and provenance["converted_from"]["folder"] == "step"


def test_what_training_cost_goes_along_parents_included(script, tmp_path):
    flops = {"paper": 6.0, "model": 4.0, "palm": 5.0}
    cost = {"tokens": 10, "parent_tokens": 5, "flops": flops, "parent_flops": dict.fromkeys(flops, 1.0)}
    state = {"format": 1, "model_config": CONFIG.to_dict(), "step_count": 7, **cost}
    source = write_training(tmp_path / "step", toy_weights(CONFIG), {}, state)
    assert script("convert_lit_checkpoint", source, tmp_path / "out")[0] == 0
    provenance = read_exchange(tmp_path / "out").provenance
    assert (provenance["tokens"], provenance["flops_total"]) == (15, 7.0)
    assert (provenance["flops_model"], provenance["flops_palm"]) == (5.0, 6.0)


def test_what_the_training_of_a_file_of_the_lineage_cost_goes_along(script, tmp_path):
    config = Config.from_name("tiny_LLaMA_120M", n_layer=1, vocab_size=64)
    run = {"hparams": {"micro_batch_size": 2, "devices": 3, "num_nodes": 1}, "iter_num": 10}
    torch.save({"model": toy_weights(config), **run}, tmp_path / "iter-000010-ckpt.pth")

    assert (
        script("convert_hf_checkpoint", tmp_path / "iter-000010-ckpt.pth", tmp_path / "out", "--parity", "never")[0]
        == 0
    )

    provenance = read_exchange(tmp_path / "out").provenance
    assert provenance["tokens"] == 10 * 2 * 3 * 2048
    assert provenance["flops_total"] == flops_per_token(config).times(provenance["tokens"]).paper


def test_the_growth_history_of_a_training_checkpoint_goes_along(script, tmp_path):
    flops = {"paper": 6.0, "model": 4.0, "palm": 5.0}
    state = {
        "format": 1,
        "model_config": CONFIG.to_dict(),
        "step_count": 7,
        "tokens": 10,
        "flops": flops,
        "history": [],
    }
    write_training(tmp_path / "small", toy_weights(CONFIG), {}, state)
    grow_checkpoint(tmp_path / "small", tmp_path / "grown", plan_growth("stack", CONFIG, factor=2))

    assert script("convert_lit_checkpoint", tmp_path / "grown", tmp_path / "out")[0] == 0

    (record,) = read_exchange(tmp_path / "out").provenance["history"]
    assert (record["operator"], record["tokens"], record["flops_total"]) == ("stack", 10, 6.0)


def test_weights_behind_a_mask_that_still_opens_are_not_converted(script, tmp_path):
    state = {"format": 1, "model_config": CONFIG.to_dict(), "mask": {"layers": 0.5}}
    source = write_training(tmp_path / "step", toy_weights(CONFIG), {}, state)
    code, _, err = script("convert_lit_checkpoint", source, tmp_path / "out")
    assert code == 3 and "still opening" in err and not (tmp_path / "out").exists()


def test_the_tokenizer_of_a_run_goes_along_if_it_is_still_the_same(script, tmp_path):
    config = toy_config(vocab_size=BYTES, padded_vocab_size=BYTES)
    data, tokenizer = tmp_path / "data", Tokenizer.load("bytes")
    data.mkdir()
    tokenizer.save(data)
    state = {"model_config": config.to_dict(), "run_config": {"data": {"train": str(data)}}, "history": []}
    for name, digest in (("same", tokenizer.fingerprint), ("other", "0" * 64)):
        write_training(tmp_path / name, toy_weights(config), {}, {**state, "tokenizer": {"sha256": digest}})
        code, _, err = script("convert_lit_checkpoint", tmp_path / name, tmp_path / f"{name}-out", "--parity", "never")
        assert code == 0, err

    assert (tmp_path / "same-out" / "tokenizer_bytes.json").is_file()
    assert not (tmp_path / "other-out" / "tokenizer_bytes.json").exists()


def test_a_file_for_the_lineage_is_what_its_tools_load(script, tmp_path):
    source = training_form(tmp_path / "step")

    code, _, _ = script("convert_lit_checkpoint", source, tmp_path / "lit_model.pth")

    assert code == 0
    loaded = torch.load(tmp_path / "lit_model.pth", weights_only=True)
    assert list(loaded["model"])[:2] == [HEAD, "transformer.wte.weight"]
    assert {name: tuple(each.shape) for name, each in loaded["model"].items()} == parameter_shapes(CONFIG)
    assert (loaded["step_count"], loaded["iter_num"]) == (12, 48)
    assert same_weights_of_legacy(tmp_path / "lit_model.pth")


def same_weights_of_legacy(path: Path) -> bool:
    found = read_legacy(path, Sizes(n_head=CONFIG.n_head)).model
    return all(torch.equal(found[name], tensor) for name, tensor in toy_weights(CONFIG).items())


def test_a_tied_head_is_written_out_for_tools_that_know_no_other(script, tmp_path):
    source = training_form(tmp_path / "step", toy_config(tie_embeddings=True))

    assert script("convert_lit_checkpoint", source, tmp_path / "out.pth")[0] == 0

    loaded = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert torch.equal(loaded[HEAD], loaded["transformer.wte.weight"])


def test_every_tensor_keeps_its_own_dtype_in_a_file_for_the_lineage(script, tmp_path):
    weights = toy_weights(CONFIG)
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"].bfloat16()
    source = write_exchange(tmp_path / "source", CONFIG, weights)

    assert script("convert_lit_checkpoint", source, tmp_path / "out.pth", "--parity", "never")[0] == 0

    loaded = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert all(
        torch.equal(loaded[name], weight) and loaded[name].dtype == weight.dtype for name, weight in weights.items()
    )


def test_queries_and_keys_of_two_dtypes_in_a_pickle_are_fused_in_the_wider_one(script, tmp_path):
    folder = foreign_folder(tmp_path / "source")
    stored = load_file(folder / "model.safetensors")
    stored = {name: weight.bfloat16() if "q_proj" in name else weight for name, weight in stored.items()}
    torch.save(stored, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()

    code, _, err = script("convert_hf_checkpoint", folder, tmp_path / "out", "--parity", "never")

    assert code == 0, err
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == stored.keys()


@pytest.mark.parametrize(
    "sizes",
    [
        *({"qkv_bias": True}, {"qk_norm": "head"}, {"rope_base": 5e5}, {"sliding_window": 8}),
        *({"norm_eps": 1e-6}, {"head_size": 12}, {"rotary_percentage": 0.5, "family": "phi3"}),
    ],
)
def test_a_model_that_the_lineage_cannot_say_is_refused(script, tmp_path, sizes):
    source = training_form(tmp_path / "step", toy_config(**sizes))

    code, _, err = script("convert_lit_checkpoint", source, tmp_path / "out.pth")

    assert code == 2 and f"have no {next(iter(sizes))}=" in err
    assert not (tmp_path / "out.pth").exists()


def test_there_and_back_through_every_form_changes_no_bit(script, tmp_path):
    folder = foreign_folder(tmp_path / "source")
    never = ("--parity", "never")

    assert script("convert_lit_checkpoint", folder, tmp_path / "a.pth", *never)[0] == 0
    assert script("convert_hf_checkpoint", tmp_path / "a.pth", tmp_path / "b", "--n-head", "4", *never)[0] == 0
    assert script("convert_hf_checkpoint", tmp_path / "b", tmp_path / "c", *never)[0] == 0

    assert (tmp_path / "c" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_the_real_model_of_llama2c_is_converted_with_its_tokenizer(script, tmp_path, data_dir):
    code, out, _ = script("convert_hf_checkpoint", data_dir("checkpoints/stories260K"), tmp_path / "out")

    assert code == 0 and "(llama2.c)" in out and "parity     text" in out
    assert Tokenizer.load(tmp_path / "out").vocab_size == 512


# The lineage's arguments


def test_tinyllamas_arguments_into_its_own_form(script, tmp_path):
    folder = foreign_folder(tmp_path / "folder")

    code, _, _ = script("convert_hf_checkpoint", "--checkpoint_dir", folder, "--dtype", "float32")

    assert code == 0 and same_weights_of_legacy(folder / "lit_model.pth")


def test_tinyllamas_arguments_out_of_its_own_form(script, tmp_path):
    config = Config.from_name("tiny_LLaMA_120M", n_layer=1, vocab_size=64)
    torch.save({"model": toy_weights(config)}, tmp_path / "iter-000010-ckpt.pth")

    flags = ("--out_dir", tmp_path, "--checkpoint_name", "iter-000010-ckpt.pth", "--model_only", "true")
    code, _, err = script("convert_lit_checkpoint", *flags, "--parity", "never")

    assert code == 0, err
    assert read_config(tmp_path / "iter-000010-ckpt-hf").n_query_groups == 1


def test_sizes_that_contradict_a_folder_are_refused(script, tmp_path):
    folder = foreign_folder(tmp_path / "folder")

    code, _, err = script("convert_hf_checkpoint", folder, tmp_path / "out", "--model_name", "tiny_LLaMA_1b")

    assert code == 2 and "n_layer 22 given, 3 there" in err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.receipt.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nowhere", "out"), 3, "no such checkpoint"),
        ((), 2, "give SRC and DST"),
        (("folder", "folder"), 3, "exists already"),
        (("folder", "out", "--dtype", "int8"), 2, "--dtype int8 is unknown; known: float32"),
    ],
)
def test_mistakes_end_in_one_error_and_leave_nothing(script, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    foreign_folder(tmp_path / "folder")
    before = sorted(tmp_path.iterdir())

    found, _, err = script("convert_hf_checkpoint", *arguments)

    assert found == code and message in err and err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


# Growing what others made


def test_a_file_of_the_lineage_grows_into_training_form_with_moments_and_exchange_form_without(tmp_path):
    from grow.apply import grow_checkpoint
    from grow.operators import plan_growth

    config = Config.from_name("tiny_LLaMA_120M", n_layer=1, vocab_size=64)
    weights = toy_weights(config)
    moments = {
        name: {"exp_avg": weight, "exp_avg_sq": weight.square(), "step": torch.tensor(5.0)}
        for name, weight in weights.items()
    }
    torch.save({"model": weights, "optimizer": {"state": moments}, "step_count": 5}, tmp_path / "run.pth")
    torch.save({"model": weights}, tmp_path / "weights.pth")
    plan = plan_growth("stack", read_config(tmp_path / "run.pth"), n_layer=2)

    receipt = grow_checkpoint(tmp_path / "run.pth", tmp_path / "grown", plan, "map")
    grow_checkpoint(tmp_path / "weights.pth", tmp_path / "grown-hf", plan)

    assert detect_form(tmp_path / "grown") == TRAINING
    assert receipt["parent"] == hashlib.sha256((tmp_path / "run.pth").read_bytes()).hexdigest()
    for path in (tmp_path / "grown", tmp_path / "grown-hf"):
        assert torch.equal(
            read_weights(path)["transformer.h.1.attn.attn.weight"], weights["transformer.h.0.attn.attn.weight"]
        )


# generate.py


@pytest.fixture
def talker(tmp_path) -> Path:
    """A model over bytes, with its tokenizer."""
    config = toy_config(vocab_size=BYTES, padded_vocab_size=BYTES, block_size=64)
    Tokenizer.load("bytes").save(tmp_path)
    return write_exchange(tmp_path / "talker", config, toy_weights(config), tokenizer_dir=tmp_path)


def test_greedy_text_is_streamed_and_the_same_in_json(script, talker):
    flags = (talker, "--prompt", "ab", "--max-new-tokens", "20")

    code, text, err = script("generate", *flags, "--greedy")
    _, as_json, _ = script("generate", *flags, "--temperature", "0", "--json")

    assert code == 0 and text.startswith("ab") and "20 tokens in" in err
    assert json.loads(as_json)["texts"] == [text.removesuffix("\n")]


def test_seeds_and_settings_decide_the_text(script, talker):
    def texts(*flags: str) -> list[str]:
        return json.loads(script("generate", talker, "--prompt", "a", *flags, "--json")[1])["texts"]

    assert texts("--seed", "1") == texts("--seed", "1") != texts("--seed", "2")
    assert texts("--top-k", "1") == texts("--top_p", "1e-9") == texts("--greedy")
    assert texts("--num_samples", "2", "--seed", "1") == texts("--seed", "1") + texts("--seed", "2")
    assert texts("--precision", "bf16", "--greedy")[0].startswith("a")


def test_a_text_ends_with_any_of_the_ends_that_the_folder_names(script, talker):
    flags = (talker, "--prompt", "a", "--greedy", "--json")
    tokenizer = Tokenizer.load("bytes")
    prompt = [tokenizer.bos_id, *tokenizer.encode("a").tolist()]
    free = generate(load_for_inference(talker, torch.float32), prompt, 40, temperature=0)[len(prompt) :]
    end = next(i for i, each in enumerate(free) if i > 3 and each not in free[:i])
    (talker / "MANIFEST.json").unlink()
    (talker / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, free[end]]}))

    assert json.loads(script("generate", *flags)[1])["new_tokens"] == end + 1


def test_a_prompt_that_leaves_little_room_is_told_and_continued_as_far_as_it_goes(script, talker):
    code, _, err = script("generate", talker, "--prompt", "a" * 60)

    assert code == 0 and "block_size=64 leaves room for 3 tokens after the prompt" in err


def test_the_first_token_is_the_one_that_separated_documents_and_can_be_another(script, talker):
    def first(*flags: str) -> int | None:
        return json.loads(script("generate", talker, *flags, "--json", "--max-new-tokens", "1")[1])["first_id"]

    assert first() == Tokenizer.load("bytes").bos_id
    assert (first("--first-id", "2"), first("--first-id", "none", "--prompt", "a")) == (2, None)
    (talker / "MANIFEST.json").unlink()
    (talker / "growth.json").write_text(json.dumps({"separator_id": 2}))
    assert first() == 2


def test_a_checkpoint_without_a_tokenizer_asks_for_one(script, tmp_path):
    folder = foreign_folder(tmp_path / "folder")

    code, _, err = script("generate", folder)

    assert code == 3 and "has no tokenizer, nor has its training data; give --tokenizer PATH" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--device", "nope"), "--device nope is not here; this machine has cpu"),
        (("--device", "cuda:99"), "--device cuda:99 is not here"),
        (("--num-samples", "0"), "must be at least 1"),
        (("--temperature", "nan"), "temperature 0 or from"),
    ],
)
def test_settings_that_no_text_can_be_made_with_are_one_error(script, talker, flags, message):
    code, out, err = script("generate", talker, "--prompt", "a", "--json", *flags)

    assert (code, out) == (2, "") and message in err


def test_characters_of_several_tokens_are_shown_whole(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "scripts"))
    pieces = importlib.import_module("generate").pieces
    tokenizer = Tokenizer.load("bytes")
    ids = [int(each) for each in tokenizer.encode("é✓")]

    assert list(pieces(tokenizer, [1], iter(ids))) == [("é", 2), ("✓", 3)]
    assert list(pieces(tokenizer, [1], iter(ids[:1]))) == [("\ufffd", 1)]
