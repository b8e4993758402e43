"""Laws through measured points: L = a C^b, L = c + a C^b, a parabola in log x, a straight line in log x.

Power laws come with bootstrap draws, from which every interval of a prediction is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

COVERAGE = 0.95
N_DRAWS = 1000
LARGEST_EXPONENT = 5.0  # of C; fits of losses give about -0.05, and steeper ones than this overflow


@dataclass(frozen=True)
class PowerLaw:
    """L = c + a C^b, with c = 0 where no offset was fitted."""

    a: float
    b: float
    c: float
    with_offset: bool
    flops: np.ndarray
    """(n,) the budgets it was fitted to."""
    loss: np.ndarray
    """(n,)"""
    draws: np.ndarray
    """(m, 3): a, b, c of the fits to resampled points; m = 0 when there are no more points than parameters."""

    @property
    def rms_log_residual(self) -> float:
        """Root mean square of log L - log of the law: 0.01 is about one per cent of the loss."""
        return float(np.sqrt(np.mean((np.log(self.loss) - np.log(self.predict(self.flops))) ** 2)))

    def predict(self, flops: float | np.ndarray) -> np.ndarray:
        """The loss at these budgets, in the shape of `flops`."""
        return self.c + self.a * np.asarray(flops, dtype=np.float64) ** self.b

    def interval(self, name: str) -> tuple[float, float] | None:
        """Of one constant, by its name."""
        return percentile_interval(self.draws[:, "abc".index(name)])

    def predicted_interval(self, flops: float) -> tuple[float, float] | None:
        """Of the law's loss at one budget; the scatter of single runs around the law is not in it."""
        a, b, c = self.draws.T
        return percentile_interval(c + a * flops**b)


