"""A model of the measurements: the Universal Scalability Law, fitted, and Little's law.

Gunther's law (https://www.perfdynamics.com/Manifesto/USLscalability.html): N at a time do

    X(N) = lambda N / (1 + sigma (N - 1) + kappa N (N - 1))

where `lambda` is what one does alone, `sigma` the share that can't be done side by side (a lock, one CPU),
and `kappa` what each costs each other one (caches, lock queues): with it, more is less from some N on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeWarning, curve_fit
from scipy.stats import t as student

__all__ = ["Estimate", "Fit", "fit", "little", "relative_interval", "usl"]

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
# Three parameters: fewer sizes than this leave nothing to judge the fit by.
FEWEST_SIZES = 4
DRAWS = 2000
# The exponential of more than this is no float any more.
LARGEST_LOG = 700.0
# A peak at more than so many times the largest size that was measured is none.
FAR = 10


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number, and the interval that holds the true one with 95 % confidence."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Fit:
    """The law, fitted to measurements."""

    rate: Estimate
    """`lambda`: requests a second of one connection."""
    sigma: Estimate
    kappa: Estimate
    peak: Estimate | None
    """The size of the largest throughput. None: it is far beyond what was measured (`kappa` is nearly 0)."""
    explained: float
    """R²: the share of the variation between the measurements that the law explains."""
    draws: tuple[tuple[float, float, float], ...]
    """Parameters drawn from what the fit leaves open: the curves that the data allow."""

    def throughput(self, size: float) -> Estimate:
        """Requests a second that the law gives a pool of `size`."""
        all_of_them = np.array([usl(size, *draw) for draw in self.draws])
        low, high = _interval(all_of_them)
        return Estimate(usl(size, self.rate.value, self.sigma.value, self.kappa.value), low, high)


def usl(size: float, rate: float, sigma: float, kappa: float) -> float:
    """The law itself."""
    return rate * size / (1 + sigma * (size - 1) + kappa * size * (size - 1))


def fit(sizes: Sequence[float], throughputs: Sequence[float], *, seed: int = 1) -> Fit | None:
    """Fit the law to (size, requests a second), any number of measurements a size.

    None where there are fewer than four sizes, or a size did nothing, or no curve can be fitted. Errors are
    taken as relative: a throughput is off by so many per cent, not by so many requests.
    """
    x, y = np.asarray(sizes, dtype=np.float64), np.asarray(throughputs, dtype=np.float64)
    if len(set(sizes)) < FEWEST_SIZES or bool(np.any(y <= 0)):
        return None
    first = float(np.mean(y[x == x.min()]) / x.min())
    try:
        best, covariance = curve_fit(
            _curve, x, y, p0=(first, 0.1, 0.001), sigma=y, bounds=([0, 0, 0], [np.inf, 1, 1]), max_nfev=20_000
        )
    except (RuntimeError, ValueError, OptimizeWarning):
        return None
    if not bool(np.all(np.isfinite(covariance))):
        return None
    draws = _draws(best, covariance, len(x) - len(best), seed)
    rate, sigma, kappa = (
        Estimate(float(value), *_interval(draws[:, number])) for number, value in enumerate(best)
    )
    residual, total = float(np.sum((y - _curve(x, *best)) ** 2)), float(np.sum((y - y.mean()) ** 2))
    return Fit(
        rate,
        sigma,
        kappa,
        peak=_peak(best, draws, float(x.max())),
        explained=1 - residual / total if total else 1.0,
        draws=tuple((float(a), float(b), float(c)) for a, b, c in draws),
    )


def _curve(size: Floats, rate: float, sigma: float, kappa: float) -> Floats:
    return rate * size / (1 + sigma * (size - 1) + kappa * size * (size - 1))


def _draws(best: Floats, covariance: Floats, freedom: int, seed: int) -> Floats:
    """Parameters as the fit leaves them open: Student's t around the best, none below 0."""
    random = np.random.default_rng(seed)
    normal = random.multivariate_normal(np.zeros(len(best)), covariance, size=DRAWS, method="eigh")
    # A multivariate t: few measurements more than parameters make wide intervals.
    wider = np.sqrt(max(1, freedom) / random.chisquare(max(1, freedom), size=DRAWS))
    return np.maximum(best + normal * wider[:, None], 0.0)


def _interval(values: Floats) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _peak(best: Floats, draws: Floats, largest: float) -> Estimate | None:
    """Where the curve is highest; the upper end is infinite where the data allow that it never falls."""
    value = math.sqrt(max(1 - best[1], 0.0) / best[2]) if best[2] > 0 else math.inf
    if value > largest * FAR:
        return None
    falls = draws[:, 2] > 0
    peaks = np.full(len(draws), np.inf)
    peaks[falls] = np.sqrt(np.maximum(1 - draws[falls, 1], 0) / draws[falls, 2])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(peaks, [tail, 1 - tail], method="nearest")
    return Estimate(value, float(low), float(high))


def little(throughput: float, hold: float) -> float:
    """Connections in use on average: requests a second, times the seconds that each holds one."""
    return throughput * hold


def relative_interval(values: Sequence[float], *, confidence: float = 0.9) -> Estimate:
    """The mean of ratios and its confidence interval, by Student's t on their logarithms.

    One value has no spread: its interval is everything.
    """
    logs = np.log(np.asarray(values, dtype=np.float64))
    mean, count = float(logs.mean()), len(logs)
    if count == 1:
        return Estimate(math.exp(mean), 0.0, math.inf)
    half = float(student.ppf((1 + confidence) / 2, count - 1) * logs.std(ddof=1) / math.sqrt(count))
    return Estimate(math.exp(mean), math.exp(mean - half), math.exp(min(mean + half, LARGEST_LOG)))
