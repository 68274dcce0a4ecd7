"""What is noted of those who wait for a connection and hold it."""

from __future__ import annotations

import asyncio
from typing import cast

import asyncpg
import pytest

from dbop_raw.sizing.contenders import TimedPool
from dbop_raw.sizing.load import Window
from tests.support.virtual_time import run


class OnePlacePool:
    """What a `TimedPool` asks of an asyncpg pool, with one connection; giving it back takes 0.1 s."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    def get_max_size(self) -> int:
        return 1

    async def acquire(self) -> object:
        await self._lock.acquire()
        return object()

    async def release(self, conn: object, **options: object) -> None:
        _ = conn, options
        await asyncio.sleep(0.1)
        self._lock.release()


def test_waits_holds_and_the_mean_in_use_are_what_happened() -> None:
    async def measure() -> TimedPool:
        pool = TimedPool(cast("asyncpg.Pool", OnePlacePool()))
        pool.waits.window = Window(0.0, 10.0)

        async def caller() -> None:
            conn = await pool.acquire()
            await asyncio.sleep(0.9)
            await pool.release(conn)

        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(caller())
        return pool

    pool = run(measure())
    assert list(pool.waits.seconds) == pytest.approx([0.0, 1.0, 2.0])
    assert pool.waits.queued == 2
    assert (pool.in_use, pool.waiting, pool.given_back) == (0, 0, 3)
    # Whole seconds of one connection, and the two that waited: 1 s and 2 s.
    assert pool.held == pytest.approx(3.0)


def test_who_gives_up_waiting_is_counted() -> None:
    async def measure() -> TimedPool:
        pool = TimedPool(cast("asyncpg.Pool", OnePlacePool()))
        pool.waits.window = Window(0.0, 10.0)
        await pool.acquire()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.acquire(), 1.0)
        return pool

    pool = run(measure())
    assert (pool.waits.given_up, pool.waits.asked) == (1, 2)
    assert (pool.in_use, pool.waiting) == (1, 0)
