"""A session by script: BEGIN, COMMIT, ROLLBACK and release going wrong, as no server does on demand."""

# ruff: noqa: ASYNC110 - what the server or the pool has done, only asking again can tell

from __future__ import annotations

import asyncio
import math
from typing import Any

import anyio
import asyncpg
import pytest

from dbop_raw import (
    CommitUnknown,
    Engine,
    Event,
    OperationTimeout,
    RetriesExhausted,
    RetryPolicy,
    RollbackFailed,
    TransactionAborted,
    events,
    operation,
    pipe,
    retry,
    savepoint,
    timeout,
)
from dbop_raw.session.settings import Bounds
from dbop_raw.testing import ScriptedConnection, ScriptedPool, Step
from tests.support.settings import with_bounds

pytestmark = pytest.mark.anyio

QUICK = RetryPolicy(attempts=3, first_delay=0.0001, max_delay=0.0001)
BEGIN = Step("BEGIN")
INSERT = Step("INSERT")
COMMIT = Step("COMMIT")
ROLLBACK = Step("ROLLBACK")
NEVER = math.inf


def server(code: str, severity: str = "ERROR") -> asyncpg.PostgresError:
    """A new one each time, as the protocol brings it."""
    return asyncpg.PostgresError.new({"S": severity, "V": severity, "C": code, "M": "of the script"})


def lost() -> asyncpg.PostgresError:
    return asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")


@operation
async def insert(conn: Any) -> str:
    tag: str = await conn.execute("INSERT")
    return tag


async def fails(conn: Any) -> None:
    await conn.execute("INSERT")
    raise LookupError("of the body")


def engine(*scripts: list[Step], **options: Any) -> tuple[Engine, list[ScriptedConnection], ScriptedPool]:
    """An engine over one connection a script, taken one after another."""
    connections = [ScriptedConnection(script) for script in scripts]
    pool = ScriptedPool(connections, max_size=1)
    pool_for_typing: Any = pool
    return Engine(pool_for_typing, **options), connections, pool


def short_engine(
    *scripts: list[Step], **options: Any
) -> tuple[Engine, list[ScriptedConnection], ScriptedPool]:
    """The same, with the bounds of the clean-up in milliseconds."""
    made, connections, pool = engine(*scripts, **options)
    return with_bounds(made, **SHORT), connections, pool


def check(connections: list[ScriptedConnection], made: Engine) -> None:
    """All of the scripts was used, and nothing is held."""
    for conn in connections:
        conn.assert_finished()
    assert made.stats().in_use == 0


SHORT = {"cleanup": 0.02, "grace": 0.02, "commit": 0.02}
"""The bounds of the clean-up, in milliseconds: what is tested is that they hold."""


# --- what is sent


async def test_a_run_is_begin_and_body_and_commit() -> None:
    made, connections, _ = engine([BEGIN, INSERT, COMMIT])
    assert await made.run(insert()) == "INSERT"
    check(connections, made)


async def test_a_body_that_needs_no_connection_sends_nothing() -> None:
    made, connections, _ = engine([BEGIN, COMMIT])

    async def idle(conn: Any) -> int:
        assert conn is not None
        return 7

    assert await made.run(idle) == 7
    assert connections[0].sent in ([], ["BEGIN", "COMMIT"])


async def test_a_failure_is_followed_by_rollback_and_raised_unchanged() -> None:
    made, connections, _ = engine([BEGIN, INSERT, ROLLBACK])
    with pytest.raises(LookupError, match="of the body"):
        await made.run(fails)
    assert not connections[0].terminated
    check(connections, made)


async def test_a_begin_that_is_refused_is_the_servers_error() -> None:
    made, connections, _ = engine([Step("BEGIN", error=server("53400")), ROLLBACK])
    with pytest.raises(asyncpg.PostgresError) as caught:
        await made.run(insert())
    assert caught.value.sqlstate == "53400"
    check(connections, made)


async def test_a_begin_on_a_lost_line_is_tried_on_another_connection() -> None:
    made, connections, _ = engine([Step("BEGIN", error=lost(), closes=True)], [BEGIN, INSERT, COMMIT])
    assert await made.run(insert(), retry=QUICK) == "INSERT"
    check(connections, made)


# --- ROLLBACK


async def test_a_rollback_that_fails_keeps_both_causes_and_throws_the_connection_away() -> None:
    broken = server("XX000")
    made, connections, pool = engine([BEGIN, INSERT, Step("ROLLBACK", error=broken)])
    with pytest.raises(RollbackFailed) as caught:
        await made.run(fails)
    error = caught.value
    assert isinstance(error.original, LookupError)
    assert error.rollback_error is broken
    assert error.__cause__ is error.original
    assert "LookupError" in str(error)
    assert type(broken).__name__ in str(error)
    assert connections[0].terminated
    assert (pool.released, pool.terminated) == (1, 1)
    assert made.stats().evicted == 1
    check(connections, made)