def percentile_interval(values: np.ndarray) -> tuple[float, float] | None:
    """The middle 95 per cent of bootstrap draws; None without draws."""
    if not len(values):
        return None
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def fit_power_law(
    flops: Sequence[float] | np.ndarray,
    loss: Sequence[float] | np.ndarray,
    *,
    with_offset: bool = False,
    n_draws: int = N_DRAWS,
    seed: int = 0,
) -> PowerLaw:
    """Least squares of log loss. Draws: points resampled with replacement, fitted in the same way.

    Args:
        flops: (n,) budgets, positive.
        loss: (n,) positive.
        with_offset: fit c as well; else c = 0.
        n_draws: bootstrap fits; resamples with fewer different budgets than constants are drawn again.
        seed: of the resampling.

    Raises:
        ValueError: fewer different budgets than constants, or a value that is not a positive number.
    """
    x, y = np.asarray(flops, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    n_constants = 3 if with_offset else 2
    for name, values in (("FLOPs", x), ("loss", y)):
        bad = values[~(np.isfinite(values) & (values > 0))]
        if len(bad):
            raise ValueError(f"a {name} of {bad[0]:g} has no logarithm; a power law needs positive numbers")
    n_different = len(np.unique(x))
    if n_different < n_constants:
        raise ValueError(
            f"{n_different} different budget{'s' * (n_different != 1)} cannot fix the {n_constants} constants of "
            f"{'c + a C^b' if with_offset else 'a C^b'}; give more runs{', or fit without offset' * with_offset}"
        )
    scale = float(np.exp(np.mean(np.log(x))))  # of order one, C^b and a do not trade places
    first = _fit(x / scale, y, with_offset, None)
    samples = _resamples(x, n_constants, n_draws if len(x) > n_constants else 0, seed)
    drawn = [_fit(x[chosen] / scale, y[chosen], with_offset, first) for chosen in samples]
    constants = np.array([first, *drawn])
    constants[:, 0] *= scale ** -constants[:, 1]
    a, b, c = (float(value) for value in constants[0])
    return PowerLaw(a, b, c, with_offset, x, y, constants[1:])


def _resamples(x: np.ndarray, n_constants: int, n_draws: int, seed: int) -> list[np.ndarray]:
    """Indices of `n_draws` resamples that can fix the constants."""
    rng = np.random.default_rng(seed)
    samples: list[np.ndarray] = []
    while len(samples) < n_draws:
        chosen = rng.integers(0, len(x), len(x))
        if len(np.unique(x[chosen])) >= n_constants:
            samples.append(chosen)
    return samples


def _fit(x: np.ndarray, y: np.ndarray, with_offset: bool, start: np.ndarray | None) -> np.ndarray:
    """(a, b, c) for budgets in units of their mean; `start` is a fit to begin at."""
    log_x, log_y = np.log(x), np.log(y)
    if not with_offset:
        b, log_a = np.polyfit(log_x, log_y, 1)
        return np.array([np.exp(log_a), b, 0.0])
    starts = [start] if start is not None else _starts(log_x, y)
    return min((_least_squares(log_x, log_y, each) for each in starts), key=lambda found: found[1])[0]


def _starts(log_x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """Fits of y - c for a few c: the sum of squares may have more than one valley."""
    starts = []
    for c in np.array([0.0, 0.5, 0.8, 0.95]) * y.min():
        b, log_a = np.polyfit(log_x, np.log(y - c), 1)
        starts.append(np.array([np.exp(log_a), b, c]))
    return starts


def _least_squares(log_x: np.ndarray, log_y: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, float]:
    from scipy.optimize import least_squares

    def residuals(constants: np.ndarray) -> np.ndarray:
        log_a, b, c = constants
        return np.log(c + np.exp(log_a + b * log_x)) - log_y

    def slopes(constants: np.ndarray) -> np.ndarray:
        log_a, b, c = constants
        power = np.exp(log_a + b * log_x)
        return np.stack([power, power * log_x, np.ones_like(power)], axis=1) / (c + power)[:, None]

    highest = np.exp(log_y.min())
    low, high = [-50.0, -LARGEST_EXPONENT, 0.0], [50.0, LARGEST_EXPONENT, highest]
    inside = np.clip([np.log(start[0]), start[1], start[2]], np.array(low) + 1e-9, np.array(high) - 1e-9 * highest)
    found = least_squares(residuals, inside, slopes, bounds=(low, high), xtol=1e-12, ftol=1e-12, gtol=1e-12)
    log_a, b, c = found.x
    return np.array([np.exp(log_a), b, c]), float(found.cost)


@dataclass(frozen=True)
class PredictedSpeedup:
    """By how much one law reaches another's loss more cheaply: C_baseline / C_grown - 1, as in eq. 48."""

    flops: float
    """The baseline's budget."""
    loss: float
    """The baseline law's loss there."""
    speedup: float
    """-1: the grown law never comes down to that loss."""
    interval: tuple[float, float] | None


def predict_speedup(grown: PowerLaw, baseline: PowerLaw, flops: float) -> PredictedSpeedup:
    """The speed-up at the loss that the baseline's law has after `flops`; draws of both are paired at random."""
    own = [np.array([[law.a, law.b, law.c]]) for law in (grown, baseline)]
    value = float(_speedups(own[0], own[1], flops)[0])
    n = min(len(grown.draws), len(baseline.draws))
    interval = percentile_interval(_speedups(grown.draws[:n], baseline.draws[:n], flops))
    return PredictedSpeedup(flops, float(baseline.predict(flops)), value, interval)


def _speedups(grown: np.ndarray, baseline: np.ndarray, flops: float) -> np.ndarray:
    """(m,) for (m, 3) constants each."""
    a, b, c = baseline.T
    above = c + a * flops**b - grown[:, 2]
    reached = (above > 0) & (grown[:, 1] < 0)
    log_needed = np.log(np.where(reached, above, 1.0) / grown[:, 0]) / np.where(reached, grown[:, 1], -1.0)
    # beyond e^700 there is no float, and no budget either
    return np.where(reached, np.exp(np.clip(np.log(flops) - log_needed, -700, 700)), 0.0) - 1


@dataclass(frozen=True)
class Parabola:
    """y = curvature (log10 x)^2 + slope log10 x + height."""

    curvature: float
    slope: float
    height: float
    optimum: float | None
    """The x of the lowest y; None when that is not between the points, or the parabola opens downwards."""

    def at(self, x: float | np.ndarray) -> np.ndarray:
        return np.polyval([self.curvature, self.slope, self.height], np.log10(x))


def fit_parabola(x: Sequence[float], y: Sequence[float]) -> Parabola:
    """Least squares in log10 x. Points with x = 0 have no logarithm: leave them out before.

    Raises:
        ValueError: fewer than three different x, or an x that is not positive.
    """
    if len(set(x)) < 3 or min(x) <= 0:
        raise ValueError(f"a parabola in log x needs three different positive x; got {', '.join(f'{v:g}' for v in x)}")
    log_x = np.log10(np.asarray(x, dtype=np.float64))
    curvature, slope, height = (float(value) for value in np.polyfit(log_x, y, 2))
    lowest = -slope / (2 * curvature) if curvature > 0 else None
    inside = lowest is not None and log_x.min() <= lowest <= log_x.max()
    return Parabola(curvature, slope, height, 10.0**lowest if inside else None)


def fit_logarithm(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Intercept and slope of y = intercept + slope ln x, by least squares."""
    slope, intercept = np.polyfit(np.log(x), y, 1)
    return float(intercept), float(slope)
