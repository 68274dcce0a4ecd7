"""A pool as the engine sees it, and as plain asyncpg code does, that notes who waits for a connection."""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import dataclass, field
from typing import Any, cast

import asyncpg

__all__ = ["TimedPool", "Waits"]


# Seconds: a connection that is free is there sooner, by far, and one that is waited for never is: the event
# loop has to come round once.
_WAITED = 0.0001


@dataclass(slots=True)
class Waits:
    """The waiting for a connection of those who asked within a window."""

    seconds: array[float] = field(default_factory=lambda: array("d"))
    given_up: int = 0
    """How many left without one."""
    held: float = 0.0
    """Seconds that those who got one held it, in all, until it was given back."""
    given_back: int = 0

    @property
    def queued(self) -> int:
        """How many had to wait, those who gave up too.

        By the time, and not by whether all connections were taken: asyncpg's pool hands one that was just
        given back to whoever asks first, ahead of those who wait for it.
        """
        return self.given_up + sum(wait > _WAITED for wait in self.seconds)


class TimedPool:
    """Wraps an asyncpg pool: the same `acquire` and `release`, two clock readings more.

    The engine and the bare asyncpg code both go through it, so that it favours neither.
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self.waits = Waits()
        self._pool = pool
        self._max_size = pool.get_max_size()
        self._clock = asyncio.get_running_loop().time
        self._from, self._until = float("inf"), float("inf")
        self.in_use = 0
        self.waiting = 0
        # Connection seconds and waiting seconds up to the last change.
        self._used, self._queued, self._changed = 0.0, 0.0, self._clock()
        # When a connection was taken, by those who are noted.
        self._since: dict[int, float] = {}
        # Connections that are on their way back, the oldest first.
        self._leaving: dict[int, None] = {}

    def as_pool(self) -> asyncpg.Pool:
        """Itself, for an `Engine`, which asks only for what is here."""
        return cast("asyncpg.Pool", self)

    def record(self, start: float, until: float) -> None:
        """Note those who ask between two times of the loop's clock."""
        self._from, self._until = start, until

    def totals(self) -> tuple[float, float]:
        """Seconds that connections were in use and that callers waited, in all, up to now."""
        self._tick(self._clock())
        return self._used, self._queued

    async def acquire(self) -> Any:
        """Take a connection."""
        asked = self._clock()
        self._tick(asked)
        noted = self._from <= asked < self._until
        self.waiting += 1
        try:
            conn = await self._pool.acquire()
        except BaseException:
            self._tick(self._clock())
            self.waiting -= 1
            if noted:
                self.waits.given_up += 1
            raise
        now = self._clock()
        self._tick(now)
        self.waiting -= 1
        if self.in_use >= self._max_size and self._leaving:
            # One is back already: who gave it back has not had its turn yet in this busy loop.
            self._left(next(iter(self._leaving)), now)
        self.in_use += 1
        if noted:
            self.waits.seconds.append(now - asked)
            self._since[id(conn)] = now
        return conn

    async def release(self, conn: Any, *, timeout: float | None = None) -> None:  # noqa: ASYNC109 - asyncpg's
        """Give it back."""
        # asyncpg makes a new proxy for each who takes a connection, so while it lives its id is its own.
        key = id(conn)
        self._leaving[key] = None
        try:
            await self._pool.release(conn, timeout=timeout)
        finally:
            if key in self._leaving:
                self._left(key, self._clock())

    def _left(self, key: int, now: float) -> None:
        self._tick(now)
        del self._leaving[key]
        self.in_use -= 1
        since = self._since.pop(key, None)
        if since is not None:
            self.waits.held += now - since
            self.waits.given_back += 1

    def _tick(self, now: float) -> None:
        passed = now - self._changed
        self._used += passed * self.in_use
        self._queued += passed * self.waiting
        self._changed = now

    def get_size(self) -> int:
        """As asyncpg has it."""
        return self._pool.get_size()

    def get_idle_size(self) -> int:
        """As asyncpg has it."""
        return self._pool.get_idle_size()

    def get_max_size(self) -> int:
        """As asyncpg has it."""
        return self._max_size

    async def expire_connections(self) -> None:
        """As asyncpg has it."""
        await self._pool.expire_connections()
