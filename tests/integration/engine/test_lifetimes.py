"""What a call leaves behind in memory: nothing, and nothing that only the collector finds."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import (
    AcquireTimeout,
    CommitUnknown,
    Engine,
    OperationTimeout,
    RetriesExhausted,
    RollbackFailed,
    TransactionAborted,
    batch,
    each,
    operation,
    pipe,
    retry,
    savepoint,
    timeout,
)
from dbop_raw.testing import Fault, Server, query
from tests.support.bodies import insert, sleep
from tests.support.failures import raising
from tests.support.policies import QUICK
from tests.support.pools import behind
from tests.support.protocol import answer_to_commit

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed now, is freed by its last reference."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Large:
    """An argument that one would like to be rid of: a picture, a thousand rows."""


# --- the arguments of a run that failed


async def its_own_error(conn: Any) -> None:
    await conn.fetchval("SELECT 1")
    raise LookupError("of the body")


async def servers_error(conn: Any) -> None:
    await raising("23505")(conn)


async def conflict(conn: Any) -> None:
    await raising("40001")(conn)


async def locked(conn: Any) -> None:
    await raising("55P03")(conn)


async def waits_elsewhere(conn: Any) -> None:
    await conn.fetchval("SELECT 1")
    await asyncio.sleep(60)


async def swallows(conn: Any) -> None:
    with contextlib.suppress(asyncpg.PostgresError):
        await servers_error(conn)


async def well(conn: Any) -> None:
    await conn.fetchval("SELECT 1")


Body = Callable[[Any], Awaitable[None]]
Wrap = Callable[[Any], Any]

FAILURES: dict[str, tuple[Body, Wrap, dict[str, Any], type[BaseException] | None]] = {
    "done": (well, lambda op: op, {}, None),
    "its own error": (its_own_error, lambda op: op, {}, LookupError),
    "the server's error": (servers_error, lambda op: op, {}, asyncpg.UniqueViolationError),
    "a savepoint's error": (servers_error, savepoint, {}, asyncpg.UniqueViolationError),
    "an error under autocommit": (servers_error, retry(QUICK), {"autocommit": True}, asyncpg.PostgresError),
    "retries exhausted": (conflict, lambda op: op, {"retry": QUICK}, RetriesExhausted),
    "retries exhausted at a savepoint": (locked, retry(QUICK), {}, RetriesExhausted),
    "a timeout by the server": (sleep, timeout(0.2), {}, OperationTimeout),
    "a timeout by the client": (waits_elsewhere, timeout(0.1), {}, OperationTimeout),
    "a deadline by the server": (sleep, lambda op: op, {"deadline": 0.2}, OperationTimeout),
    "a deadline by the client": (waits_elsewhere, lambda op: op, {"deadline": 0.1}, OperationTimeout),
    "aborted": (swallows, lambda op: op, {}, TransactionAborted),
}


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("how", FAILURES)
async def test_a_run_that_failed_does_not_keep_its_arguments_alive(how: str, single: asyncpg.Pool) -> None:
    body, wrap, options, error = FAILURES[how]
    engine = Engine(single)

    async def fails() -> weakref.ref[Large]:
        argument = Large()

        @operation
        async def op(conn: Any, argument: Large) -> None:
            assert isinstance(argument, Large)
            await body(conn)

        call = engine.run(wrap(op(argument)), **options)
        if error is None:
            await call
        else:
            with contextlib.suppress(error):
                await call
                pytest.fail("it did not fail")
        return weakref.ref(argument)

    reference = await fails()
    await anyio.lowlevel.checkpoint()
    assert reference() is None


@pytest.mark.usefixtures("no_collector")
async def test_a_run_that_got_no_connection_does_not_keep_its_arguments_alive(single: asyncpg.Pool) -> None:
    engine = Engine(single, acquire_timeout=0.05)

    async def fails() -> weakref.ref[Large]:
        argument = Large()

        @operation
        async def op(conn: Any, argument: Large) -> None:
            await conn.execute("SELECT 1", argument)

        with contextlib.suppress(AcquireTimeout):
            await engine.run(op(argument))
            pytest.fail("it did not fail")
        return weakref.ref(argument)

    async with single.acquire():
        reference = await fails()
        await anyio.lowlevel.checkpoint()
        assert reference() is None


@pytest.mark.usefixtures("no_collector")
async def test_a_run_in_doubt_does_not_keep_its_arguments_alive(dsn: str, postgres_server: Server) -> None:
    async with behind(postgres_server, dsn) as (proxy, pool):
        proxy.inject(Fault("reset", when=answer_to_commit))
        engine = Engine(pool)

        async def fails() -> weakref.ref[Large]:
            argument = Large()

            @operation
            async def op(conn: Any, argument: Large) -> None:
                assert isinstance(argument, Large)
                await insert(conn)

            with contextlib.suppress(CommitUnknown):
                await engine.run(op(argument))
                pytest.fail("it did not fail")
            return weakref.ref(argument)

        reference = await fails()
        await anyio.lowlevel.checkpoint()
        assert reference() is None


@pytest.mark.usefixtures("no_collector")
async def test_a_run_that_was_cancelled_does_not_keep_its_arguments_alive(single: asyncpg.Pool) -> None:
    engine = Engine(single)

    async def fails() -> weakref.ref[Large]:
        argument = Large()

        @operation
        async def op(conn: Any, argument: Large) -> None:
            assert isinstance(argument, Large)
            await sleep(conn)

        with anyio.move_on_after(0.1) as scope:
            await engine.run(op(argument))
        assert scope.cancelled_caught
        return weakref.ref(argument)

    reference = await fails()
    await anyio.lowlevel.checkpoint()
    assert reference() is None


class NotThere:
    """Connects, till it does not."""

    def __init__(self) -> None:
        self.refuses = False

    async def __call__(self, *args: Any, **kwargs: Any) -> asyncpg.Connection:
        if self.refuses:
            raise ConnectionRefusedError("of the test")
        return await asyncpg.connect(*args, **kwargs)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("used_before", [False, True])
async def test_a_run_that_could_not_connect_does_not_keep_its_arguments_alive(
    used_before: bool, dsn: str
) -> None:
    """Whether it asks the pool itself, for a connection that has been there, or waits in line."""
    connect = NotThere()
    async with asyncpg.create_pool(dsn, min_size=0, max_size=1, connect=connect) as pool:
        engine = Engine(pool)
        if used_before:
            await engine.run(well)
        connect.refuses = True
        async with pool.acquire() if used_before else contextlib.nullcontext() as conn:
            if conn is not None:
                conn.terminate()

        async def fails() -> weakref.ref[Large]:
            argument = Large()

            @operation
            async def op(conn: Any, argument: Large) -> None:
                await conn.execute("SELECT 1", argument)

            with contextlib.suppress(ConnectionRefusedError):
                await engine.run(op(argument))
                pytest.fail("it did not fail")
            return weakref.ref(argument)

        reference = await fails()
        await anyio.lowlevel.checkpoint()
        assert reference() is None


@pytest.mark.usefixtures("no_collector")
async def test_a_run_cancelled_at_its_commit_does_not_keep_its_arguments_alive(
    dsn: str, postgres_server: Server
) -> None:
    async with behind(postgres_server, dsn) as (proxy, pool):
        late = proxy.inject(Fault("delay", when=answer_to_commit, seconds=0.1))
        engine = Engine(pool)

        async def fails() -> weakref.ref[Large]:
            argument = Large()

            @operation
            async def op(conn: Any, argument: Large) -> None:
                assert isinstance(argument, Large)
                await insert(conn)

            task = asyncio.create_task(engine.run(op(argument)))
            await late.wait()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
                pytest.fail("it was not cancelled")
            return weakref.ref(argument)

        reference = await fails()
        await anyio.lowlevel.checkpoint()
        assert reference() is None
        assert engine.stats().commits == 1


@pytest.mark.usefixtures("no_collector")
async def test_a_run_whose_rollback_failed_does_not_keep_its_arguments_alive(
    dsn: str, postgres_server: Server
) -> None:
    async with behind(postgres_server, dsn) as (proxy, pool):
        proxy.inject(Fault("reset", when=query("ROLLBACK")))
        engine = Engine(pool)

        async def fails() -> weakref.ref[Large]:
            argument = Large()

            @operation
            async def op(conn: Any, argument: Large) -> None:
                assert isinstance(argument, Large)
                await its_own_error(conn)

            with contextlib.suppress(RollbackFailed):
                await engine.run(op(argument))
                pytest.fail("it did not fail")
            return weakref.ref(argument)

        reference = await fails()
        await anyio.lowlevel.checkpoint()
        assert reference() is None


@pytest.mark.usefixtures("no_collector")
async def test_a_transaction_that_failed_does_not_keep_what_its_block_held(single: asyncpg.Pool) -> None:
    engine = Engine(single)

    async def fails() -> weakref.ref[Large]:
        argument = Large()
        with contextlib.suppress(asyncpg.UniqueViolationError):
            async with engine.transaction() as conn:
                assert isinstance(argument, Large)
                await servers_error(conn)
        return weakref.ref(argument)

    reference = await fails()
    await anyio.lowlevel.checkpoint()
    assert reference() is None


@pytest.mark.usefixtures("no_collector")
async def test_asyncpg_alone_does_not_keep_them_either(single: asyncpg.Pool) -> None:
    """Guards the tests above: what they ask for can be had."""

    async def fails() -> weakref.ref[Large]:
        argument = Large()

        async def work(argument: Large) -> None:
            assert isinstance(argument, Large)
            async with single.acquire() as conn, conn.transaction():
                await servers_error(conn)

        with contextlib.suppress(asyncpg.UniqueViolationError):
            await work(argument)
        return weakref.ref(argument)

    reference = await fails()
    await anyio.lowlevel.checkpoint()
    assert reference() is None


# --- scopes


def ours() -> int:
    """How many objects of our classes there are: a scope that is remembered is one of them."""
    gc.collect()
    return sum(str(type(each).__module__).startswith("dbop_raw.") for each in gc.get_objects())


async def every_kind_of_call(engine: Engine, pool: asyncpg.Pool) -> None:
    op = pipe(well, savepoint, timeout(5), retry(QUICK))
    await engine.run(op)
    await engine.run(well, autocommit=True)
    await engine.run(batch(each(operation(lambda conn, _: well(conn))))([1, 2]))
    async with engine.transaction() as conn:
        await op(conn)
        await savepoint(op)(conn)
    async with pool.acquire() as conn:
        await op(conn)
        async with conn.transaction():
            await op(conn)
    for fails in (servers_error, its_own_error, swallows):
        with contextlib.suppress(asyncpg.PostgresError, LookupError, TransactionAborted):
            await engine.run(savepoint(fails))
        with contextlib.suppress(asyncpg.PostgresError, LookupError, TransactionAborted):
            async with engine.transaction() as conn:
                await fails(conn)
        with contextlib.suppress(asyncpg.PostgresError, LookupError):
            async with pool.acquire() as conn:
                await savepoint(fails)(conn)
    with anyio.move_on_after(0.02):
        await engine.run(sleep)
    with anyio.move_on_after(0.02):
        async with engine.transaction() as conn:
            await op(conn)
            await asyncio.sleep(60)


async def test_no_scope_is_remembered_after_its_end(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    await every_kind_of_call(engine, pool)
    before = ours()
    for _ in range(5):
        await every_kind_of_call(engine, pool)
    assert ours() <= before
    assert engine.stats().in_use == 0
