"""Cancellation at every await: no connection is lost, none is dirty, and no COMMIT is half known.

Each scenario is run again and again, and cancelled one await later each time, until it comes to its own end
before its cancellation.
"""

# ruff: noqa: ASYNC110 - what the server or the pool has done, only asking again can tell

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.lowlevel
import asyncpg
import pytest

from dbop_raw import (
    CommitTokens,
    Engine,
    RetryPolicy,
    batch,
    copy_into,
    copy_text,
    each,
    execute_many,
    pipe,
    retry,
    savepoint,
    timeout,
)
from dbop_raw.testing import Server
from dbop_raw.testing.server import run_sql
from tests.support.bodies import TABLES, add, insert
from tests.support.cancelling import BY_TASK, MOST_AWAITS, ONCE, TWICE, Canceller, Outcome
from tests.support.dsn import without_tls
from tests.support.failures import raise_sql
from tests.support.pools import pool_on

pytestmark = pytest.mark.anyio

QUICK = RetryPolicy(attempts=4, first_delay=0.001, max_delay=0.002)
TOKENS = CommitTokens()


# --- the database, and what was committed


@dataclass
class Commits:
    """What was sent and answered on the connections of the pool under test."""

    sent: int = 0
    done: int = 0


def recording(commits: Commits) -> Callable[[asyncpg.Connection], Awaitable[None]]:
    """What sets connections up to note each COMMIT, and whether its answer came.

    By the driver's own log, for a connection class of a user's own has its COMMIT sent in another way.
    """

    def note(query: Any) -> None:
        if query.query == "COMMIT":
            commits.sent += 1
            commits.done += query.exception is None

    async def init(conn: asyncpg.Connection) -> None:
        conn.add_query_logger(note)

    return init


@pytest.fixture(scope="module")
def database(postgres_server: Server) -> Iterator[str]:
    """Instead of the folder's: its table has a row that is never good."""
    dsn = postgres_server.create_database()
    run_sql(dsn, TABLES)
    run_sql(dsn, "ALTER TABLE t ADD CHECK (n <> 13)")
    yield without_tls(dsn)
    postgres_server.drop_database(dsn)


@dataclass
class World:
    """A pool of one connection, an engine, and somebody who watches from outside."""

    pool: asyncpg.Pool
    engine: Engine
    watcher: asyncpg.Connection
    commits: Commits
    told: list[dict[str, Any]] = field(default_factory=list)
    """What the event loop's exception handler was told."""
    background: set[asyncio.Task[None]] = field(default_factory=set)
    """Tasks of a scenario that go on after it."""

    async def begin(self) -> None:
        await self.watcher.execute("TRUNCATE t")
        self.commits.sent = self.commits.done = 0

    async def rows(self) -> list[int]:
        return [row["n"] for row in await self.watcher.fetch("SELECT n FROM t ORDER BY n")]

    async def check(self, tasks: set[asyncio.Task[Any]]) -> None:
        """Nothing is held, nothing is dirty, nothing runs on; and the next run finds it so."""
        stats = self.engine.stats()
        assert (stats.in_use, stats.waiting) == (0, 0)
        with anyio.fail_after(5):
            while asyncio.all_tasks() - tasks or self.pool.get_size() != self.pool.get_idle_size():
                await anyio.sleep(0.001)
            while await self.watcher.fetchval(_BUSY):
                await anyio.sleep(0.002)
        async with self.pool.acquire() as conn:
            assert not conn.is_in_transaction()
            found = await conn.fetchrow(
                "SELECT current_setting('statement_timeout') AS statement, "
                "current_setting('lock_timeout') AS lock, "
                "current_setting('application_name') AS name"
            )
            assert found is not None
            assert tuple(found) == ("0", "0", "under test")
        assert await self.engine.run(lambda conn: conn.fetchval("SELECT 7")) == 7


_BUSY = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
    "AND backend_type = 'client backend' AND state <> 'idle'"
)


@pytest.fixture
async def world(dsn: str, other: asyncpg.Connection) -> AsyncIterator[World]:
    commits = Commits()
    options = {"init": recording(commits), "server_settings": {"application_name": "under test"}}
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    try:
        async with pool_on(dsn, min_size=1, max_size=1, **options) as pool:
            world = World(pool, Engine(pool), other, commits)
            loop.set_exception_handler(lambda _, context: world.told.append(context))
            yield world
        gc.collect()
        await anyio.lowlevel.checkpoint()
    finally:
        loop.set_exception_handler(before)
    assert world.told == []


