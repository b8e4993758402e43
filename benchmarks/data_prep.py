"""Megabytes of text per CPU-second from jsonl.zst to token files, beside datatrove and TinyLlama's script.

Run `python -m benchmarks.data_prep --tinyllama DIR --datatrove PYTHON`: a checkout of github.com/jzhang38/TinyLlama,
and the interpreter of an environment with `datatrove[io]==0.10.1 regex nltk`. It writes results/data_prep.json. The
text is the books and web samples under LIT_GROW_DATA in SlimPajama's line layout, the tokenizer Llama's: SentencePiece
for us and TinyLlama, the JSON form of the same model for datatrove, which reads no other. One process each, in turns;
CPU time is counted from after the imports to the end, and the three token streams are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe
from benchmarks.result_files import RESULTS, add_out, write_result

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("LIT_GROW_DATA") or ROOT.parent / "shared" / "data")
TEXT_BYTES = 24_000_000
DOCUMENT_CHARACTERS = (500, 30_000)  # drawn evenly in the logarithm: as in web text, many short and some long ones
REPEATS = 5
QUICK = (200_000, 1)  # bytes of text and repeats of a smoke run
FLOORS = {"datatrove": 1.3, "TinyLlama": 1.0}
EOS = 2
RESULT = RESULTS / "data_prep.json"

OURS = """
import sys, time
sys.path.insert(0, "scripts")
import prepare
started = time.process_time()
code = prepare.main(["--input", "{source}", "--tokenizer", "{tokenizer}/tokenizer.model", "--out", "{out}",
    "--validation-fraction", "0", "--drop", "meta.redpajama_set_name=RedPajamaGithub"])
print("CPU", time.process_time() - started)
sys.exit(code)
"""

# The package's own __init__ imports CUDA kernels; its tokenizer and its builder need none of them.
TINYLLAMA = """
import sys, time, types
from pathlib import Path
package = types.ModuleType("lit_gpt")
package.__path__ = ["{peer}/lit_gpt"]
sys.modules["lit_gpt"] = package
import lit_gpt.packed_dataset, lit_gpt.tokenizer
package.Tokenizer = lit_gpt.tokenizer.Tokenizer
sys.path.insert(0, "{peer}/scripts")
import prepare_slimpajama, zstandard, sentencepiece
started = time.process_time()
prepare_slimpajama.prepare_full(Path("{source}"), Path("{tokenizer}"), Path("{out}"), 8192, "train", ["{source}"], 0)
print("CPU", time.process_time() - started)
"""

DATATROVE = """
import os, sys, time
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
import tokenizers, zstandard, orjson
steps = [
    JsonlReader(os.path.dirname("{source}"), glob_pattern="*.zst", compression="zstd"),
    LambdaFilter(lambda document: document.metadata["meta"]["redpajama_set_name"] != "RedPajamaGithub"),
    DocumentTokenizer("{out}", tokenizer_name_or_path="{tokenizer}/tokenizer.json", eos_token="</s>",
        shuffle_documents=False, save_index=True),
]
started = time.process_time()
LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir="{out}/logs").run()
print("CPU", time.process_time() - started)
"""


def documents(seed: int) -> list[str]:
    """Books cut at paragraphs into documents of drawn lengths, and the web samples between them."""
    draw = random.Random(seed)
    paragraphs = [
        paragraph
        for book in sorted((DATA / "books").glob("* - *.md"))
        for paragraph in book.read_text(encoding="utf-8").split("\n\n")
    ]
    web = [
        json.loads(line)["text"]
        for path in sorted((DATA / "web_samples").glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    texts: list[str] = []
    waiting: list[str] = []
    low, high = DOCUMENT_CHARACTERS
    wanted = low
    for paragraph in paragraphs:
        waiting.append(paragraph)
        if sum(map(len, waiting)) >= wanted:
            texts.append("\n\n".join(waiting))
            waiting, wanted = [], int(low * (high / low) ** draw.random())
            if draw.random() < 0.1:
                texts.append(web[draw.randrange(len(web))])
    return texts


def write_source(path: Path, n_bytes: int) -> int:
    """One jsonl.zst in SlimPajama's layout; returns the bytes of text that count (code from GitHub does not)."""
    import zstandard

    total, lines = 0, []
    texts = documents(seed=0)
    number = 0
    while total < n_bytes:
        text = texts[number % len(texts)]
        of_github = number % 20 == 7
        lines.append(
            json.dumps(
                {"text": text, "meta": {"redpajama_set_name": "RedPajamaGithub" if of_github else "RedPajamaC4"}}
            )
        )
        total += 0 if of_github else len(text.encode())
        number += 1
    path.write_bytes(zstandard.ZstdCompressor().compress(("\n".join(lines) + "\n").encode()))
    return total


