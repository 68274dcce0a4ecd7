"""One call's road to COMMIT, in the order in which it is gone: checkout, body, COMMIT, release.

An attempt ends as a value, `Committed`, `Failed` or `InDoubt`, and one loop decides what follows: the result,
another attempt after a pause, or the error. Only a cancellation stays an exception all the way.

`Work` is what `transaction.py` shares: there a block of the user's own is the body, and there is no second
attempt.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import anyio

from dbop_raw import events
from dbop_raw.driver import sql
from dbop_raw.engine.capacity import Capacity, Checkout
from dbop_raw.engine.commit import (
    CommitRecord,
    CommitTokens,
    NotCommitted,
    Resolution,
    XidRecord,
    resolve_and_tell,
    still_at_work,
)
from dbop_raw.failure.classify import Phase, classify
from dbop_raw.failure.errors import (
    CommitUnknown,
    DbopError,
    OperationTimeout,
    RetriesExhausted,
    RollbackFailed,
)
from dbop_raw.failure.policy import Attempts, RetryPolicy
from dbop_raw.failure.sqlstate import Repair, Verdict
from dbop_raw.pipeline.operation import Operation
from dbop_raw.pipeline.retry import delay_before_retry
from dbop_raw.session.frame import Frame
from dbop_raw.session.scope import cancelled_by_server
from dbop_raw.session.session import Session

__all__ = [
    "NOT_COMMITTED",
    "Call",
    "Run",
    "Work",
    "explain",
    "tell_committed",
    "tell_doubt",
    "tell_rolled_back",
]

T = TypeVar("T")

# A scope with a deadline has its price, also where the deadline is never.
_NO_DEADLINE = contextlib.nullcontext()
# Without a policy, a run whose COMMIT was found lost starts again so often: nobody asked for a retry, but for
# the outcome.
_AGAIN_AFTER_LOST_COMMIT = RetryPolicy(attempts=3)


class Call(NamedTuple):
    """What was asked for, checked."""

    op: Operation[Any]
    policy: RetryPolicy | None
    begin: str | None
    """The statement that begins the transaction; None: each statement is its own."""
    readonly: bool = False
    timeout: float | None = None
    """Seconds for all of it, as the caller gave them."""
    deadline: float = math.inf
    """The event loop's time at which they are over."""
    limit: float | None = None
    """Seconds for all attempts together: of a timeout around the retry whose policy is this run's."""
    resolve: bool = False
    """Is a COMMIT in doubt to be looked up?"""
    record: CommitRecord | None = None
    """What the transaction leaves behind for that; None: a record of the engine's own."""
    patient: bool = False
    """Wait for a connection however long, and be refused by nobody: of a bounded number of workers."""


class Committed(NamedTuple, Generic[T]):
    """The work is done."""

    result: T


class Failed(NamedTuple):
    """The work is not done, or (under autocommit, with `CommitUnknown`) nobody knows."""

    error: Exception
    verdict: Verdict
    phase: Phase
    check_constraints: bool = False
    """COMMIT refused a deferred constraint, and checked earlier the operation can blame it on an item."""
    begun: bool = False
    """Under autocommit: more than the statement that failed was sent, and is done."""


class InDoubt(NamedTuple, Generic[T]):
    """COMMIT was sent, and its answer lost: `result` is the body's, if it is committed."""

    error: CommitUnknown
    result: T
    record: CommitRecord | None


Outcome: TypeAlias = "Committed[T] | Failed | InDoubt[T]"

NOT_COMMITTED = Verdict(
    None,
    NotCommitted.__name__,
    Repair.TRANSACTION,
    evict=False,
    item=False,
    reason="a COMMIT in doubt was looked up: nothing is committed, and nothing can be",
    blame="load",
)

# Errors whose cause is an option of the pool: their verdict's reason names it.
_EXPLAINED = frozenset({"26000", "42P05"})


def explain(error: BaseException, verdict: Verdict) -> None:
    """Put the verdict's reason under an error that looks like the statement's and is the pool's."""
    if verdict.sqlstate in _EXPLAINED:
        note = f"dbop_raw: {verdict.reason}"
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)


