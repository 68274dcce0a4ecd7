"""Savepoints of nested operations: set, released and undone for themselves, whatever the body swallows."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from dbop_raw import (
    RetryPolicy,
    TransactionAborted,
    TransactionMisuse,
    pipe,
    savepoint,
    timeout,
)
from tests.support.fakepostgres import (
    DUPLICATE,
    FakePostgres,
    SlowPostgres,
    says,
)
from tests.support.scripts import engine_over

pytestmark = [pytest.mark.anyio, pytest.mark.every_loop]

P = RetryPolicy(attempts=3, first_delay=1e-6, max_delay=1e-6)


async def test_a_nested_savepoint_is_released_before_the_body_goes_on() -> None:
    """More of the body follows: the savepoint is released before the body goes on."""
    conn = FakePostgres()

    async def body(c: Any) -> None:
        await savepoint(says("insert a"))(c)
        await c.execute("insert b")

    await engine_over(conn).run(body)
    assert conn.messages == [
        *("BEGIN", "SAVEPOINT dbop_raw_1", "insert a", "RELEASE SAVEPOINT dbop_raw_1"),
        *("insert b", "COMMIT"),
    ]


async def test_a_nested_failure_is_undone_before_the_body_goes_on() -> None:
    conn = FakePostgres()

    async def both(c: Any) -> None:
        await c.execute("insert lost")
        await c.execute(f"fail {DUPLICATE}")

    async def body(c: Any) -> None:
        with pytest.raises(asyncpg.UniqueViolationError):
            await savepoint(both)(c)
        await c.execute("insert kept")

    await engine_over(conn).run(body)
    assert "ROLLBACK TO SAVEPOINT dbop_raw_1; RELEASE SAVEPOINT dbop_raw_1" in conn.sent
    assert conn.committed == ["kept"]


async def test_an_error_that_was_swallowed_is_never_committed_in_part() -> None:
    """A savepoint of ours that could not be set must not stand for one further out."""
    conn = FakePostgres()

    async def inner(c: Any) -> None:
        await c.execute("insert inner")
        with pytest.raises(asyncpg.PostgresError):
            await c.execute(f"fail {DUPLICATE}")
        with pytest.raises(asyncpg.PostgresError):
            await savepoint(says("insert never"))(c)
        with pytest.raises(asyncpg.PostgresError):
            await c.execute("insert after")

    with pytest.raises((asyncpg.PostgresError, TransactionAborted)):
        await engine_over(conn).run(pipe(inner, savepoint))
    assert conn.committed == []


async def test_a_scope_whose_inside_swallowed_an_error_is_undone_as_a_whole() -> None:
    conn = FakePostgres()

    async def inner(c: Any) -> None:
        await c.execute("insert inner")
        with pytest.raises(asyncpg.PostgresError):
            await c.execute(f"fail {DUPLICATE}")

    async def outer(c: Any) -> None:
        await c.execute("insert outer")
        await savepoint(inner)(c)

    async def body(c: Any) -> None:
        with pytest.raises(asyncpg.InFailedSQLTransactionError):
            await savepoint(outer)(c)
        await c.execute("insert kept")

    await engine_over(conn).run(body)
    assert conn.committed == ["kept"]


async def test_a_body_that_ends_the_transaction_is_told_so() -> None:
    conn = FakePostgres()
    with pytest.raises(TransactionMisuse, match="ended the transaction itself"):
        await engine_over(conn).run(says("COMMIT"))


async def test_a_swallowed_error_is_told_at_commit() -> None:
    conn = FakePostgres()

    async def body(c: Any) -> None:
        with pytest.raises(asyncpg.PostgresError):
            await c.execute(f"fail {DUPLICATE}")

    with pytest.raises(TransactionAborted):
        await engine_over(conn).run(body)


async def test_a_savepoint_that_was_never_set_is_not_taken_for_one_further_out() -> None:
    """The message that sets it is cut off by the deadline: what was done before must not be undone."""
    conn = SlowPostgres(late="SAVEPOINT dbop_raw_2")

    async def outer(c: Any) -> None:
        await c.execute("insert outer")
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it is, nothing may be half done
            await pipe(says("insert inner"), savepoint, timeout(0.02))(c)
        await c.execute("insert after")

    outcome: BaseException | None = None
    try:
        await engine_over(conn).run(pipe(outer, savepoint))
    except Exception as exc:  # noqa: BLE001
        outcome = exc
    assert conn.committed == ([] if outcome else ["outer", "after"])
