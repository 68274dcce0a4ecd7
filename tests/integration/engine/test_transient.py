"""Transient failures of a real server, on purpose: repaired at the right level, the right number of times."""

# ruff: noqa: ASYNC110 - what the server or the pool has done, only asking again can tell

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import (
    Engine,
    Event,
    OperationTimeout,
    RetriesExhausted,
    RetryPolicy,
    batch,
    each,
    events,
    pipe,
    retry,
    timeout,
)
from dbop_raw.testing import Server
from dbop_raw.testing.server import run_sql

pytestmark = pytest.mark.anyio

QUICK = RetryPolicy(attempts=4, first_delay=0.001, max_delay=0.01)


@pytest.fixture(scope="module")
def dsn(postgres_server: Server) -> Iterator[str]:
    dsn = postgres_server.create_database()
    run_sql(dsn, "CREATE TABLE t (n integer PRIMARY KEY, hits integer NOT NULL DEFAULT 0)")
    # Without asyncpg's question for TLS: cancelled in the middle, it leaves an error that nobody retrieves.
    yield f"{dsn}{'&' if '?' in dsn else '?'}sslmode=disable"
    postgres_server.drop_database(dsn)


@pytest.fixture
async def pool(dsn: str) -> AsyncIterator[asyncpg.Pool]:
    """Two connections, and in the table the rows 1 and 2."""
    pool = await asyncpg.create_pool(dsn, min_size=0, max_size=2)
    try:
        await pool.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        await pool.execute("TRUNCATE t")
        await pool.execute("INSERT INTO t (n) VALUES (1), (2)")
        yield pool
        with anyio.fail_after(5):
            await pool.close()
    finally:
        pool.terminate()


@pytest.fixture
async def other(dsn: str, pool: asyncpg.Pool) -> AsyncIterator[asyncpg.Connection]:
    """Another session."""
    assert pool is not None  # for the order: it ends the sessions that were left
    conn = await asyncpg.connect(dsn)
    try:
        yield conn
    finally:
        conn.terminate()


class Seen:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if type(event) is kind]

    def levels(self) -> list[str]:
        return [event.level for event in self.of(events.Retried)]


class Starts:
    """Calls a body, and keeps for each start in which transaction and on which connection it was."""

    def __init__(self, body: Callable[[Any], Awaitable[Any]]) -> None:
        self.body = body
        self.transactions: list[str] = []
        self.backends: list[int] = []

    async def __call__(self, conn: Any) -> Any:
        if conn.is_in_transaction():
            self.transactions.append(await conn.fetchval("SELECT now()::text"))
        # Known without a statement: under autocommit one that is done would not be done again.
        self.backends.append(conn.get_server_pid())
        return await self.body(conn)


async def hit(conn: Any, n: int = 1) -> None:
    await conn.execute("UPDATE t SET hits = hits + 1 WHERE n = $1", n)


async def hits(pool: asyncpg.Pool, n: int = 1) -> int:
    found: int = await pool.fetchval("SELECT hits FROM t WHERE n = $1", n)
    return found


async def sleep(conn: Any, seconds: float = 30.0) -> None:
    await conn.execute("SELECT pg_sleep($1)", seconds)


def raising(code: str) -> Callable[[Any], Awaitable[Any]]:
    async def raises(conn: Any) -> None:
        await conn.execute(f"DO $$ BEGIN RAISE EXCEPTION 'of the test' USING ERRCODE = '{code}'; END $$")

    return raises


# --- 55P03: a lock that is not free


async def test_a_lock_that_comes_free_costs_one_retry_from_the_savepoint(
    pool: asyncpg.Pool, other: asyncpg.Connection
) -> None:
    await other.execute("BEGIN")
    await hit(other)
    seen = Seen()
    before = Starts(functools.partial(hit, n=2))

    async def frees_the_lock(conn: Any) -> None:
        if len(body.transactions) == 2:
            await other.execute("ROLLBACK")
        await hit(conn)

    body = Starts(frees_the_lock)

    async def op(conn: Any) -> None:
        await before(conn)
        await pipe(body, timeout(10, lock=0.05), retry(QUICK))(conn)

    engine = Engine(pool, observer=seen)
    await engine.run(op)
    assert seen.levels() == ["savepoint"]
    assert seen.of(events.Retried)[0].sqlstate == "55P03"
    assert (len(body.transactions), len(before.transactions)) == (2, 1)
    assert set(body.transactions) == set(before.transactions)
    assert (await hits(pool, 1), await hits(pool, 2)) == (1, 1)
    assert engine.stats().retries == 1


