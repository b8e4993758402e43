"""Laws through measured points: L = a C^b, L = c + a C^b, a parabola in log x, a straight line in log x.

Power laws come with draws, from which every interval of a prediction is taken: of a C^b from Student's t, exact for
independent normal scatter of log L; of c + a C^b from a bootstrap over points, whose intervals are too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

COVERAGE = 0.95
T_DRAWS = 20_000  # at so many the ends of an interval from six points are off by about 2 per cent of its width
BOOTSTRAP_DRAWS = 1000
LARGEST_LOG = 700.0  # beyond e^700 there is no float
PREDICTED = 10  # times the largest budget: where a law is read when nobody says where
LARGEST_EXPONENT = 5.0  # of C; fits of losses give about -0.05, and steeper ones than this overflow


@dataclass(frozen=True)
class PowerLaw:
    """L = c + a C^b, with c = 0 where no offset was fitted."""

    a: float
    b: float
    c: float
    flops: np.ndarray
    """(n,) the budgets it was fitted to."""
    loss: np.ndarray
    """(n,)"""
    draws: np.ndarray
    """(m, 3): log a, b, c as they might be as well; m = 0 when there are no more points than constants."""

    @property
    def rms_log_residual(self) -> float:
        """Root mean square of log L - log of the law: 0.01 is about one per cent of the loss."""
        return float(np.sqrt(np.mean((np.log(self.loss) - np.log(self.predict(self.flops))) ** 2)))

    def predict(self, flops: float | np.ndarray) -> np.ndarray:
        """The loss at these budgets, in the shape of `flops`."""
        return self.c + self.a * np.asarray(flops, dtype=np.float64) ** self.b

    def interval(self, name: str) -> tuple[float, float] | None:
        """Of one constant, by its name."""
        values = self.draws[:, "abc".index(name)]
        return percentile_interval(_exp(values) if name == "a" else values)

    def predicted_interval(self, flops: float) -> tuple[float, float] | None:
        """Of the law's loss at one budget; the scatter of single runs around the law is not in it."""
        log_a, b, c = self.draws.T
        return percentile_interval(c + _exp(log_a + b * np.log(flops)))


def _exp(values: np.ndarray) -> np.ndarray:
    return np.exp(np.clip(values, -LARGEST_LOG, LARGEST_LOG))


def percentile_interval(values: np.ndarray) -> tuple[float, float] | None:
    """The middle 95 per cent of draws; None without draws."""
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
    n_draws: int | None = None,
    seed: int = 0,
) -> PowerLaw:
    """Least squares of log loss.

    Draws without offset: constants as likely as they are under Student's t, given the scatter of the points. Draws with
    offset: fits to points resampled with replacement.

    Args:
        flops: (n,) budgets, positive.
        loss: (n,) positive.
        with_offset: fit c as well; else c = 0.
        n_draws: default T_DRAWS, with offset BOOTSTRAP_DRAWS; resamples with fewer different budgets than constants
            are drawn again.
        seed: of the draws.

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
    if n_draws is None:
        n_draws = BOOTSTRAP_DRAWS if with_offset else T_DRAWS
    rng = np.random.default_rng(seed)
    if len(x) == n_constants:
        drawn = np.empty((0, 3))
    elif with_offset:
        samples = _resamples(x, n_constants, n_draws, rng)
        drawn = np.array([_fit(x[chosen] / scale, y[chosen], with_offset, first) for chosen in samples])
    else:
        drawn = _student_draws(np.log(x / scale), np.log(y), first, n_draws, rng)
    constants = np.concatenate([first[None], drawn])
    constants[:, 0] -= constants[:, 1] * np.log(scale)
    log_a, b, c = constants[0]
    return PowerLaw(float(_exp(log_a)), float(b), float(c), x, y, constants[1:])


def _student_draws(
    log_x: np.ndarray, log_y: np.ndarray, line: np.ndarray, n_draws: int, rng: np.random.Generator
) -> np.ndarray:
    """(n_draws, 3) log a, b and 0, such that every linear combination has Student's t around the fitted line.

    Of a straight line through n points the height at the mean of x and the slope are independent, with variances
    s^2 / n and s^2 / sum (x - mean)^2; s^2 itself is known from n - 2 degrees of freedom, so it is drawn, too.
    """
    log_a, b, _ = line
    n, mean = len(log_x), log_x.mean()
    squares = np.sum((log_y - log_a - b * log_x) ** 2)
    s = np.sqrt(squares / rng.chisquare(n - 2, n_draws))
    slope = b + s * rng.standard_normal(n_draws) / np.sqrt(np.sum((log_x - mean) ** 2))
    height = log_a + b * mean + s * rng.standard_normal(n_draws) / np.sqrt(n)
    return np.stack([height - slope * mean, slope, np.zeros(n_draws)], axis=1)


def _resamples(x: np.ndarray, n_constants: int, n_draws: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Indices of `n_draws` resamples that can fix the constants."""
    samples: list[np.ndarray] = []
    while len(samples) < n_draws:
        chosen = rng.integers(0, len(x), len(x))
        if len(np.unique(x[chosen])) >= n_constants:
            samples.append(chosen)
    return samples


