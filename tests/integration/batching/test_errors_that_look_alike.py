"""Errors that look like another that is expected in the same place: each is taken for what it is.

A 23505 that is not the ledger's, a 40001 that is no violated constraint, an error that the user's code
swallowed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import asyncpg
import pytest

from dbop_raw import (
    Batch,
    Engine,
    IngestReport,
    Ledger,
    Operation,
    Repair,
    Rule,
    batch,
    copy_into,
    each,
    events,
    ingest,
    operation,
    savepoint,
)
from dbop_raw.testing import Server
from dbop_raw.testing.server import run_sql
from tests.support.batching import QUICK, WRITERS, as_items, count, make_batch, told
from tests.support.observing import Seen

pytestmark = pytest.mark.anyio

COLUMNS = ("id", "body")
SCHEMA = (
    "CREATE TABLE item (id int PRIMARY KEY, body text NOT NULL)",
    "CREATE TABLE mark (id int PRIMARY KEY)",
    "CREATE TABLE late (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)",
    "CREATE SEQUENCE met",
    """
    CREATE FUNCTION check_late() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.body LIKE 'raise % once' AND nextval('met') > 1 THEN
            RETURN NULL;
        ELSIF NEW.body LIKE 'raise %' THEN
            RAISE EXCEPTION 'as asked' USING ERRCODE = split_part(NEW.body, ' ', 2);
        END IF;
        RETURN NULL;
    END $$
    """,
    (
        "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION check_late()"
    ),
)


@pytest.fixture(scope="module")
def database(postgres_server: Server) -> Iterator[str]:
    dsn = postgres_server.create_database()
    for statement in SCHEMA:
        run_sql(dsn, statement)
    yield dsn
    postgres_server.drop_database(dsn)


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
async def engine(database: str, seen: Seen) -> AsyncIterator[Engine]:
    async with Engine.open(database, min_size=0, max_size=3, observer=seen) as engine:
        await engine.execute(
            "TRUNCATE item, mark, late; ALTER SEQUENCE met RESTART; DROP TABLE IF EXISTS dbop_raw_ledger"
        )
        seen.events.clear()
        yield engine


# --- D.1: a 23505 that a chunk raises, and that is not "already in"

Write = Callable[[Sequence[Any]], Operation[Any]]


def with_a_key_of_its_own(at: str) -> Write:
    """A chunk's write that meets a unique violation of another table: in its body, or at COMMIT."""
    copying: Batch[Any, Any] = batch(copy_into("item", columns=COLUMNS))

    def write(items: Sequence[Any]) -> Operation[Any]:
        @operation
        async def body(conn: Any) -> Any:
            result = await copying(items)(conn)
            if items[0][0] == 10:
                table = "mark" if at == "the body" else "late"
                await conn.execute(f"INSERT INTO {table} VALUES (1), (1)")
            return result

        return body()

    return write


@pytest.mark.parametrize("with_ledger", [False, True], ids=["without a ledger", "with a ledger"])
@pytest.mark.parametrize("at", ["the body", "COMMIT"])
async def test_a_foreign_unique_violation_ends_an_ingest_and_is_not_taken_for_a_chunk_that_is_in(
    engine: Engine, at: str, with_ledger: bool
) -> None:
    reports: list[IngestReport] = []
    with pytest.raises(asyncpg.UniqueViolationError) as raised:
        await ingest(
            engine,
            [(n, "fine") for n in range(30)],
            with_a_key_of_its_own(at),
            size=10,
            workers=1,
            ledger=Ledger("events-1") if with_ledger else None,
            progress=reports.append,
        )
    assert raised.value.table_name in {"mark", "late"}
    assert not reports[-1].finished
    assert (reports[-1].written, reports[-1].skipped, reports[-1].chunks) == (10, 0, 1)
    assert await count(engine) == 10