async def test_a_lock_that_never_comes_free_costs_exactly_the_attempts(
    pool: asyncpg.Pool, other: asyncpg.Connection
) -> None:
    await other.execute("BEGIN")
    await hit(other)
    body = Starts(hit)
    engine = Engine(pool)
    with pytest.raises(RetriesExhausted) as caught:
        await engine.run(pipe(body, timeout(10, lock=0.02), retry(QUICK)))
    error = caught.value
    assert (error.attempts, error.reason, len(body.transactions)) == (4, "attempts", 4)
    assert isinstance(error.__cause__, asyncpg.LockNotAvailableError)
    assert error.elapsed >= 4 * 0.015
    assert len(set(body.transactions)) == 1
    assert (engine.stats().retries, engine.stats().evicted) == (3, 0)


async def test_a_run_of_its_own_policy_takes_what_no_savepoint_was_set_for(
    pool: asyncpg.Pool, other: asyncpg.Connection
) -> None:
    await other.execute("BEGIN")
    await hit(other)

    async def frees_the_lock(conn: Any) -> None:
        if len(body.transactions) == 2:
            await other.execute("ROLLBACK")
        await hit(conn)

    body = Starts(frees_the_lock)
    await Engine(pool).run(pipe(body, timeout(10, lock=0.05)), retry=QUICK)
    assert len(set(body.transactions)) == 2


async def test_an_outer_retry_takes_retries_exhausted_as_final(pool: asyncpg.Pool) -> None:
    body = Starts(raising("55P03"))
    inner = RetryPolicy(attempts=2, first_delay=0.001, max_delay=0.01)
    with pytest.raises(RetriesExhausted) as caught:
        await Engine(pool).run(pipe(body, retry(inner), retry(QUICK)), retry=QUICK)
    assert len(body.transactions) == 2
    assert isinstance(caught.value.__cause__, asyncpg.LockNotAvailableError)


async def test_a_locked_item_of_a_batch_waits_for_itself_only(
    pool: asyncpg.Pool, other: asyncpg.Connection
) -> None:
    await other.execute("BEGIN")
    await hit(other, 1)

    def make(n: int) -> Any:
        return pipe(functools.partial(hit, n=n), timeout(10, lock=0.02))

    result = await Engine(pool).run(batch(each(make), retry=QUICK)([1, 2]))
    (failed,) = result.failed
    assert (failed.index, failed.verdict.sqlstate, failed.verdict.transient) == (0, "55P03", True)
    assert result.retries == 3
    assert await hits(pool, 2) == 1


# --- 40P01: a deadlock


async def test_a_deadlock_is_repaired_by_a_new_transaction(pool: asyncpg.Pool) -> None:
    """Two runs that lock the same two rows, each in its own order."""
    seen = Seen()
    engine = Engine(pool, observer=seen)
    both_have_one = Together(2)

    async def first_then_second(conn: Any, first: int, second: int) -> None:
        await conn.execute("SET LOCAL deadlock_timeout = '20ms'")
        await hit(conn, first)
        await both_have_one()
        await hit(conn, second)

    async with anyio.create_task_group() as group:
        for first, second in ((1, 2), (2, 1)):
            body = functools.partial(first_then_second, first=first, second=second)
            group.start_soon(engine.run, pipe(body, timeout(10), retry(QUICK)))
    assert (await hits(pool, 1), await hits(pool, 2)) == (2, 2)
    assert set(seen.levels()) == {"transaction"}
    assert {event.sqlstate for event in seen.of(events.Retried)} == {"40P01"}


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


# --- 40001: a serialization failure


