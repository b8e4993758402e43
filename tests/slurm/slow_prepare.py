"""prepare.py that stops before its third unit until the file named by RELEASE is there, and notes its process there."""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

UNITS_BEFORE = 2


def main() -> None:
    script = Path(sys.argv[1])
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(script.parent))
    from prep import pool

    run_unit, release, units = pool.run_unit, Path(os.environ["RELEASE"]), []

    def slow(*arguments: Any) -> None:
        units.append(arguments)
        if len(units) > UNITS_BEFORE and not release.exists():
            release.with_suffix(f".{os.environ.get('SLURM_ARRAY_TASK_ID')}").write_text(str(os.getpid()))
            while not release.exists():
                time.sleep(0.02)
        run_unit(*arguments)

    pool.run_unit = slow
    runpy.run_path(str(script), run_name="__main__")


main()
