"""Growth from checkpoint to checkpoint against copying the same bytes, and against loading and saving the whole model.

Run `python -m benchmarks.grow_speed`; it writes results/grow_speed.json. At its default sizes it needs some 30 GB of
disk and half an hour; `--n-layer 4 --n-embd 1024` is a small run. Every measurement is a process of its own, in turns
over the repeats; medians are compared. The source is read once before each measurement, so that it is in the page cache
for all of them, everything that is still to be written is written out, and what cp and growth wrote the last time is
removed, so that both find as much memory free as they will write. The first copy and the first growth do not count.
`load` is how many processes of the whole machine wanted a core: above their number, seconds say little.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, own_memory
from benchmarks.result_files import RESULTS, add_out, write_result

RESULT = RESULTS / "grow_speed.json"
LIMIT_OVER_CP = 1.1
LIMIT_DEPTH_RSS_BYTES = 400_000_000
LIMIT_METADATA_SECS = 1.0
FACTOR = 4
WIDTH_REPEATS = 1  # it takes minutes of arithmetic, and its memory, which is what has a goal, does not vary
CP = ("cp", "--reflink=never", "--sparse=never")


# Measured, each in a process of its own: a function of (source, destination) that returns nothing


def grow(operator: str, policy: str = "reset", *, training: bool = False, **sizes: int) -> Callable[[Path, Path], None]:
    from grow.apply import grow_checkpoint
    from grow.operators import plan_growth
    from lit_gpt.checkpoint import read_config

    if training:
        import lit_gpt.sharded_writer  # noqa: F401 (else imported late: torch.distributed takes longer than the growth)

    def run(src: Path, dst: Path) -> None:
        grow_checkpoint(src, dst, plan_growth(operator, read_config(src), **sizes), policy)

    return run


def load_and_save() -> Callable[[Path, Path], None]:
    """What a script does: the state dict is loaded, its layers are copied under their new names, and all is saved."""
    import torch

    from lit_gpt.axes import layer_of, with_layer

    def run(src: Path, dst: Path) -> None:
        weights = torch.load(src, weights_only=True)
        n_layer = 1 + max(layer_of(name) or 0 for name in weights)
        grown = {}
        for name, weight in weights.items():
            layer = layer_of(name)
            copies = [name] if layer is None else [with_layer(name, layer + n_layer * k) for k in range(FACTOR)]
            grown |= {copy: weight.clone() for copy in copies}
        with dst.open("wb") as file:
            torch.save(grown, file)
            file.flush()
            os.fsync(file.fileno())

    return run


def copy() -> Callable[[Path, Path], None]:
    def run(src: Path, dst: Path) -> None:
        dst.mkdir()
        for file in sorted(src.glob("*.safetensors")):
            subprocess.run([*CP, str(file), str(dst)], check=True)
            with (dst / file.name).open("rb") as copied:
                os.fsync(copied.fileno())

    return run


MEASURED: dict[str, Callable[[], Callable[[Path, Path], None]]] = {
    "cp and fsync": copy,
    "stack": lambda: grow("stack", factor=FACTOR),
    "torch.load and torch.save": load_and_save,
    "zero-width": lambda: grow("zero-width", factor=2),
    "stack of training form, reset": lambda: grow("stack", training=True, factor=FACTOR),
    "stack of training form, map": lambda: grow("stack", "map", training=True, factor=FACTOR),
}


def measure_here(name: str, src: Path, dst: Path) -> None:
    """Print what one measurement took, imports not counted, as JSON."""
    run = MEASURED[name]()
    import_rss_bytes = own_memory("VmRSS")
    start, cpu_start = time.perf_counter(), _cpu_secs()
    run(src, dst)
    took = {"secs": time.perf_counter() - start, "cpu_secs": _cpu_secs() - cpu_start}
    memory = {"import_rss_bytes": import_rss_bytes, "peak_rss_bytes": own_memory("VmHWM")}
    print(json.dumps({**took, **memory, "load": os.getloadavg()[0]}))


def _cpu_secs() -> float:
    """Of this process and of those that it started and waited for, in the kernel too."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(name: str, src: Path, dst: Path) -> dict[str, float]:
    """One measurement, by another process; the destination stays until the next one."""
    _remove(dst)
    for file in [src] if src.is_file() else sorted(src.rglob("*")):
        if file.is_file():
            subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
    os.sync()
    command = [sys.executable, "-m", "benchmarks.grow_speed", "--measure", name, str(src), str(dst)]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return {**json.loads(done.stdout), "process_secs": time.perf_counter() - start}


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


# What is grown


def make_sources(folder: Path, n_layer: int, n_embd: int) -> dict[str, Path]:
    """Random weights as exchange form, shallow and narrow; the shallow one as training form and as a state dict too."""
    import torch

    from lit_gpt.checkpoint import write_exchange, write_training
    from lit_gpt.config import Config

    shallow = Config.from_name(f"{n_layer // FACTOR}L{n_embd}H")
    narrow = dataclasses.replace(
        Config.from_name(f"{n_layer}L{n_embd}H"),
        name="narrow",
        n_embd=n_embd // 2,
        n_head=shallow.n_head // 2,
        n_query_groups=shallow.n_query_groups // 2,
        intermediate_size=shallow.intermediate_size // 2,
    )
    weights = RandomWeights(shallow)
    write_exchange(folder / "shallow", shallow, weights)
    write_exchange(folder / "narrow", narrow, RandomWeights(narrow))
    step = {"step": torch.tensor(1.0)}
    moments = {name: {"exp_avg": weights[name], "exp_avg_sq": weights[name], **step} for name in weights}
    write_training(folder / "training", weights, moments, training_state(shallow))
    del moments
    torch.save(dict(weights), folder / "shallow.pth")
    return {
        "shallow": folder / "shallow",
        "narrow": folder / "narrow",
        "training": folder / "training",
        "state dict": folder / "shallow.pth",
    }