@pytest.mark.parametrize("with_ledger", [False, True], ids=["without a ledger", "with a ledger"])
async def test_a_unique_violation_that_an_override_makes_everybodys_ends_an_ingest(
    database: str, engine: Engine, with_ledger: bool
) -> None:
    """With `23505 → NEVER` an item's own key is no item's failure any more, and still not "already in"."""
    async with Engine.open(
        database, min_size=0, max_size=2, verdicts={"23505": Rule(Repair.NEVER)}
    ) as strict:
        with pytest.raises(asyncpg.UniqueViolationError):
            await ingest(
                strict,
                [(n if n != 15 else 11, "fine") for n in range(30)],
                batch(copy_into("item", columns=COLUMNS)),
                size=10,
                workers=1,
                ledger=Ledger("events-1") if with_ledger else None,
            )
    assert await count(engine) == 10


@pytest.mark.parametrize("with_ledger", [False, True], ids=["without a ledger", "with a ledger"])
async def test_a_unique_violation_of_an_item_costs_the_item_in_an_ingest(
    engine: Engine, with_ledger: bool
) -> None:
    report = await ingest(
        engine,
        [(n if n != 15 else 11, "fine") for n in range(30)],
        batch(copy_into("item", columns=COLUMNS)),
        size=10,
        workers=1,
        ledger=Ledger("events-1") if with_ledger else None,
    )
    assert (report.written, report.rejected, report.skipped, report.finished) == (29, 1, 0, True)
    assert await count(engine) == 29


async def test_a_unique_violation_of_a_table_called_like_the_ledgers_is_not_the_ledgers(
    engine: Engine,
) -> None:
    """In another schema; the ledger's is known by its row."""
    await engine.execute(
        "DROP SCHEMA IF EXISTS other CASCADE; CREATE SCHEMA other; "
        "CREATE TABLE other.dbop_raw_ledger (id int PRIMARY KEY)"
    )

    @operation
    async def body(conn: Any) -> Any:
        await conn.execute("INSERT INTO other.dbop_raw_ledger VALUES (1), (1)")

    with pytest.raises(asyncpg.UniqueViolationError):
        await ingest(
            engine,
            [(n, "fine") for n in range(30)],
            lambda _: body(),
            size=10,
            workers=1,
            ledger=Ledger("events-1"),
        )
    assert await engine.fetchval("SELECT count(*) FROM dbop_raw_ledger") == 0


# --- D.6: a conflict that the check of deferred constraints meets


@pytest.mark.parametrize("code", ["40001", "40P01"])
@pytest.mark.parametrize("writer", WRITERS)
async def test_a_conflict_in_the_deferred_check_starts_the_run_again_and_is_no_items(
    engine: Engine, seen: Seen, writer: str, code: str
) -> None:
    """Inside a transaction that goes on, the batch checks by itself: what conflicts there needs a new one."""
    starts = 0
    items = as_items(writer, [(n, f"raise {code} once" if n == 7 else "fine") for n in range(20)])

    async def body(conn: Any) -> Any:
        nonlocal starts
        starts += 1
        result = await make_batch(writer, "item", COLUMNS)(items)(conn)
        await conn.execute("INSERT INTO mark VALUES ($1)", starts)
        return result

    result = await engine.run(body, retry=QUICK)
    assert told(result) == []
    assert starts == 2
    assert [(event.level, event.sqlstate) for event in seen.of(events.Retried)] == [("transaction", code)]
    assert await engine.fetchval("SELECT array_agg(id) FROM mark") == [2]
    assert await count(engine) == 20


@pytest.mark.parametrize("code", ["40001", "40P01", "53200", "XX000", "42883"])
@pytest.mark.parametrize("writer", WRITERS)
async def test_what_is_no_items_fault_in_the_deferred_check_is_raised_as_it_is(
    engine: Engine, writer: str, code: str
) -> None:
    items = as_items(writer, [(n, f"raise {code} once" if n == 7 else "fine") for n in range(20)])

    async def body(conn: Any) -> None:
        await make_batch(writer, "item", COLUMNS)(items)(conn)
        await conn.execute("INSERT INTO mark VALUES (1)")

    with pytest.raises(asyncpg.PostgresError) as raised:
        await engine.run(body)
    assert raised.value.sqlstate == code
    assert await engine.fetchval("SELECT last_value FROM met") == 1, "the check was tried again"
    assert (await count(engine), await count(engine, "mark")) == (0, 0)


# --- D.5: an error that the user's code swallowed


