"""`timeout`: the client stops waiting, and the server a little earlier, so the connection stays usable."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import anyio

from dbop_raw.failure.errors import OperationTimeout
from dbop_raw.failure.policy import positive_seconds
from dbop_raw.pipeline.operation import AnyOperation, Operation, to_operation
from dbop_raw.session.frame import Frame
from dbop_raw.session.scope import Scope, cancelled_by_server

__all__ = ["Timeout", "timeout"]

T = TypeVar("T")

# Seconds after which a deadline that is about to run out has surely done so.
_SURELY = 0.005


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

        async def step(scope: Scope, frame: Frame) -> T:
            return await self._run(inner, scope, frame)

        limit = None if inner.policy is None else min(self.seconds, inner.limit or math.inf)
        return Operation(step, inner.name, inner.policy, f"{self!r}({inner!r})", inner.key, limit)

    async def _run(self, inner: Operation[T], scope: Scope, outer: Frame) -> T:
        started = scope.settings.clock()
        # Around a retry it is one limit for all its starts, in whatever transaction.
        total = math.inf if inner.policy is None else outer.total
        with anyio.CancelScope(deadline=min(started + self.seconds, total)) as own:
            tightest = anyio.current_effective_deadline()
            frame = Frame(
                min(outer.deadline, own.deadline),
                tightest,
                self._lock_within(outer),
                outer.total,
                outer.more_follows,
            )
            try:
                return await inner.step(scope, frame)
            except Exception as exc:
                if not (cancelled_by_server(exc) and scope.ended_by_server(frame)):
                    raise
                if own.deadline <= tightest:
                    raise OperationTimeout(seconds=self.seconds, by_server=True) from exc
                # The server ended it for the sake of a tighter deadline outside. One of ours says so itself;
                # the caller's own is about to run out: let that one speak.
                if outer.deadline > tightest:
                    await anyio.sleep_until(tightest + _SURELY)
                raise
        raise OperationTimeout(seconds=self.seconds, by_server=False)

    def _lock_within(self, outer: Frame) -> int | None:
        """Milliseconds to wait for a lock: never 0, and never longer than the frame around allows."""
        if self.lock is None:
            return outer.lock
        own = max(1, int(self.lock * 1000))
        return own if outer.lock is None else min(own, outer.lock)


def timeout(seconds: float, *, lock: float | None = None) -> Timeout:
    """End an operation after `seconds`.

    The client stops waiting then. The server is told a little less (5 %, at least 10 ms, at most 250 ms) as
    `statement_timeout`, so that it ends the statement itself and the connection stays usable; never 0, never
    longer than what is left of the tightest enclosing deadline when the statement is sent, and never longer
    than what the session, the role or a SET LOCAL of the user's own allows already.

    `statement_timeout` counts for each statement, so a body of several may still be ended by the client; that
    costs a cancel request. Outside of a transaction (`autocommit=True`) the server can't be told, and only
    the client keeps the time.

    Args:
        seconds: The longest that the operation may take, with what it waits for.
        lock: Seconds that the server waits for a lock (`lock_timeout`). Running into that is the server's
            55P03, which a retry repairs from its savepoint. None: as it is set there.

    Raises:
        PolicyError: A value is not a finite number above 0.

    The operation it makes raises `OperationTimeout` only when this scope ran out: an outer cancellation stays
    a cancellation, and an outer deadline speaks for itself.
    """
    return Timeout(
        positive_seconds("seconds", seconds), None if lock is None else positive_seconds("lock", lock)
    )
