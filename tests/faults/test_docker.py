"""A server in a container: it hangs and goes on, its disk is full, and it has no connection left to give."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from dbop_raw import (
    AcquireTimeout,
    CommitUnknown,
    Engine,
    EngineOverloaded,
    Event,
    JsonlRejects,
    OperationTimeout,
    RetriesExhausted,
    RetryBudget,
    RetryPolicy,
    batch,
    copy_into,
    copy_text,
    each,
    execute_many,
    ingest,
    operation,
    pipe,
    timeout,
)
from dbop_raw.events import Retried
from dbop_raw.testing import Fault, FaultProxy, Server, query
from dbop_raw.testing.server import run_sql
from tests.support.container import docker_server
from tests.support.servers import or_skip
from tests.support.tables import rows_of

pytestmark = pytest.mark.anyio

Row = Sequence[int | str | None]

PAUSE = 5.0
# Seconds that a deadline may be off.
TOLERANCE = 0.3
PATIENT = RetryPolicy(attempts=40, first_delay=0.02, max_delay=0.25)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A container with a small disk at /small; in it max_connections is small, too."""
    settings = {"max_connections": "12", "superuser_reserved_connections": "3"}
    with or_skip(docker_server(settings, tmpfs={"/small": "size=6m"})) as server:
        server.sql("CREATE TABLESPACE small LOCATION '/small'")
        yield server


@pytest.fixture
def database(server: Server) -> Iterator[str]:
    dsn = server.create_database()
    yield dsn
    server.drop_database(dsn)


@operation
async def insert(conn: Any, number: int) -> int:
    result: int = await conn.fetchval("INSERT INTO t VALUES ($1) RETURNING id", number)
    return result


@pytest.fixture
async def engine(database: str) -> AsyncIterator[Engine]:
    run_sql(database, "CREATE TABLE t (id integer NOT NULL)")
    async with Engine.open(
        database, min_size=4, max_size=4, acquire_timeout=1.0, max_waiting=2, ssl=False
    ) as engine:
        yield engine


