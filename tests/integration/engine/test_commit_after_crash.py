"""COMMIT in doubt, and the server crashes or waits for a standby before it is looked up."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import anyio.to_thread
import asyncpg
import pytest

from dbop_raw import (
    CommitUnknown,
    Event,
    events,
)
from dbop_raw.testing.local import LocalServer
from dbop_raw.testing.server import run_sql
from tests.support.bodies import TABLES
from tests.support.doubt import WAYS, Way, World, at_commit, world_on
from tests.support.dsn import without_tls
from tests.support.policies import QUICK
from tests.support.servers import own_server
from tests.support.sessions import as_new
from tests.support.settings import with_bounds
from tests.support.waiting import until_in_thread

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


MANY_TRANSACTIONS = "DO $$ BEGIN FOR k IN 1000..1200 LOOP INSERT INTO t VALUES (k); COMMIT; END LOOP; END $$"


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    """A server to crash; it writes no WAL before it must, so that a crash really loses something."""
    with own_server(wal_writer_delay="10000", autovacuum="off") as server:
        run_sql(server.dsn, TABLES)
        yield server


@pytest.fixture
async def world(server: LocalServer) -> AsyncIterator[World]:
    """Instead of the folder's: on the server that may crash."""
    dsn = without_tls(server.dsn)
    await as_new(dsn)
    async with world_on(server, dsn) as world:
        yield world


class CrashAtTheDoubt:
    """An observer that crashes the server when a COMMIT is in doubt, and uses up many transaction ids.

    So the id of a transaction that the crash has lost is somebody else's by the time that it is looked up.

    Attributes:
        body: The body to run, which remembers its transaction's id.
        status_that_lies: What the server said of that id after the crash.

    """

    def __init__(self, server: LocalServer, world: World) -> None:
        self.status_that_lies: str | None = None
        self._server = server
        self._world = world
        self._xid = 0

    async def body(self, conn: Any) -> str:
        self._xid = int(await conn.fetchval("SELECT pg_current_xact_id()::text"))
        return await self._world.body(conn)

    def __call__(self, event: Event) -> None:
        if isinstance(event, events.CommitInDoubt) and self.status_that_lies is None:
            self._server.crash()
            self._server.start()
            run_sql(self._server.dsn, MANY_TRANSACTIONS)
            self.status_that_lies = run_sql(self._server.dsn, f"SELECT pg_xact_status('{self._xid}')")


async def test_a_transaction_id_is_not_trusted_after_a_crash(server: LocalServer, world: World) -> None:
    """The status of the id says committed, and it is somebody else's: the worst answer there could be."""
    crash = CrashAtTheDoubt(server, world)
    engine = with_bounds(world.new_engine(on_event=crash), answer=0.2)
    world.proxy.inject(at_commit("hang", "before the server"))
    with pytest.raises(CommitUnknown):
        await engine.run(crash.body, resolve_commit=True, deadline=20)
    assert crash.status_that_lies == "committed"
    assert world.rows() == 0
    assert world.starts == 1
    assert engine.stats().commits_found_committed == 0


async def test_a_token_is_right_after_a_crash_that_its_transaction_was_not_committed(
    server: LocalServer, world: World
) -> None:
    crash = CrashAtTheDoubt(server, world)
    engine = with_bounds(await world.engine_by("token", on_event=crash), answer=0.2)
    world.proxy.inject(at_commit("hang", "before the server"))
    assert await engine.run(crash.body, resolve_commit=True, deadline=20) == "result of start 2"
    assert crash.status_that_lies == "committed"
    assert (world.starts, world.rows()) == (2, 1)


async def test_a_token_is_right_after_a_crash_that_its_transaction_was_committed(
    server: LocalServer, world: World
) -> None:
    crash = CrashAtTheDoubt(server, world)
    engine = await world.engine_by("token", on_event=crash)
    world.proxy.inject(at_commit("reset", "before the client"))
    assert await engine.run(crash.body, resolve_commit=True, deadline=20) == "result of start 1"
    assert (world.starts, world.rows()) == (1, 1)


async def test_a_recovery_without_a_restart_is_another_incarnation_too(
    server: LocalServer, world: World
) -> None:
    """A backend that is killed makes the server recover, and its start time stays the same."""
    victim = await asyncpg.connect(server.dsn)

    def kills_a_backend(event: Event) -> None:
        if isinstance(event, events.CommitInDoubt):
            server.kill_backend(victim.get_server_pid(), 9)

    engine = world.new_engine(on_event=kills_a_backend)
    world.proxy.inject(at_commit("reset", "before the client"))
    with pytest.raises(CommitUnknown):
        await engine.run(world.body, resolve_commit=True, deadline=20)
    victim.terminate()
    assert world.starts == 1


# --- a COMMIT that waits for a standby


@pytest.fixture
def waits_for_a_standby(server: LocalServer, world: World) -> Iterator[None]:
    """COMMIT waits for a standby that doesn't exist; what only reads does not."""
    assert world is not None  # for the order: what it writes must not wait
    try:
        _set_standby(server, "nobody")
        yield
    finally:
        _set_standby(server, "")


def _set_standby(server: LocalServer, name: str) -> None:
    server.sql(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
    server.sql("SELECT pg_reload_conf()")
    # SHOW in a new session: the postmaster has read it.
    until_in_thread(lambda: server.sql("SHOW synchronous_standby_names") == name)


WAITING = "FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


async def _once(server: LocalServer, statement: str) -> None:
    """Ask again and again until the answer is true."""
    await anyio.to_thread.run_sync(until_in_thread, lambda: server.sql(statement))


async def _terminate_who_waits(server: LocalServer) -> None:
    await _once(server, f"SELECT pg_terminate_backend(pid) {WAITING} AND backend_type = 'client backend'")


@pytest.mark.parametrize("way", [None, *WAYS])
async def test_a_commit_ended_while_it_waits_for_a_standby_is_in_doubt_while_none_is_there(
    way: Way | None, server: LocalServer, world: World, request: pytest.FixtureRequest
) -> None:
    """It is visible, and a fail-over would lose it."""
    engine = await world.engine_by(way) if way else world.engine
    request.getfixturevalue("waits_for_a_standby")
    async with anyio.create_task_group() as group:
        group.start_soon(_terminate_who_waits, server)
        with pytest.raises(CommitUnknown):
            await engine.run(world.body, retry=QUICK, resolve_commit=way is not None, deadline=3)
    assert (world.starts, world.rows()) == (1, 1)
    assert engine.stats().commits_found_committed == 0


@pytest.mark.parametrize("way", WAYS)
async def test_a_commit_ended_while_it_waits_for_a_standby_is_found_committed_when_one_has_it(
    way: Way, server: LocalServer, world: World, request: pytest.FixtureRequest
) -> None:
    engine = await world.engine_by(way)
    request.getfixturevalue("waits_for_a_standby")

    async def ended_and_then_there() -> None:
        await _terminate_who_waits(server)
        # The look-up's own COMMIT.
        await _once(server, f"SELECT count(*) {WAITING}")
        assert engine.stats().commits_found_committed == 0
        await anyio.to_thread.run_sync(_set_standby, server, "")

    async with anyio.create_task_group() as group:
        group.start_soon(ended_and_then_there)
        assert await engine.run(world.body, resolve_commit=True) == "result of start 1"
    assert (world.starts, world.rows()) == (1, 1)
    assert engine.stats().commits_found_committed == 1
