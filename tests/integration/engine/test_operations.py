"""What may be run: every kind of callable, each inside the transaction, and one within another."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest

from dbop_raw import (
    Engine,
    operation,
    pipe,
    retry,
    savepoint,
    timeout,
)
from tests.support.bodies import Body, add, insert, rows
from tests.support.policies import QUICK

pytestmark = pytest.mark.anyio


async def probe(conn: Any) -> asyncpg.Record:
    """Write, then tell what the statement ran in."""
    await insert(conn)
    record: asyncpg.Record = await conn.fetchrow(
        "SELECT current_setting('statement_timeout') AS limit, "
        "pg_current_xact_id_if_assigned() IS NOT NULL AS in_the_writing_transaction"
    )
    return record


class Bound:
    def __init__(self, body: Body) -> None:
        self.body = body

    async def method(self, conn: Any) -> Any:
        return await self.body(conn)


class CallableObject:
    def __init__(self, body: Body) -> None:
        self.body = body

    async def __call__(self, conn: Any) -> Any:
        return await self.body(conn)


async def _with_prefix(body: Body, conn: Any) -> Any:
    return await body(conn)


def _async_def(body: Body) -> Body:
    async def plain(conn: Any) -> Any:
        return await body(conn)

    return plain


KINDS: dict[str, Callable[[Body], Any]] = {
    "async def": _async_def,
    "lambda that returns an awaitable": lambda body: lambda conn: body(conn),  # noqa: PLW0108
    "functools.partial": lambda body: functools.partial(_with_prefix, body),
    "bound method": lambda body: Bound(body).method,
    "callable object": CallableObject,
    "@operation": lambda body: operation(_async_def(body))(),
    "lambda that calls an operation": lambda body: lambda conn: operation(_async_def(body))()(conn),  # noqa: PLW0108
}


@pytest.mark.parametrize("kind", KINDS)
async def test_every_kind_of_operation_runs_in_the_transaction_under_its_timeout(
    kind: str, pool: asyncpg.Pool
) -> None:
    found = await Engine(pool).run(pipe(KINDS[kind](probe), timeout(7)))
    assert found["in_the_writing_transaction"]
    assert 6500 < int(found["limit"].removesuffix("ms")) <= 6750
    assert await rows(pool) == [1]


@pytest.mark.parametrize("kind", KINDS)
async def test_every_kind_of_operation_is_rolled_back_when_it_fails(kind: str, pool: asyncpg.Pool) -> None:
    async def fails(conn: Any) -> None:
        await insert(conn)
        raise LookupError("of the body")

    with pytest.raises(LookupError, match="of the body"):
        await Engine(pool).run(pipe(KINDS[kind](fails), timeout(7)))
    assert await rows(pool) == []


async def test_a_coroutine_that_exists_already_is_refused(pool: asyncpg.Pool) -> None:
    with pytest.raises(TypeError, match=r"run only once.*lambda conn"):
        await Engine(pool).run(insert(None))  # type: ignore[arg-type]


async def test_a_sync_function_is_refused_and_rolls_back(pool: asyncpg.Pool) -> None:
    def not_async(conn: Any) -> int:
        assert conn is not None
        return 7

    engine = Engine(pool)
    with pytest.raises(TypeError, match=r"not_async returned int, which can't be awaited.*async def"):
        await engine.run(not_async)  # type: ignore[arg-type]
    assert engine.stats().in_use == 0


@pytest.mark.parametrize("wrong", [None, "SELECT 1", 7, Bound])
async def test_an_object_that_is_no_operation_is_refused(wrong: Any, pool: asyncpg.Pool) -> None:
    with pytest.raises(TypeError, match="not an operation"):
        await Engine(pool).run(wrong)


async def test_an_operation_called_with_the_connection_joins_its_transaction(pool: asyncpg.Pool) -> None:
    async def outer(conn: Any) -> None:
        await add(1)(conn)
        await pipe(add(2), timeout(5), retry(QUICK))(conn)
        raise LookupError

    with pytest.raises(LookupError):
        await Engine(pool).run(outer)
    assert await rows(pool) == []


async def test_a_timeout_inside_a_body_ends_with_it(pool: asyncpg.Pool) -> None:
    async def limit(conn: Any) -> str:
        found: str = await conn.fetchval("SELECT current_setting('statement_timeout')")
        return found

    async def outer(conn: Any) -> tuple[str, str, str]:
        before = await limit(conn)
        inside = await pipe(limit, timeout(2))(conn)
        return before, inside, await limit(conn)

    before, inside, after = await Engine(pool).run(pipe(outer, timeout(7)))
    # What is left by then: never longer than the deadline around it.
    assert 2000 < int(after.removesuffix("ms")) <= int(before.removesuffix("ms"))
    assert int(inside.removesuffix("ms")) < 2000 < int(before.removesuffix("ms"))


async def test_a_savepoint_that_fails_leaves_the_rest_of_the_transaction(pool: asyncpg.Pool) -> None:
    async def outer(conn: Any) -> None:
        await add(1)(conn)
        with pytest.raises(asyncpg.UniqueViolationError):
            await savepoint(add(1))(conn)
        await add(2)(conn)

    await Engine(pool).run(outer)
    assert await rows(pool) == [1, 2]
