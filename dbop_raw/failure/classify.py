"""`classify`, from an exception to a verdict: the place that knows asyncpg's exceptions.

What counts is the SQLSTATE, the severity, the type of the exception, and where it was raised; never the text
of a message. "Where" has two sides: the `Phase` of the call, which the caller knows, and the modules whose
frames are in the traceback, which tell the driver's own errors from those of the code that uses it.
"""

from __future__ import annotations

import enum
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TypeAlias, TypeGuard

import asyncpg
from asyncpg import exceptions as driver

from dbop_raw.failure.errors import (
    AcquireTimeout,
    CommitUnknown,
    DbopError,
    EngineClosed,
    EngineOverloaded,
    GroupFailed,
    OperationTimeout,
    PolicyError,
    RetriesExhausted,
    RollbackFailed,
    SkipLimitExceeded,
    TransactionAborted,
)
from dbop_raw.failure.refusal import refuses_commit
from dbop_raw.failure.sqlstate import Blame, Repair, Rule, Verdict, verdict_of

__all__ = ["Phase", "classify"]


class Phase(enum.Enum):
    """How far a call had come when its error was raised."""

    ACQUIRE = "acquire"
    """There was no connection yet, so nothing was sent."""
    BODY = "body"
    """In a transaction, before its COMMIT was sent: all that was done is undone."""
    STATEMENT = "statement"
    """On a connection without a transaction (autocommit): each statement commits by itself."""
    COMMIT = "commit"
    """COMMIT was sent, and this is the answer."""


def classify(
    exc: BaseException,
    *,
    overrides: Mapping[str, Rule] | None = None,
    closed: bool | None = None,
    phase: Phase | None = None,
) -> Verdict:
    """Say what can repair an error, who has to act on it, and whether its connection can be kept.

    Never raises. Without `closed` and `phase` the answer is careful: an `OSError` is taken for a failure to
    connect and a `TimeoutError` for an answer of the server that did not come, for nothing tells them from
    errors of the body's own.

    An `ExceptionGroup` is judged by its leaves: it is transient only if each of them is, and needs the
    strictest of their repairs; the verdict is that of the leaf which needs it, evicting if any leaf does.

    Args:
        exc: The error.
        overrides: Rows that win over the table of SQLSTATEs, as `normalise_overrides` returns them. They
            never turn an error at COMMIT into "nothing was committed".
        closed: What `conn.is_closed()` says after the error; None where there is no connection to ask. Only
            it tells "the connection was closed before, nothing was sent" from a wrong use of the driver: both
            are a bare `InterfaceError`.
        phase: How far the call had come; None where that is not known. With `Phase.BODY` and
            `Phase.STATEMENT`, and the connection not closed, an `OSError`, `TimeoutError` or `EOFError` that
            did not come from the driver is the body's own: permanent, no reason to close the connection, and
            the fault of one item.
    """
    if phase is Phase.COMMIT and not isinstance(exc, DbopError) and isinstance(exc, Exception):
        return _at_commit(exc, overrides, closed)
    return _verdict(exc, overrides, closed, phase)


def _at_commit(exc: Exception, overrides: Mapping[str, Rule] | None, closed: bool | None) -> Verdict:
    verdict = _verdict(exc, overrides, closed, Phase.BODY)
    if refuses_commit(exc):
        return verdict
    return replace(
        verdict, repair=Repair.UNKNOWN, evict=True, item=False, reason=_COMMIT_UNKNOWN, blame="server"
    )


_COMMIT_UNKNOWN = "this answer to COMMIT leaves open whether it was done, on some node at least"


def _verdict(
    exc: BaseException, overrides: Mapping[str, Rule] | None, closed: bool | None, phase: Phase | None
) -> Verdict:
    if isinstance(exc, ExceptionGroup):
        return _of_group(exc, overrides, closed, phase)
    verdict = _of_one(exc, overrides, closed, phase)
    if phase is Phase.STATEMENT and verdict.transient and _may_be_done(exc, verdict):
        verdict = replace(verdict, repair=Repair.UNKNOWN, item=False, reason=_STATEMENT_UNKNOWN)
    return _without_connection(verdict) if closed else verdict


