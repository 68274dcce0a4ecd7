"""The engine's numbers: one small mutable object inside, frozen snapshots out."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

__all__ = ["WAIT_BUCKETS", "Counters", "EngineStats"]

WAIT_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds: the upper ends of the histogram of waiting times; one more bucket holds what is above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """An engine's numbers at one moment; the totals count from its beginning."""

    size: int
    """Connections that are open."""
    max_size: int
    """Connections that may be open."""
    idle: int
    """Open connections that nobody holds."""
    in_use: int
    """Connections that this engine holds (whoever else uses the pool is in `size - idle`)."""
    waiting: int
    """Calls that wait for a connection now."""
    acquires: int
    wait_seconds: float
    """Seconds waited for connections, in all."""
    wait_max: float
    """Seconds: the longest wait."""
    wait_histogram: tuple[tuple[float, int], ...]
    """(upper end in seconds, number of waits up to it and above the one before); the last upper end is
    infinite.
    """
    held_seconds: float
    """Seconds that connections were held, in all: with the time that passed, Little's law gives the mean
    number in use.
    """
    acquire_timeouts: int
    waits_abandoned: int
    """Waits for a connection that a deadline or a cancellation ended before the acquire timeout did."""
    shed: int
    evicted: int
    """Connections thrown away instead of going back to the pool."""
    commits: int
    """Transactions, and autocommitted operations, that are surely done."""
    rollbacks: int
    """Transactions that surely left nothing; one for each attempt that was begun."""
    retries: int
    commits_in_doubt: int
    commits_found_committed: int
    commits_found_aborted: int


@dataclass(slots=True)
class Counters:
    """What an engine counts."""

    waiting: int = 0
    acquires: int = 0
    wait_seconds: float = 0.0
    wait_max: float = 0.0
    waits: list[int] = field(default_factory=lambda: [0] * (len(WAIT_BUCKETS) + 1))
    held_seconds: float = 0.0
    acquire_timeouts: int = 0
    waits_abandoned: int = 0
    shed: int = 0
    evicted: int = 0
    commits: int = 0
    rollbacks: int = 0
    retries: int = 0
    commits_in_doubt: int = 0
    commits_found_committed: int = 0
    commits_found_aborted: int = 0

    def acquired(self, waited: float) -> None:
        """A connection came after `waited` seconds."""
        self.acquires += 1
        self.wait_seconds += waited
        self.wait_max = max(self.wait_max, waited)
        self.waits[bisect.bisect_left(WAIT_BUCKETS, waited)] += 1

    def snapshot(self, *, size: int, max_size: int, idle: int, in_use: int) -> EngineStats:
        """All of it, frozen, with the pool's numbers of this moment."""
        return EngineStats(
            size=size,
            max_size=max_size,
            idle=idle,
            in_use=in_use,
            waiting=self.waiting,
            acquires=self.acquires,
            wait_seconds=self.wait_seconds,
            wait_max=self.wait_max,
            wait_histogram=tuple(zip((*WAIT_BUCKETS, float("inf")), self.waits, strict=True)),
            held_seconds=self.held_seconds,
            acquire_timeouts=self.acquire_timeouts,
            waits_abandoned=self.waits_abandoned,
            commits=self.commits,
            rollbacks=self.rollbacks,
            shed=self.shed,
            evicted=self.evicted,
            retries=self.retries,
            commits_in_doubt=self.commits_in_doubt,
            commits_found_committed=self.commits_found_committed,
            commits_found_aborted=self.commits_found_aborted,
        )
