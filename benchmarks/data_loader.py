"""Tokens per CPU-second of the data loader, beside TinyLlama's own, and the cost of jumping to token 1e12.

Run `python -m benchmarks.data_loader --tinyllama DIR` with a checkout of github.com/jzhang38/TinyLlama; it writes
results/data_loader.json. Without the checkout our side alone is measured. All variants read the same 96 files (403 MB)
in turns in one process, from the page cache, with the same two weighted sources and block_size 2048. CPU time counts
all threads of the process, so neighbours on the machine matter little.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.machine import describe
from benchmarks.result_files import RESULTS, add_out, write_result
from lit_gpt.data_order import DataOrder
from lit_gpt.packed_data import PackedData
from lit_gpt.packed_dataset import write_token_file
from lit_gpt.prefetch import batches
from lit_gpt.token_files import find_token_files
from lit_gpt.token_source import TokenSource

BLOCK_SIZE = 2048
FILE_TOKENS = (BLOCK_SIZE + 1) * 1024  # TinyLlama's chunk
FILES = {"slim": 67, "star": 29}
WEIGHTS = {"slim": 0.693584, "star": 0.306416}  # TinyLlama's
VOCAB_SIZE = 32_000
SEED = 3407
ROWS = 16_384  # per repeat: 34 million tokens
REPEATS = 7
QUICK = (16 * (BLOCK_SIZE + 1), 512, 1)  # file tokens, rows and repeats of a smoke run
FLOORS = {8: 0.9, 64: 1.0}  # of TinyLlama's tokens per CPU-second, by micro-batch
JUMP_TOKENS, JUMP_RANKS, JUMP_MICRO_BATCH = 10**12, 32, 8
RESULT = RESULTS / "data_loader.json"


def write_files(folder: Path, file_tokens: int) -> None:
    """Random tokens in the lineage's names: `{source}_{process}_{counter}.bin`."""
    generator = np.random.default_rng(0)
    for name, count in FILES.items():
        for number in range(count):
            tokens = generator.integers(0, VOCAB_SIZE, file_tokens, dtype=np.uint16)
            write_token_file(folder / f"{name}_0_{number:010d}.bin", tokens, np.dtype("<u2"))


def our_data(folder: Path) -> PackedData:
    sources = {
        name: TokenSource(find_token_files(f"{folder}/{name}*", trim=False), BLOCK_SIZE, VOCAB_SIZE) for name in FILES
    }
    order = DataOrder({name: source.n_samples for name, source in sources.items()}, SEED, WEIGHTS)
    return PackedData(sources, order)


def our_batches(packed: PackedData, micro_batch_size: int, start: int, rows: int) -> Iterator[np.ndarray]:
    """What the training loop reads: with the prefetch thread."""
    steps = rows // micro_batch_size
    with batches(
        packed, start=start, steps=steps, global_batch_size=micro_batch_size, micro_batch_size=micro_batch_size
    ) as stream:
        yield from stream


def our_rows(packed: PackedData, rows_per_call: int, start: int, rows: int) -> Iterator[np.ndarray]:
    """Without a thread, so many rows per call."""
    for position in range(start, start + rows, rows_per_call):
        yield packed.samples(position, rows_per_call)


