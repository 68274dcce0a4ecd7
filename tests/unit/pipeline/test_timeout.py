"""`timeout`: the limits that the server is told, for how long they hold, and who says that time is over."""

from __future__ import annotations

import anyio
import pytest

from dbop_raw import (
    OperationTimeout,
    RetryPolicy,
    pipe,
    timeout,
)
from tests.support.fakepostgres import (
    FakePostgres,
    SlowPostgres,
    says,
)
from tests.support.scripts import engine_over

pytestmark = [pytest.mark.anyio, pytest.mark.every_loop]

P = RetryPolicy(attempts=3, first_delay=1e-6, max_delay=1e-6)


async def test_limits_are_after_a_nested_timeout_what_they_were_before() -> None:
    conn = FakePostgres()
    seen: list[tuple[int, int]] = []

    async def look(c: FakePostgres) -> None:
        await c.execute("insert x")
        seen.append((round(int(c["statement_timeout"]), -1), round(int(c["lock_timeout"]), -1)))

    async def body(c: FakePostgres) -> None:
        await look(c)
        await timeout(1, lock=0.2)(look)(c)
        await look(c)
        await timeout(2)(look)(c)
        await look(c)

    await engine_over(conn).run(body)
    assert seen == [(0, 0), (950, 200), (0, 0), (1900, 0), (0, 0)]


async def test_an_inner_limit_is_never_longer_than_an_outer_one() -> None:
    conn = FakePostgres()
    seen: list[tuple[int, int]] = []

    async def look(c: FakePostgres) -> None:
        await c.execute("insert x")
        seen.append((int(c["statement_timeout"]), int(c["lock_timeout"])))

    await engine_over(conn).run(pipe(look, timeout(60, lock=50), timeout(1, lock=0.3)))
    await engine_over(conn).run(pipe(look, timeout(1, lock=50)))
    assert all(0 < statement <= 950 for statement, _ in seen)
    assert seen[0][1] == 300
    assert seen[1][1] <= 950


async def test_an_inner_lock_limit_ends_with_its_scope() -> None:
    conn = FakePostgres()
    seen: list[str] = []

    async def look(c: FakePostgres) -> None:
        await c.execute("insert x")
        seen.append(c["lock_timeout"])

    async def body(c: FakePostgres) -> None:
        await look(c)
        await timeout(1, lock=0.2)(look)(c)
        await look(c)

    await engine_over(conn).run(pipe(body, timeout(5)))
    assert seen == ["0", "200", "0"]


async def test_only_the_timeout_that_ran_out_says_so() -> None:
    conn = SlowPostgres(late="insert")
    with pytest.raises(OperationTimeout) as raised:
        await engine_over(conn).run(pipe(says("insert x"), timeout(0.02), timeout(60)))
    assert raised.value.seconds == 0.02


async def test_an_outer_cancellation_stays_a_cancellation() -> None:
    conn = SlowPostgres(late="insert")
    with anyio.move_on_after(0.02) as scope:
        await engine_over(conn).run(pipe(says("insert x"), timeout(60)))
    assert scope.cancelled_caught
    assert conn.state == "idle"