def _without_connection(verdict: Verdict) -> Verdict:
    """Adapt a verdict to a connection that is gone: nothing is repaired there, and no row is looked for."""
    repair = Repair.CONNECTION if verdict.transient else verdict.repair
    return replace(verdict, repair=repair, evict=True, item=False)


def _of_one(
    exc: BaseException, overrides: Mapping[str, Rule] | None, closed: bool | None, phase: Phase | None
) -> Verdict:
    if isinstance(exc, DbopError):
        return _of_ours(exc, overrides, phase)
    # A RAISE with the code of a warning (classes 01 and 02) comes as an exception of the second type.
    if isinstance(exc, (asyncpg.PostgresError, driver.PostgresWarning)):
        return _of_server(exc, overrides)
    if isinstance(exc, asyncpg.InterfaceError):
        return _of_interface(exc, overrides, closed)
    if isinstance(exc, asyncpg.InternalClientError):
        return _inside_driver(exc)
    return _of_python(exc, closed, phase)


def _made(
    exc: BaseException, repair: Repair, reason: str, blame: Blame, *, evict: bool = False, item: bool = False
) -> Verdict:
    return Verdict(None, type(exc).__name__, repair, evict, item, reason, blame)


# --- groups

# From the least repair to none. A transaction whose COMMIT was not sent is undone, so an unknown outcome in
# it is less than a permanent error; elsewhere an unknown outcome is the most that can be said.
_UNDONE = (Repair.SAVEPOINT, Repair.TRANSACTION, Repair.CONNECTION, Repair.UNKNOWN, Repair.NEVER)
_STANDING = (Repair.SAVEPOINT, Repair.TRANSACTION, Repair.CONNECTION, Repair.NEVER, Repair.UNKNOWN)


def _of_group(
    group: ExceptionGroup[Exception],
    overrides: Mapping[str, Rule] | None,
    closed: bool | None,
    phase: Phase | None,
) -> Verdict:
    order = _UNDONE if phase in {Phase.ACQUIRE, Phase.BODY} else _STANDING
    leaves = [_verdict(leaf, overrides, closed, phase) for leaf in group.exceptions]
    strictest = max(leaves, key=lambda leaf: order.index(leaf.repair))
    return replace(
        strictest, evict=any(leaf.evict for leaf in leaves), item=all(leaf.item for leaf in leaves)
    )


# --- the server's errors

_ServerError: TypeAlias = asyncpg.PostgresError | driver.PostgresWarning


def _of_server(exc: _ServerError, overrides: Mapping[str, Rule] | None) -> Verdict:
    code = exc.sqlstate
    severity = _severity(exc)
    cause = exc.__cause__
    if isinstance(exc, asyncpg.ConnectionDoesNotExistError) and severity is None and _ended_by(cause):
        return verdict_of(cause.sqlstate, severity="FATAL", overrides=overrides)
    verdict = verdict_of(code, severity=severity, overrides=overrides)
    if overrides and (code in overrides or (code or "")[:2] in overrides):
        return verdict
    return _by_routine(exc, verdict) if severity == "ERROR" else verdict


def _severity(exc: _ServerError) -> str | None:
    """The untranslated severity; PgBouncer sends only the other field, and does not translate it."""
    return exc.severity_en or exc.severity


def _ended_by(cause: BaseException | None) -> TypeGuard[asyncpg.PostgresError]:
    """Return whether a line that was lost in the middle of a command was ended by `cause`.

    `cause` is what the server said last. An ERROR did not end the line, unless a pooler sent it (its class is
    08): the line was lost after it, by something else.
    """
    if not isinstance(cause, asyncpg.PostgresError):
        return False
    return _severity(cause) in {"FATAL", "PANIC"} or (cause.sqlstate or "")[:2] == "08"


