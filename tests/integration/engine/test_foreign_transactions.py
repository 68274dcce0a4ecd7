"""`savepoint`, `retry` and `timeout` in a transaction that the user began himself, with `conn.transaction()`.

Whether there is a transaction is asked when it matters, not when the scope around was made.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest

from dbop_raw import (
    Engine,
    OperationTimeout,
    RetriesExhausted,
    RetryPolicy,
    batch,
    each,
    operation,
    pipe,
    retry,
    savepoint,
    timeout,
)
from tests.support.bodies import insert, rows, sleep
from tests.support.failures import raising
from tests.support.policies import QUICK

pytestmark = pytest.mark.anyio

Body = Callable[[Any], Awaitable[Any]]

add = operation(insert)


# --- three places where the user begins a transaction himself


async def under_autocommit(pool: asyncpg.Pool, body: Body) -> None:
    async def begins_one(conn: Any) -> None:
        async with conn.transaction():
            await body(conn)

    await Engine(pool).run(begins_one, autocommit=True)


async def on_a_plain_connection(pool: asyncpg.Pool, body: Body) -> None:
    async with pool.acquire() as conn, conn.transaction():
        await body(conn)


async def in_an_operation_on_a_plain_connection(pool: asyncpg.Pool, body: Body) -> None:
    @operation
    async def begins_one(conn: Any) -> None:
        async with conn.transaction():
            await body(conn)

    async with pool.acquire() as conn:
        await begins_one()(conn)


PLACES = pytest.mark.parametrize(
    "place",
    [under_autocommit, on_a_plain_connection, in_an_operation_on_a_plain_connection],
    ids=lambda place: place.__name__,
)
Place = Callable[[asyncpg.Pool, Body], Awaitable[None]]


@PLACES
async def test_a_savepoint_undoes_its_own_work_and_the_rest_of_the_transaction_stays(
    place: Place, single: asyncpg.Pool
) -> None:
    async def body(conn: Any) -> None:
        await insert(conn, 1)
        with pytest.raises(asyncpg.UniqueViolationError):
            await savepoint(_then(add(2), add(1)))(conn)
        await savepoint(add(3))(conn)

    await place(single, body)
    assert await rows(single) == [1, 3]


def _then(*bodies: Body) -> Body:
    async def one_after_another(conn: Any) -> None:
        for body in bodies:
            await body(conn)

    return one_after_another


@PLACES
async def test_a_savepoint_of_a_body_that_fails_by_itself_undoes_what_it_wrote(
    place: Place, single: asyncpg.Pool
) -> None:
    """No statement failed, so without a savepoint its rows would be kept, and nobody told."""

    async def writes_then_fails(conn: Any) -> None:
        await insert(conn, 2)
        raise LookupError

    async def body(conn: Any) -> None:
        await insert(conn, 1)
        with contextlib.suppress(LookupError):
            await savepoint(writes_then_fails)(conn)

    await place(single, body)
    assert await rows(single) == [1]


@PLACES
async def test_a_retry_begins_again_from_a_savepoint(place: Place, single: asyncpg.Pool) -> None:
    starts: list[int] = []

    async def finds_a_lock_once(conn: Any) -> None:
        starts.append(1)
        await insert(conn, 2)
        if len(starts) == 1:
            await raising("55P03")(conn)

    async def body(conn: Any) -> None:
        await insert(conn, 1)
        await pipe(finds_a_lock_once, retry(QUICK))(conn)

    await place(single, body)
    assert len(starts) == 2
    assert await rows(single) == [1, 2]


@PLACES
async def test_a_retry_that_gives_up_leaves_the_transaction_usable(
    place: Place, single: asyncpg.Pool
) -> None:
    async def body(conn: Any) -> None:
        await insert(conn, 1)
        with pytest.raises(RetriesExhausted):
            await pipe(_then(add(2), raising("55P03")), retry(QUICK))(conn)
        await insert(conn, 3)

    await place(single, body)
    assert await rows(single) == [1, 3]


@PLACES
async def test_what_needs_a_new_transaction_is_raised_to_who_began_this_one(
    place: Place, single: asyncpg.Pool
) -> None:
    """40001 can't be repaired from a savepoint, and the transaction is not ours to begin again."""
    starts: list[int] = []

    async def conflicts(conn: Any) -> None:
        starts.append(1)
        await raising("40001")(conn)

    with pytest.raises(asyncpg.SerializationError):
        await place(single, pipe(conflicts, retry(QUICK)))
    assert len(starts) == 1
    assert await rows(single) == []


