"""A COMMIT in doubt that waited for a standby: "committed" is said only of what a fail-over keeps.

The first COMMIT waits for a standby that is cut off, and its row becomes visible as soon as that wait is
ended, by whomever. Who sees it then and says "committed" is wrong when the standby is promoted.
"""

# ruff: noqa: ASYNC110 - what the server has done, only asking again can tell

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import pytest

from dbop_raw import CommitTokens, CommitUnknown, Engine, Event, events, operation
from dbop_raw.testing import Fault, FaultProxy, query
from dbop_raw.testing.local import LocalServer
from dbop_raw.testing.server import run_sql
from tests.support.pools import behind
from tests.support.protocol import answer_to_commit
from tests.support.replication import promote
from tests.support.replication import standby as standby_of
from tests.support.servers import own_server
from tests.support.standbys import cut_off, let_back, wait_for_standby, who_waits_for_it

pytestmark = pytest.mark.anyio

TOKENS = CommitTokens()
STANDBY = "second"
BY = pytest.mark.parametrize("by", ["token", "xid"])


@pytest.fixture
def primary() -> Iterator[LocalServer]:
    """A primary of this test's own, which is lost."""
    with own_server(max_connections="40") as server:
        run_sql(server.dsn, "CREATE TABLE t (n integer NOT NULL)")
        yield server


@dataclass
class World:
    """A primary, its synchronous standby, and an engine on the primary behind a proxy."""

    primary: LocalServer
    standby: LocalServer
    proxy: FaultProxy
    pool: asyncpg.Pool
    engine: Engine
    seen: list[Event] = field(default_factory=list)
    conninfo: str = ""

    async def cut_off(self) -> None:
        self.conninfo = await asyncio.to_thread(cut_off, self.primary, self.standby)

    async def let_back(self) -> None:
        await asyncio.to_thread(let_back, self.primary, self.standby, self.conninfo)

    async def waiting(self) -> list[int]:
        """Wait until a COMMIT waits for the standby; gives whose."""
        async with asyncio.timeout(10):
            while not (found := await asyncio.to_thread(who_waits_for_it, self.primary)):
                await asyncio.sleep(0.01)
        return found

    async def fail_over(self) -> list[int]:
        """Lose the primary, promote the standby: give the rows that are left."""
        await asyncio.to_thread(self.primary.crash)
        await asyncio.to_thread(promote, self.standby)
        connection = await asyncpg.connect(self.standby.dsn)
        try:
            return [row["n"] for row in await connection.fetch("SELECT n FROM t ORDER BY n")]
        finally:
            await connection.close()

    def outcomes(self) -> list[str]:
        return [event.outcome for event in self.seen if isinstance(event, events.CommitResolved)]


@asynccontextmanager
async def world_of(primary: LocalServer, by: str, **pool_options: Any) -> AsyncIterator[World]:
    with standby_of(primary, name=STANDBY) as standby:
        wait_for_standby(primary, STANDBY)
        async with behind(primary, f"{primary.dsn}?sslmode=disable", **pool_options) as (proxy, pool):
            seen: list[Event] = []
            tokens = TOKENS if by == "token" else None
            engine = Engine(pool, observer=seen.append, commit_tokens=tokens)
            if tokens is not None:
                await engine.run(tokens.install)
            await engine.run(insert(1))
            seen.clear()
            yield World(primary, standby, proxy, pool, engine, seen)


@operation
async def insert(conn: Any, n: int, synchronous_commit: str | None = None) -> int:
    if synchronous_commit is not None:
        await conn.execute(f"SET LOCAL synchronous_commit = {synchronous_commit}")
    await conn.execute("INSERT INTO t VALUES ($1)", n)
    return n


# --- two ways in which the wait for the standby can end without its answer


async def line_is_lost(world: World, pids: list[int]) -> None:
    """Only the client knows: the session goes on waiting until somebody ends it."""
    assert len(pids) == 1
    world.proxy.drop_all("reset")


async def session_is_ended(world: World, pids: list[int]) -> None:
    (pid,) = pids
    await asyncio.to_thread(world.primary.sql, f"SELECT pg_terminate_backend({pid}, 5000)")


Ends = Callable[[World, list[int]], Any]
ENDS = pytest.mark.parametrize(
    "ends",
    [line_is_lost, session_is_ended],
    ids=lambda ends: ends.__name__,
)


