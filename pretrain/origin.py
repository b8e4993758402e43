"""Where a run takes up: at its own last checkpoint, at the checkpoint it starts from, or at the beginning."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from grow.plan import GrowthPlan
from grow.registry import OPERATORS
from lit_gpt.checkpoint import TRAINING, detect_form, find_checkpoint, latest, read_config, read_exchange, read_training
from lit_gpt.config import Config
from lit_gpt.data_order import PROPORTIONAL
from lit_gpt.errors import DataError
from lit_gpt.flops import Flops
from lit_gpt.legacy_order import LEGACY
from lit_gpt.packed_data import describe_overlap
from lit_gpt.parity import TEXT
from lit_gpt.tokenizer import Tokenizer, tokenizer_beside
from pretrain.config import RunConfig
from pretrain.corpus import Corpus
from pretrain.data import TrainData
from pretrain.data_config import ORDER_SETTINGS, DataConfig, SegmentConfig, data_problems
from pretrain.state import TrainState

FROM_CHECKPOINT = "init_from"


def own_state(out_dir: Path) -> dict[str, Any] | None:
    """state.json of the run's last checkpoint; None if it has none."""
    folder = out_dir / "checkpoints"
    for deep in (False, True):  # a damaged one is passed over when the run resumes; checking costs a whole read
        path = latest(folder, deep=deep, on_skip=lambda *_: None)
        if path is None:
            return None
        try:
            return read_training(path, verify=False).state
        except DataError:
            if deep:
                raise
    return None


def checkpoints_meant(config: RunConfig) -> dict[str, str]:
    """Which checkpoint each path to a run means now, for a run that still trains to be read as at one moment.

    A run without one is left out: whoever needs it says so.
    """
    given = [config.init_from]
    for stage in config.stages:
        given += [stage.teacher, stage.options.get("reference")]
    meant = {}
    for path in given:
        if path is not None:
            with suppress(DataError):
                meant[str(path)] = str(find_checkpoint(str(path)))
    return meant


def naming_checkpoints(config: RunConfig, meant: Mapping[str, str]) -> RunConfig:
    """The settings with the checkpoints themselves in the place of the runs that they are of."""

    def named(path: Any) -> str | None:
        return None if path is None else meant.get(str(path), str(path))

    stages = [
        dataclasses.replace(
            stage,
            teacher=named(stage.teacher),
            options=stage.options
            if stage.options.get("reference") is None
            else {**stage.options, "reference": named(stage.options["reference"])},
        )
        for stage in config.stages
    ]
    return dataclasses.replace(config, init_from=named(config.init_from), stages=stages)


def parent_state(config: RunConfig) -> dict[str, Any]:
    """What `init_from` says of itself: state.json, or growth.json of an exchange form; a foreign one says nothing."""
    if config.init_from is None:
        return {}
    source = find_checkpoint(config.init_from)
    if detect_form(source) == TRAINING:
        return read_training(source, verify=False).state
    return read_exchange(source).provenance or {}


def growth_behind(config: RunConfig, own: Mapping[str, Any] | None) -> GrowthPlan | None:
    """The growth that made the checkpoint which the run starts or started from; None if nobody asks for it.

    own: state.json of the run's own last checkpoint, if it has one.
    """
    if config.stages[0].trainable in ("auto", "all"):
        return None
    history = (parent_state(config) if own is None else own).get("history", [])
    if own is not None:
        own_growths = sum(stage.operator is not None for stage in config.stages[: own["grown_into_stage"]])
        history = history[: len(history) - own_growths]
    return GrowthPlan.from_dict(history[-1]["plan"]) if history else None


def trainable_notes(config: RunConfig, own: Mapping[str, Any] | None) -> list[str]:
    """A line for the log if the growth behind `init_from` has a paper that trains less of the model than this run.

    own: state.json of the run's own last checkpoint, if it has one.
    """
    history = [] if own is not None else parent_state(config).get("history", [])
    op = OPERATORS.get(history[-1]["operator"]) if history else None
    if op is None or op.trainable == "all" or config.stages[0].trainable != "auto":
        return []
    return [
        f"init_from was grown by {op.name}, whose paper then trains {op.trained} alone; this run trains everything. "
        f"For the former give the first stage trainable: {op.trainable}, for the latter trainable: all"
    ]