async def limit(conn: Any) -> int:
    """Milliseconds; PostgreSQL writes whole seconds as such, and 0 without a unit."""
    found: int = await conn.fetchval(
        "SELECT setting::integer FROM pg_settings WHERE name = 'statement_timeout'"
    )
    return found


@PLACES
async def test_a_timeout_is_told_to_the_server_and_taken_back(place: Place, single: asyncpg.Pool) -> None:
    told: list[int] = []

    async def body(conn: Any) -> None:
        told.append(await limit(conn))
        told.append(await pipe(limit, timeout(7))(conn))
        told.append(await limit(conn))

    await place(single, body)
    before, within, after = told
    assert (before, after) == (0, 0)
    assert 0 < within < 7000


@PLACES
async def test_a_timeout_that_runs_out_is_kept_by_the_server_and_costs_no_connection(
    place: Place, single: asyncpg.Pool
) -> None:
    pids: list[int] = []

    async def body(conn: Any) -> None:
        pids.append(conn.get_server_pid())
        await insert(conn, 1)
        with pytest.raises(OperationTimeout) as caught:
            await pipe(sleep, savepoint, timeout(0.3))(conn)
        assert (caught.value.seconds, caught.value.by_server) == (0.3, True)
        await insert(conn, 2)

    await place(single, body)
    assert await rows(single) == [1, 2]
    assert await single.fetchval("SELECT pg_backend_pid()") == pids[0]


@PLACES
async def test_a_batch_sets_bad_items_aside(place: Place, single: asyncpg.Pool) -> None:
    failed: list[int] = []

    async def body(conn: Any) -> None:
        result = await batch(each(add))([1, 2, 1, 3])(conn)
        failed.extend(one.index for one in result.failed)

    await place(single, body)
    assert failed == [2]
    assert await rows(single) == [1, 2, 3]


# --- before, within and after it


async def test_scopes_follow_a_transaction_that_comes_and_goes(single: asyncpg.Pool) -> None:
    """Outside of it no savepoint is sent, for there is nothing that it could be in (25P01)."""

    async def tries_then_fails(conn: Any, n: int) -> None:
        await insert(conn, n)
        raise LookupError

    async def body(conn: Any) -> None:
        attempt = functools.partial(_suppressed, tries_then_fails)
        await attempt(conn, 1)  # each statement is its own: it stays
        async with conn.transaction():
            await insert(conn, 2)
            await attempt(conn, 3)
        await attempt(conn, 4)
        async with conn.transaction():
            await attempt(conn, 5)
            await savepoint(add(6))(conn)
            async with conn.transaction():
                await attempt(conn, 7)
                await savepoint(add(8))(conn)

    async def _suppressed(function: Any, conn: Any, n: int) -> None:
        with contextlib.suppress(LookupError):
            await savepoint(functools.partial(function, n=n))(conn)

    await Engine(single).run(body, autocommit=True)
    assert await rows(single) == [1, 2, 4, 6, 8]


async def test_a_transaction_begun_within_a_wrapped_operation_is_left_to_who_began_it(
    single: asyncpg.Pool,
) -> None:
    """The wrapper came first, without a transaction: its savepoint is none, inside or after."""

    async def begins_one(conn: Any) -> None:
        async with conn.transaction():
            await insert(conn, 1)
            await savepoint(add(2))(conn)
        await insert(conn, 3)

    policy = RetryPolicy(attempts=2, first_delay=0.001)
    await Engine(single).run(pipe(begins_one, savepoint, timeout(5), retry(policy)), autocommit=True)
    assert await rows(single) == [1, 2, 3]
