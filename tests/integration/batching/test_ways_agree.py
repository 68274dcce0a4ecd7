"""COPY, and row by row in the server: both store the same rows, and blame the same items."""

from __future__ import annotations

import datetime as dt
import decimal
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from dbop_raw import Batch, Engine, batch
from tests.support.batching import (
    COPY_WRITERS,
    ROW_WRITERS,
    as_items,
    in_spans,
    make_batch,
    make_writer,
    row_by_row,
    told,
)

pytestmark = pytest.mark.anyio

# Some columns are called like variables of our function in the server, which all begin with d_.
HOSTILE = "we\"ird; DROP TABLE item; -- $$ ' \\ ä %s {0}"
QUOTED = '"' + HOSTILE.replace('"', '""') + '"'

TYPES = (
    "DROP SCHEMA IF EXISTS types CASCADE",
    "CREATE SCHEMA types",
    "CREATE TYPE types.mood AS ENUM ('ok', 'sad')",
    "CREATE DOMAIN types.small AS int CHECK (VALUE < 100)",
    "CREATE DOMAIN types.brief AS varchar(3)",
    "CREATE DOMAIN types.briefer AS types.brief CHECK (VALUE <> 'no')",
    """
    CREATE TABLE types.all_of_them (
        id int GENERATED ALWAYS AS IDENTITY,
        given bigint NOT NULL,
        twice bigint GENERATED ALWAYS AS (given * 2) STORED,
        short varchar(3),
        mood types.mood,
        small types.small,
        price numeric(8, 2),
        doc jsonb,
        raw bytea,
        at timestamptz,
        flag boolean DEFAULT true,
        fixed char(2),
        brief types.briefer,
        bits bit(2),
        tiny "char",
        span interval(0)
    )
    """,
)
TYPE_COLUMNS = ("id", "given", "short", "mood", "small", "price", "doc", "raw", "at", "fixed", "brief")
AT = dt.datetime(2026, 2, 28, 23, 59, 59, 123456, tzinfo=dt.UTC)


def typed_rows(writer: str) -> tuple[list[Any], list[tuple[int, str]]]:
    """Rows of all types, of which some do not fit; and how they fail."""
    good: dict[str, Any] = {
        "short": "abc",
        "mood": "ok",
        "small": 5,
        "price": decimal.Decimal("12.34"),
        "doc": json.dumps({"a": [1, None]}),
        "raw": b"\x00\xff",
        "at": AT,
        "fixed": "ab",
        "brief": "abc",
    }
    bad: dict[int, tuple[str, Any, str]] = {
        3: ("short", "abcd", "22001"),
        # Binary, the server reads all values of a column at once: it can't try these row by row.
        **({8: ("mood", "angry", "22P02")} if writer == "copy_text" else {}),
        13: ("small", 100, "23514"),
        18: ("price", decimal.Decimal("1e7"), "22003"),
        **({23: ("doc", "{broken", "22P02")} if writer == "copy_text" else {}),
        28: ("fixed", "abc", "22001"),
        29: ("brief", "abcd", "22001"),
        30: ("brief", "no", "23514"),
        33: ("given", None, "23502"),
        38: ("id", None, "23502"),
        43: ("short", "ab \N{SNOWMAN} ", "22001"),
    }
    rows, failed = [], []
    for n in range(60):
        row = {"id": 100 + n, "given": n, **good, "at": AT + dt.timedelta(days=n)}
        if n % 7 == 0:
            row |= dict.fromkeys(good)
        if n == 50:
            row["short"] = "ab     "  # too long by spaces only: they are cut, as SQL says
        if n in bad:
            name, value, code = bad[n]
            row[name] = value
            failed.append((n, code))
        if writer == "copy_text" and row["raw"] is not None:
            row["raw"] = "\\x" + row["raw"].hex()
        rows.append(tuple(row[name] for name in TYPE_COLUMNS))
    return as_items(writer, rows), failed


async def both(
    engine: Engine, make: Callable[[], Batch[Any, Any]], items: Sequence[Any], table: str
) -> tuple[list[tuple[int, str]], list[Any]]:
    """The failures and the rows, of which it is asserted that both ways give the same."""
    found = []
    for way in (in_spans, row_by_row):
        await engine.execute(f"TRUNCATE {table} RESTART IDENTITY")
        write: Any = way(make())
        result = await engine.run(write(items))
        rows = [tuple(row) for row in await engine.fetch(f"SELECT * FROM {table} AS t ORDER BY t::text")]
        found.append((told(result), rows))
        if way is row_by_row:
            assert write._writer._in_server, "the server was never asked to try row by row"
            assert write._costs.rows_possible
    assert found[0] == found[1]
    return found[0]


@pytest.fixture
async def schemas(engine: Engine) -> AsyncIterator[Engine]:
    """An engine; schemas that a test makes are gone afterwards."""
    yield engine
    await engine.execute(f"DROP SCHEMA IF EXISTS types, {QUOTED} CASCADE")


