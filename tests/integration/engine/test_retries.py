"""Transient failures of a real server, on purpose: repaired at the right level, the right number of times."""

from __future__ import annotations

import functools
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import (
    Engine,
    RetriesExhausted,
    RetryBudget,
    RetryPolicy,
    batch,
    each,
    events,
    pipe,
    retry,
    timeout,
)
from tests.support.bodies import Starts, hit, hits
from tests.support.failures import raising
from tests.support.observing import Seen
from tests.support.waiting import Together, until

pytestmark = [pytest.mark.anyio, pytest.mark.every_loop]

QUICK = RetryPolicy(attempts=4, first_delay=0.001, max_delay=0.01)
THREE = RetryPolicy(attempts=3, first_delay=0.001, max_delay=0.01)


def a_body_that_frees_its_lock(holder: asyncpg.Connection) -> Starts:
    """Its first start waits in vain for a lock, which the second one has its holder give up."""

    async def frees_the_lock(conn: Any) -> None:
        if len(body.transactions) == 2:
            await holder.execute("ROLLBACK")
        await hit(conn)

    body = Starts(frees_the_lock)
    return body


async def test_a_lock_that_comes_free_costs_one_retry_from_the_savepoint(
    pool: asyncpg.Pool, other: asyncpg.Connection
) -> None:
    await other.execute("BEGIN")
    await hit(other)
    seen = Seen()
    before = Starts(functools.partial(hit, n=2))
    body = a_body_that_frees_its_lock(other)

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
    body = a_body_that_frees_its_lock(other)
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


async def test_a_retry_from_a_savepoint_leaves_no_lock_of_the_failed_attempt(
    pool: asyncpg.Pool, other: asyncpg.Connection
) -> None:
    """What the failed attempt had locked is free for others while the next one is waited for."""
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


async def test_a_serialization_failure_is_repaired_by_a_new_transaction(
    pool: asyncpg.Pool, other: asyncpg.Connection
) -> None:
    """The row that the first attempt has seen is changed by another session before it writes."""

    async def reads_then_writes(conn: Any) -> int:
        found: int = await conn.fetchval("SELECT hits FROM counter WHERE n = 1")
        if len(body.transactions) == 1:
            await hit(other)
        await conn.execute("UPDATE counter SET hits = $1 WHERE n = 1", found + 10)
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


async def test_a_serialization_failure_at_commit_is_repaired_by_a_new_transaction(pool: asyncpg.Pool) -> None:
    """Write skew: each of two runs reads what the other writes; one of them fails, perhaps only at COMMIT."""
    engine = Engine(pool)
    both_have_read = Together(2)

    async def skew(conn: Any, read: int, write: int) -> None:
        await conn.fetchval("SELECT hits FROM counter WHERE n = $1", read)
        await both_have_read()
        await hit(conn, write)

    async with anyio.create_task_group() as group:
        for read, write in ((1, 2), (2, 1)):
            body = functools.partial(skew, read=read, write=write)
            group.start_soon(functools.partial(engine.run, body, isolation="serializable", retry=QUICK))
    assert (await hits(pool, 1), await hits(pool, 2)) == (1, 1)
    assert engine.stats().retries >= 1


@pytest.mark.parametrize("first", ["savepoint", "transaction"])
async def test_attempts_count_together_over_all_levels(first: str, pool: asyncpg.Pool) -> None:
    kinds = ["55P03", "40001"] if first == "savepoint" else ["40001", "55P03"]

    async def fails(conn: Any) -> None:
        await raising(kinds[(len(body.transactions) - 1) % 2])(conn)

    seen = Seen()
    body = Starts(fails)
    with pytest.raises(RetriesExhausted) as caught:
        await Engine(pool, observer=seen).run(pipe(body, timeout(10), retry(QUICK)))
    assert (caught.value.attempts, len(body.transactions)) == (QUICK.attempts, QUICK.attempts)
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
    body = Starts(lambda conn: conn.execute("INSERT INTO counter (n) VALUES (1)"))
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


async def test_a_run_holds_nothing_while_it_waits_for_its_next_attempt(pool: asyncpg.Pool) -> None:
    slow = RetryPolicy(attempts=2, first_delay=60, max_delay=60)
    seen = Seen()
    engine = Engine(pool, observer=seen)
    async with anyio.create_task_group() as group:
        group.start_soon(functools.partial(engine.run, raising("40001"), retry=slow))
        await until(lambda: seen.of(events.Retried))
        assert seen.of(events.Retried)[0].delay > 0
        assert engine.stats().in_use == 0
        assert pool.get_size() == pool.get_idle_size()
        group.cancel_scope.cancel()


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


async def test_a_spent_budget_refuses_retries_of_the_whole_engine(single: asyncpg.Pool) -> None:
    seen = Seen()
    budget = RetryBudget(capacity=3, per_call=0)
    engine = Engine(single, budget=budget, observer=seen)
    outcomes = []
    for _ in range(3):
        with pytest.raises(RetriesExhausted) as caught:
            await engine.run(raising("40001"), retry=THREE)
        outcomes.append((caught.value.attempts, caught.value.reason))
    assert outcomes == [(3, "attempts"), (2, "budget"), (1, "budget")]
    assert budget.refused == 2
    assert [event.reason for event in seen.of(events.RetryRefused)] == ["attempts", "budget", "budget"]


async def test_a_retry_from_a_savepoint_draws_on_the_budget_too(single: asyncpg.Pool) -> None:
    engine = Engine(single, budget=RetryBudget(capacity=1, per_call=0))
    with pytest.raises(RetriesExhausted) as caught:
        await engine.run(pipe(raising("55P03"), retry(QUICK)))
    assert (caught.value.attempts, caught.value.reason) == (2, "budget")
