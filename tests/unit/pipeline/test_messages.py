"""What is sent, message by message: control SQL travels with what it belongs to, and costs no round trip."""

from __future__ import annotations

import pytest

from dbop_raw import (
    RetryPolicy,
    pipe,
    retry,
    savepoint,
    timeout,
)
from tests.support.fakepostgres import (
    FakePostgres,
    says,
)
from tests.support.scopes import run_in_scope
from tests.support.scripts import engine_over

pytestmark = [pytest.mark.anyio, pytest.mark.every_loop]

P = RetryPolicy(attempts=3, first_delay=1e-6, max_delay=1e-6)


async def test_begin_savepoint_and_limits_travel_in_one_message() -> None:
    conn = FakePostgres()
    await engine_over(conn).run(pipe(says("insert x"), timeout(1.5, lock=0.5), retry(P)), retry=P)
    assert conn.messages == [
        "BEGIN; SAVEPOINT dbop_raw_1; SET LOCAL statement_timeout = 1420; SET LOCAL lock_timeout = 500",
        "insert x",
        "COMMIT",
    ]


async def test_begin_travels_alone_where_nothing_wraps_the_body() -> None:
    conn = FakePostgres()
    await engine_over(conn).run(says("insert x"))
    assert conn.messages == ["BEGIN", "insert x", "COMMIT"]


async def test_autocommit_sends_the_body_alone() -> None:
    conn = FakePostgres()
    await engine_over(conn).run(pipe(says("insert x"), timeout(1), savepoint), autocommit=True)
    assert conn.messages == ["insert x"]


async def test_a_scope_outside_of_a_transaction_sends_no_control_sql() -> None:
    conn = FakePostgres()
    op = pipe(says("insert x"), savepoint, timeout(1), retry(P))
    await run_in_scope(op, conn)
    assert conn.sent == ["insert x"]
