"""Every way in which a call can end, and what the counters and the events say of it: the truth, each time.

Each transaction that was begun ends in exactly one of `commits`, `rollbacks`, or a doubt that was not settled
(`commits_in_doubt` less those found committed or aborted). A COMMIT found committed is a commit, one found
aborted a rollback. An autocommitted operation that was done is a commit; one that failed has nothing to roll
back. The pool's own calls have no transaction of ours: of them only the connection is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import (
    AcquireTimeout,
    CommitTokens,
    CommitUnknown,
    Engine,
    EngineClosed,
    EngineOverloaded,
    Event,
    OperationTimeout,
    RetriesExhausted,
    RetryPolicy,
    RollbackFailed,
    TransactionAborted,
    events,
    operation,
    pipe,
    pool_advice,
    retry,
)
from dbop_raw.testing import Fault, FaultProxy, Server, query
from tests.support.bodies import insert, sleep
from tests.support.failures import raising
from tests.support.observing import Seen
from tests.support.policies import QUICK
from tests.support.pools import behind
from tests.support.protocol import answer_to_commit
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

TOKENS = CommitTokens()


@dataclass
class World:
    """A pool of one connection behind a proxy, and an engine whose numbers begin at nought."""

    server: Server
    dsn: str
    proxy: FaultProxy
    pool: asyncpg.Pool
    other: asyncpg.Connection
    seen: Seen = field(default_factory=Seen)
    engine: Engine = field(init=False)
    unreachable_at: type[Event] | None = None
    """From this event on, no new connection comes through."""

    def __post_init__(self) -> None:
        self.with_engine()

    def with_engine(self, **options: Any) -> Engine:
        self.engine = Engine(self.pool, observer=self.observe, **options)
        return self.engine

    def observe(self, event: Event) -> None:
        self.seen(event)
        if self.unreachable_at is not None and isinstance(event, self.unreachable_at):
            self.proxy.server_port = 1


@pytest.fixture
async def world(dsn: str, other: asyncpg.Connection, postgres_server: Server) -> AsyncIterator[World]:
    async with behind(postgres_server, dsn, max_size=1) as (proxy, pool):
        yield World(postgres_server, dsn, proxy, pool, other)


# --- the ways


add = operation(insert)


async def deferred_violation(conn: Any) -> None:
    await conn.execute("INSERT INTO late VALUES (1), (1)")


async def swallows(conn: Any) -> None:
    with contextlib.suppress(asyncpg.PostgresError):
        await raising("23505")(conn)


async def fails(conn: Any) -> None:
    await insert(conn)
    raise LookupError("of the body")


async def waits(conn: Any) -> None:
    await insert(conn)
    await asyncio.sleep(60)


class FailsOnce:
    """A body whose first start gets an error of the server's."""

    def __init__(self, code: str) -> None:
        self.code, self.starts = code, 0

    async def __call__(self, conn: Any) -> int:
        self.starts += 1
        if self.starts == 1:
            await raising(self.code)(conn)
        return await insert(conn)


Body = Callable[[Any], Awaitable[Any]]
Call = Callable[..., Awaitable[Any]]


async def run(world: World, body: Body, **options: Any) -> None:
    await world.engine.run(body, **options)


async def transaction(world: World, body: Body, **options: Any) -> None:
    async with world.engine.transaction(**options) as conn:
        await body(conn)


async def committed(world: World, call: Call) -> None:
    await call(world, insert)


async def committed_readonly(world: World, call: Call) -> None:
    await call(world, lambda conn: conn.fetchval("SELECT 1"), readonly=True)


async def committed_and_the_caller_cancelled(world: World, call: Call) -> None:
    late = world.proxy.inject(Fault("delay", when=answer_to_commit, seconds=0.2))
    task = asyncio.ensure_future(call(world, insert))
    await late.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await world.other.fetchval("SELECT count(*) FROM t") == 1


async def committed_and_the_callers_time_over(world: World, call: Call) -> None:
    world.proxy.inject(Fault("delay", when=answer_to_commit, seconds=0.5))
    with anyio.move_on_after(0.25) as scope:
        await call(world, insert)
    assert scope.cancel_called
    assert await world.other.fetchval("SELECT count(*) FROM t") == 1


