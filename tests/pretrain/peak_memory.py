"""`python -m tests.pretrain.peak_memory OUT ...`: pretrain with these arguments; peak memory of its steps into OUT.

What the process had right before the model was built does not count. A toy step comes first, as torch imports and
allocates things of its own in the first backward pass and the first optimizer step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import own_memory
from lit_gpt.flops import count_parameters
from pretrain import growth, loop
from pretrain.__main__ import main
from pretrain.config import OptimizerConfig
from pretrain.footprint import stage_memory
from pretrain.optim import build_optimizer
from tests.toys import toy_config, toy_model, toy_tokens

FOUND: dict[str, Any] = {}


def warm_up() -> None:
    config = toy_config()
    model, tokens = toy_model(config), toy_tokens(config)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    build_optimizer(model, OptimizerConfig()).step()


def watch() -> None:
    """Notes memory before the model is built and after every step; and what was estimated."""
    build_model, train_step = growth.build_model, loop.train_step

    def watched_build(*arguments: Any, **keywords: Any) -> Any:
        if not FOUND:
            warm_up()
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            FOUND["before"] = own_memory("VmRSS")
        return build_model(*arguments, **keywords)

    def watched_step(run: Any, stage: Any, *rest: Any) -> Any:
        done = train_step(run, stage, *rest)
        FOUND["peak"] = own_memory("VmHWM") - FOUND["before"]
        FOUND["estimated"] = stage_memory(run.config, stage, run.compute, run.world, "cpu").total
        FOUND["parameters"] = count_parameters(stage.config)
        return done

    growth.build_model, loop.train_step = watched_build, watched_step


if __name__ == "__main__":
    watch()
    out = Path(sys.argv.pop(1))
    code = main()
    out.write_text(json.dumps(FOUND))
    raise SystemExit(code)
