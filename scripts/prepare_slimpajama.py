"""Prepare SlimPajama as TinyLlama's script of this name does, without its GitHub part.

The source is the dataset as it was downloaded: {split}/chunk*/*.jsonl.zst. The output is a folder for each split,
DESTINATION/train_slimpajama and so on, which `pretrain` reads; `prepare.py export` makes TinyLlama's own chunks of it.

What differs from TinyLlama: --percentage takes the first files by name, not in the order of the file system; files are
cut where documents end, not every 2049 * 1024 tokens, and none is left out at the end or filled up. After each document
comes the eos token and nothing before it, as with TinyLlama's present default and a tokenizer.model; earlier versions
put bos or nothing, and with a tokenizer.json whatever that adds by itself. --separator-id puts another token there. The
test split becomes held-out data like the validation split.
"""

from __future__ import annotations

from prep.lineage import Corpus, main

from lit_gpt.errors import run_command

SLIMPAJAMA = Corpus(
    name="slimpajama",
    sets={"slimpajama": ("{split}/chunk*/*",)},
    splits=("train", "validation", "test"),
    options=("--drop", "meta.redpajama_set_name=RedPajamaGithub"),
    why="prepare_slimpajama.py itself gives --drop meta.redpajama_set_name=RedPajamaGithub, as TinyLlama takes its "
    "code from StarCoder instead; files that do not say where a row comes from are prepared by prepare.py --input",
)

if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(SLIMPAJAMA, __doc__)))
