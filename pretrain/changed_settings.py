"""Which settings of a run may differ when it goes on, and which would make it another run."""

from __future__ import annotations

import dataclasses
from typing import Any

from lit_gpt.settings_files import differences
from pretrain.config import LISTS, RunConfig, known_keys, to_plain

# Settings that may change between two sittings of a run: they do not touch what is trained on what
# (what the data holds is checked by its fingerprint, wherever it lies, and its order up to here by the data object)
FREE_TO_CHANGE = (
    "logging",
    "checkpoints",
    "parallel",
    "activation_checkpointing",
    "kernels",
    "guards",
    "stop",
    "batch.micro_batch_size",
    "batch.auto",
    "validation",
    "zero_shot",
    "out_dir",
    "data.train",
    "data.validation",
    "data.tokenizer",
    "data.weights",
    "data.segments",
    "data.skips",
    "data.max_epochs",
    "data.allow_order_change",
)


def changed_settings(saved: dict[str, Any], config: RunConfig) -> list[str]:
    """One line for every setting that differs from the checkpoint's and decides what is trained on what."""
    return [
        f"{key}: {before!r} in the checkpoint, {after!r} now"
        for key, before, after in differences("", _completed(saved, RunConfig), to_plain(config))
        if not any(key == free or key.startswith(f"{free}.") for free in FREE_TO_CHANGE)
    ]


def _completed(saved: dict[str, Any], section: type) -> dict[str, Any]:
    """Saved settings with the defaults of those that did not exist yet when they were saved."""
    completed = dict(saved)
    sections = known_keys(section)
    for field in dataclasses.fields(section):
        inner = sections[field.name]
        if field.name not in saved and field.default is not dataclasses.MISSING:
            completed[field.name] = dataclasses.asdict(field.default) if inner else field.default
        elif field.name not in saved and field.default_factory is not dataclasses.MISSING:
            completed[field.name] = field.default_factory()
        elif inner and field.name in saved:
            completed[field.name] = _completed(saved[field.name], inner)
        elif (section, field.name) in LISTS and saved[field.name] is not None:
            completed[field.name] = [_completed(item, LISTS[section, field.name][1]) for item in saved[field.name]]
    return completed


def check_settings(saved: dict[str, Any], config: RunConfig) -> None:
    """Refuse to resume under settings that would make it another run.

    Raises:
        ValueError: naming every setting that differs.
    """
    lines = changed_settings(saved, config)
    if lines:
        raise ValueError(
            "\n".join([f"{config.out_dir} holds a run with other settings:", *(f"  {line}" for line in lines)])
            + "\nUse the old settings to resume, another --out_dir, or --fresh to start over"
        )