@pytest.mark.parametrize("writer", COPY_WRITERS)
class TestBothWaysStoreAndBlameTheSame:
    async def test_for_identity_generated_enum_domain_numeric_json_bytea_and_time(
        self, schemas: Engine, writer: str
    ) -> None:
        for statement in TYPES:
            await schemas.execute(statement)
        items, expected = typed_rows(writer)
        failed, rows = await both(
            schemas,
            lambda: batch(make_writer(writer, "all_of_them", TYPE_COLUMNS, schema="types")),
            items,
            "types.all_of_them",
        )
        assert failed == expected
        assert len(rows) == 60 - len(expected)
        assert {row[0] for row in rows} == {100 + n for n in range(60)} - {100 + n for n, _ in expected}
        assert all(row[2] == row[1] * 2 and row[10] for row in rows)
        assert {row[11] for row in rows} == {"ab", None}

    async def test_for_hostile_names(self, schemas: Engine, writer: str) -> None:
        relation = f"{QUOTED}.{QUOTED}"
        await schemas.execute(f"DROP SCHEMA IF EXISTS {QUOTED} CASCADE; CREATE SCHEMA {QUOTED}")
        await schemas.execute(f'CREATE TABLE {relation} ({QUOTED} int PRIMARY KEY, d_first text, "d_1" int)')
        items = as_items(writer, [(n if n % 5 else 0, "x", n) for n in range(50)])
        columns = (HOSTILE, "d_first", "d_1")
        failed, _ = await both(
            schemas, lambda: batch(make_writer(writer, HOSTILE, columns, schema=HOSTILE)), items, relation
        )
        assert failed == [(n, "23505") for n in range(5, 50, 5)]

    async def test_for_a_partitioned_table(self, engine: Engine, writer: str) -> None:
        """Routed rows fail in a partition, whose name is another."""
        await engine.execute(
            "DROP TABLE IF EXISTS measured CASCADE; "
            "CREATE TABLE measured (id int PRIMARY KEY, v int CHECK (v > 0)) PARTITION BY RANGE (id); "
            "CREATE TABLE measured_0 PARTITION OF measured FOR VALUES FROM (0) TO (50); "
            "CREATE TABLE measured_1 PARTITION OF measured FOR VALUES FROM (50) TO (100)"
        )
        items = as_items(writer, [(n, 0 if n % 11 == 1 else 1) for n in range(110)])
        failed, found = await both(
            engine, lambda: make_batch(writer, "measured", ("id", "v")), items, "measured"
        )
        assert failed == [(n, "23514") for n in range(110) if n % 11 == 1 or n >= 100]
        assert len(found) == 110 - len(failed)

    async def test_for_triggers_that_change_or_drop_rows(self, engine: Engine, writer: str) -> None:
        await engine.execute(
            "DROP TABLE IF EXISTS judged; CREATE TABLE judged (id int PRIMARY KEY, v text); "
            "CREATE OR REPLACE FUNCTION rework() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "IF NEW.v = 'drop' THEN RETURN NULL; END IF; NEW.v := upper(NEW.v); RETURN NEW; END $$; "
            "CREATE TRIGGER t BEFORE INSERT ON judged FOR EACH ROW EXECUTE FUNCTION rework()"
        )
        items = as_items(writer, [(n if n != 7 else 6, "drop" if n % 10 == 0 else "x") for n in range(40)])
        failed, found = await both(engine, lambda: make_batch(writer, "judged", ("id", "v")), items, "judged")
        assert failed == [(7, "23505")]
        assert {row[1] for row in found} == {"X"}
        assert len(found) == 40 - 4 - 1


@pytest.mark.parametrize("writer", COPY_WRITERS)
async def test_a_column_that_has_changed_its_type_is_written_as_it_is_now(
    engine: Engine, writer: str
) -> None:
    """What was learned of the table must not change a value on its way: '007' is no number now."""
    await engine.execute("DROP TABLE IF EXISTS changing; CREATE TABLE changing (id int PRIMARY KEY, v int)")
    write: Any = make_batch(writer, "changing", ("id", "v"))
    first = as_items(writer, [(n if n % 5 else 0, 7) for n in range(30)])
    assert (await engine.run(row_by_row(write)(first))).written == 25
    await engine.execute("TRUNCATE changing")
    await engine.execute("ALTER TABLE changing ALTER v TYPE text")
    second = as_items(writer, [(n if n % 5 else 0, "007") for n in range(30)])
    for _ in range(2):
        await engine.execute("TRUNCATE changing")
        result = await engine.run(row_by_row(write)(second))
        assert told(result) == [(n, "23505") for n in range(5, 30, 5)]
        assert {row["v"] for row in await engine.fetch("SELECT v FROM changing")} == {"007"}
    assert write._writer._in_server, "the server was never asked again"


@pytest.mark.parametrize("writer", ROW_WRITERS)
async def test_rows_with_array_columns_are_written_and_isolated(engine: Engine, writer: str) -> None:
    await engine.execute("DROP TABLE IF EXISTS lists; CREATE TABLE lists (id int PRIMARY KEY, v int[])")
    rows: list[Any] = [(n if n % 9 else 0, list(range(n % 4))) for n in range(60)]
    if writer == "copy_text":
        rows = [(str(n), "{" + ",".join(map(str, v)) + "}") for n, v in rows]
    result = await engine.run(row_by_row(make_batch(writer, "lists", ("id", "v")))(rows))
    assert told(result) == [(n, "23505") for n in range(9, 60, 9)]
    found = await engine.fetch("SELECT id, v FROM lists ORDER BY id")
    assert [(row["id"], row["v"]) for row in found] == [
        (n, list(range(n % 4))) for n in range(60) if n % 9 or n == 0
    ]
