"""A table that another connection alters while a pool lives: what is stored is right, on every connection.

The driver keeps what it has read of a table, and encodes by it for as long as the connection lives. A value
encoded for the old type is refused by the new one, or taken for another value: an int8 for a float8 is
5e-324.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest

from dbop_raw import Engine, RetryPolicy, batch, each, execute_many, operation
from dbop_raw.testing import Server
from tests.support.batching import COPY_WRITERS, ROW_WRITERS, as_items, make_batch, told

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

COLUMNS = ("id", "v")


@dataclass(frozen=True, repr=False)
class Change:
    """A column, what is done to it, and values that suit it before and after."""

    name: str
    column: str
    alter: str
    before: Any
    after: Any
    shown: str
    """`after`, as the server shows it."""
    text: str | None = None
    """`after` for copy_text; None: as shown."""

    def __repr__(self) -> str:
        return f"<Change {self.name}>"


def to(type_: str, using: str = "") -> str:
    return f"ALTER TABLE t ALTER v TYPE {type_}" + (f" USING {using}" if using else "")


CHANGES = (
    # Of the same length on the wire: nothing is refused, and other bits are stored.
    Change("bigint to double", "v bigint", to("float8"), 7, 7, "7"),
    Change("double to bigint", "v float8", to("bigint"), 7.0, 7, "7"),
    Change("int to real", "v int", to("real"), 7, 7, "7"),
    Change("real to int", "v real", to("int"), 7.0, 7, "7"),
    Change("bigint to timestamptz", "v bigint", to("timestamptz", "to_timestamp(v)"), 7, dt.datetime(2026, 2,
           28, tzinfo=dt.UTC), "2026-02-28 00:00:00+00"),
    Change("timestamp to timestamptz", "v timestamp", to("timestamptz"), dt.datetime(2026, 1, 1),  # noqa: DTZ001
           dt.datetime(2026, 2, 28, tzinfo=dt.UTC), "2026-02-28 00:00:00+00"),
    Change("int to date", "v int", to("date", "date '2000-01-01' + v"), 7, dt.date(2026, 2, 28),
           "2026-02-28"),
    Change("text to bytea", "v text", to("bytea", "v::bytea"), "x", b"\xff", "\\xff"),
    Change("json to jsonb", "v json", to("jsonb"), "[1]", "[1]", "[1]"),
    # Of another length, or another type altogether: refused, and every row with it.
    Change("int to bigint", "v int", to("bigint"), 7, 2**40, str(2**40)),
    Change("bigint to int", "v bigint", to("int"), 7, 7, "7"),
    Change("int to text", "v int", to("text"), 7, "007", "007"),
    Change("text to int", "v text", to("int", "v::int"), "7", 7, "7"),
    Change("int to numeric", "v int", to("numeric"), 7, 7, "7"),
    Change("a value to an array", "v int", to("int[]", "ARRAY[v]"), 7, [7, 8], "{7,8}"),
    Change("text to an enum", "v text", "CREATE TYPE mood AS ENUM ('ok'); " + to("mood", "v::mood"), "ok",
           "ok", "ok"),
    # Not its type.
    Change("a column made anew", "v int", "ALTER TABLE t DROP v; ALTER TABLE t ADD v text", 7, "007", "007"),
    Change("a table made anew", "v int",
           "DROP TABLE t; CREATE TABLE t (v float8, id int PRIMARY KEY, must int NOT NULL)", 7, 7, "7"),
    Change("a longer varchar", "v varchar(3)", to("varchar(9)"), "abc", "abcdefghi", "abcdefghi"),
    Change("an enum with one more label", "v mood", "ALTER TYPE mood ADD VALUE 'glad'", "ok", "glad", "glad"),
    Change("an enum made anew", "v mood",
           "ALTER TABLE t DROP v; DROP TYPE mood; CREATE TYPE mood AS ENUM ('new'); ALTER TABLE t ADD v mood",
           "ok", "new", "new"),
    Change("a composite with one more field", "v pair", "ALTER TYPE pair ADD ATTRIBUTE more int", (1, "x"),
           (1, "x", 2), "(1,x,2)"),
)  # fmt: skip


@dataclass
class Scene:
    """An engine of one connection that has known the table for long, and another one that alters it."""

    engine: Engine
    owner: Any


@pytest.fixture(scope="module")
def database(postgres_server: Server) -> Iterator[str]:
    dsn = postgres_server.create_database()
    yield dsn
    postgres_server.drop_database(dsn)


@pytest.fixture
async def scene(database: str) -> AsyncIterator[Scene]:
    utc = {"timezone": "UTC"}
    owner = await asyncpg.connect(database, server_settings=utc)
    try:
        await owner.execute(
            "DROP TABLE IF EXISTS t; DROP TYPE IF EXISTS mood, pair; "
            "CREATE TYPE mood AS ENUM ('ok'); CREATE TYPE pair AS (n int, word text)"
        )
        async with Engine.open(database, min_size=0, max_size=1, server_settings=utc) as engine:
            yield Scene(engine, owner)
    finally:
        await owner.close()


def rows_of(writer: str, value: Any, text: str, bad_one_in: int, start: int = 0) -> list[Any]:
    """Rows of which some have no `must`; 0: all have it."""
    rows: list[Any] = []
    for n in range(start, start + 60):
        must = None if bad_one_in and n % bad_one_in == 1 else 1
        rows += as_items(writer, [(n, must, text if writer == "copy_text" else value)])
    return rows


@pytest.mark.parametrize("known", [0, 2], ids=["none was bad", "many were bad"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
@pytest.mark.parametrize("writer", ROW_WRITERS)
async def test_a_batch_stores_what_it_is_given_after_the_table_was_altered(
    scene: Scene, writer: str, change: Change, known: int
) -> None:
    """Each row is stored as it is, or refused by its own fault; none for what the driver remembers."""
    column = change.column
    if "CREATE TYPE mood" in change.alter and "mood" not in column:
        await scene.owner.execute("DROP TYPE mood")
    await scene.owner.execute(f"CREATE TABLE t (id int PRIMARY KEY, must int NOT NULL, {column})")
    write = make_batch(writer, "t", ("id", "must", "v"))
    shown = "(1,x)" if change.before == (1, "x") else str(change.before)
    for _ in range(2):
        await scene.owner.execute("TRUNCATE t")
        result = await scene.engine.run(write(rows_of(writer, change.before, shown, known)))
        assert [index for index, _ in told(result)] == [n for n in range(60) if known and n % known == 1]
    for statement in change.alter.split("; "):
        await scene.owner.execute(statement)
    for bad_one_in in (0, 3) if known == 0 else (3, 0):
        await scene.owner.execute("TRUNCATE t")
        rows = rows_of(writer, change.after, change.text or change.shown, bad_one_in)
        result = await scene.engine.run(write(rows))
        bad = [n for n in range(60) if bad_one_in and n % bad_one_in == 1]
        stored = {row["v"] for row in await scene.owner.fetch("SELECT DISTINCT v::text AS v FROM t")}
        assert stored == {change.shown}
        assert told(result) == [(n, "23502") for n in bad]
        assert await scene.owner.fetchval("SELECT count(*) FROM t") == 60 - len(bad)


@pytest.mark.parametrize("writer", ROW_WRITERS)
async def test_every_connection_of_a_pool_notices_it(scene: Scene, database: str, writer: str) -> None:
    """Each has known the old table; each writes the new one right, whichever is first."""
    await scene.owner.execute("CREATE TABLE t (id int PRIMARY KEY, must int NOT NULL, v bigint)")
    write = make_batch(writer, "t", ("id", "must", "v"))
    async with Engine.open(database, min_size=3, max_size=3) as engine:
        async with (
            engine.transaction() as first,
            engine.transaction() as second,
            engine.transaction() as third,
        ):
            for start, conn in enumerate((first, second, third)):
                await write(rows_of(writer, 7, "7", 0, 1000 * start))(conn)
        await scene.owner.execute("TRUNCATE t")
        await scene.owner.execute(to("float8"))
        async with (
            engine.transaction() as first,
            engine.transaction() as second,
            engine.transaction() as third,
        ):
            for start, conn in enumerate((first, second, third)):
                for bad_one_in in (0, 3):
                    rows = rows_of(writer, 7, "7", bad_one_in, 1000 * start + 100 * bad_one_in)
                    result = await write(rows)(conn)
                    assert len(result.failed) == 20 * bool(bad_one_in)
        found = await scene.owner.fetch("SELECT v, count(*) AS n FROM t GROUP BY v")
        assert [(row["v"], row["n"]) for row in found] == [(7.0, 300)]


@pytest.mark.parametrize("writer", ROW_WRITERS)
async def test_it_is_noticed_inside_a_transaction_that_began_before(scene: Scene, writer: str) -> None:
    """The transaction has not touched the table yet, so it may be altered; the batch sees it as it is now."""
    await scene.owner.execute("CREATE TABLE t (id int PRIMARY KEY, must int NOT NULL, v bigint)")
    write = make_batch(writer, "t", ("id", "must", "v"))
    await scene.engine.run(write(rows_of(writer, 7, "7", 0)))
    async with scene.engine.transaction() as conn:
        await conn.fetchval("SELECT 1")
        await scene.owner.execute("TRUNCATE t")
        await scene.owner.execute(to("float8"))
        for bad_one_in in (0, 3):
            result = await write(rows_of(writer, 7, "7", bad_one_in, 300 * bad_one_in))(conn)
            assert len(result.failed) == 20 * bool(bad_one_in)
    found = await scene.owner.fetch("SELECT v, count(*) AS n FROM t GROUP BY v")
    assert [(row["v"], row["n"]) for row in found] == [(7.0, 100)]


async def test_a_statement_whose_columns_are_gone_stops_the_batch_with_the_servers_error(
    scene: Scene,
) -> None:
    """Noticing must not hide what all rows share."""
    await scene.owner.execute("CREATE TABLE t (id int PRIMARY KEY, must int NOT NULL, v bigint)")
    write = batch(execute_many("INSERT INTO t (id, must, v) VALUES ($1, $2, $3)"))
    await scene.engine.run(write([(n, 1, 7) for n in range(60)]))
    await scene.owner.execute("ALTER TABLE t DROP v")
    with pytest.raises(asyncpg.UndefinedColumnError):
        await scene.engine.run(write([(n, 1, 7) for n in range(100, 160)]))
    assert await scene.owner.fetchval("SELECT count(*) FROM t") == 60


@pytest.mark.parametrize("writer", COPY_WRITERS)
async def test_a_copy_whose_columns_are_gone_stops_the_batch_with_the_servers_error(
    scene: Scene, writer: str
) -> None:
    await scene.owner.execute("CREATE TABLE t (id int PRIMARY KEY, must int NOT NULL, v bigint)")
    write = make_batch(writer, "t", ("id", "must", "v"))
    await scene.engine.run(write(rows_of(writer, 7, "7", 0)))
    await scene.owner.execute("ALTER TABLE t DROP v")
    with pytest.raises(asyncpg.UndefinedColumnError):
        await scene.engine.run(write(rows_of(writer, 7, "7", 0, 100)))
    assert await scene.owner.fetchval("SELECT count(*) FROM t") == 60


async def test_an_operation_of_each_that_is_retried_sees_the_table_as_it_is(scene: Scene) -> None:
    """RETURNING gives the new type: the statement that was kept is made anew, and no item is blamed."""

    @operation
    async def add(conn: Any, n: int) -> Any:
        return await conn.fetchval("INSERT INTO t (id, must, v) VALUES ($1, 1, 7) RETURNING v", n)

    await scene.owner.execute("CREATE TABLE t (id int PRIMARY KEY, must int NOT NULL, v bigint)")
    write = batch(each(add), retry=RetryPolicy(attempts=2, first_delay=0.001))
    assert set((await scene.engine.run(write(range(10)))).results) == {7}
    await scene.owner.execute(to("text"))
    result = await scene.engine.run(write(range(10, 20)))
    assert told(result) == []
    assert set(result.results) == {"7"}
