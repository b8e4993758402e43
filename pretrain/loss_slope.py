"""When a stage has trained enough to grow: the loss falls too slowly for what it costs (arXiv 2203.06211).

The slope is that of log loss against log FLOPs, by least squares over the losses of the last doubling of FLOPs. They
are kept in bins, 64 per doubling, which go into checkpoints: a resumed run decides the same at the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, log, log2

DEFAULTS = {"depth": -0.0575, "width": -0.0475}
"""The paper's for GPT-2, by what grows next: where the larger model would fall faster for the same FLOPs."""
BINS = 64  # per doubling
MIN_BINS = 8  # with fewer points a slope is noise

Bin = list[float]
"""Number of the bin, sum of the losses in it, their count. A list, because checkpoints keep it as JSON."""


def add_loss(bins: Sequence[Bin], flops: float, loss: float) -> list[Bin]:
    """The bins with one more loss; those that no window reaches any more are left out."""
    number = floor(BINS * log2(flops))
    if bins and bins[-1][0] == number:
        _, total, count = bins[-1]
        added = [*bins[:-1], [number, total + loss, count + 1]]
    else:
        added = [*bins, [number, loss, 1]]
    reached = max((i for i, each in enumerate(added) if each[0] <= number - BINS - 1), default=0)
    return added[reached:]


def loss_slope(bins: Sequence[Bin]) -> float | None:
    """Over the last doubling of FLOPs before the newest bin, which is not full yet; None as long as it is not whole."""
    if len(bins) <= MIN_BINS:
        return None
    full = bins[:-1]
    start = full[-1][0] + 1 - BINS
    if full[0][0] > start:
        return None
    window = [each for each in full if each[0] >= start]
    if len(window) < MIN_BINS:
        return None
    xs = [number / BINS * log(2) for number, _, _ in window]
    ys = [log(total / count) for _, total, count in window]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
