"""One size, in one sentence with the reason; or that the data can't decide. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from bench.pool.model import Estimate, relative_interval

__all__ = ["Advice", "SizePoint", "Standing", "formula_size", "recommend"]

GOOD_THROUGHPUT = 0.95
"""A size is good with this share of the best throughput …"""
GOOD_P99 = 1.5
"""… and a p99 of at most so many times the best p99 of the sizes with a good throughput …"""
FAILED = 0.01
"""… and at most this share of requests that failed, were shed, or were not finished."""

Answer = Literal["yes", "no", "unknown"]


@dataclass(frozen=True, slots=True)
class SizePoint:
    """What was measured of one size: a value a round, the rounds in the same order for all sizes."""

    size: int
    throughput: tuple[float, ...]
    """Requests a second."""
    p99: tuple[float, ...]
    """Seconds, of the whole request."""
    wait_p99: float
    """Seconds, of the wait for a connection, over all rounds."""
    failed: float = 0.0
    """Share of requests, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How one size compares."""

    size: int
    throughput: Estimate
    """As a share of the best size's, with its 90 % confidence interval."""
    p99: Estimate | None
    """As a multiple of the best p99; None where the throughput already decided."""
    good: Answer


@dataclass(frozen=True, slots=True)
class Advice:
    """The recommendation."""

    size: int | None
    """None: the data can't decide."""
    leaning: int
    """The size itself, or what it would be by the means alone."""
    sentence: str
    by_formula: int
    """The size that the common formula gives …"""
    formula: str
    """… and how it compares, in one sentence."""
    standings: tuple[Standing, ...]


def formula_size(cores: int) -> int:
    """2 * cores + 1, from PostgreSQL's wiki ("((core_count * 2) + effective_spindle_count)")."""
    return 2 * cores + 1


def recommend(points: Sequence[SizePoint], *, cores: int, limit: str = "") -> Advice:
    """The smallest good size, where the spread of the rounds leaves no doubt; `points` by ascending size.

    Sizes are compared round by round, so that what slows a whole round down counts for nothing. `limit` is
    what is known to have held the throughput down ("the client's CPU …"), for the sentence.
    """
    best, by_formula = _best(points), formula_size(cores)
    if fmean(best.throughput) <= 0:
        nothing = "The data can't decide: no request succeeded."
        return Advice(None, points[0].size, nothing, by_formula, _formula(points, (), cores), ())
    standings = _standings(points, best)
    leaning = next((one for one in standings if _probably(one)), None)
    chosen = next((one for one in standings if one.good != "no"), None)
    by_size = {point.size: point for point in points}
    tail = f" {limit}" if limit else ""
    size: int | None = None
    if chosen is None or leaning is None:
        sentence = f"No size will do: at each, more than {FAILED:.0%} of the requests failed or were shed."
        leaning_size = best.size
    elif chosen.good == "yes" and not _rises(points, chosen):
        size = leaning_size = chosen.size
        sentence = f"{_reason(points, standings, by_size[size])}."
    else:
        leaning_size = leaning.size
        sentence = _undecided(points, standings, chosen, leaning_size)
    formula = _formula(points, standings, cores)
    return Advice(size, leaning_size, sentence + tail, by_formula, formula, standings)


# --- how sizes compare


def _best(points: Sequence[SizePoint]) -> SizePoint:
    """The largest throughput; of sizes where requests failed only if they did at all."""
    sound = [point for point in points if point.failed <= FAILED] or points
    return max(sound, key=lambda point: fmean(point.throughput))


def _standings(points: Sequence[SizePoint], best: SizePoint) -> tuple[Standing, ...]:
    shares = {point.size: _ratio(point.throughput, best.throughput) for point in points}
    carries = {
        point.size: "no" if point.failed > FAILED else _at_least(shares[point.size], GOOD_THROUGHPUT)
        for point in points
    }
    quick = [point for point in points if carries[point.size] == "yes"] or [best]
    reference = min(quick, key=lambda point: fmean(point.p99))
    standings = []
    for point in points:
        share, answer = shares[point.size], carries[point.size]
        if answer == "no":
            standings.append(Standing(point.size, share, None, "no"))
            continue
        slowness = _ratio(point.p99, reference.p99)
        standings.append(Standing(point.size, share, slowness, _both(answer, _at_most(slowness, GOOD_P99))))
    return tuple(standings)


