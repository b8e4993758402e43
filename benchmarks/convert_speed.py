"""Conversion of dense weights against copying the same bytes, and against litgpt's converter where it is installed.

Run `python -m benchmarks.convert_speed`; it writes results/convert_speed.json. At its default size, TinyLlama's 1.1B
parameters in fp32, it needs some 20 GB of disk. `--n-layer 2` is a small run. litgpt runs in an environment of its own,
made for instance by `python -m venv DIR && DIR/bin/pip install litgpt`, and named by `--litgpt-python DIR/bin/python`.
Every measurement is a process of its own, in turns over the repeats, without its imports; the source is read once
before each, so that it is in the page cache for all, and what was written is on the disk when the clock stops.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.grow_speed import RandomWeights, copy, report_goals
from benchmarks.machine import describe, own_memory
from benchmarks.result_files import RESULTS, add_out, write_result

RESULT = RESULTS / "convert_speed.json"
MODEL = "tiny_LLaMA_1b"
LITGPT_MODEL = "tiny-llama-1.1b"
LIMIT_OVER_CP = 1.5
LIMIT_RSS_BYTES = 1_000_000_000
CP, EXCHANGE, HASHED, LEGACY, BACK, LITGPT = (
    "cp and fsync",
    "folder to exchange form",
    "folder to exchange form, with sha256",
    "folder to lit_model.pth",
    "lit_model.pth to exchange form",
    "litgpt, folder to lit_model.pth",
)
# What litgpt's command does, measured as the others are: source and destination are its folder.
LITGPT_PROGRAM = """
import contextlib, io, json, os, sys, time
from pathlib import Path
from benchmarks.machine import own_memory
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
folder, name = Path(sys.argv[1]), sys.argv[2]
imported, start = own_memory("VmRSS"), time.perf_counter()
with contextlib.redirect_stdout(io.StringIO()):
    convert_hf_checkpoint(folder, model_name=name)
with (folder / "lit_model.pth").open("rb") as file:
    os.fsync(file.fileno())
secs = time.perf_counter() - start
print(json.dumps({"secs": secs, "import_rss_bytes": imported, "peak_rss_bytes": own_memory("VmHWM")}))
"""


# Measured, each in a process of its own: a function of (source, destination) that returns nothing


def converting(to: str, hash_inputs: bool = False) -> Callable[[Path, Path], None]:
    from lit_gpt.conversion import convert

    def run(src: Path, dst: Path) -> None:
        convert(src, dst, to=to, parity="never", hash_inputs=hash_inputs)

    return run


MEASURED: dict[str, Callable[[], Callable[[Path, Path], None]]] = {
    CP: copy,
    EXCHANGE: lambda: converting("exchange"),
    HASHED: lambda: converting("exchange", hash_inputs=True),
    LEGACY: lambda: converting("legacy"),
    BACK: lambda: converting("exchange"),
}


def measure_here(name: str, src: Path, dst: Path) -> None:
    """Print what one measurement took, imports not counted, as JSON."""
    run = MEASURED[name]()
    import_rss_bytes = own_memory("VmRSS")
    start = time.perf_counter()
    run(src, dst)
    secs = time.perf_counter() - start
    print(json.dumps({"secs": secs, "import_rss_bytes": import_rss_bytes, "peak_rss_bytes": own_memory("VmHWM")}))


def measure(name: str, src: Path, dst: Path, command: list[str]) -> dict[str, float]:
    """One measurement, by another process; the destination stays."""
    remove(dst)
    for file in [src] if src.is_file() else sorted(src.glob("*.safetensors")):
        subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
    os.sync()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    sys.stderr.write(f"{name}: {done.stdout.decode().strip()}\n")
    return json.loads(done.stdout)


def remove(path: Path) -> None:
    for each in (path, path.with_name(f"{path.name}.receipt.json")):
        shutil.rmtree(each) if each.is_dir() else each.unlink(missing_ok=True)


# The whole


def make_source(folder: Path, model: str, n_layer: int | None) -> Path:
    """Dense random fp32 weights as Hugging Face has them."""
    from lit_gpt.checkpoint import write_exchange
    from lit_gpt.config import Config

    config = Config.from_name(model, **({} if n_layer is None else {"n_layer": n_layer}))
    path = write_exchange(folder / "source", config, RandomWeights(config))
    for name in ("MANIFEST.json", "lit_config.json"):
        (path / name).unlink()
    return path


def run_all(folder: Path, model: str, n_layer: int | None, repeats: int, litgpt_python: str | None) -> dict[str, Any]:
    source = make_source(folder, model, n_layer)
    places = {
        CP: (source, folder / "copied"),
        EXCHANGE: (source, folder / "exchange"),
        HASHED: (source, folder / "exchange"),
        LEGACY: (source, folder / "lit_model.pth"),
        BACK: (folder / "lit_model.pth", folder / "back"),
    }
    commands = {
        name: [sys.executable, "-m", "benchmarks.convert_speed", "--measure", name, str(src), str(dst)]
        for name, (src, dst) in places.items()
    }
    if litgpt_python is not None:
        places[LITGPT] = (source, source / "lit_model.pth")
        commands[LITGPT] = [litgpt_python, "-c", LITGPT_PROGRAM, str(source), LITGPT_MODEL]
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in places}
    for _ in range(repeats):
        for name, (src, dst) in places.items():
            samples[name].append(measure(name, src, dst, commands[name]))
            if name != LEGACY:
                remove(dst)
    return {"bytes": sum(file.stat().st_size for file in source.glob("*.safetensors")), "samples": samples}


def summarise(samples: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians, ratios to cp and to litgpt of the same repeat, and which goals were kept."""
    medians = {
        name: {key: statistics.median(sample[key] for sample in each) for key in each[0]}
        for name, each in samples.items()
    }
    over_cp = {name: _ratio(samples[name], samples[CP]) for name in samples if name != CP}
    ours = [name for name in samples if name not in (CP, LITGPT)]
    kept = {
        **{f"{name} at most {LIMIT_OVER_CP} of cp": over_cp[name] <= LIMIT_OVER_CP for name in ours},
        **{f"{name} under 1 GB": medians[name]["peak_rss_bytes"] < LIMIT_RSS_BYTES for name in ours},
    }
    if LITGPT in samples:
        kept[f"{LEGACY} faster than litgpt"] = _ratio(samples[LEGACY], samples[LITGPT]) < 1
    return {"medians": medians, "over_cp": over_cp, "kept": kept}


