"""`ingest`: a stream of items, as many transactions as it takes.

Workers pull chunks from one reader, so nothing is read ahead of them. Each chunk is one transaction, retried
whole; what could not be written goes to the rejects, and with a ledger the chunk's row stands or falls with
the chunk.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import anyio
import asyncpg

from dbop_raw.batching.result import BatchResult, Failed
from dbop_raw.engine.commit import RowRecord
from dbop_raw.engine.engine import Engine
from dbop_raw.events import ChunkFinished, IngestFinished, notify
from dbop_raw.failure.errors import PolicyError, SkipLimitExceeded
from dbop_raw.failure.policy import RetryPolicy, positive_seconds, whole_number
from dbop_raw.ingestion import ledger as ledgers
from dbop_raw.ingestion.ledger import Ledger
from dbop_raw.ingestion.reader import Chunk, Reader
from dbop_raw.ingestion.rejects import Reject, RejectSink
from dbop_raw.ingestion.report import IngestReport, Tally
from dbop_raw.pipeline.operation import Operation, to_operation
from dbop_raw.pipeline.retry import check_policy
from dbop_raw.session.frame import Frame
from dbop_raw.session.scope import Scope
from dbop_raw.session.session import Session

__all__ = ["RETRY", "Write", "ingest"]

Item = TypeVar("Item")

RETRY = RetryPolicy(attempts=6, first_delay=0.05, max_delay=5.0)
"""How an ingest retries a chunk unless told otherwise: a restart of the server is survived."""

Write = Callable[[Sequence[Item]], Operation[BatchResult[Any, Any]]]
"""What `batch` gives: makes the operation that writes a chunk's items."""


async def ingest(
    engine: Engine,
    source: Iterable[Item] | AsyncIterable[Item],
    write: Write[Item],
    *,
    size: int = 1000,
    linger: float | None = None,
    workers: int = 4,
    retry: RetryPolicy = RETRY,
    rejects: RejectSink | None = None,
    skip_limit: int | None = None,
    order_by: Callable[[Item], Any] | None = None,
    ledger: Ledger | None = None,
    progress: Callable[[IngestReport], None] | None = None,
) -> IngestReport:
    """Write a stream of items in chunks, each chunk one transaction.

    A cancellation stops it in order: no chunk is begun, those in flight are rolled back, or finish if their
    COMMIT is on its way; the last call of `progress` says how many. Any other error that a chunk raises stops
    it likewise, and is raised unchanged.

    Args:
        engine: Its pool should have a connection for each worker.
        source: Any iterable or async iterable of items. It is read one chunk at a time, by a worker that is
            free: never further ahead than the workers can take.
        write: What `batch(…)` gives.
        size: Items in a chunk.
        linger: Seconds after which a chunk that is not full goes out; async sources only. None: it waits
            until it is full.
        workers: Chunks in flight at a time.
        retry: How often a chunk is started, each time whole. Its COMMIT, if in doubt, is looked up.
        rejects: Gets the items that could not be written. Without a ledger, after their chunk's COMMIT; with
            one, before, so that after a crash one may stand there twice, with the same index, but none is
            missing.
        skip_limit: How many items may be rejected in all. The chunk that goes above it is rolled back. None:
            any number.
        order_by: A key that sorts each chunk, so that upserts of several workers lock rows in one order and
            don't deadlock.
        ledger: Remembers which chunks are in: run again after a stop, the same source goes on where it
            stopped.
        progress: Called with a report after each chunk, and once more at the end, also when the ingest is
            stopped or fails.

    Returns:
        What was read, written and rejected.

    Raises:
        PolicyError: Options that are not allowed or don't fit together.
        SkipLimitExceeded: More items were rejected than `skip_limit` allows.
        RetriesExhausted: A chunk's retries gave up; the last error is its cause.
        CommitUnknown: A COMMIT in doubt could not be looked up.

    """
    _check_options(write, size=size, workers=workers, skip_limit=skip_limit, linger=linger, ledger=ledger)
    check_policy(retry)
    reader = Reader(source, size, linger)
    job = _Ingest(
        engine=engine,
        reader=reader,
        write=write,
        size=size,
        retry=retry,
        rejects=rejects,
        skip_limit=skip_limit,
        order_by=order_by,
        ledger=ledger,
        progress=progress,
    )
    try:
        return await job.run(workers)
    finally:
        await reader.close()


