"""Is the pool too small or too large? An answer from two snapshots of an engine's numbers: pure.

Little's law: connections in use, on average, are calls per second times the seconds that each holds one.
How many more are needed so that few calls wait is Erlang's C formula, for calls that come by chance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dbop_raw.engine.stats import EngineStats
from dbop_raw.failure.errors import PolicyError
from dbop_raw.failure.policy import positive_seconds

__all__ = ["PoolAdvice", "PoolVerdict", "pool_advice"]

PoolVerdict = Literal["too small", "about right", "too large", "can't tell"]

# The share of calls that may wait in a pool of the right size.
_TOLERATED = 0.05
# Seconds; one of stats.WAIT_BUCKETS. A shorter wait is the event loop's own, and nobody's trouble.
_NOTICEABLE = 0.001
# Below so many calls, shares are chance.
_FEW = 100
# A window shorter than so many holds counts mostly what was taken before it or is given back after it.
_HOLDS = 4
# A full pool shows only the least that is needed: never advise more than so many times the size at once.
_STEP = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolAdvice:
    """What `pool_advice` found."""

    verdict: PoolVerdict
    mean_in_use: float
    """Connections that this engine held, on average (Little's law)."""
    utilisation: float
    """`mean_in_use` as a share of `max_size`: 0 to 1."""
    wait_share: float
    """Share of calls, 0 to 1, that waited more than 1 ms for a connection, or did not get one."""
    mean_wait: float
    """Seconds that a call waited until it had its connection, on average over all that got one."""
    suggested_size: int | None
    """A `max_size` to try; the one it has where that is about right; None where it can't be told."""
    reason: str
    """One sentence with the numbers, for a person."""


@dataclass(frozen=True, slots=True)
class _Window:
    """What happened between two snapshots."""

    seconds: float
    size: int
    acquires: int
    refused: int
    waited: int
    wait_seconds: float
    held_seconds: float
    released: int

    @property
    def asked(self) -> int:
        return self.acquires + self.refused

    @property
    def in_use(self) -> float:
        return min(self.held_seconds / self.seconds, float(self.size))

    @property
    def wait_share(self) -> float:
        return (self.waited + self.refused) / self.asked if self.asked else 0.0

    @property
    def mean_wait(self) -> float:
        return self.wait_seconds / self.acquires if self.acquires else 0.0

    @property
    def mean_hold(self) -> float:
        return self.held_seconds / self.released if self.released > 0 else 0.0

    @property
    def load(self) -> float:
        """Connections that all who asked would have held, those who got none too."""
        return self.asked / self.seconds * self.mean_hold


def pool_advice(before: EngineStats, after: EngineStats, seconds: float) -> PoolAdvice:
    """Say whether a pool is too small or too large, from `engine.stats()` now and `seconds` ago.

    It speaks of that window only: take one of your busiest time, many times longer than a connection is held.
    Waiting for a connection to be *opened* counts as waiting. The engine should be the pool's only user: what
    others hold is not seen. It can't know whether the server has room for more connections; measure that
    (`dbop-raw pool-size`).

    Raises `PolicyError` when `seconds` is not above 0, or the snapshots are not of one engine in this order.
    """
    window = _window(before, after, positive_seconds("seconds", seconds))
    unknown = _unknown(window, after)
    if unknown is not None:
        return _advice(window, "can't tell", None, unknown)
    wanted = _smallest(window.load, _TOLERATED, window.size * _STEP)
    if window.wait_share > _TOLERATED:
        return _waiting(window, wanted)
    if _oversized(window, wanted):
        reason = (
            f"{window.in_use:.3g} of {window.size} connections were in use on average and {_waits(window)}: "
            f"{wanted} would do, if this was the busiest time"
        )
        return _advice(window, "too large", wanted, reason)
    reason = f"{window.in_use:.3g} of {window.size} connections were in use on average and {_waits(window)}"
    return _advice(window, "about right", window.size, reason)


def _refused(stats: EngineStats) -> int:
    """Calls that got no connection, because the engine or they themselves gave up on it."""
    return stats.acquire_timeouts + stats.shed + stats.waits_abandoned


def _window(before: EngineStats, after: EngineStats, seconds: float) -> _Window:
    acquires = after.acquires - before.acquires
    refused = _refused(after) - _refused(before)
    waited = _waited(after) - _waited(before)
    wait_seconds, held = after.wait_seconds - before.wait_seconds, after.held_seconds - before.held_seconds
    if before.max_size != after.max_size or min(acquires, refused, waited, wait_seconds, held) < 0:
        message = "the snapshots are not of one engine, older one first: pool_advice(before, after, seconds)"
        raise PolicyError(message)
    released = acquires - (after.in_use - before.in_use)
    return _Window(seconds, after.max_size, acquires, refused, waited, wait_seconds, held, released)


def _waited(stats: EngineStats) -> int:
    return sum(count for end, count in stats.wait_histogram if end > _NOTICEABLE)


def _unknown(window: _Window, after: EngineStats) -> str | None:
    """Why nothing can be said; None where something can."""
    if window.released <= 0 and after.in_use:
        return (
            f"{after.in_use} of {window.size} connections are held and none was given back in "
            f"{window.seconds:.3g} s: look for what holds them (leak_after=…), or take a longer window"
        )
    if window.asked < _FEW:
        return f"only {window.asked} calls asked for a connection: take a window of at least {_FEW}"
    if window.mean_hold * _HOLDS > window.seconds:
        return (
            f"a connection is held for {window.mean_hold:.3g} s on average: take a window of at least "
            f"{window.mean_hold * _HOLDS:.3g} s"
        )
    return None


def _waiting(window: _Window, wanted: int) -> PoolAdvice:
    if wanted <= window.size:
        reason = (
            f"{_waits(window)}, though only {window.in_use:.3g} of {window.size} connections were in use on "
            "average: calls come in bursts, or wait for connections to be opened (min_size below max_size)"
        )
        return _advice(window, "can't tell", None, reason)
    reason = (
        f"{_waits(window)} while {window.in_use:.3g} of {window.size} connections were in use on average: "
        f"try {wanted}, if the server has room for them"
    )
    return _advice(window, "too small", wanted, reason)


def _oversized(window: _Window, wanted: int) -> bool:
    """Half of it would do, that is two connections at least, and hardly anybody waits."""
    spare = window.size - wanted
    return wanted <= spare and spare > 1 and window.wait_share <= _TOLERATED / 10


def _waits(window: _Window) -> str:
    share = window.wait_share
    if not share:
        return f"none of {window.asked:,} calls waited for one"
    percent = "under 0.1" if share < 0.001 else f"{share * 100:.3g}"
    refused = f", {window.refused:,} got none" if window.refused else ""
    mean = f"{window.mean_wait * 1000:.2g} ms on average"
    return f"{percent} % of {window.asked:,} calls waited for one ({mean}{refused})"


def _advice(window: _Window, verdict: PoolVerdict, size: int | None, reason: str) -> PoolAdvice:
    return PoolAdvice(
        verdict=verdict,
        mean_in_use=window.in_use,
        utilisation=window.in_use / window.size,
        wait_share=window.wait_share,
        mean_wait=window.mean_wait,
        suggested_size=size,
        reason=reason,
    )


def _smallest(load: float, share: float, limit: int) -> int:
    """The fewest connections with which at most `share` of the calls wait, at `load` in use on average.

    `limit` at the most. Erlang's C formula (calls come independently, holds vary as chance has it), by the
    stable recursion of his B formula: https://en.wikipedia.org/wiki/Erlang_(unit)#Erlang_C_formula.
    """
    blocked = 1.0
    for size in range(1, limit):
        blocked = load * blocked / (size + load * blocked)
        if size > load and blocked / (1 - load / size * (1 - blocked)) <= share:
            return size
    return limit
