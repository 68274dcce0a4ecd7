"""`Scope`: one connection in one transaction, as the combinators see it.

A scope is a control buffer (SQL that has gathered, sent as one message just before the next body), a registry
of attempts, and frozen settings; what holds for one step comes as a `Frame`. A body is run here, what went
wrong is undone here up to a savepoint, and an operation that a body calls finds its scope here.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import CoroutineType
from typing import Any, TypeVar

import anyio
import asyncpg

from dbop_raw.driver.connection import Connection, discard, is_gone
from dbop_raw.driver.counting import CountingConnection
from dbop_raw.failure.classify import Phase, classify
from dbop_raw.failure.errors import RollbackFailed, TransactionMisuse
from dbop_raw.failure.policy import Attempts
from dbop_raw.failure.sqlstate import Repair, Verdict
from dbop_raw.session.control import ControlBuffer, State
from dbop_raw.session.frame import OUTERMOST, Frame
from dbop_raw.session.settings import DEFAULTS, Settings

__all__ = ["Scope", "cancelled_by_server", "name_of", "register", "scope_of", "unregister"]

T = TypeVar("T")

# The server's clock and ours may disagree by so much (seconds) on how long a statement took.
_CLOCK_SLACK = 0.005

# Looked up for each body, and an enum's member is dear to look up.
_NONE = State.NONE

# The scope that each connection in use belongs to, so that an operation called by a body joins the
# transaction that body runs in. A scope holds its connection, so an id here can't be taken over by another
# object.
_scopes: dict[int, Scope] = {}


class Scope:
    """One connection in one transaction: not shared between tasks, not used again.

    Args:
        conn: The connection.
        settings: What the engine's parts share.
        begin: The statement that begins the transaction, which is then ours to begin; None where each
            statement is its own, or where somebody else may have begun one.
        attempts: By the key of each retrying operation, how often its body has started in this run; one dict
            serves all transactions of a run, so that its levels count together.
        readonly: Was the transaction asked to be READ ONLY?
    """

    __slots__ = (
        "_innermost",
        "attempts",
        "calls",
        "check_at_commit",
        "conn",
        "constraints_immediate",
        "control",
        "frame",
        "on_begin",
        "readonly",
        "retries",
        "settings",
        "uncounted",
    )

    def __init__(
        self,
        conn: Connection,
        settings: Settings = DEFAULTS,
        *,
        begin: str | None = None,
        attempts: dict[object, Attempts] | None = None,
        readonly: bool = False,
    ) -> None:
        self.conn = conn
        self.settings = settings
        self.control = ControlBuffer(begin)
        self.readonly = readonly
        self.attempts: dict[object, Attempts] = {} if attempts is None else attempts
        # Called when a transaction of ours has begun, and when it has begun anew.
        self.on_begin: Callable[[Connection], None] | None = None
        # The connection itself, where `conn` stands for it and counts.
        self.uncounted: Connection | None = None
        # How often each retrying operation was called in this transaction: a second call counts for itself.
        self.calls: dict[object, int] = {}
        # Starts after the first, at any level inside this scope: for statistics.
        self.retries = 0
        # Deferred constraints: is COMMIT trusted to check them for an operation that can blame an item, if
        # they are checked before? And has that been tried, and failed, so that this time they are?
        self.check_at_commit = False
        self.constraints_immediate = False
        # What the code that runs now has to keep: a body, with the operations that it calls, or a batch.
        self.frame = OUTERMOST
        # The innermost operation that a body of this scope has called and that is not done.
        self._innermost: _Call | None = None

    @property
    def transactional(self) -> bool:
        """Is there a transaction, ours or one that was begun on the connection by other code?

        Asked when it matters, since a body may begin one of its own where we have none.
        """
        return self.control.state is not _NONE or bool(self.conn.is_in_transaction())

    def counting(self) -> CountingConnection:
        """Count the statements that bodies send from now on: they get a connection that does."""
        if self.uncounted is None:
            self.uncounted, self.conn = self.conn, CountingConnection(self.conn)
            register(self)
        counting: CountingConnection = self.conn
        return counting

    def verdict(self, exc: BaseException) -> Verdict:
        """`classify` with this engine's own rows, and with what the connection's state adds."""
        gone = is_gone(self.conn)
        # A connection that is gone can't be asked.
        inside = self.control.state is not _NONE or (not gone and self.conn.is_in_transaction())
        phase = Phase.BODY if inside else Phase.STATEMENT
        verdict = classify(exc, overrides=self.settings.verdicts, closed=gone, phase=phase)
        if self.readonly and verdict.sqlstate == "25006":
            # The caller asked for READ ONLY and wrote all the same: no fail-over, and no other server would
            # let it.
            return replace(verdict, repair=Repair.NEVER, evict=False)
        return verdict

    def attempts_of(self, key: object) -> Attempts:
        """Give the count of how often the body of `key` has started in this run, whatever the level.

        One more call in the same transaction counts for itself; the same in the next transaction goes on.
        """
        call = self.calls.get(key, 0)
        self.calls[key] = call + 1
        if call:
            key = (key, call)
        found = self.attempts.get(key)
        if found is None:
            found = self.attempts[key] = Attempts(since=self.settings.clock())
        return found

    # --- messages

    async def flush(self, frame: Frame | None = None) -> None:
        """Send what has gathered in one round trip; none where there is nothing.

        Args:
            frame: Whose limits the server is to keep from now on; None: those of the code that runs now.
        """
        frame = self.frame if frame is None else frame
        control, clock = self.control, self.settings.clock
        limited = self.transactional
        if not control.waiting and not (limited and control.stale(frame, clock)):
            return
        opened, released = control.marks_on_their_way()
        begins = self.on_begin is not None and control.begins
        message = control.take(frame, clock, limited=limited)
        if not message:
            return
        try:
            await self.conn.execute(message)
        except asyncpg.InFailedSQLTransactionError:
            control.nothing_done(opened, released)
            raise
        if begins and self.on_begin is not None:
            self.on_begin(self.conn)

    def ended_by_server(self, frame: Frame) -> bool:
        """Did the statement that was just cancelled run into the timeout that was told for `frame`?

        57014 is also what `pg_cancel_backend()` gives; only the time tells them apart, for the text is
        translated.
        """
        told = self.control.told_last
        return (
            told is not None
            and told.deadline == frame.server_deadline
            and self.settings.clock() >= told.expires - _CLOCK_SLACK
        )

    async def repair(
        self, original: BaseException, frame: Frame | None = None, seconds: float | None = None
    ) -> None:
        """Send what makes the transaction usable again after `original`: shielded and bounded.

        Args:
            original: The error that is undone.
            frame: Of the code that goes on; None: of the code that runs now.
            seconds: The longest it may take; None: the bound for clean-up. Never longer than the bound of
                grace after the tightest timeout or deadline of ours.

        Raises:
            RollbackFailed: The connection could not be cleaned, and was thrown away.
        """
        if not self.control.waiting or is_gone(self.conn):
            return
        frame = self.frame if frame is None else frame
        bounds, now = self.settings.bounds, self.settings.clock()
        seconds = bounds.cleanup if seconds is None else seconds
        seconds = min(seconds, max(0.0, frame.deadline - now) + bounds.grace)
        try:
            with anyio.CancelScope(shield=True, deadline=now + seconds) as limit:
                await self.flush(frame)
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

    async def body(self, function: Callable[[Any], Awaitable[T]], frame: Frame) -> T:
        """Run user code: send what has gathered, then call it with the connection."""
        control = self.control
        if control.waiting or control.told is not None or frame.server_deadline != math.inf or frame.lock:
            await self.flush(frame)
        outer, self.frame = self.frame, frame
        try:
            awaitable = function(self.conn)
            if type(awaitable) is not CoroutineType and not inspect.isawaitable(awaitable):
                raise TypeError(
                    f"{name_of(function)} returned {type(awaitable).__name__}, which can't be awaited: an "
                    "operation is an async def, or returns the awaitable of one"
                )
            result = await awaitable
        except asyncpg.InterfaceError as exc:
            if self.control.state is not _NONE and _raised_in(exc, "asyncpg.transaction"):
                raise TransactionMisuse(_NO_DRIVER_TRANSACTION.format(name=name_of(function))) from exc
            raise
        finally:
            self.frame = outer
        self.check_open(function)
        return result

    @contextlib.contextmanager
    def running(self, frame: Frame) -> Iterator[None]:
        """Mark code of ours that works like a body: what it sends, and what it calls, keeps `frame`."""
        outer, self.frame = self.frame, frame
        try:
            yield
        finally:
            self.frame = outer

    def check_open(self, code: object) -> None:
        """Raise `TransactionMisuse` when user code (a function, or its name) has ended our transaction."""
        if self.control.state is not _NONE and not self.conn.is_in_transaction():
            name = code if isinstance(code, str) else name_of(code)
            raise TransactionMisuse(_ENDED_BY_BODY.format(name=name))

    async def call(self, step: Callable[[Scope, Frame], Awaitable[T]]) -> T:
        """Run an operation's `step` for a body of this scope.

        More of that body follows, so nothing is left unsent and the limits are put back.

        Raises:
            TransactionMisuse: Another task has called an operation with the same connection, and it is not
                done: the two would undo each other's work.
        """
        outer = self._innermost
        if _caller_in(self) is not outer:
            raise TransactionMisuse(_USED_BY_ANOTHER_TASK)
        frame = self.frame
        call = self._innermost = _Call(self, _calling.get())
        token = _calling.set(call)
        try:
            result = await step(self, frame if frame.more_follows else frame._replace(more_follows=True))
            await self.flush(frame)
        except BaseException as exc:
            await self.repair(exc, frame)
            raise
        finally:
            self._innermost = outer
            call.scope = None
            _calling.reset(token)
        return result


@dataclass(slots=True, eq=False)
class _Call:
    """An operation that a body has called; `parent` is the one whose body did, on whatever connection."""

    scope: Scope | None
    """None when it is over: tasks that its body has started, and that go on, have it in their context."""
    parent: _Call | None


# The innermost call that the current task is in. A task that a body starts inherits it, and so may call
# operations where the body could; a task beside it can't.
_calling: ContextVar[_Call | None] = ContextVar("dbop_raw_calling", default=None)


def _caller_in(scope: Scope) -> _Call | None:
    """The innermost call of `scope` that the current task is in; None: it is in the run's own body."""
    call = _calling.get()
    while call is not None and call.scope is not scope:
        call = call.parent
    return call


