"""COMMIT in doubt: settled by looking it up, never guessed, and never a wrong "committed"."""

# ruff: noqa: ASYNC110 - what the server or the pool has done, only asking again can tell

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import (
    CommitTokens,
    CommitUnknown,
    Engine,
    Event,
    PolicyError,
    RetriesExhausted,
    RetryPolicy,
    events,
)
from dbop_raw.testing import Fault, FaultProxy, Injected, Message, Server, message, postgres, query
from dbop_raw.testing.server import run_sql
from tests.support.settings import with_bounds, with_settings

pytestmark = pytest.mark.anyio

QUICK = RetryPolicy(attempts=3, first_delay=0.001, max_delay=0.01)
TOKENS = CommitTokens()
LOST = (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError)


def answer_to_commit(message: Message) -> bool:
    return message.sender == "server" and message.type == "C" and message.body.startswith(b"COMMIT")


def fault(action: Any, where: str, *, times: int | None = 1) -> Fault:
    """At a COMMIT: before it reaches the server, or before its answer reaches the client."""
    when = query("COMMIT") if where == "before the server" else answer_to_commit
    return Fault(action, when=when, side="before", times=times)


ACTIONS = ["cut", "reset", "hang"]
PLACES = ["before the server", "before the client"]
WAYS = ["xid", "token"]


@pytest.fixture(scope="module")
def own_server() -> Iterator[Server]:
    """A server to crash; it writes no WAL before it must, so that a crash really loses something."""
    with postgres(settings={"wal_writer_delay": "10000", "autovacuum": "off"}) as server:
        run_sql(server.dsn, TABLE)
        yield server


TABLE = "CREATE TABLE t (n integer NOT NULL, CONSTRAINT late UNIQUE (n) DEFERRABLE INITIALLY DEFERRED)"


@pytest.fixture(scope="module")
def database(postgres_server: Server) -> Iterator[str]:
    dsn = postgres_server.create_database()
    run_sql(dsn, TABLE)
    yield without_tls(dsn)
    postgres_server.drop_database(dsn)


def without_tls(dsn: str) -> str:
    """Without asyncpg's question for TLS: cut off in the middle, it leaves an error that nobody retrieves."""
    return f"{dsn}{'&' if '?' in dsn else '?'}sslmode=disable"


class World:
    """A pool of two connections behind a proxy, and a body that is counted."""

    def __init__(self, proxy: FaultProxy, pool: asyncpg.Pool, dsn: str) -> None:
        self.proxy = proxy
        self.pool = pool
        self.dsn = dsn
        self.starts = 0
        self.seen: list[Event] = []
        self.engine = self.engine_with(None)

    def engine_with(self, tokens: CommitTokens | None, **options: Any) -> Engine:
        self.engine = Engine(self.pool, observer=self.seen.append, commit_tokens=tokens, **options)
        return self.engine

    async def by(self, way: str) -> Engine:
        """An engine that looks it up in this way."""
        engine = self.engine_with(TOKENS if way == "token" else None)
        if way == "token":
            await engine.run(TOKENS.install)
        self.seen.clear()
        return engine

    async def body(self, conn: Any, n: int = 1) -> str:
        self.starts += 1
        await conn.execute("INSERT INTO t VALUES ($1)", n)
        return f"result of start {self.starts}"

    def rows(self) -> int:
        found: int = run_sql(self.dsn, "SELECT count(*) FROM t WHERE n = 1")
        return found

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.seen if type(event) is kind]

    def outcomes(self) -> list[str]:
        return [event.outcome for event in self.of(events.CommitResolved)]


@pytest.fixture
async def world(postgres_server: Server, database: str) -> AsyncIterator[World]:
    async for world in _worlds(postgres_server, database):
        yield world


@pytest.fixture
async def own_world(own_server: Server) -> AsyncIterator[World]:
    async for world in _worlds(own_server, without_tls(own_server.dsn)):
        yield world


async def _worlds(server: Server, dsn: str) -> AsyncIterator[World]:
    run_sql(
        dsn,
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() "
        "AND pid <> pg_backend_pid() AND backend_type = 'client backend'",
    )
    run_sql(dsn, "TRUNCATE t")
    async with FaultProxy(server.host, server.port) as proxy:
        pool = await asyncpg.create_pool(proxy.dsn(dsn), min_size=0, max_size=2)
        try:
            yield World(proxy, pool, dsn)
            with anyio.fail_after(5):
                await pool.close()
        finally:
            pool.terminate()


