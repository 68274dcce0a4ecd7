"""What a run and a batch cost, on the wire and in the server: counted, not timed."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import asyncpg
import pytest

from dbop_raw import (
    Batch,
    Engine,
    Operation,
    RetryPolicy,
    batch,
    copy_into,
    copy_text,
    each,
    execute_many,
    operation,
    pipe,
    retry,
    timeout,
)
from dbop_raw.testing import FaultProxy, Server
from dbop_raw.testing.server import run_sql

pytestmark = pytest.mark.anyio

P = RetryPolicy(attempts=3)
INSERT = "INSERT INTO events (id, body) VALUES ($1, $2)"


@operation
async def add_event(conn: Any, row: tuple[int, str]) -> int:
    found: int = await conn.fetchval(INSERT + " RETURNING id", *row)
    return found


async def no_reset(_: Any) -> None:
    """Instead of asyncpg's reset query, which is one more round trip at each release."""


@pytest.fixture(scope="module")
def database(postgres_server: Server) -> Iterator[str]:
    dsn = postgres_server.create_database()
    run_sql(dsn, "CREATE TABLE events (id int PRIMARY KEY, body text NOT NULL)")
    yield dsn
    postgres_server.drop_database(dsn)


@pytest.fixture
def events(database: str) -> str:
    run_sql(database, "TRUNCATE events")
    return database


@pytest.fixture
async def proxy(postgres_server: Server) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(postgres_server.host, postgres_server.port) as proxy:
        yield proxy


@contextlib.asynccontextmanager
async def engine_on(dsn: str, **options: Any) -> AsyncIterator[Engine]:
    """An engine of one connection, which is open already."""
    async with Engine.open(dsn, min_size=1, max_size=1, **options) as engine:
        await engine.fetchval("SELECT 1")
        yield engine


@pytest.fixture
async def engine(proxy: FaultProxy, events: str) -> AsyncIterator[Engine]:
    async with engine_on(proxy.dsn(events), reset=no_reset) as engine:
        yield engine


def rows(count: int, start: int = 0) -> list[tuple[int, str]]:
    return [(n, f"event {n}") for n in range(start, start + count)]


async def warm(engine: Engine) -> None:
    """The driver prepares a statement, and looks a table up, once a connection."""
    await engine.run(add_event((-1, "warm")))
    await engine.run(batch(execute_many(INSERT))(rows(2, -3)))
    await engine.run(batch(copy_into("events", columns=("id", "body")))(rows(1, -4)))


class TestRoundTrips:
    async def test_a_run_with_timeout_and_retry_costs_3(self, engine: Engine, proxy: FaultProxy) -> None:
        await warm(engine)
        proxy.reset_counts()
        result = await engine.run(pipe(add_event((1, "x")), timeout(1.5, lock=0.5), retry(P)), retry=P)
        assert result == 1
        assert proxy.round_trips == 3

    async def test_the_pools_own_reset_query_is_the_fourth(self, proxy: FaultProxy, events: str) -> None:
        async with engine_on(proxy.dsn(events)) as engine:
            await warm(engine)
            proxy.reset_counts()
            await engine.run(pipe(add_event((1, "x")), timeout(1.5, lock=0.5), retry(P)), retry=P)
            assert proxy.round_trips == 4

    async def test_autocommit_costs_1(self, engine: Engine, proxy: FaultProxy) -> None:
        await warm(engine)
        proxy.reset_counts()
        await engine.run(pipe(add_event((1, "x")), timeout(1.5), retry(P)), autocommit=True)
        assert proxy.round_trips == 1

    async def test_an_operation_that_sends_nothing_costs_nothing(
        self, engine: Engine, proxy: FaultProxy
    ) -> None:
        async def nothing(_: Any) -> str:
            return "done"

        proxy.reset_counts()
        assert await engine.run(pipe(nothing, retry(P))) == "done"
        # BEGIN travels before any body: a body may use the connection in whatever way.
        assert proxy.round_trips <= 2

    async def test_one_retry_at_the_savepoint_costs_2_more(self, engine: Engine, proxy: FaultProxy) -> None:
        """The failed statement, and ROLLBACK TO with the limits in one message."""
        started = 0

        async def locked_once(conn: Any) -> None:
            nonlocal started
            started += 1
            if started == 1:
                await conn.execute("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '55P03'; END $$")
            await conn.execute("SELECT 1")

        proxy.reset_counts()
        await engine.run(pipe(locked_once, timeout(1.5), retry(RetryPolicy(attempts=2, first_delay=0.001))))
        assert proxy.round_trips == 3 + 2

    @pytest.mark.parametrize("writer", ["copy_into", "copy_text", "execute_many", "each"])
    async def test_an_empty_batch_costs_nothing(self, engine: Engine, proxy: FaultProxy, writer: str) -> None:
        write = writers()[writer]
        proxy.reset_counts()
        result = await engine.run(write([]))
        assert proxy.round_trips == 0
        assert (result.total, result.written, result.failed, result.results) == (0, 0, (), ())

    @pytest.mark.parametrize(
        ("writer", "items", "most"),
        [("copy_into", 1000, 6), ("copy_text", 1000, 6), ("execute_many", 1000, 5), ("each", 200, 215)],
    )
    async def test_a_clean_batch_is_cheap(
        self, engine: Engine, proxy: FaultProxy, writer: str, items: int, most: int
    ) -> None:
        """Transaction included, caches warm."""
        await warm(engine)
        write = writers()[writer]
        data: Sequence[Any] = rows(items)
        if writer == "copy_text":
            data = [(str(number), body) for number, body in data]
        proxy.reset_counts()
        result = await engine.run(write(data))
        assert proxy.round_trips <= most
        assert (result.written, result.failed) == (items, ())

    async def test_a_retry_policy_of_the_batch_costs_nothing_while_nothing_fails(
        self, engine: Engine, proxy: FaultProxy
    ) -> None:
        await warm(engine)
        counts = []
        for start, policy in ((0, None), (1000, P)):
            proxy.reset_counts()
            await engine.run(
                batch(copy_into("events", columns=("id", "body")), retry=policy)(rows(1000, start))
            )
            counts.append(proxy.round_trips)
        assert counts[0] == counts[1]