async def timed(call: Callable[[], Awaitable[Any]]) -> tuple[float, BaseException | None]:
    """How long it took, and what it raised."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    try:
        await call()
    except Exception as exc:  # noqa: BLE001 - what a test looks at
        return loop.time() - started, exc
    return loop.time() - started, None


class TestAServerThatHangsForFiveSeconds:
    async def test_deadlines_are_kept_by_a_server_that_hangs_and_nothing_is_written_twice(
        self, server: Server, database: str, engine: Engine
    ) -> None:
        loop = asyncio.get_running_loop()
        async with (
            FaultProxy(server.host, server.port) as proxy,
            Engine.open(proxy.dsn(database), min_size=3, max_size=3, ssl=False) as slow,
            Engine.open(database, min_size=1, max_size=1, ssl=False) as patient,
        ):
            # COMMITs that are on their way when the server freezes: they are held back by the proxy until
            # then.
            held = [
                proxy.inject(Fault("delay", when=query("COMMIT"), side="before", seconds=0.3))
                for _ in range(2)
            ]
            in_flight = {
                "commit, deadline 1.5": loop.create_task(timed(lambda: slow.run(insert(1), deadline=1.5))),
                "commit, deadline 9, looked up": loop.create_task(
                    timed(lambda: slow.run(insert(2), deadline=9, resolve_commit=True))
                ),
            }
            await asyncio.gather(*(asyncio.wait_for(one.wait(), 5) for one in held))
            await asyncio.to_thread(server.pause)
            frozen = loop.time()
            await asyncio.sleep(0.4)
            started = loop.time()
            calls: dict[str, tuple[float, Callable[[], Awaitable[Any]]]] = {
                "deadline": (1.5, lambda: engine.run(insert(3), deadline=1.5)),
                "timeout": (1.2, lambda: engine.run(pipe(insert(4), timeout(1.2)))),
                "timeout, inside of retry": (
                    2.0,
                    lambda: engine.run(insert(5), retry=PATIENT, deadline=2.0),
                ),
                "deadline, one statement": (
                    0.8,
                    lambda: engine.run(insert(6), deadline=0.8, autocommit=True),
                ),
                "acquire": (1.0, lambda: engine.run(insert(7))),
                "acquire, again": (1.0, lambda: engine.run(insert(8))),
                "shed": (0.0, lambda: engine.run(insert(9))),
            }
            running = {name: loop.create_task(timed(call)) for name, (_, call) in calls.items()}
            waits = loop.create_task(timed(lambda: patient.run(insert(10))))
            outcomes = {name: await task for name, task in running.items()}
            early = await in_flight.pop("commit, deadline 1.5")
            await asyncio.sleep(max(0.0, frozen + PAUSE - loop.time()))
            await asyncio.to_thread(server.resume)
            late = await in_flight.pop("commit, deadline 9, looked up")
            waited = await waits
        print({name: round(took, 3) for name, (took, _) in outcomes.items()})  # noqa: T201 - figures
        print("COMMIT", round(early[0], 3), round(late[0], 3), "patient", round(waited[0], 3))  # noqa: T201
        for name, (took, _) in outcomes.items():
            assert took == pytest.approx(calls[name][0], abs=TOLERANCE), name
        assert started - frozen < 1
        kinds = {name: type(error) for name, (_, error) in outcomes.items()}
        assert kinds == {
            "deadline": OperationTimeout,
            "timeout": OperationTimeout,
            "timeout, inside of retry": OperationTimeout,
            # No COMMIT of its own: it is open whether it was done, as with any timeout of a driver.
            "deadline, one statement": OperationTimeout,
            "acquire": AcquireTimeout,
            "acquire, again": AcquireTimeout,
            "shed": EngineOverloaded,
        }
        assert early[0] == pytest.approx(1.5, abs=TOLERANCE)
        assert isinstance(early[1], CommitUnknown)
        # These had time to wait for the server, and did.
        assert late[1] is None
        assert waited[1] is None
        # What the frozen server had received, it may do when it wakes.
        await asyncio.sleep(0.3)
        rows = await rows_of(database)
        assert set(rows.values()) == {1}, f"written twice: {rows}"
        assert {2, 10} <= rows.keys()
        assert rows.keys() <= {1, 2, 6, 10}, "raised a definite error, and is there all the same"
        assert engine.stats().in_use == 0
        assert await engine.run(insert(11), deadline=2) == 11


class TestADiskThatIsFull:
    """A table on a small disk: 53100 is nobody's bad row."""

    @pytest.fixture
    def table(self, database: str) -> str:
        run_sql(database, "CREATE TABLE t (id integer PRIMARY KEY, body text NOT NULL) TABLESPACE small")
        return database

    @pytest.mark.parametrize("kind", ["each", "execute_many", "copy_into", "copy_text"])
    async def test_a_batch_stops_at_once_when_the_disk_is_full(self, table: str, kind: str) -> None:
        number = str if kind == "copy_text" else int
        body = "x" * 1000
        # Dense bad rows first, so that the rows are tried one by one when the disk gets full.
        items = [(number(n), None if n < 300 and n % 2 else body) for n in range(12_000)]
        writers: dict[str, Any] = {
            "each": each(lambda row: lambda conn: conn.execute("INSERT INTO t VALUES ($1, $2)", *row)),
            "execute_many": execute_many("INSERT INTO t VALUES ($1, $2)"),
            "copy_into": copy_into("t", columns=("id", "body")),
            "copy_text": copy_text("t", columns=("id", "body")),
        }
        seen: list[Event] = []
        async with Engine.open(table, min_size=1, max_size=2, ssl=False, observer=seen.append) as engine:
            with pytest.raises(asyncpg.DiskFullError):
                await engine.run(batch(writers[kind], retry=PATIENT)(items), retry=PATIENT)
            assert await engine.fetchval("SELECT count(*) FROM t") == 0
        assert not [event for event in seen if isinstance(event, Retried)]
        assert not [
            event for event in seen if getattr(event, "sqlstate", None) == "53100" and "item" in event.name
        ]

    async def test_an_ingest_stops_at_once_when_the_disk_is_full_and_rejects_none_for_it(
        self, table: str, tmp_path: Path
    ) -> None:
        rejects = tmp_path / "rejects.jsonl"
        body = "x" * 1000
        source: list[Row] = [(n, None if n % 100 == 7 else body) for n in range(56_000)]
        async with Engine.open(table, min_size=1, max_size=4, ssl=False) as engine:
            reports: list[Any] = []
            with pytest.raises(asyncpg.DiskFullError):
                await ingest(
                    engine,
                    source,
                    batch(copy_into("t", columns=("id", "body"))),
                    size=500,
                    workers=2,
                    rejects=JsonlRejects(rejects),
                    progress=reports.append,
                )
            written = await engine.fetchval("SELECT count(*) FROM t")
        rejected = [json.loads(line) for line in rejects.read_text().splitlines()]
        print(f"written {written}, rejected {len(rejected)}")  # noqa: T201 - figures
        assert reports[-1].by_sqlstate.keys() == {"23502"}
        assert {one["sqlstate"] for one in rejected} == {"23502"}
        assert all(one["index"] % 100 == 7 for one in rejected)
        assert (reports[-1].written, reports[-1].rejected) == (written, len(rejected))
        assert 0 < written < 56_000


