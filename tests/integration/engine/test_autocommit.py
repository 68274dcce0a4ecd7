"""`autocommit=True`: no transaction around it, so what was done stays done, and may not be done twice."""

# ruff: noqa: ASYNC110 - what the driver has noticed, only asking again can tell

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest

from dbop_raw import (
    Engine,
    RetriesExhausted,
    RetryPolicy,
    TransactionMisuse,
    events,
    operation,
    pipe,
    retry,
    savepoint,
    timeout,
)
from dbop_raw.testing import Fault, FaultProxy, Server, query
from tests.support.bodies import insert, rows
from tests.support.failures import raising, server_error
from tests.support.observing import Seen
from tests.support.policies import QUICK
from tests.support.pools import behind
from tests.support.sessions import backend

pytestmark = pytest.mark.anyio

Body = Callable[[Any], Awaitable[Any]]

add = operation(insert)


# --- with readonly=True. The contract lets it be refused or enforced. It is enforced: a caller who asks for a
# --- cheap read that can't write gets just that, and the server says so where it writes all the same.


async def by_insert(conn: Any) -> None:
    await conn.execute("INSERT INTO t VALUES (1)")


async def by_a_query(conn: Any) -> None:
    await conn.fetch("WITH written AS (INSERT INTO t VALUES (1) RETURNING n) SELECT n FROM written")


async def by_a_function(conn: Any) -> None:
    await conn.execute("DO $$ BEGIN INSERT INTO t VALUES (1); END $$")


async def by_copy(conn: Any) -> None:
    await conn.copy_records_to_table("t", records=[(1,)], columns=["n"])


async def by_executemany(conn: Any) -> None:
    await conn.executemany("INSERT INTO t VALUES ($1)", [(1,), (2,)])


async def in_its_second_statement(conn: Any) -> None:
    await conn.fetchval("SELECT 1")
    await insert(conn)


async def in_an_operation(conn: Any) -> None:
    await savepoint(add(1))(conn)


WRITES = [
    by_insert,
    by_a_query,
    by_a_function,
    by_copy,
    by_executemany,
    in_its_second_statement,
    in_an_operation,
]


@pytest.mark.parametrize("body", WRITES, ids=lambda body: body.__name__)
async def test_an_autocommitted_write_under_readonly_is_refused_by_the_server(
    body: Body, single: asyncpg.Pool
) -> None:
    seen = Seen()
    engine = Engine(single, observer=seen)
    pid = await engine.run(backend)
    with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
        await engine.run(pipe(body, retry(QUICK)), autocommit=True, readonly=True, retry=QUICK)
    assert await rows(single) == []
    # It is the caller's mistake, not a primary that was lost.
    assert seen.of(events.PoolExpired) == seen.of(events.Evicted) == seen.of(events.Retried) == []
    assert await engine.run(backend) == pid


async def test_a_transaction_of_the_users_own_does_not_write_under_autocommit_and_readonly_either(
    single: asyncpg.Pool,
) -> None:
    async def begins_one(conn: Any) -> None:
        async with conn.transaction():
            await insert(conn)

    engine = Engine(single)
    with pytest.raises((asyncpg.ReadOnlySQLTransactionError, TransactionMisuse)):
        await engine.run(begins_one, autocommit=True, readonly=True)
    assert await rows(single) == []
    assert await engine.run(insert) == 1


async def test_a_retry_under_autocommit_and_readonly_has_nothing_to_double(single: asyncpg.Pool) -> None:
    async def writes_then_fails(conn: Any) -> None:
        await insert(conn, len(await rows_on(conn)) + 1)
        await raising("40001")(conn)

    with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
        await Engine(single).run(writes_then_fails, autocommit=True, readonly=True, retry=QUICK)
    assert await rows(single) == []


async def rows_on(conn: Any) -> list[int]:
    return [row["n"] for row in await conn.fetch("SELECT n FROM t")]


async def fails(conn: Any) -> None:
    await conn.fetchval("SELECT 1")
    raise LookupError


