"""The pool's own calls through an engine: what runs out of its time does not cost the connection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import Engine, events
from dbop_raw.testing import Fault, Server, message
from tests.support.observing import Seen
from tests.support.pools import behind
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
