"""The two on-disk forms of a checkpoint: training form (here) and exchange form (lit_gpt/exchange.py).

Training form is a directory of torch.distributed.checkpoint files with flat names, `model.<name>` and
`optimizer.<name>.<slot>`, so that growth is one map of names; state.json; the random states; MANIFEST.json.
"""

from __future__ import annotations

import errno
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lit_gpt.atomic import (
    MANIFEST,
    Known,
    atomic_directory,
    await_file,
    check_free_space,
    crc32_text,
    directory_problems,
    file_problem,
    full_disk_as_os_error,
    manifest_of,
    prune_temporaries,
    read_manifest,
    render_manifest,
    unlisted_files,
    write_synced,
)
from lit_gpt.axes import parameter_shapes
from lit_gpt.checkpoint_folder import (
    TRAINING,
    checkpoint_path,
    find_checkpoint,
    latest,
    problems_together,
    training_manifest,
)
from lit_gpt.config import Config
from lit_gpt.errors import DataError
from lit_gpt.exchange import (
    EXCHANGE,
    HF_CONFIG,
    ExchangeCheckpoint,
    read_exchange,
    read_exchange_config,
    write_exchange,
)
from lit_gpt.lazy_tensors import LazyTensors, Renamed, all_finite
from lit_gpt.legacy import is_legacy, legacy_file, read_legacy
from lit_gpt.packed_dataset import MANIFEST as PREPARED
from lit_gpt.packed_dataset import PLAN
from lit_gpt.problems import bounded_shapes, raise_problems, read_json, shape_problems
from lit_gpt.processes import ONE_PROCESS, Processes, first, together
from lit_gpt.stored_state import EARLIER, check_open, encode_rng, encode_state, read_rng
from lit_gpt.tokenizer import file_sha256

if TYPE_CHECKING:
    from lit_gpt.sharded import StoredTensors
    from lit_gpt.sharded_writer import References

__all__ = [
    "EARLIER",
    "EXCHANGE",
    "TRAINING",
    "ExchangeCheckpoint",
    "TrainingCheckpoint",
    "atomic_directory",
    "check_open",
    "checkpoint_path",
    "detect_form",
    "find_checkpoint",
    "latest",
    "manifest_sha256",
    "prune_temporaries",
    "read_config",
    "read_exchange",
    "read_training",
    "read_weights",
    "stored_name",
    "verify",
    "write_exchange",
    "write_training",
]

STATE = "state.json"
RNG = "rng-{:05d}.pt"  # of each process
FIRST_RNG = RNG.format(0)
FINITE = "finite"  # in the manifest: all weights were finite numbers when they were written
PARTS = (".distcp", ".safetensors", ".pt")  # of another checkpoint, if the manifest does not list them
OVERHEAD_BYTES = 4096  # per tensor, for its header and its share of the metadata

GIVE = "give a directory in training form, a Hugging Face folder, or a .pth or .bin file of torch.save"


@dataclass(frozen=True)
class TrainingCheckpoint:
    """An opened training form. Tensors are on the CPU and read from the files on every access."""

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Mapping[str, Tensor]]
    """Parameter name -> slot (exp_avg, exp_avg_sq, step) -> tensor."""
    state: dict[str, Any]
    rng: dict[str, Any] | None
    tensors: LazyTensors
    """All of them under the names they are stored by, see `stored_name`."""
    manifest: dict[str, Any]
    """Of a legacy file one without files: nothing can be linked to it."""

    @property
    def is_finite(self) -> bool:
        """Whether all weights were finite numbers when they were written; False if that was not recorded."""
        return self.manifest.get(FINITE) is True

    def references(self, names: Mapping[str, str], *, finite: bool) -> References:
        """For `write_training`: tensors of a new checkpoint that are stored in the files of this one.

        Args:
            names: stored name in the new checkpoint -> stored name here.
            finite: whether all weights here are known to be finite numbers.
        """
        from lit_gpt.sharded_writer import References

        crc32 = {name: entry["crc32"] for name, entry in self.manifest["files"].items()}
        return References(self.tensors, names, crc32, finite)


