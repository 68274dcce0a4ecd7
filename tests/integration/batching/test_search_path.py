"""A hostile search_path: functions, operators and tables of known names, in a schema that comes first."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from dbop_raw import Batch, Engine, batch, each, operation, pipe, retry, timeout
from tests.support.batching import (
    ITEM_COLUMNS,
    QUICK,
    WRITERS,
    Way,
    both_ways,
    count,
    insert_of,
    items_for,
    make_writer,
    row_by_row,
    told,
)

pytestmark = pytest.mark.anyio

TRAP = (
    "DROP SCHEMA IF EXISTS trap CASCADE; CREATE SCHEMA trap",
    "CREATE TABLE trap.sprung (what text)",
    # Every function that a helper of ours could call by a bare name.
    *(
        f"CREATE FUNCTION trap.{name}({arguments}) RETURNS {returns} LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION 'trapped: {name}' USING ERRCODE = '53100'; END $$"
        for name, arguments, returns in (
            ("array_length", "anyarray, int", "int"),
            ("array_length", "int[], int", "int"),
            ("array_length", "text[], int", "int"),
            ("substr", "text, int, int", "text"),
            ("to_regproc", "text", "regproc"),
            ("format_type", "oid, int", "text"),
            ("current_setting", "text", "text"),
            ("set_config", "text, text, boolean", "text"),
            ("unnest", "int[]", "setof int"),
            ("unnest", "text[]", "setof text"),
        )
    ),
    *(
        f"CREATE FUNCTION trap.bad_{name}({left}, {right}) RETURNS {returns} LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'trapped: operator' USING ERRCODE = '53100'; END $$; "
        f"CREATE OPERATOR trap.{sign} (LEFTARG = {left}, RIGHTARG = {right}, FUNCTION = trap.bad_{name})"
        for name, sign, left, right, returns in (
            ("plus", "+", "int", "int", "int"),
            ("minus", "-", "int", "int", "int"),
            ("times", "*", "int", "int", "int"),
            ("over", "/", "int", "int", "int"),
            ("le", "<=", "int", "int", "boolean"),
            ("lt", "<", "int", "int", "boolean"),
            ("gt", ">", "int", "int", "boolean"),
            ("ge", ">=", "int", "int", "boolean"),
            ("same", "=", "int", "int", "boolean"),
            ("eq", "=", "text", "text", "boolean"),
            ("ne", "<>", "oid", "oid", "boolean"),
        )
    ),
    "CREATE TABLE trap.pg_attribute (attname text)",
    "CREATE TABLE trap.pg_type (oid oid)",
    "CREATE TYPE trap.text AS ENUM ('trapped')",
    # The user's own trigger is not ours to protect: a table without one.
    "CREATE TABLE trap.target (id int PRIMARY KEY, body pg_catalog.text NOT NULL)",
)


async def walk_into_it(conn: Any) -> None:
    """The driver's own look-up of array types is not safe there: it comes first."""
    await conn.fetch("SELECT $1::int4[], $2::text[]", [1], ["x"])
    await conn.execute("SET search_path TO trap, pg_catalog, public")


async def stay(_: Any) -> None:
    """No RESET ALL: the path is for the whole session."""


@pytest.fixture
async def trapped(engine: Engine, database: str) -> AsyncIterator[Engine]:
    """An engine whose sessions search the trap first."""
    for statement in TRAP:
        await engine.execute(statement)
    try:
        async with Engine.open(database, min_size=0, init=walk_into_it, reset=stay) as trapped:
            yield trapped
        assert await count(engine, "trap.sprung") == 0
    finally:
        await engine.execute("DROP SCHEMA trap CASCADE")


def target_batch(writer: str) -> Batch[Any, Any]:
    if writer != "each":
        return batch(make_writer(writer, "target", ITEM_COLUMNS, schema="trap"), retry=QUICK)

    @operation
    async def add(conn: Any, row: Sequence[Any]) -> None:
        await conn.execute(insert_of("trap.target", ITEM_COLUMNS), *row)

    return batch(each(lambda row: pipe(add(row), timeout(10, lock=1))), retry=QUICK)


@both_ways
@pytest.mark.parametrize("writer", WRITERS)
async def test_a_hostile_search_path_changes_nothing(trapped: Engine, writer: str, way: Way) -> None:
    write = way(target_batch(writer))
    items = items_for(writer, {3: None, 50: "\0", 51: None})
    result = await trapped.run(pipe(write(items), timeout(20), retry(QUICK)))
    assert told(result) == [(3, "23502"), (50, "22021"), (51, "23502")]
    if way is row_by_row and writer != "each":
        assert write._costs.rows_possible, "it fell back: then nothing was tested"
