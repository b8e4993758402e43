"""The `grow` command: what it prints, its JSON, its exit codes, and that it never fails with a traceback."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from grow.__main__ import COMMANDS, main
from grow.layer_map import draw_layer_map
from grow.operators import plan_growth
from grow.plan import Reference
from grow.registry import OPERATORS
from lit_gpt.checkpoint import read_exchange, read_weights, write_exchange, write_training
from lit_gpt.flops import count_parameters
from lit_gpt.packed_dataset import write_token_file
from tests.toys import toy_config, toy_weights


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder with two checkpoints, the later one damaged."""
    config = toy_config()
    flops = {"paper": 6e9, "model": 4e9, "palm": 5e9}
    state = {"model_config": config.to_dict(), "step_count": 3, "tokens": 1000, "flops": flops, "history": []}
    moments = {
        name: {"exp_avg": weight, "exp_avg_sq": weight.square(), "step": torch.tensor(3.0)}
        for name, weight in toy_weights(config).items()
    }
    folder = tmp_path / "run" / "checkpoints" / "stage-01"
    for step in (3, 4):
        write_training(folder / f"step-{step:010d}", toy_weights(config), moments, state)
    (folder / "step-0000000004" / "state.json").write_text("{}")
    return tmp_path / "run"


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    config = toy_config(vocab_size=20)
    return write_exchange(tmp_path / "model", config, toy_weights(config))


def grow(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    return code, out, err


def grow_json(capsys, *arguments: object):
    code, out, err = grow(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_map_shows_layers_seams_and_connection_rate(capsys):
    code, out, _ = grow(capsys, "map", "12-3456*5-56")

    assert code == 0
    assert "24 layers" in out and "1 2 3 4 5 6 | 3 4 5 6 | 3 4 5 6" in out and "18/23 = 78.3%" in out


def test_map_says_which_layers_are_left_out(capsys):
    _, out, _ = grow(capsys, "map", "12*3", "--n-layer-src", 4)
    assert "not used    3, 4" in out


def test_map_prints_one_json_object(capsys):
    found = grow_json(capsys, "map", "12-3456*5-56", "--n_layer_src", 6, "--n_layer=24")
    assert found == {
        "layers": [0, 1, *[2, 3, 4, 5] * 5, 4, 5],
        "n_layer": 24,
        "connection_rate": "18/23",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("12-",), "error: layer map: a layer is missing here"),
        (("127", "--n-layer-src", 6), "there is no layer 7"),
        (("123*2", "--n-layer", 7), "has 6 layers, but n_layer=7"),
        (("12", "--n-layers", 6), "did you mean --n-layer?"),
        (("12", "34"), "unknown argument 34"),
        ((), "the following arguments are required: MAP"),
    ],
)
def test_bad_maps_exit_with_2_and_one_message(capsys, arguments, message):
    code, out, err = grow(capsys, "map", *arguments)

    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err


def test_no_command_and_a_wrong_one_exit_with_2(capsys):
    assert grow(capsys)[0] == 2
    code, _, err = grow(capsys, "shrink")
    assert code == 2 and "shrink" in err


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"report"}))
def test_every_command_has_help(capsys, name):
    code, out, _ = grow(capsys, name, "--help")
    assert code == 0 and out.startswith(f"usage: grow {name}") and "--json" in out