def inherit_history(state: TrainState, provenance: Mapping[str, Any]) -> list[str]:
    """Take over what growth.json of an exchange form says of the models behind it; a foreign folder says nothing.

    Returns:
        A line for the log if it says less of the FLOPs than there must have been.
    """
    state.history = list(provenance.get("history", []))
    at_growth = state.history[-1] if state.history else {}  # training may have gone on since
    tokens, total = (provenance.get(key, at_growth.get(key)) for key in ("tokens", "flops_total"))
    keys = ("growth_flops", "growth_flops_model", "growth_flops_palm")
    growths = Flops(*(sum(each.get(key, 0) for each in state.history) for key in keys))
    model, palm = (provenance.get(key) for key in ("flops_model", "flops_palm"))
    state.parent_tokens = tokens or 0
    state.parent_flops = Flops(
        growths.paper if total is None else total,
        growths.model if model is None else model,
        growths.palm if palm is None else palm,
    )
    if not total or None not in (model, palm):
        return []
    return [
        f"warning: init_from tells its {total:.4g} FLOPs in the paper's convention alone; flops_model and flops_palm "
        f"count from here on"
    ]


def origin_model(config: RunConfig, own: Mapping[str, Any] | None) -> Config | None:
    """The model of `init_from`, where model.name asks for its sizes; None where the settings name their own.

    own: state.json of the run's own last checkpoint, which knows them too while nothing has grown.

    Raises:
        ValueError: there is no init_from.
    """
    if config.model.name != FROM_CHECKPOINT:
        return None
    if config.init_from is None:
        raise ValueError(f"model.name {FROM_CHECKPOINT} takes the sizes of init_from, which is not given; give it")
    if own is not None and own["stage"] == 1:
        return Config.from_dict(own["model_config"])
    return read_config(find_checkpoint(config.init_from))


def fits_rows(found: Config, wanted: Config) -> bool:
    """Whether a vocabulary is one that an embedding may be for, of which only the number of rows is known."""
    unknown = found.vocab_size == found.padded_vocab_size == wanted.padded_vocab_size
    return unknown and wanted.vocab_size <= found.vocab_size


def with_saved_name(config: RunConfig, own: Mapping[str, Any] | None) -> RunConfig:
    """The settings with a single source that was given no name called as its checkpoint calls it: folders move.

    The order depends on the names of its sources.
    """
    data = config.data
    if not isinstance(data.train, str) or data.weights is not None or data.segments is not None:
        return config
    if own is None and (data.start_position is not None or data.allow_order_change):
        return config  # other data than that of init_from, by consent
    saved = (parent_state(config) if own is None else own).get("data")
    names = list(saved["sources"]) if saved else []
    if len(names) != 1 or names == [*data.train_paths()]:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(data, train={names[0]: data.train}))


def check_tokenizer(state: Mapping[str, Any], corpus: Corpus, origin: Path | None) -> None:
    """Refuse data whose token ids mean something else than those a checkpoint was trained on.

    state: what the checkpoint says of itself. origin: where it is, if what lies beside it may tell too.

    Raises:
        ValueError: with both fingerprints.
    """
    now, before = corpus.tokenizer_entry, (state.get("tokenizer") or {}).get("sha256")
    beside = tokenizer_beside(origin) if before is None and origin is not None else None
    guess = ""
    if beside is not None and not _encode_alike(beside, corpus.tokenizer):
        before = beside.fingerprint
        guess = f"; if the one beside {origin} is not its own, take it out of that folder"
    if now is not None and before not in (None, now["sha256"]):
        raise ValueError(
            f"the checkpoint was trained with another tokenizer ({before[:12]}) than that of the data "
            f"({now['sha256'][:12]}); prepare the data with the checkpoint's own: "
            f"scripts/prepare.py --tokenizer PATH{guess}"
        )


def _encode_alike(one: Tokenizer, other: Tokenizer | None) -> bool:
    """Whether two tokenizers give a text the same ids, as far as is known: one may be a form of the other's file."""
    return other is None or np.array_equal(one.encode(TEXT), other.encode(TEXT))


def check_separator(state: Mapping[str, Any], train: TrainData) -> None:
    """Refuse to resume with other documents than those that a checkpoint's data was divided into.

    Raises:
        ValueError: with both separators.
    """
    before, now = state.get("separator_id"), train.separator_id
    if before != now:
        raise ValueError(
            f"the run's documents were ended by token {before}, now they are by token {now}; give "
            f"data.separator_id {before}, or the data.tokenizer that the run had"
        )


def mask_notes(state: Mapping[str, Any], train: TrainData) -> list[str]:
    """A line for the log if a run sees more or less of a sample than the checkpoint that it starts from did."""
    settings = state.get("run_config")  # growth leaves none
    before = settings["data"].get("document_mask", False) if settings else train.settings.document_mask
    if before == train.settings.document_mask:
        return []
    return [f"warning: init_from was trained with data.document_mask={before}, this run is with {not before}"]