def tinyllama_module(checkout: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("tinyllama_packed_dataset", checkout / "lit_gpt/packed_dataset.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tinyllama_loader(module: ModuleType, folder: Path, batch_size: int) -> Iterator[Any]:
    """The peer's DataLoader for one rank, put together as its trainer does: groups of 8 files, no worker processes."""
    from torch.utils.data import DataLoader

    datasets = []
    for name in WEIGHTS:
        names = sorted(str(path) for path in folder.glob(f"{name}*"))
        random.seed(SEED)
        random.shuffle(names)
        datasets.append(module.PackedDataset(names, n_chunks=8, block_size=BLOCK_SIZE + 1, shuffle=True, seed=SEED))
    combined = module.CombinedDataset(datasets=datasets, seed=SEED, weights=list(WEIGHTS.values()))
    return iter(DataLoader(combined, batch_size=batch_size, shuffle=False))


def first_rows(stream: Iterator[Any], rows: int) -> Iterator[Any]:
    seen = 0
    while seen < rows:
        batch = next(stream)
        seen += len(batch)
        yield batch


def cpu_secs(stream: Iterator[Any], expected_rows: int) -> tuple[float, float]:
    """(CPU seconds of all threads, wall seconds) to read a stream to its end."""
    started, wall = time.process_time(), time.perf_counter()
    rows = sum(len(batch) for batch in stream)
    secs = time.process_time() - started, time.perf_counter() - wall
    assert rows == expected_rows
    return secs


def variants(folder: Path, tinyllama: ModuleType | None, rows: int) -> dict[str, Callable[[int], Iterator[Any]]]:
    """Name -> a function from the repeat's number to a stream of so many rows."""
    packed = our_data(folder)
    made: dict[str, Callable[[int], Iterator[Any]]] = {}
    for size in FLOORS:
        made[f"ours, micro-batch {size}"] = lambda n, size=size: our_batches(packed, size, n * rows, rows)
        if tinyllama is not None:
            loader = tinyllama_loader(tinyllama, folder, size)
            made[f"TinyLlama DataLoader, batch {size}"] = lambda n, loader=loader: first_rows(loader, rows)
    for size in (8, 64, 512):
        made[f"ours without the thread, {size} rows a call"] = lambda n, size=size: our_rows(
            packed, size, n * rows, rows
        )
    return made


def measure(folder: Path, tinyllama: ModuleType | None, rows: int, repeats: int) -> dict[str, dict[str, float]]:
    """Million tokens per CPU-second and per second of wall time, medians over the repeats; the variants take turns."""
    streams = variants(folder, tinyllama, rows)
    secs: dict[str, list[tuple[float, float]]] = {name: [] for name in streams}
    for repeat in range(-1, repeats):  # the first round warms caches and is not counted
        for name, stream in streams.items():
            taken = cpu_secs(stream(repeat + 1), rows)
            if repeat >= 0:
                secs[name].append(taken)
    tokens = rows * BLOCK_SIZE / 1e6
    return {
        name: {
            "million_tokens_per_cpu_sec": tokens / statistics.median(cpu for cpu, _ in each),
            "million_tokens_per_cpu_sec_slowest": tokens / max(cpu for cpu, _ in each),
            "million_tokens_per_cpu_sec_fastest": tokens / min(cpu for cpu, _ in each),
            "million_tokens_per_wall_sec": tokens / statistics.median(wall for _, wall in each),
        }
        for name, each in secs.items()
    }


def ratios(results: dict[str, dict[str, float]]) -> dict[str, float]:
    key = "million_tokens_per_cpu_sec"
    return {
        str(size): results[f"ours, micro-batch {size}"][key] / results[f"TinyLlama DataLoader, batch {size}"][key]
        for size in FLOORS
        if f"TinyLlama DataLoader, batch {size}" in results
    }


def jump(folder: Path, tinyllama: ModuleType | None, repeats: int) -> dict[str, float]:
    """Seconds to the sample behind JUMP_TOKENS: ours by asking for it, the peer's by its loop over all before it."""
    position = JUMP_TOKENS // BLOCK_SIZE
    secs = []
    for repeat in range(repeats):
        packed = our_data(folder)
        started = time.perf_counter()
        packed.samples(position + repeat, JUMP_MICRO_BATCH)
        secs.append(time.perf_counter() - started)
    result = {"ours_secs": statistics.median(secs)}
    if tinyllama is not None:
        iterations = 2_000
        loader = tinyllama_loader(tinyllama, folder, JUMP_MICRO_BATCH)
        next(loader)
        started = time.process_time()
        for _ in range(iterations):
            next(loader)
        per_iteration = (time.process_time() - started) / iterations
        to_skip = position / JUMP_RANKS / JUMP_MICRO_BATCH
        result |= {"tinyllama_cpu_secs_per_iteration": per_iteration, "tinyllama_iterations": to_skip}
        result |= {"tinyllama_cpu_secs_extrapolated": per_iteration * to_skip}
        result["times_faster"] = result["tinyllama_cpu_secs_extrapolated"] / result["ours_secs"]
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_loader", description=__doc__)
    parser.add_argument("--tinyllama", type=Path, metavar="DIR", help="a checkout of TinyLlama to measure beside")
    parser.add_argument("--quick", action="store_true", help="small files, once: does it run?")
    add_out(parser, RESULT, unless_quick=True)
    args = parser.parse_args()
    file_tokens, rows, repeats = QUICK if args.quick else (FILE_TOKENS, ROWS, REPEATS)
    tinyllama = None if args.tinyllama is None else tinyllama_module(args.tinyllama)
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), file_tokens)
        results = measure(Path(folder), tinyllama, rows, repeats)
        jumped = jump(Path(folder), tinyllama, repeats)
    found = ratios(results)
    kept = all(ratio >= FLOORS[int(size)] for size, ratio in found.items())
    record = {
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.data_loader --tinyllama DIR",
        "what": f"{sum(FILES.values())} files of {file_tokens} tokens, block_size {BLOCK_SIZE}, weights {WEIGHTS}, "
        f"page cache; {rows} rows per repeat, medians of {repeats} repeats",
        "results": results,
        "over_tinyllama_by_micro_batch": found,
        "floors": {"by_micro_batch": {str(size): floor for size, floor in FLOORS.items()}, "kept": kept},
        f"jump_to_token_{JUMP_TOKENS:.0e}": jumped,
        "machine": describe(),
    }
    for name, result in results.items():
        rate, slowest, fastest = (result[f"million_tokens_per_cpu_sec{end}"] for end in ("", "_slowest", "_fastest"))
        wall = result["million_tokens_per_wall_sec"]
        print(f"{name}: {rate:.0f} M tokens per CPU-second ({slowest:.0f} to {fastest:.0f}), {wall:.0f} M per second")
    for size, ratio in found.items():
        print(f"over TinyLlama at micro-batch {size}: {ratio:.2f}x (floor {FLOORS[int(size)]}x)")
    print("jump: " + ", ".join(f"{key} {value:.4g}" for key, value in jumped.items()))
    if args.out or not args.quick:
        write_result(args.out or RESULT, record)
    print(f"floors {'kept' if kept else 'MISSED'}")
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
