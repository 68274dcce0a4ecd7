"""Who waits for a connection: is served in order, is told of what went wrong, and waits for nobody's sake."""

# ruff: noqa: ASYNC110 - the numbers of an engine have no event

from __future__ import annotations

import asyncio
import gc
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import AcquireTimeout, Engine, EngineOverloaded
from tests.support.pools import Holding, pool_on
from tests.support.sessions import backend
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.every_loop]


class Turns:
    """Callers of an engine that note the order in which they were served, each holding until it may go."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.served: list[int] = []
        self.backends: list[int] = []

    async def __call__(self, number: int, until_set: asyncio.Event | None = None) -> None:
        async def body(conn: Any) -> None:
            self.served.append(number)
            self.backends.append(await backend(conn))
            if until_set is not None:
                await until_set.wait()

        await self.engine.run(body)

    async def line_up(self, group: anyio.abc.TaskGroup, numbers: range) -> None:
        """Let them come one after the other, and see each wait before the next comes."""
        for number in numbers:
            before = self.engine.stats().waiting
            group.start_soon(self, number)
            with anyio.fail_after(10):
                while self.engine.stats().waiting == before:
                    await asyncio.sleep(0)


async def refused(*_: Any, **__: Any) -> asyncpg.Connection:
    await asyncio.sleep(0.01)
    raise ConnectionRefusedError("of the test")


async def test_a_connect_that_is_refused_is_told_to_each_who_waits(dsn: str) -> None:
    async with pool_on(dsn, max_size=1, connect=refused) as pool:
        engine = Engine(pool, acquire_timeout=60)
        with anyio.fail_after(10):
            outcomes = await asyncio.gather(*[engine.run(backend) for _ in range(5)], return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ConnectionRefusedError] * 5


async def test_who_comes_as_another_gives_up_is_served(single: asyncpg.Pool) -> None:
    engine = Engine(single, acquire_timeout=60)
    async with Holding(single, 1):
        first = asyncio.create_task(engine.run(backend))
        await until(lambda: engine.stats().waiting == 1)
        await asyncio.sleep(0.01)
        first.cancel()
        second = asyncio.create_task(engine.run(backend))
        await asyncio.sleep(0.01)
        assert first.cancelled()
    with anyio.fail_after(5):
        assert await second


async def test_callers_are_served_in_order_also_after_a_long_time_of_many(single: asyncpg.Pool) -> None:
    engine = Engine(single, acquire_timeout=60)
    async with anyio.create_task_group() as group:
        for _ in range(200):
            group.start_soon(engine.run, backend)
    turns, may_go = Turns(engine), asyncio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(turns, 0, may_go)
        await until(lambda: turns.served == [0])
        await turns.line_up(group, range(1, 20))
        may_go.set()
    assert turns.served == list(range(20))


async def test_callers_are_served_in_order_where_others_use_the_pool(dsn: str) -> None:
    async with pool_on(dsn, min_size=2, max_size=2) as pool:
        engine = Engine(pool, acquire_timeout=60)
        turns, may_go = Turns(engine), asyncio.Event()
        async with anyio.create_task_group() as group:
            # Both have been with the engine, so it takes them for free; and one of them is not.
            for _ in range(2):
                group.start_soon(engine.run, backend)
        async with Holding(pool, 1), anyio.create_task_group() as group:
            group.start_soon(turns, 0, may_go)
            await until(lambda: turns.served == [0])
            await turns.line_up(group, range(1, 10))
            may_go.set()
        assert turns.served == list(range(10))


async def test_who_comes_as_a_connection_comes_back_does_not_overtake(single: asyncpg.Pool) -> None:
    """The first waits in the pool's own queue: the engine took the connection for free."""
    engine = Engine(single, acquire_timeout=60)
    await engine.run(backend)
    turns = Turns(engine)
    holding = Holding(single, 1)
    await holding.__aenter__()
    async with anyio.create_task_group() as group:
        await turns.line_up(group, range(1))
        await single.release(holding.held.pop())
        # Before the first one's task has run again.
        await turns(1)
    assert turns.served == [0, 1]


async def test_who_has_just_given_a_connection_back_does_not_overtake_where_the_pool_resets_its_own_way(
    dsn: str,
) -> None:
    """Nothing is handed over there: the connection is free for a moment, though others wait for it."""

    async def reset(conn: Any) -> None:
        await conn.execute("RESET ALL")

    async with pool_on(dsn, min_size=1, max_size=1, reset=reset) as pool:
        engine = Engine(pool, acquire_timeout=60)
        turns, may_go = Turns(engine), asyncio.Event()

        async def twice() -> None:
            await turns(0, may_go)
            await turns(3)

        async with anyio.create_task_group() as group:
            group.start_soon(twice)
            await until(lambda: turns.backends)
            await turns.line_up(group, range(1, 3))
            may_go.set()
        assert turns.served == [0, 1, 2, 3]


async def test_an_expired_connection_is_not_handed_on(single: asyncpg.Pool) -> None:
    engine = Engine(single, acquire_timeout=60)
    turns, may_go = Turns(engine), asyncio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(turns, 0, may_go)
        await until(lambda: turns.backends)
        await turns.line_up(group, range(1, 4))
        await single.expire_connections()
        may_go.set()
    assert turns.served == [0, 1, 2, 3]
    assert turns.backends[0] not in turns.backends[1:]
    assert len(set(turns.backends)) == 2