def writers() -> dict[str, Batch[Any, Any]]:
    return {
        "copy_into": batch(copy_into("events", columns=("id", "body"))),
        "copy_text": batch(copy_text("events", columns=("id", "body"))),
        "execute_many": batch(execute_many(INSERT)),
        "each": batch(each(add_event)),
    }


class TestSubtransactions:
    @pytest.mark.parametrize("writer", ["copy_into", "copy_text", "execute_many", "each"])
    async def test_a_clean_batch_of_10_000_fits_the_servers_cache(
        self, engine: Engine, events: str, writer: str
    ) -> None:
        """Beyond 64 every other session's snapshot has to look into pg_subtrans."""
        data: Sequence[Any] = rows(10_000)
        if writer == "copy_text":
            data = [(str(number), body) for number, body in data]
        observer = await asyncpg.connect(events)
        try:
            async with engine.transaction() as conn:
                result = await writers()[writer](data)(conn)
                found = await observer.fetchrow(
                    "SELECT s.subxact_count, s.subxact_overflowed FROM pg_stat_get_backend_idset() AS b, "
                    "pg_stat_get_backend_subxact(b) AS s WHERE pg_stat_get_backend_pid(b) = $1",
                    conn.get_server_pid(),
                )
        finally:
            await observer.close()
        assert result.written == 10_000
        assert found is not None
        assert 0 < found["subxact_count"] <= 64
        assert not found["subxact_overflowed"]


class TestWhatABatchLeavesBehind:
    async def test_a_batch_leaves_no_savepoint_and_no_limit_behind(self, engine: Engine) -> None:
        data = rows(300)
        data[7] = (6, "again")

        def bounded(row: tuple[int, str]) -> Operation[int]:
            return pipe(add_event(row), timeout(5, lock=1))

        async with engine.transaction() as conn:
            result = await batch(each(bounded))(data)(conn)
            assert [failed.index for failed in result.failed] == [7]
            assert await conn.fetchval("SHOW statement_timeout") == "0"
            assert await conn.fetchval("SHOW lock_timeout") == "0"
            for depth in range(1, 4):
                await conn.execute("SAVEPOINT probe")
                with pytest.raises(asyncpg.InvalidSavepointSpecificationError):
                    await conn.execute(f"RELEASE SAVEPOINT dbop_raw_{depth}")
                await conn.execute("ROLLBACK TO SAVEPOINT probe; RELEASE SAVEPOINT probe")


async def test_a_clean_batch_of_one_span_needs_no_subtransaction(events: str) -> None:
    """In a subtransaction, a row's xmin is not the transaction's own id."""
    async with engine_on(events) as engine:
        await engine.execute(
            "CREATE TABLE IF NOT EXISTS first (id int PRIMARY KEY, body text NOT NULL, "
            "top text DEFAULT pg_current_xact_id()::text); TRUNCATE first"
        )
        items = [(n, "fine") for n in range(1_000)]
        result = await engine.run(batch(copy_into("first", columns=("id", "body")))(items))
        assert result.written == 1_000
        found = await engine.fetch("SELECT DISTINCT xmin::text AS own, top FROM first")
        assert [row["own"] for row in found] == [row["top"] for row in found]
        assert len(found) == 1
