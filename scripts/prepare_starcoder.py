"""Prepare StarCoderData as TinyLlama's script of this name does.

The source is the dataset as it was downloaded: a folder for each language with parquet files. The output is the folder
DESTINATION/train_starcoder, which `pretrain` reads; `prepare.py export` makes TinyLlama's own chunks of it.

What differs from TinyLlama: --percentage takes the first files by name, not in the order of the file system; a parquet
file that cannot be read is an error, unless --on-bad-file skip says otherwise, and is then listed in the manifest;
--filenames_subset looks at the path below the source only; files are cut where documents end, not every 2049 * 1024
tokens. After each document comes the eos token and nothing before it, as with TinyLlama's present default and a
tokenizer.model; --separator-id puts another token there.
"""

from __future__ import annotations

from prep.lineage import Corpus, main

from lit_gpt.errors import run_command

STARCODER = Corpus(
    name="starcoder",
    sets={"starcoder": ("*/*.parquet",)},
    splits=("train",),
    options=("--text-key", "content"),
    subset_patterns=("*{subset}*/*.parquet", "*/*{subset}*.parquet"),
)

if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(STARCODER, __doc__)))