@dataclass(slots=True, kw_only=True)
class Run:
    """One call on its way: what all its attempts share."""

    call: Call
    capacity: Capacity
    tokens: CommitTokens | None
    attempts: Attempts
    by_key: dict[object, Attempts] = field(default_factory=dict)
    """How often the body of each retrying operation has started, whatever the level that started it."""
    total: float = math.inf
    """The event loop's time at which `call.limit` is over: it begins with the first connection."""
    constraints_immediate: bool = False
    """Check deferred constraints early: COMMIT has refused them once."""
    last: Exception | None = None
    """What the attempt before this one failed with."""

    async def to_the_end(self) -> Any:
        """Attempt until the work is done, or is not to be attempted again."""
        outcome: Outcome[Any] | None = None
        self.capacity.began()
        try:
            while True:
                outcome = await self._attempt()
                if isinstance(outcome, InDoubt):
                    outcome = await self._resolved(outcome)
                if isinstance(outcome, Committed):
                    return outcome.result
                if outcome.check_constraints and not self.constraints_immediate:
                    # This counts as no attempt, for nothing is transient.
                    self.constraints_immediate = True
                    self.attempts.count -= 1
                    continue
                delay = self._delay(outcome)
                self.capacity.counters.retries += 1
                await self.capacity.pause(delay)
        finally:
            self.capacity.ended()
            # What is raised holds this frame, which must not hold it: the caller's arguments would live on
            # until the garbage collector comes.
            outcome = self.last = None

    # --- one attempt

    async def _attempt(self) -> Outcome[Any]:
        """Check out a connection, run the body, COMMIT, release."""
        self.attempts.count += 1
        call, deadline = self.call, min(self.call.deadline, self.total)
        record = self._record()
        scope = None if math.isinf(deadline) else anyio.CancelScope(deadline=deadline)
        phase = Phase.ACQUIRE
        with scope or _NO_DEADLINE:
            try:
                checkout = await (
                    self.capacity.acquire(shed=False, timeout=math.inf)
                    if call.patient
                    else self.capacity.acquire()
                )
            except Exception as exc:  # noqa: BLE001 - a value from here on
                if isinstance(exc, DbopError) and exc.__cause__ is None:
                    # It is refused; why it was attempted once more is worth knowing too.
                    exc.__cause__ = self.last
                verdict = classify(exc, overrides=self.capacity.settings.verdicts, phase=phase)
                return Failed(exc, verdict, phase)
            phase = Phase.BODY
            work = self._work(checkout, record)
            frame = self._frame()
            if call.begin is None and call.policy is not None:
                work.session.counting()
            try:
                result = await work.session.run(call.op.step, frame)
            except Exception as exc:  # noqa: BLE001 - a value from here on
                return await self._body_failed(work, frame, exc)
            except BaseException as exc:
                await work.failed(exc)
                raise
        if scope is not None and scope.cancelled_caught:
            return self._deadline_over(phase, by_server=False, cause=self.last)
        # Outside of the deadline's scope: once COMMIT is sent, its answer counts, not the time.
        return await self._commit(work, record, result)

    def _record(self) -> CommitRecord | None:
        if self.call.record is not None or not self.call.resolve:
            return self.call.record
        return self.tokens.record() if self.tokens is not None else XidRecord()

    def _work(self, checkout: Checkout, record: CommitRecord | None) -> Work:
        call = self.call
        begin = call.begin
        if begin is not None and record is not None:
            begin = sql.join(begin, record.opening())
        session = Session(
            checkout.conn,
            self.capacity.settings,
            begin=begin,
            name=call.op.name,
            deadline=call.deadline,
            attempts=self.by_key,
            readonly=call.readonly,
        )
        session.constraints_immediate = self.constraints_immediate
        session.on_begin = None if record is None else record.capture
        if call.limit is not None and math.isinf(self.total):
            self.total = self.capacity.settings.clock() + call.limit
        return Work(self.capacity, checkout, session, self.attempts.since)

    def _frame(self) -> Frame:
        return Frame(self.call.deadline, self.call.deadline, None, self.total)

    async def _body_failed(self, work: Work, frame: Frame, error: Exception) -> Failed:
        by_server = (
            self.call.timeout is not None
            and cancelled_by_server(error)
            and work.session.ended_by_server(frame)
        )
        verdict = await work.failed(error)
        if by_server:
            return self._deadline_over(Phase.BODY, by_server=True, cause=error)
        if self.call.begin is None and verdict.repair is Repair.UNKNOWN:
            # The statement was lost on its way, and commits by itself.
            tell_doubt(self.capacity, self.call.op.name)
            doubt = CommitUnknown(looked_up=None)
            doubt.__cause__ = error
            return Failed(doubt, verdict, Phase.BODY)
        begun = False
        if self.call.begin is None and work.session.uncounted is not None:
            counting = work.session.counting()
            begun = counting.done > 0 or counting.sent > 1
        return Failed(error, verdict, Phase.BODY, begun=begun)

    def _deadline_over(self, phase: Phase, *, by_server: bool, cause: Exception | None) -> Failed:
        seconds = self.call.limit if self.total < self.call.deadline else self.call.timeout
        error = OperationTimeout(seconds=seconds or 0.0, by_server=by_server)
        error.__cause__ = cause
        return Failed(error, _FINAL, phase)

    async def _commit(self, work: Work, record: CommitRecord | None, result: Any) -> Outcome[Any]:
        session = work.session
        try:
            await session.commit(
                still_at_work=None if record is None else partial(still_at_work, record, self.capacity)
            )
        except CommitUnknown as doubt:
            verdict = await work.failed(doubt)
            if self.call.readonly and isinstance(doubt.__cause__, Exception):
                # Nothing was written, so nothing is in doubt: only the connection is lost.
                error = doubt.__cause__
                verdict = classify(error, overrides=session.settings.verdicts, phase=Phase.BODY)
                return Failed(error, verdict, Phase.BODY)
            return InDoubt(doubt, result, record)
        except Exception as exc:  # noqa: BLE001 - a value from here on
            verdict = await work.failed(exc)
            return Failed(exc, verdict, Phase.COMMIT, session.check_at_commit and verdict.item)
        except BaseException as exc:
            await work.failed(exc)
            raise
        work.attempts = self._started()
        await work.done()
        return Committed(result)

    # --- COMMIT in doubt

    async def _resolved(self, outcome: InDoubt[T]) -> Committed[T] | Failed:
        """Look up what became of it, where that was asked for."""
        name = self.call.op.name
        tell_doubt(self.capacity, name)
        unknown = Failed(outcome.error, classify(outcome.error), Phase.COMMIT)
        if not self.call.resolve or outcome.record is None:
            return unknown
        resolution = await resolve_and_tell(outcome.record, self.capacity, self.call.deadline, name)
        if resolution is Resolution.COMMITTED:
            tell_committed(self.capacity, name, self._started(), self.attempts.since)
            return Committed(outcome.result)
        if resolution is Resolution.ABORTED:
            tell_rolled_back(self.capacity, name, NOT_COMMITTED)
            error = NotCommitted()
            error.__cause__ = outcome.error
            return Failed(error, NOT_COMMITTED, Phase.COMMIT)
        doubt = CommitUnknown(looked_up=True)
        doubt.__cause__ = outcome.error.__cause__
        return unknown._replace(error=doubt)

    # --- what follows

    def _started(self) -> int:
        """How often the body has started, at whatever level."""
        inner = self.by_key.get(self.call.op.key)
        return self.attempts.count if inner is None else max(self.attempts.count, inner.count)

    def _delay(self, outcome: Failed) -> float:
        """Seconds to wait before the next attempt; raises what the caller is to see where there is none."""
        error, policy, settings = outcome.error, self.call.policy, self.capacity.settings
        verdict = self._verdict(outcome)
        if policy is None and isinstance(error, NotCommitted):
            policy = _AGAIN_AFTER_LOST_COMMIT
        over = isinstance(error, OperationTimeout) and error.seconds == self.call.limit
        if policy is None or not verdict.transient or over:
            try:
                raise error
            finally:
                del error, outcome
        self.last = error
        self.attempts.count = self._started()
        deadline = min(self.call.deadline, self.total, anyio.current_effective_deadline())
        try:
            return delay_before_retry(
                settings,
                self.call.op.name,
                policy,
                self.attempts,
                error,
                verdict,
                level="transaction",
                deadline=deadline,
            )
        except RetriesExhausted as exhausted:
            explain(exhausted, verdict)
            raise

    def _verdict(self, outcome: Failed) -> Verdict:
        """The verdict, with what this level knows of where the error came from."""
        error, verdict = outcome.error, outcome.verdict
        undone = error.original if isinstance(error, RollbackFailed) and not error.savepoint else None
        if isinstance(undone, Exception):
            # The connection is gone and the transaction with it; what counts is why it was rolled back.
            return classify(undone, overrides=self.capacity.settings.verdicts, phase=Phase.BODY)
        if isinstance(error, CommitUnknown):
            return verdict
        if self.call.begin is None and outcome.phase is Phase.BODY:
            if outcome.begun:
                return replace(verdict, repair=Repair.NEVER)
            if isinstance(error, OperationTimeout):
                # The client gave up on a statement that commits by itself: it may have been done.
                return replace(verdict, repair=Repair.UNKNOWN)
            return verdict
        # Before COMMIT is sent, and before there is a connection, nothing can have been done: a lost
        # connection is a sure rollback.
        return replace(verdict, repair=Repair.CONNECTION) if verdict.repair is Repair.UNKNOWN else verdict


