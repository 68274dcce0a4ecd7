"""`engine.transaction()` entered in one task and left in another: fixtures and async generators do that.

asyncpg's own `conn.transaction()` works there. A generator that is left early is closed by whoever comes: the
event loop, in a task of its own, or the collector.
"""

# ruff: noqa: ASYNC110 - what the server has done, only asking again can tell

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator, Awaitable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import Engine, OperationTimeout, TransactionMisuse, operation, savepoint, timeout
from tests.support.bodies import insert, rows

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

add = operation(insert)

DEADLINES = pytest.mark.parametrize("deadline", [None, 30.0], ids=["no deadline", "deadline"])


async def in_a_task_of_its_own(work: Coroutine[Any, Any, Any]) -> Any:
    async with asyncio.timeout(10):
        return await asyncio.create_task(work)


async def nothing_is_left(engine: Engine, single: asyncpg.Pool, other: asyncpg.Connection) -> None:
    """No connection is held, no transaction is open, no lock is kept."""
    async with asyncio.timeout(10):
        while engine.stats().in_use or single.get_size() != single.get_idle_size():
            await asyncio.sleep(0.002)
        while await other.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid() AND xact_start IS NOT NULL AND backend_type = 'client backend'"
        ):
            await asyncio.sleep(0.002)
        assert await engine.fetchval("SELECT 7") == 7


async def entered(transaction: AbstractAsyncContextManager[Any]) -> Any:
    return await transaction.__aenter__()


async def left(transaction: AbstractAsyncContextManager[Any], error: BaseException | None = None) -> Any:
    return await transaction.__aexit__(type(error) if error else None, error, None)


@DEADLINES
async def test_a_transaction_left_in_another_task_commits(
    deadline: float | None, single: asyncpg.Pool, other: asyncpg.Connection
) -> None:
    engine = Engine(single)
    transaction = engine.transaction(deadline=deadline)
    conn = await in_a_task_of_its_own(entered(transaction))
    await insert(conn)
    await add(2)(conn)
    await in_a_task_of_its_own(savepoint(add(3))(conn))
    await in_a_task_of_its_own(left(transaction))
    assert await rows(single) == [1, 2, 3]
    await nothing_is_left(engine, single, other)


@DEADLINES
async def test_a_transaction_left_in_another_task_with_an_error_rolls_back(
    deadline: float | None, single: asyncpg.Pool, other: asyncpg.Connection
) -> None:
    engine = Engine(single)
    transaction = engine.transaction(deadline=deadline)
    conn = await in_a_task_of_its_own(entered(transaction))
    await insert(conn)
    error = LookupError("of the block")
    with pytest.raises(LookupError) as caught:  # noqa: PT012 - raised by one line or the other
        if not await in_a_task_of_its_own(left(transaction, error)):
            raise error
    assert caught.value is error
    assert await rows(single) == []
    await nothing_is_left(engine, single, other)


@DEADLINES
async def test_a_transaction_left_in_another_task_is_still_checked_for_misuse(
    deadline: float | None, single: asyncpg.Pool, other: asyncpg.Connection
) -> None:
    engine = Engine(single)
    transaction = engine.transaction(deadline=deadline)
    conn = await in_a_task_of_its_own(entered(transaction))
    await conn.execute("ROLLBACK")
    with pytest.raises(TransactionMisuse):
        await in_a_task_of_its_own(left(transaction))
    await nothing_is_left(engine, single, other)


async def test_a_transaction_entered_and_left_by_a_task_group_neighbour_is_cancelled_by_its_own_task_only(
    single: asyncpg.Pool, other: asyncpg.Connection
) -> None:
    """A cancel scope of anyio's around the task that entered ends that task; the transaction goes on."""
    engine = Engine(single)
    transaction = engine.transaction()
    held: list[Any] = []

    async def enter_and_wait() -> None:
        held.append(await transaction.__aenter__())
        await asyncio.sleep(60)

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(enter_and_wait)
            while not held:
                await anyio.sleep(0.002)
            group.cancel_scope.cancel()
    await insert(held[0])
    await in_a_task_of_its_own(left(transaction))
    assert await rows(single) == [1]
    await nothing_is_left(engine, single, other)


# --- a generator that is left early


async def numbers(engine: Engine, deadline: float | None) -> AsyncGenerator[int]:
    """Give what is read, within a transaction that has locked a row."""
    async with engine.transaction(deadline=deadline) as conn:
        await conn.execute("SELECT n FROM t WHERE n = 1 FOR UPDATE")
        await insert(conn, 100)
        for n in range(10):
            yield n


async def lock_is_free(other: asyncpg.Connection) -> None:
    """The row can be had: the transaction that locked it is over."""
    async with asyncio.timeout(10):
        while True:
            try:
                await other.execute("SELECT n FROM t WHERE n = 1 FOR UPDATE NOWAIT")
            except asyncpg.LockNotAvailableError:
                await asyncio.sleep(0.005)
            else:
                return


