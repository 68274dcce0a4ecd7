"""Capacity.

Who gets a connection of the pool, who waits and for how long, what is shed, and which connection is thrown
away.

The pool stays the user's own: it is never patched, and can be used beside this.
"""

from __future__ import annotations

import asyncio
import math
import traceback
import warnings
from dataclasses import dataclass

import anyio
import asyncpg

from dbop_raw import events
from dbop_raw.driver.connection import Connection, discard, is_gone
from dbop_raw.driver.underway import EagerCall
from dbop_raw.engine.stats import Counters, EngineStats
from dbop_raw.failure.errors import AcquireTimeout, EngineClosed, EngineOverloaded, PolicyError
from dbop_raw.failure.policy import positive_seconds
from dbop_raw.failure.sqlstate import Repair, Verdict
from dbop_raw.session.settings import Settings

__all__ = ["Capacity", "Checkout"]

# After these, no connection of the pool leads to the primary any more: the pool is expired, once.
_PRIMARY_LOST = frozenset({"25006", "57P02"})

_POOL_METHODS = ("acquire", "release", "get_size", "get_idle_size", "get_max_size", "expire_connections")


@dataclass(slots=True, eq=False)
class Checkout:
    """A connection that an engine holds."""

    conn: Connection
    generation: int
    since: float
    timer: asyncio.TimerHandle | None = None