_FINAL = Verdict(
    None,
    OperationTimeout.__name__,
    Repair.NEVER,
    evict=False,
    item=False,
    reason="the deadline of the run is over",
    blame="load",
)


@dataclass(slots=True)
class Work:
    """A connection that was checked out, with the one transaction on it: how it is given back either way."""

    capacity: Capacity
    checkout: Checkout
    session: Session
    started: float
    """The event loop's time at which the first attempt began."""
    attempts: int = 1
    """How often the body has started so far, at whatever level."""

    async def failed(self, error: BaseException) -> Verdict:
        """Give the connection back after an error, or throw it away where the verdict says so."""
        session, capacity = self.session, self.capacity
        verdict = session.verdict(error)
        explain(error, verdict)
        capacity.counters.retries += session.retries
        if session.committed:
            # And only its caller was cancelled.
            self._tell_committed()
        elif session.in_doubt and not isinstance(error, CommitUnknown):
            # Its caller did not wait for the answer.
            tell_doubt(capacity, session.name)
        elif session.transactional_by_us and not session.in_doubt:
            tell_rolled_back(capacity, session.name, verdict)
        lost = isinstance(error, CommitUnknown) or (isinstance(error, Exception) and verdict.evict)
        await capacity.release(self.checkout, session.deadline, error=verdict, lost=lost)
        return verdict

    async def done(self) -> None:
        """COMMIT was answered: say so, and give the connection back."""
        self.capacity.counters.retries += self.session.retries
        self._tell_committed()
        await self.capacity.release(self.checkout, self.session.deadline)

    def _tell_committed(self) -> None:
        tell_committed(self.capacity, self.session.name, self.attempts, self.started)


def tell_rolled_back(capacity: Capacity, name: str, verdict: Verdict) -> None:
    """Count a transaction that is surely not committed, and tell the observer."""
    capacity.counters.rollbacks += 1
    if capacity.settings.observer is not None:
        capacity.settings.emit(
            events.RolledBack(operation=name, sqlstate=verdict.sqlstate, condition=verdict.condition)
        )


def tell_committed(capacity: Capacity, name: str, attempts: int, started: float) -> None:
    """Count what is surely done, and tell the observer."""
    settings = capacity.settings
    capacity.counters.commits += 1
    if settings.observer is not None:
        seconds = settings.clock() - started
        settings.emit(events.Committed(operation=name, attempts=attempts, seconds=seconds))


def tell_doubt(capacity: Capacity, name: str) -> None:
    """Count a COMMIT whose answer was lost, and tell the observer."""
    capacity.counters.commits_in_doubt += 1
    if capacity.settings.observer is not None:
        capacity.settings.emit(events.CommitInDoubt(operation=name))