async def commit_given_up(world: World, call: Call) -> None:
    """Cancelled twice: whoever does that does not wait for the answer any more, so nobody has seen one."""
    hung = world.proxy.inject(Fault("hang", when=answer_to_commit))
    task = asyncio.ensure_future(call(world, insert))
    await hung.wait()
    task.cancel()
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def body_raised(world: World, call: Call) -> None:
    with pytest.raises(LookupError):
        await call(world, fails)


async def servers_error(world: World, call: Call) -> None:
    with pytest.raises(asyncpg.UniqueViolationError):
        await call(world, raising("23505"))


async def aborted(world: World, call: Call) -> None:
    with pytest.raises(TransactionAborted):
        await call(world, swallows)


async def deadline_over_in_the_server(world: World, call: Call) -> None:
    with pytest.raises(OperationTimeout) as caught:
        await call(world, sleep, deadline=0.3)
    assert caught.value.by_server


async def deadline_over_in_the_client(world: World, call: Call) -> None:
    with pytest.raises(OperationTimeout):
        await call(world, waits, deadline=0.2)


async def cancelled_in_the_body(world: World, call: Call) -> None:
    task = asyncio.ensure_future(call(world, waits))
    await until(lambda: world.engine.stats().in_use)
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def cancelled_waiting(world: World, call: Call) -> None:
    async with world.pool.acquire():
        task = asyncio.ensure_future(call(world, insert))
        await until(lambda: world.engine.stats().waiting)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def deadline_over_waiting(world: World, call: Call) -> None:
    async with world.pool.acquire():
        with pytest.raises(OperationTimeout):
            await call(world, insert, deadline=0.1)


async def callers_time_over_waiting(world: World, call: Call) -> None:
    async with world.pool.acquire():
        with anyio.move_on_after(0.1) as scope:
            await call(world, insert)
        assert scope.cancelled_caught


async def acquire_timed_out(world: World, call: Call) -> None:
    world.with_engine(acquire_timeout=0.1)
    async with world.pool.acquire():
        with pytest.raises(AcquireTimeout):
            await call(world, insert)


async def shed(world: World, call: Call) -> None:
    world.with_engine(max_waiting=0)
    async with world.pool.acquire():
        with pytest.raises(EngineOverloaded):
            await call(world, insert)


async def closed(world: World, call: Call) -> None:
    await world.engine.close()
    with pytest.raises(EngineClosed):
        await call(world, insert)


async def commit_refused(world: World, call: Call) -> None:
    with pytest.raises(asyncpg.UniqueViolationError):
        await call(world, deferred_violation)


async def commit_in_doubt(world: World, call: Call) -> None:
    world.proxy.inject(Fault("reset", when=answer_to_commit))
    with pytest.raises(CommitUnknown):
        await call(world, insert)


async def evicted(world: World, call: Call) -> None:
    """Its session is ended in the middle of the body: before COMMIT that is a sure rollback."""

    async def loses_it(conn: Any) -> None:
        await insert(conn)
        await world.other.fetchval("SELECT pg_terminate_backend($1, 5000)", conn.get_server_pid())
        await conn.execute("SELECT 1")

    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError)):
        await call(world, loses_it)


async def rollback_failed(world: World, call: Call) -> None:
    """The server undoes it all the same, when it notices that nobody is there any more."""
    world.proxy.inject(Fault("reset", when=query("ROLLBACK")))
    with pytest.raises(RollbackFailed):
        await call(world, fails)


async def reset_failed(world: World, call: Call) -> list[dict[str, Any]]:
    """Committed, and then the pool's own hook raises: the caller has its result, the connection is lost.

    Gives what the event loop's exception handler was told.
    """
    told: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()

    async def breaks(conn: Any) -> None:
        await conn.fetchval("SELECT 1")
        raise ValueError("of the pool's own hook")

    async with asyncpg.create_pool(world.dsn, min_size=0, max_size=1, reset=breaks) as pool:
        world.engine = Engine(pool, observer=world.observe)
        loop.set_exception_handler(lambda _, context: told.append(context))
        try:
            await call(world, insert)
        finally:
            loop.set_exception_handler(before)
        assert await world.other.fetchval("SELECT count(*) FROM t") == 1
    return told


async def primary_lost(world: World, call: Call) -> None:
    settings = {"default_transaction_read_only": "on"}
    async with asyncpg.create_pool(world.dsn, min_size=0, max_size=1, server_settings=settings) as pool:
        world.engine = Engine(pool, observer=world.observe)
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await call(world, insert)