async def test_a_rollback_that_hangs_is_bounded_and_throws_the_connection_away() -> None:
    made, connections, _ = short_engine([BEGIN, INSERT, Step("ROLLBACK", delay=NEVER)])
    with anyio.fail_after(5), pytest.raises(RollbackFailed) as caught:
        await made.run(fails)
    assert isinstance(caught.value.original, LookupError)
    assert isinstance(caught.value.rollback_error, TimeoutError)
    assert connections[0].terminated
    check(connections, made)


async def test_a_rollback_on_a_connection_that_is_gone_is_not_sent() -> None:
    made, connections, _ = engine([BEGIN, Step("INSERT", error=lost(), closes=True)])
    with pytest.raises(asyncpg.ConnectionDoesNotExistError):
        await made.run(insert())
    check(connections, made)


async def test_a_rollback_that_fails_after_a_passing_error_does_not_stop_the_retry() -> None:
    made, connections, _ = engine(
        [BEGIN, Step("INSERT", error=server("40P01")), Step("ROLLBACK", error=server("XX000"))],
        [BEGIN, INSERT, COMMIT],
    )
    assert await made.run(insert(), retry=QUICK) == "INSERT"
    assert connections[0].terminated
    check(connections, made)


async def test_a_rollback_that_fails_after_a_permanent_error_is_not_tried_again() -> None:
    made, connections, _ = engine(
        [BEGIN, Step("INSERT", error=server("23505")), Step("ROLLBACK", error=server("XX000"))]
    )
    with pytest.raises(RollbackFailed):
        await made.run(insert(), retry=QUICK)
    check(connections, made)


@pytest.mark.parametrize(
    "rollback",
    [Step("ROLLBACK", error=server("XX000")), Step("ROLLBACK", delay=NEVER)],
    ids=["fails", "hangs"],
)
async def test_a_cancellation_stays_one_when_the_rollback_goes_wrong(rollback: Step) -> None:
    made, connections, _ = short_engine([BEGIN, INSERT, rollback])

    async def waits(conn: Any) -> None:
        await conn.execute("INSERT")
        scope.cancel()
        await anyio.sleep_forever()

    with anyio.fail_after(5), anyio.CancelScope() as scope:
        await made.run(waits)
    assert scope.cancelled_caught
    assert connections[0].terminated
    check(connections, made)


async def test_a_timeout_stays_one_when_the_server_hangs() -> None:
    made, connections, _ = short_engine([BEGIN, Step("INSERT", delay=NEVER), Step("ROLLBACK", delay=NEVER)])
    with anyio.fail_after(5), pytest.raises(OperationTimeout) as caught:
        await made.run(pipe(insert(), timeout(0.02)))
    assert not caught.value.by_server
    assert connections[0].terminated
    assert made.stats().evicted == 1
    check(connections, made)


async def test_a_deadline_stays_one_when_the_server_hangs() -> None:
    made, connections, _ = short_engine([BEGIN, Step("INSERT", delay=NEVER), Step("ROLLBACK", delay=NEVER)])
    with anyio.fail_after(5), pytest.raises(OperationTimeout) as caught:
        await made.run(insert(), deadline=0.03)
    assert caught.value.seconds == 0.03
    assert connections[0].terminated
    check(connections, made)


# --- ROLLBACK TO


async def test_a_rollback_to_a_savepoint_that_fails_keeps_both_causes() -> None:
    passing, broken = server("55P03"), server("XX000")
    made, connections, _ = engine(
        [BEGIN, Step("SAVEPOINT"), Step("INSERT", error=passing), Step("ROLLBACK TO", error=broken)]
    )

    async def body(conn: Any) -> None:
        with pytest.raises(RollbackFailed) as caught:
            await savepoint(insert())(conn)
        assert caught.value.original is passing
        assert caught.value.rollback_error is broken
        raise LookupError

    with pytest.raises(LookupError):
        await made.run(body)
    assert connections[0].terminated
    check(connections, made)


async def test_a_retry_from_a_savepoint_is_one_message() -> None:
    made, connections, _ = engine(
        [BEGIN, Step("INSERT", error=server("55P03")), Step("ROLLBACK TO"), INSERT, COMMIT]
    )
    assert await made.run(pipe(insert(), retry(QUICK))) == "INSERT"
    check(connections, made)


# --- COMMIT


async def test_a_commit_answered_with_rollback_is_transaction_aborted() -> None:
    made, connections, _ = engine([BEGIN, INSERT, Step("COMMIT", "ROLLBACK")])
    with pytest.raises(TransactionAborted):
        await made.run(insert(), retry=QUICK)
    assert not connections[0].terminated
    check(connections, made)


@pytest.mark.parametrize("code", ["23505", "40001", "40P01", "25P02", "01000", "02000", "53100"])
async def test_an_error_of_the_server_at_commit_is_definite(code: str) -> None:
    refused = server(code)
    made, connections, _ = engine([BEGIN, INSERT, Step("COMMIT", error=refused)])
    with pytest.raises(type(refused)) as caught:
        await made.run(insert())
    assert caught.value is refused
    assert made.stats().commits_in_doubt == 0
    check(connections, made)


