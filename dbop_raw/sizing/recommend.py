"""One size, in one sentence with the reason; or that the data can't decide. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from dbop_raw.sizing.model import Estimate, relative_interval

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
    throughput_share: Estimate
    """As a share of the best size's, with its 90 % confidence interval."""
    p99_ratio: Estimate | None
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
    """The smallest good size, where the spread of the rounds leaves no doubt.

    Sizes are compared round by round, so that what slows a whole round down counts for nothing.

    Args:
        points: What was measured, by ascending size.
        cores: Of the server, for the common formula.
        limit: What is known to have held the throughput down ("The client …"), for the sentence.
    """
    # Of sizes where requests failed, only if they did at all.
    sound = [point for point in points if point.failed <= FAILED] or points
    best = max(sound, key=lambda point: fmean(point.throughput))
    if fmean(best.throughput) <= 0:
        size, leaning, sentence = None, points[0].size, "The data can't decide: no request succeeded."
        standings: tuple[Standing, ...] = ()
    else:
        standings = _standings(points, best)
        size, leaning, sentence = _choose(points, standings, best)
        sentence += f" {limit}" if limit else ""
    return Advice(size, leaning, sentence, formula_size(cores), _formula(points, standings, cores), standings)


def _choose(
    points: Sequence[SizePoint], standings: Sequence[Standing], best: SizePoint
) -> tuple[int | None, int, str]:
    leaning = next((one.size for one in standings if _probably(one)), best.size)
    chosen = next((one for one in standings if one.good != "no"), None)
    if chosen is None:
        none = f"No size will do: at each, more than {FAILED:.0%} of the requests failed or were shed."
        return None, best.size, none
    # One round has no spread, also where the best is the smallest; and where the largest is the first good
    # one, a larger one may be better still.
    if len(best.throughput) == 1 or chosen.good != "yes" or chosen.size == points[-1].size:
        return None, leaning, _undecided(points, standings, chosen, leaning)
    point = next(one for one in points if one.size == chosen.size)
    throughput = (
        "the best throughput"
        if point is best
        else f"{chosen.throughput_share.value:.0%} of the best throughput (that of {best.size})"
    )
    reason = f"{throughput}, and the p99 wait is {_time(point.wait_p99)}{_beyond(points, point)}"
    return chosen.size, chosen.size, f"{chosen.size}: {reason}."


# --- how sizes compare


def _standings(points: Sequence[SizePoint], best: SizePoint) -> tuple[Standing, ...]:
    shares = [_ratio(point.throughput, best.throughput) for point in points]
    carries: list[Answer] = [
        "no" if point.failed > FAILED else _between(share, GOOD_THROUGHPUT, math.inf)
        for point, share in zip(points, shares, strict=True)
    ]
    quick = [point for point, answer in zip(points, carries, strict=True) if answer == "yes"] or [best]
    reference = min(quick, key=lambda point: fmean(point.p99))
    standings = []
    for point, share, answer in zip(points, shares, carries, strict=True):
        slowness, good = None, answer
        if answer != "no":
            slowness = _ratio(point.p99, reference.p99)
            answers = {answer, _between(slowness, 0.0, GOOD_P99)}
            good = next(one for one in _WORST_FIRST if one in answers)
        standings.append(Standing(point.size, share, slowness, good))
    return tuple(standings)


_WORST_FIRST: tuple[Answer, ...] = ("no", "unknown", "yes")


def _ratio(values: Sequence[float], others: Sequence[float]) -> Estimate:
    pairs = [(one, other) for one, other in zip(values, others, strict=True) if one > 0 and other > 0]
    if len(pairs) < len(values):
        # In a round nothing succeeded at all.
        return Estimate(0.0, 0.0, 0.0 if not pairs else math.inf)
    if values == others:
        return Estimate(1.0, 1.0, 1.0)
    return relative_interval([one / other for one, other in pairs])


def _between(estimate: Estimate, least: float, most: float) -> Answer:
    if estimate.low >= least and estimate.high <= most:
        return "yes"
    return "no" if estimate.high < least or estimate.low > most else "unknown"


def _probably(standing: Standing) -> bool:
    """Good, by the means alone."""
    p99 = standing.p99_ratio
    return (
        standing.good != "no"
        and standing.throughput_share.value >= GOOD_THROUGHPUT
        and (p99 is None or p99.value <= GOOD_P99)
    )


# --- words


def _beyond(points: Sequence[SizePoint], chosen: SizePoint) -> str:
    """What the next sizes would bring: the first that changes the p99 by much, else the largest."""
    larger = [point for point in points if point.size > chosen.size]
    here = median(chosen.p99)
    for point in larger:
        times = median(point.p99) / here if here else 1.0
        if times >= 1.25:
            there = _time(median(point.p99))
            return f"; at {point.size} the p99 {_grows(times)}, {_time(here)} to {there}"
    if not larger:
        return ""
    gain = fmean(larger[-1].throughput) / fmean(chosen.throughput) - 1
    return f"; {larger[-1].size} would change the throughput by {gain:+.0%}"


def _grows(times: float) -> str:
    if 1.8 <= times < 2.3:
        return "doubles"
    return f"is {times:.1f} times as long" if times > 2 else f"rises by {times - 1:.0%}"


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
    first = next((one.size for one in standings if one.good == "yes"), None)
    doubtful = {one.size for one in standings if one.good == "unknown"} | ({first} if first else set())
    *sizes, last = sorted(doubtful)
    between = f"between {', '.join(map(str, sizes))} and {last}" if sizes else f"whether {last} is enough"
    return (
        f"The data can't decide {between}: their confidence intervals overlap the limit; by the means alone, "
        f"{leaning}. More --rounds or longer --seconds would tell."
    )


def _formula(points: Sequence[SizePoint], standings: Sequence[Standing], cores: int) -> str:
    size = formula_size(cores)
    says = f"The common formula, 2 * cores + 1, says {size} ({cores} {'core' if cores == 1 else 'cores'})"
    known = {one.size: one.throughput_share.value for one in standings}
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