def test_map_and_help_start_without_torch():
    for arguments in (["--help"], ["apply", "--help"], ["map", "123*4"], ["operators"]):
        code = (
            "import sys\nfrom grow.__main__ import main\n"
            f"try: main({arguments})\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0, arguments


def test_operators_are_listed_with_what_they_are(capsys):
    listed = {entry["name"]: entry for entry in grow_json(capsys, "operators")}

    assert list(listed) == list(OPERATORS)
    assert listed["stack"]["axis"] == "depth" and listed["stack"]["paper"] == "arXiv 2405.15319"
    assert (listed["stack"]["preserves"], listed["stack"]["function"]) == (False, "no")
    assert (listed["llama-pro"]["preserves"], listed["llama-pro"]["function"]) == (True, "bitwise")
    assert listed["llama-pro"]["trained"] == "new layers"
    out = grow(capsys, "operators")[1]
    for words in ("gstack", "bit for bit", "not the function", "arXiv 2401.02415", "scratch: it grows nothing"):
        assert words in out


def test_the_page_about_operators_has_the_tables_of_the_registry(capsys):
    code, out, _ = grow(capsys, "operators", "--markdown")
    page = (Path(__file__).parents[2] / "docs" / "operators.md").read_text()

    assert code == 0
    for table in out.strip().split("\n\n"):
        assert table in page, "write the output of `grow operators --markdown` into docs/operators.md"


PICTURE = re.compile(r"^([a-z-]+) +([1-9]+) -> +(\d+)   ([\d|()\[\]+ new]+?)(?:   .*)?$", re.MULTILINE)


def test_the_pictures_of_the_page_are_what_the_operators_draw():
    page = (Path(__file__).parents[2] / "docs" / "operators.md").read_text()
    pictures = PICTURE.findall(page)

    assert len(pictures) == 16
    for name, n_layer_src, n_layer_dst, picture in pictures:
        src = toy_config(n_layer=int(n_layer_src))
        layer_map = "12-345*3-6" if name == "partial" else None
        appends = name == "inheritune" and int(n_layer_dst) > src.n_layer
        reference = Reference(toy_config(n_layer=6), "sha", "large") if appends else None
        plan = plan_growth(name, src, n_layer=int(n_layer_dst), layer_map=layer_map, reference=reference)
        assert [picture.strip()] == draw_layer_map(plan.layer_map, **plan.marks)


def test_apply_grows_the_latest_valid_checkpoint_of_a_run(capsys, run_folder, tmp_path, caplog):
    code, out, err = grow(
        capsys, "apply", run_folder, tmp_path / "grown", "--operator", "gstack", "--factor", 2, "--optimizer_policy=map"
    )

    assert (code, err) == (0, "")
    assert "step-0000000004" in caplog.text, "a skipped checkpoint must be said loudly"
    for words in ("stack: 2 -> 4 layers", "1 2 | 1 2", "2/3 = 66.7%", "not the function", "1,000 tokens, 6e+09 FLOPs"):
        assert words in out
    found = grow_json(capsys, "inspect", tmp_path / "grown", "--verify")
    assert found["config"]["n_layer"] == 4 and found["verified"] is True
    assert found["history"][0]["parent_path_name"] == "step-0000000003"
    assert found["parameters"] == count_parameters(toy_config(n_layer=4))


def test_apply_prints_its_receipt_as_json(capsys, model_folder, tmp_path):
    receipt = grow_json(
        capsys, "apply", model_folder, tmp_path / "grown", "--operator", "partial", "--layer-map", "1-12"
    )
    assert receipt["layer_map"] == [0, 0, 1] and receipt["connection_rate"] == "1/2"
    assert receipt["destination"] == str(tmp_path / "grown") and (tmp_path / "grown" / "growth.json").is_file()


def test_a_receipt_does_not_ask_for_a_cost_that_nobody_recorded(capsys, tmp_path):
    folder = write_exchange(tmp_path / "model", toy_config(), toy_weights(toy_config()), provenance={"tokens": 2})
    code, out, _ = grow(capsys, "apply", folder, tmp_path / "grown", "--operator", "stack", "--factor", 2)
    assert code == 0 and "manifest" in out and "behind it" not in out


def test_a_dry_run_refuses_a_policy_that_the_growth_would_refuse(capsys, model_folder, tmp_path):
    arguments = ("apply", model_folder, tmp_path / "grown", "--operator", "learn-depth", "--n-layer", 4, "--dry-run")
    assert grow(capsys, *arguments)[0] == 0
    code, out, err = grow(capsys, *arguments, "--optimizer-policy", "map")
    assert code == 2 and not out and "'map' does not go with learn-depth" in err


def test_a_dry_run_writes_nothing(capsys, model_folder, tmp_path):
    arguments = ("apply", model_folder, tmp_path / "grown", "--operator=stack", "--n-layer=4", "--dry-run")

    code, out, _ = grow(capsys, *arguments)
    shown = grow_json(capsys, *arguments)

    assert code == 0 and "dry run: nothing was written" in out
    assert shown["dry_run"] is True and shown["layer_map"] == [0, 1, 0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_methods_of_prts_noise_and_a_wider_dtype_are_understood(capsys, tmp_path):
    config = toy_config(vocab_size=20)
    write_exchange(tmp_path / "model", config, toy_weights(config, dtype=torch.bfloat16))
    arguments = ("--method", "zero_depth", "--n-layer", 3, "--dtype", "float32")

    receipt = grow_json(capsys, "apply", tmp_path / "model", tmp_path / "grown", *arguments)
    noisy = grow_json(capsys, "apply", tmp_path / "model", tmp_path / "noisy", *arguments, "--noise=0.1", "--seed=3")

    assert (receipt["operator"], receipt["function"], receipt["preserves"]) == ("zero-depth", "bitwise", True)
    assert (noisy["function"], noisy["preserves"]) == ("no", False)
    src, dst = read_weights(tmp_path / "model"), read_weights(tmp_path / "grown")
    assert {weight.dtype for weight in dst.values()} == {torch.float32}
    assert all(torch.equal(dst[name], weight.float()) for name, weight in src.items() if ".h." not in name)
    assert not torch.equal(read_weights(tmp_path / "noisy")["lm_head.weight"], dst["lm_head.weight"])


def test_apply_shows_identity_layers_new_ones_and_what_is_preserved(capsys, model_folder, tmp_path):
    arguments = ("apply", model_folder, tmp_path / "grown", "--dry-run", "--n-layer", 4, "--operator")
    code, out, _ = grow(capsys, *arguments, "llama-pro")
    assert code == 0
    for words in ("1 | (1) 2 | (2)", "proj = w3 = 0", "the function, bit for bit", "trained     new layers"):
        assert words in out
    out = grow(capsys, *arguments, "random-depth", "--seed", 5, "--noise", 0.25)[1]
    for words in ("1 2 | new | new", "initial weights, drawn with seed 5", "0.25 of every matrix", "loss jumps"):
        assert words in out


def test_apply_grows_in_width_and_says_what_it_did(capsys, model_folder, tmp_path):
    arguments = ("apply", model_folder, tmp_path / "grown", "--operator", "split-width", "--n-embd", 32)

    code, out, err = grow(capsys, *arguments, "--n_query_groups=2")

    assert (code, err) == (0, "")
    for words in ("n_embd 16 -> 32, n_head 4 -> 8", "intermediate_size 24 -> 48", "up to rounding in fp32"):
        assert words in out
    assert "layer map" not in out and "stay equal" not in out
    found = grow_json(capsys, "inspect", tmp_path / "grown", "--verify")
    assert (found["config"]["n_embd"], found["config"]["n_query_groups"], found["verified"]) == (32, 2, True)
    assert "grown by split-width: n_embd 16 -> 32" in grow(capsys, "inspect", tmp_path / "grown")[1]
    assert grow_json(capsys, "check", model_folder, tmp_path / "grown")["max_abs_logit_gap"] < 1e-4


def test_apply_says_when_copies_can_never_part(capsys, model_folder, tmp_path):
    arguments = ("apply", model_folder, tmp_path / "grown", "--operator=hypercloning", "--factor=2", "--dry-run")
    assert "copies with even shares stay equal" in grow(capsys, *arguments)[1]
    for parted in (("--twin-noise", 0.3), ("--noise", 0.1)):
        assert "copies with even shares stay equal" not in grow(capsys, *arguments, *parted)[1]
    assert grow_json(capsys, *arguments)["stays_symmetric"] is True


def test_weights_that_are_no_numbers_are_grown_only_when_allowed(capsys, tmp_path):
    config = toy_config(vocab_size=20)
    weights = toy_weights(config)
    weights["transformer.ln_f.weight"][0] = float("nan")
    write_exchange(tmp_path / "model", config, weights)
    arguments = ("apply", tmp_path / "model", tmp_path / "grown", "--operator", "stack", "--factor", 2)

    code, _, err = grow(capsys, *arguments)
    assert code == 3 and "holds NaN or infinity" in err
    assert grow(capsys, *arguments, "--allow-nonfinite")[0] == 0


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"--operator": "stak"}, 2, "did you mean 'stack'"),
        ({"--operator": "milk"}, 2, "operator 'milk' is retired"),
        ({"--operator": "learn-depth"}, 2, "learn-depth makes weights from training samples: give --data PATH"),
        ({"--operator": "gradmax", "--data": "nowhere"}, 3, "no such data; prepare some"),
        ({"--data": "text.txt"}, 2, "stack reads no data; leave --data out. Operators that do: learn-depth"),
        ({"--learn-steps": "5"}, 2, "stack takes n_layer, factor, layer_map, and not learn_steps"),
        ({"--operator": "ligo", "--learn-steps": "0"}, 2, "learn_steps=0 must be at least 1"),
        ({"--operator": "inheritune"}, 2, "1 to 2 of them, and not 4"),
        ({"--operator": "split-width", "--factor": "1.1"}, 2, "is 17.6; the result must be a whole number"),
        ({"--n-embd": "32"}, 2, "stack takes n_layer, factor, layer_map, and not n_embd"),
        ({"--noise": "2"}, 2, "noise=2.0 must be in [0, 1]"),
        ({"--factor": "1.2"}, 2, "must be a whole number"),
        ({"--layer-map": "12-3"}, 2, "there is no layer 3"),
        ({"--optimizer-policy": "map"}, 2, "needs moments"),
        ({"SRC": "nowhere"}, 3, "no such checkpoint"),
        ({"SRC": "text.txt"}, 3, "text.txt"),
        ({"DST": "model"}, 2, "lies in the source"),
        ({"DST": "taken"}, 3, "exists already"),
        ({"DST": "text.txt/grown"}, 3, "text.txt"),
    ],
)
def test_what_cannot_be_grown_exits_with_one_message_and_writes_nothing(
    capsys, model_folder, tmp_path, change, code, message
):
    (tmp_path / "text.txt").write_text("no checkpoint")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    options = {"--operator": "stack", "--factor": "2"}
    options |= {key: value for key, value in change.items() if key.startswith("-")}
    places = [tmp_path / change.get("SRC", "model"), tmp_path / change.get("DST", "grown")]

    found, out, err = grow(capsys, "apply", *places, *(word for pair in options.items() for word in pair), "--json")

    assert (found, out) == (code, "")
    assert err.startswith("error: ") and message in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_fills_up_at_the_last_moment_leaves_nothing_behind(capsys, model_folder, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", full)
        code, out, err = grow(capsys, "apply", model_folder, tmp_path / "grown", "--operator=stack", "--factor=2")
    assert code == 3 and "wrote" not in out and "disk is full" in err
    assert sorted(tmp_path.rglob("*")) == before

    assert grow(capsys, "apply", model_folder, tmp_path / "grown", "--operator=stack", "--factor=2")[0] == 0


def test_inspect_says_what_a_checkpoint_is(capsys, run_folder, model_folder):
    code, out, _ = grow(capsys, "inspect", run_folder)
    assert code == 0
    for words in ("step-0000000003 (training form)", "n_layer             2", "1,000", "never grown", "use --verify"):
        assert words in out
    found = grow_json(capsys, "inspect", model_folder)
    assert (found["form"], found["verified"], found["history"]) == ("exchange", None, [])


def test_inspect_tells_growth_history(capsys, run_folder, tmp_path):
    grow(capsys, "apply", run_folder, tmp_path / "grown", "--operator", "interpolate", "--n-layer", 3)
    _, out, _ = grow(capsys, "inspect", tmp_path / "grown")
    assert "grown by interpolate: 2 -> 3 layers after 1,000 tokens" in out and "layer map   112" in out


def test_inspect_finds_a_flipped_bit_only_when_it_looks_at_every_byte(capsys, model_folder):
    file = model_folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)

    assert grow(capsys, "inspect", model_folder)[0] == 0
    code, _, err = grow(capsys, "inspect", model_folder, "--verify")
    assert code == 3 and "model.safetensors does not have the crc32" in err