class TestTooManyConnections:
    async def test_a_refused_connection_backs_off_charges_the_budget_double_and_recovers(
        self, server: Server, database: str
    ) -> None:
        run_sql(database, "CREATE TABLE t (id integer NOT NULL)")
        # Not as superuser: those have connections kept for them.
        run_sql(database, "DROP ROLE IF EXISTS plain")
        run_sql(database, "CREATE ROLE plain LOGIN")
        run_sql(database, "GRANT ALL ON t TO plain")
        dsn = database.replace(f"//{server.user}@", "//plain@")
        budget = RetryBudget(capacity=400, per_call=0)
        seen: list[Event] = []
        hogs = [await asyncpg.connect(dsn, ssl=False) for _ in range(9)]
        try:
            async with Engine.open(
                dsn, min_size=0, max_size=4, ssl=False, budget=budget, observer=seen.append
            ) as engine:
                with pytest.raises(asyncpg.TooManyConnectionsError):
                    await engine.run(insert(0))
                poor = RetryBudget(capacity=5, per_call=0)
                async with Engine.open(dsn, min_size=0, max_size=1, ssl=False, budget=poor) as limited:
                    with pytest.raises(RetriesExhausted) as caught:
                        await limited.run(insert(0), retry=PATIENT)
                assert (caught.value.reason, caught.value.attempts) == ("budget", 3), "2 tokens a retry, of 5"

                calls = [asyncio.create_task(engine.run(insert(n), retry=PATIENT)) for n in range(1, 9)]
                await asyncio.sleep(0.5)
                refused = [event for event in seen if isinstance(event, Retried)]
                assert {event.sqlstate for event in refused} == {"53300"}
                for hog in hogs:
                    await hog.close()
                released = asyncio.get_running_loop().time()
                done = await asyncio.wait_for(asyncio.gather(*calls), 10)
                recovered = asyncio.get_running_loop().time() - released
        finally:
            for hog in hogs:
                hog.terminate()
        retries = [event for event in seen if isinstance(event, Retried)]
        print(f"{len(retries)} retries, all in {recovered:.2f} s after the last connection was given back")  # noqa: T201 - figures
        assert budget.tokens == 400 - 2 * len(retries)
        assert done == list(range(1, 9))
        assert await rows_of(database) == dict.fromkeys(done, 1)
        # 8 calls, half a second: with full jitter up to 0.25 s, no more than about 5 tries each.
        assert len(refused) <= 8 * 12
        assert recovered < 1

    async def test_connections_that_the_pool_has_are_used_while_it_can_make_no_more(
        self, server: Server, database: str
    ) -> None:
        """The pool tries the place that can't be filled again and again, while others lie idle."""
        run_sql(database, "CREATE TABLE t (id integer NOT NULL)")
        run_sql(database, "DROP ROLE IF EXISTS plain")
        run_sql(database, "CREATE ROLE plain LOGIN")
        run_sql(database, "GRANT ALL ON t TO plain")
        dsn = database.replace(f"//{server.user}@", "//plain@")
        async with Engine.open(dsn, min_size=2, max_size=4, ssl=False) as engine:
            hogs = [await asyncpg.connect(dsn, ssl=False) for _ in range(7)]
            try:
                # More at a time than there are connections; then one after another.
                crowd = await asyncio.gather(
                    *(engine.run(insert(n), retry=PATIENT) for n in range(8)), return_exceptions=True
                )
                alone = [await timed(lambda n=n: engine.run(insert(100 + n))) for n in range(20)]  # type: ignore[misc]
            finally:
                for hog in hogs:
                    await hog.close()
        assert [error for _, error in alone if error is not None] == []
        assert crowd == list(range(8))