@BY
@ENDS
async def test_committed_is_not_said_of_what_the_standby_does_not_have(
    ends: Ends, by: str, primary: LocalServer
) -> None:
    async with world_of(primary, by) as world:
        await world.cut_off()
        run = asyncio.create_task(world.engine.run(insert(7), resolve_commit=True, deadline=3))
        await ends(world, await world.waiting())
        with pytest.raises(CommitUnknown):
            await run
        stats = world.engine.stats()
        assert (stats.commits_in_doubt, stats.commits_found_committed, stats.commits_found_aborted) == (
            1,
            0,
            0,
        )
        assert world.outcomes() == ["unknown"]
        assert stats.in_use == 0
        assert await world.fail_over() == [1], "the trap is not set: the row was not lost"


@BY
@ENDS
async def test_committed_is_said_when_the_standby_has_it(ends: Ends, by: str, primary: LocalServer) -> None:
    """Till it is back, it is not known; then it is, and a fail-over keeps it."""
    async with world_of(primary, by) as world:
        await world.cut_off()
        run = asyncio.create_task(world.engine.run(insert(7), resolve_commit=True, deadline=30))
        await ends(world, await world.waiting())
        done, _ = await asyncio.wait({run}, timeout=2)
        assert not done, "it is answered before the standby has it"
        await world.let_back()
        assert await run == 7
        assert world.engine.stats().commits_found_committed == 1
        assert world.outcomes() == ["committed"]
        assert await world.fail_over() == [1, 7]


@BY
async def test_committed_is_not_said_where_the_body_asked_for_the_standby_itself(
    by: str, primary: LocalServer
) -> None:
    """The session's own setting waits for nobody, so a COMMIT of a look-up's would not either."""
    settings = {"synchronous_commit": "local"}
    async with world_of(primary, by, server_settings=settings) as world:
        await world.cut_off()
        run = asyncio.create_task(world.engine.run(insert(7, "on"), resolve_commit=True, deadline=3))
        await line_is_lost(world, await world.waiting())
        with pytest.raises(CommitUnknown):
            await run
        assert world.engine.stats().commits_found_committed == 0
        assert await world.fail_over() == [1], "the trap is not set: the row was not lost"


@BY
async def test_not_committed_is_still_found_while_the_standby_is_away(by: str, primary: LocalServer) -> None:
    """That nothing was committed needs no standby: a retry then waits for it, and is in doubt itself."""
    async with world_of(primary, by) as world:
        await world.cut_off()
        starts: list[int] = []

        async def is_ended_before_its_commit(conn: Any) -> int:
            starts.append(1)
            result: int = await insert(7)(conn)
            if len(starts) == 1:
                world.proxy.inject(Fault("reset", when=query("COMMIT")))
            return result

        with pytest.raises(CommitUnknown):
            await world.engine.run(is_ended_before_its_commit, resolve_commit=True, deadline=6)
        assert world.outcomes() == ["aborted", "unknown"]
        assert len(starts) == 2
        assert world.engine.stats().commits_found_committed == 0
        assert await world.fail_over() == [1]


# --- a look-up that finds a server which can't tell

# Between two look-ups there is a pause of 50 ms at least, and one sends so many messages at the most (what is
# the server, how does the transaction stand, end its session; the pool's reset).
MOST_A_SECOND, MOST_MESSAGES = 20, 5


@BY
async def test_a_look_up_that_meets_a_standby_pauses_before_it_asks_again(
    by: str, primary: LocalServer
) -> None:
    """The address leads to the standby before that is promoted: it has no answer yet."""
    async with world_of(primary, by) as world:

        def leads_to_the_standby(event: Event) -> None:
            world.seen.append(event)
            if isinstance(event, events.CommitInDoubt):
                world.proxy.drop_all()
                world.proxy.server_port = world.standby.port
                world.proxy.reset_counts()

        engine = Engine(
            world.pool, observer=leads_to_the_standby, commit_tokens=TOKENS if by == "token" else None
        )
        world.proxy.inject(Fault("reset", when=answer_to_commit))
        with pytest.raises(CommitUnknown):
            await engine.run(insert(7), resolve_commit=True, deadline=1.5)
        sent = [each for each in world.proxy.messages if each.sender == "client" and each.type in {"Q", "B"}]
        assert len(sent) > MOST_MESSAGES, "it was not asked again"
        assert len(sent) <= 1.5 * (MOST_A_SECOND + 1) * MOST_MESSAGES
        assert world.outcomes() == ["unknown"]
