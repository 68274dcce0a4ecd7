"""Connecting that takes longer than its caller waits: what is under way is not thrown away with him."""

# ruff: noqa: ASYNC110 - what the server or the pool has done, only asking again can tell

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import AcquireTimeout, Engine, OperationTimeout
from tests.support.bodies import insert, rows
from tests.support.sessions import backend
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


class Gate:
    """A `connect=` for a pool that goes on when it is opened, and remembers what became of each."""

    def __init__(self) -> None:
        self.is_open = asyncio.Event()
        self.begun = self.cancelled = 0

    async def __call__(self, *args: Any, **kwargs: Any) -> asyncpg.Connection:
        self.begun += 1
        try:
            await self.is_open.wait()
            return await asyncpg.connect(*args, **kwargs)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


@contextlib.asynccontextmanager
async def slow_pool(dsn: str, gate: Gate, **options: Any) -> AsyncIterator[asyncpg.Pool]:
    options = {"min_size": 0, "max_size": 1} | options
    pool = await asyncpg.create_pool(dsn, connect=gate, **options)
    try:
        yield pool
        with anyio.fail_after(5):
            await pool.close()
    finally:
        pool.terminate()


async def by_acquire_timeout(engine: Engine) -> None:
    with pytest.raises(AcquireTimeout):
        await engine.run(backend)


async def by_deadline(engine: Engine) -> None:
    with pytest.raises(OperationTimeout):
        await engine.run(backend, deadline=0.05)


async def by_cancellation(engine: Engine) -> None:
    task = asyncio.create_task(engine.run(backend))
    await until(lambda: engine.stats().waiting == 1)
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_a_scope(engine: Engine) -> None:
    with anyio.move_on_after(0.05) as scope:
        await engine.run(backend)
    assert scope.cancelled_caught


async def by_a_direct_call(engine: Engine) -> None:
    with pytest.raises(AcquireTimeout):
        await engine.fetchval("SELECT 1")


async def by_a_transaction(engine: Engine) -> None:
    with pytest.raises(AcquireTimeout):
        async with engine.transaction():
            pass


WAYS_TO_GIVE_UP = [
    by_acquire_timeout,
    by_deadline,
    by_cancellation,
    by_a_scope,
    by_a_direct_call,
    by_a_transaction,
]


def engine_for(give_up: Callable[[Engine], Awaitable[None]], pool: asyncpg.Pool) -> Engine:
    patient = give_up in {by_deadline, by_cancellation, by_a_scope}
    return Engine(pool, acquire_timeout=30 if patient else 0.05)


@pytest.mark.parametrize("give_up", WAYS_TO_GIVE_UP, ids=lambda give_up: give_up.__name__)
async def test_a_connect_under_way_outlives_the_caller_who_gave_up_on_it(
    give_up: Callable[[Engine], Awaitable[None]], dsn: str
) -> None:
    gate = Gate()
    async with slow_pool(dsn, gate) as pool:
        engine = engine_for(give_up, pool)
        with anyio.fail_after(10):
            await give_up(engine)
            assert (gate.begun, gate.cancelled) == (1, 0)
            assert (engine.stats().waiting, engine.stats().in_use) == (0, 0)
            gate.is_open.set()
            await until(lambda: pool.get_idle_size() == 1)
            assert await engine.run(insert) == 1
        assert gate.begun == 1
        assert await rows(pool) == [1]


async def test_a_pool_that_opens_more_slowly_than_acquire_timeout_still_opens(dsn: str) -> None:
    """As it was met: each caller is given less time than one connect takes."""

    async def connect(*args: Any, **kwargs: Any) -> asyncpg.Connection:
        await asyncio.sleep(0.4)
        return await asyncpg.connect(*args, **kwargs)

    async with asyncpg.create_pool(dsn, min_size=0, max_size=2, connect=connect) as pool:
        engine = Engine(pool, acquire_timeout=0.1)
        with anyio.fail_after(10):
            for _ in range(20):
                try:
                    assert await engine.run(insert) == 1
                except AcquireTimeout:
                    continue
                break
        assert await rows(pool) == [1]


