"""What the server is told of a timeout: never more than is left or it had; nobody's own is undone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import (
    Engine,
    Operation,
    OperationTimeout,
    RetriesExhausted,
    RetryPolicy,
    batch,
    each,
    events,
    operation,
    pipe,
    retry,
    savepoint,
    timeout,
)
from dbop_raw.testing.server import run_sql
from tests.support.bodies import insert, rows, sleep
from tests.support.failures import raising
from tests.support.observing import Seen
from tests.support.policies import QUICK
from tests.support.sessions import backend

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

Body = Callable[[Any], Awaitable[Any]]


async def told(conn: Any) -> dict[str, int]:
    """What the server goes by now, in milliseconds; 0 is no limit."""
    found = await conn.fetch(
        "SELECT name, setting::integer FROM pg_settings WHERE name IN ('statement_timeout', 'lock_timeout')"
    )
    return {row["name"]: row["setting"] for row in found}


async def statement_timeout(conn: Any) -> int:
    return (await told(conn))["statement_timeout"]


@contextlib.asynccontextmanager
async def pool_of(dsn: str, **settings: str) -> AsyncIterator[asyncpg.Pool]:
    """A pool of one connection whose sessions begin with these settings."""
    pool = await asyncpg.create_pool(dsn, min_size=0, max_size=1, server_settings=settings)
    try:
        yield pool
        with anyio.fail_after(5):
            await pool.close()
    finally:
        pool.terminate()


# --- a limit that the session or the role has already is never raised


async def run_under_timeout(engine: Engine, body: Body) -> Any:
    return await engine.run(pipe(body, timeout(5)))


async def run_under_deadline(engine: Engine, body: Body) -> Any:
    return await engine.run(body, deadline=5)


async def run_under_both(engine: Engine, body: Body) -> Any:
    return await engine.run(pipe(body, timeout(5), retry(QUICK)), deadline=20)


async def in_a_transaction_with_a_deadline(engine: Engine, body: Body) -> Any:
    async with engine.transaction(deadline=5) as conn:
        return await body(conn)


async def in_an_operation_of_a_transaction(engine: Engine, body: Body) -> Any:
    async with engine.transaction() as conn:
        return await pipe(body, savepoint, timeout(5))(conn)


WAYS = [
    run_under_timeout,
    run_under_deadline,
    run_under_both,
    in_a_transaction_with_a_deadline,
    in_an_operation_of_a_transaction,
]
EACH_WAY = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
Way = Callable[[Engine, Body], Awaitable[Any]]


@EACH_WAY
async def test_the_sessions_own_statement_timeout_is_not_raised(way: Way, dsn: str) -> None:
    async with pool_of(dsn, statement_timeout="200") as pool:
        engine = Engine(pool)
        assert await way(engine, statement_timeout) == 200
        assert await engine.run(statement_timeout) == 200


@pytest.fixture
def role(dsn: str) -> Iterator[str]:
    """A role whose administrator allows it 200 ms a statement."""
    run_sql(dsn, "CREATE ROLE in_a_hurry LOGIN")
    run_sql(dsn, "ALTER ROLE in_a_hurry SET statement_timeout = '200ms'")
    yield "in_a_hurry"
    run_sql(dsn, "DROP ROLE in_a_hurry")


@EACH_WAY
async def test_the_roles_own_statement_timeout_is_not_raised(way: Way, role: str, dsn: str) -> None:
    async with asyncpg.create_pool(dsn, user=role, min_size=0, max_size=1) as pool:
        assert await way(Engine(pool), statement_timeout) == 200


@EACH_WAY
async def test_a_statement_that_outlives_the_sessions_limit_is_the_servers_own_error(
    way: Way, dsn: str
) -> None:
    """It is no timeout of ours that ran out: there were seconds left."""
    async with pool_of(dsn, statement_timeout="200") as pool:
        engine = Engine(pool)
        pid = await engine.run(backend)
        with pytest.raises(asyncpg.QueryCanceledError):
            await way(engine, sleep)
        assert await engine.run(backend) == pid
        assert engine.stats().retries == 0


async def test_the_sessions_own_lock_timeout_is_not_raised(dsn: str) -> None:
    async with pool_of(dsn, lock_timeout="150") as pool:
        engine = Engine(pool)
        assert (await engine.run(pipe(told, timeout(5, lock=3))))["lock_timeout"] == 150
        assert (await engine.run(pipe(told, timeout(5, lock=0.05))))["lock_timeout"] == 50
        assert (await engine.run(told))["lock_timeout"] == 150


async def test_a_wider_limit_of_the_session_is_lowered_and_put_back(dsn: str) -> None:
    async with pool_of(dsn, statement_timeout="30000", lock_timeout="20000") as pool:

        async def body(conn: Any) -> list[dict[str, int]]:
            return [await told(conn), await pipe(told, timeout(2, lock=1))(conn), await told(conn)]

        before, within, after = await Engine(pool).run(body)
        assert before == after == {"statement_timeout": 30000, "lock_timeout": 20000}
        assert 0 < within["statement_timeout"] < 2000
        assert within["lock_timeout"] == 1000


async def test_the_users_own_tighter_limit_in_the_transaction_is_not_raised(single: asyncpg.Pool) -> None:
    async def body(conn: Any) -> list[int]:
        await conn.execute("SET LOCAL statement_timeout = '150ms'")
        return [await pipe(statement_timeout, timeout(5))(conn), await statement_timeout(conn)]

    assert await Engine(single).run(body) == [150, 150]


# --- what the user sets himself, stays


@pytest.mark.parametrize("name", ["statement_timeout", "lock_timeout"])
async def test_the_users_own_setting_between_two_operations_survives_the_second(
    name: str, single: asyncpg.Pool
) -> None:
    async def body(conn: Any) -> list[int]:
        op = pipe(told, timeout(2, lock=1))
        found = []
        for limit in (30000, 40000, 0, 50000):
            await op(conn)
            await conn.execute(f"SET LOCAL {name} = {limit}")
            await op(conn)
            found.append((await told(conn))[name])
        return found

    assert await Engine(single).run(body) == [30000, 40000, 0, 50000]


async def test_the_users_own_setting_under_a_deadline_survives_the_next_operation(
    single: asyncpg.Pool,
) -> None:
    async def body(conn: Any) -> list[int]:
        await conn.execute("SET LOCAL statement_timeout = 900")
        await pipe(statement_timeout, timeout(2))(conn)
        return [await statement_timeout(conn), await pipe(statement_timeout, timeout(5))(conn)]

    assert await Engine(single).run(body, deadline=20) == [900, 900]


async def test_the_users_own_setting_survives_an_operation_that_is_undone(single: asyncpg.Pool) -> None:
    """ROLLBACK TO undoes a SET LOCAL that came after the savepoint; the user's came before."""

    async def body(conn: Any) -> list[int]:
        await pipe(insert, timeout(2))(conn)
        await conn.execute("SET LOCAL statement_timeout = 30000")
        with pytest.raises(asyncpg.UniqueViolationError):
            await pipe(insert, timeout(2), savepoint)(conn)
        after_a_failure = await statement_timeout(conn)
        await pipe(lambda conn: insert(conn, 2), savepoint, timeout(2))(conn)
        return [after_a_failure, await statement_timeout(conn)]

    assert await Engine(single).run(body) == [30000, 30000]