def _fit(x: np.ndarray, y: np.ndarray, with_offset: bool, start: np.ndarray | None) -> np.ndarray:
    """(log a, b, c) for budgets in units of their mean; `start` is a fit to begin at."""
    log_x, log_y = np.log(x), np.log(y)
    if not with_offset:
        b, log_a = np.polyfit(log_x, log_y, 1)
        return np.array([log_a, b, 0.0])
    starts = [start] if start is not None else _starts(log_x, y)
    return min((_least_squares(log_x, log_y, each) for each in starts), key=lambda found: found[1])[0]


def _starts(log_x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """Fits of y - c for a few c: the sum of squares may have more than one valley."""
    starts = []
    for c in np.array([0.0, 0.5, 0.8, 0.95]) * y.min():
        b, log_a = np.polyfit(log_x, np.log(y - c), 1)
        starts.append(np.array([log_a, b, c]))
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
    inside = np.clip(start, np.array(low) + 1e-9, np.array(high) - 1e-9 * highest)
    found = least_squares(residuals, inside, slopes, bounds=(low, high), xtol=1e-12, ftol=1e-12, gtol=1e-12)
    return found.x, float(found.cost)


@dataclass(frozen=True)
class PredictedSpeedup:
    """By how much one law reaches another's loss more cheaply: C_baseline / C_grown - 1, as in eq. 48."""

    flops: float
    """The baseline's budget."""
    loss: float
    """The baseline law's loss there."""
    speedup: float | None
    """None: the grown law never comes down to that loss."""
    interval: tuple[float, float] | None
    """Of the draws that do."""
    never: float
    """Share of the draws whose grown law never comes down to the loss; 0 without draws."""


def predict_speedup(grown: PowerLaw, baseline: PowerLaw, flops: float) -> PredictedSpeedup:
    """The speed-up at the loss that the baseline's law has after `flops`; draws of both are paired at random."""
    own = [np.array([[np.log(law.a), law.b, law.c]]) for law in (grown, baseline)]
    values = _speedups(own[0], own[1], flops)
    n = min(len(grown.draws), len(baseline.draws))
    drawn = _speedups(grown.draws[:n], baseline.draws[:n], flops)
    return PredictedSpeedup(
        flops,
        float(baseline.predict(flops)),
        float(values[0]) if len(values) else None,
        percentile_interval(drawn),
        1 - len(drawn) / n if n else 0.0,
    )


def _speedups(grown: np.ndarray, baseline: np.ndarray, flops: float) -> np.ndarray:
    """For (m, 3) constants each, log a first; only those of the m pairs whose grown law comes down to the loss."""
    log_a, b, c = baseline.T
    above = c + _exp(log_a + b * np.log(flops)) - grown[:, 2]
    reached = (above > 0) & (grown[:, 1] < 0)
    above, grown = above[reached], grown[reached]
    return _exp(np.log(flops) - (np.log(above) - grown[:, 0]) / grown[:, 1]) - 1


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
