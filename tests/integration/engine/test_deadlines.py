"""The deadline over everything that a run and a transaction block do, kept by the server where it can be."""

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
    timeout,
)
from tests.support.bodies import insert, rows, sleep, then
from tests.support.failures import raising
from tests.support.pools import Holding
from tests.support.sessions import backend
from tests.support.settings import with_bounds

pytestmark = [pytest.mark.anyio, pytest.mark.every_loop]

QUICK = RetryPolicy(attempts=4, first_delay=0.001, max_delay=0.01)
KEPT = 0.5
"""Seconds that the server can keep: it is told 25 ms less, in which its answer has to come."""


async def test_the_deadline_of_a_transaction_is_told_to_the_server(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    with pytest.raises(OperationTimeout) as caught:
        async with engine.transaction(deadline=KEPT) as conn:
            await sleep(conn)
    assert (caught.value.seconds, caught.value.by_server) == (KEPT, True)
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
        await engine.run(sleep, deadline=KEPT)
    assert (caught.value.seconds, caught.value.by_server) == (KEPT, True)
    assert engine.stats().evicted == 0


async def test_a_deadline_within_a_wider_timeout_is_ended_by_the_server_too(single: asyncpg.Pool) -> None:
    engine = Engine(single)
    with pytest.raises(OperationTimeout) as caught:
        await engine.run(pipe(sleep, timeout(20)), deadline=KEPT)
    assert (caught.value.seconds, caught.value.by_server) == (KEPT, True)
    assert engine.stats().evicted == 0


async def test_the_deadline_is_over_a_body_that_waits_for_something_else(single: asyncpg.Pool) -> None:
    engine = Engine(single)
    with pytest.raises(OperationTimeout) as caught:
        await engine.run(then(insert, lambda _: anyio.sleep(30)), deadline=0.1)
    assert not caught.value.by_server
    assert await rows(single) == []


async def test_the_deadline_is_over_the_pauses_between_attempts(single: asyncpg.Pool) -> None:
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


async def test_the_callers_own_fail_after_stays_the_callers_timeout(pool: asyncpg.Pool) -> None:
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


@pytest.mark.parametrize("level", ["savepoint", "transaction"])
async def test_no_retry_waits_past_the_deadline_of_its_caller(level: str, pool: asyncpg.Pool) -> None:
    slow = RetryPolicy(attempts=1000, first_delay=600, max_delay=600)
    code = "55P03" if level == "savepoint" else "40001"
    with anyio.fail_after(5), pytest.raises(RetriesExhausted) as caught:
        await Engine(pool).run(pipe(raising(code), retry(slow)))
    assert caught.value.reason == "deadline"


async def test_a_run_that_outlives_its_deadline_keeps_its_connection(single: asyncpg.Pool) -> None:
    """No time is left for the release by then, and a server that is well resets all the same."""
    engine = with_bounds(Engine(single), reset=5.0)
    pid = await engine.run(backend)

    async def outlives(conn: Any) -> None:
        await insert(conn)
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.05 + engine.settings.bounds.grace + 0.1)
        await anyio.sleep_forever()

    with pytest.raises(OperationTimeout):
        await engine.run(outlives, deadline=0.05)
    assert engine.stats().evicted == 0
    assert await engine.run(backend) == pid
