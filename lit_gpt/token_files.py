"""What a path holds: the token files of a folder, a file or a pattern, in the order in which they are read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.errors import DataError
from lit_gpt.packed_dataset import MANIFEST, TokenFile, load_manifest, read_header

FINGERPRINT_BYTES = 512


class TokenFiles(Sequence[TokenFile]):
    """Token files of one format and one type, in the order in which they are read."""

    def __init__(self, files: Sequence[TokenFile], kind: str, notes: Sequence[str] = ()) -> None:
        self._files = list(files)
        self.kind = kind
        """litpkds, datatrove, megatron or raw."""
        self.notes = tuple(notes)
        """One sentence each: what was trimmed, left out or assumed."""
        self.n_tokens = np.fromiter((file.n_tokens for file in files), np.int64, len(files))
        self.dtype = one_dtype(files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: Any) -> Any:
        return TokenFiles(self._files[index], self.kind) if isinstance(index, slice) else self._files[index]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self)

    def by_name(self) -> TokenFiles:
        """In the lexicographic order of their names, as `sorted(glob(...))` gives them."""
        return TokenFiles(sorted(self._files, key=lambda file: file.path), self.kind, self.notes)


def one_dtype(files: Sequence[TokenFile]) -> np.dtype:
    """The type that all files share.

    Raises:
        DataError: two files differ.
    """
    for file in files:
        if file.dtype != files[0].dtype:
            raise DataError(
                f"{file.path} holds {file.dtype} tokens, but {files[0].path} holds {files[0].dtype}; "
                f"files of one source need one dtype, so prepare them in one go"
            )
    return files[0].dtype


def find_token_files(
    path: str | os.PathLike[str],
    split: str = "train",
    *,
    dtype: str | None = None,
    trim: bool = True,
    cache: Path | None = None,
) -> TokenFiles:
    """The token files of one split: those the manifest lists, or without a manifest all `{split}*.bin` of the folder.

    Raises:
        FileNotFoundError: no folder, or no file of this split.
        DataError: a file is damaged, or does not hold what the manifest says.
    """
    directory = Path(path)
    if (directory / MANIFEST).is_file():
        return TokenFiles(_files_of_manifest(directory, split), "litpkds")
    if not directory.is_dir():
        raise FileNotFoundError(f"data folder {directory} does not exist; prepare it with scripts/prepare.py")
    paths = sorted(directory.glob(f"{split}*.bin"), key=_natural_key)
    if not paths:
        raise FileNotFoundError(f"{directory} holds no {split}*.bin; prepare it with scripts/prepare.py")
    return TokenFiles([read_header(path) for path in paths], "litpkds")


def _files_of_manifest(directory: Path, split: str) -> list[TokenFile]:
    splits = load_manifest(directory)["splits"]
    if not splits.get(split, {}).get("files"):
        held = ", ".join(name for name, each in splits.items() if each["files"])
        raise FileNotFoundError(
            f"{directory} holds no {split} data; it holds {held}. Name a folder that does, or prepare the text again: "
            f"scripts/prepare.py --document-bytes cuts long files, --validation-input names held-out ones"
        )
    files = [read_header(directory / name) for name in splits[split]["files"]]
    _check_total(directory, files, splits[split]["tokens"])
    return files


def _check_total(directory: Path, files: Iterable[TokenFile], expected_tokens: int) -> None:
    found_tokens = sum(file.n_tokens for file in files)
    if found_tokens != expected_tokens:
        raise DataError(
            f"{directory / MANIFEST} announces {expected_tokens} tokens, its files hold {found_tokens}; "
            f"files were exchanged, so prepare the data again"
        )


def _natural_key(path: Path) -> list[tuple[int, str]]:
    """Numbers inside a name count as numbers: `x_2.bin` comes before `x_10.bin`."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part) if part.isdigit() else -1, part) for part in parts]


def fingerprint(files: Sequence[TokenFile]) -> str:
    """sha256 over names, sizes and first tokens. Opens every file once, and so finds those that are not whole."""
    digest = sha256()
    for file in files:
        with open(file.path, "rb", buffering=0) as opened:
            found_bytes = os.fstat(opened.fileno()).st_size
            if found_bytes < file.end_bytes:
                raise DataError(
                    f"{file.path} is truncated: expected {file.end_bytes} bytes, found {found_bytes} bytes; "
                    f"copy or prepare it again"
                )
            opened.seek(file.byte_offset)
            head = opened.read(min(FINGERPRINT_BYTES, file.n_tokens * file.dtype.itemsize))
        digest.update(f"{Path(file.path).name}\x1f{file.n_tokens}\x1f{file.dtype.str}\x1f".encode())
        digest.update(sha256(head).digest())
    return digest.hexdigest()