@pytest.mark.parametrize("ends", ["well", "with the server's error", "with its own error", "cancelled"])
async def test_readonly_under_autocommit_ends_with_its_run(ends: str, single: asyncpg.Pool) -> None:
    """The next user of the connection writes as always."""
    engine = Engine(single)
    pid = await engine.run(backend)
    options: dict[str, Any] = {"autocommit": True, "readonly": True}
    if ends == "well":
        assert await engine.run(lambda conn: conn.fetchval("SELECT 7"), **options) == 7
    elif ends == "with the server's error":
        with pytest.raises(asyncpg.DivisionByZeroError):
            await engine.run(lambda conn: conn.fetchval("SELECT 1 / 0"), **options)
    elif ends == "with its own error":
        with pytest.raises(LookupError):
            await engine.run(fails, **options)
    else:
        is_there = asyncio.Event()

        async def waits(conn: Any) -> None:
            await conn.fetchval("SELECT 1")
            is_there.set()
            await asyncio.sleep(60)

        task = asyncio.create_task(engine.run(waits, **options))
        await is_there.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await single.fetchval("SHOW transaction_read_only") == "off"
    assert await engine.run(insert, autocommit=True) == 1
    async with engine.transaction() as conn:
        await insert(conn, 2)
    assert await rows(single) == [1, 2]
    assert await engine.run(backend) == pid


# --- with a retry: a body is started again only while nothing that it did can be done twice


class Starts:
    """Counts the starts of a body, without a statement of its own."""

    def __init__(self, body: Body) -> None:
        self.body = body
        self.count = 0

    async def __call__(self, conn: Any) -> Any:
        self.count += 1
        return await self.body(conn)


def and_then(first: Body, second: Body) -> Starts:
    async def one_after_the_other(conn: Any) -> None:
        await first(conn)
        await second(conn)

    return Starts(one_after_the_other)


async def by_prepared_statement(conn: Any) -> None:
    statement = await conn.prepare("INSERT INTO t VALUES ($1)")
    await statement.fetch(1)


async def by_an_operation(conn: Any) -> None:
    await add(1)(conn)


FIRST = [by_insert, by_a_query, by_copy, by_prepared_statement, by_an_operation]
RETRIES: dict[str, Callable[[Body], tuple[Any, RetryPolicy | None]]] = {
    "retry in the pipeline": lambda body: (pipe(body, retry(QUICK)), None),
    "retry of the run": lambda body: (body, QUICK),
    "both": lambda body: (pipe(body, timeout(5), retry(QUICK)), QUICK),
}
RETRY_WAYS = pytest.mark.parametrize("way", RETRIES)


@RETRY_WAYS
@pytest.mark.parametrize(
    ("first", "code"),
    [*((first, "40001") for first in FIRST), (by_insert, "40P01"), (by_insert, "55P03")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
async def test_an_autocommitted_body_is_not_started_again_after_its_first_statement_was_done(
    first: Body, code: str, way: str, single: asyncpg.Pool
) -> None:
    """The error is raised as it came: no retry gave up, there was none."""
    seen = Seen()
    body = and_then(first, raising(code))
    op, policy = RETRIES[way](body)
    with pytest.raises(asyncpg.PostgresError) as caught:
        await Engine(single, observer=seen).run(op, autocommit=True, retry=policy)
    assert caught.value.sqlstate == code
    assert body.count == 1
    assert seen.of(events.Retried) == []
    assert await rows(single) == [1]


@RETRY_WAYS
async def test_an_autocommitted_body_is_not_started_again_after_its_first_statement_failed(
    way: str, single: asyncpg.Pool
) -> None:
    """What failed has undone itself on a plain table, but not a sequence that it moved, for example."""

    async def is_refused(conn: Any) -> None:
        with contextlib.suppress(asyncpg.NotNullViolationError):
            await conn.execute("INSERT INTO t VALUES (NULL)")

    body = and_then(is_refused, raising("40001"))
    op, policy = RETRIES[way](body)
    with pytest.raises(asyncpg.SerializationError):
        await Engine(single).run(op, autocommit=True, retry=policy)
    assert body.count == 1


@RETRY_WAYS
async def test_an_autocommitted_body_is_not_started_again_where_it_fails_by_itself_after_its_statement(
    way: str, single: asyncpg.Pool
) -> None:
    async def fails(conn: Any) -> None:
        assert conn is not None
        raise server_error("40001")

    body = and_then(by_insert, fails)
    op, policy = RETRIES[way](body)
    with pytest.raises(asyncpg.SerializationError):
        await Engine(single).run(op, autocommit=True, retry=policy)
    assert body.count == 1
    assert await rows(single) == [1]


@RETRY_WAYS
async def test_an_autocommitted_body_whose_connection_is_lost_after_its_first_statement_is_not_started_again(
    way: str, single: asyncpg.Pool, other: asyncpg.Connection
) -> None:
    """Of the second statement nothing was sent, which makes the first no less done."""

    async def is_ended(conn: Any) -> None:
        await other.fetchval("SELECT pg_terminate_backend($1, 5000)", conn.get_server_pid())
        while not conn.is_closed():
            await asyncio.sleep(0.002)
        await conn.execute("SELECT 1")

    body = and_then(by_insert, is_ended)
    op, policy = RETRIES[way](body)
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError)):
        await Engine(single).run(op, autocommit=True, retry=policy)
    assert body.count == 1
    assert await rows(single) == [1]


