"""Closing an engine: what `close()` waits for, whom it refuses, and what a refused later attempt says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import (
    AcquireTimeout,
    DbopError,
    Engine,
    EngineClosed,
    EngineOverloaded,
    Event,
    RetryPolicy,
    events,
)
from tests.support.bodies import add, insert, rows, sleep, then
from tests.support.failures import raising
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

# A pause is drawn from 0 up to the longest one, so several runs are looked at: not all draw a short one.
SEVERAL = 8


class FailsOnce:
    """A body that needs a second try."""

    def __init__(self, n: int = 1) -> None:
        self.n = n
        self.starts = 0

    async def __call__(self, conn: Any) -> int:
        self.starts += 1
        if self.starts == 1:
            await raising("40001")(conn)
        return await insert(conn, self.n)


class Paused:
    """Runs that have failed once, each in its pause before the second try."""

    def __init__(self, pool: asyncpg.Pool, longest: float, count: int = SEVERAL) -> None:
        self.seen: list[Event] = []
        self.engine = Engine(pool, observer=self.seen.append)
        policy = RetryPolicy(attempts=2, first_delay=longest, max_delay=longest)
        self.tasks = [asyncio.create_task(self.engine.run(FailsOnce(n), retry=policy)) for n in range(count)]

    async def begun(self) -> None:
        def all_failed() -> bool:
            return sum(isinstance(event, events.Retried) for event in self.seen) == len(self.tasks)

        await until(lambda: all_failed() and not self.engine.stats().in_use)

    async def end(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks)


# --- close() and runs in their pause


async def test_close_ends_the_pauses_of_runs(pool: asyncpg.Pool) -> None:
    paused = Paused(pool, longest=3600)
    await paused.begun()
    assert await paused.engine.close(timeout=10)
    outcomes = await asyncio.gather(*paused.tasks, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {EngineClosed}


async def test_close_does_not_return_true_while_a_run_is_in_its_pause(pool: asyncpg.Pool) -> None:
    paused = Paused(pool, longest=3600)
    await paused.begun()
    with anyio.fail_after(10):
        ended = await paused.engine.close(timeout=0.1)
        in_pause = [task for task in paused.tasks if not task.done()]
        assert not (ended and in_pause)
        await paused.end()


async def test_close_that_returns_true_has_waited_for_the_runs_in_their_pause(pool: asyncpg.Pool) -> None:
    """Each is done by then: with its result, or refused because the engine closes."""
    paused = Paused(pool, longest=0.5)
    await paused.begun()
    with anyio.fail_after(20):
        assert await paused.engine.close(timeout=15)
    assert [task.done() for task in paused.tasks] == [True] * SEVERAL
    outcomes = [task.exception() for task in paused.tasks]
    assert all(outcome is None or type(outcome) is EngineClosed for outcome in outcomes)
    assert await rows(pool) == [n for n, outcome in enumerate(outcomes) if outcome is None]


async def test_close_goes_on_when_the_last_who_waits_has_gone(single: asyncpg.Pool) -> None:
    """It sleeps until something ends, and a wait that is given up is such a thing."""
    engine = Engine(single, acquire_timeout=60)
    async with single.acquire():
        with anyio.fail_after(10):
            waiting = asyncio.create_task(engine.run(insert))
            await until(lambda: engine.stats().waiting == 1)
            closing = asyncio.create_task(engine.close(timeout=60))
            await asyncio.sleep(0.02)
            assert not closing.done()
            waiting.cancel()
            assert await closing
            assert waiting.cancelled()


async def test_close_goes_on_when_the_last_who_waits_has_run_out_of_time(single: asyncpg.Pool) -> None:
    engine = Engine(single, acquire_timeout=0.2)
    async with single.acquire():
        with anyio.fail_after(10):
            waiting = asyncio.create_task(engine.run(insert))
            await until(lambda: engine.stats().waiting == 1)
            assert await engine.close(timeout=60)
            with pytest.raises(AcquireTimeout):
                await waiting


# --- a refusal on a later try keeps the failure before it


class TakesTheConnection:
    """An observer that has the pool's only connection before the second try can ask for it."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self.pool = pool
        self.taking: asyncio.Future[Any] | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, events.Retried):
            self.taking = asyncio.ensure_future(self.pool.acquire())

    async def give_back(self) -> None:
        if self.taking is not None:
            await self.pool.release(await self.taking)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"acquire_timeout": 0.1}, AcquireTimeout), ({"max_waiting": 0}, EngineOverloaded)],
    ids=["AcquireTimeout", "EngineOverloaded"],
)
async def test_a_refusal_on_a_later_try_names_the_failure_before_it(
    options: dict[str, Any], error: type[Exception], single: asyncpg.Pool
) -> None:
    takes = TakesTheConnection(single)
    body = FailsOnce()
    engine = Engine(single, observer=takes, **options)
    policy = RetryPolicy(attempts=3, first_delay=0.05, max_delay=0.05)
    try:
        with anyio.fail_after(10), pytest.raises(error) as caught:
            await engine.run(body, retry=policy)
    finally:
        await takes.give_back()
    assert isinstance(caught.value.__cause__, asyncpg.SerializationError)
    assert body.starts == 1


