"""`Operation`, and how operations are joined: `operation`, `pipe`, `chain`.

An operation is opening SQL, a body, and closing SQL. The combinators do not send their SQL: they leave it
with the `Scope`, and the scope sends what has gathered as *one* message just before the next body runs. So
BEGIN, SAVEPOINT and SET LOCAL cost one round trip together, the end of one span travels with the start of the
next, and what COMMIT does anyway (releasing savepoints, ending SET LOCAL) is never sent.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import CoroutineType, FunctionType
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeAlias, TypeVar

import anyio
import asyncpg

from dbop_raw import sql
from dbop_raw.classify import classify
from dbop_raw.errors import RollbackFailed, TransactionMisuse
from dbop_raw.events import Event, Observer, notify
from dbop_raw.policy import RetryBudget, RetryPolicy, Tries
from dbop_raw.sqlstate import Repair, Rule, Verdict
from dbop_raw.underway import now

__all__ = [
    "CLEANUP_SECONDS",
    "GRACE_SECONDS",
    "AnyOperation",
    "Connection",
    "Operation",
    "Scope",
    "Wrapper",
    "chain",
    "discard",
    "is_gone",
    "name_of",
    "operation",
    "pipe",
    "scope_of",
    "to_operation",
]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
P = ParamSpec("P")

Connection: TypeAlias = Any
"""What a body is given: an `asyncpg.Connection`, or the proxy that asyncpg's pool hands out for one."""

AnyOperation: TypeAlias = Callable[[Any], Awaitable[T]]
"""An `Operation[T]`, or anything else that is called with a connection and gives an awaitable of T."""

CLEANUP_SECONDS = 2.0
"""The longest that ROLLBACK, ROLLBACK TO or a release may take before the connection is thrown away."""
GRACE_SECONDS = 0.2
"""The same, once a deadline is over or a server did not keep its own timeout: it hangs, most likely."""

# The scope that each connection in use belongs to, so that an operation called by a body joins the
# transaction that body runs in. A scope holds its connection, so an id here can't be taken over by another
# object.
_scopes: dict[int, Scope] = {}


def is_gone(conn: Connection) -> bool:
    """Is the connection closed? A pool's proxy can't be asked once the pool has taken a lost one back."""
    try:
        return bool(conn.is_closed())
    except asyncpg.InterfaceError:
        return True


def discard(conn: Connection) -> None:
    """Throw the connection away, at once; nothing where that has happened already."""
    with contextlib.suppress(asyncpg.InterfaceError):
        conn.terminate()


@dataclass(slots=True, eq=False)
class _Mark:
    """An open savepoint, and the limits that were in force when it was set: ROLLBACK TO undoes SET LOCAL."""

    depth: int
    in_force: sql.Limits | None
    saved: bool
    there: bool = True
    """False: the server refused to set it, because the transaction had failed before."""


