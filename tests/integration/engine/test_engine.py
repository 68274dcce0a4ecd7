"""The engine on a real server: what an operation runs in, who gets a connection, what is thrown away."""

# ruff: noqa: ASYNC110 - what the server or the pool has done, only asking again can tell

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import fields
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
    OperationTimeout,
    PolicyError,
    Repair,
    RetriesExhausted,
    RetryBudget,
    RetryPolicy,
    Rule,
    TransactionAborted,
    TransactionMisuse,
    batch,
    each,
    events,
    operation,
    pipe,
    retry,
    savepoint,
    timeout,
)
from dbop_raw.testing import FaultProxy, Server, postgres
from dbop_raw.testing.server import run_sql

pytestmark = pytest.mark.anyio

QUICK = RetryPolicy(attempts=3, first_delay=0.001, max_delay=0.01)
PASSWORD = "sesame-4711"

Body = Callable[..., Awaitable[Any]]


@pytest.fixture(scope="module")
def dsn(postgres_server: Server) -> Iterator[str]:
    dsn = postgres_server.create_database()
    run_sql(dsn, "CREATE TABLE t (n integer PRIMARY KEY)")
    yield without_tls(dsn)
    postgres_server.drop_database(dsn)


def without_tls(dsn: str) -> str:
    """Without asyncpg's question for TLS: cancelled in the middle, it leaves an error nobody retrieves."""
    return f"{dsn}{'&' if '?' in dsn else '?'}sslmode=disable"


@pytest.fixture(scope="module")
def own_server() -> Iterator[Server]:
    """A server that may be given a standby: never one that somebody else's DSN names."""
    with postgres(settings={"max_connections": "60"}) as server:
        yield server


@pytest.fixture
async def pool(dsn: str) -> AsyncIterator[asyncpg.Pool]:
    """Four connections; a test that keeps one fails here."""
    pool = await asyncpg.create_pool(dsn, min_size=0, max_size=4)
    try:
        await start_afresh(pool)
        yield pool
        with anyio.fail_after(5):
            await pool.close()
    finally:
        pool.terminate()


@pytest.fixture
async def single(dsn: str) -> AsyncIterator[asyncpg.Pool]:
    """One connection."""
    pool = await asyncpg.create_pool(dsn, min_size=1, max_size=1)
    try:
        await start_afresh(pool)
        yield pool
        with anyio.fail_after(5):
            await pool.close()
    finally:
        pool.terminate()


async def start_afresh(pool: asyncpg.Pool) -> None:
    """End what an earlier test left on the server (it notices a client's end late), and empty the table."""
    await pool.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
    )
    await pool.execute("TRUNCATE t")


async def rows(pool: asyncpg.Pool) -> list[int]:
    return [row["n"] for row in await pool.fetch("SELECT n FROM t ORDER BY n")]


async def insert(conn: Any, n: int = 1) -> int:
    await conn.execute("INSERT INTO t VALUES ($1)", n)
    return n


async def sleep(conn: Any, seconds: float = 30.0) -> None:
    await conn.execute("SELECT pg_sleep($1)", seconds)


async def backend(conn: Any) -> int:
    pid: int = await conn.fetchval("SELECT pg_backend_pid()")
    return pid


async def probe(conn: Any) -> asyncpg.Record:
    """Write, then tell what the statement ran in."""
    await insert(conn)
    record: asyncpg.Record = await conn.fetchrow(
        "SELECT current_setting('statement_timeout') AS limit, "
        "pg_current_xact_id_if_assigned() IS NOT NULL AS in_the_writing_transaction"
    )
    return record


class Seen:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if type(event) is kind]


# --- every kind of operation really runs inside the scope


class Bound:
    def __init__(self, body: Body) -> None:
        self.body = body

    async def method(self, conn: Any) -> Any:
        return await self.body(conn)


class CallableObject:
    def __init__(self, body: Body) -> None:
        self.body = body

    async def __call__(self, conn: Any) -> Any:
        return await self.body(conn)


async def _with_prefix(body: Body, conn: Any) -> Any:
    return await body(conn)


def _async_def(body: Body) -> Body:
    async def plain(conn: Any) -> Any:
        return await body(conn)

    return plain


KINDS: dict[str, Callable[[Body], Any]] = {
    "async def": _async_def,
    "lambda that returns an awaitable": lambda body: lambda conn: body(conn),  # noqa: PLW0108
    "functools.partial": lambda body: functools.partial(_with_prefix, body),
    "bound method": lambda body: Bound(body).method,
    "callable object": CallableObject,
    "@operation": lambda body: operation(_async_def(body))(),
    "lambda that calls an operation": lambda body: lambda conn: operation(_async_def(body))()(conn),  # noqa: PLW0108
}


@pytest.mark.parametrize("kind", KINDS)
async def test_it_runs_in_the_transaction_and_under_the_timeout(kind: str, pool: asyncpg.Pool) -> None:
    found = await Engine(pool).run(pipe(KINDS[kind](probe), timeout(7)))
    assert found["in_the_writing_transaction"]
    assert 6500 < int(found["limit"].removesuffix("ms")) <= 6750
    assert await rows(pool) == [1]


