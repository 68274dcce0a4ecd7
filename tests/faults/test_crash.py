"""The server crashes and recovers, and its backends are ended, while work goes on."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from dbop_raw import (
    CommitUnknown,
    Engine,
    Event,
    Repair,
    RetriesExhausted,
    RetryBudget,
    RetryPolicy,
    classify,
)
from dbop_raw.events import Retried
from dbop_raw.testing import Fault, FaultProxy, message, query
from dbop_raw.testing.local import LocalServer
from dbop_raw.testing.server import run_sql
from tests.support.losing import OURS, TOKENS, insert, make_tables, use_up
from tests.support.servers import own_server
from tests.support.tables import rows_of

pytestmark = pytest.mark.anyio

PATIENT = RetryPolicy(attempts=200, first_delay=0.02, max_delay=0.25)


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    """A server to be broken. Its WAL is written late, so that a crash loses what was not flushed."""
    with own_server(wal_writer_delay="10s") as server:
        yield server


@pytest.fixture
def database(server: LocalServer) -> Iterator[str]:
    server.start()
    dsn = server.create_database()
    make_tables(dsn)
    yield dsn
    server.start()
    server.drop_database(dsn)


@pytest.fixture
async def admin(database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database, ssl=False)
    yield connection
    await connection.close()


class TestAServerThatIsKilledAndStarted:
    async def test_work_goes_on_within_the_deadline_and_no_storm_comes_of_it(
        self, server: LocalServer, database: str, scale: float
    ) -> None:
        seen: list[Event] = []
        finished: list[float] = []
        overruns: list[float] = []
        failed: dict[int, Exception] = {}
        acknowledged: set[int] = set()
        counter = iter(range(1_000_000))
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        deadline = 15.0

        async def work(engine: Engine) -> None:
            while not stop.is_set():
                number = next(counter)
                started = loop.time()
                try:
                    await engine.run(insert(number), retry=PATIENT, deadline=deadline, resolve_commit=True)
                except Exception as exc:  # noqa: BLE001 - judged below
                    failed[number] = exc
                else:
                    acknowledged.add(number)
                    finished.append(loop.time())
                overruns.append(loop.time() - started - deadline)

        async with Engine.open(
            database, min_size=2, max_size=8, ssl=False, observer=seen.append, commit_tokens=TOKENS
        ) as engine:
            workers = [asyncio.create_task(work(engine)) for _ in range(16)]
            ups = []
            for _ in range(max(2, round(2 * scale))):
                await asyncio.sleep(0.4)
                await asyncio.to_thread(server.crash)
                await asyncio.sleep(0.2)
                await asyncio.to_thread(start_slowly, server, 0.7)
                ups.append(loop.time())
            await asyncio.sleep(0.4)
            stop.set()
            await asyncio.gather(*workers)
            stats = engine.stats()
        rows = await rows_of(database, OURS)
        gaps = [min(at for at in finished if at > up) - up for up in ups]
        refused = Counter(event.sqlstate for event in seen if isinstance(event, Retried))
        print(  # noqa: T201 - figures
            f"{len(acknowledged)} acknowledged, {len(failed)} raised, first commit after the start: "
            f"{', '.join(f'{gap:.3f}' for gap in gaps)} s; retries by code {dict(refused)}; in doubt "
            f"{stats.commits_in_doubt}"
        )
        assert not failed, failed
        assert set(rows.values()) == {1}
        assert rows.keys() == acknowledged
        assert refused["57P03"] > 0, "nobody met the server while it started"
        assert max(overruns) < 0.3
        assert max(gaps) < 1
        # 16 calls at a time, each at most once in 0.125 s on the average while the server is away (1 s).
        assert sum(refused.values()) < 16 * len(ups) * 20

    async def test_a_budget_bounds_the_attempts(self, server: LocalServer, database: str) -> None:
        seen: list[Event] = []
        starts = calls = 0
        budget = RetryBudget(capacity=20, per_call=0.1)

        async with Engine.open(
            database, min_size=1, max_size=8, ssl=False, observer=seen.append, budget=budget
        ) as engine:

            async def one() -> None:
                nonlocal calls
                calls += 1
                try:
                    await engine.run(insert(calls), retry=PATIENT)
                except (RetriesExhausted, CommitUnknown, OSError):
                    await asyncio.sleep(0.01)

            async def many() -> None:
                while not stop.is_set():
                    await one()

            stop = asyncio.Event()
            workers = [asyncio.create_task(many()) for _ in range(16)]
            await asyncio.sleep(0.2)
            await asyncio.to_thread(server.crash)
            await asyncio.sleep(0.8)
            await asyncio.to_thread(server.start)
            await asyncio.sleep(0.2)
            stop.set()
            await asyncio.gather(*workers)
            starts = calls + sum(isinstance(event, Retried) for event in seen)
            assert await engine.run(insert(0), retry=PATIENT) == 0
        print(f"{calls} calls, {starts} tries, {budget.refused} refused")  # noqa: T201 - figures
        assert budget.refused > 0
        assert starts <= calls * 1.1 + 20


def start_slowly(server: LocalServer, seconds: float) -> None:
    """Start it, and hold its recovery for a while: until then it answers 57P03."""
    assert server.data_dir is not None
    started: list[BaseException | None] = []
    stopped = None

    def start() -> None:
        try:
            server.start()
        except BaseException as exc:  # noqa: BLE001 - carried over
            started.append(exc)
        else:
            started.append(None)

    thread = threading.Thread(target=start)
    thread.start()
    end = time.monotonic() + 5
    while stopped is None and not started and time.monotonic() < end:
        stopped = _startup_of(server.data_dir)
    if stopped is not None:
        os.kill(stopped, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(stopped, signal.SIGCONT)
    thread.join()
    if started[0] is not None:
        raise started[0]


def _startup_of(data_dir: Path) -> int | None:
    """The process that recovers; it lives for some milliseconds."""
    try:
        postmaster = int((data_dir / "postmaster.pid").read_text().split("\n", 1)[0])
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
        for child in children:
            if b"startup" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    except (OSError, ValueError):
        pass
    return None


class TestABackendThatIsKilled:
    """The server recovers, and what was not flushed is lost: the ids of lost transactions are given again."""

    @pytest.mark.parametrize("by", ["token", "xid"])
    async def test_a_lost_transaction_is_never_reported_committed(
        self, server: LocalServer, database: str, by: str
    ) -> None:
        asynchronous = {"synchronous_commit": "off"}
        xids: list[int] = []

        async def body(conn: Any) -> int:
            xids.append(await conn.fetchval("SELECT pg_current_xact_id()::text::bigint"))
            return await insert(7)(conn)

        async with (
            FaultProxy(server.host, server.port) as proxy,
            Engine.open(
                proxy.dsn(database),
                min_size=1,
                max_size=2,
                ssl=False,
                server_settings=asynchronous,
                commit_tokens=TOKENS if by == "token" else None,
            ) as engine,
        ):
            victim = await asyncpg.connect(database, ssl=False)
            pid = await victim.fetchval("SELECT pg_backend_pid()")
            lost = proxy.inject(Fault("cut", when=query("COMMIT"), side="after"))
            run = asyncio.create_task(engine.run(body, resolve_commit=True, deadline=20))
            await asyncio.wait_for(lost.wait(), 5)
            proxy.server_port = 1  # no look-up yet
            # It is committed, as all can see, and not on disk.
            await _wait_for_row(victim, 7)
            server.kill_backend(pid, signal.SIGKILL)
            victim.terminate()
            await asyncio.to_thread(_recovered, server, database)
            await asyncio.to_thread(use_up, database, xids[0])
            lie = run_sql(database, f"SELECT pg_xact_status('{xids[0]}'::xid8)")
            assert lie == "committed", "the trap is not set: nobody got the xid again"
            assert await rows_of(database, OURS) == {}, "the trap is not set: the transaction was not lost"
            proxy.server_port = server.port
            if by == "token":
                assert await run == 7
                assert await rows_of(database, OURS) == {7: 1}
                assert engine.stats().commits_found_aborted == 1
            else:
                with pytest.raises(CommitUnknown):
                    await run
                assert await rows_of(database, OURS) == {}
            assert engine.stats().commits_found_committed == 0

    @pytest.mark.parametrize("by", ["token", "xid"])
    async def test_a_commit_in_doubt_with_no_crash_in_between_is_known(
        self, server: LocalServer, database: str, by: str
    ) -> None:
        """So that the xid way does not pass the test above by knowing nothing, ever."""
        async with (
            FaultProxy(server.host, server.port) as proxy,
            Engine.open(
                proxy.dsn(database),
                min_size=1,
                max_size=2,
                ssl=False,
                commit_tokens=TOKENS if by == "token" else None,
            ) as engine,
        ):
            for number, side in ((1, "after"), (2, "before")):
                proxy.inject(Fault("cut", when=query("COMMIT"), side=side))  # type: ignore[arg-type]
                assert await engine.run(insert(number), resolve_commit=True, deadline=5) == number
            stats = engine.stats()
        assert (stats.commits_found_committed, stats.commits_found_aborted) == (1, 1)
        assert await rows_of(database, OURS) == {1: 1, 2: 1}


async def _wait_for_row(connection: asyncpg.Connection, number: int) -> None:
    async with asyncio.timeout(5):
        while not await connection.fetchval("SELECT count(*) FROM t WHERE id = $1", number):
            await connection.execute("SELECT pg_sleep(0.005)")


def _recovered(server: LocalServer, dsn: str) -> None:
    """Wait until the server has gone down for its recovery and takes connections again."""
    end = time.monotonic() + 20
    gone = False
    while time.monotonic() < end:
        try:
            run_sql(dsn, "SELECT 1")
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            gone = True
        else:
            if gone or "all server processes terminated; reinitializing" in server.log_tail(50):
                return
        time.sleep(0.01)
    raise TimeoutError("the server did not recover")


class TestBackendsThatAreTerminated:
    @pytest.mark.parametrize("by", ["token", "xid", "nothing"])
    async def test_each_row_is_there_once_or_its_error_was_raised_though_backends_are_terminated(
        self,
        database: str,
        admin: asyncpg.Connection,
        rng: random.Random,
        scale: float,
        by: str,
    ) -> None:
        acknowledged: set[int] = set()
        failed: dict[int, Exception] = {}
        counter = iter(range(1_000_000))
        loop = asyncio.get_running_loop()
        end = loop.time() + 2 * scale
        size = 8

        async def work(engine: Engine) -> None:
            while loop.time() < end:
                number = next(counter)
                try:
                    await engine.run(insert(number), retry=PATIENT, resolve_commit=by != "nothing")
                except Exception as exc:  # noqa: BLE001 - judged below
                    failed[number] = exc
                else:
                    acknowledged.add(number)

        async def terminate() -> int:
            killed = 0
            while loop.time() < end:
                pids = await admin.fetch(
                    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
                    "AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
                )
                if pids:
                    pid = rng.choice(pids)["pid"]
                    killed += await admin.fetchval("SELECT pg_terminate_backend($1)::integer", pid)
                await asyncio.sleep(rng.uniform(0.001, 0.02))
            return killed

        async with Engine.open(
            database,
            min_size=size,
            max_size=size,
            ssl=False,
            commit_tokens=TOKENS if by == "token" else None,
        ) as engine:
            killed, *_ = await asyncio.gather(terminate(), *(work(engine) for _ in range(2 * size)))
            whole = loop.time()
            async with asyncio.timeout(1):
                await asyncio.gather(*(engine.run(_rest, retry=PATIENT) for _ in range(size)))
            whole = loop.time() - whole
            stats = engine.stats()
            assert (stats.size, stats.in_use, stats.waiting) == (size, 0, 0)
        rows = await rows_of(database, OURS)
        unknown = {number for number, exc in failed.items() if isinstance(exc, CommitUnknown)}
        print(  # noqa: T201 - figures
            f"{by}: {killed} killed, {len(acknowledged)} acknowledged, {len(unknown)} CommitUnknown, in "
            f"doubt {stats.commits_in_doubt} (committed {stats.commits_found_committed}, aborted "
            f"{stats.commits_found_aborted}), evicted {stats.evicted}; whole after {whole:.3f} s"
        )
        assert (killed or 0) > 20
        assert set(rows.values()) == {1}, "doubled"
        assert acknowledged <= rows.keys(), "lost"
        assert rows.keys() - acknowledged <= unknown
        assert failed.keys() == unknown, failed
        assert by == "nothing" or not failed, failed

    async def test_the_last_word_of_a_session_is_heard_before_the_end_of_its_line(
        self, server: LocalServer, database: str, admin: asyncpg.Connection
    ) -> None:
        """57P01 came while the connection lay idle, and its line still looks open."""
        async with (
            FaultProxy(server.host, server.port) as proxy,
            Engine.open(proxy.dsn(database), min_size=1, max_size=1, ssl=False) as engine,
        ):
            for retry in (None, PATIENT):
                pid = await engine.fetchval("SELECT pg_backend_pid()")
                last_word = proxy.inject(Fault("hang", when=message("server", "E"), side="after"))
                await admin.execute("SELECT pg_terminate_backend($1)", pid)
                await asyncio.wait_for(last_word.wait(), 5)
                await asyncio.sleep(0.05)
                if retry is None:
                    with pytest.raises(asyncpg.InternalClientError) as caught:
                        await engine.run(insert(1))
                    verdict = classify(caught.value)
                    # By itself nobody can say what was sent; before COMMIT, the run knows.
                    assert (verdict.repair, verdict.evict) == (Repair.UNKNOWN, True)
                else:
                    assert await engine.run(insert(2), retry=retry) == 2
                proxy.heal()
            assert engine.stats().evicted == 2
        assert await rows_of(database, OURS) == {2: 1}


async def _rest(conn: Any) -> None:
    await conn.execute("SELECT pg_sleep(0.05)")
