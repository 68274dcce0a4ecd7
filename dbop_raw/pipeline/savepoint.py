"""`savepoint`: all or nothing, inside a transaction."""

from __future__ import annotations

from typing import TypeVar

from dbop_raw.pipeline.operation import AnyOperation, Operation, to_operation
from dbop_raw.session.frame import Frame
from dbop_raw.session.scope import Scope

__all__ = ["savepoint"]

T = TypeVar("T")


def savepoint(op: AnyOperation[T], /) -> Operation[T]:
    """`op` behind a savepoint.

    When it fails, what it did is undone, and the transaction around it stays usable.

    A wrapper, so `pipe(op, savepoint)` is the same. Costs no round trip of its own where nothing fails.
    Outside of a transaction it changes nothing. (A failed statement aborts its transaction up to the last
    savepoint: PostgreSQL, "SAVEPOINT".)
    """
    inner = to_operation(op)

    async def step(scope: Scope, frame: Frame) -> T:
        if not scope.transactional:
            return await inner.step(scope, frame)
        control = scope.control
        control.savepoint()
        try:
            result = await inner.step(scope, frame)
        except BaseException:
            # No await here, so that a cancellation can't come between: the SQL is sent by whoever goes on
            # with the transaction.
            control.abandon()
            raise
        control.release()
        return result

    return Operation(step, inner.name, inner.policy, f"savepoint({inner!r})", inner.key, inner.limit)
