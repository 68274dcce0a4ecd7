"""What the measurements say in numbers: percentiles, ratios with their intervals, and a fitted law.

Gunther's Universal Scalability Law (https://www.perfdynamics.com/Manifesto/USLscalability.html): N at a time
do

    X(N) = lambda N / (1 + sigma (N - 1) + kappa N (N - 1))

where `lambda` is what one does alone, `sigma` the share that can't be done side by side (a lock, one CPU),
and `kappa` what each costs each other one (caches, lock queues): with it, more is less from some N on.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "PERCENTS",
    "Estimate",
    "Fit",
    "Spread",
    "fit",
    "percentiles",
    "relative_interval",
    "student",
    "usl",
]

Floats: TypeAlias = NDArray[np.float64]
Durations: TypeAlias = "Sequence[float] | array[float] | Floats"
"""In seconds."""

_CONFIDENCE = 0.95
# Three parameters: fewer sizes than this leave nothing to judge the fit by.
_FEWEST_SIZES = 4
_DRAWS = 2000
_STEPS = 5
# The exponential of more than this is no float any more.
_LARGEST_LOG = 700.0
# A peak at more than so many times the largest size that was measured is none.
_FAR = 10


def percentiles(values: Durations, percents: Sequence[float]) -> list[float]:
    """Of each of `percents`, the smallest value that so many are not above; 0 where there is none at all."""
    if not len(values):
        return [0.0] * len(percents)
    found = np.asarray(values, dtype=np.float64)
    return [float(one) for one in np.percentile(found, percents, method="inverted_cdf")]


PERCENTS = (0, 1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9, 99.99, 100)
"""Of `Spread.curve`."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of durations in seconds; all 0 where there were none."""

    p50: float
    p95: float
    p99: float
    p999: float
    max: float
    mean: float
    curve: tuple[float, ...]
    """At `PERCENTS`: to draw it elsewhere."""

    @classmethod
    def of(cls, values: Durations) -> Spread:
        """Of raw durations: nothing is rounded, and no bucket has a width."""
        p50, p95, p99, p999, most = percentiles(values, (50, 95, 99, 99.9, 100))
        mean = float(np.mean(values)) if len(values) else 0.0
        return cls(p50, p95, p99, p999, most, mean, tuple(percentiles(values, PERCENTS)))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number, and the interval that holds the true one with the confidence that was asked for."""

    value: float
    low: float
    high: float


def student(confidence: float, freedom: int) -> float:
    """Student's t: what is not further than this from 0 with `confidence`, by degrees of freedom.

    The finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4, turned round by halving.
    """
    odd = freedom % 2

    def within(angle: float) -> float:
        cosine, total = math.cos(angle), 0.0
        term = cosine if odd else 1.0
        for number in range(1 + odd, freedom + 1, 2):
            total += term
            term *= cosine * cosine * number / (number + 1)
        share = math.sin(angle) * total
        return (angle + share) * 2 / math.pi if odd else share

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def relative_interval(values: Sequence[float], *, confidence: float = 0.9) -> Estimate:
    """The mean of ratios and its confidence interval, by Student's t on their logarithms.

    One value has no spread: its interval is everything.
    """
    logs, count = [math.log(value) for value in values], len(values)
    mean = fmean(logs)
    if count == 1:
        return Estimate(math.exp(mean), 0.0, math.inf)
    half = student(confidence, count - 1) * stdev(logs) / math.sqrt(count)
    return Estimate(math.exp(mean), math.exp(mean - half), math.exp(min(mean + half, _LARGEST_LOG)))


# --- the law


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """The law, fitted to measurements; its intervals are of 95 %."""

    rate: Estimate
    """`lambda`: requests a second of one connection."""
    sigma: Estimate
    kappa: Estimate
    peak: Estimate | None
    """The size of the largest throughput. None: it is far beyond what was measured (`kappa` is nearly 0)."""
    explained: float
    """R²: the share of the variation between the measurements that the law explains."""
    draws: Floats
    """Rates, sigmas and kappas drawn from what the fit leaves open: the curves that the data allow."""

    def throughput(self, size: float) -> Estimate:
        """Requests a second that the law gives a pool of `size`."""
        return _estimate(
            usl(size, self.rate.value, self.sigma.value, self.kappa.value), usl(size, *self.draws)
        )


def usl(size: Any, rate: Any, sigma: Any, kappa: Any) -> Any:
    """The law itself, of numbers or of arrays."""
    return rate * size / (1 + sigma * (size - 1) + kappa * size * (size - 1))


def fit(sizes: Sequence[float], throughputs: Sequence[float], *, seed: int = 1) -> Fit | None:
    """Fit the law to (size, requests a second), any number of measurements a size.

    None where there are fewer than four sizes, or a size did nothing. Errors are taken as relative: a
    throughput is off by so many per cent, not by so many requests.
    """
    x, y = np.asarray(sizes, dtype=np.float64), np.asarray(throughputs, dtype=np.float64)
    if len(set(sizes)) < _FEWEST_SIZES or bool(np.any(y <= 0)):
        return None
    # N / X(N) is linear: a + b N + c N (N - 1), none of them below 0 (that is what keeps sigma between 0 and
    # 1), with rate 1 / (a + b), sigma b / (a + b), kappa c / (a + b).
    columns, taken = np.column_stack([np.ones_like(x), x, x * (x - 1)]), x / y
    around = taken
    for _ in range(_STEPS):
        # Gauss and Newton: the logarithm of the error, as a line through what the last step found.
        terms, wanted = columns / around[:, None], 1 - np.log(around / taken)
        best = _least_squares(terms, wanted)
        around = columns @ best
    residuals = terms @ best - wanted
    freedom = max(1, len(x) - len(best))
    covariance = np.linalg.inv(terms.T @ terms) * float(residuals @ residuals) / freedom
    random = np.random.default_rng(seed)
    # A multivariate Student's t around the best: few measurements more than parameters make wide intervals.
    normal = random.multivariate_normal(np.zeros(len(best)), covariance, size=_DRAWS, method="eigh")
    wider = np.sqrt(freedom / random.chisquare(freedom, size=_DRAWS))
    draws = np.maximum(best + normal * wider[:, None], 0.0)
    (rate, sigma, kappa, peak), drawn = _parameters(best), _parameters(draws.T)
    law = usl(x, rate, sigma, kappa)
    total = float(np.sum((y - y.mean()) ** 2))
    return Fit(
        _estimate(rate, drawn[0]),
        _estimate(sigma, drawn[1]),
        _estimate(kappa, drawn[2]),
        peak=_estimate(peak, drawn[3]) if peak <= x.max() * _FAR else None,
        explained=1 - float(np.sum((y - law) ** 2)) / total if total else 1.0,
        draws=np.stack(drawn[:3]),
    )


def _least_squares(terms: Floats, wanted: Floats) -> Floats:
    """The best coefficients that are not below 0: of three, by trying which of them are 0."""
    best, least = np.zeros(terms.shape[1]), math.inf
    for count in range(1, terms.shape[1] + 1):
        for chosen in itertools.combinations(range(terms.shape[1]), count):
            found = np.linalg.lstsq(terms[:, chosen], wanted, rcond=None)[0]
            error = float(np.sum((terms[:, chosen] @ found - wanted) ** 2))
            # Not the last by itself: one connection alone takes some time too.
            if error < least and bool(np.all(found >= 0)) and chosen != (2,):
                best, least = np.zeros(terms.shape[1]), error
                best[list(chosen)] = found
    return best


def _parameters(terms: Any) -> tuple[Any, Any, Any, Any]:
    """Rate, sigma, kappa and the size of the peak."""
    a, b, c = terms
    one = np.maximum(a + b, np.finfo(np.float64).tiny)
    peak = np.sqrt(np.divide(a, c, out=np.full_like(a, np.inf), where=c > 0))
    return 1 / one, b / one, c / one, peak


def _estimate(value: float, drawn: Floats) -> Estimate:
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], method="nearest")
    return Estimate(float(value), float(low), float(high))
