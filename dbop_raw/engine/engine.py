"""`Engine`: what a user calls. It runs operations on the connections of an asyncpg pool, a transaction each.

The options are checked here; `capacity.py` has who gets a connection, and `run.py` a call's road to COMMIT.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import anyio
import asyncpg

from dbop_raw.driver import sql
from dbop_raw.driver.connection import Connection, is_gone
from dbop_raw.driver.dsn import check_dsn
from dbop_raw.engine.capacity import Capacity
from dbop_raw.engine.commit import CommitRecord, CommitTokens, XidRecord
from dbop_raw.engine.run import Call, Run, explain
from dbop_raw.engine.stats import EngineStats
from dbop_raw.engine.transaction import Transaction
from dbop_raw.events import Observer
from dbop_raw.failure.classify import Phase, classify
from dbop_raw.failure.errors import PolicyError
from dbop_raw.failure.policy import Attempts, RetryBudget, RetryPolicy, positive_seconds
from dbop_raw.failure.sqlstate import Repair, Rule, normalise_overrides
from dbop_raw.pipeline.operation import AnyOperation, to_operation
from dbop_raw.pipeline.retry import check_policy
from dbop_raw.session.settings import Settings

__all__ = ["Engine"]

T = TypeVar("T")


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
            raise PolicyError(f"observer={observer!r} can't be called: give a function that takes an event")
        settings = Settings(
            observer=observer,
            verdicts=normalise_overrides(verdicts) if verdicts else None,
            budget=budget,
        )
        self._capacity = Capacity(
            pool, settings, acquire_timeout=acquire_timeout, max_waiting=max_waiting, leak_after=leak_after
        )
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
            with anyio.move_on_after(engine.settings.bounds.cleanup, shield=True):
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
            raise PolicyError(
                "autocommit=True begins no transaction, so it takes no isolation, no deferrable and no "
                "resolve_commit"
            )
        run = self._run(
            op,
            retry,
            # Nothing but a transaction makes the server refuse to write.
            begin=None if autocommit and not readonly else begin,
            readonly=readonly,
            timeout=deadline,
            resolve=resolve_commit and not readonly,
        )
        result: T = await run.to_the_end()
        return result

    async def run_recorded(
        self,
        op: AnyOperation[T],
        record: CommitRecord | None,
        *,
        retry: RetryPolicy | None = None,
        readonly: bool = False,
    ) -> T:
        """`run` for the workers of code built on the engine.

        A COMMIT is resolved, by a record that the caller brings. A worker waits for a connection however
        long, and is not shed: there is a bounded number of them.

        Args:
            op: What runs.
            record: What the transaction leaves behind (a ledger's row); None: a record of the engine's own.
            retry: As for `run`.
            readonly: As for `run`; then nothing is in doubt.
        """
        run = self._run(
            op,
            retry,
            begin=sql.begin(readonly=readonly),
            readonly=readonly,
            resolve=not readonly,
            record=record,
            patient=True,
        )
        result: T = await run.to_the_end()
        return result

    def _run(
        self,
        op: AnyOperation[Any],
        retry: RetryPolicy | None,
        *,
        begin: str | None,
        resolve: bool,
        readonly: bool = False,
        timeout: float | None = None,
        record: CommitRecord | None = None,
        patient: bool = False,
    ) -> Run:
        """What is asked for, checked."""
        op = to_operation(op)
        check_policy(retry)
        settings = self.settings
        started = settings.clock()
        call = Call(
            op=op,
            policy=op.policy if retry is None else retry,
            begin=begin,
            readonly=readonly,
            timeout=timeout,
            deadline=math.inf if timeout is None else started + positive_seconds("deadline", timeout),
            limit=op.limit if retry is None else None,
            resolve=resolve,
            record=record,
            patient=patient,
        )
        if settings.budget is not None:
            settings.budget.deposit()
        return Run(call=call, capacity=self._capacity, tokens=self._tokens, attempts=Attempts(since=started))

    # --- plain code

    def transaction(
        self,
        *,
        isolation: sql.Isolation | None = None,
        readonly: bool = False,
        deferrable: bool = False,
        deadline: float | None = None,
        resolve_commit: bool = False,
    ) -> AbstractAsyncContextManager[Connection]:
        """One transaction for plain code: `async with engine.transaction() as conn`.

        COMMIT at the end, ROLLBACK on an error; no retry. Operations join it: `await op(conn)`. It may be
        entered in one task and left in another.

        Args:
            isolation: As for `run`.
            readonly: As for `run`.
            deferrable: As for `run`.
            deadline: Seconds for all of it. Then the block is cancelled, where the task that entered it is in
                it; where it is not (an async generator waits at its `yield`), the connection is thrown away.
            resolve_commit: When the answer to COMMIT is lost, look up what became of it: committed is no
                error, not committed is `TransactionAborted`, and `CommitUnknown` where it can't be known.

        Raises:
            PolicyError: Options that don't fit together.
        """
        begin = sql.begin(isolation, readonly=readonly, deferrable=deferrable)
        return Transaction(
            self._capacity,
            begin,
            readonly=readonly,
            seconds=None if deadline is None else positive_seconds("deadline", deadline),
            record=self._record() if resolve_commit and not readonly else None,
        )

    def _record(self) -> CommitRecord:
        return XidRecord() if self._tokens is None else self._tokens.record()

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
        capacity = self._capacity
        checkout = await capacity.acquire()
        try:
            result = await getattr(checkout.conn, method)(*args, **kwargs)
        except BaseException as exc:
            gone = is_gone(checkout.conn)
            verdict = classify(exc, overrides=self.settings.verdicts, closed=gone, phase=Phase.STATEMENT)
            explain(exc, verdict)
            # The driver has asked the server to end the statement: where it does so in time, the connection
            # is as good as before.
            ended = type(exc) is TimeoutError and kwargs.get("timeout") is not None
            await capacity.release(
                checkout,
                error=verdict,
                lost=isinstance(exc, Exception) and verdict.evict and not ended,
                seconds=self.settings.bounds.grace if ended else None,
            )
            raise
        await capacity.release(checkout)
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
    def settings(self) -> Settings:
        """What all parts of this engine share, for code that is built on it."""
        return self._capacity.settings
