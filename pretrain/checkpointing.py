"""A run's folder of checkpoints: what is saved, what stays, and where a repeated command takes up again."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt.atomic import remove_directory, write_atomically
from lit_gpt.checkpoint import TrainingCheckpoint, checkpoint_path, prune_temporaries, read_training, write_training
from lit_gpt.checkpoint_folder import newest_first, reason_to_skip
from lit_gpt.errors import EXIT_DATA, DataError, exit_code, explain
from lit_gpt.model import GPT
from lit_gpt.processes import first
from lit_gpt.versions import versions
from pretrain.background import BackgroundWork
from pretrain.config import CheckpointConfig
from pretrain.loggers import say
from pretrain.optim import named_state
from pretrain.run_lock import TakenOver, check_held
from pretrain.state import TrainState
from pretrain.world import ALONE, World

LAST_SAVED_FILE = "last_saved"
"""In the run's folder: the newest checkpoint that was ever complete, also when none is left that is."""
LEARNING = "learning"
"""Beside the random states: mixing matrices and their moments, by name."""


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds: of tensors that processes share, this one's parts."""

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Mapping[str, Tensor]]
    state: dict[str, Any]
    rng: dict[str, Any]


class RunCheckpoints:
    """Writes the checkpoints of one run and removes those that need not stay. Every process makes the same calls.

    Args:
        out_dir: the run's folder.
        settings: when and how.
        metadata: parts of state.json that do not change during the run.
        world: the processes.
        device_type: of what trains, cpu or cuda.
    """

    def __init__(
        self,
        out_dir: Path,
        settings: CheckpointConfig,
        metadata: dict[str, Any],
        world: World = ALONE,
        device_type: str = "cpu",
    ) -> None:
        self.folder = out_dir / "checkpoints"
        self._out_dir = out_dir
        self._last_saved = out_dir / LAST_SAVED_FILE
        self.world = world
        self.settings = settings
        self.metadata = metadata
        self.last: Path | None = None
        """The newest one that is complete."""
        self.moment: tuple[Any, ...] | None = None
        """Where the run stood in it, or, before there is one, where the run begins; see TrainState."""
        self.longest_secs = 0.0
        """What the longest save took from its beginning to its end, also where training went on meanwhile."""
        self.learning: dict[str, Any] | None = None
        """What the checkpoint that the run resumed from says of a growth that was being learned."""
        self._device_type = device_type
        self._passed_over: list[Path] = []
        self._saving: tuple[Path, tuple[Any, ...], BackgroundWork] | None = None
        in_background = settings.async_save
        if in_background is None:
            in_background = world.size > 1 or device_type == "cuda"
        self._staging = Staging(device_type == "cuda") if in_background else None
        self._apart = world.apart() if in_background else world

    def __enter__(self) -> RunCheckpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """What is being written becomes complete, unless somebody is in a hurry."""
        if self._saving is not None and not (kind and issubclass(kind, SystemExit | KeyboardInterrupt)):
            self._collect(stop=False)

    def save(
        self,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        state: TrainState,
        *,
        periodic: bool = False,
        learning: dict[str, Any] | None = None,
        **changing: Any,
    ) -> None:
        """Write a checkpoint of this moment; one that is not periodic is complete when this returns.

        Args:
            model: its weights.
            optimizer: its moments.
            state: where the run stands.
            periodic: whether the run goes on, so that it may be written meanwhile, or, by policy, not at all.
            learning: what a growth that is being learned has learned so far.
            changing: goes into state.json.

        Raises:
            DataError, OSError: it, or by policy the one before, could not be written; those before are intact.
        """
        started = time.perf_counter()
        self._collect(stop=periodic)  # one at a time
        path = checkpoint_path(self.folder, state.stage, state.step_count)
        content = Content(
            model.state_dict(),
            named_state(model, optimizer),
            {"format": 1, **self.metadata, **changing, **state.to_dict(), "versions": versions()},
            random_states(self._device_type) | ({} if learning is None else {LEARNING: learning}),
        )
        if periodic and self._staging is not None:
            copied = self._staging.copy(content)
            work = BackgroundWork(lambda: self._write(path, copied, self._apart), self.world)
            self._saving = path, state.moment, work
            say(f"checkpoint {_short(path)}: training stood {time.perf_counter() - started:.3f} s while it was copied")
            return
        try:
            self._write(path, content, self.world)
        except (DataError, OSError) as error:
            self._report(path, error, stop=not periodic or self.settings.on_failure == "stop")
            return
        seconds = time.perf_counter() - started
        self._saved(path, state.moment, seconds, f"training stood {seconds:.3f} s")

    def poll(self) -> None:
        """See whether what is being written is complete; raises, like `save`, if it failed. Cheap: for every step."""
        if self._saving is not None and self._saving[-1].is_done():
            self._collect(stop=True)

    def _collect(self, *, stop: bool) -> None:
        """Wait for what is being written; with `stop`, its failure may end the run."""
        if self._saving is None:
            return
        (path, moment, work), self._saving = self._saving, None
        try:
            work.result()
        except (DataError, OSError) as error:
            self._report(path, error, stop=stop and self.settings.on_failure == "stop")
            return
        self._saved(path, moment, work.seconds, f"written in {work.seconds:.2f} s while training went on")

    def _saved(self, path: Path, moment: tuple[Any, ...], seconds: float, how: str) -> None:
        self.last, self.moment = path, moment
        self.longest_secs = max(self.longest_secs, seconds)
        say(f"checkpoint {_short(path)} saved, {how}")

    def _report(self, path: Path, error: Exception, *, stop: bool) -> None:
        """Every process gets the same error; the first one speaks for all."""
        if stop or isinstance(error, TakenOver):
            raise error if self.world.is_first else SystemExit(exit_code(error))
        if self.world.is_first:
            kept = f"the last one is {self.last}" if self.last else "there is none before it"
            sys.stderr.write(f"warning: checkpoint {path} could not be saved: {explain(error)}. Going on; {kept}\n")

    def _write(self, path: Path, content: Content, world: World) -> None:
        first(world, lambda: check_held(self._out_dir))
        write_training(
            path,
            model=content.model,
            optimizer=content.optimizer,
            state=content.state,
            rng=content.rng,
            replace=True,  # what is there already was found damaged on resume
            processes=world,
        )
        first(world, lambda: self._published(path))

    def _published(self, path: Path) -> None:
        check_held(self._out_dir)  # nothing of another's is removed
        with suppress(OSError):  # a full disk, say; the checkpoint is complete all the same
            write_atomically(self._last_saved, f"{_short(path)}\n".encode())
        self._remove_superseded(path)

    @property
    def last_step(self) -> int | None:
        """Steps that were done at the newest one that is complete; None if there is none."""
        return None if self.last is None else int(self.last.name.removeprefix("step-"))

    def holds(self, state: TrainState) -> bool:
        """Whether a repeated command would begin at this moment; what is being written is waited for."""
        self._collect(stop=False)
        return self.moment == state.moment

    def resume(self) -> TrainingCheckpoint | None:
        """The newest valid checkpoint, None before the first save; those passed over go with the next save.

        Raises:
            DataError: there were checkpoints and none is valid; nothing was deleted.
        """
        self.last = self._find()
        if self.last is None:
            self._check_nothing_is_lost()
            return None
        checkpoint = read_training(self.last, verify=False, processes=self.world)
        if checkpoint.rng is not None:
            self.learning = checkpoint.rng.get(LEARNING)
        return checkpoint

    def _check_nothing_is_lost(self) -> None:
        """A run that was killed before its first save has neither the record of one nor a checkpoint, even damaged."""

        def reached() -> str | None:
            if self._last_saved.exists():
                return self._last_saved.read_text(encoding="utf-8").strip()
            return _short(self._passed_over[0]) if self._passed_over else None

        name = first(self.world, reached)
        if name is None:
            return
        if not self.world.is_first:
            raise SystemExit(EXIT_DATA)
        raise DataError(
            f"this run had reached {name} and none of its checkpoints in {self.folder} is valid; restore one, or start "
            f"over with --fresh, which deletes them and the logs"
        )

    def _find(self) -> Path | None:
        """All processes read through it together, each some of its files."""

        def candidates() -> list[Path]:
            prune_temporaries(self.folder)
            return newest_first(self.folder)

        for path in first(self.world, candidates):
            reason = reason_to_skip(path, deep=True, processes=self.world)
            if reason is None:
                return path
            if self.world.is_first:
                sys.stderr.write(f"warning: {path} is passed over: {reason}\n")
            self._passed_over.append(path)
        return None

    def _remove_superseded(self, written: Path) -> None:
        """Keep the newest of this stage, multiples of keep_every_steps, and every earlier stage's last one."""
        superseded = [path for path in self._passed_over if path.exists() and path != written]
        self._passed_over = []
        for stage_folder in sorted(self.folder.glob("stage-*")):
            paths = [path for path in sorted(stage_folder.glob("step-*")) if path not in superseded]
            keep_last = self.settings.keep_last if stage_folder == written.parent else 1
            every = self.settings.keep_every_steps
            superseded += [path for path in paths[:-keep_last] if not every or int(path.name[5:]) % every]
        for path in superseded:
            try:
                remove_directory(path)
            except OSError as error:  # the one that was just written is complete all the same
                sys.stderr.write(f"warning: checkpoint {path} could not be removed: {explain(error)}\n")


class Staging:
    """Copies in memory, in buffers that stay for the next copy; pinned where a GPU is copied from."""

    def __init__(self, cuda: bool) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
            )
        )

    def copy(self, content: Content) -> Content:
        """The same content, which training does not change any more; until the next copy."""
        moments = {name: dict(slots) for name, slots in content.optimizer.items()}
        tensors = self._stager.stage({"model": dict(content.model), "optimizer": moments})
        return Content(tensors["model"], tensors["optimizer"], content.state, copy.deepcopy(content.rng))


def random_states(device_type: str) -> dict[str, Any]:
    """Of this process's generators."""
    states: dict[str, Any] = {"torch": torch.get_rng_state()}
    if device_type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    """The inverse of `random_states`; one of a device that is not used now has no effect."""
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _short(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
