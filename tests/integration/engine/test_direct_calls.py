"""The pool's own calls through an engine: what runs out of its time does not cost the connection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import AcquireTimeout, DbopError, Engine, EngineOverloaded, events
from dbop_raw.testing import Fault, Server, message
from tests.support.bodies import rows
from tests.support.observing import Seen
from tests.support.pools import Holding, behind
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


async def _fetch(engine: Engine, seconds: float) -> Any:
    return await engine.fetch("SELECT pg_sleep(30)", timeout=seconds)


async def _fetchrow(engine: Engine, seconds: float) -> Any:
    return await engine.fetchrow("SELECT pg_sleep(30)", timeout=seconds)


async def _fetchval(engine: Engine, seconds: float) -> Any:
    return await engine.fetchval("SELECT pg_sleep(30)", timeout=seconds)


async def _execute(engine: Engine, seconds: float) -> Any:
    return await engine.execute("SELECT pg_sleep($1)", 30.0, timeout=seconds)


async def _execute_simple(engine: Engine, seconds: float) -> Any:
    return await engine.execute("SELECT pg_sleep(30)", timeout=seconds)


async def _executemany(engine: Engine, seconds: float) -> Any:
    return await engine.executemany("SELECT pg_sleep($1)", [(30.0,)], timeout=seconds)


@pytest.mark.parametrize(
    "call",
    [_fetch, _fetchrow, _fetchval, _execute, _execute_simple, _executemany],
    ids=lambda call: call.__name__,
)
async def test_a_direct_call_that_times_out_keeps_the_connection(
    call: Callable[[Engine, float], Awaitable[Any]], single: asyncpg.Pool
) -> None:
    seen = Seen()
    engine = Engine(single, observer=seen)
    pid = await engine.fetchval("SELECT pg_backend_pid()")
    with pytest.raises(TimeoutError):
        await call(engine, 0.2)
    assert engine.stats().evicted == 0
    assert seen.of(events.Evicted) == []
    assert await engine.fetchval("SELECT pg_backend_pid()") == pid
    assert await engine.fetchval("SHOW statement_timeout") == "0"
    assert engine.stats().in_use == 0


async def test_a_direct_call_that_times_out_on_a_line_that_hangs_costs_the_connection(
    dsn: str, postgres_server: Server
) -> None:
    """The server does not end it, as far as anybody can see: and that does not take for ever."""
    async with behind(postgres_server, dsn, max_size=1) as (proxy, pool):
        engine = Engine(pool)
        assert await engine.fetchval("SELECT 1") == 1
        hung = proxy.inject(Fault("hang", when=message("client", "E")))
        with anyio.fail_after(10), pytest.raises(TimeoutError):
            await engine.fetchval("SELECT pg_sleep(30)", timeout=0.2)
        assert hung.fired == 1
        assert (engine.stats().evicted, engine.stats().in_use) == (1, 0)


async def test_a_cancelled_direct_call_gives_its_connection_back(single: asyncpg.Pool) -> None:
    engine = Engine(single)
    task = asyncio.create_task(engine.execute("SELECT pg_sleep(30)"))
    await until(lambda: engine.stats().in_use == 1)
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.stats().in_use == 0
    with anyio.fail_after(5):
        assert await engine.fetchval("SELECT 7") == 7


@pytest.mark.parametrize(
    ("call", "result"),
    [
        (lambda engine: engine.execute("INSERT INTO t VALUES (1), (2)"), "INSERT 0 2"),
        (lambda engine: engine.executemany("INSERT INTO t VALUES ($1)", [(1,), (2,)]), None),
        (lambda engine: engine.fetch("SELECT * FROM (VALUES (1), (2)) v WHERE column1 > $1", 1), [(2,)]),
        (lambda engine: engine.fetchrow("SELECT 1, 2"), (1, 2)),
        (lambda engine: engine.fetchval("SELECT 1, 2", column=1), 2),
    ],
    ids=["execute", "executemany", "fetch", "fetchrow", "fetchval"],
)
async def test_a_call_of_the_pools_gives_what_the_pools_does(
    call: Callable[[Engine | asyncpg.Pool], Awaitable[Any]], result: Any, pool: asyncpg.Pool
) -> None:
    assert await call(Engine(pool)) == result
    await pool.execute("TRUNCATE t")
    assert await call(pool) == result


async def test_executemany_is_all_or_nothing(single: asyncpg.Pool) -> None:
    with pytest.raises(asyncpg.UniqueViolationError):
        await Engine(single).executemany("INSERT INTO t VALUES ($1)", [(1,), (1,)])
    assert await rows(single) == []


async def test_a_direct_call_has_a_timeout_of_its_own(single: asyncpg.Pool) -> None:
    engine = Engine(single)
    with pytest.raises(TimeoutError):
        await engine.fetchval("SELECT pg_sleep(30)", timeout=0.05)
    assert engine.stats().in_use == 0


@pytest.mark.parametrize(("max_waiting", "error"), [(0, EngineOverloaded), (None, AcquireTimeout)])
async def test_a_direct_call_is_under_the_engines_bounds(
    max_waiting: int | None, error: type[DbopError], single: asyncpg.Pool
) -> None:
    engine = Engine(single, acquire_timeout=0.05, max_waiting=max_waiting)
    async with Holding(single, 1):
        with pytest.raises(error):
            await engine.fetch("SELECT 1")
    assert engine.stats().in_use == 0


async def test_a_direct_calls_error_whose_cause_is_an_option_of_the_pool_says_so(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    with pytest.raises(asyncpg.InvalidSQLStatementNameError) as caught:
        await engine.execute("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '26000'; END $$")
    (note,) = caught.value.__notes__
    assert "statement_cache_size" in note
