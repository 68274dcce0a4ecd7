"""`each`: operations of the user's own, their results, their retries and their errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import asyncpg
import pytest

from dbop_raw import Engine, RetriesExhausted, batch, each, operation, pipe, retry
from tests.support.batching import QUICK, count, told

pytestmark = pytest.mark.anyio


async def test_results_stand_at_their_items_index(engine: Engine) -> None:
    async def square(conn: Any, number: int) -> int:
        if number % 3 == 0:
            await conn.execute("SELECT 1/0")
        return int(await conn.fetchval("SELECT $1::int * $1::int", number))

    def make(number: int) -> Callable[[Any], Any]:
        return lambda conn: square(conn, number)

    result = await engine.run(batch(each(make))(range(100)))
    assert result.results == tuple(n * n if n % 3 else None for n in range(100))
    assert [failed.index for failed in result.failed] == list(range(0, 100, 3))
    assert [failed.item for failed in result.failed] == list(range(0, 100, 3))
    assert {failed.verdict.sqlstate for failed in result.failed} == {"22012"}


async def test_an_items_own_retry_is_final_for_the_item(engine: Engine) -> None:
    """Its attempts are not multiplied by the batch's; the verdict tells of the error behind."""
    started = 0

    @operation
    async def locked(conn: Any, number: int) -> int:
        nonlocal started
        if number == 3:
            started += 1
            await conn.execute("INSERT INTO item VALUES (3, 'raise 55P03')")
        return number

    def make(number: int) -> Any:
        return pipe(locked(number), retry(QUICK))

    result = await engine.run(batch(each(make), retry=QUICK)([0, 1, 2, 3]))
    assert [failed.index for failed in result.failed] == [3]
    assert isinstance(result.failed[0].error, RetriesExhausted)
    assert result.failed[0].verdict.sqlstate == "55P03"
    assert result.failed[0].verdict.transient
    assert started == QUICK.attempts


async def test_an_error_of_the_users_code_costs_its_item_only(engine: Engine) -> None:
    async def body(conn: Any, number: int) -> int:
        await conn.execute("INSERT INTO item VALUES ($1, 'x')", number)
        if number == 2:
            raise LookupError(number)
        return number

    def make(number: int) -> Callable[[Any], Any]:
        if number == 4:
            raise KeyError(number)
        return lambda conn: body(conn, number)

    result = await engine.run(batch(each(make))(range(6)))
    assert told(result) == [(2, "LookupError"), (4, "KeyError")]
    assert result.results == (0, 1, None, 3, None, 5)
    assert await count(engine) == 4


async def test_an_item_that_swallows_an_error_of_its_own_stops_the_batch(engine: Engine) -> None:
    """Its transaction has failed unseen: nothing of the batch may be taken for written."""

    async def body(conn: Any, number: int) -> int:
        await conn.execute("INSERT INTO item VALUES ($1, 'x')", number)
        if number == 2:
            with pytest.raises(asyncpg.PostgresError):
                await conn.execute("SELECT 1/0")
        return number

    def make(number: int) -> Callable[[Any], Any]:
        return lambda conn: body(conn, number)

    with pytest.raises(Exception, match=r"aborted|ROLLBACK"):
        await engine.run(batch(each(make))(range(3)))
    assert await count(engine) == 0
