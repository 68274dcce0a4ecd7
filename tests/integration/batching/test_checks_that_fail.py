"""A check of deferred constraints that could not be done, and a span whose last item swallowed its error.

Neither says that an item violates anything: nobody is blamed, and the transaction around stays usable.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from dbop_raw import Engine, batch, each, execute_many, operation, savepoint

pytestmark = pytest.mark.anyio

INSERT = "INSERT INTO item (id, body) VALUES ($1, $2)"


@pytest.fixture
async def conflicts(engine: Engine) -> AsyncIterator[Engine]:
    """A table whose deferred check meets a serialization failure."""
    await engine.execute(
        "CREATE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "RAISE EXCEPTION 'as asked' USING ERRCODE = '40001'; END $$; "
        "CREATE CONSTRAINT TRIGGER conflict AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW WHEN (NEW.body = 'conflict') EXECUTE FUNCTION conflict()"
    )
    yield engine
    await engine.execute("DROP TRIGGER conflict ON item; DROP FUNCTION conflict")


async def test_a_serialization_failure_of_the_deferred_check_is_no_violated_constraint(
    conflicts: Engine,
) -> None:
    """It leaves the batch inside a transaction of others, and no item is tried alone for it."""
    write = batch(execute_many(INSERT))
    tried: list[Any] = []
    async with conflicts.transaction() as conn:
        with pytest.raises(asyncpg.SerializationError):
            tried.append(await write([(1, "x"), (2, "conflict"), (3, "x")])(conn))
        assert await conn.fetchval("SELECT count(*) FROM item") == 0
    assert tried == []


@operation
async def swallow(conn: Any, row: tuple[int, str]) -> None:
    """Swallow what the server refuses: the transaction has failed by then."""
    try:
        await conn.execute(INSERT, *row)
    except asyncpg.IntegrityConstraintViolationError:
        assert row[1] == "raise 23514"


async def test_an_error_that_the_last_item_swallowed_leaves_the_transaction_around_usable(
    engine: Engine,
) -> None:
    async with engine.transaction() as conn:
        await conn.execute(INSERT, 100, "before")
        with pytest.raises(asyncpg.InFailedSQLTransactionError):
            await savepoint(batch(each(swallow))([(1, "x"), (2, "raise 23514")]))(conn)
        await conn.execute(INSERT, 101, "after")
    rows = await engine.fetch("SELECT id FROM item ORDER BY id")
    assert [row["id"] for row in rows] == [100, 101]