def cpu_secs(python: str, script: str) -> float:
    """Run a script, which prints its own CPU time as the last line that begins with CPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("CPU ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{python} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return float(lines[-1].split()[1])


def tokens_of(name: str, out: Path) -> np.ndarray:
    """The token stream that a contestant wrote."""
    if name == "datatrove":
        return np.concatenate([np.fromfile(path, "<u2") for path in sorted(out.glob("*.ds"))])
    files = sorted(out.glob("train_0*.bin" if name == "ours" else "train_slimpajama_0_*.bin"))
    return np.concatenate([np.fromfile(path, "<u2", offset=24) for path in files])


def compare(streams: dict[str, np.ndarray]) -> dict[str, Any]:
    """Whether the streams agree; TinyLlama throws its last, partly filled chunk away."""
    ours = streams["ours"]
    result: dict[str, Any] = {"ours_tokens": len(ours)}
    for name, stream in streams.items():
        if name != "ours":
            result[name] = {"tokens": len(stream), "identical": bool(np.array_equal(stream, ours[: len(stream)]))}
    return result


def contestants(args: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """Name -> (interpreter, script)."""
    found = {"ours": (sys.executable, OURS)}
    if args.datatrove is not None:
        found["datatrove"] = (args.datatrove, DATATROVE)
    if args.tinyllama is not None:
        found["TinyLlama"] = (sys.executable, TINYLLAMA)
    return found


def measure(folder: Path, args: argparse.Namespace) -> tuple[int, dict[str, list[float]], dict[str, Any]]:
    source = folder / "source" / "part.jsonl.zst"
    source.parent.mkdir()
    text_bytes, repeats = QUICK if args.quick else (TEXT_BYTES, REPEATS)
    n_bytes = write_source(source, text_bytes)
    places = {"source": source, "tokenizer": DATA / "tokenizers" / "llama2", "peer": args.tinyllama}
    secs: dict[str, list[float]] = {}
    streams = {}
    for repeat in range(repeats):
        for name, (python, script) in contestants(args).items():
            out = folder / f"{name}-{repeat}"
            secs.setdefault(name, []).append(cpu_secs(python, script.format(out=out, **places)))
            streams[name] = tokens_of(name, out)
    return n_bytes, secs, compare(streams)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_prep", description=__doc__)
    parser.add_argument("--tinyllama", type=Path, metavar="DIR", help="a checkout of TinyLlama to measure beside")
    parser.add_argument("--datatrove", metavar="PYTHON", help="interpreter of an environment that has datatrove")
    parser.add_argument("--quick", action="store_true", help="a little text, once: does it run?")
    add_out(parser, RESULT, unless_quick=True)
    args = parser.parse_args()
    if not (DATA / "books").is_dir():
        print(f"no books under {DATA}; set LIT_GROW_DATA", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        n_bytes, secs, streams = measure(Path(folder), args)
    rates = {name: n_bytes / 1e6 / statistics.median(each) for name, each in secs.items()}
    ratios = {name: rates["ours"] / rate for name, rate in rates.items() if name != "ours"}
    kept = all(ratio >= FLOORS[name] for name, ratio in ratios.items())
    same = all(each["identical"] for name, each in streams.items() if name != "ours_tokens")
    record = {
        "command": "python -m benchmarks.data_prep --tinyllama DIR --datatrove PYTHON",
        "what": f"{n_bytes} bytes of text as one jsonl.zst, Llama tokenizer, one process, "
        f"medians of {len(secs['ours'])} repeats",
        "megabytes_per_cpu_sec": rates,
        "cpu_secs": secs,
        "ours_over": ratios,
        "floors": {**FLOORS, "kept": kept},
        "streams": streams,
        "machine": describe(),
    }
    for name, rate in rates.items():
        print(f"{name}: {rate:.2f} MB of text per CPU-second ({', '.join(f'{s:.2f}' for s in secs[name])} s)")
    for name, ratio in ratios.items():
        print(f"over {name}: {ratio:.2f}x (floor {FLOORS[name]}x)")
    print(f"token streams: {streams}")
    if args.out or not args.quick:
        write_result(args.out or RESULT, record)
    print(f"floors {'kept' if kept else 'MISSED'}, streams {'identical' if same else 'DIFFERENT'}")
    return 0 if kept and same else 1


if __name__ == "__main__":
    raise SystemExit(main())