def bounded_insert(n: int) -> Operation[int]:
    return pipe(operation(insert)(n), timeout(2))


async def test_the_users_own_setting_survives_a_batch(single: asyncpg.Pool) -> None:
    async def body(conn: Any) -> list[int]:
        await pipe(statement_timeout, timeout(2))(conn)
        await conn.execute("SET LOCAL statement_timeout = 30000")
        result = await batch(each(bounded_insert))([1, 2, 1, 3])(conn)
        assert len(result.failed) == 1
        return [await statement_timeout(conn)]

    assert await Engine(single).run(body) == [30000]


async def test_the_users_own_setting_in_a_transaction_block_survives(single: asyncpg.Pool) -> None:
    async with Engine(single).transaction() as conn:
        await pipe(statement_timeout, timeout(2))(conn)
        await conn.execute("SET LOCAL statement_timeout = 30000")
        await pipe(statement_timeout, timeout(2))(conn)
        assert await statement_timeout(conn) == 30000


# --- each try is told what is left when it begins


PAUSE = 0.4
# Between telling the server and asking it lie a round trip and a busy machine, but no such pause.
SLACK = PAUSE / 2


class Tries:
    """A body that takes a while and fails at first; keeps what each try was told, and what was left then."""

    def __init__(self, seconds: float, code: str) -> None:
        self.until, self.code = asyncio.get_running_loop().time() + seconds, code
        self.told: list[float] = []
        self.left: list[float] = []

    async def __call__(self, conn: Any) -> None:
        self.told.append(await statement_timeout(conn) / 1000)
        self.left.append(self.until - asyncio.get_running_loop().time())
        if len(self.told) < 3:
            await asyncio.sleep(PAUSE)
            await raising(self.code)(conn)

    def check(self) -> None:
        assert len(self.told) == 3
        for told_, left in zip(self.told, self.left, strict=True):
            assert 0 < told_ < left + SLACK