def cancelled_by_server(exc: BaseException) -> bool:
    """Did the server cancel a statement, and nothing else fail? Of a group of errors, each has to be that."""
    if isinstance(exc, BaseExceptionGroup):
        return all(cancelled_by_server(leaf) for leaf in exc.exceptions)
    return isinstance(exc, asyncpg.QueryCanceledError)


def name_of(function: object) -> str:
    """Give a readable name of anything that can be called."""
    while isinstance(function, functools.partial):
        function = function.func
    # A function has the first, an operation the second.
    name = getattr(function, "__qualname__", None) or getattr(function, "name", None)
    return name if isinstance(name, str) else type(function).__qualname__


_NO_DRIVER_TRANSACTION = (
    "{name} called conn.transaction(), but it runs inside a transaction that dbop_raw began. For a nested "
    "scope use `await savepoint(op)(conn)`; for a transaction of its own give the operation to engine.run(); "
    "to write plain code with conn.transaction(), take a connection with the pool's own acquire()"
)
_ENDED_BY_BODY = (
    "{name} ended the transaction itself (COMMIT, ROLLBACK or END in its SQL): the transaction belongs to "
    "the scope that began it. Take that statement out; raise an error to roll back; for a part that may fail "
    "use savepoint(op)"
)
_USED_BY_ANOTHER_TASK = (
    "two tasks call operations with one connection at once: their savepoints would undo each other's work. "
    "Await one after the other, or give each task a connection of its own with engine.run()"
)


def _raised_in(exc: BaseException, module: str) -> bool:
    """Did the innermost Python frame of `exc` belong to `module`? Messages are no contract; the place is."""
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
    if scope.uncounted is not None:
        _scopes.pop(id(scope.uncounted), None)


def scope_of(conn: Connection) -> Scope | None:
    """Give the scope that `conn` is used by now, if dbop_raw began it."""
    return _scopes.get(id(conn))
