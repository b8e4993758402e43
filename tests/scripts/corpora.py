"""Small corpora for the tests of preparation, and what comes out of them."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np

from lit_gpt.packed_dataset import load_manifest
from lit_gpt.token_files import find_token_files
from lit_gpt.tokenizer import Tokenizer

WORDS = "the of and to in a is that for it was on are as with his they at be this from have or by one had not".split()


def make_texts(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [f"Document {i}.\n" + " ".join(rng.choices(WORDS, k=rng.randint(5, 300))) + "\n" for i in range(n)]


def write_corpus(folder: Path, texts: list[str], per_file: int = 20) -> Path:
    """Some JSON lines, some of them packed, as corpora come."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, first in enumerate(range(0, len(texts), per_file)):
        data = "".join(json.dumps({"text": text}) + "\n" for text in texts[first : first + per_file]).encode()
        name = f"part-{number:03d}.jsonl"
        if number % 2:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data, mtime=0))
        else:
            (folder / name).write_bytes(data)
    return folder


def documents_in(out: Path, split: str) -> list[str]:
    """The documents that the token files hold, cut at separators."""
    manifest, tokenizer = load_manifest(out), Tokenizer.load(out)
    texts = []
    for file in find_token_files(out, split):
        tokens = np.fromfile(file.path, file.dtype, offset=file.byte_offset).astype(np.int64)
        ends = np.flatnonzero(tokens == manifest["separator_id"])
        assert ends[-1] == len(tokens) - 1
        starts = [0, *(ends[:-1] + 1)]
        texts += [tokenizer.decode(tokens[start:end]) for start, end in zip(starts, ends, strict=True)]
    return texts


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