def continued_settings(data: DataConfig, saved: Mapping[str, Any] | None) -> tuple[DataConfig, list[str]]:
    """The data settings of a run that starts from a checkpoint: what is not given is what its data object says.

    Args:
        data: as given.
        saved: the checkpoint's data object, if it has one.

    Returns:
        The settings in force, and a line for the log for each that was taken over.

    Raises:
        ValueError: the checkpoint's sources have other names.
    """
    if saved is None or data.start_position is not None:
        return data, []
    kind = saved.get("order", "permuted")
    if data.order not in (None, kind):
        return data, []  # check_state says what differs
    taken = {key: value for key, value in _order_settings(saved).items() if getattr(data, key) is None}
    if data.weights is not None or data.segments is not None:
        taken = {key: value for key, value in taken.items() if key not in ("weights", "segments")}
    strange = sorted(_names_in(taken) - set(data.train_paths()))
    if strange and data.allow_order_change:
        taken = {key: value for key, value in taken.items() if key not in ("weights", "segments")}
    elif strange:
        raise ValueError(
            f"init_from was trained on the sources {sorted(saved['sources'])} with weights, data.train names "
            f"{sorted(data.train_paths())}; name them alike (data.train.NAME PATH), or give data.weights and "
            f"data.allow_order_change, or start in new data by hand with data.start_position"
        )
    settings = dataclasses.replace(data, **taken)
    problems = data_problems(settings)
    if problems:
        raise ValueError("\n".join(["with what init_from brings along:", *problems]))
    return settings, [f"data.{key} as in init_from: {_shown(value)}" for key, value in taken.items()]


def _order_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A data object's order in the terms of the settings; only what is not the default."""
    found: dict[str, Any] = {}
    if saved.get("order") == LEGACY:
        found = {"order": LEGACY, "legacy_world_size": saved["world_size"], "weights": dict(saved["weights"])}
    elif [weights for _, weights in saved["segments"]] != [PROPORTIONAL]:
        segments = [SegmentConfig(start, dict(weights)) for start, weights in saved["segments"]]
        found = {"weights": segments[0].weights} if len(segments) == 1 else {"segments": segments}
    found |= {key: saved.get(key) for key in ("skips", "window")}
    assert set(found) <= set(ORDER_SETTINGS)
    return {key: value for key, value in found.items() if value}


def _names_in(taken: Mapping[str, Any]) -> set[str]:
    """Sources that the weights among some settings name."""
    all_weights = [taken.get("weights") or {}, *(segment.weights for segment in taken.get("segments") or [])]
    return {name for weights in all_weights for name in weights}


def _shown(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], SegmentConfig):
        return ", ".join(f"{segment.weights} from sample {segment.start:,}" for segment in value)
    return str(value)


def first_position(config: RunConfig, train: TrainData, saved: Mapping[str, Any] | None) -> tuple[int, list[str]]:
    """Where the data of a run begins that has no checkpoint of its own yet, and lines for the log.

    Raises:
        ValueError: the data is not what `saved` was trained on, and nobody allowed that.
    """
    if config.data.start_position is not None:
        return config.data.start_position, []
    return (0, []) if saved is None else continued_position(train, saved)


def check_stream(train: TrainData, saved: Mapping[str, Any]) -> None:
    """`PackedData.check_state`, which knows no paths; of the same data under other names, say how to name it.

    Raises:
        ValueError: as there.
    """
    try:
        train.packed.check_state(saved)
    except ValueError as error:
        renamed = _renamed(train, saved)
        if renamed is None:
            raise
        different = [line for line in str(error).splitlines() if line.startswith("data.")]
        listed = ", ".join(f"{name}: {path}" for name, path in renamed.items())
        way_out = f"the data is the same under other names; name it as the checkpoint does: --data.train '{{{listed}}}'"
        raise ValueError("\n".join([*different, way_out])) from error


def _renamed(train: TrainData, saved: Mapping[str, Any]) -> dict[str, str] | None:
    """Saved name -> path of each source, if this is the data of a checkpoint under other names; None if it is not."""
    paths = train.settings.train_paths()
    found = {
        source.fingerprint: paths[name]
        for name, source in zip(train.packed.order.names, train.packed.sources, strict=True)
    }
    before = {name: source["fingerprint"] for name, source in saved.get("sources", {}).items()}
    if set(before) == set(paths) or len(before) != len(paths) or set(before.values()) != set(found):
        return None
    return {name: found[fingerprint] for name, fingerprint in before.items()}


def continued_position(train: TrainData, saved: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Where a data object goes on in this data, and lines for the log if it goes on otherwise than it began.

    Raises:
        ValueError: naming the field that differs, unless data.allow_order_change.
    """
    try:
        check_stream(train, saved)
    except ValueError as error:
        if not train.settings.allow_order_change:
            raise
        notes = [f"warning: data.allow_order_change: {str(error).splitlines()[0]}"]
        if (saved["block"], saved["stride"]) != (train.packed.block_size, train.packed.stride):
            return 0, [*notes, f"warning: the data starts over at sample 0. {describe_overlap(saved)}"]
        return saved["position"], notes
    return saved["position"], []
