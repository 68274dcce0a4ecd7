"""ROLLBACK and ROLLBACK TO by script: failing, hanging, and not sent where there is nobody to send it to."""

from __future__ import annotations

from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import (
    OperationTimeout,
    RetryPolicy,
    RollbackFailed,
    pipe,
    retry,
    savepoint,
    timeout,
)
from dbop_raw.testing import Step
from tests.support.failures import lost_line, server_error
from tests.support.scripts import BEGIN, COMMIT, INSERT, NEVER, SHORT, Played, fails, insert

pytestmark = [pytest.mark.anyio, pytest.mark.every_loop]

QUICK = RetryPolicy(attempts=3, first_delay=0.0001, max_delay=0.0001)


async def test_a_rollback_that_fails_keeps_both_causes_and_throws_the_connection_away() -> None:
    broken = server_error("XX000")
    played = Played([BEGIN, INSERT, Step("ROLLBACK", error=broken)])
    with pytest.raises(RollbackFailed) as caught:
        await played.engine.run(fails)
    error = caught.value
    assert isinstance(error.original, LookupError)
    assert error.rollback_error is broken
    assert error.__cause__ is error.original
    assert "LookupError" in str(error)
    assert type(broken).__name__ in str(error)
    assert played.connections[0].terminated
    assert (played.pool.released, played.pool.terminated) == (1, 1)
    assert played.engine.stats().evicted == 1
    played.check()


async def test_a_rollback_that_hangs_is_bounded_and_throws_the_connection_away() -> None:
    played = Played([BEGIN, INSERT, Step("ROLLBACK", delay=NEVER)], bounds=SHORT)
    with anyio.fail_after(5), pytest.raises(RollbackFailed) as caught:
        await played.engine.run(fails)
    assert isinstance(caught.value.original, LookupError)
    assert isinstance(caught.value.rollback_error, TimeoutError)
    assert played.connections[0].terminated
    played.check()


async def test_a_rollback_on_a_connection_that_is_gone_is_not_sent() -> None:
    played = Played([BEGIN, Step("INSERT", error=lost_line(), closes=True)])
    with pytest.raises(asyncpg.ConnectionDoesNotExistError):
        await played.engine.run(insert())
    played.check()


async def test_a_rollback_that_fails_after_a_transient_error_does_not_stop_the_retry() -> None:
    played = Played(
        [BEGIN, Step("INSERT", error=server_error("40P01")), Step("ROLLBACK", error=server_error("XX000"))],
        [BEGIN, INSERT, COMMIT],
    )
    assert await played.engine.run(insert(), retry=QUICK) == "INSERT"
    assert played.connections[0].terminated
    played.check()


async def test_a_rollback_that_fails_after_a_permanent_error_is_not_tried_again() -> None:
    played = Played(
        [BEGIN, Step("INSERT", error=server_error("23505")), Step("ROLLBACK", error=server_error("XX000"))]
    )
    with pytest.raises(RollbackFailed):
        await played.engine.run(insert(), retry=QUICK)
    played.check()


@pytest.mark.parametrize(
    "rollback",
    [Step("ROLLBACK", error=server_error("XX000")), Step("ROLLBACK", delay=NEVER)],
    ids=["fails", "hangs"],
)
async def test_a_cancellation_stays_a_cancellation_when_the_rollback_goes_wrong(rollback: Step) -> None:
    played = Played([BEGIN, INSERT, rollback], bounds=SHORT)

    async def waits(conn: Any) -> None:
        await conn.execute("INSERT")
        scope.cancel()
        await anyio.sleep_forever()

    with anyio.fail_after(5), anyio.CancelScope() as scope:
        await played.engine.run(waits)
    assert scope.cancelled_caught
    assert played.connections[0].terminated
    played.check()


async def test_a_timeout_stays_a_timeout_when_the_server_hangs() -> None:
    played = Played([BEGIN, Step("INSERT", delay=NEVER), Step("ROLLBACK", delay=NEVER)], bounds=SHORT)
    with anyio.fail_after(5), pytest.raises(OperationTimeout) as caught:
        await played.engine.run(pipe(insert(), timeout(0.02)))
    assert not caught.value.by_server
    assert played.connections[0].terminated
    assert played.engine.stats().evicted == 1
    played.check()


async def test_a_rollback_after_a_timeout_that_the_server_did_not_keep_has_the_bound_of_grace() -> None:
    bounds = {"cleanup": 3600, "grace": 0.02}
    played = Played([BEGIN, Step("INSERT", delay=NEVER), Step("ROLLBACK", delay=NEVER)], bounds=bounds)
    with anyio.fail_after(5), pytest.raises(OperationTimeout):
        await played.engine.run(pipe(insert(), timeout(0.02)))
    assert played.connections[0].terminated
    played.check()


async def test_a_savepoint_is_rolled_back_within_the_bound_of_the_tightest_timeout_around_it() -> None:
    async def body(conn: Any) -> None:
        await savepoint(insert())(conn)

    hangs = [BEGIN, Step("SAVEPOINT"), Step("INSERT", delay=NEVER), Step("ROLLBACK TO", delay=NEVER)]
    played = Played(hangs, bounds={"cleanup": 3600, "grace": 0.02})
    with anyio.fail_after(5), pytest.raises((OperationTimeout, RollbackFailed)):
        await played.engine.run(pipe(body, timeout(3600), timeout(0.02)))
    assert played.connections[0].terminated
    played.check()


async def test_a_deadline_stays_a_timeout_when_the_server_hangs() -> None:
    played = Played([BEGIN, Step("INSERT", delay=NEVER), Step("ROLLBACK", delay=NEVER)], bounds=SHORT)
    with anyio.fail_after(5), pytest.raises(OperationTimeout) as caught:
        await played.engine.run(insert(), deadline=0.03)
    assert caught.value.seconds == 0.03
    assert played.connections[0].terminated
    played.check()


async def test_a_rollback_to_a_savepoint_that_fails_keeps_both_causes() -> None:
    passing, broken = server_error("55P03"), server_error("XX000")
    played = Played(
        [BEGIN, Step("SAVEPOINT"), Step("INSERT", error=passing), Step("ROLLBACK TO", error=broken)]
    )

    async def body(conn: Any) -> None:
        with pytest.raises(RollbackFailed) as caught:
            await savepoint(insert())(conn)
        assert caught.value.original is passing
        assert caught.value.rollback_error is broken
        raise LookupError

    with pytest.raises(LookupError):
        await played.engine.run(body)
    assert played.connections[0].terminated
    played.check()


async def test_a_retry_from_a_savepoint_costs_one_message() -> None:
    played = Played([BEGIN, Step("INSERT", error=server_error("55P03")), Step("ROLLBACK TO"), INSERT, COMMIT])
    assert await played.engine.run(pipe(insert(), retry(QUICK))) == "INSERT"
    played.check()
