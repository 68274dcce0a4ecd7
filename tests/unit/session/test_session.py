"""A session by script: what it sends, and giving its connection back."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from dbop_raw import (
    Engine,
    RetriesExhausted,
    RetryPolicy,
)
from dbop_raw.testing import ScriptedConnection, ScriptedPool, Step
from tests.support.failures import lost_line, server_error
from tests.support.scripts import BEGIN, COMMIT, INSERT, ROLLBACK, Played, fails, insert

pytestmark = [pytest.mark.anyio, pytest.mark.every_loop]

QUICK = RetryPolicy(attempts=3, first_delay=0.0001, max_delay=0.0001)


async def test_a_run_is_begin_and_body_and_commit() -> None:
    played = Played([BEGIN, INSERT, COMMIT])
    assert await played.engine.run(insert()) == "INSERT"
    played.check()


async def test_a_body_that_sends_nothing_costs_no_more_than_begin_and_commit() -> None:
    played = Played([BEGIN, COMMIT])

    async def idle(conn: Any) -> int:
        assert conn is not None
        return 7

    assert await played.engine.run(idle) == 7
    assert played.connections[0].sent in ([], ["BEGIN", "COMMIT"])


async def test_a_bodys_error_is_raised_unchanged_after_a_rollback() -> None:
    played = Played([BEGIN, INSERT, ROLLBACK])
    with pytest.raises(LookupError, match="of the body"):
        await played.engine.run(fails)
    assert not played.connections[0].terminated
    played.check()


async def test_a_begin_that_is_refused_is_the_servers_error() -> None:
    played = Played([Step("BEGIN", error=server_error("53400")), ROLLBACK])
    with pytest.raises(asyncpg.PostgresError) as caught:
        await played.engine.run(insert())
    assert caught.value.sqlstate == "53400"
    played.check()


async def test_a_begin_on_a_lost_line_is_tried_on_another_connection() -> None:
    played = Played([Step("BEGIN", error=lost_line(), closes=True)], [BEGIN, INSERT, COMMIT])
    assert await played.engine.run(insert(), retry=QUICK) == "INSERT"
    played.check()


class RefusesRelease(ScriptedPool):
    """Release fails as asyncpg's does: the reset query failed, and the connection was terminated."""

    async def release(self, connection: ScriptedConnection, *, timeout: float | None = None) -> None:  # noqa: ASYNC109
        connection.terminate()
        await super().release(connection, timeout=timeout)
        raise lost_line()


async def test_a_release_that_fails_is_no_error_of_a_run_that_is_committed() -> None:
    pool: Any = RefusesRelease([ScriptedConnection([BEGIN, INSERT, COMMIT])])
    made = Engine(pool)
    assert await made.run(insert()) == "INSERT"
    assert (made.stats().in_use, made.stats().evicted) == (0, 1)


async def test_a_release_that_fails_does_not_hide_the_bodys_error() -> None:
    pool: Any = RefusesRelease([ScriptedConnection([BEGIN, INSERT, ROLLBACK])])
    made = Engine(pool)
    with pytest.raises(LookupError):
        await made.run(fails)
    assert made.stats().in_use == 0


async def test_a_connection_that_cannot_be_made_is_tried_again() -> None:
    pool: Any = ScriptedPool(
        [
            ConnectionRefusedError("of the script"),
            server_error("57P03", "FATAL"),
            ScriptedConnection([BEGIN, INSERT, COMMIT]),
        ]
    )
    made = Engine(pool)
    assert await made.run(insert(), retry=QUICK) == "INSERT"
    assert (made.stats().retries, made.stats().in_use, made.stats().waiting) == (2, 0, 0)


async def test_a_connection_that_can_never_be_made_is_given_up_with_the_cause() -> None:
    refused = [ConnectionRefusedError("of the script") for _ in range(3)]
    pool: Any = ScriptedPool(refused)
    with pytest.raises(RetriesExhausted) as caught:
        await Engine(pool).run(insert(), retry=QUICK)
    assert caught.value.attempts == 3
    assert caught.value.__cause__ is refused[-1]
