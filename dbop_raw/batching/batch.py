"""`batch`: one transaction, many items, bad ones set aside.

The chooser says which span; this runs it behind a savepoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import anyio

from dbop_raw.batching.inserver import Unsupported
from dbop_raw.batching.spans import Memory, Spans, Step
from dbop_raw.batching.writers import WriteFailed, Writer
from dbop_raw.driver import sql
from dbop_raw.events import BatchFinished, ItemFailed
from dbop_raw.failure.errors import OperationTimeout, PolicyError, RetriesExhausted, SkipLimitExceeded
from dbop_raw.failure.policy import Attempts, RetryPolicy
from dbop_raw.failure.sqlstate import Repair, Verdict
from dbop_raw.pipeline.operation import Operation
from dbop_raw.pipeline.retry import check_policy, delay_before_retry
from dbop_raw.session.frame import Frame
from dbop_raw.session.scope import Scope

__all__ = ["Batch", "BatchResult", "Failed", "batch"]

Item = TypeVar("Item")
Item_co = TypeVar("Item_co", covariant=True)
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

_ONCE = RetryPolicy(attempts=1)
# A foreign key that is not met may be met by a later item.
_WAITS = "23503"


@dataclass(frozen=True, slots=True)
class Failed(Generic[Item_co]):
    """An item that was set aside."""

    index: int
    """Its place in the batch, from 0."""
    item: Item_co = field(repr=False)
    error: Exception
    verdict: Verdict
    """Its `transient` is true where the item outlasted its retries: try it again later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult(Generic[Item_co, R_co]):
    """What became of each item: written once, or in `failed` once."""

    total: int
    written: int
    failed: tuple[Failed[Item_co], ...]
    """In the order of the input."""
    results: tuple[R_co | None, ...]
    """For `each`: the operations' results by the items' index, None where an item failed. For the other
    writers: empty.
    """
    retries: int
    """Starts after the first, of items or spans, for passing reasons."""


class Batch(Generic[Item, R]):
    """Call it with items to get an operation. What one batch learned serves the next."""

    def __init__(self, writer: Writer[Item, R], policy: RetryPolicy | None, skip_limit: int | None) -> None:
        self._writer = writer
        self._policy = policy
        self._skip_limit = skip_limit
        self._memory = Memory()
        self._name = writer.name

    def __repr__(self) -> str:
        """As it is written."""
        return f"batch({self._name})"

    def __call__(self, items: Sequence[Item]) -> Operation[BatchResult[Item, R]]:
        """The operation that writes `items`.

        Raises `TypeError` when they are no sequence: a batch may read them more than once.
        """
        if not isinstance(items, Sequence) or isinstance(items, (str, bytes)):
            message = (
                f"a batch takes a sequence of items, not a {type(items).__name__}: use list(…), or ingest() "
                "for a stream"
            )
            raise TypeError(message)
        if not isinstance(items, (list, tuple)):
            # Spans of it are cut out, and not every sequence can do that (a deque can't).
            items = list(items)

        async def step(scope: Scope, frame: Frame) -> BatchResult[Item, R]:
            with scope.running(frame if frame.more_follows else frame._replace(more_follows=True)):
                return await _Writing(
                    self._writer, items, scope, self._policy, self._skip_limit, self._memory
                ).run(last=not frame.more_follows)

        return Operation(step, self._name, self._policy, f"{self!r}(<{len(items)} items>)")


def batch(
    writer: Writer[Item, R], *, retry: RetryPolicy | None = None, skip_limit: int | None = None
) -> Batch[Item, R]:
    """Write many items in one atomic transaction.

    Each is written exactly once or is in `failed` exactly once, whatever the mix of errors.

    `writer`: `each(make_op)`, `execute_many(sql)`, `copy_into(table, columns=…)` or `copy_text(table,
    columns=…)`.
    `retry`: what a savepoint can repair is tried again there, for the item it concerns; an item that outlasts
    its tries is in `failed`. What needs a new transaction or connection leaves the batch, and the run around
    it starts the whole again, under the same policy if it has none of its own.
    `skip_limit`: how many items may fail; one more raises `SkipLimitExceeded`, and nothing is written. None:
    any number.

    A permanent failure costs its own item only, also where the client finds it (a wrong Python type). An
    error that every item would share (class 42, disk full) is raised at once. Deferred constraints are
    checked at the end of the batch and blamed on their item.

    The result is data: look at `failed`.
    """
    for needed in ("write", "write_rows", "name", "opaque"):
        if not hasattr(writer, needed):
            message = (
                f"batch() got an object of type {type(writer).__name__}: give a writer: each(…), "
                "execute_many(…), copy_into(…) or copy_text(…)"
            )
            raise PolicyError(message)
    check_policy(retry)
    if skip_limit is not None and (
        isinstance(skip_limit, bool) or not isinstance(skip_limit, int) or skip_limit < 0
    ):
        message = f"skip_limit={skip_limit!r} is not allowed: give a whole number of at least 0, or None"
        raise PolicyError(message)
    return Batch(writer, retry, skip_limit)