# --- the ways of run alone


async def found_committed(world: World, call: Call) -> None:
    world.proxy.inject(Fault("reset", when=answer_to_commit))
    await call(world, insert, resolve_commit=True, deadline=10)


async def found_committed_by_token(world: World, call: Call) -> None:
    await world.engine.run(TOKENS.install)
    world.with_engine(commit_tokens=TOKENS)
    world.seen.events.clear()
    await found_committed(world, call)


async def found_aborted_and_run_again(world: World, call: Call) -> None:
    world.proxy.inject(Fault("reset", when=query("COMMIT")))
    await call(world, insert, resolve_commit=True, deadline=10)


async def not_found_out(world: World, call: Call) -> None:
    world.unreachable_at = events.CommitInDoubt
    world.proxy.inject(Fault("reset", when=answer_to_commit))
    with pytest.raises(CommitUnknown):
        await call(world, insert, resolve_commit=True, deadline=0.6)


async def retried_in_a_new_transaction(world: World, call: Call) -> None:
    await call(world, FailsOnce("40001"), retry=QUICK)


async def retried_from_a_savepoint(world: World, call: Call) -> None:
    await call(world, pipe(FailsOnce("55P03"), retry(QUICK)))


async def retries_exhausted(world: World, call: Call) -> None:
    with pytest.raises(RetriesExhausted):
        await call(world, raising("40001"), retry=QUICK)


async def refused_on_a_later_try(world: World, call: Call) -> None:
    taking: list[asyncio.Future[Any]] = []

    def takes_the_connection(event: Event) -> None:
        world.seen(event)
        if isinstance(event, events.Retried):
            taking.append(asyncio.ensure_future(world.pool.acquire()))

    world.engine = Engine(world.pool, observer=takes_the_connection, acquire_timeout=0.1)
    slowly = RetryPolicy(attempts=3, first_delay=0.05, max_delay=0.05)
    with pytest.raises(AcquireTimeout):
        await call(world, raising("40001"), retry=slowly)
    await world.pool.release(await taking[0])


async def autocommitted(world: World, call: Call) -> None:
    await call(world, insert, autocommit=True)


async def autocommitted_readonly(world: World, call: Call) -> None:
    await call(world, lambda conn: conn.fetchval("SELECT 1"), autocommit=True, readonly=True)


async def autocommit_lost(world: World, call: Call) -> None:
    world.proxy.inject(Fault("reset", when=query("INSERT"), side="after"))
    with pytest.raises(CommitUnknown):
        await call(world, insert, autocommit=True)


async def autocommit_refused_by_the_server(world: World, call: Call) -> None:
    with pytest.raises(asyncpg.UniqueViolationError):
        await call(world, raising("23505"), autocommit=True)


async def autocommit_body_raised(world: World, call: Call) -> None:
    with pytest.raises(LookupError):
        await call(world, fails, autocommit=True)


async def autocommit_retried(world: World, call: Call) -> None:
    await call(world, FailsOnce("40001"), autocommit=True, retry=QUICK)


# --- the pool's own calls


async def direct(world: World, body: Body, **options: Any) -> None:
    del body
    sql = options.pop("sql", "SELECT 1")
    await world.engine.fetchval(sql, **options)


async def direct_done(world: World, call: Call) -> None:
    await call(world, insert)


async def direct_refused_by_the_server(world: World, call: Call) -> None:
    with pytest.raises(asyncpg.DivisionByZeroError):
        await call(world, insert, sql="SELECT 1 / 0")


async def direct_timed_out(world: World, call: Call) -> None:
    with pytest.raises(TimeoutError):
        await call(world, insert, sql="SELECT pg_sleep(30)", timeout=0.2)


async def direct_cancelled(world: World, call: Call) -> None:
    task = asyncio.ensure_future(call(world, insert, sql="SELECT pg_sleep(30)"))
    await until(lambda: world.engine.stats().in_use)
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# --- the table


