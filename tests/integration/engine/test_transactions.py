"""A transaction: its modes, its end by success or error, for `run` and as a block, and misuse of it."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from dbop_raw import (
    Engine,
    PolicyError,
    TransactionAborted,
    TransactionMisuse,
    batch,
    each,
    pipe,
    savepoint,
    timeout,
)
from tests.support.bodies import add, insert, rows
from tests.support.policies import QUICK

pytestmark = [pytest.mark.anyio, pytest.mark.every_loop]


MODES = (
    "SELECT current_setting('transaction_isolation') AS isolation, "
    "current_setting('transaction_read_only') AS readonly, "
    "current_setting('transaction_deferrable') AS deferrable"
)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("read committed", "off", "off")),
        ({"isolation": "read committed"}, ("read committed", "off", "off")),
        ({"isolation": "repeatable read"}, ("repeatable read", "off", "off")),
        ({"isolation": "serializable"}, ("serializable", "off", "off")),
        ({"readonly": True}, ("read committed", "on", "off")),
        (
            {"isolation": "serializable", "readonly": True, "deferrable": True},
            ("serializable", "on", "on"),
        ),
    ],
)
async def test_the_modes_of_a_transaction_are_those_that_were_asked_for(
    options: dict[str, Any], expected: tuple[str, str, str], pool: asyncpg.Pool
) -> None:
    engine = Engine(pool)
    assert tuple(await engine.run(lambda conn: conn.fetchrow(MODES), **options)) == expected
    async with engine.transaction(**options) as conn:
        assert tuple(await conn.fetchrow(MODES)) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"isolation": "read uncommitted"},
        {"isolation": "SERIALIZABLE"},
        {"deferrable": True},
        {"deferrable": True, "readonly": True},
        {"deferrable": True, "isolation": "serializable"},
        {"autocommit": True, "isolation": "serializable"},
        {"autocommit": True, "resolve_commit": True},
        {"autocommit": True, "deferrable": True, "readonly": True, "isolation": "serializable"},
        {"deadline": 0},
        {"deadline": -1},
        {"deadline": float("nan")},
        {"deadline": True},
        {"retry": 3},
    ],
    ids=repr,
)
async def test_options_of_a_run_that_are_not_allowed_are_refused_before_a_connection_is_taken(
    options: dict[str, Any], pool: asyncpg.Pool
) -> None:
    engine = Engine(pool)
    with pytest.raises(PolicyError):
        await engine.run(insert, **options)
    assert engine.stats().acquires == 0


async def test_autocommit_begins_no_transaction(pool: asyncpg.Pool) -> None:
    async def fails_after_its_statement(conn: Any) -> None:
        await insert(conn)
        assert not conn.is_in_transaction()
        raise LookupError

    with pytest.raises(LookupError):
        await Engine(pool).run(fails_after_its_statement, autocommit=True)
    assert await rows(pool) == [1]


async def test_a_transaction_block_commits(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    async with engine.transaction() as conn:
        await insert(conn)
        await add(2)(conn)
        assert await rows(pool) == []
    assert await rows(pool) == [1, 2]
    assert engine.stats().in_use == 0


async def test_a_transaction_block_rolls_back_on_an_error(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    with pytest.raises(LookupError):  # noqa: PT012 - the block is what is tested
        async with engine.transaction() as conn:
            await insert(conn)
            raise LookupError
    assert await rows(pool) == []
    assert engine.stats().in_use == 0


async def test_a_transaction_within_a_transaction_is_one_of_its_own(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    with pytest.raises(LookupError):  # noqa: PT012 - the block is what is tested
        async with engine.transaction() as outer:
            await insert(outer, 1)
            async with engine.transaction() as inner:
                await insert(inner, 2)
            raise LookupError
    assert await rows(pool) == [2]


async def test_a_savepoint_in_a_transaction_is_undone_alone(pool: asyncpg.Pool) -> None:
    async with Engine(pool).transaction() as conn:
        await insert(conn, 1)
        with pytest.raises(asyncpg.UniqueViolationError):
            await savepoint(add(1))(conn)
        await insert(conn, 2)
    assert await rows(pool) == [1, 2]


async def test_a_batch_in_a_transaction_joins_it(pool: asyncpg.Pool) -> None:
    engine = Engine(pool)
    with pytest.raises(LookupError):  # noqa: PT012 - the block is what is tested
        async with engine.transaction() as conn:
            result = await batch(each(add))([1, 1, 2])(conn)
            assert [failed.index for failed in result.failed] == [1]
            assert await conn.fetchval("SELECT count(*) FROM t") == 2
            raise LookupError
    assert await rows(pool) == []


async def test_the_block_of_a_transaction_may_not_end_it(pool: asyncpg.Pool) -> None:
    with pytest.raises(TransactionMisuse, match=r"engine\.transaction\(\) ended the transaction"):
        async with Engine(pool).transaction() as conn:
            await conn.execute("ROLLBACK")


async def test_conn_transaction_in_an_operation_says_what_to_use(single: asyncpg.Pool) -> None:
    async def old_habit(conn: Any) -> None:
        await insert(conn)
        async with conn.transaction():
            await insert(conn, 2)

    engine = Engine(single)
    with pytest.raises(TransactionMisuse, match=r"old_habit called conn\.transaction\(\).*savepoint\(op\)"):
        await engine.run(old_habit)
    assert await rows(single) == []
    assert engine.stats().evicted == 0


@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK", "END", "ABORT"])
async def test_a_body_that_ends_the_transaction_is_told_so_and_leaves_a_clean_connection(
    statement: str, single: asyncpg.Pool
) -> None:
    async def ends_it(conn: Any) -> None:
        await conn.execute(statement)

    engine = Engine(single)
    with pytest.raises(TransactionMisuse, match="ends_it ended the transaction itself"):
        await engine.run(pipe(ends_it, timeout(5)))
    assert await engine.run(lambda conn: conn.fetchval("SHOW statement_timeout")) == "0"


async def test_a_body_that_swallows_an_error_gets_transaction_aborted(single: asyncpg.Pool) -> None:
    async def swallows(conn: Any) -> str:
        await insert(conn)
        with pytest.raises(asyncpg.UniqueViolationError):
            await insert(conn)
        return "done"

    engine = Engine(single)
    with pytest.raises(TransactionAborted):
        await engine.run(swallows, retry=QUICK)
    assert await rows(single) == []
    assert engine.stats().retries == 0
