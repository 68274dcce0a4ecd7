"""From an exception to a verdict: the one place that knows asyncpg's exceptions.

What counts is the SQLSTATE, the severity, the type of the exception, and where it was raised; never the
text of a message.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeAlias, TypeGuard

import asyncpg
from asyncpg import exceptions as driver

from dbop_raw.failure.errors import (
    AcquireTimeout,
    CommitUnknown,
    DbopError,
    OperationTimeout,
    RetriesExhausted,
    RollbackFailed,
    TransactionAborted,
)
from dbop_raw.failure.sqlstate import Repair, Rule, Verdict, verdict_of

__all__ = ["classify"]


def classify(
    exc: BaseException, *, overrides: Mapping[str, Rule] | None = None, closed: bool | None = None
) -> Verdict:
    """Say what can repair `exc`. It never raises.

    `overrides` are rows that win over the table of `dbop_raw.sqlstate`, as `normalise_overrides` gives
    them. `closed` is what `conn.is_closed()` says after the error; None where there is no connection to
    ask. It is the only sure sign between "the connection was closed before, nothing was sent" and a wrong
    use of the driver: both are a bare `InterfaceError`.
    """
    verdict = _verdict(exc, overrides, closed=closed)
    return _without_connection(verdict) if closed else verdict


def _without_connection(verdict: Verdict) -> Verdict:
    """The same verdict on a connection that is gone: nothing is repaired there, and no row looked for."""
    repair = Repair.CONNECTION if verdict.transient else verdict.repair
    return replace(verdict, repair=repair, evict=True, item=False)


def _verdict(exc: BaseException, overrides: Mapping[str, Rule] | None, *, closed: bool | None) -> Verdict:
    if isinstance(exc, DbopError):
        return _of_ours(exc, overrides)
    # A RAISE with the code of a warning (classes 01 and 02) comes as an exception of the second type.
    if isinstance(exc, (asyncpg.PostgresError, driver.PostgresWarning)):
        return _of_server(exc, overrides)
    if isinstance(exc, (asyncpg.InterfaceError, asyncpg.InternalClientError)):
        return _of_driver(exc, overrides, closed=closed)
    if isinstance(exc, OSError):
        return _of_line(exc)
    if isinstance(exc, Exception):
        return _made(
            exc, Repair.NEVER, "the client refused a value, or the body failed on its item", item=True
        )
    # CancelledError, KeyboardInterrupt: whatever was under way is half done on this connection.
    return _made(exc, Repair.NEVER, "the caller gave up", evict=True)


def _made(
    exc: BaseException, repair: Repair, reason: str, *, evict: bool = False, item: bool = False
) -> Verdict:
    return Verdict(None, type(exc).__name__, repair, evict, item, reason)


# --- the server's errors

_ServerError: TypeAlias = asyncpg.PostgresError | driver.PostgresWarning


def _of_server(exc: _ServerError, overrides: Mapping[str, Rule] | None) -> Verdict:
    code = exc.sqlstate
    # PgBouncer sends only the field that a server would translate, and doesn't translate it.
    severity = exc.severity_en or exc.severity
    cause = exc.__cause__
    if isinstance(exc, asyncpg.ConnectionDoesNotExistError) and severity is None and _ended_by(cause):
        return verdict_of(cause.sqlstate, severity="FATAL", overrides=overrides)
    verdict = verdict_of(code, severity=severity, overrides=overrides)
    if overrides and (code in overrides or (code or "")[:2] in overrides):
        return verdict
    return _by_routine(exc, verdict)


def _ended_by(cause: BaseException | None) -> TypeGuard[asyncpg.PostgresError]:
    """Was `cause`, the server's last words on a line that was lost in the middle of a command, its end?

    An ERROR was not, unless a pooler sent it (its class is 08): the line was lost after it, and that is what
    happened.
    """
    if not isinstance(cause, asyncpg.PostgresError):
        return False
    return (cause.severity_en or cause.severity) in {"FATAL", "PANIC"} or (cause.sqlstate or "")[:2] == "08"


def _by_routine(exc: _ServerError, verdict: Verdict) -> Verdict:
    """Tell apart what one code means twice, by the server's function that raised it, not by the text."""
    if verdict.evict:
        return verdict
    if isinstance(exc, driver.InvalidCachedStatementError):
        # "cached plan must not change result type" (0A000 from RevalidateCachedQuery): asyncpg has dropped
        # its cache by now.
        return replace(verdict, repair=Repair.TRANSACTION, reason=_STALE)
    if verdict.sqlstate == "42501" and exc.server_source_function == "ExecWithCheckOptions":
        return replace(
            verdict,
            item=True,
            reason="a row does not fit a row-level security policy, and fits no better again",
        )
    return verdict


_STALE = "the schema changed under the driver's cache, which is reset now: a new transaction sees the new one"


# --- the driver's errors


def _of_driver(
    exc: asyncpg.InterfaceError | asyncpg.InternalClientError,
    overrides: Mapping[str, Rule] | None,
    *,
    closed: bool | None,
) -> Verdict:
    if isinstance(exc, asyncpg.InterfaceError):
        return _of_interface(exc, overrides, closed=closed)
    return _inside_driver(exc)


