"""Folders that the `save_to_disk` of Hugging Face datasets wrote: which of their Arrow files belong to which split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lit_gpt.errors import DataError

DATASET, DATASETS = "state.json", "dataset_dict.json"
SPLIT_OF = {"train": "train", **dict.fromkeys(("validation", "valid", "val", "dev"), "validation")}


def is_saved(folder: Path, names: list[str]) -> bool:
    """Whether a folder with these names is a saved dataset, or one of several splits."""
    return DATASETS in names or (DATASET in names and "_data_files" in _described(folder / DATASET))


def files_of_saved(folder: Path, split: str) -> tuple[list[tuple[Path, str]], list[Path]]:
    """The Arrow files of a saved dataset, each with the split it goes to, and the folders of splits left out.

    Of a dataset in several splits, `auto` takes those for training and for validation as they are; if there is none
    for validation, texts of the training split decide. `train` and `validation` take the one split alone.

    Raises:
        FileNotFoundError: the dataset has no split to take.
        DataError: a file is missing, or an old version of datasets saved a selection of rows.
    """
    if not (folder / DATASETS).is_file():
        return [(path, split) for path in _data_files(folder)], []
    names = _described(folder / DATASETS).get("splits", [])
    roles = {name: SPLIT_OF.get(name) for name in names}
    taken = [name for name, role in roles.items() if role is not None and split in ("auto", role)]
    if not taken:
        raise FileNotFoundError(
            f"dataset {folder} has the splits {', '.join(names) or 'none'}, and none of a name that means "
            f"{'training or validation' if split == 'auto' else split}; give the folder of a split instead"
        )
    whole = split == "auto" and "validation" not in roles.values()
    files = [(path, split if whole else roles[name]) for name in taken for path in _data_files(folder / name)]
    return files, [folder / name for name in names if name not in taken]


def _data_files(folder: Path) -> list[Path]:
    state = _described(folder / DATASET)
    if state.get("_indices_data_files"):
        raise DataError(
            f"{folder} holds rows that an old version of datasets only marked as selected; save it again with a newer "
            f"one, which writes the selected rows themselves"
        )
    paths = [folder / entry["filename"] for entry in state.get("_data_files", [])]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{folder / DATASET} lists {', '.join(missing)}, missing in the folder; get the dataset again")
    return paths


def _described(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); get it again") from error
    return description if isinstance(description, dict) else {}
