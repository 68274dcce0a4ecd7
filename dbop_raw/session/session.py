"""One transaction on one connection: BEGIN, COMMIT and ROLLBACK as explicit SQL, and what if they fail.

What may never happen is here: a connection goes back to its pool inside a transaction; a COMMIT that answered
ROLLBACK passes for done; a COMMIT whose answer was lost passes for done or for not done; a cancelled caller
leaves a COMMIT half known on a healthy server.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

from dbop_raw.driver import sql
from dbop_raw.driver.connection import Connection, discard, is_customised, is_gone
from dbop_raw.driver.underway import EagerCall
from dbop_raw.failure.errors import CommitUnknown, OperationTimeout, RollbackFailed, TransactionAborted
from dbop_raw.failure.policy import Attempts
from dbop_raw.failure.refusal import refuses_commit
from dbop_raw.session.control import State
from dbop_raw.session.frame import Frame
from dbop_raw.session.scope import Scope, register, unregister
from dbop_raw.session.settings import Settings

__all__ = ["Session"]

T = TypeVar("T")


class Session(Scope):
    """One transaction, or one autocommitted operation, on a connection that it does not own.

    Args:
        conn: The connection.
        settings: What the engine's parts share.
        begin: The statement that begins the transaction; None: each statement is its own.
        name: What events call it.
        deadline: The event loop's time at which all of the run must be over; clean-up may take the bound of
            grace more.
        attempts: See `Scope`.
        readonly: See `Scope`.
    """

    __slots__ = ("committed", "deadline", "in_doubt", "name")

    def __init__(
        self,
        conn: Connection,
        settings: Settings,
        *,
        begin: str | None,
        name: str,
        deadline: float = math.inf,
        attempts: dict[object, Attempts] | None = None,
        readonly: bool = False,
    ) -> None:
        super().__init__(conn, settings, begin=begin, attempts=attempts, readonly=readonly)
        self.name = name
        self.deadline = deadline
        # COMMIT was answered with COMMIT. It says so also where the caller's cancellation is what is raised.
        self.committed = False
        # COMMIT was sent, and no answer seen: from that moment on, for a caller may be cancelled so often
        # that nobody waits for the answer.
        self.in_doubt = False

    @property
    def transactional_by_us(self) -> bool:
        """Is there a transaction, or was there, that we begin and end?"""
        return self.control.state is not State.NONE

    # --- up to COMMIT

    async def run(self, step: Callable[[Scope, Frame], Awaitable[T]], frame: Frame) -> T:
        """Run an operation's `step` up to the point where only COMMIT is left.

        On any error or cancellation, roll back.
        """
        register(self)
        try:
            result = await step(self, frame)
            if self.control.must_send:
                await self.flush(frame)
        except BaseException as exc:
            unregister(self)
            await self.rollback(exc)
            raise
        unregister(self)
        return result

    async def begin(self, frame: Frame) -> None:
        """Begin now, for a caller that uses the connection itself, and ends with `end` or `rollback`.

        On any error or cancellation, roll back.
        """
        register(self)
        self.frame = frame
        try:
            await self.flush(frame)
        except BaseException as exc:
            unregister(self)
            await self.rollback(exc)
            raise

    async def end(self, frame: Frame) -> None:
        """Make what `begin` began ready for COMMIT; on any error or cancellation, roll back."""
        unregister(self)
        try:
            self.check_open("the block of engine.transaction()")
            if self.control.must_send:
                await self.flush(frame)
        except BaseException as exc:
            await self.rollback(exc)
            raise

    # --- the two ends

    async def rollback(self, original: BaseException) -> None:
        """ROLLBACK after `original`: shielded, bounded; a connection that does not answer is thrown away.

        Raises:
            RollbackFailed: It could not be done. Not raised where `original` is a cancellation or a timeout:
                those are what the caller waits for, and the server rolls back by itself when the connection
                is gone.
        """
        unregister(self)
        begun = self.control.begun
        self.control.drop()
        if not begun or is_gone(self.conn):
            return
        bounds, now = self.settings.bounds, self.settings.clock()
        # A statement that outlived the timeout its server was given: the server hangs, so don't wait for it
        # long.
        hangs = isinstance(original, OperationTimeout) and not original.by_server
        seconds = bounds.grace if hangs else bounds.cleanup
        deadline = min(now + seconds, max(now, self.deadline) + bounds.grace)
        failure: BaseException | None = None
        try:
            with anyio.CancelScope(shield=True, deadline=deadline) as limit:
                await self.conn.execute(sql.ROLLBACK)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the connection is in doubt
            failure = exc
        except BaseException:
            discard(self.conn)
            raise
        if limit.cancelled_caught:
            failure = TimeoutError(f"the server did not answer ROLLBACK within {deadline - now:.3g} s")
        if failure is None:
            return
        discard(self.conn)
        if isinstance(original, Exception) and not isinstance(original, OperationTimeout):
            try:
                raise RollbackFailed(original=original, rollback_error=failure) from original
            finally:
                # What is raised holds this frame, which must not hold it.
                del original, failure

    async def commit(self, *, still_at_work: Callable[[], Awaitable[bool]] | None = None) -> None:
        """COMMIT, and know what became of it.

        A cancellation waits for the answer, at most the bound for it, and is then raised.

        Args:
            still_at_work: The caller can look up the outcome, and asks by this whether the server is seen to
                be at work on it. Where it is not after the bound for an answer, the answer counts as lost.
                With a deadline it counts as lost after half of the time left: the other half is for the
                look-up.

        Raises:
            TransactionAborted: The server answered ROLLBACK.
            CommitUnknown: The answer was lost.
            Exception: The server's error, where it refused: then nothing is committed.
        """
        if not self.control.begun:
            self.control.drop()
            return
        self.control.drop()
        # Not simply awaited: asyncio's task.cancel() would cancel the COMMIT itself, whatever shields it.
        commit = self.conn.execute(sql.COMMIT)
        if is_customised(self.conn):
            # It may open cancel scopes, which a wait for it must not open others in between of.
            commit = asyncio.ensure_future(commit)
            commit.add_done_callback(_taken_note_of)
        self.in_doubt = True
        answer: EagerCall[str] = EagerCall(commit)
        cancelled: BaseException | None = None
        try:
            await answer.wait(self._patience(can_be_looked_up=still_at_work is not None))
            while not answer.done and still_at_work is not None and math.isinf(self.deadline):
                if not await still_at_work():
                    break
                await answer.wait(self.settings.bounds.answer)
        except BaseException as exc:  # noqa: BLE001 - a cancellation: raised below, when the answer is known
            cancelled = exc
            await self._await_answer(answer)
        try:
            if not answer.done:
                await self._abandon(answer)
            self._judge(answer)
        finally:
            try:
                if cancelled is not None:
                    raise cancelled
            finally:
                # What is raised holds this frame, which must not hold it.
                del answer, cancelled

    def _patience(self, *, can_be_looked_up: bool = False) -> float | None:
        """Seconds to wait for the answer to COMMIT; None: for ever."""
        bounds = self.settings.bounds
        if math.isinf(self.deadline):
            return bounds.answer if can_be_looked_up else None
        left = max(0.0, self.deadline - self.settings.clock())
        if can_be_looked_up:
            return max(bounds.grace, min(bounds.answer, left / 2))
        return left + bounds.grace

    async def _await_answer(self, answer: EagerCall[str]) -> None:
        """Wait on for a bounded time, though the caller is cancelled."""
        patience, commit = self._patience(), self.settings.bounds.commit
        seconds = commit if patience is None else min(commit, patience)
        try:
            with anyio.CancelScope(shield=True):
                await answer.wait(seconds)
        except asyncio.CancelledError:
            # Cancelled twice: whoever does that wants out now, and the connection can't be kept.
            discard(self.conn)

    async def _abandon(self, answer: EagerCall[str]) -> None:
        """No answer came: the connection is worthless, and the outcome unknown."""
        discard(self.conn)
        try:
            with anyio.CancelScope(shield=True):
                await answer.wait(self.settings.bounds.grace)
        finally:
            answer.abandon()

    def _judge(self, answer: EagerCall[str]) -> None:
        """Return where COMMIT was answered with COMMIT; raise what it was otherwise."""
        try:
            tag = answer.result()
        except asyncio.CancelledError:
            raise CommitUnknown from None
        except Exception as exc:
            if refuses_commit(exc):
                self.in_doubt = False
                raise
            raise CommitUnknown from exc
        self.in_doubt = False
        if tag != sql.COMMIT:
            raise TransactionAborted
        self.committed = True


def _taken_note_of(done: asyncio.Future[str]) -> None:
    """Keep asyncio from complaining of an answer that nobody waited for."""
    if not done.cancelled():
        done.exception()
