"""`Scope`: one connection in one transaction, as the combinators see it.

Control SQL gathers here, and is sent as one message just before the next body runs; what went wrong is undone
here, up to a savepoint. A body is run here, and an operation that a body calls finds its scope here.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import CoroutineType
from typing import Any, TypeVar

import anyio
import asyncpg

from dbop_raw.driver import sql
from dbop_raw.driver.connection import CLEANUP_SECONDS, GRACE_SECONDS, Connection, discard, is_gone
from dbop_raw.driver.underway import now
from dbop_raw.events import Event, Observer, notify
from dbop_raw.failure.classify import classify
from dbop_raw.failure.errors import RollbackFailed, TransactionMisuse
from dbop_raw.failure.policy import Attempts, RetryBudget
from dbop_raw.failure.sqlstate import Repair, Rule, Verdict

__all__ = ["Scope", "name_of", "register", "scope_of", "unregister"]

T = TypeVar("T")

# The scope that each connection in use belongs to, so that an operation called by a body joins the
# transaction that body runs in. A scope holds its connection, so an id here can't be taken over by another
# object.
_scopes: dict[int, Scope] = {}


@dataclass(slots=True, eq=False)
class _Mark:
    """An open savepoint, and the limits that were in force when it was set: ROLLBACK TO undoes SET LOCAL."""

    depth: int
    in_force: sql.Limits | None
    saved: bool
    root: bool = False
    """It stands where the transaction begins: BEGIN does for it, and no subtransaction is needed."""
    there: bool = True
    """False: the server refused to set it, because the transaction had failed before."""


class Scope:
    """The state of one connection in one transaction, as the combinators see it: not shared, not reused.

    `transactional` is False where each statement is its own transaction: then no control SQL is sent at all.
    """

    __slots__ = (
        "_begin",
        "_in_force",
        "_marks",
        "_must_send",
        "_opened",
        "_pending",
        "_released",
        "_saved",
        "attempts",
        "budget",
        "calls",
        "check_at_commit",
        "conn",
        "constraints_immediate",
        "continues",
        "observer",
        "overrides",
        "readonly",
        "retries",
        "total",
        "transactional",
        "until",
        "want",
    )

    def __init__(
        self,
        conn: Connection,
        *,
        transactional: bool,
        begin: str | None = None,
        observer: Observer | None = None,
        overrides: Mapping[str, Rule] | None = None,
        budget: RetryBudget | None = None,
        attempts: dict[object, Attempts] | None = None,
        readonly: bool = False,
    ) -> None:
        self.conn = conn
        self.transactional = transactional
        self.observer = observer
        self.overrides = overrides
        self.budget = budget
        self.readonly = readonly
        # By the key of the retrying operation; one dict serves all tries of a run, so that its levels count
        # together.
        self.attempts: dict[object, Attempts] = {} if attempts is None else attempts
        # How often each retrying operation was called in this transaction: a second call counts for itself.
        self.calls: dict[object, int] = {}
        # Starts after the first, at any level inside this scope: for statistics.
        self.retries = 0
        # May more SQL follow in this transaction after the operation that runs now? If so, limits must be put
        # back.
        self.continues = False
        # Deferred constraints: is COMMIT trusted to check them for an operation that can blame an item, if
        # they are checked before? And has that been tried, and failed, so that this time they are?
        self.check_at_commit = False
        self.constraints_immediate = False
        # The limits that the next body is to run under; None: the session's own.
        self.want: sql.Limits | None = None
        # The event loop's time at which the tightest timeout or deadline of ours runs out.
        self.until = math.inf
        # The same for a timeout around the retry whose policy the run has taken for its own: one for all
        # its transactions.
        self.total = math.inf
        self._in_force: sql.Limits | None = None
        self._saved = False
        # What begins the transaction, where that is for us to do.
        self._begin = begin
        self._pending: list[str] = [] if begin is None else [begin]
        self._must_send = False
        self._marks: list[_Mark] = []
        # What the SQL that waits opens and releases.
        self._opened: list[_Mark] = []
        self._released: list[_Mark] = []

    def emit(self, event: Event) -> None:
        """Tell the observer. Callers test `observer` first, so that no event is made for nobody."""
        if self.observer is not None:
            notify(self.observer, event)

    def verdict(self, exc: BaseException) -> Verdict:
        """`classify` with this engine's own rows, and with what the connection's state adds."""
        verdict = classify(exc, overrides=self.overrides, closed=is_gone(self.conn))
        if self.readonly and verdict.sqlstate == "25006":
            # The caller asked for READ ONLY and wrote all the same: no fail-over, and no other server would
            # let it.
            return replace(verdict, repair=Repair.NEVER, evict=False)
        return verdict

    def attempts_of(self, key: object) -> Attempts:
        """How often the body of `key` has started in this run, whatever the level that started it.

        One more call in the same transaction counts for itself; the same in the next transaction goes on.
        """
        call = self.calls.get(key, 0)
        self.calls[key] = call + 1
        if call:
            key = (key, call)
        found = self.attempts.get(key)
        if found is None:
            found = self.attempts[key] = Attempts(since=now())
        return found

    # --- control SQL: gathered here, sent by flush

    def push(self, statement: str) -> None:
        """Leave `statement` to be sent before the next body."""
        self._pending.append(statement)

    @property
    def pending(self) -> bool:
        """Is there SQL that has not been sent?"""
        return bool(self._pending)

    @property
    def must_send(self) -> bool:
        """Is there SQL that COMMIT does not make needless: a ROLLBACK TO?"""
        return self._must_send

    def savepoint(self, *, or_begin: bool = False) -> None:
        """Open a savepoint before the next body.

        `or_begin`: none where nothing has been done since BEGIN, for ROLLBACK and BEGIN undo the same. That
        spares the server a subtransaction, with a transaction id of its own; but what is tried again begins
        a new transaction, with another time and snapshot.
        """
        mark = _Mark(len(self._marks) + 1, self._in_force, self._saved, root=or_begin and self._at_begin)
        if not mark.root:
            self._pending.append(sql.savepoint(mark.depth))
            self._opened.append(mark)
        self._marks.append(mark)

    @property
    def _at_begin(self) -> bool:
        """Is BEGIN the last that waits to be sent? Then nothing has been done since."""
        return self._begin is not None and bool(self._pending) and self._pending[-1] is self._begin

    @property
    def begins(self) -> bool:
        """Does what waits to be sent begin the transaction, for the first time or again?"""
        return self._begin is not None and self._begin in self._pending

    def rollback_to(self) -> None:
        """Undo all since the newest savepoint, which stays open."""
        mark = self._marks[-1]
        if mark.there:
            self._back_to(mark)

    def _back_to(self, mark: _Mark) -> None:
        if not mark.root:
            self._pending.append(sql.rollback_to(mark.depth))
        elif self._begin is not None and not self._at_begin:
            self._pending += (sql.ROLLBACK, self._begin)
        else:
            return
        self._in_force, self._saved = mark.in_force, mark.saved
        self._must_send = True

    def release(self) -> None:
        """Close the newest savepoint, and keep what was done since."""
        mark = self._marks.pop()
        if mark.there:
            self._release(mark)
            self._released.append(mark)

    def _release(self, mark: _Mark) -> None:
        if not mark.root:
            self._pending.append(sql.release(mark.depth))

    def abandon(self) -> None:
        """Undo all since the newest savepoint and close it: the depth is what it was before."""
        self.rollback_to()
        self.release()

    def drop_pending(self) -> None:
        """Forget what was not sent: the transaction is over, or never began."""
        self._pending.clear()
        self._opened, self._released = [], []
        self._must_send = False

    def _limits(self) -> str:
        want, have = self.want, self._in_force
        if want == have or not self.transactional:
            return ""
        statements = []
        began = want is not None and any(
            w is not None and (have is None or have[n] is None) for n, w in enumerate(want)
        )
        if began and self.continues and not self._saved:
            statements.append(sql.save_limits())
            self._saved = True
        lowered = have is not None and (
            want is None or any(w is None and h is not None for w, h in zip(want, have, strict=True))
        )
        if lowered and self._saved:
            statements.append(sql.restore_limits())
        if want is not None:
            statements.append(sql.set_limits(want))
        self._in_force = want
        return sql.join(*filter(None, statements))

    def take(self) -> str:
        """All SQL that waits, and the limits where they change, as one message; empty when there is none."""
        limits = self._limits()
        if limits:
            self._pending.append(limits)
        message = sql.join(*self._pending)
        self.drop_pending()
        return message

    async def flush(self) -> None:
        """Send what has gathered, in one round trip; none where nothing has."""
        if self._pending or self.want != self._in_force:
            opened, released = self._opened, self._released
            message = self.take()
            if message:
                try:
                    await self.conn.execute(message)
                except asyncpg.InFailedSQLTransactionError:
                    self._nothing_done(opened, released)
                    raise

    def _nothing_done(self, opened: Sequence[_Mark], released: Sequence[_Mark]) -> None:
        """A body swallowed an error, so the server refused a message from its first word on.

        What the message was to open is not there, and what it was to release is: that is undone instead.
        """
        for mark in opened:
            mark.there = False
        kept = [mark for mark in released if mark.there]
        if kept:
            outermost = min(kept, key=lambda mark: mark.depth)
            self._back_to(outermost)
            self._release(outermost)

    async def repair(self, original: BaseException, seconds: float = CLEANUP_SECONDS) -> None:
        """Send what makes the transaction usable again after `original`: shielded, at most `seconds`.

        Nor longer than `GRACE_SECONDS` after the tightest timeout or deadline of ours. A connection that
        can't be cleaned is thrown away, and `RollbackFailed` is raised with both causes.
        """
        if not self._pending or is_gone(self.conn):
            return
        now = anyio.current_time()
        seconds = min(seconds, max(0.0, self.until - now) + GRACE_SECONDS)
        try:
            with anyio.CancelScope(shield=True, deadline=now + seconds) as limit:
                await self.flush()
        except asyncpg.InvalidSavepointSpecificationError:
            # It was never set: its message was cancelled. The transaction has failed now, and can't be
            # committed.
            return
        except Exception as exc:  # noqa: BLE001 - whatever it is, the connection is in doubt
            discard(self.conn)
            raise RollbackFailed(original=original, rollback_error=exc, savepoint=True) from original
        except BaseException:
            discard(self.conn)
            raise
        if limit.cancelled_caught:
            discard(self.conn)
            failure = TimeoutError(f"the server did not answer ROLLBACK TO within {seconds:.3g} s")
            raise RollbackFailed(original=original, rollback_error=failure, savepoint=True) from original

    # --- bodies

    async def body(self, function: Callable[[Any], Awaitable[T]]) -> T:
        """Run user code: send what has gathered, then call it with the connection."""
        if self._pending or self.want != self._in_force:
            await self.flush()
        try:
            awaitable = function(self.conn)
            if type(awaitable) is not CoroutineType and not inspect.isawaitable(awaitable):
                message = (
                    f"{name_of(function)} returned {type(awaitable).__name__}, which can't be awaited: an "
                    "operation is an "
                    "async def, or returns the awaitable of one"
                )
                raise TypeError(message)
            result = await awaitable
        except asyncpg.InterfaceError as exc:
            if self.transactional and _raised_in(exc, "asyncpg.transaction"):
                raise TransactionMisuse(_NO_DRIVER_TRANSACTION.format(name=name_of(function))) from exc
            raise
        self.check_open(function)
        return result

    def check_open(self, code: object) -> None:
        """Raise `TransactionMisuse` when user code (a function, or its name) has ended the transaction."""
        if self.transactional and not self.conn.is_in_transaction():
            name = code if isinstance(code, str) else name_of(code)
            raise TransactionMisuse(_ENDED_BY_BODY.format(name=name))

    async def call(self, step: Callable[[Scope], Awaitable[T]]) -> T:
        """Run an operation's `step` for a body.

        More of that body follows, so nothing is left unsent and the limits are put back.
        """
        continues, want = self.continues, self.want
        self.continues = True
        try:
            result = await step(self)
            self.continues, self.want = continues, want
            await self.flush()
        except BaseException as exc:
            self.want = want
            await self.repair(exc)
            raise
        finally:
            self.continues, self.want = continues, want
        return result


def name_of(function: object) -> str:
    """A readable name of anything that can be called."""
    while isinstance(function, functools.partial):
        function = function.func
    # A function has the first, an operation the second.
    name = getattr(function, "__qualname__", None) or getattr(function, "name", None)
    return name if isinstance(name, str) else type(function).__qualname__


_NO_DRIVER_TRANSACTION = (
    "{name} called conn.transaction(), but it runs inside a transaction that dbop_raw began. For a nested "
    "scope use "
    "`await savepoint(op)(conn)`; for a transaction of its own give the operation to engine.run(); to write"
    " plain code "
    "with conn.transaction(), take a connection with the pool's own acquire()"
)
_ENDED_BY_BODY = (
    "{name} ended the transaction itself (COMMIT, ROLLBACK or END in its SQL): the transaction belongs to "
    "the scope that began it. "
    "Take that statement out; raise an error to roll back; for a part that may fail use savepoint(op)"
)


def _raised_in(exc: BaseException, module: str) -> bool:
    """Did the innermost Python frame of `exc` belong to `module`? Messages are no contract.

    Where it was raised is.
    """
    trace = exc.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    return bool(trace.tb_frame.f_globals.get("__name__") == module)


def register(scope: Scope) -> None:
    """From now on, an operation called with the scope's connection joins the scope."""
    _scopes[id(scope.conn)] = scope


def unregister(scope: Scope) -> None:
    """The scope is over."""
    _scopes.pop(id(scope.conn), None)


def scope_of(conn: Connection) -> Scope | None:
    """The scope that `conn` is used by now, if dbop_raw began it."""
    return _scopes.get(id(conn))
