"""Settings: token counts, unknown keys, and everything that is wrong reported at once."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pretrain.command_line import normalise, parse
from pretrain.config import parse_token_count

MINIMAL = {
    "out_dir": "out/x",
    "model": {"name": "2L64H"},
    "data": {"train": "somewhere"},
    "stages": [{"name": "main", "max_steps": 3}],
}


@pytest.fixture
def config_file(tmp_path):
    def write(**changes):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**MINIMAL, "batch": {"global_batch_size": 8}, **changes}))
        return ["--config", str(path)]

    return write


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("10B", 10**10), ("600M", 6 * 10**8), ("20k", 20_000), ("15e12", 15 * 10**12), ("1.5m", 1_500_000), (7, 7)],
)
def test_token_counts_are_read_with_their_suffix(text, tokens):
    assert parse_token_count(text) == tokens


@given(st.integers(1, 999), st.integers(0, 999), st.sampled_from("MBT"))
def test_decimals_with_a_suffix_are_exact(whole, thousandths, suffix):
    unit = {"M": 10**6, "B": 10**9, "T": 10**12}[suffix]
    assert parse_token_count(f"{whole}.{thousandths:03d}{suffix}") == whole * unit + thousandths * unit // 1000


@given(st.integers(1, 10**13))
def test_plain_digits_are_taken_as_they_are(tokens):
    assert parse_token_count(str(tokens)) == tokens


@pytest.mark.parametrize("text", ["ten", "0", "-5", "1.5", "3q", "", "0.0001k"])
def test_what_is_no_whole_positive_count_is_refused(text):
    with pytest.raises(ValueError, match="tokens"):
        parse_token_count(text)


def test_dashes_and_underscores_are_equal_in_option_names_but_not_in_values():
    assert normalise(["--batch.micro-batch-size", "a-b", "--out-dir=x-y"]) == [
        "--batch.micro_batch_size",
        "a-b",
        "--out_dir=x-y",
    ]


def test_flags_win_over_files_and_files_over_defaults(config_file):
    config = parse([*config_file(seed=5, optimizer={"learning_rate": 0.5}), "--seed", "6"]).config
    assert (config.seed, config.optimizer.learning_rate, config.optimizer.weight_decay) == (6, 0.5, 0.1)


def test_a_later_file_replaces_stages_of_an_earlier_one(config_file, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("stages: [{name: scratch, max_tokens: 4k}]\n")
    config = parse([*config_file(), "--config", str(other)]).config
    assert [stage.name for stage in config.stages] == ["scratch"]


@pytest.mark.parametrize(("flag", "fresh"), [("--fresh", True), ("--fresh=true", True), ("--fresh=false", False)])
def test_a_switch_can_be_spelt_out(config_file, flag, fresh):
    assert parse([*config_file(), flag]).fresh is fresh


def test_a_switch_takes_no_other_value(config_file):
    with pytest.raises(ValueError, match="is a switch"):
        parse([*config_file(), "--scratch=no"])


def test_a_folders_own_name_keeps_its_dashes(config_file):
    assert parse([*config_file(), "--data.validation.my-corpus", "x"]).config.data.validation == {"my-corpus": "x"}


def test_all_unknown_keys_are_named_with_the_nearest_known_one(config_file):
    with pytest.raises(ValueError) as error:
        parse(config_file(sede=1, batch={"micro_batchsize": 2}, stages=[{"name": "a", "max_step": 1}]))
    message = str(error.value)
    for wrong, right in (("sede", "seed"), ("micro_batchsize", "micro_batch_size"), ("max_step", "max_steps")):
        assert f"unknown key {wrong!r}; did you mean {right!r}?" in message


def test_an_unknown_flag_is_named_with_the_nearest_known_one(config_file):
    with pytest.raises(ValueError, match="did you mean 'batch.micro_batch_size'"):
        parse([*config_file(), "--batch.micro-batchsize", "2"])


def test_all_settings_that_do_not_fit_are_listed_at_once(config_file):
    with pytest.raises(ValueError) as error:
        parse(
            config_file(
                batch={"global_batch_size": 6, "micro_batch_size": 4},
                optimizer={"learning_rate": -1},
                stages=[{"name": "a", "max_steps": 1}, {"name": "a", "max_tokens": "x", "max_steps": 2}],
            )
        )
    message = str(error.value)
    assert "micro_batch_size can be 1, 2, 3, 6" in message
    assert "optimizer.learning_rate=-1" in message
    assert "stage name 'a' occurs twice" in message
    assert "exactly one of max_tokens and max_steps" in message
    assert "needs an operator" in message


def test_a_wrong_type_is_an_error_that_names_the_key(config_file):
    with pytest.raises(ValueError, match="seed"):
        parse([*config_file(), "--seed", "many"])


def test_a_rate_in_yamls_other_spelling_is_still_a_number(config_file):
    config = parse([*config_file(), "--optimizer.learning-rate", "1e-3"]).config
    assert config.optimizer.learning_rate == 1e-3


def test_a_missing_config_file_is_named():
    with pytest.raises(ValueError, match="nowhere.yaml"):
        parse(["--config", "nowhere.yaml"])


def test_the_shipped_configs_are_valid():
    for files in (["configs/demo.yaml"], ["configs/demo.yaml", "configs/smoke.yaml"]):
        invocation = parse([argument for file in files for argument in ("--config", file)])
        assert [stage.name for stage in invocation.config.stages] == ["base", "grown"]
