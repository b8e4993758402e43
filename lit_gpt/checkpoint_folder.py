"""A run's folder of checkpoints in training form: where each belongs, and which is the newest that is valid."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_gpt.atomic import directory_problems, read_manifest
from lit_gpt.errors import DataError
from lit_gpt.problems import raise_problems
from lit_gpt.processes import ONE_PROCESS, Processes, together

TRAINING = "training"
_STAGE_AND_STEP = re.compile(r"stage-(\d+)/step-(\d+)")

logger = logging.getLogger(__name__)


def training_manifest(directory: Path) -> dict[str, Any]:
    """MANIFEST.json of a checkpoint in training form; raises DataError for anything else."""
    manifest = read_manifest(directory)
    if manifest["form"] != TRAINING:
        raise DataError(
            f"{directory} is {manifest['form'] or 'not a checkpoint'}, not training form; give a checkpoint"
        )
    return manifest


def checkpoint_path(checkpoints_dir: str | Path, stage: int, step: int) -> Path:
    """Where the checkpoint of a (1-based) stage and a step belongs."""
    return Path(checkpoints_dir) / f"stage-{stage:02d}" / f"step-{step:010d}"


def warn_skipped(path: Path, reason: str) -> None:
    """What `latest` does with a checkpoint that it skips, unless told otherwise."""
    logger.warning("skipped a checkpoint that is not valid: %s: %s", path, reason)


def latest(
    checkpoints_dir: str | Path, *, deep: bool = False, on_skip: Callable[[Path, str], None] = warn_skipped
) -> Path | None:
    """The valid checkpoint of the highest (stage, step), None if there is none.

    Args:
        checkpoints_dir: holds stage-NN/step-NNNNNNNNNN directories.
        deep: compute the crc32 of every file; otherwise the manifest's digest and all sizes have to be right.
        on_skip: called with the path and the reason for every later checkpoint that is not valid.
    """
    for path in newest_first(Path(checkpoints_dir)):
        reason = reason_to_skip(path, deep=deep)
        if reason is None:
            return path
        on_skip(path, reason)
    return None


def find_checkpoint(path: str | Path, *, deep: bool = False) -> Path:
    """The checkpoint that a path means: itself, or the latest one of a run folder.

    deep: of a run's, compute the crc32 of every file, as training does.

    Raises:
        DataError: a run folder without a valid checkpoint.
    """
    folder = Path(path) / "checkpoints"
    if not folder.is_dir():
        return Path(path)
    found = latest(folder, deep=deep)
    if found is None:
        raise DataError(f"{folder} holds no valid checkpoint; give the path of one, or let the run save first")
    return found


def reason_to_skip(path: Path, *, deep: bool, processes: Processes = ONE_PROCESS) -> str | None:
    """What is wrong with a checkpoint, None if nothing is; see `problems_together`."""
    try:
        raise_problems(problems_together(path, deep=deep, processes=processes), "an earlier one is tried")
    except DataError as error:
        return str(error)
    return None


def problems_together(path: Path, *, deep: bool, processes: Processes) -> list[str]:
    """All that is wrong with a checkpoint, on every process; each looks at some of the files, as many bytes as others.

    deep: compute the crc32 of every file.
    """

    def problems() -> list[str]:
        try:
            manifest = training_manifest(path)
            largest_first = sorted(manifest["files"].items(), key=lambda item: (-item[1]["size"], item[0]))
            share = dict(largest_first[processes.rank :: processes.size])
            return directory_problems(path, {**manifest, "files": share}, deep=deep)
        except (DataError, OSError) as error:
            return [str(error)]

    return [*dict.fromkeys(problem for each in together(processes, problems) for problem in each)]


def newest_first(checkpoints_dir: Path) -> list[Path]:
    """The checkpoints of a run, valid or not.

    By number: sorted by name, step 1000000 would come before step 960000 where digits run out.
    """
    found = []
    for path in checkpoints_dir.glob("stage-*/step-*"):
        numbers = _STAGE_AND_STEP.fullmatch(f"{path.parent.name}/{path.name}")
        if numbers is not None and path.is_dir():
            found.append((int(numbers[1]), int(numbers[2]), path))
    return [path for _, _, path in sorted(found, reverse=True)]
