"""Mistakes that people make: each is told by name, with what to write instead, before anything is sent."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest

from dbop_raw import (
    AcquireTimeout,
    CommitTokens,
    CommitUnknown,
    Engine,
    batch,
    chain,
    each,
    execute_many,
    operation,
    pipe,
    retry,
    savepoint,
    timeout,
)
from dbop_raw.testing import Fault, Server, query
from tests.support.bodies import insert, rows
from tests.support.policies import QUICK
from tests.support.pools import behind
from tests.support.protocol import answer_to_commit
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


@operation
async def add_row(conn: Any, n: int = 1) -> int:
    return await insert(conn, n)


@operation
async def count_rows(conn: Any) -> int:
    found: int = await conn.fetchval("SELECT count(*) FROM t")
    return found


# --- an operation that was not called


FORGOTTEN: dict[str, Callable[[Any], Any]] = {
    "run(f)": lambda f: f,
    "pipe(f, timeout)": lambda f: pipe(f, timeout(5)),
    "retry(P)(f)": retry(QUICK),
    "savepoint(f)": savepoint,
    "chain(…)(f)": chain(savepoint, timeout(5)),
}


@pytest.mark.parametrize("make", FORGOTTEN.values(), ids=FORGOTTEN)
@pytest.mark.parametrize("forgotten", [add_row, count_rows], ids=["add_row", "count_rows"])
async def test_an_operation_that_was_not_called_is_told_to_call_it(
    forgotten: Any, make: Callable[[Any], Any], single: asyncpg.Pool
) -> None:
    engine = Engine(single)
    name = forgotten.__name__
    with pytest.raises(TypeError, match=rf"{name}\("):
        await engine.run(make(forgotten))
    assert engine.stats().acquires == 0


# --- an operation called with what is no connection


@pytest.mark.parametrize("wrapped", [False, True])
async def test_an_operation_called_with_an_engine_is_told_to_be_run_by_it(
    wrapped: bool, single: asyncpg.Pool
) -> None:
    op = pipe(add_row(1), savepoint, timeout(5)) if wrapped else add_row(1)
    with pytest.raises(TypeError, match=r"engine\.run\("):
        await op(Engine(single))
    assert await rows(single) == []


async def test_an_operation_called_with_a_pool_is_told_to_take_a_connection(single: asyncpg.Pool) -> None:
    with pytest.raises(TypeError, match=r"Pool.*(engine\.run\(|acquire)"):
        await add_row(1)(single)
    assert await rows(single) == []


@pytest.mark.parametrize("wrong", [None, "postgresql://localhost/x", 7])
async def test_an_operation_called_with_anything_else_is_told_what_it_takes(wrong: Any) -> None:
    with pytest.raises(TypeError, match="connection"):
        await add_row(1)(wrong)


async def test_batch_called_with_an_engine_is_told_to_be_run_by_it(single: asyncpg.Pool) -> None:
    write = batch(execute_many("INSERT INTO t VALUES ($1)"))
    with pytest.raises(TypeError, match=r"engine\.run\("):
        await write([(1,)])(Engine(single))


# --- CommitUnknown advises what the call can take


async def test_a_plain_runs_commit_unknown_advises_resolve_commit(dsn: str, postgres_server: Server) -> None:
    async with behind(postgres_server, dsn) as (proxy, pool):
        proxy.inject(Fault("reset", when=answer_to_commit))
        with pytest.raises(CommitUnknown, match="resolve_commit=True"):
            await Engine(pool).run(add_row(1))


async def test_an_autocommitted_runs_commit_unknown_does_not_advise_what_it_can_not_take(
    dsn: str, postgres_server: Server
) -> None:
    """`autocommit=True, resolve_commit=True` is a PolicyError."""
    async with behind(postgres_server, dsn) as (proxy, pool):
        proxy.inject(Fault("reset", when=query("INSERT"), side="after"))
        with pytest.raises(CommitUnknown) as caught:
            await Engine(pool).run(add_row(1), autocommit=True)
        assert "resolve_commit=True" not in str(caught.value)


@pytest.mark.parametrize("by", ["xid", "token"])
async def test_a_run_that_could_not_be_resolved_is_not_advised_to_resolve(
    by: str, dsn: str, postgres_server: Server
) -> None:
    tokens = CommitTokens() if by == "token" else None
    async with behind(postgres_server, dsn) as (proxy, pool):
        engine = Engine(pool, commit_tokens=tokens)
        if tokens is not None:
            await engine.run(tokens.install)
        await engine.run(count_rows())
        proxy.inject(Fault("reset", when=answer_to_commit))
        # From now on nobody gets through.
        proxy.inject(Fault("reset", when=lambda seen: seen.type == "startup", times=None))
        with pytest.raises(CommitUnknown) as caught:
            await engine.run(add_row(1), resolve_commit=True, deadline=0.6)
        assert "resolve_commit=True" not in str(caught.value)


# --- a run within a run


IT_IS_THIS_TASK = re.compile(r"\btask\b", re.IGNORECASE)


async def test_a_run_within_a_run_on_a_full_pool_is_told_that_this_task_holds_a_connection(
    single: asyncpg.Pool,
) -> None:
    engine = Engine(single, acquire_timeout=0.1)

    async def outer(conn: Any) -> None:
        await insert(conn)
        await engine.run(add_row(2))

    with pytest.raises(AcquireTimeout, match=IT_IS_THIS_TASK):
        await engine.run(outer)


async def in_a_run(engine: Engine) -> None:
    await engine.run(add_row(2))


async def in_a_transaction(engine: Engine) -> None:
    async with engine.transaction():
        pass


async def in_a_direct_call(engine: Engine) -> None:
    await engine.fetchval("SELECT 1")


@pytest.mark.parametrize(
    "inner", [in_a_run, in_a_transaction, in_a_direct_call], ids=lambda inner: inner.__name__
)
async def test_a_call_within_a_transaction_on_a_full_pool_is_told_the_same(
    inner: Callable[[Engine], Awaitable[None]], single: asyncpg.Pool
) -> None:
    engine = Engine(single, acquire_timeout=0.1)
    async with engine.transaction():
        with pytest.raises(AcquireTimeout, match=IT_IS_THIS_TASK):
            await inner(engine)


async def test_who_waits_for_others_is_not_told_that_he_holds_one(single: asyncpg.Pool) -> None:
    engine = Engine(single, acquire_timeout=0.1)
    may_end = asyncio.Event()

    async def holds() -> None:
        async with engine.transaction():
            await may_end.wait()

    other = asyncio.create_task(holds())
    await until(lambda: engine.stats().in_use == 1)
    with pytest.raises(AcquireTimeout) as caught:
        await engine.run(add_row(2))
    may_end.set()
    await other
    assert not IT_IS_THIS_TASK.search(str(caught.value))
    # Nor is who held one before.
    await engine.run(add_row(3))
    async with single.acquire():
        with pytest.raises(AcquireTimeout) as caught:
            await engine.run(add_row(2))
    assert not IT_IS_THIS_TASK.search(str(caught.value))


# --- @operation on a method


class Repository:
    """As people write it: a class whose methods are operations."""

    def __init__(self, offset: int) -> None:
        self.offset = offset

    @operation
    async def add(self, conn: Any, n: int, *, twice: bool = False) -> int:
        await insert(conn, self.offset + n)
        if twice:
            await insert(conn, self.offset + n + 1)
        return self.offset + n

    @operation
    async def count(self, conn: Any) -> int:
        found: int = await conn.fetchval("SELECT count(*) FROM t")
        return found

    @operation
    async def fails_once(self, conn: Any, starts: list[int]) -> int:
        starts.append(self.offset)
        if len(starts) == 1:
            await conn.execute("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40001'; END $$")
        return await insert(conn, self.offset)


class Heir(Repository):
    """Overrides one, and calls its parent's."""

    @operation
    async def add(self, conn: Any, n: int, *, twice: bool = False) -> int:
        result: int = await super().add(n, twice=twice)(conn)
        return -result


