"""`retry`: written once, and each failure is repaired where it can be, by the savepoint here or by the run.

What needs a new transaction or a new connection is raised unchanged: the run that is around takes this policy
for its own, and both count the same attempts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import anyio

from dbop_raw.events import Retried, RetryRefused
from dbop_raw.failure.errors import OperationTimeout, PolicyError, RetriesExhausted
from dbop_raw.failure.policy import Attempts, RetryPolicy, next_delay
from dbop_raw.failure.sqlstate import Repair, Verdict
from dbop_raw.pipeline.operation import AnyOperation, Operation, to_operation
from dbop_raw.session.frame import Frame
from dbop_raw.session.scope import Scope
from dbop_raw.session.settings import Settings

__all__ = ["Retry", "check_policy", "delay_before_retry", "retry"]

T = TypeVar("T")

# The server says that it has too many connections: a retry adds to the cause, so it costs more of the budget.
_DOUBLE_COST = frozenset({"53300"})


def check_policy(policy: RetryPolicy | None) -> None:
    """Raise `PolicyError` when `policy` is neither a `RetryPolicy` nor None."""
    if policy is not None and not isinstance(policy, RetryPolicy):
        raise PolicyError(f"retry={policy!r} is not a RetryPolicy: use RetryPolicy(attempts=4), for example")


def delay_before_retry(
    settings: Settings,
    name: str,
    policy: RetryPolicy,
    attempts: Attempts,
    error: Exception,
    verdict: Verdict,
    *,
    level: str,
    deadline: float,
) -> float:
    """Decide on one more start after the transient failure `error`, and tell the observer.

    Args:
        settings: Clock, randomness, budget, observer.
        name: The operation's.
        policy: How often, and the longest wait.
        attempts: How often the body has started.
        error: What failed.
        verdict: Of it.
        level: From where it starts again: "savepoint", "transaction" or "statement".
        deadline: The event loop's time by which it must have started.

    Returns:
        Seconds to wait.

    Raises:
        RetriesExhausted: There is to be no other start; `error` is its cause.
    """
    try:
        delay = next_delay(
            policy,
            attempts,
            now=settings.clock(),
            deadline=deadline,
            rng=settings.rng,
            budget=settings.budget,
            cost=2.0 if verdict.sqlstate in _DOUBLE_COST else 1.0,
        )
    except RetriesExhausted as exhausted:
        if settings.observer is not None:
            settings.emit(
                RetryRefused(
                    operation=name,
                    reason=exhausted.reason,
                    attempts=attempts.count,
                    sqlstate=verdict.sqlstate,
                    condition=verdict.condition,
                )
            )
        raise exhausted from error
    if settings.observer is not None:
        settings.emit(
            Retried(
                operation=name,
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
        # The attempts of this body are counted under this key, over all transactions of a run.
        key = object()

        async def step(scope: Scope, frame: Frame) -> T:
            run = self._from_savepoint if scope.transactional else self._in_place
            return await run(inner, scope, frame, scope.attempts_of(key))

        return Operation(step, inner.name, self.policy, f"{self!r}({inner!r})", key)

    def _delay(
        self,
        inner: Operation[T],
        scope: Scope,
        attempts: Attempts,
        error: Exception,
        verdict: Verdict,
        level: str,
    ) -> float:
        deadline = anyio.current_effective_deadline()
        return delay_before_retry(
            scope.settings, inner.name, self.policy, attempts, error, verdict, level=level, deadline=deadline
        )

    async def _from_savepoint(self, inner: Operation[T], scope: Scope, frame: Frame, attempts: Attempts) -> T:
        control = scope.control
        control.savepoint()
        calls = dict(scope.calls)
        try:
            while True:
                attempts.count += 1
                try:
                    result = await inner.step(scope, frame)
                    break
                except Exception as exc:
                    verdict = scope.verdict(exc)
                    if verdict.repair is not Repair.SAVEPOINT:
                        # Permanent, or for the run around us to repair in a new transaction, under the same
                        # count.
                        raise
                    delay = self._delay(inner, scope, attempts, exc, verdict, "savepoint")
                    scope.retries += 1
                    scope.calls = dict(calls)
                    control.rollback_to()
                    if isinstance(exc, TimeoutError) and not getattr(exc, "by_server", False):
                        # A timeout, ours or the driver's, that the server did not keep: find out now, and not
                        # for long, whether it still answers.
                        await scope.repair(exc, frame, scope.settings.bounds.grace)
                    await anyio.sleep(delay)
        except BaseException:
            control.abandon()
            raise
        control.release()
        return result

    async def _in_place(self, inner: Operation[T], scope: Scope, frame: Frame, attempts: Attempts) -> T:
        """Without a transaction a failed statement has undone itself: the same connection can try again.

        Only as long as it was the body's first: what was done before it is done.
        """
        counting = scope.counting()
        while True:
            attempts.count += 1
            sent, done = counting.sent, counting.done
            try:
                return await inner.step(scope, frame)
            except Exception as exc:
                verdict = scope.verdict(exc)
                lost = isinstance(exc, OperationTimeout) and not scope.readonly
                begun = counting.done > done or counting.sent > sent + 1
                if (
                    lost
                    or begun
                    or verdict.repair not in {Repair.SAVEPOINT, Repair.TRANSACTION}
                    or verdict.evict
                ):
                    # `lost`: cancelled by us, but perhaps after it was done; only a statement that writes
                    # nothing may be repeated.
                    raise
                delay = self._delay(inner, scope, attempts, exc, verdict, "statement")
                scope.retries += 1
                await anyio.sleep(delay)


def retry(policy: RetryPolicy) -> Retry:
    """Start an operation again when it fails for a passing reason, at most `policy.attempts` times in all.

    Written once, and repaired where it can be. Inside a transaction a savepoint is set, and what a savepoint
    can repair (a lock that was not free, a statement that our own `timeout` ended) starts again from there.
    What needs a new transaction or a new connection is raised unchanged, and the `Engine.run` around it
    starts the whole again: under its own `retry=`, or under this policy when it was given none. All attempts
    count together.

    What is transient is said by `classify`. A retry never waits past an enclosing deadline.

    Args:
        policy: How often, and the longest waits.

    Raises:
        PolicyError: `policy` is no `RetryPolicy`.

    The operation it makes raises permanent errors unchanged, and `RetriesExhausted` (the last error is its
    `__cause__`) when the attempts, the retry budget or the time are used up; an outer retry takes that as
    final.
    """
    if not isinstance(policy, RetryPolicy):
        check_policy(policy)
        raise PolicyError("retry() needs a policy: retry(RetryPolicy(attempts=4)), for example")
    return Retry(policy)
