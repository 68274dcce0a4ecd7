"""Fail-over: the primary dies, a standby is promoted, and the old primary comes back as a standby."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import asyncpg
import pytest

from dbop_raw import (
    CommitUnknown,
    Engine,
    Event,
    Repair,
    RetryPolicy,
    classify,
)
from dbop_raw.events import PoolExpired, Retried
from dbop_raw.testing import Fault, FaultProxy, query
from dbop_raw.testing.local import LocalServer
from tests.support.losing import OURS, TOKENS, insert, make_tables, use_up
from tests.support.replication import promote, rewind
from tests.support.replication import standby as standby_of
from tests.support.servers import own_server
from tests.support.standbys import cut_off, wait_for_standby
from tests.support.tables import rows_of

pytestmark = pytest.mark.anyio

PATIENT = RetryPolicy(attempts=200, first_delay=0.02, max_delay=0.2)
STANDBY = "second"


@pytest.fixture
def primary() -> Iterator[LocalServer]:
    """A primary of this test's own. Its WAL is written late, so that an unflushed transaction can be lost."""
    with own_server(wal_writer_delay="10s") as server:
        make_tables(server.dsn)
        yield server


def fail_over(primary: LocalServer, standby: LocalServer) -> None:
    primary.crash()
    promote(standby)
    standby.sql("ALTER SYSTEM SET synchronous_standby_names = ''")
    standby.sql("SELECT pg_reload_conf()")


class TestAPoolThatKnowsBothHosts:
    @pytest.mark.parametrize("by", ["token", "xid"])
    async def test_writes_find_the_new_primary_and_each_acknowledged_row_is_there_once(
        self, primary: LocalServer, rng: random.Random, scale: float, by: str
    ) -> None:
        acknowledged: list[float] = []
        numbers: set[int] = set()
        failed: dict[int, Exception] = {}
        counter = iter(range(1_000_000))
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        async def work(engine: Engine) -> None:
            while not stop.is_set():
                number = next(counter)
                try:
                    await engine.run(insert(number), retry=PATIENT, deadline=15, resolve_commit=True)
                except Exception as exc:  # noqa: BLE001 - judged below
                    failed[number] = exc
                else:
                    numbers.add(number)
                    acknowledged.append(loop.time())

        with standby_of(primary, name=STANDBY) as standby:
            wait_for_standby(primary, STANDBY)
            hosts = f"{primary.host}:{primary.port},{standby.host}:{standby.port}"
            dsn = f"postgresql://{primary.user}@{hosts}/postgres?target_session_attrs=read-write"
            async with Engine.open(
                dsn, min_size=2, max_size=8, ssl=False, commit_tokens=TOKENS if by == "token" else None
            ) as engine:
                workers = [asyncio.create_task(work(engine)) for _ in range(8)]
                await asyncio.sleep(rng.uniform(0.3, 0.5))
                down = loop.time()
                await asyncio.to_thread(fail_over, primary, standby)
                up = loop.time()
                await asyncio.sleep(0.5)
                await asyncio.to_thread(rewind, primary, standby)
                await asyncio.to_thread(primary.start)
                assert primary.sql("SELECT pg_is_in_recovery()") is True
                # Connections to be made now meet the old primary, which is a standby, first.
                await asyncio.sleep(0.2)
                await engine.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE "
                    "backend_type = 'client backend' AND pid <> pg_backend_pid()"
                )
                await asyncio.sleep(0.5 * scale)
                stop.set()
                await asyncio.gather(*workers)
                stats = engine.stats()
            rows = await rows_of(standby.dsn, OURS)
        gap = min((at for at in acknowledged if at > up), default=float("inf")) - up
        open_ = {number for number, exc in failed.items() if isinstance(exc, CommitUnknown)}
        print(  # noqa: T201 - figures
            f"{by}: promoted after {up - down:.2f} s, first commit {gap:.3f} s later, {len(numbers)} "
            f"acknowledged, {len(open_)} CommitUnknown, in doubt {stats.commits_in_doubt}, found committed "
            f"{stats.commits_found_committed}, found aborted {stats.commits_found_aborted}"
        )
        assert set(rows.values()) == {1}, "a row is there twice"
        assert numbers <= rows.keys(), "acknowledged and lost"
        assert rows.keys() - numbers <= open_
        assert failed.keys() == open_, failed
        assert not (by == "token" and failed), "a token can always be looked up"
        assert any(at > up for at in acknowledged)
        assert gap < 2