# --- the six cases, and three ways to meet them


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("action", ACTIONS)
async def test_without_resolve_it_is_commit_unknown_after_one_try(
    action: str, where: str, world: World
) -> None:
    world.proxy.inject(fault(action, where))
    deadline = 0.3 if action == "hang" else None
    with pytest.raises(CommitUnknown):
        await world.engine.run(world.body, retry=QUICK, deadline=deadline)
    assert world.starts == 1
    stats = world.engine.stats()
    assert (stats.commits_in_doubt, stats.evicted, stats.in_use, stats.retries) == (1, 1, 0, 0)
    assert len(world.of(events.CommitInDoubt)) == 1
    assert world.of(events.RolledBack) == world.of(events.Committed) == []
    assert world.outcomes() == []
    assert world.rows() == (1 if where == "before the client" else 0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("action", ACTIONS)
async def test_a_commit_that_was_done_gives_the_bodys_result_and_no_second_run(
    action: str, way: str, world: World
) -> None:
    engine = await world.by(way)
    world.proxy.inject(fault(action, "before the client"))
    deadline = 1.5 if action == "hang" else None
    result = await engine.run(world.body, resolve_commit=True, deadline=deadline)
    assert result == "result of start 1"
    assert (world.starts, world.rows()) == (1, 1)
    assert world.outcomes() == ["committed"]
    stats = engine.stats()
    assert (stats.commits_in_doubt, stats.commits_found_committed, stats.commits_found_aborted) == (1, 1, 0)
    assert stats.in_use == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("action", ACTIONS)
async def test_a_commit_that_was_not_done_runs_again_and_writes_once(
    action: str, way: str, world: World
) -> None:
    engine = await world.by(way)
    world.proxy.inject(fault(action, "before the server"))
    deadline = 3 if action == "hang" else None
    result = await engine.run(world.body, resolve_commit=True, deadline=deadline)
    assert result == "result of start 2"
    assert (world.starts, world.rows()) == (2, 1)
    assert world.outcomes() == ["aborted"]
    stats = engine.stats()
    assert (stats.commits_in_doubt, stats.commits_found_committed, stats.commits_found_aborted) == (1, 0, 1)
    assert stats.in_use == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", PLACES)
async def test_a_line_that_hangs_and_is_lost_later_is_settled_without_a_deadline(
    where: str, way: str, world: World
) -> None:
    engine = await world.by(way)
    hung = world.proxy.inject(fault("hang", where))
    task = asyncio.ensure_future(engine.run(world.body, resolve_commit=True))
    await hung.wait()
    await anyio.sleep(0.05)
    assert not task.done()
    world.proxy.drop_all("reset")
    await task
    assert world.rows() == 1
    assert world.starts == (1 if where == "before the client" else 2)


@pytest.mark.parametrize("way", WAYS)
async def test_several_runs_in_doubt_at_once_are_settled_each_for_itself(way: str, world: World) -> None:
    engine = await world.by(way)
    world.proxy.inject(fault("reset", "before the client"))
    world.proxy.inject(fault("reset", "before the server", times=2))
    results = await asyncio.gather(
        *(engine.run(functools.partial(world.body, n=n), resolve_commit=True) for n in range(1, 9))
    )
    assert len(results) == 8
    assert run_sql(world.dsn, "SELECT array_agg(n ORDER BY n) FROM t") == list(range(1, 9))
    assert engine.stats().commits_in_doubt == 3
    assert sorted(world.outcomes()) in (["aborted", "aborted", "committed"], ["aborted"] * 3)


@pytest.mark.parametrize("way", WAYS)
async def test_a_commit_that_is_lost_each_time_runs_three_times_and_no_more(way: str, world: World) -> None:
    engine = await world.by(way)
    world.proxy.inject(fault("reset", "before the server", times=None))
    with pytest.raises(RetriesExhausted) as caught:
        await engine.run(world.body, resolve_commit=True)
    assert (caught.value.attempts, world.starts, world.rows()) == (3, 3, 0)


@pytest.mark.parametrize("way", WAYS)
async def test_the_policy_says_how_often_when_there_is_one(way: str, world: World) -> None:
    engine = await world.by(way)
    world.proxy.inject(fault("reset", "before the server", times=None))
    policy = RetryPolicy(attempts=2, first_delay=0.001)
    with pytest.raises(RetriesExhausted):
        await engine.run(world.body, retry=policy, resolve_commit=True)
    assert world.starts == 2


@pytest.mark.parametrize("way", WAYS)
async def test_a_look_up_waits_until_the_server_can_be_reached_again(way: str, world: World) -> None:
    engine = await world.by(way)
    port = world.proxy.server_port

    def unreachable_for_a_while(event: Event) -> None:
        world.seen.append(event)
        if isinstance(event, events.CommitInDoubt):
            world.proxy.drop_all()
            world.proxy.server_port = 1
            asyncio.get_running_loop().call_later(0.2, setattr, world.proxy, "server_port", port)

    with_settings(engine, observer=unreachable_for_a_while)
    world.proxy.inject(fault("reset", "before the client"))
    assert await engine.run(world.body, resolve_commit=True) == "result of start 1"
    assert world.rows() == 1


async def test_a_look_up_that_finds_no_server_until_the_deadline_is_commit_unknown(world: World) -> None:
    def unreachable(event: Event) -> None:
        if isinstance(event, events.CommitInDoubt):
            world.proxy.drop_all()
            world.proxy.server_port = 1

    engine = Engine(world.pool, observer=unreachable)
    world.proxy.inject(fault("reset", "before the client"))
    with anyio.fail_after(5), pytest.raises(CommitUnknown):
        await engine.run(world.body, resolve_commit=True, deadline=0.6)
    assert world.starts == 1


async def test_an_engine_that_closes_during_the_look_up_does_not_say_that_nothing_was_sent(
    world: World,
) -> None:
    closing: list[asyncio.Task[Any]] = []

    def unreachable_and_closed(event: Event) -> None:
        if isinstance(event, events.CommitInDoubt):
            world.proxy.drop_all()
            world.proxy.server_port = 1
            closing.append(asyncio.ensure_future(engine.close(timeout=0.05)))

    engine = Engine(world.pool, observer=unreachable_and_closed)
    world.proxy.inject(fault("reset", "before the client"))
    with anyio.fail_after(5), pytest.raises(CommitUnknown):
        await engine.run(world.body, resolve_commit=True)
    await closing[0]
    assert world.rows() == 1


# --- what is no doubt


@pytest.mark.parametrize("resolve", [False, True])
async def test_a_commit_that_is_refused_is_a_definite_error(resolve: bool, world: World) -> None:
    async def twice(conn: Any) -> None:
        world.starts += 1
        await conn.execute("INSERT INTO t VALUES (1), (1)")

    with pytest.raises(asyncpg.UniqueViolationError) as caught:
        await world.engine.run(twice, retry=QUICK, resolve_commit=resolve)
    assert caught.value.constraint_name == "late"
    stats = world.engine.stats()
    assert (world.starts, world.rows(), stats.commits_in_doubt, stats.evicted) == (1, 0, 0, 0)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("action", ACTIONS)
async def test_a_read_only_run_has_no_doubt_and_is_the_drivers_error(
    action: str, where: str, world: World
) -> None:
    world.proxy.inject(fault(action, where))

    async def look(conn: Any) -> int:
        world.starts += 1
        found: int = await conn.fetchval("SELECT 7")
        return found

    deadline = 0.3 if action == "hang" else None
    with pytest.raises((*LOST, TimeoutError)):
        await world.engine.run(look, readonly=True, resolve_commit=True, deadline=deadline)
    assert world.starts == 1
    assert world.engine.stats().commits_in_doubt == 0
    assert world.of(events.CommitInDoubt) == []


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("action", ["cut", "reset"])
async def test_a_read_only_run_is_simply_tried_again(action: str, where: str, world: World) -> None:
    world.proxy.inject(fault(action, where))

    async def look(conn: Any) -> int:
        world.starts += 1
        found: int = await conn.fetchval("SELECT 7")
        return found

    assert await world.engine.run(look, readonly=True, retry=QUICK) == 7
    assert world.starts == 2


@pytest.mark.parametrize("action", ["cut", "reset"])
async def test_a_line_lost_before_commit_is_sent_is_no_doubt_and_runs_again(
    action: Any, world: World
) -> None:
    lost = world.proxy.inject(Fault(action, when=query("INSERT"), side="after"))
    assert await world.engine.run(world.body, retry=QUICK) == "result of start 2"
    assert (world.starts, world.rows(), lost.fired) == (2, 1, 1)
    assert world.engine.stats().commits_in_doubt == 0


@pytest.mark.parametrize("where", PLACES)
async def test_a_transaction_block_says_commit_unknown(where: str, world: World) -> None:
    world.proxy.inject(fault("reset", where))
    with pytest.raises(CommitUnknown) as caught:
        async with world.engine.transaction() as conn:
            await world.body(conn)
    assert isinstance(caught.value.__cause__, asyncpg.PostgresConnectionError)
    assert world.engine.stats().commits_in_doubt == 1


@pytest.mark.parametrize("action", ["cut", "reset"])
async def test_an_autocommitted_statement_whose_answer_is_lost_is_unknown(action: Any, world: World) -> None:
    world.proxy.inject(Fault(action, when=query("INSERT"), side="after"))
    with pytest.raises(CommitUnknown):
        await world.engine.run(world.body, autocommit=True, retry=QUICK)
    assert world.starts == 1


@pytest.mark.parametrize("resolve", [False, True])
async def test_a_deadline_bounds_a_commit_that_hangs(resolve: bool, world: World) -> None:
    """With resolve the server hangs too, so that nothing can be looked up."""
    await world.pool.fetchval("SELECT 1")
    world.proxy.inject(fault("hang", "before the client"))
    if resolve:
        world.proxy.inject(Fault("hang", when=message("client", "startup"), times=None))
    loop = asyncio.get_running_loop()
    started = loop.time()
    with pytest.raises(CommitUnknown):
        await world.engine.run(world.body, deadline=0.4, resolve_commit=resolve)
    assert loop.time() - started < 0.4 + 0.3 + 0.3
    assert world.starts == 1
    world.proxy.heal()


# --- tokens


async def test_the_token_table_is_installed_once_and_purged_by_age(world: World) -> None:
    tokens = CommitTokens(table="Tokens of mine", schema="some where", keep=3600)
    run_sql(world.dsn, 'DROP SCHEMA IF EXISTS "some where" CASCADE')
    run_sql(world.dsn, 'CREATE SCHEMA "some where"')
    engine = world.engine_with(tokens)
    await engine.run(tokens.install)
    await engine.run(tokens.install)
    for n in range(3):
        await engine.run(functools.partial(world.body, n=n), resolve_commit=True)
    await engine.run(functools.partial(world.body, n=9))
    count = 'SELECT count(*) FROM "some where"."Tokens of mine"'
    assert await engine.fetchval(count) == 3
    assert await engine.run(tokens.purge) == 0
    await engine.execute('UPDATE "some where"."Tokens of mine" SET at = at - interval \'2 hours\' WHERE true')
    await engine.run(functools.partial(world.body, n=4), resolve_commit=True)
    assert await engine.run(tokens.purge) == 3
    assert await engine.fetchval(count) == 1


async def test_a_token_table_with_odd_names_settles_too(world: World) -> None:
    tokens = CommitTokens(table="T'\"; --", schema="public")
    engine = world.engine_with(tokens)
    await engine.run(tokens.install)
    world.proxy.inject(fault("reset", "before the client"))
    assert await engine.run(world.body, resolve_commit=True) == "result of start 1"


async def test_a_token_table_that_is_not_there_is_the_servers_error(world: World) -> None:
    engine = world.engine_with(CommitTokens(table="nowhere"))
    with pytest.raises(asyncpg.UndefinedTableError):
        await engine.run(world.body, resolve_commit=True)
    assert world.rows() == 0


async def test_a_rolled_back_run_leaves_no_token(world: World) -> None:
    engine = await world.by("token")
    before = await engine.fetchval(f"SELECT count(*) FROM {TOKENS.table}")

    async def fails(conn: Any) -> None:
        await world.body(conn)
        raise LookupError

    with pytest.raises(LookupError):
        await engine.run(fails, resolve_commit=True)
    assert await engine.fetchval(f"SELECT count(*) FROM {TOKENS.table}") == before


@pytest.mark.parametrize(
    "options", [{"table": ""}, {"table": "x" * 64}, {"keep": 0}, {"schema": "a\0"}], ids=repr
)
def test_tokens_that_are_not_allowed_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PolicyError):
        CommitTokens(**options)


