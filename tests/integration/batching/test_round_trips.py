"""What a batch costs, on the wire and in the server: counted, not timed."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest

from dbop_raw import Engine, Operation, batch, copy_into, each, pipe, timeout
from dbop_raw.testing import FaultProxy, Server
from dbop_raw.testing.server import run_sql
from tests.support.batching import QUICK, WRITERS, as_items, make_batch
from tests.support.round_trips import EVENTS, add_event, counted, warm

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

COLUMNS = ("id", "body")


@pytest.fixture
def events(postgres_dsn: str) -> str:
    run_sql(postgres_dsn, EVENTS)
    return postgres_dsn


@pytest.fixture
async def behind_proxy(postgres_server: Server, events: str) -> AsyncIterator[tuple[Engine, FaultProxy]]:
    async with counted(postgres_server, events) as found:
        await warm(found[0])
        yield found


def rows(count: int, start: int = 0) -> list[tuple[int, str]]:
    return [(n, f"event {n}") for n in range(start, start + count)]


class TestRoundTrips:
    @pytest.mark.parametrize("writer", WRITERS)
    async def test_an_empty_batch_costs_nothing(
        self, behind_proxy: tuple[Engine, FaultProxy], writer: str
    ) -> None:
        engine, proxy = behind_proxy
        proxy.reset_counts()
        result = await engine.run(make_batch(writer, "events", COLUMNS)([]))
        assert proxy.round_trips == 0
        assert (result.total, result.written, result.failed, result.results) == (0, 0, (), ())

    @pytest.mark.parametrize(
        ("writer", "items", "most"),
        [("copy_into", 1000, 6), ("copy_text", 1000, 6), ("execute_many", 1000, 5), ("each", 200, 215)],
    )
    async def test_a_clean_batch_is_cheap(
        self, behind_proxy: tuple[Engine, FaultProxy], writer: str, items: int, most: int
    ) -> None:
        """Transaction included, caches warm."""
        engine, proxy = behind_proxy
        data = as_items(writer, rows(items))
        proxy.reset_counts()
        result = await engine.run(make_batch(writer, "events", COLUMNS)(data))
        assert proxy.round_trips <= most
        assert (result.written, result.failed) == (items, ())

    async def test_a_retry_policy_of_the_batch_costs_nothing_while_nothing_fails(
        self, behind_proxy: tuple[Engine, FaultProxy]
    ) -> None:
        engine, proxy = behind_proxy
        counts = []
        for start, policy in ((0, None), (1000, QUICK)):
            proxy.reset_counts()
            await engine.run(batch(copy_into("events", columns=COLUMNS), retry=policy)(rows(1000, start)))
            counts.append(proxy.round_trips)
        assert counts[0] == counts[1]


class TestSubtransactions:
    @pytest.mark.parametrize("writer", WRITERS)
    async def test_a_clean_batch_of_10_000_fits_the_servers_cache(self, events: str, writer: str) -> None:
        """Beyond 64 every other session's snapshot has to look into pg_subtrans."""
        observer = await asyncpg.connect(events)
        try:
            async with Engine.open(events, min_size=0) as engine, engine.transaction() as conn:
                data = as_items(writer, rows(10_000))
                result = await make_batch(writer, "events", COLUMNS)(data)(conn)
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

    async def test_a_clean_batch_of_one_span_needs_no_subtransaction(self, postgres_dsn: str) -> None:
        """In a subtransaction, a row's xmin is not the transaction's own id."""
        async with Engine.open(postgres_dsn, min_size=0) as engine:
            await engine.execute(
                "CREATE TABLE first (id int PRIMARY KEY, body text NOT NULL, "
                "top text DEFAULT pg_current_xact_id()::text)"
            )
            result = await engine.run(batch(copy_into("first", columns=COLUMNS))(rows(1_000)))
            assert result.written == 1_000
            found = await engine.fetch("SELECT DISTINCT xmin::text AS own, top FROM first")
            assert [row["own"] for row in found] == [row["top"] for row in found]
            assert len(found) == 1


class TestWhatABatchLeavesBehind:
    @pytest.fixture
    async def after_a_batch(self, events: str) -> AsyncIterator[asyncpg.Connection]:
        """A connection whose transaction goes on after a batch with a bad item and with limits."""
        data = rows(300)
        data[7] = (6, "again")

        def bounded(row: tuple[int, str]) -> Operation[int]:
            return pipe(add_event(row), timeout(5, lock=1))

        async with Engine.open(events, min_size=0) as engine, engine.transaction() as conn:
            result = await batch(each(bounded))(data)(conn)
            assert [failed.index for failed in result.failed] == [7]
            yield conn

    @pytest.mark.parametrize("limit", ["statement_timeout", "lock_timeout"])
    async def test_a_batch_leaves_no_limit_behind(
        self, after_a_batch: asyncpg.Connection, limit: str
    ) -> None:
        assert await after_a_batch.fetchval(f"SHOW {limit}") == "0"

    @pytest.mark.parametrize("depth", [1, 2, 3])
    async def test_a_batch_leaves_no_savepoint_behind(
        self, after_a_batch: asyncpg.Connection, depth: int
    ) -> None:
        await after_a_batch.execute("SAVEPOINT probe")
        with pytest.raises(asyncpg.InvalidSavepointSpecificationError):
            await after_a_batch.execute(f"RELEASE SAVEPOINT dbop_raw_{depth}")
        await after_a_batch.execute("ROLLBACK TO SAVEPOINT probe; RELEASE SAVEPOINT probe")