def swallowing(at: int) -> Batch[Any, Any]:
    """Items of which one meets an error, and keeps it to itself."""

    async def add(conn: Any, n: int) -> int:
        await conn.execute("INSERT INTO item VALUES ($1, 'fine')", n)
        if n == at:
            with pytest.raises(asyncpg.DivisionByZeroError):
                await conn.execute("SELECT 1 / 0")
        return n

    def make(n: int) -> Callable[[Any], Any]:
        return lambda conn: add(conn, n)

    return batch(each(make))


@pytest.mark.parametrize("items", [1, 3, 64, 65, 200])
async def test_an_error_swallowed_by_the_last_item_leaves_the_transaction_around_usable(
    engine: Engine, items: int
) -> None:
    """The savepoint around the batch is undone; what came before it, and comes after, is committed."""

    async def body(conn: Any) -> str:
        await conn.execute("INSERT INTO mark VALUES (1)")
        with pytest.raises(asyncpg.InFailedSQLTransactionError):
            await savepoint(swallowing(items - 1)(range(items)))(conn)
        await conn.execute("INSERT INTO mark VALUES (2)")
        return "done"

    assert await engine.run(body) == "done"
    assert await engine.fetchval("SELECT array_agg(id ORDER BY id) FROM mark") == [1, 2]
    assert await count(engine) == 0


@pytest.mark.parametrize("at", [0, 63, 64, 65, 130, 199])
async def test_an_error_swallowed_by_any_item_leaves_the_transaction_around_usable(
    engine: Engine, at: int
) -> None:
    async def body(conn: Any) -> None:
        await conn.execute("INSERT INTO mark VALUES (1)")
        with pytest.raises(asyncpg.PostgresError):
            await savepoint(swallowing(at)(range(200)))(conn)
        await savepoint(swallowing(-1)(range(200)))(conn)
        await conn.execute("INSERT INTO mark VALUES (2)")

    await engine.run(body)
    assert await engine.fetchval("SELECT array_agg(id ORDER BY id) FROM mark") == [1, 2]
    assert await count(engine) == 200


async def test_an_error_swallowed_by_a_savepoints_last_statement_leaves_the_outer_ones_usable(
    engine: Engine,
) -> None:
    """Three deep, each as the last of its span."""

    async def innermost(conn: Any) -> None:
        await conn.execute("INSERT INTO item VALUES (3, 'fine')")
        with pytest.raises(asyncpg.DivisionByZeroError):
            await conn.execute("SELECT 1 / 0")

    async def middle(conn: Any) -> None:
        await conn.execute("INSERT INTO item VALUES (2, 'fine')")
        with pytest.raises(asyncpg.PostgresError):
            await savepoint(innermost)(conn)

    async def outer(conn: Any) -> None:
        await conn.execute("INSERT INTO item VALUES (1, 'fine')")
        await savepoint(middle)(conn)

    await engine.run(outer)
    assert [row["id"] for row in await engine.fetch("SELECT id FROM item ORDER BY id")] == [1, 2]


@pytest.mark.parametrize("depth", [1, 2, 3])
async def test_an_error_swallowed_inside_several_savepoints_leaves_none_of_them_behind(
    engine: Engine, depth: int
) -> None:
    """They are released in one message, which the server refuses as a whole."""

    async def swallows(conn: Any) -> None:
        await conn.execute("INSERT INTO item VALUES (1, 'fine')")
        with pytest.raises(asyncpg.DivisionByZeroError):
            await conn.execute("SELECT 1 / 0")

    nested: Any = swallows
    for _ in range(depth):
        nested = savepoint(nested)

    async def body(conn: Any) -> None:
        await conn.execute("INSERT INTO mark VALUES (1)")
        with pytest.raises(asyncpg.InFailedSQLTransactionError):
            await nested(conn)
        await conn.execute("INSERT INTO mark VALUES (2)")
        await conn.execute("SAVEPOINT probe")
        with pytest.raises(asyncpg.InvalidSavepointSpecificationError):
            await conn.execute("RELEASE SAVEPOINT dbop_raw_1")
        await conn.execute("ROLLBACK TO SAVEPOINT probe")

    await engine.run(body)
    assert await engine.fetchval("SELECT array_agg(id ORDER BY id) FROM mark") == [1, 2]
    assert await count(engine) == 0
