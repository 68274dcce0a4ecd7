"""A timeout that a body keeps itself, by the driver's `timeout=` or its own, costs no connection."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from dbop_raw import CommitUnknown, Engine, batch, each, events, operation, pipe, retry
from tests.support.bodies import insert, rows
from tests.support.observing import Seen
from tests.support.policies import QUICK
from tests.support.sessions import backend

pytestmark = pytest.mark.anyio


async def runs_out(conn: Any) -> None:
    """The driver's own timeout: it raises at once, and cancels the statement in the background."""
    await conn.fetchval("SELECT pg_sleep(30)", timeout=0.05)


async def is_left(conn: Any) -> None:
    """A timeout of the body's own around a statement: the driver cancels the statement."""
    async with asyncio.timeout(0.05):
        await conn.fetchval("SELECT pg_sleep(30)")


class Once:
    """Insert a row; at the first start, then run into a timeout."""

    def __init__(self, late: Any) -> None:
        self.late = late
        self.starts = 0

    async def __call__(self, conn: Any) -> int:
        self.starts += 1
        await insert(conn)
        if self.starts == 1:
            await self.late(conn)
        return await backend(conn)


async def test_the_drivers_timeout_is_tried_again_from_the_savepoint(single: asyncpg.Pool) -> None:
    seen = Seen()
    engine = Engine(single, observer=seen)
    body = Once(runs_out)
    pid = await engine.run(pipe(body, retry(QUICK)))
    assert [event.level for event in seen.of(events.Retried)] == ["savepoint"]
    assert (body.starts, engine.stats().evicted) == (2, 0)
    assert await engine.run(backend) == pid
    assert await rows(single) == [1]


async def test_the_drivers_timeout_without_a_retry_is_raised_as_it_is(single: asyncpg.Pool) -> None:
    engine = Engine(single)
    pid = await engine.run(backend)
    with pytest.raises(TimeoutError) as caught:
        await engine.run(Once(runs_out))
    assert type(caught.value) is TimeoutError
    assert engine.stats().evicted == 0
    assert await engine.run(backend) == pid
    assert await rows(single) == []


async def test_the_drivers_timeout_under_autocommit_leaves_open_whether_the_statement_was_done(
    single: asyncpg.Pool,
) -> None:
    async def slow(conn: Any) -> None:
        starts.append(1)
        await conn.execute("INSERT INTO t SELECT 1 FROM pg_sleep(30)", timeout=0.05)

    starts: list[int] = []
    engine = Engine(single)
    with pytest.raises(CommitUnknown) as caught:
        await engine.run(pipe(slow, retry(QUICK)), retry=QUICK, autocommit=True)
    assert type(caught.value.__cause__) is TimeoutError
    assert len(starts) == 1


async def test_the_drivers_timeout_of_an_item_costs_that_item_alone(single: asyncpg.Pool) -> None:
    @operation
    async def write(conn: Any, n: int) -> None:
        await insert(conn, n)
        if n == 3:
            await runs_out(conn)

    engine = Engine(single)
    pid = await engine.run(backend)
    result = await engine.run(batch(each(write), retry=QUICK)([1, 2, 3, 4]))
    assert [(failed.item, failed.verdict.blame) for failed in result.failed] == [(3, "load")]
    assert await rows(single) == [1, 2, 4]
    assert engine.stats().evicted == 0
    assert await engine.run(backend) == pid


async def test_a_timeout_of_the_bodys_own_around_a_statement_is_permanent(single: asyncpg.Pool) -> None:
    engine = Engine(single)
    pid = await engine.run(backend)
    body = Once(is_left)
    with pytest.raises(TimeoutError):
        await engine.run(pipe(body, retry(QUICK)), retry=QUICK)
    assert (body.starts, engine.stats().evicted) == (1, 0)
    assert await engine.run(backend) == pid
    assert await rows(single) == []


async def test_a_file_that_the_driver_was_to_copy_is_the_bodys_own(
    single: asyncpg.Pool, tmp_path: Path
) -> None:
    async def copies(conn: Any) -> None:
        starts.append(1)
        await conn.copy_to_table("t", source=tmp_path / "missing")

    starts: list[int] = []
    engine = Engine(single)
    pid = await engine.run(backend)
    with pytest.raises(FileNotFoundError):
        await engine.run(pipe(copies, retry(QUICK)), retry=QUICK)
    assert (len(starts), engine.stats().evicted) == (1, 0)
    assert await engine.run(backend) == pid
