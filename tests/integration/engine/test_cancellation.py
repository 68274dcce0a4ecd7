"""Cancellation at every await: no connection is lost, none is dirty, and no COMMIT is half known.

Each scenario is run again and again, and cancelled one await later each time, until it comes to its own end
before its cancellation.
"""

# ruff: noqa: ASYNC110 - what the server or the pool has done, only asking again can tell

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
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
    operation,
    pipe,
    retry,
    savepoint,
    timeout,
)
from dbop_raw.session.settings import Bounds
from dbop_raw.testing import Fault, FaultProxy, Message, Server, query
from dbop_raw.testing.server import run_sql
from tests.support.settings import with_bounds

pytestmark = pytest.mark.anyio

QUICK = RetryPolicy(attempts=4, first_delay=0.001, max_delay=0.002)
MOST_AWAITS = 400


# --- cancelling at the n-th await


class Awaits:
    """Awaits `work`; calls `at` with the number of each await that really waits, and what it waits for."""

    def __init__(self, work: Coroutine[Any, Any, Any], at: Callable[[int, Any], None]) -> None:
        self.work = work
        self.at = at

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self.work.__await__()
        thrown: BaseException | None = None
        number = 0
        while True:
            try:
                waits_for = steps.send(None) if thrown is None else steps.throw(thrown)
            except StopIteration as stop:
                return stop.value
            self.at(number, waits_for)
            number += 1
            thrown = None
            try:
                yield waits_for
            except BaseException as exc:  # noqa: BLE001 - goes to the work, as it would without us
                thrown = exc


@dataclass
class Outcome:
    fired: bool = False
    cancelled: bool = False
    result: Any = None


Canceller = Callable[[Coroutine[Any, Any, Any], int, Outcome], Awaitable[None]]


def _when_it_is_done(waits_for: Any, then: Callable[[], object]) -> None:
    """Before the task that waits learns of it: the answer is there, and is lost."""
    if isinstance(waits_for, asyncio.Future):
        waits_for.add_done_callback(lambda _: then())
    else:
        asyncio.get_running_loop().call_soon(then)


async def _by_task(
    work: Coroutine[Any, Any, Any],
    outcome: Outcome,
    at: Callable[[asyncio.Task[Any], int, Any], bool],
) -> None:
    async def drive() -> Any:
        task = asyncio.current_task()
        assert task is not None

        def each_await(number: int, waits_for: Any) -> None:
            outcome.fired |= at(task, number, waits_for)

        return await Awaits(work, each_await)

    task = asyncio.ensure_future(drive())
    await asyncio.wait({task}, timeout=20)
    assert task.done(), "it does not end"
    outcome.cancelled = task.cancelled()
    if not outcome.cancelled:
        outcome.result = task.result()


async def task_at_once(work: Coroutine[Any, Any, Any], n: int, outcome: Outcome) -> None:
    def at(task: asyncio.Task[Any], number: int, _: Any) -> bool:
        return number == n and task.cancel()

    await _by_task(work, outcome, at)


async def task_as_the_answer_comes(work: Coroutine[Any, Any, Any], n: int, outcome: Outcome) -> None:
    def at(task: asyncio.Task[Any], number: int, waits_for: Any) -> bool:
        if number == n:
            _when_it_is_done(waits_for, task.cancel)
        return number == n

    await _by_task(work, outcome, at)


async def task_twice(work: Coroutine[Any, Any, Any], n: int, outcome: Outcome) -> None:
    def at(task: asyncio.Task[Any], number: int, _: Any) -> bool:
        return number in {n, n + 1} and task.cancel()

    await _by_task(work, outcome, at)


async def task_twice_as_answers_come(work: Coroutine[Any, Any, Any], n: int, outcome: Outcome) -> None:
    def at(task: asyncio.Task[Any], number: int, waits_for: Any) -> bool:
        if number in {n, n + 1}:
            _when_it_is_done(waits_for, task.cancel)
        return number == n

    await _by_task(work, outcome, at)


async def task_again_and_again(work: Coroutine[Any, Any, Any], n: int, outcome: Outcome) -> None:
    def at(task: asyncio.Task[Any], number: int, _: Any) -> bool:
        return number >= n and task.cancel()

    await _by_task(work, outcome, at)


