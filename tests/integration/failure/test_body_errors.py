"""An error of the body's own input or output is not the database's: permanent, and nothing is thrown away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from dbop_raw import (
    CommitUnknown,
    Engine,
    RetriesExhausted,
    RetryPolicy,
    batch,
    each,
    operation,
    pipe,
    retry,
)
from dbop_raw.testing import Server
from dbop_raw.testing.server import run_sql

pytestmark = pytest.mark.anyio

P = RetryPolicy(attempts=4, first_delay=0.001, max_delay=0.01)


@pytest.fixture(scope="module")
def database(postgres_server: Server) -> Iterator[str]:
    dsn = postgres_server.create_database()
    run_sql(dsn, "CREATE TABLE t (n integer)")
    yield dsn
    postgres_server.drop_database(dsn)


@pytest.fixture
async def pool(database: str) -> AsyncIterator[asyncpg.Pool]:
    run_sql(database, "TRUNCATE t")
    pool = await asyncpg.create_pool(database, min_size=1, max_size=1)
    yield pool
    await pool.close()


async def pid_of(engine: Engine) -> int:
    pid: int = await engine.fetchval("SELECT pg_backend_pid()")
    return pid


async def count(engine: Engine) -> int:
    found: int = await engine.fetchval("SELECT count(*) FROM t")
    return found


# --- what a body does beside the database, and fails at

MISSING = Path("/nonexistent/file")


async def reads_a_file(_: Any) -> None:
    MISSING.read_text(encoding="utf-8")  # noqa: ASYNC240 - it is not there


async def calls_a_service(_: Any) -> None:
    await asyncio.open_connection("127.0.0.1", 1)


async def meets_the_end_of_a_stream(_: Any) -> None:
    reader = asyncio.StreamReader()
    reader.feed_eof()
    await reader.readexactly(1)


async def waits_for_a_service(_: Any) -> None:
    async with asyncio.timeout(0.01):
        await asyncio.sleep(10)


async def limits_a_statement_itself(conn: Any) -> None:
    async with asyncio.timeout(0.05):
        await conn.execute("SELECT pg_sleep(10)")


async def copies_from_a_file_that_is_missing(conn: Any) -> None:
    await conn.copy_to_table("t", source=MISSING)


OWN = [
    (reads_a_file, FileNotFoundError),
    (calls_a_service, ConnectionRefusedError),
    (meets_the_end_of_a_stream, EOFError),
    (waits_for_a_service, TimeoutError),
    (limits_a_statement_itself, TimeoutError),
    (copies_from_a_file_that_is_missing, FileNotFoundError),
]


@pytest.mark.parametrize(
    ("fails", "error", "options"),
    [(*case, options) for case in OWN for options in ({}, {"autocommit": True})]
    # COPY into a table is refused before its file is opened.
    + [(*case, {"readonly": True}) for case in OWN if case[0] is not copies_from_a_file_that_is_missing],
)
async def test_an_error_of_the_bodys_own_is_raised_unchanged_after_one_start(
    fails: Callable[[Any], Awaitable[None]],
    error: type[Exception],
    options: dict[str, Any],
    pool: asyncpg.Pool,
) -> None:
    engine = Engine(pool)
    pid = await pid_of(engine)
    starts: list[int] = []

    async def body(conn: Any) -> None:
        starts.append(1)
        await fails(conn)

    with pytest.raises(error) as caught:
        await engine.run(pipe(body, retry(P)), retry=P, **options)
    assert not isinstance(caught.value, (CommitUnknown, RetriesExhausted))
    stats = engine.stats()
    assert (len(starts), stats.retries, stats.evicted, stats.commits_in_doubt) == (1, 0, 0, 0)
    assert await pid_of(engine) == pid


@pytest.mark.parametrize(("fails", "error"), OWN)
async def test_an_error_of_the_bodys_own_leaves_the_connection_of_a_transaction_usable(
    fails: Callable[[Any], Awaitable[None]], error: type[Exception], pool: asyncpg.Pool
) -> None:
    engine = Engine(pool)
    pid = await pid_of(engine)

    async def block() -> None:
        async with engine.transaction() as conn:
            await conn.execute("INSERT INTO t VALUES (1)")
            await fails(conn)

    with pytest.raises(error):
        await block()
    assert (await pid_of(engine), await count(engine), engine.stats().evicted) == (pid, 0, 0)


@pytest.mark.parametrize(("fails", "error"), OWN)
async def test_an_error_of_the_bodys_own_costs_its_item_of_each_and_no_other(
    fails: Callable[[Any], Awaitable[None]], error: type[Exception], pool: asyncpg.Pool
) -> None:
    engine = Engine(pool)
    pid = await pid_of(engine)

    @operation
    async def write(conn: Any, n: int) -> None:
        await conn.execute("INSERT INTO t VALUES ($1)", n)
        if n == 7:
            await fails(conn)

    result = await engine.run(batch(each(write), retry=P)(range(20)), retry=P)
    assert [one.index for one in result.failed] == [7]
    assert isinstance(result.failed[0].error, error)
    assert (result.failed[0].verdict.blame, result.failed[0].verdict.transient) == ("caller", False)
    assert (result.written, await count(engine), engine.stats().evicted) == (19, 19, 0)
    assert await pid_of(engine) == pid


# --- the driver's own timeout


async def test_the_drivers_timeout_of_a_direct_call_does_not_cost_its_connection(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    pid = await pid_of(engine)
    with pytest.raises(TimeoutError):
        await engine.fetchval("SELECT pg_sleep(10)", timeout=0.05)
    assert (await pid_of(engine), engine.stats().evicted) == (pid, 0)


async def test_the_drivers_timeout_in_a_transaction_is_tried_again_on_the_same_connection(
    pool: asyncpg.Pool,
) -> None:
    engine = Engine(pool)
    pid = await pid_of(engine)
    starts: list[int] = []

    async def slow_at_first(conn: Any) -> int:
        starts.append(1)
        await conn.execute("INSERT INTO t VALUES (1)")
        if len(starts) == 1:
            await conn.fetchval("SELECT pg_sleep(10)", timeout=0.05)
        found: int = await conn.fetchval("SELECT pg_backend_pid()")
        return found

    assert await engine.run(pipe(slow_at_first, retry(P))) == pid
    assert (len(starts), await count(engine), engine.stats().evicted) == (2, 1, 0)


async def test_the_drivers_timeout_under_autocommit_leaves_open_whether_the_statement_was_done(
    pool: asyncpg.Pool,
) -> None:
    engine = Engine(pool)
    starts: list[int] = []

    async def slow(conn: Any) -> None:
        starts.append(1)
        await conn.execute("INSERT INTO t SELECT 1 FROM pg_sleep(10)", timeout=0.05)

    with pytest.raises(CommitUnknown) as caught:
        await engine.run(slow, retry=P, autocommit=True)
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert len(starts) == 1


async def test_the_drivers_timeout_of_an_item_costs_that_item(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)

    @operation
    async def write(conn: Any, n: int) -> None:
        await conn.execute("INSERT INTO t VALUES ($1)", n)
        if n == 7:
            await conn.fetchval("SELECT pg_sleep(10)", timeout=0.02)

    result = await engine.run(batch(each(write), retry=P)(range(20)))
    assert [(one.index, one.verdict.blame) for one in result.failed] == [(7, "load")]
    assert (await count(engine), engine.stats().evicted) == (19, 0)


# --- groups


async def test_a_serialization_failure_in_a_task_group_is_tried_again(
    pool: asyncpg.Pool, database: str
) -> None:
    engine = Engine(pool)
    run_sql(database, "INSERT INTO t VALUES (0)")
    starts: list[int] = []

    async def body(conn: Any) -> None:
        starts.append(1)
        await conn.fetchval("SELECT sum(n) FROM t")
        if len(starts) == 1:
            run_sql(database, "UPDATE t SET n = n + 1")

        async with asyncio.TaskGroup() as group:
            group.create_task(conn.execute("UPDATE t SET n = n + 10"))

    await engine.run(body, retry=P, isolation="repeatable read")
    assert (len(starts), await engine.fetchval("SELECT n FROM t")) == (2, 11)
    assert engine.stats().evicted == 0


async def test_a_permanent_error_beside_a_transient_one_in_a_group_is_not_tried_again(
    pool: asyncpg.Pool, database: str
) -> None:
    engine = Engine(pool)
    run_sql(database, "INSERT INTO t VALUES (0)")
    starts: list[int] = []

    async def body(conn: Any) -> None:
        starts.append(1)
        await conn.fetchval("SELECT sum(n) FROM t")
        run_sql(database, "UPDATE t SET n = n + 1")
        try:
            await conn.execute("UPDATE t SET n = n + 10")
        except asyncpg.SerializationError as exc:
            raise ExceptionGroup("both", [exc, ValueError("mine")]) from None

    with pytest.raises(ExceptionGroup, match="both"):
        await engine.run(body, retry=P, isolation="repeatable read")
    assert (len(starts), engine.stats().evicted) == (1, 0)