LEVELS = pytest.mark.parametrize(
    "code", ["55P03", "40001"], ids=["from the savepoint", "in a new transaction"]
)


@LEVELS
async def test_a_later_try_within_a_timeout_is_told_what_is_left(code: str, single: asyncpg.Pool) -> None:
    tries = Tries(2.0, code)
    await Engine(single).run(pipe(tries, retry(QUICK), timeout(2)))
    tries.check()


@LEVELS
async def test_a_later_try_within_a_deadline_is_told_what_is_left(code: str, single: asyncpg.Pool) -> None:
    tries = Tries(2.0, code)
    await Engine(single).run(pipe(tries, retry(QUICK)), deadline=2)
    tries.check()


@LEVELS
async def test_a_later_try_within_a_callers_own_scope_is_told_what_is_left(
    code: str, single: asyncpg.Pool
) -> None:
    tries = Tries(2.0, code)
    with anyio.fail_after(2):
        await Engine(single).run(pipe(tries, timeout(20), retry(QUICK)))
    tries.check()


async def test_a_later_try_in_the_users_own_transaction_is_told_what_is_left(single: asyncpg.Pool) -> None:
    async with single.acquire() as conn, conn.transaction():
        tries = Tries(2.0, "55P03")
        await pipe(tries, retry(QUICK), timeout(2))(conn)
        tries.check()


async def test_an_operation_late_in_a_body_is_told_what_is_left(single: asyncpg.Pool) -> None:
    found: list[int] = []

    async def body(conn: Any) -> None:
        await asyncio.sleep(0.5)
        found.append(await pipe(statement_timeout, savepoint)(conn))
        found.append(await pipe(statement_timeout, timeout(20))(conn))

    await Engine(single).run(pipe(body, timeout(1)))
    assert all(0 < limit < 500 for limit in found)


async def test_a_later_item_of_a_batch_is_told_what_is_left(single: asyncpg.Pool) -> None:
    """The first is bad, and is undone in a message of ours: the second's limit goes with it."""
    until = asyncio.get_running_loop().time() + 2
    found: list[tuple[float, float]] = []

    @operation
    async def item(conn: Any, n: int) -> None:
        found.append((await statement_timeout(conn) / 1000, until - asyncio.get_running_loop().time()))
        await asyncio.sleep(PAUSE)
        await insert(conn, n)

    await single.execute("INSERT INTO t VALUES (1)")
    await Engine(single).run(pipe(batch(each(item))([1, 2]), timeout(2)))
    assert len(found) >= 2
    assert all(0 < told_ < left + SLACK for told_, left in found)


@LEVELS
@pytest.mark.parametrize("limit", ["timeout", "deadline"])
async def test_a_later_try_that_takes_too_long_is_ended_by_the_server(
    limit: str, code: str, single: asyncpg.Pool
) -> None:
    """And so it costs no connection: the client never had to."""
    starts: list[int] = []

    async def slow_at_last(conn: Any) -> None:
        starts.append(await backend(conn))
        if len(starts) == 1:
            await asyncio.sleep(0.5)
            await raising(code)(conn)
        await sleep(conn)

    seen = Seen()
    engine = Engine(single, observer=seen)
    op = (
        pipe(slow_at_last, retry(QUICK), timeout(1))
        if limit == "timeout"
        else pipe(slow_at_last, retry(QUICK))
    )
    with pytest.raises(OperationTimeout) as caught:
        await engine.run(op, deadline=1 if limit == "deadline" else None)
    assert type(caught.value) is OperationTimeout
    assert (caught.value.seconds, caught.value.by_server) == (1, True)
    assert len(starts) == 2
    assert (engine.stats().evicted, engine.stats().retries) == (0, 1)
    assert seen.of(events.Evicted) == []
    assert await engine.run(backend) == starts[0]


