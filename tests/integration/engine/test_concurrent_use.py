"""One connection belongs to one task at a time: two that open scopes on it at once are told, not mixed up.

ROLLBACK TO undoes what came after its savepoint, whoever did it, and keeps what came before: with two tasks
between each other's savepoints, the wrong rows stay.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import (
    Engine,
    OperationTimeout,
    TransactionMisuse,
    batch,
    each,
    operation,
    pipe,
    retry,
    savepoint,
    timeout,
)
from tests.support.bodies import insert, rows
from tests.support.policies import QUICK

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

Body = Callable[[Any], Awaitable[Any]]

add = operation(insert)


# --- four places where a body has the connection


async def in_a_transaction(pool: asyncpg.Pool, body: Body) -> None:
    async with Engine(pool).transaction() as conn:
        await body(conn)


async def in_a_run(pool: asyncpg.Pool, body: Body) -> None:
    await Engine(pool).run(body)


async def in_the_users_own_transaction(pool: asyncpg.Pool, body: Body) -> None:
    async with pool.acquire() as conn, conn.transaction():
        await body(conn)


async def under_autocommit(pool: asyncpg.Pool, body: Body) -> None:
    async def begins_one(conn: Any) -> None:
        async with conn.transaction():
            await body(conn)

    await Engine(pool).run(begins_one, autocommit=True)


Place = Callable[[asyncpg.Pool, Body], Awaitable[None]]
PLACES = pytest.mark.parametrize(
    "place",
    [in_a_transaction, in_a_run, in_the_users_own_transaction, under_autocommit],
    ids=lambda place: place.__name__,
)

WRAPPERS: dict[str, Callable[[Body], Any]] = {
    "savepoint": savepoint,
    "retry": retry(QUICK),
    "timeout": timeout(10),
    "no wrapper": lambda body: operation(body)(),
    "savepoint in timeout": lambda body: pipe(body, savepoint, timeout(10)),
}
SCOPES = pytest.mark.parametrize("wrapper", WRAPPERS)


class Paused:
    """A body that inserts, and goes on when it is told to."""

    def __init__(self, n: int, error: Exception | None = None) -> None:
        self.n, self.error = n, error
        self.is_there, self.may_go_on = asyncio.Event(), asyncio.Event()

    async def __call__(self, conn: Any) -> None:
        await insert(conn, self.n)
        self.is_there.set()
        await self.may_go_on.wait()
        if self.error is not None:
            raise self.error


@contextlib.asynccontextmanager
async def open_in_another_task(conn: Any, wrapped: Any, paused: Paused) -> AsyncIterator[asyncio.Task[Any]]:
    """Within the block, another task has a scope open on the connection; at its end, that goes on."""
    async with asyncio.timeout(10):
        task = asyncio.create_task(wrapped(conn))
        await paused.is_there.wait()
        try:
            yield task
        finally:
            paused.may_go_on.set()
            await asyncio.wait({task})


@PLACES
@SCOPES
async def test_a_second_task_that_opens_a_scope_is_misuse_and_the_first_is_not_disturbed(
    wrapper: str, place: Place, single: asyncpg.Pool
) -> None:
    async def body(conn: Any) -> None:
        paused = Paused(1)
        async with open_in_another_task(conn, WRAPPERS[wrapper](paused), paused) as first:
            with pytest.raises(TransactionMisuse, match="task"):
                await savepoint(add(2))(conn)
        first.result()
        await savepoint(add(3))(conn)

    await place(single, body)
    assert await rows(single) == [1, 3]


@PLACES
@SCOPES
async def test_a_second_tasks_scope_of_any_kind_is_misuse(
    wrapper: str, place: Place, single: asyncpg.Pool
) -> None:
    async def second(conn: Any) -> None:
        await insert(conn, 2)

    async def body(conn: Any) -> None:
        paused = Paused(1)
        async with open_in_another_task(conn, savepoint(paused), paused) as first:
            with pytest.raises(TransactionMisuse):
                await WRAPPERS[wrapper](second)(conn)
        first.result()

    await place(single, body)
    assert await rows(single) == [1]


@PLACES
async def test_a_first_task_that_fails_takes_nobody_elses_rows_along(
    place: Place, single: asyncpg.Pool
) -> None:
    """With the second's row written, ROLLBACK TO would have undone it, and the second would not know."""

    async def body(conn: Any) -> None:
        paused = Paused(1, LookupError("of the first"))
        async with open_in_another_task(conn, savepoint(paused), paused) as first:
            with pytest.raises(TransactionMisuse):
                await savepoint(add(2))(conn)
        assert isinstance(first.exception(), LookupError)
        await savepoint(add(2))(conn)

    await place(single, body)
    assert await rows(single) == [2]