def _check_options(
    write: object, *, size: int, workers: int, skip_limit: int | None, linger: float | None, ledger: object
) -> None:
    whole_number("size", size, 1)
    whole_number("workers", workers, 1)
    if skip_limit is not None:
        whole_number("skip_limit", skip_limit, 0)
    if linger is not None:
        positive_seconds("linger", linger)
        if ledger is not None:
            raise PolicyError(
                "linger and ledger don't go together: the ledger needs the same chunks again, and linger "
                "cuts them by the clock"
            )
    if not callable(write):
        raise PolicyError(
            f"write= is an object of type {type(write).__name__}, which can't be called: give what batch(…) "
            "makes"
        )


@dataclass(slots=True, kw_only=True)
class _Ingest(Generic[Item]):
    """One ingest on its way; the options are those of `ingest`."""

    engine: Engine
    reader: Reader[Item]
    write: Write[Item]
    size: int
    retry: RetryPolicy
    rejects: RejectSink | None
    skip_limit: int | None
    order_by: Callable[[Item], Any] | None
    ledger: Ledger | None
    progress: Callable[[IngestReport], None] | None
    sink_lock: anyio.Lock = field(default_factory=anyio.Lock)
    # The chunks that the ledger has, with their numbers of items.
    done: dict[int, int] = field(default_factory=dict)
    # Rejects of chunks that are not committed yet: they count for the skip limit of all.
    failing: dict[int, int] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)

    async def run(self, workers: int) -> IngestReport:
        """All of it; the error of a chunk is raised as it is, not in a group."""
        error: Exception | None = None
        try:
            if self.ledger is not None:
                await self._open_ledger(self.ledger)
            async with anyio.create_task_group() as group:

                async def work() -> None:
                    nonlocal error
                    try:
                        await self._work()
                    except Exception as exc:  # noqa: BLE001 - raised below
                        error = error or exc
                        group.cancel_scope.cancel()

                for _ in range(workers):
                    group.start_soon(work)
            self.tally.finished = error is None
        finally:
            report = self._tell_end()
        if error is not None:
            raise error
        return report

    async def _open_ledger(self, ledger: Ledger) -> None:
        await self.engine.run(lambda conn: ledgers.install(ledger, conn), retry=self.retry, autocommit=True)
        self.done = await self.engine.run(
            lambda conn: ledger.done(conn, self.size), retry=self.retry, readonly=True
        )

    async def _work(self) -> None:
        """One worker: chunk after chunk, to the source's end."""
        while (chunk := await self.reader.next()) is not None:
            if chunk.number in self.done:
                self._skip(chunk)
                continue
            self.tally.in_flight += 1
            if self.order_by is not None:
                chunk = _sorted(chunk, self.order_by)
            await self.write_chunk(chunk)

    def _skip(self, chunk: Chunk[Item]) -> None:
        """Pass by a chunk that the ledger has."""
        known = self.done.get(chunk.number)
        if known is not None and known != len(chunk.items):
            raise PolicyError(
                f"chunk {chunk.number} has {len(chunk.items)} items now and had {known} when the ledger was "
                "written: the source is not the same; use another ledger name for it"
            )
        self.tally.skip(len(chunk.items))
        self._tell(chunk, 0, 0, skipped=True)

    async def write_chunk(self, chunk: Chunk[Item]) -> None:
        """Write one chunk in one transaction, and keep its rejects."""
        record = None
        if self.ledger is not None:
            record = self.ledger.record(chunk.number, self.size, len(chunk.items))
        attempt = _Attempts(self, chunk, record)
        try:
            result = await self.engine.run_recorded(
                Operation(attempt.step, "ingest chunk"), record, retry=self.retry
            )
        except asyncpg.UniqueViolationError as exc:
            if self.ledger is None or exc.table_name != self.ledger.table:
                raise
            # Another process with the same ledger was first, or our own COMMIT of a run before.
            self._landed(chunk)
            self._skip(chunk)
            return
        except asyncio.CancelledError:
            if (committed := attempt.committed()) is not None:
                # The COMMIT was on its way, and came through: the chunk is in, and what it rejected must not
                # be lost.
                await self._conclude(chunk, committed, attempt.count)
            raise
        await self._conclude(chunk, result, attempt.count)

    async def _conclude(self, chunk: Chunk[Item], result: BatchResult[Item, Any], attempts: int) -> None:
        """A chunk is committed: count it, keep its rejects, and tell."""
        self._landed(chunk)
        self.tally.add(result, attempts)
        if self.ledger is None:
            await self.reject(chunk, result.failed)
        self._tell(chunk, result.written, len(result.failed), skipped=False)

    def _landed(self, chunk: Chunk[Item]) -> None:
        """A chunk is in: by this call, or by another that has the same ledger."""
        self.tally.in_flight -= 1
        self.failing.pop(chunk.number, None)

    def check_limit(self, chunk: Chunk[Item], result: BatchResult[Item, Any]) -> None:
        """Raise `SkipLimitExceeded` when this chunk's rejects are too many, with those of all others."""
        self.failing[chunk.number] = len(result.failed)
        rejected = self.tally.rejected + sum(self.failing.values())
        if self.skip_limit is not None and rejected > self.skip_limit:
            raise SkipLimitExceeded(limit=self.skip_limit, failed=result.failed, total=rejected)

    async def reject(self, chunk: Chunk[Item], failed: Sequence[Failed[Item]]) -> None:
        """Hand rejects to the sink, one chunk at a time."""
        if self.rejects is None or not failed:
            return
        rejects = [_reject(chunk.indexes[one.index], one) for one in failed]
        rejects.sort(key=lambda reject: reject.index)
        # Their chunk may be committed already: a cancellation must not lose them.
        with anyio.CancelScope(shield=self.ledger is None):
            async with self.sink_lock:
                await self.rejects.write(rejects)

    def _tell(self, chunk: Chunk[Item], written: int, rejected: int, *, skipped: bool) -> None:
        """Tell the observer and `progress` of a chunk."""
        observer = self.engine.settings.observer
        if observer is not None:
            event = ChunkFinished(
                chunk=chunk.number, read=len(chunk.items), written=written, rejected=rejected, skipped=skipped
            )
            notify(observer, event)
        if self.progress is not None:
            self.progress(self.tally.report())

    def _tell_end(self) -> IngestReport:
        """Tell the observer and `progress` of the end, whatever it was."""
        report = self.tally.report()
        observer = self.engine.settings.observer
        if observer is not None:
            event = IngestFinished(
                read=report.read,
                written=report.written,
                rejected=report.rejected,
                chunks=report.chunks,
                seconds=report.seconds,
                stopped=not report.finished,
            )
            notify(observer, event)
        if self.progress is not None:
            self.progress(report)
        return report