def _by_routine(exc: _ServerError, verdict: Verdict) -> Verdict:
    """Tell apart what one code means twice, by the server's function that raised it.

    The function's name is one of the error's fields. Unlike the message it is not translated.
    """
    routine = exc.server_source_function
    if isinstance(exc, driver.InvalidCachedStatementError):
        # "cached plan must not change result type" (0A000 from RevalidateCachedQuery): asyncpg has dropped
        # its cache by now.
        return replace(verdict, repair=Repair.TRANSACTION, reason=_STALE, blame="load")
    if verdict.sqlstate == "42501" and routine == "ExecWithCheckOptions":
        return replace(verdict, item=True, reason=_ROW_SECURITY, blame="item")
    if routine == "ReportCopyError" and verdict.sqlstate in {"XX000", "58030"}:
        # Any other code says what it is. Citus (multi_copy.c) passes on what a worker said of a COPY
        # without its code, as XX000; or, as 58030, says that the worker said nothing any more.
        lost = verdict.sqlstate == "58030"
        return replace(
            verdict,
            repair=Repair.TRANSACTION if lost else Repair.NEVER,
            evict=False,
            item=not lost,
            reason=_COPY_NODE_LOST if lost else _COPY_REFUSED,
            blame="server" if lost else "item",
        )
    return verdict


_STALE = "the schema changed under the driver's cache, which is reset now: a new transaction sees the new one"
_ROW_SECURITY = "a row does not fit a row-level security policy, and fits no better again"
_COPY_REFUSED = "a node of Citus refused a row under COPY, and refuses it again"
_COPY_NODE_LOST = "a node of Citus was lost under COPY, this connection is well: try again after a pause"


def _may_be_done(exc: BaseException, verdict: Verdict) -> bool:
    """Return whether a statement that commits by itself may be committed in spite of its error.

    Its error may come from its COMMIT, and then the same holds as there (see `refusal`): a server that speaks
    of another node, of its system or of itself does not say that nothing is committed, whatever repair a user
    has set for the code. And the driver may fail to read the rows of a statement that was done.
    """
    if isinstance(exc, driver.OutdatedSchemaCacheError):
        return True
    if not isinstance(exc, asyncpg.PostgresError):
        return False
    code = verdict.sqlstate or ""
    # 57P05 ends a session that idles, so the statement was never read.
    return code[:2] in {"08", "57", "58", "XX"} and code != "57P05"


_STATEMENT_UNKNOWN = "the statement commits by itself, and this error leaves open whether it is committed"


# --- the driver's errors


def _of_interface(
    exc: asyncpg.InterfaceError, overrides: Mapping[str, Rule] | None, closed: bool | None
) -> Verdict:
    if isinstance(exc, ValueError) and not isinstance(exc, driver.ClientConfigurationError):
        # asyncpg's client-side DataError is hidden behind the server's class of that name: its bases tell.
        return verdict_of("22000", overrides=overrides)
    if closed or _innermost_function(exc) in _CLOSED_CHECKS:
        reason = "the connection was closed before: nothing was sent"
        return _made(exc, Repair.CONNECTION, reason, "server", evict=True)
    if exc.hint is not None and not isinstance(exc, driver.ClientConfigurationError):
        # Of the driver's own complaints only this one has a hint. Where it was raised can't be told: Cython
        # gives a frame the name of whichever function raised first at that line number, in any of its files.
        reason = "a row has not as many values as the statement has parameters"
        return _made(exc, Repair.NEVER, reason, "item", item=True)
    return _made(exc, Repair.NEVER, "the driver was used in a way that it does not allow", "caller")


# Functions of asyncpg's Python modules: where the innermost frame is one of these, nothing was sent. A name
# that asyncpg changes costs only the finer verdict; a test holds them against the driver.
_CLOSED_CHECKS = frozenset({"_check_open"})