async def test_an_operation_that_is_a_method_gets_its_self_and_the_connection(single: asyncpg.Pool) -> None:
    engine = Engine(single)
    one, other = Repository(10), Repository(20)
    assert await engine.run(one.add(1)) == 11
    assert await engine.run(other.add(2, twice=True)) == 22
    assert await engine.run(pipe(one.count(), timeout(5), retry(QUICK))) == 3
    assert await rows(single) == [11, 22, 23]


async def test_an_operation_that_is_a_method_joins_a_transaction_and_is_tried_again(
    single: asyncpg.Pool,
) -> None:
    engine = Engine(single)
    starts: list[int] = []
    assert await engine.run(Repository(5).fails_once(starts), retry=QUICK) == 5
    assert starts == [5, 5]
    async with engine.transaction() as conn:
        assert await savepoint(Repository(30).add(1))(conn) == 31
    assert await rows(single) == [5, 31]


async def test_an_operation_that_is_a_method_can_be_overridden(single: asyncpg.Pool) -> None:
    assert await Engine(single).run(Heir(1).add(1)) == -2
    assert await rows(single) == [2]


def test_an_operation_that_is_a_method_checks_its_arguments_when_it_is_made() -> None:
    with pytest.raises(TypeError, match="'n'"):
        Repository(1).add()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Repository(1).count(7)  # type: ignore[call-arg]


def test_an_operation_that_is_a_method_is_named_like_it() -> None:
    assert Repository(1).count().name == "Repository.count"
    assert "Repository.count" in repr(pipe(Repository(1).count(), timeout(5)))


async def test_a_method_serves_a_batch(single: asyncpg.Pool) -> None:
    result = await Engine(single).run(batch(each(Repository(100).add))([1, 1, 2]))
    assert [failed.index for failed in result.failed] == [1]
    assert await rows(single) == [101, 102]


class Tool:
    """A static method has no self, and so it takes the connection first."""

    @staticmethod
    @operation
    async def add(conn: Any, n: int) -> int:
        return await insert(conn, n)


async def test_an_operation_that_is_a_static_method_is_like_a_function(single: asyncpg.Pool) -> None:
    engine = Engine(single)
    assert await engine.run(Tool.add(1)) == 1
    assert await engine.run(Tool().add(2)) == 2