async def test_a_serialization_failure_is_repaired_by_a_new_transaction(
    pool: asyncpg.Pool, other: asyncpg.Connection
) -> None:
    """The row that the first try has seen is changed by another session before it writes."""

    async def reads_then_writes(conn: Any) -> int:
        found: int = await conn.fetchval("SELECT hits FROM t WHERE n = 1")
        if len(body.transactions) == 1:
            await hit(other)
        await conn.execute("UPDATE t SET hits = $1 WHERE n = 1", found + 10)
        return found

    seen = Seen()
    body = Starts(reads_then_writes)
    found = await Engine(pool, observer=seen).run(
        pipe(body, timeout(10), retry(QUICK)), isolation="serializable"
    )
    assert found == 1
    assert await hits(pool) == 11
    assert seen.levels() == ["transaction"]
    assert len(set(body.transactions)) == 2


async def test_a_serialization_failure_at_commit_is_repaired_too(pool: asyncpg.Pool) -> None:
    """Write skew: each of two runs reads what the other writes; one of them fails, perhaps only at COMMIT."""
    engine = Engine(pool)
    both_have_read = Together(2)

    async def skew(conn: Any, read: int, write: int) -> None:
        await conn.fetchval("SELECT hits FROM t WHERE n = $1", read)
        await both_have_read()
        await hit(conn, write)

    async with anyio.create_task_group() as group:
        for read, write in ((1, 2), (2, 1)):
            body = functools.partial(skew, read=read, write=write)
            group.start_soon(functools.partial(engine.run, body, isolation="serializable", retry=QUICK))
    assert (await hits(pool, 1), await hits(pool, 2)) == (1, 1)
    assert engine.stats().retries >= 1


@pytest.mark.parametrize("first", ["savepoint", "transaction"])
async def test_starts_count_together_over_all_levels(first: str, pool: asyncpg.Pool) -> None:
    kinds = ["55P03", "40001"] if first == "savepoint" else ["40001", "55P03"]

    async def fails(conn: Any) -> None:
        await raising(kinds[(len(body.transactions) - 1) % 2])(conn)

    seen = Seen()
    body = Starts(fails)
    with pytest.raises(RetriesExhausted) as caught:
        await Engine(pool, observer=seen).run(pipe(body, timeout(10), retry(QUICK)))
    assert (caught.value.attempts, len(body.transactions)) == (4, 4)
    second = "transaction" if first == "savepoint" else "savepoint"
    assert seen.levels() == [first, second, first]


async def test_the_runs_own_policy_wins_over_the_pipelines(pool: asyncpg.Pool) -> None:
    body = Starts(raising("40001"))
    with pytest.raises(RetriesExhausted):
        await Engine(pool).run(pipe(body, retry(QUICK)), retry=RetryPolicy(attempts=2, first_delay=0.001))
    assert len(body.transactions) == 2


async def test_without_a_policy_nothing_is_tried_again(pool: asyncpg.Pool) -> None:
    body = Starts(raising("40001"))
    with pytest.raises(asyncpg.SerializationError):
        await Engine(pool).run(body)
    assert len(body.transactions) == 1


async def test_a_permanent_error_passes_unchanged_at_once(pool: asyncpg.Pool) -> None:
    body = Starts(lambda conn: conn.execute("INSERT INTO t (n) VALUES (1)"))
    with pytest.raises(asyncpg.UniqueViolationError):
        await Engine(pool).run(pipe(body, timeout(10), retry(QUICK)), retry=QUICK)
    assert len(body.transactions) == 1


async def test_autocommitted_statements_are_tried_again_in_place(pool: asyncpg.Pool) -> None:
    async def fails_once(conn: Any) -> None:
        if len(body.backends) == 1:
            await raising("40P01")(conn)
        await hit(conn)

    seen = Seen()
    body = Starts(fails_once)
    await Engine(pool, observer=seen).run(pipe(body, retry(QUICK)), autocommit=True)
    assert seen.levels() == ["statement"]
    assert len(set(body.backends)) == 1
    assert await hits(pool) == 1


# --- 57014: timeouts, and who they belong to


