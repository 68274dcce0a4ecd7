"""Many callers at random: cancelled, out of time, evicted, expired, beside others who use the same pool.

In calm weather (one engine, and nobody else uses its pool or loses a connection) those who did not give up
are served in the order of their coming; beside others the pool's own line, which has no order, counts too.
In any weather nobody waits for ever, no connection is with two at once, and at the end all numbers are 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import AcquireTimeout, DbopError, Engine, Event, OperationTimeout
from dbop_raw.events import Acquired
from tests.support.pools import pool_on
from tests.support.sessions import others
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.every_loop, pytest.mark.slow]

CALLERS = 250
ENGINES = 2
SEEDS = range(2)
HASTE = 0.01
"""Seconds that some wait for a connection."""
MOST = 3
"""Connections of the pool."""

_number: ContextVar[int] = ContextVar("number", default=0)


class Order:
    """An observer that sees to it that nobody who waits is overtaken."""

    def __init__(self) -> None:
        self.waiting: set[int] = set()
        # Others were served first, who had come later. He may have given up, and is giving back what he was
        # given at the same moment.
        self.passed: set[int] = set()
        self.overtaken: set[int] = set()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Acquired):
            number = _number.get()
            self.waiting.discard(number)
            self.overtaken |= {number} & self.passed
            before = {other for other in self.waiting if other < number}
            if before:
                # Whoever of them was given one, or gave up, a moment ago: his task will run before this.
                asyncio.get_running_loop().call_soon(self._note, before)

    def _note(self, before: set[int]) -> None:
        self.passed |= before & self.waiting


class Storm:
    """Callers of some engines on one pool, by a seed.

    Args:
        pool: The pool.
        chances: What is left to chance.
        calm: Is no connection lost?
    """

    def __init__(self, pool: asyncpg.Pool, chances: random.Random, *, calm: bool) -> None:
        self.pool, self.chances, self.calm = pool, chances, calm
        self.orders = [Order() for _ in range(1 if calm else ENGINES)]
        self.engines = [Engine(pool, acquire_timeout=60, observer=order) for order in self.orders]
        self.hasty = [] if calm else [Engine(pool, acquire_timeout=HASTE) for _ in range(ENGINES)]
        self.in_use: set[int] = set()
        self.calls = self.done = 0

    @property
    def all_engines(self) -> list[Engine]:
        return self.engines + self.hasty

    @contextlib.contextmanager
    def alone(self, conn: Any) -> Any:
        """Nobody else has the connection."""
        pid = conn.get_server_pid()
        assert pid not in self.in_use, "two have one connection"
        self.in_use.add(pid)
        assert len(self.in_use) <= MOST
        try:
            yield
        finally:
            self.in_use.discard(pid)

    async def work(self, conn: Any) -> None:
        with self.alone(conn):
            assert conn.is_in_transaction()
            await conn.execute("SELECT pg_sleep($1)", self.chances.choice([0, 0, 0.001, 0.003]))

    async def lose(self, conn: Any) -> None:
        with self.alone(conn):
            conn.terminate()
            await conn.execute("SELECT 1")

    # --- callers

    async def one_of_the_engines(self, deadline: float | None = None) -> None:
        which = self.chances.randrange(len(self.engines))
        self.calls += 1
        number = self.calls
        _number.set(number)
        self.orders[which].waiting.add(number)
        lost = not self.calm and self.chances.random() < 0.1
        try:
            await self.engines[which].run(self.lose if lost else self.work, deadline=deadline)
            self.done += 1
        finally:
            self.orders[which].waiting.discard(number)

    async def patient(self) -> None:
        await self.one_of_the_engines()

    async def cancelled_by_its_task(self) -> None:
        task = asyncio.create_task(self.one_of_the_engines())
        for _ in range(self.chances.choice([1, 1, 2, 3])):
            await asyncio.wait({task}, timeout=self.chances.uniform(0, 0.05))
            task.cancel()
        await task

    async def cancelled_by_a_scope(self) -> None:
        with anyio.move_on_after(self.chances.uniform(0, 0.05)):
            await self.one_of_the_engines()

    async def out_of_time(self) -> None:
        await self.one_of_the_engines(deadline=self.chances.uniform(0.001, 0.03))

    async def hasty_one(self) -> None:
        await self.chances.choice(self.hasty).run(self.work)

    async def direct(self) -> None:
        await self.chances.choice(self.hasty).execute("SELECT 1")

    async def plain(self) -> None:
        async with self.chances.choice(self.hasty).transaction() as conn:
            await self.work(conn)

    async def beside(self) -> None:
        async with self.pool.acquire() as conn:
            with self.alone(conn):
                await conn.execute("SELECT pg_sleep(0.001)")

    async def expires(self) -> None:
        await self.pool.expire_connections()
        await self.beside()

    async def call(self) -> None:
        kinds: list[Callable[[], Awaitable[None]]] = [
            self.patient,
            self.cancelled_by_its_task,
            self.cancelled_by_a_scope,
            self.out_of_time,
            self.hasty_one,
            self.direct,
            self.plain,
            self.beside,
        ]
        weights = [6, 3, 3, 2, *([0] * 5 if self.calm else [2, 1, 1, 2, 1])]
        kind = self.chances.choices([*kinds, self.expires], weights)[0]
        await asyncio.sleep(self.chances.uniform(0, 0.3))
        with contextlib.suppress(
            asyncio.CancelledError, AcquireTimeout, OperationTimeout, *([] if self.calm else LOST)
        ):
            await kind()


LOST = [asyncpg.PostgresConnectionError, asyncpg.InterfaceError, DbopError]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("calm", [True, False], ids=["calm", "rough"])
async def test_nobody_is_forgotten_or_overtaken_and_no_connection_is_with_two(
    calm: bool, dsn: str, seed: int
) -> None:
    tasks = asyncio.all_tasks()
    chances = random.Random(seed)
    options: dict[str, Any] = {} if calm else {"max_queries": 40, "max_inactive_connection_lifetime": 0.02}
    async with pool_on(dsn, max_size=MOST, **options) as pool:
        storm = Storm(pool, chances, calm=calm)
        with anyio.fail_after(30):
            await asyncio.gather(*[storm.call() for _ in range(CALLERS)])
        stats = [engine.stats() for engine in storm.all_engines]
        assert [(one.in_use, one.waiting) for one in stats] == [(0, 0)] * len(stats)
        await until(lambda: pool.get_idle_size() == pool.get_size())
        assert storm.in_use == set()
        assert storm.done > CALLERS / 10
        if calm:
            assert [order.overtaken for order in storm.orders] == [set()]
            assert sum(one.evicted for one in stats) <= sum(one.waits_abandoned for one in stats)
        # All of them still give connections, and as many as there are.
        for engine in storm.engines:
            async with contextlib.AsyncExitStack() as stack, asyncio.timeout(10):
                for _ in range(MOST):
                    await stack.enter_async_context(engine.transaction())
    await until(lambda: asyncio.all_tasks() <= tasks)
    await until(lambda: others(dsn) == 0)