def _ratio(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> float:
    return statistics.median(a["secs"] / b["secs"] for a, b in zip(ours, theirs, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL, help="name of the sizes (%(default)s); litgpt reads that one alone")
    parser.add_argument("--n-layer", type=int, help="fewer of its layers, for a small run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--litgpt-python", metavar="PATH", help="Python of an environment with litgpt")
    parser.add_argument("--directory", type=Path, help="for the checkpoints; a temporary one here by default")
    parser.add_argument("--measure", nargs=3, metavar=("NAME", "SRC", "DST"), help=argparse.SUPPRESS)
    add_out(parser, RESULT)
    args = parser.parse_args()
    if args.measure:
        name, src, dst = args.measure
        measure_here(name, Path(src), Path(dst))
        return 0
    with tempfile.TemporaryDirectory(dir=args.directory or Path.cwd(), prefix=".convert_speed-") as folder:
        measured = run_all(Path(folder), args.model, args.n_layer, args.repeats, args.litgpt_python)
    summary = summarise(measured["samples"])
    flags = [] if args.model == MODEL else [f"--model {args.model}"]
    flags += [] if args.n_layer is None else [f"--n-layer {args.n_layer}"]
    flags += ["--litgpt-python PATH"] if args.litgpt_python else []
    record = {
        "command": " ".join(["python -m benchmarks.convert_speed", *flags, f"--repeats {args.repeats}"]),
        "what": f"conversion of {measured['bytes'] / 1e9:.2f} GB, dense random fp32, source in the page cache",
        **summary,
        **measured,
        "machine": describe(),
    }
    write_result(args.out, record)
    report(summary)
    return 0 if all(summary["kept"].values()) else 1


def report(summary: dict[str, Any]) -> None:
    for name, each in summary["medians"].items():
        ratio = f", {summary['over_cp'][name]:.2f} of cp" if name in summary["over_cp"] else ""
        print(
            f"{name}: {each['secs']:.2f} s{ratio}, {each['peak_rss_bytes'] / 1e6:.0f} MB at most, "
            f"{each['import_rss_bytes'] / 1e6:.0f} MB of that after the imports"
        )
    report_goals(summary["kept"])


if __name__ == "__main__":
    raise SystemExit(main())
