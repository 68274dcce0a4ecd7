"""A body that swallows an error of the server's leaves the transaction aborted; a savepoint around ends that.

The server refuses everything up to the last savepoint then, our own RELEASE too, which is how it is noticed:
by then several scopes may have ended, and what is undone is all that they did.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest

from dbop_raw import (
    Engine,
    Operation,
    TransactionAborted,
    batch,
    each,
    operation,
    pipe,
    retry,
    savepoint,
    timeout,
)
from tests.support.bodies import insert, rows
from tests.support.failures import raising
from tests.support.policies import QUICK

pytestmark = pytest.mark.anyio

NOTICED = (asyncpg.InFailedSQLTransactionError, TransactionAborted)

add = operation(insert)
SWALLOWS = 13


@operation
async def item(conn: Any, n: int) -> int:
    """Insert; 13 swallows an error of the server's instead."""
    if n == SWALLOWS:
        with contextlib.suppress(asyncpg.PostgresError):
            await raising("22012")(conn)
    else:
        await insert(conn, n)
    return n


async def nested(conn: Any) -> None:
    await savepoint(add(2))(conn)
    await savepoint(item(SWALLOWS))(conn)


async def as_the_last_of_two(conn: Any) -> None:
    await add(2)(conn)
    await item(SWALLOWS)(conn)


def of_a_batch(*items: int) -> Callable[[], Operation[Any]]:
    return lambda: batch(each(item))(items)


INSIDE: dict[str, Callable[[], Any]] = {
    "alone": lambda: item(SWALLOWS),
    "in a savepoint": lambda: savepoint(item(SWALLOWS)),
    "in two savepoints": lambda: savepoint(savepoint(item(SWALLOWS))),
    "in a retry": lambda: retry(QUICK)(item(SWALLOWS)),
    "in all": lambda: pipe(item(SWALLOWS), savepoint, timeout(5), retry(QUICK), savepoint),
    "in a savepoint after another": lambda: nested,
    "after other work": lambda: as_the_last_of_two,
    "as the only item": of_a_batch(SWALLOWS),
    "as the last item": of_a_batch(2, 3, SWALLOWS),
    "as the first item": of_a_batch(SWALLOWS, 2),
    "in the middle of the items": of_a_batch(2, SWALLOWS, 3),
    "as the last item after a bad one": of_a_batch(2, 1, 3, SWALLOWS),
    "as the last of many items": of_a_batch(*range(20, 98), 1, *range(110, 140), SWALLOWS),
}
PLACES = pytest.mark.parametrize("inside", INSIDE)


@PLACES
@pytest.mark.parametrize("depth", [1, 2])
async def test_what_swallowed_an_error_inside_a_savepoint_is_undone_and_the_transaction_goes_on(
    depth: int, inside: str, single: asyncpg.Pool
) -> None:
    async def body(conn: Any) -> None:
        await insert(conn, 1)
        op = INSIDE[inside]()
        for _ in range(depth):
            op = savepoint(op)
        with pytest.raises(NOTICED):
            await op(conn)
        await insert(conn, 100)
        await savepoint(add(101))(conn)
        with pytest.raises(asyncpg.UniqueViolationError):
            await savepoint(add(1))(conn)
        await insert(conn, 102)

    await Engine(single).run(body)
    assert await rows(single) == [1, 100, 101, 102]


@PLACES
async def test_the_same_in_a_transaction_of_plain_code(inside: str, single: asyncpg.Pool) -> None:
    async with Engine(single).transaction() as conn:
        await insert(conn, 1)
        with pytest.raises(NOTICED):
            await savepoint(INSIDE[inside]())(conn)
        await insert(conn, 100)
    assert await rows(single) == [1, 100]


@PLACES
async def test_what_swallowed_an_error_without_a_savepoint_around_is_never_committed_in_part(
    inside: str, single: asyncpg.Pool
) -> None:
    engine = Engine(single)
    with pytest.raises(NOTICED):
        await engine.run(_then(add(1), INSIDE[inside]()))
    assert await rows(single) == []
    assert await engine.run(add(1)) == 1
    assert engine.stats().evicted == 0


def _then(*ops: Any) -> Callable[[Any], Any]:
    async def one_after_another(conn: Any) -> None:
        for op in ops:
            await op(conn)

    return one_after_another