async def test_a_serialization_failure_at_commit_is_tried_again() -> None:
    made, connections, _ = engine(
        [BEGIN, INSERT, Step("COMMIT", error=server("40001")), BEGIN, INSERT, COMMIT]
    )
    assert await made.run(insert(), retry=QUICK) == "INSERT"
    check(connections, made)


@pytest.mark.parametrize(
    "error",
    [
        server("57P01", "FATAL"),
        server("40001", "FATAL"),
        server("XX000", "PANIC"),
        server("40003"),
        server("08007"),
        lost(),
        ConnectionResetError("of the script"),
        TimeoutError("of the script"),
    ],
    ids=repr,
)
async def test_any_other_error_at_commit_is_commit_unknown_and_not_tried_again(error: Exception) -> None:
    made, connections, _ = engine([BEGIN, INSERT, Step("COMMIT", error=error, closes=True)])
    with pytest.raises(CommitUnknown) as caught:
        await made.run(insert(), retry=QUICK)
    assert caught.value.__cause__ is error
    assert (made.stats().commits_in_doubt, made.stats().evicted) == (1, 1)
    check(connections, made)


async def test_a_commit_that_was_never_sent_is_no_doubt() -> None:
    """A connection closed before says so with an InterfaceError: nothing was sent."""
    made, connections, _ = engine([BEGIN, INSERT], [BEGIN, INSERT, COMMIT])
    starts = 0

    async def closes_it(conn: Any) -> int:
        nonlocal starts
        starts += 1
        await conn.execute("INSERT")
        if starts == 1:
            operation_is_over.append(conn)
        return starts

    operation_is_over: list[ScriptedConnection] = []
    closing = connections[0]
    real = closing.is_in_transaction

    def closes_after_the_check() -> bool:
        there = real()
        if operation_is_over:
            closing.terminate()
            operation_is_over.clear()
        return there

    closing.is_in_transaction = closes_after_the_check  # type: ignore[method-assign]
    assert await made.run(closes_it, retry=QUICK) == 2
    assert made.stats().commits_in_doubt == 0
    check(connections, made)


async def test_a_commit_that_hangs_past_the_deadline_is_commit_unknown() -> None:
    made, connections, _ = short_engine([BEGIN, INSERT, Step("COMMIT", delay=NEVER)])
    with anyio.fail_after(5), pytest.raises(CommitUnknown):
        await made.run(insert(), deadline=0.05, retry=QUICK)
    assert connections[0].terminated
    check(connections, made)


@pytest.mark.parametrize("how", ["task", "scope"])
async def test_a_cancelled_caller_waits_for_commits_answer_and_keeps_the_connection(how: str) -> None:
    seen: list[Event] = []
    made, connections, _ = engine([BEGIN, INSERT, Step("COMMIT", delay=0.05)], observer=seen.append)
    await _cancel_at_commit(how, made, connections[0])
    assert not connections[0].terminated
    assert made.stats().evicted == 0
    assert not [event for event in seen if isinstance(event, events.RolledBack)], "it is committed"
    check(connections, made)


@pytest.mark.parametrize("how", ["task", "scope"])
async def test_a_cancelled_caller_gives_up_on_a_commit_that_hangs(how: str) -> None:
    made, connections, _ = short_engine([BEGIN, INSERT, Step("COMMIT", delay=NEVER)])
    await _cancel_at_commit(how, made, connections[0])
    assert connections[0].terminated
    check(connections, made)


async def test_a_caller_cancelled_twice_gives_up_at_once() -> None:
    made, connections, _ = engine([BEGIN, INSERT, Step("COMMIT", delay=NEVER)])
    task = asyncio.ensure_future(made.run(insert()))
    await _until_commit(connections[0])
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with anyio.fail_after(Bounds().commit / 2), pytest.raises(asyncio.CancelledError):
        await task
    assert connections[0].terminated
    check(connections, made)


async def _until_commit(conn: ScriptedConnection) -> None:
    with anyio.fail_after(5):
        while "COMMIT" not in conn.sent:
            await asyncio.sleep(0)


async def _cancel_at_commit(how: str, made: Engine, conn: ScriptedConnection) -> None:
    with anyio.fail_after(5):
        if how == "task":
            task = asyncio.ensure_future(made.run(insert()))
            await _until_commit(conn)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return
        async with anyio.create_task_group() as group:
            group.start_soon(made.run, insert())
            await _until_commit(conn)
            group.cancel_scope.cancel()


# --- giving the connection back


class RefusesRelease(ScriptedPool):
    """Release fails as asyncpg's does: the reset query failed, and the connection was terminated."""

    async def release(self, connection: ScriptedConnection, *, timeout: float | None = None) -> None:  # noqa: ASYNC109
        connection.terminate()
        await super().release(connection, timeout=timeout)
        raise lost()


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
            server("57P03", "FATAL"),
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