def _inside_driver(exc: asyncpg.InternalClientError) -> Verdict:
    if isinstance(exc, driver.OutdatedSchemaCacheError):
        return _made(exc, Repair.TRANSACTION, _STALE, "load")
    if isinstance(exc, driver.TargetServerAttributeNotMatched):
        reason = "no server is what the DSN asks for, a primary say: one may become it soon"
        return _made(exc, Repair.CONNECTION, reason, "server")
    if isinstance(exc.__cause__, PolicyError):
        # A writer has found out what the driver was asked for in vain, before it sent anything.
        return _made(exc, Repair.NEVER, "the driver can't send what it was asked to send", "caller")
    if type(exc) is asyncpg.InternalClientError:
        # Above all: the server's last word (57P01, say) came between two commands, and the end of the line
        # not yet, so the driver refuses to begin the next one. Nothing tells that from worse.
        reason = "the driver lost track of its connection; the server may have ended the session"
        return _made(exc, Repair.UNKNOWN, reason, "server", evict=True)
    reason = "the driver lost its way in the protocol: its connection is not to be trusted"
    return _made(exc, Repair.NEVER, reason, "server", evict=True)


# --- Python's errors

# Where an OSError can only be from connecting, or where nothing says that it is not.
_NO_BODY = frozenset({None, Phase.ACQUIRE})


def _of_python(exc: BaseException, closed: bool | None, phase: Phase | None) -> Verdict:
    if isinstance(exc, OSError):
        return _of_line(exc, phase) if phase in _NO_BODY else _of_body(exc, phase, closed)
    if isinstance(exc, Exception):
        blame: Blame = "item" if _handled_values(exc) else "caller"
        reason = "the client refused a value, or the body failed on its item"
        return _made(exc, Repair.NEVER, reason, blame, item=True)
    # CancelledError, KeyboardInterrupt, a group with one of them: what was under way is half done on this
    # connection.
    return _made(exc, Repair.NEVER, "the caller gave up", "caller", evict=True)


_TLS_LINE_LOST = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)


def _of_line(exc: OSError, phase: Phase | None) -> Verdict:
    """Judge an `OSError` that was raised while connecting, or of which nothing is known."""
    if isinstance(exc, TimeoutError) and phase is not Phase.ACQUIRE:
        return _made(exc, Repair.UNKNOWN, _NO_ANSWER, "load", evict=True)
    if isinstance(exc, ssl.SSLError) and not isinstance(exc, _TLS_LINE_LOST):
        reason = "TLS was refused, by a certificate say: it will be again"
        return _made(exc, Repair.NEVER, reason, "server")
    # asyncpg makes 08003 of a line lost in the middle of a command, so a bare OSError is from connecting.
    reason = "no connection could be made: nothing was sent"
    return _made(exc, Repair.CONNECTION, reason, "server", evict=True)


_NO_ANSWER = "the driver stopped waiting for an answer: what was sent may have been done"


def _of_body(exc: OSError, phase: Phase | None, closed: bool | None) -> Verdict:
    """Judge an `OSError` that was raised where there was a connection, by the driver or by the body."""
    if isinstance(exc, TimeoutError) and _raised_by_driver(exc):
        # Its `timeout=` or `command_timeout`. asyncpg has asked the server to cancel the statement, and lets
        # the next command wait for that: the connection is as good as before.
        if phase is Phase.STATEMENT:
            return _made(exc, Repair.UNKNOWN, _NO_ANSWER, "load")
        reason = "the driver's own timeout ran out: there may be time for another try"
        return _made(exc, Repair.SAVEPOINT, reason, "load", item=True)
    if closed:
        # Then it may well be of the line, whoever raised it.
        reason = "the connection was lost: what was sent may have been done"
        return _made(exc, Repair.UNKNOWN, reason, "server", evict=True)
    # Also where the driver passes it on: of a file that COPY reads, or of a function that takes its output.
    reason = "the body's own input or output failed, not the database's: a file, say, or another service"
    return _made(exc, Repair.NEVER, reason, "caller", item=True)


def _raised_by_driver(exc: BaseException) -> bool:
    """Return whether asyncpg raised an error, and not code that it calls or that calls it.

    The innermost frame is asyncpg's then, or asyncio's right inside one of asyncpg's (a compiled module's
    frame has a name that can't be trusted, but the right module).
    """
    for module in reversed(list(_modules(exc))):
        if module.partition(".")[0] != "asyncio":
            return module.partition(".")[0] == "asyncpg"
    return False


