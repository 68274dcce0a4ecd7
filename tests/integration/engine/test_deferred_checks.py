"""A deferred check can fail for a passing reason: that is no violated constraint, and no item's fault."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from dbop_raw import Engine, Operation, batch, copy_into, each, events, execute_many, operation
from tests.support.observing import Seen
from tests.support.policies import QUICK

pytestmark = pytest.mark.anyio

CREATE = """
    CREATE SEQUENCE IF NOT EXISTS checks;
    CREATE TABLE IF NOT EXISTS checked (n integer PRIMARY KEY);
    CREATE OR REPLACE FUNCTION check_fails_once() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        -- A sequence is not rolled back: it fails at its first check, whatever becomes of the transaction.
        IF nextval('checks') = 1 THEN
            RAISE EXCEPTION 'of the test' USING ERRCODE = TG_ARGV[0];
        END IF;
        RETURN NULL;
    END $$;
"""


@pytest.fixture
async def fails_once(single: asyncpg.Pool) -> AsyncIterator[Any]:
    """Give a function that makes the deferred check of the table fail once, with a code."""
    await single.execute(CREATE)

    async def fails_once(code: str) -> None:
        await single.execute(
            "TRUNCATE checked; DROP TRIGGER IF EXISTS late ON checked; ALTER SEQUENCE checks RESTART; "
            "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON checked DEFERRABLE INITIALLY DEFERRED "
            f"FOR EACH ROW EXECUTE FUNCTION check_fails_once('{code}')"
        )

    yield fails_once
    await single.execute("DROP TABLE checked; DROP FUNCTION check_fails_once; DROP SEQUENCE checks")


@operation
async def add(conn: Any, n: int) -> None:
    await conn.execute("INSERT INTO checked VALUES ($1)", n)


WRITERS: dict[str, Any] = {
    "each": lambda: batch(each(lambda row: add(row[0]))),
    "execute_many": lambda: batch(execute_many("INSERT INTO checked VALUES ($1)")),
    "copy_into": lambda: batch(copy_into("checked", columns=("n",))),
}
ITEMS = [(1,), (2,), (3,)]


def at_commit(write: Operation[Any]) -> Any:
    """Nothing comes after the batch: COMMIT makes the check."""
    return write


def before_more(write: Operation[Any]) -> Any:
    """More comes after the batch, so it makes the check itself."""

    async def body(conn: Any) -> Any:
        result = await write(conn)
        await add(4)(conn)
        return result

    return body


EACH = pytest.mark.parametrize("writer", WRITERS)
WHEN = pytest.mark.parametrize("when", [at_commit, before_more], ids=lambda when: when.__name__)
PASSING = pytest.mark.parametrize("code", ["40001", "40P01"])


async def written(pool: asyncpg.Pool) -> list[int]:
    return [row["n"] for row in await pool.fetch("SELECT n FROM checked ORDER BY n")]


@EACH
@WHEN
@PASSING
async def test_a_conflict_that_a_deferred_check_meets_is_raised_as_it_is(
    code: str, when: Any, writer: str, single: asyncpg.Pool, fails_once: Any
) -> None:
    """Nobody asked for a retry; a batch that looked for a bad item would find none, and go on."""
    await fails_once(code)
    engine = Engine(single)
    with pytest.raises(asyncpg.PostgresError) as caught:
        await engine.run(when(WRITERS[writer]()(ITEMS)))
    assert caught.value.sqlstate == code
    assert await written(single) == []


@EACH
@WHEN
@PASSING
async def test_a_conflict_that_a_deferred_check_meets_is_repaired_by_a_new_transaction(
    code: str, when: Any, writer: str, single: asyncpg.Pool, fails_once: Any
) -> None:
    await fails_once(code)
    seen = Seen()
    engine = Engine(single, observer=seen)
    result = await engine.run(when(WRITERS[writer]()(ITEMS)), retry=QUICK)
    assert (result.written, result.failed) == (3, ())
    assert [(event.level, event.sqlstate) for event in seen.of(events.Retried)] == [("transaction", code)]
    assert engine.stats().retries == 1
    assert await written(single) == [1, 2, 3, *([4] if when is before_more else [])]


@EACH
@WHEN
async def test_a_violation_that_a_deferred_check_finds_is_no_retry(
    when: Any, writer: str, single: asyncpg.Pool, fails_once: Any
) -> None:
    """Guards the tests above: with a code of class 23 it is looked for, and nothing is tried again."""
    await fails_once("23514")
    seen = Seen()
    result = await Engine(single, observer=seen).run(when(WRITERS[writer]()(ITEMS)), retry=QUICK)
    assert result.written + len(result.failed) == 3
    assert seen.of(events.Retried) == []