def test_inspect_does_not_claim_checksums_where_there_are_none(capsys, model_folder):
    (model_folder / "MANIFEST.json").unlink()
    assert grow_json(capsys, "inspect", model_folder, "--verify")["verified"] is False
    assert "no checksums to compare" in grow(capsys, "inspect", model_folder, "--verify")[1]


def test_a_run_without_a_valid_checkpoint_is_an_error(capsys, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    code, _, err = grow(capsys, "inspect", tmp_path / "run")
    assert code == 3 and "holds no valid checkpoint" in err


def test_check_measures_the_gap_and_names_what_would_not_train(capsys, model_folder, tmp_path):
    grow(capsys, "apply", model_folder, tmp_path / "grown", "--operator", "stack", "--factor", 2)
    write_token_file(tmp_path / "tokens.bin", np.arange(200) % 20, np.dtype("u2"))

    same = grow_json(capsys, "check", model_folder, model_folder)
    grown = grow_json(capsys, "check", model_folder, tmp_path / "grown", "--tokens", tmp_path / "tokens.bin")
    _, out, _ = grow(capsys, "check", model_folder, tmp_path / "grown")

    assert same["max_abs_logit_gap"] == 0 and same["zero_gradient"] == []
    assert grown["max_abs_logit_gap"] > 0.1 and grown["n_tokens"] == 32
    assert "largest logit gap" in out and "without gradient    0 tensors" in out


def test_check_says_whether_the_history_promises_the_function(capsys, model_folder, tmp_path):
    for operator in ("stack", "llama-pro", "split-width"):
        grow(capsys, "apply", model_folder, tmp_path / operator, "--operator", operator, "--factor", 2)
    verdicts = {
        path.name: grow_json(capsys, "check", model_folder, path)["verdict"]
        for path in (tmp_path / "stack", tmp_path / "llama-pro", tmp_path / "split-width", model_folder)
    }

    assert verdicts["stack"].startswith("not kept, and not expected to be: stack keeps the weights")
    assert verdicts["llama-pro"].startswith("kept, to the bit, as expected: llama-pro keeps the function")
    assert verdicts["split-width"].startswith("kept, up to rounding, as expected: ")
    assert "does not name SRC as a parent" in verdicts["model"]
    assert "(after the first step)" in grow(capsys, "check", model_folder, tmp_path / "llama-pro")[1]


def test_check_says_it_when_a_promise_is_broken(capsys, model_folder, tmp_path):
    grow(capsys, "apply", model_folder, tmp_path / "grown", "--operator", "llama-pro", "--factor", 2)
    found = read_exchange(tmp_path / "grown")
    weights = {**dict(found.weights), "lm_head.weight": found.weights["lm_head.weight"] + 1}
    write_exchange(tmp_path / "changed", found.config, weights, provenance=found.provenance)

    assert "NOT KEPT, although llama-pro" in grow(capsys, "check", model_folder, tmp_path / "changed")[1]


def test_check_compares_weights_that_are_no_numbers_only_when_allowed(capsys, tmp_path):
    config = toy_config(vocab_size=20)
    weights = {**toy_weights(config), "transformer.ln_f.weight": torch.full((16,), float("nan"))}
    write_exchange(tmp_path / "model", config, weights)

    assert grow(capsys, "check", tmp_path / "model", tmp_path / "model")[0] == 3
    code, out, _ = grow(capsys, "check", tmp_path / "model", tmp_path / "model", "--allow-nonfinite")
    assert code == 0 and "largest logit gap   nan" in out


def test_a_policy_that_needs_moments_is_refused_before_a_plan_is_shown(capsys, model_folder, tmp_path):
    arguments = ("apply", model_folder, tmp_path / "grown", "--operator", "stack", "--factor", 2, "--dry-run")
    code, out, err = grow(capsys, *arguments, "--optimizer-policy", "map")
    assert (code, out) == (2, "") and "needs moments, and the source has none" in err


def test_growth_that_changes_nothing_says_that_it_copies(capsys, model_folder, tmp_path):
    arguments = ("apply", model_folder, tmp_path / "grown", "--operator", "stack", "--dry-run", "--factor")
    assert "nothing grows: what is written is a copy" in grow(capsys, *arguments, 1)[1]
    assert "nothing grows" not in grow(capsys, *arguments, 2)[1]


def test_what_is_kept_of_a_model_whose_layers_are_all_new_is_said(capsys, model_folder, tmp_path):
    arguments = ("apply", model_folder, tmp_path / "grown", "--dry-run", "--n-layer", 4, "--operator")
    assert "embedding, final norm and head alone" in grow(capsys, *arguments, "zero-layer")[1]
    assert "nothing, for every weight is new" in grow(capsys, *arguments, "distill")[1]
    assert grow_json(capsys, *arguments, "distill")["preserves"] is False


def test_the_checkpoints_of_a_run_are_no_place_for_others(capsys, run_folder, model_folder, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    for place in ("stage-02/step-0000000001", "grown"):
        dst = run_folder / "checkpoints" / place
        code, _, err = grow(capsys, "apply", model_folder, dst, "--operator", "stack", "--factor", 2)
        assert code == 2 and "lies among the checkpoints of the run" in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_growth_that_fails_leaves_no_folders_behind(capsys, tmp_path):
    config = toy_config(vocab_size=20)
    weights = {**toy_weights(config), "transformer.ln_f.weight": torch.full((16,), float("nan"))}
    write_exchange(tmp_path / "model", config, weights)
    code, _, _ = grow(capsys, "apply", tmp_path / "model", tmp_path / "a/b/c", "--operator", "stack", "--factor", 2)
    assert code == 3 and sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_folder_of_token_files_is_not_taken_for_a_checkpoint(capsys, tmp_path):
    write_token_file(tmp_path / "train_000000.bin", np.arange(200) % 20, np.dtype("u2"))
    (tmp_path / "manifest.json").write_text("{}")
    code, _, err = grow(capsys, "inspect", tmp_path)
    assert code == 3 and "is a folder of token files" in err and "pickle" not in err


def test_operators_for_both_axes_take_a_factor_of_the_width(capsys, model_folder, tmp_path):
    arguments = ("apply", model_folder, tmp_path / "grown", "--dry-run", "--factor", 2, "--n-layer", 3, "--operator")
    for operator in ("lemon", "fpi", "aki", "aki-pro", "distill", "learn-width"):
        assert "2 -> 3 layers, n_embd 16 -> 32" in grow(capsys, *arguments, operator)[1]
