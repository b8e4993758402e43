"""`python -m ...` in which every training step takes STEP_SECS longer; at step DIE_AT the first start of the last
process dies, when that is set."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from typing import Any


def main() -> None:
    sys.argv = sys.argv[sys.argv.index("-m") + 1 :]
    module = sys.argv[0]
    if module == "pretrain" and sys.argv[1:2] != ["validate"]:
        slow_down()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def slow_down() -> None:
    from pretrain import loop

    advance = loop.advance

    def slow(run: Any, stage: Any, state: Any, *rest: Any) -> None:
        advance(run, stage, state, *rest)
        time.sleep(float(os.environ.get("STEP_SECS", "0")))
        is_last = run.world.size > 1 and run.world.rank == run.world.size - 1
        if is_last and run.world.attempt == 0 and str(state.step_count) == os.environ.get("DIE_AT"):
            os.kill(os.getpid(), signal.SIGKILL)

    loop.advance = slow


main()