async def test_the_application_name_is_the_sessions_again_after_a_run_that_resolves(world: World) -> None:
    for way in WAYS:
        engine = await world.by(way)
        before = await engine.fetchval("SHOW application_name")
        await engine.run(lambda conn: conn.execute("SELECT 1"), resolve_commit=True)
        assert await engine.fetchval("SHOW application_name") == before


# --- a crash between the loss and the look-up


MANY_TRANSACTIONS = "DO $$ BEGIN FOR k IN 1000..1200 LOOP INSERT INTO t VALUES (k); COMMIT; END LOOP; END $$"


class CrashesAtTheDoubt:
    """Crash the server when a COMMIT is in doubt, start it again, and use up many transaction ids.

    So the id of a transaction that the crash has lost is somebody else's by the time that it is looked up.
    """

    def __init__(self, server: Server, world: World, xid: Callable[[], int]) -> None:
        self.server = server
        self.world = world
        self.xid = xid
        self.status_that_lies: str | None = None

    def __call__(self, event: Event) -> None:
        self.world.seen.append(event)
        if isinstance(event, events.CommitInDoubt) and self.status_that_lies is None:
            self.server.crash()
            self.server.start()
            run_sql(self.server.dsn, MANY_TRANSACTIONS)
            self.status_that_lies = run_sql(self.server.dsn, f"SELECT pg_xact_status('{self.xid()}')")


