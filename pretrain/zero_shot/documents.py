"""The documents of a task's file: JSON lines, blocks of lines, or WikiText's articles."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_gpt.errors import DataError


@dataclass(frozen=True)
class Document:
    """One item of a file."""

    values: dict[str, Any]
    line: int
    """Of the file, from 1: where it begins."""


def read_documents(path: Path, file_format: str, lines: Sequence[str] = ()) -> list[Document]:
    """All documents of a file.

    Args:
        path: the file, in UTF-8.
        file_format: one of FORMATS.
        lines: for `blocks`, the name of each line of a block.

    Raises:
        DataError: it is damaged, of another format, or empty.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line} is not UTF-8; restore the file") from None
    found = list(FORMATS[file_format](path, text.split("\n"), lines))
    if not found:
        raise DataError(f"{path} holds no document; restore the file")
    return found


def _json_lines(path: Path, text: list[str], _: Sequence[str]) -> Iterator[Document]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}; restore the file") from None
        if not isinstance(values, dict):
            raise DataError(f"{path}, line {number} is not a JSON object; restore the file")
        yield Document(values, number)


def _blocks(path: Path, text: list[str], names: Sequence[str]) -> Iterator[Document]:
    """Documents of one line per field, with empty lines between them."""
    block: list[str] = []
    for number, line in enumerate([*text, ""], 1):
        if line.strip():
            block.append(line)
            continue
        if block:
            start = number - len(block)
            if len(block) != len(names):
                raise DataError(
                    f"{path}, line {start}: {len(block)} lines where {len(names)} ({', '.join(names)}) make a "
                    f"document; restore the file"
                )
            yield Document(dict(zip(names, block, strict=True)), start)
        block = []


def _articles(_: Path, text: list[str], __: Sequence[str]) -> Iterator[Document]:
    """Articles of WikiText in its raw form, each with its heading, in the field `page`."""
    page, start = [], 1
    for number, line in enumerate(text, 1):
        if _is_heading(line) and number > start:
            yield from _article(page, start)
            page, start = [], number
        page.append(line)
    yield from _article(page, start)


def _article(page: list[str], start: int) -> Iterator[Document]:
    if "".join(page).strip():
        yield Document({"page": "\n".join(page)}, start)


def _is_heading(line: str) -> bool:
    flat = line.replace("= = =", "===").replace("= =", "==").strip()
    return flat.startswith("= ") and flat.endswith(" =")


FORMATS: dict[str, Callable[[Path, list[str], Sequence[str]], Iterator[Document]]] = {
    "jsonl": _json_lines,
    "blocks": _blocks,
    "articles": _articles,
}
"""`format` of a task -> its reader."""
