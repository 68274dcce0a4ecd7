"""Who gets a connection, who waits, who is refused, and the numbers of it."""

from __future__ import annotations

import anyio
import asyncpg
import pytest

from dbop_raw import (
    AcquireTimeout,
    Engine,
    EngineOverloaded,
)
from tests.support.bodies import add, insert, rows, sleep
from tests.support.pools import Holding
from tests.support.sessions import backend
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.every_loop]


async def test_an_acquire_timeout_tells_the_pools_numbers(pool: asyncpg.Pool) -> None:
    engine = Engine(pool, acquire_timeout=0.05)
    async with Holding(pool, 4):
        with pytest.raises(AcquireTimeout) as caught:
            await engine.run(insert)
    error = caught.value
    assert (error.seconds, error.size, error.max_size, error.idle, error.waiting) == (0.05, 4, 4, 0, 0)
    assert "acquire_timeout=0.05" in str(error)
    assert "4 of at most 4" in str(error)
    assert engine.stats().acquire_timeouts == 1
    assert engine.stats().waiting == 0


@pytest.mark.parametrize("max_waiting", [0, 1, 3])
async def test_one_caller_too_many_is_refused_at_once(max_waiting: int, single: asyncpg.Pool) -> None:
    engine = Engine(single, max_waiting=max_waiting)
    async with anyio.create_task_group() as group:
        held = await single.acquire()
        for n in range(max_waiting):
            group.start_soon(engine.run, add(n))
        await until(lambda: engine.stats().waiting == max_waiting)
        with pytest.raises(EngineOverloaded) as caught:
            await engine.run(add(99))
        assert (caught.value.waiting, caught.value.max_waiting, caught.value.max_size) == (
            max_waiting, max_waiting, 1,
        )  # fmt: skip
        await single.release(held)
    assert await rows(single) == list(range(max_waiting))
    assert engine.stats().shed == 1


@pytest.mark.parametrize("warm", [False, True])
async def test_nobody_is_refused_while_connections_are_free(warm: bool, pool: asyncpg.Pool) -> None:
    engine = Engine(pool, max_waiting=0)
    if warm:
        async with Holding(pool, 4):
            pass
    for _ in range(3):
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(engine.run, backend)
    assert engine.stats().shed == 0


async def test_of_many_callers_as_many_run_or_wait_as_there_is_room_for(pool: asyncpg.Pool) -> None:
    engine = Engine(pool, max_waiting=3)
    refused = 0

    async def call() -> None:
        nonlocal refused
        try:
            await engine.run(lambda conn: sleep(conn, 0.02))
        except EngineOverloaded:
            refused += 1

    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(call)
    stats = engine.stats()
    assert (refused, stats.shed, stats.acquires, stats.waiting, stats.in_use) == (13, 13, 7, 0, 0)


async def test_stats_are_numbers_of_what_happened(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    assert engine.stats().acquires == 0
    await engine.run(insert)
    async with Holding(pool, 2), anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(engine.run, lambda conn: sleep(conn, 0.06))
        await until(lambda: engine.stats().in_use == 2 and engine.stats().waiting == 1)
        now = engine.stats()
        assert (now.size, now.max_size, now.idle) == (4, 4, 0)
    stats = engine.stats()
    assert (stats.acquires, stats.in_use, stats.waiting, stats.idle, stats.size) == (4, 0, 0, 4, 4)
    counted = sum(count for _, count in stats.wait_histogram)
    assert counted == stats.acquires
    assert sum(count for end, count in stats.wait_histogram if end > 0.025) >= 1
    assert stats.wait_histogram[-1] == (float("inf"), 0)
    assert 0.02 < stats.wait_max <= stats.wait_seconds
    assert stats.held_seconds > 0.1
    assert (stats.retries, stats.evicted, stats.shed, stats.acquire_timeouts) == (0, 0, 0, 0)


async def test_the_user_may_use_the_pool_beside_the_engine(single: asyncpg.Pool) -> None:
    engine = Engine(single, acquire_timeout=5)
    async with anyio.create_task_group() as group:
        for n in range(10):
            group.start_soon(engine.run, add(n))
            group.start_soon(single.execute, "INSERT INTO t VALUES ($1)", 100 + n)
    assert len(await rows(single)) == 20
    async with single.acquire() as conn, conn.transaction():
        await conn.execute("INSERT INTO t VALUES (1000)")
        assert (engine.stats().in_use, engine.stats().idle) == (0, 0)
