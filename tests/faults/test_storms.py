"""Many at once: deadlocks, serialization failures, an outage under load, and a blocked event loop."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import (
    Engine,
    Operation,
    OperationTimeout,
    RetryBudget,
    RetryPolicy,
    batch,
    each,
    execute_many,
    ingest,
    operation,
    pipe,
    retry,
    timeout,
)
from dbop_raw.testing import Server
from tests.support.soak.checker import TABLE, Books
from tests.support.soak.nemesis import note_complaints, until
from tests.support.soak.workload import add

pytestmark = pytest.mark.anyio

# A batch takes so long that a short pause only meets the same rivals again.
PATIENT = RetryPolicy(attempts=100, first_delay=0.02, max_delay=1.0)

# --- deadlocks

KEYS = 200
WORKERS = 8
UPSERT = "INSERT INTO tally VALUES ($1, 1) ON CONFLICT (k) DO UPDATE SET n = tally.n + 1"


@operation
async def upsert(conn: Any, key: tuple[int]) -> None:
    await conn.execute(UPSERT, *key)


async def _tally(dsn: str) -> None:
    conn = await asyncpg.connect(dsn)
    await conn.execute("CREATE TABLE tally (k int PRIMARY KEY, n int NOT NULL)")
    # A deadlock is looked for soon: the storm is to be short.
    await conn.execute(
        f"ALTER DATABASE {(await conn.fetchval('SELECT current_database()'))} SET deadlock_timeout = '20ms'"
    )
    await conn.close()


async def _deadlocks(dsn: str) -> int:
    """Deadlocks that the server has counted. A session's are counted when it ends, at the latest."""
    others = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    conn = await asyncpg.connect(dsn)
    try:
        while await conn.fetchval(others):  # noqa: ASYNC110 - the server has no event for it
            await anyio.sleep(0.01)
        return int(
            await conn.fetchval("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
        )
    finally:
        await conn.close()


async def _all_counted(dsn: str, rounds: int) -> None:
    conn = await asyncpg.connect(dsn)
    try:
        rows = await conn.fetch("SELECT k, n FROM tally")
    finally:
        await conn.close()
    assert {row["k"]: row["n"] for row in rows} == dict.fromkeys(range(KEYS), rounds)


WRITERS: dict[str, Callable[[], Callable[[Sequence[tuple[int]]], Operation[Any]]]] = {
    "each": lambda: batch(each(upsert)),
    "execute_many": lambda: batch(execute_many(UPSERT)),
}


@pytest.mark.parametrize("writer", WRITERS)
async def test_a_deadlock_storm_ends_with_each_upsert_done_once(
    writer: str, postgres_dsn: str, rng: random.Random, scale: float
) -> None:
    await _tally(postgres_dsn)
    rounds = round(2 * scale)
    orders = [rng.sample(range(KEYS), KEYS) for _ in range(WORKERS * rounds)]
    async with Engine.open(postgres_dsn, min_size=0, max_size=WORKERS, acquire_timeout=60) as engine:
        write = WRITERS[writer]()

        async def work(orders: list[list[int]]) -> None:
            for order in orders:
                result = await engine.run(write([(key,) for key in order]), retry=PATIENT)
                assert result.failed == ()

        async with anyio.create_task_group() as group:
            for number in range(WORKERS):
                group.start_soon(work, orders[number::WORKERS])
        retries = engine.stats().retries
        assert engine.stats().in_use == 0
    await _all_counted(postgres_dsn, len(orders))
    deadlocks = await _deadlocks(postgres_dsn)
    print(f"{writer}: {len(orders)} batches of {KEYS}, {deadlocks} deadlocks, {retries} retries")  # noqa: T201
    assert deadlocks > 0, "no storm"
    assert retries == deadlocks, "another kind of retry, or one too many"


@pytest.mark.parametrize("ordered", [False, True], ids=["as they come", "order_by"])
async def test_an_ingest_of_upserts_deadlocks_only_without_order_by(
    postgres_dsn: str, rng: random.Random, scale: float, *, ordered: bool
) -> None:
    await _tally(postgres_dsn)
    rounds = WORKERS * round(4 * scale)
    source = [(key,) for _ in range(rounds) for key in rng.sample(range(KEYS), KEYS)]
    async with Engine.open(postgres_dsn, min_size=0, max_size=WORKERS, acquire_timeout=60) as engine:
        report = await ingest(
            engine,
            source,
            batch(execute_many(UPSERT)),
            size=KEYS,
            workers=WORKERS,
            retry=PATIENT,
            order_by=(lambda key: key[0]) if ordered else None,
        )
    assert (report.written, report.rejected, report.finished) == (len(source), 0, True)
    await _all_counted(postgres_dsn, rounds)
    deadlocks = await _deadlocks(postgres_dsn)
    print(f"ingest, ordered={ordered}: {rounds} chunks, {deadlocks} deadlocks, {report.retries} retries")  # noqa: T201
    assert (deadlocks, report.retries) == (0, 0) if ordered else deadlocks > 0


# --- serialization failures

ACCOUNTS, START, TASKS = 10, 1000, 16


async def test_under_serializable_the_sum_never_changes_and_each_transfer_is_done_once(
    postgres_dsn: str, rng: random.Random, scale: float
) -> None:
    conn = await asyncpg.connect(postgres_dsn)
    await conn.execute("CREATE TABLE accounts (id int PRIMARY KEY, balance int NOT NULL)")
    await conn.execute("CREATE TABLE transfers (id int NOT NULL, source int, target int, amount int)")
    await conn.executemany("INSERT INTO accounts VALUES ($1, $2)", [(n, START) for n in range(ACCOUNTS)])
    sums: list[int] = []
    acknowledged: dict[int, tuple[int, int, int]] = {}
    over = False

    async def transfer(conn: Any, number: int, source: int, target: int, amount: int) -> None:
        had = await conn.fetchval("SELECT balance FROM accounts WHERE id = $1", source)
        has = await conn.fetchval("SELECT balance FROM accounts WHERE id = $1", target)
        # Written from what was read: a lost update would change the sum.
        await conn.execute("UPDATE accounts SET balance = $2 WHERE id = $1", source, had - amount)
        await conn.execute("UPDATE accounts SET balance = $2 WHERE id = $1", target, has + amount)
        await conn.execute("INSERT INTO transfers VALUES ($1, $2, $3, $4)", number, source, target, amount)

    async with Engine.open(postgres_dsn, max_size=TASKS + 1, acquire_timeout=60) as engine:

        async def teller(numbers: Sequence[int], chances: random.Random) -> None:
            for number in numbers:
                source, target = chances.sample(range(ACCOUNTS), 2)
                amount = chances.randrange(1, 100)

                def op(conn: Any, told: tuple[int, int, int, int] = (number, source, target, amount)) -> Any:
                    return transfer(conn, *told)

                await engine.run(op, isolation="serializable", retry=PATIENT)
                acknowledged[number] = (source, target, amount)

        async def auditor() -> None:
            while not over:
                total = await engine.run(
                    lambda conn: conn.fetchval("SELECT sum(balance) FROM accounts"),
                    isolation="serializable", readonly=True, retry=PATIENT,
                )  # fmt: skip
                sums.append(total)

        numbers = range(round(TASKS * 20 * scale))
        async with anyio.create_task_group() as watch:
            watch.start_soon(auditor)
            async with anyio.create_task_group() as group:
                for first in range(TASKS):
                    group.start_soon(teller, numbers[first::TASKS], random.Random(rng.random()))
            over = True
        stats = engine.stats()
    rows = await conn.fetch("SELECT * FROM transfers")
    final = await conn.fetchval("SELECT sum(balance) FROM accounts")
    await conn.close()
    print(f"{len(numbers)} transfers, {stats.retries} retries, {len(sums)} snapshots")  # noqa: T201
    assert Counter(tuple(row) for row in rows) == Counter((n, *told) for n, told in acknowledged.items())
    assert len(rows) == len(numbers)
    assert {*sums, final} == {ACCOUNTS * START}
    assert len(sums) >= 10
    assert stats.retries > 0, "no storm"
    assert stats.in_use == 0


# --- an outage

CALLERS = 200
PAUSE = 0.8
"""Seconds between two calls of one caller: 250 calls a second in all, well below what the server can do."""


@pytest.mark.parametrize("how", ["paused", "gone"])
async def test_retries_are_no_storm_in_an_outage_and_the_rate_is_back_within_two_seconds(  # noqa: PLR0915
    how: str, fragile_server: Server, fragile_dsn: str, rng: random.Random, scale: float
) -> None:
    # Paused, the server lets a call wait; gone, it refuses it at once, and only the budget stops the retries.
    begin, end = {
        "paused": (fragile_server.pause, fragile_server.resume),
        "gone": (fragile_server.crash, fragile_server.start),
    }[how]
    outage = 3.0 if scale <= 1 else 10.0
    complaints: list[str] = []
    note_complaints(complaints)
    books, loop = Books(), asyncio.get_running_loop()
    done: list[float] = []
    starts = calls = 0
    over = False
    conn = await asyncpg.connect(fragile_dsn)
    await conn.execute(TABLE)
    await conn.close()

    async def caller(engine: Engine, chances: random.Random) -> None:
        nonlocal calls
        await anyio.sleep(chances.uniform(0, PAUSE))
        while not over:
            began = loop.time()
            calls += 1
            group = books.group()
            op = pipe(add(group.rows[0]), timeout(0.5), retry(RetryPolicy(attempts=4)))
            try:
                with books.judging(group, deadline=1.5):
                    await engine.run(op, deadline=1.5)
                done.append(loop.time())
            except Exception:  # noqa: BLE001, S110 - an outage; the books have it
                pass
            await anyio.sleep(max(0.0, PAUSE - (loop.time() - began)) * chances.uniform(0.5, 1.5))

    budget = RetryBudget(capacity=20, per_call=0.1)
    async with Engine.open(
        fragile_dsn, min_size=10, max_size=20, acquire_timeout=0.5, budget=budget
    ) as engine:
        async with anyio.create_task_group() as group:
            for _ in range(CALLERS):
                group.start_soon(caller, engine, random.Random(rng.random()))
            await anyio.sleep(2.5)
            before, calls_before, retries_before = loop.time(), calls, engine.stats().retries
            rate = sum(at > before - 1.5 for at in done) / 1.5
            await asyncio.to_thread(begin)
            paused = loop.time()
            try:
                await anyio.sleep(outage)
            finally:
                await asyncio.to_thread(end)
            resumed = loop.time()
            in_outage = calls - calls_before
            starts = in_outage + engine.stats().retries - retries_before
            await anyio.sleep(2.2)
            over = True
        stats = engine.stats()
        assert stats.in_use == 0
    # The rate of each second that ends within two seconds of the outage's end.
    ends = [resumed + 1 + step / 20 for step in range(21)]
    rates = [sum(end - 1 < at <= end for at in done) for end in ends]
    first = next((end - resumed for end, got in zip(ends, rates, strict=True) if got >= 0.9 * rate), None)
    met = sum(paused < at < resumed for at in done)
    conn = await asyncpg.connect(fragile_dsn)
    audit = await books.audit(conn)
    await conn.close()
    print(  # noqa: T201
        f"{how}: outage of {outage:g} s: {in_outage} calls, {starts} starts ({starts / in_outage:.2f} a "
        f"call), {met} done in it, {rate:.0f}/s before, {first and round(first, 2)} s to 90 %, "
        f"errors {books.errors}, overrun {books.overrun:.2f} s ({books.overrun_by}), {audit.rows} rows"
    )
    assert audit.clean, audit
    assert complaints == []
    assert met < 0.1 * rate * outage, "no outage"
    assert in_outage > CALLERS
    assert starts <= 1.2 * in_outage
    assert how == "paused" or budget.refused > in_outage / 2, "the budget was not needed"
    assert first is not None, f"rates after the outage {rates}, before {rate}"
    assert books.overrun <= 0.3, books.overrun_by


# --- a blocked event loop

BLOCK = 2.0
"""Seconds for which user code blocks the event loop."""
LIMIT = 0.5
"""Seconds: the timeout and the deadline of each call, which run out while the loop is blocked."""


async def _in_flight(what: str, engine: Engine, go: asyncio.Event, ready: Callable[[], None]) -> Any:
    """A call whose last message is on its way when `go` is set; gives its outcome."""

    async def last_statement(conn: Any) -> str:
        await conn.execute("SELECT 1")
        ready()
        await go.wait()
        tag: str = await conn.execute("INSERT INTO t VALUES (1, 'one')")
        return tag

    async def nothing_more(conn: Any) -> str:
        tag: str = await conn.execute("INSERT INTO t VALUES (1, 'one')")
        ready()
        await go.wait()
        return tag

    async def fails(conn: Any) -> str:
        await nothing_more(conn)
        raise ZeroDivisionError

    calls: dict[str, Callable[[], Any]] = {
        "timeout": lambda: engine.run(pipe(last_statement, timeout(LIMIT))),
        "deadline": lambda: engine.run(last_statement, deadline=LIMIT),
        "autocommit": lambda: engine.run(pipe(last_statement, timeout(LIMIT)), autocommit=True),
        "COMMIT": lambda: engine.run(nothing_more, deadline=LIMIT),
        "COMMIT looked up": lambda: engine.run(nothing_more, deadline=LIMIT, resolve_commit=True),
        "ROLLBACK": lambda: engine.run(fails, deadline=LIMIT),
    }
    try:
        return await calls[what]()
    except Exception as exc:  # noqa: BLE001 - it is the outcome
        return exc


IN_FLIGHT = ("timeout", "deadline", "autocommit", "COMMIT", "COMMIT looked up", "ROLLBACK")


async def test_an_answer_that_came_while_the_event_loop_was_blocked_is_no_timeout(postgres_dsn: str) -> None:
    before = asyncio.all_tasks()
    conn = await asyncpg.connect(postgres_dsn)
    await conn.execute(TABLE)
    outcomes: dict[str, Any] = {}
    waiting = 0

    def ready() -> None:
        nonlocal waiting
        waiting += 1

    async with Engine.open(postgres_dsn, min_size=len(IN_FLIGHT), max_size=len(IN_FLIGHT)) as engine:
        go = asyncio.Event()

        async def one(what: str) -> None:
            outcomes[what] = await _in_flight(what, engine, go, ready)

        async with anyio.create_task_group() as group:
            for what in IN_FLIGHT:
                group.start_soon(one, what)
            assert await until(lambda: waiting == len(IN_FLIGHT), 0.8 * LIMIT)
            go.set()
            # After the steps in which the calls send their messages, and before any answer is read.
            asyncio.get_running_loop().call_soon(time.sleep, BLOCK)
        stats = engine.stats()
    written = await conn.fetchval("SELECT count(*) FROM t")
    await conn.close()
    failure = outcomes.pop("ROLLBACK")
    assert outcomes == dict.fromkeys(IN_FLIGHT[:-1], "INSERT 0 1")
    assert isinstance(failure, ZeroDivisionError)
    assert written == len(IN_FLIGHT) - 1
    assert (stats.in_use, stats.evicted, stats.commits_in_doubt) == (0, 0, 0)
    assert await until(lambda: asyncio.all_tasks() <= before)


async def test_a_body_with_more_to_do_after_a_blocked_loop_is_out_of_time_and_a_retry_does_it(
    postgres_dsn: str,
) -> None:
    conn = await asyncpg.connect(postgres_dsn)
    await conn.execute(TABLE)
    loop, starts = asyncio.get_running_loop(), 0

    async def body(conn: Any) -> int:
        nonlocal starts
        starts += 1
        if starts % 2:
            loop.call_soon(time.sleep, 2 * LIMIT)
        await conn.execute("INSERT INTO t VALUES (1, 'one')")
        await conn.execute("INSERT INTO t VALUES (2, 'two')")
        return starts

    async with Engine.open(postgres_dsn, min_size=1, max_size=2) as engine:
        # The time is over, and half of the work is not done: this verdict is true.
        with pytest.raises(OperationTimeout):
            await engine.run(pipe(body, timeout(LIMIT)))
        starts = 0
        assert await engine.run(pipe(body, timeout(LIMIT), retry(RetryPolicy(attempts=2)))) == 2
        assert engine.stats().in_use == 0
    rows = await conn.fetch("SELECT id FROM t ORDER BY id")
    await conn.close()
    assert [row["id"] for row in rows] == [1, 2]
