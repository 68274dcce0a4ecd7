"""Errors that a coordinator tells of another node: our own connection is in good health, and stays in use.

57P01 with severity ERROR is another node's end, raised here by a trigger. What a COPY reports from a worker
(XX000 from the routine `ReportCopyError`, with no context) no server raises on demand: there is a scripted
coordinator for it.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import asyncpg
import pytest

from dbop_raw import Engine, Repair, SkipLimitExceeded, classify, events
from dbop_raw.testing import ScriptedConnection, ScriptedPool
from tests.support.batching import (
    COPY_WRITERS,
    QUICK,
    WRITERS,
    Way,
    as_items,
    both_ways,
    count,
    item_batch,
    items_for,
    make_batch,
    told,
)
from tests.support.observing import Seen

pytestmark = pytest.mark.anyio


# --- C.2: a node that shuts down


@pytest.fixture
async def watched(database: str) -> AsyncIterator[tuple[Engine, Seen]]:
    seen = Seen()
    async with Engine.open(database, min_size=0, max_size=1, observer=seen) as engine:
        await engine.execute("TRUNCATE item; ALTER SEQUENCE met RESTART")
        yield engine, seen


@both_ways
@pytest.mark.parametrize("code", ["57P01", "57P02", "08006"])
@pytest.mark.parametrize("writer", WRITERS)
async def test_another_nodes_end_starts_the_run_again_on_the_same_connection(
    watched: tuple[Engine, Seen], writer: str, way: Way, code: str
) -> None:
    engine, seen = watched
    pid = await engine.fetchval("SELECT pg_backend_pid()")
    write = way(item_batch(writer))
    items = items_for(writer, {40: f"raise {code} once", 41: "raise 23514"})
    result = await engine.run(write(items), retry=QUICK)
    assert told(result) == [(41, "23514")]
    assert await count(engine) == 99
    assert [event.level for event in seen.of(events.Retried)] == ["transaction"]
    assert engine.stats().evicted == 0
    assert await engine.fetchval("SELECT pg_backend_pid()") == pid


@both_ways
@pytest.mark.parametrize("writer", WRITERS)
async def test_without_a_policy_another_nodes_end_is_raised_and_blamed_on_nobody(
    watched: tuple[Engine, Seen], writer: str, way: Way
) -> None:
    engine, _ = watched
    with pytest.raises(asyncpg.AdminShutdownError):
        await engine.run(way(item_batch(writer))(items_for(writer, {40: "raise 57P01", 41: None})))
    assert await count(engine) == 0
    assert engine.stats().evicted == 0


def test_a_shutdown_with_severity_error_is_another_nodes_and_with_fatal_our_own() -> None:
    told_of = asyncpg.PostgresError.new({"S": "ERROR", "V": "ERROR", "C": "57P01", "M": "terminating"})
    verdict = classify(told_of)
    assert (verdict.repair, verdict.evict, verdict.item) == (Repair.TRANSACTION, False, False)
    own = asyncpg.PostgresError.new({"S": "FATAL", "V": "FATAL", "C": "57P01", "M": "terminating"})
    verdict = classify(own)
    assert (verdict.repair, verdict.evict, verdict.item) == (Repair.CONNECTION, True, False)


# --- C.3: a COPY that a worker refused


def copy_error(code: str = "XX000", **fields: str) -> Exception:
    """As Citus tells of a row that a worker has refused."""
    error: Exception = asyncpg.PostgresError.new(
        {
            "S": "ERROR",
            "V": "ERROR",
            "C": code,
            "M": "null value in column violates not-null constraint",
            "F": "multi_copy.c",
            "R": "ReportCopyError",
        }
        | fields
    )
    return error


def plain_error() -> Exception:
    error: Exception = asyncpg.PostgresError.new(
        {"S": "ERROR", "V": "ERROR", "C": "XX000", "M": "cache lookup failed", "R": "getTypeInputInfo"}
    )
    return error


class Coordinator(ScriptedConnection):
    """A coordinator that keeps rows in a list, with savepoints, and can try no rows one by one.

    A row whose last value is a key of `refused` is refused by its worker, with that error.
    """

    def __init__(self, refused: dict[Any, Exception]) -> None:
        super().__init__()
        self.refused = refused
        self.rows: list[tuple[Any, ...]] = []
        self.committed: list[tuple[Any, ...]] = []
        self._marks: list[tuple[str, int]] = []

    async def execute(self, query: str, *args: object, timeout: float | None = None) -> Any:  # noqa: ARG002, ASYNC109
        self.sent.append(query)
        if self.is_closed():
            raise asyncpg.InterfaceError("connection is closed")
        if "CREATE " in query:
            raise asyncpg.FeatureNotSupportedError("not on a coordinator")
        for statement in filter(None, (part.strip() for part in query.split(";"))):
            self._follow(statement)
        self._track(query, failed=False)
        return query.rsplit(";", maxsplit=1)[-1].split(maxsplit=1)[0].upper()

    def _follow(self, statement: str) -> None:
        word = statement.upper()
        name = statement.rsplit(maxsplit=1)[-1]
        if word.startswith(("BEGIN", "ROLLBACK")) and " TO " not in word:
            self.rows, self._marks = list(self.committed), []
        elif word.startswith("COMMIT"):
            self.committed, self._marks = list(self.rows), []
        elif word.startswith("SAVEPOINT"):
            self._marks.append((name, len(self.rows)))
        elif word.startswith("ROLLBACK TO"):
            while self._marks[-1][0] != name:
                self._marks.pop()
            del self.rows[self._marks[-1][1] :]
        elif word.startswith("RELEASE"):
            while self._marks.pop()[0] != name:
                pass

    async def fetch(self, query: str, *args: object, timeout: float | None = None) -> Any:  # noqa: ARG002, ASYNC109
        self.sent.append(query)
        return []

    async def prepare(self, query: str, *, name: str | None = None, timeout: float | None = None) -> Any:  # noqa: ARG002, ASYNC109
        raise asyncpg.FeatureNotSupportedError("not on a coordinator")

    def _store(self, rows: Iterable[Sequence[Any]]) -> str:
        for row in rows:
            # The whole COPY fails, and where it was does not come through.
            if row[-1] in self.refused:
                raise self.refused[row[-1]]
            self.rows.append(tuple(row))
        return "COPY"

    async def copy_records_to_table(self, table_name: str, *, records: Any, **options: Any) -> Any:
        self.sent.append(f"COPY {table_name} {sorted(options)}")
        return self._store(list(records))

    async def copy_to_table(self, table_name: str, *, source: Any, **options: Any) -> Any:
        self.sent.append(f"COPY {table_name} {sorted(options)}")
        if isinstance(source, memoryview):
            data = bytes(source)
        else:
            data = b"".join([piece async for piece in source])
        lines = data.decode().split("\n")[:-1]
        return self._store([re.split("\t", line) for line in lines])


def rows_on(writer: str, bodies: dict[int, str], total: int = 60) -> list[Any]:
    return as_items(writer, [(n, bodies.get(n, "fine")) for n in range(total)])


def engine_on(coordinator: Coordinator, **options: Any) -> tuple[Engine, ScriptedPool]:
    pool: Any = ScriptedPool([coordinator])
    return Engine(pool, **options), pool


@pytest.mark.parametrize("bad", [{7}, {7, 8, 40}, set(range(0, 60, 3)), set(range(60))])
@pytest.mark.parametrize("code", ["XX000", "23502", "22001"])
@pytest.mark.parametrize("writer", COPY_WRITERS)
async def test_a_row_that_a_worker_refuses_costs_its_item_only(writer: str, code: str, bad: set[int]) -> None:
    coordinator = Coordinator({"bad": copy_error(code)})
    engine, pool = engine_on(coordinator)
    rows = rows_on(writer, dict.fromkeys(bad, "bad"))
    result = await engine.run(make_batch(writer, "item", ("id", "body"))(rows))
    assert told(result) == [(n, code) for n in sorted(bad)]
    assert [int(row[0]) for row in coordinator.committed] == [n for n in range(60) if n not in bad]
    assert {(f.verdict.repair, f.verdict.evict) for f in result.failed} == {(Repair.NEVER, False)}
    assert not coordinator.terminated
    assert (pool.acquired, pool.released, pool.terminated) == (1, 1, 0)
    assert engine.stats().evicted == 0


@pytest.mark.parametrize("writer", COPY_WRITERS)
async def test_rows_that_workers_refuse_count_for_the_skip_limit(writer: str) -> None:
    coordinator = Coordinator({"bad": copy_error()})
    engine, _ = engine_on(coordinator)
    rows = rows_on(writer, {7: "bad", 8: "bad"})
    with pytest.raises(SkipLimitExceeded):
        await engine.run(make_batch(writer, "item", ("id", "body"), skip_limit=1)(rows))
    assert coordinator.committed == []
    assert not coordinator.terminated


@pytest.mark.parametrize("writer", COPY_WRITERS)
async def test_an_internal_error_of_another_routine_still_stops_the_batch(writer: str) -> None:
    """Nobody knows what it is about: the connection is not to be trusted."""
    coordinator = Coordinator({"bad": plain_error()})
    engine, _ = engine_on(coordinator)
    with pytest.raises(asyncpg.InternalServerError):
        await engine.run(make_batch(writer, "item", ("id", "body"))(rows_on(writer, {7: "bad"})))
    assert coordinator.committed == []
    assert engine.stats().evicted == 1


@pytest.mark.parametrize("code", ["08006", "57P01", "40P01"])
@pytest.mark.parametrize("writer", COPY_WRITERS)
async def test_a_worker_that_is_gone_is_no_rows_fault_though_the_same_routine_tells_of_it(
    writer: str, code: str
) -> None:
    """A code that says what it is keeps its verdict: the run starts again, and nobody is blamed."""
    coordinator = Coordinator({"gone": copy_error(code)})
    engine, _ = engine_on(coordinator)
    rows = rows_on(writer, {7: "gone"})

    async def heals(conn: Any) -> Any:
        try:
            return await make_batch(writer, "item", ("id", "body"))(rows)(conn)
        finally:
            coordinator.refused.clear()

    result = await engine.run(heals, retry=QUICK)
    assert told(result) == []
    assert len(coordinator.committed) == 60
    assert engine.stats().evicted == 0


def test_the_routine_makes_it_the_rows_and_only_there() -> None:
    verdict = classify(copy_error())
    assert (verdict.repair, verdict.item, verdict.evict) == (Repair.NEVER, True, False)
    verdict = classify(plain_error())
    assert (verdict.repair, verdict.item, verdict.evict) == (Repair.NEVER, False, True)
    fatal = classify(copy_error(S="FATAL", V="FATAL"))
    assert (fatal.item, fatal.evict) == (False, True)
