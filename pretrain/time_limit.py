"""How long a run may take: what the user says, and what SLURM says of the job."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.config import StopConfig
    from pretrain.world import World

SECS_OF = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_IN_UNITS = re.compile(r"(?:\d+(?:\.\d+)?[smhd])+")
_BY_COLONS = re.compile(r"(?:(?P<days>\d+)-)?(?:(?P<hours>\d+):)?(?P<minutes>\d+):(?P<seconds>\d+)")
ANSWER_SECS = 20  # a controller that is busier than that is not waited for


@dataclass(frozen=True)
class TimeLimit:
    """A moment at which a run saves and stops."""

    what: str
    """For the message."""
    at_secs: float
    """On the clock of time.monotonic."""
    saves: int = 0
    """Come earlier by so many times what saving takes."""


def parse_duration(text: str) -> float:
    """Seconds in `8h`, `1h30m`, `2d`, or as SLURM writes them, `5:00`, `12:00:00`, `2-12:00:00`.

    Raises:
        ValueError: anything else, or nothing.
    """
    text = str(text).strip().lower()
    if _IN_UNITS.fullmatch(text):
        secs = sum(float(part[:-1]) * SECS_OF[part[-1]] for part in re.findall(r"[\d.]+[smhd]", text))
    elif match := _BY_COLONS.fullmatch(text):
        days, hours, minutes, seconds = (int(match[name] or 0) for name in ("days", "hours", "minutes", "seconds"))
        secs = float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    else:
        raise ValueError(f"{text!r} is not a time; write 8h, 90m, 1d12h or 2-12:00:00")
    if secs <= 0:
        raise ValueError(f"{text!r} must be more than no time")
    return secs


def job_secs_left(env: Mapping[str, str] = os.environ) -> float | None:
    """How long SLURM's job still has; None outside a job, without a limit, and when SLURM does not answer."""
    if "SLURM_JOB_ID" not in env:
        return None
    if env.get("SLURM_JOB_END_TIME", "").isdecimal():  # SLURM 22.05 does not say it, later ones do
        return int(env["SLURM_JOB_END_TIME"]) - time.time()
    try:
        asked = ["squeue", "--noheader", "--jobs", env["SLURM_JOB_ID"], "--format", "%L"]
        answer = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=ANSWER_SECS, env=dict(env))
        return parse_duration(answer.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):  # UNLIMITED, NOT_SET, INVALID are no times
        return None


def find_limits(
    settings: StopConfig,
    world: World,
    secs_left: Callable[[], float | None] = job_secs_left,
    now: Callable[[], float] = time.monotonic,
) -> tuple[TimeLimit, ...]:
    """The moments at which a run has to stop; the first process asks SLURM for all."""
    limits = []
    if settings.after is not None:
        limits.append(TimeLimit(f"stop.after={settings.after}", now() + parse_duration(settings.after)))
    left = world.broadcast(secs_left() if world.is_first else None)
    if left is not None and left > settings.margin_secs:
        limits.append(TimeLimit("the end of the job's time", now() + left - settings.margin_secs, saves=2))
    elif left is not None and world.is_first:
        sys.stderr.write(
            f"warning: the job has {left:.0f} s left, not more than stop.margin_secs={settings.margin_secs:g}; "
            f"only a signal will stop the run before its end\n"
        )
    return tuple(limits)
