"""COMMIT by script: which answer is definite and which is not, and who waits for it how long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from dbop_raw import (
    CommitUnknown,
    RetryPolicy,
    TransactionAborted,
    events,
)
from dbop_raw.session.settings import Bounds
from dbop_raw.testing import ScriptedConnection, Step
from tests.support.failures import lost_line, server_error
from tests.support.observing import Seen
from tests.support.scripts import BEGIN, COMMIT, INSERT, NEVER, SHORT, Played, insert

pytestmark = [pytest.mark.anyio, pytest.mark.every_loop]

QUICK = RetryPolicy(attempts=3, first_delay=0.0001, max_delay=0.0001)


async def test_a_commit_answered_with_rollback_is_transaction_aborted() -> None:
    played = Played([BEGIN, INSERT, Step("COMMIT", "ROLLBACK")])
    with pytest.raises(TransactionAborted):
        await played.engine.run(insert(), retry=QUICK)
    assert not played.connections[0].terminated
    played.check()


@pytest.mark.parametrize("code", ["23505", "40001", "40P01", "55P03", "P0001", "22012", "01000", "02000"])
async def test_an_error_by_which_postgresql_refuses_a_commit_is_definite(code: str) -> None:
    refused = server_error(code)
    played = Played([BEGIN, INSERT, Step("COMMIT", error=refused)])
    with pytest.raises(type(refused)) as caught:
        await played.engine.run(insert())
    assert caught.value is refused
    assert played.engine.stats().commits_in_doubt == 0
    played.check()


async def test_a_serialization_failure_at_commit_is_tried_again() -> None:
    played = Played([BEGIN, INSERT, Step("COMMIT", error=server_error("40001")), BEGIN, INSERT, COMMIT])
    assert await played.engine.run(insert(), retry=QUICK) == "INSERT"
    played.check()


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: server_error("57P01", "FATAL"), id="57P01, FATAL"),
        pytest.param(lambda: server_error("40001", "FATAL"), id="40001, FATAL"),
        pytest.param(lambda: server_error("XX000", "PANIC"), id="XX000, PANIC"),
        pytest.param(lambda: server_error("40003"), id="40003"),
        pytest.param(lambda: server_error("08007"), id="08007"),
        pytest.param(lost_line, id="lost line"),
        pytest.param(lambda: ConnectionResetError("of the script"), id="ConnectionResetError"),
        pytest.param(lambda: TimeoutError("of the script"), id="TimeoutError"),
    ],
)
async def test_any_other_error_at_commit_is_commit_unknown_and_not_tried_again(
    make: Callable[[], Exception],
) -> None:
    error = make()
    played = Played([BEGIN, INSERT, Step("COMMIT", error=error, closes=True)])
    with pytest.raises(CommitUnknown) as caught:
        await played.engine.run(insert(), retry=QUICK)
    assert caught.value.__cause__ is error
    assert (played.engine.stats().commits_in_doubt, played.engine.stats().evicted) == (1, 1)
    played.check()


async def test_a_commit_that_was_never_sent_is_in_no_doubt() -> None:
    """A connection closed before says so with an InterfaceError: nothing was sent."""
    played = Played([BEGIN, INSERT], [BEGIN, INSERT, COMMIT])
    starts = 0

    async def closes_it(conn: Any) -> int:
        nonlocal starts
        starts += 1
        await conn.execute("INSERT")
        if starts == 1:
            operation_is_over.append(conn)
        return starts

    operation_is_over: list[ScriptedConnection] = []
    closing = played.connections[0]
    real = closing.is_in_transaction

    def closes_after_the_check() -> bool:
        there = real()
        if operation_is_over:
            closing.terminate()
            operation_is_over.clear()
        return there

    closing.is_in_transaction = closes_after_the_check  # type: ignore[method-assign]
    assert await played.engine.run(closes_it, retry=QUICK) == 2
    assert played.engine.stats().commits_in_doubt == 0
    played.check()


async def test_a_commit_that_hangs_past_the_deadline_is_commit_unknown() -> None:
    played = Played([BEGIN, INSERT, Step("COMMIT", delay=NEVER)], bounds=SHORT)
    with anyio.fail_after(5), pytest.raises(CommitUnknown):
        await played.engine.run(insert(), deadline=0.05, retry=QUICK)
    assert played.connections[0].terminated
    played.check()


async def _until_commit(conn: ScriptedConnection) -> None:
    with anyio.fail_after(5):
        while "COMMIT" not in conn.sent:  # noqa: ASYNC110 - a script has no event for it
            await asyncio.sleep(0)


async def _cancel_at_commit(how: str, played: Played) -> None:
    with anyio.fail_after(5):
        if how == "task":
            task = asyncio.ensure_future(played.engine.run(insert()))
            await _until_commit(played.connections[0])
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return
        async with anyio.create_task_group() as group:
            group.start_soon(played.engine.run, insert())
            await _until_commit(played.connections[0])
            group.cancel_scope.cancel()


@pytest.mark.parametrize("how", ["task", "scope"])
async def test_a_cancelled_caller_waits_for_commits_answer_and_keeps_the_connection(how: str) -> None:
    seen = Seen()
    played = Played([BEGIN, INSERT, Step("COMMIT", delay=0.05)], observer=seen)
    await _cancel_at_commit(how, played)
    assert not played.connections[0].terminated
    assert played.engine.stats().evicted == 0
    assert seen.of(events.RolledBack) == [], "it is committed"
    played.check()


@pytest.mark.parametrize("how", ["task", "scope"])
async def test_a_cancelled_caller_gives_up_on_a_commit_that_hangs(how: str) -> None:
    played = Played([BEGIN, INSERT, Step("COMMIT", delay=NEVER)], bounds=SHORT)
    await _cancel_at_commit(how, played)
    assert played.connections[0].terminated
    played.check()


async def test_a_caller_cancelled_twice_gives_up_at_once() -> None:
    played = Played([BEGIN, INSERT, Step("COMMIT", delay=NEVER)])
    task = asyncio.ensure_future(played.engine.run(insert()))
    await _until_commit(played.connections[0])
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with anyio.fail_after(Bounds().commit / 2), pytest.raises(asyncio.CancelledError):
        await task
    assert played.connections[0].terminated
    played.check()


async def test_a_commit_whose_caller_is_cancelled_again_and_again_is_in_doubt() -> None:
    """It was sent: nobody may say that it is rolled back."""
    seen = Seen()
    played = Played([BEGIN, INSERT, Step("COMMIT", delay=NEVER)], observer=seen)
    task = asyncio.ensure_future(played.engine.run(insert()))
    await _until_commit(played.connections[0])
    with anyio.fail_after(5):
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
    assert task.cancelled()
    stats = played.engine.stats()
    assert (stats.commits_in_doubt, stats.rollbacks, stats.commits) == (1, 0, 0)
    assert len(seen.of(events.CommitInDoubt)) == 1
    assert seen.of(events.RolledBack) == []
    played.check()