class Doubt:
    """A body that remembers its transaction id."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.xid = 0

    async def __call__(self, conn: Any) -> str:
        self.xid = int(await conn.fetchval("SELECT pg_current_xact_id()::text"))
        return await self.world.body(conn)


async def test_after_a_crash_a_transaction_id_is_not_trusted(own_server: Server, own_world: World) -> None:
    """The status of the id says committed, and it is somebody else's: the worst answer there could be."""
    world = own_world
    body = Doubt(world)
    observer = CrashesAtTheDoubt(own_server, world, lambda: body.xid)
    engine = with_bounds(Engine(world.pool, observer=observer), answer=0.2)
    world.proxy.inject(fault("hang", "before the server"))
    with pytest.raises(CommitUnknown):
        await engine.run(body, resolve_commit=True, deadline=20)
    assert observer.status_that_lies == "committed"
    assert world.rows() == 0
    assert world.starts == 1
    assert engine.stats().commits_found_committed == 0


async def test_after_a_crash_a_token_is_right_that_it_was_not_committed(
    own_server: Server, own_world: World
) -> None:
    world = own_world
    await world.by("token")
    body = Doubt(world)
    observer = CrashesAtTheDoubt(own_server, world, lambda: body.xid)
    engine = with_bounds(Engine(world.pool, observer=observer, commit_tokens=TOKENS), answer=0.2)
    world.proxy.inject(fault("hang", "before the server"))
    assert await engine.run(body, resolve_commit=True, deadline=20) == "result of start 2"
    assert observer.status_that_lies == "committed"
    assert (world.starts, world.rows()) == (2, 1)


