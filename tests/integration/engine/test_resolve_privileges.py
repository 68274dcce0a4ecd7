"""`resolve_commit=True` for an ordinary role: what it needs of the server, and what others see meanwhile."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from dbop_raw import CommitTokens, CommitUnknown, Engine, Event, events
from dbop_raw.engine.commit import Resolution, XidRecord
from dbop_raw.testing import Fault, FaultProxy, Server, postgres, query
from dbop_raw.testing.local import LocalServer
from dbop_raw.testing.server import run_sql
from tests.support.bodies import insert, rows
from tests.support.dsn import without_tls
from tests.support.observing import Seen
from tests.support.pools import behind
from tests.support.protocol import answer_to_commit
from tests.support.servers import own_server
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

TOKENS = CommitTokens()
WAYS = pytest.mark.parametrize("way", ["xid", "token"])
NAME = "billing 4711"


# --- a role that may not read pg_control_system(), as on managed servers


def limited(dsn: str) -> str:
    """Make a role that may do what an application does, and no more; gives its DSN."""
    role = f"app_{uuid.uuid4().hex[:8]}"
    for statement in (
        f"CREATE ROLE {role} LOGIN",
        f"GRANT SELECT, INSERT ON t TO {role}",
        "REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC",
    ):
        run_sql(dsn, statement)
    return dsn.replace("//postgres@", f"//{role}@")


@pytest.fixture
def limited_dsn(dsn: str) -> Iterator[str]:
    limited_dsn = limited(dsn)
    role = limited_dsn.partition("//")[2].partition("@")[0]
    yield limited_dsn
    run_sql(dsn, f"DROP OWNED BY {role}")
    run_sql(dsn, f"DROP ROLE {role}")


@asynccontextmanager
async def engine_as(server: Server, dsn: str, **options: Any) -> AsyncIterator[tuple[FaultProxy, Engine]]:
    async with behind(server, dsn, server_settings={"application_name": NAME}) as (proxy, pool):
        assert await pool.fetchval("SELECT rolsuper FROM pg_roles WHERE rolname = current_user") is False
        yield proxy, Engine(pool, **options)


async def test_a_role_that_may_not_read_pg_control_system_can_run_with_resolve_commit(
    limited_dsn: str, pool: asyncpg.Pool, postgres_server: Server
) -> None:
    """It goes without: the server's start time, to the microsecond, tells servers apart as well.

    The contract would also allow an error that says what to grant. But nothing is in doubt yet, and on a
    managed server nobody can grant it.
    """
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        run_sql(limited_dsn, "SELECT system_identifier FROM pg_control_system()")
    async with engine_as(postgres_server, limited_dsn) as (_, engine):
        assert await engine.run(insert, resolve_commit=True) == 1
    assert await rows(pool) == [1]


@pytest.mark.parametrize("where", ["before the server", "before the client"])
async def test_a_role_that_may_not_read_pg_control_system_has_its_commit_resolved(
    where: str, limited_dsn: str, pool: asyncpg.Pool, postgres_server: Server
) -> None:
    seen = Seen()
    starts: list[int] = []

    async def body(conn: Any) -> int:
        starts.append(1)
        return await insert(conn)

    async with engine_as(postgres_server, limited_dsn, observer=seen) as (proxy, engine):
        proxy.inject(
            Fault("reset", when=query("COMMIT") if where == "before the server" else answer_to_commit)
        )
        assert await engine.run(body, resolve_commit=True, deadline=10) == 1
    (resolved,) = seen.of(events.CommitResolved)
    assert (resolved.outcome, len(starts)) == (
        ("aborted", 2) if where == "before the server" else ("committed", 1)
    )
    assert await rows(pool) == [1]


async def test_a_role_that_may_not_read_pg_control_system_is_told_no_lie_after_a_crash() -> None:
    """What it goes without is not all that is looked at: an id from before a crash counts for nothing."""
    with postgres(settings={"max_connections": "40"}) as server:
        run_sql(server.dsn, "CREATE TABLE t (n integer PRIMARY KEY)")

        def crashes_at_the_doubt(event: Event) -> None:
            if isinstance(event, events.CommitInDoubt):
                server.crash()
                server.start()

        dsn = limited(without_tls(server.dsn))
        async with engine_as(server, dsn, observer=crashes_at_the_doubt) as (proxy, engine):
            proxy.inject(Fault("reset", when=answer_to_commit))
            with pytest.raises(CommitUnknown):
                await engine.run(insert, resolve_commit=True, deadline=10)
            assert engine.stats().commits_found_committed == 0


async def test_a_role_that_may_not_read_pg_control_system_needs_it_for_no_token(
    dsn: str, limited_dsn: str, pool: asyncpg.Pool, postgres_server: Server
) -> None:
    await Engine(pool).run(TOKENS.install)
    role = limited_dsn.partition("//")[2].partition("@")[0]
    run_sql(dsn, f"GRANT SELECT, INSERT ON {TOKENS.table} TO {role}")
    async with engine_as(postgres_server, limited_dsn, commit_tokens=TOKENS) as (proxy, engine):
        proxy.inject(Fault("reset", when=answer_to_commit))
        assert await engine.run(insert, resolve_commit=True, deadline=10) == 1
        assert engine.stats().commits_found_committed == 1
    assert await rows(pool) == [1]


# --- what others see of the session while it runs


class Looks:
    """A body that sees how its session is called, from inside and from outside, while it works."""

    def __init__(self, other: asyncpg.Connection) -> None:
        self.other = other
        self.names: list[str] = []

    async def __call__(self, conn: Any) -> int:
        self.names.append(await conn.fetchval("SELECT current_setting('application_name')"))
        result = await insert(conn)
        self.names.append(await conn.fetchval("SHOW application_name"))
        self.names.append(
            await self.other.fetchval(
                "SELECT application_name FROM pg_stat_activity WHERE pid = $1", conn.get_server_pid()
            )
        )
        return result


async def tokens_for(way: str, engine_pool: asyncpg.Pool) -> CommitTokens | None:
    if way == "xid":
        return None
    await Engine(engine_pool).run(TOKENS.install)
    return TOKENS


@WAYS
async def test_a_body_that_is_resolved_runs_under_its_sessions_own_application_name(
    way: str, dsn: str, pool: asyncpg.Pool, other: asyncpg.Connection, postgres_server: Server
) -> None:
    """Who looks at pg_stat_activity for what blocks him sees whose it is; a mark of ours may stand behind."""
    tokens = await tokens_for(way, pool)
    body = Looks(other)
    async with behind(postgres_server, dsn, server_settings={"application_name": NAME}) as (_, named):
        engine = Engine(named, commit_tokens=tokens)
        assert await engine.run(body, resolve_commit=True) == 1
        assert await engine.fetchval("SHOW application_name") == NAME
    assert len(body.names) == 3
    assert all(f"{name} ".startswith(f"{NAME} ") for name in body.names)


@WAYS
@pytest.mark.parametrize("where", ["before the server", "before the client"])
async def test_a_body_that_names_its_session_itself_is_resolved_and_keeps_the_name(
    where: str,
    way: str,
    dsn: str,
    pool: asyncpg.Pool,
    other: asyncpg.Connection,
    postgres_server: Server,
) -> None:
    tokens = await tokens_for(way, pool)
    seen = Seen()
    names: list[str] = []

    async def names_itself(conn: Any) -> int:
        await conn.execute("SET LOCAL application_name = 'nightly job'")
        result = await insert(conn)
        names.append(
            await other.fetchval(
                "SELECT application_name FROM pg_stat_activity WHERE pid = $1", conn.get_server_pid()
            )
        )
        return result

    async with behind(postgres_server, dsn) as (proxy, named):
        engine = Engine(named, commit_tokens=tokens, observer=seen)
        proxy.inject(
            Fault("reset", when=query("COMMIT") if where == "before the server" else answer_to_commit)
        )
        assert await engine.run(names_itself, resolve_commit=True, deadline=10) == 1
    assert [event.outcome for event in seen.of(events.CommitResolved)] == [
        "aborted" if where == "before the server" else "committed"
    ]
    assert set(names) == {"nightly job"}
    assert await rows(pool) == [1]


@WAYS
@pytest.mark.parametrize("where", ["before the server", "before the client"])
async def test_a_session_with_the_longest_name_that_may_be_is_resolved(
    where: str, way: str, dsn: str, pool: asyncpg.Pool, postgres_server: Server
) -> None:
    """PostgreSQL cuts a name at 63 bytes: what is looked up by it must not be what is cut."""
    tokens = await tokens_for(way, pool)
    seen = Seen()
    async with behind(postgres_server, dsn, server_settings={"application_name": "n" * 63}) as (proxy, named):
        engine = Engine(named, commit_tokens=tokens, observer=seen)
        proxy.inject(
            Fault("reset", when=query("COMMIT") if where == "before the server" else answer_to_commit)
        )
        assert await engine.run(insert, resolve_commit=True, deadline=10) == 1
    assert [event.outcome for event in seen.of(events.CommitResolved)] == [
        "aborted" if where == "before the server" else "committed"
    ]
    assert await rows(pool) == [1]


async def test_a_transaction_id_of_a_server_that_has_run_for_long_is_resolved() -> None:
    """Its ids have eighteen digits: with a long name in front, the last of them must not be cut off."""
    with own_server() as server:
        run_sql(server.dsn, "CREATE TABLE t (n integer PRIMARY KEY)")
        let_it_run_for_long(server)
        seen = Seen()
        dsn = without_tls(server.dsn)
        async with behind(server, dsn, server_settings={"application_name": "n" * 63}) as (proxy, pool):
            proxy.inject(Fault("reset", when=answer_to_commit))
            assert await Engine(pool, observer=seen).run(insert, resolve_commit=True, deadline=10) == 1
        assert [event.outcome for event in seen.of(events.CommitResolved)] == ["committed"]


async def test_an_open_transaction_of_a_server_that_has_run_for_long_is_found_and_ended() -> None:
    """The server shows whose transaction it is without the epoch of its id."""
    with own_server() as server:
        let_it_run_for_long(server)
        writer, other = await asyncpg.connect(server.dsn), await asyncpg.connect(server.dsn)
        try:
            record = XidRecord()
            await writer.execute(f"BEGIN; {record.opening()}")
            record.capture(writer)
            assert await record.look_up(other) is None
            await until(writer.is_closed)
            assert await record.look_up(other) is Resolution.ABORTED
        finally:
            writer.terminate()
            other.terminate()


def let_it_run_for_long(server: LocalServer) -> None:
    """Let its next transaction ids be those after 200 million times 2 ** 32 others."""
    server.stop()
    server.binaries.run("pg_resetwal", "-f", "-e", "200000000", "-D", server.place.data_dir)
    server.start()
    assert len(server.sql("SELECT pg_current_xact_id()::text")) == 18
