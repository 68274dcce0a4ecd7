"""`batch`: one transaction, many items, bad ones set aside.

Here the batch is driven. The chooser (`spans.py`) says which span is next; a writer (`writers/`) writes it
behind a savepoint; where that fails, `judging.py` says what it means, and what it says is done here: undo,
wait, set aside, raise.

The first span has no savepoint of its own where nothing was done since BEGIN: where it fails, ROLLBACK and
BEGIN undo it, in the message that goes anyway. So a clean batch of one span makes no subtransaction, and
takes one transaction id instead of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Generic, TypeVar

import anyio

from dbop_raw.batching.costs import CostModel
from dbop_raw.batching.judging import (
    ConstraintChecks,
    Decision,
    Judgement,
    choose_constraint_checks,
    forward_references,
    judge,
    too_many,
)
from dbop_raw.batching.result import BatchResult, Failed
from dbop_raw.batching.spans import Spans, Step
from dbop_raw.batching.writers.protocol import WriteFailed, Writer
from dbop_raw.driver import sql
from dbop_raw.events import BatchFinished, ItemFailed
from dbop_raw.failure.errors import PolicyError, RetriesExhausted, SkipLimitExceeded
from dbop_raw.failure.policy import Attempts, RetryPolicy
from dbop_raw.failure.sqlstate import Verdict
from dbop_raw.pipeline.operation import Operation
from dbop_raw.pipeline.retry import check_policy, delay_before_retry
from dbop_raw.session.frame import Frame
from dbop_raw.session.scope import Scope

__all__ = ["Batch", "batch"]

Item = TypeVar("Item")
R = TypeVar("R")

_ONCE = RetryPolicy(attempts=1)
# So many items are alone with an error that may be the statement's, before it is believed to be.
_MOST_DOUBTS = 3


class Batch(Generic[Item, R]):
    """A writer with its options: call it with items to get an operation.

    What one run measured serves the next (`CostModel`), so keep it and use it again.
    """

    def __init__(self, writer: Writer[Item, R], policy: RetryPolicy | None, skip_limit: int | None) -> None:
        self._writer = writer
        self._policy = policy
        self._skip_limit = skip_limit
        self._costs = CostModel()
        self._name = writer.name

    def __repr__(self) -> str:
        """As it is written."""
        return f"batch({self._name})"

    @property
    def writer(self) -> Writer[Item, R]:
        """What writes the items."""
        return self._writer

    def __call__(self, items: Sequence[Item]) -> Operation[BatchResult[Item, R]]:
        """Make the operation that writes `items`.

        Args:
            items: A sequence, since a batch may read them more than once. They must not change meanwhile.

        Raises:
            TypeError: They are no sequence, or one str or bytes.
        """
        if not isinstance(items, Sequence) or isinstance(items, (str, bytes)):
            raise TypeError(
                f"a batch takes a sequence of items, not a {type(items).__name__}: use list(…), or ingest() "
                "for a stream"
            )
        if not isinstance(items, (list, tuple)):
            # Spans of it are cut out, and not every sequence can do that (a deque can't).
            items = list(items)

        async def step(scope: Scope, frame: Frame) -> BatchResult[Item, R]:
            run = _Run(self._writer, items, scope, self._policy, self._skip_limit, self._costs)
            # Whatever follows the batch, more follows each of its spans.
            with scope.running(frame if frame.more_follows else frame._replace(more_follows=True)):
                return await run.run(more_follows=frame.more_follows)

        return Operation(step, self._name, self._policy, f"{self!r}(<{len(items)} items>)")


def batch(
    writer: Writer[Item, R], *, retry: RetryPolicy | None = None, skip_limit: int | None = None
) -> Batch[Item, R]:
    """Write many items in one atomic transaction.

    Each is written exactly once or is in `failed` exactly once, whatever the mix of errors. The result is
    data: look at `failed`.

    A permanent failure costs its own item only, also where the client finds it (a wrong Python type). An
    error that every item would share (class 42, disk full) is raised at once. Deferred constraints are
    checked at the end of the batch and blamed on their item.

    Args:
        writer: `each(make_op)`, `execute_many(sql)`, `copy_into(table, columns=…)` or `copy_text(table,
            columns=…)`.
        retry: What a savepoint can repair is tried again there under this policy, for the item it concerns;
            an item that outlasts its tries is in `failed`. What needs a new transaction or connection leaves
            the batch, and the run around it starts the whole again, under the same policy if it has none of
            its own. None: nothing is tried again.
        skip_limit: How many items may fail; one more raises `SkipLimitExceeded`, and nothing is written.
            None: any number.

    Returns:
        Call it with a sequence of items to get an operation, whose result is a `BatchResult`.

    Raises:
        PolicyError: `writer` is none, or an option is not allowed.
    """
    for needed in ("write", "write_rows", "name", "per_item"):
        if not hasattr(writer, needed):
            raise PolicyError(
                f"batch() got an object of type {type(writer).__name__}: give a writer: each(…), "
                "execute_many(…), copy_into(…) or copy_text(…)"
            )
    check_policy(retry)
    if skip_limit is not None and (
        isinstance(skip_limit, bool) or not isinstance(skip_limit, int) or skip_limit < 0
    ):
        raise PolicyError(
            f"skip_limit={skip_limit!r} is not allowed: give a whole number of at least 0, or None"
        )
    return Batch(writer, retry, skip_limit)


class _Run(Generic[Item, R]):
    """One run of a batch in one transaction: mutable, used once."""

    def __init__(
        self,
        writer: Writer[Item, R],
        items: Sequence[Item],
        scope: Scope,
        policy: RetryPolicy | None,
        skip_limit: int | None,
        costs: CostModel,
    ) -> None:
        self._writer = writer
        self._items = items
        self._scope = scope
        self._policy = policy or _ONCE
        self._skip_limit = skip_limit
        self._costs = costs
        self._spans = Spans(0, costs)
        self._failed: dict[int, Failed[Item]] = {}
        self._results: list[R | None] = []
        # How often an item of the span search at hand was tried, for those that failed for a passing reason.
        self._attempts: dict[int, Attempts] = {}
        self._retries_before = scope.retries
        # Is the statement known to be right? Not before an item got through, or was refused for its own sake.
        self._proven = False
        # The errors that are the statement's fault, if it is wrong.
        self._doubts: list[Exception] = []
        # Is each statement checked for all constraints? Then a row that refers to a later one is refused for
        # now.
        self._constraints_immediate = False

    async def run(self, *, more_follows: bool) -> BatchResult[Item, R]:
        """Write all of it, inside the transaction that the scope is in.

        Args:
            more_follows: Will more than COMMIT follow in that transaction?
        """
        if not self._scope.transactional:
            raise PolicyError(
                "a batch needs a transaction: leave out autocommit=True, or call it inside "
                "engine.transaction()"
            )
        if self._items:
            await self._write_all(more_follows=more_follows)
            if self._doubts and not self._proven:
                raise self._doubts[0]
        return self._result()

    # --- all items, and when constraints are checked

    async def _write_all(self, *, more_follows: bool) -> None:
        scope, everything = self._scope, range(len(self._items))
        checks = choose_constraint_checks(
            more_follows=more_follows, constraints_immediate=scope.constraints_immediate
        )
        if checks is ConstraintChecks.IMMEDIATE:
            scope.check_at_commit = False
            await self._write_with_constraints_immediate(everything)
        elif checks is ConstraintChecks.AT_COMMIT:
            scope.check_at_commit = True
            await self._write_spans(everything)
        else:
            scope.control.savepoint()
            try:
                await self._write_spans(everything)
                if not await self._constraints_hold():
                    scope.control.rollback_to()
                    self._failed.clear()
                    await self._write_with_constraints_immediate(everything)
            except BaseException:
                scope.control.abandon()
                raise
            scope.control.release()

    async def _constraints_hold(self) -> bool:
        """Check deferred constraints now, without making them immediate for what follows."""
        scope = self._scope
        scope.control.savepoint()
        scope.control.push(sql.CHECK_DEFERRED)
        try:
            await scope.flush()
        except Exception as exc:
            if not scope.verdict(exc).item:
                raise
            return False
        finally:
            # Undone either way: what follows in this transaction may defer its own again.
            scope.control.abandon()
        return True

    async def _write_with_constraints_immediate(self, indexes: Sequence[int]) -> None:
        """Write; from here to the transaction's end each statement checks all constraints."""
        self._scope.control.push(sql.CHECK_DEFERRED)
        # By itself: what was violated before this batch is raised here, and no item is blamed for it.
        await self._scope.flush()
        self._constraints_immediate = True
        await self._write_spans(indexes)
        await self._retry_forward_references()
        self._constraints_immediate = False
        self._check_limit()

    async def _retry_forward_references(self) -> None:
        """Try rows that may refer to a later one of the batch again, now that the others are in.

        As long as that helps: a row may refer to one that was itself tried again.
        """
        while waiting := forward_references(self._failed):
            before = len(self._failed)
            for index in waiting:
                del self._failed[index]
            await self._write_spans(sorted(waiting))
            # What refused an item in its own turn counts, not what later items have taken from it since.
            self._failed.update({i: failed for i, failed in waiting.items() if i in self._failed})
            if len(self._failed) == before:
                return

    # --- spans

    async def _write_spans(self, indexes: Sequence[int]) -> None:
        """Write the items at `indexes`, in order; those that can't be written are set aside."""
        whole = len(indexes) == len(self._items)
        view = self._items if whole else [self._items[index] for index in indexes]
        per_item = self._writer.per_item
        self._spans = Spans(len(view), self._costs, per_item=per_item)
        self._attempts.clear()
        if per_item and not self._results:
            self._results = [None] * len(self._items)
        while (step := self._spans.next()) is not None:
            failed = await self._try(step, view, indexes)
            # Judged out here, so that what is raised carries no trace of our own signal.
            if failed is not None:
                judgement = judge(step, failed, self._scope.verdict)
                if step.way == "write":
                    judgement = self._settled(step, judgement, failed)
                await self._follow(judgement, failed.error, indexes)
        self._spans.finish()

    def _settled(self, step: Step, judgement: Judgement, failed: WriteFailed) -> Judgement:
        """Settle a doubt, whether the statement or an item's value is wrong, by what other items showed."""
        culprit, named = judgement.culprit, judgement.culprit is not None
        if judgement.decision is not Decision.DOUBT:
            if judgement.decision is Decision.BLAME and named and not failed.client:
                self._proven = True
            return judgement
        if self._writer.per_item and named and culprit != step.lo:
            self._proven = True
        alone = step.hi - step.lo == 1
        if not self._proven and alone:
            self._doubts.append(failed.error)
        if not self._proven and (len(self._doubts) >= _MOST_DOUBTS or len(self._items) == 1):
            return replace(judgement, decision=Decision.RAISE)
        # As long as nothing is proven, the search goes on until an item is alone with its error.
        return replace(judgement, decision=Decision.BLAME, culprit=culprit if self._proven or alone else None)

    async def _try(self, step: Step, view: Sequence[Item], indexes: Sequence[int]) -> WriteFailed | None:
        """Write one span behind its savepoint, or BEGIN; return why it failed, if it did.

        What closes or undoes the savepoint is left for the next message.
        """
        scope, writer = self._scope, self._writer
        control, clock = scope.control, scope.settings.clock
        control.savepoint(or_begin=True)
        started = clock()
        try:
            if step.way == "rows":
                tried = await writer.write_rows(scope, view, step.lo, step.hi, self._costs.failure_rate)
                self._spans.rows([failure.index for failure in tried.failures], tried.seconds)
                # It was executed, whatever came of it.
                self._proven = True
                for failure in tried.failures:
                    self._set_aside(indexes[failure.index], failure.error, scope.verdict(failure.error))
            else:
                results = await writer.write(scope, view, step.lo, step.hi)
                self._spans.wrote(clock() - started)
                self._proven = True
                if results:
                    for index, result in zip(range(step.lo, step.hi), results, strict=True):
                        self._results[indexes[index]] = result
        except WriteFailed as exc:
            control.abandon()
            return exc
        except BaseException:
            control.abandon()
            raise
        control.release()
        return None

    async def _follow(self, judgement: Judgement, error: Exception, indexes: Sequence[int]) -> None:
        """Do what the judgement of a failed span says."""
        decision, culprit = judgement.decision, judgement.culprit
        if decision is Decision.RAISE:
            raise error
        if decision in (Decision.NO_ROWS_HERE, Decision.NO_ROWS):
            self._spans.rows_failed(possible=decision is Decision.NO_ROWS_HERE)
            return
        if isinstance(error, TimeoutError) and not getattr(error, "by_server", False):
            # A timeout, ours or the driver's, that the server did not keep: find out now, and not for long,
            # whether it still answers.
            await self._scope.repair(error, seconds=self._scope.settings.bounds.grace)
        if (
            decision is Decision.RETRY
            and culprit is not None
            and await self._wait_for(culprit, error, judgement.verdict)
        ):
            self._spans.again(culprit)
            return
        found = self._spans.failed(culprit)
        if found is not None:
            self._set_aside(indexes[found], error, judgement.verdict)

    async def _wait_for(self, culprit: int, error: Exception, verdict: Verdict) -> bool:
        """Wait until the item may be tried again; return False when it has used up its attempts."""
        settings = self._scope.settings
        attempts = self._attempts.setdefault(culprit, Attempts(since=settings.clock()))
        attempts.count += 1
        try:
            delay = delay_before_retry(
                settings,
                self._writer.name,
                self._policy,
                attempts,
                error,
                verdict,
                level="savepoint",
                deadline=anyio.current_effective_deadline(),
            )
        except RetriesExhausted:
            return False
        self._scope.retries += 1
        await anyio.sleep(delay)
        return True

    def _set_aside(self, index: int, error: Exception, verdict: Verdict) -> None:
        self._failed[index] = Failed(index, self._items[index], error, verdict)
        if self._writer.per_item:
            self._results[index] = None
        self._check_limit()

    def _check_limit(self) -> None:
        limit = self._skip_limit
        if limit is None:
            return
        failed = too_many(self._failed, limit, constraints_immediate=self._constraints_immediate)
        if failed:
            raise SkipLimitExceeded(limit=limit, failed=failed)

    # --- the end

    def _result(self) -> BatchResult[Item, R]:
        failed = tuple(self._failed[index] for index in sorted(self._failed))
        result: BatchResult[Item, R] = BatchResult(
            total=len(self._items),
            written=len(self._items) - len(failed),
            failed=failed,
            results=tuple(self._results),
            retries=self._scope.retries - self._retries_before,
        )
        if self._scope.settings.observer is not None:
            self._report(result)
        return result

    def _report(self, result: BatchResult[Item, R]) -> None:
        """Tell the observer.

        At the end, and not when an item was set aside: it may have been written after all.
        """
        name, emit = self._writer.name, self._scope.settings.emit
        for one in result.failed:
            said = one.verdict
            emit(ItemFailed(writer=name, index=one.index, sqlstate=said.sqlstate, condition=said.condition))
        emit(
            BatchFinished(
                writer=name,
                total=result.total,
                written=result.written,
                failed=len(result.failed),
                retries=result.retries,
            )
        )