class TestAnAddressThatMoves:
    """A proxy stands for a virtual address or a DNS name."""

    async def test_25006_expires_the_pool_once_and_writes_find_the_new_primary(
        self, primary: LocalServer
    ) -> None:
        seen: list[Event] = []
        count = 8
        with standby_of(primary, name=STANDBY) as standby:
            # The address leads to what is only a standby now; then the primary gets it.
            async with (
                FaultProxy(standby.host, standby.port) as proxy,
                Engine.open(
                    proxy.dsn(primary.dsn), min_size=count, max_size=count, ssl=False, observer=seen.append
                ) as engine,
            ):
                with pytest.raises(asyncpg.ReadOnlySQLTransactionError) as caught:
                    await engine.run(insert(0))
                assert classify(caught.value).repair is Repair.CONNECTION
                assert len(_expiries(seen)) == 1
                # All of them again on the standby.
                await asyncio.gather(*(engine.fetchval("SELECT pg_sleep(0.05)") for _ in range(count)))
                seen.clear()
                met = asyncio.Barrier(count)

                async def write(conn: Any, number: int) -> int:
                    if number not in begun:
                        begun.add(number)
                        await conn.fetchval("SELECT 1")
                        await met.wait()
                        proxy.server_port = primary.port
                    return await insert(number)(conn)

                begun: set[int] = set()
                results = await asyncio.gather(
                    *(
                        engine.run(partial(write, number=n), retry=PATIENT, deadline=5)
                        for n in range(1, count + 1)
                    ),
                    *(engine.run(insert(n), retry=PATIENT, deadline=5) for n in range(count + 1, 3 * count)),
                )
                old = proxy.connections
                evicted = engine.stats().evicted
                assert await engine.fetchval("SELECT pg_is_in_recovery()") is False
            assert results == list(range(1, 3 * count))
            print(f"{count} on the standby, {len(_expiries(seen))} expiry, {evicted} evicted")  # noqa: T201
            assert len(_expiries(seen)) == 1, "once for each loss, not once a waiter"
            assert {event.sqlstate for event in seen if isinstance(event, Retried)} == {"25006"}
            assert old <= count
            assert await rows_of(primary.dsn, OURS) == dict.fromkeys(results, 1)

    @pytest.mark.parametrize("by", ["token", "xid"])
    async def test_an_xid_that_another_transaction_got_on_the_promoted_server_is_not_taken_for_ours(
        self, primary: LocalServer, by: str
    ) -> None:
        with standby_of(primary, name=STANDBY) as standby:
            async with (
                FaultProxy(primary.host, primary.port) as proxy,
                Engine.open(
                    proxy.dsn(primary.dsn),
                    min_size=1,
                    max_size=2,
                    ssl=False,
                    commit_tokens=TOKENS if by == "token" else None,
                ) as engine,
            ):
                await asyncio.to_thread(cut_off, primary, standby)
                primary_xid: list[str] = []

                async def body(conn: Any) -> int:
                    primary_xid.append(await conn.fetchval("SELECT pg_current_xact_id()::text"))
                    return await insert(7)(conn)

                lost = proxy.inject(Fault("cut", when=query("COMMIT"), side="after"))
                run = asyncio.create_task(engine.run(body, resolve_commit=True, deadline=20))
                await asyncio.wait_for(lost.wait(), 5)
                proxy.server_port = 1  # until the new primary has the address
                await asyncio.to_thread(primary.crash)
                await asyncio.to_thread(promote, standby)
                xid = primary_xid[0]
                await asyncio.to_thread(use_up, standby.dsn, int(xid))
                # What a naive look-up would be told:
                lie = standby.sql(f"SELECT pg_xact_status('{xid}'::xid8)")
                assert lie == "committed", "the trap is not set: nobody took the xid"
                assert await rows_of(standby.dsn, OURS) == {}, "the row is there: it was not lost"
                proxy.server_port = standby.port
                if by == "token":
                    assert await run == 7
                    assert await rows_of(standby.dsn, OURS) == {7: 1}
                    assert engine.stats().commits_found_aborted == 1
                else:
                    with pytest.raises(CommitUnknown):
                        await run
                    assert await rows_of(standby.dsn, OURS) == {}
                assert engine.stats().commits_found_committed == 0


def _expiries(seen: list[Event]) -> list[PoolExpired]:
    return [event for event in seen if isinstance(event, PoolExpired)]