def _handled_values(exc: BaseException) -> bool:
    """Return whether an error was raised while an item's values were made ready to be sent.

    asyncpg does that, calling codecs of the user's; and the writers of a batch do.
    """
    modules = list(_modules(exc))
    return any(module.partition(".")[0] == "asyncpg" for module in modules) or any(
        module.startswith("dbop_raw.batching.") for module in modules[-1:]
    )


def _modules(exc: BaseException) -> Iterator[str]:
    """The modules of the frames in a traceback, the outermost first."""
    trace = exc.__traceback__
    while trace is not None:
        yield str(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next


def _innermost_function(exc: BaseException) -> str | None:
    """The name of the Python function that raised an error; of a compiled one it can't be trusted."""
    trace = exc.__traceback__
    if trace is None:
        return None
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_name.rpartition(".")[2]


# --- our own errors


def _of_ours(exc: DbopError, overrides: Mapping[str, Rule] | None, phase: Phase | None) -> Verdict:
    if isinstance(exc, RetriesExhausted):
        return _exhausted(exc, overrides, phase)
    if isinstance(exc, GroupFailed):
        return _companion(exc, overrides, phase)
    if isinstance(exc, OperationTimeout):
        reason = "a timeout ran out; there may be time for another try, within one that is wider"
        by_server = exc.by_server
        return _made(exc, Repair.SAVEPOINT, reason, "load", evict=not by_server, item=by_server)
    for kind, (repair, blame, reason) in _OURS.items():
        if isinstance(exc, kind):
            # Those of the first kind leave nothing of a connection to keep.
            return _made(exc, repair, reason, blame, evict=repair is not Repair.NEVER)
    return _made(exc, Repair.NEVER, "dbop_raw refused it, and will refuse it again", "caller")


_OURS: Mapping[type[DbopError], tuple[Repair, Blame, str]] = {
    CommitUnknown: (Repair.UNKNOWN, "server", "the answer to COMMIT was lost: it may be committed"),
    RollbackFailed: (
        Repair.CONNECTION,
        "server",
        "the rollback failed and the connection was thrown away: the server undoes the rest",
    ),
    AcquireTimeout: (
        Repair.NEVER,
        "load",
        "no connection came free in time: to wait once more is the caller's decision",
    ),
    EngineOverloaded: (Repair.NEVER, "load", "too many wait already: to come again is the caller's decision"),
    EngineClosed: (Repair.NEVER, "server", "the engine is closed, and stays closed"),
    TransactionAborted: (
        Repair.NEVER,
        "caller",
        "COMMIT was answered with ROLLBACK: the body swallows an error, each time",
    ),
    SkipLimitExceeded: (Repair.NEVER, "item", "more items were refused than may be, and will be again"),
}


def _exhausted(exc: RetriesExhausted, overrides: Mapping[str, Rule] | None, phase: Phase | None) -> Verdict:
    """Judge a retry that gave up: final, but with the last error's code and its word on the connection."""
    reason = "a retry gave up on it: an outer retry takes that as final"
    last = _cause(exc, RetriesExhausted)
    if last is None:
        return _made(exc, Repair.NEVER, reason, "load", item=True)
    verdict = classify(last, overrides=overrides, phase=phase)
    return replace(verdict, repair=Repair.NEVER, item=not verdict.evict, reason=reason, blame="load")


def _companion(exc: GroupFailed, overrides: Mapping[str, Rule] | None, phase: Phase | None) -> Verdict:
    """Judge an item that shares the fate of another: repaired by what repairs that one."""
    reason = "an item of the same group failed, and they stand or fall together"
    first = _cause(exc, GroupFailed)
    if first is None:
        return _made(exc, Repair.NEVER, reason, "item", item=True)
    verdict = classify(first, overrides=overrides, phase=phase)
    # Without the code, which would count as often as the group has items.
    return _made(exc, verdict.repair, reason, verdict.blame, item=True)


def _cause(exc: BaseException, kind: type[BaseException]) -> BaseException | None:
    """The first cause that is not of `kind`; None where there is none, or the causes run in a circle."""
    seen: set[int] = set()
    error: BaseException | None = exc
    while isinstance(error, kind):
        if id(error) in seen:
            return None
        seen.add(id(error))
        error = error.__cause__
    return error
