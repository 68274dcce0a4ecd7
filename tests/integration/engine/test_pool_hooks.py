"""A pool's own hooks may use anyio: a cancel scope of theirs opens and closes within any command of ours."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import Engine, events, operation, pipe, retry, savepoint, timeout
from dbop_raw.testing import Fault, Server
from tests.support.bodies import insert, rows
from tests.support.observing import Seen
from tests.support.policies import QUICK
from tests.support.pools import behind
from tests.support.protocol import answer_to_commit

pytestmark = pytest.mark.anyio

Hook = Callable[[Any], Awaitable[None]]

add = operation(insert)


async def with_a_deadline(conn: Any) -> None:
    with anyio.fail_after(5):
        await conn.execute("SELECT 1")


async def with_a_task_group(conn: Any) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(conn.execute, "SELECT 1")


async def with_a_shield(conn: Any) -> None:
    with anyio.CancelScope(shield=True):
        await conn.execute("SELECT 1")


HOOKS = [with_a_deadline, with_a_task_group, with_a_shield]


@contextlib.asynccontextmanager
async def pool_with(dsn: str, **options: Any) -> AsyncIterator[asyncpg.Pool]:
    pool = await asyncpg.create_pool(dsn, min_size=0, max_size=1, **options)
    try:
        yield pool
        with anyio.fail_after(5):
            await pool.close()
    finally:
        pool.terminate()


async def use(engine: Engine) -> None:
    """Every kind of call; what comes after the first finds a connection that is free."""
    for n in range(3):
        await engine.run(add(10 + n))
    await engine.run(pipe(savepoint(add(20)), timeout(5), retry(QUICK)), deadline=5)
    async with engine.transaction() as conn:
        await insert(conn, 30)
    await engine.execute("INSERT INTO t VALUES (40)")
    with pytest.raises(asyncpg.UniqueViolationError):
        await engine.run(add(40))
    await engine.run(add(50), deadline=5)


ALL = [10, 11, 12, 20, 30, 40, 50]


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
@pytest.mark.parametrize("option", ["setup", "init", "reset"])
async def test_a_hook_of_the_pool_may_use_anyio(option: str, hook: Hook, dsn: str) -> None:
    async with pool_with(dsn, **{option: hook}) as pool:
        engine = Engine(pool)
        await use(engine)
        assert await rows(pool) == ALL
        assert (engine.stats().evicted, engine.stats().in_use) == (0, 0)


async def test_a_connect_hook_of_the_pool_may_use_anyio(dsn: str) -> None:
    async def connect(*args: Any, **kwargs: Any) -> asyncpg.Connection:
        with anyio.fail_after(5):
            return await asyncpg.connect(*args, **kwargs)

    async with pool_with(dsn, connect=connect) as pool:
        await use(Engine(pool))
        assert await rows(pool) == ALL


class Bounded(asyncpg.Connection):
    """A connection class of the user's own, with a bound for each command."""

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:  # noqa: ASYNC109
        with anyio.fail_after(10):
            return await super().execute(query, *args, timeout=timeout)


async def test_a_connection_class_of_the_users_own_may_use_anyio(dsn: str) -> None:
    async with pool_with(dsn, connection_class=Bounded) as pool:
        await use(Engine(pool))
        assert await rows(pool) == ALL


@pytest.mark.parametrize("by", ["task", "scope"])
async def test_a_commit_of_such_a_class_is_waited_for_when_its_caller_is_cancelled(
    by: str, dsn: str, postgres_server: Server
) -> None:
    async with behind(postgres_server, dsn, connection_class=Bounded, max_size=1) as (proxy, pool):
        seen = Seen()
        engine = Engine(pool, observer=seen)
        late = proxy.inject(Fault("delay", when=answer_to_commit, seconds=0.2))
        with anyio.fail_after(5):
            if by == "task":
                task = asyncio.ensure_future(engine.run(add(1)))
                await late.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                async with anyio.create_task_group() as group:
                    group.start_soon(engine.run, add(1))
                    await late.wait()
                    group.cancel_scope.cancel()
        stats = engine.stats()
        assert (stats.evicted, stats.commits_in_doubt, stats.in_use) == (0, 0, 0)
        assert len(seen.of(events.Committed)) == 1
        assert await rows(pool) == [1]