async def test_a_connection_that_came_too_late_goes_to_who_waits_now(dsn: str) -> None:
    gate = Gate()
    async with slow_pool(dsn, gate) as pool:
        with anyio.fail_after(10):
            engine = Engine(pool, acquire_timeout=30)
            await by_deadline(engine)
            task = asyncio.create_task(engine.run(insert))
            await asyncio.sleep(0.02)
            gate.is_open.set()
            assert await task == 1
        assert (gate.begun, gate.cancelled) == (1, 0)


CONNECTING_IS_SLOW = re.compile(r"\bconnecting\b|\bto connect\b|\bopen(ing|ed)\b", re.IGNORECASE)


async def test_the_message_says_that_connecting_is_what_is_slow(dsn: str, single: asyncpg.Pool) -> None:
    """Of a pool whose connections are in use it says something else."""
    gate = Gate()
    async with slow_pool(dsn, gate) as pool:
        with pytest.raises(AcquireTimeout) as connecting:
            await Engine(pool, acquire_timeout=0.05).run(backend)
        gate.is_open.set()
        await until(lambda: pool.get_size() == pool.get_idle_size())
    async with single.acquire():
        with pytest.raises(AcquireTimeout) as in_use:
            await Engine(single, acquire_timeout=0.05).run(backend)
    assert CONNECTING_IS_SLOW.search(str(connecting.value))
    assert not CONNECTING_IS_SLOW.search(str(in_use.value))


async def test_a_connect_that_fails_after_its_caller_left_bothers_nobody_and_is_tried_again(dsn: str) -> None:
    told: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: told.append(context))
    refuse = asyncio.Event()
    calls: list[int] = []

    async def connect(*args: Any, **kwargs: Any) -> asyncpg.Connection:
        calls.append(1)
        if len(calls) == 1:
            await refuse.wait()
            raise ConnectionRefusedError("of the test")
        return await asyncpg.connect(*args, **kwargs)

    try:
        async with asyncpg.create_pool(dsn, min_size=0, max_size=1, connect=connect) as pool:
            engine = Engine(pool)
            with pytest.raises(OperationTimeout):
                await engine.run(insert, deadline=0.05)
            refuse.set()
            with anyio.fail_after(10):
                while len(calls) < 2:
                    with contextlib.suppress(ConnectionRefusedError):
                        assert await engine.run(insert) == 1
    finally:
        loop.set_exception_handler(before)
    assert told == []
    assert len(calls) == 2


async def test_an_engine_that_closes_while_a_connect_is_left_behind_leaves_no_task(dsn: str) -> None:
    tasks = asyncio.all_tasks()

    async def connect(*args: Any, **kwargs: Any) -> asyncpg.Connection:
        await asyncio.sleep(0.3)
        return await asyncpg.connect(*args, **kwargs)

    with anyio.fail_after(10):
        async with Engine.open(dsn, min_size=0, max_size=1, connect=connect, acquire_timeout=0.05) as engine:
            with pytest.raises(AcquireTimeout):
                await engine.run(insert)
        while asyncio.all_tasks() - tasks:
            await asyncio.sleep(0.005)


async def test_a_connect_under_way_outlives_its_caller_also_after_many_calls(dsn: str) -> None:
    """As many as were ever given back are not free: the engine knows that the pool has to connect."""
    gate = Gate()
    gate.is_open.set()
    async with slow_pool(dsn, gate, max_size=2) as pool:
        engine = Engine(pool, acquire_timeout=30)
        for _ in range(3):
            await engine.run(backend)
        gate.is_open.clear()
        async with engine.transaction():
            await by_cancellation(engine)
            gate.is_open.set()
            await until(lambda: pool.get_size() == 2)
        assert (gate.begun, gate.cancelled) == (2, 0)
