"""`Engine`.

Runs operations on the connections of an asyncpg pool, one transaction each, and repairs what a new
transaction can repair.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import anyio
import asyncpg

from dbop_raw import events
from dbop_raw.driver import sql
from dbop_raw.driver.connection import CLEANUP_SECONDS, Connection, is_gone
from dbop_raw.driver.dsn import check_dsn
from dbop_raw.driver.underway import now
from dbop_raw.engine.capacity import Capacity, Checkout
from dbop_raw.engine.commit import CommitRecord, CommitTokens, NotCommitted, Outcome, XidRecord, resolve
from dbop_raw.engine.stats import EngineStats
from dbop_raw.events import Event, Observer
from dbop_raw.failure.classify import classify
from dbop_raw.failure.errors import (
    CommitUnknown,
    DbopError,
    OperationTimeout,
    PolicyError,
    RetriesExhausted,
    RollbackFailed,
)
from dbop_raw.failure.policy import Attempts, RetryBudget, RetryPolicy, positive_seconds
from dbop_raw.failure.sqlstate import Repair, Rule, Verdict, normalise_overrides
from dbop_raw.pipeline.operation import AnyOperation, Operation, to_operation
from dbop_raw.pipeline.retry import Retrying, check_policy
from dbop_raw.pipeline.timeout import ended_by_server, limits_within
from dbop_raw.session.session import Session

__all__ = ["Engine"]

T = TypeVar("T")

# A COMMIT in doubt is looked up for so long (seconds), or until the run's deadline.
_RESOLVE_SECONDS = 15.0
# A COMMIT that can be looked up counts as in doubt when its answer is not here after so long (seconds): the
# line hangs. Without a deadline only; with one, half of the time left is for the look-up.
_ANSWER_SECONDS = 30.0
# A scope with a deadline has its price, also where the deadline is never.
_NO_LIMIT = contextlib.nullcontext()
# Without a policy, a run whose COMMIT was found lost starts again so often: nobody asked for a retry, but for
# the outcome.
_RERUN = RetryPolicy(attempts=3)


@dataclass(slots=True, kw_only=True)
class _Call:
    """One `run`: what was asked for, and what all its tries share."""

    op: Operation[Any]
    policy: RetryPolicy | None
    begin: str | None
    readonly: bool
    deadline: float | None
    until: float
    resolve: bool
    record: CommitRecord | None
    attempts: Attempts
    nodes: dict[object, Attempts] = field(default_factory=dict)
    limit: float | None = None
    """Seconds for all tries together: of a timeout around the retry whose policy is this run's."""
    total: float = math.inf
    """The event loop's time at which that limit is over, for the tries after the first."""
    constraints_immediate: bool = False
    """Check deferred constraints early: COMMIT has refused them once."""
    verdict: Verdict | None = None
    """Of the last failure, from the connection that knew most about it; None when there was no connection."""

    def started(self) -> int:
        """How often the body has started, at whatever level."""
        inner = self.nodes.get(self.op.key)
        return self.attempts.count if inner is None else max(self.attempts.count, inner.count)


_NOT_COMMITTED = Verdict(
    None,
    NotCommitted.__name__,
    Repair.TRANSACTION,
    evict=False,
    item=False,
    reason="a COMMIT in doubt was looked up: nothing is committed, and nothing can be",
)

# Errors whose cause is an option of the pool: their verdict's reason names it.
_EXPLAINED = frozenset({"26000", "42P05"})


def _explain(exc: BaseException, verdict: Verdict) -> None:
    """Put the verdict's reason under an error that looks like the statement's and is the pool's."""
    if verdict.sqlstate in _EXPLAINED:
        note = f"dbop_raw: {verdict.reason}"
        if note not in getattr(exc, "__notes__", ()):
            exc.add_note(note)


class _DeadlineOver(DbopError):
    """The run's own deadline is over: never leaves this module."""

    def __init__(self, *, by_server: bool) -> None:
        super().__init__()
        self.by_server = by_server


class _CheckEarlier(DbopError):
    """COMMIT refused a deferred constraint that the operation can blame on an item, if it is checked before.

    Never leaves this module: the run starts again, which counts as no retry, for nothing is transient.
    """


