"""Between two tries: what `close()` waits for, and what a try that is refused says of the one before it."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import AcquireTimeout, Engine, EngineClosed, EngineOverloaded, Event, RetryPolicy, events
from tests.support.bodies import insert, rows
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
