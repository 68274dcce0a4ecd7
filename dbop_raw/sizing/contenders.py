"""Who sends the requests: an engine, or plain asyncpg code; and what is noted of their waits and holds.

The engine is measured as it is used, by what it tells its observer and in its statistics; the pool of the
plain code is wrapped. Seen in processor time of a point read, the first costs an engine about 5 %, the second
plain code about 2 %: where the client is the limit, the engine is a little better than its figures.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable
from typing import Any, Protocol

import asyncpg

from dbop_raw.engine.engine import Engine
from dbop_raw.events import Acquired, AcquireTimedOut, Event
from dbop_raw.sizing.load import Window
from dbop_raw.sizing.options import Options
from dbop_raw.sizing.workloads import Request

__all__ = ["Bare", "Contender", "Ours", "TimedPool", "Waits"]

# Seconds: a connection that is free is there sooner, by far, and one that is waited for never is: the event
# loop has to come round once.
_WAITED = 0.0001


class Waits:
    """What those waited for a connection who asked for one within a window, and how long it was held."""

    def __init__(self) -> None:
        self.window = Window(0.0, 0.0)
        self.seconds = array("d")
        """Until it was there, of each that got one."""
        self.given_up = 0
        """How many left without one."""

    def note(self, waited: float, until: float, *, got: bool) -> None:
        """One has waited for so many seconds, until that time of the loop's clock."""
        if until - waited in self.window:
            if got:
                self.seconds.append(waited)
            else:
                self.given_up += 1

    @property
    def asked(self) -> int:
        """How many asked for one."""
        return len(self.seconds) + self.given_up

    @property
    def queued(self) -> int:
        """How many had to wait, those who gave up too.

        By the time, and not by whether all connections were taken: asyncpg's pool hands one that was just
        given back to whoever asks first, ahead of those who wait for it.
        """
        return self.given_up + sum(wait > _WAITED for wait in self.seconds)


class Contender(Protocol):
    """Who sends requests through a pool."""

    waits: Waits

    def send(self, request: Request) -> Awaitable[object]:
        """Run it to its end."""
        ...

    def gauge(self) -> tuple[int, int]:
        """Connections in use, and callers that wait for one: now."""
        ...

    def holds(self) -> tuple[float, int]:
        """Seconds that connections were held, and how often one was given back: so far."""
        ...


class Ours:
    """An engine, as it is used: what it tells its observer and in its statistics is noted."""

    def __init__(self, pool: asyncpg.Pool, options: Options) -> None:
        self.waits = Waits()
        self._clock = asyncio.get_running_loop().time
        timeout, waiting = options.acquire_timeout, options.max_waiting
        self._engine = Engine(pool, acquire_timeout=timeout, max_waiting=waiting, observer=self._note)

    def _note(self, event: Event) -> None:
        if isinstance(event, (Acquired, AcquireTimedOut)):
            self.waits.note(event.waited, self._clock(), got=isinstance(event, Acquired))

    def send(self, request: Request) -> Awaitable[object]:
        """Run it to its end."""
        return self._engine.run(request.operation, autocommit=not request.transaction)

    def gauge(self) -> tuple[int, int]:
        """Connections in use, and callers that wait for one: now."""
        stats = self._engine.stats()
        return stats.in_use, stats.waiting

    def holds(self) -> tuple[float, int]:
        """Seconds that connections were held, and how often one was given back: so far."""
        stats = self._engine.stats()
        return stats.held_seconds, stats.acquires - stats.in_use


class TimedPool:
    """An asyncpg pool for plain code: its `acquire` and `release`, with two clock readings more."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self.waits = Waits()
        self.in_use = 0
        self.waiting = 0
        self.held = 0.0
        """Seconds that connections were held, in all, until they were given back …"""
        self.given_back = 0
        """… and how often that was."""
        self._pool = pool
        self._max_size = pool.get_max_size()
        self._clock = asyncio.get_running_loop().time
        # When a connection was taken; those that are on their way back, the oldest first.
        self._since: dict[int, float] = {}
        self._leaving: dict[int, None] = {}

    async def acquire(self) -> Any:
        """Take a connection."""
        asked = self._clock()
        self.waiting += 1
        got = False
        try:
            conn = await self._pool.acquire()
            got = True
        finally:
            now = self._clock()
            self.waiting -= 1
            self.waits.note(now - asked, now, got=got)
        if self.in_use >= self._max_size and self._leaving:
            # One is back already: who gave it back has not had its turn yet in this busy loop.
            self._left(next(iter(self._leaving)))
        self.in_use += 1
        # asyncpg makes a new proxy for each who takes a connection, so while it lives its id is its own.
        self._since[id(conn)] = now
        return conn

    async def release(self, conn: Any) -> None:
        """Give it back."""
        key = id(conn)
        self._leaving[key] = None
        try:
            await self._pool.release(conn)
        finally:
            if key in self._leaving:
                self._left(key)

    def _left(self, key: int) -> None:
        del self._leaving[key]
        self.in_use -= 1
        self.held += self._clock() - self._since.pop(key)
        self.given_back += 1

    def gauge(self) -> tuple[int, int]:
        """Connections in use, and callers that wait for one: now."""
        return self.in_use, self.waiting

    def holds(self) -> tuple[float, int]:
        """Seconds that connections were held, and how often one was given back: so far."""
        return self.held, self.given_back


class Bare(TimedPool):
    """Plain asyncpg code."""

    async def send(self, request: Request) -> None:
        """Run it to its end."""
        conn = await self.acquire()
        try:
            if request.transaction:
                async with conn.transaction():
                    await request.bare(conn)
            else:
                await request.bare(conn)
        finally:
            await self.release(conn)