def stored_name(name: str, slot: str | None = None) -> str:
    """Under which a parameter, or a slot of its optimizer state, is stored."""
    return f"model.{name}" if slot is None else f"optimizer.{name}.{slot}"


def write_training(
    path: str | Path,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Mapping[str, Tensor]],
    state: dict[str, Any],
    rng: dict[str, Any] | None = None,
    *,
    replace: bool = False,
    references: References | None = None,
    processes: Processes = ONE_PROCESS,
) -> Path:
    """Write a training form; all or nothing. Dtypes are kept, tensors may be on any device.

    Tensors of lazy mappings are in memory one at a time. The manifest notes whether all weights are finite.

    Args:
        path: the directory to make.
        model: parameter name -> tensor, exactly the parameters of state["model_config"].
        optimizer: parameter name -> slot -> tensor: a scalar, or of the parameter's shape. May be empty.
        state: what state.json shall hold; JSON values only. That of the first process counts.
        rng: random states of this process: tensors, numbers, strings, lists, tuples and dicts of them.
        replace: whether a directory that is there already may go.
        references: tensors that are those of another checkpoint; its files are linked in, and the tensors not read.
        processes: that write it together: each its parts of shared tensors, and its random states.

    Raises:
        ValueError: state or rng hold what cannot be stored.
        DataError: the tensors are not those of the configuration.
        OSError: `path` exists already, cannot be written, or the disk is full; on whichever process.
    """
    from lit_gpt.sharded_writer import write_tensors

    path = Path(path)
    stored_state, stored_rng = encode_state(state), encode_rng(rng)
    tensors = _under_stored_names(model, optimizer)
    first(processes, lambda: _check_before_writing(path, tensors, state, references))
    known = Known(notes={FINITE: references is None or references.finite})

    def note_finite(name: str, tensor: Tensor) -> None:
        if known.notes[FINITE] and name.startswith("model."):
            known.notes[FINITE] = all_finite(tensor)

    with (
        full_disk_as_os_error(path),
        atomic_directory(path, TRAINING, replace=replace, known=known, processes=processes) as directory,
    ):
        crc32 = write_tensors(
            directory,
            tensors,
            references,
            on_tensor=note_finite,
            before_copy=lambda n_bytes: check_free_space(path, n_bytes),
            processes=processes,
        )
        files = {RNG.format(processes.rank): stored_rng, STATE: stored_state if processes.rank == 0 else None}
        crc32 |= together(processes, lambda: _write_files(directory, files))[processes.rank]
        _join(directory, known, crc32, processes)
    if processes.size > 1:
        together(processes, lambda: await_file(path / MANIFEST))
    return path


def _write_files(directory: Path, files: Mapping[str, bytes | None]) -> dict[str, str]:
    """Write small files, those that there are; returns their crc32."""
    present = {name: data for name, data in files.items() if data is not None}
    for name, data in present.items():
        write_synced(directory / name, data)
    return {name: crc32_text(zlib.crc32(data)) for name, data in present.items()}


def _join(directory: Path, known: Known, crc32: dict[str, str], processes: Processes) -> None:
    """Put together what the manifest takes from each process, and see that the first one sees all of it."""
    sizes = {name: (directory / name).stat().st_size for name in crc32}
    for other_crc32, other_sizes, finite in processes.gather((crc32, sizes, known.notes[FINITE])):
        known.crc32.update(other_crc32)
        known.notes[FINITE] = known.notes[FINITE] and finite
        sizes |= other_sizes

    def await_all() -> None:
        for name, size in sizes.items():
            await_file(directory / name, size)

    first(processes, await_all)


def _check_before_writing(path: Path, tensors: Renamed, state: dict[str, Any], references: References | None) -> None:
    specs = {name: tensors.spec(name) for name in tensors}
    shapes = {name: spec.shape for name, spec in specs.items()}
    raise_problems(_tensor_problems(_config_in(state), shapes, str(path)), "nothing was written")
    referenced = {} if references is None else references.names
    check_free_space(path, sum(spec.n_bytes + OVERHEAD_BYTES for name, spec in specs.items() if name not in referenced))