async def scope_at_once(work: Coroutine[Any, Any, Any], n: int, outcome: Outcome) -> None:
    with anyio.CancelScope() as scope:

        def at(number: int, _: Any) -> None:
            if number == n:
                outcome.fired = True
                scope.cancel()

        outcome.result = await Awaits(work, at)
    outcome.cancelled = scope.cancelled_caught


async def scope_as_the_answer_comes(work: Coroutine[Any, Any, Any], n: int, outcome: Outcome) -> None:
    with anyio.CancelScope() as scope:

        def at(number: int, waits_for: Any) -> None:
            if number == n:
                outcome.fired = True
                _when_it_is_done(waits_for, scope.cancel)

        outcome.result = await Awaits(work, at)
    outcome.cancelled = scope.cancelled_caught


ONCE: list[Canceller] = [task_at_once, task_as_the_answer_comes, scope_at_once, scope_as_the_answer_comes]
BY_TASK: list[Canceller] = [task_at_once, task_as_the_answer_comes]
MORE: list[Canceller] = [task_twice, task_twice_as_answers_come, task_again_and_again]


# --- the database, and what was committed


@dataclass
class Commits:
    """What was sent and answered on the connections of the pool under test."""

    sent: int = 0
    done: int = 0


COMMITS = Commits()


class Recording(asyncpg.Connection):
    """Notes each COMMIT, and whether its answer came."""

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:  # noqa: ASYNC109
        if query != "COMMIT":
            return await super().execute(query, *args, timeout=timeout)
        COMMITS.sent += 1
        tag = await super().execute(query, *args, timeout=timeout)
        COMMITS.done += tag == "COMMIT"
        return tag


@pytest.fixture(scope="module")
def dsn(postgres_server: Server) -> Iterator[str]:
    dsn = postgres_server.create_database()
    run_sql(dsn, "CREATE TABLE t (n integer PRIMARY KEY CHECK (n <> 13))")
    # Without asyncpg's question for TLS: cancelled in the middle, it leaves an error that nobody retrieves.
    yield f"{dsn}{'&' if '?' in dsn else '?'}sslmode=disable"
    postgres_server.drop_database(dsn)


@dataclass
class World:
    """A pool of one connection, an engine, and somebody who watches from outside."""

    pool: asyncpg.Pool
    engine: Engine
    watcher: asyncpg.Connection
    told: list[dict[str, Any]] = field(default_factory=list)

    async def begin(self) -> None:
        await self.watcher.execute("TRUNCATE t")
        COMMITS.sent = COMMITS.done = 0

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
async def world(dsn: str) -> AsyncIterator[World]:
    watcher = await asyncpg.connect(dsn)
    settings = {"application_name": "under test"}
    pool = await asyncpg.create_pool(
        dsn, min_size=1, max_size=1, connection_class=Recording, server_settings=settings
    )
    engine = Engine(pool, commit_tokens=None)
    world = World(pool, engine, watcher)
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: world.told.append(context))
    try:
        yield world
        with anyio.fail_after(5):
            await pool.close()
        gc.collect()
        await anyio.lowlevel.checkpoint()
    finally:
        loop.set_exception_handler(before)
        pool.terminate()
        watcher.terminate()
    assert world.told == []


# --- the scenarios


async def insert(conn: Any, n: int = 1) -> int:
    await conn.execute("INSERT INTO t VALUES ($1)", n)
    return n


add = operation(insert)


def raising(code: str) -> str:
    return f"DO $$ BEGIN RAISE EXCEPTION 'of the test' USING ERRCODE = '{code}'; END $$"


async def in_a_transaction(engine: Engine) -> None:
    async with engine.transaction() as conn:
        await insert(conn, 1)
        await savepoint(add(2))(conn)


def that_needs_retries() -> Any:
    """A lock that is not free, then a deadlock, then it works."""
    codes = ["55P03", "40P01"]

    async def body(conn: Any) -> None:
        await insert(conn)
        if codes:
            await conn.execute(raising(codes.pop(0)))

    return pipe(body, timeout(5, lock=1), retry(QUICK))