@pytest.mark.parametrize("kind", KINDS)
async def test_its_failure_rolls_back(kind: str, pool: asyncpg.Pool) -> None:
    async def fails(conn: Any) -> None:
        await insert(conn)
        raise LookupError("of the body")

    with pytest.raises(LookupError, match="of the body"):
        await Engine(pool).run(pipe(KINDS[kind](fails), timeout(7)))
    assert await rows(pool) == []


async def test_a_coroutine_that_exists_already_is_refused(pool: asyncpg.Pool) -> None:
    with pytest.raises(TypeError, match=r"run only once.*lambda conn"):
        await Engine(pool).run(insert(None))  # type: ignore[arg-type]


async def test_a_sync_function_is_refused_and_rolls_back(pool: asyncpg.Pool) -> None:
    def not_async(conn: Any) -> int:
        assert conn is not None
        return 7

    engine = Engine(pool)
    with pytest.raises(TypeError, match=r"not_async returned int, which can't be awaited.*async def"):
        await engine.run(not_async)  # type: ignore[arg-type]
    assert engine.stats().in_use == 0


@pytest.mark.parametrize("wrong", [None, "SELECT 1", 7, Bound])
async def test_what_is_no_operation_is_refused(wrong: Any, pool: asyncpg.Pool) -> None:
    with pytest.raises(TypeError, match="not an operation"):
        await Engine(pool).run(wrong)


# --- the modes of a transaction


MODES = (
    "SELECT current_setting('transaction_isolation') AS isolation, "
    "current_setting('transaction_read_only') AS readonly, "
    "current_setting('transaction_deferrable') AS deferrable"
)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("read committed", "off", "off")),
        ({"isolation": "read committed"}, ("read committed", "off", "off")),
        ({"isolation": "repeatable read"}, ("repeatable read", "off", "off")),
        ({"isolation": "serializable"}, ("serializable", "off", "off")),
        ({"readonly": True}, ("read committed", "on", "off")),
        (
            {"isolation": "serializable", "readonly": True, "deferrable": True},
            ("serializable", "on", "on"),
        ),
    ],
)
async def test_the_modes_are_really_set(
    options: dict[str, Any], expected: tuple[str, str, str], pool: asyncpg.Pool
) -> None:
    engine = Engine(pool)
    assert tuple(await engine.run(lambda conn: conn.fetchrow(MODES), **options)) == expected
    async with engine.transaction(**options) as conn:
        assert tuple(await conn.fetchrow(MODES)) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"isolation": "read uncommitted"},
        {"isolation": "SERIALIZABLE"},
        {"deferrable": True},
        {"deferrable": True, "readonly": True},
        {"deferrable": True, "isolation": "serializable"},
        {"autocommit": True, "isolation": "serializable"},
        {"autocommit": True, "resolve_commit": True},
        {"autocommit": True, "deferrable": True, "readonly": True, "isolation": "serializable"},
        {"deadline": 0},
        {"deadline": -1},
        {"deadline": float("nan")},
        {"deadline": True},
        {"retry": 3},
    ],
    ids=repr,
)
async def test_options_that_are_not_allowed_are_refused_before_anything_is_taken(
    options: dict[str, Any], pool: asyncpg.Pool
) -> None:
    engine = Engine(pool)
    with pytest.raises(PolicyError):
        await engine.run(insert, **options)
    assert engine.stats().acquires == 0


@pytest.mark.parametrize(
    "options",
    [
        {"acquire_timeout": 0},
        {"acquire_timeout": float("inf")},
        {"max_waiting": -1},
        {"max_waiting": True},
        {"max_waiting": 1.5},
        {"observer": "log"},
        {"leak_after": 0},
        {"verdicts": {"4000": Repair.NEVER}},
    ],
    ids=repr,
)
async def test_an_engine_of_options_that_are_not_allowed_is_not_made(
    options: dict[str, Any], pool: asyncpg.Pool
) -> None:
    with pytest.raises(PolicyError):
        Engine(pool, **options)


@pytest.mark.parametrize("wrong", [None, "postgresql://localhost/x", object()])
def test_what_is_no_pool_is_refused(wrong: Any) -> None:
    with pytest.raises(PolicyError, match="not an asyncpg pool"):
        Engine(wrong)


async def test_autocommit_begins_no_transaction(pool: asyncpg.Pool) -> None:
    async def fails_after_its_statement(conn: Any) -> None:
        await insert(conn)
        assert not conn.is_in_transaction()
        raise LookupError

    with pytest.raises(LookupError):
        await Engine(pool).run(fails_after_its_statement, autocommit=True)
    assert await rows(pool) == [1]


# --- operations within operations


add = operation(insert)


async def test_an_operation_called_with_the_connection_joins_its_transaction(pool: asyncpg.Pool) -> None:
    async def outer(conn: Any) -> None:
        await add(1)(conn)
        await pipe(add(2), timeout(5), retry(QUICK))(conn)
        raise LookupError

    with pytest.raises(LookupError):
        await Engine(pool).run(outer)
    assert await rows(pool) == []


async def test_a_timeout_inside_a_body_ends_with_it(pool: asyncpg.Pool) -> None:
    async def limit(conn: Any) -> str:
        found: str = await conn.fetchval("SELECT current_setting('statement_timeout')")
        return found

    async def outer(conn: Any) -> tuple[str, str, str]:
        before = await limit(conn)
        inside = await pipe(limit, timeout(2))(conn)
        return before, inside, await limit(conn)

    before, inside, after = await Engine(pool).run(pipe(outer, timeout(7)))
    # What is left by then: never longer than the deadline around it.
    assert 2000 < int(after.removesuffix("ms")) <= int(before.removesuffix("ms"))
    assert int(inside.removesuffix("ms")) < 2000 < int(before.removesuffix("ms"))