async def test_after_a_crash_a_token_is_right_that_it_was_committed(
    own_server: Server, own_world: World
) -> None:
    world = own_world
    await world.by("token")
    body = Doubt(world)
    observer = CrashesAtTheDoubt(own_server, world, lambda: body.xid)
    engine = Engine(world.pool, observer=observer, commit_tokens=TOKENS)
    world.proxy.inject(fault("reset", "before the client"))
    assert await engine.run(body, resolve_commit=True, deadline=20) == "result of start 1"
    assert (world.starts, world.rows()) == (1, 1)


async def test_a_recovery_without_a_restart_is_another_incarnation_too(
    own_server: Server, own_world: World
) -> None:
    """A backend that is killed makes the server recover, and its start time stays the same."""
    world = own_world
    body = Doubt(world)
    victim = await asyncpg.connect(own_server.dsn)
    engine: Engine

    def kills_a_backend(event: Event) -> None:
        if isinstance(event, events.CommitInDoubt):
            own_server.kill_backend(victim.get_server_pid(), 9)

    engine = Engine(world.pool, observer=kills_a_backend)
    world.proxy.inject(fault("reset", "before the client"))
    with pytest.raises(CommitUnknown):
        await engine.run(body, resolve_commit=True, deadline=20)
    victim.terminate()
    assert world.starts == 1


