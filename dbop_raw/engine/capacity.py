"""Capacity: who gets a connection, who waits and in what order, what is shed, and what is thrown away.

Whoever finds a free connection takes it. Whoever does not stands in line, and the line is served in order: a
connection that comes free is handed to the first in it, so nobody is overtaken. Where the pool may have more
connections than this engine holds, a task for each that is missing asks the pool for it. Such a task belongs
to the line and to no caller: one that gives up takes nothing along, and a connect under way is not thrown
away with whoever asked for it first.

The pool stays the user's own: it is never patched, and can be used beside this.
"""

from __future__ import annotations

import asyncio
import math
import traceback
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import anyio
import asyncpg

from dbop_raw import events
from dbop_raw.driver.connection import Connection, discard, is_gone
from dbop_raw.driver.handover import can_hand_over, hand_over
from dbop_raw.driver.underway import EagerCall
from dbop_raw.engine.stats import Counters, EngineStats
from dbop_raw.failure.errors import AcquireTimeout, EngineClosed, EngineOverloaded, PolicyError
from dbop_raw.failure.policy import positive_seconds
from dbop_raw.failure.sqlstate import Repair, Verdict
from dbop_raw.session.settings import Settings

__all__ = ["Capacity", "Checkout"]

# After these, no connection of the pool leads to the primary any more: the pool is expired, once.
_PRIMARY_LOST = frozenset({"25006", "57P02"})

# So many times in a row a connection is handed to the next in line; then it goes through the pool, so that
# the pool's `max_queries` and expiry, and its other users, get their due.
_HANDED_OVER_AT_MOST = 32

_OF_THE_DRIVER = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)

_POOL_METHODS = ("acquire", "release", "get_size", "get_idle_size", "get_max_size", "expire_connections")


