"""Cost of the data order at the scale of 1e12 tokens: time and memory to build the index, and to jump into it.

Run `python -m benchmarks.data_index`; it writes results/data_index.json. The files are simulated: their names and
lengths exist, in the same table as those of real files. Half a million of them is the layout of TinyLlama (2049 x 1024
tokens each); our own writer makes 1 GB files.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from typing import Any

import numpy as np

from benchmarks.machine import describe
from benchmarks.result_files import RESULTS, add_out, write_result
from lit_gpt.data_order import DataOrder
from lit_gpt.file_names import FileNames
from lit_gpt.packed_dataset import HEADER
from lit_gpt.token_files import TokenFiles
from lit_gpt.token_source import SampleIndex

TOKENS = 10**12
BLOCK_SIZE = 2048
FILE_TOKENS = {"TinyLlama, 2049 * 1024 tokens per file": 2049 * 1024, "ours, 2**29 tokens per file": 2**29}
FILES_PER_PROCESS = 8192
LIMIT_SECS, LIMIT_BYTES = 1.0, 50_000_000
REPEATS = 7
JUMPS = 200
RESULT = RESULTS / "data_index.json"


def build(file_tokens: int) -> tuple[DataOrder, list[SampleIndex], dict[str, TokenFiles]]:
    """Two sources with weights: the order over both, the index of each, and the files of each."""
    n_files = -(-TOKENS // file_tokens)
    counts = {"web": n_files * 7 // 10, "code": n_files - n_files * 7 // 10}
    files = {name: simulated(name, count, file_tokens) for name, count in counts.items()}
    indices = {name: SampleIndex(each.n_tokens, BLOCK_SIZE) for name, each in files.items()}
    order = DataOrder({name: index.n_samples for name, index in indices.items()}, 3407, {"web": 0.69, "code": 0.31})
    return order, [indices[name] for name in order.names], files


def simulated(name: str, count: int, file_tokens: int) -> TokenFiles:
    """The table that `find_token_files` reads from its cache, with names as the lineage's writer gives them."""
    numbers = np.arange(count)
    processes = numbers // FILES_PER_PROCESS
    groups = [(f"prepared/train_{name}_{process}_", ".bin") for process in range(int(processes.max()) + 1)]
    names = FileNames(groups, processes.astype(np.int32), numbers % FILES_PER_PROCESS, np.full(count, 10, np.uint8))
    columns = (np.full(count, file_tokens), np.full(count, HEADER.size), np.zeros((count, 32), np.uint8))
    return TokenFiles(names, *columns, dtype=np.dtype("<u2"), kind="litpkds")


def locate(order: DataOrder, indices: list[SampleIndex], positions: np.ndarray) -> None:
    """All that a read needs to know before it touches a file."""
    source, sample = order.locate(positions)
    for i, index in enumerate(indices):
        index.locate(sample[source == i])


def measure(file_tokens: int) -> dict[str, Any]:
    build_secs = [timed(lambda: build(file_tokens)) for _ in range(REPEATS)]
    tracemalloc.start()
    order, indices, files = build(file_tokens)
    locate(order, indices, np.arange(10**8, 10**8 + 1024))
    kept_bytes, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    starts = np.random.default_rng(0).integers(0, TOKENS // BLOCK_SIZE - 1024, JUMPS)
    jump_secs = [timed(lambda start=start: locate(order, indices, np.arange(start, start + 1))) for start in starts]
    batch_secs = [timed(lambda start=start: locate(order, indices, np.arange(start, start + 1024))) for start in starts]
    return {
        "files": sum(len(each) for each in files.values()),
        "samples": sum(index.n_samples for index in indices),
        "build_secs_median": statistics.median(build_secs),
        "build_secs_max": max(build_secs),
        "memory_kept_bytes": kept_bytes,
        "memory_peak_bytes": peak_bytes,
        "jump_secs_median": statistics.median(jump_secs),
        "jump_to_1024_samples_secs_median": statistics.median(batch_secs),
    }


def explicit_permutation() -> dict[str, Any]:
    """What a stored shuffle costs, for a hundredth of the samples: time and memory grow in proportion."""
    n = TOKENS // BLOCK_SIZE // 100
    secs = timed(lambda: np.random.default_rng(0).permutation(np.arange(n, dtype=np.uint32)))
    return {"samples": n, "secs": secs, "bytes": 4 * n, "secs_times_100": 100 * secs, "bytes_times_100": 400 * n}


def timed(function: Any) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_out(parser, RESULT)
    args = parser.parse_args()
    results = {name: measure(file_tokens) for name, file_tokens in FILE_TOKENS.items()}
    within = all(r["build_secs_max"] < LIMIT_SECS and r["memory_peak_bytes"] < LIMIT_BYTES for r in results.values())
    record = {
        "command": "python -m benchmarks.data_index",
        "what": f"index and order of {TOKENS:.0e} tokens, two weighted sources, block_size {BLOCK_SIZE}, no real files",
        "limits": {"build_secs": LIMIT_SECS, "memory_bytes": LIMIT_BYTES, "kept": within},
        "results": results,
        "stored_shuffle_of_a_hundredth": explicit_permutation(),
        "machine": describe(),
    }
    for name, result in results.items():
        print(
            f"{name}: {result['files']:,} files, {result['samples']:,} samples; "
            f"built in {1e3 * result['build_secs_median']:.1f} ms, {result['memory_peak_bytes'] / 1e6:.1f} MB at most; "
            f"a jump {1e3 * result['jump_secs_median']:.2f} ms, "
            f"with 1024 samples {1e3 * result['jump_to_1024_samples_secs_median']:.2f} ms"
        )
    stored = record["stored_shuffle_of_a_hundredth"]
    print(
        f"a stored shuffle of a hundredth of it: {stored['secs']:.2f} s and {stored['bytes'] / 1e6:.0f} MB, "
        f"so {stored['secs_times_100']:.0f} s and {stored['bytes_times_100'] / 1e9:.1f} GB for all"
    )
    write_result(args.out, record)
    print(
        f"limits ({LIMIT_SECS} s, {LIMIT_BYTES / 1e6:.0f} MB) {'kept' if within else 'MISSED'}; {args.out.name} written"
    )
    return 0 if within else 1


if __name__ == "__main__":
    raise SystemExit(main())