def _ratio(values: Sequence[float], others: Sequence[float]) -> Estimate:
    pairs = [(one, other) for one, other in zip(values, others, strict=True) if one > 0 and other > 0]
    if len(pairs) < len(values):
        # In a round nothing succeeded at all.
        return Estimate(0.0, 0.0, 0.0 if not pairs else math.inf)
    if values == others:
        return Estimate(1.0, 1.0, 1.0)
    return relative_interval([one / other for one, other in pairs])


def _at_least(estimate: Estimate, least: float) -> Answer:
    if estimate.low >= least:
        return "yes"
    return "no" if estimate.high < least else "unknown"


def _at_most(estimate: Estimate, most: float) -> Answer:
    if estimate.high <= most:
        return "yes"
    return "no" if estimate.low > most else "unknown"


def _both(one: Answer, other: Answer) -> Answer:
    if "no" in {one, other}:
        return "no"
    return "unknown" if "unknown" in {one, other} else "yes"


def _probably(standing: Standing) -> bool:
    """Good, by the means alone."""
    return standing.good != "no" and (
        standing.throughput.value >= GOOD_THROUGHPUT
        and (standing.p99 is None or standing.p99.value <= GOOD_P99)
    )


def _rises(points: Sequence[SizePoint], chosen: Standing) -> bool:
    """The largest size is the first good one: a larger one may be better still."""
    return len(points) > 1 and chosen.size == points[-1].size


# --- words


def _reason(points: Sequence[SizePoint], standings: Sequence[Standing], chosen: SizePoint) -> str:
    share = next(one.throughput for one in standings if one.size == chosen.size)
    best = _best(points)
    throughput = (
        "the best throughput"
        if best is chosen
        else f"{share.value:.0%} of the best throughput (that of {best.size})"
    )
    return (
        f"{chosen.size}: {throughput}, and the p99 wait is {_time(chosen.wait_p99)}{_beyond(points, chosen)}"
    )


def _beyond(points: Sequence[SizePoint], chosen: SizePoint) -> str:
    """What the next sizes would bring: the first that changes the p99 by much, else the largest."""
    larger = [point for point in points if point.size > chosen.size]
    if not larger:
        return ""
    here = median(chosen.p99)
    for point in larger:
        times = median(point.p99) / here if here else 1.0
        if times >= 1.25:
            return f"; at {point.size} the p99 {_grows(times)}, {_time(here)} to {_time(median(point.p99))}"
    gain = fmean(larger[-1].throughput) / fmean(chosen.throughput) - 1
    return f"; {larger[-1].size} would change the throughput by {gain:+.0%}"


def _grows(times: float) -> str:
    if 1.8 <= times < 2.3:
        return "doubles"
    return f"is {times:.1f} times as long" if times >= 2.3 else f"rises by {times - 1:.0%}"


def _undecided(
    points: Sequence[SizePoint], standings: Sequence[Standing], chosen: Standing, leaning: int
) -> str:
    if len(points[0].throughput) == 1:
        return f"The data can't decide: one round has no spread to judge by; by it alone, {leaning}."
    if chosen.good == "yes":
        return (
            f"The data can't decide: {chosen.size} is the largest size that was measured, and the first "
            "that is good; measure larger ones."
        )
    doubtful = [str(one.size) for one in standings if one.good == "unknown"]
    first = next((str(one.size) for one in standings if one.good == "yes"), None)
    others = doubtful if first is None or first in doubtful else [*doubtful, first]
    sizes = sorted({int(one) for one in others})
    between = f"between {_list(sizes)}" if len(sizes) > 1 else f"whether {sizes[0]} is enough"
    return (
        f"The data can't decide {between}: their confidence intervals overlap the limit; by the means alone, "
        f"{leaning}. More --rounds or longer --seconds would tell."
    )


def _list(sizes: Sequence[int]) -> str:
    return f"{', '.join(str(size) for size in sizes[:-1])} and {sizes[-1]}"


def _formula(points: Sequence[SizePoint], standings: Sequence[Standing], cores: int) -> str:
    size = formula_size(cores)
    says = f"The common formula, 2 * cores + 1, says {size} ({cores} {'core' if cores == 1 else 'cores'})"
    known = {one.size: one.throughput.value for one in standings}
    if size in known:
        p99 = next(median(point.p99) for point in points if point.size == size)
        return f"{says}: {known[size]:.0%} of the best throughput, p99 {_time(p99)}."
    below = max((other for other in known if other < size), default=None)
    above = min((other for other in known if other > size), default=None)
    near = [f"{other} had {known[other]:.0%}" for other in (below, above) if other is not None]
    return f"{says}; it was not measured{': of the best throughput ' + ', '.join(near) if near else ''}."


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1000:.2g} ms" if seconds < 0.01 else f"{seconds * 1000:.0f} ms"