class Scope:
    """The state of one connection in one transaction, as the combinators see it: not shared, not reused.

    `transactional` is False where each statement is its own transaction: then no control SQL is sent at all.
    """

    __slots__ = (
        "_in_force",
        "_marks",
        "_must_send",
        "_opened",
        "_pending",
        "_released",
        "_saved",
        "budget",
        "calls",
        "careful",
        "check_at_commit",
        "conn",
        "continues",
        "observer",
        "overrides",
        "readonly",
        "retries",
        "total",
        "transactional",
        "tries",
        "until",
        "want",
    )

    def __init__(
        self,
        conn: Connection,
        *,
        transactional: bool,
        observer: Observer | None = None,
        overrides: Mapping[str, Rule] | None = None,
        budget: RetryBudget | None = None,
        tries: dict[object, Tries] | None = None,
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
        self.tries: dict[object, Tries] = {} if tries is None else tries
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
        self.careful = False
        # The limits that the next body is to run under; None: the session's own.
        self.want: sql.Limits | None = None
        # The event loop's time at which the tightest timeout or deadline of ours runs out.
        self.until = math.inf
        # The same for a timeout around the retry whose policy the run has taken for its own: one for all
        # its transactions.
        self.total = math.inf
        self._in_force: sql.Limits | None = None
        self._saved = False
        self._pending: list[str] = []
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

    def tries_of(self, key: object) -> Tries:
        """How often the body of `key` has started in this run, whatever the level that started it.

        One more call in the same transaction counts for itself; the same in the next transaction goes on.
        """
        call = self.calls.get(key, 0)
        self.calls[key] = call + 1
        if call:
            key = (key, call)
        found = self.tries.get(key)
        if found is None:
            found = self.tries[key] = Tries(since=now())
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

    def savepoint(self) -> None:
        """Open a savepoint before the next body."""
        mark = _Mark(len(self._marks) + 1, self._in_force, self._saved)
        self._pending.append(sql.savepoint(mark.depth))
        self._marks.append(mark)
        self._opened.append(mark)

    def rollback_to(self) -> None:
        """Undo all since the newest savepoint, which stays open."""
        mark = self._marks[-1]
        if mark.there:
            self._back_to(mark)

    def _back_to(self, mark: _Mark) -> None:
        self._pending.append(sql.rollback_to(mark.depth))
        self._in_force, self._saved = mark.in_force, mark.saved
        self._must_send = True

    def release(self) -> None:
        """Close the newest savepoint, and keep what was done since."""
        mark = self._marks.pop()
        if mark.there:
            self._pending.append(sql.release(mark.depth))
            self._released.append(mark)

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
            self._pending.append(sql.release(outermost.depth))

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
        self.check_open(name_of(function))
        return result

    def check_open(self, name: str) -> None:
        """Raise `TransactionMisuse` when user code, called `name`, has ended the transaction by itself."""
        if self.transactional and not self.conn.is_in_transaction():
            raise TransactionMisuse(_ENDED_BY_BODY.format(name=name))

    async def call(self, op: Operation[T]) -> T:
        """Run `op` for a body.

        More of that body follows, so nothing is left unsent and the limits are put back.
        """
        continues, want = self.continues, self.want
        self.continues = True
        try:
            result = await op.step(self)
            self.continues, self.want = continues, want
            await self.flush()
        except BaseException as exc:
            self.want = want
            await self.repair(exc)
            raise
        finally:
            self.continues, self.want = continues, want
        return result


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


@dataclass(frozen=True, slots=True, repr=False)
class Operation(Generic[T_co]):
    """A piece of database work that waits for a connection: immutable, and run as often as it is called.

    Give it to `Engine.run`, or call it with a connection inside another operation: `await op(conn)` joins the
    transaction that the connection is in.
    """

    step: Callable[[Scope], Awaitable[T_co]] = field(repr=False)
    """How it runs in a scope: for the combinators, not for callers."""
    name: str
    """The body's name, for events and messages."""
    policy: RetryPolicy | None = None
    """The outermost retry policy of the pipeline: `Engine.run` uses it when it was given none."""
    text: str = ""
    """The pipeline as nested calls; empty: the name."""
    key: object = None
    """What the starts of the outermost `retry` are counted under."""
    limit: float | None = None
    """Seconds: the tightest timeout around the outermost `retry`, which all its starts together have."""

    def __repr__(self) -> str:
        """The nesting, outermost first; never an argument's value."""
        return self.text or self.name

    async def __call__(self, conn: Connection) -> T_co:
        """Run with `conn`: in the transaction it is in, if any; else each statement is its own."""
        scope = _scopes.get(id(conn))
        if scope is not None:
            return await scope.call(self)
        scope = Scope(conn, transactional=conn.is_in_transaction())
        register(scope)
        try:
            return await scope.call(self)
        finally:
            unregister(scope)


class Wrapper(Protocol):
    """What `pipe` and `chain` take: makes an operation from an operation, and keeps its result's type."""

    def __call__(self, op: AnyOperation[T], /) -> Operation[T]:
        """Wrap `op`."""
        ...


def name_of(function: object) -> str:
    """A readable name of anything that can be called."""
    while isinstance(function, functools.partial):
        function = function.func
    name = (
        getattr(function, "name", None)
        if isinstance(function, Operation)
        else getattr(function, "__qualname__", None)
    )
    return name if isinstance(name, str) else type(function).__qualname__


def _kind(thing: object) -> str:
    """What a message says of a thing that is not what it should be: it may be an item, or hold a secret."""
    return (
        f"the class {thing.__qualname__}"
        if isinstance(thing, type)
        else f"an object of type {type(thing).__name__}"
    )


def to_operation(op: AnyOperation[T]) -> Operation[T]:
    """`op` itself if it is an `Operation`, else one whose body is `op`.

    Raises `TypeError` at once for what can't be called with a connection, such as a coroutine that was made
    already.
    """
    if isinstance(op, Operation):
        return op
    if type(op) is not FunctionType or op.__code__.co_flags & _GENERATORS:
        _check_callable(op)
    function = op

    async def step(scope: Scope) -> T:
        return await scope.body(function)

    return Operation(step, name_of(function))


_GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


def _check_callable(op: object) -> None:
    """Raise `TypeError` for what can't be called with a connection."""
    if inspect.isawaitable(op):
        if inspect.iscoroutine(op):
            op.close()
        message = (
            f"{_kind(op)} is an awaitable that exists already and can run only once: give the function "
            "itself, or `lambda conn: f(conn, …)`, so that it can be called with a connection, and again for "
            "a retry"
        )
        raise TypeError(message)
    if isinstance(op, type) or not callable(op):
        message = (
            f"{_kind(op)} is not an operation: give an async function that takes a connection, or what "
            "@operation makes"
        )
        raise TypeError(message)
    if inspect.isgeneratorfunction(op) or inspect.isasyncgenfunction(op):
        message = (
            f"{name_of(op)} is a generator function: an operation returns one result; collect the rows and "
            "return them"
        )
        raise TypeError(message)


def _plain_arguments(signature: inspect.Signature) -> tuple[int, int]:
    """How many positional arguments, beside the connection, surely fit; (1, 0) where that can't be said."""
    plain = [
        p for p in signature.parameters.values() if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}
    ]
    needed = [p for p in plain if p.default is p.empty]
    keywords = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    return (1, 0) if keywords or not needed else (len(needed) - 1, len(plain) - 1)