# --- the scenarios


async def in_a_transaction(world: World) -> None:
    async with world.engine.transaction() as conn:
        await insert(conn, 1)
        await savepoint(add(2))(conn)


def that_needs_retries() -> Any:
    """A lock that is not free, then a deadlock, then it works."""
    codes = ["55P03", "40P01"]

    async def body(conn: Any) -> None:
        await insert(conn)
        if codes:
            await conn.execute(raise_sql(codes.pop(0)))

    return pipe(body, timeout(5, lock=1), retry(QUICK))


async def with_operations_inside(conn: Any) -> None:
    await pipe(add(1), timeout(5), retry(QUICK))(conn)
    try:
        await savepoint(add(1))(conn)
    except asyncpg.UniqueViolationError:
        await add(2)(conn)


async def on_a_fresh_connection(world: World) -> None:
    await world.pool.expire_connections()
    await world.engine.run(add(1))


async def after_waiting_for_one(world: World) -> None:
    """Its connection comes free 10 ms later."""
    held = await world.pool.acquire()

    async def let_go() -> None:
        await anyio.sleep(0.01)
        await world.pool.release(held)

    letting_go = asyncio.ensure_future(let_go())
    try:
        await world.engine.run(add(1))
    finally:
        world.background.add(letting_go)
        letting_go.add_done_callback(world.background.discard)


Scenario = Callable[[World], Coroutine[Any, Any, Any]]

RUNS: dict[str, tuple[Scenario, list[int]]] = {
    "run": (lambda world: world.engine.run(add(1)), [1]),
    "run with everything": (
        lambda world: world.engine.run(
            pipe(add(1), timeout(5, lock=1), retry(QUICK)), retry=QUICK, isolation="serializable", deadline=10
        ),
        [1],
    ),
    "run that needs retries": (lambda world: world.engine.run(that_needs_retries(), retry=QUICK), [1]),
    "run that resolves": (lambda world: world.engine.run(add(1), resolve_commit=True), [1]),
    "run of nested operations": (lambda world: world.engine.run(with_operations_inside), [1, 2]),
    "run on a fresh connection": (on_a_fresh_connection, [1]),
    "run that waits for a connection": (after_waiting_for_one, [1]),
    "transaction": (in_a_transaction, [1, 2]),
}

# With a NULL, a duplicate, and a row that breaks a check: 1, 2, 3 and 4 are good.
ITEMS: list[Any] = [1, 2, None, 2, 13, 3, 4]
ROWS = [(item,) for item in ITEMS]
LINES = [(None if item is None else str(item),) for item in ITEMS]
GOOD = [1, 2, 3, 4]
# Dense enough for the server to try them row by row.
DENSE = [(n if n % 2 else None,) for n in range(100, 200)]
DENSE_GOOD = list(range(101, 200, 2))


def writing(writer: Any, items: Any) -> Scenario:
    """A batch; what it learned is from one that came before, so that the cancelled one is short."""
    write = batch(writer, retry=QUICK)
    return lambda world: world.engine.run(write(items))


BATCHES: dict[str, tuple[Scenario, list[int]]] = {
    "each": (writing(each(lambda n: pipe(add(n), timeout(5))), ITEMS), GOOD),
    "execute_many": (writing(execute_many("INSERT INTO t VALUES ($1)"), ROWS), GOOD),
    "copy_into": (writing(copy_into("t", columns=("n",)), ROWS), GOOD),
    "copy_text": (writing(copy_text("t", columns=("n",)), LINES), GOOD),
    "dense execute_many": (writing(execute_many("INSERT INTO t VALUES ($1)"), DENSE), DENSE_GOOD),
    "dense copy_into": (writing(copy_into("t", columns=("n",)), DENSE), DENSE_GOOD),
}
SCENARIOS = RUNS | BATCHES
OTHERS = [name for name in SCENARIOS if name != "run"]
CLEANS_UP = {"run that needs retries", "run of nested operations"}
"""They send ROLLBACKs, into which asyncio's `task.cancel()` reaches, and then the connection is not kept."""