class Slow(asyncpg.Connection):
    """Resets its session when it may."""

    gate: asyncio.Event
    resets = 0

    async def reset(self, *, timeout: float | None = None) -> None:  # noqa: ASYNC109 - asyncpg's
        Slow.resets += 1
        await Slow.gate.wait()
        await super().reset(timeout=timeout)


@pytest.fixture
def slow() -> type[Slow]:
    Slow.gate, Slow.resets = asyncio.Event(), 0
    return Slow


async def test_a_connection_that_expires_while_it_is_reset_is_not_handed_on(
    dsn: str, slow: type[Slow]
) -> None:
    async with pool_on(dsn, max_size=1, connection_class=slow) as pool:
        turns = Turns(Engine(pool, acquire_timeout=60))
        async with anyio.create_task_group() as group:
            may_go = asyncio.Event()
            group.start_soon(turns, 0, may_go)
            await until(lambda: turns.backends)
            await turns.line_up(group, range(1, 3))
            may_go.set()
            await until(lambda: slow.resets == 1)
            await pool.expire_connections()
            slow.gate.set()
        assert turns.served == [0, 1, 2]
        assert turns.backends[0] not in turns.backends[1:]


async def test_a_caller_cancelled_while_his_connection_is_reset_does_not_cost_it(
    dsn: str, slow: type[Slow]
) -> None:
    async with pool_on(dsn, max_size=1, connection_class=slow) as pool:
        engine = Engine(pool, acquire_timeout=60)
        turns, may_go = Turns(engine), asyncio.Event()
        first = asyncio.create_task(turns(0, may_go))
        await until(lambda: turns.backends)
        second = asyncio.create_task(turns(1))
        await until(lambda: engine.stats().waiting == 1)
        may_go.set()
        await until(lambda: slow.resets == 1)
        first.cancel()
        await asyncio.sleep(0.01)
        slow.gate.set()
        with anyio.fail_after(5):
            await second
            with pytest.raises(asyncio.CancelledError):
                await first
        assert turns.backends[0] == turns.backends[1]
        assert (engine.stats().evicted, engine.stats().in_use) == (0, 0)


async def test_a_pool_that_is_closed_lets_nobody_wait(dsn: str) -> None:
    async with pool_on(dsn, max_size=2) as pool:
        engine = Engine(pool, acquire_timeout=60)
        turns, may_go = Turns(engine), asyncio.Event()
        with anyio.fail_after(10):
            held = [asyncio.create_task(turns(0, may_go)) for _ in range(2)]
            await until(lambda: len(turns.backends) == 2)
            waiting = [asyncio.create_task(turns(1)) for _ in range(8)]
            await until(lambda: engine.stats().waiting == 8)
            closing = asyncio.create_task(pool.close())
            await asyncio.sleep(0)
            may_go.set()
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
            await asyncio.gather(*held, closing)
        assert [type(outcome) for outcome in outcomes] == [asyncpg.InterfaceError] * 8
        assert turns.served == [0, 0]
        assert (engine.stats().waiting, engine.stats().in_use) == (0, 0)


def _futures() -> int:
    gc.collect()
    return sum(isinstance(found, asyncio.Future) for found in gc.get_objects())


async def test_who_gave_up_is_not_remembered(single: asyncpg.Pool) -> None:
    """While a connection is held for long, thousands may come and go."""
    engine = Engine(single, acquire_timeout=0.01)
    async with engine.transaction():
        before = _futures()
        for _ in range(5):
            calls = [engine.run(backend) for _ in range(50)]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} == {AcquireTimeout}
            del calls, outcomes
        # The last round may still be known to the event loop.
        assert _futures() <= before + 50


async def test_who_was_cancelled_makes_room_in_the_line(single: asyncpg.Pool) -> None:
    engine = Engine(single, acquire_timeout=60, max_waiting=1)
    async with anyio.create_task_group() as group, Holding(single, 1):
        gave_up = asyncio.create_task(engine.run(backend))
        await until(lambda: engine.stats().waiting == 1)
        gave_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gave_up
        group.start_soon(engine.run, backend)
        await until(lambda: engine.stats().waiting == 1)
    assert (engine.stats().shed, engine.stats().acquires) == (0, 1)


async def test_who_waits_in_the_pools_own_queue_counts_among_those_who_wait(single: asyncpg.Pool) -> None:
    engine = Engine(single, acquire_timeout=2, max_waiting=1)
    await engine.run(backend)
    async with anyio.create_task_group() as group, Holding(single, 1):
        group.start_soon(engine.run, backend)
        await until(lambda: engine.stats().waiting == 1)
        with pytest.raises(EngineOverloaded):
            await engine.run(backend)


class FailsToReset(asyncpg.Connection):
    """Can't be used again."""

    async def reset(self, *, timeout: float | None = None) -> None:  # noqa: ASYNC109, ARG002 - asyncpg's
        raise ConnectionResetError("of the test")


async def test_who_waits_is_served_where_a_connection_can_not_be_handed_over(dsn: str) -> None:
    async with pool_on(dsn, max_size=1, connection_class=FailsToReset) as pool:
        turns, may_go = Turns(Engine(pool, acquire_timeout=60)), asyncio.Event()
        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                group.start_soon(turns, 0, may_go)
                await until(lambda: turns.backends)
                await turns.line_up(group, range(1, 3))
                may_go.set()
        assert turns.served == [0, 1, 2]
