"""The weights of a Hugging Face folder, read from its safetensors files one tensor at a time, under our names."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt.atomic import CHUNK_BYTES, MANIFEST, crc32_problem, crc32_text, file_problem, read_manifest
from lit_gpt.axes import HEAD, parameter_shapes
from lit_gpt.checksum import combined_crc32
from lit_gpt.config import Config
from lit_gpt.errors import DataError
from lit_gpt.hf import IGNORED, family_of, from_hf, hf_names, hf_shapes
from lit_gpt.lazy_tensors import LazyTensors, TensorSpec, all_finite, promoted
from lit_gpt.problems import bounded_shapes, raise_problems, read_json, shape_problems
from lit_gpt.safetensors_file import DTYPES, Entry, read_entries, read_tensor

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
ACCEPT_CHANGES = f"restore the file, or remove {MANIFEST} to accept the folder as it is"


@dataclass(frozen=True)
class ScannedTensor:
    """A stored tensor whose bytes were all looked at."""

    name: str
    """Hugging Face's."""
    path: Path
    entry: Entry
    crc32: int


class TensorFiles(LazyTensors):
    """Hugging Face name -> tensor, over one safetensors file or several with an index.

    Args:
        directory: the folder.
        manifest: what the files are checked against; None checks nothing.
        check_on_open: whether the crc32 of each file is computed before its first tensor is read. Otherwise only its
            size is checked then, and the rest is left to `scan`.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any] | None, *, check_on_open: bool = True) -> None:
        self.directory = directory
        self._manifest = manifest
        self._check_on_open = check_on_open
        self._open: dict[str, dict[str, Entry]] = {}
        self._file_of = self._find()

    def _find(self) -> dict[str, str]:
        if (self.directory / MODEL).is_file():
            return dict.fromkeys(self._entries(MODEL), MODEL)
        if (self.directory / INDEX).is_file():
            return self._indexed()
        raise DataError(f"{self.directory} has neither {MODEL} nor {INDEX}; it is not a complete Hugging Face folder")

    def _indexed(self) -> dict[str, str]:
        if self._manifest is not None:
            raise_problems([file_problem(self.directory, self._manifest, INDEX, deep=True)], ACCEPT_CHANGES)
        weight_map = read_json(self.directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in weight_map.values()
        ):
            raise DataError(f"{self.directory / INDEX} has no weight_map of tensor names to names of files beside it")
        missing = [f"{file}: {name}" for name, file in weight_map.items() if name not in self._entries(file)]
        raise_problems(
            [f"{self.directory}/{entry} is in the index, not in the file" for entry in missing], "get it again"
        )
        return weight_map

    def _entries(self, file_name: str) -> dict[str, Entry]:
        if file_name not in self._open:
            path = self.directory / file_name
            if self._manifest is not None:
                problem = file_problem(self.directory, self._manifest, file_name, deep=self._check_on_open)
                raise_problems([problem], ACCEPT_CHANGES)
            if not path.is_file():
                raise DataError(f"{path} is missing, {INDEX} lists it; get the folder again")
            self._open[file_name] = {entry.name: entry for entry in read_entries(path)}
        return self._open[file_name]

    def __getitem__(self, name: str) -> Tensor:
        return read_tensor(self.directory / self._file_of[name], self.entry(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def entry(self, name: str) -> Entry:
        """Where a tensor lies in its file, and of what kind it is."""
        return self._entries(self._file_of[name])[name]

    def spec(self, name: str) -> TensorSpec:
        entry = self.entry(name)
        return TensorSpec(entry.shape, DTYPES[entry.dtype])

    def scan(self, non_finite: list[str]) -> Iterator[ScannedTensor]:
        """Read every byte of every file once, in the order of the files, and check it against the manifest.

        Args:
            non_finite: takes the names of tensors that hold NaN or infinity, before they are handed out.

        Raises:
            DataError: after its last tensor, if the content of a file is not what the manifest says.
        """
        for file_name in dict.fromkeys(self._file_of.values()):
            yield from self._scan_file(file_name, non_finite)

    def _scan_file(self, file_name: str, non_finite: list[str]) -> Iterator[ScannedTensor]:
        path = self.directory / file_name
        entries = self._entries(file_name).values()  # the format allows no gaps between them
        buffer = memoryview(bytearray(CHUNK_BYTES))
        with path.open("rb", buffering=0) as file:
            n_bytes = min((entry.offset for entry in entries), default=path.stat().st_size)
            parts = [(_crc32(file, n_bytes, buffer, None)[0], n_bytes)]
            for entry in entries:
                crc32, finite = _crc32(file, entry.n_bytes, buffer, DTYPES.get(entry.dtype))
                parts.append((crc32, entry.n_bytes))
                if not finite:
                    non_finite.append(entry.name)
                if self._file_of.get(entry.name) == file_name:
                    yield ScannedTensor(entry.name, path, entry, crc32)
        if self._manifest is not None:
            found = crc32_text(combined_crc32(parts))
            raise_problems([crc32_problem(path, self._manifest["files"][file_name], found)], ACCEPT_CHANGES)


def _crc32(file: Any, n_bytes: int, buffer: memoryview, dtype: torch.dtype | None) -> tuple[int, bool]:
    """crc32 of the next `n_bytes` of an open file; and whether they are finite numbers, where a dtype is given."""
    crc32, finite, left = 0, True, n_bytes
    while left:
        n_read = 0
        wanted = min(left, buffer.nbytes)
        while n_read < wanted:  # whole numbers only
            more = file.readinto(buffer[n_read:wanted])
            if not more:
                raise DataError(f"{file.name} ends {left:,} bytes early: it was cut short meanwhile; get it again")
            n_read += more
        piece = buffer[:n_read]
        crc32 = zlib.crc32(piece, crc32)
        finite = finite and (dtype is None or all_finite(torch.frombuffer(piece, dtype=dtype)))
        left -= n_read
    return crc32, finite


class LitWeights(LazyTensors):
    """Our names over Hugging Face's files; q, k and v are fused on access."""

    def __init__(self, files: TensorFiles, config: Config) -> None:
        self.files = files
        self.config = config
        self._shapes = parameter_shapes(config)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._shapes:
            raise KeyError(name)
        return from_hf(name, self.files.__getitem__, self.config)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def spec(self, name: str) -> TensorSpec:
        dtypes = {self.files.spec(theirs).dtype for theirs in hf_names(name, family_of(self.config))}
        return TensorSpec(self._shapes[name], promoted(dtypes))

    def scan(self, *, allow_non_finite: bool = False) -> Iterator[ScannedTensor]:
        """Every stored tensor after all its bytes were looked at; all of every file is read, once.

        Raises:
            DataError: at the end, if weights are not finite, or a file is not what the manifest says. Nothing is
                handed out any more after the first weight that is not finite.
        """
        non_finite: list[str] = []
        for scanned in self.files.scan(non_finite):
            if allow_non_finite or not self._ours(non_finite):
                yield scanned
        if not allow_non_finite:
            found = [f"{self.files.directory}: {name} holds NaN or infinity" for name in self._ours(non_finite)]
            raise_problems(found, "use another checkpoint")

    def _ours(self, names: list[str]) -> list[str]:
        return list(dict.fromkeys(self._our_name[name] for name in names if name in self._our_name))

    @cached_property
    def _our_name(self) -> dict[str, str]:
        family = family_of(self.config)
        return {theirs: ours for ours in self._shapes for theirs in hf_names(ours, family)}


def tensor_problems(files: TensorFiles, config: Config) -> list[str]:
    """What is missing, too many, or of another shape or dtype than the configuration wants, one line each."""
    wanted: dict[str, tuple[int, ...]] = {}
    for name, shape in bounded_shapes(config, len(files), str(files.directory)).items():
        wanted |= hf_shapes(name, shape, config)
    spare = set(hf_names(HEAD)) if config.tie_embeddings else set()
    found = {name: files.entry(name).shape for name in files if name not in spare and not name.endswith(IGNORED)}
    problems = shape_problems(wanted, found, str(files.directory))
    return problems + [
        f"{files.directory}: {name} has dtype {files.entry(name).dtype}; weights have one of {', '.join(DTYPES)}"
        for name in wanted
        if name in found and files.entry(name).dtype not in DTYPES
    ]


def manifest_if_ours(directory: Path) -> dict[str, Any] | None:
    """The manifest of a folder that we wrote; a plain Hugging Face folder has none."""
    return read_manifest(directory) if (directory / MANIFEST).exists() else None
