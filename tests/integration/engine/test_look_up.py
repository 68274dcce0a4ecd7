"""A look-up of a COMMIT in doubt that goes wrong itself: it keeps no connection, and storms no server."""

# ruff: noqa: ASYNC110 - what the pool has done, only asking again can tell

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import CommitTokens, CommitUnknown, Engine, Event, events
from dbop_raw.testing import Fault, FaultProxy, Message, Server
from dbop_raw.testing.server import run_sql
from tests.support.bodies import insert
from tests.support.pools import behind
from tests.support.protocol import answer_to_commit

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

TOKENS = CommitTokens()
WAYS = pytest.mark.parametrize("way", ["xid", "token"])


class World:
    """A pool of one connection behind a proxy: a look-up that keeps it leaves none."""

    def __init__(self, proxy: FaultProxy, pool: asyncpg.Pool) -> None:
        self.proxy, self.pool = proxy, pool
        self.seen: list[Event] = []
        self.at_the_doubt: list[Any] = []
        self.engine = self.with_tokens(None)

    def with_tokens(self, tokens: CommitTokens | None, **options: Any) -> Engine:
        self.engine = Engine(self.pool, observer=self.observe, commit_tokens=tokens, **options)
        return self.engine

    async def by(self, way: str) -> Engine:
        if way == "xid":
            return self.with_tokens(None)
        await self.engine.run(TOKENS.install)
        self.seen.clear()
        return self.with_tokens(TOKENS)

    def observe(self, event: Event) -> None:
        self.seen.append(event)
        if isinstance(event, events.CommitInDoubt):
            for act in self.at_the_doubt:
                act()

    def outcomes(self) -> list[str]:
        return [event.outcome for event in self.seen if isinstance(event, events.CommitResolved)]

    async def check(self) -> None:
        """Nothing is held, and the pool's only connection can be had."""
        assert (self.engine.stats().in_use, self.engine.stats().waiting) == (0, 0)
        with anyio.fail_after(10):
            while self.pool.get_size() != self.pool.get_idle_size():
                await anyio.sleep(0.002)
            assert await self.engine.fetchval("SELECT 7") == 7


@pytest.fixture
def role(dsn: str) -> Iterator[str]:
    """An ordinary role, of which privileges can be taken."""
    for statement in (
        "CREATE ROLE looks_up LOGIN",
        "GRANT CREATE ON SCHEMA public TO looks_up",
        "GRANT SELECT, INSERT ON t TO looks_up",
    ):
        run_sql(dsn, statement)
    yield "looks_up"
    run_sql(dsn, "DROP OWNED BY looks_up")
    run_sql(dsn, "DROP ROLE looks_up")
    run_sql(dsn, "GRANT EXECUTE ON FUNCTION pg_xact_status(xid8) TO PUBLIC")


@pytest.fixture
async def world(dsn: str, role: str, postgres_server: Server) -> AsyncIterator[World]:
    async with behind(postgres_server, dsn, user=role, max_size=1) as (proxy, pool):
        yield World(proxy, pool)


@WAYS
async def test_a_look_up_that_is_refused_gives_its_connection_back(
    way: str, dsn: str, role: str, world: World
) -> None:
    """The server says no each time: that will not change, so nothing is asked again."""
    engine = await world.by(way)
    revoke = (
        "REVOKE EXECUTE ON FUNCTION pg_xact_status(xid8) FROM PUBLIC"
        if way == "xid"
        else f"REVOKE ALL ON {TOKENS.table} FROM {role}"
    )
    world.at_the_doubt.append(lambda: run_sql(dsn, revoke))
    world.proxy.inject(Fault("reset", when=answer_to_commit))
    with anyio.fail_after(10), pytest.raises(CommitUnknown):
        await engine.run(insert, resolve_commit=True)
    assert world.outcomes() == ["unknown"]
    await world.check()


def after_the_doubt(world: World, containing: str) -> Any:
    def when(message: Message) -> bool:
        in_doubt = any(isinstance(event, events.CommitInDoubt) for event in world.seen)
        return in_doubt and message.sender == "client" and containing in message.sql

    return when


@WAYS
@pytest.mark.parametrize("action", ["cut", "reset"])
async def test_a_look_up_whose_line_breaks_again_and_again_gives_its_connections_back(
    action: Any, way: str, world: World
) -> None:
    engine = await world.by(way)
    world.proxy.inject(Fault("reset", when=answer_to_commit))
    broken = world.proxy.inject(
        Fault(action, when=after_the_doubt(world, "pg_" if way == "xid" else TOKENS.table), times=3)
    )
    with anyio.fail_after(15):
        assert await engine.run(insert, resolve_commit=True, deadline=10) == 1
    assert broken.fired == 3
    assert world.outcomes() == ["committed"]
    await world.check()


@WAYS
@pytest.mark.parametrize("by", ["task", "scope"])
async def test_a_look_up_whose_caller_is_cancelled_gives_its_connection_back(
    by: str, way: str, world: World
) -> None:
    engine = await world.by(way)
    world.proxy.inject(Fault("reset", when=answer_to_commit))
    hung = world.proxy.inject(
        Fault("hang", when=after_the_doubt(world, "pg_" if way == "xid" else TOKENS.table))
    )
    with anyio.fail_after(15):
        if by == "task":
            task = asyncio.ensure_future(engine.run(insert, resolve_commit=True))
            await hung.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            async with anyio.create_task_group() as group:

                async def call() -> None:
                    await engine.run(insert, resolve_commit=True)

                group.start_soon(call)
                await hung.wait()
                group.cancel_scope.cancel()
        world.proxy.heal()
        await world.check()


@WAYS
async def test_a_look_up_that_hangs_until_the_deadline_gives_its_connection_back(
    way: str, world: World
) -> None:
    engine = await world.by(way)
    world.proxy.inject(Fault("reset", when=answer_to_commit))
    hung = world.proxy.inject(
        Fault("hang", when=after_the_doubt(world, "pg_" if way == "xid" else TOKENS.table))
    )
    with anyio.fail_after(15), pytest.raises(CommitUnknown):
        await engine.run(insert, resolve_commit=True, deadline=0.6)
    assert hung.fired == 1
    world.proxy.heal()
    await world.check()


# Between two look-ups there is a pause of 50 ms at least: so many fit into a second, and not one more.
MOST_A_SECOND = 20


@WAYS
async def test_a_look_up_that_finds_no_server_pauses_before_it_asks_again(way: str, world: World) -> None:
    engine = await world.by(way)

    def unreachable() -> None:
        world.proxy.drop_all()
        world.proxy.server_port = 1
        world.proxy.reset_counts()

    world.at_the_doubt.append(unreachable)
    world.proxy.inject(Fault("reset", when=answer_to_commit))
    with anyio.fail_after(10), pytest.raises(CommitUnknown):
        await engine.run(insert, resolve_commit=True, deadline=1)
    assert 2 <= world.proxy.connections_opened <= MOST_A_SECOND + 1
