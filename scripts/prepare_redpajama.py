"""Prepare RedPajama-1T, or its sample, as lit-gpt's script of this name does.

The source is the dataset as it was downloaded: a folder for each of its seven sets, or the *_sample.jsonl files. The
output is a folder for each set, DESTINATION/train_redpajama_arxiv and so on, which `pretrain` reads with weights.

What differs from lit-gpt: the dumps of Common Crawl are found in their folders; files are cut where documents end, not
every (block_size + 1) * 1024 tokens, and none is filled up. After each document comes the eos token and nothing before
it; lit-gpt's versions differ in that, and --separator-id puts another token there. Nothing is held out: to hold out a
share of the documents, pass --split auto --validation-fraction 0.01.
"""

from __future__ import annotations

from prep.lineage import Corpus, main

from lit_gpt.errors import run_command

DUMPS = ("2019-30", "2020-05", "2021-04", "2022-05", "2023-06")
REDPAJAMA = Corpus(
    name="redpajama",
    sets={
        "arxiv": ("arxiv/arxiv*",),
        "book": ("book/book*",),
        "c4": ("c4/c4-train*",),
        "common_crawl": ("common_crawl/**/*.jsonl*",),
        "github": ("github/filtered*",),
        "stackexchange": ("stackexchange/stackexchange*",),
        "wikipedia": ("wikipedia/wiki*",),
    },
    sample_sets={
        "arxiv": ("arxiv_sample.jsonl",),
        "book": ("book_sample.jsonl",),
        "c4": ("c4_sample.jsonl",),
        "common_crawl": tuple(f"cc_{dump}_sample.jsonl" for dump in DUMPS),
        "github": ("github_sample.jsonl",),
        "stackexchange": ("stackexchange_sample.jsonl",),
        "wikipedia": ("wikipedia_sample.jsonl",),
    },
)

if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(REDPAJAMA, __doc__)))
