"""Class 42 and 54 raised by a value: that item's, and not the end of the batch.

A statement that is wrong, a privilege that is missing, a function that a trigger can't find: all items share
these, and they stop the batch as before. A tsquery, a jsonpath, a regclass, a name that can't be read, or a
row that is too big: these are about one value, whatever their SQLSTATE says.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest

from dbop_raw import Engine, Repair, batch, copy_into, copy_text, each, execute_many, operation
from dbop_raw.testing import Server
from dbop_raw.testing.server import run_sql
from tests.support.batching import COPY_WRITERS, ROW_WRITERS, insert_of, make_batch, told
from tests.support.one_by_one import HISTORIES, Engines, History, engines_on, teach

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

COLUMNS = ("id", "v")


@dataclass(frozen=True, repr=False)
class Case:
    """A column of which a value can be bad, and by what code it is refused."""

    name: str
    column: str
    good: Any
    bad: Any
    code: str
    writers: Sequence[str]
    insert: str | None = None
    """None: the plain INSERT."""

    def __repr__(self) -> str:
        return f"<Case {self.name}>"


TEXT = ("copy_text", "execute_many")
ALL = ROW_WRITERS
CASES = (
    # Refused as the value is read: COPY's context names line and column, a parameter's its number.
    Case("tsquery", "v tsquery", "a & b", "a & & b", "42601", TEXT),
    Case("tsvector", "v tsvector", "a b", "'", "42601", TEXT),
    Case("jsonpath", "v jsonpath", "$.a", "$.", "42601", TEXT),
    Case("regclass", "v regclass", "pg_class", "nosuch", "42P01", ("copy_text",)),
    Case("regtype", "v regtype", "int4", "nosuch", "42704", ("copy_text",)),
    Case("regproc", "v regproc", "now", "nosuch", "42883", ("copy_text",)),
    Case("regrole", "v regrole", "pg_monitor", "nosuch", "42704", ("copy_text",)),
    Case("ltree", "v ltree", "a.b", "a..", "42601", TEXT),
    Case("hstore", "v hstore", "a=>b", "a=", "42601", ("copy_text",)),
    Case("a name in binary", "v name", "abc", "x" * 70, "42622", ("copy_into", "execute_many")),
    Case("a composite in binary", "v pair", (1, "x"), (1,), "42804", ("copy_into", "execute_many")),
    Case("an array of tsquery", "v tsquery[]", "{a}", "{a & & b}", "42601", ("copy_text",)),
    Case("a domain's CHECK", "v asked", "a & b", "a & & b", "42601", ALL),
    # Refused as the row is computed.
    Case("a generated column", "v text, q tsquery GENERATED ALWAYS AS (to_tsquery('simple', v)) STORED",
         "a & b", "a & & b", "42601", ALL),
    Case("a CHECK", "v text, CHECK (to_tsquery('simple', v) IS NOT NULL)", "a & b", "a & & b", "42601", ALL),
    # Refused by the user's own statement, which is right for all other values.
    Case("a function of the statement", "v tsquery", "a & b", "a & & b", "42601", ("execute_many",),
         "INSERT INTO {table} (id, v) VALUES ($1, to_tsquery('simple', $2))"),
    Case("a cast of the statement", "v regclass", "pg_class", "nosuch", "42P01", ("execute_many",),
         "INSERT INTO {table} (id, v) VALUES ($1, $2::text::regclass)"),
    # Class 54.
    Case("a row that is too big", "v text STORAGE PLAIN", "x", "x" * 9000, "54000", ALL),
    Case("a row too big for its index", "v text, EXCLUDE USING btree (v WITH =)", "x", "", "54000", ALL),
    Case("a text too long for tsvector",
         "v text, q tsvector GENERATED ALWAYS AS (to_tsvector('simple', v)) STORED", "x", " ".join(map(str,
         range(200_000))), "54000", ("copy_into",)),
)  # fmt: skip
PARAMETERS = [
    pytest.param(case, writer, id=f"{case.name}-{writer}") for case in CASES for writer in case.writers
]

TYPES = (
    "CREATE EXTENSION ltree",
    "CREATE EXTENSION hstore",
    "CREATE TYPE pair AS (n int, word text)",
    "CREATE DOMAIN asked AS text CHECK (to_tsquery('simple', VALUE) IS NOT NULL)",
)


@pytest.fixture(scope="module")
def database(postgres_server: Server) -> Iterator[str]:
    dsn = postgres_server.create_database()
    for statement in TYPES:
        run_sql(dsn, statement)
    yield dsn
    postgres_server.drop_database(dsn)


@pytest.fixture(scope="module")
async def engines(database: str) -> AsyncIterator[Engines]:
    async with engines_on(database) as engines:
        yield engines


def table_of(case: Case) -> str:
    return f"t{CASES.index(case)}"


def batch_of(case: Case, writer: str, **options: Any) -> Any:
    if case.insert is not None:
        return batch(execute_many(case.insert.format(table=table_of(case))), **options)
    return make_batch(writer, table_of(case), COLUMNS, **options)


def rows_of(case: Case, writer: str, size: int, bad: Sequence[int]) -> list[tuple[Any, Any]]:
    # A key of an index is compressed where it can be, so it has to be random.
    chance = random.Random(1)
    unique = "index" in case.name

    def value(n: int) -> Any:
        if n in bad:
            return chance.randbytes(2000).hex() if unique else case.bad
        return f"{case.good} {n}" if unique else case.good

    return [(str(n) if writer == "copy_text" else n, value(n)) for n in range(size)]


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize(("case", "writer"), PARAMETERS)
async def test_a_value_that_is_refused_with_class_42_or_54_costs_its_item_only(
    engines: Engines, case: Case, writer: str, history: History
) -> None:
    engine = await engines.get(history)
    owner = await engines.get("nothing known")
    table = table_of(case)
    await owner.execute(
        f"DROP TABLE IF EXISTS {table}; CREATE TABLE {table} (id int PRIMARY KEY, {case.column})"
    )
    write = batch_of(case, writer)
    one = rows_of(case, writer, 1, [])[0]
    await teach(
        engine, write, history, lambda n, good: (type(one[0])(n) if good else None, None if n else one[1])
    )
    await owner.execute(f"TRUNCATE {table}")
    bad = [3, 17, 18, 39]
    rows = rows_of(case, writer, 40, bad)
    result = await engine.run(write(rows))
    assert told(result) == [(n, case.code) for n in bad]
    assert await owner.fetchval(f"SELECT array_agg(id ORDER BY id) FROM {table}") == [
        n for n in range(40) if n not in bad
    ]
    assert {failed.verdict.repair for failed in result.failed} == {Repair.NEVER}


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize(("case", "writer"), PARAMETERS)
async def test_it_does_so_where_no_other_row_shows_that_the_statement_is_right(
    engines: Engines, case: Case, writer: str, size: int
) -> None:
    """All rows are bad, each by its own value: they are set aside, and nothing is raised."""
    if case.insert is not None:
        # Whether the statement or its value is wrong, only another value can tell.
        size = max(size, 5)
    engine = await engines.get("nothing known")
    table = table_of(case)
    await engine.execute(
        f"DROP TABLE IF EXISTS {table}; CREATE TABLE {table} (id int PRIMARY KEY, {case.column})"
    )
    bad = range(size) if case.insert is None else range(1, size)
    rows = rows_of(case, writer, size, bad)
    result = await engine.run(batch_of(case, writer)(rows))
    assert told(result) == [(n, case.code) for n in bad]
    assert await engine.fetchval(f"SELECT count(*) FROM {table}") == size - len(bad)


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("writer", COPY_WRITERS)
@pytest.mark.parametrize("partitioned", [False, True], ids=["a table", "partitions"])
async def test_a_row_that_is_too_big_is_not_blamed_on_the_last_row_that_was_buffered(
    engines: Engines, writer: str, partitioned: bool, history: History
) -> None:
    """COPY inserts together what it has buffered, and the error then names the line that was read last.

    It buffers 1,000 rows, or 64 KB of text; of what comes in binary it does not count the bytes.
    """
    owner = await engines.get("nothing known")
    engine = await engines.get(history)
    await owner.execute(
        "DROP TABLE IF EXISTS big; CREATE TABLE big (id int PRIMARY KEY, v text STORAGE PLAIN)"
        + " PARTITION BY HASH (id)" * partitioned
    )
    for n in range(3 * partitioned):
        await owner.execute(
            f"CREATE TABLE big_{n} PARTITION OF big FOR VALUES WITH (MODULUS 3, REMAINDER {n})"
        )
    key = str if writer == "copy_text" else int
    write = make_batch(writer, "big", COLUMNS)
    await teach(engine, write, history, lambda n, good: (key(n) if good else None, "x"))
    await owner.execute("TRUNCATE big")
    if history == "nothing temporary":
        # One in many is bad, and it was named: it will be looked for where the error points to.
        await engine.run(write([(key(n) if n != 3 else None, "x") for n in range(4000)]))
        await owner.execute("TRUNCATE big")
    bad = {7, 99, 300}
    rows: list[Any] = [(key(n), "x" * (9000 if n in bad else 500)) for n in range(1100)]
    result = await engine.run(write(rows))
    assert told(result) == [(n, "54000") for n in sorted(bad)]
    assert await owner.fetchval("SELECT count(*) FROM big") == 1097


@pytest.mark.parametrize("code", ["42601", "54000"])
async def test_an_operation_of_each_fails_alone_with_a_value_error_of_class_42(
    postgres_dsn: str, code: str
) -> None:
    """For an operation of the user's own the value's error is known by where the server raised it."""
    async with Engine.open(postgres_dsn, min_size=0, max_size=1) as engine:
        await engine.execute("CREATE TABLE t (id int PRIMARY KEY, q tsquery, v text STORAGE PLAIN)")

        @operation
        async def add(conn: Any, row: tuple[int, str, str]) -> None:
            await conn.execute("INSERT INTO t VALUES ($1, $2, $3)", *row)

        rows = [(n, "a & b", "x") for n in range(20)]
        rows[7] = (7, "a & & b", "x") if code == "42601" else (7, "a", "x" * 9000)
        result = await engine.run(batch(each(add))(rows))
        assert told(result) == [(7, code)]
        assert await engine.fetchval("SELECT count(*) FROM t") == 19


# --------------------------------------------------------------------------------- what still stops the batch


SHARED = {
    "no table": ("INSERT INTO nosuch (id, v) VALUES ($1::int, $2::text)", "42P01", ""),
    "no column": ("INSERT INTO t (id, nosuch) VALUES ($1, $2::text)", "42703", ""),
    "no function": ("INSERT INTO t (id, v) VALUES ($1, nosuch($2::text))", "42883", ""),
    "a syntax error": ("INSERT INTO t (id, v) VALUES ($1, $2::text", "42601", ""),
    "an identity that is always generated": (
        "INSERT INTO t (id, v, own) VALUES ($1, $2::text, 7)",
        "428C9",
        "",
    ),
    "a trigger without its function": (
        insert_of("t", COLUMNS),
        "42883",
        (
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM nosuch(1); "
            "RETURN NEW; END $$; CREATE TRIGGER t BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION f()"
        ),
    ),
    "a trigger on a table that is not there": (
        insert_of("t", COLUMNS),
        "42P01",
        (
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO nosuch VALUES (1); "
            "RETURN NEW; END $$; CREATE TRIGGER t BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION f()"
        ),
    ),
    "a CHECK by a function that one may not call": (
        insert_of("t", COLUMNS),
        "42501",
        (
            "CREATE FUNCTION fine(text) RETURNS bool LANGUAGE plpgsql IMMUTABLE "
            "AS $$ BEGIN RETURN true; END $$; ALTER TABLE t ADD CHECK (fine(v)); "
            "REVOKE EXECUTE ON FUNCTION fine FROM PUBLIC"
        ),
    ),
    "a table that one may not write": (insert_of("t", COLUMNS), "42501", "REVOKE INSERT ON t FROM {role}"),
}


@pytest.mark.parametrize("what", SHARED)
@pytest.mark.parametrize("writer", ROW_WRITERS)
async def test_an_error_of_class_42_that_all_rows_share_still_stops_the_batch(
    postgres_dsn: str, writer: str, what: str
) -> None:
    statement, code, setup = SHARED[what]
    if not setup and writer != "execute_many":
        statement = ""
    role = "plain_" + postgres_dsn.rpartition("/")[2]
    owner = await asyncpg.connect(postgres_dsn)
    try:
        await owner.execute(f"CREATE ROLE {role}")
        await owner.execute(
            "CREATE TABLE t (id int PRIMARY KEY, v text CHECK (v <> 'no'), "
            f"own int GENERATED ALWAYS AS IDENTITY); GRANT ALL ON t TO {role}; " + setup.format(role=role)
        )
        async with Engine.open(
            postgres_dsn, min_size=0, max_size=1, server_settings={"role": role}
        ) as engine:
            rows: list[Any] = [(n, "no" if n % 3 == 0 else "x") for n in range(60)]
            if writer == "copy_text":
                rows = [(str(n), v) for n, v in rows]
            make: Any = {"copy_into": copy_into, "copy_text": copy_text}.get(writer)
            if make is None:
                write = batch(execute_many(statement))
            elif setup:
                write = batch(make("t", columns=COLUMNS))
            else:
                write, code = batch(make("nosuch", columns=COLUMNS)), "42P01"
            with pytest.raises(asyncpg.PostgresError) as raised:
                await engine.run(write(rows))
            assert raised.value.sqlstate == code
        assert await owner.fetchval("SELECT count(*) FROM t") == 0
    finally:
        await owner.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
        await owner.close()