class _Attempts(Generic[Item]):
    """The attempts at one chunk: its transaction's body, and what is known when one of them is cancelled."""

    def __init__(self, job: _Ingest[Item], chunk: Chunk[Item], record: RowRecord | None) -> None:
        self._job = job
        self._chunk = chunk
        self._record = record
        # With a ledger rejects are handed over before COMMIT, and an attempt after it finds the same again.
        self._told: set[int] = set()
        self._last: tuple[Scope, BatchResult[Item, Any]] | None = None
        self.count = 0
        """How often the body was started."""

    async def step(self, scope: Scope, frame: Frame) -> BatchResult[Item, Any]:
        """All up to COMMIT."""
        self.count += 1
        job, chunk = self._job, self._chunk
        result = await to_operation(job.write(chunk.items)).step(scope, frame)
        job.check_limit(chunk, result)
        if self._record is not None:
            # Where no item reached the server, the chunk's row must all the same.
            await scope.flush(frame)
            await job.reject(chunk, [one for one in result.failed if one.index not in self._told])
            self._told.update(one.index for one in result.failed)
        self._last = scope, result
        return result

    def committed(self) -> BatchResult[Item, Any] | None:
        """Give the result of the last attempt if its COMMIT came through, though its caller was cancelled."""
        if self._last is None:
            return None
        scope, result = self._last
        return result if isinstance(scope, Session) and scope.committed else None


def _reject(index: int, failed: Failed[Any]) -> Reject:
    return Reject(
        index=index,
        item=failed.item,
        sqlstate=failed.verdict.sqlstate,
        condition=failed.verdict.condition,
        message=str(failed.error),
        constraint=getattr(failed.error, "constraint_name", None),
    )


def _sorted(chunk: Chunk[Item], key: Callable[[Item], Any]) -> Chunk[Item]:
    pairs = sorted(zip(chunk.indexes, chunk.items, strict=True), key=lambda pair: key(pair[1]))
    return Chunk(chunk.number, [index for index, _ in pairs], [item for _, item in pairs])
