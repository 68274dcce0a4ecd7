"""Through PgBouncer in transaction mode: what it passes on, breaks, and must not carry over."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Iterator
from typing import Any, Literal

import asyncpg
import pytest

from dbop_raw import (
    CommitTokens,
    CommitUnknown,
    Engine,
    Event,
    Operation,
    OperationTimeout,
    Repair,
    RetriesExhausted,
    RetryPolicy,
    batch,
    classify,
    copy_into,
    copy_text,
    each,
    execute_many,
    operation,
    pipe,
    retry,
    savepoint,
    timeout,
)
from dbop_raw.events import Retried
from dbop_raw.testing import Fault, FaultProxy, Server, query
from dbop_raw.testing.server import run_sql
from tests.support.pgbouncer import PgBouncer, pgbouncer
from tests.support.servers import or_skip, own_server
from tests.support.tables import rows_of

pytestmark = pytest.mark.anyio

PATIENT = RetryPolicy(attempts=40, first_delay=0.02, max_delay=0.25)
TOKENS = CommitTokens()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with own_server() as server:
        yield server


@pytest.fixture
def database(server: Server) -> Iterator[str]:
    dsn = server.create_database()
    run_sql(dsn, "CREATE TABLE t (id integer NOT NULL, body text NOT NULL)")
    yield dsn
    server.drop_database(dsn)


@pytest.fixture
def pooler(server: Server, request: pytest.FixtureRequest) -> Iterator[PgBouncer]:
    """A pooler with the settings that a test is marked with, by `through_pooler`."""
    with or_skip(pgbouncer(server, settings=getattr(request, "param", None))) as pooler:
        yield pooler


def through_pooler(**settings: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("pooler", [settings], indirect=True, ids=[""])


def opened(dsn: str, **options: Any) -> Any:
    # Without TLS: the driver complains of a future of its own when a line is lost while it asks for it.
    fixed = {"min_size": 1, "max_size": 4, "statement_cache_size": 0, "ssl": False}
    return Engine.open(dsn, **(fixed | options))


@operation
async def insert(conn: Any, number: int) -> int:
    result: int = await conn.fetchval("INSERT INTO t VALUES ($1, 'body') RETURNING id", number)
    return result


class TestWhatItPassesOn:
    async def test_savepoints_and_timeouts_work_through_a_pooler(
        self, pooler: PgBouncer, database: str
    ) -> None:
        async with opened(pooler.through(database)) as engine:
            tries = 0

            async def locked_at_first(conn: Any) -> int:
                nonlocal tries
                tries += 1
                if tries == 1:
                    await conn.execute("DO $$BEGIN RAISE lock_not_available; END$$")
                return await insert(1)(conn)

            async def parts(conn: Any) -> None:
                await retry(PATIENT)(locked_at_first)(conn)
                with pytest.raises(asyncpg.NotNullViolationError):
                    await savepoint(lambda c: c.execute("INSERT INTO t VALUES (2, NULL)"))(conn)
                told = await timeout(1.5)(lambda c: c.fetchval("SHOW statement_timeout"))(conn)
                # What is left when it is sent, less 5 %.
                assert 1000 < int(told.removesuffix("ms")) <= 1425
                assert await conn.fetchval("SHOW statement_timeout") == "0"

            await engine.run(parts)
            assert tries == 2

            with pytest.raises(OperationTimeout) as caught:
                await engine.run(pipe(lambda conn: conn.execute("SELECT pg_sleep(5)"), timeout(0.3)))
            assert caught.value.by_server
            async with engine.transaction() as other:
                await other.execute("LOCK TABLE t")
                with pytest.raises(asyncpg.LockNotAvailableError):
                    await engine.run(pipe(insert(3), timeout(2, lock=0.05)))
        assert await rows_of(database) == {1: 1}

    @pytest.mark.parametrize("share", [0.02, 0.6], ids=["sparse", "dense"])
    @pytest.mark.parametrize("kind", ["each", "execute_many", "copy_into", "copy_text"])
    async def test_every_writer_works_through_a_pooler(
        self, pooler: PgBouncer, database: str, kind: str, share: float, rng: random.Random
    ) -> None:
        number = str if kind == "copy_text" else int
        bad = {n for n in range(400) if rng.random() < share} | {5}
        items = [(number(n), None if n in bad else "x") for n in range(400)]
        writers: dict[str, Any] = {
            "each": each(lambda row: lambda conn: conn.execute("INSERT INTO t VALUES ($1, $2)", *row)),
            "execute_many": execute_many("INSERT INTO t VALUES ($1, $2)"),
            "copy_into": copy_into("t", columns=("id", "body")),
            "copy_text": copy_text("t", columns=("id", "body")),
        }
        write = batch(writers[kind])
        async with opened(pooler.through(database)) as engine:
            result = await engine.run(write(items), resolve_commit=True)
        assert {failed.index for failed in result.failed} == bad
        assert {failed.verdict.sqlstate for failed in result.failed} == {"23502"}
        assert await rows_of(database) == dict.fromkeys(sorted(set(range(400)) - bad), 1)

    @through_pooler(default_pool_size="2")
    async def test_the_row_by_row_way_finds_its_function_missing_in_another_session(
        self, pooler: PgBouncer, database: str
    ) -> None:
        items = [(n, None if n % 2 else "x") for n in range(200)]
        write = batch(execute_many("INSERT INTO t VALUES ($1, $2)"))
        functions = "SELECT count(*) FROM pg_catalog.pg_proc WHERE proname LIKE 'dbop_raw\\_%'"
        async with opened(pooler.through(database)) as engine, opened(pooler.through(database)) as other:
            sessions = []
            for _ in range(2):
                async with engine.transaction() as conn:
                    sessions.append(await conn.fetchval("SELECT pg_backend_pid()"))
                    result = await write(items)(conn)
                    assert len(result.failed) == 100
                if len(sessions) == 1:
                    # Whoever takes the pooler's idle session leaves us another one.
                    holder = other.transaction()
                    held = await holder.__aenter__()
                    assert await held.fetchval("SELECT pg_backend_pid()") == sessions[0]
            await holder.__aexit__(None, None, None)
        assert sessions[0] != sessions[1]
        assert run_sql(database, functions) == 2, "the row-by-row way was not taken in both sessions"
        assert await rows_of(database) == dict.fromkeys(range(0, 200, 2), 2)


class TestWhatItMustNotCarryOver:
    @through_pooler(default_pool_size="1")
    async def test_no_session_state_leaks_to_other_clients(self, pooler: PgBouncer, database: str) -> None:
        dense = [(n, None if n % 2 else "x") for n in range(100)]
        # The driver itself sets `jit` and puts it back: what counts is what is not as it was.
        settings = (
            "SELECT name || '=' || setting FROM pg_catalog.pg_settings "
            "WHERE source = 'session' AND setting IS DISTINCT FROM reset_val"
        )
        async with FaultProxy(pooler.host, pooler.port) as proxy:
            fresh = await asyncpg.connect(pooler.through(database), statement_cache_size=0)
            before = await fresh.fetch(settings)
            pid = await fresh.fetchval("SELECT pg_backend_pid()")
            await fresh.close()
            # Without the pool's reset query: it would hide what we leave behind.
            async with opened(proxy.dsn(database), reset=_no_reset, commit_tokens=TOKENS) as engine:
                await engine.run(TOKENS.install)
                await engine.run(pipe(insert(1), timeout(1, lock=0.5), retry(PATIENT)), deadline=5)
                await engine.run(insert(2), resolve_commit=True, isolation="serializable")
                await engine.run(lambda c: c.fetch("TABLE t"), readonly=True)
                await engine.run(batch(execute_many("INSERT INTO t VALUES ($1, $2)"))(dense))
                await engine.run(batch(copy_into("t", columns=("id", "body")))(dense))
                with pytest.raises(OperationTimeout):
                    await engine.run(lambda c: c.execute("SELECT pg_sleep(5)"), deadline=0.2)
                with pytest.raises(asyncpg.DivisionByZeroError):
                    await engine.run(lambda c: c.execute("SELECT 1/0"), resolve_commit=True)
                async with opened(proxy.dsn(database), reset=_no_reset) as by_xid:
                    await by_xid.run(insert(3), resolve_commit=True, deadline=5)
            sent = [message.sql for message in proxy.messages if message.sql]
            fresh = await asyncpg.connect(pooler.through(database), statement_cache_size=0)
            try:
                assert await fresh.fetchval("SELECT pg_backend_pid()") == pid, "not the session that we used"
                assert await fresh.fetch(settings) == before
                for name, default in (
                    ("statement_timeout", "0"),
                    ("lock_timeout", "0"),
                    ("application_name", ""),
                    ("search_path", '"$user", public'),
                    ("default_transaction_isolation", "read committed"),
                    ("default_transaction_read_only", "off"),
                ):
                    assert await fresh.fetchval(f"SHOW {name}") == default
                assert await fresh.fetchval("SELECT count(*) FROM pg_prepared_statements") == 0
                assert await fresh.fetchval("SELECT count(*) FROM pg_cursors WHERE name <> ''") == 0
                held = "SELECT count(*) FROM pg_locks WHERE pid = $1 AND locktype <> 'virtualxid'"
                assert await fresh.fetchval(f"{held} AND relation <> 'pg_locks'::regclass", pid) == 0
            finally:
                await fresh.close()
        assert any("set_config('statement_timeout'" in sql for sql in sent)
        for sql in sent:
            outside = re.sub(r"\$d_\w+\$.*\$d_\w+\$", "", sql, flags=re.DOTALL)
            assert not re.search(r"\bSET\s+(?!LOCAL\b|CONSTRAINTS\b)|\bLISTEN\b|\bPREPARE\b", outside), sql
            # The driver's own `jit` aside: it is put back.
            assert not re.search(r"set_config\((?!'jit')[^;]*false\)", sql), sql


async def _no_reset(_conn: Any) -> None:
    """Leave the session as it is."""


class TestAForgottenStatementCache:
    @pytest.mark.parametrize("how", ["run", "run with retry", "fetchval"])
    async def test_the_error_of_a_forgotten_statement_cache_explains_it(
        self, pooler: PgBouncer, database: str, how: str
    ) -> None:
        policy = RetryPolicy(attempts=2, first_delay=0.001)

        async def read(conn: Any) -> Any:
            return await conn.fetchval("SELECT $1::integer + 1", 1)

        dsn = pooler.through(database)
        async with Engine.open(dsn, min_size=4, max_size=4, ssl=False) as engine:
            calls = {
                "run": lambda: engine.run(read),
                "run with retry": lambda: engine.run(read, retry=policy),
                "fetchval": lambda: engine.fetchval("SELECT $1::integer + 1", 1),
            }

            async def many() -> None:
                for _ in range(100):
                    results = await asyncio.gather(*(calls[how]() for _ in range(8)), return_exceptions=True)
                    for result in results:
                        if isinstance(result, BaseException):
                            raise result

            with pytest.raises((asyncpg.PostgresError, RetriesExhausted)) as caught:
                await many()
        error = caught.value
        assert classify(error).sqlstate in {"26000", "42P05"}
        assert len(error.__notes__) == 1
        assert "statement_cache_size=0" in error.__notes__[0]


class TestItsLimits:
    @through_pooler(default_pool_size="1", query_wait_timeout="1")
    async def test_query_wait_timeout_is_waited_out_by_a_retry(
        self, pooler: PgBouncer, database: str
    ) -> None:
        retried = asyncio.Event()

        def observer(event: Event) -> None:
            if isinstance(event, Retried) and event.sqlstate == "08P01":
                retried.set()

        async with (
            opened(pooler.through(database), max_size=1) as holder,
            opened(pooler.through(database), min_size=0, max_size=1, observer=observer) as engine,
        ):
            async with holder.transaction() as conn:
                await insert(1)(conn)
                with pytest.raises(
                    (asyncpg.PostgresConnectionError, asyncpg.ProtocolViolationError)
                ) as caught:
                    await engine.run(insert(2))
                assert classify(caught.value).sqlstate == "08P01"
                waiting = asyncio.create_task(engine.run(insert(3), retry=PATIENT))
                async with asyncio.timeout(5):
                    await retried.wait()
            assert await waiting == 3
        assert await rows_of(database) == {1: 1, 3: 1}

    @through_pooler(max_client_conn="3")
    async def test_max_client_conn_is_waited_out_by_a_retry(self, pooler: PgBouncer, database: str) -> None:
        seen: list[Event] = []
        dsn = pooler.through(database)
        async with opened(dsn, min_size=0, max_size=1, observer=seen.append) as engine:
            async with opened(dsn, min_size=3):
                with pytest.raises(asyncpg.PostgresError) as caught:
                    await engine.run(insert(1))
                verdict = classify(caught.value)
                assert verdict.sqlstate in {"08P01", "53300"}
                waiting = asyncio.create_task(engine.run(insert(2), retry=PATIENT))
                await asyncio.sleep(0.3)
                assert not waiting.done()
            assert await waiting == 2
        assert await rows_of(database) == {2: 1}
        refused = [event for event in seen if isinstance(event, Retried)]
        assert 1 <= len(refused) <= 15
        assert {event.level for event in refused} == {"transaction"}

    @through_pooler(idle_transaction_timeout="1")
    async def test_idle_transaction_timeout_costs_a_try_and_no_row(
        self, pooler: PgBouncer, database: str
    ) -> None:
        starts = 0

        async def slow_at_first(conn: Any) -> int:
            nonlocal starts
            starts += 1
            await insert(starts)(conn)
            if starts == 1:
                await asyncio.sleep(2.5)
            return await insert(starts + 10)(conn)

        async with opened(pooler.through(database)) as engine:
            assert await engine.run(slow_at_first, retry=PATIENT) == 12
            assert engine.stats().evicted == 1
        assert await rows_of(database) == {2: 1, 12: 1}


class TestCommitInDoubt:
    """The pooler dies while COMMIT is under way; it is told by the server, whatever became of the pooler."""

    @pytest.mark.parametrize("by", ["token", "xid"])
    @pytest.mark.parametrize("side", ["before", "after"])
    async def test_a_commit_in_doubt_behind_a_pooler_is_resolved_and_never_guessed(
        self, server: Server, database: str, side: Literal["before", "after"], by: str
    ) -> None:
        bodies = 0

        async def body(conn: Any) -> int:
            nonlocal bodies
            bodies += 1
            return await insert(7)(conn)

        async with FaultProxy(server.host, server.port) as proxy:
            with or_skip(pgbouncer(Server(proxy.host, proxy.port, server.user))) as pooler:
                tokens = TOKENS if by == "token" else None
                async with opened(pooler.through(database), commit_tokens=tokens) as engine:
                    if tokens:
                        await engine.run(tokens.install)
                    lost = proxy.inject(Fault("hang", when=query("COMMIT"), side=side))
                    run = asyncio.create_task(engine.run(body, resolve_commit=True))
                    async with asyncio.timeout(5):
                        await lost.wait()
                    pooler.restart()
                    async with asyncio.timeout(10):
                        result = await run
                    # What was held back may arrive now, late: it must not write a second row.
                    proxy.heal()
                    await asyncio.sleep(0.1)
                    stats = engine.stats()
        assert result == 7
        assert await rows_of(database) == {7: 1}
        assert bodies == (1 if side == "after" else 2)
        assert stats.commits_in_doubt == 1
        assert (stats.commits_found_committed, stats.commits_found_aborted) == (
            (1, 0) if side == "after" else (0, 1)
        )

    async def test_a_commit_in_doubt_behind_a_pooler_is_commit_unknown_where_nobody_resolves_it(
        self, server: Server, database: str
    ) -> None:
        async with FaultProxy(server.host, server.port) as proxy:
            with or_skip(pgbouncer(Server(proxy.host, proxy.port, server.user))) as pooler:
                async with opened(pooler.through(database)) as engine:
                    lost = proxy.inject(Fault("hang", when=query("COMMIT"), side="after"))
                    run = asyncio.create_task(engine.run(insert(7), retry=PATIENT))
                    async with asyncio.timeout(5):
                        await lost.wait()
                    pooler.restart()
                    with pytest.raises(CommitUnknown) as caught:
                        await run
                    assert classify(caught.value).repair is Repair.UNKNOWN
        assert await rows_of(database) == {7: 1}


class TestKilledUnderLoad:
    @pytest.mark.parametrize("by", ["token", "xid"])
    async def test_each_acknowledged_row_is_there_once_though_the_pooler_is_killed(
        self, pooler: PgBouncer, database: str, rng: random.Random, scale: float, by: str
    ) -> None:
        acknowledged: set[int] = set()
        failed: dict[int, Exception] = {}
        numbers = iter(range(1_000_000))
        tokens = TOKENS if by == "token" else None
        stop = asyncio.Event()
        kills = 0

        async def work(engine: Engine) -> None:
            while not stop.is_set():
                number = next(numbers)
                try:
                    await engine.run(_twice(number), retry=PATIENT, deadline=10, resolve_commit=True)
                except Exception as exc:  # noqa: BLE001 - judged below
                    failed[number] = exc
                else:
                    acknowledged.add(number)

        async with opened(pooler.through(database), max_size=8, commit_tokens=tokens) as engine:
            if tokens:
                await engine.run(tokens.install)
            workers = [asyncio.create_task(work(engine)) for _ in range(8)]
            loop = asyncio.get_running_loop()
            end = loop.time() + 2 * scale
            while loop.time() < end:
                await asyncio.sleep(rng.uniform(0.02, 0.3))
                pooler.kill()
                kills += 1
                await asyncio.sleep(rng.uniform(0, 0.05))
                pooler.start()
            stop.set()
            await asyncio.gather(*workers)
            stats = engine.stats()
        rows = await rows_of(database)
        open_ = {number for number, exc in failed.items() if isinstance(exc, CommitUnknown)}
        print(  # noqa: T201 - figures
            f"{by}: {kills} kills, {len(acknowledged)} acknowledged, {len(failed)} raised "
            f"({len(open_)} CommitUnknown), in doubt {stats.commits_in_doubt}, found committed "
            f"{stats.commits_found_committed}, found aborted {stats.commits_found_aborted}"
        )
        assert kills >= 5
        assert acknowledged
        assert {number for number, times in rows.items() if times != 2} == set(), "a lost or doubled half"
        assert acknowledged <= rows.keys(), "acknowledged and lost"
        assert rows.keys() - acknowledged <= open_, "there, though its call said that it is not"
        assert not failed, f"a pooler that comes back is waited for, yet: {failed}"


def _twice(number: int) -> Operation[None]:
    """Two statements, so that a half done transaction shows."""

    async def body(conn: Any) -> None:
        await insert(number)(conn)
        await insert(number)(conn)

    return pipe(body)