async def with_operations_inside(conn: Any) -> None:
    await pipe(add(1), timeout(5), retry(QUICK))(conn)
    try:
        await savepoint(add(1))(conn)
    except asyncpg.UniqueViolationError:
        await add(2)(conn)


async def on_a_fresh_connection(engine: Engine) -> None:
    await engine._capacity._pool.expire_connections()
    await engine.run(add(1))


async def after_waiting_for_one(engine: Engine) -> None:
    """Its connection comes free 10 ms later."""
    pool = engine._capacity._pool
    held = await pool.acquire()

    async def let_go() -> None:
        await anyio.sleep(0.01)
        await pool.release(held)

    letting_go = asyncio.ensure_future(let_go())
    try:
        await engine.run(add(1))
    finally:
        LETTING_GO.add(letting_go)
        letting_go.add_done_callback(LETTING_GO.discard)


LETTING_GO: set[asyncio.Task[None]] = set()


TOKENS = CommitTokens()

Scenario = Callable[[Engine], Coroutine[Any, Any, Any]]

RUNS: dict[str, tuple[Scenario, list[int]]] = {
    "run": (lambda engine: engine.run(add(1)), [1]),
    "run with everything": (
        lambda engine: engine.run(
            pipe(add(1), timeout(5, lock=1), retry(QUICK)), retry=QUICK, isolation="serializable", deadline=10
        ),
        [1],
    ),
    "run that needs retries": (lambda engine: engine.run(that_needs_retries(), retry=QUICK), [1]),
    "run that resolves": (lambda engine: engine.run(add(1), resolve_commit=True), [1]),
    "run of nested operations": (lambda engine: engine.run(with_operations_inside), [1, 2]),
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
    return lambda engine: engine.run(write(items))


BATCHES: dict[str, tuple[Scenario, list[int]]] = {
    "each": (writing(each(lambda n: pipe(add(n), timeout(5))), ITEMS), GOOD),
    "execute_many": (writing(execute_many("INSERT INTO t VALUES ($1)"), ROWS), GOOD),
    "copy_into": (writing(copy_into("t", columns=("n",)), ROWS), GOOD),
    "copy_text": (writing(copy_text("t", columns=("n",)), LINES), GOOD),
    "dense execute_many": (writing(execute_many("INSERT INTO t VALUES ($1)"), DENSE), DENSE_GOOD),
    "dense copy_into": (writing(copy_into("t", columns=("n",)), DENSE), DENSE_GOOD),
}
SCENARIOS = RUNS | BATCHES


async def cancel_everywhere(world: World, name: str, how: Canceller) -> int:
    """How many awaits there were."""
    scenario, expected = SCENARIOS[name]
    cleans_up = name in {"run that needs retries", "run of nested operations"}
    await world.begin()
    await scenario(world.engine)
    assert await world.rows() == expected
    for n in range(MOST_AWAITS):
        await world.begin()
        tasks = asyncio.all_tasks()
        outcome = Outcome()
        await how(scenario(world.engine), n, outcome)
        if how not in [*BY_TASK, *MORE] and not LETTING_GO:
            assert world.pool.get_size() == world.pool.get_idle_size(), f"await {n}: it is not given back"
        await world.check(tasks)
        rows = await world.rows()
        if not outcome.fired:
            assert rows == expected
            return n
        assert outcome.cancelled or rows == expected, f"await {n}"
        assert rows in ([], expected), f"await {n}"
        if how in ONCE:
            assert COMMITS.sent == COMMITS.done, f"await {n}: it did not wait for COMMIT's answer"
            # asyncio's task.cancel() reaches into a ROLLBACK under way, and then the connection is not kept.
            allowed = 4 if how in BY_TASK and cleans_up else 0
            assert world.engine.stats().evicted <= allowed, f"await {n}: a connection that was well is lost"
            # Of check's own run there is one more, and it writes nothing.
            assert bool(rows) == (COMMITS.done > 1), f"await {n}"
        assert world.told == [], f"await {n}"
    raise AssertionError(f"more than {MOST_AWAITS} awaits")


@pytest.mark.parametrize("how", ONCE, ids=lambda how: how.__name__)
@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_cancellation_at_any_await_leaves_everything_clean(
    name: str, how: Canceller, world: World
) -> None:
    assert await cancel_everywhere(world, name, how) >= 3


@pytest.mark.parametrize("how", MORE, ids=lambda how: how.__name__)
@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_second_cancellation_at_any_await_leaves_everything_clean(
    name: str, how: Canceller, world: World
) -> None:
    assert await cancel_everywhere(world, name, how) >= 3


@pytest.mark.parametrize("how", [*ONCE, *MORE], ids=lambda how: how.__name__)
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


@pytest.mark.parametrize("how", [*ONCE, *MORE], ids=lambda how: how.__name__)
async def test_a_cancelled_shortcut_leaves_a_clean_connection(how: Canceller, world: World) -> None:
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


@pytest.mark.parametrize("how", [*ONCE, *MORE], ids=lambda how: how.__name__)
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


# --- a COMMIT on its way


def answer_to_commit(message: Message) -> bool:
    return message.sender == "server" and message.type == "C" and message.body.startswith(b"COMMIT")


@pytest.fixture
async def proxy(postgres_server: Server) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(postgres_server.host, postgres_server.port) as proxy:
        yield proxy


@pytest.fixture
async def behind(proxy: FaultProxy, dsn: str) -> AsyncIterator[Engine]:
    """An engine behind the proxy, with one connection and an empty table."""
    run_sql(dsn, "TRUNCATE t")
    pool = await asyncpg.create_pool(proxy.dsn(dsn), min_size=1, max_size=1)
    try:
        yield Engine(pool)
    finally:
        pool.terminate()


def rows(dsn: str) -> int:
    found: int = run_sql(dsn, "SELECT count(*) FROM t")
    return found


@pytest.mark.parametrize("how", ["task", "scope"])
async def test_a_cancelled_caller_waits_for_the_answer_to_its_commit(
    how: str, behind: Engine, proxy: FaultProxy, dsn: str
) -> None:
    late = proxy.inject(Fault("delay", when=answer_to_commit, seconds=0.3))
    loop = asyncio.get_running_loop()
    if how == "task":
        task = asyncio.ensure_future(behind.run(add(1)))
        await late.wait()
        cancelled_at = loop.time()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        async with anyio.create_task_group() as group:
            group.start_soon(behind.run, add(1))
            await late.wait()
            cancelled_at = loop.time()
            group.cancel_scope.cancel()
    assert loop.time() - cancelled_at >= 0.2
    assert rows(dsn) == 1
    stats = behind.stats()
    assert (stats.in_use, stats.evicted, stats.commits_in_doubt) == (0, 0, 0)


@pytest.mark.parametrize("how", ["task", "scope"])
async def test_with_a_commit_that_hangs_it_gives_up_and_throws_the_connection_away(
    how: str, behind: Engine, proxy: FaultProxy
) -> None:
    with_bounds(behind, commit=0.2)
    hung = proxy.inject(Fault("hang", when=query("COMMIT")))
    with anyio.fail_after(5):
        if how == "task":
            task = asyncio.ensure_future(behind.run(add(1)))
            await hung.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            async with anyio.create_task_group() as group:
                group.start_soon(behind.run, add(1))
                await hung.wait()
                group.cancel_scope.cancel()
    stats = behind.stats()
    assert (stats.in_use, stats.size, stats.evicted) == (0, 0, 1)
    proxy.heal()
    assert await behind.run(lambda conn: conn.fetchval("SELECT 7")) == 7


async def test_the_bound_for_a_commit_that_hangs_is_seconds() -> None:
    assert 0 < Bounds().commit <= 10


async def test_a_cancelled_caller_of_a_dead_server_gives_up_in_bounded_time(
    behind: Engine, proxy: FaultProxy
) -> None:
    hung = proxy.inject(Fault("hang", when=query("INSERT")))
    with anyio.fail_after(5):
        task = asyncio.ensure_future(behind.run(add(1)))
        await hung.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert (behind.stats().in_use, behind.stats().size) == (0, 0)