def training_state(config: Any) -> dict[str, Any]:
    flops = {"paper": 0.0, "model": 0.0, "palm": 0.0}
    return {"format": 1, "model_config": config.to_dict(), "step_count": 1, "tokens": 1, "flops": flops, "history": []}


class RandomWeights(Mapping[str, Any]):
    """Dense random fp32 of a model's shapes, drawn on every access."""

    def __init__(self, config: Any) -> None:
        from lit_gpt.axes import parameter_shapes

        self._shapes = parameter_shapes(config)

    def __getitem__(self, name: str) -> Any:
        import torch

        generator = torch.Generator().manual_seed(len(name))
        return torch.rand(self._shapes[name], generator=generator).sub_(0.5)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


# The whole


def run_all(folder: Path, n_layer: int, n_embd: int, repeats: int) -> dict[str, Any]:
    sources = make_sources(folder, n_layer, n_embd)
    grown = folder / "stack"
    measure("stack", sources["shallow"], grown)
    measure("cp and fsync", grown, folder / "copied")
    places = {
        "cp and fsync": (grown, folder / "copied"),
        "stack": (sources["shallow"], grown),
        "torch.load and torch.save": (sources["state dict"], folder / "naive.pth"),
        "zero-width": (sources["narrow"], folder / "wide"),
        "stack of training form, reset": (sources["training"], folder / "reset"),
        "stack of training form, map": (sources["training"], folder / "map"),
    }
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in places}
    for repeat in range(repeats):
        for name, (src, dst) in places.items():
            if name == "zero-width" and repeat >= WIDTH_REPEATS:
                continue
            samples[name].append(measure(name, src, dst))
            sys.stderr.write(f"{repeat + 1}/{repeats} {name}: {samples[name][-1]['secs']:.2f} s\n")
            if dst not in (grown, folder / "copied"):
                _remove(dst)  # or its pages would push those of the sources out
    return {
        "written_bytes": sum(file.stat().st_size for file in grown.glob("*.safetensors")),
        "read_bytes": {name: _size(path) for name, path in sources.items()},
        "largest_tensor_bytes": largest_tensor_bytes(n_layer, n_embd),
        "samples": samples,
    }


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())


def largest_tensor_bytes(n_layer: int, n_embd: int) -> int:
    """Of the grown model, in fp32."""
    from math import prod

    from lit_gpt.axes import parameter_shapes
    from lit_gpt.config import Config

    return 4 * max(map(prod, parameter_shapes(Config.from_name(f"{n_layer}L{n_embd}H")).values()))


def summarise(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians, ratios to cp of the same repeat, and which goals were kept."""
    samples = measured["samples"]
    medians = {
        name: {key: statistics.median(sample[key] for sample in each) for key in each[0]}
        for name, each in samples.items()
    }
    over_cp = {
        name: statistics.median(
            ours["secs"] / cp["secs"]
            for ours, cp in zip(samples[name], samples["cp and fsync"], strict=False)  # width has fewer
        )
        for name in ("stack", "torch.load and torch.save", "zero-width")
    }
    width = medians["zero-width"]
    width_limit = width["import_rss_bytes"] + 2 * measured["largest_tensor_bytes"]
    kept = {
        f"stack at most {LIMIT_OVER_CP} of cp": over_cp["stack"] <= LIMIT_OVER_CP,
        "stack at most 400 MB": medians["stack"]["peak_rss_bytes"] <= LIMIT_DEPTH_RSS_BYTES,
        "zero-width at most what is imported and two of the largest tensor": width["peak_rss_bytes"] <= width_limit,
        **{
            f"{name} under 1 s": medians[name]["secs"] < LIMIT_METADATA_SECS
            for name in medians
            if "training form" in name
        },
    }
    return {"medians": medians, "over_cp": over_cp, "zero_width_rss_limit_bytes": width_limit, "kept": kept}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-layer", type=int, default=24, help=f"of the grown model, a multiple of {FACTOR}")
    parser.add_argument("--n-embd", type=int, default=2048, help="of the grown model, e.g. 1024 or 2048")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="for the checkpoints; a temporary one here by default")
    parser.add_argument("--measure", nargs=3, metavar=("NAME", "SRC", "DST"), help=argparse.SUPPRESS)
    add_out(parser, RESULT)
    args = parser.parse_args()
    if args.measure:
        name, src, dst = args.measure
        measure_here(name, Path(src), Path(dst))
        return 0
    with tempfile.TemporaryDirectory(dir=args.directory or Path.cwd(), prefix=".grow_speed-") as folder:
        measured = run_all(Path(folder), args.n_layer, args.n_embd, args.repeats)
    summary = summarise(measured)
    record = {
        "command": f"python -m benchmarks.grow_speed --n-layer {args.n_layer} --n-embd {args.n_embd} "
        f"--repeats {args.repeats}",
        "what": f"growth into {args.n_layer}L{args.n_embd}H, dense random fp32, source in the page cache",
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
            f"{name}: {each['secs']:.2f} s{ratio}, {each['cpu_secs']:.2f} s of CPU, at a load of {each['load']:.0f}; "
            f"{each['peak_rss_bytes'] / 1e6:.0f} MB at most, "
            f"{each['import_rss_bytes'] / 1e6:.0f} MB of that after the imports"
        )
    report_goals(summary["kept"])


def report_goals(kept: Mapping[str, bool]) -> None:
    for goal, is_kept in kept.items():
        print(f"{goal}: {'kept' if is_kept else 'MISSED'}")


if __name__ == "__main__":
    raise SystemExit(main())