def operation(function: Callable[Concatenate[Any, P], Awaitable[T]]) -> Callable[P, Operation[T]]:
    """Make `async def f(conn, *args) -> T` into `f(*args) -> Operation[T]`.

    The arguments are checked against the function's signature when the operation is made, not when it runs: a
    missing one is a `TypeError` at the line that forgot it.
    """
    signature = inspect.signature(function)
    name = name_of(function)
    least, most = _plain_arguments(signature)

    @functools.wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> Operation[T]:
        if kwargs or not least <= len(args) <= most:
            signature.bind(None, *args, **kwargs)

        async def step(scope: Scope) -> T:
            return await scope.body(call)

        def call(conn: Connection) -> Awaitable[T]:
            return function(conn, *args, **kwargs)

        call.__qualname__ = name
        return Operation(step, name)

    # wraps() copies the signature with `conn`; what is called has none.
    del make.__wrapped__
    make.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]
    return make


@dataclass(frozen=True, slots=True)
class Chain:
    """Wrappers in the order they are applied, inner to outer."""

    wrappers: tuple[Wrapper, ...]

    def __call__(self, op: AnyOperation[T], /) -> Operation[T]:
        """Apply them all."""
        return pipe(op, *self.wrappers)


def pipe(op: AnyOperation[T], *wrappers: Wrapper) -> Operation[T]:
    """`op` in its wrappers, inner to outer.

    `pipe(op, timeout(1.5), retry(P))` is `retry(P)(timeout(1.5)(op))`, 1.5 s a try.

    Raises `TypeError` when one of them is not a wrapper.
    """
    result = to_operation(op)
    for wrapper in wrappers:
        wrapped = wrapper(result) if callable(wrapper) else None
        if not isinstance(wrapped, Operation):
            message = f"{_kind(wrapper)} is not a wrapper: use timeout(…), retry(…), savepoint, or chain(…)"
            raise TypeError(message)
        result = wrapped
    return result


def chain(*wrappers: Wrapper) -> Chain:
    """Name a list of wrappers, to use it again; it is applied as `pipe` applies them."""
    for wrapper in wrappers:
        if not callable(wrapper):
            message = f"{_kind(wrapper)} is not a wrapper: use timeout(…), retry(…), savepoint, or chain(…)"
            raise TypeError(message)
    return Chain(wrappers)
