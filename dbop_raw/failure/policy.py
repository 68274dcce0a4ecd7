"""How often to try again, how long to wait, and how much retrying a whole engine may do: pure, no I/O.

Time and randomness are passed in, so that a test never sleeps and never guesses.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dbop_raw.failure.errors import PolicyError, RetriesExhausted

__all__ = ["Attempts", "RetryBudget", "RetryPolicy", "next_delay", "positive_seconds"]

# 2 ** 1024 overflows a float; no delay grows for so long anyway.
_LARGEST_EXPONENT = 1000


def positive_seconds(name: str, value: float) -> float:
    """Return `value` as a float of seconds, or raise `PolicyError` when it is not a finite number above 0."""
    _number(name, value)
    if not (math.isfinite(value) and value > 0):
        message = f"{name}={value!r} is not allowed: give finite seconds greater than 0"
        raise PolicyError(message)
    return float(value)


def _number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        message = f"{name}={value!r} is not a number: give one, for example {name}=1.5"
        raise PolicyError(message)


def _whole_number(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        message = f"{name}={value!r} is not allowed: give a whole number of at least {least}"
        raise PolicyError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How many times a body may start, and the longest wait before each new start.

    The wait before start *n + 1* is drawn uniformly from 0 to `first_delay * factor ** (n - 1)`, at most
    `max_delay` ("full jitter": it spreads out the callers that one event made fail together).

    What is retried is not said here: the verdict of the error says it (see `dbop_raw.classify`).

    Raises `PolicyError` when a value is not allowed.
    """

    attempts: int
    """How many times the body may start in all, whatever the level that starts it again; 1 never retries."""
    first_delay: float = 0.05
    """Seconds: the longest wait before the second start."""
    max_delay: float = 1.0
    """Seconds: no wait is longer."""
    factor: float = 2.0
    """How much the longest wait grows from one start to the next; at least 1."""

    def __post_init__(self) -> None:
        _whole_number("attempts", self.attempts, 1)
        positive_seconds("first_delay", self.first_delay)
        positive_seconds("max_delay", self.max_delay)
        if self.max_delay < self.first_delay:
            message = (
                f"max_delay={self.max_delay!r} is below first_delay={self.first_delay!r}: give at least that"
            )
            raise PolicyError(message)
        _number("factor", self.factor)
        if not (math.isfinite(self.factor) and self.factor >= 1):
            message = f"factor={self.factor!r} is not allowed: give a finite number of at least 1"
            raise PolicyError(message)

    def longest_delay(self, started: int) -> float:
        """Seconds: the upper end of the wait after the body has started `started` times (1 or more)."""
        exponent = min(started - 1, _LARGEST_EXPONENT)
        try:
            return min(self.max_delay, self.first_delay * self.factor**exponent)
        except OverflowError:
            return self.max_delay

    def delay(self, started: int, rng: Callable[[], float] = random.random) -> float:
        """Seconds to wait after the body has started `started` times; `rng` gives a float in [0, 1)."""
        return self.longest_delay(started) * rng()


@dataclass(slots=True)
class Attempts:
    """How many times one body has started, and since when: shared by every level that may start it again."""

    since: float
    """The clock's reading (seconds) at the first start."""
    count: int = 0


@dataclass(slots=True, kw_only=True)
class RetryBudget:
    """A token bucket that all calls of one engine share, so that retries can't become a storm.

    It starts full. Each call puts `per_call` tokens in, each second `per_second`, never above `capacity`;
    each retry takes one out (two where the server says that it has too many connections). An empty bucket
    refuses the retry: the error goes to the caller at once, as `RetriesExhausted` with `reason="budget"`. So
    over a long outage the number of tries is at most `1 + per_call` times the number of calls, whatever the
    policies say. (The idea is Finagle's and tower's retry budget.)

    One event loop only: it is not thread safe. Raises `PolicyError` when a value is not allowed.
    """

    capacity: float
    """Tokens at the most, and at the start: how many retries a short burst may make."""
    per_call: float = 0.1
    """Tokens that each call puts in: 0.1 lets one call in ten be retried for as long as it takes."""
    per_second: float = 0.0
    """Tokens that each second puts in, for an engine with few calls."""
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    tokens: float = field(init=False)
    refused: int = field(init=False, default=0)
    """How many retries were refused so far."""
    _at: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        positive_seconds("capacity", self.capacity)
        for name, value in (("per_call", self.per_call), ("per_second", self.per_second)):
            _number(name, value)
            if not (math.isfinite(value) and value >= 0):
                message = f"{name}={value!r} is not allowed: give a finite number of at least 0"
                raise PolicyError(message)
        self.tokens = float(self.capacity)
        self._at = self.clock()

    def deposit(self) -> None:
        """A call has begun."""
        self.tokens = min(self.capacity, self.tokens + self.per_call)

    def withdraw(self, cost: float = 1.0) -> bool:
        """Take `cost` tokens for one retry; False when there are not so many, and then none is taken."""
        if self.per_second:
            now = self.clock()
            self.tokens = min(self.capacity, self.tokens + (now - self._at) * self.per_second)
            self._at = now
        if self.tokens < cost:
            self.refused += 1
            return False
        self.tokens -= cost
        return True


def next_delay(
    policy: RetryPolicy,
    attempts: Attempts,
    *,
    now: float,
    deadline: float,
    rng: Callable[[], float],
    budget: RetryBudget | None = None,
    cost: float = 1.0,
) -> float:
    """Say how long to wait before a body starts again after a transient failure.

    Args:
        policy: How often, and the longest wait.
        attempts: How often it has started, and since when.
        now: The clock's reading in seconds.
        deadline: The clock's reading by which the next start must have begun; -inf where the caller is
            cancelled already: that is no lack of time, and the wait that follows will raise it.
        rng: Gives a float in [0, 1).
        budget: What the retry is charged to; None: nothing.
        cost: The tokens that it takes.

    Returns:
        Seconds.

    Raises:
        RetriesExhausted: There is to be no other start; its `reason` says why.
    """
    delay = policy.delay(attempts.count, rng)
    if attempts.count >= policy.attempts:
        reason = "attempts"
    elif -math.inf < deadline <= now + delay:
        reason = "deadline"
    elif budget is not None and not budget.withdraw(cost):
        reason = "budget"
    else:
        return delay
    raise RetriesExhausted(attempts=attempts.count, elapsed=now - attempts.since, reason=reason)