class Engine:
    """Runs operations on the connections of an asyncpg pool.

    `acquire_timeout`: seconds that a call waits for a connection, then `AcquireTimeout`.
    `max_waiting`: how many calls may wait; one more is refused at once with `EngineOverloaded`. None: any
    number.
    `budget`: a `RetryBudget` that all retries of this engine draw on. None: only the policies limit retries.
    `observer`: gets an event for all that happens (see `dbop_raw.events`). None: no cost.
    `verdicts`: rows that come before the table of `dbop_raw.sqlstate`, by code or by class (the first two
    characters).
    `commit_tokens`: a table that settles a COMMIT in doubt even over a crash; see `CommitTokens`.
    `leak_after`: seconds after which a connection that is still held is reported with the stack that took it.
    None: never.

    Belongs to the event loop of its pool. Raises `PolicyError` when an option is not allowed.
    """

    def __init__(
        self,
        pool: asyncpg.Pool,
        *,
        acquire_timeout: float = 5.0,
        max_waiting: int | None = None,
        budget: RetryBudget | None = None,
        observer: Observer | None = None,
        verdicts: Mapping[str, Rule | Repair] | None = None,
        commit_tokens: CommitTokens | None = None,
        leak_after: float | None = None,
    ) -> None:
        if observer is not None and not callable(observer):
            message = f"observer={observer!r} can't be called: give a function that takes an event"
            raise PolicyError(message)
        self._capacity = Capacity(
            pool,
            acquire_timeout=acquire_timeout,
            max_waiting=max_waiting,
            leak_after=leak_after,
            observer=observer,
        )
        self._counters = self._capacity.counters
        self._budget = budget
        self._observer = observer
        self._overrides = normalise_overrides(verdicts) if verdicts else None
        self._tokens = commit_tokens

    def __repr__(self) -> str:
        """The numbers that matter; never a DSN."""
        return f"<Engine {self._capacity!r}>"

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        dsn: str | None = None,
        *,
        acquire_timeout: float = 5.0,
        max_waiting: int | None = None,
        budget: RetryBudget | None = None,
        observer: Observer | None = None,
        verdicts: Mapping[str, Rule | Repair] | None = None,
        commit_tokens: CommitTokens | None = None,
        leak_after: float | None = None,
        **pool_options: Any,
    ) -> AsyncIterator[Engine]:
        """Make the pool too: `async with Engine.open(dsn, max_size=8) as engine`.

        `pool_options` go to `asyncpg.create_pool` as they are (`min_size`, `max_size`, `ssl`,
        `server_settings`, `statement_cache_size`, …). At the end the engine drains for at most 10 s and the
        pool is closed.
        """
        check_dsn(dsn)
        pool = asyncpg.create_pool(dsn, **pool_options)
        await pool
        try:
            engine = cls(
                pool,
                acquire_timeout=acquire_timeout,
                max_waiting=max_waiting,
                budget=budget,
                observer=observer,
                verdicts=verdicts,
                commit_tokens=commit_tokens,
                leak_after=leak_after,
            )
            yield engine
            # A block that failed is not waited for: what it left running is cut off.
            await engine.close()
            with anyio.move_on_after(CLEANUP_SECONDS, shield=True):
                await pool.close()
        finally:
            pool.terminate()

    # --- the main road

    async def run(
        self,
        op: AnyOperation[T],
        *,
        retry: RetryPolicy | None = None,
        isolation: sql.Isolation | None = None,
        readonly: bool = False,
        deferrable: bool = False,
        deadline: float | None = None,
        autocommit: bool = False,
        resolve_commit: bool = False,
    ) -> T:
        """Acquire a connection, run `op` in one transaction, release.

        `retry`: start the whole again, on a fresh connection, when the error's verdict says that a savepoint,
        a new transaction or a new connection repairs it; nothing is held during the wait. None: the
        pipeline's outermost `retry(…)`, if it has one.
        `isolation`, `readonly`, `deferrable`: the transaction's modes; None and False leave the session's
        defaults.
        `deadline`: seconds for all of it: waiting for a connection, tries, pauses. Clean-up takes at most 0.2
        s more.
        `autocommit`: no transaction: each statement of `op` is its own. One round trip, for an operation of
        one statement. An `OperationTimeout` then leaves open whether it was done, so it is not retried.
        `resolve_commit`: when the answer to COMMIT is lost, look up what became of it: committed gives the
        result, not committed runs again. False, or where it can't be known: `CommitUnknown`.

        Raises the driver's own error, unchanged, when it is permanent; `RetriesExhausted` when a retry gave
        up; `OperationTimeout` when the deadline was over; `AcquireTimeout`, `EngineOverloaded`,
        `EngineClosed`; `TransactionAborted`, `CommitUnknown`, `RollbackFailed`, `TransactionMisuse`;
        `PolicyError` for options that don't fit together.
        """
        begin = sql.begin(isolation, readonly=readonly, deferrable=deferrable)
        if autocommit and (isolation is not None or deferrable or resolve_commit):
            message = (
                "autocommit=True begins no transaction, so it takes no isolation, no deferrable and no "
                "resolve_commit"
            )
            raise PolicyError(message)
        call = self._call(
            op,
            retry,
            begin=None if autocommit else begin,
            readonly=readonly,
            deadline=deadline,
            resolve=resolve_commit and not readonly,
        )
        result: T = await self._tries(call)
        return result

    async def run_recorded(
        self, op: AnyOperation[T], record: CommitRecord | None, *, retry: RetryPolicy | None = None
    ) -> T:
        """`run`, its COMMIT resolved by a record of the transaction that the caller brings (a ledger's row).

        For what is built on the engine. None: by the engine's own.
        """
        result: T = await self._tries(self._call(op, retry, begin=sql.begin(), resolve=True, record=record))
        return result

    def _call(
        self,
        op: AnyOperation[Any],
        retry: RetryPolicy | None,
        *,
        begin: str | None,
        resolve: bool,
        readonly: bool = False,
        deadline: float | None = None,
        record: CommitRecord | None = None,
    ) -> _Call:
        """What is asked for, checked."""
        op = to_operation(op)
        check_policy(retry)
        started = now()
        call = _Call(
            op=op,
            policy=op.policy if retry is None else retry,
            begin=begin,
            readonly=readonly,
            deadline=deadline,
            until=math.inf if deadline is None else started + positive_seconds("deadline", deadline),
            resolve=resolve,
            record=record,
            attempts=Attempts(since=started),
            limit=op.limit if retry is None else None,
        )
        if self._budget is not None:
            self._budget.deposit()
        return call

    async def _tries(self, call: _Call) -> Any:
        last: Exception | None = None
        while True:
            call.attempts.count += 1
            call.verdict = None
            try:
                result = await self._once(call)
            except _DeadlineOver as over:
                seconds = call.limit if call.total < call.until else call.deadline
                raise OperationTimeout(seconds=seconds or 0.0, by_server=over.by_server) from (
                    over.__cause__ or last
                )
            except _CheckEarlier:
                call.constraints_immediate = True
                call.attempts.count -= 1
                continue
            except Exception as exc:  # noqa: BLE001 - what is not to be retried is raised again there
                last = exc
                delay = self._delay(call, exc)
            else:
                if self._observer is not None:
                    seconds = anyio.current_time() - call.attempts.since
                    self._emit(
                        events.Committed(operation=call.op.name, attempts=call.started(), seconds=seconds)
                    )
                return result
            self._counters.retries += 1
            await anyio.sleep(delay)

    def _delay(self, call: _Call, exc: Exception) -> float:
        """Seconds until the next try.

        Raises `exc` when a new try can't repair it, `RetriesExhausted` when there is to be none.
        """
        verdict = self._run_verdict(call, exc)
        policy = call.policy
        if policy is None and isinstance(exc, NotCommitted):
            policy = _RERUN
        over = isinstance(exc, OperationTimeout) and exc.seconds == call.limit
        if policy is None or not verdict.transient or over:
            raise exc
        call.attempts.count = call.started()
        retrying = Retrying(
            call.op.name, policy, self._budget, None if self._observer is None else self._emit
        )
        deadline = min(call.until, call.total, anyio.current_effective_deadline())
        try:
            return retrying.delay(call.attempts, exc, verdict, "transaction", deadline)
        except RetriesExhausted as gave_up:
            _explain(gave_up, verdict)
            raise

    def _run_verdict(self, call: _Call, exc: Exception) -> Verdict:
        """The verdict, with what this level knows of where the error came from."""
        if isinstance(exc, RollbackFailed) and not exc.savepoint and isinstance(exc.original, Exception):
            # The connection is gone and the transaction with it; what counts is why it was rolled back.
            return classify(exc.original, overrides=self._overrides)
        if isinstance(exc, NotCommitted):
            return _NOT_COMMITTED
        verdict = call.verdict or classify(exc, overrides=self._overrides)
        if isinstance(exc, CommitUnknown):
            return verdict
        if call.begin is None and not call.readonly:
            if isinstance(exc, OperationTimeout) and call.verdict is not None:
                # The client gave up on a statement that commits by itself: it may have been done.
                return replace(verdict, repair=Repair.UNKNOWN)
            if call.verdict is not None:
                return verdict
        # Before COMMIT is sent, and before there is a connection, nothing can have been done: a lost
        # connection is a sure rollback.
        return replace(verdict, repair=Repair.CONNECTION) if verdict.repair is Repair.UNKNOWN else verdict

    async def _once(self, call: _Call) -> Any:
        """One try: acquire, body, COMMIT, release."""
        record = self._record_for(call)
        until = min(call.until, call.total)
        limit = None if math.isinf(until) else anyio.CancelScope(deadline=until)
        with limit or _NO_LIMIT:
            checkout = await self._capacity.acquire()
            session = self._session(call, checkout.conn, record)
            if call.limit is not None and math.isinf(call.total):
                call.total = anyio.current_time() + call.limit
            try:
                result = await self._body(call, session)
            except BaseException as exc:
                call.verdict = await self._failed(checkout, session, exc)
                if call.begin is None and not call.readonly and call.verdict.repair is Repair.UNKNOWN:
                    raise CommitUnknown from exc
                raise
        if limit is not None and limit.cancelled_caught:
            raise _DeadlineOver(by_server=False)
        # Outside of the deadline's scope: once COMMIT is sent, its answer counts, not the time.
        if record is not None and session.begun:
            record.capture(checkout.conn)
        try:
            await session.commit(looked_up_after=None if record is None else _ANSWER_SECONDS)
        except BaseException as exc:
            call.verdict = await self._failed(checkout, session, exc)
            if session.check_at_commit and call.verdict.item and isinstance(exc, Exception):
                raise _CheckEarlier from exc
            if not isinstance(exc, CommitUnknown):
                raise
            return await self._in_doubt(call, record, exc, result)
        self._counters.retries += session.retries
        await self._capacity.release(checkout, call.until)
        return result

    async def _body(self, call: _Call, session: Session) -> Any:
        """All up to COMMIT, with the server told of the deadline too."""
        if call.deadline is None:
            return await session.body_of(call.op.step)
        started = anyio.current_time()
        session.want = limits = limits_within(call.until - started, None, None)
        try:
            return await session.body_of(call.op.step)
        except asyncpg.QueryCanceledError as exc:
            if ended_by_server(started, limits):
                raise _DeadlineOver(by_server=True) from exc
            raise

    def _session(self, call: _Call, conn: Connection, record: CommitRecord | None) -> Session:
        begin = call.begin
        if begin is not None and record is not None:
            begin = sql.join(begin, record.opening())
        session = Session(
            conn,
            begin=begin,
            name=call.op.name,
            deadline=call.until,
            observer=self._observer,
            overrides=self._overrides,
            budget=self._budget,
            attempts=call.nodes,
            readonly=call.readonly,
        )
        session.constraints_immediate = call.constraints_immediate
        session.total = call.total
        return session

    async def _failed(self, checkout: Checkout, session: Session, exc: BaseException) -> Verdict:
        """Give the connection back after an error, or throw it away where the verdict says so."""
        verdict = session.verdict(exc)
        _explain(exc, verdict)
        self._counters.retries += session.retries
        # Not where it is committed and only its caller is cancelled, nor where it may be: that is in doubt.
        known = not session.committed and not isinstance(exc, CommitUnknown)
        if self._observer is not None and known:
            self._emit(
                events.RolledBack(
                    operation=session.name, sqlstate=verdict.sqlstate, condition=verdict.condition
                )
            )
        lost = isinstance(exc, CommitUnknown) or (isinstance(exc, Exception) and verdict.evict)
        await self._capacity.give_back(checkout, verdict, lost=lost, until=session.deadline)
        return verdict

    # --- COMMIT in doubt

    def _record_for(self, call: _Call) -> CommitRecord | None:
        if call.record is not None or not call.resolve:
            return call.record
        return self._tokens.record() if self._tokens is not None else XidRecord()

    def _doubt(self, name: str) -> None:
        self._counters.commits_in_doubt += 1
        if self._observer is not None:
            self._emit(events.CommitInDoubt(operation=name))

    async def _in_doubt(
        self, call: _Call, record: CommitRecord | None, doubt: CommitUnknown, result: Any
    ) -> Any:
        """Settle it, where that was asked for.

        The result if it is committed, `NotCommitted` if not, else `doubt`.
        """
        if call.readonly and isinstance(doubt.__cause__, Exception):
            # Nothing was written, so nothing is in doubt: only the connection is lost.
            call.verdict = None
            raise doubt.__cause__
        self._doubt(call.op.name)
        if not call.resolve or record is None:
            raise doubt
        until = min(call.until, anyio.current_time() + _RESOLVE_SECONDS)
        outcome = await resolve(record, self._capacity, until, self._overrides)
        if self._observer is not None:
            self._emit(events.CommitResolved(operation=call.op.name, outcome=outcome.value))
        if outcome is Outcome.COMMITTED:
            self._counters.commits_found_committed += 1
            return result
        if outcome is Outcome.ABORTED:
            self._counters.commits_found_aborted += 1
            call.verdict = None
            raise NotCommitted from doubt
        raise doubt

    # --- plain code

    @contextlib.asynccontextmanager
    async def transaction(
        self,
        *,
        isolation: sql.Isolation | None = None,
        readonly: bool = False,
        deferrable: bool = False,
        deadline: float | None = None,
    ) -> AsyncIterator[Connection]:
        """One transaction for plain code: `async with engine.transaction() as conn`.

        COMMIT at the end, ROLLBACK on an error; no retry.

        Operations join it: `await op(conn)`. The options mean the same as those of `run`.
        """
        begin = sql.begin(isolation, readonly=readonly, deferrable=deferrable)
        until = (
            math.inf if deadline is None else anyio.current_time() + positive_seconds("deadline", deadline)
        )
        with anyio.CancelScope(deadline=until) as limit:
            checkout = await self._capacity.acquire()
            session = Session(
                checkout.conn,
                begin=begin,
                name="transaction",
                deadline=until,
                observer=self._observer,
                overrides=self._overrides,
                budget=self._budget,
                readonly=readonly,
            )
            started = anyio.current_time()
            if deadline is not None:
                session.want = limits_within(until - started, None, None)
            limits = session.want
            try:
                async with session.entered():
                    yield checkout.conn
            except BaseException as exc:
                await self._failed(checkout, session, exc)
                if (
                    deadline is not None
                    and limits is not None
                    and isinstance(exc, asyncpg.QueryCanceledError)
                    and ended_by_server(started, limits)
                ):
                    raise OperationTimeout(seconds=deadline, by_server=True) from exc
                raise
        if limit.cancelled_caught:
            raise OperationTimeout(seconds=deadline or 0.0, by_server=False)
        try:
            await session.commit()
        except BaseException as exc:
            await self._failed(checkout, session, exc)
            if isinstance(exc, CommitUnknown):
                self._doubt(session.name)
            raise
        self._counters.retries += session.retries
        await self._capacity.release(checkout, until)

    async def fetch(self, query: str, *args: Any, timeout: float | None = None) -> list[Any]:
        """`pool.fetch` with the engine's bounds: acquire timeout, shedding, eviction."""
        rows: list[Any] = await self._direct("fetch", query, *args, timeout=timeout)
        return rows

    async def fetchrow(self, query: str, *args: Any, timeout: float | None = None) -> Any:
        """`pool.fetchrow` with the engine's bounds."""
        return await self._direct("fetchrow", query, *args, timeout=timeout)

    async def fetchval(self, query: str, *args: Any, column: int = 0, timeout: float | None = None) -> Any:
        """`pool.fetchval` with the engine's bounds."""
        return await self._direct("fetchval", query, *args, column=column, timeout=timeout)

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        """`pool.execute` with the engine's bounds; gives the command's tag."""
        tag: str = await self._direct("execute", query, *args, timeout=timeout)
        return tag

    async def executemany(
        self, query: str, args: Iterable[Sequence[Any]], *, timeout: float | None = None
    ) -> None:
        """`pool.executemany` with the engine's bounds: all or nothing."""
        await self._direct("executemany", query, args, timeout=timeout)

    async def _direct(self, method: str, *args: Any, **kwargs: Any) -> Any:
        checkout = await self._capacity.acquire()
        try:
            result = await getattr(checkout.conn, method)(*args, **kwargs)
        except BaseException as exc:
            verdict = classify(exc, overrides=self._overrides, closed=is_gone(checkout.conn))
            _explain(exc, verdict)
            await self._capacity.give_back(
                checkout, verdict, lost=isinstance(exc, Exception) and verdict.evict
            )
            raise
        await self._capacity.release(checkout)
        return result

    # --- the end, and the numbers

    async def close(self, timeout: float = 10.0) -> bool:
        """Refuse new calls, and wait at most `timeout` seconds for those that run.

        Then throw away the connections they hold.

        True when all of them came to their own end. The pool stays open: it is yours (`Engine.open` closes
        the one that it made).
        """
        return await self._capacity.drain(positive_seconds("timeout", timeout))

    def stats(self) -> EngineStats:
        """The numbers as they are now: frozen."""
        return self._capacity.stats()

    @property
    def observer(self) -> Observer | None:
        """Who is told; for what is built on the engine."""
        return self._observer

    def _emit(self, event: Event) -> None:
        if self._observer is not None:
            events.notify(self._observer, event)
