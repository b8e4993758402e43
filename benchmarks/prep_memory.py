"""Peak memory of preparing 2 GB of JSON lines, in one file and in many, and of training a tokenizer on them.

Run `python -m benchmarks.prep_memory`; it needs 7 GB in the folder for temporary files (TMPDIR) and writes
results/prep_memory.json. The peak is the largest resident set of any process of the command, as the system counts it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.result_files import RESULTS, add_out, write_result

ROOT = Path(__file__).resolve().parent.parent
TEXT_BYTES = 2_000_000_000
LIMIT_BYTES = 1_000_000_000
LAYOUTS = {"one file": 1, "200 files": 200}
RUNS = {
    "bytes": ["--tokenizer", "bytes"],
    "training a tokenizer": ["--vocab-size", "4096", "--plan-only"],
}
LONG_DOCUMENT_CHARACTERS = 1_000_000
RESULT = RESULTS / "prep_memory.json"


def documents(seed: int) -> Iterator[str]:
    """Without end: made-up words, lengths as on the web with a mean of 5 kB, and one document in a thousand of 1 MB."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(20_000)]
    pool = " ".join(rng.choices(words, k=1_500_000))
    while True:
        n = min(int(rng.lognormvariate(7.8, 1.2)), 500_000) if rng.random() > 0.001 else LONG_DOCUMENT_CHARACTERS
        start = rng.randrange(len(pool) - n)
        yield pool[start : start + n]


def write_corpus(folder: Path, n_files: int, n_bytes: int) -> int:
    """JSON lines of about `n_bytes` in all; returns how many bytes they have."""
    folder.mkdir()
    texts, written = documents(0), 0
    for number in range(n_files):
        with open(folder / f"part-{number:04d}.jsonl", "w", encoding="utf-8") as file:
            while file.tell() < n_bytes // n_files:
                for _ in range(10):  # asking for the place in the file costs more than a line
                    file.write(json.dumps({"text": next(texts), "meta": {"source": "made up"}}) + "\n")
            written += file.tell()
    return written


def measure(source: Path, out: Path, options: list[str]) -> dict[str, Any]:
    """One run with one worker: its peak memory and its time."""
    started_secs = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "prepare.py"), "--input", str(source), "--out", str(out), *options],
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"prepare.py ended with exit status {process.returncode}")
    shutil.rmtree(out)
    return {
        "peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "cpu_secs": round(usage.ru_utime + usage.ru_stime, 1),
        "secs": round(time.monotonic() - started_secs, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=TEXT_BYTES, help="size of the corpus (%(default)s)")
    add_out(parser, RESULT)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for layout, n_files in LAYOUTS.items():
            source = Path(folder, "in")
            written = write_corpus(source, n_files, args.bytes)
            for name, options in RUNS.items():
                found = measure(source, Path(folder, "out"), options)
                results[f"{layout}, {name}"] = {"files": n_files, "input_bytes": written, **found}
                print(f"{layout}, {name}: {found['peak_bytes'] / 1e6:.0f} MB at most, {found['secs']} s", flush=True)
            shutil.rmtree(source)
    within = all(each["peak_bytes"] <= LIMIT_BYTES for each in results.values())
    record = {
        "command": "python -m benchmarks.prep_memory",
        "what": "peak resident memory of prepare.py with one worker",
        "limits": {"memory_bytes": LIMIT_BYTES, "kept": within},
        "results": results,
        "machine": describe(),
    }
    write_result(args.out, record)
    print(f"limit ({LIMIT_BYTES / 1e6:.0f} MB) {'kept' if within else 'MISSED'}; {args.out.name} written")
    return 0 if within else 1


if __name__ == "__main__":
    raise SystemExit(main())