@PLACES
async def test_a_batch_in_a_second_task_is_misuse(place: Place, single: asyncpg.Pool) -> None:
    async def body(conn: Any) -> None:
        paused = Paused(1)
        async with open_in_another_task(conn, savepoint(paused), paused) as first:
            with pytest.raises(TransactionMisuse):
                await batch(each(add))([2, 3])(conn)
        first.result()

    await place(single, body)
    assert await rows(single) == [1]


async def test_of_two_children_of_a_task_group_one_is_told(single: asyncpg.Pool) -> None:
    """The mistake as people make it: a task group around calls that share a connection."""
    met = asyncio.Barrier(2)

    async def item(conn: Any, n: int) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await met.wait()
        await insert(conn, n)
        if n == 1:
            raise LookupError("of the first")

    async def one(conn: Any, n: int) -> None:
        with contextlib.suppress(LookupError):
            await savepoint(operation(item)(n))(conn)

    with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012 - the block is what is tested
        async with Engine(single).transaction() as conn, anyio.create_task_group() as group:
            group.start_soon(one, conn, 1)
            group.start_soon(one, conn, 2)
    assert caught.group_contains(TransactionMisuse)
    assert await rows(single) == []


# --- what is no misuse


@PLACES
async def test_one_task_after_the_other_is_no_misuse(place: Place, single: asyncpg.Pool) -> None:
    """`asyncio.wait_for` has a task of its own in Python 3.11, and so has a fixture."""

    async def body(conn: Any) -> None:
        await asyncio.wait_for(savepoint(add(1))(conn), 10)
        await asyncio.create_task(pipe(add(2), timeout(5), retry(QUICK))(conn))
        async with anyio.create_task_group() as group:
            group.start_soon(savepoint(add(3)), conn)
        await savepoint(add(4))(conn)

    await place(single, body)
    assert await rows(single) == [1, 2, 3, 4]


@PLACES
async def test_scopes_within_scopes_of_one_task_are_no_misuse(place: Place, single: asyncpg.Pool) -> None:
    async def inner(conn: Any) -> None:
        await insert(conn, 1)
        await pipe(add(2), savepoint, timeout(5))(conn)

    await place(single, pipe(inner, savepoint, retry(QUICK), timeout(10)))
    assert await rows(single) == [1, 2]


@PLACES
async def test_a_task_whose_scope_failed_or_was_cancelled_has_it_no_more(
    place: Place, single: asyncpg.Pool
) -> None:
    async def body(conn: Any) -> None:
        failing = Paused(1, LookupError())
        async with open_in_another_task(conn, savepoint(failing), failing) as first:
            pass
        assert isinstance(first.exception(), LookupError)
        paused = Paused(2)
        async with open_in_another_task(conn, savepoint(paused), paused) as second:
            second.cancel()
        assert second.cancelled()
        with pytest.raises(OperationTimeout):
            await asyncio.create_task(pipe(Paused(3), savepoint, timeout(0.2))(conn))
        await savepoint(add(4))(conn)

    await place(single, body)
    assert await rows(single) == [4]


async def test_two_connections_are_nobodys_business(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    async with engine.transaction() as one, engine.transaction() as other:
        paused = Paused(1)
        async with open_in_another_task(one, savepoint(paused), paused) as first:
            await savepoint(add(2))(other)
        first.result()
    assert await rows(pool) == [1, 2]


# --- tasks that outlive the operation that started them


class Later:
    """An operation whose body starts a task, which calls an operation itself when it may."""

    def __init__(self) -> None:
        self.may_go = asyncio.Event()
        self.task: asyncio.Task[Any] | None = None

    async def __call__(self, conn: Any) -> None:
        self.task = asyncio.create_task(self._insert(conn))
        await asyncio.sleep(0)

    async def _insert(self, conn: Any) -> None:
        await self.may_go.wait()
        await savepoint(add(1))(conn)

    async def go(self) -> None:
        self.may_go.set()
        assert self.task is not None
        async with asyncio.timeout(10):
            await self.task


@PLACES
@SCOPES
async def test_a_task_may_call_operations_after_the_one_that_started_it(
    wrapper: str, place: Place, single: asyncpg.Pool
) -> None:
    """Its context still has that operation, which is done: nobody else is at work on the connection."""

    async def body(conn: Any) -> None:
        later = Later()
        await WRAPPERS[wrapper](later)(conn)
        await later.go()

    await place(single, body)
    assert await rows(single) == [1]


@PLACES
async def test_such_a_task_is_misuse_while_another_operation_is_at_work(
    place: Place, single: asyncpg.Pool
) -> None:
    async def body(conn: Any) -> None:
        later = Later()
        await savepoint(later)(conn)
        paused = Paused(2)
        async with open_in_another_task(conn, savepoint(paused), paused) as first:
            with pytest.raises(TransactionMisuse):
                await later.go()
        first.result()

    await place(single, body)
    assert await rows(single) == [2]
