"""Which connections are thrown away: by verdict, by loss of the primary, by the server's own hand."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator
from typing import Any

import anyio
import anyio.to_thread
import asyncpg
import pytest

from dbop_raw import (
    Engine,
    Repair,
    RetriesExhausted,
    RetryPolicy,
    Rule,
    events,
)
from dbop_raw.testing.local import LocalServer
from dbop_raw.testing.server import run_sql
from tests.support.bodies import add, insert, rows
from tests.support.dsn import without_tls
from tests.support.failures import raising
from tests.support.observing import Seen
from tests.support.policies import QUICK
from tests.support.pools import engine_on
from tests.support.replication import promote
from tests.support.replication import standby as standby_of
from tests.support.servers import own_server
from tests.support.sessions import backend, terminate
from tests.support.waiting import Together, until

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


@pytest.fixture(scope="module")
def primary() -> Iterator[LocalServer]:
    with own_server() as server:
        run_sql(server.dsn, "CREATE TABLE t (n integer PRIMARY KEY)")
        yield server


@pytest.fixture
def standby(primary: LocalServer) -> Iterator[LocalServer]:
    run_sql(primary.dsn, "TRUNCATE t")
    with standby_of(primary) as standby:
        yield standby


async def test_a_fail_over_expires_the_pool_once_and_not_once_a_caller(standby: LocalServer) -> None:
    seen = Seen()
    async with engine_on(without_tls(standby.dsn), max_size=8, observer=seen) as engine:
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


async def test_after_a_promotion_a_retry_writes_through_fresh_connections(standby: LocalServer) -> None:
    patient = RetryPolicy(attempts=200, first_delay=0.02, max_delay=0.05)
    async with engine_on(without_tls(standby.dsn), max_size=4) as engine:
        async with anyio.create_task_group() as group:
            for n in range(4):
                group.start_soon(functools.partial(engine.run, add(n), retry=patient))
            await until(lambda: engine.stats().retries >= 4)
            await anyio.to_thread.run_sync(promote, standby)
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
