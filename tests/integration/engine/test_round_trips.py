"""What a run costs on the wire: round trips, counted, not timed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from dbop_raw import Engine, RetryPolicy, pipe, retry, timeout
from dbop_raw.testing import FaultProxy, Server
from dbop_raw.testing.server import run_sql
from tests.support.round_trips import EVENTS, add_event, counted, warm

pytestmark = pytest.mark.anyio

POLICY = RetryPolicy(attempts=3)


@pytest.fixture
def events(postgres_dsn: str) -> str:
    run_sql(postgres_dsn, EVENTS)
    return postgres_dsn


@pytest.fixture
async def behind_proxy(postgres_server: Server, events: str) -> AsyncIterator[tuple[Engine, FaultProxy]]:
    async with counted(postgres_server, events) as found:
        await warm(found[0])
        yield found


async def test_a_run_with_timeout_and_retry_costs_3(behind_proxy: tuple[Engine, FaultProxy]) -> None:
    engine, proxy = behind_proxy
    proxy.reset_counts()
    op = pipe(add_event((1, "x")), timeout(1.5, lock=0.5), retry(POLICY))
    assert await engine.run(op, retry=POLICY) == 1
    assert proxy.round_trips == 3


async def test_the_pools_own_reset_query_is_the_fourth(postgres_server: Server, events: str) -> None:
    async with counted(postgres_server, events, reset=True) as (engine, proxy):
        await warm(engine)
        proxy.reset_counts()
        op = pipe(add_event((1, "x")), timeout(1.5, lock=0.5), retry(POLICY))
        await engine.run(op, retry=POLICY)
        assert proxy.round_trips == 4


async def test_an_autocommitted_run_costs_1(behind_proxy: tuple[Engine, FaultProxy]) -> None:
    engine, proxy = behind_proxy
    proxy.reset_counts()
    await engine.run(pipe(add_event((1, "x")), timeout(1.5), retry(POLICY)), autocommit=True)
    assert proxy.round_trips == 1


async def test_an_operation_that_sends_nothing_costs_no_more_than_its_transaction(
    behind_proxy: tuple[Engine, FaultProxy],
) -> None:
    async def nothing(_: Any) -> str:
        return "done"

    engine, proxy = behind_proxy
    proxy.reset_counts()
    assert await engine.run(pipe(nothing, retry(POLICY))) == "done"
    # BEGIN travels before any body: a body may use the connection in whatever way.
    assert proxy.round_trips <= 2


async def test_a_retry_at_the_savepoint_costs_2_more(behind_proxy: tuple[Engine, FaultProxy]) -> None:
    """The failed statement, and ROLLBACK TO with the limits in one message."""
    started = 0

    async def locked_once(conn: Any) -> None:
        nonlocal started
        started += 1
        if started == 1:
            await conn.execute("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '55P03'; END $$")
        await conn.execute("SELECT 1")

    engine, proxy = behind_proxy
    proxy.reset_counts()
    await engine.run(pipe(locked_once, timeout(1.5), retry(RetryPolicy(attempts=2, first_delay=0.001))))
    assert proxy.round_trips == 3 + 2
