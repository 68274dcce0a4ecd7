"""`engine.transaction()`: one transaction for a block of plain code, no retry.

It may be entered in one task and left in another, as asyncpg's own can: a test's fixture and an async
generator do that. So no cancel scope stands open while the block runs; a deadline is a timer.
"""

from __future__ import annotations

import asyncio
import math
import sys
from functools import partial
from types import FrameType, TracebackType

import anyio

from dbop_raw.driver import sql
from dbop_raw.driver.connection import Connection, discard
from dbop_raw.engine.capacity import Capacity
from dbop_raw.engine.commit import (
    CommitRecord,
    NotCommitted,
    Resolution,
    resolve_and_tell,
    still_at_work,
)
from dbop_raw.engine.run import NOT_COMMITTED, Work, tell_committed, tell_doubt, tell_rolled_back
from dbop_raw.failure.errors import CommitUnknown, OperationTimeout
from dbop_raw.session.frame import Frame
from dbop_raw.session.scope import cancelled_by_server
from dbop_raw.session.session import Session

__all__ = ["Transaction"]


class Transaction:
    """What `engine.transaction()` gives: enter it once, with `async with`.

    Args:
        capacity: Where the connection comes from.
        begin: The statement that begins the transaction.
        readonly: Was it asked to be READ ONLY?
        seconds: For all of it; None: no limit.
        record: What lets a COMMIT in doubt be looked up; None: it is not.
    """

    def __init__(
        self,
        capacity: Capacity,
        begin: str,
        *,
        readonly: bool,
        seconds: float | None,
        record: CommitRecord | None,
    ) -> None:
        self._capacity = capacity
        self._begin = begin if record is None else sql.join(begin, record.opening())
        self._readonly = readonly
        self._seconds = seconds
        self._record = record
        self._work: Work | None = None
        self._frame = Frame(more_follows=True)
        self._watch: _Watch | None = None

    async def __aenter__(self) -> Connection:
        """Check out a connection and begin.

        Raises:
            OperationTimeout: The deadline was over before that.
        """
        caller = sys._getframe(1)  # noqa: SLF001 - whose block it is, see _Watch
        capacity, seconds = self._capacity, self._seconds
        settings = capacity.settings
        started = settings.clock()
        deadline = math.inf if seconds is None else started + seconds
        self._frame = frame = Frame(deadline, deadline, more_follows=True)
        capacity.began()
        try:
            with anyio.CancelScope(deadline=deadline) as limit:
                checkout = await capacity.acquire()
                session = Session(
                    checkout.conn,
                    settings,
                    begin=self._begin,
                    name="transaction",
                    deadline=deadline,
                    readonly=self._readonly,
                )
                session.on_begin = None if self._record is None else self._record.capture
                work = Work(capacity, checkout, session, started)
                try:
                    await session.begin(frame)
                except BaseException as exc:
                    await self._failed(work, exc)
                    raise
            if limit.cancelled_caught:
                raise OperationTimeout(seconds=seconds or 0.0, by_server=False)  # noqa: TRY301
        except BaseException:
            capacity.ended()
            raise
        self._work = work
        if seconds is not None:
            self._watch = _Watch(deadline, checkout.conn, caller)
        return checkout.conn

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """COMMIT; ROLLBACK after an error.

        Raises:
            OperationTimeout: The deadline was over.
            TransactionAborted: Nothing is committed: COMMIT was answered with ROLLBACK, or its answer was
                lost, and the look-up shows so.
            CommitUnknown: The answer was lost, and it is not known what became of it.
        """
        work, watch = self._work, self._watch
        if work is None:
            raise RuntimeError("leave a transaction only after it was entered, and once")
        self._work = self._watch = None
        try:
            over = watch is not None and watch.stop(error)
            try:
                if error is not None:
                    await work.session.rollback(error)
                    raise error  # noqa: TRY301 - it ends as one that is raised here does
                await work.session.end(self._frame)
            except BaseException as exc:
                await self._failed(work, exc, over=over)
                if exc is error:
                    return
                raise
            await self._commit(work)
        finally:
            del error
            self._capacity.ended()

    async def _failed(self, work: Work, error: BaseException, *, over: bool = False) -> None:
        """Give the connection back; raises `OperationTimeout` where the deadline is what ended the block."""
        by_server = (
            self._seconds is not None
            and cancelled_by_server(error)
            and work.session.ended_by_server(self._frame)
        )
        await work.failed(error)
        if self._seconds is not None and (over or by_server):
            raise OperationTimeout(seconds=self._seconds, by_server=by_server) from error

    async def _commit(self, work: Work) -> None:
        session, record = work.session, self._record
        try:
            await session.commit(
                still_at_work=None if record is None else partial(still_at_work, record, self._capacity)
            )
        except CommitUnknown as doubt:
            await work.failed(doubt)
            if self._readonly and isinstance(doubt.__cause__, Exception):
                raise doubt.__cause__ from None
            tell_doubt(self._capacity, session.name)
            if record is None:
                raise
            await self._look_up(record, session, doubt, work.started)
        except BaseException as exc:
            await work.failed(exc)
            raise
        else:
            await work.done()

    async def _look_up(
        self, record: CommitRecord, session: Session, doubt: CommitUnknown, started: float
    ) -> None:
        resolution = await resolve_and_tell(record, self._capacity, session.deadline, session.name)
        if resolution is Resolution.COMMITTED:
            tell_committed(self._capacity, session.name, 1, started)
        if resolution is Resolution.ABORTED:
            tell_rolled_back(self._capacity, session.name, NOT_COMMITTED)
            raise NotCommitted from doubt
        if resolution is Resolution.UNKNOWN:
            raise CommitUnknown(looked_up=True) from doubt.__cause__


class _Watch:
    """Ends a block at its deadline.

    The task that has entered the block is cancelled only where it is surely inside of it at that moment: the
    frame that entered is among those that the task waits in. Elsewhere (a fixture, an async generator that
    waits at its `yield`) the task does something else, which is none of our business; there the connection is
    thrown away, so that nothing is held any longer, and who comes back to the block is told.
    """

    def __init__(self, deadline: float, conn: Connection, caller: FrameType) -> None:
        self._task = asyncio.current_task()
        self._cancelling = 0 if self._task is None else self._task.cancelling()
        self._caller: FrameType | None = caller
        self._conn = conn
        self._over = self._cancelled = False
        self._timer = asyncio.get_running_loop().call_at(deadline, self._end)

    def _end(self) -> None:
        self._over = True
        if self._task is not None and not self._task.done() and _waits_in(self._task, self._caller):
            self._cancelled = True
            self._task.cancel()
        else:
            discard(self._conn)

    def stop(self, error: BaseException | None) -> bool:
        """The block is left with `error`: was it the deadline that ended it?"""
        self._timer.cancel()
        self._caller = None
        if not self._over:
            return False
        if not self._cancelled or self._task is None:
            return True
        # As asyncio.timeout does: where somebody else has cancelled the task as well, that is what counts.
        alone = self._task.uncancel() <= self._cancelling
        return alone and isinstance(error, asyncio.CancelledError)


def _waits_in(task: asyncio.Task[object], frame: FrameType | None) -> bool:
    """Is `frame` among those that `task` waits in?"""
    waiting: object = task.get_coro()
    while waiting is not None:
        for kind in ("cr", "gi", "ag"):
            found = getattr(waiting, f"{kind}_frame", None)
            if found is not None:
                break
        else:
            return False
        if found is frame:
            return True
        waiting = getattr(waiting, "gi_yieldfrom" if kind == "gi" else f"{kind}_await", None)
    return False
