"""`retry` by the messages that it sends, and how often it starts a body."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from dbop_raw import (
    RetriesExhausted,
    RetryPolicy,
    pipe,
    retry,
    timeout,
)
from tests.support.fakepostgres import (
    DUPLICATE,
    LOCKED,
    SERIAL,
    FakePostgres,
    fails_first,
)
from tests.support.scripts import engine_over

pytestmark = [pytest.mark.anyio, pytest.mark.every_loop]

P = RetryPolicy(attempts=3, first_delay=1e-6, max_delay=1e-6)


async def test_a_retry_goes_back_and_sets_the_limits_again_in_one_message() -> None:
    """ROLLBACK TO undoes SET LOCAL."""
    conn = FakePostgres()
    op = pipe(fails_first(1, LOCKED), timeout(1), retry(P))
    assert await engine_over(conn).run(op) == 2
    assert conn.messages == [
        "BEGIN; SAVEPOINT dbop_raw_1; SET LOCAL statement_timeout = 950",
        f"fail {LOCKED}",
        "ROLLBACK TO SAVEPOINT dbop_raw_1; SET LOCAL statement_timeout = 950",
        "insert x",
        "COMMIT",
    ]


async def test_a_limit_around_a_retry_is_set_again_with_it() -> None:
    conn = FakePostgres()
    op = pipe(fails_first(1, LOCKED), retry(P), timeout(1))
    await engine_over(conn).run(op)
    assert conn.said[0].startswith("BEGIN; SAVEPOINT dbop_raw_1; SET LOCAL statement_timeout = ")
    assert conn.said[2].startswith("ROLLBACK TO SAVEPOINT dbop_raw_1; SET LOCAL statement_timeout = ")


@pytest.mark.parametrize(
    ("code", "raised"), [(DUPLICATE, asyncpg.UniqueViolationError), (SERIAL, RetriesExhausted)]
)
async def test_an_error_that_no_savepoint_repairs_is_not_tried_again_from_one(
    code: str, raised: type[Exception]
) -> None:
    conn = FakePostgres()
    with pytest.raises(raised):
        await engine_over(conn).run(pipe(fails_first(9, code), retry(P)))
    assert not [s for s in conn.statements() if s.startswith("ROLLBACK TO")]
    assert conn.state == "idle"


async def test_a_transaction_that_failed_starts_again_whole() -> None:
    conn = FakePostgres()
    assert await engine_over(conn).run(pipe(fails_first(1, SERIAL), retry(P))) == 2
    assert conn.messages == [
        *("BEGIN; SAVEPOINT dbop_raw_1", f"fail {SERIAL}", "ROLLBACK"),
        *("BEGIN; SAVEPOINT dbop_raw_1", "insert x", "COMMIT"),
    ]


async def test_attempts_count_starts_at_whatever_level() -> None:
    codes = iter([LOCKED, SERIAL, LOCKED, LOCKED])
    starts = 0

    async def body(conn: Any) -> None:
        nonlocal starts
        starts += 1
        await conn.execute(f"fail {next(codes)}")

    with pytest.raises(RetriesExhausted) as raised:
        await engine_over(FakePostgres()).run(pipe(body, retry(P)))
    assert starts == raised.value.attempts == P.attempts


async def test_each_call_of_one_operation_has_its_own_attempts() -> None:
    """A loop in a body over one operation: its tenth call may be retried like its first."""
    fails = iter([False, False, False, True, False])

    async def once(conn: Any) -> None:
        await conn.execute(f"fail {LOCKED}" if next(fails) else "insert x")

    op = pipe(once, retry(P))

    async def body(conn: Any) -> None:
        for _ in range(4):
            await op(conn)

    conn = FakePostgres()
    await engine_over(conn).run(body)
    assert conn.committed == ["x"] * 4


async def test_starts_in_a_new_transaction_count_with_those_before() -> None:
    """Layers don't multiply: what a nested retry started in the first transaction, it has started."""
    starts = 0

    async def once(conn: Any) -> None:
        nonlocal starts
        starts += 1
        await conn.execute(f"fail {LOCKED if starts < P.attempts else SERIAL}")

    op = pipe(once, retry(P))

    async def body(conn: Any) -> None:
        await op(conn)

    with pytest.raises(RetriesExhausted):
        await engine_over(FakePostgres()).run(body, retry=RetryPolicy(attempts=2, first_delay=1e-6))
    assert starts == P.attempts + 1