@dataclass(slots=True, eq=False)
class Checkout:
    """A connection that an engine holds."""

    conn: Connection
    generation: int
    since: float
    task: asyncio.Task[Any] | None = None
    """Who took it: a task that holds one and waits for another may wait for itself."""
    handed_over: int = 0
    """How often in a row it did not go through the pool."""
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
                raise PolicyError(
                    f"a {type(pool).__name__} is not an asyncpg pool (no {needed}()): give what "
                    "asyncpg.create_pool() makes"
                )
        if max_waiting is not None and (
            isinstance(max_waiting, bool) or not isinstance(max_waiting, int) or max_waiting < 0
        ):
            raise PolicyError(
                f"max_waiting={max_waiting!r} is not allowed: give a whole number of at least 0, or None"
            )
        self.counters = Counters()
        self.settings = settings
        self._pool = pool
        self._acquire_timeout = positive_seconds("acquire_timeout", acquire_timeout)
        self._max_waiting = max_waiting
        self._leak_after = None if leak_after is None else positive_seconds("leak_after", leak_after)
        self._hands_over = can_hand_over(pool)
        self._held: set[Checkout] = set()
        # Who waits, first come first. A dict, so that who gives up leaves at once, wherever he stands.
        self._line: OrderedDict[asyncio.Future[Checkout | None], None] = OrderedDict()
        # Tasks that ask the pool for a connection, for the line.
        self._asking: set[asyncio.Task[None]] = set()
        # Connections that we have given back to the pool and not taken since: most likely free. With those
        # that are held never more than the pool may have.
        self._free = 0
        # Calls that ask the pool for one of these themselves.
        self._taking = 0
        # Counts the expiries: a connection from before one does not cause the next.
        self._generation = 0
        # Calls that have begun and not ended, also those in the pause before another attempt.
        self._calls = 0
        self._closed = False
        # The time to drain is over: who still waits for a connection gets none any more.
        self._cut = False
        # Set when the engine is closed, so that pauses end.
        self._closing: asyncio.Event | None = None
        # Set each time that a call ends, or stops waiting, while drain() waits for them.
        self._ended: asyncio.Event | None = None

    def __repr__(self) -> str:
        """The numbers that matter; never a DSN."""
        size, limit = self._pool.get_size(), self._pool.get_max_size()
        return f"size={size}/{limit} in_use={len(self._held)} waiting={self.counters.waiting}"

    # --- in

    async def acquire(self, *, shed: bool = True, timeout: float | None = None) -> Checkout:  # noqa: ASYNC109
        """Take a connection.

        Args:
            shed: Refuse where as many wait as may; not for a call that was let in already.
            timeout: Seconds to wait, possibly infinite; None: the engine's.

        Raises:
            AcquireTimeout: None came in time.
            EngineOverloaded: Too many wait already.
            EngineClosed: The engine was closed.
            Exception: What connecting raised.
        """
        if self._closed:
            raise EngineClosed
        if shed and self._max_waiting is not None:
            self._shed_if_full(self._max_waiting)
        clock, counters = self.settings.clock, self.counters
        seconds = self._acquire_timeout if timeout is None else timeout
        started = clock()
        counters.waiting += 1
        checkout: Checkout | None
        try:
            if self._free and not (self._line or self._asking or self._taking):
                # Most likely one is free, and costs no timer.
                self._free -= 1
                taking: EagerCall[Connection] = EagerCall(self._pool.acquire())
                if taking.done:
                    checkout = self._checkout(taking.result())
                else:
                    checkout = await self._take(taking, started + seconds)
            else:
                checkout = await self._stand_in_line(started + seconds)
        except asyncio.CancelledError:
            counters.waits_abandoned += 1
            raise
        finally:
            counters.waiting -= 1
            if self._ended is not None:
                self._ended.set()
        if checkout is None:
            raise self._timed_out(clock() - started, seconds)
        waited = checkout.since - started
        if self._cut:
            await self.release(checkout)
            raise EngineClosed
        self._took(checkout, waited)
        return checkout

    def _took(self, checkout: Checkout, waited: float) -> None:
        """Count it, tell the observer, and watch how long it is held."""
        self.counters.acquired(waited)
        checkout.task = asyncio.current_task()
        if self.settings.observer is not None:
            self.settings.emit(events.Acquired(waited=waited))
        if self._leak_after is not None:
            self._watch(checkout, self._leak_after)

    async def _take(self, taking: EagerCall[Connection], deadline: float) -> Checkout | None:
        """Wait for a connection that the pool did not give at once; None: not in time.

        Somebody else took it, it was closed, or the pool's `setup=` is at work. It goes on in this task, and
        no cancel scope of anyio's may begin now: one that `setup` has begun would be inside of it.
        """
        limit = asyncio.timeout_at(deadline if math.isfinite(deadline) else None)
        # It was not so, and the others are not free either. Until this caller has one he is the first of all
        # who wait, but stands in the pool's line and not in ours: so nobody else goes there, and nothing is
        # handed over past him.
        self._free = 0
        self._taking += 1
        try:
            async with limit:
                return self._checkout(await taking)
        except TimeoutError:
            if limit.expired():
                return None
            raise
        finally:
            self._taking -= 1

    def _checkout(self, conn: Connection, handed_over: int = 0) -> Checkout:
        checkout = Checkout(conn, self._generation, self.settings.clock(), None, handed_over)
        self._held.add(checkout)
        return checkout

    async def _stand_in_line(self, deadline: float) -> Checkout | None:
        """Wait for a connection behind those who wait already; None: not in time."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Checkout | None] = loop.create_future()
        self._line[waiter] = None
        self._ask_the_pool()
        timer = loop.call_at(deadline, self._give_up, waiter) if math.isfinite(deadline) else None
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                checkout = waiter.result()
                if checkout is not None:
                    # It was given at the same moment: the next one gets it.
                    await self.release(checkout)
            raise
        finally:
            if timer is not None:
                timer.cancel()
            self._line.pop(waiter, None)
            # An error that it holds would hold it in turn, by this frame.
            del waiter
            self._leave_pool_alone()

    def _give_up(self, waiter: asyncio.Future[Checkout | None]) -> None:
        """The time of who waits is over."""
        if not waiter.done():
            self._line.pop(waiter, None)
            waiter.set_result(None)

    def _next_in_line(self) -> asyncio.Future[Checkout | None] | None:
        while self._line:
            waiter, _ = self._line.popitem(last=False)
            # One that was cancelled a moment ago is still there.
            if not waiter.done():
                return waiter
        return None

    def _ask_the_pool(self) -> None:
        """Ask for as many connections as may still be had, and are waited for."""
        wanted = min(len(self._line), self._pool.get_max_size() - len(self._held))
        while len(self._asking) < wanted:
            task = asyncio.get_running_loop().create_task(self._ask())
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    async def _ask(self) -> None:
        """Get one connection from the pool, for whoever is first in line by then."""
        conn = None
        try:
            conn = await self._pool.acquire()
        except Exception as exc:  # noqa: BLE001 - raised by who waits
            self._tell_next(exc)
        finally:
            task = asyncio.current_task()
            if task is not None:
                self._asking.discard(task)
        if conn is None:
            # That is one told; who waits behind him needs somebody who asks as well.
            self._ask_the_pool()
            return
        self._free = max(0, self._free - 1)
        waiter = self._next_in_line()
        if waiter is not None:
            waiter.set_result(self._checkout(conn))
            return
        # Nobody waits any more. It was not used, so it counts as nobody's.
        try:
            await self._pool.release(conn, timeout=self.settings.bounds.cleanup)
            self._free += 1
        except Exception as exc:  # noqa: BLE001 - asyncpg has terminated the connection
            self._tell_reset_failed(exc)

    def _tell_next(self, exc: Exception) -> None:
        waiter = self._next_in_line()
        if waiter is not None:
            waiter.set_exception(exc)

    def _leave_pool_alone(self) -> None:
        """Stop asking where nobody waits any more.

        Unless that would throw away a connect under way, or a connection that the pool's `setup=` is at work
        on.
        """
        if self._line or not self._asking or not self._hands_over:
            return
        if self._pool.get_size() >= self._pool.get_max_size():
            for task in self._asking:
                task.cancel()
            # They ask no more, though they have not ended: who comes now is not to rely on them.
            self._asking.clear()

    def _shed_if_full(self, max_waiting: int) -> None:
        """Refuse the call when connections in use and calls on their way fill both the pool and the queue."""
        pool, waiting = self._pool, self._taking + len(self._line)
        busy = pool.get_size() - pool.get_idle_size()
        if busy + waiting >= pool.get_max_size() + max_waiting:
            self.counters.shed += 1
            if self.settings.observer is not None:
                self.settings.emit(events.Shed(waiting=waiting))
            raise EngineOverloaded(waiting=waiting, max_waiting=max_waiting, max_size=pool.get_max_size())

    def _timed_out(self, waited: float, seconds: float) -> AcquireTimeout:
        pool, waiting = self._pool, self.counters.waiting
        self.counters.acquire_timeouts += 1
        if self.settings.observer is not None:
            self.settings.emit(events.AcquireTimedOut(waited=waited, waiting=waiting))
        size, max_size = pool.get_size(), pool.get_max_size()
        task = asyncio.current_task()
        return AcquireTimeout(
            seconds=seconds,
            size=size,
            max_size=max_size,
            idle=pool.get_idle_size(),
            waiting=waiting,
            connecting=min(len(self._asking), max_size - size),
            holding=sum(held.task is task for held in self._held),
        )

    def _watch(self, checkout: Checkout, seconds: float) -> None:
        # Places, not lines of code: a line may hold SQL, a value or a DSN.
        frames = traceback.extract_stack(limit=20)[:-2]
        stack = "".join(f'  File "{at.filename}", line {at.lineno}, in {at.name}\n' for at in frames)
        loop = asyncio.get_running_loop()

        def report() -> None:
            if self.settings.observer is not None:
                self.settings.emit(events.LeakSuspected(held=seconds, stack=stack))
                return
            message = f"a connection has been held for more than {seconds:g} s; it was taken here:\n{stack}"
            # Both, since Python shows no ResourceWarning unless it is asked to.
            loop.call_exception_handler({"message": f"dbop_raw: {message}"})
            warnings.warn(message, ResourceWarning, stacklevel=1)

        checkout.timer = loop.call_later(seconds, report)

    # --- out

    async def release(
        self,
        checkout: Checkout,
        deadline: float = math.inf,
        *,
        error: Verdict | None = None,
        lost: bool = False,
        seconds: float | None = None,
    ) -> None:
        """Give a connection back, or to the next in line, shielded and bounded; or throw it away.

        What can't be reset is thrown away, and is no error of the caller's.

        Args:
            checkout: What was acquired.
            deadline: The event loop's time at which the run has to be over; the release is over the bound of
                grace after that, whatever went before.
            error: The verdict of what failed with it. A lost primary expires the pool.
            lost: The connection is not to be used again.
            seconds: The longest it may take; None: the bound for clean-up.
        """
        if checkout.timer is not None:
            checkout.timer.cancel()
        if error is not None:
            if error.sqlstate in _PRIMARY_LOST and error.repair is Repair.CONNECTION:
                await self._expire(checkout, error)
            if lost or is_gone(checkout.conn):
                self._evict(checkout, error)
        elif self._line and await self._handed_over(checkout, deadline):
            return
        await self._to_pool(checkout, self._seconds(deadline) if seconds is None else seconds)

    def _evict(self, checkout: Checkout, error: Verdict) -> None:
        self.counters.evicted += 1
        if self.settings.observer is not None:
            self.settings.emit(events.Evicted(sqlstate=error.sqlstate, condition=error.condition))
        discard(checkout.conn)

    def _seconds(self, deadline: float) -> float:
        bounds = self.settings.bounds
        if math.isinf(deadline):
            return bounds.cleanup
        return min(bounds.cleanup, max(bounds.reset, deadline + bounds.grace - self.settings.clock()))

    async def _handed_over(self, checkout: Checkout, deadline: float) -> bool:
        """Give the connection to the first in line; False where it has to go to the pool."""
        if (
            not self._hands_over
            or self._closed
            or self._taking
            or checkout.handed_over >= _HANDED_OVER_AT_MOST
        ):
            return False
        ended = self.settings.clock()
        try:
            with anyio.CancelScope(shield=True):
                conn = await hand_over(checkout.conn, self._seconds(deadline))
        except Exception as exc:  # noqa: BLE001 - the pool learns of it, and opens another one
            self._could_not_reset(checkout, exc)
            self._let_go(checkout, ended)
            self._ask_the_pool()
            return True
        except BaseException:
            # By task.cancel(), from which nothing shields, and half reset. The pool does it once more, in a
            # task that nobody cancels.
            await self._to_pool(checkout, self._seconds(deadline))
            raise
        if conn is None:
            return False
        # Who has come meanwhile may stand in the pool's line, and be before all in ours.
        waiter = None if self._taking else self._next_in_line()
        self._let_go(checkout, ended)
        following = self._checkout(conn, checkout.handed_over + 1)
        if waiter is None:
            await self._to_pool(following, self._seconds(deadline))
        else:
            waiter.set_result(following)
        return True

    def _could_not_reset(self, checkout: Checkout, exc: Exception) -> None:
        """A session that can't be reset is thrown away."""
        self.counters.evicted += 1
        discard(checkout.conn)
        if self.settings.observer is not None:
            sqlstate = getattr(exc, "sqlstate", None)
            self.settings.emit(events.Evicted(sqlstate=sqlstate, condition=type(exc).__name__))
        self._tell_reset_failed(exc)

    def _tell_reset_failed(self, exc: Exception) -> None:
        """Let the user hear of what a `reset=` of his own raised; that a line is lost is no news."""
        if not self._hands_over and not isinstance(exc, (OSError, *_OF_THE_DRIVER)):
            asyncio.get_running_loop().call_exception_handler(
                {
                    "message": "dbop_raw: the pool could not reset a connection, which was thrown away",
                    "exception": exc,
                }
            )

    async def _to_pool(self, checkout: Checkout, seconds: float) -> None:
        ended = self.settings.clock()
        alive = not is_gone(checkout.conn)
        try:
            with anyio.CancelScope(shield=True):
                await self._pool.release(checkout.conn, timeout=seconds)
            self._free += alive
        except Exception as exc:  # noqa: BLE001 - asyncpg has terminated the connection
            self._could_not_reset(checkout, exc)
        finally:
            self._let_go(checkout, ended)
            if self._line:
                self._ask_the_pool()

    def _let_go(self, checkout: Checkout, ended: float) -> None:
        self.counters.held_seconds += ended - checkout.since
        self._held.discard(checkout)
        if self._ended is not None:
            self._ended.set()

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

    # --- calls, and the end

    def began(self) -> None:
        """A call has begun: the engine is not drained before it has ended."""
        self._calls += 1

    def ended(self) -> None:
        """A call has ended."""
        self._calls -= 1
        self._tell_drain()

    async def pause(self, seconds: float) -> None:
        """Wait before another attempt, with nothing held; at most until the engine is closed."""
        if self._closing is None:
            self._closing = asyncio.Event()
        if not self._closed:
            with anyio.move_on_after(seconds):
                await self._closing.wait()

    def _tell_drain(self) -> None:
        if self._ended is not None:
            self._ended.set()

    async def drain(self, seconds: float) -> bool:
        """Refuse new calls, wait for those that run or wait, then throw away the connections still held.

        True when there were none.
        """
        self._closed = True
        if self._closing is not None:
            self._closing.set()
        if self._ended is None:
            self._ended = asyncio.Event()
        with anyio.move_on_after(seconds):
            while self._held or self._calls or self.counters.waiting:
                self._ended.clear()
                await self._ended.wait()
        clean = not (self._held or self._calls or self.counters.waiting)
        self._cut = True
        while (waiter := self._next_in_line()) is not None:
            waiter.set_exception(EngineClosed())
        for task in self._asking:
            task.cancel()
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