COUNTED: dict[str, type[Event]] = {
    "acquires": events.Acquired,
    "acquire_timeouts": events.AcquireTimedOut,
    "shed": events.Shed,
    "evicted": events.Evicted,
    "retries": events.Retried,
    "commits": events.Committed,
    "rollbacks": events.RolledBack,
    "commits_in_doubt": events.CommitInDoubt,
}
"""Each of these counts what its event tells."""
COUNTED_ALONE = ("waits_abandoned", "commits_found_committed", "commits_found_aborted")
TOLD_ALONE: dict[str, type[Event]] = {
    "resolved": events.CommitResolved,
    "refused": events.RetryRefused,
    "expired": events.PoolExpired,
}
"""What is told and not counted, by the table's names."""

BOTH = (run, transaction)
RUN = (run,)
DIRECT = (direct,)
ALL = (run, transaction, direct)

Ending = Callable[[World, Call], Awaitable[object]]
TABLE: list[tuple[Ending, tuple[Call, ...], dict[str, int]]] = [
    (committed, BOTH, {"acquires": 1, "commits": 1}),
    (committed_readonly, BOTH, {"acquires": 1, "commits": 1}),
    (committed_and_the_caller_cancelled, BOTH, {"acquires": 1, "commits": 1}),
    (committed_and_the_callers_time_over, BOTH, {"acquires": 1, "commits": 1}),
    (reset_failed, BOTH, {"acquires": 1, "commits": 1, "evicted": 1}),
    (body_raised, BOTH, {"acquires": 1, "rollbacks": 1}),
    (servers_error, BOTH, {"acquires": 1, "rollbacks": 1}),
    (aborted, BOTH, {"acquires": 1, "rollbacks": 1}),
    (deadline_over_in_the_server, BOTH, {"acquires": 1, "rollbacks": 1}),
    (deadline_over_in_the_client, RUN, {"acquires": 1, "rollbacks": 1}),
    (cancelled_in_the_body, BOTH, {"acquires": 1, "rollbacks": 1}),
    (commit_refused, BOTH, {"acquires": 1, "rollbacks": 1}),
    (evicted, BOTH, {"acquires": 1, "rollbacks": 1, "evicted": 1}),
    (rollback_failed, BOTH, {"acquires": 1, "rollbacks": 1, "evicted": 1}),
    (primary_lost, BOTH, {"acquires": 1, "rollbacks": 1, "evicted": 1, "expired": 1}),
    (commit_in_doubt, BOTH, {"acquires": 1, "commits_in_doubt": 1, "evicted": 1}),
    (commit_given_up, BOTH, {"acquires": 1, "commits_in_doubt": 1, "evicted": 1}),
    (cancelled_waiting, ALL, {"waits_abandoned": 1}),
    (deadline_over_waiting, BOTH, {"waits_abandoned": 1}),
    (callers_time_over_waiting, ALL, {"waits_abandoned": 1}),
    (acquire_timed_out, ALL, {"acquire_timeouts": 1}),
    (shed, ALL, {"shed": 1}),
    (closed, ALL, {}),
    (
        found_committed,
        RUN,
        {
            "acquires": 2, "commits": 1, "commits_in_doubt": 1, "commits_found_committed": 1, "resolved": 1,
            "evicted": 1,
        },
    ),
    (
        found_committed_by_token,
        RUN,
        {
            "acquires": 2, "commits": 1, "commits_in_doubt": 1, "commits_found_committed": 1, "resolved": 1,
            "evicted": 1,
        },
    ),
    (
        found_aborted_and_run_again,
        RUN,
        {
            "acquires": 3, "commits": 1, "rollbacks": 1, "retries": 1, "commits_in_doubt": 1,
            "commits_found_aborted": 1, "resolved": 1, "evicted": 1,
        },
    ),
    (not_found_out, RUN, {"acquires": 1, "commits_in_doubt": 1, "resolved": 1, "evicted": 1}),
    (retried_in_a_new_transaction, RUN, {"acquires": 2, "rollbacks": 1, "retries": 1, "commits": 1}),
    (retried_from_a_savepoint, RUN, {"acquires": 1, "retries": 1, "commits": 1}),
    (retries_exhausted, RUN, {"acquires": 3, "rollbacks": 3, "retries": 2, "refused": 1}),
    (refused_on_a_later_try, RUN, {"acquires": 1, "rollbacks": 1, "retries": 1, "acquire_timeouts": 1}),
    (autocommitted, RUN, {"acquires": 1, "commits": 1}),
    (autocommitted_readonly, RUN, {"acquires": 1, "commits": 1}),
    (autocommit_retried, RUN, {"acquires": 2, "retries": 1, "commits": 1}),
    (autocommit_lost, RUN, {"acquires": 1, "commits_in_doubt": 1, "evicted": 1}),
    (autocommit_refused_by_the_server, RUN, {"acquires": 1}),
    (autocommit_body_raised, RUN, {"acquires": 1}),
    (direct_done, DIRECT, {"acquires": 1}),
    (direct_refused_by_the_server, DIRECT, {"acquires": 1}),
    (direct_timed_out, DIRECT, {"acquires": 1}),
    (direct_cancelled, DIRECT, {"acquires": 1}),
]  # fmt: skip