async def cancel_everywhere(world: World, name: str, how: Canceller) -> int:
    """Return how many awaits there were."""
    scenario, expected = SCENARIOS[name]
    await world.begin()
    await scenario(world)
    assert await world.rows() == expected
    for n in range(MOST_AWAITS):
        await world.begin()
        tasks = asyncio.all_tasks()
        outcome = Outcome()
        await how(scenario(world), n, outcome)
        if how not in [*BY_TASK, *TWICE] and not world.background:
            assert world.pool.get_size() == world.pool.get_idle_size(), f"await {n}: it is not given back"
        await world.check(tasks)
        rows = await world.rows()
        if not outcome.fired:
            assert rows == expected
            return n
        assert outcome.cancelled or rows == expected, f"await {n}"
        assert rows in ([], expected), f"await {n}"
        if how in ONCE:
            assert world.commits.sent == world.commits.done, f"await {n}: it did not wait for COMMIT's answer"
            allowed = 4 if how in BY_TASK and name in CLEANS_UP else 0
            assert world.engine.stats().evicted <= allowed, f"await {n}: a connection that was well is lost"
            # Of check's own run there is one more, and it writes nothing.
            assert bool(rows) == (world.commits.done > 1), f"await {n}"
        assert world.told == [], f"await {n}"
    raise AssertionError(f"more than {MOST_AWAITS} awaits")


@pytest.mark.every_loop
@pytest.mark.parametrize("how", ONCE, ids=lambda how: how.__name__)
@pytest.mark.parametrize("name", ["run", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
async def test_a_cancellation_at_any_await_leaves_everything_clean(
    name: str, how: Canceller, world: World
) -> None:
    assert await cancel_everywhere(world, name, how) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("how", TWICE, ids=lambda how: how.__name__)
@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_second_cancellation_at_any_await_leaves_everything_clean(
    name: str, how: Canceller, world: World
) -> None:
    assert await cancel_everywhere(world, name, how) >= 3


@pytest.mark.slow
@pytest.mark.every_loop
@pytest.mark.parametrize("how", [*ONCE, *TWICE], ids=lambda how: how.__name__)
async def test_a_cancelled_autocommit_run_leaves_a_clean_connection(how: Canceller, world: World) -> None:
    for n in range(MOST_AWAITS):
        await world.begin()
        tasks = asyncio.all_tasks()
        outcome = Outcome()
        await how(world.engine.run(add(1), autocommit=True), n, outcome)
        await world.check(tasks)
        if not outcome.fired:
            assert n >= 2
            assert await world.rows() == [1]
            return
    raise AssertionError("it never ends")


@pytest.mark.slow
@pytest.mark.every_loop
@pytest.mark.parametrize("how", [*ONCE, *TWICE], ids=lambda how: how.__name__)
async def test_a_cancelled_direct_call_leaves_a_clean_connection(how: Canceller, world: World) -> None:
    for n in range(MOST_AWAITS):
        await world.begin()
        tasks = asyncio.all_tasks()
        outcome = Outcome()
        await how(world.engine.fetch("SELECT pg_sleep(0.001)"), n, outcome)
        await world.check(tasks)
        if not outcome.fired:
            assert n >= 2
            return
    raise AssertionError("it never ends")


@pytest.mark.slow
@pytest.mark.parametrize("how", [*ONCE, *TWICE], ids=lambda how: how.__name__)
async def test_a_cancelled_run_with_a_token_commits_it_with_its_row_or_not_at_all(
    how: Canceller, world: World
) -> None:
    world.engine = Engine(world.pool, commit_tokens=TOKENS)
    await world.engine.run(TOKENS.install)

    async def tokens() -> int:
        found: int = await world.watcher.fetchval(f"SELECT count(*) FROM {TOKENS.table}")
        return found

    for n in range(MOST_AWAITS):
        await world.begin()
        tasks = asyncio.all_tasks()
        outcome = Outcome()
        before = await tokens()
        await how(world.engine.run(add(1), resolve_commit=True), n, outcome)
        await world.check(tasks)
        assert await tokens() - before == len(await world.rows())
        if not outcome.fired:
            assert await world.rows() == [1]
            return
    raise AssertionError("it never ends")