@DEADLINES
async def test_a_generator_closed_in_another_task_gives_everything_back(
    deadline: float | None, single: asyncpg.Pool, other: asyncpg.Connection
) -> None:
    await other.execute("INSERT INTO t VALUES (1)")
    engine = Engine(single)
    generator = numbers(engine, deadline)
    assert await in_a_task_of_its_own(anext_of(generator)) == 0
    assert await anext(generator) == 1
    await in_a_task_of_its_own(closed(generator))
    await lock_is_free(other)
    await nothing_is_left(engine, single, other)
    assert await rows(single) == [1]


async def anext_of(generator: AsyncGenerator[int]) -> int:
    return await anext(generator)


async def closed(generator: AsyncGenerator[int]) -> None:
    await generator.aclose()


@DEADLINES
async def test_a_generator_that_is_left_early_and_forgotten_gives_everything_back(
    deadline: float | None, single: asyncpg.Pool, other: asyncpg.Connection
) -> None:
    """The event loop closes it in a task of its own, as soon as nobody has it any more."""
    await other.execute("INSERT INTO t VALUES (1)")
    engine = Engine(single)

    async def leave_early() -> int | None:
        async for n in numbers(engine, deadline):
            if n == 3:
                return n
        return None

    with anyio.fail_after(10):
        assert await leave_early() == 3
        gc.collect()
        await lock_is_free(other)
    await nothing_is_left(engine, single, other)
    assert await rows(single) == [1]


# --- a deadline belongs to the transaction, and to no task


async def goes_on(seconds: float, then: Awaitable[None] | None = None) -> str:
    """Work of a task that only opened the transaction: nobody may cancel it."""
    await asyncio.sleep(seconds)
    if then is not None:
        await then
    return "went on"


async def test_the_deadline_of_a_transaction_left_in_another_task_cancels_nobody_later(
    single: asyncpg.Pool, other: asyncpg.Connection
) -> None:
    engine = Engine(single)
    transaction = engine.transaction(deadline=0.3)
    entering = asyncio.Event()

    async def innocent() -> str:
        await transaction.__aenter__()
        entering.set()
        return await goes_on(0.8)

    task = asyncio.create_task(innocent())
    async with asyncio.timeout(10):
        await entering.wait()
        await in_a_task_of_its_own(left(transaction))
        assert await task == "went on"
    await nothing_is_left(engine, single, other)


async def test_the_deadline_of_a_generator_left_early_cancels_no_innocent_task_and_ends_the_transaction(
    single: asyncpg.Pool, other: asyncpg.Connection
) -> None:
    """The one who read from it goes on to other work, and still has the generator somewhere."""
    await other.execute("INSERT INTO t VALUES (1)")
    engine = Engine(single)
    generator = numbers(engine, 0.3)

    async def reads_one_and_goes_on() -> str:
        assert await anext(generator) == 0
        return await goes_on(0.5, lock_is_free(other))

    async with asyncio.timeout(10):
        assert await asyncio.create_task(reads_one_and_goes_on()) == "went on"
        with pytest.raises(OperationTimeout) as caught:
            # Up to its end: the deadline was over before.
            async for _ in generator:
                pass
    assert (caught.value.seconds, caught.value.by_server) == (0.3, False)
    await nothing_is_left(engine, single, other)
    assert await rows(single) == [1]


async def test_the_deadline_of_a_transaction_ends_its_statement_in_whatever_task(
    single: asyncpg.Pool, other: asyncpg.Connection
) -> None:
    engine = Engine(single)
    transaction = engine.transaction(deadline=0.3)
    conn = await in_a_task_of_its_own(entered(transaction))

    async def sleeps() -> None:
        with pytest.raises(OperationTimeout) as caught:  # noqa: PT012 - the block is what is tested
            try:
                await conn.execute("SELECT pg_sleep(30)")
            except BaseException as exc:
                if not await left(transaction, exc):
                    raise
        assert caught.value.seconds == 0.3

    await in_a_task_of_its_own(sleeps())
    await nothing_is_left(engine, single, other)
    assert engine.stats().evicted == 0


async def test_a_timeout_within_such_a_transaction_is_the_callers_own(
    single: asyncpg.Pool, other: asyncpg.Connection
) -> None:
    engine = Engine(single)
    transaction = engine.transaction(deadline=30)
    conn = await in_a_task_of_its_own(entered(transaction))
    with pytest.raises(OperationTimeout) as caught:
        await timeout(0.2)(lambda conn: conn.execute("SELECT pg_sleep(30)"))(conn)
    assert (caught.value.seconds, caught.value.by_server) == (0.2, True)
    await in_a_task_of_its_own(left(transaction, caught.value))
    await nothing_is_left(engine, single, other)