async def test_our_own_timeout_is_kept_by_the_server(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    with pytest.raises(OperationTimeout) as caught:
        await engine.run(pipe(sleep, timeout(0.2)))
    assert (caught.value.seconds, caught.value.by_server) == (0.2, True)
    assert isinstance(caught.value.__cause__, asyncpg.QueryCanceledError)
    assert engine.stats().evicted == 0


async def test_a_timeout_a_try_is_tried_again_within_an_outer_one(pool: asyncpg.Pool) -> None:
    async def slow_at_first(conn: Any) -> str:
        if len(body.transactions) < 3:
            await sleep(conn)
        return "done"

    seen = Seen()
    body = Starts(slow_at_first)
    engine = Engine(pool, observer=seen)
    assert await engine.run(pipe(body, timeout(0.1), retry(QUICK), timeout(20))) == "done"
    assert seen.levels() == ["savepoint", "savepoint"]
    assert len(set(body.transactions)) == 1
    assert engine.stats().evicted == 0


async def test_an_outer_timeout_ends_the_retrying(pool: asyncpg.Pool) -> None:
    patient = RetryPolicy(attempts=1000, first_delay=0.001, max_delay=0.01)
    body = Starts(sleep)
    with anyio.fail_after(5), pytest.raises((OperationTimeout, RetriesExhausted)):
        await Engine(pool).run(pipe(body, timeout(0.1), retry(patient), timeout(0.35)))
    assert 2 <= len(body.transactions) <= 4
    assert len(set(body.transactions)) == 1


async def test_of_two_timeouts_the_tighter_outer_one_is_the_one_that_is_raised(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    with pytest.raises(OperationTimeout) as caught:
        await engine.run(pipe(sleep, timeout(20), timeout(0.2)))
    assert (caught.value.seconds, caught.value.by_server) == (0.2, True)
    assert engine.stats().evicted == 0


async def test_a_body_that_hangs_outside_of_the_server_is_ended_by_the_client(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    with pytest.raises(OperationTimeout) as caught:
        await engine.run(pipe(lambda _: anyio.sleep(30), timeout(0.05)))
    assert (caught.value.seconds, caught.value.by_server) == (0.05, False)


async def test_what_somebody_else_cancels_is_the_drivers_own_error(
    pool: asyncpg.Pool, other: asyncpg.Connection
) -> None:
    async def op(conn: Any) -> None:
        pid = conn.get_server_pid()
        async with anyio.create_task_group() as group:
            group.start_soon(_cancel_backend, other, pid)
            await sleep(conn)

    body = Starts(op)
    with pytest.raises(ExceptionGroup) as caught:
        await Engine(pool).run(pipe(body, timeout(20), retry(QUICK)), retry=QUICK)
    assert caught.group_contains(asyncpg.QueryCanceledError)
    assert len(body.transactions) == 1

    async def asked_for(conn: Any) -> None:
        await conn.execute("SELECT pg_cancel_backend(pg_backend_pid())")
        await sleep(conn)

    with pytest.raises(asyncpg.QueryCanceledError):
        await Engine(pool).run(pipe(asked_for, timeout(20), retry(QUICK)), retry=QUICK)


async def _cancel_backend(other: asyncpg.Connection, pid: int) -> None:
    """Cancel what `pid` executes, as soon as it is asleep."""
    asleep = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'PgSleep'"
    while not await other.fetchval(asleep, pid):
        await anyio.sleep(0.005)
    await other.execute("SELECT pg_cancel_backend($1)", pid)


async def test_the_callers_own_fail_after_stays_the_callers(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    with pytest.raises(TimeoutError) as caught, anyio.fail_after(0.2):
        await engine.run(pipe(sleep, timeout(20), retry(QUICK)), retry=QUICK)
    assert not isinstance(caught.value, OperationTimeout)
    assert engine.stats().in_use == 0
    assert engine.stats().retries == 0


async def test_the_callers_own_fail_after_is_told_to_the_server(pool: asyncpg.Pool) -> None:
    limits: list[int] = []

    async def looks(conn: Any) -> None:
        limits.append(int((await conn.fetchval("SHOW statement_timeout")).removesuffix("ms")))

    with anyio.fail_after(3.001):
        await Engine(pool).run(pipe(looks, timeout(20)))
    assert 1000 < limits[0] < 3001


# --- waiting


async def test_nothing_is_held_while_a_run_waits_for_its_next_try(pool: asyncpg.Pool) -> None:
    slow = RetryPolicy(attempts=2, first_delay=60, max_delay=60)
    seen = Seen()
    engine = Engine(pool, observer=seen)
    async with anyio.create_task_group() as group:

        async def call() -> None:
            await engine.run(raising("40001"), retry=slow)

        group.start_soon(call)
        with anyio.fail_after(5):
            while not seen.of(events.Retried):
                await anyio.sleep(0.002)
        assert seen.of(events.Retried)[0].delay > 0
        assert engine.stats().in_use == 0
        assert pool.get_size() == pool.get_idle_size()
        group.cancel_scope.cancel()


@pytest.mark.parametrize("level", ["savepoint", "transaction"])
async def test_no_retry_waits_past_the_deadline_of_its_caller(level: str, pool: asyncpg.Pool) -> None:
    slow = RetryPolicy(attempts=1000, first_delay=600, max_delay=600)
    code = "55P03" if level == "savepoint" else "40001"
    with anyio.fail_after(5), pytest.raises(RetriesExhausted) as caught:
        await Engine(pool).run(pipe(raising(code), retry(slow)))
    assert caught.value.reason == "deadline"


async def test_no_retry_waits_past_an_enclosing_timeout(pool: asyncpg.Pool) -> None:
    slow = RetryPolicy(attempts=1000, first_delay=600, max_delay=600)
    with pytest.raises(RetriesExhausted) as caught:
        await Engine(pool).run(pipe(raising("55P03"), retry(slow), timeout(2)))
    assert caught.value.reason == "deadline"
    assert caught.value.elapsed < 2


async def test_a_savepoints_retry_leaves_no_lock_of_the_failed_try(
    pool: asyncpg.Pool, other: asyncpg.Connection
) -> None:
    """What the failed try had locked is free for others while the next one is waited for."""
    await other.execute("SET lock_timeout = '2s'")

    async def locks_then_fails(conn: Any) -> None:
        if len(body.transactions) == 1:
            await hit(conn, 1)
            await raising("55P03")(conn)
        await hit(other, 1)

    body = Starts(locks_then_fails)
    await Engine(pool).run(pipe(body, retry(QUICK)))
    assert len(body.transactions) == 2
    assert await hits(pool) == 1


# --- a timeout around a retry is one for all starts, in whatever transaction


async def test_a_timeout_around_a_retry_is_not_tried_again(pool: asyncpg.Pool) -> None:
    body = Starts(sleep)
    with pytest.raises(OperationTimeout) as caught:
        await Engine(pool).run(pipe(body, retry(QUICK), timeout(0.15)))
    assert (caught.value.seconds, caught.value.by_server) == (0.15, True)
    assert len(body.transactions) == 1


async def test_a_timeout_around_a_retry_is_one_for_all_transactions(pool: asyncpg.Pool) -> None:
    async def slow_then_deadlocked(conn: Any) -> None:
        await sleep(conn, 0.1)
        await raising("40P01")(conn)

    patient = RetryPolicy(attempts=1000, first_delay=0.001, max_delay=0.002)
    body = Starts(slow_then_deadlocked)
    engine = Engine(pool)
    with anyio.fail_after(5), pytest.raises((OperationTimeout, RetriesExhausted)):
        await engine.run(pipe(body, retry(patient), timeout(0.35)))
    assert 2 <= len(body.transactions) <= 4
    assert engine.stats().in_use == 0


async def test_a_policy_given_to_run_repeats_the_timeout_inside(pool: asyncpg.Pool) -> None:
    body = Starts(sleep)
    twice = RetryPolicy(attempts=2, first_delay=0.001)
    with pytest.raises(RetriesExhausted):
        await Engine(pool).run(pipe(body, retry(QUICK), timeout(0.1)), retry=twice)
    assert len(body.transactions) == 2


async def test_an_operation_called_again_and_again_has_its_attempts_each_time(pool: asyncpg.Pool) -> None:
    async def fails_at_its_fourth_start(conn: Any) -> None:
        if len(body.transactions) == 4:
            await raising("55P03")(conn)
        await hit(conn)

    body = Starts(fails_at_its_fourth_start)
    op = pipe(body, retry(RetryPolicy(attempts=2, first_delay=0.001)))

    async def many(conn: Any) -> None:
        for _ in range(5):
            await op(conn)

    await Engine(pool).run(many)
    assert len(body.transactions) == 6
    assert await hits(pool) == 5