# --- a COMMIT that waits for a standby


@pytest.fixture
def waits_for_a_standby(own_server: Server) -> Iterator[None]:
    """COMMIT waits for a standby that doesn't exist; what only reads does not."""
    try:
        _set_standby(own_server, "nobody")
        yield
    finally:
        _set_standby(own_server, "")


def _set_standby(server: Server, name: str) -> None:
    run_sql(server.dsn, f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
    run_sql(server.dsn, "SELECT pg_reload_conf()")
    # SHOW in a new session: the postmaster has read it.
    for _ in range(200):
        if run_sql(server.dsn, "SHOW synchronous_standby_names") == name:
            return
    raise AssertionError("the setting did not come")


async def _wait_until_one_waits(dsn: str) -> None:
    """Wait for the look-up's own COMMIT."""
    conn = await asyncpg.connect(dsn)
    try:
        with anyio.fail_after(10):
            while not await conn.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
            ):
                await anyio.sleep(0.01)
    finally:
        await conn.close()


async def _terminate_who_waits(dsn: str) -> None:
    conn = await asyncpg.connect(dsn)
    try:
        with anyio.fail_after(10):
            while not await conn.fetchval(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE wait_event = 'SyncRep' AND backend_type = 'client backend'"
            ):
                await anyio.sleep(0.01)
    finally:
        await conn.close()


@pytest.mark.parametrize("way", ["none", *WAYS])
async def test_a_commit_ended_while_it_waits_for_a_standby_is_in_doubt_while_none_is_there(
    way: str, own_server: Server, own_world: World, request: pytest.FixtureRequest
) -> None:
    """It is visible, and a fail-over would lose it."""
    engine = await own_world.by(way)
    request.getfixturevalue("waits_for_a_standby")
    async with anyio.create_task_group() as group:
        group.start_soon(_terminate_who_waits, own_server.dsn)
        with pytest.raises(CommitUnknown):
            await engine.run(own_world.body, retry=QUICK, resolve_commit=way != "none", deadline=3)
    assert (own_world.starts, own_world.rows()) == (1, 1)
    assert engine.stats().commits_found_committed == 0


@pytest.mark.parametrize("way", WAYS)
async def test_a_commit_ended_while_it_waits_for_a_standby_is_found_committed_when_one_has_it(
    way: str, own_server: Server, own_world: World, request: pytest.FixtureRequest
) -> None:
    engine = await own_world.by(way)
    request.getfixturevalue("waits_for_a_standby")

    async def ended_and_then_there() -> None:
        await _terminate_who_waits(own_server.dsn)
        await _wait_until_one_waits(own_server.dsn)
        assert engine.stats().commits_found_committed == 0
        await anyio.to_thread.run_sync(_set_standby, own_server, "")

    async with anyio.create_task_group() as group:
        group.start_soon(ended_and_then_there)
        assert await engine.run(own_world.body, resolve_commit=True) == "result of start 1"
    assert (own_world.starts, own_world.rows()) == (1, 1)
    assert engine.stats().commits_found_committed == 1


def test_the_faults_that_are_meant_are_the_faults_that_are_there() -> None:
    """Guards the guards: a fault that never fires would make the tests above pass for nothing."""
    injected = Injected(fault("cut", "before the client"))
    commit = Message(1, "server", "C", 1, b"COMMIT\0")
    assert injected.takes(commit)
    assert not injected.takes(Message(1, "server", "C", 1, b"ROLLBACK\0"))
    assert Injected(fault("cut", "before the server")).takes(Message(1, "client", "Q", 1, b"", "COMMIT"))
