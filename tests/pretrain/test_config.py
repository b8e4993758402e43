"""Settings: token counts, unknown keys, and everything that is wrong reported at once."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.counts import parse_token_count
from pretrain.command_line import normalise, parse
from pretrain.config import BatchConfig, DataConfig

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


@pytest.mark.parametrize("text", ["ten", "0", "-5", "1.5", "3q", "", "0.0001k", "1e3000000"])
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


def test_an_unknown_flag_without_a_value_is_unknown_all_the_same(config_file):
    with pytest.raises(ValueError, match="unknown key 'dry_runn'; did you mean 'dry_run'"):
        parse([*config_file(), "--dry-runn"])
    with pytest.raises(ValueError, match="--seed needs a value"):
        parse([*config_file(), "--seed"])


def test_a_flag_leaves_out_the_tasks_that_a_file_names(config_file):
    file = config_file(zero_shot={"tasks": ["piqa"], "limit": 3})
    assert parse([*file, "--zero_shot.tasks", "[]"]).config.zero_shot.names == []
    with pytest.raises(ValueError, match="zero_shot.limit has no effect without zero_shot.tasks"):
        parse(config_file(zero_shot={"limit": 3}))


def test_all_settings_that_do_not_fit_are_listed_at_once(config_file):
    with pytest.raises(ValueError) as error:
        parse(
            config_file(
                batch={"global_batch_size": 6, "micro_batch_size": 4},
                optimizer={"learning_rate": -1},
                stages=[
                    {"name": "a", "max_steps": 1},
                    {"name": "a", "max_tokens": "x", "max_steps": 2, "layer_map": "12*2"},
                ],
            )
        )
    message = str(error.value)
    assert "micro_batch_size can be 1, 2, 3, 6" in message
    assert "optimizer.learning_rate=-1" in message
    assert "stage name 'a' occurs twice" in message
    assert "exactly one of max_tokens and max_steps" in message
    assert "layer_map and options belong to a growth operator" in message


def test_a_wrong_type_is_an_error_that_names_the_key(config_file):
    with pytest.raises(ValueError, match="seed"):
        parse([*config_file(), "--seed", "many"])


def test_settings_that_cannot_be_empty_are_named_all_at_once(config_file):
    with pytest.raises(ValueError) as error:
        parse(
            config_file(
                precision=None,
                kernels=None,
                validation={"every_steps": None},
                stages=[{"name": "a", "max_steps": 1}, {"name": None, "max_steps": 1}],
            )
        )
    assert [line.split(" is empty")[0] for line in str(error.value).splitlines()] == [
        "kernels",
        "precision",
        "stage 2: name",
        "validation: every_steps",
    ]


def test_null_gives_a_setting_its_default_where_it_may(config_file):
    config = parse(config_file(validation={"max_tokens": None}, init_from=None)).config
    assert config.validation.max_tokens is config.init_from is None


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


def data_error(config_file, **data) -> str:
    with pytest.raises(ValueError) as error:
        parse(config_file(data={"train": {"a": "x", "b": "y"}, **data}))
    return str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": {}}, "data.train names no files"),
        ({"weights": {"a": 1}}, r"data.weights names ['a'], data.train names ['a', 'b']"),
        ({"weights": {"a": 0, "b": 0}}, "data.weights: all weights are 0"),
        ({"weights": {"a": -1, "b": 1}}, "data.weights: -1.0 of 'a'"),
        ({"order": "legacy"}, "data.legacy_world_size=None"),
        ({"order": "legacy"}, "needs data.weights, those of the old run's data config"),
        ({"order": "legacy", "legacy_world_size": 0}, "data.legacy_world_size=0"),
        ({"legacy_world_size": 8}, "no effect without data.order=legacy"),
        ({"order": "legacy", "window": 4}, "data.window cannot be used with order=legacy"),
        ({"order": "legacy", "skips": [[0, 1]]}, "data.skips cannot be used with order=legacy"),
        ({"order": "legacy", "segments": [{"start": 0, "weights": {"a": 1}}]}, "data.segments cannot be used"),
        ({"weights": {"a": 1, "b": 1}, "segments": [{"start": 0, "weights": {"a": 1}}]}, "not both"),
        ({"segments": []}, "data.segments start at []"),
        ({"segments": [{"start": 5, "weights": {"a": 1}}]}, "data.segments start at [5]"),
        ({"segments": [{"start": 0, "weights": {"a": 1}}, {"start": 0, "weights": {"b": 1}}]}, "must increase"),
        ({"segments": [{"start": 0, "weights": {"c": 1}}]}, "data.segments[1] names ['c']"),
        ({"segments": [{"start": 0, "weights": {"a": 0}}]}, "data.segments[1]: all weights are 0"),
        ({"skips": [[5, 5]]}, "data.skips: [5, 5] must be [start, stop]"),
        ({"skips": [[5]]}, "data.skips: [5] must be [start, stop]"),
        ({"skips": [[5, 9], [0, 6]]}, "data.skips: [0, 6] and [5, 9] overlap"),
        ({"window": 0}, "data.window=0"),
        ({"dtype": "float32"}, "data.dtype='float32' is no type of tokens; known: uint8"),
        ({"max_epochs": 0}, "data.max_epochs=0"),
        ({"start_position": -1}, "data.start_position=-1"),
        ({"separator_id": 2}, "data.separator_id has no effect without data.document_mask"),
    ],
)
def test_data_settings_that_cannot_be_are_refused(config_file, data, message):
    assert message in data_error(config_file, **data)


def test_an_unknown_order_is_refused(config_file):
    assert "legacy" in data_error(config_file, order="shuffled")


def test_a_key_of_a_segment_that_nobody_knows_is_named_with_the_nearest(config_file):
    message = data_error(config_file, segments=[{"begin": 0, "weight": {"a": 1}}])
    assert "data: segment 1: unknown key 'weight'; did you mean 'weights'?" in message


def test_segments_and_skips_may_be_given_as_flags(config_file):
    flags = ["--data.segments", "[{start: 0, weights: {somewhere: 1.5}}]", "--data.skips", "[[3, 7], [9, 10]]"]
    data = parse([*config_file(), *flags]).config.data
    assert [(segment.start, segment.weights) for segment in data.segments] == [(0, {"somewhere": 1.5})]
    assert data.skips == [[3, 7], [9, 10]]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/slim", "slim"),
        ("data/slim/", "slim"),
        ("slim_star/train_slim*", "train_slim"),
        ("data/slim/*", "slim"),
        ("data/slim/*.bin", "slim"),
        ("a/train_0.bin", "train_0.bin"),
        (".", "train"),
    ],
)
def test_a_source_without_a_name_has_that_of_its_path(path, name):
    assert list(DataConfig(path).train_paths()) == [name]


def test_an_unknown_key_of_a_stage_is_named_in_a_flag_too(config_file):
    with pytest.raises(ValueError, match="stage 1: unknown key 'max_step'; did you mean 'max_steps'.*--stages.help"):
        parse([*config_file(), "--stages", "[{name: a, max_step: 1}]"])


@pytest.mark.parametrize(
    ("processes", "message"),
    [(3, "3 processes do not divide .*=8; use 1, 2, 4 or 8 processes"), (4, "micro_batch_size can be 1, 2$")],
)
def test_a_batch_that_cannot_be_dealt_says_what_can(processes, message):
    with pytest.raises(ValueError, match=message):
        BatchConfig(global_batch_size=8, micro_batch_size=8).iters_per_step(processes)
