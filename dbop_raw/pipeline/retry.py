"""`retry`.

Written once, and each failure is repaired where it can be: by the savepoint here, or by the run around it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import anyio

from dbop_raw.driver.connection import GRACE_SECONDS
from dbop_raw.events import Event, Retried, RetryRefused
from dbop_raw.failure.errors import OperationTimeout, PolicyError, RetriesExhausted
from dbop_raw.failure.policy import Attempts, RetryBudget, RetryPolicy
from dbop_raw.failure.sqlstate import Repair, Verdict
from dbop_raw.pipeline.operation import AnyOperation, Operation, to_operation
from dbop_raw.session.scope import Scope

__all__ = ["Retry", "Retrying", "check_policy", "retry"]

T = TypeVar("T")

# The server says that it has too many connections: a retry adds to the cause, so it costs more of the budget.
_DOUBLE_COST = frozenset({"53300"})


def check_policy(policy: RetryPolicy | None) -> None:
    """Raise `PolicyError` when `policy` is neither a `RetryPolicy` nor None."""
    if policy is not None and not isinstance(policy, RetryPolicy):
        message = f"retry={policy!r} is not a RetryPolicy: use RetryPolicy(attempts=4), for example"
        raise PolicyError(message)


@dataclass(frozen=True, slots=True)
class Retrying:
    """What decides on one more start: shared by every level that retries."""

    name: str
    policy: RetryPolicy
    budget: RetryBudget | None = None
    emit: Callable[[Event], None] | None = None

    def delay(
        self, attempts: Attempts, exc: Exception, verdict: Verdict, level: str, deadline: float
    ) -> float:
        """Seconds to wait before the next start after the transient failure `exc`.

        `deadline` is in the event loop's time. Raises `RetriesExhausted` from `exc` when there is to be no
        other start.
        """
        elapsed = anyio.current_time() - attempts.since
        delay = self.policy.delay(attempts.count, random.random)
        reason = None
        if attempts.count >= self.policy.attempts:
            reason = "attempts"
        elif -math.inf < deadline <= anyio.current_time() + delay:
            # -inf: the caller is cancelled. That is no lack of time, and the wait that follows will raise it.
            reason = "deadline"
        elif self.budget is not None and not self.budget.withdraw(
            2.0 if verdict.sqlstate in _DOUBLE_COST else 1.0
        ):
            reason = "budget"
        if reason is not None:
            if self.emit is not None:
                self.emit(
                    RetryRefused(
                        operation=self.name,
                        reason=reason,
                        attempts=attempts.count,
                        sqlstate=verdict.sqlstate,
                        condition=verdict.condition,
                    )
                )
            raise RetriesExhausted(attempts=attempts.count, elapsed=elapsed, reason=reason) from exc
        if self.emit is not None:
            self.emit(
                Retried(
                    operation=self.name,
                    level=level,
                    attempts=attempts.count,
                    delay=delay,
                    sqlstate=verdict.sqlstate,
                    condition=verdict.condition,
                )
            )
        return delay


@dataclass(frozen=True, slots=True, repr=False)
class Retry:
    """What `retry` makes; see there."""

    policy: RetryPolicy

    def __repr__(self) -> str:
        """Short: the number of attempts."""
        return f"retry(attempts={self.policy.attempts})"

    def __call__(self, op: AnyOperation[T], /) -> Operation[T]:
        """`op`, started again when it fails for a passing reason."""
        inner = to_operation(op)
        # The tries of this body are counted under this key, over all transactions of a run.
        key = object()

        async def step(scope: Scope) -> T:
            run = self._from_savepoint if scope.transactional else self._in_place
            return await run(inner, scope, scope.attempts_of(key))

        return Operation(step, inner.name, self.policy, f"{self!r}({inner!r})", key)

    def _retrying(self, inner: Operation[T], scope: Scope) -> Retrying:
        return Retrying(inner.name, self.policy, scope.budget, None if scope.observer is None else scope.emit)

    async def _from_savepoint(self, inner: Operation[T], scope: Scope, attempts: Attempts) -> T:
        scope.savepoint()
        calls = dict(scope.calls)
        try:
            while True:
                attempts.count += 1
                try:
                    result = await inner.step(scope)
                    break
                except Exception as exc:
                    verdict = scope.verdict(exc)
                    if verdict.repair is not Repair.SAVEPOINT:
                        # Permanent, or for the run around us to repair in a new transaction, under the same
                        # count.
                        raise
                    deadline = anyio.current_effective_deadline()
                    delay = self._retrying(inner, scope).delay(attempts, exc, verdict, "savepoint", deadline)
                    scope.retries += 1
                    scope.calls = dict(calls)
                    scope.rollback_to()
                    if isinstance(exc, OperationTimeout) and not exc.by_server:
                        # The server did not keep its own limit: find out now, and not for long, whether it
                        # still answers.
                        await scope.repair(exc, GRACE_SECONDS)
                    await anyio.sleep(delay)
        except BaseException:
            scope.abandon()
            raise
        scope.release()
        return result

    async def _in_place(self, inner: Operation[T], scope: Scope, attempts: Attempts) -> T:
        """Without a transaction a failed statement has undone itself: the same connection can try again."""
        while True:
            attempts.count += 1
            try:
                return await inner.step(scope)
            except Exception as exc:
                verdict = scope.verdict(exc)
                lost = isinstance(exc, OperationTimeout) and not scope.readonly
                if lost or verdict.repair not in {Repair.SAVEPOINT, Repair.TRANSACTION} or verdict.evict:
                    # `lost`: cancelled by us, but perhaps after it was done; only a statement that writes
                    # nothing may be repeated.
                    raise
                deadline = anyio.current_effective_deadline()
                delay = self._retrying(inner, scope).delay(attempts, exc, verdict, "statement", deadline)
                scope.retries += 1
                await anyio.sleep(delay)


def retry(policy: RetryPolicy) -> Retry:
    """Start an operation again when it fails for a passing reason, at most `policy.attempts` starts in all.

    Written once, and repaired where it can be. Inside a transaction a savepoint is set, and what a savepoint
    can repair (a lock that was not free, a statement that our own `timeout` ended) starts again from there.
    What needs a new transaction or a new connection is raised unchanged, and the `Engine.run` around it
    starts the whole again: under its own `retry=`, or under this policy when it was given none. All starts
    count together.

    Permanent errors pass unchanged. Raises `RetriesExhausted` (the last error is its `__cause__`) when the
    attempts, the retry budget or the time are used up; an outer retry takes that as final. Never waits past
    an enclosing deadline. What is transient is said by `classify`.
    """
    if not isinstance(policy, RetryPolicy):
        check_policy(policy)
        message = "retry() needs a policy: retry(RetryPolicy(attempts=4)), for example"
        raise PolicyError(message)
    return Retry(policy)
