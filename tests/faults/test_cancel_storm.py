"""Runs and batches cancelled at random moments, by anyio's scopes and by asyncio's `task.cancel()`."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import anyio
import asyncpg
import pytest

from dbop_raw import CommitTokens, Engine, RetryPolicy
from tests.support.soak.checker import TABLE, Books
from tests.support.soak.nemesis import note_complaints, until
from tests.support.soak.workload import JOBS, How

pytestmark = pytest.mark.anyio

CALLS = 2000
AT_A_TIME = 16
CONNECTIONS = 8
NAMES = ("single", "nested", "copied", "each", "many", "ingest", "plain")
HOW = How(retry=RetryPolicy(attempts=3, first_delay=0.001, max_delay=0.01), deadline=30.0, timeout=5.0)


class Latest:
    """Seconds after which the latest cancellation of each job comes.

    It follows how long the job takes here and now: about half of the calls come to their end.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(NAMES, 0.05)

    def note(self, name: str, *, cancelled: bool) -> None:
        self.seconds[name] *= 1.1 if cancelled else 1 / 1.1


async def _cancelled_by_anyio(
    engine: Engine, books: Books, name: str, how: How, rng: random.Random, latest: float
) -> bool:
    with anyio.move_on_after(rng.uniform(0, latest)) as scope:
        await JOBS[name](engine, books, how, rng)
    return scope.cancelled_caught


async def _cancelled_by_asyncio(
    engine: Engine, books: Books, name: str, how: How, rng: random.Random, latest: float
) -> bool:
    task = asyncio.ensure_future(JOBS[name](engine, books, how, rng))
    # Sometimes twice, which ends even the wait for the answer to COMMIT.
    delays = [rng.uniform(0, latest)] + [rng.uniform(0, 0.001)] * (rng.random() < 0.2)
    for delay in delays:
        await asyncio.wait({task}, timeout=delay)
        task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return True
    return False


async def _check_connections(pool: asyncpg.Pool, engine: Engine) -> None:
    """All of them are there, none in a transaction, none with settings of somebody else."""
    assert engine.stats().in_use == 0
    async with asyncio.timeout(5):
        connections = [await pool.acquire() for _ in range(CONNECTIONS)]
    for conn in connections:
        assert not conn.is_in_transaction()
        [row] = await conn.fetch(
            "SELECT current_setting('statement_timeout'), current_setting('lock_timeout'), "
            "current_setting('application_name'), pg_current_xact_id_if_assigned()"
        )
        assert tuple(row) == ("0", "0", "storm", None)
    for conn in connections:
        await pool.release(conn)


async def test_two_thousand_cancellations_lose_dirty_and_leak_no_connection(
    postgres_dsn: str, seed: int, scale: float
) -> None:
    before = asyncio.all_tasks()
    complaints: list[str] = []
    note_complaints(complaints)
    outside = await asyncpg.connect(postgres_dsn)
    await outside.execute(TABLE)
    tokens = CommitTokens()
    await tokens.install(outside)
    books, ends, latest = Books(), Counter[str](), Latest()
    calls = iter(range(round(CALLS * scale)))
    async with asyncpg.create_pool(
        postgres_dsn,
        min_size=0,
        max_size=CONNECTIONS,
        server_settings={"application_name": "storm"},
    ) as pool:
        engines = (Engine(pool, acquire_timeout=30, commit_tokens=tokens), Engine(pool, acquire_timeout=30))

        async def work() -> None:
            for number in calls:
                chances = random.Random(seed + number)
                name = chances.choice(NAMES)
                how = How(
                    retry=HOW.retry,
                    deadline=HOW.deadline,
                    timeout=HOW.timeout,
                    resolve=chances.random() < 0.5,
                )
                cancel = chances.choice([_cancelled_by_anyio, _cancelled_by_asyncio])
                engine = chances.choice(engines)
                cancelled = await cancel(engine, books, name, how, chances, latest.seconds[name])
                latest.note(name, cancelled=cancelled)
                ends["cancelled" if cancelled else "done"] += 1

        async with anyio.create_task_group() as group:
            for _ in range(AT_A_TIME):
                group.start_soon(work)
        for engine in engines:
            await _check_connections(pool, engine)
        stats = [engine.stats() for engine in engines]
    in_transaction = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    async with asyncio.timeout(5):
        while await outside.fetchval(in_transaction):  # noqa: ASYNC110 - the server has no event for it
            await anyio.sleep(0.01)
    audit = await books.audit(outside, whole_table=True)
    await outside.close()
    evicted = sum(one.evicted for one in stats)
    print(f"{dict(ends)}, errors {books.errors}, {evicted} connections thrown away, {audit.rows} rows")  # noqa: T201
    assert audit.clean, audit
    assert books.surprises + complaints == []
    assert set(books.errors) <= {"CancelledError"}, "a cancellation became an error"
    # A cancelled transaction is rolled back: its connection is thrown away only where that can't be done.
    assert evicted < 0.1 * ends["cancelled"]
    assert min(ends["cancelled"], ends["done"]) > 0.1 * sum(ends.values()), "no storm"
    assert await until(lambda: asyncio.all_tasks() <= before), "tasks are left"