def _of_interface(
    exc: asyncpg.InterfaceError, overrides: Mapping[str, Rule] | None, *, closed: bool | None
) -> Verdict:
    if isinstance(exc, ValueError) and not isinstance(exc, driver.ClientConfigurationError):
        # asyncpg's client-side DataError is hidden behind the server's class of that name: its bases tell.
        return verdict_of("22000", overrides=overrides)
    if closed or _raised_in(exc) in _CLOSED_CHECKS:
        return _made(exc, Repair.CONNECTION, "the connection was closed before: nothing was sent", evict=True)
    if exc.hint is not None and not isinstance(exc, driver.ClientConfigurationError):
        # Of the driver's own complaints only this one has a hint. Where it was raised can't be told: Cython
        # gives a frame the name of whichever function raised first at that line number, in any of its files.
        return _made(
            exc, Repair.NEVER, "a row has not as many values as the statement has parameters", item=True
        )
    return _made(exc, Repair.NEVER, "the driver was used in a way that it does not allow")


# Functions of asyncpg's Python modules: where the innermost frame is one of these, nothing was sent. A name
# that asyncpg changes costs only the finer verdict; a test holds them against the driver.
_CLOSED_CHECKS = frozenset({"_check_open"})


def _raised_in(exc: BaseException) -> str | None:
    """The name of the Python function that raised `exc`; of a compiled one it can't be trusted."""
    frames = exc.__traceback__
    if frames is None:
        return None
    while frames.tb_next is not None:
        frames = frames.tb_next
    return frames.tb_frame.f_code.co_name.rpartition(".")[2]


def _inside_driver(exc: asyncpg.InternalClientError) -> Verdict:
    if isinstance(exc, driver.OutdatedSchemaCacheError):
        return _made(exc, Repair.TRANSACTION, _STALE)
    if isinstance(exc, driver.TargetServerAttributeNotMatched):
        return _made(
            exc,
            Repair.CONNECTION,
            "no server is what the DSN asks for, a primary say: one may become it soon",
        )
    if type(exc) is asyncpg.InternalClientError:
        # Above all: the server's last word (57P01, say) came between two commands, and the end of the line
        # not yet, so the driver refuses to begin the next one. Nothing tells that from worse.
        return _made(
            exc,
            Repair.UNKNOWN,
            "the driver lost track of its connection; the server may have ended the session",
            evict=True,
        )
    return _made(
        exc,
        Repair.NEVER,
        "the driver lost its way in the protocol: its connection is not to be trusted",
        evict=True,
    )


def _of_line(exc: OSError) -> Verdict:
    if isinstance(exc, TimeoutError):
        # Of the driver (command_timeout, or its connect timeout) or of the body: it may have been done.
        return _made(
            exc,
            Repair.UNKNOWN,
            "the driver stopped waiting for an answer: what was sent may have been done",
            evict=True,
        )
    if isinstance(exc, ssl.SSLError) and not isinstance(exc, _TLS_LINE_LOST):
        return _made(exc, Repair.NEVER, "TLS was refused, by a certificate say: it will be again")
    # asyncpg makes 08003 of a line lost in the middle of a command, so a bare OSError is from connecting.
    return _made(exc, Repair.CONNECTION, "no connection could be made: nothing was sent", evict=True)


_TLS_LINE_LOST = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)


# --- our own errors


def _of_ours(exc: DbopError, overrides: Mapping[str, Rule] | None) -> Verdict:
    if isinstance(exc, RetriesExhausted):
        return _given_up(exc, overrides)
    for kind, make in _OURS.items():
        if isinstance(exc, kind):
            return make(exc)
    return _made(exc, Repair.NEVER, "dbop_raw refused it, and will refuse it again")


def _operation_timeout(exc: DbopError) -> Verdict:
    by_server = isinstance(exc, OperationTimeout) and exc.by_server
    reason = "a timeout ran out; there may be time for another try, within one that is wider"
    return _made(exc, Repair.SAVEPOINT, reason, evict=not by_server, item=by_server)


def _acquire_timeout(exc: DbopError) -> Verdict:
    return _made(
        exc, Repair.NEVER, "no connection came free in time: to wait once more is the caller's decision"
    )


def _commit_unknown(exc: DbopError) -> Verdict:
    return _made(exc, Repair.UNKNOWN, "the answer to COMMIT was lost: it may be committed", evict=True)


def _transaction_aborted(exc: DbopError) -> Verdict:
    return _made(
        exc, Repair.NEVER, "COMMIT was answered with ROLLBACK: the body swallows an error, each time"
    )


def _rollback_failed(exc: DbopError) -> Verdict:
    return _made(
        exc,
        Repair.CONNECTION,
        "the rollback failed and the connection was thrown away: the server undoes the rest",
        evict=True,
    )


_OURS: Mapping[type[DbopError], Callable[[DbopError], Verdict]] = {
    OperationTimeout: _operation_timeout,
    AcquireTimeout: _acquire_timeout,
    CommitUnknown: _commit_unknown,
    TransactionAborted: _transaction_aborted,
    RollbackFailed: _rollback_failed,
}


def _given_up(exc: RetriesExhausted, overrides: Mapping[str, Rule] | None) -> Verdict:
    """Final, but with the code of the last error, for those who count, and its word on the connection."""
    reason = "a retry gave up on it: an outer retry takes that as final"
    last = _last_error(exc)
    if last is None:
        return _made(exc, Repair.NEVER, reason, item=True)
    verdict = classify(last, overrides=overrides)
    return replace(verdict, repair=Repair.NEVER, item=not verdict.evict, reason=reason)


def _last_error(exc: RetriesExhausted) -> BaseException | None:
    """The cause that is no `RetriesExhausted` itself; None where there is none, or they run in a circle."""
    seen: set[int] = set()
    error: BaseException | None = exc
    while isinstance(error, RetriesExhausted):
        if id(error) in seen:
            return None
        seen.add(id(error))
        error = error.__cause__
    return error