def _under_stored_names(model: Mapping[str, Tensor], optimizer: Mapping[str, Mapping[str, Tensor]]) -> Renamed:
    places = {stored_name(name): (model, name) for name in model}
    for name in optimizer:
        slots = optimizer[name]
        places |= {stored_name(name, slot): (slots, slot) for slot in slots}
    return Renamed(places)


def read_training(
    path: str | Path,
    *,
    verify: bool = True,
    verify_up_to_bytes: float = math.inf,
    processes: Processes = ONE_PROCESS,
) -> TrainingCheckpoint:
    """Open a training form, or a legacy file as one.

    Args:
        path: the directory, or the file.
        verify: whether the crc32 of every file is checked first; sizes are checked in any case.
        verify_up_to_bytes: the crc32 of larger files is not.
        processes: that open it, which share the checking. Each gets the random states that it left, or, if it was not
            there, those of the first.

    Raises:
        FileNotFoundError: there is no such directory.
        DataError: a file is damaged or missing, or the tensors are not those of the configuration.
    """
    if is_legacy(path):
        legacy = read_legacy(path)
        stored = _under_stored_names(legacy.model, legacy.optimizer)
        return TrainingCheckpoint(legacy.model, legacy.optimizer, legacy.state, None, stored, {"files": {}})
    directory = Path(path)
    if verify and processes.size > 1:
        raise_problems(problems_together(directory, deep=True, processes=processes), EARLIER)
        verify = False
    manifest = training_manifest(directory)
    problems = directory_problems(directory, manifest, deep=verify, deep_up_to_bytes=verify_up_to_bytes)
    raise_problems(problems, EARLIER)
    state = read_json(directory / STATE, EARLIER)
    config = _stored_config(directory, state)
    tensors = _stored_tensors(directory, manifest)
    shapes = {name: tensors.spec(name).shape for name in tensors}
    raise_problems(_tensor_problems(config, shapes, str(directory)), EARLIER)
    stored_rng = next((name for name in (RNG.format(processes.rank), FIRST_RNG) if name in manifest["files"]), None)
    rng = None if stored_rng is None else read_rng(directory / stored_rng)
    model = Renamed({name: (tensors, stored_name(name)) for name in parameter_shapes(config)})
    return TrainingCheckpoint(model, _optimizer_of(tensors), state, rng, tensors, manifest)