# --- what is raised then


async def in_the_server(conn: Any) -> None:
    await sleep(conn)


async def in_the_client(conn: Any) -> None:
    await conn.fetchval("SELECT 1")
    await asyncio.sleep(60)


@LEVELS
@pytest.mark.parametrize("slow", [in_the_server, in_the_client], ids=lambda slow: slow.__name__)
@pytest.mark.parametrize(("total", "deadline"), [(0.5, None), (None, 0.5), (0.5, 20), (20, 0.5)], ids=str)
async def test_of_a_later_try_the_limit_that_ran_out_is_raised(
    total: float | None, deadline: float | None, slow: Body, code: str, single: asyncpg.Pool
) -> None:
    """By its seconds, and by who ended it: just as at the first."""
    starts: list[int] = []

    async def slow_at_last(conn: Any) -> None:
        starts.append(1)
        if len(starts) == 1:
            await raising(code)(conn)
        await slow(conn)

    op: Operation[None] = pipe(slow_at_last, retry(QUICK))
    engine = Engine(single)
    with pytest.raises(OperationTimeout) as caught:
        await engine.run(op if total is None else pipe(op, timeout(total)), deadline=deadline)
    assert type(caught.value) is OperationTimeout
    assert (caught.value.seconds, caught.value.by_server) == (0.5, slow is in_the_server)
    assert (len(starts), engine.stats().retries) == (2, 1)
    assert slow is in_the_client or engine.stats().evicted == 0


@pytest.mark.parametrize("slow", [in_the_server, in_the_client], ids=lambda slow: slow.__name__)
async def test_a_timeout_a_try_that_ran_out_at_the_last_try_is_the_cause(
    slow: Body, single: asyncpg.Pool
) -> None:
    starts: list[int] = []

    async def body(conn: Any) -> None:
        starts.append(1)
        if len(starts) == 1:
            await raising("40001")(conn)
        await slow(conn)

    twice = RetryPolicy(attempts=2, first_delay=0.001)
    with pytest.raises(RetriesExhausted) as caught:
        await Engine(single).run(pipe(body, timeout(0.3), retry(twice)))
    cause = caught.value.__cause__
    assert type(cause) is OperationTimeout
    assert (cause.seconds, cause.by_server) == (0.3, slow is in_the_server)
    assert len(starts) == 2


@LEVELS
async def test_a_deadline_over_a_later_try_names_what_the_try_ran_into(
    code: str, single: asyncpg.Pool
) -> None:
    starts: list[int] = []

    async def slow_at_last(conn: Any) -> None:
        starts.append(1)
        if len(starts) == 1:
            await raising(code)(conn)
        await asyncio.sleep(60)

    engine = Engine(single)
    with pytest.raises(OperationTimeout) as caught:
        await engine.run(pipe(slow_at_last, retry(QUICK)), deadline=0.4)
    assert (caught.value.seconds, caught.value.by_server, len(starts)) == (0.4, False, 2)
    if code == "40001":
        # A savepoint's failure was repaired, and is over; a run's has cost its first transaction.
        assert isinstance(caught.value.__cause__, asyncpg.SerializationError)


async def test_a_deadline_while_a_later_try_waits_for_a_connection_keeps_the_failure_before_it(
    single: asyncpg.Pool,
) -> None:
    """The cause is why there was a second try at all."""
    held: list[Any] = []
    seen = Seen()

    def takes_the_connection(event: Any) -> None:
        seen(event)
        if isinstance(event, events.RolledBack):
            held.append(asyncio.ensure_future(single.acquire()))

    engine = Engine(single, acquire_timeout=30, observer=takes_the_connection)
    policy = RetryPolicy(attempts=3, first_delay=0.02, max_delay=0.02)
    try:
        with pytest.raises((OperationTimeout, RetriesExhausted)) as caught:
            await engine.run(raising("40001"), retry=policy, deadline=0.4)
        assert type(caught.value) is OperationTimeout
        assert (caught.value.seconds, caught.value.by_server) == (0.4, False)
        assert isinstance(caught.value.__cause__, asyncpg.SerializationError)
    finally:
        for taking in held:
            await single.release(await taking)
    assert len(seen.of(events.RolledBack)) == 1
    assert await rows(single) == []
