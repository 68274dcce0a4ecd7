"""An error in answer to COMMIT is a sure no only where PostgreSQL's own checks raise it.

A distributed server is played by a deferred constraint trigger, which runs inside of COMMIT as a callback of
Citus does: it has the row written on another connection ("another node has committed"), then raises.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest

from dbop_raw import (
    CommitUnknown,
    Engine,
    Event,
    Repair,
    RetryPolicy,
    Rule,
    batch,
    copy_into,
    each,
    events,
    execute_many,
    operation,
)
from dbop_raw.testing import Server
from dbop_raw.testing.server import run_sql

pytestmark = pytest.mark.anyio

P = RetryPolicy(attempts=4, first_delay=0.001, max_delay=0.01)

# `fires` counts over rollbacks: the error comes at the first COMMIT only, so a second attempt would succeed.
SCHEMA = (
    "CREATE EXTENSION dblink",
    "CREATE TABLE t (n integer)",
    "CREATE TABLE plain (n integer)",
    "CREATE TABLE trouble (code text, elsewhere text)",
    "CREATE SEQUENCE fires",
    """
    CREATE FUNCTION commits_elsewhere() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE how trouble%ROWTYPE;
    BEGIN
        SELECT * INTO how FROM trouble;
        IF FOUND AND nextval('fires') = 1 THEN
            IF how.elsewhere IS NOT NULL THEN
                PERFORM dblink_exec(how.elsewhere, format(
                    'SET session_replication_role = replica; INSERT INTO t VALUES (%s)', NEW.n));
            END IF;
            RAISE EXCEPTION 'at COMMIT' USING ERRCODE = how.code;
        END IF;
        RETURN NULL;
    END $$
    """,
    (
        "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION commits_elsewhere()"
    ),
)


@pytest.fixture(scope="module")
def database(postgres_server: Server) -> Iterator[str]:
    dsn = postgres_server.create_database()
    for statement in SCHEMA:
        run_sql(dsn, statement)
    yield dsn
    postgres_server.drop_database(dsn)


class World:
    """A pool of one connection, and a COMMIT that fails in a given way."""

    def __init__(self, pool: asyncpg.Pool, dsn: str) -> None:
        self.pool = pool
        self.dsn = dsn
        self.starts = 0
        self.seen: list[Event] = []

    def engine(self, **options: Any) -> Engine:
        return Engine(self.pool, observer=self.seen.append, **options)

    def commit_fails(self, code: str, *, elsewhere: bool) -> None:
        """The next COMMIT that has written to `t` raises `code`, after the row was committed elsewhere."""
        run_sql(self.dsn, "ALTER SEQUENCE fires RESTART")
        run_sql(self.dsn, "TRUNCATE t, trouble")
        link = f"'{self.dsn}'" if elsewhere else "NULL"
        run_sql(self.dsn, f"INSERT INTO trouble VALUES ('{code}', {link})")

    def rows(self) -> int:
        found: int = run_sql(self.dsn, "SELECT count(*) FROM t")
        return found

    async def insert(self, conn: Any) -> None:
        self.starts += 1
        await conn.execute("INSERT INTO t VALUES (1)")


@pytest.fixture
async def world(database: str) -> AsyncIterator[World]:
    pool = await asyncpg.create_pool(database, min_size=0, max_size=1)
    yield World(pool, database)
    await pool.close()


OVERRIDES = [None, Repair.TRANSACTION, Rule(Repair.NEVER, item=True, reason="a row of Citus under COPY")]


@pytest.mark.parametrize("override", OVERRIDES, ids=["no override", "transaction", "item"])
@pytest.mark.parametrize("code", ["XX000", "08006", "57P01", "58030", "53100", "57014", "40003"])
async def test_what_postgresql_does_not_refuse_a_commit_by_leaves_it_in_doubt_whatever_an_override_says(
    code: str, override: Rule | Repair | None, world: World
) -> None:
    world.commit_fails(code, elsewhere=True)
    engine = world.engine(verdicts=None if override is None else {code: override, code[:2]: override})
    with pytest.raises(CommitUnknown) as caught:
        await engine.run(world.insert, retry=P)
    assert isinstance(caught.value.__cause__, asyncpg.PostgresError)
    assert caught.value.__cause__.sqlstate == code
    stats = engine.stats()
    assert (world.starts, world.rows(), stats.commits_in_doubt) == (1, 1, 1)
    assert [type(e) for e in world.seen].count(events.CommitInDoubt) == 1
    assert not any(isinstance(e, events.Committed | events.RolledBack) for e in world.seen)


@pytest.mark.parametrize("override", OVERRIDES, ids=["no override", "transaction", "item"])
@pytest.mark.parametrize(
    "write",
    [
        batch(execute_many("INSERT INTO t VALUES ($1)")),
        batch(copy_into("t", columns=("n",))),
        batch(each(operation(lambda conn, row: conn.execute("INSERT INTO t VALUES ($1)", row[0])))),
    ],
    ids=["execute_many", "copy_into", "each"],
)
async def test_a_batch_whose_commit_is_in_doubt_is_not_written_twice(
    write: Any, override: Rule | Repair | None, world: World
) -> None:
    world.commit_fails("XX000", elsewhere=True)
    engine = world.engine(verdicts=None if override is None else {"XX000": override})
    with pytest.raises(CommitUnknown):
        await engine.run(write([(7,)]), retry=P)
    assert (world.rows(), engine.stats().commits_in_doubt) == (1, 1)


async def test_a_statement_under_autocommit_whose_own_commit_is_in_doubt_is_not_written_twice(
    world: World,
) -> None:
    world.commit_fails("XX000", elsewhere=True)
    engine = world.engine(verdicts={"XX000": Repair.TRANSACTION})
    with pytest.raises(CommitUnknown):
        await engine.run(world.insert, retry=P, autocommit=True)
    assert (world.starts, world.rows()) == (1, 1)


@pytest.mark.parametrize("code", ["23505", "23514", "22012", "P0001", "42501", "44000", "40002", "MY001"])
async def test_what_a_deferred_trigger_refuses_is_raised_unchanged_and_nothing_is_in_doubt(
    code: str, world: World
) -> None:
    world.commit_fails(code, elsewhere=False)
    engine = world.engine()
    with pytest.raises(asyncpg.PostgresError) as caught:
        await engine.run(world.insert, retry=P)
    assert caught.value.sqlstate == code
    stats = engine.stats()
    assert (world.starts, world.rows(), stats.commits_in_doubt, stats.evicted) == (1, 0, 0, 0)


@pytest.mark.parametrize("code", ["40001", "40P01", "55P03", "40000"])
async def test_a_transient_error_of_a_deferred_trigger_is_tried_again(code: str, world: World) -> None:
    world.commit_fails(code, elsewhere=False)
    engine = world.engine()
    await engine.run(world.insert, retry=P)
    stats = engine.stats()
    assert (world.starts, world.rows(), stats.commits_in_doubt, stats.evicted) == (2, 1, 0, 0)


@pytest.mark.parametrize("code", ["57P01", "57P02", "57P03", "08006"])
async def test_a_server_that_tells_of_another_node_keeps_its_connection_and_the_transaction_is_tried_again(
    code: str, world: World
) -> None:
    engine = world.engine()
    pids: list[int] = []

    async def body(conn: Any) -> None:
        pids.append(await conn.fetchval("SELECT pg_backend_pid()"))
        await conn.execute("INSERT INTO plain VALUES (1)")
        if len(pids) == 1:
            await conn.execute(f"DO $$ BEGIN RAISE 'the other node' USING ERRCODE = '{code}'; END $$")

    await engine.run(body, retry=P)
    assert len(pids) == 2
    assert (len(set(pids)), engine.stats().evicted) == (1, 0)