class Capacity:
    """The connections of one pool, as one engine takes them and gives them back.

    The options are `Engine`'s; see there.
    """

    def __init__(
        self,
        pool: asyncpg.Pool,
        settings: Settings,
        *,
        acquire_timeout: float,
        max_waiting: int | None,
        leak_after: float | None,
    ) -> None:
        for needed in _POOL_METHODS:
            if not callable(getattr(pool, needed, None)):
                message = (
                    f"a {type(pool).__name__} is not an asyncpg pool (no {needed}()): give what "
                    "asyncpg.create_pool() makes"
                )
                raise PolicyError(message)
        if max_waiting is not None and (
            isinstance(max_waiting, bool) or not isinstance(max_waiting, int) or max_waiting < 0
        ):
            message = (
                f"max_waiting={max_waiting!r} is not allowed: give a whole number of at least 0, or None"
            )
            raise PolicyError(message)
        self.counters = Counters()
        self._pool = pool
        self._acquire_timeout = positive_seconds("acquire_timeout", acquire_timeout)
        self._max_waiting = max_waiting
        self._leak_after = None if leak_after is None else positive_seconds("leak_after", leak_after)
        self.settings = settings
        self._held: set[Checkout] = set()
        # Counts the expiries: a connection from before one does not cause the next.
        self._generation = 0
        self._closed = False
        # The time to drain is over: who still waited for a connection gets none any more.
        self._cut = False
        # Set each time that a call ends, or stops waiting, while close() waits for them.
        self._ended: asyncio.Event | None = None

    def __repr__(self) -> str:
        """The numbers that matter; never a DSN."""
        size, limit = self._pool.get_size(), self._pool.get_max_size()
        return f"size={size}/{limit} in_use={len(self._held)} waiting={self.counters.waiting}"

    async def acquire(self, *, shed: bool = True) -> Checkout:
        """Take a connection.

        Raises `AcquireTimeout`, `EngineOverloaded` (with `shed`), `EngineClosed`, or what connecting raised.
        """
        if self._closed:
            raise EngineClosed
        if shed and self._max_waiting is not None:
            self._shed_if_full(self._max_waiting)
        started = self.settings.clock()
        self.counters.waiting += 1
        try:
            conn = await self._conn_by(started + self._acquire_timeout)
        finally:
            self.counters.waiting -= 1
            if self._ended is not None:
                self._ended.set()
        since = self.settings.clock()
        if conn is None:
            raise self._timed_out(since - started)
        if self._cut:
            await self.release(Checkout(conn, self._generation, since))
            raise EngineClosed
        self.counters.acquired(since - started)
        if self.settings.observer is not None:
            self.settings.emit(events.Acquired(waited=since - started))
        checkout = Checkout(conn, self._generation, since)
        if self._leak_after is not None:
            self._watch(checkout, self._leak_after)
        self._held.add(checkout)
        return checkout

    async def _conn_by(self, deadline: float) -> Connection | None:
        """A connection of the pool; None when none came in time. One that is free costs no timer."""
        taking: EagerCall[Connection] = EagerCall(self._pool.acquire())
        if taking.done:
            return taking.result()
        with anyio.CancelScope(deadline=deadline):
            return await taking
        return None

    def _shed_if_full(self, max_waiting: int) -> None:
        """Refuse the call when connections in use and calls on their way fill both the pool and the queue."""
        pool, waiting = self._pool, self.counters.waiting
        busy = pool.get_size() - pool.get_idle_size()
        if busy + waiting >= pool.get_max_size() + max_waiting:
            self.counters.shed += 1
            if self.settings.observer is not None:
                self.settings.emit(events.Shed(waiting=waiting))
            raise EngineOverloaded(waiting=waiting, max_waiting=max_waiting, max_size=pool.get_max_size())

    def _timed_out(self, waited: float) -> AcquireTimeout:
        pool, waiting = self._pool, self.counters.waiting
        self.counters.acquire_timeouts += 1
        if self.settings.observer is not None:
            self.settings.emit(events.AcquireTimedOut(waited=waited, waiting=waiting))
        return AcquireTimeout(
            seconds=self._acquire_timeout,
            size=pool.get_size(),
            max_size=pool.get_max_size(),
            idle=pool.get_idle_size(),
            waiting=waiting,
        )

    def _watch(self, checkout: Checkout, seconds: float) -> None:
        # Places, not lines of code: a line may hold SQL, a value or a DSN.
        frames = traceback.extract_stack(limit=20)[:-2]
        stack = "".join(f'  File "{at.filename}", line {at.lineno}, in {at.name}\n' for at in frames)

        def report() -> None:
            if self.settings.observer is not None:
                self.settings.emit(events.LeakSuspected(held=seconds, stack=stack))
            else:
                message = (
                    f"a connection has been held for more than {seconds:g} s; it was taken here:\n{stack}"
                )
                warnings.warn(message, ResourceWarning, stacklevel=1)

        checkout.timer = asyncio.get_running_loop().call_later(seconds, report)

    async def release(
        self,
        checkout: Checkout,
        deadline: float = math.inf,
        *,
        error: Verdict | None = None,
        lost: bool = False,
    ) -> None:
        """Give a connection back, shielded and bounded; or throw it away.

        What can't be reset is thrown away by the pool, and is no error of the caller's.

        Args:
            checkout: What was acquired.
            deadline: The event loop's time at which the run has to be over; the release is over the bound of
                grace after that, whatever went before.
            error: The verdict of what failed with it. A lost primary expires the pool.
            lost: The connection is not to be used again.
        """
        if error is not None:
            if error.sqlstate in _PRIMARY_LOST and error.repair is Repair.CONNECTION:
                await self._expire(checkout, error)
            if lost or is_gone(checkout.conn):
                self._evict(checkout, error)
        await self._to_pool(checkout, deadline)

    def _evict(self, checkout: Checkout, error: Verdict) -> None:
        self.counters.evicted += 1
        if self.settings.observer is not None:
            self.settings.emit(events.Evicted(sqlstate=error.sqlstate, condition=error.condition))
        discard(checkout.conn)

    async def _expire(self, checkout: Checkout, verdict: Verdict) -> None:
        """Expire the pool once for each loss.

        Whoever still holds a connection from before does not expire the new ones.
        """
        if checkout.generation != self._generation:
            return
        self._generation += 1
        with anyio.CancelScope(shield=True):
            await self._pool.expire_connections()
        if self.settings.observer is not None:
            self.settings.emit(events.PoolExpired(sqlstate=verdict.sqlstate))

    async def _to_pool(self, checkout: Checkout, deadline: float) -> None:
        bounds, ended = self.settings.bounds, self.settings.clock()
        seconds = min(bounds.cleanup, max(bounds.reset, deadline + bounds.grace - ended))
        try:
            with anyio.CancelScope(shield=True):
                await self._pool.release(checkout.conn, timeout=seconds)
        except Exception:  # noqa: BLE001 - asyncpg has terminated the connection
            self.counters.evicted += 1
        finally:
            if checkout.timer is not None:
                checkout.timer.cancel()
            self.counters.held_seconds += ended - checkout.since
            self._held.discard(checkout)
            if self._ended is not None:
                self._ended.set()

    async def drain(self, seconds: float) -> bool:
        """Refuse new calls, wait for those that run or wait, then throw away the connections still held.

        True when there were none.
        """
        self._closed = True
        if self._ended is None:
            self._ended = asyncio.Event()
        with anyio.move_on_after(seconds):
            while self._held or self.counters.waiting:
                self._ended.clear()
                await self._ended.wait()
        clean = not (self._held or self.counters.waiting)
        self._cut = True
        for checkout in list(self._held):
            discard(checkout.conn)
        return clean

    def stats(self) -> EngineStats:
        """The numbers as they are now."""
        pool = self._pool
        return self.counters.snapshot(
            size=pool.get_size(),
            max_size=pool.get_max_size(),
            idle=pool.get_idle_size(),
            in_use=len(self._held),
        )