@RETRY_WAYS
@pytest.mark.parametrize("code", ["40P01", "40001", "55P03"])
async def test_an_autocommitted_body_of_one_statement_is_started_again(
    code: str, way: str, single: asyncpg.Pool
) -> None:
    """It has undone itself, so there is nothing to double."""

    async def fails_twice(conn: Any) -> None:
        await (raising(code) if body.count < 3 else by_insert)(conn)

    body = Starts(fails_twice)
    op, policy = RETRIES[way](body)
    await Engine(single).run(op, autocommit=True, retry=policy)
    assert body.count == 3
    assert await rows(single) == [1]


async def test_an_autocommitted_body_of_one_message_with_several_statements_is_started_again(
    single: asyncpg.Pool,
) -> None:
    """PostgreSQL makes one transaction of a message without arguments, so that one was undone as a whole."""

    async def all_or_nothing(conn: Any) -> None:
        fail = "DO $$ BEGIN RAISE EXCEPTION 'of the test' USING ERRCODE = '40001'; END $$"
        await conn.execute("INSERT INTO t VALUES (1)" + (f"; {fail}" if body.count == 1 else ""))

    body = Starts(all_or_nothing)
    await Engine(single).run(pipe(body, retry(QUICK)), autocommit=True)
    assert body.count == 2
    assert await rows(single) == [1]


@RETRY_WAYS
async def test_between_two_starts_of_an_autocommitted_body_there_is_the_pause_that_was_told(
    way: str, single: asyncpg.Pool
) -> None:
    policy = RetryPolicy(attempts=5, first_delay=0.05, max_delay=0.05)
    starts: list[float] = []
    loop = asyncio.get_running_loop()

    async def fails_each_time(conn: Any) -> None:
        starts.append(loop.time())
        await raising("40001")(conn)

    seen = Seen()
    op = fails_each_time if way == "retry of the run" else pipe(fails_each_time, retry(policy))
    with pytest.raises(RetriesExhausted):
        await Engine(single, observer=seen).run(
            op, autocommit=True, retry=None if way == "retry in the pipeline" else policy
        )
    pauses = [event.delay for event in seen.of(events.Retried)]
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    assert len(pauses) == len(gaps) == 4
    assert sum(pauses) > 0
    # No timer of asyncio is early by more than its clock's resolution.
    assert all(gap >= pause - 0.001 for gap, pause in zip(gaps, pauses, strict=True))


# --- a body that fails


@pytest.mark.parametrize("error", ["the server's", "its own"])
async def test_a_failed_autocommitted_body_sends_no_rollback(
    error: str, dsn: str, postgres_server: Server
) -> None:
    body = by_insert if error == "the server's" else fails
    async with behind(postgres_server, dsn, max_size=1) as (proxy, pool):
        engine = Engine(pool)
        await engine.run(by_insert)
        proxy.reset_counts()
        with pytest.raises((LookupError, asyncpg.UniqueViolationError)):
            await engine.run(body, autocommit=True)
        assert [sql for sql in sent(proxy) if "ROLLBACK" in sql or "COMMIT" in sql or "BEGIN" in sql] == []


def sent(proxy: FaultProxy) -> list[str]:
    return [message.sql for message in proxy.messages if message.sender == "client" and message.sql]


@pytest.mark.parametrize("action", ["reset", "hang"])
async def test_an_autocommitted_bodys_own_error_is_not_hidden_by_a_line_that_breaks(
    action: Any, dsn: str, postgres_server: Server
) -> None:
    """Nothing has to be undone, so nothing that fails can come between."""
    async with behind(postgres_server, dsn, max_size=1) as (proxy, pool):
        proxy.inject(Fault(action, when=query("ROLLBACK"), times=None))
        with pytest.raises(LookupError):
            await Engine(pool).run(fails, autocommit=True)