def _optimizer_of(tensors: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
    stored: dict[str, dict[str, str]] = {}
    for full_name in tensors:
        kind, _, rest = full_name.partition(".")
        if kind == "optimizer":
            name, _, slot = rest.rpartition(".")
            stored.setdefault(name, {})[slot] = full_name
    return {
        name: Renamed({slot: (tensors, full_name) for slot, full_name in slots.items()})
        for name, slots in stored.items()
    }


def _tensor_problems(config: Config, shapes: Mapping[str, tuple[int, ...]], where: str) -> list[str]:
    parameters = bounded_shapes(config, len(shapes), where)
    wanted = {f"model.{name}": shape for name, shape in parameters.items()}
    for full_name, found in shapes.items():
        name, _, _ = full_name.removeprefix("optimizer.").rpartition(".")
        if full_name.startswith("optimizer.") and name in parameters:
            wanted[full_name] = parameters[name] if found else ()
    return shape_problems(wanted, shapes, where)


def _config_in(state: dict[str, Any]) -> Config:
    if "model_config" not in state:
        raise ValueError("state has no model_config; put Config.to_dict() there")
    return Config.from_dict(state["model_config"])


def _stored_config(directory: Path, state: dict[str, Any]) -> Config:
    try:
        return _config_in(state)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise DataError(f"{directory / STATE}: {error}; {EARLIER}") from error


def _stored_tensors(directory: Path, manifest: dict[str, Any]) -> StoredTensors:
    from lit_gpt.sharded import StoredTensors

    return StoredTensors(directory, {name: entry["size"] for name, entry in manifest["files"].items()})


def detect_form(path: str | Path) -> str:
    """TRAINING or EXCHANGE: a legacy file is read as either, by whether it has an optimizer's state.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        DataError: it is neither; the message says what it seems to be.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "no such checkpoint", str(path))
    if is_legacy(path):
        return TRAINING if read_legacy(path).optimizer else EXCHANGE
    if path.is_file():
        raise DataError(f"{path} is a file; {GIVE}")
    if (path / STATE).exists() or (path / ".metadata").exists():
        return TRAINING
    if (path / HF_CONFIG).exists():
        return EXCHANGE
    if (path / MANIFEST).exists():
        return _form_in_manifest(path)
    if (path / PREPARED).exists() or (path / PLAN).exists():
        raise DataError(f"{path} is a folder of token files, made by scripts/prepare.py, and no checkpoint; {GIVE}")
    newest = latest(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if newest is not None:
        raise DataError(f"{path} holds the checkpoints of a run; give one of them, e.g. {newest}")
    raise DataError(f"{path} is not a checkpoint; {GIVE}")


def _form_in_manifest(path: Path) -> str:
    form = read_manifest(path)["form"]
    if form not in (TRAINING, EXCHANGE):
        raise DataError(f"{path} is {form or 'another kind of directory'}, not a checkpoint; {GIVE}")
    return form


def read_config(path: str | Path) -> Config:
    """The sizes of the model in a checkpoint of either form; reads no tensor."""
    directory = Path(path)
    if is_legacy(directory) or detect_form(directory) == EXCHANGE:
        return read_exchange_config(directory)
    raise_problems([file_problem(directory, training_manifest(directory), STATE, deep=True)], EARLIER)
    return _stored_config(directory, read_json(directory / STATE, EARLIER))


def read_weights(path: str | Path, *, verify: bool = True, processes: Processes = ONE_PROCESS) -> Mapping[str, Tensor]:
    """Parameter name -> tensor on the CPU, read on every access, from a checkpoint of either form.

    verify, processes: as in `read_training`; exchange form is checked by each process.
    """
    if detect_form(path) == EXCHANGE:
        return read_exchange(path, verify=verify).weights
    checkpoint = read_training(path, verify=verify, processes=processes)
    check_open(checkpoint.state, path)
    return checkpoint.model


def verify(path: str | Path, *, deep: bool = True) -> list[str]:
    """Everything that is wrong with a checkpoint of either form, one line each; empty when nothing is.

    Args:
        path: the directory. A plain Hugging Face folder has no MANIFEST.json; of it only tensors' shapes are checked.
        deep: also compute the crc32 of every file, and compare the tensors with the configuration.

    Raises:
        FileNotFoundError: there is nothing at `path`.
    """
    directory = Path(path)
    try:
        form = detect_form(directory)
        if is_legacy(directory):
            return []
        if form == TRAINING or (directory / MANIFEST).exists():
            manifest = read_manifest(directory)
            strays = unlisted_files(directory, manifest, PARTS)
            raise_problems(directory_problems(directory, manifest, deep=deep) + strays, EARLIER)
        if deep:
            read_exchange(directory, verify=False) if form == EXCHANGE else read_training(directory, verify=False)
    except DataError as error:
        return str(error).splitlines()
    return []


def manifest_sha256(path: str | Path) -> str:
    """The identity of a checkpoint: sha256 of its MANIFEST.json, or of what a plain Hugging Face folder would get.

    Of a legacy file its own.
    """
    if is_legacy(path):
        return file_sha256(legacy_file(path))
    directory = Path(path)
    if (directory / MANIFEST).exists() or detect_form(directory) == TRAINING:
        read_manifest(directory)
        return sha256((directory / MANIFEST).read_bytes()).hexdigest()
    return sha256(render_manifest(manifest_of(directory, EXCHANGE))).hexdigest()