ROWS = [
    pytest.param(ending, call, expected, id=f"{call.__name__}-{ending.__name__}")
    for ending, calls, expected in TABLE
    for call in calls
]


@pytest.mark.parametrize(("ending", "call", "expected"), ROWS)
async def test_counters_and_events_tell_the_truth(
    ending: Ending, call: Call, expected: dict[str, int], world: World
) -> None:
    with anyio.fail_after(30):
        await ending(world, call)
    assert not expected.keys() - COUNTED.keys() - set(COUNTED_ALONE) - TOLD_ALONE.keys()
    stats = asdict(world.engine.stats())
    told = Counter(type(event) for event in world.seen.events)
    found = {name: stats.get(name, "there is none") for name in (*COUNTED, *COUNTED_ALONE)}
    assert found == {name: expected.get(name, 0) for name in found}
    named = COUNTED | TOLD_ALONE
    assert {name: told[kind] for name, kind in named.items()} == {
        name: expected.get(name, 0) for name in named
    }
    assert (stats["in_use"], stats["waiting"]) == (0, 0)


# --- what the events say


async def test_the_commit_of_a_transaction_is_told_like_that_of_a_run(world: World) -> None:
    await committed(world, transaction)
    (event,) = world.seen.of(events.Committed)
    assert (event.operation, event.attempts) == ("transaction", 1)
    assert event.seconds > 0


@pytest.mark.parametrize("call", BOTH, ids=lambda call: call.__name__)
async def test_a_cancelled_callers_commit_is_told_like_any_other(call: Call, world: World) -> None:
    await committed_and_the_caller_cancelled(world, call)
    (event,) = world.seen.of(events.Committed)
    assert (event.operation, event.attempts) == ("insert" if call is run else "transaction", 1)
    assert event.seconds > 0


async def test_a_doubt_under_autocommit_is_told_with_its_operation(world: World) -> None:
    await autocommit_lost(world, run)
    (event,) = world.seen.of(events.CommitInDoubt)
    assert event.operation == "insert"


async def test_a_rollback_of_what_was_found_aborted_is_told_with_its_operation(world: World) -> None:
    await found_aborted_and_run_again(world, run)
    (event,) = world.seen.of(events.RolledBack)
    assert event.operation == "insert"


@pytest.mark.parametrize("call", BOTH, ids=lambda call: call.__name__)
async def test_a_pools_own_reset_that_fails_is_told_with_its_error(call: Call, world: World) -> None:
    """To the observer as an eviction; to the event loop's exception handler, for it is a bug somewhere."""
    told = await reset_failed(world, call)
    (event,) = world.seen.of(events.Evicted)
    assert (event.sqlstate, event.condition) == (None, "ValueError")
    (context,) = told
    assert isinstance(context["exception"], ValueError)


async def test_waits_that_were_abandoned_are_seen_by_the_sizing_advice(world: World) -> None:
    """Half of the calls got no connection within their deadline: that pool is not about right."""
    await world.pool.fetchval("SELECT 1")
    loop = asyncio.get_running_loop()
    before, began = world.engine.stats(), loop.time()
    for _ in range(100):
        await world.engine.run(lambda conn: conn.fetchval("SELECT 1"))
    async with world.pool.acquire(), anyio.create_task_group() as group:
        for _ in range(100):
            group.start_soon(_gives_up, world.engine)
    advice = pool_advice(before, world.engine.stats(), loop.time() - began)
    assert 0.45 < advice.wait_share < 0.55


async def _gives_up(engine: Engine) -> None:
    with contextlib.suppress(OperationTimeout):
        await engine.run(insert, deadline=0.05)
