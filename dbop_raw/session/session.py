"""One transaction on one connection.

BEGIN, COMMIT and ROLLBACK as explicit SQL, and what happens when they go wrong.

What may never happen is here: a connection goes back to its pool inside a transaction; a COMMIT that answered
ROLLBACK passes for done; a COMMIT whose answer was lost passes for done or for not done; a cancelled caller
leaves a COMMIT half known on a healthy server.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TypeVar

import anyio
import asyncpg

from dbop_raw.driver import sql
from dbop_raw.driver.connection import CLEANUP_SECONDS, GRACE_SECONDS, Connection, discard, is_gone
from dbop_raw.driver.underway import EagerCall, now
from dbop_raw.events import Observer
from dbop_raw.failure.errors import CommitUnknown, OperationTimeout, RollbackFailed, TransactionAborted
from dbop_raw.failure.policy import Attempts, RetryBudget
from dbop_raw.failure.sqlstate import Rule
from dbop_raw.session.scope import Scope, register, unregister

__all__ = ["COMMIT_SECONDS", "Session"]

T = TypeVar("T")

COMMIT_SECONDS = 5.0
"""How long a cancelled caller waits for the answer to a COMMIT that is on its way."""

# Codes by which a server says itself that it does not know the outcome.
_OUTCOME_UNKNOWN = frozenset({"40003", "08007"})


class Session(Scope):
    """One transaction, or one autocommitted operation, on a connection that it does not own."""

    __slots__ = ("committed", "deadline", "name")

    def __init__(
        self,
        conn: Connection,
        *,
        begin: str | None,
        name: str,
        deadline: float = math.inf,
        observer: Observer | None = None,
        overrides: Mapping[str, Rule] | None = None,
        budget: RetryBudget | None = None,
        attempts: dict[object, Attempts] | None = None,
        readonly: bool = False,
    ) -> None:
        super().__init__(
            conn,
            transactional=begin is not None,
            begin=begin,
            observer=observer,
            overrides=overrides,
            budget=budget,
            attempts=attempts,
            readonly=readonly,
        )
        self.name = name
        # The event loop's time at which all of the run must be over; clean-up may take GRACE_SECONDS more.
        self.deadline = self.until = deadline
        # COMMIT was answered with COMMIT. It says so also where the caller's cancellation is what is raised.
        self.committed = False

    @property
    def begun(self) -> bool:
        """Has BEGIN been sent? Until a body needs the connection it has not, and there is nothing to end."""
        return self._begin is not None and not (self._pending and self._pending[0] is self._begin)

    @contextlib.asynccontextmanager
    async def entered(self) -> AsyncIterator[None]:
        """Begin now, for a caller that uses the connection itself; up to COMMIT, which is the caller's.

        Rolls back on an error.
        """
        register(self)
        self.continues = True
        try:
            await self.flush()
            yield
            self.check_open("the block of engine.transaction()")
            if self.must_send:
                await self.flush()
        except BaseException as exc:
            unregister(self)
            await self.rollback(exc)
            raise
        unregister(self)

    async def body_of(self, step: Callable[[Scope], Awaitable[T]]) -> T:
        """Run an operation's `step` up to the point where only COMMIT is left.

        On any error or cancellation, roll back.
        """
        register(self)
        try:
            result = await step(self)
            if self.must_send:
                await self.flush()
        except BaseException as exc:
            unregister(self)
            await self.rollback(exc)
            raise
        unregister(self)
        return result

    async def rollback(self, original: BaseException) -> None:
        """ROLLBACK after `original`: shielded, bounded; a connection that does not answer is thrown away.

        Raises `RollbackFailed` with both causes when it could not be done, unless `original` is a
        cancellation or a timeout: those are what the caller waits for, and the server rolls back by itself
        when the connection is gone.
        """
        begun = self.begun
        self.drop_pending()
        if not begun or is_gone(self.conn):
            return
        now = anyio.current_time()
        # A statement that outlived the timeout its server was given: the server hangs, so don't wait for it
        # long.
        hangs = isinstance(original, OperationTimeout) and not original.by_server
        bound = min(
            now + (GRACE_SECONDS if hangs else CLEANUP_SECONDS), max(now, self.deadline) + GRACE_SECONDS
        )
        failure: BaseException | None = None
        try:
            with anyio.CancelScope(shield=True, deadline=bound) as limit:
                await self.conn.execute(sql.ROLLBACK)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the connection is in doubt
            failure = exc
        except BaseException:
            discard(self.conn)
            raise
        if limit.cancelled_caught:
            failure = TimeoutError(f"the server did not answer ROLLBACK within {bound - now:.3g} s")
        if failure is None:
            return
        discard(self.conn)
        if isinstance(original, Exception) and not isinstance(original, OperationTimeout):
            raise RollbackFailed(original=original, rollback_error=failure) from original

    async def commit(self, *, looked_up_after: float | None = None) -> None:
        """COMMIT, and know what became of it.

        Raises the server's error when it refused (nothing is committed), `TransactionAborted` when it
        answered ROLLBACK, and `CommitUnknown` when the answer was lost. A cancellation waits for the answer,
        at most `COMMIT_SECONDS`, and is then raised.

        `looked_up_after`: the caller can look up the outcome, so an answer that is not here after so many
        seconds, or after half of the time left, counts as lost: the other half is for the look-up.
        """
        if not self.begun:
            self.drop_pending()
            return
        self.drop_pending()
        # Not simply awaited: asyncio's task.cancel() would cancel the COMMIT itself, whatever shields it.
        answer: EagerCall[str] = EagerCall(self.conn.execute(sql.COMMIT))
        cancelled: BaseException | None = None
        try:
            await answer.wait(self._patience(looked_up_after))
        except BaseException as exc:  # noqa: BLE001 - a cancellation: raised below, when the answer is known
            cancelled = exc
            await self._await_answer(answer)
        if not answer.done:
            await self._give_up(answer)
        try:
            self._judge(answer)
            self.committed = True
        finally:
            if cancelled is not None:
                raise cancelled

    def _patience(self, looked_up_after: float | None = None) -> float | None:
        """Seconds to wait for the answer to COMMIT; None: for ever."""
        left = max(0.0, self.deadline - now())
        if looked_up_after is not None:
            return max(GRACE_SECONDS, min(looked_up_after, left / 2))
        return None if math.isinf(left) else left + GRACE_SECONDS

    async def _await_answer(self, answer: EagerCall[str]) -> None:
        """Wait on for a bounded time, though the caller is cancelled."""
        patience = self._patience()
        seconds = COMMIT_SECONDS if patience is None else min(COMMIT_SECONDS, patience)
        try:
            with anyio.CancelScope(shield=True):
                await answer.wait(seconds)
        except asyncio.CancelledError:
            # Cancelled twice: whoever does that wants out now, and the connection can't be kept.
            discard(self.conn)

    async def _give_up(self, answer: EagerCall[str]) -> None:
        """No answer came: the connection is worthless, and the outcome unknown."""
        discard(self.conn)
        with anyio.CancelScope(shield=True):
            await answer.wait(GRACE_SECONDS)
        answer.give_up()

    def _judge(self, answer: EagerCall[str]) -> None:
        try:
            tag = answer.result()
        except asyncio.CancelledError:
            raise CommitUnknown from None
        except Exception as exc:
            if _refused(exc):
                raise
            raise CommitUnknown from exc
        if tag != sql.COMMIT:
            raise TransactionAborted


def _refused(exc: BaseException) -> bool:
    """Is `exc` a definite no to COMMIT? Then nothing is committed; anything else leaves it open.

    An ERROR of the server is: it aborts the transaction. FATAL and PANIC are not: the session may have been
    ended while it waited for a standby, after the commit. An `InterfaceError` says that nothing was sent.
    """
    sqlstate = getattr(exc, "sqlstate", None)
    if sqlstate is not None:
        # Not by class: asyncpg makes a warning's class of an ERROR with a code of class 01 or 02.
        return getattr(exc, "severity_en", None) == "ERROR" and sqlstate not in _OUTCOME_UNKNOWN
    return isinstance(exc, asyncpg.InterfaceError)
