"""An engine: what it is made of, how it opens and closes, and the pool's own calls on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import (
    AcquireTimeout,
    DbopError,
    Engine,
    EngineClosed,
    EngineOverloaded,
    PolicyError,
    Repair,
)
from tests.support.bodies import add, insert, rows, sleep, then
from tests.support.pools import Holding
from tests.support.sessions import backend
from tests.support.waiting import until, until_gone

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    "options",
    [
        {"acquire_timeout": 0},
        {"acquire_timeout": float("inf")},
        {"max_waiting": -1},
        {"max_waiting": True},
        {"max_waiting": 1.5},
        {"observer": "log"},
        {"leak_after": 0},
        {"verdicts": {"4000": Repair.NEVER}},
    ],
    ids=repr,
)
async def test_an_engine_of_options_that_are_not_allowed_is_not_made(
    options: dict[str, Any], pool: asyncpg.Pool
) -> None:
    with pytest.raises(PolicyError):
        Engine(pool, **options)


@pytest.mark.parametrize("wrong", [None, "postgresql://localhost/x", object()])
def test_an_object_that_is_no_pool_is_refused(wrong: Any) -> None:
    with pytest.raises(PolicyError, match="not an asyncpg pool"):
        Engine(wrong)


async def test_close_waits_for_what_runs(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    async with anyio.create_task_group() as group:
        group.start_soon(engine.run, then(lambda conn: sleep(conn, 0.1), insert))
        await until(lambda: engine.stats().in_use == 1)
        assert await engine.close()
    assert await rows(pool) == [1]


async def _a_transaction(engine: Engine) -> None:
    async with engine.transaction():
        pass


@pytest.mark.parametrize(
    "call",
    [lambda engine: engine.run(insert), lambda engine: engine.execute("SELECT 1"), _a_transaction],
    ids=["run", "execute", "transaction"],
)
async def test_a_closed_engine_refuses_a_call(
    call: Callable[[Engine], Awaitable[Any]], pool: asyncpg.Pool
) -> None:
    engine = Engine(pool)
    await engine.close()
    with pytest.raises(EngineClosed):
        await call(engine)


async def test_close_leaves_a_pool_of_the_users_own_open(pool: asyncpg.Pool) -> None:
    await Engine(pool).close()
    assert await pool.fetchval("SELECT 7") == 7


async def test_close_also_waits_for_callers_that_were_let_in_and_wait_themselves(
    single: asyncpg.Pool,
) -> None:
    engine = Engine(single)
    async with anyio.create_task_group() as group:
        for n in range(3):
            group.start_soon(engine.run, then(lambda conn: sleep(conn, 0.05), add(n)))
        await until(lambda: (engine.stats().in_use, engine.stats().waiting) == (1, 2))
        assert await engine.close()
        assert (engine.stats().in_use, engine.stats().waiting) == (0, 0)
    assert await rows(single) == [0, 1, 2]


async def test_close_is_bounded_and_cuts_off_what_does_not_end(single: asyncpg.Pool) -> None:
    engine = Engine(single)
    outcomes: list[BaseException] = []

    async def call(n: int) -> None:
        try:
            await engine.run(then(add(n), sleep))
        except (asyncpg.PostgresError, asyncpg.InterfaceError, DbopError) as exc:
            outcomes.append(exc)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(call, 1)
            group.start_soon(call, 2)
            await until(lambda: (engine.stats().in_use, engine.stats().waiting) == (1, 1))
            assert not await engine.close(timeout=0.05)
    assert [type(outcome) for outcome in outcomes].count(EngineClosed) == 1
    assert len(outcomes) == 2
    await until(lambda: engine.stats().in_use == 0)
    assert await rows(single) == []


async def test_open_makes_the_pool_with_its_options_and_closes_it(dsn: str) -> None:
    async with Engine.open(
        dsn, min_size=1, max_size=3, server_settings={"application_name": "opened"}, acquire_timeout=0.5
    ) as engine:
        assert await engine.fetchval("SHOW application_name") == "opened"
        assert (engine.stats().max_size, engine.stats().size) == (3, 1)
        pid = await engine.run(backend)
    with pytest.raises(EngineClosed):
        await engine.run(backend)
    await until_gone(dsn, pid)


async def test_open_cuts_off_what_a_failed_block_left(dsn: str) -> None:
    async with asyncio.timeout(5):
        left: asyncio.Task[Any] | None = None
        with pytest.raises(LookupError):  # noqa: PT012 - the block is what is tested
            async with Engine.open(dsn, min_size=1, max_size=1) as engine:
                left = asyncio.ensure_future(engine.run(sleep))
                await until(lambda: engine.stats().in_use == 1)
                raise LookupError
        assert left is not None
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, DbopError)):
            await left


# --- the pool's own calls


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