async def test_engine_closed_on_a_later_try_names_the_failure_before_it(pool: asyncpg.Pool) -> None:
    paused = Paused(pool, longest=1)
    await paused.begun()
    with anyio.fail_after(20):
        # It ends the pauses, and what they then ask for is refused.
        await paused.engine.close(timeout=0.01)
        await asyncio.wait(paused.tasks)
    refused = [task.exception() for task in paused.tasks if task.exception() is not None]
    assert refused
    for error in refused:
        assert type(error) is EngineClosed
        assert isinstance(error.__cause__, asyncpg.SerializationError)


async def test_close_waits_for_what_runs(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    async with anyio.create_task_group() as group:
        group.start_soon(engine.run, then(lambda conn: sleep(conn, 0.1), insert))
        await until(lambda: engine.stats().in_use == 1)
        assert await engine.close()
    assert await rows(pool) == [1]


async def _a_transaction(engine: Engine) -> None:
    async with engine.transaction():
        pass


@pytest.mark.parametrize(
    "call",
    [lambda engine: engine.run(insert), lambda engine: engine.execute("SELECT 1"), _a_transaction],
    ids=["run", "execute", "transaction"],
)
async def test_a_closed_engine_refuses_a_call(
    call: Callable[[Engine], Awaitable[Any]], pool: asyncpg.Pool
) -> None:
    engine = Engine(pool)
    await engine.close()
    with pytest.raises(EngineClosed):
        await call(engine)


async def test_close_leaves_a_pool_of_the_users_own_open(pool: asyncpg.Pool) -> None:
    await Engine(pool).close()
    assert await pool.fetchval("SELECT 7") == 7


async def test_close_also_waits_for_callers_that_were_let_in_and_wait_themselves(
    single: asyncpg.Pool,
) -> None:
    engine = Engine(single)
    async with anyio.create_task_group() as group:
        for n in range(3):
            group.start_soon(engine.run, then(lambda conn: sleep(conn, 0.05), add(n)))
        await until(lambda: (engine.stats().in_use, engine.stats().waiting) == (1, 2))
        assert await engine.close()
        assert (engine.stats().in_use, engine.stats().waiting) == (0, 0)
    assert await rows(single) == [0, 1, 2]


async def test_close_is_bounded_and_cuts_off_what_does_not_end(single: asyncpg.Pool) -> None:
    engine = Engine(single)
    outcomes: list[BaseException] = []

    async def call(n: int) -> None:
        try:
            await engine.run(then(add(n), sleep))
        except (asyncpg.PostgresError, asyncpg.InterfaceError, DbopError) as exc:
            outcomes.append(exc)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(call, 1)
            group.start_soon(call, 2)
            await until(lambda: (engine.stats().in_use, engine.stats().waiting) == (1, 1))
            assert not await engine.close(timeout=0.05)
    assert [type(outcome) for outcome in outcomes].count(EngineClosed) == 1
    assert len(outcomes) == 2
    await until(lambda: engine.stats().in_use == 0)
    assert await rows(single) == []


async def test_open_cuts_off_what_a_failed_block_left(dsn: str) -> None:
    async with asyncio.timeout(5):
        left: asyncio.Task[Any] | None = None
        with pytest.raises(LookupError):  # noqa: PT012 - the block is what is tested
            async with Engine.open(dsn, min_size=1, max_size=1) as engine:
                left = asyncio.ensure_future(engine.run(sleep))
                await until(lambda: engine.stats().in_use == 1)
                raise LookupError
        assert left is not None
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, DbopError)):
            await left
