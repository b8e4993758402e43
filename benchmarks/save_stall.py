"""How long training stands still for a checkpoint: written while it goes on, against written before it goes on.

Run `python -m benchmarks.save_stall`; it writes results/save_stall.json. Two processes (FSDP2, gloo) hold one model and
AdamW's moments, some hundred MB together, and save it in turns in both ways; between two saves they compute for as long
as a background save takes, so that none waits for the one before. A stall is what `save` takes until it returns, on the
slower process; the last save of a run has none to overlap with and is synchronous. The first of each kind is not
counted. How long the background takes while training goes on, and what that costs the training, are recorded as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.forked import start_function
from benchmarks.machine import describe
from benchmarks.result_files import RESULTS, add_out, write_result

RESULT = RESULTS / "save_stall.json"
SIZE = 2
LIMIT = 0.2


def measure(folder: Path, n_layer: int, n_embd: int, repeats: int) -> None:
    """On every process; the first one writes down what both measured."""
    from pretrain.world import connected, find_world

    world = find_world()
    with connected(world, "cpu"):
        measured = measure_in(world, folder, n_layer, n_embd, repeats)
        everyone = world.gather(measured["samples"])
        measured["samples"] = [
            {key: each[0][key] if key == "way" else max(sample[key] for sample in each) for key in each[0]}
            for each in zip(*everyone, strict=True)
        ]
        if world.is_first:
            (folder / "measured.json").write_text(json.dumps(measured))


def measure_in(world: Any, folder: Path, n_layer: int, n_embd: int, repeats: int) -> dict[str, Any]:
    import torch

    from lit_gpt.config import Config
    from lit_gpt.model import InitialWeights
    from pretrain.checkpointing import RunCheckpoints
    from pretrain.config import CheckpointConfig, OptimizerConfig, ParallelConfig
    from pretrain.optim import build_optimizer
    from pretrain.parallel import Compute, build_model
    from pretrain.state import TrainState

    config = Config.from_name(f"{n_layer}L{n_embd}H", vocab_size=8192)
    compute, cpu = Compute("fp32", "none", ""), torch.device("cpu")
    model = build_model(config, InitialWeights(config, 0), compute, ParallelConfig(), world, device=cpu)
    optimizer = build_optimizer(model, OptimizerConfig())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    metadata = {"model_config": config.to_dict()}
    ways = {
        way: RunCheckpoints(folder / way, CheckpointConfig(keep_last=1, async_save=way == "async"), metadata, world)
        for way in ("sync", "async")
    }
    samples = []
    for repeat in range(repeats + 1):
        for way, checkpoints in ways.items():
            world.barrier()
            start = time.perf_counter()
            checkpoints.save(model, optimizer, TrainState(step_count=repeat), periodic=True)
            stall_secs = time.perf_counter() - start
            steps = 0
            while checkpoints._saving is not None:  # training, which changes what was copied
                optimizer.step()
                steps += 1
                checkpoints.poll()
            whole_secs = time.perf_counter() - start
            if repeat:
                samples.append({"way": way, "stall_secs": stall_secs, "until_saved_secs": whole_secs, "steps": steps})
    saved = ways["sync"].last
    assert saved is not None
    return {"bytes": sum(file.stat().st_size for file in saved.iterdir()), "samples": samples}


def summarise(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians, their ratio, and whether the goal was kept."""
    stalls = {
        way: statistics.median(sample["stall_secs"] for sample in measured["samples"] if sample["way"] == way)
        for way in ("sync", "async")
    }
    until_saved = statistics.median(
        sample["until_saved_secs"] for sample in measured["samples"] if sample["way"] == "async"
    )
    ratio = stalls["async"] / stalls["sync"]
    return {
        "bytes": measured["bytes"],
        "stall_secs": stalls,
        "async_until_saved_secs": until_saved,
        "async_over_sync": ratio,
        "kept": {f"async at most {LIMIT} of sync": ratio <= LIMIT},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-layer", type=int, default=6)
    parser.add_argument("--n-embd", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="for the checkpoints; a temporary one here by default")
    add_out(parser, RESULT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory or Path.cwd(), prefix=".save_stall-") as name:
        folder = Path(name)
        started = start_function(measure, (folder, args.n_layer, args.n_embd, args.repeats), SIZE, folder / "logs")
        if any(started.wait(1200)):
            sys.stderr.write(started.errors(0) + started.errors(1))
            return 1
        measured = json.loads((folder / "measured.json").read_text())
    summary = summarise(measured)
    record = {
        "command": f"python -m benchmarks.save_stall --n-layer {args.n_layer} --n-embd {args.n_embd} "
        f"--repeats {args.repeats}",
        "what": f"stall of a save of {args.n_layer}L{args.n_embd}H with moments on {SIZE} processes",
        **summary,
        "samples": measured["samples"],
        "machine": describe(),
    }
    write_result(args.out, record)
    print(json.dumps(summary, indent=1))
    return 0 if all(summary["kept"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