class _Writing(Generic[Item, R]):
    """One batch on its way: mutable, used once."""

    def __init__(
        self,
        writer: Writer[Item, R],
        items: Sequence[Item],
        scope: Scope,
        policy: RetryPolicy | None,
        skip_limit: int | None,
        memory: Memory,
    ) -> None:
        self._writer = writer
        self._items = items
        self._scope = scope
        self._policy = policy or _ONCE
        self._skip_limit = skip_limit
        self._memory = memory
        self._spans = Spans(0, memory)
        self._failed: dict[int, Failed[Item]] = {}
        self._results: list[R | None] = []
        self._strikes: dict[int, Attempts] = {}
        self._retries_before = scope.retries
        # Constraints are checked at once, so a row that refers to a later one is refused for now.
        self._early = False

    async def run(self, *, last: bool) -> BatchResult[Item, R]:
        """All of it, inside the transaction that the scope is in."""
        scope = self._scope
        if not scope.transactional:
            message = (
                "a batch needs a transaction: leave out autocommit=True, or call it inside "
                "engine.transaction()"
            )
            raise PolicyError(message)
        if self._items:
            await self._write_all(last=last)
        return self._result()

    def _result(self) -> BatchResult[Item, R]:
        total, failed, scope = len(self._items), len(self._failed), self._scope
        retries = scope.retries - self._retries_before
        if scope.settings.observer is not None:
            name = self._writer.name
            # Now, and not when it was set aside: an item may have been written after all.
            for one in sorted(self._failed.values(), key=lambda one: one.index):
                said = one.verdict
                scope.settings.emit(
                    ItemFailed(writer=name, index=one.index, sqlstate=said.sqlstate, condition=said.condition)
                )
            scope.settings.emit(
                BatchFinished(
                    writer=name, total=total, written=total - failed, failed=failed, retries=retries
                )
            )
        return BatchResult(
            total=total,
            written=total - failed,
            failed=tuple(self._failed[index] for index in sorted(self._failed)),
            results=tuple(self._results),
            retries=retries,
        )

    async def _write_all(self, *, last: bool) -> None:
        """All items, and once more with immediate constraints where a deferred one is violated at the end.

        `last`: only COMMIT follows. It checks deferred constraints itself, at no round trip of ours; where it
        refuses, the run starts again, carefully.
        """
        scope = self._scope
        if last:
            scope.check_at_commit = not scope.constraints_immediate
            await (
                self._carefully()
                if scope.constraints_immediate
                else self._write_spans(range(len(self._items)))
            )
            return
        scope.control.savepoint()
        try:
            await self._write_spans(range(len(self._items)))
            if not await self._check_deferred():
                scope.control.rollback_to()
                self._failed.clear()
                await self._carefully()
        except BaseException:
            scope.control.abandon()
            raise
        scope.control.release()

    async def _carefully(self) -> None:
        """From here to the transaction's end each statement checks all constraints, so errors name items."""
        self._scope.control.push(sql.CHECK_DEFERRED)
        # By itself: what was violated before this batch is raised here, and no item is blamed for it.
        await self._scope.flush()
        self._early = True
        await self._write_spans(range(len(self._items)))
        await self._second_chance()
        self._early = False
        self._check_limit()

    async def _check_deferred(self) -> bool:
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

    async def _second_chance(self) -> None:
        """A row that refers to a later one of the batch is allowed by a deferred constraint.

        Try such rows again, when the others are in.
        """
        while True:
            waiting = {i: failed for i, failed in self._failed.items() if failed.verdict.sqlstate == _WAITS}
            if not waiting:
                return
            before = len(self._failed)
            for index in waiting:
                del self._failed[index]
            await self._write_spans(sorted(waiting))
            # What refused an item in its own turn counts, not what later items have taken from it since.
            self._failed.update({i: failed for i, failed in waiting.items() if i in self._failed})
            if len(self._failed) == before:
                return

    async def _write_spans(self, indexes: Sequence[int]) -> None:
        """Write the items at `indexes`, in order."""
        whole = len(indexes) == len(self._items)
        view = self._items if whole else [self._items[index] for index in indexes]
        self._spans = Spans(len(view), self._memory, opaque=self._writer.opaque)
        self._strikes.clear()
        if self._writer.opaque and not self._results:
            self._results = [None] * len(self._items)
        while (step := self._spans.next()) is not None:
            await self._step(step, view, indexes)
        self._spans.finish()

    async def _step(self, step: Step, view: Sequence[Item], indexes: Sequence[int]) -> None:
        """One span behind its savepoint, or BEGIN. What closes or undoes it is left for the next message."""
        scope, writer = self._scope, self._writer
        scope.control.savepoint(or_begin=True)
        started = anyio.current_time()
        failed: WriteFailed | None = None
        try:
            if step.way == "rows":
                density = self._memory.density
                tried = await writer.write_rows(scope, view, step.lo, step.hi, density)
                self._spans.rows([failure.index for failure in tried.failures], tried.seconds)
                for failure in tried.failures:
                    self._set_aside(indexes[failure.index], failure.error, scope.verdict(failure.error))
            else:
                results = await writer.write(scope, view, step.lo, step.hi)
                self._spans.wrote(anyio.current_time() - started)
                if results:
                    for index, result in zip(range(step.lo, step.hi), results, strict=True):
                        self._results[indexes[index]] = result
        except WriteFailed as exc:
            scope.control.abandon()
            failed = exc
        except BaseException:
            scope.control.abandon()
            raise
        else:
            scope.control.release()
        # Judged out here, so that what is raised carries no trace of our own signal.
        if failed is not None:
            await self._judge(step, failed, indexes)

    async def _judge(self, step: Step, failed: WriteFailed, indexes: Sequence[int]) -> None:
        """What a failed span means: for one item, for the search, or for the whole batch."""
        error, scope = failed.error, self._scope
        verdict = scope.verdict(error)
        final = isinstance(error, RetriesExhausted) and error.__cause__ is not None
        if final and error.__cause__ is not None:
            # The item's own retry gave up: that is final, but what it says of the item is in the cause.
            verdict = scope.verdict(error.__cause__)
        if step.way == "rows":
            self._judge_rows(error, verdict, client=failed.client)
            return
        if not final and verdict.repair in {Repair.TRANSACTION, Repair.CONNECTION, Repair.UNKNOWN}:
            raise error
        if verdict.repair is Repair.NEVER and not (
            verdict.item or (failed.client and failed.index is not None)
        ):
            raise error
        if isinstance(error, OperationTimeout) and not error.by_server:
            await scope.repair(error, seconds=scope.settings.bounds.grace)
        culprit = failed.index if step.hi - step.lo > 1 else step.lo
        if (
            verdict.repair is Repair.SAVEPOINT
            and not final
            and culprit is not None
            and await self._wait_for(culprit, error, verdict)
        ):
            self._spans.again(culprit)
            return
        found = self._spans.failed(culprit)
        if found is not None:
            self._set_aside(indexes[found], error, verdict)

    def _judge_rows(self, error: Exception, verdict: Verdict, *, client: bool) -> None:
        """The server could not try row by row: go on in spans, which show what it is about."""
        if not client and verdict.repair in {Repair.TRANSACTION, Repair.CONNECTION, Repair.UNKNOWN}:
            raise error
        # A row that can't be sent, or one that waits for a lock: here only. Anything else (no privilege, no
        # language, a type that doesn't fit): nowhere.
        here_only = client or verdict.item or verdict.repair is Repair.SAVEPOINT
        self._spans.rows_failed(possible=here_only and not isinstance(error, Unsupported))

    async def _wait_for(self, culprit: int, error: Exception, verdict: Verdict) -> bool:
        """Wait until the item may be tried again; False when it has used up its tries."""
        attempts = self._strikes.setdefault(culprit, Attempts(since=anyio.current_time()))
        attempts.count += 1
        scope = self._scope
        try:
            delay = delay_before_retry(
                scope.settings,
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
        scope.retries += 1
        await anyio.sleep(delay)
        return True

    def _set_aside(self, index: int, error: Exception, verdict: Verdict) -> None:
        self._failed[index] = Failed(index, self._items[index], error, verdict)
        if self._writer.opaque:
            self._results[index] = None
        self._check_limit()

    def _check_limit(self) -> None:
        if self._skip_limit is None or len(self._failed) <= self._skip_limit:
            return
        failed: tuple[Failed[Any], ...] = tuple(
            self._failed[index]
            for index in sorted(self._failed)
            # Items that may only have come too early are counted when they had their second chance.
            if not (self._early and self._failed[index].verdict.sqlstate == _WAITS)
        )
        if len(failed) > self._skip_limit:
            raise SkipLimitExceeded(limit=self._skip_limit, failed=failed)


Make = Callable[[Sequence[Item]], Operation[BatchResult[Item, R]]]
"""What `batch` gives, as a type to write down."""
