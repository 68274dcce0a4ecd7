"""An exception group is judged by what is in it: a task group in a body changes no repair and no timeout."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import (
    Engine,
    OperationTimeout,
    Repair,
    RetriesExhausted,
    batch,
    classify,
    each,
    events,
    operation,
    pipe,
    retry,
    timeout,
)
from tests.support.bodies import insert, rows, sleep
from tests.support.failures import raising
from tests.support.observing import Seen
from tests.support.policies import QUICK
from tests.support.sessions import backend

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

Body = Callable[[Any], Awaitable[Any]]


# --- two kinds of task groups


async def _call(body: Body, conn: Any) -> None:
    await body(conn)


async def by_anyio(body: Body, conn: Any) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(_call, body, conn)


async def by_asyncio(body: Body, conn: Any) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(_call(body, conn))


async def nested(body: Body, conn: Any) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(by_asyncio, body, conn)


Group = Callable[[Body, Any], Awaitable[None]]
GROUPS = pytest.mark.parametrize("group", [by_anyio, by_asyncio, nested], ids=lambda group: group.__name__)


class Starts:
    """A body that does its work in a task group, and counts its starts."""

    def __init__(self, group: Group, *bodies: Body) -> None:
        self.group, self.bodies = group, list(bodies)
        self.count = 0

    async def __call__(self, conn: Any) -> None:
        body = self.bodies[min(self.count, len(self.bodies) - 1)]
        self.count += 1
        await self.group(body, conn)


LEVELS = [("40001", "transaction"), ("40P01", "transaction"), ("55P03", "savepoint")]


@GROUPS
@pytest.mark.parametrize(("code", "level"), LEVELS)
async def test_a_transient_failure_in_a_task_group_is_repaired_where_it_would_be_without(
    code: str, level: str, group: Group, single: asyncpg.Pool
) -> None:
    seen = Seen()
    engine = Engine(single, observer=seen)
    body = Starts(group, raising(code), insert)
    await engine.run(pipe(body, retry(QUICK)))
    assert body.count == 2
    (retried,) = seen.of(events.Retried)
    assert (retried.level, retried.sqlstate) == (level, code)
    assert await rows(single) == [1]
    assert engine.stats().evicted == 0


@GROUPS
async def test_a_retry_of_the_run_judges_a_group_too(group: Group, single: asyncpg.Pool) -> None:
    body = Starts(group, raising("40001"), insert)
    await Engine(single).run(body, retry=QUICK)
    assert body.count == 2
    assert await rows(single) == [1]


@GROUPS
async def test_a_retry_that_gives_up_on_a_group_has_it_as_its_cause(
    group: Group, single: asyncpg.Pool
) -> None:
    body = Starts(group, raising("40001"))
    with pytest.raises(RetriesExhausted) as caught:
        await Engine(single).run(body, retry=QUICK)
    assert (caught.value.attempts, body.count) == (3, 3)
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    assert caught.value.__cause__.subgroup(asyncpg.SerializationError) is not None


@GROUPS
async def test_a_permanent_failure_in_a_task_group_is_raised_as_the_group_it_came_in(
    group: Group, single: asyncpg.Pool
) -> None:
    body = Starts(group, raising("23505"))
    with pytest.raises(ExceptionGroup) as caught:
        await Engine(single).run(pipe(body, retry(QUICK)), retry=QUICK)
    assert body.count == 1
    assert caught.group_contains(asyncpg.UniqueViolationError, depth=2 if group is nested else 1)


@GROUPS
async def test_a_lost_connection_in_a_task_group_is_replaced(
    group: Group, single: asyncpg.Pool, other: asyncpg.Connection
) -> None:
    async def loses_it(conn: Any) -> None:
        await other.fetchval("SELECT pg_terminate_backend($1, 5000)", await backend(conn))
        await conn.execute("SELECT 1")

    engine = Engine(single)
    body = Starts(group, loses_it, insert)
    await engine.run(body, retry=QUICK)
    assert body.count == 2
    assert engine.stats().evicted == 1
    assert await rows(single) == [1]


# --- several failures at once


class Both:
    """Two failures in one group: of the connection, and of one beside it."""

    def __init__(self, pool: asyncpg.Pool, first: str, second: str) -> None:
        self.pool, self.codes = pool, (first, second)
        self.count = 0

    async def __call__(self, conn: Any) -> None:
        self.count += 1
        if self.count > 1:
            await insert(conn)
            return
        errors = []
        for code in self.codes:
            try:
                await self.pool.fetch(f"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{code}'; END $$")
            except asyncpg.PostgresError as exc:
                errors.append(exc)
        raise ExceptionGroup("of the test", errors)


@pytest.mark.parametrize("order", [("40001", "55P03"), ("55P03", "40001")])
async def test_of_several_transient_failures_the_strictest_repair_is_taken(
    order: tuple[str, str], pool: asyncpg.Pool
) -> None:
    seen = Seen()
    body = Both(pool, *order)
    await Engine(pool, observer=seen).run(pipe(body, retry(QUICK)))
    assert [event.level for event in seen.of(events.Retried)] == ["transaction"]
    assert body.count == 2
    assert await rows(pool) == [1]


@pytest.mark.parametrize("order", [("40001", "23505"), ("23505", "40001")])
async def test_a_group_with_one_permanent_failure_is_not_tried_again(
    order: tuple[str, str], pool: asyncpg.Pool
) -> None:
    body = Both(pool, *order)
    with pytest.raises(ExceptionGroup) as caught:
        await Engine(pool).run(pipe(body, retry(QUICK)), retry=QUICK)
    assert len(caught.value.exceptions) == 2
    assert body.count == 1
    assert await rows(pool) == []


async def made(pool: asyncpg.Pool, code: str) -> asyncpg.PostgresError:
    """An error as the server sends it."""
    with pytest.raises(asyncpg.PostgresError) as caught:
        await pool.execute(f"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{code}'; END $$")
    return caught.value


@pytest.mark.parametrize(
    ("codes", "repair"),
    [
        (["55P03"], Repair.SAVEPOINT),
        (["40001"], Repair.TRANSACTION),
        (["55P03", "40001"], Repair.TRANSACTION),
        (["40001", "26000"], Repair.CONNECTION),
        (["55P03", "40003"], Repair.UNKNOWN),
        (["55P03", "23505"], Repair.NEVER),
        (["23505", "42601"], Repair.NEVER),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else value.name,
)
async def test_classify_judges_a_group_by_its_leaves(
    codes: list[str], repair: Repair, single: asyncpg.Pool
) -> None:
    errors = [await made(single, code) for code in codes]
    for leaves in (errors, errors[::-1]):
        flat = ExceptionGroup("flat", leaves)
        deep = ExceptionGroup("deep", [ExceptionGroup("inner", leaves[:1]), *leaves[1:]])
        assert [classify(group).repair for group in (flat, deep)] == [repair, repair]
    assert classify(ExceptionGroup("evicts", [*errors, await made(single, "XX000")])).evict


async def test_a_group_of_one_has_its_only_leafs_code(single: asyncpg.Pool) -> None:
    verdict = classify(ExceptionGroup("one", [await made(single, "40001")]))
    assert (verdict.sqlstate, verdict.condition, verdict.transient) == (
        "40001", "serialization_failure", True,
    )  # fmt: skip


# --- timeouts and deadlines around a task group


@GROUPS
async def test_a_timeout_around_a_task_group_is_operation_timeout(group: Group, single: asyncpg.Pool) -> None:
    engine = Engine(single)
    pid = await engine.run(backend)
    with pytest.raises(OperationTimeout) as caught:
        await engine.run(pipe(Starts(group, sleep), timeout(0.3)))
    assert (caught.value.seconds, caught.value.by_server) == (0.3, True)
    assert await engine.run(backend) == pid


@GROUPS
async def test_a_deadline_around_a_task_group_is_operation_timeout(
    group: Group, single: asyncpg.Pool
) -> None:
    engine = Engine(single)
    pid = await engine.run(backend)
    with pytest.raises(OperationTimeout) as caught:
        await engine.run(Starts(group, sleep), deadline=0.3)
    assert (caught.value.seconds, caught.value.by_server) == (0.3, True)
    assert await engine.run(backend) == pid


@GROUPS
async def test_a_deadline_of_a_transaction_around_a_task_group_is_operation_timeout(
    group: Group, single: asyncpg.Pool
) -> None:
    engine = Engine(single)
    pid = await engine.run(backend)
    with pytest.raises(OperationTimeout) as caught:
        async with engine.transaction(deadline=0.3) as conn:
            await group(sleep, conn)
    assert (caught.value.seconds, caught.value.by_server) == (0.3, True)
    assert await engine.run(backend) == pid


@GROUPS
async def test_a_timeout_a_try_around_a_task_group_is_tried_again(group: Group, single: asyncpg.Pool) -> None:
    body = Starts(group, sleep, insert)
    await Engine(single).run(pipe(body, timeout(0.3), retry(QUICK)))
    assert body.count == 2
    assert await rows(single) == [1]


@GROUPS
async def test_a_timeout_within_a_task_group_is_tried_again(group: Group, single: asyncpg.Pool) -> None:
    body = Starts(group, pipe(sleep, timeout(0.3)), insert)
    await Engine(single).run(pipe(body, retry(QUICK)))
    assert body.count == 2
    assert await rows(single) == [1]


@GROUPS
async def test_a_timeout_that_the_client_kept_around_a_task_group_is_operation_timeout(
    group: Group, single: asyncpg.Pool
) -> None:
    async def waits_elsewhere(conn: Any) -> None:
        await conn.fetchval("SELECT 1")
        await anyio.sleep(60)

    with pytest.raises(OperationTimeout) as caught:
        await Engine(single).run(pipe(Starts(group, waits_elsewhere), timeout(0.2)))
    assert (caught.value.seconds, caught.value.by_server) == (0.2, False)


@GROUPS
async def test_what_somebody_else_cancels_in_a_task_group_is_no_timeout_of_ours(
    group: Group, single: asyncpg.Pool
) -> None:
    async def asks_for_it(conn: Any) -> None:
        await conn.execute("SELECT pg_cancel_backend(pg_backend_pid())")
        await sleep(conn)

    with pytest.raises(ExceptionGroup) as caught:
        await Engine(single).run(pipe(Starts(group, asks_for_it), timeout(20), retry(QUICK)), deadline=30)
    assert caught.group_contains(asyncpg.QueryCanceledError, depth=2 if group is nested else 1)


async def test_a_group_of_the_servers_timeout_and_an_error_of_the_bodys_own_is_raised_as_it_is(
    single: asyncpg.Pool,
) -> None:
    async def fails_too(conn: Any) -> None:
        try:
            await sleep(conn)
        except asyncpg.QueryCanceledError as ended:
            raise ExceptionGroup("both", [ended, LookupError("of the body")]) from None

    with pytest.raises(ExceptionGroup) as caught:
        await Engine(single).run(pipe(fails_too, timeout(0.5)))
    assert [type(error) for error in caught.value.exceptions] == [asyncpg.QueryCanceledError, LookupError]


# --- in a batch


@GROUPS
async def test_an_item_that_fails_in_a_task_group_costs_itself(group: Group, single: asyncpg.Pool) -> None:
    @operation
    async def item(conn: Any, n: int) -> None:
        await group(lambda conn: insert(conn, n), conn)

    result = await Engine(single).run(batch(each(item))([1, 2, 1, 3]))
    (failed,) = result.failed
    assert failed.index == 2
    assert isinstance(failed.error, ExceptionGroup)
    assert failed.verdict.sqlstate == "23505"
    assert await rows(single) == [1, 2, 3]


@GROUPS
async def test_an_item_that_needs_a_new_transaction_in_a_task_group_begins_the_batch_again(
    group: Group, single: asyncpg.Pool
) -> None:
    starts: list[int] = []

    @operation
    async def item(conn: Any, n: int) -> None:
        starts.append(n)
        if starts == [1, 2]:
            await group(raising("40001"), conn)
        await insert(conn, n)

    result = await Engine(single).run(batch(each(item), retry=QUICK)([1, 2, 3]))
    assert result.failed == ()
    assert starts == [1, 2, 1, 2, 3]
    assert await rows(single) == [1, 2, 3]
