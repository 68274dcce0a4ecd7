"""`timeout`.

The client stops waiting, and the server is told a little earlier, so that the connection stays usable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import anyio
import asyncpg

from dbop_raw.driver import sql
from dbop_raw.driver.underway import now
from dbop_raw.failure.errors import OperationTimeout
from dbop_raw.failure.policy import positive_seconds
from dbop_raw.pipeline.operation import AnyOperation, Operation, to_operation
from dbop_raw.session.scope import Scope

__all__ = ["Timeout", "ended_by_server", "limits_within", "timeout"]

T = TypeVar("T")

# The server's clock and ours may disagree by so much (seconds) on how long a statement took.
_CLOCK_SLACK = 0.005


def limits_within(remaining: float, lock: float | None, outer: sql.Limits | None) -> sql.Limits:
    """The server's limits for a scope that has `remaining` seconds.

    Never longer than that, a lock wait never longer than a statement.
    """
    statement = sql.server_milliseconds(remaining)
    wait = outer[1] if outer is not None else None
    if lock is not None:
        own = max(1, int(lock * 1000))
        wait = own if wait is None else min(own, wait)
    if wait is not None and statement is not None:
        wait = min(wait, statement)
    return statement, wait


def ended_by_server(started: float, limits: sql.Limits) -> bool:
    """Did the statement that was just cancelled run into `statement_timeout`?

    57014 is also what pg_cancel_backend() gives; only the time tells them apart, for the text is translated.
    """
    statement = limits[0]
    return statement is not None and anyio.current_time() - started >= statement / 1000 - _CLOCK_SLACK


@dataclass(frozen=True, slots=True, repr=False)
class Timeout:
    """What `timeout` makes; see there."""

    seconds: float
    lock: float | None = None

    def __repr__(self) -> str:
        """As it is written."""
        return (
            f"timeout({self.seconds:g})"
            if self.lock is None
            else f"timeout({self.seconds:g}, lock={self.lock:g})"
        )

    def __call__(self, op: AnyOperation[T], /) -> Operation[T]:
        """`op`, ended after `seconds`."""
        inner = to_operation(op)

        async def step(scope: Scope) -> T:
            return await self._run(inner, scope)

        limit = None if inner.policy is None else min(self.seconds, inner.limit or math.inf)
        return Operation(step, inner.name, inner.policy, f"{self!r}({inner!r})", inner.key, limit)

    async def _run(self, inner: Operation[T], scope: Scope) -> T:
        started = now()
        outer_limits, outer_until = scope.want, scope.until
        # Around a retry it is one limit for all its starts, in whatever transaction.
        total = math.inf if inner.policy is None else scope.total
        with anyio.CancelScope(deadline=min(started + self.seconds, total)) as own:
            tightest = anyio.current_effective_deadline()
            limits = limits_within(tightest - started, self.lock, outer_limits)
            scope.want, scope.until = limits, min(outer_until, own.deadline)
            try:
                return await inner.step(scope)
            except asyncpg.QueryCanceledError as exc:
                if not ended_by_server(started, limits):
                    raise
                if own.deadline <= tightest:
                    raise OperationTimeout(seconds=self.seconds, by_server=True) from exc
                # The server ended it for the sake of a tighter deadline outside. One of ours says so itself;
                # the caller's own is about to run out: let that one speak.
                if outer_until > tightest:
                    await anyio.sleep_until(tightest + _CLOCK_SLACK)
                raise
            finally:
                scope.want, scope.until = outer_limits, outer_until
        raise OperationTimeout(seconds=self.seconds, by_server=False)


def timeout(seconds: float, *, lock: float | None = None) -> Timeout:
    """End an operation after `seconds`.

    The client stops waiting then. The server is told a little less (5 %, at least 10 ms, at most 250 ms) as
    `statement_timeout`, so that it ends the statement itself and the connection stays usable; never 0, and
    never longer than the tightest enclosing deadline. With `lock` it is also told how many seconds to wait
    for a lock (`lock_timeout`): running into that is the server's 55P03, which a retry repairs from its
    savepoint.

    Raises `OperationTimeout` only when this scope ran out: an outer cancellation stays a cancellation, and an
    outer deadline speaks for itself. Outside of a transaction (`autocommit=True`) the server can't be told,
    and only the client keeps the time.

    `statement_timeout` counts for each statement, so a body of several may still be ended by the client; that
    costs a cancel request.

    Raises `PolicyError` when a value is not a finite number above 0.
    """
    return Timeout(
        positive_seconds("seconds", seconds), None if lock is None else positive_seconds("lock", lock)
    )
