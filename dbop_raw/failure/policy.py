"""How often to retry, how long to wait, and how much retrying a whole engine may do.

Pure, without I/O. Time and randomness are passed in, so that a test needs neither to sleep nor to guess.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dbop_raw.failure.errors import PolicyError, RetriesExhausted

__all__ = ["Attempts", "RetryBudget", "RetryPolicy", "next_delay", "positive_seconds", "whole_number"]

# 2 ** 1024 overflows a float; no delay grows for so long anyway.
_LARGEST_EXPONENT = 1000


def positive_seconds(name: str, value: float) -> float:
    """Check an option that is a number of seconds.

    Args:
        name: The option's name, for the message.
        value: What it was set to.

    Returns:
        The value as a float.

    Raises:
        PolicyError: It is not a finite number above 0.
    """
    _number(name, value)
    if not (math.isfinite(value) and value > 0):
        raise PolicyError(f"{name}={value!r} is not allowed: give finite seconds greater than 0")
    return float(value)


def _number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PolicyError(f"{name}={value!r} is not a number: give one, for example {name}=1.5")


def whole_number(name: str, value: int, least: int) -> None:
    """Raise `PolicyError` when `value` is not a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PolicyError(f"{name}={value!r} is not allowed: give a whole number of at least {least}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How many times a body may be started, and the longest wait before each new start.

    The wait before start *n + 1* is drawn uniformly from 0 to `first_delay * factor ** (n - 1)`, at most
    `max_delay`. This "full jitter" spreads out callers that failed together, so that they don't meet again.
    On average half of the longest wait passes: with `attempts=4` and the defaults, 0.175 s in all, and never
    more than 0.35 s, which is too little to outlive the restart of a server.

    Which errors are retried is not part of a policy: their verdicts say it (see `dbop_raw.classify`).

    Raises:
        PolicyError: A value is not allowed.
    """

    attempts: int
    """How many times the body may be started in all, at whatever level; 1 never retries."""
    first_delay: float = 0.05
    """Seconds: the longest wait before the second start."""
    max_delay: float = 1.0
    """Seconds: no wait is longer."""
    factor: float = 2.0
    """By how much the longest wait grows from one start to the next; at least 1."""

    def __post_init__(self) -> None:
        whole_number("attempts", self.attempts, 1)
        positive_seconds("first_delay", self.first_delay)
        positive_seconds("max_delay", self.max_delay)
        if self.max_delay < self.first_delay:
            raise PolicyError(
                f"max_delay={self.max_delay!r} is below first_delay={self.first_delay!r}: give at least that"
            )
        _number("factor", self.factor)
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise PolicyError(f"factor={self.factor!r} is not allowed: give a finite number of at least 1")

    def longest_delay(self, started: int) -> float:
        """Return the longest wait before the next start, in seconds.

        Args:
            started: How many times the body has been started, at least 1.
        """
        exponent = min(started - 1, _LARGEST_EXPONENT)
        try:
            return min(self.max_delay, self.first_delay * self.factor**exponent)
        except OverflowError:
            return self.max_delay

    def delay(self, started: int, rng: Callable[[], float] = random.random) -> float:
        """Draw the wait before the next start, in seconds.

        Args:
            started: How many times the body has been started, at least 1.
            rng: Returns a random float in [0, 1).
        """
        return self.longest_delay(started) * rng()


@dataclass(slots=True)
class Attempts:
    """How many times one body has been started, and since when.

    Every level that may start the body again (savepoint, transaction) counts in the same object.
    """

    since: float
    """The clock's reading, in seconds, at the first start."""
    count: int = 0
    """How many times the body has been started."""


@dataclass(slots=True, kw_only=True)
class RetryBudget:
    """A token bucket that all calls of one engine share, so that retries don't add up to a storm.

    It starts full. Each call adds `per_call` tokens and each second `per_second`, up to `capacity`. Each
    retry takes one token, or two where the server says that it has too many connections (53300). Where too
    few are left, the retry is refused: the caller gets `RetriesExhausted` with `reason="budget"` at once. So
    in a long outage bodies are started at most `1 + per_call` times as often as calls are made, whatever the
    policies allow. (The idea is that of the retry budgets of Finagle and tower.)

    For one event loop; it is not thread-safe.

    Raises:
        PolicyError: A value is not allowed.
    """

    capacity: float
    """Tokens at the start, and at most: how many retries a short burst may make."""
    per_call: float = 0.1
    """Tokens that each call adds: 0.1 allows one retry for every ten calls, for any length of time."""
    per_second: float = 0.0
    """Tokens that each second adds, for an engine with few calls."""
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    """The time in seconds, for `per_second`."""
    tokens: float = field(init=False)
    """Tokens that are left."""
    refused: int = field(init=False, default=0)
    """How many retries have been refused."""
    _at: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        positive_seconds("capacity", self.capacity)
        for name, value in (("per_call", self.per_call), ("per_second", self.per_second)):
            _number(name, value)
            if not (math.isfinite(value) and value >= 0):
                raise PolicyError(f"{name}={value!r} is not allowed: give a finite number of at least 0")
        self.tokens = float(self.capacity)
        self._at = self.clock()

    def deposit(self) -> None:
        """Add a call's tokens: called when one begins."""
        self.tokens = min(self.capacity, self.tokens + self.per_call)

    def withdraw(self, cost: float = 1.0) -> bool:
        """Take the tokens for one retry.

        Args:
            cost: How many.

        Returns:
            Whether there were as many; if not, none is taken and the retry is refused.
        """
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
    """Decide how long to wait before a body is started again after a transient failure.

    Args:
        policy: How many starts are allowed, and how long the waits are.
        attempts: How many times the body has been started, and since when.
        now: The clock's reading, in seconds.
        deadline: The clock's reading by which the next start must have begun; infinity for no deadline. Minus
            infinity says that the caller is cancelled, which is no lack of time: the wait that follows will
            raise the cancellation.
        rng: Returns a random float in [0, 1).
        budget: What the retry is charged to; None charges nothing.
        cost: How many tokens it takes.

    Returns:
        The wait, in seconds.

    Raises:
        RetriesExhausted: The body is not to be started again; `reason` says why.
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
