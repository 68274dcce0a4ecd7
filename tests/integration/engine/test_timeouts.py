"""Timeouts on a real server (57014): who keeps them, whose they are, and what a retry makes of them."""

from __future__ import annotations

from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import (
    Engine,
    OperationTimeout,
    RetriesExhausted,
    RetryPolicy,
    pipe,
    retry,
    savepoint,
    timeout,
)
from tests.support.bodies import Starts, sleep
from tests.support.failures import raising
from tests.support.observing import Seen

pytestmark = [pytest.mark.anyio, pytest.mark.every_loop]

QUICK = RetryPolicy(attempts=4, first_delay=0.001, max_delay=0.01)
KEPT = 0.5
"""Seconds that the server can keep: it is told 25 ms less, in which its answer has to come."""


async def test_a_timeout_is_kept_by_the_server(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    with pytest.raises(OperationTimeout) as caught:
        await engine.run(pipe(sleep, timeout(KEPT)))
    assert (caught.value.seconds, caught.value.by_server) == (KEPT, True)
    assert isinstance(caught.value.__cause__, asyncpg.QueryCanceledError)
    assert engine.stats().evicted == 0


async def test_a_timeout_of_each_attempt_is_tried_again_within_an_outer_one(pool: asyncpg.Pool) -> None:
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
        await engine.run(pipe(sleep, timeout(20), timeout(KEPT)))
    assert (caught.value.seconds, caught.value.by_server) == (KEPT, True)
    assert engine.stats().evicted == 0


async def test_a_body_that_hangs_outside_of_the_server_is_ended_by_the_client(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    with pytest.raises(OperationTimeout) as caught:
        await engine.run(pipe(lambda _: anyio.sleep(30), timeout(0.05)))
    assert (caught.value.seconds, caught.value.by_server) == (0.05, False)


async def _cancel_backend(other: asyncpg.Connection, pid: int) -> None:
    """Cancel what `pid` executes, as soon as it is asleep."""
    asleep = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'PgSleep'"
    while not await other.fetchval(asleep, pid):  # noqa: ASYNC110 - the server has no event for it
        await anyio.sleep(0.005)
    await other.execute("SELECT pg_cancel_backend($1)", pid)


async def test_a_statement_that_somebody_else_cancels_is_the_drivers_own_error(
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


async def test_a_statement_that_its_own_body_cancels_is_the_drivers_own_error(pool: asyncpg.Pool) -> None:
    async def asked_for(conn: Any) -> None:
        await conn.execute("SELECT pg_cancel_backend(pg_backend_pid())")
        await sleep(conn)

    with pytest.raises(asyncpg.QueryCanceledError):
        await Engine(pool).run(pipe(asked_for, timeout(20), retry(QUICK)), retry=QUICK)


async def test_no_retry_waits_past_an_enclosing_timeout(pool: asyncpg.Pool) -> None:
    slow = RetryPolicy(attempts=1000, first_delay=600, max_delay=600)
    with pytest.raises(RetriesExhausted) as caught:
        await Engine(pool).run(pipe(raising("55P03"), retry(slow), timeout(2)))
    assert caught.value.reason == "deadline"
    assert caught.value.elapsed < 2


async def test_a_timeout_around_a_retry_is_not_tried_again(pool: asyncpg.Pool) -> None:
    starts = 0

    async def sleeps(conn: Any) -> None:
        # One statement: the server counts from the start of each, and the client from that of the first.
        nonlocal starts
        starts += 1
        await sleep(conn)

    with pytest.raises(OperationTimeout) as caught:
        await Engine(pool).run(pipe(sleeps, retry(QUICK), timeout(KEPT)))
    assert (caught.value.seconds, caught.value.by_server) == (KEPT, True)
    assert starts == 1


@pytest.mark.parametrize("outside", [(), (savepoint,), (timeout(20),)], ids=["alone", "savepoint", "timeout"])
async def test_a_timeout_around_a_retry_is_one_for_all_transactions(
    outside: tuple[Any, ...], pool: asyncpg.Pool
) -> None:
    async def slow_then_deadlocked(conn: Any) -> None:
        await sleep(conn, 0.1)
        await raising("40P01")(conn)

    patient = RetryPolicy(attempts=1000, first_delay=0.001, max_delay=0.002)
    body = Starts(slow_then_deadlocked)
    engine = Engine(pool)
    with anyio.fail_after(5), pytest.raises((OperationTimeout, RetriesExhausted)):
        await engine.run(pipe(body, retry(patient), timeout(0.35), *outside))
    assert 2 <= len(body.transactions) <= 4
    assert engine.stats().in_use == 0


async def test_a_policy_given_to_run_repeats_the_timeout_inside(pool: asyncpg.Pool) -> None:
    body = Starts(sleep)
    twice = RetryPolicy(attempts=2, first_delay=0.001)
    with pytest.raises(RetriesExhausted):
        await Engine(pool).run(pipe(body, retry(QUICK), timeout(0.1)), retry=twice)
    assert len(body.transactions) == 2