async def test_a_savepoint_that_fails_leaves_the_rest(pool: asyncpg.Pool) -> None:
    async def outer(conn: Any) -> None:
        await add(1)(conn)
        with pytest.raises(asyncpg.UniqueViolationError):
            await savepoint(add(1))(conn)
        await add(2)(conn)

    await Engine(pool).run(outer)
    assert await rows(pool) == [1, 2]


# --- a transaction for plain code


async def test_a_transaction_commits(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    async with engine.transaction() as conn:
        await insert(conn)
        await add(2)(conn)
        assert await rows(pool) == []
    assert await rows(pool) == [1, 2]
    assert engine.stats().in_use == 0


async def test_a_transaction_rolls_back_on_an_error(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    with pytest.raises(LookupError):  # noqa: PT012 - the block is what is tested
        async with engine.transaction() as conn:
            await insert(conn)
            raise LookupError
    assert await rows(pool) == []
    assert engine.stats().in_use == 0


async def test_a_transaction_within_a_transaction_is_one_of_its_own(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    with pytest.raises(LookupError):  # noqa: PT012 - the block is what is tested
        async with engine.transaction() as outer:
            await insert(outer, 1)
            async with engine.transaction() as inner:
                await insert(inner, 2)
            raise LookupError
    assert await rows(pool) == [2]


async def test_a_savepoint_in_a_transaction_is_undone_alone(pool: asyncpg.Pool) -> None:
    async with Engine(pool).transaction() as conn:
        await insert(conn, 1)
        with pytest.raises(asyncpg.UniqueViolationError):
            await savepoint(add(1))(conn)
        await insert(conn, 2)
    assert await rows(pool) == [1, 2]


async def test_a_batch_in_a_transaction_joins_it(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    with pytest.raises(LookupError):  # noqa: PT012 - the block is what is tested
        async with engine.transaction() as conn:
            result = await batch(each(add))([1, 1, 2])(conn)
            assert [failed.index for failed in result.failed] == [1]
            assert await conn.fetchval("SELECT count(*) FROM t") == 2
            raise LookupError
    assert await rows(pool) == []


async def test_the_deadline_of_a_transaction_is_told_to_the_server(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    with pytest.raises(OperationTimeout) as caught:
        async with engine.transaction(deadline=0.3) as conn:
            await sleep(conn)
    assert (caught.value.seconds, caught.value.by_server) == (0.3, True)
    assert isinstance(caught.value.__cause__, asyncpg.QueryCanceledError)
    assert engine.stats().evicted == 0


async def test_the_deadline_of_a_transaction_ends_what_is_no_statement(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    with pytest.raises(OperationTimeout) as caught:  # noqa: PT012 - the block is what is tested
        async with engine.transaction(deadline=0.2) as conn:
            await insert(conn)
            await anyio.sleep(30)
    assert not caught.value.by_server
    assert await rows(pool) == []
    assert engine.stats().in_use == 0


async def test_the_block_of_a_transaction_may_not_end_it(pool: asyncpg.Pool) -> None:
    with pytest.raises(TransactionMisuse, match=r"engine\.transaction\(\) ended the transaction"):
        async with Engine(pool).transaction() as conn:
            await conn.execute("ROLLBACK")


# --- misuse


async def test_conn_transaction_in_an_operation_says_what_to_use(single: asyncpg.Pool) -> None:
    async def old_habit(conn: Any) -> None:
        await insert(conn)
        async with conn.transaction():
            await insert(conn, 2)

    engine = Engine(single)
    with pytest.raises(TransactionMisuse, match=r"old_habit called conn\.transaction\(\).*savepoint\(op\)"):
        await engine.run(old_habit)
    assert await rows(single) == []
    assert engine.stats().evicted == 0


@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK", "END", "ABORT"])
async def test_a_body_that_ends_the_transaction_is_told_so_and_leaves_a_clean_connection(
    statement: str, single: asyncpg.Pool
) -> None:
    async def ends_it(conn: Any) -> None:
        await conn.execute(statement)

    engine = Engine(single)
    with pytest.raises(TransactionMisuse, match="ends_it ended the transaction itself"):
        await engine.run(pipe(ends_it, timeout(5)))
    assert await engine.run(lambda conn: conn.fetchval("SHOW statement_timeout")) == "0"


async def test_a_body_that_swallows_an_error_gets_transaction_aborted(single: asyncpg.Pool) -> None:
    async def swallows(conn: Any) -> str:
        await insert(conn)
        with pytest.raises(asyncpg.UniqueViolationError):
            await insert(conn)
        return "done"

    engine = Engine(single)
    with pytest.raises(TransactionAborted):
        await engine.run(swallows, retry=QUICK)
    assert await rows(single) == []
    assert engine.stats().retries == 0


# --- who gets a connection


async def test_acquire_timeout_tells_the_numbers(pool: asyncpg.Pool) -> None:
    engine = Engine(pool, acquire_timeout=0.05)
    async with Holding(pool, 4):
        with pytest.raises(AcquireTimeout) as caught:
            await engine.run(insert)
    error = caught.value
    assert (error.seconds, error.size, error.max_size, error.idle, error.waiting) == (0.05, 4, 4, 0, 0)
    assert "acquire_timeout=0.05" in str(error)
    assert "4 of at most 4" in str(error)
    assert engine.stats().acquire_timeouts == 1
    assert engine.stats().waiting == 0


class Holding:
    """Hold `count` connections of the pool, past the engine."""

    def __init__(self, pool: asyncpg.Pool, count: int) -> None:
        self.pool, self.count = pool, count
        self.held: list[Any] = []

    async def __aenter__(self) -> list[Any]:
        self.held = [await self.pool.acquire() for _ in range(self.count)]
        return self.held

    async def __aexit__(self, *_: object) -> None:
        for conn in self.held:
            await self.pool.release(conn)


@pytest.mark.parametrize("max_waiting", [0, 1, 3])
async def test_one_caller_too_many_is_refused_at_once(max_waiting: int, single: asyncpg.Pool) -> None:
    engine = Engine(single, max_waiting=max_waiting)
    async with anyio.create_task_group() as group:
        held = await single.acquire()
        for n in range(max_waiting):
            group.start_soon(engine.run, add(n))
        await until(lambda: engine.stats().waiting == max_waiting)
        with pytest.raises(EngineOverloaded) as caught:
            await engine.run(add(99))
        assert (caught.value.waiting, caught.value.max_waiting, caught.value.max_size) == (
            max_waiting, max_waiting, 1,
        )  # fmt: skip
        await single.release(held)
    assert await rows(single) == list(range(max_waiting))
    assert engine.stats().shed == 1


async def until(happened: Callable[[], Any], seconds: float = 5.0) -> None:
    """Wait until it has happened; a bound for what ought to take no time."""
    with anyio.fail_after(seconds):
        while not happened():
            await anyio.sleep(0.002)


@pytest.mark.parametrize("warm", [False, True])
async def test_nobody_is_refused_while_connections_are_free(warm: bool, pool: asyncpg.Pool) -> None:
    engine = Engine(pool, max_waiting=0)
    if warm:
        async with Holding(pool, 4):
            pass
    for _ in range(3):
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(engine.run, backend)
    assert engine.stats().shed == 0


async def test_of_many_callers_as_many_run_or_wait_as_there_is_room_for(pool: asyncpg.Pool) -> None:
    engine = Engine(pool, max_waiting=3)
    refused = 0

    async def call() -> None:
        nonlocal refused
        try:
            await engine.run(lambda conn: sleep(conn, 0.02))
        except EngineOverloaded:
            refused += 1

    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(call)
    stats = engine.stats()
    assert (refused, stats.shed, stats.acquires, stats.waiting, stats.in_use) == (13, 13, 7, 0, 0)


async def test_stats_are_numbers_of_what_happened(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    assert engine.stats().acquires == 0
    await engine.run(insert)
    async with Holding(pool, 2), anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(engine.run, lambda conn: sleep(conn, 0.06))
        await until(lambda: engine.stats().in_use == 2 and engine.stats().waiting == 1)
        now = engine.stats()
        assert (now.size, now.max_size, now.idle) == (4, 4, 0)
    stats = engine.stats()
    assert (stats.acquires, stats.in_use, stats.waiting, stats.idle, stats.size) == (4, 0, 0, 4, 4)
    counted = sum(count for _, count in stats.wait_histogram)
    assert counted == stats.acquires
    assert sum(count for end, count in stats.wait_histogram if end > 0.025) >= 1
    assert stats.wait_histogram[-1] == (float("inf"), 0)
    assert 0.02 < stats.wait_max <= stats.wait_seconds
    assert stats.held_seconds > 0.1
    assert (stats.retries, stats.evicted, stats.shed, stats.acquire_timeouts) == (0, 0, 0, 0)


async def test_the_user_may_use_the_pool_beside_the_engine(single: asyncpg.Pool) -> None:
    engine = Engine(single, acquire_timeout=5)
    async with anyio.create_task_group() as group:
        for n in range(10):
            group.start_soon(engine.run, add(n))
            group.start_soon(single.execute, "INSERT INTO t VALUES ($1)", 100 + n)
    assert len(await rows(single)) == 20
    async with single.acquire() as conn, conn.transaction():
        await conn.execute("INSERT INTO t VALUES (1000)")
        assert (engine.stats().in_use, engine.stats().idle) == (0, 0)


# --- leaks


async def test_a_connection_held_too_long_is_reported_with_who_took_it(pool: asyncpg.Pool) -> None:
    seen = Seen()
    engine = Engine(pool, leak_after=0.02, observer=seen)

    async def the_one_who_forgets() -> None:
        await engine.run(lambda _: until(lambda: seen.of(events.LeakSuspected)))

    await the_one_who_forgets()
    (leak,) = seen.of(events.LeakSuspected)
    assert leak.held == 0.02
    assert "the_one_who_forgets" in leak.stack


async def test_without_an_observer_a_leak_is_a_warning(pool: asyncpg.Pool) -> None:
    engine = Engine(pool, leak_after=0.02)
    with pytest.warns(ResourceWarning, match=r"held for more than 0\.02 s.*taken here"):
        await engine.run(lambda _: anyio.sleep(0.1))


async def test_a_connection_given_back_in_time_is_not_reported(pool: asyncpg.Pool) -> None:
    seen = Seen()
    engine = Engine(pool, leak_after=0.05, observer=seen)
    await engine.run(insert)
    async with engine.transaction() as conn:
        await insert(conn, 2)
    await engine.execute("SELECT 1")
    await anyio.sleep(0.1)
    assert seen.of(events.LeakSuspected) == []


# --- the end


async def test_close_waits_for_what_runs_and_refuses_what_is_new(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    async with anyio.create_task_group() as group:
        group.start_soon(engine.run, _then(lambda conn: sleep(conn, 0.1), insert))
        await until(lambda: engine.stats().in_use == 1)
        assert await engine.close()
    assert await rows(pool) == [1]
    for call in (engine.run(insert), engine.execute("SELECT 1")):
        with pytest.raises(EngineClosed):
            await call
    with pytest.raises(EngineClosed):
        async with engine.transaction():
            pass
    assert await pool.fetchval("SELECT 7") == 7


def _then(*bodies: Body) -> Body:
    async def one_after_another(conn: Any) -> None:
        for body in bodies:
            await body(conn)

    return one_after_another


async def test_close_also_waits_for_callers_that_were_let_in_and_wait_themselves(
    single: asyncpg.Pool,
) -> None:
    engine = Engine(single)
    async with anyio.create_task_group() as group:
        for n in range(3):
            group.start_soon(engine.run, _then(lambda conn: sleep(conn, 0.05), add(n)))
        await until(lambda: (engine.stats().in_use, engine.stats().waiting) == (1, 2))
        assert await engine.close()
        assert (engine.stats().in_use, engine.stats().waiting) == (0, 0)
    assert await rows(single) == [0, 1, 2]


async def test_close_is_bounded_and_cuts_off_what_does_not_end(single: asyncpg.Pool) -> None:
    engine = Engine(single)
    outcomes: list[BaseException] = []

    async def call(n: int) -> None:
        try:
            await engine.run(_then(add(n), sleep))
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


async def test_open_makes_the_pool_with_its_options_and_closes_it(dsn: str) -> None:
    async with Engine.open(
        dsn, min_size=1, max_size=3, server_settings={"application_name": "opened"}, acquire_timeout=0.5
    ) as engine:
        assert await engine.fetchval("SHOW application_name") == "opened"
        assert (engine.stats().max_size, engine.stats().size) == (3, 1)
        pid = await engine.run(backend)
    with pytest.raises(EngineClosed):
        await engine.run(backend)
    await until_gone(dsn, pid)


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


async def until_gone(dsn: str, pid: int) -> None:
    """Wait until the server has no such process."""
    conn = await asyncpg.connect(dsn)
    try:
        with anyio.fail_after(5):
            while await conn.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", pid):
                await anyio.sleep(0.005)
    finally:
        await conn.close()


# --- the pool's own calls


async def test_the_pools_calls_are_there_with_the_engines_bounds(single: asyncpg.Pool) -> None:
    engine = Engine(single, acquire_timeout=0.05, max_waiting=0)
    assert await engine.execute("INSERT INTO t VALUES (1), (2)") == "INSERT 0 2"
    await engine.executemany("INSERT INTO t VALUES ($1)", [(3,), (4,)])
    assert [row["n"] for row in await engine.fetch("SELECT n FROM t WHERE n > $1 ORDER BY n", 1)] == [2, 3, 4]
    row = await engine.fetchrow("SELECT 1 AS a, 2 AS b")
    assert (row["a"], row["b"]) == (1, 2)
    assert await engine.fetchval("SELECT 1, 2", column=1) == 2
    with pytest.raises(TimeoutError):
        await engine.fetchval("SELECT pg_sleep(30)", timeout=0.05)
    with pytest.raises(asyncpg.UniqueViolationError):
        await engine.executemany("INSERT INTO t VALUES ($1)", [(5,), (1,)])
    assert await rows(single) == [1, 2, 3, 4]
    async with Holding(single, 1):
        with pytest.raises(EngineOverloaded):
            await engine.fetch("SELECT 1")
        with pytest.raises(AcquireTimeout):
            await Engine(single, acquire_timeout=0.05).fetch("SELECT 1")
    assert engine.stats().in_use == 0


# --- what is thrown away


async def test_a_fail_over_expires_the_pool_once_and_not_once_a_caller(own_server: Server) -> None:
    seen = Seen()
    run_sql(own_server.dsn, "CREATE TABLE IF NOT EXISTS t (n integer PRIMARY KEY)")
    with own_server.standby() as standby:
        async with Engine.open(without_tls(standby.dsn), min_size=0, max_size=8, observer=seen) as engine:
            all_have_begun = Together(8)

            async def write(conn: Any, n: int) -> None:
                await all_have_begun()
                await insert(conn, n)

            results = await asyncio.gather(
                *(engine.run(functools.partial(write, n=n)) for n in range(8)), return_exceptions=True
            )
            assert {type(result) for result in results} == {asyncpg.ReadOnlySQLTransactionError}
            (expired,) = seen.of(events.PoolExpired)
            assert expired.sqlstate == "25006"
            assert engine.stats().evicted == 8


class Together:
    """Nobody goes on before all are here, the first time."""

    def __init__(self, count: int) -> None:
        self.missing = count
        self.all_here = anyio.Event()

    async def __call__(self) -> None:
        self.missing -= 1
        if self.missing <= 0:
            self.all_here.set()
        await self.all_here.wait()


async def test_after_a_promotion_a_retry_writes_through_fresh_connections(own_server: Server) -> None:
    run_sql(own_server.dsn, "CREATE TABLE IF NOT EXISTS t (n integer PRIMARY KEY)")
    run_sql(own_server.dsn, "TRUNCATE t")
    with own_server.standby() as standby:
        patient = RetryPolicy(attempts=200, first_delay=0.02, max_delay=0.05)
        async with Engine.open(without_tls(standby.dsn), min_size=0, max_size=4) as engine:
            async with anyio.create_task_group() as group:
                for n in range(4):
                    group.start_soon(functools.partial(engine.run, add(n), retry=patient))
                await until(lambda: engine.stats().retries >= 4)
                await anyio.to_thread.run_sync(standby.promote)
            assert await engine.fetchval("SELECT count(*) FROM t") == 4


async def test_a_write_under_readonly_is_the_callers_error_and_no_fail_over(single: asyncpg.Pool) -> None:
    seen = Seen()
    engine = Engine(single, observer=seen)
    with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
        await engine.run(insert, readonly=True, retry=QUICK)
    with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
        async with engine.transaction(readonly=True) as conn:
            await insert(conn)
    assert seen.of(events.PoolExpired) == []
    assert (engine.stats().evicted, engine.stats().retries) == (0, 0)


def raising(code: str) -> Body:
    """A server's ERROR with a code of our choice, on a connection that is well."""

    async def raises(conn: Any) -> None:
        await conn.execute(f"DO $$ BEGIN RAISE EXCEPTION 'of the test' USING ERRCODE = '{code}'; END $$")

    return raises


async def test_verdicts_are_overridden_for_one_engine_only(single: asyncpg.Pool) -> None:
    own = Engine(single, verdicts={"XT001": Repair.TRANSACTION, "40001": Rule(Repair.NEVER)})
    plain = Engine(single)
    with pytest.raises(RetriesExhausted):
        await own.run(raising("XT001"), retry=QUICK)
    with pytest.raises(asyncpg.PostgresError) as caught:
        await plain.run(raising("XT001"), retry=QUICK)
    assert caught.value.sqlstate == "XT001"
    with pytest.raises(asyncpg.SerializationError):
        await own.run(raising("40001"), retry=QUICK)
    with pytest.raises(RetriesExhausted):
        await plain.run(raising("40001"), retry=QUICK)
    assert (own.stats().retries, plain.stats().retries) == (2, 2)


async def test_an_override_may_throw_connections_away(single: asyncpg.Pool) -> None:
    engine = Engine(single, verdicts={"XT": Rule(Repair.CONNECTION, evict=True)})
    pids: list[int] = []

    async def op(conn: Any) -> None:
        pids.append(await backend(conn))
        await raising("XT002")(conn)

    with pytest.raises(RetriesExhausted):
        await engine.run(op, retry=QUICK)
    assert len(set(pids)) == 3
    assert engine.stats().evicted == 3


async def test_an_error_that_tells_of_another_nodes_connection_evicts_nothing(single: asyncpg.Pool) -> None:
    engine = Engine(single)
    pid = await engine.run(backend)
    with pytest.raises(RetriesExhausted) as caught:
        await engine.run(raising("08006"), retry=QUICK)
    assert caught.value.attempts == 3
    assert isinstance(caught.value.__cause__, asyncpg.PostgresConnectionError)
    assert await engine.run(backend) == pid
    assert engine.stats().evicted == 0


async def terminate(dsn: str, pid: int) -> None:
    """End a session, from another one, and wait until it is gone."""
    conn = await asyncpg.connect(dsn)
    try:
        assert await conn.fetchval("SELECT pg_terminate_backend($1, 5000)", pid)
    finally:
        await conn.close()


async def test_a_connection_ended_while_idle_is_repaired_by_a_retry(single: asyncpg.Pool, dsn: str) -> None:
    engine = Engine(single)
    pid = await engine.run(backend)
    await terminate(dsn, pid)
    assert await engine.run(backend, retry=QUICK) != pid


async def test_a_connection_ended_while_in_use_is_thrown_away_and_the_run_repaired(
    single: asyncpg.Pool, dsn: str
) -> None:
    seen = Seen()
    engine = Engine(single, observer=seen)
    pids: list[int] = []

    async def op(conn: Any) -> None:
        pids.append(await backend(conn))
        await insert(conn)
        if len(pids) == 1:
            await terminate(dsn, pids[0])
        await conn.execute("SELECT 1")

    await engine.run(op, retry=QUICK)
    assert len(set(pids)) == 2
    assert await rows(single) == [1]
    assert (engine.stats().evicted, engine.stats().retries) == (1, 1)
    (evicted,) = seen.of(events.Evicted)
    assert isinstance(evicted.condition, str)


async def test_without_a_policy_a_lost_connection_is_the_drivers_own_error(
    single: asyncpg.Pool, dsn: str
) -> None:
    async def op(conn: Any) -> None:
        await terminate(dsn, await backend(conn))
        await conn.execute("SELECT 1")

    engine = Engine(single)
    with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.InterfaceError)):
        await engine.run(op)
    assert engine.stats().evicted == 1
    await engine.run(insert)


# --- the deadline over everything


async def test_the_deadline_is_over_waiting_for_a_connection(single: asyncpg.Pool) -> None:
    engine = Engine(single, acquire_timeout=30)
    async with Holding(single, 1):
        with pytest.raises(OperationTimeout) as caught:
            await engine.run(insert, deadline=0.05)
    assert (caught.value.seconds, caught.value.by_server) == (0.05, False)
    assert engine.stats().waiting == 0


async def test_the_deadline_is_over_a_statement_which_the_server_ends(single: asyncpg.Pool) -> None:
    engine = Engine(single)
    with pytest.raises(OperationTimeout) as caught:
        await engine.run(sleep, deadline=0.3)
    assert (caught.value.seconds, caught.value.by_server) == (0.3, True)
    assert engine.stats().evicted == 0


async def test_a_deadline_within_a_wider_timeout_is_ended_by_the_server_too(single: asyncpg.Pool) -> None:
    engine = Engine(single)
    with pytest.raises(OperationTimeout) as caught:
        await engine.run(pipe(sleep, timeout(20)), deadline=0.3)
    assert (caught.value.seconds, caught.value.by_server) == (0.3, True)
    assert engine.stats().evicted == 0


async def test_the_deadline_is_over_a_body_that_waits_for_something_else(single: asyncpg.Pool) -> None:
    engine = Engine(single)
    with pytest.raises(OperationTimeout) as caught:
        await engine.run(_then(insert, lambda _: anyio.sleep(30)), deadline=0.1)
    assert not caught.value.by_server
    assert await rows(single) == []


async def test_the_deadline_is_over_the_pauses_between_tries(single: asyncpg.Pool) -> None:
    slow = RetryPolicy(attempts=50, first_delay=60, max_delay=60)
    engine = Engine(single)
    with anyio.fail_after(5), pytest.raises(RetriesExhausted) as caught:
        # Full jitter: a pause of 60 s at most may be short enough once in a while, not each time.
        await engine.run(raising("40001"), retry=slow, deadline=0.5)
    assert caught.value.reason == "deadline"
    assert isinstance(caught.value.__cause__, asyncpg.SerializationError)


async def test_a_deadline_that_is_kept_changes_nothing(single: asyncpg.Pool) -> None:
    engine = Engine(single)
    await engine.run(insert, deadline=30)
    assert await rows(single) == [1]
    assert await engine.run(lambda conn: conn.fetchval("SHOW statement_timeout")) == "0"


# --- events


async def test_a_run_tells_of_connection_and_commit(single: asyncpg.Pool) -> None:
    seen = Seen()
    await Engine(single, observer=seen).run(add(1))
    acquired, committed = seen.events
    assert isinstance(acquired, events.Acquired)
    assert acquired.waited >= 0
    assert isinstance(committed, events.Committed)
    assert (committed.operation, committed.attempts) == ("insert", 1)
    assert committed.seconds > 0


async def test_a_failure_tells_of_the_rollback(single: asyncpg.Pool) -> None:
    seen = Seen()
    engine = Engine(single, observer=seen)
    await engine.run(insert)
    seen.events.clear()
    with pytest.raises(asyncpg.UniqueViolationError):
        await engine.run(insert)
    (rolled_back,) = seen.of(events.RolledBack)
    assert (rolled_back.operation, rolled_back.sqlstate, rolled_back.condition) == (
        "insert", "23505", "unique_violation",
    )  # fmt: skip
    assert seen.of(events.Committed) == []


async def test_a_retry_tells_of_each_new_start_and_of_giving_up(single: asyncpg.Pool) -> None:
    seen = Seen()
    engine = Engine(single, observer=seen)
    with pytest.raises(RetriesExhausted):
        await engine.run(raising("40001"), retry=QUICK)
    assert [(e.level, e.attempts, e.sqlstate, e.condition) for e in seen.of(events.Retried)] == [
        ("transaction", 1, "40001", "serialization_failure"),
        ("transaction", 2, "40001", "serialization_failure"),
    ]
    assert all(0 <= e.delay <= 0.01 for e in seen.of(events.Retried))
    (refused,) = seen.of(events.RetryRefused)
    assert (refused.reason, refused.attempts, refused.sqlstate) == ("attempts", 3, "40001")
    assert len(seen.of(events.RolledBack)) == 3


async def test_waiting_in_vain_and_being_shed_are_told(single: asyncpg.Pool) -> None:
    seen = Seen()
    engine = Engine(single, observer=seen, acquire_timeout=0.05, max_waiting=1)
    async with Holding(single, 1), anyio.create_task_group() as group:

        async def waits() -> None:
            with pytest.raises(AcquireTimeout):
                await engine.run(insert)

        group.start_soon(waits)
        await until(lambda: engine.stats().waiting == 1)
        with pytest.raises(EngineOverloaded):
            await engine.run(insert)
    (shed,) = seen.of(events.Shed)
    assert shed.waiting == 1
    (timed_out,) = seen.of(events.AcquireTimedOut)
    assert timed_out.waited >= 0.04
    assert timed_out.waiting == 0


async def test_an_eviction_is_told_with_its_cause(single: asyncpg.Pool) -> None:
    seen = Seen()
    engine = Engine(single, observer=seen, verdicts={"XT003": Rule(Repair.CONNECTION, evict=True)})
    with pytest.raises(asyncpg.PostgresError):
        await engine.run(raising("XT003"))
    (evicted,) = seen.of(events.Evicted)
    assert evicted.sqlstate == "XT003"


async def test_a_batch_tells_of_its_items(single: asyncpg.Pool) -> None:
    seen = Seen()
    await Engine(single, observer=seen).run(batch(each(add))([1, 1, 2]))
    (failed,) = seen.of(events.ItemFailed)
    assert (failed.index, failed.sqlstate, failed.condition) == (1, "23505", "unique_violation")
    (finished,) = seen.of(events.BatchFinished)
    assert (finished.total, finished.written, finished.failed) == (3, 2, 1)


def with_password(dsn: str) -> str:
    """The same DSN with a password, which a server that trusts us does not ask for."""
    return dsn.replace("postgresql://postgres@", f"postgresql://postgres:{PASSWORD}@")


async def test_no_event_holds_sql_a_parameter_or_a_dsn(dsn: str, postgres_server: Server) -> None:
    seen = Seen()
    secret = "a-value-that-is-secret"
    async with FaultProxy(postgres_server.host, postgres_server.port) as proxy:
        options: dict[str, Any] = {"min_size": 0, "max_size": 2, "leak_after": 0.05, "acquire_timeout": 0.2}
        async with Engine.open(proxy.dsn(with_password(dsn)), observer=seen, **options) as engine:

            async def op(conn: Any, value: str) -> None:
                await conn.execute("CREATE TEMP TABLE IF NOT EXISTS s (a text PRIMARY KEY)")
                await conn.execute("INSERT INTO s VALUES ($1), ($1)", value)

            with pytest.raises(asyncpg.UniqueViolationError):
                await engine.run(pipe(operation(op)(secret), timeout(5), retry(QUICK)))
            with pytest.raises(RetriesExhausted):
                await engine.run(raising("40001"), retry=QUICK)
            await engine.run(lambda _: anyio.sleep(0.1))
            proxy.drop_all()
            await engine.run(batch(each(operation(op)))([secret]), retry=QUICK)
    assert len({type(event) for event in seen.events}) >= 6
    for event in seen.events:
        told = " ".join(str(getattr(event, field.name)) for field in fields(event) if field.name != "stack")
        for hidden in (secret, PASSWORD, "INSERT", "CREATE", "postgresql://", str(proxy.port)):
            assert hidden not in told, event


async def test_an_observer_that_fails_does_not_break_the_work(single: asyncpg.Pool) -> None:
    told: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: told.append(context))
    try:

        def breaks(event: Event) -> None:
            raise LookupError(event.name)

        assert await Engine(single, observer=breaks).run(insert) == 1
    finally:
        loop.set_exception_handler(before)
    assert await rows(single) == [1]
    assert [str(context["exception"]) for context in told] == ["pool.acquired", "transaction.committed"]


# --- the budget


async def test_a_spent_budget_refuses_retries_of_the_whole_engine(single: asyncpg.Pool) -> None:
    seen = Seen()
    budget = RetryBudget(capacity=3, per_call=0)
    engine = Engine(single, budget=budget, observer=seen)
    outcomes = []
    for _ in range(3):
        with pytest.raises(RetriesExhausted) as caught:
            await engine.run(raising("40001"), retry=QUICK)
        outcomes.append((caught.value.attempts, caught.value.reason))
    assert outcomes == [(3, "attempts"), (2, "budget"), (1, "budget")]
    assert budget.refused == 2
    assert [event.reason for event in seen.of(events.RetryRefused)] == ["attempts", "budget", "budget"]


async def test_a_retry_from_a_savepoint_draws_on_the_budget_too(single: asyncpg.Pool) -> None:
    engine = Engine(single, budget=RetryBudget(capacity=1, per_call=0))
    with pytest.raises(RetriesExhausted) as caught:
        await engine.run(pipe(raising("55P03"), retry(QUICK)))
    assert (caught.value.attempts, caught.value.reason) == (2, "budget")


# --- secrets


async def test_no_repr_shows_a_dsn(dsn: str) -> None:
    async with Engine.open(with_password(dsn), min_size=1, max_size=2) as engine:
        text = repr(engine)
        assert "size=1/2" in text
        assert repr(engine.stats()).count(PASSWORD) == 0
        assert PASSWORD not in text
        assert "postgresql" not in text


async def test_no_error_holds_the_password(dsn: str, postgres_server: Server) -> None:
    errors: list[BaseException] = []

    async def fails(work: Awaitable[Any]) -> None:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it is
            await work
        error: BaseException | None = caught.value
        while error is not None:
            errors.append(error)
            error = error.__cause__ or error.__context__

    secret = with_password(dsn)
    async with FaultProxy(postgres_server.host, postgres_server.port) as proxy:
        async with Engine.open(proxy.dsn(secret), min_size=0, max_size=1, acquire_timeout=0.1) as engine:
            await fails(engine.run(raising("40001"), retry=QUICK))
            await fails(engine.run(sleep, deadline=0.05))
            proxy.server_port = 1
            proxy.drop_all()
            await fails(engine.run(insert, retry=QUICK))
        await fails(asyncpg.create_pool(proxy.dsn(secret), min_size=1))
    assert len(errors) >= 5
    for error in errors:
        assert PASSWORD not in f"{error!s} {error!r}"
