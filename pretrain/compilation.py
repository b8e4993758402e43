"""torch.compile for a model that grows: what is compiled, how often, and what it cost."""

from __future__ import annotations

import sys

from lit_gpt.model import GPT

# A width takes one graph of a block for training, one for validation, and one more of each while a mask opens; torch
# gives up after 8 of one function and computes eagerly from then on
RECOMPILE_LIMIT = 64


def compile_model(model: GPT, how: str) -> None:
    """In place: the keys of the state dict stay as they are.

    how: none; model; or block: the graphs of one depth serve every other depth, so growth in depth compiles nothing
    new, and growth in width one block.
    """
    if how == "none":
        return
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    if how == "model":
        model.compile(dynamic=False)
        return
    for block in model.transformer.h:
        block.compile(dynamic=False)
    model.use_kernels(model.kernels.with_compiled_loss())


def compile_secs() -> float:
    """Seconds that this process has spent compiling, backward graphs included; they lie within those of steps."""
    utils = sys.modules.get("torch._dynamo.utils")  # not imported: nothing was compiled
    return 0.0 if utils is None else float(utils.calculate_time_spent().get("total_wall_time", 0.0))
